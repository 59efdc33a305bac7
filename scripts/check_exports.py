"""Exports runs to timm, torchvision and transformers, runs them there, and compares with jft's own predictions.

Needs torch, timm, torchvision and transformers, not jax; jft is called as a command. It runs the very lines that
`jft export` prints, over the pictures of a folder:

    python scripts/check_exports.py --jft .venv/bin/jft --pictures hymenoptera_data/val runs/resnet18 runs/vit_tiny

Exit code 1 where a class differs or, on the same pixels, a probability by more than 1e-4.
"""

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

# torchvision's compiled operators do not load beside every torch; only their declarations are needed here.
try:
    import torchvision  # noqa: F401
except RuntimeError:
    sys.modules.pop("torchvision", None)
    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

TOLERANCE = 1e-4
SAME_PIXELS = 1.5 / 255  # a processor that is more than rounding away from jft's picture shows another one


def call(*command: object) -> str:
    """A command's output; its error message, and the end, where it fails."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stderr}")
    return done.stdout


def jft_predictions(jft: str, run: Path, pictures: Path, classes: list[str], out: Path) -> dict[str, np.ndarray]:
    """Every picture's probabilities, in the order of the classes."""
    call(jft, "predict", run, pictures, "--top-k", len(classes), "--out", out)
    found = {}
    with open(out, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["error"]:
                continue
            ranks = ["", *(f"_{k}" for k in range(2, len(classes) + 1))]
            by_label = {row[f"label{k}"]: float(row[f"probability{k}"]) for k in ranks}
            found[row["path"]] = np.array([by_label[c] for c in classes])
    return found


def run_code(text: str) -> dict:
    """Run the lines that an export printed after its receipt, up to those about one picture."""
    lines = text.split("\n\n", 1)[1].splitlines()
    scope: dict = {}
    exec("\n".join(line for line in lines if not line.startswith(("logits", "picture", "print"))), scope)
    return scope


def softmax(logits: torch.Tensor) -> np.ndarray:
    """Probabilities of one picture."""
    return torch.softmax(logits[0].double(), -1).numpy()


def upright(path: str) -> object:
    """The picture as the printed lines open it."""
    from PIL import Image, ImageOps

    return ImageOps.exif_transpose(Image.open(path)).convert("RGB")


def check(jft: str, run: Path, pictures: Path, folder: Path) -> bool:
    """Compare one run in every library that has its model; prints a line each."""
    about = json.loads((run / "model" / "config.json").read_text(encoding="utf-8"))
    expected = jft_predictions(jft, run, pictures, about["classes"], folder / "jft.csv")
    formats = ["timm", "hf"] + (["torchvision"] if about["model"].startswith("resnet") else [])
    made = {}
    for format in formats:
        out = folder / (format if format == "hf" else f"{format}.safetensors")
        made[format] = run_code(call(jft, "export", run, "--format", format, "--out", out))
    from transformers import AutoImageProcessor

    transform = made["timm"]["transform"]
    ways = {
        f"{format}, its printed transform": (made[format]["model"], transform) for format in formats if format != "hf"
    }
    ways["hf, the same pixels"] = (made["hf"]["model"], transform)
    for backend in ("pil", "torchvision"):
        processor = AutoImageProcessor.from_pretrained(folder / "hf", backend=backend)
        assert type(processor).__name__.startswith("BitImageProcessor"), type(processor)
        ways[f"hf, its processor ({backend})"] = (
            made["hf"]["model"],
            lambda picture, p=processor: p(images=picture, return_tensors="pt")["pixel_values"][0],
        )
    good = True
    print(f"{run}: {about['model']}, {len(expected)} pictures")
    for way, (model, prepare) in ways.items():
        model.eval()
        worst, differ, moved, off = 0.0, 0, 0, []
        for path, p in expected.items():
            picture = upright(path)
            pixels = prepare(picture)
            shift = (pixels - transform(picture)).abs().max().item() * float(np.min(about["preprocess"]["std"]))
            with torch.no_grad():
                y = model(pixels[None])
            q = softmax(y.logits if hasattr(y, "logits") else y)
            off.append(float(np.abs(p - q).max()))
            worst, differ = max(worst, off[-1]), differ + int(p.argmax() != q.argmax())
            moved += shift > SAME_PIXELS
        bound = "" if "processor" in way else f" (at most {TOLERANCE:g})"
        good &= differ == 0 and ("processor" in way or worst <= TOLERANCE)
        beyond = sum(v > TOLERANCE for v in off)
        print(
            f"  {way:32} other classes {differ}, probabilities within {worst:.2g}{bound}, mean {np.mean(off):.2g}; "
            f"{beyond} pictures beyond {TOLERANCE:g}, {moved} with other pixels"
        )
    return good


def main() -> int:
    """Check every run named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--pictures", type=Path, required=True, help="a folder of pictures")
    parser.add_argument("--jft", default="jft", help="the command")
    options = parser.parse_args()
    good = True
    for run in options.runs:
        with tempfile.TemporaryDirectory() as folder:
            good &= check(options.jft, run, options.pictures, Path(folder))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
