"""What is told of a model's reasons: Grad-CAM by its definition, neighbours among the training images, a probe."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from test_report import Page, changed

from jft import bundle, explain, weights
from jft.bundle import Bundle
from jft.data import sources
from jft.data.prepare import make_prepare
from jft.errors import UserError
from jft.models import MODELS, make_model
from jft.preprocess import Preprocess
from jft.report.html import make_report
from jft.step import make_eval_step


def made(name, size, classes=("a", "b", "c")):
    model = make_model(name, num_classes=len(classes), image_size=(size, size))
    params, stats = model.init(jax.random.key(0))
    shape = params["head/kernel"].shape
    params = params | {"head/kernel": 0.5 * jax.random.normal(jax.random.key(1), shape)}
    params, stats = ({n: np.asarray(v) for n, v in half.items()} for half in (params, stats))
    return Bundle(model, params, stats, classes, Preprocess((size, size), crop_pct=1.0))


@pytest.mark.slow
def test_grad_cam_behind_a_mean_is_the_class_activation_map():
    """Zhou et al. 2016: where a mean and a linear head follow, the sum of the activations by the head's kernel."""
    model = made("tiny_resnet", 64)
    pixels = np.random.default_rng(0).integers(0, 255, (2, 64, 64, 3)).astype(np.uint8)
    classes = np.array([[0, 1], [2, 0]], np.int32)
    found = explain.grad_cam(model, pixels, classes)
    assert explain.places(model.model) == "pool" and found.shape == (2, 2, 2, 2)
    body = jax.jit(make_eval_step(model.model, prepare=make_prepare(model.preprocess), stop="pool"))
    given = {"image": pixels, "index": np.arange(2, dtype=np.int32)}
    h = np.asarray(body(dict(model.params), dict(model.batch_stats), given), np.float64)
    for i, row in enumerate(classes):
        for j, c in enumerate(row):
            wanted = np.maximum(h[i] @ model.params["head/kernel"][:, c].astype(np.float64), 0)
            wanted = np.rint(255 * wanted / max(wanted.max(), 1e-12))
            np.testing.assert_allclose(found[i, j], wanted, atol=1)


def test_grad_cam_reaches_the_patches_of_a_class_token():
    model = made("tiny_vit", 32)
    assert explain.places(model.model) == f"block{sum(p.startswith('block') for p in model.model.parts) - 1}"
    pixels = np.random.default_rng(0).integers(0, 255, (1, 32, 32, 3)).astype(np.uint8)
    found = explain.grad_cam(model, pixels, np.array([[0, 1, 2]], np.int32))
    assert found.max() == 255 and found.shape[2] == found.shape[3] > 1


@pytest.mark.parametrize(
    ("tokens", "size", "wanted"),
    [(197, (224, 224), (14, 14)), (198, (224, 224), (14, 14)), (1374, (518, 518), (37, 37)), (13, (32, 96), (2, 6))],
)
def test_grid_of_tokens(tokens, size, wanted):
    assert explain.grid(tokens, size) == wanted


@pytest.mark.parametrize("name", [n for n in MODELS if n.startswith("tiny")])
def test_every_family_has_places(name):
    model = make_model(name)
    part = explain.places(model)
    assert part is not None and np.prod(model.shape_before(part)[:-1]) > 1


@pytest.mark.slow
def test_a_run_is_explained(folder, tmp_path):
    splits = sources.load(str(folder), seed=0, val_fraction=0.25)
    model = made("tiny_resnet", 64, splits.classes)
    run, val = tmp_path / "run", splits.val
    bundle.save(run / "model", model_name="tiny_resnet", model_options={"num_classes": 3, "image_size": [64, 64]},
                params=model.params, batch_stats=model.batch_stats, classes=splits.classes,
                preprocess=model.preprocess)  # fmt: skip
    source = run / "model" / "model.safetensors"
    config = {"data": str(folder), "seed": 0, "val_fraction": 0.25, "model": "tiny_resnet", "shots": None}
    sha256 = weights.load(model.model, str(source)).sha256
    about = {"config": config, "data": str(folder), "weights": str(source), "weights_sha256": sha256}
    result = {"model": "tiny_resnet", "data": str(folder), "classes": splits.classes, "val": {"count": len(val)}}
    for name, held in (("config.json", about), ("result.json", result)):
        (run / name).write_text(json.dumps(held))
    with pytest.raises(UserError, match=r"no predictions\.npz"):
        explain.explain(run)
    p = np.random.default_rng(0).dirichlet(np.ones(3), len(val)).astype(np.float32)
    np.savez(run / "predictions.npz", names=np.array(val.names), labels=val.labels, probabilities=p)
    with np.load(explain.explain(run, images=24, shown=4)) as file:
        found = dict(file)
    assert found["maps"].shape == (4, 2, 2, 2) and found["pixels"].shape == (4, 64, 64, 3)
    assert {n for row in found["neighbours"] for n in row} <= set(splits.train.names)
    assert (np.diff(found["similarity"], axis=1) <= 0).all() and (found["similarity"] <= 1 + 1e-6).all()
    for names, labels in zip(found["neighbours"], found["neighbour_labels"], strict=True):
        assert [n.split("/")[0] for n in names] == labels.tolist()
    assert 0 <= found["probe_accuracy"] <= 1 and found["probe_count"] == 24
    page = Page(make_report(run))
    for words in ("Grad-CAM", "Linear probe baseline", "Training images:", "cosine similarities"):
        assert words in page.text, words
    alts = [value for tag, key, value in page.attributes if (tag, key) == ("img", "alt")]
    assert sum(a.startswith("What of ") for a in alts) == 8 and all(alts)
    changed(run / "model", "config.json", lambda c: c.update(sha256="of another model"))
    assert "speaks for" not in Page(make_report(run)).text
    np.savez(run / "explained.npz", sha256="of another model", shown=found["shown"])
    with pytest.raises(UserError, match="lacks classes"):
        make_report(run)


def test_features_of_several_labels(folder):
    data = sources.load(str(folder), seed=0, val_fraction=0.25).train
    several = replace(data, labels=np.eye(3, dtype=np.float32)[data.labels])
    assert explain._label(several, 0) == explain._label(data, 0)


@pytest.mark.parametrize("several", [False, True])
def test_the_probe_doubts_the_labels_that_are_wrong(several):
    rng = np.random.default_rng(0)
    true = rng.integers(0, 3, 120)
    x = (4 * np.eye(3)[true] + 0.5 * rng.normal(size=(120, 3))).astype(np.float32)
    given = true.copy()
    given[:3] = (given[:3] + 1) % 3
    labels = np.eye(3, dtype=np.float32)[given] if several else given.astype(np.int32)
    data = sources.Dataset(tuple(map(str, range(120))), labels, ("a", "b", "c"), lambda i: None)
    seen = explain.Predicted(np.zeros((120, 3), np.float32), np.arange(120), [], x)
    found = explain._probe(seen, data, seen, data)
    assert found["probe_accuracy"] == pytest.approx(117 / 120) and found["probe_count"] == 120
    assert set(found["suspect_names"][:3].tolist()) == {"0", "1", "2"}
    if not several:
        assert found["suspect_label"][:3].tolist() == [int(given[int(n)]) for n in found["suspect_names"][:3]]
        assert found["suspect_said"][:3].tolist() == [int(true[int(n)]) for n in found["suspect_names"][:3]]
