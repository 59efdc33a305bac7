"""timm's names: ViT, and ResNet under torchvision's names."""

from collections.abc import Mapping

from jft.preprocess import Preprocess
from jft.weights import torchvision
from jft.weights.rules import Rule, Source, conv, linear, norm, present

_INCEPTION = Preprocess(crop_pct=0.9, interpolation="bicubic", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def _source(name: str, tag: str, data: str, paper: str) -> Source:
    return Source(f"hf:timm/{name}.{tag}", _INCEPTION, data, "Apache-2.0", f"https://arxiv.org/abs/{paper}")


_AUGREG = ("ImageNet-21k, then ImageNet-1k", "2106.10270")
_ORIGINAL = ("ImageNet-21k, without head", "2010.11929")
SOURCES = {
    name: _source(name, tag, *about)
    for name, tag, about in (
        ("vit_tiny_patch16_224", "augreg_in21k_ft_in1k", _AUGREG),
        ("vit_small_patch16_224", "augreg_in21k_ft_in1k", _AUGREG),
        ("vit_small_patch32_224", "augreg_in21k_ft_in1k", _AUGREG),
        ("vit_base_patch8_224", "augreg_in21k_ft_in1k", _AUGREG),
        ("vit_base_patch16_224", "augreg2_in21k_ft_in1k", _AUGREG),
        ("vit_base_patch32_224", "augreg_in21k_ft_in1k", _AUGREG),
        ("vit_large_patch16_224", "augreg_in21k_ft_in1k", _AUGREG),
        ("vit_large_patch32_224", "orig_in21k", _ORIGINAL),
        ("vit_huge_patch14_224", "orig_in21k", _ORIGINAL),
    )
}


def rules(ours: Mapping[str, tuple[int, ...]]) -> tuple[Rule, ...]:
    """The rules for a model with these names and shapes."""
    return _vit(ours) if "embed/patch/kernel" in ours else torchvision.rules(ours)


def _vit(ours: Mapping[str, tuple[int, ...]]) -> tuple[Rule, ...]:
    found = [
        Rule("cls_token", "embed/cls_token"),
        Rule("pos_embed", "embed/pos_embed", resize=True),
        *conv("patch_embed.proj", "embed/patch"),
    ]
    i = 0
    while f"block{i}/norm1/scale" in ours:
        theirs, block = f"blocks.{i}", f"block{i}"
        found += norm(f"{theirs}.norm1", f"{block}/norm1")
        found += linear(f"{theirs}.attn.qkv", f"{block}/attn/qkv")
        found += linear(f"{theirs}.attn.proj", f"{block}/attn/proj")
        found += norm(f"{theirs}.norm2", f"{block}/norm2")
        found += linear(f"{theirs}.mlp.fc1", f"{block}/mlp/fc1")
        found += linear(f"{theirs}.mlp.fc2", f"{block}/mlp/fc2")
        i += 1
    found += [*norm("norm", "norm"), *norm("fc_norm", "pool/norm"), *linear("head", "head")]
    return present(found, ours)
