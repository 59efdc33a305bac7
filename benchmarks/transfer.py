"""Every plan and regulariser on few images: accuracy over seeds, mean ± spread, and seconds, as one table.

    python benchmarks/transfer.py $JFT_ASSETS transfer.csv                    all of it: hours on two cores
    python benchmarks/transfer.py $JFT_ASSETS transfer.csv --only shots=5 --only model=vit
    python benchmarks/transfer.py $JFT_ASSETS transfer.csv --table            what has been measured, as Markdown
    python benchmarks/transfer.py $JFT_ASSETS whole.csv --only shots=5 --size 224       in a file of its own

A run is one line of the CSV, appended when it is done; lines that are there are not run again, so that the command can
be stopped and given again at any time. The most telling comparisons come first.

All runs of a setting take the same number of steps of 8 images, at the rates that the plan itself has, on images of
96 pixels (the models were pretrained at 224: the whole is meant for two cores). The accuracy is that of the last state,
not that of the best validated one, so nothing is chosen on the images it is told of. WiSE-FT's α is chosen on one half
of them and scored on the other, both ways round. Seconds are the processor's, over all its cores: those of a clock
depend on what else runs. The table has their median over seeds, of which only the first compiles.
"""

import argparse
import csv
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

import jft
from jft import average, losses, plan, shard, weights
from jft.build import plain_model
from jft.data import order, pipeline, sources
from jft.data.prepare import make_prepare
from jft.run import Shared
from jft.step import make_eval_step
from jft.train import train

BATCH, SIZE = 8, 96
STEPS = {1: 40, 5: 40, 20: 60, None: 100}  # by images a class
SEEDS = range(5)
FILES = {
    "vit_tiny_patch16_224": "vit_tiny_patch16_224.safetensors",
    "resnet18": "resnet18_imagenet_ktb.pth",
    "resnet50": "resnet50_imagenet_ktb.safetensors",
}
MODELS = ("vit_tiny_patch16_224", "resnet18")
DATA = {"ants and bees": "hymenoptera_data", "CIFAR-10": "cifar10_subset"}
SCORED = 20  # images a class of CIFAR's test set; of the ants and bees all 153
ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)


def then(lr: float, batch_norm: Literal["auto", "frozen"] = "auto") -> dict[str, Any]:
    """LP-FT with its second stage at another rate, or with BatchNorms that keep their statistics."""
    probe, rest = plan.lp_ft(())
    return {"plan": (probe, replace(rest, lr=lr, batch_norm=batch_norm))}


def share(value: float) -> dict[str, Any]:
    """`full` with this share of the head's rate for pretrained parts, whose BatchNorms normalise by the batch."""
    return {"plan": (plan.Stage("full", ("head", ("*", value)), lr=1e-3),)}


# What each changes of a Config. `full` is what the other plans are told against, `flat` what regularisers of it are.
METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "full, share 0.1": share(0.1),
    "flat": {"plan": "flat"},
    "head": {"plan": "head"},
    "lp-ft": {"plan": "lp-ft"},
    "flat, L2-SP 0.1": {"plan": "flat", "penalty": "l2-sp", "penalty_weight": 0.1},
    "gradual": {"plan": "gradual"},
    "surgical": {"plan": "surgical"},
    "lora": {"plan": "lora"},
    "bitfit": {"plan": "bitfit"},
    "norm": {"plan": "norm"},
    "top-1": {"plan": "top-1"},
    "vpt": {"plan": "vpt"},
    "surgical-first": {"plan": "surgical-first"},
    "surgical-last": {"plan": "surgical-last"},
    "flat, layer decay 0.75": {"plan": "flat", "layer_decay": 0.75},
    "flat, features held 1": {"plan": "flat", "objective": "distil"},
    "flat, answers held 1": {"plan": "flat", "objective": "lwf"},
    "flat, L2 0.1": {"plan": "flat", "penalty": "l2", "penalty_weight": 0.1},
    "flat, rate 3e-5": {"plan": "flat", "lr": 3e-5},
    "flat, rate 3e-4": {"plan": "flat", "lr": 3e-4},
    "flat, rate 1e-3": {"plan": "flat", "lr": 1e-3},
    "flat, EMA 0.9": {"plan": "flat", "ema": 0.9},
    "flat, SAM 0.05": {"plan": "flat", "sam": 0.05},
    "lp-ft, then 1e-4": then(1e-4),
    "lp-ft, then 1e-5": then(1e-5),
    "lp-ft, then 3e-5": then(3e-5),
    "lp-ft, then 1e-4, frozen": then(1e-4, "frozen"),
    "lp-ft, then 1e-5, frozen": then(1e-5, "frozen"),
}
LATER = {"surgical-first", "surgical-last", *list(METHODS)[15:]}  # with 5 images a class only
BETWEEN = ("flat",)  # runs whose weights are interpolated with their source's too; of one stage
WEIGHED = ("WiSE-FT 0.5", "WiSE-FT")  # what these give beside their own line
FIELDS = ("data", "model", "shots", "method", "seed", "accuracy", "steps", "seconds", "trained")


def settings() -> Iterator[tuple[str, str, int | None, str, int]]:
    """(data, model, shots, method, seed), the most telling first: few images, then single ones and more, then all."""
    for shots, later in ((5, False), (1, False), (20, False), (None, False), (5, True)):
        for model, data, method in itertools.product(MODELS, DATA, METHODS):
            unfit = method == "vpt" if "vit" not in model else method == "full, share 0.1"  # which is `full` there
            if (method in LATER) == later and not unfit:
                for seed in SEEDS:  # one after the other, so that they compile once
                    yield data, model, shots, method, seed


@cache
def images(folder: Path) -> dict[str, sources.Dataset]:
    """Training images, and those that are scored."""
    splits = sources.load(folder, val_fraction=0)
    scored = splits.val or splits.test
    assert scored is not None
    if splits.val is None:
        few = [np.flatnonzero(scored.labels == c)[:SCORED] for c in range(len(splits.classes))]
        scored = scored.select(np.concatenate(few))
    return {"train": splits.train, "val": scored}


@cache
def reader(folder: Path) -> Callable[[], dict[str, sources.Dataset]]:
    """The one function for all runs on a folder: with one each, none would be like the one before but for its seed."""
    return partial(images, folder)


def config(
    assets: Path,
    data: str,
    model: str,
    shots: int | None,
    method: str,
    seed: int,
    workdir: str,
    steps: int | None = None,
    size: int = SIZE,
) -> jft.Config:
    """The run of a line; of the steps that are usual for its images, and of 96 pixels, unless told."""
    folder = assets / "data" / DATA[data]
    count = len(images(folder)["train"]) if shots is None else shots * len(images(folder)["train"].classes)
    file = assets / "weights" / FILES[model]
    changed = METHODS[method]
    return jft.Config(
        data=reader(folder),
        model=model,
        weights=str(file),
        plan="full",
        shots=shots,
        seed=seed,
        batch=BATCH,
        epochs=(steps or STEPS[shots]) * BATCH / count,
        eval_every=1e6,
        checkpoint_every=1e6,
        image_size=size,
        workdir=workdir,
        display="quiet",
    ).replace(**changed)


class Scorer:
    """Correct or not, of each scored image, for any weights of one model on one data set: compiled and decoded once."""

    def __init__(self, made: jft.Config):
        assert callable(made.data)
        dataset = made.data()["val"]
        self.model = plain_model(made, len(dataset.classes))
        self.source = weights.load(self.model, made.weights)
        pictures, kept, _ = pipeline.decode_all(dataset, self.source.preprocess)
        self.images, self.labels = pictures, dataset.labels[kept]
        self.step = shard.jit(make_eval_step(self.model, prepare=make_prepare(self.source.preprocess)))

    def __call__(self, params: Any, stats: Any) -> np.ndarray:
        rows = []
        for index, mask in zip(*order.evaluation_batches(len(self.images), 64), strict=True):
            rows.append(np.asarray(self.step(params, stats, {"image": self.images[index]}))[mask])
        return np.asarray(losses.correct(np.concatenate(rows), jax.numpy.asarray(self.labels)), bool)

    def between(self, run: Path) -> dict[str, float]:
        """WiSE-FT of a run's model: at α 0.5, and with α chosen on one half of the images for the other."""
        tuned = jft.load(run / "model")
        right = np.stack(
            [
                self(
                    average.interpolate(self.source.params, tuned.params, alpha),
                    average.interpolate(self.source.batch_stats, tuned.batch_stats, alpha),
                )
                for alpha in ALPHAS
            ]
        )
        halves = [np.arange(len(self.labels)) % 2 == half for half in (0, 1)]
        chosen = np.concatenate(
            [right[::-1, there][right[::-1, here].mean(1).argmax()] for here, there in (halves, halves[::-1])]
        )
        found = (right[ALPHAS.index(0.5)].mean(), chosen.mean())
        return {name: float(value) for name, value in zip(WEIGHED, found, strict=True)}


def measure(assets: Path, file: Path, wanted: Callable[[dict[str, str]], bool], steps: int | None, size: int) -> None:
    """Run what is wanted and not there yet, a line after the other."""
    done = {tuple(row[f] for f in FIELDS[:5]) for row in read(file)}
    shared = Shared()
    scorers: dict[tuple[str, str], Scorer] = {}
    for data, model, shots, method, seed in settings():
        key = dict(zip(FIELDS[:5], (data, model, str(shots or "all"), method, str(seed)), strict=True))
        if tuple(key.values()) in done or not wanted(key):
            continue
        with tempfile.TemporaryDirectory() as folder:
            made = config(assets, data, model, shots, method, seed, folder + "/run", steps, size)
            begun = time.process_time()
            run = train(made, shared=shared)
            seconds = time.process_time() - begun
            result = run.result
            common = {
                "steps": sum(s["steps"] for s in result["stages"]),
                "seconds": f"{seconds:.1f}",
                "trained": max(s["trainable_params"] for s in result["stages"]),
            }
            rows = [key | {"accuracy": f"{result['last']['accuracy']:.4f}"} | common]
            if method in BETWEEN:
                if (data, model) not in scorers:
                    scorers[data, model] = Scorer(made)
                for name, accuracy in scorers[data, model].between(run.workdir).items():
                    rows.append(key | {"method": f"{method}, {name}", "accuracy": f"{accuracy:.4f}"} | common)
        write(file, rows)
        print(*rows[0].values(), sep=", ", flush=True)


def read(file: Path) -> list[dict[str, str]]:
    """The lines that are there."""
    if not file.exists():
        return []
    with open(file, newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    """Append lines."""
    fresh = not file.exists()
    with open(file, "a", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, FIELDS, lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerows(rows)


def table(rows: list[dict[str, str]]) -> str:
    """A Markdown table for each number of shots: a row a method, for each model a column a data set and the seconds."""
    lines = []
    order: list[str] = []
    for method in METHODS:
        order += [method, *(f"{method}, {name}" for name in WEIGHED if method in BETWEEN)]
    for shots in map(str, (*[n for n in STEPS if n], "all")):
        here = [r for r in rows if r["shots"] == shots]
        if not here:
            continue
        models = [m for m in MODELS if any(r["model"] == m for r in here)]
        head = [f"{model}: {' | '.join(DATA)} | s" for model in models]
        title = {"1": "1 image a class", "all": "all images"}.get(shots, f"{shots} images a class")
        lines += [f"\n| {title} | {' | '.join(head)} |", "|---" * (1 + len(models) * (len(DATA) + 1)) + "|"]
        for method in sorted({r["method"] for r in here}, key=order.index):
            cells = []
            for model in models:
                mine = [r for r in here if (r["method"], r["model"]) == (method, model)]
                for data in DATA:
                    found = [100 * float(r["accuracy"]) for r in mine if r["data"] == data]
                    spread = f" ± {np.std(found, ddof=1):.1f}" if len(found) > 1 else ""
                    few = f" ({len(found)})" if 0 < len(found) < len(SEEDS) else ""
                    cells.append(f"{np.mean(found):.1f}{spread}{few}" if found else "")
                cells.append(f"{np.median([float(r['seconds']) for r in mine]):.0f}" if mine else "")
            lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines).strip()


def make_parser(doc: str | None) -> argparse.ArgumentParser:
    """What every script takes that appends to a CSV."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("assets", type=Path, help="the folder of weights and data")
    parser.add_argument("file", type=Path, help="the CSV of what is measured")
    parser.add_argument("--table", action="store_true", help="print what is there and measure nothing")
    return parser


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--only", action="append", default=[], metavar="FIELD=TEXT", help="of fields that hold this")
    parser.add_argument("--steps", type=int, help="of every run, instead of 40 to 100 by images a class")
    parser.add_argument(
        "--size", type=int, default=SIZE, help="of the pictures' sides, in pixels (default: %(default)s)"
    )
    options = parser.parse_args()
    asked = [text.partition("=")[::2] for text in options.only]
    if unknown := [field for field, _ in asked if field not in FIELDS[:5]]:
        parser.error(f"--only {unknown[0]}=…: the fields are {', '.join(FIELDS[:5])}")

    def wanted(key: dict[str, str]) -> bool:
        """Words for one field are alternatives; numbers and methods are themselves, other words parts of a value."""
        fields = {field for field, _ in asked}
        return all(
            any(
                key[f] == word or (not key[f].isdigit() and word not in METHODS and word in key[f])
                for f, word in asked
                if f == field
            )
            for field in fields
        )

    if not options.table:
        measure(options.assets, options.file, wanted, options.steps, options.size)
    print(table([row for row in read(options.file) if wanted(row)]))


if __name__ == "__main__":
    main()
