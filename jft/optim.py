"""A stage's optax transformation: optimisers and schedules by name, one group for each learning-rate multiplier."""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from jft.errors import UserError
from jft.words import Words

# Each takes the weight decay and a mask of what it applies to, and knows no learning rate: what it gives is subtracted,
# times the rate (`optax.scale_by_adam`, not `optax.adam`).
Optimizer = Callable[[float, Callable], optax.GradientTransformation]


def sgd(
    weight_decay: float, mask: Callable, *, momentum: float = 0.9, nesterov: bool = False
) -> optax.GradientTransformation:
    """Momentum as in torch, without dampening, and decay is L2 in the gradient, as there."""
    return optax.chain(optax.add_decayed_weights(weight_decay, mask), optax.trace(momentum, nesterov))


def adam(
    weight_decay: float, mask: Callable, *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8
) -> optax.GradientTransformation:
    """Kingma and Ba 2015; decay is L2 in the gradient, as in torch."""
    return optax.chain(optax.add_decayed_weights(weight_decay, mask), optax.scale_by_adam(b1, b2, eps))


def adamw(
    weight_decay: float, mask: Callable, *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8
) -> optax.GradientTransformation:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019)."""
    return optax.chain(optax.scale_by_adam(b1, b2, eps), optax.add_decayed_weights(weight_decay, mask))


def lion(weight_decay: float, mask: Callable, *, b1: float = 0.9, b2: float = 0.99) -> optax.GradientTransformation:
    """Sign of an interpolated momentum; rates 3 to 10 times below Adam's (Chen et al. 2023)."""
    return optax.chain(optax.scale_by_lion(b1, b2), optax.add_decayed_weights(weight_decay, mask))


def lamb(
    weight_decay: float, mask: Callable, *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-6
) -> optax.GradientTransformation:
    """AdamW whose step of each array is scaled to that array's norm, for large batches (You et al. 2020).

    Biases and norms take AdamW's own step, as in the reference implementations, and so does what begins at zero, a new
    head and low-rank updates: scaled to a norm near zero they would stay there.
    """

    def scaled(params: Mapping[str, Any]) -> dict[str, bool]:
        return {n: v and not n.startswith("head/") and "/lora_" not in n for n, v in decays(params).items()}

    return optax.chain(
        optax.scale_by_adam(b1, b2, eps),
        optax.add_decayed_weights(weight_decay, mask),
        optax.masked(optax.scale_by_trust_ratio(), scaled),
    )


def muon(
    weight_decay: float, mask: Callable, *, momentum: float = 0.95, b1: float = 0.9, b2: float = 0.999
) -> optax.GradientTransformation:
    """Momentum made orthogonal for matrices below the head, Adam for all else; decoupled decay (Jordan et al. 2024).

    A convolution's kernel is the matrix [height · width · channels, features]. Patch embeddings and tables of positions
    are Adam's, as embeddings are in the reference. Scaled to Adam's size of step, 0.2 of root mean square, so that the
    same rates serve (Liu et al. 2025).
    """

    def numbers(p: Any) -> Any:
        return optax.contrib.MuonDimensionNumbers(tuple(range(p.ndim - 1)), p.ndim - 1)

    turned = optax.contrib.scale_by_muon(
        beta=momentum, weight_dimension_numbers=lambda tree: jax.tree.map(numbers, tree)
    )
    kinds = {"matrix": turned, "other": optax.scale_by_adam(b1, b2)}

    def matrix(name: str, p: Any) -> bool:
        kernel = getattr(p, "ndim", 0) in (2, 4) and not name.endswith(("rel_pos", "/patch/kernel"))
        return kernel and not name.startswith("head/")

    def kind(params: Any) -> Any:
        # Other groups' parameters are nodes without leaves here, and stay so.
        return {
            n: p if isinstance(p, optax.MaskedNode) else "matrix" if matrix(n, p) else "other"
            for n, p in params.items()
        }

    def to_adams_size(updates: Any, params: Any) -> Any:
        return {
            n: u * (0.2 * max(u.shape[-1], u.size // u.shape[-1]) ** 0.5) if matrix(n, u) else u
            for n, u in updates.items()
        }

    return optax.chain(
        optax.multi_transform(kinds, kind),
        optax.stateless(to_adams_size),
        optax.add_decayed_weights(weight_decay, mask),
    )


class Free(optax.GradientTransformation):
    """An optimizer whose steps `make_optimizer` averages, however a function of the user's wraps it."""


def schedule_free(
    weight_decay: float, mask: Callable, *, b2: float = 0.999, eps: float = 1e-8
) -> optax.GradientTransformation:
    """AdamW whose momentum is an average of the iterates, which is what is evaluated (Defazio et al. 2024).

    The averaging is `make_optimizer`'s, and `averaged` tells the weights to evaluate; decay is at the point of the
    gradient. A constant rate after the warm-up is its schedule. BatchNorms that train gather their statistics at the
    point of the gradient, which is near the average but is not it; `batch_norm="frozen"` in a stage keeps the source's.
    """
    return Free(*optax.chain(optax.scale_by_adam(0.0, b2, eps), optax.add_decayed_weights(weight_decay, mask)))


def schedule_free_sgd(weight_decay: float, mask: Callable) -> optax.GradientTransformation:
    """The same over plain SGD (Defazio et al. 2024, algorithm 1)."""
    return Free(*optax.add_decayed_weights(weight_decay, mask))


OPTIMIZERS = Words(
    "optimizer",
    {
        "sgd": sgd,
        "adam": adam,
        "adamw": adamw,
        "lion": lion,
        "lamb": lamb,
        "muon": muon,
        "schedule-free": schedule_free,
        "schedule-free-sgd": schedule_free_sgd,
    },
    {"momentum": (0, 0.9999), "b1": (0, 0.9999), "b2": (0, 0.999999), "eps": (1e-30, 1)},
    {"momentum": "sgd", "nesterov": "sgd:nesterov=yes"},
    own="a function (weight_decay, mask) -> transformation",
)


def is_free(optimizer: Any) -> bool:
    """Whether an optimizer is schedule-free: one of these by name, or a function that gives what one of them does."""
    with contextlib.suppress(Exception):  # what is wrong with it is told where it is used
        return isinstance(OPTIMIZERS.find(optimizer)(0.0, decays), Free)
    return False


def usual_schedule(optimizer: Any) -> str:
    """The name of the schedule where none is asked for."""
    return "constant" if is_free(optimizer) else "cosine"


def constant(peak: float, steps: int) -> optax.Schedule:
    """The peak all along."""
    return optax.constant_schedule(peak)


def linear(peak: float, steps: int, *, end: float = 0.0) -> optax.Schedule:
    """A straight line down to `end` of the peak."""
    return optax.linear_schedule(peak, end * peak, steps)


def cosine(peak: float, steps: int, *, end: float = 0.0) -> optax.Schedule:
    """Half a cosine down to `end` of the peak (Loshchilov and Hutter 2017, without restarts)."""
    return optax.cosine_decay_schedule(peak, steps, end)


def step(peak: float, steps: int, *, factor: float = 0.1, rise: int = 0) -> optax.Schedule:
    """`factor` of the rate before, after 30, 60 and 90 % of all the steps, those of the `rise` among them.

    BiT's HyperRule (Kolesnikov et al. 2020).
    """
    drops: dict[int, float] = {}
    for at in (0.3, 0.6, 0.9):
        place = max(1, int((rise + steps) * at) - rise)
        drops[place] = factor * drops.get(place, 1.0)  # of few steps several fall together
    return optax.piecewise_constant_schedule(peak, drops)


def one_cycle(
    peak: float, steps: int, *, pct_start: float = 0.3, div_factor: float = 25.0, final_div_factor: float = 1e4
) -> optax.Schedule:
    """A cosine up from 1 / div_factor of the peak, and one down to 1 / final_div_factor of where it began.

    It has a rise of its own, over `pct_start` of the steps: Smith and Topin 2018, with torch's names and values.
    """
    # Of fewer than 4 steps it would be all edges.
    return optax.cosine_onecycle_schedule(max(steps, 4), peak, pct_start, div_factor, final_div_factor)


SCHEDULES = Words(
    "schedule",
    {"constant": constant, "linear": linear, "cosine": cosine, "step": step, "one-cycle": one_cycle},
    {"end": (0, 1), "factor": (0, 1), "pct_start": (0.01, 0.99), "div_factor": (1, 1e6), "final_div_factor": (1, 1e9)},
    {"onecycle": "one-cycle", "multistep": "step"},
    own="a function (peak, steps) -> optax schedule",
)


def make_schedule(
    name: str | Callable[[float, int], optax.Schedule], peak: float, steps: int, warmup: float
) -> optax.Schedule:
    """Learning rate against the stage's step: a linear rise over `warmup` of the steps, then the schedule.

    `one-cycle` has a rise of its own.
    """
    schedule = SCHEDULES.find(name)
    if not 0 <= warmup < 1:
        raise UserError(f"warmup is {warmup:g}; it is a share of a stage's steps, from 0 to below 1.")
    of = getattr(schedule, "func", schedule)
    if of is one_cycle:
        return schedule(peak, steps)
    rise = round(warmup * steps)
    given = {"rise": rise} if of is step else {}
    after = schedule(peak, max(1, steps - rise), **given)
    if not rise:
        return after
    # The first step already moves: rates peak/rise, 2·peak/rise, …, peak.
    return optax.join_schedules([lambda count: peak * (count + 1) / rise, after], [rise])


def decays(params: Mapping[str, Any]) -> dict[str, bool]:
    """Weight decay's usual mask: matrices and kernels, but no biases, norms, tokens, or embeddings of positions."""
    # multi_transform shows each group the other groups' parameters as nodes without dimensions.
    return {
        n: getattr(p, "ndim", 0) >= 2 and not n.endswith(("_token", "pos_embed", "rel_pos")) for n, p in params.items()
    }


def make_optimizer(
    optimizer: str | Optimizer,
    schedule: optax.Schedule,
    multipliers: Mapping[str, float],
    labels: Mapping[str, str] | None = None,
    *,
    weight_decay: float = 0.0,
    clip: float | None = None,
    surgical: Mapping[str, str] | None = None,
    pull: Callable[[Any], Any] | None = None,
) -> optax.GradientTransformation:
    """The transformation of a stage's trainable half: clipping, an optimizer a group, the multipliers, the schedule.

    It sees the parameters that train and no others, so clipping counts their norm alone and frozen parameters hold no
    state. `labels` are `plan.labels`, by default one group; `surgical` names each parameter's part, whose rate is then
    scaled by its relative gradient norm. `pull` is a penalty of the parameters whose gradient joins the step past the
    optimizer, as decoupled weight decay does (Loshchilov and Hutter 2019).
    """
    free = is_free(optimizer)
    make = OPTIMIZERS.find(optimizer)
    group = {n: labels[n] if labels else "all" for n, v in multipliers.items() if v}
    transforms = {label: make(weight_decay, decays) for label in group.values()}
    steps = optax.multi_transform(transforms, group)
    made = (
        optax.clip_by_global_norm(clip) if clip else optax.identity(),
        scale_by_relative_gradient_norm(steps, surgical) if surgical else steps,
        optax.stateless(lambda u, params: optax.tree.add(u, jax.grad(pull)(params))) if pull else optax.identity(),
        optax.stateless(lambda updates, params: {n: multipliers[n] * u for n, u in updates.items()}),
        optax.scale_by_learning_rate(schedule),
    )
    if free:
        # optax counts from 1 what it weighs the average by: a step's weight is the rate that it was made at.
        return optax.contrib.schedule_free(optax.chain(*made), lambda count: schedule(count - 1))
    return optax.chain(*made)


def averaged(opt_state: optax.OptState, params: Mapping[str, Any]) -> dict[str, Any]:
    """The values to evaluate of parameters that are trained schedule-free, and no others: x, where training is at y.

    Training holds y = β x + (1 − β) z, z the base optimizer's iterates and x their average.
    """
    if not isinstance(opt_state, optax.contrib.ScheduleFreeState):
        return {}
    train = {n: params[n] for n in opt_state.z}
    return dict(optax.contrib.schedule_free_eval_params(opt_state, train))


def carry(fresh: optax.OptState, old: optax.OptState) -> optax.OptState:
    """A stage's first optimizer state, with the old values of whatever the stage before held under the same label.

    A group's count goes with its moments, so Adam's bias correction stays right; what begins to train is a group of
    its own, with a count from zero (`plan.labels`). The schedule begins anew.
    """
    new, before = fresh[1], old[1]
    # Where one stage alone is surgical the moments lie a level deeper in its state.
    if isinstance(new, RelativeGradientNorm) and not isinstance(before, RelativeGradientNorm):
        return (fresh[0], new._replace(inner=_kept(new.inner, before)), *fresh[2:])
    if isinstance(before, RelativeGradientNorm) and not isinstance(new, RelativeGradientNorm):
        before = before.inner
    return (fresh[0], _kept(new, before), *fresh[2:])


def _kept(fresh: optax.OptState, old: optax.OptState) -> optax.OptState:
    known = {path: leaf for path, leaf in jax.tree_util.tree_flatten_with_path(old)[0]}
    return jax.tree_util.tree_map_with_path(lambda path, leaf: known.get(path, leaf), fresh)


class RelativeGradientNorm(NamedTuple):
    """State of `scale_by_relative_gradient_norm`."""

    inner: optax.OptState
    counts: dict[str, Any]  # by part, its steps: one that begins to train in a later stage has had none
    norms: dict[str, Any]  # by part, the mean so far of ‖gradient‖ / ‖weights‖


def scale_by_relative_gradient_norm(
    inner: optax.GradientTransformation, part_of: Mapping[str, str]
) -> optax.GradientTransformation:
    """The updates of `inner`, each part's scaled by its ‖gradient‖ / ‖weights‖ against the largest of any part.

    Auto-RGN of Lee et al. 2023, "Surgical fine-tuning improves adaptation to distribution shifts", section 5, with the
    mean of the ratios over the steps so far, where theirs is taken anew every epoch.
    """

    def members(updates: Mapping[str, Any]) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name in updates:
            found.setdefault(part_of[name], []).append(name)
        return found

    def init(params: Any) -> RelativeGradientNorm:
        parts = members(params)
        return RelativeGradientNorm(
            inner.init(params),
            {part: jnp.zeros((), jnp.int32) for part in parts},
            {part: jnp.zeros(()) for part in parts},
        )

    def update(grads: Any, state: RelativeGradientNorm, params: Any = None) -> tuple[Any, RelativeGradientNorm]:
        updates, after = inner.update(grads, state.inner, params)
        counts = {part: count + 1 for part, count in state.counts.items()}
        norms = {}
        for part, names in members(grads).items():
            weights = optax.tree.norm({n: params[n] for n in names})
            # A fresh head of zeros has no ratio to be compared with: it trains at the full rate.
            ratio = optax.tree.norm({n: grads[n] for n in names}) / jnp.maximum(weights, 1e-12)
            norms[part] = state.norms[part] + (ratio - state.norms[part]) / counts[part].astype(jnp.float32)
        body = [v for part, v in norms.items() if part != "head"] or [*norms.values()]
        largest = jnp.maximum(jnp.max(jnp.stack(body)), 1e-12)
        scale = {part: jnp.minimum(v / largest, 1.0) for part, v in norms.items()}
        return {n: scale[part_of[n]] * u for n, u in updates.items()}, RelativeGradientNorm(after, counts, norms)

    return optax.GradientTransformation(init, update)


def state_bytes(optimizer: optax.GradientTransformation, trainable: Mapping[str, jax.ShapeDtypeStruct]) -> int:
    """Bytes of optimizer state for these parameters, computed from shapes alone."""
    shapes = jax.eval_shape(optimizer.init, dict(trainable))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
