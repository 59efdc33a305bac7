"""timm's names: ViT, VGG, BiT and ConvNeXt, and ResNet under torchvision's names."""

from collections.abc import Callable, Mapping
from dataclasses import replace

from jft.preprocess import Preprocess
from jft.weights import torchvision, vit
from jft.weights.rules import LINEAR, Reshape, Rule, Source, conv, linear, norm, present

_INCEPTION = Preprocess(crop_pct=0.9, interpolation="bicubic", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def _source(name: str, tag: str, data: str, paper: str) -> Source:
    return Source(f"hf:timm/{name}.{tag}", _INCEPTION, data, "Apache-2.0", f"https://arxiv.org/abs/{paper}")


_AUGREG = ("ImageNet-21k, then ImageNet-1k", "2106.10270")
_ORIGINAL = ("ImageNet-21k, without head", "2010.11929")
SOURCES = {
    name: _source(name, tag, *about)
    for name, tag, about in (
        ("vit_tiny_patch16_224", "augreg_in21k_ft_in1k", _AUGREG),
        ("vit_small_patch8_224", "dino", ("ImageNet-1k, without labels", "2104.14294")),
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

SOURCES["vit_small_patch8_224"] = replace(
    SOURCES["vit_small_patch8_224"], preprocess=Preprocess(crop_pct=0.9, interpolation="bicubic")
)
SOURCES |= vit.SOURCES

_APACHE, _BSD = "Apache-2.0", "BSD-3-Clause"
_IN1K = "ImageNet-1k"
_BICUBIC = Preprocess(interpolation="bicubic")
_HALF = Preprocess(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
_D, _SE = "https://arxiv.org/abs/1812.01187", "https://arxiv.org/abs/1709.01507"
SOURCES |= {
    name: Source(f"hf:timm/{name}.{tag}", preprocess, data, licence, paper)
    for names, tag, preprocess, data, licence, paper in (
        (("resnet18d", "resnet34d", "resnet50d"), "ra2_in1k", _BICUBIC, _IN1K, _APACHE, _D),
        (("resnet101d", "resnet152d"), "gluon_in1k", _BICUBIC, _IN1K, _APACHE, _D),
        (("seresnet50",), "ra2_in1k", _BICUBIC, _IN1K, _APACHE, _SE),
        (("seresnet152d",), "ra2_in1k", replace(_BICUBIC, size=(256, 256), crop_pct=0.95), _IN1K, _APACHE, _SE),
        (("seresnext50_32x4d",), "racm_in1k", _BICUBIC, _IN1K, _APACHE, _SE),
        (("seresnext101_32x8d",), "ah_in1k", replace(_BICUBIC, crop_pct=0.95), _IN1K, _APACHE, _SE),
        (
            tuple(f"vgg{layers}{suffix}" for layers in (11, 13, 16, 19) for suffix in ("", "_bn")),
            *("tv_in1k", Preprocess(), _IN1K, _BSD, "https://arxiv.org/abs/1409.1556"),
        ),
        (  # BiT-M, which the paper transfers
            tuple(f"resnetv2_{size}_bit" for size in ("50x1", "50x3", "101x1", "101x3", "152x2", "152x4")),
            *("goog_in21k", _HALF, "ImageNet-21k", _APACHE, "https://arxiv.org/abs/1912.11370"),
        ),
        (
            tuple(f"convnext_{size}" for size in ("tiny", "small", "base", "large")),
            *("fb_in22k_ft_in1k", _BICUBIC, "ImageNet-22k, then ImageNet-1k", _APACHE),
            "https://arxiv.org/abs/2201.03545",
        ),
    )
    for name in names
}


def rules(ours: Mapping[str, tuple[int, ...]]) -> tuple[Rule, ...]:
    """The rules for a model with these names and shapes."""
    for name, family in _FAMILIES.items():
        if name in ours:
            return family(ours)
    return torchvision.rules(ours)


def _vgg(ours: Mapping[str, tuple[int, ...]]) -> tuple[Rule, ...]:
    found = [
        *torchvision.vgg_features(ours),
        *conv("pre_logits.fc1", "fc1"),
        *_pointwise("pre_logits.fc2", "fc2", ours),
    ]
    return present([*found, *linear("head.fc", "head")], ours)


def _bit(ours: Mapping[str, tuple[int, ...]]) -> tuple[Rule, ...]:
    found = conv("stem.conv", "stem/conv")
    for block in torchvision.blocks(ours):
        stage, _, place = block.removeprefix("stage").partition("/block")
        theirs = f"stages.{int(stage) - 1}.blocks.{place}"
        found += conv(f"{theirs}.downsample.conv", f"{block}/shortcut")
        for i in (1, 2, 3):
            found += [*norm(f"{theirs}.norm{i}", f"{block}/norm{i}"), *conv(f"{theirs}.conv{i}", f"{block}/conv{i}")]
    return present([*found, *norm("norm", "norm"), *_pointwise("head.fc", "head", ours)], ours)


def _convnext(ours: Mapping[str, tuple[int, ...]]) -> tuple[Rule, ...]:
    found = [*conv("stem.0", "stem/patch"), *norm("stem.1", "stem/norm")]
    for block in torchvision.blocks(ours):
        stage, _, place = block.removeprefix("stage").partition("/block")
        theirs = f"stages.{int(stage) - 1}"
        found += norm(f"{theirs}.downsample.0", f"{block}/downsample/norm")
        found += conv(f"{theirs}.downsample.1", f"{block}/downsample/conv")
        theirs += f".blocks.{place}"
        found += [Rule(f"{theirs}.gamma", f"{block}/layer_scale/gamma"), *conv(f"{theirs}.conv_dw", f"{block}/conv")]
        found += [*norm(f"{theirs}.norm", f"{block}/norm"), *linear(f"{theirs}.mlp.fc1", f"{block}/fc1")]
        found += linear(f"{theirs}.mlp.fc2", f"{block}/fc2")
    return present([*found, *norm("head.norm", "norm"), *linear("head.fc", "head")], ours)


def _pointwise(theirs: str, name: str, ours: Mapping[str, tuple[int, ...]]) -> list[Rule]:
    """A linear layer that is kept as a 1×1 convolution."""
    fan_in = ours[f"{name}/kernel"][0]
    op = Reshape((-1, fan_in, 1, 1), (-1, fan_in), LINEAR)
    return [Rule(f"{theirs}.weight", f"{name}/kernel", op), Rule(f"{theirs}.bias", f"{name}/bias")]


# What only this family's models have.
_FAMILIES: dict[str, Callable[[Mapping[str, tuple[int, ...]]], tuple[Rule, ...]]] = {
    "embed/patch/kernel": vit.rules,
    "stage1/conv0/kernel": _vgg,
    "stage1/block0/shortcut/kernel": _bit,
    "stem/patch/kernel": _convnext,
}
