"""Low-rank updates: nothing at first, merged equal to unmerged, the kernels frozen, small files, every family."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from generated import picture

from jft import plan, tree
from jft.errors import UserError
from jft.lora import Lora, read_adapter, with_lora, write_adapter
from jft.models import make_model
from jft.penalties import l2_sp

KINDS = [Lora(2), Lora(2, alpha=4.0, dora=True)]


def random(params, key):
    """Updates that are no longer zero."""
    return {
        n: v + 0.1 * jax.random.normal(jax.random.fold_in(key, i), v.shape) if "/lora_" in n else v
        for i, (n, v) in enumerate(params.items())
    }


@pytest.fixture(scope="module", params=[pytest.param("tiny_resnet", marks=pytest.mark.slow), "tiny_vit"])
def base(request):
    model = make_model(request.param, num_classes=3)
    params, stats = model.init(jax.random.key(0))
    params["head/kernel"] = jax.random.normal(jax.random.key(1), params["head/kernel"].shape)
    return model, params, stats, jnp.asarray(picture(2, *model.input_shape))


@pytest.mark.parametrize("lora", KINDS)
def test_nothing_at_first_and_merged_equals_unmerged(base, lora):
    plain, params, stats, x = base
    model = with_lora(plain, lora)
    whole = params | model.init_updates(jax.random.key(0))
    assert set(whole) == set(model.shapes()[0])
    assert {n: v.shape for n, v in whole.items()} == {n: s.shape for n, s in model.shapes()[0].items()}
    y = plain.apply(params, stats, x)[0]
    np.testing.assert_allclose(model.apply(whole, stats, x)[0], y, rtol=1e-5, atol=1e-5)
    moved = random(whole, jax.random.key(2))
    z = model.apply(moved, stats, x)[0]
    assert np.abs(z - y).max() > 1e-2
    merged = model.merged(moved)
    assert set(merged) == set(params)
    np.testing.assert_array_equal(model.plain().apply(merged, stats, x)[0], z)


@pytest.mark.parametrize("lora", KINDS)
def test_a_penalty_is_of_the_kernels_as_they_are_applied(base, lora):
    """L2-SP is ½‖W − W_s‖², nothing at the source, where A is not zero; its gradient goes through the sum."""
    plain, params, stats, _ = base
    model = with_lora(plain, lora)
    whole = params | model.init_updates(jax.random.key(0))
    trainable = frozenset(n for n in whole if "/lora_" in n)
    penalty = jax.jit(lambda p: l2_sp(model.effective(p, trainable), params))
    assert float(penalty(whole)) == 0
    moved = random(whole, jax.random.key(2))
    merged = model.merged(moved)
    expected = sum(0.5 * np.sum(np.square(merged[n] - params[n])) for n in model.kernels)
    np.testing.assert_allclose(penalty(moved), expected, rtol=1e-4)
    assert set(model.effective(moved, trainable)) == set(model.kernels)
    one = model.kernels[0].removesuffix("kernel")
    assert set(model.effective(moved, {one + "lora_a", "head/bias"})) == {one + "kernel", "head/bias"}
    pull = jax.grad(penalty)(moved)[one + "lora_b"]
    if not lora.dora:
        difference = (merged[one + "kernel"] - params[one + "kernel"]).reshape(-1, pull.shape[1])
        np.testing.assert_allclose(pull, moved[one + "lora_a"].T @ difference, rtol=1e-3, atol=1e-5)


def test_against_the_equations():
    model = with_lora(make_model("tiny_vit", num_classes=3), Lora(2, alpha=6.0, targets=("block1/mlp",)))
    w, a, b = (
        np.random.default_rng(i).normal(size=s).astype(np.float32) for i, s in enumerate([(32, 128), (32, 2), (2, 128)])
    )
    names = {"block1/mlp/fc1/kernel": w, "block1/mlp/fc1/lora_a": a, "block1/mlp/fc1/lora_b": b}
    np.testing.assert_allclose(model.merged(names)["block1/mlp/fc1/kernel"], w + 3 * a @ b, rtol=1e-5, atol=1e-5)
    dora = with_lora(model.plain(), Lora(2, alpha=6.0, targets=("block1/mlp",), dora=True))
    m = np.linspace(0.5, 2, 128).astype(np.float32)
    v = w + 3 * a @ b
    expected = m * np.linalg.norm(w, axis=0) * v / np.linalg.norm(v, axis=0)
    got = dora.merged(names | {"block1/mlp/fc1/lora_m": m})["block1/mlp/fc1/kernel"]
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_the_plan_trains_the_updates_and_the_head_alone(base):
    model = with_lora(base[0], Lora(2))
    names = list(model.shapes()[0])
    (stage,) = plan.resolve("lora", names, list(model.parts), epochs=1, lr=None)
    trained = plan.trainable(plan.multipliers(stage, names, list(model.parts)))
    assert trained == {n for n in names if "/lora_" in n or n.startswith("head/")}
    first = next(iter(model.parts))
    assert not any(n.startswith(first) for n in trained)


def test_a_small_file_gives_the_same_model_back(base, tmp_path):
    plain, params, _, _ = base
    model = with_lora(plain, Lora(2, dora=True))
    whole = random(params | model.init_updates(jax.random.key(0)), jax.random.key(2))
    write_adapter(tmp_path / "a.safetensors", model, whole)
    assert (tmp_path / "a.safetensors").stat().st_size < 0.7 * sum(v.nbytes for v in params.values())
    again = read_adapter(tmp_path / "a.safetensors", plain, params)
    for name, value in model.merged(whole).items():
        np.testing.assert_allclose(again[name], value, rtol=1e-5, atol=1e-7)  # numpy multiplies in its own order
    other = make_model("tiny_vit" if plain.name == "tiny_resnet" else "tiny_resnet")
    with pytest.raises(UserError, match="no low-rank updates of"):
        read_adapter(tmp_path / "a.safetensors", other, params)


def test_init_of_some_parts_holds_their_updates_alone(base):
    model = with_lora(base[0], Lora(2))
    part = list(model.parts)[1]
    params, _ = model.init(jax.random.key(0), [part])
    shapes = model.shapes()[0]
    assert set(params) == {n for n in shapes if n.startswith(part + "/")} and any("/lora_a" in n for n in params)
    assert tree.under(params, part)


@pytest.mark.parametrize(("lora", "message"), [(Lora(0), "at least 1"), (Lora(2, targets=("*/atn",)), "Did you mean")])
def test_refused(lora, message):
    with pytest.raises(UserError, match=message):
        with_lora(make_model("tiny_vit"), lora)
