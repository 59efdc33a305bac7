"""Trying a run out before it is one: one batch through all that it will do, and whether one can be learned by heart."""

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jft import bundle, sanity
from jft.build import build, check_first, check_missing, choose_loss, load_images, read_data, resolve
from jft.config import Config
from jft.data import order, sources
from jft.errors import UserError
from jft.hyper import settle
from jft.report.live import make_display
from jft.report.log import read
from jft.run import Clock, compile_cache, default_workdir, running
from jft.train import Run

STEPS = 60  # of learning a batch by heart, over all stages
LEARNED = 0.1  # share of the first loss below which it is known by heart


@dataclass(frozen=True)
class Trial:
    """What a trial found: the losses of its steps, and that of guessing."""

    config: Config
    stages: list[dict[str, Any]]  # as result.json has them
    losses: list[float]
    guess: float | None  # None where it is not known
    train: int
    val: int

    def json(self) -> dict[str, Any]:
        """What a program reads."""
        return {
            "stages": self.stages,
            "first_loss": self.losses[0],
            "last_loss": self.losses[-1],
            "guessing": self.guess,
            "images": {"train": self.train, "val": self.val},
        }


def dry_run(config: Config) -> Trial:
    """One batch through every stage, validation, saving, restoring and the finished model; then all of it is removed.

    It happens in a folder beside the run's own, so that what cannot be written is found out too. Raises UserError for
    whatever a run would refuse, and where what is restored is not what was saved.
    """
    with _trial(config, lambda stage, share: replace(stage, epochs=1.0)) as (made, splits):
        run: Run = made()
        with contextlib.closing(run):
            run.advance(len(run.legs), lambda: False)
        again: Run = made()
        with contextlib.closing(again):
            again.restore()
            for one, two in zip(jax.tree.leaves(run._collected()), jax.tree.leaves(again._collected()), strict=True):
                if np.asarray(one).tobytes() != np.asarray(two).tobytes():
                    raise UserError(f"What was restored from {again.workdir} is not what was saved. Check the disk.")
            again.finish(splits, [])
            bundle.load(again.workdir / "model")
        return _found(config, run)


def overfit(config: Config) -> Trial:
    """The plan on one batch again and again, without augmentation, dropout and decay: a model that works learns it.

    60 steps, shared by the stages as the plan shares its epochs. Raises UserError where the batch was not learned: its
    loss not below a tenth of what it was.
    """
    config = config.replace(
        augment=(), dropout=0.0, drop_path=0.0, label_smoothing=0.0, weight_decay=0.0, ema=None, patience=None,
        eval_every=1e9, on_nan="stop", views=None,
    )  # fmt: skip
    steady = {"augment": (), "schedule": "constant", "warmup": 0.0}
    with _trial(config, lambda stage, share: replace(stage, epochs=STEPS * share, **steady)) as (made, _):
        run: Run = made()
        with contextlib.closing(run):
            run.data = {**run.data, "val": run.data["train"]}
            run.advance(len(run.legs), lambda: False)
        found = _found(config, run)
    if not found.losses[-1] < LEARNED * found.losses[0]:
        raise UserError(
            f"One batch was not learned: its loss went from {found.losses[0]:.3f} to {found.losses[-1]:.3f} in "
            f"{len(found.losses)} steps{_guessed(found)}. Try a higher --lr (`jft lr` suggests one), a plan that "
            "trains more, or look at the labels: no model learns labels that say nothing."
        )
    return found


@contextlib.contextmanager
def _trial(config: Config, shorten: Any) -> Iterator[tuple[Any, sources.Splits]]:
    """A function that makes a run of one batch in a folder that is removed, and the splits it sees."""
    compile_cache()
    display = make_display("quiet")
    splits = read_data(config)
    config = settle(config, splits, display.note)
    check_first(config, splits)
    model, params, batch_stats, loaded = build(config, splits.classes)
    stages = resolve(config, model, params)
    check_missing(config, model, stages, splits, loaded.missing)
    sanity.labels(splits)
    loss = choose_loss(config, splits.train)  # one batch need not have every class
    total = sum(s.epochs or 0 for s in stages)
    train, val = splits.train, splits.val
    assert val is not None
    few = replace(
        splits,
        train=train.select(np.sort(order.permutation(len(train), config.seed, 0)[: config.batch])),
        val=val.select(np.sort(order.permutation(len(val), config.seed, 0)[: config.batch])),
        test=None,
    )
    step = config.batch / len(few.train)  # in passes
    stages = tuple(shorten(s, step * (s.epochs or 0) / total) for s in stages)
    data, _ = load_images(config, few, stages, loaded.preprocess, display)
    parent = Path(config.workdir or default_workdir(config)).absolute().parent
    while not parent.exists():
        parent = parent.parent
    try:
        folder = tempfile.TemporaryDirectory(prefix=".jft-trial-", dir=parent)
    except OSError as error:
        raise UserError(f"{parent} cannot be written: {error.strerror}. Name another folder with --workdir.") from None

    def made() -> Run:
        return Run(
            config, Path(folder.name), model, loaded, params, batch_stats, stages, dict(data), Clock(), display, loss
        )

    with folder, running(Path(folder.name)):
        yield made, few


def _found(config: Config, run: Run) -> Trial:
    losses = [float(row["loss"]) for row in read(run.workdir / "metrics.jsonl") if "loss" in row]
    guess = sanity.guessing(run.data["train"].dataset)[1] if sanity.comparable(config) else None
    return Trial(config, run.records, losses, guess, len(run.data["train"].labels), len(run.data["val"].labels))


def text(found: Trial, what: str) -> str:
    """For people."""
    lines = [
        f"{s['name']}: {s['steps']} {'step' if s['steps'] == 1 else 'steps'}, {s['trainable_params']:,} parameters, "
        f"{s['seconds']:.1f} s"
        for s in found.stages
    ]
    first = f"The loss began at {found.losses[0]:.3f}{_guessed(found)}"
    if what == "overfit":
        lines.append(f"{first} and went to {found.losses[-1]:.3f} in {len(found.losses)} steps: one batch is learned.")
    else:
        lines.append(
            f"{first}. A batch of {found.train} images was trained on, {found.val} validated, the state saved and "
            "restored bit for bit, the model and report written. All is removed again."
        )
    return "\n".join(lines)


def _guessed(found: Trial) -> str:
    return "" if found.guess is None else f" (guessing gives {found.guess:.3f})"
