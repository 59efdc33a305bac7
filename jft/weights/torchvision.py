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


def rules(ours: Mapping[str, tuple[int, ...]]) -> tuple[Rule, ...]:
    """The rules for a model with these names and shapes; none for a family that torchvision names otherwise."""
    if "stem/conv/kernel" not in ours:
        return ()
    found = [*conv("conv1", "stem/conv"), *batch_norm("bn1", "stem/norm")]
    for block in sorted({"/".join(name.split("/")[:2]) for name in ours if name.startswith("stage")}):
        theirs = block.replace("stage", "layer").replace("/block", ".")
        for i in (1, 2, 3):
            if f"{block}/conv{i}/kernel" in ours:
                found += conv(f"{theirs}.conv{i}", f"{block}/conv{i}")
                found += batch_norm(f"{theirs}.bn{i}", f"{block}/norm{i}")
        if f"{block}/shortcut/conv/kernel" in ours:
            found += conv(f"{theirs}.downsample.0", f"{block}/shortcut/conv")
            found += batch_norm(f"{theirs}.downsample.1", f"{block}/shortcut/norm")
    found += linear("fc", "head")
    return present(found, ours)
