"""Tensors as they lie in a file: where, of what type, and read one at a time without mapping the file into memory."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

MAX_DIMS = 32
MAX_SIZE = 2**62  # of anything a file claims: larger numbers would be slow to calculate with, and are lies


class Bad(ValueError):
    """Why a file cannot be read; the file's name is added where it is known."""


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file: its shape and dtype, and how to read it."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


def fill(buffer: np.ndarray, read_into: Callable[[memoryview], int | None]) -> None:
    """Fill a buffer of bytes, in as many calls as it takes. Raises Bad where there are too few."""
    view, done = buffer.data, 0
    while done < len(view):
        count = read_into(view[done : done + (1 << 30)])  # Linux reads 2 GiB a call at most
        if not count:
            raise Bad(f"the file ends {len(view) - done:,} bytes too early")
        done += count


def read_at(file: BinaryIO, offset: int, size: int) -> np.ndarray:
    """So many bytes from an offset on."""
    buffer = np.empty(size, np.uint8)
    file.seek(offset)
    fill(buffer, file.readinto)  # type: ignore[attr-defined]
    return buffer


def strided(
    file: BinaryIO, offset: int, shape: tuple[int, ...], dtype: np.dtype, strides: tuple[int, ...] | None = None
) -> Tensor:
    """A tensor whose elements lie in the file as they are, `strides` elements apart (None: in C order)."""
    contiguous = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    native = dtype.newbyteorder("=")

    def read() -> np.ndarray:
        if 0 in shape:
            return np.zeros(shape, native)
        if strides is None or all(n == 1 or s == c for n, s, c in zip(shape, strides, contiguous, strict=True)):
            array = read_at(file, offset, math.prod(shape) * dtype.itemsize).view(dtype).reshape(shape)
        else:
            span = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
            flat = read_at(file, offset, span * dtype.itemsize).view(dtype)
            steps = tuple(s * dtype.itemsize for s in strides)
            array = np.lib.stride_tricks.as_strided(flat, shape, steps, writeable=False).copy()
        return array if dtype == native else array.astype(native)

    return Tensor(shape, native, read)


def contiguous(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The array in C order and of this dtype; itself, where it is that already."""
    if array.flags.c_contiguous or array.ndim != 2:
        return array.astype(dtype, order="C", copy=False)
    # A transposed matrix, a cache line of columns at a time: five times as fast as in one assignment.
    copy = np.empty(array.shape, dtype)
    for i in range(0, array.shape[1], 16):
        copy[:, i : i + 16] = array[:, i : i + 16]
    return copy


def natural(value: Any) -> bool:
    """Whether this is an integer that a size or an offset can be."""
    return type(value) is int and 0 <= value < MAX_SIZE


def listed(names: list[str], limit: int = 8) -> str:
    """A few names, shortened, and how many more."""
    names = [name[:80] for name in names]
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
