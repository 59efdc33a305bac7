"""torchvision's names: ResNet."""

from collections.abc import Mapping

from jft.preprocess import Preprocess
from jft.weights.rules import Rule, Source, batch_norm, conv, linear, present

# IMAGENET1K_V1, which timm's repositories hold under torchvision's own names.
SOURCES = {
    f"resnet{depth}": Source(
        uri=f"hf:timm/resnet{depth}.tv_in1k",
        preprocess=Preprocess(),
        data="ImageNet-1k",
        licence="BSD-3-Clause",
        paper="https://arxiv.org/abs/1512.03385",
    )
    for depth in (18, 34, 50, 101, 152)
}

# What torchvision's own get_model makes by the same name.
HAS = {*SOURCES, "wide_resnet50_2", "wide_resnet101_2", "resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d"}


def rules(ours: Mapping[str, tuple[int, ...]]) -> tuple[Rule, ...]:
    """The rules for a model with these names and shapes; none for a family that torchvision names otherwise."""
    deep = "stem/conv3/kernel" in ours  # ResNet-D, under timm's names: torchvision has none
    if not deep and "stem/conv/kernel" not in ours:
        return ()
    found = [*conv("conv1", "stem/conv"), *batch_norm("bn1", "stem/norm")]
    if deep:
        found = [*conv("conv1.0", "stem/conv1"), *batch_norm("conv1.1", "stem/norm1")]
        found += [*conv("conv1.3", "stem/conv2"), *batch_norm("conv1.4", "stem/norm2")]
        found += [*conv("conv1.6", "stem/conv3"), *batch_norm("bn1", "stem/norm3")]
    for block in sorted({"/".join(name.split("/")[:2]) for name in ours if name.startswith("stage")}):
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
    found += linear("fc", "head")
    return present(found, ours)
