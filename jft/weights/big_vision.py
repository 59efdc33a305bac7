"""The names of big_vision's `.npz` files, alone or, as in SigLIP's, beside a text tower (Zhai et al. 2023)."""

from jft.weights.augreg import Flax, affine, attention, blocks
from jft.weights.rules import Rule, Shapes


def _rules(ours: Shapes, root: str = "") -> list[Rule]:
    attn, pool = "MultiHeadDotProductAttention_0", f"{root}MAPHead_0"
    found = [
        Rule(f"{root}cls", "embed/cls_token"),
        Rule(f"{root}pos_embedding", "embed/pos_embed", resize=True),
        *affine(f"{root}embedding", "embed/patch"),
        *blocks(ours, root, attn, "MlpBlock_0", ("LayerNorm_0", "LayerNorm_1")),
        *affine(f"{root}Transformer/encoder_norm", "norm", "scale"),
    ]
    if "pool/latent" in ours:
        found.append(Rule(f"{pool}/probe", "pool/latent"))
        found += attention(f"{pool}/{attn}", ours, "pool")
        found += affine(f"{pool}/LayerNorm_0", "pool/norm", "scale")
        found += [
            *affine(f"{pool}/MlpBlock_0/Dense_0", "pool/mlp/fc1"),
            *affine(f"{pool}/MlpBlock_0/Dense_1", "pool/mlp/fc2"),
        ]
    return [*found, *affine(f"{root}head", "head")]


def _two_tower(ours: Shapes) -> list[Rule]:
    return [
        *_rules(ours, "img/"),
        Rule(("txt/*", "t", "b"), None, why="the text tower and what joins it to the pictures'"),
    ]


PLAIN, TWO_TOWER = Flax(_rules), Flax(_two_tower)
