"""Weights and pictures made from names alone, so that a golden needs to store only what a model does with them."""

import zlib

import numpy as np

SKETCH = 32


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The value of the parameter or statistic of this name (ours), at a scale that keeps activations in bounds."""
    noise = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, np.float32)
    match name.rsplit("/", 1)[-1]:
        case "kernel":
            return noise / np.float32(np.sqrt(np.prod(shape[:-1])))
        case "scale":
            return 1 + noise / 10
        case "var":
            return 1 + noise.clip(-2, 2) / 4
        case "cls_token" | "pos_embed":  # small, so that the first LayerNorm's epsilon tells
            return noise / 50
        case _:
            return noise / 10


def picture(*shape: int) -> np.ndarray:
    """Standard normal pixels."""
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def sketch(x: np.ndarray) -> np.ndarray:
    """A random projection to a few numbers (a count sketch): the norm of a difference survives it, within a third."""
    rng = np.random.default_rng(1)
    sign = rng.integers(0, 2, x.size) * 2.0 - 1
    return np.bincount(rng.integers(0, SKETCH, x.size), sign * np.asarray(x, np.float64).ravel(), SKETCH)


def case(model: str, **options: object) -> str:
    """A golden's name: the model and its options.

    >>> case("tiny_vit", pool="avg")
    'tiny_vit pool=avg'
    """
    return " ".join([model, *(f"{k}={v}" for k, v in sorted(options.items()))])


def size(model: str) -> tuple[int, int]:
    """A picture size for a golden: small, not square, and for a ViT 2 by 3 patches."""
    if "vit" not in model:
        return 64, 96
    patch = 8 if model == "tiny_vit" else int(model.split("patch")[1].split("_")[0])
    return 2 * patch, 3 * patch
