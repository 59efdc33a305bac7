"""Penalties R(f, f_s): functions of the trainable parameters and their source values.

Each takes `strengths`, pairs of a pattern over names and a factor, the first match counting, 1 where none does: in a
config `penalty=partial(l2_sp, strengths=(("*norm*", 0.0), ("stage4", 0.1)))`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from jft import tree

Strengths = Sequence[tuple[str, float]]


def l2(params: Mapping[str, Any], source: Mapping[str, Any], *, strengths: Strengths = ()) -> Float[Array, ""]:
    """½ Σ w²: weight decay written as a penalty. Raises UserError for a pattern that names nothing."""
    factors = _factors(params, source, strengths)
    return sum((factors[n] * _half_square(w) for n, w in params.items() if factors[n]), jnp.zeros(()))


def l2_sp(
    params: Mapping[str, Any], source: Mapping[str, Any], *, new: float = 0.1, strengths: Strengths = ()
) -> Float[Array, ""]:
    """½ Σ (w − w_source)² over the pretrained parameters + `new` · ½ Σ w² over those the source lacks.

    L2-SP: Li, Grandvalet, Davoine 2018, "Explicit inductive bias for transfer learning", equation 3; `new` is β/α.
    The magnitudes of DoRA are multiples of the source's, and are held to 1.
    Raises UserError for a pattern that names nothing.
    """
    factors = _factors(params, source, strengths)
    shared = (factors[n] * _half_square(w - source[n]) for n, w in params.items() if n in source and factors[n])
    fresh = (
        factors[n] * _half_square(w - float(n.endswith("/lora_m")))
        for n, w in params.items()
        if n not in source and factors[n]
    )
    return sum(shared, jnp.zeros(())) + new * sum(fresh, jnp.zeros(()))


def _half_square(w: Array) -> Array:
    return 0.5 * jnp.sum(jnp.square(w))


def _factors(params: Mapping[str, Any], source: Mapping[str, Any], strengths: Strengths) -> dict[str, float]:
    # Of all names, not of those that train: a pattern of a part that thaws in a later stage is no mistake in this one.
    return tree.first_match(strengths, dict.fromkeys([*params, *source]), 1.0)
