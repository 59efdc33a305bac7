"""Losses L(f, D): functions of logits and a batch, one value per example."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from jft.errors import UserError, near
from jft.words import Words

Weights = Sequence[float] | np.ndarray | Array | None  # [k], one a class


def cross_entropy(
    logits: Float[Array, "b k"],
    batch: Mapping[str, Any],
    *,
    label_smoothing: float = 0.0,
    class_weights: Weights = None,
) -> Float[Array, " b"]:
    """Softmax cross-entropy in nats, of class indices [b] or of soft labels [b, k] that sum to one.

    Smoothing mixes the labels with the uniform distribution (Szegedy et al. 2016, section 7). Each class's term counts
    `class_weights` times, as in torch; the mean over a batch is of the examples, not of their weights.
    """
    target = _weighted(_distribution(logits, batch["label"], label_smoothing), class_weights)
    return optax.softmax_cross_entropy(logits, target)


def focal(
    logits: Float[Array, "b k"],
    batch: Mapping[str, Any],
    *,
    gamma: float = 2.0,
    label_smoothing: float = 0.0,
    class_weights: Weights = None,
) -> Float[Array, " b"]:
    """Cross-entropy with each term times (1 − p)^gamma: what is well classified counts little; labels as there.

    Lin et al. 2017, "Focal loss for dense object detection", equation 4, with softmax for one label of many.
    """
    target = _weighted(_distribution(logits, batch["label"], label_smoothing), class_weights)
    log_p = jax.nn.log_softmax(logits)
    # 1 − p as a power of e, and p not quite 1: the gradient is finite for any gamma.
    log_rest = jnp.log(-jnp.expm1(jnp.minimum(log_p, -1e-7)))
    return -(target * jnp.exp(gamma * log_rest) * log_p).sum(-1)


def binary_cross_entropy(
    logits: Float[Array, "b k"],
    batch: Mapping[str, Any],
    *,
    label_smoothing: float = 0.0,
    class_weights: Weights = None,
) -> Float[Array, " b"]:
    """Sigmoid cross-entropy in nats, summed over the classes.

    Labels [b, k], any number of which may be one, or class indices [b]: one against all others (Wightman et al. 2021,
    "ResNet strikes back"). Smoothing moves every label towards a half. An example of class c counts `class_weights[c]`
    times, one that mixup made of two the mean of theirs, by their shares; with labels [b, k] of an image that can have
    several, each class's term does where the class is there, as torch's `pos_weight`.
    """
    target = _several(logits, batch["label"], label_smoothing)
    there, absent = -jax.nn.log_sigmoid(logits), -jax.nn.log_sigmoid(-logits)
    return _both(target * there, (1 - target) * absent, batch, class_weights)


def binary_focal(
    logits: Float[Array, "b k"],
    batch: Mapping[str, Any],
    *,
    gamma: float = 2.0,
    alpha: float | None = 0.25,
    label_smoothing: float = 0.0,
    class_weights: Weights = None,
) -> Float[Array, " b"]:
    """Sigmoid cross-entropy, each class's term times (1 − p)^gamma, p being what its label was given.

    Labels and class weights as for `binary_cross_entropy`.

    What is there counts alpha times, what is not 1 − alpha; None weighs them alike. Lin et al. 2017, equation 5, as
    torchvision's sigmoid_focal_loss.
    """
    target = _several(logits, batch["label"], label_smoothing)
    there, absent = (1.0, 1.0) if alpha is None else (alpha, 1 - alpha)
    log_p, log_q = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
    terms = (
        -there * target * jnp.exp(gamma * log_q) * log_p,
        -absent * (1 - target) * jnp.exp(gamma * log_p) * log_q,
    )
    return _both(*terms, batch, class_weights)


def asymmetric(
    logits: Float[Array, "b k"],
    batch: Mapping[str, Any],
    *,
    gamma_neg: float = 4.0,
    gamma_pos: float = 0.0,
    clip: float = 0.05,
    label_smoothing: float = 0.0,
    class_weights: Weights = None,
) -> Float[Array, " b"]:
    """Focal loss for several labels with a gamma each for what is there and what is not, summed over the classes.

    What is not there counts nothing up to a probability of `clip`. Labels and class weights as for
    `binary_cross_entropy`. Ridnik et al. 2021, "Asymmetric loss for multi-label classification", equations 4 to 6 and
    the values of section 4.
    """
    target = _several(logits, batch["label"], label_smoothing)
    log_p, log_q = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
    there = jnp.exp(gamma_pos * log_q) * log_p
    if clip:
        shifted = jnp.maximum(jax.nn.sigmoid(logits) - clip, 0)
        # Where it is 0 a power below 1 would have an infinite gradient, and 0 · ∞ is not a number.
        focus = jnp.where(shifted > 0, jnp.where(shifted > 0, shifted, 1.0) ** gamma_neg, 0.0) if gamma_neg else 1.0
        absent = focus * jnp.log1p(-shifted)
    else:
        absent = jnp.exp(gamma_neg * log_p) * log_q
    return _both(-target * there, -(1 - target) * absent, batch, class_weights)


def squared_error(logits: Float[Array, "b k"], batch: Mapping[str, Any]) -> Float[Array, " b"]:
    """(output − label)², for regression: labels [b, k], or [b] where there is one output; the mean over outputs."""
    return jnp.square(_residual(logits, batch["label"])).mean(-1)


def huber(logits: Float[Array, "b k"], batch: Mapping[str, Any], *, delta: float = 1.0) -> Float[Array, " b"]:
    """Half the squared error up to a distance of delta, beyond it linear; labels and mean as for `squared_error`.

    Huber 1964, "Robust estimation of a location parameter".
    """
    return optax.huber_loss(_residual(logits, batch["label"]), delta=delta).mean(-1)


LOSSES = Words(
    "loss",
    {
        "cross-entropy": cross_entropy,
        "focal": focal,
        "binary-cross-entropy": binary_cross_entropy,
        "binary-focal": binary_focal,
        "asymmetric": asymmetric,
        "squared-error": squared_error,
        "huber": huber,
    },
    {"gamma": (0, 100), "gamma_neg": (0, 100), "gamma_pos": (0, 100), "alpha": (0, 1), "clip": (0, 0.99),
     "delta": (1e-6, 1e6)},
    own="a function (logits, batch) -> [b]",
)  # fmt: skip


def correct(logits: Float[Array, "b k"], label: Array) -> Float[Array, " b"]:
    """1 where the prediction is right: the largest logit's class; for several labels, every class's sign.

    Labels that mixup made soft are not several ones: for those, give the batch's "hard_label".
    """
    if label.ndim == 1:
        return (logits.argmax(-1) == label).astype(jnp.float32)
    return ((logits > 0) == (label > 0.5)).all(-1).astype(jnp.float32)


def average(logits: Float[Array, "v b k"], several: bool = False) -> Float[Array, "b k"]:
    """Of several views' or models' logits, those whose probabilities are the mean of theirs.

    Softmax probabilities, or where an example can have `several` labels, each class's sigmoid.
    """
    if several:
        there = jax.nn.logsumexp(jax.nn.log_sigmoid(logits), 0)
        return there - jax.nn.logsumexp(jax.nn.log_sigmoid(-logits), 0)
    return jax.nn.logsumexp(jax.nn.log_softmax(logits), 0) - math.log(logits.shape[0])


KINDS = ("inverse", "effective")


def class_weights(labels: Any, k: int, kind: str = "inverse", beta: float = 0.999) -> Float[np.ndarray, " k"]:
    """Weights of k classes that rise as their examples grow fewer, of labels [n] or [n, k].

    `inverse` to their number n, or to its `effective` number (1 − beta^n) / (1 − beta), which levels off at
    1 / (1 − beta). Cui et al. 2019, "Class-balanced loss based on effective number of samples". Of labels [n] their
    mean is 1. Of [n, k] each is that of the class's examples over that of the others, the usual `pos_weight` of torch:
    both then count alike. Raises UserError for a class without examples and an unknown kind.

    >>> class_weights([0, 0, 0, 1], 2)
    array([0.5, 1.5], dtype=float32)
    """
    labels = np.asarray(labels)
    if kind not in KINDS:
        raise UserError(f"There are no class weights {kind!r}.{near(kind, KINDS)} Known: {', '.join(KINDS)}.")
    if not 0 <= beta < 1:
        raise UserError(f"The beta of class weights is {beta}; it is at least 0 and below 1.")
    count = np.bincount(labels, minlength=k) if labels.ndim == 1 else labels.sum(0, dtype=np.float64)
    if len(count) != k:
        raise UserError(f"There are labels of {len(count)} classes; class weights for {k} were asked for.")
    if not count.all():
        missing = ", ".join(str(i) for i in np.flatnonzero(count == 0)[:5])
        raise UserError(f"The classes {missing} have no examples, so they have no weight by their number.")

    def weigh(count: Any) -> Any:
        return 1 / count if kind == "inverse" else (1 - beta) / (1 - beta**count)

    if labels.ndim == 1:
        weights = weigh(count)
        return (weights / weights.mean()).astype(np.float32)
    return (weigh(count) / weigh(np.maximum(len(labels) - count, 1))).astype(np.float32)


def named_weights(given: Mapping[str, Any] | str, classes: Sequence[str]) -> Float[np.ndarray, " k"]:
    """Weights of these classes as they are, by name, or as the command line has them. Raises UserError.

    >>> named_weights("ants=2,bees=0.5", ["ants", "bees"])
    array([2. , 0.5], dtype=float32)
    """
    if isinstance(given, str):
        pairs = (pair.rpartition("=") for pair in given.split(","))
        given = {name: value for name, _, value in pairs}
    for name in given:
        if name not in classes:
            raise UserError(f"Class weights name {name!r}, which is no class.{near(name, classes)}")
    if missing := [name for name in classes if name not in given]:
        raise UserError(
            f"Class weights name every class; {', '.join(missing[:5])} {'is' if len(missing) == 1 else 'are'} not."
        )
    try:
        found = np.array([float(given[name]) for name in classes], np.float32)
    except (TypeError, ValueError):
        found = np.array([np.nan], np.float32)
    if not (np.isfinite(found).all() and (found >= 0).all() and found.any()):
        raise UserError(f"Class weights are {given}; numbers of 0 and more are expected, one at least above 0.")
    return found


def _distribution(logits: Array, label: Array, smoothing: float) -> Array:
    k = logits.shape[-1]
    target = jax.nn.one_hot(label, k, dtype=logits.dtype) if label.ndim == 1 else label.astype(logits.dtype)
    return target * (1 - smoothing) + smoothing / k


def _several(logits: Array, label: Array, smoothing: float) -> Array:
    target = jax.nn.one_hot(label, logits.shape[-1]) if label.ndim == 1 else label
    return target.astype(logits.dtype) * (1 - smoothing) + smoothing / 2


def _weighted(terms: Array, weights: Weights) -> Array:
    if weights is None:
        return terms
    if np.shape(weights) != terms.shape[-1:]:
        raise ValueError(f"class weights of shape {np.shape(weights)} for {terms.shape[-1]} classes")
    return terms * jnp.asarray(weights, terms.dtype)[None]


def _both(there: Array, absent: Array, batch: Mapping[str, Any], weights: Weights) -> Array:
    """The sum over classes of what is there and what is not, weighed as `binary_cross_entropy` says.

    A weight of a class's both terms would leave the probability that minimises them where it is.
    """
    label = batch["label"]
    if weights is None or (label.ndim > 1 and "hard_label" not in batch):
        return (_weighted(there, weights) + absent).sum(-1)
    share = jax.nn.one_hot(label, there.shape[-1]) if label.ndim == 1 else label
    return (there + absent).sum(-1) * _weighted(share.astype(there.dtype), weights).sum(-1)


def _residual(logits: Array, label: Array) -> Array:
    label = label[:, None] if label.ndim == 1 else label
    if label.shape != logits.shape:
        raise ValueError(f"{logits.shape[-1]} outputs for labels of shape {label.shape[1:]}; they should be as many")
    return logits - label.astype(logits.dtype)
