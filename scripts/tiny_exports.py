"""Exports models with generated weights, one of each kind, and what jft makes of a picture, for check_exports.py.

Needs jft, not torch: python scripts/tiny_exports.py FOLDER [KINDS…]
"""

import json
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from generated import VITS, picture, weight

from jft import bundle
from jft.convert import export_model
from jft.errors import UserError
from jft.models import make_model
from jft.preprocess import Preprocess

KINDS: dict[str, tuple[str, dict]] = {
    # what transformers has classes of its own for
    "vit": ("tiny_vit", {}),
    "deit_distilled": ("tiny_vit", VITS["deit_distilled"]),
    "deit3": ("tiny_vit", VITS["deit3"]),
    "dinov2": ("tiny_vit", VITS["dinov2"]),
    "dinov2_token_avg": ("tiny_vit", {**VITS["dinov2"], "pool": "token_avg"}),
    "dinov2_giant": ("tiny_vit", {**VITS["dinov2_giant"], "mlp_dim": 88}),
    "dinov2_registers": ("tiny_vit", VITS["dinov2_reg"]),
    "beit": ("tiny_vit", VITS["beit"]),
    "resnet": ("tiny_resnet", {}),
    "bit": ("tiny_bit", {}),
    "convnext": ("tiny_convnext", {}),
    # what it has through timm
    "vit_avg": ("vit_tiny_patch16_224", {"pool": "avg", "image_size": 64}),
    "clip": ("vit_base_patch32_clip_quickgelu_224", {"image_size": 64}),
    "siglip": ("vit_base_patch16_siglip_224", {"image_size": 64}),
    "resnet_d": ("resnet18d", {"image_size": 64}),
    "resnet_se": ("seresnext50_32x4d", {"image_size": 64}),
    # what torchvision and timm have too
    "resnet18": ("resnet18", {"image_size": 64}),
    "resnet_bit": ("resnetv2_50x1_bit", {"image_size": 64}),
    "vit_b_32": ("vit_base_patch32_224", {"image_size": 64}),
    "convnext_tiny": ("convnext_tiny", {"image_size": 64}),
    "deit": ("deit_tiny_distilled_patch16_224", {"image_size": 64}),
}


def write(folder: Path, name: str, options: dict) -> None:
    """Every format that takes the model, the lines that open it, and the logits."""
    model = make_model(name, num_classes=3, **options)
    params, stats = ({n: weight(n, s.shape) for n, s in shapes.items()} for shapes in model.shapes())
    x = picture(2, *model.input_shape)
    logits, _ = jax.jit(lambda params, stats, x: model.apply(params, stats, x))(params, stats, x)
    folder.mkdir(parents=True)
    np.savez(folder / "expected.npz", x=x.transpose(0, 3, 1, 2), logits=logits)
    told = {}
    with tempfile.TemporaryDirectory() as run:
        bundle.save(
            Path(run) / "model",
            model_name=name,
            model_options={**options, "num_classes": 3},
            params=params,
            batch_stats=stats,
            classes=("ants", "bees", "others"),
            preprocess=Preprocess(size=model.input_shape[:2], crop_pct=0.9, interpolation="bicubic"),
        )
        for format, place in (("hf", "hf"), ("timm", "timm.safetensors"), ("torchvision", "torchvision.safetensors")):
            try:
                told[format] = "\n".join(export_model(run, format, folder / place).code)
            except UserError as error:
                told[format] = f"refused: {error}"
    (folder / "code.json").write_text(json.dumps(told, indent=1))


def main(folder: str, kinds: list[str]) -> None:
    """Write every kind, or these, into a folder of its name."""
    jax.config.update("jax_default_matmul_precision", "highest")
    for kind in kinds or KINDS:
        write(Path(folder) / kind, *KINDS[kind])


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
