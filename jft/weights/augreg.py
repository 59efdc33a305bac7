"""The names of vit_jax's `.npz` files: the first ViTs and augreg's (Dosovitskiy et al. 2020, Steiner et al. 2021)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from jft.weights.rules import HEAD, Concat, Reshape, Rule, Shapes, Source, present
from jft.weights.vit import depth


@dataclass(frozen=True)
class Flax:
    """A format of rules alone, in Flax's layout, which is ours but for attention's heads, kept apart there."""

    make: Callable[[Shapes], list[Rule]]
    SOURCES: dict[str, Source] = field(default_factory=dict)

    def rules(self, ours: Mapping[str, tuple[int, ...]]) -> tuple[Rule, ...]:
        """The rules for a ViT; none where the number of its heads is not known."""
        if not isinstance(ours, Shapes) or not ours.heads or "block0/attn/qkv/kernel" not in ours:
            return ()
        return present(self.make(ours), ours)


def affine(theirs: str, ours: str, kernel: str = "kernel") -> list[Rule]:
    """A layer's weights, under the same names on both sides."""
    return [Rule(f"{theirs}/{kernel}", f"{ours}/{kernel}"), Rule(f"{theirs}/bias", f"{ours}/bias")]


def attention(theirs: str, ours: Shapes, block: str) -> list[Rule]:
    """Query, key and value, heads apart in each, to one matrix; and the projection behind them."""
    dim, heads = ours[f"{block}/proj/kernel"][0], ours.heads
    qkv = [f"{theirs}/{part}" for part in ("query", "key", "value")]
    kernel, bias = Reshape((dim, heads, -1), (dim, dim)), Reshape((heads, -1), (dim,))
    return [
        Rule(tuple(f"{part}/kernel" for part in qkv), f"{block}/qkv/kernel", Concat(3, -1, kernel)),
        Rule(tuple(f"{part}/bias" for part in qkv), f"{block}/qkv/bias", Concat(3, -1, bias)),
        Rule(f"{theirs}/out/kernel", f"{block}/proj/kernel", Reshape((heads, -1, dim), (dim, dim))),
        Rule(f"{theirs}/out/bias", f"{block}/proj/bias"),
    ]


def blocks(ours: Shapes, root: str, attn: str, mlp: str, norms: tuple[str, str]) -> list[Rule]:
    """The rules of the blocks, by what a generation of the code called their layers."""
    found = []
    for i in range(depth(ours)):
        theirs, block = f"{root}Transformer/encoderblock_{i}", f"block{i}"
        found += attention(f"{theirs}/{attn}", ours, f"{block}/attn")
        for j, name in enumerate(norms, start=1):
            found += affine(f"{theirs}/{name}", f"{block}/norm{j}", "scale")
            found += affine(f"{theirs}/{mlp}/Dense_{j - 1}", f"{block}/mlp/fc{j}")
    return found


def _augreg(ours: Shapes) -> list[Rule]:
    return [
        Rule("cls", "embed/cls_token"),
        Rule("Transformer/posembed_input/pos_embedding", "embed/pos_embed", resize=True),
        *affine("embedding", "embed/patch"),
        *blocks(ours, "", "MultiHeadDotProductAttention_1", "MlpBlock_3", ("LayerNorm_0", "LayerNorm_2")),
        *affine("Transformer/encoder_norm", "norm", "scale"),
        *affine("head", "head"),
    ]


def _with_pre_logits(ours: Shapes) -> list[Rule]:
    """The ImageNet-21k models of 2020: their head follows a layer that no later model has, so both are left out."""
    why = "the head of 21k classes and the layer before it, which the model has not"
    body = [rule for rule in _augreg(ours) if not (rule.ours or "").startswith(HEAD + "/")]
    pre_logits = Rule(("pre_logits/kernel", "pre_logits/bias"), None, why=why, needed=True)
    return [*body, pre_logits, replace(pre_logits, theirs=("head/kernel", "head/bias"), needed=False)]


AUGREG, WITH_PRE_LOGITS = Flax(_augreg), Flax(_with_pre_logits)
