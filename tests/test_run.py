"""Entering a run's folder: the same data and weights are the same run wherever they lie; others are refused."""

import json
import os
import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest
from PIL import Image

from jft import run, train
from jft.config import PLACE, Config, describe
from jft.data import sources
from jft.errors import UserError
from jft.models import make_model
from jft.run import contents, data_path, entered, fingerprint
from jft.use import own_validation
from jft.weights.writers import write_safetensors

pytestmark = pytest.mark.usefixtures("optax_promotion")


def config(root, workdir) -> Config:
    return Config(
        data=f"{root / 'bees'}", model="tiny_vit", weights=str(root / "tiny.safetensors"), plan="head", epochs=2,
        batch=8, lr=1e-2, workdir=str(workdir), display="quiet", checkpoint_every=0.0, augment=("crop", "flip"),
    )  # fmt: skip


@pytest.fixture
def job1(folder, tmp_path):
    """What a job has staged: a data set and weights."""
    root = tmp_path / "job1"
    shutil.copytree(folder, root / "bees")
    params, stats = make_model("tiny_vit", num_classes=1000).init(jax.random.key(0))
    write_safetensors(root / "tiny.safetensors", {n: np.asarray(v) for n, v in (params | stats).items()})
    return root


def told(workdir):
    return json.loads((workdir / "config.json").read_text())


@pytest.mark.slow
def test_a_run_goes_on_where_its_data_and_weights_lie_now(job1, tmp_path, crash):
    whole, cut, job2 = tmp_path / "whole", tmp_path / "cut", tmp_path / "job2"
    train.train(config(job1, whole))
    crash(config(job1, cut), 5)
    job1.rename(job2)
    train.train(config(job2, cut))
    for file in ("metrics.jsonl", "predictions.csv", "model/model.safetensors"):
        assert (whole / file).read_bytes() == (cut / file).read_bytes(), file
    now = told(cut)
    assert now["data"] == now["config"]["data"] == str(job2 / "bees")
    assert now["weights"] == now["config"]["weights"] == str(job2 / "tiny.safetensors")
    assert len(own_validation(cut)) == 6  # what reads the run's folder finds them
    before = (cut / "config.json").read_bytes()
    spelt = config(job2, cut).replace(data=f"{job2}/./bees/", weights=f"{job2}/../job2/tiny.safetensors")
    train.train(spelt)  # finished: nothing is changed
    assert (cut / "config.json").read_bytes() == before


@pytest.mark.slow
def test_a_preset_that_has_become_another_is_refused(job1, tmp_path, crash):
    """Begun by a version in which the plan's word meant other stages: the config alone is the same."""
    crash(config(job1, tmp_path / "run"), 5)
    file = tmp_path / "run/config.json"
    file.write_text(file.read_text().replace('"lr": 0.01', '"lr": 0.1').replace('"lr": 0.1', '"lr": 0.01', 1))
    with pytest.raises(UserError, match=r"another configuration .*\n  stages\.head\.lr: 0\.1 → 0\.01\n"):
        train.train(config(job1, tmp_path / "run"))


def test_other_data_and_weights_are_refused_wherever_they_lie(job1, tmp_path, crash):
    cut, job2 = tmp_path / "cut", tmp_path / "job2"
    crash(config(job1, cut), 5)
    before = (cut / "config.json").read_bytes()
    shutil.copytree(job1, job2)
    for file in (job2 / "bees").rglob("*.png"):  # the same names and labels
        with Image.open(file) as picture:
            smaller = picture.resize((32, 32))
        smaller.save(file)
    with pytest.raises(UserError, match=r"config\.data: .*job1/bees.* → .*job2/bees"):
        train.train(config(job2, cut).replace(weights=str(job1 / "tiny.safetensors")))
    with pytest.raises(UserError, match=r"(?s)config\.weights: .*job1.* → .*weights_sha256"):
        train.train(config(job1, cut).replace(weights="none"))
    for file in (job1 / "bees").rglob("*.png"):  # others under the same names, at the same path
        shutil.copy(job2 / file.relative_to(job1), file)
    with pytest.raises(UserError, match=r"(?s)data_contents: .*The images have changed, under the same names\."):
        train.train(config(job1, cut))
    (job1 / "bees/red/0.png").unlink()
    with pytest.raises(UserError, match="data_sha256"):  # at the same path
        train.train(config(job1, cut))
    assert (cut / "config.json").read_bytes() == before


def about(changes=(), **others):
    fields = {"data": "bees/", "weights": "./a.pth", "lr": 1.0} | dict(changes)
    return {
        "config": {k: v for k, v in describe(Config(**fields)).items() if k not in PLACE},
        "data": "/x/bees", "weights": "a.pth", "weights_sha256": "1", "data_sha256": "2", "preprocess": {"size": 3},
    } | others  # fmt: skip


@pytest.mark.parametrize(
    ("now", "refused"),
    [
        (about(), None),
        (about({"data": "../x/bees", "weights": "a.pth"}), None),
        (about({"data": "b"}, data="/x/b"), "config.data"),  # a run from before there was `data_contents`
        (about(data_contents="4"), None),  # which the run does not say
        (about({"weights": None}), None),  # the model's own, which are the same file
        (about({"weights": None}, preprocess={"size": 4}), "config.weights"),
        (about({"lr": 2.0}), "config.lr"),
        (about({"data": {"names": []}}), "config.data"),  # arrays have no path
    ],
)
def test_what_is_compared_with_a_run_that_was_begun(tmp_path, now, refused):
    with entered(tmp_path / "run", about(), print):
        pass
    if refused:
        with pytest.raises(UserError, match=refused), entered(tmp_path / "run", now, print):
            pass
        return
    with entered(tmp_path / "run", now, print):
        assert told(tmp_path / "run")["config"] == now["config"]


def test_a_csv_that_is_a_link_is_found_where_it_was_given(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store/labels.csv").write_text("path,label\n")
    (tmp_path / "labels.csv").symlink_to("store/labels.csv")
    assert data_path(Config(data=str(tmp_path / "store/../labels.csv"))) == str(tmp_path / "labels.csv")


def test_contents_are_those_of_the_images(folder):
    splits = sources.load(str(folder))
    other = replace(splits, train=replace(splits.train, read=lambda i: b"" if i == 3 else splits.train.read(i)))
    arrays = replace(splits, train=replace(splits.train, read=lambda i: np.full((2, 2, 3), i, np.uint8)))
    assert contents(splits) == contents(sources.load(str(folder)))
    assert fingerprint(other) == fingerprint(splits)
    assert len({contents(s) for s in (splits, other, arrays)}) == 3


def test_deterministic_operations_are_asked_for_before_jax_begins(monkeypatch):
    flags = "--xla_force_host_platform_device_count=8"
    monkeypatch.setattr("jax._src.xla_bridge.backends_are_initialized", lambda: False)
    monkeypatch.setenv("XLA_FLAGS", flags)
    assert run.make_deterministic() and os.environ["XLA_FLAGS"] == f"{flags} {run.DETERMINISTIC}"
    monkeypatch.setattr("jax._src.xla_bridge.backends_are_initialized", lambda: True)
    assert run.make_deterministic()  # of the next run in the same process
    monkeypatch.setenv("XLA_FLAGS", flags)
    assert run.make_deterministic()  # a CPU is anyway
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for _ in range(2):  # each run is told
        assert not run.make_deterministic() and os.environ["XLA_FLAGS"] == flags


def test_deterministic_says_where_it_comes_too_late(job1, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(train, "make_deterministic", lambda: False)
    (job1 / "tiny.safetensors").unlink()
    with pytest.raises(UserError, match="tiny"):
        train.train(config(job1, tmp_path / "run").replace(deterministic=True, display="plain"))
    assert "--deterministic has no effect here" in "".join(capfd.readouterr())
