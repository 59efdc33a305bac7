"""How good predictions are: exact figures over a whole set, from its probabilities and labels."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped

from jft.errors import UserError

Probabilities = Float[np.ndarray, "n k"]
Labels = Int[np.ndarray, " n"]
Targets = Shaped[np.ndarray, "n k"]  # several labels an example: 0 or 1, or bool


# By which runs are told and compared, averages of models of several labels chosen, and their names.
HEADLINES = {"accuracy": "accuracy", "r2": "R²", "average_precision": "mAP"}


def figure(quantities: bool, several: bool = False) -> str:
    """Which of `HEADLINES` a model is told by: R² where it says quantities, mAP of several labels, else accuracy."""
    return "r2" if quantities else "average_precision" if several else "accuracy"


def headline(scores: Mapping[str, Any], prefix: str = "") -> str:
    """Which of `HEADLINES` these scores are told by. Of single labels mAP stands beside the balanced accuracy."""
    several = prefix + "average_precision" in scores and prefix + "balanced_accuracy" not in scores
    return figure(prefix + "r2" in scores, several)


def told(name: str, value: float) -> str:
    """A headline's value: `97.12%`, of R² `0.912`."""
    return f"{value:.3f}" if name == "r2" else f"{value:.2%}"


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
    right: Shaped[np.ndarray, "*r k"], support: Shaped[np.ndarray, "*r k"], said: Shaped[np.ndarray, "*r k"]
) -> dict[str, Float[np.ndarray, "*r k"]]:
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


def pairs(probabilities: Probabilities, targets: Targets) -> tuple[Float[np.ndarray, "m 2"], Int[np.ndarray, " m"]]:
    """Each example's every label as a question of its own, no or yes: what `calibration` takes of several labels."""
    p = probabilities.reshape(-1)
    return np.stack([1 - p, p], axis=1), targets.reshape(-1).astype(np.int64)


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
    """Mean average precision over the classes with an example (mAP); None where there is none.

    Of a class, precision summed over the steps of recall, as in scikit-learn: no interpolation.
    """
    some = np.flatnonzero(np.any(targets, axis=0))
    ones = np.ones((1, len(targets)), np.float32)
    areas = [_precision(targets[:, c].astype(bool), probabilities[:, c], ones)[0] for c in some]
    return float(np.mean(areas)) if areas else None


def _precision(target: np.ndarray, score: np.ndarray, weights: Float[np.ndarray, "r n"]) -> Float[np.ndarray, " r"]:
    """Average precision of one class with each row of weights of the examples; NaN without an example of the class."""
    order = np.argsort(-score, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(score[order]) != 0, True))  # equal scores are told apart by no threshold
    weights = weights[:, order].astype(np.float64)
    right, said = (weights * target[order]).cumsum(axis=1)[:, ends], weights.cumsum(axis=1)[:, ends]
    steps = np.diff(right, axis=1, prepend=0.0)
    with np.errstate(invalid="ignore"):
        return (steps * right / np.maximum(said, 1e-300)).sum(axis=1) / right[:, -1]


def wilson(right: int, count: int) -> tuple[float, float]:
    """The 95 % score interval of a share (Wilson 1927): honest for small sets and for shares near 0 and 1."""
    z = 1.959963984540054
    share, room = right / count, z * z / count
    middle = (share + room / 2) / (1 + room)
    half = z / (1 + room) * np.sqrt(share * (1 - share) / count + room / (4 * count))
    return float(max(min(middle - half, share), 0)), float(min(max(middle + half, share), 1))  # against rounding


def bootstrap_mean(values: Shaped[np.ndarray, " n"], resamples: int = 1000, seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of a mean over examples, by the percentile bootstrap (see `intervals`)."""
    draws = np.random.default_rng(seed).integers(0, len(values), (resamples, len(values)))
    low, high = np.quantile(values[draws].mean(axis=1), (0.025, 0.975))
    return float(low), float(high)


def intervals(
    probabilities: Probabilities, labels: Shaped[np.ndarray, "..."], resamples: int = 1000, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """95 % intervals of figures of `summary`: Wilson's of the accuracy, else by the percentile bootstrap.

    Examples are drawn anew, with replacement, `resamples` times (Efron & Tibshirani 1993, ch. 13). They tell how far a
    figure would move with other images, not with another seed of the training. Fewer resamples are taken of mAP where
    the set is large. The areas under curves of single labels have none.
    """
    n, k = probabilities.shape
    rng = np.random.default_rng(seed)
    several = labels.ndim == 2
    said = probabilities >= 0.5 if several else probabilities.argmax(axis=1)
    right = np.all(said == labels, axis=1) if several else said == labels
    found = {"accuracy": wilson(int(right.sum()), n)}
    drawn: dict[str, list[float]] = {}
    if several:
        labels = labels.astype(bool)
        few = max(min(resamples, 4 * 10**7 // (n * k)), 50)
        weights = rng.multinomial(n, np.full(n, 1 / n), few).astype(np.float32)
        tp, support, often = (weights @ v.astype(np.float32) for v in (said & labels, labels, said))
        drawn["f1_macro"] = per_class(tp, support, often)["f1"].mean(axis=1)
        drawn["f1_micro"] = 2 * tp.sum(axis=1) / np.maximum(support.sum(axis=1) + often.sum(axis=1), 1)
        some = np.flatnonzero(labels.any(axis=0))
        if len(some):
            areas = np.stack([_precision(labels[:, c], probabilities[:, c], weights) for c in some])
            seen = ~np.isnan(areas)
            drawn["average_precision"] = np.where(seen, areas, 0).sum(axis=0) / np.maximum(seen.sum(axis=0), 1)
    else:
        counts = confusion(probabilities, labels).ravel()
        cells = np.flatnonzero(counts)  # what is drawn is only told by how often each pair of true and said comes
        times = rng.multinomial(n, counts[cells] / n, resamples)
        true, guess = np.divmod(cells, k)
        tp, support, often = (
            times @ (where[:, None] == np.arange(k)[None]).astype(np.int64)
            for where in (np.where(true == guess, true, -1), true, guess)
        )
        classwise, there = per_class(tp, support, often), support > 0
        drawn["balanced_accuracy"] = (classwise["recall"] * there).sum(axis=1) / there.sum(axis=1)
        drawn["f1_macro"] = classwise["f1"].sum(axis=1) / (support + often > 0).sum(axis=1)
    ends = {name: np.quantile(values, (0.025, 0.975)) for name, values in drawn.items()}
    return found | {name: (float(low), float(high)) for name, (low, high) in ends.items()}


def suspects(probabilities: Probabilities, labels: Shaped[np.ndarray, "..."]) -> Int[np.ndarray, " m"]:
    """Examples whose label is probably wrong, the surest first: confident learning (Northcutt et al. 2021).

    The off-diagonal of the confident joint (section 3.1): an example is another class's where its probability of that
    class is at least the mean of those labelled so, and of all such classes it is the likeliest. Ordered by the margin
    of that class over the label's. The probabilities must come from a model that was not fitted to these labels.
    Where an example may have several labels, each is judged by itself, present or absent.
    """
    n, k = probabilities.shape
    p = probabilities.astype(np.float64)
    if labels.ndim == 2:
        margins = np.full(n, -np.inf)
        for c in range(k):
            two = np.stack([1 - p[:, c], p[:, c]], axis=1)
            wrong, margin = _joint(two, labels[:, c].astype(np.int64))
            margins[wrong] = np.maximum(margins[wrong], margin)
        order = np.argsort(-margins, kind="stable")
        return order[np.isfinite(margins[order])]
    wrong, margin = _joint(p, labels)
    return wrong[np.argsort(-margin, kind="stable")]


def _joint(p: Float[np.ndarray, "n k"], labels: Labels) -> tuple[np.ndarray, np.ndarray]:
    """Examples off the diagonal of the confident joint, and their margins."""
    support = np.bincount(labels, minlength=p.shape[1])
    own = p[np.arange(len(p)), labels]
    usual = np.bincount(labels, own, p.shape[1]) / np.maximum(support, 1)
    sure = (p >= usual[None]) & (support > 0)[None]
    said = np.where(sure, p, -1.0).argmax(axis=1)
    wrong = np.flatnonzero(sure.any(axis=1) & (said != labels))
    return wrong, p[wrong, said[wrong]] - own[wrong]


def mistakes(probabilities: Probabilities, labels: Shaped[np.ndarray, "..."]) -> Int[np.ndarray, " m"]:
    """Wrong answers, the most confident first; of several labels an example's worst one counts."""
    if labels.ndim == 2:
        off = abs(probabilities - labels.astype(probabilities.dtype)).max(axis=1)
        wrong = np.flatnonzero(((probabilities >= 0.5) != labels.astype(bool)).any(axis=1))
        return wrong[np.argsort(-off[wrong], kind="stable")]
    wrong = np.flatnonzero(probabilities.argmax(axis=1) != labels)
    return wrong[np.argsort(-probabilities[wrong].max(axis=1), kind="stable")]


def uncertain(probabilities: Probabilities, several: bool = False) -> Int[np.ndarray, " n"]:
    """All examples, the closest call between the two likeliest classes, or of any label with 0.5, first."""
    if several:
        return np.argsort(abs(probabilities - np.float32(0.5)).min(axis=1), kind="stable")
    two = np.sort(np.partition(probabilities, -2, axis=1)[:, -2:], axis=1)
    return np.argsort(two[:, 1] - two[:, 0], kind="stable")


def tempered(probabilities: Probabilities, temperature: float, several: bool = False) -> Probabilities:
    """The probabilities that the same logits, divided by the temperature, give (Guo et al. 2017)."""
    tiny = np.finfo(np.float32).tiny
    p = probabilities.astype(np.float64)
    if several:
        odds = np.log(p.clip(tiny, 1)) - np.log1p(-p.clip(0, 1 - np.finfo(np.float32).epsneg))
        return (1 / (1 + np.exp(-odds / temperature))).astype(np.float32)
    logits = np.log(p.clip(tiny, 1)) / temperature
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return (powers / powers.sum(axis=1, keepdims=True)).astype(np.float32)


def summary(probabilities: Probabilities, labels: Shaped[np.ndarray, "..."], classes: Sequence[str]) -> dict[str, Any]:
    """All figures of a set, as plain numbers; one that is undefined there (no example of a class) is left out.

    `labels` is `[n]` class indices, or `[n, k]` zeros and ones where an example may have several labels. Then the
    probabilities are independent, 0.5 is the threshold, and `accuracy` is the share of examples with every label right.

    Raises UserError where the model's output is not finite, ValueError where the shapes contradict each other.
    """
    n, k = probabilities.shape
    if k != len(classes) or len(labels) != n or (labels.ndim == 2 and labels.shape[1] != k) or n == 0:
        raise ValueError(f"probabilities {n, k}, labels {labels.shape} and {len(classes)} classes do not fit together")
    _check_finite(probabilities)
    figures = _several(probabilities, labels.astype(bool)) if labels.ndim == 2 else _one(probabilities, labels)
    return {"count": n} | {name: value for name, value in figures.items() if value is not None}


def quantities(
    values: Float[np.ndarray, "n k"], labels: Float[np.ndarray, "n k"], names: Sequence[str]
) -> dict[str, Any]:
    """R², mean absolute and root mean squared error of predicted quantities; of several those of each, and mean R².

    R² is the share of the variance that is explained: 1 − Σ (y − ŷ)² / Σ (y − ȳ)², of these labels' mean ȳ. As in
    scikit-learn, where no two labels differ it is 1 if all are met and else 0. Raises UserError and ValueError as
    `summary` does.
    """
    if values.shape != labels.shape or values.shape[1:] != (len(names),) or not len(values):
        raise ValueError(f"values {values.shape}, labels {labels.shape} and {len(names)} names do not fit together")
    _check_finite(values)
    gap = values.astype(np.float64) - labels
    squares, spread = np.square(gap).sum(0), np.square(labels - labels.mean(0)).sum(0)
    varied = differ(labels) & (spread > 0)
    r2 = np.where(varied, 1 - squares / np.where(varied, spread, 1), squares == 0)
    mae, rmse = abs(gap).mean(0), np.sqrt(np.square(gap).mean(0))
    if len(names) == 1:
        return {"count": len(values), "r2": float(r2[0]), "mae": float(mae[0]), "rmse": float(rmse[0])}
    columns = zip(names, r2, mae, rmse, strict=True)
    each = {name: {"r2": float(r), "mae": float(a), "rmse": float(s)} for name, r, a, s in columns}
    return {"count": len(values), "r2": float(r2.mean()), "each": each}


def furthest(values: Float[np.ndarray, "n k"], labels: Float[np.ndarray, "n k"]) -> list[int]:
    """All examples, that first whose worst quantity is furthest off, in standard deviations of the labels."""
    return np.argsort(-_off(values, labels, labels).max(axis=1), kind="stable").tolist()


def worst_quantity(value: Float[np.ndarray, " k"], label: Float[np.ndarray, " k"], labels: Any) -> int:
    """Which quantity of an example is furthest off, in standard deviations of all `labels` [n, k]."""
    return int(_off(value, label, labels).argmax())


def _off(values: np.ndarray, labels: np.ndarray, all_labels: np.ndarray) -> np.ndarray:
    std = all_labels.std(0)
    return abs(values - labels) / np.where(differ(all_labels) & (std > 0), std, 1)


def differ(labels: np.ndarray) -> np.ndarray:
    """Which columns hold more than one value: the mean of equal ones can be an ulp off, and their variance above 0."""
    return labels.max(0) > labels.min(0)


def _check_finite(answers: np.ndarray) -> None:
    n = len(answers)
    if bad := int((~np.isfinite(answers)).any(axis=1).sum()):
        raise UserError(
            f"The model's output is not finite for {bad} of {n} examples, so there is nothing to score: the training "
            "has diverged. Lower the learning rate, or add warm-up or gradient clipping."
        )


def _one(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float | None]:
    k = probabilities.shape[1]
    counts = confusion(probabilities, labels)
    support, said = counts.sum(axis=1), counts.sum(axis=0)
    classwise = per_class(np.diag(counts), support, said)
    targets = np.arange(k)[None] == labels[:, None]
    return {
        "accuracy": accuracy(probabilities, labels),
        "top5_accuracy": top_k_accuracy(probabilities, labels) if k > 5 else None,
        "balanced_accuracy": float(classwise["recall"][support > 0].mean()),
        "f1_macro": float(classwise["f1"][support + said > 0].mean()),
        "f1_micro": accuracy(probabilities, labels),  # the same, where each example has one label
        "log_loss": log_loss(probabilities, labels),
        "ece": ece(probabilities, labels),
        "auroc": auroc(probabilities, targets),
        "average_precision": average_precision(probabilities, targets),
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
        "ece": ece(*pairs(probabilities, targets)),
        "average_precision": average_precision(probabilities, targets),
        "auroc": auroc(probabilities, targets),
    }
