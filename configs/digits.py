"""Transfer on scikit-learn's handwritten digits: from 0-4, with many labels, to 5-9, with ten a class.

Source    none published. The pictures are scikit-learn's 1,797 real 8×8 digits, each twice its size at a random place
          among scraps of others, as in cluttered translated MNIST (Mnih et al. 2014, arXiv 1406.6247). No network.
Expected  test accuracy on 5-9, mean ± std of 5 seeds: staged about 50 % ± 8, head only 40 % ± 2, from scratch 22 % ± 2;
          50.4, 42.2, 21.7 on one machine and 47.9, 38.5, 21.7 on another, since the one source network that all
          seeds share is trained there, and rounding makes it another. The command prints what it measured.
Cost      1.5 minutes on 2 CPU cores.
Command   jft finetune configs/digits.py

A small ResNet learns 0-4, where the digit may be anywhere and what is around it does not count. Its weights are written
as a file under timm's names, and that file is imported as any pretrained weights are. Three ways to 5-9 are compared on
the same few labels: the same network from scratch, a new head on the frozen features, and staged: the head first, then
everything at a lower rate.
"""

from pathlib import Path

import numpy as np

import jft


def digits(chosen: range) -> tuple[np.ndarray, np.ndarray]:
    """The pictures of these digits, uint8 [n, 8, 8] in a fixed random order, and their labels, counted from 0."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = (images.reshape(-1, 8, 8) * 255 / 16).astype(np.uint8)
    order = np.random.default_rng(0).permutation(np.flatnonzero(np.isin(labels, chosen)))
    return images[order], labels[order] - chosen[0]


def scenes(images: np.ndarray, times: int, seed: int) -> np.ndarray:
    """Each picture `times` times, at twice its size, at a random place of a 32×32 canvas with four scraps of others."""
    rng = np.random.default_rng(seed)
    large = images.repeat(2, axis=1).repeat(2, axis=2)
    canvases = np.zeros((len(images) * times, 32, 32), np.uint8)

    def paint(canvas: np.ndarray, picture: np.ndarray) -> None:
        h, w = picture.shape
        top, left = rng.integers(0, 32 - h + 1), rng.integers(0, 32 - w + 1)
        window = canvas[top : top + h, left : left + w]
        np.maximum(window, picture, out=window)

    for i, canvas in enumerate(canvases):
        for _ in range(4):
            top, left = rng.integers(0, 11, 2)
            paint(canvas, large[rng.integers(len(large))][top : top + 6, left : left + 6])
        paint(canvas, large[i // times])
    return canvases


def splits(chosen: range, train: int, times: int) -> dict:
    """So many pictures to train on, each in `times` scenes, 100 to validate, the rest to test; none is in two."""
    images, labels = digits(chosen)
    train_x, val_x, test_x = np.split(images, [train, train + 100])
    train_y, val_y, test_y = np.split(labels, [train, train + 100])
    return {
        "train": (scenes(train_x, times, 1), np.repeat(train_y, times)),
        "val": (scenes(val_x, 1, 2), val_y),
        "test": (scenes(test_x, 1, 3), test_y),
    }


def source_digits() -> dict:
    """0-4, plenty."""
    return splits(range(5), train=650, times=6)


def target_digits() -> dict:
    """5-9, of which `shots` a class are labelled."""
    return splits(range(5, 10), train=400, times=1)


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


COMMON = jft.Config(
    model="tiny_resnet",
    model_options={"depths": (1, 1, 1), "bottleneck": False, "width": 16},
    batch=25,
    augment=(),
    preprocess={"crop_pct": 1.0},
)
SOURCE = COMMON.replace(data=source_digits, weights="none", plan="full", epochs=8, lr=3e-3)
TARGET = COMMON.replace(data=target_digits, shots=10, seeds=5, epochs=40)
STAGED = (
    jft.Stage("head", ("head",), share=1, lr=1e-2),
    jft.Stage("all", ("*",), share=2, lr=3e-3),
)


def config() -> dict[str, jft.Config]:
    """The three ways, side by side."""
    return {
        "from scratch": TARGET.replace(weights="none", plan="full", lr=3e-3),
        "head only": TARGET.replace(weights=source_weights, plan="head", lr=1e-2),
        "staged": TARGET.replace(weights=source_weights, plan=STAGED),
    }
