"""Laws 1, 2, 4 and 6 on a tiny ResNet: frozen bytes, frozen cost, BatchNorm's policy, equal on one and many devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jft import distil, features, optim, plan, shard, tree
from jft.data import order
from jft.data.prepare import make_prepare
from jft.errors import UserError
from jft.models import make_model
from jft.penalties import l2_sp
from jft.plan import Stage
from jft.preprocess import Preprocess
from jft.step import State, make_eval_step, make_train_step, repeat, supervised, truth

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


def make(model, params, stats, train, batch_norm="auto", axis_name=None, start=None, clip=1.0, opt="adamw", **more):
    stage = Stage("s", train, batch_norm=batch_norm)
    multipliers = plan.multipliers(stage, list(params), list(model.parts))
    trainable = plan.trainable(multipliers)
    parts = plan.parts_with(trainable, model.parts)
    optimizer = optim.make_optimizer(opt, optim.make_schedule("constant", 1e-2, 10, 0.0), multipliers, clip=clip)
    objective = supervised(
        model, train_parts=parts, update_stats=parts if batch_norm == "auto" else (), trainable=trainable, start=start
    )
    step = make_train_step(objective, optimizer, trainable=trainable, prepare=identity, axis_name=axis_name, **more)
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


@pytest.mark.slow
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


@pytest.mark.parametrize("sharding", ["replicate", "fsdp", pytest.param("pmap", marks=pytest.mark.slow)])
def test_one_device_equals_eight(problem, on_one, sharding):
    state, losses = run_on(jax.devices(), sharding, problem)
    np.testing.assert_allclose(losses, on_one[1], rtol=2e-5)
    for name, value in on_one[0].params.items():
        np.testing.assert_allclose(state.params[name], value, rtol=2e-4, atol=2e-5, err_msg=name)
    for name, value in on_one[0].batch_stats.items():
        np.testing.assert_allclose(state.batch_stats[name], value, rtol=2e-4, atol=2e-5, err_msg=name)


def test_an_example_that_comes_again_is_drawn_anew_on_any_number_of_devices():
    prepare = make_prepare(Preprocess(size=(8, 8)), ("crop", "mixup"), train=True, num_classes=2)
    images = np.random.default_rng(0).integers(0, 256, (5, 12, 12, 3), np.uint8)
    data = {"image": images, "label": np.zeros(5, np.int32)}
    index = order.tickets(np.arange(16, dtype=np.int32)[None] % 5, 5)

    def means(devices, sharding, n, spread=False):
        mesh = shard.make_mesh(devices)
        axis = shard.DATA if sharding == "pmap" else None
        prepared = prepare if axis is None else make_prepare(
            Preprocess(size=(8, 8)), ("crop", "mixup"), train=True, num_classes=2, axis_name=axis
        )  # fmt: skip

        def step(state, batch):
            each = prepared(batch, jax.random.key(0))["image"].mean((1, 2, 3))
            return state, {"image": jax.lax.all_gather(each, axis, tiled=True) if axis else each}

        state = State(step=np.int32(0), params={}, batch_stats={}, opt_state=(), key=np.zeros(2, np.uint32))
        state = shard.distribute(state, mesh, sharding)
        run = shard.compile_steps(repeat(step, False, True, n), state, mesh, sharding, "cut" if spread else "replicate")
        placed = shard.spread(data, mesh) if spread else shard.place(data, mesh, sharding)
        return np.asarray(run(state, placed, index if n else index % 5, np.int32(1))[1]["image"])[0]

    one = means(jax.devices()[:1], "replicate", 5)
    assert len(np.unique(one)) == 16 and len(np.unique(means(jax.devices()[:1], "replicate", None))) < 10
    for sharding, spread in (("replicate", False), ("replicate", True), ("pmap", False)):
        np.testing.assert_allclose(means(jax.devices(), sharding, 5, spread), one, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_tensor_parallel_equals_one_device():
    """A ViT's blocks cut over `model` by name, what is left by FSDP over `data`; optimizer state lies with them."""
    model = make_model("tiny_vit", num_classes=CLASSES)
    params, stats = model.init(jax.random.key(0))
    rng = np.random.default_rng(0)
    params["head/kernel"] = jnp.asarray(rng.normal(size=params["head/kernel"].shape), jnp.float32)
    batch = {
        "image": jnp.asarray(rng.normal(size=(BATCH, *model.input_shape)), jnp.float32),
        "label": jnp.asarray(rng.integers(0, CLASSES, BATCH), jnp.int32),
    }
    after = []
    for mesh, sharding in ((shard.make_mesh(jax.devices()[:1]), "replicate"), (shard.make_mesh(model=2), "fsdp")):
        step, state, _ = make(model, params, stats, ("*",))
        state = shard.distribute(state, mesh, sharding)
        run = shard.compile_steps(repeat(step, loop=False), state, mesh, sharding)
        state, _ = run(state, shard.distribute(batch, mesh), np.arange(16, dtype=np.int32)[None], np.int32(1))
        after.append(state)
    kernel = after[1].params["block0/mlp/fc1/kernel"]
    moments = next(v for p, v in jax.tree_util.tree_leaves_with_path(after[1].opt_state) if "fc1/kernel" in str(p))
    assert kernel.addressable_shards[0].data.size == kernel.size // 8 and moments.sharding == kernel.sharding
    for name, value in after[0].params.items():
        np.testing.assert_allclose(after[1].params[name], value, rtol=2e-3, atol=1e-4, err_msg=name)
    with pytest.raises(UserError, match="cannot be divided"):
        shard.make_mesh(model=3)


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


@pytest.mark.slow
def test_a_step_that_is_not_finite_changes_nothing(problem):
    model, params, stats, batch = problem
    step, state, _ = make(model, params, stats, ("*",), ema=0.9)
    state = state.replace(ema=dict(params))
    bad = dict(batch) | {"image": batch["image"].at[0, 0, 0, 0].set(jnp.nan)}
    after, metrics = jax.jit(step)(state, bad)
    assert metrics["skipped"] == 1
    assert after.step == 1
    for a, b in zip(jax.tree.leaves(after.replace(step=state.step)), jax.tree.leaves(state), strict=True):
        assert same(a, b)
    assert jax.jit(step)(state, batch)[1]["skipped"] == 0


def test_the_moving_average(problem):
    """e ← d e + (1 − d) w with d = min(decay, (1 + t) / (10 + t)), over weights and batch statistics."""
    model, params, stats, batch = problem
    step, state, trainable = make(model, params, stats, ("head", "stage4"), ema=0.15)
    moving = {n for n in stats if n.startswith("stage4")}
    expected = {n: np.asarray((params | stats)[n]) for n in trainable | moving}
    state = state.replace(ema={n: (params | stats)[n] for n in expected})
    for t in range(3):
        state, _ = jax.jit(step)(state, batch)
        decay = min(0.15, (1 + t) / (10 + t))
        for n in expected:
            expected[n] = decay * expected[n] + (1 - decay) * np.asarray((state.params | state.batch_stats)[n])
    for n, value in expected.items():
        np.testing.assert_allclose(state.ema[n], value, rtol=1e-5, atol=1e-7, err_msg=n)


def test_sam_takes_the_gradient_uphill(problem):
    """The step of plain SGD from the gradient at w + ρ g/‖g‖."""
    model, params, stats, batch = problem
    params = params | {"head/kernel": 0.02 * params["head/kernel"]}  # answers so sure that no step changes a gradient
    step, state, trainable = make(model, params, stats, ("head",), clip=None, opt="sgd", sam=0.5)
    after, metrics = jax.jit(step)(state, batch)

    def loss(train):
        logits = model.apply(params | train, stats, batch["image"])[0]
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

    train = {n: params[n] for n in trainable}
    g = jax.grad(loss)(train)
    norm = optax.tree.norm(g)
    up = jax.grad(loss)({n: w + 0.5 * g[n] / norm for n, w in train.items()})
    assert abs(norm - 1) > 0.2 and any(np.abs(up[n] - g[n]).max() > 0.01 for n in trainable)
    for n in trainable:
        np.testing.assert_allclose((params[n] - after.params[n]) / 1e-2, up[n], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-4)
    np.testing.assert_allclose(metrics["loss"], loss(train), rtol=1e-5)


def test_mixed_examples_are_right_by_the_class_that_weighs_most():
    labels, mixed = jnp.array([1, 0]), jnp.array([[0.3, 0.7], [0.6, 0.4]])
    assert truth({"label": labels}) is labels
    assert truth({"label": mixed, "hard_label": labels}) is labels


def test_the_penalty_is_of_what_trains_and_logged_apart(problem):
    """L2-SP: the gradient is that of the loss plus λ (w − w_s), of w alone where the source lacks it."""
    model, params, stats, batch = problem
    source = {n: v + 0.1 for n, v in params.items() if not n.startswith("head/")}
    trainable = plan.trainable(plan.multipliers(Stage("s", ("head", "stage4")), list(params), list(model.parts)))
    options = dict(train_parts=(), update_stats=(), trainable=trainable)
    with_it = supervised(model, penalty=l2_sp, penalty_weight=0.3, source=source, **options)
    key = jax.random.key(0)

    def half(objective):
        train, frozen = tree.split(params, trainable)
        return jax.grad(lambda t: objective(tree.merge(t, frozen), stats, batch, key), has_aux=True)(train)

    (a, (metrics, _)), (b, _) = half(with_it), half(supervised(model, **options))
    for n in trainable:
        pull = 0.3 * (params[n] - source[n] if n in source else 0.1 * params[n])
        np.testing.assert_allclose(a[n], b[n] + pull, rtol=1e-3, atol=1e-6, err_msg=n)
    expected = sum(np.sum(np.square(params[n] - source[n])) for n in trainable if n in source)
    expected += 0.1 * sum(np.sum(np.square(params[n])) for n in trainable if n not in source)
    np.testing.assert_allclose(metrics["penalty"], 0.3 * 0.5 * expected, rtol=1e-4)


def test_distillation_holds_the_features_where_they_were(problem):
    model, params, stats, batch = problem
    source = {n: v for n, v in (params | stats).items() if not n.startswith("head/")}
    trainable = {n for n in params if n.startswith(("stage4", "head"))}
    options = dict(train_parts=(), update_stats=(), trainable=trainable, source=source, at="head")
    moved = {n: v + 0.05 if n.startswith("stage4") else v for n, v in params.items()}
    key = jax.random.key(0)
    objective = distil.features(model, weight=0.5, **options)
    value, (metrics, _) = objective(params, stats, batch, key)
    assert metrics["penalty"] == 0
    np.testing.assert_allclose(value, metrics["loss"])
    h, h_s = (make_eval_step(model, stop="head")(p, stats, batch) for p in (moved, params))
    np.testing.assert_allclose(
        objective(moved, stats, batch, key)[1][0]["penalty"], 0.25 * np.mean(np.square(h - h_s)), rtol=1e-4
    )
    head = {
        "kernel": jnp.asarray(np.random.default_rng(1).normal(size=(h.shape[1], 5)), jnp.float32),
        "bias": jnp.zeros(5),
    }
    lwf = distil.answers(model, source_head=head, temperature=2.0, **options)
    p, log_q = jax.nn.softmax(h_s @ head["kernel"] / 2), jax.nn.log_softmax(h @ head["kernel"] / 2)
    expected = -4 * np.mean(np.sum(p * log_q, -1))
    np.testing.assert_allclose(lwf(moved, stats, batch, key)[1][0]["penalty"], expected, rtol=1e-4)
    head_only = options | {"trainable": {n for n in params if n.startswith("head/")}}
    value, (metrics, _) = distil.features(model, **head_only)(moved, stats, batch, key)
    assert value == metrics["loss"] and "penalty" not in metrics  # nothing before the head trains: nothing to hold
    both = distil.features(model, weight=0.5, penalty=l2_sp, penalty_weight=2.0, **options)
    pull = 2.0 * l2_sp({n: moved[n] for n in trainable}, source)
    told = objective(moved, stats, batch, key)[1][0]["penalty"]
    np.testing.assert_allclose(both(moved, stats, batch, key)[1][0]["penalty"], told + pull, rtol=1e-5)
    with pytest.raises(UserError, match="have no"):
        distil.features(model, **(options | {"source": {}}))


@pytest.mark.slow
def test_distillation_beside_prompts_which_the_source_has_not():
    """Prompts are added, as low-rank updates are: the source's features are those without."""
    model = make_model("tiny_vit", num_classes=CLASSES, prompts=2)
    params, stats = model.init(jax.random.key(0))
    source = {n: v for n, v in params.items() if not n.endswith("/prompts")}
    images = jnp.asarray(np.random.default_rng(0).normal(size=(2, *model.input_shape)), jnp.float32)
    batch = {"image": images, "label": jnp.zeros(2, jnp.int32)}
    trainable = {n for n in params if n.endswith("/prompts")}
    options = dict(train_parts=(), update_stats=(), trainable=trainable, source=source, at="pool")
    told = distil.features(model, **options)(params, stats, batch, jax.random.key(0))[1][0]
    h = make_eval_step(model, stop="pool")(params, stats, batch)
    h_s = make_eval_step(make_model("tiny_vit", num_classes=CLASSES), stop="pool")(source, stats, batch)
    assert h.shape == h_s.shape
    np.testing.assert_allclose(told["penalty"], 0.5 * np.mean(np.square(h - h_s)), rtol=1e-4)


@pytest.mark.slow
def test_accumulated_gradients_are_those_of_the_whole_batch(problem):
    """Looped or written out, and every piece cut over all devices."""
    model, params, stats, batch = problem
    mesh, after = shard.make_mesh(), []
    for accumulate, unroll in ((1, False), (2, False), (2, True)):
        step, state, _ = make(
            model, params, stats, ("head", "stage4"), "frozen", opt="sgd", accumulate=accumulate, unroll=unroll
        )
        state = shard.distribute(state, mesh)
        run = shard.compile_steps(repeat(step, loop=False), state, mesh)
        state, metrics = run(state, shard.distribute(batch, mesh), np.arange(16, dtype=np.int32)[None], np.int32(1))
        after.append(state.params | metrics)
    for other in after[1:]:
        for name, value in after[0].items():
            np.testing.assert_allclose(other[name], value, rtol=2e-4, atol=2e-6, err_msg=name)


@pytest.mark.slow
def test_accumulation_moves_batch_statistics_piece_by_piece(problem):
    model, params, stats, batch = problem
    step, state, _ = make(model, params, stats, ("*",), accumulate=2)
    twice = jax.jit(step)(state, batch)[0].batch_stats
    _, once = model.apply(params, stats, batch["image"][::2], update_stats=model.parts)
    _, expected = model.apply(params, once, batch["image"][1::2], update_stats=model.parts)
    for name, value in expected.items():
        np.testing.assert_allclose(twice[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
