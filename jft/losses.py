"""Losses L(f, D): functions of logits and a batch, one value per example."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float


def cross_entropy(
    logits: Float[Array, "b k"], batch: Mapping[str, Any], *, label_smoothing: float = 0.0
) -> Float[Array, " b"]:
    """Softmax cross-entropy in nats, of class indices [b] or of soft labels [b, k] that sum to one.

    Smoothing mixes the labels with the uniform distribution (Szegedy et al. 2016, section 7).
    """
    label = batch["label"]
    k = logits.shape[-1]
    target = jax.nn.one_hot(label, k, dtype=logits.dtype) if label.ndim == 1 else label.astype(logits.dtype)
    target = target * (1 - label_smoothing) + label_smoothing / k
    return optax.softmax_cross_entropy(logits, target)


def binary_cross_entropy(
    logits: Float[Array, "b k"], batch: Mapping[str, Any], *, label_smoothing: float = 0.0
) -> Float[Array, " b"]:
    """Sigmoid cross-entropy in nats, summed over the classes, for labels [b, k] any number of which may be one."""
    target = batch["label"].astype(logits.dtype)
    target = target * (1 - label_smoothing) + label_smoothing / 2
    return optax.sigmoid_binary_cross_entropy(logits, target).sum(-1)


def correct(logits: Float[Array, "b k"], label: Array) -> Float[Array, " b"]:
    """1 where the prediction is right: the largest logit's class; for several labels, every class's sign."""
    if label.ndim == 1:
        return (logits.argmax(-1) == label).astype(jnp.float32)
    return ((logits > 0) == (label > 0.5)).all(-1).astype(jnp.float32)
