"""Sweeps: the space, trials as runs, pruning, and that a sweep that was stopped goes on as if it had not been."""

import jax
import numpy as np
import pytest

from jft import features, train
from jft.config import Config

pytestmark = pytest.mark.usefixtures("optax_promotion")


def config(folder, workdir, **changes):
    base = Config(
        data=str(folder), model="tiny_vit", weights="none", batch=8, epochs=2.0, lr=1e-2, workdir=str(workdir),
        display="quiet", checkpoint_every=0.0,
    )  # fmt: skip
    return base.replace(**changes)


def test_runs_share_features_and_are_the_same_as_alone(folder, tmp_path, monkeypatch):
    computed, compute = [], features.compute
    monkeypatch.setattr(features, "compute", lambda *a, **k: computed.append(1) or compute(*a, **k))
    shared: features.Shared = {}
    told = []
    for name in ("a", "b"):
        train.train(config(folder, tmp_path / name, epochs=1.0), shared=shared, watch=told.append)
    assert len(shared) == len(computed) == 2
    train.train(config(folder, tmp_path / "c", epochs=1.0))
    logs = {(tmp_path / name / "metrics.jsonl").read_bytes() for name in "abc"}
    assert len(logs) == 1 and len(computed) == 4
    assert [(t["done"], t["final"], t["step"]) for t in told] == [(1.0, True, 4)] * 2


def test_the_key_of_shared_features_is_all_they_depend_on():
    from jft.models import make_model

    model = make_model("tiny_vit", num_classes=3)
    params, _ = model.init(jax.random.key(0))
    images = np.zeros((2, 4, 4, 3), np.uint8)

    def key(stop="head", changed="", images=images, also=8):
        values = {n: np.asarray(v) + (1 if n == changed else 0) for n, v in params.items()}
        return features.key(model, stop, values, images, also)

    assert key() == key() == key(changed="head/kernel")
    others = [key("norm"), key(changed="block0/mlp/fc1/kernel"), key(images=images + 1), key(also=16)]
    assert len({key(), *others}) == 5
    shared = {str(i): jax.numpy.zeros(1) for i in range(features.MOST_SHARED)}
    features.share(shared, "new", jax.numpy.ones(1))
    assert list(shared) == [*map(str, range(1, features.MOST_SHARED)), "new"]
