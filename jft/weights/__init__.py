"""Pretrained weights: read without executing anything, matched by rules, written again under the same names."""

from jft.weights.export import export
from jft.weights.formats import (
    FORMATS,
    Loaded,
    Receipt,
    default_preprocess,
    default_source,
    head_size,
    load,
    read_head,
    scratch,
)
from jft.weights.hub import locate
from jft.weights.readers import WeightFile, open_weights

__all__ = [
    "FORMATS",
    "Loaded",
    "Receipt",
    "WeightFile",
    "default_preprocess",
    "default_source",
    "export",
    "head_size",
    "load",
    "locate",
    "open_weights",
    "read_head",
    "scratch",
]
