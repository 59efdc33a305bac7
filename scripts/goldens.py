"""Records what torchvision's and timm's models do with generated weights, for tests/test_models.py.

Needs torch, torchvision and timm, not jax: python scripts/goldens.py tests/goldens/models.npz
"""

import re
import sys
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
from torchvision.models.resnet import Bottleneck, ResNet

RESNETS = ["tiny_resnet", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]
RESNETS += ["wide_resnet50_2", "wide_resnet101_2", "resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d"]
VARIANTS = ["resnet18d", "resnet34d", "resnet50d", "resnet101d", "resnet152d"]  # timm's alone
VARIANTS += ["seresnet50", "seresnet152d", "seresnext50_32x4d", "seresnext101_32x8d"]
VITS = ["tiny_vit", "vit_tiny_patch16_224"]
VITS += [f"vit_{size}_patch{patch}_224" for size in ("small", "base") for patch in (8, 16, 32)]
VITS += [f"vit_large_patch{patch}_224" for patch in (14, 16, 32)] + ["vit_huge_patch14_224"]
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


def ours(name: str, value: torch.Tensor, deep: bool = False) -> str:
    """Our name of a torch tensor."""
    for pattern, replacement in (DEEP_NAMES if deep else []) + NAMES:
        name = re.sub(pattern, replacement, name)
    if name.endswith(".weight"):
        name = name.removesuffix("weight") + ("scale" if value.ndim == 1 else "kernel")
    return name.replace(".", "/")


def to_ours(value: torch.Tensor) -> np.ndarray:
    """A tensor in our layout: HWIO, [in, out]."""
    axes = {4: (2, 3, 1, 0), 2: (1, 0)}.get(value.ndim, tuple(range(value.ndim)))
    return value.detach().numpy().transpose(axes)


def fill(model: torch.nn.Module) -> None:
    """Give every tensor its generated value."""
    back = {4: (3, 2, 0, 1), 2: (1, 0)}
    deep = any(name == "conv1.0.weight" for name in model.state_dict())
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if not name.endswith("num_batches_tracked"):
                new = weight(ours(name, value, deep), to_ours(value).shape)
                value.copy_(torch.from_numpy(new.transpose(back.get(value.ndim, tuple(range(value.ndim))))))


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
    if name in VARIANTS:
        return timm.create_model(name, num_classes=CLASSES)
    return timm.create_model(name, img_size=size(name), num_classes=CLASSES, **options)


def tap(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What every part of ours gives, filled in as the model runs."""
    seen: dict[str, torch.Tensor] = {}

    def watch(module: torch.nn.Module, part: str) -> None:
        module.register_forward_hook(lambda m, args, y: seen.__setitem__(part, y))

    if hasattr(model, "layer4"):
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
    seen = tap(model)
    with torch.no_grad():
        logits = model(torch.from_numpy(picture(2, *size(name), 3).transpose(0, 3, 1, 2)))
    sketches = [sketch(y.permute(0, 2, 3, 1).numpy() if y.ndim == 4 else y.numpy()) for y in seen.values()]
    key = case(name, **options)
    return {f"{key}/logits": logits.numpy(), f"{key}/parts": np.stack(sketches).astype(np.float32)}


def record_training(name: str) -> dict[str, np.ndarray]:
    """Training mode: the logits, and sketches of the new statistics and of the gradients, all in one row by name."""
    model = build(name).train()
    fill(model)
    logits = model(torch.from_numpy(picture(4, 64, 64, 3).transpose(0, 3, 1, 2)))
    (logits * torch.from_numpy(picture(4, CLASSES))).sum().backward()
    grads = {ours(n, p): to_ours(p.grad) for n, p in model.named_parameters()}
    stats = {ours(n, v): to_ours(v) for n, v in model.named_buffers() if v.ndim}
    arrays = {
        f"{name} train/{kind}": sketch(np.concatenate([tensors[n].ravel() for n in sorted(tensors)])).astype(np.float32)
        for kind, tensors in {"stats": stats, "grads": grads}.items()
    }
    return {f"{name} train/logits": logits.detach().numpy()} | arrays


def main(path: str) -> None:
    """Record every model, and write them to one file."""
    arrays = record_training("tiny_resnet")
    for name in [*RESNETS, *VARIANTS, *VITS]:
        print(name, flush=True)
        arrays |= record(name)
    for name in ("tiny_vit", "vit_small_patch32_224"):
        arrays |= {k.replace("global_pool", "pool"): v for k, v in record(name, global_pool="avg").items()}
    np.savez_compressed(path, **arrays)


if __name__ == "__main__":
    main(sys.argv[1])
