"""How good predictions are: exact figures over a whole set, from its probabilities and labels."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped

from jft.errors import UserError

Probabilities = Float[np.ndarray, "n k"]
Labels = Int[np.ndarray, " n"]
Targets = Shaped[np.ndarray, "n k"]  # several labels an example: 0 or 1, or bool


def accuracy(probabilities: Probabilities, labels: Labels) -> float:
    """The share of examples whose most probable class is the right one."""
    return float(np.mean(probabilities.argmax(axis=1) == labels))


def top_k_accuracy(probabilities: Probabilities, labels: Labels, k: int = 5) -> float:
    """The share of examples with fewer than `k` classes ahead of the right one (of equal ones, the lower index)."""
    right = np.take_along_axis(probabilities, labels[:, None], axis=1)
    before = np.arange(probabilities.shape[1])[None] < labels[:, None]
    ahead = (probabilities > right) | ((probabilities == right) & before)
    return float(np.mean(ahead.sum(axis=1) < k))


def confusion(probabilities: Probabilities, labels: Labels) -> Int[np.ndarray, "k k"]:
    """Counts, with the true class as row and the predicted one as column."""
    k = probabilities.shape[1]
    return np.bincount(labels * k + probabilities.argmax(axis=1), minlength=k * k).reshape(k, k)


def per_class(
    right: Shaped[np.ndarray, " k"], support: Shaped[np.ndarray, " k"], said: Shaped[np.ndarray, " k"]
) -> dict[str, Float[np.ndarray, " k"]]:
    """Precision, recall and F1 of each class, from how often it was rightly said, was true, and was said.

    Zero where undefined, as with scikit-learn's `zero_division=0`. From a confusion matrix these are its diagonal, the
    sums of its rows and of its columns.
    """
    return {
        "precision": right / np.maximum(said, 1),
        "recall": right / np.maximum(support, 1),
        "f1": 2 * right / np.maximum(support + said, 1),
    }


def log_loss(probabilities: Probabilities, labels: Labels) -> float:
    """Mean negative log probability of the right class, in nats; probabilities are clipped to float32's resolution."""
    right = np.take_along_axis(probabilities, labels[:, None], axis=1).astype(np.float64)
    return float(-np.log(right.clip(np.finfo(np.float32).eps, 1)).mean())


def calibration(
    probabilities: Probabilities, labels: Labels, bins: int = 15
) -> tuple[Int[np.ndarray, " bins"], Float[np.ndarray, " bins"], Float[np.ndarray, " bins"]]:
    """In `bins` equal intervals of confidence: the number of examples, their mean confidence, their accuracy."""
    confidence = probabilities.max(axis=1).astype(np.float64)
    right = (probabilities.argmax(axis=1) == labels).astype(np.float64)
    index = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    count = np.bincount(index, minlength=bins)
    many = np.maximum(count, 1)
    return count, np.bincount(index, confidence, bins) / many, np.bincount(index, right, bins) / many


def ece(probabilities: Probabilities, labels: Labels, bins: int = 15) -> float:
    """Expected calibration error (Guo et al. 2017): how far confidence and accuracy lie apart, on average."""
    count, confidence, right = calibration(probabilities, labels, bins)
    return float((count * abs(confidence - right)).sum() / count.sum())


def auroc(probabilities: Probabilities, targets: Targets) -> float | None:
    """Area under the ROC curve, each class against the rest, the mean over the classes that have both.

    With two exclusive classes this is the usual binary one. None where no class has both.
    """
    both = [c for c in range(targets.shape[1]) if 0 < np.count_nonzero(targets[:, c]) < len(targets)]
    areas = [_area(targets[:, c].astype(bool), probabilities[:, c]) for c in both]
    return float(np.mean(areas)) if areas else None


def _area(target: np.ndarray, score: np.ndarray) -> float:
    """The share of pairs, one example of the class and one of none, that the score has in order; ties count half."""
    # Not sklearn's, which takes longer to import than a head to train.
    _, place, often = np.unique(score, return_inverse=True, return_counts=True)
    rank = (np.cumsum(often) - (often - 1) / 2)[place]
    has = np.count_nonzero(target)
    return float((rank[target].sum() - has * (has + 1) / 2) / (has * (len(target) - has)))


def average_precision(probabilities: Probabilities, targets: Targets) -> float | None:
    """Mean average precision over the classes with an example (mAP); None where there is none."""
    from sklearn.metrics import average_precision_score

    some = np.flatnonzero(np.any(targets, axis=0))
    areas = [average_precision_score(targets[:, c].astype(bool), probabilities[:, c]) for c in some]
    return float(np.mean(areas)) if areas else None


def wilson(right: int, count: int) -> tuple[float, float]:
    """The 95 % score interval of a share (Wilson 1927): honest for small sets and for shares near 0 and 1."""
    z = 1.959963984540054
    share, room = right / count, z * z / count
    middle = (share + room / 2) / (1 + room)
    half = z / (1 + room) * np.sqrt(share * (1 - share) / count + room / (4 * count))
    return float(max(min(middle - half, share), 0)), float(min(max(middle + half, share), 1))  # against rounding


def summary(probabilities: Probabilities, labels: Shaped[np.ndarray, "..."], classes: Sequence[str]) -> dict[str, Any]:
    """All figures of a set, as plain numbers; one that is undefined there (no example of a class) is left out.

    `labels` is `[n]` class indices, or `[n, k]` zeros and ones where an example may have several labels. Then the
    probabilities are independent, 0.5 is the threshold, and `accuracy` is the share of examples with every label right.

    Raises UserError where the model's output is not finite, ValueError where the shapes contradict each other.
    """
    n, k = probabilities.shape
    if k != len(classes) or len(labels) != n or (labels.ndim == 2 and labels.shape[1] != k) or n == 0:
        raise ValueError(f"probabilities {n, k}, labels {labels.shape} and {len(classes)} classes do not fit together")
    if bad := int((~np.isfinite(probabilities)).any(axis=1).sum()):
        raise UserError(
            f"The model's output is not finite for {bad} of {n} examples, so there is nothing to score: the training "
            "has diverged. Lower the learning rate, or add warm-up or gradient clipping."
        )
    figures = _several(probabilities, labels.astype(bool)) if labels.ndim == 2 else _one(probabilities, labels)
    return {"count": n} | {name: value for name, value in figures.items() if value is not None}


def _one(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float | None]:
    k = probabilities.shape[1]
    counts = confusion(probabilities, labels)
    support, said = counts.sum(axis=1), counts.sum(axis=0)
    classwise = per_class(np.diag(counts), support, said)
    return {
        "accuracy": accuracy(probabilities, labels),
        "top5_accuracy": top_k_accuracy(probabilities, labels) if k > 5 else None,
        "balanced_accuracy": float(classwise["recall"][support > 0].mean()),
        "f1_macro": float(classwise["f1"][support + said > 0].mean()),
        "f1_micro": accuracy(probabilities, labels),  # the same, where each example has one label
        "log_loss": log_loss(probabilities, labels),
        "ece": ece(probabilities, labels),
        "auroc": auroc(probabilities, np.arange(k)[None] == labels[:, None]),
    }


def _several(probabilities: np.ndarray, targets: np.ndarray) -> dict[str, float | None]:
    said = probabilities >= 0.5
    right, support, often = (said & targets).sum(axis=0), targets.sum(axis=0), said.sum(axis=0)
    p = probabilities.astype(np.float64).clip(np.finfo(np.float32).eps, 1 - np.finfo(np.float32).eps)
    return {
        "accuracy": float((said == targets).all(axis=1).mean()),
        "f1_macro": float(per_class(right, support, often)["f1"].mean()),
        "f1_micro": float(2 * right.sum() / max(support.sum() + often.sum(), 1)),
        "log_loss": float(-np.where(targets, np.log(p), np.log1p(-p)).mean()),
        "average_precision": average_precision(probabilities, targets),
        "auroc": auroc(probabilities, targets),
    }
