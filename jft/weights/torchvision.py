"""torchvision's names: ResNet, VGG, ConvNeXt and the plain ViT."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from jft.preprocess import Preprocess
from jft.weights.rules import CONV, LINEAR, Reshape, Rule, Source, batch_norm, conv, linear, norm, present

_RESNET = "https://arxiv.org/abs/1512.03385"
_WIDE = "https://arxiv.org/abs/1605.07146"
_RESNEXT = "https://arxiv.org/abs/1611.05431"
# IMAGENET1K_V1, which timm's repositories hold under torchvision's own names.
SOURCES = {
    name: Source(f"hf:timm/{name}.tv_in1k", Preprocess(), data="ImageNet-1k", licence="BSD-3-Clause", paper=paper)
    for paper, names in {
        _RESNET: ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
        _WIDE: ("wide_resnet50_2", "wide_resnet101_2"),
        _RESNEXT: ("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d"),
    }.items()
    for name in names
}

# What torchvision's own get_model makes, and by which name.
HAS = {
    **{name: name for name in SOURCES},
    **{name: name for layers in (11, 13, 16, 19) for name in (f"vgg{layers}", f"vgg{layers}_bn")},
    **{name: name for name in (f"convnext_{size}" for size in ("tiny", "small", "base", "large"))},
    **{f"vit_{size}_patch{patch}_224": f"vit_{size[0]}_{patch}" for size in ("base", "large") for patch in (16, 32)},
    "vit_huge_patch14_224": "vit_h_14",
}


def rules(ours: Mapping[str, tuple[int, ...]]) -> tuple[Rule, ...]:
    """The rules for a model with these names and shapes; none for a family that torchvision names otherwise."""
    if "stage1/conv0/kernel" in ours:
        return present(_vgg(ours), ours)
    if "stem/patch/kernel" in ours:
        return present(_convnext(ours), ours)
    if "stem/norm/scale" in ours or "stem/conv3/kernel" in ours:
        return present(_resnet(ours), ours)
    return _vit(ours)


@dataclass(frozen=True)
class First:
    """The names of the ViTs' published files, whose MLPs had other names than the models have now."""

    SOURCES: dict[str, Source] = field(default_factory=dict)

    def rules(self, ours: Mapping[str, tuple[int, ...]]) -> tuple[Rule, ...]:
        """The rules for a ViT; none for any other family."""
        return _vit(ours, ("linear_1", "linear_2"))


FIRST = First()


def _vit(ours: Mapping[str, tuple[int, ...]], mlp: tuple[str, str] = ("0", "3")) -> tuple[Rule, ...]:
    """The plain ViT, the only one of the family that torchvision has."""
    if "block0/attn/qkv/kernel" not in ours:
        return ()
    found = [
        Rule("class_token", "embed/cls_token"),
        Rule("encoder.pos_embedding", "embed/pos_embed", resize=True),
        *conv("conv_proj", "embed/patch"),
    ]
    depth = len([name for name in ours if name.endswith("/norm1/scale")])
    for i in range(depth):
        theirs, block = f"encoder.layers.encoder_layer_{i}", f"block{i}"
        found += [*norm(f"{theirs}.ln_1", f"{block}/norm1"), *norm(f"{theirs}.ln_2", f"{block}/norm2")]
        found.append(Rule(f"{theirs}.self_attention.in_proj_weight", f"{block}/attn/qkv/kernel", LINEAR))
        found.append(Rule(f"{theirs}.self_attention.in_proj_bias", f"{block}/attn/qkv/bias"))
        found += linear(f"{theirs}.self_attention.out_proj", f"{block}/attn/proj")
        found += linear(f"{theirs}.mlp.{mlp[0]}", f"{block}/mlp/fc1")
        found += linear(f"{theirs}.mlp.{mlp[1]}", f"{block}/mlp/fc2")
    found += [*norm("encoder.ln", "norm"), *linear("heads.head", "head")]
    plain = present(found, ours)
    return plain if set(ours) == {rule.ours for rule in plain} else ()


def _resnet(ours: Mapping[str, tuple[int, ...]]) -> list[Rule]:
    deep = "stem/conv3/kernel" in ours  # ResNet-D, under timm's names: torchvision has none
    found = [*conv("conv1", "stem/conv"), *batch_norm("bn1", "stem/norm")]
    if deep:
        found = [*conv("conv1.0", "stem/conv1"), *batch_norm("conv1.1", "stem/norm1")]
        found += [*conv("conv1.3", "stem/conv2"), *batch_norm("conv1.4", "stem/norm2")]
        found += [*conv("conv1.6", "stem/conv3"), *batch_norm("bn1", "stem/norm3")]
    for block in blocks(ours):
        theirs = block.replace("stage", "layer").replace("/block", ".")
        for i in (1, 2, 3):
            if f"{block}/conv{i}/kernel" in ours:
                found += conv(f"{theirs}.conv{i}", f"{block}/conv{i}")
                found += batch_norm(f"{theirs}.bn{i}", f"{block}/norm{i}")
        if f"{block}/shortcut/conv/kernel" in ours:
            place = int(deep)  # after the averaging
            found += conv(f"{theirs}.downsample.{place}", f"{block}/shortcut/conv")
            found += batch_norm(f"{theirs}.downsample.{place + 1}", f"{block}/shortcut/norm")
        found += [*conv(f"{theirs}.se.fc1", f"{block}/se/fc1"), *conv(f"{theirs}.se.fc2", f"{block}/se/fc2")]
    return [*found, *linear("fc", "head")]


def blocks(ours: Iterable[str]) -> list[str]:
    """The parts within stages, in depth order."""
    found = {tuple(name.split("/")[:2]) for name in ours if name.startswith("stage")}
    return ["/".join(block) for block in sorted(found, key=lambda block: (block[0], len(block[1]), block[1]))]


def vgg_features(ours: Mapping[str, tuple[int, ...]]) -> list[Rule]:
    """The rules of a VGG's convolutions, which timm names alike."""
    found: list[Rule] = []
    place, before = 0, ""
    for layer in blocks(ours):
        stage = layer.split("/")[0]
        place += int(before not in ("", stage))  # the pooling between
        before = stage
        found += [*conv(f"features.{place}", layer)]
        place += 2  # the convolution and its ReLU
        if f"{layer}/norm/scale" in ours:
            found += batch_norm(f"features.{place - 1}", f"{layer}/norm")
            place += 1
    return found


def _vgg(ours: Mapping[str, tuple[int, ...]]) -> list[Rule]:
    *window, fan_in, hidden = ours["fc1/kernel"]
    # There a row holds a channel's positions, then the next channel's.
    flat = Reshape((hidden, -1), (hidden, fan_in, *window), CONV)
    found = [
        *vgg_features(ours),
        Rule("classifier.0.weight", "fc1/kernel", flat),
        Rule("classifier.0.bias", "fc1/bias"),
    ]
    return [*found, *linear("classifier.3", "fc2"), *linear("classifier.6", "head")]


def _convnext(ours: Mapping[str, tuple[int, ...]]) -> list[Rule]:
    found = [*conv("features.0.0", "stem/patch"), *norm("features.0.1", "stem/norm")]
    for block in blocks(ours):
        stage, _, place = block.removeprefix("stage").partition("/block")
        theirs = f"features.{2 * int(stage) - 1}.{place}"
        if f"{block}/downsample/conv/kernel" in ours:
            found += norm(f"features.{2 * int(stage) - 2}.0", f"{block}/downsample/norm")
            found += conv(f"features.{2 * int(stage) - 2}.1", f"{block}/downsample/conv")
        found.append(Rule(f"{theirs}.layer_scale", f"{block}/layer_scale/gamma", Reshape((-1, 1, 1), (-1,))))
        found += [*conv(f"{theirs}.block.0", f"{block}/conv"), *norm(f"{theirs}.block.2", f"{block}/norm")]
        found += [*linear(f"{theirs}.block.3", f"{block}/fc1"), *linear(f"{theirs}.block.5", f"{block}/fc2")]
    return [*found, *norm("classifier.0", "norm"), *linear("classifier.2", "head")]
