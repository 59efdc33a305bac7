"""What is odd at a run's beginning: labels that tell nothing, a kept head of other classes, a strange first loss."""

import math
from collections.abc import Sequence

import numpy as np

from jft.data.sources import Dataset, Splits
from jft.errors import UserError
from jft.weights import Loaded

FAR = 1.5  # times the loss of guessing, above which a new head's first loss is told as odd


def labels(splits: Splits) -> list[str]:
    """What to warn of. Raises UserError where all training images have one label."""
    told = []
    for name, dataset in (("training", splits.train), ("validation", splits.val)):
        if dataset is None or not len(dataset):
            continue
        same = _constant(dataset)
        if dataset.labels.ndim == 2:
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


def _constant(dataset: Dataset) -> list[str]:
    """Classes that all images have, or of several labels an image, all or none."""
    if dataset.labels.ndim == 1:
        return [dataset.classes[int(dataset.labels[0])]] if (dataset.labels == dataset.labels[0]).all() else []
    flat = (dataset.labels == dataset.labels[:1]).all(0)
    return [dataset.classes[i] for i in np.flatnonzero(flat)]


def kept_head(loaded: Loaded, classes: Sequence[str]) -> list[str]:
    """What to warn of where the weights' own head is kept. Raises UserError where its classes are in another order."""
    if any(name.startswith("head/") for name in loaded.missing):
        return []
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


def guessing(classes: int, several: bool) -> float:
    """The loss of a model that holds all classes equally likely: ln K, or K ln 2 of several labels an image."""
    return classes * math.log(2) if several else math.log(classes)


def first_loss(loss: float, classes: int, several: bool, fresh: bool) -> tuple[str, bool]:
    """A sentence about the first loss against that of guessing, and whether it is odd for a head that is `fresh`."""
    guess = guessing(classes, several)
    formula = f"{classes} ln 2" if several else f"ln {classes}"
    told = f"The loss at the start is {loss:.3f}; guessing gives {formula} = {guess:.3f}."
    odd = fresh and not loss < FAR * guess
    if odd:
        told += " A new head should be near it: look at the labels, the preprocessing and the loss."
    return told, odd
