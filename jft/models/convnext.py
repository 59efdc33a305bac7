"""ConvNeXt (Liu et al. 2022, "A ConvNet for the 2020s") in parts, computing what timm's and torchvision's compute."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jft.errors import UserError
from jft.models.base import Model
from jft.models.layers import DropPath, Head, LayerNorm, Linear, along_last, drop_path_rates, matmul, normal
from jft.models.resnet import Pool


class Patches(nn.Module):
    """A convolution whose stride is its size, over the whole patches there are; kernel [size, size, in, out]."""

    features: int
    size: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b i j d"]:
        b, h, w, c = x.shape
        n = self.size
        kernel = self.param("kernel", normal(0.02), (n, n, c, self.features), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        x = x.astype(self.dtype)[:, : h // n * n, : w // n * n]
        x = x.reshape(b, h // n, n, w // n, n, c).transpose(0, 1, 3, 2, 4, 5).reshape(b, h // n, w // n, n * n * c)
        y = matmul(x, kernel.astype(self.dtype).reshape(-1, self.features))
        return y + along_last(bias.astype(self.dtype), 4)


@jax.custom_vjp
def depthwise(x: Float[Array, "b h w c"], kernel: Float[Array, "n n 1 c"]) -> Float[Array, "b h w c"]:
    """Each channel convolved with its own odd-sized filter, padded with zeros to the same size."""
    # XLA's grouped convolution takes 6 to 50 times as long on a CPU, its gradients 5 to 20 times.
    return jax.lax.platform_dependent(x, kernel, cpu=_shifted, default=_convolved)


def _convolved(x: Array, kernel: Array) -> Array:
    n, c = len(kernel), x.shape[-1]
    return jax.lax.conv_general_dilated(
        *(x, kernel, (1, 1), ((n // 2, n // 2),) * 2),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=c,
    )


def _shifted(x: Array, kernel: Array) -> Array:
    """The sum of shifted copies of x, each times one of the filters' weights, in float32."""
    (_, h, w, _), n = x.shape, len(kernel)
    padded = _padded(x, n)
    y = jnp.zeros(x.shape, jnp.float32)
    for i in range(n):
        for j in range(n):
            y = y + (padded[:, i : i + h, j : j + w] * kernel[i, j, 0][None, None, None]).astype(jnp.float32)
    return y.astype(x.dtype)


def _padded(x: Array, n: int) -> Array:
    return jnp.pad(x, ((0, 0), (n // 2, n // 2), (n // 2, n // 2), (0, 0)))


def _depthwise_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return depthwise(x, kernel), (x, kernel)


def _depthwise_backward(kept: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    return jax.lax.platform_dependent(*kept, dy, cpu=_shifted_gradients, default=_convolved_gradients)


def _convolved_gradients(x: Array, kernel: Array, dy: Array) -> tuple[Array, Array]:
    return jax.vjp(_convolved, x, kernel)[1](dy)


def _shifted_gradients(x: Array, kernel: Array, dy: Array) -> tuple[Array, Array]:
    n = len(kernel)
    padded = _padded(x, n)

    def weight(place: Array) -> Array:
        shifted = jax.lax.dynamic_slice(padded, (0, place // n, place % n, 0), x.shape)
        return (shifted.astype(jnp.float32) * dy.astype(jnp.float32)).sum((0, 1, 2))

    # One after another: written out, they take longer to run and 3 times as long to compile.
    weights = jax.lax.map(weight, jnp.arange(n * n)).reshape(kernel.shape).astype(kernel.dtype)
    return _shifted(dy, kernel[::-1, ::-1]), weights


depthwise.defvjp(_depthwise_forward, _depthwise_backward)


class Depthwise(nn.Module):
    """A depthwise convolution with bias; kernel [size, size, 1, channels]."""

    size: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        c = x.shape[-1]
        kernel = self.param("kernel", normal(0.02), (self.size, self.size, 1, c), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (c,), jnp.float32)
        return depthwise(x.astype(self.dtype), kernel.astype(self.dtype)) + along_last(bias.astype(self.dtype), 4)


class LayerScale(nn.Module):
    """A learned factor per channel (Touvron et al. 2021, "Going deeper with image transformers"), fresh 1e-6."""

    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        gamma = self.param("gamma", nn.initializers.constant(1e-6), (x.shape[-1],), jnp.float32)
        return x * along_last(gamma.astype(self.dtype), 4)


class Stem(nn.Module):
    """Patches of 4 × 4 pixels, then LayerNorm: a quarter of the resolution."""

    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool, use_running_average: bool) -> Float[Array, "b i j d"]:
        x = Patches(self.width, 4, self.dtype, name="patch")(x)
        return LayerNorm(self.dtype, name="norm")(x)


class Downsample(nn.Module):
    """LayerNorm, then patches of 2 × 2: half the resolution."""

    width: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b i j d"]:
        x = LayerNorm(self.dtype, name="norm")(x)
        return Patches(self.width, 2, self.dtype, name="conv")(x)


class Block(nn.Module):
    """7×7 depthwise convolution, LayerNorm, an MLP of 4 times the width, LayerScale, and the residual.

    The first block of a later stage begins by downsampling; ConvNeXt's own layer-wise decay counts it so too.
    """

    width: int
    downsample: bool = False
    drop_path: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool, use_running_average: bool) -> Float[Array, "b i j d"]:
        x = x.astype(self.dtype)
        if self.downsample:
            x = Downsample(self.width, self.dtype, name="downsample")(x)
        y = Depthwise(7, self.dtype, name="conv")(x)
        y = LayerNorm(self.dtype, name="norm")(y)
        y = nn.gelu(Linear(4 * self.width, self.dtype, name="fc1")(y), approximate=False)
        y = Linear(self.width, self.dtype, name="fc2")(y)
        y = LayerScale(self.dtype, name="layer_scale")(y)
        return x + DropPath(self.drop_path)(y, train)


def make_convnext(
    name: str,
    *,
    depths: Sequence[int],
    widths: Sequence[int],
    num_classes: int = 1000,
    image_size: int | tuple[int, int] | None = None,
    dtype: Any = "float32",
    dropout: float = 0.0,
    drop_path: float = 0.0,
    axis_name: str | None = None,
    remat: str = "none",
    default_size: int = 224,
) -> Model:
    """A ConvNeXt of four stages with `depths` blocks, `widths` channels wide.

    Parts: `stem`, `stage1/block0` … `stage4/blockN`, `pool`, `norm`, `head`. `image_size` is one side or (height,
    width); `dtype` is that of the computation, parameters stay float32; `dropout` acts before the head; `drop_path` is
    the last block's rate of stochastic depth; `axis_name` changes nothing: examples share no
    statistics.
    """
    size = image_size or default_size
    height, across = (size, size) if isinstance(size, int) else size
    if min(height, across) < 32:
        raise UserError(f"{name}: image_size {height}×{across} is too small to be divided by 32.")
    dtype = jnp.dtype(dtype)
    rates = iter(drop_path_rates(drop_path, sum(depths)))
    parts: dict[str, nn.Module] = {"stem": Stem(widths[0], dtype)}
    for s, (depth, width) in enumerate(zip(depths, widths, strict=True)):
        for b in range(depth):
            parts[f"stage{s + 1}/block{b}"] = Block(width, s > 0 and b == 0, next(rates), dtype)
    parts |= {"pool": Pool(), "norm": LayerNorm(), "head": Head(num_classes, dropout)}
    return Model(name, parts, (height, across, 3), num_classes, remat=remat)
