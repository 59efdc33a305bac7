"""Transfer on scikit-learn's handwritten digits: from 0-4, of which there are many, to 5-9, of which there are few.

Source    none published: a worked example on 1,797 real 8×8 pictures that come with scikit-learn; no network needed.
Expected  test accuracy on 5-9, 10 labels a class, mean of 5 seeds: staged ahead of the head alone and of scratch; the
          command prints what it measured.
Cost      under 2 minutes on 2 CPU cores.
Command   jft finetune configs/digits.py

A small ResNet learns 0-4 from all their pictures; its weights are written as a file under timm's names, and that
file is imported as any pretrained weights are. On 5-9 three ways are compared, on the same few labels: the same network
from scratch, the head alone on frozen features, and staged (the head first, then everything at a lower rate).
"""

from pathlib import Path

import numpy as np

import jft

SHOTS, SEEDS = 10, 5


def pictures(digits: range) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [n, 8, 8] and labels, 0 for the first of these digits."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    chosen = np.isin(labels, digits)
    return (images[chosen].reshape(-1, 8, 8) * 255 / 16).astype(np.uint8), labels[chosen] - digits[0]


def split(images: np.ndarray, labels: np.ndarray, **parts: int) -> dict:
    """Parts of so many images, in a fixed random order; the rest is the test set."""
    shuffled = np.random.default_rng(0).permutation(len(labels))
    ends = np.cumsum(list(parts.values()))
    pieces = np.split(shuffled, ends)
    return {name: (images[i], labels[i]) for name, i in zip([*parts, "test"], pieces, strict=True)}


def source_digits() -> dict:
    """0-4: 600 to train on, 100 to validate, the rest to test."""
    return split(*pictures(range(5)), train=600, val=100)


def target_digits() -> dict:
    """5-9: 300 to draw the few labelled ones from, 100 to validate, the rest to test."""
    return split(*pictures(range(5, 10)), train=300, val=100)


def source_weights() -> Path:
    """The file with the source network's weights, trained where there is none yet."""
    from jft.data.cache import cache_dir
    from jft.weights import export

    folder = cache_dir() / "digits"
    file = folder / "resnet_0to4.safetensors"
    if not file.exists():
        run = jft.finetune(SOURCE, workdir=str(folder / "run"), display="quiet")
        model = jft.load(run.workdir / "model")
        export(file, model.model, model.params, model.batch_stats, format="timm")
    return file


COMMON = jft.Config(model="tiny_resnet", model_options={"width": 16}, image_size=16, optimizer="adamw", batch=25, augment=(), preprocess={"crop_pct": 1.0})
SOURCE = COMMON.replace(data=source_digits, weights="none", plan="full", epochs=20, lr=3e-3)
TARGET = COMMON.replace(data=target_digits, weights=source_weights, shots=SHOTS, seeds=SEEDS, epochs=40, lr=3e-3)

STAGED = (
    jft.Stage("head", ("head",), epochs=20, lr=1e-2),
    jft.Stage("all", ("head", ("*", 0.3)), epochs=20, lr=1e-2),
)


def config() -> dict[str, jft.Config]:
    """The three ways, side by side."""
    return {
        "from scratch": TARGET.replace(weights="none", plan="full"),
        "head only": TARGET.replace(plan="head", lr=1e-2),
        "staged": TARGET.replace(plan=STAGED),
    }
