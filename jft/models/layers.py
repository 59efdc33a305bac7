"""The layers the model families share. Parameters are float32; `dtype` is what a layer computes in and gives back."""

from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Initializer = Callable[..., Any]
SMALL_MAP = 4  # places of what a convolution gives, up to which it is taken apart on a CPU


def normal(std: float) -> Initializer:
    """An initialiser: normal numbers of this standard deviation, the same for the same key everywhere."""

    def init(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        def draw(seed: Any) -> np.ndarray:
            return np.random.default_rng(np.asarray(seed)).standard_normal(shape, np.float32) * np.float32(std)

        # On the host: XLA takes 0.3 s to compile a draw of each shape, which is 10 s for a model that draws in 0.2 s.
        numbers = jax.pure_callback(draw, jax.ShapeDtypeStruct(shape, jnp.float32), jax.random.key_data(key))
        return numbers.astype(dtype)

    return init


def along_last(v: Float[Array, " c"], ndim: int) -> Float[Array, "..."]:
    """A vector over channels as an array of rank `ndim`, ready to broadcast."""
    return v.reshape((1,) * (ndim - 1) + (-1,))


def matmul(x: Float[Array, "*b c"], kernel: Float[Array, "c d"]) -> Float[Array, "*b d"]:
    """x @ kernel over the last axis."""
    # With the leading axes as one: contracting several in the kernel's gradient is up to 3 times slower on a CPU.
    return jnp.dot(x.reshape(-1, x.shape[-1]), kernel).reshape(*x.shape[:-1], kernel.shape[-1])


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def greatest(x: Float[Array, "..."], axis: int, size: int) -> Float[Array, "..."]:
    """The maximum of each window of `size` (2 or 3) entries along an axis, stride 2, without padding.

    The gradient goes to the first entry that has the maximum, as torch's pooling gives it along one axis.
    """
    return reduce(jnp.maximum, _windows(x, axis, size))


def _windows(x: Array, axis: int, size: int) -> list[Array]:
    stop = 2 * ((x.shape[axis] - size) // 2) + 1
    return [jax.lax.slice_in_dim(x, i, i + stop, 2, axis) for i in range(size)]


def _greatest_forward(x: Array, axis: int, size: int) -> tuple[Array, Array]:
    return greatest(x, axis, size), x


def _greatest_backward(axis: int, size: int, x: Array, slope: Array) -> tuple[Array]:
    # Entries are compared with each other, not with the maximum as in what jax derives: that gradient of a VGG was off
    # by 81 % when compiled without optimisation, likely as XLA computed x a second time, otherwise rounded.
    # The entries of even and of odd number, interleaved: half the time, on a CPU, of what jax derives, which adds
    # arrays full of zeros. Of three, an even entry is the last of one window and the first of the next.
    a, b, *c = _windows(x, axis, size)
    first = (a >= b) & (a >= c[0]) if c else a >= b
    second = ~first & (b >= c[0]) if c else ~first
    zero = jnp.zeros((), slope.dtype)

    def pad(v: Array, before: int, after: int) -> Array:
        return jax.lax.pad(v, zero, [(before, after, 0) if i == axis else (0, 0, 0) for i in range(v.ndim)])

    even, odd = pad(jnp.where(first, slope, zero), 0, 1), pad(jnp.where(second, slope, zero), 0, 1)
    if c:
        even += pad(jnp.where(first | second, zero, slope), 1, 0)
    both = jnp.stack([even, odd], axis + 1).reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :])
    return (jax.lax.slice_in_dim(both, 0, x.shape[axis], 1, axis),)


greatest.defvjp(_greatest_forward, _greatest_backward)


def convolve(
    x: Float[Array, "b h w c"], kernel: Float[Array, "k k i d"], stride: int = 1, groups: int = 1
) -> Float[Array, "b h2 w2 d"]:
    """A convolution padded by `k // 2` on every side, as torch models pad; i is c / groups."""
    size = kernel.shape[0]
    if size == 1 and groups == 1:
        # A matrix product: the same numbers, in training up to 3 times as fast as XLA's convolution on a CPU.
        return matmul(x[:, ::stride, ::stride], kernel[0, 0])
    places = np.prod([-(-n // stride) for n in x.shape[1:3]])
    cpu = jax.default_backend() == "cpu" and x.dtype == jnp.float32  # narrower sums would be rounded nine times
    if cpu and size == 3 and groups == 1 and places <= SMALL_MAP:
        return _by_taps(x, kernel, stride)
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=((size // 2, size // 2),) * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def _by_taps(x: Float[Array, "b h w c"], kernel: Float[Array, "3 3 c d"], stride: int) -> Float[Array, "b h2 w2 d"]:
    """The sum of a matrix product for each entry of the kernel.

    XLA's convolution that gives 2×2 maps of 512 channels is tens of times slower on a CPU, with gradients too.
    """
    h, w = (-(-n // stride) for n in x.shape[1:3])
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    seen = [x[:, i : i + stride * h : stride, j : j + stride * w : stride] for i in range(3) for j in range(3)]
    return reduce(jnp.add, map(matmul, seen, kernel.reshape(-1, *kernel.shape[2:])))


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_normalise(
    x: Float[Array, "*b c"], scale: Float[Array, " c"], bias: Float[Array, " c"], epsilon: float
) -> Float[Array, "*b c"]:
    """Layer normalisation over the last axis, computed and given in float32 (Ba et al. 2016)."""
    # What jax derives keeps more arrays as large as x for the backward pass. Here it is x alone, which is there anyway.
    return _layer_forward(x, scale, bias, epsilon)[0]


def _layer_forward(x: Array, scale: Array, bias: Array, epsilon: float) -> tuple[Array, tuple[Array, ...]]:
    d = x.astype(jnp.float32)
    mean = d.mean(-1, keepdims=True)
    d = d - mean
    rate = jax.lax.rsqrt(jnp.square(d).mean(-1, keepdims=True) + epsilon)
    return d * rate * along_last(scale, x.ndim) + along_last(bias, x.ndim), (x, mean, rate, scale)


def _layer_backward(epsilon: float, kept: tuple[Array, ...], slope: Array) -> tuple[Array, Array, Array]:
    x, mean, rate, scale = kept
    x = jax.lax.optimization_barrier(x)  # else XLA keeps the difference of the forward pass
    y = (x.astype(jnp.float32) - mean) * rate
    inner = slope * along_last(scale, x.ndim)
    dx = (inner - inner.mean(-1, keepdims=True) - y * (inner * y).mean(-1, keepdims=True)) * rate
    axes = tuple(range(x.ndim - 1))
    return dx.astype(x.dtype), (slope * y).sum(axes), slope.sum(axes)


layer_normalise.defvjp(_layer_forward, _layer_backward)


class Linear(nn.Module):
    """x @ kernel + bias over the last axis; kernel [in, out]. Fresh as timm's transformers: normal, 0.02."""

    features: int
    dtype: Any = jnp.float32
    bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "*b c"]) -> Float[Array, "*b d"]:
        kernel = self.param("kernel", normal(0.02), (x.shape[-1], self.features), jnp.float32)
        y = matmul(x.astype(self.dtype), kernel.astype(self.dtype))
        if self.bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
            y = y + along_last(bias.astype(self.dtype), y.ndim)
        return y


class Conv(nn.Module):
    """A convolution padded by `size // 2` on every side, as torch models pad; kernel [size, size, in / groups, out].

    Fresh as torchvision's ResNets: normal by the fan-out (He et al. 2015).
    """

    features: int
    size: int
    stride: int = 1
    groups: int = 1
    bias: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        shape = (self.size, self.size, x.shape[-1] // self.groups, self.features)
        he = normal((2 / (self.size**2 * self.features)) ** 0.5)
        kernel = self.param("kernel", he, shape, jnp.float32).astype(self.dtype)
        x = x.astype(self.dtype)
        y = convolve(x, kernel, self.stride, self.groups)
        if self.bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
            y = y + along_last(bias.astype(self.dtype), 4)
        return y


class BatchNorm(nn.Module):
    """Batch normalisation over all axes but the last, as torch's: parameters `scale`, `bias`, statistics `mean`, `var`.

    `momentum` is the share of the running statistic that is kept (torch's 0.1 is 0.9 here). `axis_name` is pmap's: the
    batch is then that of all devices. Statistics are computed in float32 whatever `dtype` is.
    """

    dtype: Any = jnp.float32
    axis_name: str | None = None
    momentum: float = 0.9
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: Float[Array, "*b c"], use_running_average: bool) -> Float[Array, "*b c"]:
        c, axes = x.shape[-1], tuple(range(x.ndim - 1))
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (c,), jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, (c,), jnp.float32)
        scale = self.param("scale", nn.initializers.ones, (c,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (c,), jnp.float32)
        x = x.astype(jnp.float32)
        if use_running_average:
            mean, var = running_mean.value, running_var.value
        else:
            # E[x²] − E[x]² needs one pass over x, but cancels where the mean is large: take the running mean off first.
            origin = running_mean.value
            d = x - along_last(origin, x.ndim)
            moments = jnp.stack([d.mean(axes), jnp.square(d).mean(axes)])
            count = x.size // c
            if self.axis_name is not None and not self.is_initializing():
                moments = jax.lax.pmean(moments, self.axis_name)
                count *= jax.lax.axis_size(self.axis_name)
            var = jnp.maximum(moments[1] - jnp.square(moments[0]), 0.0)
            mean = moments[0] + origin
            if not self.is_initializing():
                # torch normalises by the biased variance and keeps the unbiased one for evaluation. flax keeps the
                # biased; at the few positions per channel of a last stage and a small batch they differ by percents,
                # and the statistics of imported weights were gathered in torch's way, so that is the one moved here.
                unbiased = var * (count / max(count - 1, 1))
                running_mean.value = self.momentum * running_mean.value + (1 - self.momentum) * mean
                running_var.value = self.momentum * running_var.value + (1 - self.momentum) * unbiased
        y = (x - along_last(mean, x.ndim)) * along_last(scale * jax.lax.rsqrt(var + self.epsilon), x.ndim)
        return (y + along_last(bias, x.ndim)).astype(self.dtype)


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis, in float32; usable as a part of a model."""

    dtype: Any = jnp.float32
    epsilon: float = 1e-6

    @nn.compact
    def __call__(
        self, x: Float[Array, "*b c"], train: bool = False, use_running_average: bool = True
    ) -> Float[Array, "*b c"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32)
        return layer_normalise(x, scale, bias, self.epsilon).astype(self.dtype)


class DropPath(nn.Module):
    """Stochastic depth: in training the whole branch is dropped, per example, and scaled up where it stays.

    Huang et al., Deep networks with stochastic depth, 2016.
    """

    rate: float

    @nn.compact
    def __call__(self, x: Float[Array, "b *d"], train: bool) -> Float[Array, "b *d"]:
        if not train or self.rate == 0.0:
            return x
        keep = jax.random.bernoulli(self.make_rng("dropout"), 1 - self.rate, (x.shape[0],) + (1,) * (x.ndim - 1))
        return jnp.where(keep, x / (1 - self.rate), jnp.zeros((), x.dtype))


class Identity(nn.Module):
    """A part that does nothing."""

    def __call__(self, x: Float[Array, "..."], train: bool, use_running_average: bool) -> Float[Array, "..."]:
        return x


class Head(nn.Module):
    """Dropout and the linear classifier, in float32: features [b, d] to logits [b, classes].

    A fresh head is zero, as vit_jax and big_vision have it for transfer: the first loss is exactly ln(classes), and the
    first gradients into a pretrained body are not those of a random classifier.
    """

    num_classes: int
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: Float[Array, "b d"], train: bool, use_running_average: bool) -> Float[Array, "b k"]:
        kernel = self.param("kernel", nn.initializers.zeros, (x.shape[-1], self.num_classes), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.num_classes,), jnp.float32)
        x = nn.Dropout(self.dropout, deterministic=not train)(x.astype(jnp.float32))
        return jnp.dot(x, kernel) + along_last(bias, 2)


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """The rate of each of `depth` blocks, rising linearly from 0 at the first to `rate` at the last."""
    return [rate * i / max(depth - 1, 1) for i in range(depth)]
