"""The train step and the evaluation step: pure functions of the state and a batch, without a word about devices."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jft import losses, tree
from jft.models.base import Model

FEATURES = "features"  # in a batch: what the parts before `start` gave

Batch = Mapping[str, Any]
Metrics = dict[str, Array]


@flax.struct.dataclass
class State:
    """All that training changes, as one pytree of arrays."""

    # Any, not Array: trees of shardings and of shapes have this form too.
    step: Any  # int32 [], counted over all stages
    params: dict[str, Any]
    batch_stats: dict[str, Any]
    opt_state: Any  # of the current stage's optimizer, over the parameters that train
    key: Any  # uint32 [2], key data of the run; a step's randomness is derived from it and `step`


TrainStep = Callable[[State, Batch], tuple[State, Metrics]]


def make_train_step(
    model: Model,
    optimizer: optax.GradientTransformation,
    *,
    trainable: Collection[str],
    train_parts: Collection[str],
    update_stats: Collection[str],
    prepare: Callable[[Batch, Array], Batch],
    loss: Callable[..., Float[Array, " b"]] = losses.cross_entropy,
    penalty: Callable[..., Array] | None = None,
    penalty_weight: float = 0.0,
    source: Mapping[str, Any] | None = None,
    start: str | None = None,
    axis_name: str | None = None,
) -> TrainStep:
    """One step of gradient descent on mean L(f, batch) + λ R(f, f_s), a function `(state, batch) -> (state, metrics)`.

    Only `trainable` is differentiated: the rest takes no gradient, no optimizer state and no backward pass. With
    `start` the batch holds features and the parts before it are not run. `axis_name` is pmap's.
    """

    def train_step(state: State, batch: Batch) -> tuple[State, Metrics]:
        augment_key, model_key = jax.random.split(jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step))
        if axis_name:  # each device draws its own dropout; augmentation keys already differ by example
            model_key = jax.random.fold_in(model_key, jax.lax.axis_index(axis_name))
        batch = prepare(batch, augment_key)
        train, frozen = tree.split(state.params, trainable)

        def objective(train: dict[str, Array]) -> tuple[Array, tuple[Array, Array, Array, dict[str, Array]]]:
            logits, batch_stats = model.apply(
                tree.merge(train, frozen),
                state.batch_stats,
                batch[FEATURES if start else model.input],
                start=start,
                train=train_parts,
                update_stats=update_stats,
                key=model_key,
            )
            logits = logits.astype(jnp.float32)
            fit = loss(logits, batch).mean()
            distance = penalty(train, source) if penalty else jnp.zeros(())
            return fit + penalty_weight * distance, (fit, distance, logits, batch_stats)

        grads, (fit, distance, logits, batch_stats) = jax.grad(objective, has_aux=True)(train)
        metrics = {"loss": fit, "accuracy": losses.correct(logits, batch["label"]).mean()}
        if axis_name:
            grads, metrics = jax.lax.pmean((grads, metrics), axis_name)
        if penalty:
            metrics |= {"penalty": penalty_weight * distance}
        metrics |= {"grad_norm": optax.tree.norm(grads)}
        updates, opt_state = optimizer.update(grads, state.opt_state, train)
        params = tree.merge(optax.apply_updates(train, updates), frozen)
        return state.replace(  # type: ignore[attr-defined]
            step=state.step + 1, params=params, batch_stats=batch_stats, opt_state=opt_state
        ), metrics

    return train_step


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


def gather(data: Mapping[str, Any], index: Array) -> dict[str, Array]:
    """The batch of these examples out of arrays resident on the device; `index` [b] stays in it as `index`."""
    # Streamed data bring their own `index`, the examples' places in the whole set.
    return {"index": index} | {name: jnp.take(array, index, axis=0) for name, array in data.items()}


def repeat(step: TrainStep, loop: bool = True) -> Callable[[State, Batch, Array, Array], tuple[State, Metrics]]:
    """Many steps in one dispatch: `(state, data, index [n, b], count) -> (state, metrics [n])`, the first `count` run.

    `count` is a value, not a shape, so a stage compiles once however its steps are grouped. Without `loop` there is
    one step a dispatch (n = 1).
    """

    def run(state: State, data: Batch, index: Array, count: Array) -> tuple[State, Metrics]:
        if not loop:
            state, metrics = step(state, gather(data, index[0]))
            return state, {name: m[None] for name, m in metrics.items()}
        shapes = jax.eval_shape(lambda s, d, i: step(s, gather(d, i))[1], state, data, index[0])
        empty = {name: jnp.zeros((index.shape[0], *m.shape), m.dtype) for name, m in shapes.items()}

        def body(i: Array, carry: tuple[State, Metrics]) -> tuple[State, Metrics]:
            state, metrics = carry
            state, new = step(state, gather(data, index[i]))
            return state, {name: m.at[i].set(new[name]) for name, m in metrics.items()}

        return jax.lax.fori_loop(0, count, body, (state, empty))

    return run
