"""Using models: real pretrained weights on real images answer as the reference does; every image counts once."""

import csv

import numpy as np
import pytest
from PIL import Image

from jft.data import sources
from jft.errors import UserError
from jft.use import evaluate_dataset, predict, pretrained, probabilities, run_model

REAL = {
    "resnet18": ("resnet18_imagenet_ktb.pth", 0.765),
    "resnet50": ("resnet50_imagenet_ktb.safetensors", 0.79),
    "vit_tiny_patch16_224": ("vit_tiny_patch16_224.safetensors", 0.865),
}


@pytest.mark.slow
@pytest.mark.assets
@pytest.mark.parametrize("name", REAL)
def test_top1_of_real_weights_on_real_images(assets, name):
    """As `jft predict --model … --weights …` does it, from the file to the class: at most one of 200 images off."""
    file, expected = REAL[name]
    folder = assets / "data" / "imagenet_sample_200"
    with open(folder / "index.csv", newline="", encoding="utf-8") as table:
        rows = list(csv.DictReader(table))
    labels = np.array([int(row["class_index"]) for row in rows])
    dataset, excluded = sources.unlabelled([folder / row["file"] for row in rows], [str(i) for i in range(1000)])
    done = run_model(pretrained(name, str(assets / "weights" / file)), dataset)
    assert not excluded and not done.excluded and len(done.kept) == 200
    ours = np.mean(done.logits.argmax(-1) == labels)
    assert abs(ours - expected) <= 1 / 200 + 1e-9
    reference = np.load(assets / "reference" / "logits_200.npz")
    (key,) = [k for k in reference if k.startswith(name.split("_")[0]) and k.endswith("logits")]
    assert np.mean(done.logits.argmax(-1) == reference[key].argmax(-1)) >= 0.97


@pytest.fixture(scope="module")
def model():
    import jax

    from jft.bundle import Bundle
    from jft.models import make_model
    from jft.preprocess import Preprocess

    made = make_model("tiny_vit", num_classes=3)
    params, stats = made.init(jax.random.key(0))
    head = {"head/kernel": jax.random.normal(jax.random.key(1), params["head/kernel"].shape)}
    params = {n: np.asarray(v) for n, v in (params | head).items()}
    return Bundle(made, params, stats, ("a", "b", "c"), Preprocess((32, 32), crop_pct=1.0))


def pictures(n):
    return np.random.default_rng(0).integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)


@pytest.mark.parametrize("batch", [1, 3, 7, 32])
def test_every_image_counts_once_whatever_the_batch(model, batch):
    dataset = sources.arrays(pictures(13), np.arange(13, dtype=np.int32) % 3, ["a", "b", "c"])
    scores = evaluate_dataset(model, dataset, batch=batch)
    whole = run_model(model, dataset, batch=13)
    assert scores["count"] == 13
    assert scores["accuracy"] == np.mean(whole.logits.argmax(-1) == np.arange(13) % 3)
    np.testing.assert_allclose(run_model(model, dataset, batch=batch).logits, whole.logits, rtol=1e-4, atol=1e-5)


def test_views_are_averaged_in_probability(model):
    images = pictures(3)
    dataset = sources.arrays(images, np.zeros(3, np.int32), ["a"])
    mirrored = sources.arrays(images[:, :, ::-1], np.zeros(3, np.int32), ["a"])
    p, q = (probabilities(run_model(model, d).logits) for d in (dataset, mirrored))
    both = probabilities(run_model(model, dataset, tta=("flip",)).logits)
    np.testing.assert_allclose(both, (p + q) / 2, rtol=1e-4, atol=1e-6)
    assert run_model(model, dataset, tta=("corners", "flip")).logits.shape == (3, 3)
    with pytest.raises(UserError, match="Did you mean flip"):
        run_model(model, dataset, tta=("flop",))


def test_classes_are_matched_by_name_not_by_place(model):
    one = evaluate_dataset(model, sources.arrays(pictures(6), np.array([0, 1, 2] * 2, np.int32), ["a", "b", "c"]))
    two = evaluate_dataset(model, sources.arrays(pictures(6), np.array([1, 0, 2] * 2, np.int32), ["b", "a", "c"]))
    assert one == two


def test_classes_the_model_does_not_know_are_refused(model):
    with pytest.raises(UserError, match="does not know: dogs"):
        evaluate_dataset(model, sources.arrays(pictures(2), np.array([0, 1], np.int32), ["a", "dogs"]))


def test_predict_takes_arrays_pictures_and_paths(model, tmp_path):
    array = pictures(1)[0]
    Image.fromarray(array).save(tmp_path / "x.png")
    rows = [predict(model, [form])[0] for form in (array, Image.fromarray(array), tmp_path / "x.png")]
    assert len({(r["label"], round(r["probability"], 6)) for r in rows}) == 1
    with pytest.raises(UserError, match="not both"):
        predict(model, [array, tmp_path / "x.png"])
