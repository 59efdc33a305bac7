"""Penalties R(f, f_s): functions of the trainable parameters and their source values."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float


def l2(params: Mapping[str, Any], source: Mapping[str, Any]) -> Float[Array, ""]:
    """½ Σ w²: weight decay written as a penalty."""
    return sum((0.5 * jnp.sum(jnp.square(w)) for w in params.values()), jnp.zeros(()))


def l2_sp(params: Mapping[str, Any], source: Mapping[str, Any], *, new: float = 0.1) -> Float[Array, ""]:
    """½ Σ (w − w_source)² over the pretrained parameters + `new` · ½ Σ w² over those the source lacks.

    L2-SP: Li, Grandvalet, Davoine 2018, "Explicit inductive bias for transfer learning", equation 3; `new` is β/α.
    """
    shared = sum((0.5 * jnp.sum(jnp.square(w - source[n])) for n, w in params.items() if n in source), jnp.zeros(()))
    fresh = sum((0.5 * jnp.sum(jnp.square(w)) for n, w in params.items() if n not in source), jnp.zeros(()))
    return shared + new * fresh
