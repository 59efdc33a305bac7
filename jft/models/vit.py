"""The Vision Transformer (Dosovitskiy et al. 2020) and its variants in parts, computing what timm's models compute.

DeiT (Touvron et al. 2020), DeiT-III (2022), DINOv2 (Oquab et al. 2023, Darcet et al. 2023), CLIP's and SigLIP's picture
towers (Radford et al. 2021, Zhai et al. 2023) and BEiT (Bao et al. 2021) differ from it by options of `make_vit`.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jft.errors import UserError, near
from jft.models.base import Model
from jft.models.layers import DropPath, Head, Identity, LayerNorm, Linear, along_last, drop_path_rates, matmul, normal


class PatchEmbed(nn.Module):
    """A linear map of each patch; kernel [patch, patch, channels, dim], as the strided convolution it equals."""

    patch: int
    dim: int
    dtype: Any
    bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b n d"]:
        b, h, w, c = x.shape
        p = self.patch
        kernel = self.param("kernel", normal((p * p * c) ** -0.5), (p, p, c, self.dim), jnp.float32)
        x = x[:, : h // p * p, : w // p * p]  # SigLIP's 384 pixels are 27 patches of 14; the rest is not looked at
        x = x.astype(self.dtype).reshape(b, h // p, p, w // p, p, c).transpose(0, 1, 3, 2, 4, 5)
        y = matmul(x.reshape(b, -1, p * p * c), kernel.reshape(-1, self.dim).astype(self.dtype))
        if self.bias:
            bias = self.param("bias", nn.initializers.zeros, (self.dim,), jnp.float32)
            y = y + along_last(bias.astype(self.dtype), 3)
        return y


class Embed(nn.Module):
    """Patches to tokens [b, n, dim]: class, distillation and register tokens first, then the patches row by row.

    `positions` are added to all tokens (`all`), to all but the registers (`class`), to the patches alone (`patches`)
    or to none (`none`). `pre_norm` ends in a LayerNorm, as CLIP has it.
    """

    patch: int
    dim: int
    dtype: Any = jnp.float32
    bias: bool = True
    class_token: bool = True
    distilled: bool = False
    registers: int = 0
    positions: str = "all"
    pre_norm: bool = False
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool, use_running_average: bool) -> Float[Array, "b n d"]:
        x = PatchEmbed(self.patch, self.dim, self.dtype, self.bias, name="patch")(x)
        b, n, d = x.shape

        def tokens(name: str, count: int, std: float) -> list[Array]:
            if not count:
                return []
            token = self.param(name, normal(std), (1, count, d), jnp.float32)
            return [jnp.broadcast_to(token.astype(self.dtype), (b, count, d))]

        first = tokens("cls_token", int(self.class_token), 1e-6) + tokens("dist_token", int(self.distilled), 0.02)
        registers = tokens("reg_token", self.registers, 1e-6)
        placed = {"all": [*first, *registers, x], "class": [*first, x], "patches": [x], "none": [x]}[self.positions]
        x = jnp.concatenate(placed, axis=1)
        if self.positions != "none":
            pos_embed = self.param("pos_embed", normal(0.02), (1, x.shape[1], d), jnp.float32)
            x = x + pos_embed.astype(self.dtype)
        if self.positions == "class" and registers:
            x = jnp.concatenate([x[:, : len(first)], *registers, x[:, len(first) :]], axis=1)
        elif self.positions in ("patches", "none"):
            x = jnp.concatenate([*first, *registers, x], axis=1)
        return LayerNorm(self.dtype, self.epsilon, name="norm")(x) if self.pre_norm else x


def attend(
    q: Float[Array, "b h m d"],
    k: Float[Array, "b h n d"],
    v: Float[Array, "b h n d"],
    bias: Float[Array, "h m n"] | None = None,
) -> Float[Array, "b h m d"]:
    """softmax(q kᵀ / √d + bias) v, the softmax in float32."""
    # With the heads before the tokens, and divided after the second product, this takes a half to a third of the time
    # of jax.nn.dot_product_attention on a CPU.
    scores = jnp.einsum("bhmd,bhnd->bhmn", q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32)
    if bias is not None:
        scores = scores + bias[None]
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    y = jnp.einsum("bhmn,bhnd->bhmd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return (y / weights.sum(-1, keepdims=True)).astype(v.dtype)


def relative_positions(height: int, width: int) -> Int[np.ndarray, "n n"]:
    """For each pair of tokens, the class token first, which row of BEiT's table holds their bias.

    The table's first (2 height − 1)(2 width − 1) rows are the offsets between patches, row by row; the last three are
    the class token to patches, patches to the class token, and the class token to itself (Bao et al. 2021; its code).
    """
    y, x = (axis.ravel() for axis in np.mgrid[:height, :width])
    offsets = (2 * height - 1) * (2 * width - 1)
    index = np.zeros((height * width + 1,) * 2, np.int64)
    index[1:, 1:] = (y[:, None] - y + height - 1) * (2 * width - 1) + x[:, None] - x + width - 1
    index[0, :], index[:, 0], index[0, 0] = offsets, offsets + 1, offsets + 2
    return index


class Attention(nn.Module):
    """Multi-head self-attention, the softmax in float32.

    `grid`, the patches' rows and columns, adds a learned bias by relative position, and leaves out the keys' bias, as
    BEiT does.
    """

    heads: int
    dtype: Any
    grid: tuple[int, int] | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        b, n, d = x.shape
        qkv = Linear(3 * d, self.dtype, self.grid is None, name="qkv")(x).reshape(b, n, 3, self.heads, d // self.heads)
        # Split, not indexed: the gradient is then one concatenation, not the sum of three arrays that are mostly zeros.
        q, k, v = (y[:, :, 0].transpose(0, 2, 1, 3) for y in jnp.split(qkv, 3, 2))  # each (b, heads, n, d / heads)
        bias = None
        if self.grid is not None:
            q, v = (
                y
                + self.param(f"{name}_bias", nn.initializers.zeros, (d,)).astype(y.dtype).reshape(1, -1, 1, y.shape[-1])
                for name, y in (("q", q), ("v", v))
            )
            index = relative_positions(*self.grid)
            rows = int(index.max()) + 1
            table = self.param("rel_pos", nn.initializers.zeros, (rows, self.heads), jnp.float32)
            bias = table[index].transpose(2, 0, 1)
        y = attend(q, k, v, bias).transpose(0, 2, 1, 3).reshape(b, n, d)
        return Linear(d, self.dtype, name="proj")(y)


@jax.custom_vjp
def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The exact GELU, x Φ(x)."""
    # By erf as torch has it: jax.nn.gelu's erfc is three times slower on a CPU. What jax derives keeps erf beside x.
    return 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5))


def _gelu_backward(x: Array, slope: Array) -> tuple[Array]:
    x = jax.lax.optimization_barrier(x)  # else XLA keeps what it computed of it in the forward pass
    return (slope * (0.5 * (1 + jax.lax.erf(x * 0.5**0.5)) + x * jnp.exp(-0.5 * x * x) * (2 * np.pi) ** -0.5),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


def quick_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """OpenAI's approximation in CLIP, x σ(1.702 x)."""
    return x * jax.nn.sigmoid(1.702 * x)


def swiglu(x: Float[Array, "*b d"]) -> Float[Array, "*b e"]:
    """The gated unit of DINOv2's giant: half of the channels, as gates through SiLU, times the other half."""
    gate, value = jnp.split(x, 2, axis=-1)
    return jax.nn.silu(gate) * value


ACTS: dict[str, Callable[[Array], Array]] = {
    "gelu": gelu,
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "quick_gelu": quick_gelu,
    "swiglu": swiglu,
}


class Mlp(nn.Module):
    """Two linear maps with an activation of `ACTS` between them."""

    hidden: int
    dtype: Any
    act: str = "gelu"

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        wide = self.hidden * (2 if self.act == "swiglu" else 1)
        y = ACTS[self.act](Linear(wide, self.dtype, name="fc1")(x))
        return Linear(x.shape[-1], self.dtype, name="fc2")(y)


class LayerScale(nn.Module):
    """A learned factor per channel (Touvron et al. 2021, Going deeper with image transformers)."""

    start: float
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        gamma = self.param("gamma", nn.initializers.constant(self.start), (x.shape[-1],), jnp.float32)
        return x * along_last(gamma.astype(self.dtype), 3)


class Block(nn.Module):
    """Pre-norm attention and MLP, each with its residual, scaled where `layer_scale` is given."""

    heads: int
    mlp: int
    drop_path: float = 0.0
    dtype: Any = jnp.float32
    act: str = "gelu"
    layer_scale: float | None = None
    epsilon: float = 1e-6
    grid: tuple[int, int] | None = None
    prompts: int = 0  # tokens put behind the others before the block
    dropped: int = 0  # tokens taken off the end after it
    spread: float = 0.0  # of fresh prompts

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"], train: bool, use_running_average: bool) -> Float[Array, "b m d"]:
        x = x.astype(self.dtype)
        if self.prompts:
            shape = (1, self.prompts, x.shape[-1])
            tokens = self.param("prompts", uniform(self.spread), shape, jnp.float32).astype(self.dtype)
            x = jnp.concatenate([x, jnp.broadcast_to(tokens, (x.shape[0], *shape[1:]))], axis=1)
        y = LayerNorm(self.dtype, self.epsilon, name="norm1")(x)
        y = Attention(self.heads, self.dtype, self.grid, name="attn")(y)
        if self.layer_scale is not None:
            y = LayerScale(self.layer_scale, self.dtype, name="ls1")(y)
        x = x + DropPath(self.drop_path)(y, train)
        y = LayerNorm(self.dtype, self.epsilon, name="norm2")(x)
        y = Mlp(self.mlp, self.dtype, self.act, name="mlp")(y)
        if self.layer_scale is not None:
            y = LayerScale(self.layer_scale, self.dtype, name="ls2")(y)
        x = x + DropPath(self.drop_path)(y, train)
        return x[:, : x.shape[1] - self.dropped]


def without_prompts(model: Model) -> Model:
    """The model as its pretrained weights have it: no prompts beside its tokens."""
    parts = {
        name: part.clone(prompts=0, dropped=0, spread=0.0) if isinstance(part, Block) else part
        for name, part in model.parts.items()
    }
    return replace(model, parts=parts)


def uniform(spread: float) -> Any:
    """An initialiser: uniform within ± `spread`."""
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -spread, spread)


class TokenPool(nn.Module):
    """The class token, in float32; of a distilled model both it and the distillation token, [b, 2, d]."""

    distilled: bool = False

    def __call__(self, x: Float[Array, "b n d"], train: bool, use_running_average: bool) -> Float[Array, "b *d"]:
        return (x[:, :2] if self.distilled else x[:, 0]).astype(jnp.float32)


class MeanPool(nn.Module):
    """The mean of the patch tokens, then a LayerNorm (timm's `fc_norm`), in float32."""

    prefix: int = 1  # tokens before the patches
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"], train: bool, use_running_average: bool) -> Float[Array, "b d"]:
        return LayerNorm(epsilon=self.epsilon, name="norm")(x[:, self.prefix :].astype(jnp.float32).mean(1))


class TokenMeanPool(nn.Module):
    """The class token and the mean of the patch tokens, one after the other, in float32: DINOv2's linear classifier."""

    prefix: int = 1

    def __call__(self, x: Float[Array, "b n d"], train: bool, use_running_average: bool) -> Float[Array, "b d2"]:
        x = x.astype(jnp.float32)
        return jnp.concatenate([x[:, 0], x[:, self.prefix :].mean(1)], axis=-1)


class Packed(nn.Module):
    """The weights of several linear maps of one input, side by side: kernel [in, out] and bias."""

    features: int

    @nn.compact
    def __call__(self, dim: int) -> tuple[Float[Array, "c d"], Float[Array, " d"]]:
        kernel = self.param("kernel", normal(0.02), (dim, self.features), jnp.float32)
        return kernel, self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)


class MapPool(nn.Module):
    """Attention pooling by a learned query, then an MLP with its residual (Zhai et al. 2021), in float32 in the end."""

    heads: int
    mlp: int
    dtype: Any = jnp.float32
    act: str = "gelu"
    prefix: int = 0
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"], train: bool, use_running_average: bool) -> Float[Array, "b d"]:
        x = x[:, self.prefix :].astype(self.dtype)
        b, n, d = x.shape
        latent = self.param("latent", normal(d**-0.5), (1, 1, d), jnp.float32).astype(self.dtype)
        kernel, bias = (w.astype(self.dtype) for w in Packed(3 * d, name="qkv")(d))
        q = matmul(latent, kernel[:, :d]) + along_last(bias[:d], 3)
        q = jnp.broadcast_to(q.reshape(1, self.heads, 1, -1), (b, self.heads, 1, d // self.heads))
        kv = matmul(x, kernel[:, d:]) + along_last(bias[d:], 3)
        k, v = kv.reshape(b, n, 2, self.heads, -1).transpose(2, 0, 3, 1, 4)
        y = Linear(d, self.dtype, name="proj")(attend(q, k, v).reshape(b, 1, d))
        z = LayerNorm(self.dtype, self.epsilon, name="norm")(y)
        return (y + Mlp(self.mlp, self.dtype, self.act, name="mlp")(z))[:, 0].astype(jnp.float32)


class Projection(nn.Module):
    """A linear map without bias, in float32, such as CLIP's into the space it shares with text."""

    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "b d"], train: bool, use_running_average: bool) -> Float[Array, "b e"]:
        kernel = self.param("kernel", normal(x.shape[-1] ** -0.5), (x.shape[-1], self.features), jnp.float32)
        return jnp.dot(x, kernel)


class DistilledHead(nn.Module):
    """The mean of two heads' logits, of the class token's and the distillation token's, in float32; fresh zero."""

    num_classes: int
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: Float[Array, "b 2 d"], train: bool, use_running_average: bool) -> Float[Array, "b k"]:
        shape = (x.shape[-1], self.num_classes)
        kernels = [self.param(n, nn.initializers.zeros, shape, jnp.float32) for n in ("kernel", "dist_kernel")]
        biases = [self.param(n, nn.initializers.zeros, shape[1:], jnp.float32) for n in ("bias", "dist_bias")]
        x = nn.Dropout(self.dropout, deterministic=not train)(x.astype(jnp.float32))
        logits = [jnp.dot(x[:, i], kernels[i]) + along_last(biases[i], 2) for i in (0, 1)]
        return (logits[0] + logits[1]) / 2


POOLS = ("token", "avg", "token_avg", "map")
POSITIONS = ("all", "class", "patches", "none")


def make_vit(
    name: str,
    *,
    dim: int,
    depth: int,
    heads: int,
    patch: int,
    pool: str = "token",
    mlp_dim: int | None = None,
    act: str = "gelu",
    layer_scale: float | None = None,
    class_token: bool = True,
    distilled: bool = False,
    registers: int = 0,
    positions: str = "all",
    relative: bool = False,
    pre_norm: bool = False,
    projection: int | None = None,
    epsilon: float = 1e-6,
    prompts: int = 0,
    deep_prompts: bool = True,
    num_classes: int = 1000,
    image_size: int | tuple[int, int] | None = None,
    dtype: Any = "float32",
    dropout: float = 0.0,
    drop_path: float = 0.0,
    axis_name: str | None = None,
    remat: str = "none",
    default_size: int = 224,
) -> Model:
    """A Vision Transformer.

    Parts: `embed`, `block0` … , `norm`, `pool`, where asked for `projection`, and `head`.

    `pool` is `token` (the class token), `avg` (the mean of the patch tokens, normalised after the mean: the `norm` part
    then does nothing), `token_avg` (the two, one after the other) or `map` (attention by a learned query). `mlp_dim` is
    the MLPs' width (4 `dim`), `act` their activation: gelu, gelu_tanh, quick_gelu or swiglu. `layer_scale` scales each
    branch by a learned factor that starts there. `distilled` adds a distillation token and its head, `registers` so
    many tokens without meaning. `positions` says which tokens get one: all, all but the registers (`class`), the
    patches (`patches`) or none; `relative` adds BEiT's biases by relative position. `pre_norm` normalises before the
    first block and leaves out the patches' bias, as CLIP does; `projection` is the width of CLIP's; `epsilon` is that
    of the LayerNorms. `prompts` adds so many learned tokens `blockI/prompts`, to every block, which drops them behind
    it, or with `deep_prompts` false to the first, and the last drops them (Jia et al. 2022, "Visual prompt tuning").

    `image_size` is one side or (height, width), multiples of `patch`; `dtype` is that of the computation, parameters
    stay float32; `dropout` acts before the head; `drop_path` is the last block's rate of stochastic depth; `axis_name`
    changes nothing here, there being no BatchNorm.
    """
    size = image_size or default_size
    height, width = (size, size) if isinstance(size, int) else size
    if (height % patch or width % patch) and size != default_size:
        raise UserError(
            f"{name} cuts the picture into {patch}×{patch} patches: image_size {height}×{width} is no multiple of "
            f"{patch}. Try {max(round(height / patch), 1) * patch}×{max(round(width / patch), 1) * patch}."
        )
    for option, value, known in (("pool", pool, POOLS), ("act", act, [*ACTS]), ("positions", positions, POSITIONS)):
        if value not in known:
            raise UserError(f"{name}: {option} is one of {', '.join(known)}, not {value!r}.{near(value, known)}")
    if not class_token and (pool.startswith("token") or relative):
        raise UserError(f"{name} has no class token, which {'relative=True' if relative else f'pool={pool!r}'} needs.")
    if distilled and (pool != "token" or not class_token or projection):
        raise UserError(f"{name}: a distilled model has a class token, pool='token' and no projection.")
    if relative and (distilled or registers):
        raise UserError(f"{name}: relative positions are those of the patches and a class token alone.")
    if prompts < 0 or (prompts and relative):
        raise UserError(f"{name}: prompts is {prompts}; it is at least 0, and 0 with relative positions.")
    dtype, mlp = jnp.dtype(dtype), mlp_dim or 4 * dim
    prefix = int(class_token) + int(distilled) + registers
    grid = (height // patch, width // patch) if relative else None
    parts: dict[str, nn.Module] = {
        "embed": Embed(patch, dim, dtype, not pre_norm, class_token, distilled, registers, positions, pre_norm, epsilon)
    }
    for i, rate in enumerate(drop_path_rates(drop_path, depth)):
        put = prompts if deep_prompts or i == 0 else 0
        dropped = prompts if deep_prompts or i == depth - 1 else 0
        spread = (6 / (3 * patch * patch + dim)) ** 0.5
        parts[f"block{i}"] = Block(
            heads, mlp, rate, dtype, act, layer_scale, epsilon, grid, put, dropped, spread if put else 0.0
        )
    parts |= {
        "norm": Identity() if pool == "avg" else LayerNorm(dtype, epsilon),
        "pool": {
            "token": TokenPool(distilled),
            "avg": MeanPool(prefix, epsilon),
            "token_avg": TokenMeanPool(prefix),
            "map": MapPool(heads, mlp, dtype, act, prefix, epsilon),
        }[pool],
    }
    if projection:
        parts["projection"] = Projection(projection)
    parts["head"] = DistilledHead(num_classes, dropout) if distilled else Head(num_classes, dropout)
    return Model(name, parts, (height, width, 3), num_classes, remat=remat)
