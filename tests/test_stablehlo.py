"""A model as one program: it computes what the model computes, for any batch size, with or without preprocessing."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from generated import weight

from jft import bundle, stablehlo
from jft.convert import export_model
from jft.errors import UserError
from jft.models import make_model
from jft.preprocess import Preprocess


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A bundle of a model of one block."""
    folder = tmp_path_factory.mktemp("run")
    options = {"num_classes": 3, "depth": 1}
    model = make_model("tiny_vit", **options)
    bundle.save(
        folder / "model",
        model_name="tiny_vit",
        model_options=options,
        params={n: weight(n, s.shape) for n, s in model.shapes()[0].items()},
        batch_stats={},
        classes=("a", "b", "c"),
        preprocess=Preprocess(size=(32, 32), mean=(0.5, 0.4, 0.3)),
    )
    return folder


def call(done, images):
    """Run the lines that an export printed."""
    scope = {"images": images}
    exec("\n".join(done.code), scope)
    return np.asarray(scope["logits"])


def test_any_batch_size_and_preprocessing_inside(run, tmp_path):
    given = bundle.load(run / "model")
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    x = (pixels.astype(np.float32) / np.float32(255) - np.float32(given.preprocess.mean)) / np.float32(
        given.preprocess.std
    )
    expected = np.asarray(
        given.model.apply({n: jnp.asarray(a) for n, a in given.params.items()}, {}, jnp.asarray(x))[0]
    )
    done = export_model(run, "stablehlo", tmp_path / "plain")
    np.testing.assert_allclose(call(done, x), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(call(done, x[:1]), expected[:1], rtol=1e-4, atol=1e-5)
    said = json.loads((tmp_path / "plain" / "model.json").read_text())
    assert said["input"]["shape"] == ["b", 32, 32, 3] and said["classes"] == ["a", "b", "c"]

    inside = export_model(run, "stablehlo", tmp_path / "inside", preprocess_inside=True, dtype="bfloat16")
    y = call(inside, pixels)
    assert np.linalg.norm(y - expected) < 0.02 * np.linalg.norm(expected)
    sizes = [(tmp_path / name / "model.stablehlo").stat().st_size for name in ("plain", "inside")]
    assert sizes[1] < 0.8 * sizes[0]
    assert json.loads((tmp_path / "inside" / "model.json").read_text())["input"]["dtype"] == "uint8"


def test_a_model_too_large_for_the_container(run, tmp_path, monkeypatch):
    monkeypatch.setattr(stablehlo, "LIMIT", 1000)
    with pytest.raises(UserError, match="--dtype bfloat16"):
        export_model(run, "stablehlo", tmp_path / "large")
    assert not (tmp_path / "large").exists()
