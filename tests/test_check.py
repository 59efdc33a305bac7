"""The check of a data set finds what it should and nothing else; training goes on past everything that is no image."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import bad_pictures
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter

from jft import cli
from jft.data import check, pipeline, sources
from jft.errors import UserError
from jft.preprocess import Preprocess
from jft.report import sheet


def scene(seed: int, size: tuple[int, int] = (120, 90)) -> Image.Image:
    """Something like a photograph: soft shapes of several colours."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", size, tuple(int(c) for c in rng.integers(40, 200, 3)))
    pen = ImageDraw.Draw(image)
    for _ in range(25):
        x, y, r = int(rng.integers(size[0])), int(rng.integers(size[1])), int(rng.integers(5, 30))
        pen.ellipse((x - r, y - r, x + r, y + r), tuple(int(c) for c in rng.integers(0, 255, 3)))
    return image.filter(ImageFilter.GaussianBlur(1.5))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Ten pictures of each of two classes in train and val, and one of everything that is suspicious."""
    root = tmp_path_factory.mktemp("suspicious") / "data"
    for s, split in enumerate(("train", "val")):
        for c, name in enumerate(("ants", "bees")):
            (root / split / name).mkdir(parents=True)
            for i in range(10):
                scene(1000 * s + 100 * c + i).save(root / split / name / f"{i}.jpg", quality=90)
    shutil.copy(root / "train/ants/0.jpg", root / "val/ants/leak.jpg")
    shutil.copy(root / "train/ants/1.jpg", root / "train/bees/conflict.jpg")
    shutil.copy(root / "train/ants/2.jpg", root / "train/ants/twice.jpg")
    scene(3).resize((60, 45)).save(root / "val/ants/smaller.jpg", quality=60)
    ImageEnhance.Brightness(scene(4)).enhance(1.08).save(root / "train/bees/brighter.png")
    scene(5).crop((1, 1, 119, 89)).save(root / "train/ants/cropped.webp")
    placeholder = Image.new("RGB", (200, 150), "white")
    ImageDraw.Draw(placeholder).text((60, 70), "not found", "grey")
    placeholder.save(root / "train/bees/placeholder.gif")
    Image.new("RGB", (50, 40), "red").save(root / "train/bees/red.png")
    scene(6, (400, 20)).save(root / "train/bees/strip.png")
    (root / "train/bees/cut.jpg").write_bytes((root / "train/bees/7.jpg").read_bytes()[:700])
    (root / "train/bees/8.jpg").rename(root / "train/bees/8.png")
    shutil.copy(root / "val/bees/9.jpg", root.parent / "elsewhere.jpg")
    (root / "val/bees/9.jpg").unlink()
    (root / "val/bees/9.jpg").symlink_to("../../../elsewhere.jpg")
    return root


def found(findings) -> dict[str, list[tuple[str, ...]]]:
    told: dict[str, list[tuple[str, ...]]] = {}
    for finding in findings:
        told.setdefault(finding.kind, []).append(finding.names)
    return told


@pytest.fixture(scope="module")
def report(data) -> check.Report:
    return check.check(sources.load(data), str(data))


def test_everything_suspicious_is_found_and_nothing_else(report):
    assert found(report.findings) == {
        "unusable": [("train/bees/cut.jpg",)],
        "leak": [("val/ants/leak.jpg", "train/ants/0.jpg")],
        "conflict": [("train/ants/1.jpg", "train/bees/conflict.jpg")],
        "duplicate": [("train/ants/2.jpg", "train/ants/twice.jpg")],
        "near leak": [("val/ants/smaller.jpg", "train/ants/3.jpg")],
        "near conflict": [("train/ants/4.jpg", "train/bees/brighter.png")],
        "near duplicate": [("train/ants/5.jpg", "train/ants/cropped.webp")],
        "empty": [("train/bees/placeholder.gif",), ("train/bees/red.png",)],
        "size": [("train/bees/strip.png",)],
        "link": [("val/bees/9.jpg",)],
        "format": [("train/bees/8.png",)],
        "odd": [("train/bees/placeholder.gif",)],
    }
    assert report.counts == {"train": {"ants": 12, "bees": 15}, "val": {"ants": 12, "bees": 10}}
    details = {f.kind: f.detail for f in report.findings}
    assert details["near leak"] == "in train and val" and details["conflict"] == "labelled ants and bees"
    assert details["format"] == "is JPEG, named as PNG" and details["size"] == "a strip, 400×20 pixels"


def test_a_start_tells_what_costs_nothing(data):
    told = found(check.at_start(sources.load(data)))
    assert told == {
        "leak": [("val/ants/leak.jpg", "train/ants/0.jpg")],
        "conflict": [("train/ants/1.jpg", "train/bees/conflict.jpg")],
        "link": [("val/bees/9.jpg",)],
        "format": [("train/bees/8.png",)],
    }
    lines = check.summary(check.at_start(sources.load(data)))
    assert len(lines) == 4 and "several splits" in lines[0] and lines[0].endswith("in train and val.")


def test_classes_that_are_few_or_uneven(tmp_path):
    for name, count in {"many": 60, "some": 4, "single": 1}.items():
        (tmp_path / name).mkdir()
        for i in range(count):
            bad_pictures.picture(i + 100 * count, size=(20, 20)).save(tmp_path / name / f"{i}.png")
    details = [f.detail for f in check.at_start(sources.load(tmp_path, val_fraction=0)) if f.kind == "class"]
    assert any("imbalanced: 60 of many, 1 of single" in d for d in details)
    assert any("one image of 'single'" in d for d in details)
    assert any("fewer than 5 images of 'some'" in d for d in details)
    assert not any("several ways" in d for d in details)
    bad_pictures.picture(5, size=(20, 20)).save(tmp_path / "single" / "1.png")
    (tmp_path / "single").rename(tmp_path / "Some_")
    details = [f.detail for f in check.at_start(sources.load(tmp_path, val_fraction=0)) if f.kind == "class"]
    assert any("'Some_', 'some' are 2 classes: is it one, written in several ways?" in d for d in details)


def test_what_most_pictures_are_is_no_fault(tmp_path):
    """Digits on black are nearly one colour, all of them."""
    for c in "ab":
        (tmp_path / c).mkdir()
        for i in range(10):
            image = Image.new("L", (28, 28))
            ImageDraw.Draw(image).line((5 + i, 4, 14 + i % 3, 24), 255, 1)
            image.save(tmp_path / c / f"{c}{i}.png")
    report = check.check(sources.load(tmp_path, val_fraction=0))
    assert "empty" not in found(report.findings) and any("so these data are" in f.detail for f in report.findings)


def test_arrays_are_looked_at_too():
    images = np.stack([np.asarray(scene(i)) for i in range(6)] + [np.asarray(scene(0))])
    report = check.check(sources.load(sources.arrays(images, list("aabbaab")), val_fraction=0))
    assert found(report.findings) == {"conflict": [("0", "6")], "class": [()]}


def test_what_is_too_thin_to_be_resized_is_told_as_training_does(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        scene(ord(name)).save(tmp_path / name / "0.png")
    Image.new("L", (1, 3000)).save(tmp_path / "a" / "thin.png")
    splits = sources.load(tmp_path, val_fraction=0)
    (told,) = (f for f in check.check(splits).findings if f.kind == "unusable")
    assert pipeline.readable(splits.train, Preprocess())[1] == [(*told.names, told.detail)]
    assert told.detail.startswith("256 x 768000 pixels (what 1 x 3000 are resized to) exceed the limit")


def test_a_name_that_looks_like_a_comment_is_listed_so_that_it_is_none(tmp_path):
    for name in ("# a", "b"):
        (tmp_path / name).mkdir()
        scene(len(name)).save(tmp_path / name / "0.png")
    shutil.copy(tmp_path / "# a/0.png", tmp_path / "# a/1.png")
    report = check.check(sources.load(tmp_path, val_fraction=0))
    (tmp_path / "quarantine.txt").write_text(check.quarantine(report))
    assert [name for name, _ in sources.load(tmp_path, val_fraction=0).excluded] == ["# a/1.png"]


def test_the_list_to_leave_out_is_one_that_training_takes(data, report, tmp_path):
    text = check.quarantine(report)
    copy = tmp_path / "data"
    shutil.copytree(data, copy, symlinks=True)
    (copy / "quarantine.txt").write_text(text)
    splits = sources.load(copy)
    out = {name for name, reason in splits.excluded if "quarantine" in reason}
    assert out == {
        "train/ants/0.jpg", "train/ants/twice.jpg", "train/bees/placeholder.gif", "train/bees/red.png",
    }  # fmt: skip
    assert splits.unknown == () and "# train/bees/conflict.jpg\tconflict: labelled ants and bees\n" in text
    again = found(check.check(splits, str(copy)).findings)
    assert len(again["quarantined"]) == 4 and not {"leak", "duplicate", "empty"} & again.keys()


def test_the_sheet_shows_them(data, report, tmp_path):
    image = sheet.draw(report, sources.load(data))
    assert image.width == 1248 and 1000 < image.height < 4000
    pixels = np.asarray(image.resize((image.width // 4, image.height // 4)))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 1000
    path = sheet.write_sheet(tmp_path / "sheet.png", report, sources.load(data))
    with Image.open(path) as drawn:
        assert drawn.size == image.size and list(tmp_path.iterdir()) == [path]
    nothing = check.Report("x", 0, {}, (), ())
    assert sheet.draw(nothing, sources.load(data)).height < 200


def test_the_command(data, tmp_path, capsys, monkeypatch):
    before = {p: p.read_bytes() for p in data.rglob("*") if p.is_file()}
    assert cli.main(["data", "check", str(data), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["found"]["leak"] == 1 and told["images"] == 50 and told["usable"] == 49
    assert cli.main(["data", "check", str(data), "--out", str(tmp_path / "look")]) == 0
    shown = capsys.readouterr().out
    assert "The same picture in several splits: scores will be too good (1)" in shown and "train 27, val 22" in shown
    written = {p.name for p in (tmp_path / "look").iterdir()}
    assert written == {"report.txt", "report.json", "sheet.png", "quarantine.txt"}
    assert {p: p.read_bytes() for p in data.rglob("*") if p.is_file()} == before
    assert cli.main(["data", "check", str(data), "--out", str(data / "look")]) == 2
    assert "lies in the data" in capsys.readouterr().err and not (data / "look").exists()
    assert cli.main(["data", "check", str(tmp_path / "none")]) == 2


def test_a_check_needs_no_jax(data):
    code = "import sys; from jft.cli import main; main(['data', 'check', sys.argv[1]]); sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code, str(data)], capture_output=True).returncode == 0


def test_a_list_beside_a_csv_is_not_written_over(data, tmp_path):
    (tmp_path / "index.csv").write_text("path,label\n")
    with pytest.raises(UserError, match="takes effect"):
        check.write(check.Report("x", 0, {}, (), ()), tmp_path, tmp_path / "index.csv")


def test_real_photographs_are_not_alike(assets):
    report = check.check(sources.load(assets / "data" / "hymenoptera_data"))
    assert found(report.of(check.SUSPICIOUS, check.LEFT_OUT)) == {"empty": [("train/ants/imageNotFound.gif",)]}


# A hundred kinds of files that are no pictures

SESSION = """
import json, sys
from pathlib import Path
root = Path(sys.argv[1])
events = []

def audit(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto", "urllib.Request") or (
        event == "socket.__new__" and args[1] not in (-1, 1)  # 1: AF_UNIX, a pipe of the event loop
    ):
        events.append([event, repr(args)])

sys.addaudithook(audit)
for name in ("tensorflow", "torch"):  # whoever imports one leaves a mark
    (root / "fake" / name).mkdir(parents=True)
    (root / "fake" / name / "__init__.py").write_text(f"open({str(root / 'imported')!r}, 'a').write({name!r})")
sys.path.insert(0, str(root / "fake"))
import jft
from jft.cli import main
data, run = str(root / "data"), str(root / "run")
codes = [
    main(["finetune", "--data", data, "--model", "tiny_vit", "--weights", "none", "--batch", "8", "--epochs", "1",
          "--workdir", run, "--display", "plain"]),
    main(["predict", run, data, "--out", str(root / "preds.csv")]),
]
(root / "told.json").write_text(json.dumps({"codes": codes, "events": events}))
"""


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """A run and a prediction over good pictures and bad, in a process of its own that is watched."""
    root = tmp_path_factory.mktemp("session")
    bad, fine = bad_pictures.make(root / "data")
    done = subprocess.run(
        [sys.executable, "-c", SESSION, str(root)],
        capture_output=True, env={**os.environ, "JFT_CACHE": str(root / "cache"), "XLA_FLAGS": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    return root, bad, fine, done.stdout.decode(), json.loads((root / "told.json").read_text())


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the folder has names and files that only Linux has")
def test_training_goes_on_past_a_hundred_kinds_of_bad_files(session):
    root, bad, fine, shown, told = session
    assert told["codes"] == [0, 0] and len(bad) > 100
    result = json.loads((root / "run" / "result.json").read_text())
    excluded = {entry["path"]: entry["reason"] for entry in result["excluded"]}
    assert len(result["excluded"]) == len(excluded) and excluded.keys() == bad.keys()
    assert all(word in excluded[name] for name, word in bad.items())
    assert result["train"]["count"] + result["val"]["count"] == len(fine)
    for name in bad:
        assert shown.count(f"warning: left out: {name}: ") == 1, name
    with open(root / "preds.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(bad) + len(fine)
    assert sum(not row["error"] for row in rows) == len(fine)
    assert all(bool(row["error"]) != bool(row["label"]) for row in rows)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the folder has names and files that only Linux has")
def test_names_of_files_do_nothing_where_they_are_told(session):
    root, bad, _, shown, _ = session
    assert not set(shown) & {"\x1b", "\u202e", "\r"} and "\nleft out: b.jpg" not in shown
    for file in ("report.html", "metrics.jsonl", "result.json", "predictions.csv", "config.json"):
        text = (root / "run" / file).read_text(encoding="utf-8")
        assert "\x1b" not in text and "\u202e" not in text, file
        assert "<script>alert" not in text or file.endswith((".json", ".jsonl", ".csv"))
    assert "\x1b" not in (root / "preds.csv").read_text(encoding="utf-8")
    for left in ("executed", "run/executed", "imported"):
        assert not (root / left).exists()
    assert not Path("/tmp/executed").exists()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the folder has names and files that only Linux has")
def test_a_local_run_opens_no_socket_and_imports_neither_tensorflow_nor_torch(session):
    root, *_, told = session
    assert told["events"] == [] and not (root / "imported").exists()
