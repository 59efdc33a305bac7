"""The names of BiT's own .npz files (Kolesnikov et al. 2020), in TensorFlow's layout, which is ours."""

from collections.abc import Mapping

from jft.weights.rules import Reshape, Rule, Source, present
from jft.weights.torchvision import blocks

SOURCES: dict[str, Source] = {}


def rules(ours: Mapping[str, tuple[int, ...]]) -> tuple[Rule, ...]:
    """The rules for a BiT ResNet-v2; none for any other family."""
    if "stage1/block0/shortcut/kernel" not in ours:
        return ()
    found = [Rule("resnet/root_block/standardized_conv2d/kernel", "stem/conv/kernel")]
    for block in blocks(ours):
        stage, _, place = block.removeprefix("stage").partition("/block")
        theirs = f"resnet/block{stage}/unit{int(place) + 1:02}"
        found.append(Rule(f"{theirs}/a/proj/standardized_conv2d/kernel", f"{block}/shortcut/kernel"))
        for i, letter in enumerate("abc", start=1):
            found += _group_norm(f"{theirs}/{letter}/group_norm", f"{block}/norm{i}")
            found.append(Rule(f"{theirs}/{letter}/standardized_conv2d/kernel", f"{block}/conv{i}/kernel"))
    fan_in = ours["head/kernel"][0]
    pointwise = Reshape((1, 1, fan_in, -1), (fan_in, -1))
    found += _group_norm("resnet/group_norm", "norm")
    found.append(Rule("resnet/head/conv2d/kernel", "head/kernel", pointwise))
    return present([*found, Rule("resnet/head/conv2d/bias", "head/bias")], ours)


def _group_norm(theirs: str, ours: str) -> list[Rule]:
    return [Rule(f"{theirs}/gamma", f"{ours}/scale"), Rule(f"{theirs}/beta", f"{ours}/bias")]
