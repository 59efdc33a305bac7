"""The frozen-prefix cache: parts that do not train are run once per image, and the rest trains on what they gave."""

import hashlib
import importlib.metadata
import logging
import os
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jft import shard
from jft.data.cache import cache_dir, make_room, used
from jft.errors import MachineError, disk
from jft.files import writing
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


MOST_KEPT, MOST_ON_DISK = 2**30, 8 * 2**30  # bytes of one array that goes to the disk unasked, and of them all
MAGIC = b"jftfeat1"  # ends every file of features, after a checksum of the rest

log = logging.getLogger(__name__)


def key(model: Model, stop: str, variables: Mapping[str, Any], images: np.ndarray, *also: Any) -> str:
    """A hash of all that the activations before `stop` depend on: modules, their variables, the images, what else.

    And of what computes them, down to the last bit: the kind and number of devices, the versions of jax, and what it
    and its compiler are told of precision.
    """
    span = model.span(None, stop)
    versions = [importlib.metadata.version(n) for n in ("jax", "jaxlib", "flax")]
    by = [*versions, jax.devices()[0].device_kind, jax.device_count(), shard.compiler_options()]
    by += [jax.config.jax_default_matmul_precision, os.environ.get("XLA_FLAGS", "")]  # type: ignore[attr-defined]
    digest = hashlib.blake2b(repr([stop, [(name, model.parts[name]) for name in span], by, *also]).encode())
    for name in sorted(variables):
        if any(name.startswith(part + "/") for part in span):
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(variables[name]).data)
    digest.update(np.ascontiguousarray(images).data)
    return digest.hexdigest()[:40]


def shape(model: Model, stop: str, examples: int) -> tuple[int, ...]:
    """Of the activations before `stop` for so many examples."""
    return (examples, *model.shape_before(stop))


def nbytes(model: Model, stop: str, examples: int, dtype: str = "float32") -> int:
    """Bytes of the activations before `stop` for so many examples, from shapes alone."""
    return int(np.prod(shape(model, stop, examples))) * jnp.dtype(dtype).itemsize


def rows(
    eval_step: Callable[..., Float[jax.Array, "b ..."]],
    params: Mapping[str, Any],
    batch_stats: Mapping[str, Any],
    batches: Iterable[Mapping[str, Any]],
    advance: Callable[[int], Any] = lambda n: None,
) -> Iterator[np.ndarray]:
    """What a compiled evaluation step gives for every example, once each, in the order of the batches, piece by piece.

    A batch's `mask` says which of its rows are examples and which are padding.
    """
    ahead: tuple[jax.Array, int] | None = None  # one batch ahead of the device and no more

    def done(y: jax.Array, count: int) -> np.ndarray:
        whole = np.asarray(y)
        advance(count)
        return whole[:count]

    for batch in batches:
        before, ahead = ahead, (eval_step(params, batch_stats, batch), int(batch["mask"].sum()))
        if before:
            yield done(*before)
    if ahead:
        yield done(*ahead)


def compute(
    eval_step: Callable[..., Float[jax.Array, "b ..."]],
    params: Mapping[str, Any],
    batch_stats: Mapping[str, Any],
    batches: Iterable[Mapping[str, Any]],
    advance: Callable[[int], Any] = lambda n: None,
) -> Float[np.ndarray, "n ..."]:
    """All of the `rows`."""
    return np.concatenate(list(rows(eval_step, params, batch_stats, batches, advance)))


def _file(name: str) -> Path:
    return cache_dir() / "features" / name


def load(name: str, shape: tuple[int, ...], dtype: str = "float32") -> np.ndarray | None:
    """Features that were saved under this name, mapped from the disk; None where there are none, or not whole."""
    path, size = _file(name), int(np.prod(shape)) * jnp.dtype(dtype).itemsize
    try:
        if path.stat().st_size != size + 4 + len(MAGIC):
            raise ValueError("its size is wrong")
        raw = np.memmap(path, np.uint8, "r")
        if raw[-len(MAGIC) :].tobytes() != MAGIC or zlib.crc32(raw[:size].data) != int(
            raw[size : size + 4].view("<u4")[0]
        ):
            raise ValueError("its checksum is wrong")
        used(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        log.warning("The features in %s are damaged (%s); computing them again.", path, error)
        return None
    return raw[:size].view(jnp.dtype(dtype)).reshape(shape).view(np.ndarray)


def save(name: str, pieces: Iterable[np.ndarray], needed: bool = False) -> None:
    """Write features, piece by piece, for `load`; whole or not at all. The features used longest ago make room.

    Raises OSError where they cannot be written; MachineError, with the way out, where the run needs them there.
    """
    path = _file(name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with writing(path) as part:
            with open(part, "wb") as file:
                total = 0
                for piece in pieces:
                    raw = np.ascontiguousarray(piece).view(np.uint8).data
                    total = zlib.crc32(raw, total)
                    file.write(raw)
                file.write(total.to_bytes(4, "little") + MAGIC)
            make_room(path, part.stat().st_size, MOST_ON_DISK)  # before it stands there, for another process to remove
    except OSError as error:
        if not needed:
            raise
        raise MachineError(
            f"{disk(error, path)}. Features that memory does not hold need a place there: make room, or name another "
            "with JFT_CACHE=FOLDER. Without --features disk the frozen parts run every epoch. The same command goes on."
        ) from error
