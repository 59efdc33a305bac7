"""The `.safetensors` format: a JSON header that is believed only where it agrees with the file's size."""

import json
import math
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from jft.weights.layout import MAX_DIMS, Bad, Tensor, natural, read_at, strided

SAFETENSORS_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}

MAX_HEADER = 100_000_000  # bytes, the limit of the safetensors format itself


def safetensors_tensors(file: BinaryIO, size: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors by name, and the metadata."""
    length = int.from_bytes(bytes(read_at(file, 0, 8)), "little")
    if length > MAX_HEADER:
        raise Bad(f"its header claims {length:,} bytes; the format allows {MAX_HEADER:,}.")
    if 8 + length > size:
        raise Bad(f"it is truncated: the header claims {length:,} bytes, the file has {size:,}.")
    try:
        header = json.loads(bytes(read_at(file, 8, length)), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise Bad(f"its header cannot be read: {str(error)[:200]}.") from None
    if not isinstance(header, dict):
        raise Bad("its header is no table of tensors.")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise Bad("its header's metadata is something other than text by name.")
    start, tensors, spans = 8 + length, {}, []
    for name, entry in header.items():
        shape, dtype, begin, end = _entry(name, entry)
        if end > size - start:
            raise Bad(f"it is truncated: {name!r} ends at byte {start + end:,}, the file has {size:,}.")
        spans.append((begin, end, name))
        tensors[name] = strided(file, start + begin, shape, dtype)
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            what = "overlaps another tensor" if begin < position else "leaves a gap before it"
            raise Bad(f"its header lies: {name!r} at bytes {begin:,} to {end:,} {what}.")
        position = end
    if position != size - start:
        raise Bad(f"it has {size - start - position:,} bytes after the last tensor.")
    return tensors, metadata


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name stands in it twice")
    return table


def _entry(name: str, entry: Any) -> tuple[tuple[int, ...], np.dtype, int, int]:
    match entry:
        case {"dtype": str(code), "shape": list(shape), "data_offsets": [begin, end]}:
            pass
        case _:
            raise Bad(f"its header describes {name!r} by something other than dtype, shape and data_offsets.")
    if code not in SAFETENSORS_DTYPES:
        raise Bad(f"{name!r} has the dtype {code!r}; known are {', '.join(SAFETENSORS_DTYPES)}.")
    if len(shape) > MAX_DIMS or not all(map(natural, (*shape, begin, end))):
        raise Bad(f"its header gives {name!r} an impossible shape or place.")
    expected = math.prod(shape) * SAFETENSORS_DTYPES[code].itemsize
    if end - begin != expected:
        raise Bad(
            f"its header lies: {name!r} of shape {tuple(shape)} and dtype {code} takes {expected:,} bytes, "
            f"its place has {end - begin:,}."
        )
    return tuple(shape), SAFETENSORS_DTYPES[code], begin, end
