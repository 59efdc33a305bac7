"""A stage's optax transformation: optimisers and schedules by name, one group for each learning-rate multiplier."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

from jft.errors import UserError, near
from jft.plan import labels

# Each takes the weight decay and a mask of what it applies to, and knows no learning rate.
Optimizer = Callable[[float, Callable], optax.GradientTransformation]


def sgd(weight_decay: float, mask: Callable) -> optax.GradientTransformation:
    """Momentum 0.9; decay is L2 in the gradient, as in torch."""
    return optax.chain(optax.add_decayed_weights(weight_decay, mask), optax.trace(0.9))


def adam(weight_decay: float, mask: Callable) -> optax.GradientTransformation:
    """β 0.9, 0.999, ε 1e-8; decay is L2 in the gradient, as in torch (Kingma and Ba 2015)."""
    return optax.chain(optax.add_decayed_weights(weight_decay, mask), optax.scale_by_adam())


def adamw(weight_decay: float, mask: Callable) -> optax.GradientTransformation:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019)."""
    return optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(weight_decay, mask))


def lion(weight_decay: float, mask: Callable) -> optax.GradientTransformation:
    """Sign of an interpolated momentum, β 0.9, 0.99; rates 3 to 10 times below Adam's (Chen et al. 2023)."""
    return optax.chain(optax.scale_by_lion(), optax.add_decayed_weights(weight_decay, mask))


OPTIMIZERS: dict[str, Optimizer] = {"sgd": sgd, "adam": adam, "adamw": adamw, "lion": lion}

SCHEDULES: dict[str, Callable[[float, int], optax.Schedule]] = {
    "constant": lambda peak, steps: optax.constant_schedule(peak),
    "linear": lambda peak, steps: optax.linear_schedule(peak, 0.0, steps),
    "cosine": lambda peak, steps: optax.cosine_decay_schedule(peak, steps),
    # tenfold down at 30, 60 and 90 % of the steps, as in BiT's HyperRule
    "step": lambda peak, steps: optax.piecewise_constant_schedule(
        peak, {max(1, int(steps * at)): 0.1 for at in (0.3, 0.6, 0.9)}
    ),
}


def make_schedule(
    name: str | Callable[[float, int], optax.Schedule], peak: float, steps: int, warmup: float
) -> optax.Schedule:
    """Learning rate against the stage's step: a linear rise over `warmup` of the steps, then the schedule."""
    if isinstance(name, str) and name not in SCHEDULES:
        raise UserError(f"There is no schedule {name!r}.{near(name, SCHEDULES)} Schedules: {', '.join(SCHEDULES)}.")
    if not 0 <= warmup < 1:
        raise UserError(f"warmup is {warmup:g}; it is a share of a stage's steps, from 0 to below 1.")
    rise = round(warmup * steps)
    after = (SCHEDULES[name] if isinstance(name, str) else name)(peak, max(1, steps - rise))
    if not rise:
        return after
    # The first step already moves: rates peak/rise, 2·peak/rise, …, peak.
    return optax.join_schedules([lambda count: peak * (count + 1) / rise, after], [rise])


def decays(params: Mapping[str, Any]) -> dict[str, bool]:
    """Weight decay's usual mask: matrices and kernels, but no biases, norms, tokens or position embeddings."""
    # multi_transform shows each group the other groups' parameters as nodes without dimensions.
    return {n: getattr(p, "ndim", 0) >= 2 and not n.endswith(("_token", "pos_embed")) for n, p in params.items()}


def make_optimizer(
    optimizer: str | Optimizer,
    schedule: optax.Schedule,
    multipliers: Mapping[str, float],
    *,
    weight_decay: float = 0.0,
    clip: float | None = None,
) -> optax.GradientTransformation:
    """The transformation of a stage's trainable half: global-norm clipping, a group for each multiplier, the schedule.

    It sees the parameters that train and no others, so clipping counts their norm alone and frozen parameters hold no
    state.
    """
    if isinstance(optimizer, str):
        if optimizer not in OPTIMIZERS:
            raise UserError(
                f"There is no optimizer {optimizer!r}.{near(optimizer, OPTIMIZERS)} "
                f"Optimizers: {', '.join(OPTIMIZERS)}; or a function (weight_decay, mask) -> transformation."
            )
        optimizer = OPTIMIZERS[optimizer]
    group = {n: label for n, label in labels(multipliers).items() if label != "frozen"}
    by_label = {group[n]: multipliers[n] for n in group}
    transforms = {
        label: optax.chain(optimizer(weight_decay, decays), optax.scale(multiplier))
        for label, multiplier in by_label.items()
    }
    return optax.chain(
        optax.clip_by_global_norm(clip) if clip else optax.identity(),
        optax.multi_transform(transforms, group),
        optax.scale_by_learning_rate(schedule),
    )


def state_bytes(optimizer: optax.GradientTransformation, trainable: Mapping[str, jax.ShapeDtypeStruct]) -> int:
    """Bytes of optimizer state for these parameters, computed from shapes alone."""
    shapes = jax.eval_shape(optimizer.init, dict(trainable))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
