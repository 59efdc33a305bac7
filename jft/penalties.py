"""Penalties R(f, f_s): functions of the trainable parameters and their source values.

Of low-rank updates a run gives them the kernels as they are applied, W + α/r · A B, and not A and B.

Each takes `strengths`, pairs of a pattern over names and a factor, the first match counting, 1 where none does: in a
config `penalty=partial(jft.penalties.l2_sp, strengths=(("*norm*", 0.0), ("stage4", 0.1)))`. A run refuses a pattern
that names no parameter of its model.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from jft import tree
from jft.words import Words

Strengths = Sequence[tuple[str, float]]

_whole: ContextVar[bool] = ContextVar("whole", default=False)


@contextlib.contextmanager
def whole_model() -> Iterator[None]:
    """Within it penalties are given all of a model's parameters: UserError for a pattern that names none of them.

    Elsewhere one of a part that trains in another stage, and is not in the source either, is no mistake.
    """
    token = _whole.set(True)
    try:
        yield
    finally:
        _whole.reset(token)


def l2(params: Mapping[str, Any], source: Mapping[str, Any], *, strengths: Strengths = ()) -> Float[Array, ""]:
    """½ Σ w²: weight decay written as a penalty."""
    factors = _factors(params, strengths)
    return sum((factors[n] * _half_square(w) for n, w in params.items() if factors[n]), jnp.zeros(()))


def l2_sp(
    params: Mapping[str, Any], source: Mapping[str, Any], *, new: float = 0.1, strengths: Strengths = ()
) -> Float[Array, ""]:
    """½ Σ (w − w_source)² over the pretrained parameters + `new` · ½ Σ w² over those the source lacks.

    L2-SP: Li, Grandvalet, Davoine 2018, "Explicit inductive bias for transfer learning", equation 3; `new` is β/α.
    """
    factors = _factors(params, strengths)
    shared = (factors[n] * _half_square(w - source[n]) for n, w in params.items() if n in source and factors[n])
    fresh = (factors[n] * _half_square(w) for n, w in params.items() if n not in source and factors[n])
    return sum(shared, jnp.zeros(())) + new * sum(fresh, jnp.zeros(()))


PENALTIES = Words("penalty", {"l2": l2, "l2-sp": l2_sp}, {"new": (0, 1e6)}, own="a function (params, source) -> scalar")


def _half_square(w: Array) -> Array:
    return 0.5 * jnp.sum(jnp.square(w))


def _factors(params: Mapping[str, Any], strengths: Strengths) -> dict[str, float]:
    if _whole.get():
        return tree.first_match(strengths, params, 1.0)
    return {n: next((factor for pattern, factor in strengths if tree.matches(pattern, n)), 1.0) for n in params}
