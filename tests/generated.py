"""Weights and pictures made from names alone, so that a golden needs to store only what a model does with them."""

import zlib
from functools import lru_cache

import numpy as np

SKETCH = 32


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The value of the parameter or statistic of this name (ours), at a scale that keeps activations in bounds."""
    noise = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, np.float32)
    match name.rsplit("/", 1)[-1]:
        case "kernel" | "dist_kernel":
            noise /= np.float32(np.sqrt(np.prod(shape[:-1])))
            return noise
        case "scale" | "gamma":
            return 1 + noise / 10
        case "var":
            return 1 + noise.clip(-2, 2) / 4
        case "cls_token" | "pos_embed":  # small, so that the first LayerNorm's epsilon tells
            return noise / 50
        case _:
            return noise / 10


# The variants of the Vision Transformer as options of `tiny_vit`.
VITS: dict[str, dict] = {
    "deit_distilled": dict(distilled=True),
    "deit3": dict(positions="patches", layer_scale=1e-6),
    "dinov2": dict(layer_scale=1e-5),
    "dinov2_giant": dict(layer_scale=1e-5, act="swiglu", mlp_dim=40),
    "dinov2_reg": dict(layer_scale=1e-5, registers=4, positions="patches"),
    "clip": dict(pre_norm=True, epsilon=1e-5),
    "clip_quickgelu": dict(pre_norm=True, epsilon=1e-5, act="quick_gelu"),
    "siglip": dict(class_token=False, pool="map", mlp_dim=40),
    "beit": dict(positions="none", relative=True, pool="avg", layer_scale=0.1),
}
# Those that other libraries have.
OTHER_VITS: dict[str, dict] = {
    "hf vit": dict(),
    "hf mae": dict(),
    "hf deit": dict(distilled=True),
    "hf dinov2": dict(layer_scale=1e-5, pool="token_avg"),
    "hf dinov2 swiglu": dict(layer_scale=1e-5, act="swiglu", mlp_dim=48, pool="token_avg"),
    "hf dinov2 registers": dict(layer_scale=1e-5, registers=4, positions="class", pool="token_avg"),
    "hf clip": dict(pre_norm=True, epsilon=1e-5, act="quick_gelu", projection=16),
    "hf siglip": dict(class_token=False, pool="map", act="gelu_tanh"),
    "hf beit": dict(positions="none", relative=True, pool="avg", layer_scale=0.1),
    "torchvision": dict(),
    "open_clip": dict(pre_norm=True, epsilon=1e-5, projection=16),
    "open_clip quickgelu": dict(pre_norm=True, epsilon=1e-5, act="quick_gelu", projection=16),
}


def torch_weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The value of the tensor of this name in a torch model that is not of ours."""
    noise = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, np.float32)
    if len(shape) < 2:
        return np.asarray(noise / 10 + (0 if name.endswith(("bias", "embedding")) else 1), np.float32)
    noise /= np.float32(np.sqrt(np.prod(shape[1:])))
    return noise


def picture(*shape: int) -> np.ndarray:
    """Standard normal pixels."""
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def sketch(x: np.ndarray) -> np.ndarray:
    """A random projection to a few numbers (a count sketch): the norm of a difference survives it, within a third."""
    sign, place = _drawn(x.size)
    return np.bincount(place, sign * np.asarray(x, np.float64).ravel(), SKETCH)


@lru_cache(maxsize=4)
def _drawn(size: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    sign = rng.integers(0, 2, size) * 2.0 - 1
    return sign, rng.integers(0, SKETCH, size)


def case(model: str, **options: object) -> str:
    """A golden's name: the model and its options.

    >>> case("tiny_vit", pool="avg")
    'tiny_vit pool=avg'
    """
    return " ".join([model, *(f"{k}={v}" for k, v in sorted(options.items()))])


def size(model: str) -> tuple[int, int]:
    """A picture size for a golden: small, not square, and for a ViT 2 by 3 patches."""
    if model != "tiny_vit" and "patch" not in model:
        return 64, 96
    patch = 8 if model == "tiny_vit" else int(model.split("patch")[1].split("_")[0])
    return 2 * patch, 3 * patch
