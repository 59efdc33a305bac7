"""What is odd at a run's beginning: labels that tell nothing, a kept head of other classes, a strange first loss."""

import math
from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

import numpy as np

from jft import distil, optim, plan
from jft.config import Config, method
from jft.data.sources import Dataset, Splits
from jft.errors import UserError
from jft.models.base import Model
from jft.weights import Loaded
from jft.words import name_of

FEW_STEPS = 50  # with fewer, of a plan whose epochs nobody chose, a run is told to be short
FAR = 1.5  # times the loss of guessing, above which a new head's first loss is told as odd


def labels(splits: Splits) -> list[str]:
    """What to warn of. Raises UserError where all training images have one label."""
    told = []
    for name, dataset in (("training", splits.train), ("validation", splits.val)):
        if dataset is None or not len(dataset):
            continue
        same = _constant(dataset)
        if dataset.quantities:
            if len(same) == len(dataset.classes) and name == "training":
                values = ", ".join(f"{c} = {v:g}" for c, v in zip(same, dataset.labels[0], strict=True))
                raise UserError(
                    f"All {len(dataset)} training images have {values}: there is nothing to learn. Look at the values, "
                    "and at the split."
                )
            told += [f"All {len(dataset)} {name} images have the same {', '.join(same[:5])}."] if same else []
        elif dataset.several:
            if same:
                few = ", ".join(same[:5])
                told.append(f"No two {name} images differ in whether they are: {few}{', …' if len(same) > 5 else ''}.")
        elif same and name == "training":
            raise UserError(
                f"All {len(dataset)} training images are {same[0]!r}: there is nothing to learn. "
                "Look at the labels, and at the split."
            )
        elif same:
            told.append(f"All {len(dataset)} validation images are {same[0]!r}: accuracy on them tells little.")
    return told


def too_few(splits: Splits, shots: int | None) -> list[str]:
    """What to warn of where classes have fewer images than `--shots` asks for."""
    if shots is None:
        return []
    count = np.bincount(splits.train.labels, minlength=len(splits.classes))
    fewer = [f"{c} has {n}" for c, n in zip(splits.classes, count.tolist(), strict=True) if n < shots]
    more = f" and {len(fewer) - 5} more classes" if len(fewer) > 5 else ""
    return [f"--shots {shots} takes all of classes that have fewer: {', '.join(fewer[:5])}{more}."] if fewer else []


def _constant(dataset: Dataset) -> list[str]:
    """Classes that all images have, or of several labels an image, all or none; quantities that do not differ."""
    if dataset.labels.ndim == 1:
        return [dataset.classes[int(dataset.labels[0])]] if (dataset.labels == dataset.labels[0]).all() else []
    flat = (dataset.labels == dataset.labels[:1]).all(0)
    return [dataset.classes[i] for i in np.flatnonzero(flat)]


def kept_head(loaded: Loaded, classes: Sequence[str]) -> list[str]:
    """What to warn of where the weights' own head is kept. Raises UserError where its classes are in another order."""
    if loaded.classes is None:
        return [
            "The kept head's weights do not name their classes: its outputs are taken for "
            f"{', '.join(list(classes)[:5])}{', …' if len(classes) > 5 else ''}, in this order."
        ]
    odd = [(i, a, b) for i, (a, b) in enumerate(zip(loaded.classes, classes, strict=False)) if a != b]
    if not odd:
        return []
    i, theirs, ours = odd[0]
    if sorted(loaded.classes) == sorted(classes):
        raise UserError(
            f"The kept head has the data's classes in another order: output {i} is its {theirs!r} and the data's "
            f"{ours!r}. Leave out --keep-head for a new head."
        )
    return [
        f"{len(odd)} of {len(classes)} classes of the kept head have other names than the data's: output {i} is "
        f"{theirs!r} in the weights and {ours!r} in the data. They are taken to be the same."
    ]


def guessing(data: Dataset) -> tuple[str, float]:
    """The loss of a model that knows nothing, and how it is told.

    All classes equally likely: ln K, or K ln 2 of several labels an image. Every quantity its mean: 1, in units of its
    standard deviation.
    """
    if data.quantities:
        return "saying the mean gives", 1.0
    k = len(data.classes)
    formula, guess = (f"{k} ln 2", k * math.log(2)) if data.several else (f"ln {k}", math.log(k))
    return f"guessing gives {formula} =", guess


def comparable(config: Config) -> bool:
    """Whether the loss of this config is the one that `guessing` tells of."""
    return config.loss is None and config.objective is None and config.class_weights is None


def first_loss(loss: float, guessed: tuple[str, float], fresh: bool) -> tuple[str, bool]:
    """A sentence about the first loss against that of `guessing`, and whether it is odd for a head that is `fresh`."""
    formula, guess = guessed
    told = f"The loss at the start is {loss:.3f}; {formula} {guess:.3f}."
    odd = fresh and not loss < FAR * guess
    if odd:
        told += " A new head should be near it: look at the labels, the preprocessing and the loss."
    return told, odd


def settings(config: Config, held_out: bool = True) -> list[str]:
    """What the config sets and counts for nothing, or twice, and a rate that was chosen for another optimizer.

    `held_out`: whether the validation images were drawn from the training images.
    """
    dead = sorted(n for n in config.given & plan.overridden(config.plan) if getattr(config, n) is not None)
    told = [f"{n} {getattr(config, n)} counts for nothing: every stage of the plan has its own." for n in dead]
    if name_of(config.schedule) == "one-cycle" and config.warmup and "warmup" in config.given - set(dead):
        told.append(f"warmup {config.warmup:g} counts for nothing: one-cycle has a rise of its own.")
    if config.balance and config.class_weights:
        told.append("balance and class_weights each make up for classes of few images; with both those count twice.")
    if "val_fraction" in config.given and not held_out:
        told.append(f"val_fraction {config.val_fraction:g} counts for nothing: the data have a validation split.")
    known = isinstance(config.optimizer, str) and name_of(config.optimizer) in optim.OPTIMIZERS
    usual = not known or name_of(config.optimizer) in ("adam", "adamw")
    if not usual and config.lr is None and isinstance(config.plan, str):
        told.append(
            f"The rate is the plan's own, which is for AdamW, and {config.optimizer} may want quite another: `jft lr` "
            "with the same options finds one, and --lr sets it."
        )
    return told


def over_legs(config: Config, model: Model, legs: Sequence[Any]) -> list[str]:
    """What the config sets and counts for nothing over these legs (`build.Leg`), and BatchNorms of an average."""
    told = []
    if config.carry and len(legs) == 1:
        told.append("carry counts for nothing: the plan has one stage.")
    if (config.layer_decay or 1.0) < 1:
        depth = plan.depths(legs[0].multipliers, list(model.parts))
        if all(depth[part] == max(depth.values()) for leg in legs for part in leg.train_parts):
            told.append(f"layer_decay {config.layer_decay:g} counts for nothing: nothing trains below the head.")
    trained = {part for leg in legs for part in leg.train_parts}
    if config.drop_path and not any(getattr(model.parts[part], "drop_path", 0) for part in trained):
        told.append(f"drop_path {config.drop_path:g} counts for nothing: no part trains that has it.")
    given: Any = method(config, "objective")
    options: dict[str, Any] = {}
    while isinstance(given, partial):
        given, options = given.func, given.keywords | options
    at = str(options.get("at", "head"))
    if given in (distil.features, distil.answers) and not trained & set(model.span(None, at)):
        told.append(f"The objective holds the features before {at}, and no stage trains what gives them.")
    if optim.is_free(config.optimizer) and any(leg.update_stats for leg in legs):
        told.append(
            "Schedule-free weights are an average, and BatchNorms that train gather their statistics beside it, not "
            "at it: a stage's batch_norm=\"frozen\" keeps the source's."
        )
    return told


def few_steps(config: Config, steps: int, images: int) -> list[str]:
    """A plan by name that makes next to no steps on so few images, where nobody said how many passes it takes."""
    if steps >= FEW_STEPS or config.epochs is not None or not isinstance(config.plan, str):
        return []
    count = "one step" if steps == 1 else f"{steps} steps"
    passes = -(-FEW_STEPS * config.batch // images)
    return [
        f"Only {count} on {images} images in batches of {config.batch}: --epochs {passes} makes about {FEW_STEPS}, and "
        "a smaller --batch more in as many epochs."
    ]


def never_trained(
    names: Sequence[str], parts: Sequence[str], missing: Collection[str], stages: Sequence[plan.Stage]
) -> list[str]:
    """What the weights do not have and no stage trains: it stays as it was drawn, in front of all that is learnt."""
    moved = {n for s in stages for n in plan.trainable(plan.multipliers(s, names, parts))}
    left = [n for n in missing if n in names and n not in moved]
    if not left:
        return []
    shown = ", ".join(left[:3]) + (" …" if len(left) > 3 else "")
    return [f"No stage trains {shown}, which the weights do not have: {len(left)} arrays stay as they were drawn."]
