"""VGG (Simonyan and Zisserman 2015), with and without BatchNorm, in parts, computing what torchvision's compute."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from jft.errors import UserError
from jft.models.base import Model
from jft.models.layers import BatchNorm, Conv, Head, along_last, greatest, matmul, normal


class Layer(nn.Module):
    """3×3 convolution, BatchNorm where asked for, ReLU and, at the end of a stage, 2×2 max pooling."""

    features: int
    batch_norm: bool = False
    pool: bool = False
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool, use_running_average: bool) -> Float[Array, "b i j d"]:
        conv = Conv(self.features, 3, bias=True, dtype=self.dtype)
        nn.share_scope(self, conv)  # the kernel is the layer's own: stage1/conv0/kernel
        x = conv(x)
        if self.batch_norm:
            x = BatchNorm(self.dtype, self.axis_name, name="norm")(x, use_running_average)
        x = nn.relu(x)
        return max_pool(x) if self.pool else x


def max_pool(x: Float[Array, "b h w c"]) -> Float[Array, "b i j c"]:
    """2×2, stride 2; an odd last row or column is left out."""
    return greatest(greatest(x, 1, 2), 2, 2)


def adaptive_mean_pool(x: Float[Array, "b h w c"], side: int) -> Float[Array, "b {side} {side} c"]:
    """Means over side × side windows, which overlap or repeat where they must: torch's `adaptive_avg_pool2d`."""
    for axis in (1, 2):
        n = x.shape[axis]
        if n != side:
            windows = [(i * n // side, -(-(i + 1) * n // side)) for i in range(side)]
            x = jnp.stack([x.take(jnp.arange(*w), axis).mean(axis) for w in windows], axis)
    return x


class Hidden(nn.Module):
    """A fully connected layer over all positions, ReLU and dropout; kernel [side, side, in, out], or [in, out].

    Fresh as torchvision's: normal, 0.01.
    """

    features: int
    side: int | None = None  # pool to side × side positions first; None: the input has none
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b *p c"], train: bool, use_running_average: bool) -> Float[Array, "b d"]:
        if self.side is not None:
            x = adaptive_mean_pool(x, self.side)
        kernel = self.param("kernel", normal(0.01), (*x.shape[1:], self.features), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        y = matmul(x.astype(self.dtype).reshape(len(x), -1), kernel.astype(self.dtype).reshape(-1, self.features))
        y = nn.relu(y + along_last(bias.astype(self.dtype), 2))
        return nn.Dropout(self.dropout, deterministic=not train)(y)


def make_vgg(
    name: str,
    *,
    depths: Sequence[int],
    batch_norm: bool,
    width: int = 64,
    hidden: int = 4096,
    side: int = 7,
    num_classes: int = 1000,
    image_size: int | tuple[int, int] | None = None,
    dtype: Any = "float32",
    dropout: float = 0.0,
    drop_path: float = 0.0,
    axis_name: str | None = None,
    remat: str = "none",
    default_size: int = 224,
) -> Model:
    """A VGG of five stages with `depths` convolutions, `width`, 2, 4, 8 and 8 times `width` channels wide.

    Parts: `stage1/conv0` … `stage5/convN`, `fc1`, which pools to `side` × `side` positions first, `fc2`, `head`.
    `batch_norm` puts a BatchNorm behind every convolution. `image_size` is one side or (height, width); `dtype` is that
    of the computation, parameters stay float32; `dropout` acts after both hidden layers (torchvision trains with 0.5);
    `drop_path` is 0, as there are no branches; `axis_name` is pmap's, over which BatchNorm gathers its statistics.
    """
    size = image_size or default_size
    height, across = (size, size) if isinstance(size, int) else size
    if min(height, across) < 32:
        raise UserError(f"{name}: image_size {height}×{across} is too small for five poolings; a side has 32 at least.")
    if drop_path:
        raise UserError(f"{name} has no residual branches that drop_path={drop_path} could drop; leave it at 0.")
    dtype = jnp.dtype(dtype)
    parts: dict[str, nn.Module] = {}
    for s, depth in enumerate(depths):
        for i in range(depth):
            features = width * min(2**s, 8)
            parts[f"stage{s + 1}/conv{i}"] = Layer(features, batch_norm, i == depth - 1, dtype, axis_name)
    parts |= {
        "fc1": Hidden(hidden, side, dropout, dtype),
        "fc2": Hidden(hidden, None, 0.0, dtype),  # its dropout is the head's
        "head": Head(num_classes, dropout),
    }
    return Model(name, parts, (height, across, 3), num_classes, remat=remat)
