"""ResNet v1.5 (He et al. 2015, the stride on the 3×3 convolution as torchvision has it) and its variants, in parts."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jft.models.base import Model
from jft.models.layers import BatchNorm, Conv, DropPath, Head, drop_path_rates, greatest


class Stem(nn.Module):
    """7×7 convolution of stride 2, BatchNorm, ReLU, 3×3 max pooling of stride 2: a quarter of the resolution."""

    width: int
    deep: bool = False  # ResNet-D's: three 3×3 convolutions in the place of the 7×7
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool, use_running_average: bool) -> Float[Array, "b i j d"]:
        if not self.deep:
            x = Conv(self.width, 7, stride=2, dtype=self.dtype, name="conv")(x)
            x = nn.relu(BatchNorm(self.dtype, self.axis_name, name="norm")(x, use_running_average))
            return max_pool(x)
        for i, (features, stride) in enumerate([(self.width // 2, 2), (self.width // 2, 1), (self.width, 1)], start=1):
            x = Conv(features, 3, stride, dtype=self.dtype, name=f"conv{i}")(x)
            x = nn.relu(BatchNorm(self.dtype, self.axis_name, name=f"norm{i}")(x, use_running_average))
        return max_pool(x)


def max_pool(x: Float[Array, "b h w c"], border: float = -np.inf) -> Float[Array, "b i j c"]:
    """3×3, stride 2, padded by 1 with `border`: −∞ as torch pads."""
    # One axis after the other is 3 times as fast as reduce_window on a CPU, its gradient 6 times.
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=border)
    return greatest(greatest(x, 1, 3), 2, 3)


def mean_pool(x: Float[Array, "b h w c"]) -> Float[Array, "b i j c"]:
    """2×2, stride 2; at an odd edge the mean of what is there."""
    b, h, w, c = x.shape
    x = jnp.pad(x, ((0, 0), (0, h % 2), (0, w % 2), (0, 0)))
    sums = x.reshape(b, (h + 1) // 2, 2, (w + 1) // 2, 2, c).sum((2, 4))
    rows, columns = (np.minimum(2, n - np.arange(0, n, 2)) for n in (h, w))
    return sums / jnp.asarray(rows[:, None, None] * columns[None, :, None], x.dtype)[None]


class Shortcut(nn.Module):
    """The 1×1 convolution and BatchNorm beside a block that changes resolution or channels."""

    features: int
    stride: int
    mean: bool  # ResNet-D's: what the stride would skip is averaged
    dtype: Any
    axis_name: str | None

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], use_running_average: bool) -> Float[Array, "b i j d"]:
        averaged = self.mean and self.stride == 2
        x = mean_pool(x) if averaged else x
        x = Conv(self.features, 1, 1 if averaged else self.stride, dtype=self.dtype, name="conv")(x)
        return BatchNorm(self.dtype, self.axis_name, name="norm")(x, use_running_average)


class SqueezeExcite(nn.Module):
    """Each channel times a gate in (0, 1), computed from all channels' means (Hu et al. 2018)."""

    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        c = x.shape[-1]
        hidden = max(8, (c // 16 + 4) // 8 * 8)  # a sixteenth, rounded to a multiple of 8, as timm's
        mean = x.astype(jnp.float32).mean((1, 2), keepdims=True)
        gate = nn.relu(Conv(hidden, 1, bias=True, dtype=self.dtype, name="fc1")(mean))
        return x * nn.sigmoid(Conv(c, 1, bias=True, dtype=self.dtype, name="fc2")(gate))


class Block(nn.Module):
    """A residual block: convolutions, each with its BatchNorm, and the shortcut past them."""

    convs: Sequence[tuple[int, int, int, int]]  # size, features, stride, groups
    squeeze: bool = False
    mean_shortcut: bool = False
    drop_path: float = 0.0
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool, use_running_average: bool) -> Float[Array, "b i j d"]:
        x = x.astype(self.dtype)
        y, stride = x, 1
        for i, (size, features, s, groups) in enumerate(self.convs, start=1):
            if i > 1:
                y = nn.relu(y)
            y = Conv(features, size, s, groups, dtype=self.dtype, name=f"conv{i}")(y)
            y = BatchNorm(self.dtype, self.axis_name, name=f"norm{i}")(y, use_running_average)
            stride *= s
        if self.squeeze:
            y = SqueezeExcite(self.dtype, name="se")(y)
        if stride > 1 or y.shape[-1] != x.shape[-1]:
            shortcut = Shortcut(y.shape[-1], stride, self.mean_shortcut, self.dtype, self.axis_name, name="shortcut")
            x = shortcut(x, use_running_average)
        return nn.relu(x + DropPath(self.drop_path)(y, train))


class Pool(nn.Module):
    """The mean over positions, in float32: [b, h, w, c] to [b, c]."""

    def __call__(self, x: Float[Array, "b h w c"], train: bool, use_running_average: bool) -> Float[Array, "b c"]:
        return x.astype(jnp.float32).mean((1, 2))


def make_resnet(
    name: str,
    *,
    depths: Sequence[int],
    bottleneck: bool,
    width: int = 64,
    groups: int = 1,
    group_width: int = 64,
    variant_d: bool = False,
    squeeze: bool = False,
    num_classes: int = 1000,
    image_size: int | tuple[int, int] | None = None,
    dtype: Any = "float32",
    dropout: float = 0.0,
    drop_path: float = 0.0,
    axis_name: str | None = None,
    remat: str = "none",
    default_size: int = 224,
) -> Model:
    """A ResNet of four stages with `depths` blocks, the first `width` channels wide and each next twice as wide.

    `groups` and `group_width` are those of a bottleneck's 3×3 convolution in the first stage (ResNeXt, Xie et al. 2017;
    wide, Zagoruyko and Komodakis 2016); `variant_d` has the deep stem and the averaging shortcuts of He et al. 2019;
    `squeeze` gates the channels of every block (Hu et al. 2018).

    Parts: `stem`, `stage1/block0` … `stage4/blockN`, `pool`, `head`. `image_size` is one side or (height, width);
    `dtype` is that of the computation, parameters stay float32; `dropout` acts before the head; `drop_path` is the last
    block's rate of stochastic depth; `axis_name` is pmap's, over which BatchNorm gathers its statistics.
    """
    size = image_size or default_size
    height, across = (size, size) if isinstance(size, int) else size
    dtype = jnp.dtype(dtype)
    rates = iter(drop_path_rates(drop_path, sum(depths)))
    parts: dict[str, nn.Module] = {"stem": Stem(width, variant_d, dtype, axis_name)}
    for s, depth in enumerate(depths):
        w = width * 2**s
        for b in range(depth):
            stride = 2 if s > 0 and b == 0 else 1
            convs = [(3, w, stride, 1), (3, w, 1, 1)]
            if bottleneck:
                inner = w * group_width // 64 * groups
                convs = [(1, inner, 1, 1), (3, inner, stride, groups), (1, 4 * w, 1, 1)]
            block = Block(tuple(convs), squeeze, variant_d, next(rates), dtype, axis_name)
            parts[f"stage{s + 1}/block{b}"] = block
    parts |= {"pool": Pool(), "head": Head(num_classes, dropout)}
    return Model(name, parts, (height, across, 3), num_classes, remat=remat)
