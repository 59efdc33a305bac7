"""Exports runs to timm, torchvision and transformers, runs them there, and compares with jft's own predictions.

Needs torch, timm, torchvision and transformers, not jax; jft is called as a command. It runs the very lines that
`jft export` prints, over the pictures of a folder:

    python scripts/check_exports.py --jft .venv/bin/jft --pictures hymenoptera_data/val runs/resnet18 runs/vit_tiny

or the models of every kind that tiny_exports.py has written, on the picture beside them:

    python scripts/check_exports.py --generated FOLDER

Exit code 1 where a class differs, or a probability by more than 1e-4, or logits by that share. Probabilities may differ
by more where transformers' own image processor prepares the pictures, which has other pixels than jft; it has none of
them other with `--processor timm`. A format that jft refuses for a model is told and passed over.
"""

import argparse
import csv
import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
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
    """Run the lines that an export printed, but for those about one picture."""
    lines = text.splitlines()
    scope: dict = {}
    exec("\n".join(line for line in lines if not line.startswith(("logits", "picture", "print"))), scope)
    return scope


def transform_of(preprocess: dict) -> str:
    """torchvision's transform of a bundle's preprocessing."""
    size, mode = tuple(preprocess["size"]), f"T.InterpolationMode.{preprocess['interpolation'].upper()}"
    resize = int(min(size) / preprocess["crop_pct"])
    steps = [f"T.Resize({size}, {mode})"]
    if not preprocess["squash"]:
        steps = [f"T.Resize({resize}, {mode})", f"T.CenterCrop({size})"]
    steps += ["T.ToTensor()", f"T.Normalize({tuple(preprocess['mean'])}, {tuple(preprocess['std'])})"]
    return f"T.Compose([{', '.join(steps)}])"


def pixels_of(paths: Iterable[str], prepare: Callable[[object], torch.Tensor]) -> list[torch.Tensor]:
    """What a way of preparing them makes of the pictures."""
    return [torch.as_tensor(prepare(upright(path))) for path in paths]


def probabilities(
    model: torch.nn.Module, pixels: list[torch.Tensor], known: dict[bytes, np.ndarray], batch: int = 17
) -> np.ndarray:
    """Every picture's probabilities. What `known` has of this model and the very pixels is not computed again."""
    keys = [hashlib.sha256(x.numpy().tobytes()).digest() for x in pixels]
    fresh = [i for i, key in enumerate(keys) if key not in known]
    for start in range(0, len(fresh), batch):
        places = fresh[start : start + batch]
        with torch.no_grad():
            y = model(torch.stack([pixels[i] for i in places]))
        y = y.logits if hasattr(y, "logits") else y
        known |= zip([keys[i] for i in places], torch.softmax(y.double(), -1).numpy(), strict=True)
    return np.stack([known[key] for key in keys])


def by_processor(processor: Callable) -> Callable[[object], torch.Tensor]:
    """A picture's pixels by an image processor of transformers'."""
    return lambda picture: processor(images=picture, return_tensors="pt")["pixel_values"][0]


def upright(path: str) -> object:
    """The picture as the printed lines open it."""
    from PIL import Image, ImageOps

    return ImageOps.exif_transpose(Image.open(path)).convert("RGB")


def check(jft: str, run: Path, pictures: Path, folder: Path) -> bool:
    """Compare one run in every library that has its model; prints a line each."""
    about = json.loads((run / "model" / "config.json").read_text(encoding="utf-8"))
    expected = jft_predictions(jft, run, pictures, about["classes"], folder / "jft.csv")
    print(f"{run}: {about['model']}, {len(expected)} pictures")
    made = {}
    for words in ("timm", "torchvision", "hf", "hf --processor timm"):
        format, *more = words.split()
        out = folder / (words.replace(" ", "") if format == "hf" else f"{format}.safetensors")
        try:
            made[words] = run_code(
                call(jft, "export", run, "--format", format, *more, "--out", out).split("\n\n", 1)[1]  # its receipt
            )
        except SystemExit as refused:
            print(f"  {words} is refused: {str(refused).splitlines()[1][:90]}")
    from torchvision import transforms as T
    from transformers import AutoImageProcessor

    transform = eval(transform_of(about["preprocess"]), {"T": T})
    ways = {}
    for words, found in made.items():
        if not words.startswith("hf"):
            ways[f"{words}, its printed transform"] = (found["model"], found["transform"])
            continue
        assert [found["model"].config.id2label[i] for i in range(len(about["classes"]))] == about["classes"]
        ways[f"{words}, its printed processor"] = (found["model"], by_processor(found["processor"]))
        if words == "hf":
            ways["hf, the same pixels"] = (found["model"], transform)
            own = AutoImageProcessor.from_pretrained(folder / "hf", backend="pil")
            ways["hf, its processor (pil)"] = (found["model"], by_processor(own))
    good = bool(made)
    of_jft = pixels_of(expected, transform)
    p = np.stack([*expected.values()])
    known: dict[int, dict[bytes, np.ndarray]] = {}
    for way, (model, prepare) in ways.items():
        pixels = pixels_of(expected, prepare)
        q = probabilities(model.eval(), pixels, known.setdefault(id(model), {}))
        off, differ = np.abs(p - q).max(1), int((p.argmax(1) != q.argmax(1)).sum())
        moved = sum(
            (a - b).abs().max().item() * float(np.min(about["preprocess"]["std"])) > SAME_PIXELS
            for a, b in zip(pixels, of_jft, strict=True)
        )
        free = way.startswith("hf, its")
        good &= differ == 0 and (free or off.max() <= TOLERANCE)
        bound = "" if free else f" (at most {TOLERANCE:g})"
        worst, beyond = off.max(), int((off > TOLERANCE).sum())
        print(
            f"  {way:42} {type(model).__name__:30} other classes {differ}, probabilities within {worst:.2g}{bound}, "
            f"mean {off.mean():.2g}; {beyond} pictures beyond {TOLERANCE:g}, {moved} with other pixels",
            flush=True,
        )
    return good


def check_generated(folder: Path) -> bool:
    """Compare one model in every library that has it; prints a line each."""
    expected, good = np.load(folder / "expected.npz"), True
    for format, code in json.loads((folder / "code.json").read_text(encoding="utf-8")).items():
        if code.startswith("refused: "):
            print(f"{folder.name:18} {format:12} {code[:90]}")
            continue
        scope = run_code(code)
        model, kind = scope["model"].eval(), type(scope["model"]).__name__
        with torch.no_grad():
            y = model(torch.from_numpy(expected["x"]))
        y = (y.logits if hasattr(y, "logits") else y).numpy()
        off = float(np.linalg.norm(y - expected["logits"]) / np.linalg.norm(expected["logits"]))
        fits = off <= TOLERANCE
        if format == "hf":
            _, told = type(model).from_pretrained(folder / "hf", output_loading_info=True)
            fits &= not any(told.values()) and list(model.config.id2label.values()) == ["ants", "bees", "others"]
            pixels = scope["processor"](images=picture(), return_tensors="pt")["pixel_values"]
            fits &= pixels.shape[1:] == expected["x"].shape[1:]
        print(f"{folder.name:18} {format:12} {kind:40} logits within {off:.2g}{'' if fits else '  WRONG'}")
        good &= fits
    return good


def picture() -> object:
    """A picture of noise."""
    from PIL import Image

    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8))


def main() -> int:
    """Check every run named, or every generated model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path)
    parser.add_argument("--pictures", type=Path, help="a folder of pictures")
    parser.add_argument("--generated", type=Path, metavar="FOLDER", help="what tiny_exports.py has written")
    parser.add_argument("--jft", default="jft", help="the command")
    options = parser.parse_args()
    if bool(options.runs) != bool(options.pictures) or not (options.runs or options.generated):
        parser.error("name runs and --pictures, or --generated")
    good = True
    for folder in sorted(options.generated.iterdir()) if options.generated else ():
        good &= check_generated(folder)
    for run in options.runs:
        with tempfile.TemporaryDirectory() as folder:
            good &= check(options.jft, run, options.pictures, Path(folder))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
