"""The train step and the evaluation step: pure functions of the state and a batch, without a word about devices."""

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jft import losses, tree
from jft.models.base import Model

FEATURES = "features"  # in a batch: what the parts before `start` gave
SOURCE_HEAD = "source_head/"  # before the names of the weights' own head among the pretrained values

Batch = Mapping[str, Any]
Metrics = dict[str, Array]


@flax.struct.dataclass
class State:
    """All that training changes, and what it is held against, as one pytree of arrays."""

    # Any, not Array: trees of shardings and of shapes have this form too.
    step: Any  # int32 [], counted over all stages
    params: dict[str, Any]
    batch_stats: dict[str, Any]
    opt_state: Any  # of the current stage's optimizer, over the parameters that train
    key: Any  # uint32 [2], key data of the run; a step's randomness is derived from it and `step`
    ema: Any = flax.struct.field(default_factory=dict)  # moving averages of what has trained, where asked for
    source: Any = flax.struct.field(default_factory=dict)  # pretrained values, for penalties and objectives


# (params, batch_stats, batch, key) -> (what is minimised, (metrics, batch statistics after it))
Objective = Callable[[Mapping[str, Any], Mapping[str, Any], Batch, Array], tuple[Array, tuple[Metrics, dict[str, Any]]]]
TrainStep = Callable[[State, Batch], tuple[State, Metrics]]


def truth(batch: Batch) -> Array:
    """What a prediction is right against: the labels, or the class that weighs most in those that were mixed."""
    return batch.get("hard_label", batch["label"])


def supervised(
    model: Model,
    *,
    train_parts: Collection[str],
    update_stats: Collection[str],
    trainable: Collection[str],
    loss: Callable[..., Float[Array, " b"]] = losses.cross_entropy,
    penalty: Callable[..., Array] | None = None,
    penalty_weight: float = 0.0,
    source: Mapping[str, Any] | None = None,
    start: str | None = None,
) -> Objective:
    """Mean L(f, batch) + λ R(f, f_s) over labelled examples, the penalty of what trains (`Model.effective`).

    With `start` the batch holds features and the parts before it are not run. `source` holds the pretrained values, of
    parameters and batch statistics, by name; those that the pretrained weights lack are not in it.
    """

    def objective(
        params: Mapping[str, Any], batch_stats: Mapping[str, Any], batch: Batch, key: Array
    ) -> tuple[Array, tuple[Metrics, dict[str, Any]]]:
        x = batch[FEATURES if start else model.input]
        logits, new_stats = model.apply(
            params, batch_stats, x, start=start, train=train_parts, update_stats=update_stats, key=key
        )
        logits = logits.astype(jnp.float32)
        fit = loss(logits, batch).mean()
        metrics = {"loss": fit, "accuracy": losses.correct(logits, truth(batch)).mean()}
        if penalty is None:
            return fit, (metrics, new_stats)
        distance = penalty_weight * penalty(model.effective(params, trainable), source)
        return fit + distance, (metrics | {"penalty": distance}, new_stats)

    return objective


def make_train_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    trainable: Collection[str],
    prepare: Callable[[Batch, Array], Batch],
    ema: float = 0.0,
    sam: float = 0.0,
    accumulate: int = 1,
    unroll: bool = False,
    gather: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    axis_name: str | None = None,
) -> TrainStep:
    """One step of gradient descent on an objective, a function `(state, batch) -> (state, metrics)`.

    Only `trainable` is differentiated: the rest takes no gradient, no optimizer state and no backward pass. A step
    whose loss or gradient is not finite changes nothing but the step's number, and says so in `skipped`.

    `ema` is the decay of a moving average of what trains, rising from 0.1 as in TensorFlow's ExponentialMovingAverage;
    `sam` the radius ρ of sharpness-aware minimisation (Foret et al. 2021, equation 2), which takes two gradients. With
    `accumulate` the batch is taken in so many pieces, one after the other, and the gradient is their mean: that of the
    whole batch, but for BatchNorms that use batch statistics, which see a piece at a time. `unroll` writes the pieces
    out instead of looping. `gather` lays the parameters out for computing, where they are kept in pieces (FSDP).
    `axis_name` is pmap's.
    """

    def train_step(state: State, batch: Batch) -> tuple[State, Metrics]:
        augment_key, model_key = jax.random.split(jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step))
        if axis_name:  # each device draws its own dropout; augmentation keys already differ by example
            model_key = jax.random.fold_in(model_key, jax.lax.axis_index(axis_name))
        batch = prepare(batch, augment_key)
        train, frozen = tree.split(state.params, trainable)

        def half(
            train: dict[str, Array], batch_stats: Mapping[str, Any], batch: Batch, key: Array
        ) -> tuple[Array, tuple[Metrics, dict[str, Array]]]:
            params = tree.merge(train, frozen)
            return objective(gather(params) if gather else params, batch_stats, batch, key)

        def gradient(at: dict[str, Array]) -> tuple[dict[str, Array], Metrics, dict[str, Array]]:
            slope = jax.grad(half, has_aux=True)
            if accumulate == 1:
                grads, (metrics, batch_stats) = slope(at, state.batch_stats, batch, model_key)
            else:
                (grads, metrics, batch_stats) = _accumulated(
                    partial(slope, at), state.batch_stats, pieces(batch, accumulate), model_key, unroll
                )
            if axis_name:
                grads, metrics = jax.lax.pmean((grads, metrics), axis_name)
            return grads, metrics, batch_stats

        grads, metrics, batch_stats = gradient(train)
        norm = optax.tree.norm(grads)
        if sam:
            # Metrics and batch statistics stay those of the weights themselves.
            up = sam / jnp.maximum(norm, 1e-12)
            grads, _, _ = gradient({n: w + up * grads[n] for n, w in train.items()})
        updates, opt_state = optimizer.update(grads, state.opt_state, train)
        new = {
            "params": tree.merge(optax.apply_updates(train, updates), frozen),
            "batch_stats": batch_stats,
            "opt_state": opt_state,
            "ema": state.ema,
        }
        if ema:
            count = state.step.astype(jnp.float32)
            decay = jnp.minimum(ema, (1 + count) / (10 + count))
            now = new["params"] | batch_stats
            new["ema"] = {n: decay * v + (1 - decay) * now[n] for n, v in state.ema.items()}
        sound = jnp.isfinite(norm) & jnp.isfinite(optax.tree.norm(grads)) & jnp.isfinite(metrics.get("loss", norm))
        old = {name: getattr(state, name) for name in new}
        new = jax.tree.map(lambda a, b: a if a is b else jnp.where(sound, a, b), new, old)
        metrics |= {"grad_norm": norm, "skipped": jnp.where(sound, 0.0, 1.0)}
        return state.replace(step=state.step + 1, **new), metrics  # type: ignore[attr-defined]

    return train_step


def pieces(batch: Batch, count: int) -> dict[str, Array]:
    """The batch's arrays [b, …] as [count, b / count, …].

    A piece has every `count`-th example, so that a batch cut over devices is still cut over all of them piece by piece.
    """
    return {n: jnp.swapaxes(v.reshape(v.shape[0] // count, count, *v.shape[1:]), 0, 1) for n, v in batch.items()}


def _accumulated(
    slope: Callable[..., Any], batch_stats: Mapping[str, Any], batches: dict[str, Array], key: Array, unroll: bool
) -> tuple[dict[str, Array], Metrics, dict[str, Array]]:
    """Mean gradient and mean metrics of the pieces, and the batch statistics after the last."""
    count = len(next(iter(batches.values())))

    def one(batch_stats: Any, i: Array, batch: Batch) -> tuple[Any, Any]:
        grads, (metrics, batch_stats) = slope(batch_stats, batch, jax.random.fold_in(key, i))
        return (grads, metrics), batch_stats

    def add(carry: Any, each: Any) -> tuple[Any, None]:
        new, batch_stats = one(carry[1], *each)
        return (jax.tree.map(jnp.add, carry[0], new), batch_stats), None

    each, start = (jnp.arange(count, dtype=jnp.int32), batches), dict(batch_stats)
    sums = jax.eval_shape(one, start, *jax.tree.map(lambda v: v[0], each))[0]
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), sums)
    (total, after), _ = jax.lax.scan(add, (zero, start), each, unroll=count if unroll else 1)
    grads, metrics = jax.tree.map(lambda v: v / count, total)
    return grads, metrics, after


def make_eval_step(
    model: Model,
    *,
    prepare: Callable[[Batch, Array], Batch] | None = None,
    start: str | None = None,
    stop: str | None = None,
) -> Callable[[Mapping[str, Array], Mapping[str, Array], Batch], Float[Array, "b ..."]]:
    """The model as in evaluation, a function `(params, batch_stats, batch) -> logits`, or features before `stop`."""

    def eval_step(params: Mapping[str, Any], batch_stats: Mapping[str, Any], batch: Batch) -> Float[Array, "b ..."]:
        if prepare is not None:
            batch = prepare(batch, jax.random.key(0))  # evaluation draws nothing from it
        y, _ = model.apply(params, batch_stats, batch[FEATURES if start else model.input], start=start, stop=stop)
        return y.astype(jnp.float32)

    return eval_step


def gather(data: Mapping[str, Any], index: Array, n: int | None = None) -> dict[str, Array]:
    """The batch of these examples out of arrays resident on the devices; `index` [b] stays in it as `index`.

    Of n examples it is given as `order.tickets`, which stay in it as `ticket`.
    """
    drawn = {} if n is None else {"ticket": index}
    index = index if n is None else index % n
    return {"index": index, **drawn} | {name: jnp.take(array, index, axis=0) for name, array in data.items()}


def repeat(
    step: TrainStep, loop: bool = True, resident: bool = True, n: int | None = None
) -> Callable[[State, Batch, Array, Array], tuple[State, Metrics]]:
    """Many steps in one dispatch: `(state, data, index [s, b], count) -> (state, metrics [s])`, the first `count` run.

    `count` is a value, not a shape, so a stage compiles once however its steps are grouped. Without `loop` there is
    one step a dispatch; of data that are not `resident` it is the very batch. `n` is that of `gather`.
    """

    def run(state: State, data: Batch, index: Array, count: Array) -> tuple[State, Metrics]:
        if not loop or not resident:
            state, metrics = step(state, gather(data, index[0], n) if resident else data)
            return state, {name: m[None] for name, m in metrics.items()}
        shapes = jax.eval_shape(lambda s, d, i: step(s, gather(d, i, n))[1], state, data, index[0])
        empty = {name: jnp.zeros((index.shape[0], *m.shape), m.dtype) for name, m in shapes.items()}

        def body(i: Array, carry: tuple[State, Metrics]) -> tuple[State, Metrics]:
            state, metrics = carry
            state, new = step(state, gather(data, index[i], n))
            return state, {name: m.at[i].set(new[name]) for name, m in metrics.items()}

        return jax.lax.fori_loop(0, count, body, (state, empty))

    return run
