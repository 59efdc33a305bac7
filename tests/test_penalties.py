"""Penalties by their gradients: λ (w − w_s) where the source has the name, β w where it has not, times the strength."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jft.errors import UserError
from jft.penalties import l2, l2_sp, whole_model

PARAMS = {"a/kernel": jnp.array([[1.0, -2.0]]), "b/norm/scale": jnp.array([3.0]), "head/kernel": jnp.array([[5.0]])}
SOURCE = {"a/kernel": np.array([[0.5, 1.0]], np.float32), "b/norm/scale": np.array([1.0], np.float32)}


def gradient(penalty, params=PARAMS, **options):
    return jax.grad(lambda p: penalty(p, SOURCE, **options))(params)


def test_l2_is_weight_decay():
    for name, pull in gradient(l2).items():
        np.testing.assert_array_equal(pull, PARAMS[name])


def test_l2_sp_pulls_to_the_source_and_what_is_new_to_zero():
    found = gradient(l2_sp, new=0.25)
    np.testing.assert_allclose(found["a/kernel"], [[0.5, -3.0]])
    np.testing.assert_allclose(found["b/norm/scale"], [2.0])
    np.testing.assert_allclose(found["head/kernel"], [[1.25]])


def test_strengths_go_by_name_and_the_first_match_counts():
    found = gradient(l2_sp, new=1.0, strengths=(("*norm*", 0.0), ("b", 7.0), ("a", 0.5))[::2])
    np.testing.assert_allclose(found["a/kernel"], [[0.25, -1.5]])
    np.testing.assert_array_equal(found["b/norm/scale"], [0.0])
    np.testing.assert_allclose(found["head/kernel"], [[5.0]])
    np.testing.assert_allclose(gradient(l2, strengths=(("head", 2.0),))["head/kernel"], [[10.0]])


def test_a_pattern_of_what_does_not_train_is_no_mistake_and_one_of_nothing_is():
    """What a stage does not train may be new as well: a head, a low-rank update."""
    body = {"a/kernel": PARAMS["a/kernel"]}
    strengths = (("head", 0.0), ("*/lora_a", 0.0), ("a", 0.5))
    np.testing.assert_allclose(gradient(l2_sp, body, strengths=strengths)["a/kernel"], [[0.25, -1.5]])
    with whole_model():
        gradient(l2_sp, strengths=(("head", 0.0),))
        with pytest.raises(UserError, match="'haed' matches no parameter"):
            gradient(l2_sp, strengths=(("haed", 0.0),))
