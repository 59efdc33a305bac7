"""Records what torchvision's and timm's models do with generated weights, for tests/test_models.py.

Needs torch, torchvision and timm, not jax. One file a group of families:
python scripts/goldens.py models tests/goldens/models.npz
python scripts/goldens.py cnn tests/goldens/cnn.npz
"""

import re
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from generated import case, picture, size, sketch, weight

try:
    import torchvision
except RuntimeError:  # its compiled operators do not fit this torch: declarations are all that is asked for here
    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision
import timm
from timm.layers import GroupNormAct, StdConv2d
from timm.models.convnext import ConvNeXt
from timm.models.resnetv2 import ResNetV2
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.models.vgg import VGG, make_layers

RESNETS = ["tiny_resnet", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]
RESNETS += ["wide_resnet50_2", "wide_resnet101_2", "resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d"]
VARIANTS = ["resnet18d", "resnet34d", "resnet50d", "resnet101d", "resnet152d"]  # timm's alone
VARIANTS += ["seresnet50", "seresnet152d", "seresnext50_32x4d", "seresnext101_32x8d"]
VITS = ["tiny_vit", "vit_tiny_patch16_224"]
VITS += [f"vit_{size}_patch{patch}_224" for size in ("small", "base") for patch in (8, 16, 32)]
VITS += [f"vit_large_patch{patch}_224" for patch in (14, 16, 32)] + ["vit_huge_patch14_224"]
VGGS = ["tiny_vgg", *(f"vgg{layers}{suffix}" for layers in (11, 13, 16, 19) for suffix in ("", "_bn"))]
BITS = ["tiny_bit", *(f"resnetv2_{size}_bit" for size in ("50x1", "50x3", "101x1", "101x3", "152x2", "152x4"))]
CONVNEXTS = ["tiny_convnext", *(f"convnext_{size}" for size in ("tiny", "small", "base", "large"))]
CLASSES = 10

# Their names to ours, kept apart from jft.weights on purpose: an oracle should not lean on what it judges.
NAMES = [
    (r"^conv1\.weight", r"stem.conv.weight"),
    (r"^bn1\.", r"stem.norm."),
    (r"^layer(\d+)\.(\d+)\.", r"stage\1/block\2."),
    (r"\.bn(\d)\.", r".norm\1."),
    (r"\.downsample\.0\.", r".shortcut.conv."),
    (r"\.downsample\.1\.", r".shortcut.norm."),
    (r"^fc\.", r"head."),
    (r"^patch_embed\.proj\.", r"embed.patch."),
    (r"^(cls_token|pos_embed)$", r"embed.\1"),
    (r"^blocks\.(\d+)\.", r"block\1."),
    (r"^fc_norm\.", r"pool.norm."),
    (r"\.running_(mean|var)$", r".\1"),
]


DEEP_NAMES = [  # a D variant's
    (r"^conv1\.0\.", r"stem.conv1."),
    (r"^conv1\.1\.", r"stem.norm1."),
    (r"^conv1\.3\.", r"stem.conv2."),
    (r"^conv1\.4\.", r"stem.norm2."),
    (r"^conv1\.6\.", r"stem.conv3."),
    (r"^bn1\.", r"stem.norm3."),
    (r"\.downsample\.1\.", r".shortcut.conv."),
    (r"\.downsample\.2\.", r".shortcut.norm."),
]
VGG_NAMES = [
    (r"^classifier\.0\.", r"fc1."),
    (r"^classifier\.3\.", r"fc2."),
    (r"^classifier\.6\.", r"head."),
    (r"\.running_(mean|var)$", r".\1"),
]
STAGE_NAMES = [  # of timm's ResNet-v2 and ConvNeXt
    (r"\.downsample\.conv\.weight", r".shortcut.weight"),
    (r"^stem\.0\.", r"stem.patch."),
    (r"^stem\.1\.", r"stem.norm."),
    (r"\.downsample\.0\.", r".blocks.0.downsample.norm."),
    (r"\.downsample\.1\.", r".blocks.0.downsample.conv."),
    (r"^head\.norm\.", r"norm."),
    (r"^head\.fc\.", r"head."),
    (r"\.conv_dw\.", r".conv."),
    (r"\.mlp\.", r"."),
    (r"\.gamma$", r".layer_scale.gamma"),
]


def vgg_layers(model: torch.nn.Module) -> dict[int, str]:
    """Our name of each part of torchvision's `features` that has parameters."""
    found, stage, conv = {}, 1, -1
    for i, layer in enumerate(model.features):
        if isinstance(layer, torch.nn.MaxPool2d):
            stage, conv = stage + 1, -1
        elif isinstance(layer, torch.nn.Conv2d):
            conv += 1
            found[i] = f"stage{stage}/conv{conv}"
        elif isinstance(layer, torch.nn.BatchNorm2d):
            found[i] = f"stage{stage}/conv{conv}.norm"
    return found


def names(model: torch.nn.Module) -> list[tuple[str, str]]:
    """The replacements that make our names of this model's."""
    if hasattr(model, "features"):
        return [(rf"^features\.{i}\.", f"{layer}.") for i, layer in vgg_layers(model).items()] + VGG_NAMES
    if hasattr(model, "stages"):
        blocks = [(rf"^stages\.{s}\.blocks\.", rf"stage{s + 1}/block") for s in range(4)]
        return STAGE_NAMES + blocks
    return (DEEP_NAMES if "conv1.0.weight" in model.state_dict() else []) + NAMES


def ours(name: str, value: torch.Tensor, replacements: Sequence[tuple[str, str]] = NAMES) -> str:
    """Our name of a torch tensor."""
    for pattern, replacement in replacements:
        name = re.sub(pattern, replacement, name)
    if name.endswith(".weight"):
        name = name.removesuffix("weight") + ("scale" if value.ndim == 1 else "kernel")
    return name.replace(".", "/")


def in_our_layout(model: torch.nn.Module, name: str, value: torch.Tensor) -> torch.Tensor:
    """A view of a tensor in our layout: HWIO, [in, out]."""
    if name == "classifier.0.weight" and hasattr(model, "features"):  # over channels, rows and columns, flattened
        value = value.view(len(value), -1, *model.avgpool.output_size)
    if name == "head.fc.weight":  # a 1×1 convolution in ResNet-v2
        value = value.view(value.shape[:2])
    return value.permute({4: (2, 3, 1, 0), 2: (1, 0)}.get(value.ndim, tuple(range(value.ndim))))


def fill(model: torch.nn.Module) -> None:
    """Give every tensor its generated value."""
    replacements = names(model)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if not name.endswith("num_batches_tracked"):
                view = in_our_layout(model, name, value)
                view.copy_(torch.from_numpy(weight(ours(name, value, replacements), tuple(view.shape))))


def build(name: str, **options: object) -> torch.nn.Module:
    """The reference model of this name."""
    if name == "tiny_resnet":
        model = ResNet(Bottleneck, [1, 1, 1, 1], CLASSES)
        model.inplanes = 4
        model.conv1 = torch.nn.Conv2d(3, 4, 7, 2, 3, bias=False)
        model.bn1 = torch.nn.BatchNorm2d(4)
        for i, (planes, blocks) in enumerate([(4, 2), (8, 1), (16, 1), (32, 1)]):
            setattr(model, f"layer{i + 1}", model._make_layer(Bottleneck, planes, blocks, stride=1 + (i > 0)))
        model.fc = torch.nn.Linear(128, CLASSES)
        return model
    if name in RESNETS:
        return torchvision.models.get_model(name, num_classes=CLASSES)
    if name == "tiny_vit":
        return timm.models.VisionTransformer(
            img_size=size(name), patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=CLASSES, **options
        )
    if name == "tiny_vgg":
        layers = [4, "M", 8, "M", 16, 16, "M", 32, "M", 32, "M"]
        model = VGG(make_layers(layers, batch_norm=True), CLASSES, dropout=0.0)
        model.avgpool = torch.nn.AdaptiveAvgPool2d((2, 2))
        for i, (a, b) in {0: (32 * 2 * 2, 24), 3: (24, 24), 6: (24, CLASSES)}.items():
            model.classifier[i] = torch.nn.Linear(a, b)
        return model
    if name in VGGS:
        return torchvision.models.get_model(name, num_classes=CLASSES)
    if name == "tiny_bit":
        return ResNetV2(
            [2, 1, 1, 1],
            (32, 64, 128, 256),
            CLASSES,
            stem_chs=8,
            stem_type="fixed",
            norm_layer=partial(GroupNormAct, num_groups=4),
            conv_layer=partial(StdConv2d, eps=1e-8),
        )
    if name == "tiny_convnext":
        return ConvNeXt(num_classes=CLASSES, depths=(1, 1, 2, 1), dims=(8, 16, 24, 32))
    if name in [*VARIANTS, *BITS, *CONVNEXTS]:
        return timm.create_model(name, num_classes=CLASSES)
    return timm.create_model(name, img_size=size(name), num_classes=CLASSES, **options)


def tap(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What every part of ours gives, filled in as the model runs."""
    seen: dict[str, torch.Tensor] = {}

    def watch(module: torch.nn.Module, part: str) -> None:
        module.register_forward_hook(lambda m, args, y: seen.__setitem__(part, y))

    if hasattr(model, "features"):
        layers = vgg_layers(model)
        for i, layer in enumerate(model.features):
            if isinstance(layer, torch.nn.ReLU):
                part = [found for place, found in layers.items() if place < i][-1].removesuffix(".norm")
                watch(layer, part)
            elif isinstance(layer, torch.nn.MaxPool2d):
                watch(layer, part)  # in the place of the ReLU's
        for i, part in {1: "fc1", 4: "fc2", 6: "head"}.items():
            watch(model.classifier[i], part)
    elif hasattr(model, "stages"):
        watch(model.stem, "stem")
        for s, stage in enumerate(model.stages):
            for i, block in enumerate(stage.blocks):
                watch(block, f"stage{s + 1}/block{i}")
        watch(model.norm if isinstance(model, ResNetV2) else model.head.norm, "norm")
        watch(model.head.global_pool, "pool")
        watch(model.head, "head")
    elif hasattr(model, "layer4"):
        watch(model.maxpool, "stem")
        for stage in range(1, 5):
            for i, block in enumerate(getattr(model, f"layer{stage}")):
                watch(block, f"stage{stage}/block{i}")
        watch(model.fc, "head")
        model.fc.register_forward_pre_hook(lambda m, args: seen.__setitem__("pool", args[0]))
    else:
        watch(model.norm_pre, "embed")
        for i, block in enumerate(model.blocks):
            watch(block, f"block{i}")
        watch(model.norm, "norm")
        model.head.register_forward_pre_hook(lambda m, args: seen.__setitem__("pool", args[0]))
        watch(model.head, "head")
    return seen


def record(name: str, **options: object) -> dict[str, np.ndarray]:
    """The logits and a sketch of every part's output, in the order of the parts."""
    model = build(name, **options).eval()
    fill(model)
    x = torch.from_numpy(picture(2, *size(name), 3).transpose(0, 3, 1, 2))
    if name in BITS:  # a deep one with generated weights enlarges rounding: in float32 torch errs twice as far as jax
        model, x = model.double(), x.double()
    seen = tap(model)
    with torch.no_grad():
        logits = model(x)
    sketches = [sketch(y.permute(0, 2, 3, 1).numpy() if y.ndim == 4 else y.numpy()) for y in seen.values()]
    key = case(name, **options)
    return {f"{key}/logits": logits.float().numpy(), f"{key}/parts": np.stack(sketches).astype(np.float32)}


def record_training(name: str) -> dict[str, np.ndarray]:
    """Training mode: the logits, and sketches of the new statistics and of the gradients, all in one row by name."""
    model = build(name).train()
    fill(model)
    logits = model(torch.from_numpy(picture(4, 64, 64, 3).transpose(0, 3, 1, 2)))
    (logits * torch.from_numpy(picture(4, CLASSES))).sum().backward()
    of = names(model)
    grads = {ours(n, p, of): in_our_layout(model, n, p.grad).numpy() for n, p in model.named_parameters()}
    stats = {ours(n, v, of): v.numpy() for n, v in model.named_buffers() if v.ndim}
    arrays = {
        f"{name} train/{kind}": sketch(np.concatenate([tensors[n].ravel() for n in sorted(tensors)])).astype(np.float32)
        for kind, tensors in {"stats": stats, "grads": grads}.items()
        if tensors
    }
    return {f"{name} train/logits": logits.detach().numpy()} | arrays


def record_group(group: str) -> dict[str, np.ndarray]:
    """Every model of a group, and training of its tiny ones."""
    arrays: dict[str, np.ndarray] = {}
    tiny, members = {
        "models": (["tiny_resnet"], [*RESNETS, *VARIANTS, *VITS]),
        "cnn": (["tiny_vgg", "tiny_bit", "tiny_convnext"], [*VGGS, *BITS, *CONVNEXTS]),
    }[group]
    for name in tiny:
        arrays |= record_training(name)
    for name in members:
        print(name, flush=True)
        arrays |= record(name)
    if group == "models":
        for name in ("tiny_vit", "vit_small_patch32_224"):
            arrays |= {k.replace("global_pool", "pool"): v for k, v in record(name, global_pool="avg").items()}
    return arrays


if __name__ == "__main__":
    np.savez_compressed(sys.argv[2], **record_group(sys.argv[1]))
