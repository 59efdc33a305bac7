"""timm's names: ViT, and ResNet under torchvision's names."""

from collections.abc import Mapping

from jft.preprocess import Preprocess
from jft.weights import torchvision, vit
from jft.weights.rules import Rule, Source

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

SOURCES |= vit.SOURCES


def rules(ours: Mapping[str, tuple[int, ...]]) -> tuple[Rule, ...]:
    """The rules for a model with these names and shapes."""
    return vit.rules(ours) if "embed/patch/kernel" in ours else torchvision.rules(ours)
