"""Weights written as files, tensor by tensor: `.safetensors` and `.npz`."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from jft.files import writing
from jft.weights.layout import contiguous
from jft.weights.safetensors import SAFETENSORS_DTYPES

_CODES = {dtype: code for code, dtype in SAFETENSORS_DTYPES.items()}


def write_safetensors(
    path: str | Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Write arrays by name; the file appears under its name when it is complete."""
    # Wide elements first, as the format's own writer does, so that every tensor starts at a multiple of its itemsize.
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name in order:
        tensor = tensors[name]
        end = position + tensor.size * tensor.dtype.itemsize
        header[name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with writing(path) as part, open(part, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            little = contiguous(tensors[name], tensors[name].dtype.newbyteorder("<"))
            file.write(little.reshape(-1).view(np.uint8).data)


def write_npz(path: str | Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write arrays by name, uncompressed; the file appears under its name when it is complete."""
    with writing(path) as part, open(part, "wb") as file:
        np.savez(file, **tensors)  # type: ignore[arg-type]
