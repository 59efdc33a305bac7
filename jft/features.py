"""The frozen-prefix cache: parts that do not train are run once per image, and the rest trains on what they gave."""

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jft.models.base import Model


def cut(model: Model, trainable: Collection[str]) -> str | None:
    """The first part that trains, where a run can start from features; None where nothing is saved before it.

    >>> cut(model, {"head/kernel", "head/bias"})
    'head'
    """
    for i, part in enumerate(model.parts):
        if any(name.startswith(part + "/") for name in trainable):
            return part if i else None
    return None


Shared = dict[str, jax.Array]  # what runs of one process have kept, by `key`
MOST_SHARED = 4  # arrays: training and validation at two cuts


def key(model: Model, stop: str, variables: Mapping[str, Any], images: np.ndarray, *also: Any) -> str:
    """A hash of all that the activations before `stop` depend on: modules, their variables, the images, what else."""
    span = model.span(None, stop)
    digest = hashlib.sha256(repr([stop, [(name, model.parts[name]) for name in span], *also]).encode())
    for name in sorted(variables):
        if any(name.startswith(part + "/") for part in span):
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(variables[name]).data)
    digest.update(np.ascontiguousarray(images).data)
    return digest.hexdigest()


def share(shared: Shared, name: str, kept: jax.Array) -> None:
    """Keep activations for runs to come; the oldest go where they get too many."""
    while len(shared) >= MOST_SHARED:
        del shared[next(iter(shared))]
    shared[name] = kept


def nbytes(model: Model, stop: str | None, examples: int) -> int:
    """Bytes of the float32 activations before `stop` for so many examples, from shapes alone."""
    params, stats = model.shapes()
    x = jax.ShapeDtypeStruct((1, *model.input_shape), jnp.float32)
    y = jax.eval_shape(lambda p, s, x: model.apply(p, s, x, stop=stop)[0], params, stats, x)
    return 4 * examples * int(np.prod(y.shape))


def compute(
    eval_step: Callable[..., Float[Array, "b ..."]],
    params: Mapping[str, Any],
    batch_stats: Mapping[str, Any],
    batches: Iterable[Mapping[str, np.ndarray]],
    advance: Callable[[int], Any] = lambda n: None,
) -> Float[Array, "n ..."]:
    """What a compiled evaluation step gives for every example, once each, in the order of the batches.

    A batch's `mask` says which of its rows are examples and which are padding.
    """
    rows: list[jax.Array] = []
    for batch in batches:
        y = eval_step(params, batch_stats, batch)
        count = int(batch["mask"].sum())
        if rows:  # one batch ahead of the device and no more, so that its memory and the progress told are true
            rows[-1].block_until_ready()
        rows.append(y if count == len(y) else y[:count])
        advance(count)
    return jnp.concatenate(rows).block_until_ready()
