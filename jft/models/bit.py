"""BiT's ResNet-v2 (Kolesnikov et al. 2020, "Big Transfer"): pre-activation, GroupNorm and weight standardisation."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jft.models.base import Model
from jft.models.layers import DropPath, Head, along_last, convolve, drop_path_rates, normal
from jft.models.resnet import Pool, max_pool


class StdConv(nn.Module):
    """A convolution whose every filter is used with mean 0 and variance 1 (Qiao et al. 2019), padded by `size // 2`.

    1e-8 is added to the variance, as timm does for BiT. The kernel is kept as it is: [size, size, in, out].
    """

    features: int
    size: int
    stride: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b i j d"]:
        shape = (self.size, self.size, x.shape[-1], self.features)
        he = normal((2 / (self.size**2 * self.features)) ** 0.5)
        kernel = self.param("kernel", he, shape, jnp.float32)
        kernel = kernel - kernel.mean((0, 1, 2), keepdims=True)
        kernel = kernel * jax.lax.rsqrt(jnp.square(kernel).mean((0, 1, 2), keepdims=True) + 1e-8)
        return convolve(x.astype(self.dtype), kernel.astype(self.dtype), self.stride)


class GroupNormReLU(nn.Module):
    """Group normalisation (Wu and He 2018) in float32, then ReLU; usable as a part of a model."""

    groups: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], train: bool = False, use_running_average: bool = True
    ) -> Float[Array, "b h w c"]:
        b, c = x.shape[0], x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (c,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (c,), jnp.float32)

        def mean(x: Float[Array, "b h w c"]) -> Float[Array, "b 1 1 c"]:
            """Over positions and a group's channels, for every channel."""
            # Positions first: what is left to regroup is small, and x keeps its layout.
            groups = x.mean((1, 2)).reshape(b, self.groups, -1).mean(-1)
            return jnp.repeat(groups, c // self.groups, 1)[:, None, None]

        d = x.astype(jnp.float32)
        d = d - mean(d)
        y = d * (jax.lax.rsqrt(mean(jnp.square(d)) + 1e-5) * along_last(scale, 4))
        return nn.relu(y + along_last(bias, 4)).astype(self.dtype)


class Stem(nn.Module):
    """7×7 convolution of stride 2 and 3×3 max pooling of stride 2, both padded with zeros."""

    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool, use_running_average: bool) -> Float[Array, "b i j d"]:
        # No ReLU precedes the pooling, so that zeros at the border tell; BiT's TensorFlow models were padded so.
        return max_pool(StdConv(self.width, 7, 2, self.dtype, name="conv")(x), border=0.0)


class Block(nn.Module):
    """A pre-activation bottleneck (He et al. 2016): normalisation and ReLU stand before each convolution."""

    features: int
    stride: int
    groups: int
    shortcut: bool  # a convolution beside the block, after its first normalisation
    drop_path: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool, use_running_average: bool) -> Float[Array, "b i j d"]:
        inner = self.features // 4
        x = x.astype(self.dtype)
        y = GroupNormReLU(self.groups, self.dtype, name="norm1")(x)
        if self.shortcut:
            x = StdConv(self.features, 1, self.stride, self.dtype, name="shortcut")(y)
        y = StdConv(inner, 1, 1, self.dtype, name="conv1")(y)
        y = GroupNormReLU(self.groups, self.dtype, name="norm2")(y)
        y = StdConv(inner, 3, self.stride, self.dtype, name="conv2")(y)
        y = GroupNormReLU(self.groups, self.dtype, name="norm3")(y)
        y = StdConv(self.features, 1, 1, self.dtype, name="conv3")(y)
        return x + DropPath(self.drop_path)(y, train)


def make_bit(
    name: str,
    *,
    depths: Sequence[int],
    width: int = 64,
    groups: int = 32,
    num_classes: int = 1000,
    image_size: int | tuple[int, int] | None = None,
    dtype: Any = "float32",
    dropout: float = 0.0,
    drop_path: float = 0.0,
    axis_name: str | None = None,
    remat: str = "none",
    default_size: int = 224,
) -> Model:
    """A BiT ResNet-v2 of four stages with `depths` blocks, the first 4 `width` channels wide, each next twice as wide.

    Parts: `stem`, `stage1/block0` … `stage4/blockN`, `norm`, `pool`, `head`. `groups` are those of the normalisations.
    `image_size` is one side or (height, width); `dtype` is that of the computation, parameters stay float32; `dropout`
    acts before the head; `drop_path` is the last block's rate of stochastic depth; `axis_name` changes nothing, as no
    statistics are shared between examples.
    """
    size = image_size or default_size
    height, across = (size, size) if isinstance(size, int) else size
    dtype = jnp.dtype(dtype)
    rates = iter(drop_path_rates(drop_path, sum(depths)))
    parts: dict[str, nn.Module] = {"stem": Stem(width, dtype)}
    for s, depth in enumerate(depths):
        for b in range(depth):
            stride = 2 if s > 0 and b == 0 else 1
            parts[f"stage{s + 1}/block{b}"] = Block(4 * width * 2**s, stride, groups, b == 0, next(rates), dtype)
    parts |= {"norm": GroupNormReLU(groups, dtype), "pool": Pool(), "head": Head(num_classes, dropout)}
    return Model(name, parts, (height, across, 3), num_classes, remat=remat)
