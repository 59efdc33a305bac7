"""Regression: numbers are read, learned in units of their own spread, scored, predicted and told in their own units."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error

from jft import average, bundle, compare, convert, metrics, train, use
from jft.build import Scale
from jft.cli import main
from jft.config import Config
from jft.data import sources
from jft.data.check import check as check_data
from jft.errors import UserError
from jft.models import make_model
from jft.report.html import make_report
from jft.report.several import make_comparison
from jft.step import State
from jft.sweep import sweep
from jft.weights import open_weights

pytestmark = pytest.mark.usefixtures("optax_promotion")
NAMES = ("lightness", "grün − rot")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """40 pictures of one colour with noise, and two numbers of each that can be seen, in units far from one."""
    root = tmp_path_factory.mktemp("numbers")
    rng = np.random.default_rng(0)
    rows = []
    for i in range(40):
        colour = rng.integers(20, 220, 3)
        pixels = np.clip(colour + rng.integers(-15, 15, (36, 40, 3)), 0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(root / f"{i}.png")
        rows.append((f"{i}.png", 1e6 + 1e3 * float(colour.mean()), float(colour[1] - colour[0]) / 1e4))
    (root / "broken.png").write_text("no picture")
    rows.append(("broken.png", 1.0, 2.0))
    with open(root / "numbers.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("path", *(f"Value:{n}" for n in NAMES)), *rows])
    with open(root / "one.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("path", "value"), *(row[:2] for row in rows)])
    return root


def config(file, workdir, **changes) -> Config:
    base = Config(
        data=str(file), model="tiny_vit", weights="none", plan="full", epochs=30, batch=8, lr=3e-3, augment=(),
        eval_every=5, workdir=str(workdir), display="quiet",
    )  # fmt: skip
    return base.replace(**changes)


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    with jax.numpy_dtype_promotion("standard"):
        return train.train(config(data / "numbers.csv", tmp_path_factory.mktemp("finished") / "run", snapshots=True))


def rows_of(file) -> list[dict[str, str]]:
    with open(file, newline="", encoding="utf-8") as text:
        return list(csv.DictReader(text))


def test_numbers_of_a_csv_are_read_as_they_stand(data):
    splits = sources.load(data / "numbers.csv")
    assert splits.classes == NAMES and splits.train.quantities and not splits.train.several
    assert (len(splits.train), len(splits.val)) == (33, 8) and splits.train.labels.dtype == np.float64
    rows = {r["path"]: [float(r[f"Value:{n}"]) for n in NAMES] for r in rows_of(data / "numbers.csv")}
    for name, label in zip(splits.val.names, splits.val.labels, strict=True):
        assert rows[name] == label.tolist()
    assert sources.load(data / "one.csv").classes == ("value",)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("path,value\n0.png,3\n1.png,much\n", r"line 3: the value is 'much'; a number is expected"),
        ("path,value:age\n0.png,nan\n", r"line 2: the age is 'nan'"),
        ("path,value\n0.png,1e999\n", r"line 2: the value is '1e999'"),
        ("path,value,label\n0.png,3,cat\n", r"not both: give one of them another name"),
        ("path,value\n0.png,3\n0.png,4\n", r"listed before with another value or split"),
        ("path,value,split\n0.png,3,val\n", r"no training images"),
        ("path,value:a,value:a\n0.png,3,4\n1.png,3,4\n", r"the column 'value:a' twice"),
        ("path,value\n0.png,3\n1.png,3\n2.png,3\n", r"have value = 3: there is nothing to learn"),
    ],
)
def test_numbers_that_cannot_be_used_are_told(data, tmp_path, text, told):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes((data / f"{i}.png").read_bytes())
    (tmp_path / "bad.csv").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=told):
        train.train(config(tmp_path / "bad.csv", tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_floating_point_labels_of_arrays_are_quantities():
    pixels = np.zeros((4, 8, 8), np.uint8)
    assert sources.arrays(pixels, [0.5, 1, 2, 3]).labels.tolist() == [[0.5], [1], [2], [3]]
    two = sources.arrays(pixels, np.arange(8.0).reshape(4, 2), ["a", "b"])
    assert two.quantities and two.classes == ("a", "b")
    assert sources.arrays(pixels, np.eye(4)).several and not sources.arrays(pixels, [0, 1, 2, 3]).quantities
    splits = sources.load({"train": (pixels, np.arange(4.0)), "val": (pixels, np.ones(4))})
    assert splits.train.quantities and splits.val.quantities and splits.classes == ("value",)
    with pytest.raises(UserError, match="image 2 is no finite number"):
        sources.arrays(pixels, [0.5, 1, np.nan, 3])


def test_figures_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    y, said = rng.normal(5, 3, (50, 2)), rng.normal(5, 3, (50, 2))
    one = metrics.quantities(said[:, :1], y[:, :1], ["a"])
    assert one["r2"] == pytest.approx(r2_score(y[:, 0], said[:, 0]))
    assert one["mae"] == pytest.approx(mean_absolute_error(y[:, 0], said[:, 0]))
    assert one["rmse"] == pytest.approx(root_mean_squared_error(y[:, 0], said[:, 0]))
    two = metrics.quantities(said, y, ["a", "b"])
    assert two["r2"] == pytest.approx(r2_score(y, said)) and two["each"]["a"]["r2"] == pytest.approx(one["r2"])
    same = np.ones((3, 1))
    assert metrics.quantities(same, same, ["a"])["r2"] == 1 == r2_score(same, same)
    assert metrics.quantities(2 * same, same, ["a"])["r2"] == 0 == r2_score(same, 2 * same)
    with pytest.raises(UserError, match="not finite for 1 of 3"):
        metrics.quantities(np.array([[np.nan], [1], [2]]), same, ["a"])
    assert metrics.furthest(np.array([[1, 0], [0, 0], [0, 9.0]]), np.array([[0, 0], [1, 5], [2, 10.0]]))[0] == 2
    low, high = metrics.bootstrap_mean(y[:, 0])
    assert low < y[:, 0].mean() < high and high - low == pytest.approx(4 * y[:, 0].std() / 50**0.5, rel=0.1)


@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.slow
def test_a_head_that_holds_the_scale_says_the_values(distilled):
    model = make_model("tiny_vit", num_classes=2, distilled=distilled)
    params, stats = model.init(jax.random.key(0))
    drawn = {n: jax.random.normal(jax.random.key(i), v.shape) for i, (n, v) in enumerate(params.items())}
    params = {n: drawn[n] if n.startswith("head/") else v for n, v in params.items()}
    x = jax.numpy.asarray(np.random.default_rng(0).random((3, *model.input_shape), np.float32))
    labels = np.array([[1e6, 2e-4], [3e6, 2e-4], [5e6, 9e-4]])
    scale = Scale.of(labels)
    inside = np.asarray(model.apply(params, stats, x)[0])
    outside = np.asarray(model.apply(jax.device_put(scale.into_head(params)), stats, x)[0])
    np.testing.assert_allclose(outside, scale.values(inside), rtol=2e-5)
    units = scale.units(labels)
    np.testing.assert_allclose((units.mean(0), units.std(0)), ([0, 0], [1, 1]), atol=1e-6)
    np.testing.assert_allclose(scale.values(units), labels, rtol=1e-6)


def test_a_snapshot_of_a_heads_bias_alone_holds_the_scale(tmp_path):
    """It stands beside the run's kernel, which does."""
    scale = Scale.of(np.array([[10.0], [14.0]]))
    params = {"head/kernel": np.ones((4, 1), np.float32), "head/bias": np.ones(1, np.float32)}
    run = SimpleNamespace(
        _touched=lambda leg: ({"head/bias"}, set()), legs=[None], step=7, workdir=tmp_path,
        data={"val": SimpleNamespace(scale=scale)},
    )  # fmt: skip
    train.Run._snapshot(run, State(step=7, params=params, batch_stats={}, opt_state=(), key=None))
    with open_weights(tmp_path / "snapshots" / "00000007.safetensors") as file:
        assert list(file.names) == ["head/bias"] and file.read("head/bias") == [14.0]


def test_quantities_that_are_all_equal_have_no_scale():
    """The mean of three 0.1 is an ulp off, and their standard deviation is 1e-17."""
    assert Scale.of(np.array([[0.1, 1.0], [0.1, 2.0], [0.1, 3.0]])).std[0] == 1.0


def test_a_run_learns_numbers_and_says_them_everywhere(finished, data, capsys):
    w, result = finished.workdir, finished.result
    val = result["val"]
    assert result["quantities"] and val["r2"] > 0.5 and set(val["each"]) == set(NAMES) and "accuracy" not in val
    assert result["train"]["mean"][0] == pytest.approx(1e6 + 1e3 * 120, rel=0.05)
    assert [e["path"] for e in result["excluded"]] == ["broken.png"]
    log = [json.loads(line) for line in (w / "metrics.jsonl").read_text().splitlines()]
    assert max(r["val_r2"] for r in log if "val_r2" in r) >= val["r2"] and not any("accuracy" in r for r in log)
    assert result["val"]["loss"] == min(r["val_loss"] for r in log if "val_loss" in r)
    told = rows_of(w / "predictions.csv")
    kinds = [f"{kind}:{n}" for kind in ("true_value", "value") for n in NAMES]
    assert list(told[0]) == ["path", *kinds, "error"] and len(told) == val["count"] == 8
    said = use.predict(w, [data / r["path"] for r in told])
    for row, expected in zip(said, told, strict=True):
        assert [row[f"value:{n}"] for n in NAMES] == pytest.approx(
            [float(expected[f"value:{n}"]) for n in NAMES], rel=1e-4, abs=1e-6
        )
    again = use.evaluate(w)
    assert again["r2"] == pytest.approx(val["r2"], abs=1e-4) and again["count"] == 8
    out = w / "out.csv"
    assert main(["predict", str(w), str(data / "0.png"), str(data / "broken.png"), "--out", str(out)]) == 0
    good, bad = rows_of(out)
    assert float(good["value:lightness"]) > 9e5 and bad["value:lightness"] == "" and "not an image" in bad["error"]
    assert main(["predict", str(w), str(data / "0.png"), "--top-k", "2"]) == 2
    assert "predicts numbers" in capsys.readouterr().err
    page = (w / "report.html").read_text()
    assert "Validation R²" in page and "grün − rot" in page and "Largest errors" in page and "Calibration" not in page
    card = (w / "model/README.md").read_text()
    assert "Predicts 2 numbers from a picture" in card and "## Quantities" in card and "image-regression" in card


@pytest.mark.slow
def test_units_are_no_matter(finished, data, tmp_path):
    """The same numbers in other units give the same run, but for the rounding of what is told in them."""
    rows = rows_of(data / "numbers.csv")
    for row in rows:
        row["Value:lightness"] = str((float(row["Value:lightness"]) - 1e6) / 256)
    with open(data / "other.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    other = train.train(config(data / "other.csv", tmp_path / "run")).result
    assert other["val"]["r2"] == pytest.approx(finished.result["val"]["r2"], rel=1e-3)
    mine, theirs = (r["val"]["each"]["lightness"]["mae"] for r in (finished.result, other))
    assert theirs * 256 == pytest.approx(mine, rel=1e-3)


@pytest.mark.slow
def test_averages_and_comparisons_go_by_r2(finished, data, tmp_path):
    soup = average.soup_of_run(finished.workdir)
    assert soup.figure == "r2" and soup.score >= max(r["r2"] for r in soup.rows) - 1e-9
    assert max(r["r2"] for r in soup.rows) == pytest.approx(
        max(
            json.loads(line).get("val_r2", -1) for line in (finished.workdir / "metrics.jsonl").read_text().splitlines()
        ),
        abs=1e-4,
    )
    assert bundle.load(soup.path).quantities
    several = compare.compare(
        {
            n: config(data / "one.csv", tmp_path / "both", plan="head", lr=lr, epochs=2, seeds=2)
            for n, lr in (("low", 1e-3), ("high", 1e-2))
        }
    )
    assert {"r2", "std"} <= set(several.rows[0]) and "±" in compare.shown(several.rows[0])
    page = (tmp_path / "both/report.html").read_text()
    assert "validation R²" in page and "mean absolute error" in page and "log loss" not in page
    with pytest.raises(UserError, match="nothing to compare"):
        classes = {"train": (np.zeros((4, 8, 8), np.uint8), [0, 1] * 2), "val": (np.zeros((2, 8, 8), np.uint8), [0, 1])}
        train.train(config(data, tmp_path / "classes").replace(data=classes, plan="head", epochs=1))
        make_comparison([finished.workdir, tmp_path / "classes"])


@pytest.mark.slow
def test_a_sweep_seeks_the_best_r2(data, tmp_path):
    found = sweep(config(data / "one.csv", tmp_path / "sweep", plan="head", epochs=2), {"lr": [1e-5, 1e-2]})
    assert found.best["r2"] == max(r["r2"] for r in found.rows) and "accuracy" not in found.best
    assert "R²" in (tmp_path / "sweep/sweep.html").read_text()


@pytest.mark.slow
def test_a_kept_head_goes_on_in_the_values_own_units(finished, data, tmp_path):
    more = train.train(
        config(
            data / "numbers.csv", tmp_path / "more", weights=str(finished.workdir), keep_head=True, lr=1e-9, epochs=1
        )
    )
    assert more.result["val"]["r2"] == pytest.approx(finished.result["val"]["r2"], abs=1e-3)


def test_exports_say_what_they_hold(finished, tmp_path):
    done = convert.export_model(finished.workdir, "hf", tmp_path / "hf")
    assert json.loads((tmp_path / "hf/config.json").read_text())["problem_type"] == "regression"
    assert "logits[0].tolist()" in done.code[-1]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"shots": 2}, "--shots draws images by class; these data have quantities"),
        ({"balance": True}, "--balance draws images by class; these data have quantities"),
        ({"class_weights": "inverse"}, "--class-weights is about classes"),
        ({"label_smoothing": 0.1}, "--label-smoothing is about classes"),
    ],
)
def test_what_is_about_classes_is_refused(data, tmp_path, changes, told):
    with pytest.raises(UserError, match=told):
        train.train(config(data / "one.csv", tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_numbers_and_classes_are_not_confused(finished, data, folder):
    with pytest.raises(UserError, match="predicts numbers, and the labels of the data are classes"):
        use.evaluate(finished.workdir, folder)
    with pytest.raises(UserError, match="quantities that the model does not know: value"):
        use.evaluate(finished.workdir, data / "one.csv")


def test_the_data_are_checked_as_others_are(data):
    report = check_data(sources.load(data / "one.csv"))
    assert [f.names for f in report.findings if f.kind == "unusable"] == [("broken.png",)]


def test_a_report_of_what_there_is(finished, tmp_path):
    """Of a run that was stopped: what is not there yet is left out."""
    for name in ("config.json", "metrics.jsonl"):
        (tmp_path / name).write_bytes((finished.workdir / name).read_bytes())
    assert "R²" in make_report(tmp_path).read_text()
