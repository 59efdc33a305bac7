"""Laws 1, 2, 4 and 6 on a tiny ResNet: frozen bytes, frozen cost, BatchNorm's policy, equal on one and many devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jft import features, optim, plan, shard, tree
from jft.models import make_model
from jft.plan import Stage
from jft.step import State, make_eval_step, make_train_step, repeat

BATCH, CLASSES = 16, 3
pytestmark = pytest.mark.usefixtures("optax_promotion")


def identity(batch, key):
    return batch


@pytest.fixture(scope="module")
def problem():
    model = make_model("tiny_resnet", num_classes=CLASSES)
    params, stats = model.init(jax.random.key(0))
    rng = np.random.default_rng(0)
    # A zero head has zero gradients below it: nothing would be tested there.
    params["head/kernel"] = jnp.asarray(rng.normal(size=params["head/kernel"].shape), jnp.float32)
    images = rng.normal(size=(BATCH, *model.input_shape)).astype(np.float32)
    labels = rng.integers(0, CLASSES, BATCH).astype(np.int32)
    return model, params, stats, {"image": jnp.asarray(images), "label": jnp.asarray(labels)}


def make(model, params, stats, train, batch_norm="auto", axis_name=None, start=None, clip=1.0, opt="adamw"):
    stage = Stage("s", train, batch_norm=batch_norm)
    multipliers = plan.multipliers(stage, list(params), list(model.parts))
    trainable = plan.trainable(multipliers)
    parts = plan.parts_with(trainable, model.parts)
    optimizer = optim.make_optimizer(opt, optim.make_schedule("constant", 1e-2, 10, 0.0), multipliers, clip=clip)
    step = make_train_step(
        model, optimizer, trainable=trainable, train_parts=parts, update_stats=parts if batch_norm == "auto" else (),
        prepare=identity, axis_name=axis_name, start=start,
    )  # fmt: skip
    state = State(
        step=jnp.asarray(0, jnp.int32), params=dict(params), batch_stats=dict(stats),
        opt_state=optimizer.init(tree.split(params, trainable)[0]), key=jax.random.key_data(jax.random.key(1)),
    )  # fmt: skip
    return step, state, trainable


def same(a, b):
    return np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("train", [("head",), ("head", "stage4"), (("stage2", 0.5), "head/bias")])
def test_frozen_means_frozen(problem, train):
    model, params, stats, batch = problem
    step, state, trainable = make(model, params, stats, train)
    after = jax.jit(step)(state, batch)[0]
    moved = {n for n in params if not same(params[n], after.params[n])}
    assert moved == trainable
    parts = plan.parts_with(trainable, model.parts)
    moved_stats = {n for n in stats if not same(stats[n], after.batch_stats[n])}
    assert moved_stats == {n for n in stats if plan.part_of(n, model.parts) in parts}


def test_batch_norm_frozen_by_the_stage_uses_running_statistics(problem):
    model, params, stats, batch = problem
    step, state, _ = make(model, params, stats, ("*",), batch_norm="frozen")
    after, metrics = jax.jit(step)(state, batch)
    assert all(same(stats[n], after.batch_stats[n]) for n in stats)
    logits = make_eval_step(model)(params, stats, batch)
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)


def flops(function, *args):
    return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]


def test_frozen_costs_nothing(problem):
    """A head stage is a forward pass and next to nothing, and its optimizer state is the head's alone."""
    model, params, stats, batch = problem
    step, state, trainable = make(model, params, stats, ("head",))
    forward = flops(make_eval_step(model), params, stats, batch)
    assert flops(step, state, batch) < 1.02 * forward
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(state.opt_state))
    head = sum(params[n].nbytes for n in trainable)
    assert 2 * head <= held <= 2 * head + 64  # two moments, and counters
    everything, state, _ = make(model, params, stats, ("*",))
    assert flops(everything, state, batch) > 2 * forward


def test_clipping_counts_what_trains_alone(problem):
    """The norm logged and clipped is that of the trainable gradients, whatever the frozen ones would have been."""
    model, params, stats, batch = problem
    step, state, trainable = make(model, params, stats, ("head",), clip=1e-3, opt="sgd")
    after, metrics = jax.jit(step)(state, batch)
    moved = optax.tree.norm({n: after.params[n] - params[n] for n in trainable})
    assert metrics["grad_norm"] > 1e-2
    np.testing.assert_allclose(moved, 1e-2 * 1e-3, rtol=1e-3)


def run_on(devices, sharding, problem, steps=3):
    model, params, stats, batch = problem
    mesh = shard.make_mesh(devices)
    if sharding == "pmap":
        model = make_model("tiny_resnet", num_classes=CLASSES, axis_name=shard.DATA)
    axis = shard.DATA if sharding == "pmap" else None
    step, state, _ = make(model, params, stats, ("head", ("stage4", 0.5), ("stage3", 0.1)), axis_name=axis, opt="sgd")
    state = shard.distribute(state, mesh, sharding)
    run = shard.compile_steps(repeat(step, loop=False), state, mesh, sharding)
    data = shard.distribute(batch, mesh, "pmap" if sharding == "pmap" else "replicate")
    losses = []
    for i in range(steps):
        index = np.random.default_rng(i).permutation(BATCH).astype(np.int32)[None]
        state, metrics = run(state, data, index, np.int32(1))
        losses.append(float(metrics["loss"][0]))
    return jax.device_get(shard.collect(state, sharding)), losses


@pytest.fixture(scope="module")
def on_one(problem):
    return run_on(jax.devices()[:1], "replicate", problem)


@pytest.mark.parametrize("sharding", ["replicate", "fsdp", "pmap"])
def test_one_device_equals_eight(problem, on_one, sharding):
    state, losses = run_on(jax.devices(), sharding, problem)
    np.testing.assert_allclose(losses, on_one[1], rtol=2e-5)
    for name, value in on_one[0].params.items():
        np.testing.assert_allclose(state.params[name], value, rtol=2e-4, atol=2e-5, err_msg=name)
    for name, value in on_one[0].batch_stats.items():
        np.testing.assert_allclose(state.batch_stats[name], value, rtol=2e-4, atol=2e-5, err_msg=name)


def test_fsdp_cuts_what_can_be_cut(problem):
    model, params, stats, _ = problem
    mesh = shard.make_mesh()
    placed = shard.distribute(params, mesh, "fsdp")
    kernel = placed["stage4/block0/conv2/kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 8


def test_distribute_leaves_the_callers_arrays_alone(problem):
    """Donating the state must not delete the source parameters, which penalties and the next stage still need."""
    model, params, stats, batch = problem
    mesh = shard.make_mesh(jax.devices()[:1])
    step, state, _ = make(model, params, stats, ("head",))
    placed = shard.distribute(state, mesh)
    run = shard.compile_steps(repeat(step), placed, mesh)
    run(placed, shard.distribute(batch, mesh), np.arange(16, dtype=np.int32)[None], np.int32(1))
    assert not any(leaf.is_deleted() for leaf in params.values())


def test_steps_grouped_differently_give_the_same_bytes(problem):
    """How many steps go into a dispatch is a matter of the clock, so it must not matter to the result."""
    model, params, stats, batch = problem
    mesh = shard.make_mesh(jax.devices()[:1])
    step, state, _ = make(model, params, stats, ("head",))
    results = []
    index = np.stack([np.random.default_rng(i).permutation(BATCH) for i in range(6)]).astype(np.int32)
    run = None
    for groups in ((6,), (1, 2, 3)):
        placed = shard.distribute(state, mesh)
        run = run or shard.compile_steps(repeat(step), placed, mesh)
        done = 0
        for count in groups:
            rows = np.zeros_like(index)
            rows[:count] = index[done : done + count]
            placed, _ = run(placed, shard.distribute(batch, mesh), rows, np.int32(count))
            done += count
        results.append(jax.device_get(placed))
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        assert same(a, b)


def test_training_from_features_equals_training_from_images(problem):
    model, params, stats, batch = problem
    plain, state, trainable = make(model, params, stats, ("head", "stage4"))
    cut = features.cut(model, trainable)
    assert cut == "stage4/block0"
    kept = make_eval_step(model, stop=cut)(params, stats, batch)
    cached, _, _ = make(model, params, stats, ("head", "stage4"), start=cut)
    a = jax.jit(plain)(state, batch)[0]
    b = jax.jit(cached)(state, {"features": kept, "label": batch["label"]})[0]
    for name in params:
        np.testing.assert_allclose(a.params[name], b.params[name], rtol=1e-4, atol=1e-5, err_msg=name)
