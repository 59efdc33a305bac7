"""Averages of weights: the ends of an interpolation, a greedy soup by hand, and both on a run's folder."""

import json
import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest

from jft import average, cli, metrics
from jft.average import greedy_soup, interpolate, mean, soup, soup_of_run, wise_ft
from jft.bundle import Bundle
from jft.config import Config
from jft.data import sources
from jft.errors import UserError
from jft.models import make_model
from jft.preprocess import Preprocess
from jft.train import train
from jft.use import evaluate, fit_temperature, open_model, own_validation, probabilities, run_model
from jft.weights import open_weights

TREE = {"a": np.array([1.0, 2.0], np.float32), "head": np.array([9.0], np.float32)}
SOURCE = {"a": np.array([3.0, 2.0], np.float32)}


def test_the_ends_are_the_ends_and_a_new_head_stays():
    assert interpolate(SOURCE, TREE, 1.0)["a"] is TREE["a"]
    assert interpolate(SOURCE, TREE, 0.0)["a"] is SOURCE["a"]
    half = interpolate(SOURCE, TREE, 0.5)
    np.testing.assert_array_equal(half["a"], [2.0, 2.0])
    np.testing.assert_array_equal(half["head"], [9.0])


def test_a_greedy_soup_leaves_out_what_makes_it_worse():
    trees = [{"w": np.array([v], np.float32)} for v in (1.0, -1.0, 4.0)]
    kept, told = greedy_soup(trees, lambda tree: -abs(float(tree["w"][0])))
    assert kept == [0, 1]  # the best (±1) first, its mirror image makes 0, the third would make it worse
    assert told == [-1.0, 0.0, pytest.approx(-4 / 3)]
    np.testing.assert_allclose(mean(trees)["w"], [4 / 3], rtol=1e-6)


@pytest.fixture(scope="module")
def runs(folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    base = Config(
        data=str(folder), model="tiny_vit", weights="none", plan="full", batch=8, epochs=1, lr=1e-2, augment=(),
        snapshots=True, eval_every=0.5,
        display="quiet", workdir=str(root / "source"),
    )  # fmt: skip
    with jax.numpy_dtype_promotion("standard"):
        source = train(base)
        file = str(source.workdir / "model/model.safetensors")
        return [train(base.replace(weights=file, lr=lr, workdir=str(root / f"lr{lr}"))).workdir for lr in (1e-2, 3e-2)]


def test_wise_ft_takes_the_best_of_its_candidates(runs):
    done = wise_ft(runs[0])
    assert [row["alpha"] for row in done.rows] == [i / 10 for i in range(11)]
    assert done.score == max(row["accuracy"] for row in done.rows)
    assert done.rows[-1]["accuracy"] == json.loads((runs[0] / "result.json").read_text())["val"]["accuracy"]
    assert open_model(done.path).classes == open_model(runs[0]).classes
    assert json.loads((done.path / "average.json").read_text())["accuracy"] == done.score


def test_data_that_have_moved_are_given_again(runs, folder, tmp_path, capsys):
    moved = tmp_path / "run"
    shutil.copytree(runs[0], moved, ignore=shutil.ignore_patterns("wise-ft", "soup"))
    about = json.loads((moved / "config.json").read_text())
    about["data"] = about["config"]["data"] = str(tmp_path / "nowhere")
    (moved / "config.json").write_text(json.dumps(about))
    assert cli.main(["average", str(moved)]) == 2 and "Pass --data" in capsys.readouterr().err
    shutil.copytree(folder, tmp_path / "pictures")
    assert own_validation(moved, str(tmp_path / "pictures")).names == own_validation(runs[0]).names
    (next((tmp_path / "pictures").glob("red/*"))).unlink()  # others, then: all of them
    assert len(own_validation(moved, str(tmp_path / "pictures"))) == 35
    assert cli.main(["average", str(moved), "--snapshots", "--uniform", "--data", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] >= 0
    shutil.move(tmp_path / "pictures" / "red", tmp_path / "pictures" / "rot")
    with pytest.raises(UserError, match="the images are of"):
        wise_ft(moved, out=tmp_path / "w", data=str(tmp_path / "pictures"))


def test_where_the_head_alone_trained_there_is_nothing_between(runs, folder, tmp_path, capsys):
    source = str(runs[0].parent / "source/model/model.safetensors")
    made = Config(
        data=str(folder), model="tiny_vit", weights=source, plan="head", batch=8, epochs=1, display="quiet",
        workdir=str(tmp_path / "head"),
    )  # fmt: skip
    with jax.numpy_dtype_promotion("standard"):
        train(made)
    assert cli.main(["average", str(tmp_path / "head")]) == 2
    assert "nothing to interpolate" in (told := capsys.readouterr().err) and "--plan full" in told
    assert not (tmp_path / "head" / "wise-ft").exists()


def test_an_average_has_a_card_and_a_temperature(runs, tmp_path):
    done = wise_ft(runs[0], out=tmp_path / "wise")
    card = (done.path / "README.md").read_text(encoding="utf-8")
    alpha = max(row["alpha"] for row in done.rows if row["accuracy"] == done.score)
    assert f"with α = {alpha:g}, the best of 11" in card and "α was chosen on the validation images" in card
    assert f"value: {done.score:.6g}" in card and "by the plan `full`, from the file model.safetensors" in card
    assert "state it here before you share" in card
    model = open_model(done.path)
    logits = run_model(model, own_validation(runs[0])).logits
    assert model.temperature == pytest.approx(fit_temperature(logits, own_validation(runs[0]).labels))
    for greedy, told in ((True, "What was averaged was chosen"), (False, "mean of those of 2 of 2 runs")):
        made = soup(runs, tmp_path / "soup", greedy=greedy)
        card = (made.path / "README.md").read_text(encoding="utf-8")
        assert told in card and f"value: {made.score:.6g}" in card and open_model(made.path).temperature
    card = (soup_of_run(runs[0], greedy=False, out=tmp_path / "own").path / "README.md").read_text(encoding="utf-8")
    assert "states that one run had at its validations" in card and "leans" not in card


def test_a_card_names_the_repository_that_a_run_began_from(runs):
    model, run = open_model(runs[0]), json.loads((runs[0] / "config.json").read_text())
    assert average._about(model, runs)["origins"] is None
    run["config"]["weights"] = "hf:timm/x@1"
    assert average._origin(model, run) == "hf:timm/x@1"
    model = replace(model, model=make_model("resnet18", num_classes=3))
    assert average._origin(model, run | {"config": {"weights": None}}).startswith("hf:timm/resnet18.")
    assert average._origin(model, run | {"weights_sha256": None}) == ""


def test_a_soup_of_two_runs(runs, tmp_path, capsys):
    done = soup(runs, tmp_path / "soup", greedy=False)
    a, b, made = (open_model(w).params for w in (*runs, done.path))
    np.testing.assert_allclose(made["head/kernel"], (a["head/kernel"] + b["head/kernel"]) / 2, rtol=1e-5, atol=1e-7)
    assert cli.main(["average", *map(str, runs), "--out", str(tmp_path / "greedy"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["accuracy"] >= max(row["accuracy"] for row in told["rows"])


def test_a_soup_of_one_runs_validations(runs, capsys):
    """The last snapshot is the last state, and a uniform soup is their mean."""
    files = sorted((runs[0] / "snapshots").iterdir())
    lines = [json.loads(line) for line in (runs[0] / "metrics.jsonl").read_text().splitlines()]
    validated = [line for line in lines if "val_accuracy" in line]
    assert [int(f.stem) for f in files] == [line["step"] for line in validated] and len(files) >= 2
    done = soup_of_run(runs[0], greedy=False)
    assert [row["accuracy"] for row in done.rows] == [line["val_accuracy"] for line in validated]
    kernels = []
    for path in files:
        with open_weights(path) as file:
            kernels.append(np.array(file.read("block1/attn/qkv/kernel")))
    np.testing.assert_allclose(
        open_model(done.path).params["block1/attn/qkv/kernel"], np.mean(kernels, 0), rtol=1e-5, atol=1e-7
    )
    assert cli.main(["average", str(runs[0]), "--snapshots", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["accuracy"] >= max(row["accuracy"] for row in told["rows"])


def test_averages_go_where_out_says_and_only_over_models(runs, tmp_path, capsys):
    for words in (["--snapshots", "--uniform"], []):
        out = tmp_path / f"average{len(words)}"
        for _ in range(2):  # an older average gives way to a new one
            assert cli.main(["average", str(runs[0]), *words, "--out", str(out), "--json"]) == 0
            assert json.loads(capsys.readouterr().out)["path"] == str(out)
        assert (out / "average.json").is_file() and open_model(out).classes == open_model(runs[0]).classes
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "1.jpg").write_bytes(b"mine")
    for made in (wise_ft, soup_of_run, lambda w, out: soup(runs, out)):
        with pytest.raises(UserError, match=r"photos is there and is no model of jft"):
            made(runs[0], out=tmp_path / "photos")
    assert (tmp_path / "photos" / "1.jpg").read_bytes() == b"mine"
    with pytest.raises(SystemExit) as left:
        cli.main(["average", str(runs[0]), "--uniform"])
    assert left.value.code == 2 and "--uniform is of a soup" in capsys.readouterr().err


@pytest.mark.usefixtures("optax_promotion")
def test_models_of_several_labels_are_averaged_by_their_map():
    images = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    labels = np.array([[1, 0], [1, 1], [0, 1]] * 2, np.float32)
    made = make_model("tiny_vit", num_classes=2)
    params, stats = made.init(jax.random.key(0))
    params = {n: np.asarray(v) for n, v in params.items()}
    params["head/kernel"] = np.random.default_rng(1).normal(size=params["head/kernel"].shape).astype(np.float32)
    model = Bundle(made, params, stats, ("x", "y"), Preprocess((32, 32), crop_pct=1.0), multi_label=True)
    dataset = sources.arrays(images, labels, ["x", "y"])
    likely = probabilities(run_model(model, dataset).logits, several=True)
    expected = metrics.summary(likely, labels, ["x", "y"])
    assert average._figure(model) == "average_precision" and expected["average_precision"] != expected["accuracy"]
    assert average.Validation(model, dataset, None).score(model) == pytest.approx(expected["average_precision"])
    with pytest.raises(UserError, match="show none of the labels"):
        average.Validation(model, sources.arrays(images, np.zeros_like(labels), ["x", "y"]), None).score(model)


@pytest.mark.usefixtures("optax_promotion")
def test_runs_that_held_out_different_images_are_not_averaged(runs, folder, tmp_path):
    """Each was trained on what the other was validated on."""
    common = dict(data=str(folder), model="tiny_vit", weights="none", batch=8, epochs=1, augment=(), display="quiet")
    other = train(Config(**common, seed=1, workdir=str(tmp_path / "seed1"))).workdir
    with pytest.raises(UserError, match="held out different images"):
        soup([runs[0], other], tmp_path / "soup")


@pytest.mark.usefixtures("optax_promotion")
@pytest.mark.slow
def test_prompts_stay_between_source_and_tuned(folder, tmp_path):
    """WiSE-FT of visual prompts: the source has none, so at every α they are as they were tuned."""
    common = dict(data=str(folder), model="tiny_vit", batch=8, epochs=1, lr=1e-2, augment=(), display="quiet")
    source = train(Config(**common, weights="none", workdir=str(tmp_path / "source"))).workdir
    common |= dict(weights=str(source / "model/model.safetensors"), model_options={"prompts": 3})
    alone = train(Config(**common, plan="vpt", workdir=str(tmp_path / "alone"))).workdir
    with pytest.raises(UserError, match="nothing to interpolate"):
        wise_ft(alone)
    run = train(Config(**common, plan="full", workdir=str(tmp_path / "run"))).workdir
    done = wise_ft(run)
    tuned, made = open_model(run).params, open_model(done.path).params
    prompts = [n for n in tuned if "prompts" in n]
    assert prompts and all(np.array_equal(tuned[n], made[n]) for n in prompts)


def test_refused(runs, folder, tmp_path):
    shutil.rmtree(runs[1] / "snapshots")
    with pytest.raises(UserError, match="Train it with --snapshots"):
        soup_of_run(runs[1])
    with pytest.raises(UserError, match="from scratch"):
        wise_ft(runs[0].parent / "source")
    assert evaluate(runs[0])["count"] == 6
