"""Optimisers against formulas worked out by hand on two-leaf trees, and schedules at the steps that matter."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jft import optim
from jft.errors import UserError

pytestmark = pytest.mark.usefixtures("optax_promotion")
PARAMS = {"body/kernel": jnp.array([[1.0, -2.0]]), "head/bias": jnp.array([0.5])}
GRADS = {"body/kernel": jnp.array([[3.0, 0.0]]), "head/bias": jnp.array([4.0])}


def one_step(name, multipliers, **options):
    tx = optim.make_optimizer(name, optax.constant_schedule(0.1), multipliers, **options)
    return tx.update(GRADS, tx.init(PARAMS), PARAMS)[0]


def test_multipliers_scale_a_groups_step():
    updates = one_step("sgd", {"body/kernel": 0.5, "head/bias": 1.0})
    np.testing.assert_allclose(updates["body/kernel"], [[-0.1 * 0.5 * 3, 0]])
    np.testing.assert_allclose(updates["head/bias"], [-0.1 * 4], rtol=1e-6)


def test_clipping_is_global_over_the_groups():
    updates = one_step("sgd", {"body/kernel": 0.5, "head/bias": 1.0}, clip=1.0)  # the norm is 5
    np.testing.assert_allclose(updates["body/kernel"], [[-0.1 * 0.5 * 3 / 5, 0]], rtol=1e-6)
    np.testing.assert_allclose(updates["head/bias"], [-0.1 * 4 / 5], rtol=1e-6)


def test_adamw_decays_kernels_and_spares_biases():
    updates = one_step("adamw", {"body/kernel": 1.0, "head/bias": 1.0}, weight_decay=0.01)
    np.testing.assert_allclose(updates["body/kernel"], [[-0.1 * (1 + 0.01), -0.1 * (0.01 * -2)]], rtol=1e-5)
    np.testing.assert_allclose(updates["head/bias"], [-0.1], rtol=1e-5)


def test_adam_and_sgd_decay_in_the_gradient_as_torch_does():
    updates = one_step("sgd", {"body/kernel": 1.0, "head/bias": 1.0}, weight_decay=0.01)
    np.testing.assert_allclose(updates["body/kernel"], [[-0.1 * (3 + 0.01), -0.1 * (0.01 * -2)]], rtol=1e-5)
    updates = one_step("adam", {"body/kernel": 1.0, "head/bias": 1.0}, weight_decay=0.01)
    np.testing.assert_allclose(updates["body/kernel"], [[-0.1, 0.1]], rtol=1e-3)


def test_lion_steps_by_the_sign():
    updates = one_step("lion", {"body/kernel": 1.0, "head/bias": 0.5})
    np.testing.assert_allclose(updates["body/kernel"], [[-0.1, 0.0]])
    np.testing.assert_allclose(updates["head/bias"], [-0.05])


def test_lamb_scales_adamws_step_to_the_weights():
    updates = one_step("lamb", {"body/kernel": 1.0, "head/bias": 1.0}, weight_decay=0.01)
    adam = np.array([1.0, 0.0]) + 0.01 * np.array([1.0, -2.0])
    expected = -0.1 * np.sqrt(5) * adam / np.linalg.norm(adam)
    np.testing.assert_allclose(updates["body/kernel"], [expected], rtol=1e-4)
    np.testing.assert_allclose(updates["head/bias"], [-0.1], rtol=1e-4)  # Adam's own step


def test_lamb_moves_what_begins_at_zero():
    """A step scaled to the norm of a new head would stay as small as that."""
    params = {n: jnp.zeros((2, 2)) for n in ("head/kernel", "body/lora_b")} | {"body/norm/scale": jnp.ones(2)}
    tx = optim.make_optimizer("lamb", optax.constant_schedule(1e-3), dict.fromkeys(params, 1.0))
    state = tx.init(params)
    for _ in range(3):
        updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
        params = optax.apply_updates(params, updates)
    for name, value in params.items():
        np.testing.assert_allclose(value, (1.0 if "norm" in name else 0.0) - 3e-3, rtol=1e-3)


def test_muon_makes_matrices_orthogonal_and_leaves_the_head_to_adam():
    rng = np.random.default_rng(0)
    params = {
        n: jnp.asarray(rng.normal(size=s), jnp.float32)
        for n, s in {
            "a": (8, 4), "conv": (3, 3, 2, 4), "head/kernel": (4, 2), "b": (3,),
            "attn/rel_pos": (9, 2), "embed/patch/kernel": (2, 2, 3, 4),
        }.items()
    }  # fmt: skip
    tx = optim.make_optimizer("muon", optax.constant_schedule(1.0), dict.fromkeys(params, 1.0))
    updates = tx.update(params, tx.init(params), params)[0]
    singular = np.linalg.svd(np.asarray(updates["a"]) / (0.2 * 8**0.5), compute_uv=False)
    assert (singular > 0.6).all() and (singular < 1.3).all()  # five Newton-Schulz steps bring them near 1
    singular = np.linalg.svd(np.asarray(updates["conv"]).reshape(18, 4) / (0.2 * 18**0.5), compute_uv=False)
    assert (singular > 0.6).all() and (singular < 1.3).all()
    for name in ("head/kernel", "b", "attn/rel_pos", "embed/patch/kernel"):
        np.testing.assert_allclose(updates[name], -np.sign(params[name]), rtol=1e-3)


def run(tx, params, grads, state=None):
    state = tx.init(params) if state is None else state
    for g in grads:
        updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize("name", ["adam", "adamw", "lion", "sgd", "muon", "lamb"])
def test_carried_state_is_that_of_a_run_without_a_boundary_and_the_new_group_that_of_a_fresh_one(name):
    """Stage 1 trains a; stage 2 trains a and b. Carried, a goes on as if alone all the while; b begins as if alone."""
    rng = np.random.default_rng(0)
    params = {n: jnp.asarray(rng.normal(size=(4, 3)), jnp.float32) for n in "ab"}
    grads = [{n: jnp.asarray(rng.normal(size=(4, 3)), jnp.float32) for n in "ab"} for _ in range(6)]

    def only(n, gs):
        return [{n: g[n]} for g in gs]

    def make(multipliers, labels):
        return optim.make_optimizer(name, optax.constant_schedule(0.01), multipliers, labels, weight_decay=0.1)

    one = make({"a": 1.0, "b": 0.0}, {"a": "since0", "b": "frozen"})
    after, state = run(one, {"a": params["a"]}, only("a", grads[:3]))
    two = make({"a": 1.0, "b": 1.0}, {"a": "since0", "b": "since1"})
    both = {"a": after["a"], "b": params["b"]}
    carried = optim.carry(two.init(both), state)
    ended, _ = run(two, both, grads[3:], carried)
    alone_a, _ = run(one, {"a": params["a"]}, only("a", grads))
    alone_b, _ = run(make({"b": 1.0}, {"b": "since0"}), {"b": params["b"]}, only("b", grads[3:]))
    np.testing.assert_array_equal(ended["a"], alone_a["a"])
    np.testing.assert_array_equal(ended["b"], alone_b["b"])


@pytest.mark.parametrize("name", ["schedule-free", "schedule-free-sgd"])
def test_schedule_free_against_its_equations(name):
    """Defazio et al. 2024, equations 7 to 9: the gradient is taken at y, z steps, x is the mean of z weighed by γ²."""
    rng = np.random.default_rng(0)
    params = {n: jnp.asarray(rng.normal(size=(3, 2)), jnp.float32) for n in "ab"}
    times, rate, beta, decay = {"a": 1.0, "b": 0.5}, lambda count: 0.1 / (1 + count), 0.9, 0.1
    tx = optim.make_optimizer(name, rate, times, weight_decay=decay)
    state, y = tx.init(params), params
    x, z, square, total, largest = dict(params), dict(params), dict.fromkeys("ab", 0.0), 0.0, 0.0
    for t in range(5):
        grads = {n: jnp.asarray(rng.normal(size=(3, 2)), jnp.float32) for n in "ab"}
        at = y
        y, state = run(tx, y, [grads], state)
        largest = max(largest, rate(t))
        total += largest**2
        for n in "ab":
            square[n] = 0.999 * square[n] + 0.001 * np.square(grads[n])
            step = grads[n] if "sgd" in name else grads[n] / (np.sqrt(square[n] / (1 - 0.999 ** (t + 1))) + 1e-8)
            z[n] = z[n] - rate(t) * times[n] * (step + decay * at[n])
            x[n] = x[n] + largest**2 / total * (z[n] - x[n])
            np.testing.assert_allclose(y[n], beta * x[n] + (1 - beta) * z[n], rtol=1e-4, atol=1e-6)
        found = optim.averaged(state, y | {"frozen": jnp.ones(1)})
        assert found.keys() == {"a", "b"}
        for n in "ab":
            np.testing.assert_allclose(found[n], x[n], rtol=1e-4, atol=1e-6)
    assert optim.averaged(optim.make_optimizer("sgd", rate, times).init(params), params) == {}
    function = optim.make_optimizer(optim.OPTIMIZERS[name], rate, times, weight_decay=decay)
    assert jax.tree.structure(function.init(params)) == jax.tree.structure(tx.init(params))
    # Wrapped it is what it was.
    wrapped = (optim.OPTIMIZERS[name], partial(optim.OPTIMIZERS[name]), lambda w, mask: optim.OPTIMIZERS[name](w, mask))
    for each in wrapped:
        assert optim.usual_schedule(each) == "constant"
        assert optim.averaged(optim.make_optimizer(each, rate, times).init(params), params).keys() == {"a", "b"}
    for other in ("adam", "no such", optim.sgd, optax.adamw, 3):
        assert optim.usual_schedule(other) == "cosine"


@pytest.mark.parametrize("surgical", [(True, False), (False, True), (True, True)])
def test_what_is_carried_between_a_surgical_stage_and_another(surgical):
    times, parts = {"a/w": 1.0, "b/w": 1.0}, {"a/w": "a", "b/w": "b"}
    before, after = (
        optim.make_optimizer("adam", optax.constant_schedule(0.1), times, surgical=parts if on else None)
        for on in surgical
    )
    params = dict.fromkeys(times, jnp.ones(2))
    _, state = before.update(dict.fromkeys(times, jnp.ones(2)), before.init(params), params)
    carried = optim.carry(after.init(params), state)
    assert jax.tree.structure(carried) == jax.tree.structure(after.init(params))
    moments = [v for p, v in jax.tree_util.tree_leaves_with_path(carried) if ".mu" in jax.tree_util.keystr(p)]
    assert len(moments) == 2 and all(np.allclose(v, 0.1) for v in moments)


def test_schedule_free_weighs_by_the_rates_of_its_own_steps():
    """In a rise too: γ² of the steps made, 1 + 4 + 9 hundredths after three of rates 0.1, 0.2 and 0.3."""
    tx = optim.make_optimizer("schedule-free-sgd", optim.make_schedule("constant", 1.0, 100, 0.1), {"a": 1.0})
    params = {"a": jnp.ones(2)}
    _, state = run(tx, params, [{"a": jnp.ones(2)}] * 3)
    assert float(state.weight_sum) == pytest.approx(0.14)


def test_a_decoupled_penalty_passes_by_the_optimizer():
    """AdamW of the gradient alone, and rate · multiple · the penalty's own gradient."""
    source = {"body/kernel": jnp.array([[3.0, -2.0]])}
    pull = lambda p: 0.1 * 0.5 * jnp.sum(jnp.square(p["body/kernel"] - source["body/kernel"]))  # noqa: E731
    times = {"body/kernel": 0.5, "head/bias": 1.0}
    plain, pulled = one_step("adamw", times), one_step("adamw", times, pull=pull)
    np.testing.assert_allclose(
        pulled["body/kernel"] - plain["body/kernel"], [[-0.1 * 0.5 * 0.1 * (1 - 3), 0.0]], rtol=1e-4
    )
    np.testing.assert_array_equal(pulled["head/bias"], plain["head/bias"])


def test_surgical_rates_follow_the_relative_gradient_norm():
    params = {"p/w": jnp.full((4,), 2.0), "q/w": jnp.full((4,), 1.0), "head/w": jnp.zeros((4,))}
    grads = {"p/w": jnp.full((4,), 1.0), "q/w": jnp.full((4,), 1.0), "head/w": jnp.full((4,), 1.0)}
    part = {n: n.split("/")[0] for n in params}
    tx = optim.make_optimizer("sgd", optax.constant_schedule(1.0), dict.fromkeys(params, 1.0), surgical=part)
    updates, state = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(updates["q/w"], -np.ones(4), rtol=1e-6)  # ratio 1, the largest below the head
    np.testing.assert_allclose(updates["p/w"], -0.5 * np.ones(4), rtol=1e-6)
    np.testing.assert_allclose(updates["head/w"], -np.ones(4), rtol=1e-6)
    zero_q = grads | {"q/w": jnp.zeros((4,))}  # means now: p 0.5, q 0.5
    updates, _ = tx.update(zero_q, state, params)
    np.testing.assert_allclose(updates["p/w"], -(1 + 0.9) * np.ones(4), rtol=1e-6)  # momentum 0.9, scale 1


def test_carried_surgical_rates_of_a_part_that_begins_are_those_of_a_fresh_one():
    params = {"p/w": jnp.full((4,), 2.0), "q/w": jnp.full((4,), 2.0)}

    def make(*names):
        multipliers = {n: float(n in names) for n in params}
        labels = {n: "since0" if n == "q/w" else "since1" for n in params}
        part = {n: n.split("/")[0] for n in names}
        return optim.make_optimizer("sgd", optax.constant_schedule(1.0), multipliers, labels, surgical=part)

    one, both = make("q/w"), make("p/w", "q/w")
    _, state = run(one, {"q/w": params["q/w"]}, [{"q/w": jnp.ones(4)}] * 20)
    updates, _ = both.update(dict.fromkeys(params, jnp.ones(4)), optim.carry(both.init(params), state), params)
    np.testing.assert_allclose(updates["p/w"], -np.ones(4), rtol=1e-6)


def test_one_cycle_rises_and_falls():
    rates = [float(optim.make_schedule("one-cycle", 0.4, 100, 0.1)(i)) for i in range(100)]
    assert rates[0] == pytest.approx(0.4 / 25)
    assert max(rates) == pytest.approx(0.4) and rates.index(max(rates)) == 30
    assert rates[-1] < 1e-3
    assert np.isfinite(float(optim.make_schedule("one-cycle", 0.4, 1, 0.1)(0)))


def test_tokens_and_position_embeddings_are_not_decayed():
    params = {"embed/pos_embed": jnp.ones((1, 2, 3)), "embed/cls_token": jnp.ones((1, 1, 3)), "w": jnp.ones((2, 2))}
    assert optim.decays(params) == {"embed/pos_embed": False, "embed/cls_token": False, "w": True}


def test_no_state_for_what_is_frozen():
    tx = optim.make_optimizer("adamw", optax.constant_schedule(0.1), {"body/kernel": 0.0, "head/bias": 1.0})
    shapes = {"head/bias": jax.ShapeDtypeStruct((1,), jnp.float32)}
    assert optim.state_bytes(tx, shapes) == 2 * 4 + 2 * 4  # two moments, Adam's count and the schedule's


def test_step_falls_when_bits_does():
    """BiT's get_schedule of 10,000 steps is [500, 3000, 6000, 9000, 10000]: the rise, and tenfold down from each."""
    schedule = optim.make_schedule("step", 1.0, 10_000, 0.05)
    ends = {499: 1.0, 500: 1.0, 2999: 1.0, 3000: 0.1, 5999: 0.1, 6000: 0.01, 8999: 0.01, 9000: 0.001, 9999: 0.001}
    for step, rate in ends.items():
        assert float(schedule(step)) == pytest.approx(rate), step


def test_a_schedule_is_the_same_by_name_and_as_a_function():
    for name, function in (("step", optim.step), ("one-cycle", optim.one_cycle), ("cosine", optim.cosine)):
        for given in (function, partial(function)):
            one, other = (optim.make_schedule(s, 1.0, 20, 0.5) for s in (name, given))
            assert [float(one(i)) for i in range(20)] == [float(other(i)) for i in range(20)], name


def test_falls_of_a_few_steps_that_come_together_count_each():
    schedule = optim.make_schedule("step", 1.0, 3, 0.0)
    assert [float(schedule(i)) for i in range(3)] == pytest.approx([1.0, 0.01, 0.001])


@pytest.mark.parametrize("name", [n for n in optim.SCHEDULES if n != "one-cycle"])
def test_schedules_rise_to_the_peak_and_do_not_pass_it(name):
    schedule = optim.make_schedule(name, 0.4, 100, 0.1)
    rates = [float(schedule(i)) for i in range(100)]
    np.testing.assert_allclose(rates[:10], [0.04 * (i + 1) for i in range(10)], rtol=1e-5)
    assert max(rates) == pytest.approx(0.4)
    ends = {"constant": 0.4, "linear": 0.4 / 90, "cosine": 0.4 * 0.5 * (1 + np.cos(np.pi * 89 / 90)), "step": 4e-4}
    assert rates[-1] == pytest.approx(ends[name], rel=1e-3)


def test_one_step_of_one_stage_moves():
    assert float(optim.make_schedule("cosine", 0.4, 1, 0.1)(0)) == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: optim.make_schedule("cosin", 1, 10, 0), "Did you mean cosine"),
        (lambda: optim.make_schedule("cosine", 1, 10, 1.0), "share of a stage's steps"),
        (lambda: optim.make_optimizer("adamv", optax.constant_schedule(1), {"w": 1.0}), "Did you mean adam"),
    ],
)
def test_refused(call, message):
    with pytest.raises(UserError, match=message):
        call()
