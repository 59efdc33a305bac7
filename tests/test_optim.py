"""Optimisers against formulas worked out by hand on two-leaf trees, and schedules at the steps that matter."""

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


def test_tokens_and_position_embeddings_are_not_decayed():
    params = {"embed/pos_embed": jnp.ones((1, 2, 3)), "embed/cls_token": jnp.ones((1, 1, 3)), "w": jnp.ones((2, 2))}
    assert optim.decays(params) == {"embed/pos_embed": False, "embed/cls_token": False, "w": True}


def test_no_state_for_what_is_frozen():
    tx = optim.make_optimizer("adamw", optax.constant_schedule(0.1), {"body/kernel": 0.0, "head/bias": 1.0})
    shapes = {"head/bias": jax.ShapeDtypeStruct((1,), jnp.float32)}
    assert optim.state_bytes(tx, shapes) == 2 * 4 + 2 * 4  # two moments, Adam's count and the schedule's


@pytest.mark.parametrize("name", optim.SCHEDULES)
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
