"""Distillation from the frozen source: objectives that hold features, or the old head's answers, where they were."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jft import losses
from jft.errors import UserError
from jft.lora import LoraModel
from jft.models.base import Model
from jft.models.vit import without_prompts
from jft.step import FEATURES, Batch, Metrics, Objective, supervised, truth
from jft.words import Words


def half_mean_square(h: Array, h_s: Array) -> Float[Array, ""]:
    """Mean of ½ ‖h − h_s‖² / dim."""
    return 0.5 * jnp.mean(jnp.square(h - h_s))


def features(
    model: Model,
    *,
    train_parts: Collection[str],
    update_stats: Collection[str],
    trainable: Collection[str],
    source: Mapping[str, Any],
    loss: Callable[..., Float[Array, " b"]] = losses.cross_entropy,
    start: str | None = None,
    at: str = "head",
    weight: float = 1.0,
    distance: Callable[[Array, Array], Array] = half_mean_square,
    penalty: Callable[..., Array] | None = None,
    penalty_weight: float = 0.0,
) -> Objective:
    """Mean L(f, batch) + weight · distance(h, h_s), h and h_s [b, …] what the model and the source give before `at`.

    In a stage that trains nothing before `at`, such as the first of `lp-ft`, there is nothing to hold: L(f, batch) is
    all. A penalty of the config is added to either.

    The mean squared distance of features, as in FitNets (Romero et al. 2015) and DELTA without its attention (Li et al.
    2019). In a config: `objective="distil:at=pool:weight=0.1"`. Raises UserError where a part below `at` is not the
    source's.
    """
    below = model.span(start, at)
    if not any(name.startswith(part + "/") for name in trainable for part in below):
        return supervised(
            model,
            train_parts=train_parts,
            update_stats=update_stats,
            trainable=trainable,
            loss=loss,
            penalty=penalty,
            penalty_weight=penalty_weight,
            source=source,
            start=start,
        )
    plain = model.plain() if isinstance(model, LoraModel) else model
    if not any(n.endswith("/prompts") for n in source):
        plain = without_prompts(plain)
    params, stats = (
        {n: source.get(n) for n in names if any(n.startswith(part + "/") for part in below)} for names in plain.shapes()
    )
    for name, value in {**params, **stats}.items():
        if value is None:
            raise UserError(f"The pretrained weights have no {name}, so they give no features before {at}.")

    def objective(
        now: Mapping[str, Any], batch_stats: Mapping[str, Any], batch: Batch, key: Array
    ) -> tuple[Array, tuple[Metrics, dict[str, Any]]]:
        x = batch[FEATURES if start else model.input]
        h, new_stats = model.apply(
            now, batch_stats, x, start=start, stop=at, train=train_parts, update_stats=update_stats, key=key
        )
        logits, new_stats = model.apply(
            now, new_stats, h, start=at, train=train_parts, update_stats=update_stats, key=key
        )
        h_s = jax.lax.stop_gradient(plain.apply(params, stats, x, start=start, stop=at)[0])
        logits, h, h_s = (v.astype(jnp.float32) for v in (logits, h, h_s))
        fit = loss(logits, batch).mean()
        held = weight * distance(h, h_s)
        if penalty is not None:
            held += penalty_weight * penalty(model.effective(now, trainable), source)
        metrics = {"loss": fit, "accuracy": losses.correct(logits, truth(batch)).mean(), "penalty": held}
        return fit + held, (metrics, new_stats)

    return objective


def answers(
    model: Model,
    *,
    source_head: Mapping[str, Array],
    weight: float = 1.0,
    temperature: float = 2.0,
    **given: Any,
) -> Objective:
    """`features` before the head, held by what the source's own head says of them: Learning without Forgetting.

    The distance is the cross-entropy of its answers at `temperature`, times its square (Li and Hoiem 2016, equation 3);
    that head stays as it was, where theirs goes on learning. In a config: `objective="lwf:weight=0.5"`. A run reads
    `source_head`, its `kernel` [d, k] and `bias` [k], from the weights.
    """

    def distance(h: Array, h_s: Array) -> Float[Array, ""]:
        old, new = ((v @ source_head["kernel"] + source_head["bias"][None]) / temperature for v in (h_s, h))
        return -(temperature**2) * jnp.mean(jnp.sum(jax.nn.softmax(old) * jax.nn.log_softmax(new), -1))

    return features(model, weight=weight, distance=distance, **given)


OBJECTIVES = Words(
    "objective",
    {"distil": features, "lwf": answers},
    {"at": str, "weight": (0, 1e6), "temperature": (0.01, 1000)},
    own="a function (model, …) -> (params, batch_stats, batch, key) -> …",
)
