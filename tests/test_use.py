"""Using models: real pretrained weights on real images answer as the reference does; every image counts once."""

import csv
import dataclasses
import errno
import inspect
import io
import json
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jft import bundle, table, use
from jft.build import read_data
from jft.config import Config
from jft.data import sources
from jft.errors import UserError
from jft.hyper import follow_weights
from jft.run import Result, contents, fingerprint
from jft.train import train
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


@pytest.mark.slow
def test_views_are_averaged_in_probability(model):
    images = pictures(3)
    dataset = sources.arrays(images, np.zeros(3, np.int32), ["a"])
    mirrored = sources.arrays(images[:, :, ::-1], np.zeros(3, np.int32), ["a"])
    p, q = (probabilities(run_model(model, d).logits) for d in (dataset, mirrored))
    both = probabilities(run_model(model, dataset, tta=("flip",)).logits)
    np.testing.assert_allclose(both, (p + q) / 2, rtol=1e-4, atol=1e-6)
    cut = dataclasses.replace(model, preprocess=dataclasses.replace(model.preprocess, crop_pct=0.875))
    assert run_model(cut, dataset, tta=("corners", "flip")).logits.shape == (3, 3)
    with pytest.raises(UserError, match="Did you mean flip"):
        run_model(model, dataset, tta=("flop",))


def test_views_are_checked_before_anything_is_decoded(model, monkeypatch):
    images = list(pictures(2))
    assert predict(model, images, tta=["none"]) == predict(model, images)
    assert (
        evaluate_dataset(model, sources.arrays(pictures(2), np.zeros(2, np.int32), ["a"]), tta=["none"])["count"] == 2
    )
    monkeypatch.setattr(use.pipeline, "decode_all", None)
    for given, told in ((["corners"], "leaves nothing: take --tta flip"), (["none", "flip"], "no view 'none'")):
        with pytest.raises(UserError, match=told):
            use.predict_rows(model, images, tta=given)


def test_classes_are_matched_by_name_not_by_place(model):
    one = evaluate_dataset(model, sources.arrays(pictures(6), np.array([0, 1, 2] * 2, np.int32), ["a", "b", "c"]))
    two = evaluate_dataset(model, sources.arrays(pictures(6), np.array([1, 0, 2] * 2, np.int32), ["b", "a", "c"]))
    assert one == two


def test_images_of_one_class_are_scored(model, tmp_path):
    for i, pixels in enumerate(pictures(4)):
        (tmp_path / "b").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "b" / f"{i}.png")
    of_b = (run_model(model, sources.unlabelled([tmp_path / "b"])[0]).logits.argmax(-1) == 1).mean()
    told = use.evaluate(model, str(tmp_path))
    assert (told["split"], told["count"], told["accuracy"]) == ("all", 4, of_b)


def test_classes_the_model_does_not_know_are_refused(model):
    with pytest.raises(UserError, match="does not know: dogs"):
        evaluate_dataset(model, sources.arrays(pictures(2), np.array([0, 1], np.int32), ["a", "dogs"]))


def test_the_model_decides_whether_an_image_has_several_labels(model):
    labels = np.arange(6, dtype=np.int32) % 3
    one = sources.arrays(pictures(6), labels, ["c", "a", "b"])
    several = dataclasses.replace(one, labels=np.eye(3, dtype=np.float32)[labels])
    sigmoids = dataclasses.replace(model, multi_label=True)
    scores = evaluate_dataset(sigmoids, one)
    assert scores == evaluate_dataset(sigmoids, several) and "balanced_accuracy" not in scores
    assert "balanced_accuracy" in evaluate_dataset(model, one)
    with pytest.raises(UserError, match="images of these data have several"):
        evaluate_dataset(model, several)


def test_a_model_of_several_labels_says_all_that_are_likely(model):
    for p, told in (([0.5, 0.1, 0.8], "a|c"), ([0.4, 0.1, 0.2], "")):
        assert use.row(np.array(p), "abc", several=True)["labels"] == told
    sigmoids, images = dataclasses.replace(model, multi_label=True), list(pictures(6))
    logits = run_model(model, sources.arrays(pictures(6), np.zeros(6, np.int32), ["a"])).logits
    likely = probabilities(logits, several=True)
    expected = ["|".join(c for c, v in zip("abc", p, strict=True) if v >= 0.5) for p in likely]
    assert any("|" in e for e in expected)
    out = io.StringIO()
    use.write_predictions([(out, "csv")], sigmoids, images, top_k=2)
    rows = list(csv.DictReader(out.getvalue().splitlines()))
    assert [r["labels"] for r in rows] == expected
    first = ["path", "class_index", "label", "probability"]
    assert list(rows[0]) == [*first, "labels", "label_2", "probability_2", "error"]
    assert list(predict(sigmoids, images)[0]) == [*first, "labels", "error"]
    assert list(predict(model, images)[0]) == [*first, "error"]


@pytest.mark.usefixtures("optax_promotion")
def test_a_run_on_several_labels_writes_all_that_are_likely(tmp_path):
    labels = np.array([[1, 0], [1, 1], [0, 0]] * 4, np.float32)
    w = train(Config(
        data=lambda: {n: sources.arrays(pictures(12), labels, ["x", "y"]) for n in ("train", "val")}, model="tiny_vit",
        weights="none", epochs=1, batch=8, augment=(), display="quiet", workdir=str(tmp_path / "w"),
    )).workdir  # fmt: skip
    rows = list(csv.DictReader((w / "predictions.csv").read_text(encoding="utf-8").splitlines()))
    first = ["path", "true_label", "class_index", "label", "probability", "labels"]
    assert list(rows[0]) == [*first, "p:x", "p:y", "error"] and len(rows) == 12
    with np.load(w / "predictions.npz") as found:
        expected = ["|".join(c for c, v in zip("xy", p, strict=True) if v >= 0.5) for p in found["probabilities"]]
    assert [r["labels"] for r in rows] == expected


def test_a_lists_columns_are_named_as_in_training_and_no_row_is_dropped(photos, tmp_path):
    listed = tmp_path / "list.csv"
    name = unicodedata.normalize("NFC", "é.png")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / name).write_bytes((photos / "0.png").read_bytes())
    rows = f"1, {name}\n\n2,sub\\{unicodedata.normalize('NFD', name)}\n3,gone.png\n"
    listed.write_text("\ufeffid, Path \n" + rows.replace(" ", ""), encoding="utf-8")
    assert use.pictures([listed])[0].names == tuple(str(tmp_path / n) for n in (name, f"sub/{name}", "gone.png"))
    listed.write_text("id,path\n1,a.png\n2,\n")
    with pytest.raises(UserError, match=r"list\.csv, line 3: the path is empty"):
        use.pictures([listed])
    listed.write_text("path\na,b.png\n")
    with pytest.raises(UserError, match=r"line 2: 2 values for 1 columns.*double quotes"):
        use.pictures([listed])


@pytest.fixture
def begun(tmp_path):
    """A folder of two classes, and a function that makes the folder of a run on it: its config.json, no more."""
    for name in ("cat", "dog"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i, pixels in enumerate(pictures(10)):
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{i}.png")

    def make(**fields):
        config = Config(data=str(tmp_path / "data"), val_fraction=0.2, seed=3, **fields)
        about = {
            "config": {"data": config.data, "seed": 3, "val_fraction": 0.2, "shots": config.shots},
            "data": config.data,
            "data_sha256": fingerprint(read_data(config)),
            "data_contents": contents(read_data(config)),
        }
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / "config.json").write_text(json.dumps(about))
        return tmp_path / "run"

    return tmp_path / "data", make


@pytest.mark.parametrize("shots", [None, 3])
def test_images_that_changed_since_a_run_are_not_its_own(begun, shots):
    data, make = begun
    run = make(shots=shots)
    before = use.own_validation(run).names
    assert len(before) == 4 and len(use.own_splits(run).train) == 16
    held = (data / before[0]).read_bytes()
    shutil.copy(data / before[1], data / before[0])  # under the same name
    with pytest.raises(UserError, match=r"data has changed since .*run was trained.*pass --data"):
        use.own_validation(run)
    (data / before[0]).write_bytes(held)
    assert use.own_validation(run).names == before
    for name in ("cat", "dog"):
        shutil.copy(data / name / "0.png", data / name / "00.png")
    assert set(sources.load(data, seed=3).val.names) - set(before)  # which had been for training
    for function in (use.own_validation, use.own_splits):
        with pytest.raises(UserError, match=r"data has changed since .*run was trained.*pass --data"):
            function(run)
    about = json.loads((run / "config.json").read_text())
    del about["data_sha256"], about["data_contents"]  # as before runs had them
    (run / "config.json").write_text(json.dumps(about))
    assert len(use.own_validation(run)) == 4


def test_a_home_is_found(model, photos, begun, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    begun[1]()
    bundle.save(
        tmp_path / "run" / "model", model_name="tiny_vit", model_options={"num_classes": 3, "image_size": [32, 32]},
        params=model.params, batch_stats=model.batch_stats, classes=model.classes, preprocess=model.preprocess,
    )  # fmt: skip
    assert use.open_model("~/run").classes == pretrained(None, "~/run").classes == model.classes
    assert use.open_model(Path("~/run")).classes == model.classes
    assert len(use.own_validation("~/run")) == 4
    (tmp_path / "list.csv").write_text(f"path\n{photos / '0.png'}\n")
    (told,) = predict("~/run", ["~/list.csv"])
    assert told["path"] == str(photos / "0.png") and not told["error"]
    use.write_predictions([("~/p.csv", None)], model, ["~/list.csv"])
    assert (tmp_path / "p.csv").is_file()


def test_a_run_that_may_not_be_read(begun, monkeypatch):
    run = begun[1]()

    def denied(path, *_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "exists", denied)
    monkeypatch.setattr(Path, "read_text", denied)
    for function in (use.open_model, use.own_splits, use.evaluate):
        with pytest.raises(UserError, match=r"cannot be read: Permission denied"):
            function(run)


def test_predict_takes_arrays_pictures_and_paths(model, tmp_path):
    array = pictures(1)[0]
    Image.fromarray(array).save(tmp_path / "x.png")
    rows = [predict(model, [form])[0] for form in (array, Image.fromarray(array), tmp_path / "x.png")]
    assert len({(r["label"], round(r["probability"], 6)) for r in rows}) == 1
    for alone in (Image.fromarray(array), tmp_path / "x.png", str(tmp_path / "x.png"), str(tmp_path)):
        assert [round(r["probability"], 6) for r in predict(model, alone)] == [round(rows[0]["probability"], 6)]
    assert [round(r["probability"], 6) for r in predict(model, np.stack([array]))] == [
        round(r["probability"], 6) for r in predict(model, array)
    ]
    with pytest.raises(UserError, match="not both"):
        predict(model, [array, tmp_path / "x.png"])
    with pytest.raises(UserError, match="not NoneType"):
        inspect.unwrap(use.predict_rows)(model, None)
    for wrong in ({"top_k": 0}, {"batch": 0}, {"unknown": 3}, {"unknown": float("nan")}):
        with pytest.raises(UserError, match="expected"):
            predict(model, [array], **wrong)


def test_a_runs_result_takes_pictures_one_by_one_in_a_list_or_as_a_batch(monkeypatch):
    monkeypatch.setattr(
        use, "predict", lambda where, images, **options: [{"path": image} | options for image in images]
    )
    result = Result(Path("run"), {})
    both = [{"path": "a.png"}, {"path": "b.png"}]
    assert result.predict("a.png", "b.png") == result.predict(["a.png", "b.png"]) == both
    assert result.predict("a.png") == both[:1]
    assert result.predict("a.png", top_k=2) == [{"path": "a.png", "top_k": 2}]
    assert [row["path"].shape for row in result.predict(np.zeros((3, 4, 5, 3), np.uint8))] == [(4, 5, 3)] * 3
    assert [row["path"].shape for row in result.predict(np.zeros((4, 5, 3), np.uint8))] == [(4, 5, 3)]


def test_a_few_images_take_no_whole_batch(model, monkeypatch):
    seen: list[int] = []
    batches = use.order.evaluation_batches
    monkeypatch.setattr(use.order, "evaluation_batches", lambda n, batch: seen.append(batch) or batches(n, batch))
    for count in (1, 3, 13, 0):
        assert len(run_model(model, sources.arrays(pictures(13), [0] * 13, ["a"]).select(range(count))).kept) == count
    monkeypatch.setattr(use, "CHUNK", 8)
    run_model(model, sources.arrays(pictures(13), [0] * 13, ["a"]), batch=1000)
    assert seen == [1, 4, 16, 8, 8]


@pytest.mark.parametrize("glob", ["**", "**/*", "*"])
def test_a_glob_names_each_picture_once(photos, glob):
    names, _ = use.pictures([str(photos / glob)])
    found = [Path(n).name for n in names.names if not n.endswith("note.txt")]  # which all but the first name itself
    assert sorted(found) == sorted(["4.jpg", *(f"{i}.png" for i in range(10))])


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Ten pictures, two of them in a folder of their own, a file that is none, and a note beside them."""
    root = tmp_path_factory.mktemp("photos")
    (root / "more").mkdir()
    for i, pixels in enumerate(pictures(10)):
        Image.fromarray(pixels).save(root / ("more" if i > 7 else "") / f"{i}.png")
    (root / "4.jpg").write_text("no image")
    (root / "note.txt").write_text("nor this")
    return root


def test_pieces_give_what_the_whole_gives(model, photos, monkeypatch):
    whole = predict(model, [photos], top_k=2)
    seen: list[tuple] = []
    monkeypatch.setattr(use, "CHUNK", 3)
    rows = use.predict_rows(model, [photos], top_k=2, batch=2, features=lambda names, x: seen.append((names, x)))
    first = next(rows)
    assert len(seen) == 1  # what is done is handed on before the rest is decoded
    pieces = [first, *rows]
    assert [r["path"] for r in pieces] == [r["path"] for r in whole] and len(pieces) == 12
    assert [r["label"] for r in pieces] == [r["label"] for r in whole]
    wrong = [Path(r["path"]).name for r in pieces if r["error"]]
    assert wrong == ["4.jpg", "note.txt"]
    names, x = [n for names, _ in seen for n in names], np.concatenate([x for _, x in seen])
    assert names == [r["path"] for r in pieces if not r["error"]]
    logits = run_model(model, sources.unlabelled([photos])[0]).logits
    head = {n: np.asarray(model.params[f"head/{n}"]) for n in ("kernel", "bias")}
    np.testing.assert_allclose(x @ head["kernel"] + head["bias"], logits, rtol=1e-4, atol=1e-4)


def test_pictures_come_from_everywhere(model, photos, tmp_path):
    table = tmp_path / "list.csv"
    table.write_text(f"id,path\n1,{photos / '1.png'}\n2,gone.png\n")
    names, excluded = use.pictures(
        [photos / "0.png", table, str(photos / "**" / "[89].png"), "-"], stdin=io.BytesIO(b"a.png\n\nb.png\r\n")
    )
    assert [Path(n).name for n in names.names] == ["0.png", "1.png", "gone.png", "8.png", "9.png", "a.png", "b.png"]
    assert Path(names.names[2]).parent == tmp_path and not excluded  # from the CSV's own folder
    zeros = use.pictures(["-"], stdin=io.BytesIO(b"a b.png\0c\nd.png\0"))[0]
    assert zeros.names == ("a b.png", "c\\nd.png")  # control characters stand as escapes
    with pytest.raises(UserError, match="Nothing matches"):
        use.pictures([str(photos / "*.tiff")])
    with pytest.raises(UserError, match="no file"):
        use.pictures([photos / "none.png"])
    (tmp_path / "empty" / "below").mkdir(parents=True)
    with pytest.raises(UserError, match=r"no image in .*empty"):
        use.pictures([photos / "0.png", tmp_path / "empty"])
    out = io.StringIO()
    with pytest.raises(UserError, match=r"no image in .*empty"):
        use.write_predictions([(out, "csv")], model, [tmp_path / "empty"])
    assert out.getvalue() == ""  # not even a header
    table.write_text("file\nx\n")
    with pytest.raises(UserError, match="the columns file; a column path"):
        use.pictures([table])


def test_a_file_that_a_list_names_and_that_is_gone_keeps_its_row(model, photos, monkeypatch):
    given = f"{photos / '0.png'}\n{photos / 'gone.png'}\n{photos / '1.png'}\n"
    monkeypatch.setattr(use.sys, "stdin", io.TextIOWrapper(io.BytesIO(given.encode())))
    rows = predict(model, ["-"])
    assert [bool(r["error"]) for r in rows] == [False, True, False] and "No such file" in rows[1]["error"]


def test_temperature_and_the_unknown(model, photos):
    logits = run_model(model, sources.unlabelled([photos / "0.png"])[0]).logits
    warm = dataclasses.replace(model, temperature=2.5)
    for given, t in ((None, 1.0), ("4", 4.0), ("fitted", 2.5)):
        (told,) = predict(warm, [photos / "0.png"], temperature=given, probability_of_each=True)
        p = probabilities(logits / np.float32(t))[0]
        assert told["probability"] == pytest.approx(float(p.max()), rel=1e-4)
        assert [told[f"p:{c}"] for c in "abc"] == pytest.approx(p.tolist(), rel=1e-3)
    (told,) = predict(warm, [photos / "0.png"], temperature=1e6, unknown=0.5)
    assert (told["label"], told["class_index"]) == ("unknown", -1) and told["probability"] == pytest.approx(
        1 / 3, rel=1e-3
    )
    with pytest.raises(UserError, match="no fitted temperature"):
        predict(model, [photos / "0.png"], temperature="fitted")
    for bad in ("0", "warm", -1.0, "nan"):
        with pytest.raises(UserError, match="above 0"):
            predict(model, [photos / "0.png"], temperature=bad)


def test_the_fitted_temperature_is_the_one_of_least_loss():
    rng = np.random.default_rng(0)
    true = rng.normal(size=(4000, 5)) * 2
    noisy = true + rng.gumbel(size=true.shape)  # whose largest is a class drawn by the softmax
    labels = noisy.argmax(axis=1)
    assert use.fit_temperature(3 * true, labels) == pytest.approx(3, rel=0.1)
    several = (rng.random(true.shape) < 1 / (1 + np.exp(-true))).astype(np.float32)
    assert use.fit_temperature(0.5 * true, several) == pytest.approx(0.5, rel=0.1)


COLUMNS = {"path": str, "class_index": int, "label": str, "probability": float, "error": str}
ROWS = [
    {"path": 'ä,"b".png', "class_index": 1, "label": "x", "probability": 0.25, "error": ""},
    {"path": "bad.png", "class_index": "", "label": "", "probability": "", "error": "cannot be read"},
]


def test_rows_are_written_as_csv_json_lines_and_parquet(tmp_path, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(table, "GROUP", 1)
    for name in ("a.csv", "a.jsonl", "a.parquet"):
        with table.rows_to(tmp_path / name, COLUMNS) as write:
            write(ROWS[:1])
            assert not (tmp_path / name).exists()
            write(ROWS[1:])
    read = list(csv.DictReader((tmp_path / "a.csv").read_text(encoding="utf-8").splitlines()))
    assert [r["path"] for r in read] == [r["path"] for r in ROWS] and read[0]["probability"] == "0.25"
    assert [json.loads(line) for line in (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()] == ROWS
    told = parquet.read_table(tmp_path / "a.parquet").to_pylist()
    assert told[0] == ROWS[0] and told[1]["class_index"] is None and told[1]["error"] == "cannot be read"
    with pytest.raises(UserError, match="no folder"), table.rows_to(tmp_path / "none" / "a.csv", COLUMNS):
        pass
    with pytest.raises(KeyboardInterrupt), table.rows_to(tmp_path / "b.csv", COLUMNS) as write:
        raise KeyboardInterrupt
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.csv", "a.jsonl", "a.parquet"]


def test_features_are_written_as_npz_and_parquet(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    x = np.random.default_rng(0).random((5, 3), np.float32)
    names = [f"grün {i}.png" for i in range(5)]
    for name in ("f.npz", "f.parquet"):
        with table.features_to(tmp_path / name) as write:
            write(names[:2], x[:2])
            write(names[2:], x[2:])
    with np.load(tmp_path / "f.npz") as found:
        assert found["paths"].tolist() == names
        np.testing.assert_array_equal(found["features"], x)
    told = parquet.read_table(tmp_path / "f.parquet").to_pydict()
    assert told["path"] == names
    np.testing.assert_array_equal(np.array(told["features"], np.float32), x)
    with pytest.raises(UserError, match=r"\.npz or \.parquet"), table.features_to(tmp_path / "f.csv"):
        pass


def test_a_bundle_needs_no_name_beside_it(model, photos, tmp_path):
    bundle.save(
        tmp_path / "run" / "model", model_name="tiny_vit", model_options={"num_classes": 3, "image_size": [32, 32]},
        params=model.params, batch_stats=model.batch_stats, classes=model.classes, preprocess=model.preprocess,
        temperature=1.5,
    )  # fmt: skip
    for where in (tmp_path / "run", tmp_path / "run" / "model", tmp_path / "run" / "model" / "model.safetensors"):
        found = pretrained(None, str(where))
        assert (found.classes, found.temperature) == (model.classes, 1.5)
    assert predict(found, [photos / "0.png"]) == predict(model, [photos / "0.png"])
    named = Config(weights=str(tmp_path / "run"))
    assert follow_weights(named).model == "tiny_vit" and follow_weights(named).weights.endswith("model")
    other = follow_weights(named.replace(model="resnet18"))
    assert other.model == "resnet18" and other.weights.endswith("model")  # and not another file of the run's folder
    assert follow_weights(Config(weights="none")) == Config(weights="none")
    np.savez(tmp_path / "other.npz", x=np.zeros(1))
    with pytest.raises(UserError, match="--model must say"):
        pretrained(None, str(tmp_path / "other.npz"))
