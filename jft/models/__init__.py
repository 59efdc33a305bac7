"""The table of models by name, and `make_model`."""

import inspect
from collections.abc import Callable
from functools import partial
from numbers import Integral
from typing import Any

from jft.errors import UserError, brief, near
from jft.models.base import Model
from jft.models.bit import make_bit
from jft.models.convnext import make_convnext
from jft.models.resnet import make_resnet
from jft.models.vgg import make_vgg
from jft.models.vit import make_vit

_R18: dict[str, Any] = dict(depths=(2, 2, 2, 2), bottleneck=False)
_R34: dict[str, Any] = dict(depths=(3, 4, 6, 3), bottleneck=False)
_R50: dict[str, Any] = dict(depths=(3, 4, 6, 3), bottleneck=True)
_R101: dict[str, Any] = dict(depths=(3, 4, 23, 3), bottleneck=True)
_R152: dict[str, Any] = dict(depths=(3, 8, 36, 3), bottleneck=True)
_RESNETS: dict[str, dict[str, Any]] = {
    "resnet18": _R18,
    "resnet34": _R34,
    "resnet50": _R50,
    "resnet101": _R101,
    "resnet152": _R152,
    "resnet18d": _R18 | dict(variant_d=True),
    "resnet34d": _R34 | dict(variant_d=True),
    "resnet50d": _R50 | dict(variant_d=True),
    "resnet101d": _R101 | dict(variant_d=True),
    "resnet152d": _R152 | dict(variant_d=True),
    "wide_resnet50_2": _R50 | dict(group_width=128),
    "wide_resnet101_2": _R101 | dict(group_width=128),
    "resnext50_32x4d": _R50 | dict(groups=32, group_width=4),
    "resnext101_32x8d": _R101 | dict(groups=32, group_width=8),
    "resnext101_64x4d": _R101 | dict(groups=64, group_width=4),
    "seresnet50": _R50 | dict(squeeze=True),
    "seresnet152d": _R152 | dict(squeeze=True, variant_d=True, default_size=256),
    "seresnext50_32x4d": _R50 | dict(groups=32, group_width=4, squeeze=True),
    "seresnext101_32x8d": _R101 | dict(groups=32, group_width=8, squeeze=True),
    "tiny_resnet": dict(depths=(2, 1, 1, 1), bottleneck=True, width=4, num_classes=10, default_size=32),
}
_BITS: dict[str, dict[str, Any]] = {
    f"resnetv2_{layers}x{factor}_bit": dict(depths=depths, width=64 * factor)
    for layers, depths, factors in (
        (50, (3, 4, 6, 3), (1, 3)),
        (101, (3, 4, 23, 3), (1, 3)),
        (152, (3, 8, 36, 3), (2, 4)),
    )
    for factor in factors
} | {"tiny_bit": dict(depths=(2, 1, 1, 1), width=8, groups=4, num_classes=10, default_size=32)}
_CONVNEXTS: dict[str, dict[str, Any]] = {
    "convnext_tiny": dict(depths=(3, 3, 9, 3), widths=(96, 192, 384, 768)),
    "convnext_small": dict(depths=(3, 3, 27, 3), widths=(96, 192, 384, 768)),
    "convnext_base": dict(depths=(3, 3, 27, 3), widths=(128, 256, 512, 1024)),
    "convnext_large": dict(depths=(3, 3, 27, 3), widths=(192, 384, 768, 1536)),
    "tiny_convnext": dict(depths=(1, 1, 2, 1), widths=(8, 16, 24, 32), num_classes=10, default_size=32),
}
_VGGS: dict[str, dict[str, Any]] = {
    f"vgg{layers}{suffix}": dict(depths=depths, batch_norm=bool(suffix))
    for layers, depths in {11: (1, 1, 2, 2, 2), 13: (2,) * 5, 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}.items()
    for suffix in ("", "_bn")
} | {
    "tiny_vgg": dict(
        depths=(1, 1, 2, 1, 1), batch_norm=True, width=4, hidden=24, side=2, num_classes=10, default_size=32
    )
}
_VIT_SIZES: dict[str, dict[str, int]] = {
    "tiny": dict(dim=192, depth=12, heads=3),
    "small": dict(dim=384, depth=12, heads=6),
    "base": dict(dim=768, depth=12, heads=12),
    "large": dict(dim=1024, depth=24, heads=16),
    "huge": dict(dim=1280, depth=32, heads=16),
}
# The pairs that timm has names for; another patch is an option: make_model("vit_tiny_patch16_224", patch=8).
_VIT_PATCHES = {"tiny": (16,), "small": (8, 16, 32), "base": (8, 16, 32), "large": (14, 16, 32), "huge": (14,)}
_DINOV2: dict[str, Any] = dict(patch=14, layer_scale=1e-5, default_size=518)
_DINOV2_SIZES: dict[str, dict[str, Any]] = {size: {**_VIT_SIZES[size]} for size in ("small", "base", "large")} | {
    "giant": dict(dim=1536, depth=40, heads=24, mlp_dim=4096, act="swiglu")
}
_SIGLIP: dict[str, Any] = dict(class_token=False, pool="map")
_SIGLIP_SIZES: dict[str, dict[str, Any]] = {size: {**_VIT_SIZES[size]} for size in ("base", "large")} | {
    "so400m": dict(dim=1152, depth=27, heads=16, mlp_dim=4304)
}
_BEIT: dict[str, Any] = dict(positions="none", relative=True, pool="avg")
_VITS: dict[str, dict[str, Any]] = {
    f"vit_{size}_patch{patch}_224": dict(**_VIT_SIZES[size], patch=patch)
    for size, patches in _VIT_PATCHES.items()
    for patch in patches
} | {
    **{f"deit_{size}_patch16_224": dict(**_VIT_SIZES[size], patch=16) for size in ("tiny", "small", "base")},
    **{
        f"deit_{size}_distilled_patch16_224": dict(**_VIT_SIZES[size], patch=16, distilled=True)
        for size in ("tiny", "small", "base")
    },
    **{
        f"deit3_{size}_patch16_224": dict(**_VIT_SIZES[size], patch=16, positions="patches", layer_scale=1e-6)
        for size in ("small", "base", "large")
    },
    **{f"vit_{size}_patch14_dinov2": _DINOV2 | options for size, options in _DINOV2_SIZES.items()},
    # timm adds the class token's position to the token itself; the files of DINOv2's own repository keep them apart.
    **{
        f"vit_{size}_patch14_reg4_dinov2": _DINOV2 | options | dict(registers=4, positions="patches")
        for size, options in _DINOV2_SIZES.items()
    },
    **{
        f"dinov2_vit{size[0]}14_reg": _DINOV2 | options | dict(registers=4, positions="class")
        for size, options in _DINOV2_SIZES.items()
    },
    **{
        f"vit_{size}_patch{patch}_clip_{act}224": dict(**_VIT_SIZES[size], patch=patch, pre_norm=True, epsilon=1e-5)
        | (dict(act="quick_gelu") if act else {})
        for size, patch in (("base", 32), ("base", 16), ("large", 14))
        for act in ("", "quickgelu_")
    },
    **{
        f"vit_{size}_patch{patch}_siglip_{side}": dict(**_SIGLIP_SIZES[size], **_SIGLIP, patch=patch, default_size=side)
        # timm gives the later so400m the approximate GELU of SigLIP's own code, and the earlier ones the exact.
        | (dict(act="gelu_tanh") if (size, patch) == ("so400m", 16) else {})
        for size, patch, sides in (
            ("base", 16, (224, 256, 384)),
            ("large", 16, (256, 384)),
            ("so400m", 14, (224, 384)),
            ("so400m", 16, (256, 384)),
        )
        for side in sides
    },
    **{
        f"{beit}_{size}_patch16_224": dict(**_VIT_SIZES[size], **_BEIT, patch=16, layer_scale=scale)
        for beit, size, scale in (
            ("beit", "base", 0.1),
            ("beit", "large", 1e-5),
            ("beitv2", "base", 1e-5),
            ("beitv2", "large", 1e-5),
        )
    },
    "tiny_vit": dict(dim=32, depth=3, heads=2, patch=8, num_classes=10, default_size=32),
}

# The options of every family.
_EVERY = ("num_classes", "image_size", "dtype", "dropout", "drop_path", "axis_name", "remat")

MODELS: dict[str, Callable[..., Model]] = {
    name: partial(make_resnet, name, **options) for name, options in _RESNETS.items()
}
MODELS |= {name: partial(make_bit, name, **options) for name, options in _BITS.items()}
MODELS |= {name: partial(make_convnext, name, **options) for name, options in _CONVNEXTS.items()}
MODELS |= {name: partial(make_vgg, name, **options) for name, options in _VGGS.items()}
MODELS |= {name: partial(make_vit, name, **options) for name, options in _VITS.items()}


def make_model(name: str, **options: Any) -> Model:
    """The model of this name in `MODELS`.

    Options of every family: `num_classes` (1000), `image_size` (the model's own; one side, or height and width),
    `dtype` of the computation ("float32"), `dropout` before the head (0), `drop_path` (0), `axis_name` of pmap (None),
    `remat` ("none", "dots", "full"). Raises UserError, with near names, for an unknown model or option.

    >>> make_model("resnet50", num_classes=2).input_shape
    (224, 224, 3)
    """
    if name not in MODELS:
        raise UserError(f"There is no model {name!r}.{near(name, MODELS)} `jft models` prints them all.")
    make = MODELS[name]
    known = [o for o, p in inspect.signature(make).parameters.items() if p.kind is p.KEYWORD_ONLY]
    for option in options:
        if option not in known:
            raise UserError(f"{name} has no option {option!r}.{near(option, known)} Its options: {', '.join(known)}.")
    _check_numbers(name, options.get("num_classes"), options.get("image_size"))
    own = {option: value for option, value in options.items() if option not in _EVERY}
    try:
        model = make(**options)
        # Numbers that no model has show where its arrays are laid out. That is remembered for every kind of part, but
        # takes up to a second the first time, so a model as its name has it is trusted.
        shapes = [shape for part in model.shapes() for shape in part.items()] if own else []
    except (UserError, MemoryError):
        raise
    except Exception as error:  # whatever a family's own code makes of them
        raise UserError(
            f"{name} cannot be made with {own or options}: {brief(str(error).rstrip('.'), 300)}."
        ) from error
    if odd := [f"{n} would be of shape {s.shape}" for n, s in shapes if any(side < 1 for side in s.shape)]:
        raise UserError(f"{name} cannot be made with {own}: {odd[0]}.")
    return model


def _check_numbers(name: str, num_classes: Any, image_size: Any) -> None:
    """Raises UserError for what is no number of classes, or no side or height and width; None is the model's own."""

    def counts(value: Any) -> bool:
        return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1

    if num_classes is not None and not counts(num_classes):
        raise UserError(f"{name}: num_classes is {num_classes!r}; a classifier has at least one class.")
    sides = image_size if isinstance(image_size, list | tuple) else [image_size] * 2
    if image_size is not None and (len(sides) != 2 or not all(map(counts, sides))):
        raise UserError(
            f"{name}: image_size is {image_size!r}; it is one side in pixels, 1 or more, or a pair: height, width."
        )
