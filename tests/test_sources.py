"""Sources: folders, CSV, TFDS and arrays become the same names and labels on every machine, or a clear error."""

import errno
import io
import json
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from jft.data import pipeline, sources
from jft.data.sources import arrays, load, stratified_split, to_score, unlabelled
from jft.errors import UserError
from jft.preprocess import Preprocess

SMALL = Preprocess(size=(8, 8), crop_pct=1.0)


def put(path: Path, shade: int = 0, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (10, 8), (shade, 0, 0)).save(path, **options)
    return path


def folder(root: Path, **counts: int) -> Path:
    """`folder(root, train__ants=3)` puts three pictures into train/ants."""
    for name, count in counts.items():
        for i in range(count):
            put(root / name.replace("__", "/") / f"{i}.png", i)
    return root


def message(data, **options) -> str:
    with pytest.raises(UserError) as caught:
        load(data, **options)
    return str(caught.value)


def test_folder_with_splits(tmp_path):
    folder(tmp_path, train__ants=3, train__bees=2, valid__ants=1, valid__bees=1, test__bees=2)
    splits = load(str(tmp_path))
    assert splits.classes == ("ants", "bees") and splits.excluded == []
    assert splits.train.names == tuple(f"train/{n}.png" for n in ("ants/0", "ants/1", "ants/2", "bees/0", "bees/1"))
    assert splits.train.labels.tolist() == [0, 0, 0, 1, 1] and splits.train.labels.dtype == np.int32
    assert splits.val is not None and splits.val.names == ("valid/ants/0.png", "valid/bees/0.png")
    assert splits.test is not None and splits.test.labels.tolist() == [1, 1]
    assert splits.train.read(4) == (tmp_path / "train/bees/1.png").read_bytes()


@pytest.mark.parametrize(
    "names",
    [("Training", "Testing", "Validation"), ("TRAIN", "Test", "VAL"), ("training", "testing", "valid")],
)
def test_splits_go_by_the_names_that_public_sets_have(tmp_path, names):
    for name, count in zip(names, (3, 2, 1), strict=True):
        folder(tmp_path / name, cat=count, dog=count)
    splits = load(tmp_path)
    assert splits.classes == ("cat", "dog") and splits.val is not None and splits.test is not None
    assert (len(splits.train), len(splits.test), len(splits.val)) == (6, 4, 2)
    folder(tmp_path / "train", cat=1, dog=1)
    if names[0].lower() != "train":
        assert "both" in message(tmp_path)


def test_folders_that_may_be_splits_are_no_classes(tmp_path):
    root = tmp_path / "intel"
    folder(root, seg_train__cat=2, seg_train__dog=2, seg_test__cat=2, seg_test__dog=2)
    text = message(root)
    assert "the folders seg_test, seg_train" in text and "lie in cat, dog in each" in text
    assert "name the outer folders train, val and test" in text and "CSV" in text
    assert load(root / "seg_train").classes == ("cat", "dog")
    assert "lie in cat, dog" in message(folder(tmp_path / "one", pictures__cat=2, pictures__dog=2))
    # What lies deeper belongs to a class wherever it is plain which folders are the classes.
    put(root / "seg_train" / "0.png")
    assert load(root).classes == ("seg_test", "seg_train")
    folder(tmp_path / "deep", a__x=2, b__x=2)
    assert load(tmp_path / "deep").classes == ("a", "b")
    folder(tmp_path / "odd", a__x=2, a__y=2, b__x=2, b__z=2)
    assert load(tmp_path / "odd").classes == ("a", "b")


def test_class_folders_alone_are_split(tmp_path):
    folder(tmp_path, ants=10, bees=5)
    splits, again, other = load(tmp_path, seed=1), load(tmp_path, seed=1), load(tmp_path, seed=2)
    assert splits.val is not None and again.val is not None and other.val is not None
    assert np.bincount(splits.val.labels).tolist() == [2, 1] and len(splits.train) == 12
    assert sorted(splits.train.names + splits.val.names) == sorted(
        [f"ants/{i}.png" for i in range(10)] + [f"bees/{i}.png" for i in range(5)]
    )
    assert splits.val.names == again.val.names and splits.val.names != other.val.names
    assert splits.val.read(0) == (tmp_path / splits.val.names[0]).read_bytes()
    assert load(tmp_path, val_fraction=0.0).val is None


def test_the_order_of_the_file_system_plays_no_part(tmp_path, monkeypatch):
    folder(tmp_path, ants=6, bees=6)
    expected = load(tmp_path)
    scandir = os.scandir

    class Backwards:
        def __init__(self, path):
            with scandir(path) as entries:
                self.entries = sorted(entries, key=lambda e: e.name, reverse=True)

        def __enter__(self):
            return iter(self.entries)

        def __exit__(self, *args):
            pass

    monkeypatch.setattr(os, "scandir", Backwards)
    assert load(tmp_path).train.names == expected.train.names


def test_a_class_called_train_is_a_class(tmp_path):
    folder(tmp_path, train=3, bus=3)
    assert load(tmp_path).classes == ("bus", "train")


def test_what_is_scored_needs_no_training_images_and_no_second_class(tmp_path):
    one = folder(tmp_path / "one", a=2)
    held = folder(tmp_path / "held", val__a=2, val__b=1, test__b=3)
    both = folder(tmp_path / "both", train__a=1, train__b=1, test__c=2)
    (one / "quarantine.txt").write_text("a/1.png\n")
    told = {}
    for root in (one, held, both):
        name, dataset = to_score(root)
        told[root.name] = name, dataset.names, dataset.classes
    assert told == {
        "one": ("train", ("a/0.png",), ("a",)),
        "held": ("test", ("test/b/0.png", "test/b/1.png", "test/b/2.png"), ("b",)),
        "both": ("test", ("test/c/0.png", "test/c/1.png"), ("c",)),
    }
    lines = "a/0.png,x,test\na/1.png,x,test\n"
    name, dataset = to_score(table(one, "path,label,split\n" + lines))
    assert (name, dataset.classes, len(dataset)) == ("test", ("x",), 1)
    name, dataset = to_score(arrays(np.zeros((2, 4, 4), np.uint8), ["x", "x"]))
    assert (name, dataset.classes, len(dataset)) == ("train", ("x",), 2)
    (one / "quarantine.txt").write_text("a/1.png\na/0.png\n")
    with pytest.raises(UserError, match="leaves no image of train"):
        to_score(one)
    (one / "quarantine.txt").unlink()
    for root, said in ((one, "one class only"), (both, "differ")):
        assert said in message(root)  # to train on


def test_a_missing_validation_set_is_split_off_and_the_test_set_left_alone(tmp_path):
    folder(tmp_path, train__a=5, train__b=5, test__a=2, test__b=1)
    splits = load(tmp_path)
    assert splits.val is not None and splits.test is not None
    assert (len(splits.train), len(splits.val), len(splits.test)) == (8, 2, 3)


def test_names_of_every_kind(tmp_path):
    odd = ["été", "a b", "<b>&", "日本"]
    for name in odd:
        put(tmp_path / "train" / name / "pic ture.png")
        put(tmp_path / "val" / unicodedata.normalize("NFD", name) / "ö.png")
    put(tmp_path / "val" / "日本" / "deeper" / "x.jpeg")
    splits = load(tmp_path)
    assert splits.classes == tuple(sorted(odd))
    assert splits.val is not None and "val/日本/deeper/x.jpeg" in splits.val.names and len(splits.val) == 5


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has file names that are no text")
def test_a_name_that_is_no_text_can_still_be_written(tmp_path):
    folder(tmp_path, a=2, b=2)
    os.rename(tmp_path / "a/0.png", os.fsencode(tmp_path) + b"/a/\xff.png")
    dataset = load(tmp_path, val_fraction=0.0).train
    assert "a/\\xff.png" in dataset.names
    json.dumps(dataset.names).encode("utf-8")
    assert dataset.read(dataset.names.index("a/\\xff.png"))


def test_what_is_no_image_is_left_out_with_a_reason_and_litter_silently(tmp_path):
    folder(tmp_path, a=2, b=2)
    for name in (".DS_Store", "Thumbs.db", "a/.hidden.png", "__MACOSX/x/y.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"litter")
    os.mkfifo(tmp_path / "a" / "pipe.png")
    (tmp_path / "a" / "notes.txt").write_text("no image")
    (tmp_path / "README.md").write_text("no image")
    (tmp_path / "empty").mkdir()
    put(tmp_path / "b" / "really_a_png", format="png")
    splits = load(tmp_path, val_fraction=0.0)
    assert splits.classes == ("a", "b") and len(splits.train) == 5 and "b/really_a_png" in splits.train.names
    assert dict(splits.excluded) == {
        "a/notes.txt": "not an image",
        "README.md": "not in a class folder",
        "empty/": "class folder without images; the class is left out",
        "a/pipe.png": "a pipe, not a file",
    }


def test_links_that_lead_in_a_circle_are_followed_once(tmp_path):
    folder(tmp_path, a=2, b=2)
    (tmp_path / "a" / "again").symlink_to(tmp_path / "a")
    assert len(load(tmp_path, val_fraction=0.0).train) == 4


def test_what_is_no_file_is_named(tmp_path):
    folder(tmp_path, a=2, b=2)
    (tmp_path / "a" / "nowhere.png").symlink_to("gone.png")
    (tmp_path / "b" / "round.png").symlink_to("round.png")
    os.mkfifo(tmp_path / "pipe")
    assert dict(load(tmp_path, val_fraction=0.0).excluded) == {
        "a/nowhere.png": "a link that leads nowhere",
        "b/round.png": "a link in a circle",
        "pipe": "a pipe, not a file",
    }
    assert unlabelled([tmp_path / "pipe"])[1] == [(str(tmp_path / "pipe"), "a pipe, not a file")]
    with pytest.raises(OSError, match=r"^a folder, not a file$"):  # as a list of paths may name one
        sources.read_file(tmp_path / "a")


def test_a_folder_that_goes_while_it_is_walked_is_left_out(tmp_path, monkeypatch):
    folder(tmp_path, a=1, b=1)
    (tmp_path / "a" / "sub").mkdir()
    read = sources._entries

    def entries(place):
        found = read(place)
        if place == tmp_path / "a":
            (tmp_path / "a" / "sub").rmdir()
        return found

    monkeypatch.setattr(sources, "_entries", entries)
    assert load(tmp_path, val_fraction=0.0).excluded == [("a/sub/", "cannot be read: No such file or directory")]


def test_a_file_beyond_the_limit_or_become_a_pipe_is_not_read(tmp_path):
    folder(tmp_path, a=3, b=2)
    os.truncate(tmp_path / "a" / "0.png", 1 << 40)  # a hole: takes no space
    dataset = load(tmp_path, val_fraction=0.0).train
    (tmp_path / "a" / "1.png").unlink()
    os.mkfifo(tmp_path / "a" / "1.png")
    kept, excluded = pipeline.readable(dataset, SMALL)
    assert kept.tolist() == [2, 3, 4] and [name for name, _ in excluded] == ["a/0.png", "a/1.png"]
    assert "limit" in excluded[0][1] and "a pipe, not a file" in excluded[1][1]


ODD_NAMES = {
    "a\nb": "a\\nb",
    "\x1b[31mred": "\\x1b[31mred",
    "\u202egnp": "\\u202egnp",
    "=cmd()'x'": "=cmd()'x'",
    "<i>": "<i>",
}


def test_names_hold_no_control_characters(tmp_path):
    for name in ODD_NAMES:
        put(tmp_path / "d" / name / f"{name}.png")
        put(tmp_path / "d" / name / f"2{name}.png", 1)
    splits = load(tmp_path / "d")
    assert splits.classes == tuple(sorted(ODD_NAMES.values()))
    assert sorted(splits.train.names + splits.val.names) == sorted(
        f"{shown}/{n}{shown}.png" for shown in ODD_NAMES.values() for n in ("", "2")
    )
    assert splits.train.files is not None and splits.train.read(0) == splits.train.files[0].read_bytes()
    rows = "".join(f'"d/{n}/{n}.png","{n}"\n' for n in ODD_NAMES)
    listed = load(table(tmp_path, "path,label\n" + rows), val_fraction=0.0)
    assert listed.classes == splits.classes
    assert sorted(listed.train.names) == sorted(f"d/{n}/{n}.png" for n in ODD_NAMES.values())


def test_quarantine_names_pictures_that_look_like_comments(tmp_path):
    for name in ("# x", "y"):
        for i in range(3):
            put(tmp_path / name / f"{i}.png")
    (tmp_path / "quarantine.txt").write_text("./# x/0.png\ttwice\n# x/1.png\n")
    assert load(tmp_path, val_fraction=0.0).excluded == [("# x/0.png", "in quarantine.txt: twice")]


def test_quarantine_leaves_out_what_it_names_and_moves_nothing_else(tmp_path):
    folder(tmp_path, a=10, b=10)
    put(tmp_path / "a" / "x\ny.png")
    before = load(tmp_path)
    gone = (before.train.names[0], before.val.names[0], "a/x\\ny.png")
    (tmp_path / "quarantine.txt").write_text(
        f"# reviewed\n./{gone[0]}\tplaceholder\n{gone[1]}\n{gone[2]}\n\nb/no.png\n"
    )
    after = load(tmp_path)
    assert after.train.names == tuple(n for n in before.train.names if n not in gone)
    assert after.val.names == tuple(n for n in before.val.names if n not in gone)
    assert after.train.read(0) == before.train.read(1)
    assert dict(after.excluded) == dict.fromkeys(gone, "in quarantine.txt") | {
        gone[0]: "in quarantine.txt: placeholder"
    }
    assert after.unknown == ("b/no.png",)
    (tmp_path / "quarantine.txt").write_text("".join(f"a/{i}.png\n" for i in range(10)) + gone[2])
    assert "no training image of a" in message(tmp_path)
    (tmp_path / "quarantine.txt").write_bytes(b"\xff\n")
    assert "no UTF-8" in message(tmp_path)


def test_quarantine_of_a_csv_lies_beside_it(pictures):
    rows = "".join(f"p/{i}.png,{'ab'[i % 2]}\n" for i in range(6))
    (pictures / "quarantine.txt").write_text("p/0.png\n")
    splits = load(table(pictures, "path,label\n" + rows), val_fraction=0.0)
    assert len(splits.train) == 5 and splits.excluded == [("p/0.png", "in quarantine.txt")]


def test_wrong_folders(tmp_path):
    folder(tmp_path / "hymenoptera", train__ants=1, train__bees=1, val__ants=1, val__wasps=1)
    text = message(tmp_path / "hymenopter")
    assert "There is no folder" in text and "Did you mean hymenoptera?" in text
    text = message(tmp_path / "hymenoptera")
    assert "without training images: wasps" in text and "missing in val: bees" in text
    (tmp_path / "empty").mkdir()
    assert "has no images" in message(tmp_path / "empty")
    (tmp_path / "empty" / "cls").mkdir()
    (tmp_path / "empty" / "cls" / "x.txt").write_text("text")
    text = message(tmp_path / "empty")
    assert "has no images" in text and "cls/x.txt (not an image)" in text
    assert "one class only, 'a'" in message(folder(tmp_path / "one", a=3))
    assert "no class folders" in message(put(tmp_path / "flat" / "x.png").parent)
    assert "both val/ and valid/" in message(folder(tmp_path / "two", train__a=1, val__a=1, valid__a=1))
    assert "No class has two images" in message(folder(tmp_path / "singles", a=1, b=1))
    assert "between 0 and 1" in message(folder(tmp_path / "ok", a=2, b=2), val_fraction=1.5)
    with pytest.raises(UserError, match="data is a int"):
        load(3)


# CSV


def table(root: Path, text: str, encoding: str = "utf-8") -> Path:
    (root / "index.csv").write_bytes(text.encode(encoding))
    return root / "index.csv"


@pytest.fixture
def pictures(tmp_path):
    for i in range(6):
        put(tmp_path / "p" / f"{i}.png", i)
    return tmp_path


def test_csv(pictures):
    rows = "p/3.png,dog, Train \np/0.png,cat,train\n\np/1.png,dog,validation\n./p/2.png,cat,test\n"
    splits = load(table(pictures, "\ufeffPath, label ,SPLIT\r\n" + rows))
    assert splits.classes == ("cat", "dog")
    assert splits.train.names == ("p/0.png", "p/3.png") and splits.train.labels.tolist() == [0, 1]
    assert splits.val is not None and splits.val.names == ("p/1.png",)
    assert splits.test is not None and splits.test.names == ("p/2.png",)
    assert splits.train.read(1) == (pictures / "p/3.png").read_bytes()


def test_decimal_numbers_are_refused_as_classes_and_whole_ones_are_not(pictures):
    with pytest.raises(UserError, match=r"are decimal numbers: 0\.5, 1\.0, 2\.25.*name the column value"):
        load(table(pictures, "path,label\np/0.png,0.5\np/1.png,1.0\np/2.png,2.25\np/3.png,0.5"))
    assert load(table(pictures, "path,label\np/0.png,0\np/1.png,10\np/2.png,10\np/3.png,0")).classes == ("0", "10")
    named = load(table(pictures, "path,label\np/0.png,v0.5\np/1.png,0.5\np/2.png,0.5\np/3.png,v0.5"))
    assert named.classes == ("0.5", "v0.5")


def test_csv_with_several_labels(pictures):
    rows = "".join(f"p/{i}.png,{label}\n" for i, label in enumerate(["a|b", "b", "", "a| c", "c|b", "a"]))
    splits = load(table(pictures, "path,label\n" + rows), val_fraction=0.3)
    assert splits.classes == ("a", "b", "c") and splits.train.labels.dtype == np.float32
    assert splits.val is not None
    both = dict(zip(splits.train.names + splits.val.names, [*splits.train.labels, *splits.val.labels], strict=True))
    assert [both[f"p/{i}.png"].tolist() for i in range(4)] == [[1, 1, 0], [0, 1, 0], [0, 0, 0], [1, 0, 1]]


def test_labels_and_paths_in_any_form_of_unicode_and_with_backslashes(tmp_path):
    nfc, nfd = (unicodedata.normalize(form, "Müller") for form in ("NFC", "NFD"))
    put(tmp_path / nfc / "0.png")
    put(tmp_path / nfd / "1.png", 1)
    put(tmp_path / "sub" / "2.png", 2)
    put(tmp_path / r"sub\3.png", 3)
    put(tmp_path / "sub" / "3.png", 4)
    rows = f"{nfd}/0.png,{nfc}\n{nfc}\\1.png,{nfd}\nsub\\2.png,b\n.\\sub\\x\\..\\2.png,b\nsub\\3.png,b\n"
    splits = load(table(tmp_path, "path,label\n" + rows), val_fraction=0.0)
    assert splits.classes == (nfc, "b")
    # As they lie on the disk, and one that is there as it is spelt is meant so.
    assert splits.train.names == tuple(sorted([f"{nfc}/0.png", f"{nfd}/1.png", "sub/2.png", r"sub\3.png"]))
    assert splits.excluded == [("sub/2.png", "listed twice")]
    assert splits.train.read(splits.train.names.index(r"sub\3.png")) == (tmp_path / r"sub\3.png").read_bytes()
    values = load(table(tmp_path, f"path,value:{nfd}\nsub/2.png,1\nsub/3.png,2.5\n"), val_fraction=0.0)
    assert values.classes == (nfc,)


def test_no_other_spelling_leads_out_of_the_folder(tmp_path):
    put(tmp_path / "secret.png")
    put(tmp_path / "in" / "0.png")
    for path in ("..\\secret.png", f"{tmp_path}/secret.png".replace("/", "\\"), "x\\..\\..\\secret.png"):
        assert "do not exist" in message(table(tmp_path / "in", f"path,label\n{path},a\n0.png,b\n"))


def test_what_may_not_be_read_is_named(pictures, monkeypatch):
    def denied(path, *arguments, **options):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    listed = table(pictures, "path,label\np/0.png,a\np/1.png,b\n")
    with monkeypatch.context() as patched:
        patched.setattr(sources, "open", denied, raising=False)
        assert message(listed) == f"{listed} cannot be read: Permission denied."
    real = os.stat

    def stat(path, *arguments, **options):
        return (denied if str(path).startswith(str(pictures / "p")) else real)(path, *arguments, **options)

    monkeypatch.setattr(os, "stat", stat)
    assert message(pictures / "p") == f"{pictures / 'p'} cannot be read: Permission denied."
    picture = pictures / "p" / "0.png"
    assert unlabelled([picture])[1] == [(str(picture), "no permission to read it")]


def test_a_line_given_twice_counts_once(pictures):
    splits = load(table(pictures, "path,label\np/0.png,a\np/1.png,b\np//0.png,a\n"), val_fraction=0.0)
    assert splits.train.names == ("p/0.png", "p/1.png") and splits.excluded == [("p/0.png", "listed twice")]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", r"columns \(none\)"),
        ("file,label\nx,y\n", "has the columns file, label; expected path,label"),
        ("Filename,label\nx,y\n", "expected path,label.*The column 'filename' is to be named path"),
        ("path;label\nx;y\n", "expected path,label.*The separator is ;; a comma is expected"),
        ("path\tlabel\nx\ty\n", "The separator is a tab; a comma"),
        ("path,label\n", "lists no images"),
        ("path,label\np/0.png\n", "line 2: 1 values for 2 columns"),
        ("path,label\np/0.png,a\np/7.png,b\np/8.png,b\n", "lists 2 files that do not exist .*: p/7.png, p/8.png"),
        ("path,label\n../x.png,a\n", "line 2: '../x.png' lies outside"),
        ("path,label\n/etc/passwd,a\n", "'/etc/passwd' lies outside"),
        ("path,label\np/../../x.png,a\n", "lies outside"),
        ("path,label\np/0.png,\n", "p/0.png has no label"),
        ("path,label\n,a\n", "the path is empty"),
        ("path,label,split\np/0.png,a,dev\n", r"split is 'dev'; expected train, val or test \(dev is named val"),
        ("path,label,split\np/0.png,a,train\np/1.png,b,\n", "line 3: the split is ''; expected train, val or test"),
        ("path,label,split\np/0.png,a,here\n", r"split is 'here'; expected train, val or test\.$"),
        ("path,label\np/0.png,a\np/0.png,b\n", "line 3: p/0.png was listed before with another label"),
        ("path,label,split\np/0.png,a,val\np/1.png,b,val\n", "no training images"),
        ("path,label,split\np/0.png,cat,train\np/1.png,b,train\np/2.png,cats,val\n", "cats of val .*Did you mean cat"),
        ("path,label\np/0.png,a\np/1.png,a\n", "one class only"),
        ('path,label\n"p/0.png,a\n', "no valid CSV"),
        ("path,label\n\0,a\n", "no valid CSV|zero byte"),
        (f"path,label\n{'p/' * 3000}x.png,a\n", "do not exist"),
        (f"path,label\np/0.png,{'a' * 2000}\n", "a label has 2,000 characters"),
    ],
)
def test_wrong_csv(pictures, text, said):
    with pytest.raises(UserError, match=said):
        load(table(pictures, text))


def test_a_folder_dev_is_told_to_be_val(tmp_path):
    for split in ("train", "dev", "more"):
        for name in ("a", "b"):
            put(tmp_path / split / name / "0.png")
            put(tmp_path / split / name / "1.png")
    told = dict(load(tmp_path).excluded)
    assert told == {
        "dev/": "neither train, val nor test (dev is named val here)",
        "more/": "neither train, val nor test",
    }


def test_csv_that_is_no_text(pictures):
    assert "no UTF-8 text" in message(table(pictures, "path,label\np/é.png,a\n", "latin-1"))
    assert "no UTF-8 text" in message(pictures / "p" / "0.png")
    assert "expected path,label" in message(table(pictures, "\0\0\n"))


# Arrays


def test_arrays():
    images = np.arange(6 * 4 * 4, dtype=np.uint8).reshape(6, 4, 4)
    dataset = arrays(images, [7, 9, 7, 9, 8, 8])
    assert dataset.classes == ("7", "8", "9") and dataset.labels.tolist() == [0, 2, 0, 2, 1, 1]
    assert (dataset.select([5, 0]).read(0) == images[5]).all() and dataset.select([5, 0]).names == ("5", "0")
    splits = load({"train": (images, list("ababab")), "val": (images[:2], list("ba"))})
    assert splits.classes == ("a", "b") and splits.val is not None and splits.val.labels.tolist() == [1, 0]
    splits = load(arrays(images, [0, 1, 0, 1, 0, 1], ["no", "yes"]))
    assert splits.classes == ("no", "yes") and splits.val is not None and len(splits.val) == 2
    assert (np.asarray(arrays(images / np.float32(95), [0] * 6).read(5)) == np.rint(images[5] / 95 * 255)).all()
    matrix = np.eye(6, 3, dtype=int)
    assert arrays([image[:3] for image in images], matrix).labels.tolist() == matrix.tolist()


def test_pictures_of_pillow():
    red = Image.new("P", (4, 3))
    red.putpalette([200, 0, 0])
    dataset = arrays([red, Image.new("CMYK", (2, 2))], ["a", "b"])
    assert np.asarray(dataset.read(0)).tolist() == [[[200, 0, 0]] * 4] * 3 and np.asarray(dataset.read(1)).min() == 255
    with pytest.raises(UserError, match="Image 1 cannot be used: floating-point"):
        arrays([red, Image.new("F", (2, 2), -1)], ["a", "b"])


def test_labels_of_a_mapping_mean_the_same_in_every_split():
    images = np.zeros((3, 4, 4), np.uint8)
    splits = load({"train": (images, [5, 6, 9]), "val": (images[:2], [9, 5])})
    assert splits.classes == ("5", "6", "9") and splits.val is not None and splits.val.labels.tolist() == [2, 0]


def test_of_a_mapping_to_score_no_training_images_are_asked():
    images = np.zeros((3, 4, 4), np.uint8)
    name, dataset = to_score({"test": (images, [9, 5, 9]), "val": (images[:1], [7])})
    assert (name, dataset.classes, dataset.labels.tolist()) == ("test", ("5", "7", "9"), [2, 0, 2])
    assert to_score({"val": arrays(images, [0, 1, 0], "abc")})[1].classes == ("a", "b", "c")
    with pytest.raises(UserError, match="no train"):
        to_score({})


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"val": ([], [])}, "no train"),
        ({"train": 3}, "expected a pair"),
        ({"train": (np.zeros((2, 4, 4), np.uint8), [0, 1]), "dev": ()}, "keys train, dev"),
        ({"train": (np.zeros((2, 4, 4), np.uint8), [0])}, "2 images and 1 labels"),
        ({"train": (np.full((2, 4, 4), 1.5), [0, 1])}, "floating point beyond 0..1"),
        ({"train": ([np.zeros((4, 4)), np.zeros((0, 4))], [0, 1])}, r"Image 1 has no pixels: it is \[0, 4\]"),
        ({"train": (np.zeros((2, 4, 4), np.int64), [0, 1])}, "images are int64"),
        ({"train": (np.zeros((2, 4, 4), np.uint8), [0.5, np.inf])}, "image 1 is no finite number"),
        ({"train": (np.zeros((0, 4, 4), np.uint8), [])}, "no images"),
        (
            {"train": (np.zeros((2, 4, 4), np.uint8), [0, 1]), "val": (np.zeros((1, 4, 4), np.uint8), [2])},
            "labels 2 of val",
        ),
    ],
)
def test_wrong_arrays(data, said):
    with pytest.raises(UserError, match=said):
        load(data)


def test_labels_beyond_the_classes():
    with pytest.raises(UserError, match="from 0 to 2; expected 0 to 1"):
        arrays(np.zeros((2, 4, 4), np.uint8), [0, 2], ["a", "b"])
    with pytest.raises(UserError, match="labels c are not among"):
        arrays(np.zeros((2, 4, 4), np.uint8), ["a", "c"], ["a", "b"])


def test_unlabelled(tmp_path):
    folder(tmp_path / "d", x=2)
    (tmp_path / "d" / "notes.txt").write_text("text")
    single = put(tmp_path / "single.png")
    dataset, excluded = unlabelled([single, str(tmp_path / "d")], ["a", "b"])
    assert dataset.names == (str(single), f"{tmp_path}/d/x/0.png", f"{tmp_path}/d/x/1.png")
    assert set(dataset.labels.tolist()) == {-1} and dataset.classes == ("a", "b")
    assert excluded == [(f"{tmp_path}/d/notes.txt", "not an image")]
    with pytest.raises(UserError, match=r"There is no file .* an image, a folder of images, a glob"):
        unlabelled([tmp_path / "nothing.png"])


# Splitting


@settings(deadline=None)
@given(st.lists(st.integers(-1, 4), min_size=1, max_size=60), st.floats(0.05, 0.95), st.integers(0, 3))
def test_every_class_is_on_both_sides(labels, fraction, seed):
    labels = np.array(labels, np.int32)
    kept, held_out = stratified_split(labels, fraction, seed)
    assert sorted([*kept, *held_out]) == list(range(len(labels)))
    assert (np.diff(kept) > 0).all() and (np.diff(held_out) > 0).all()
    for label in np.unique(labels):
        n, out = (labels == label).sum(), (labels[held_out] == label).sum()
        assert (n == 1 and out == 0) or (1 <= out <= n - 1 and abs(out - fraction * n) <= 1)
    assert (stratified_split(labels, fraction, seed)[1] == held_out).all()


def test_another_class_changes_nothing_for_the_rest():
    labels = np.repeat(np.arange(2, dtype=np.int32), 20)
    more = np.concatenate([labels, np.full(9, 2, np.int32)])
    held_out = stratified_split(labels, 0.3, 5)[1]
    assert set(held_out) == {i for i in stratified_split(more, 0.3, 5)[1] if i < 40}
    assert (held_out[:6] + 20 != held_out[6:]).any()


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10_000), st.integers(2, 60), st.integers(1, 5))
def test_several_labels_are_dealt_label_by_label(seed, n, k):
    labels = (np.random.default_rng(seed).random((n, k)) < 0.3).astype(np.float32)
    kept, held_out = stratified_split(labels, 0.25, seed)
    assert sorted([*kept, *held_out]) == list(range(n))
    rarest = np.argsort(labels.sum(0), kind="stable")[0]
    if (count := labels[:, rarest].sum()) >= 2:
        assert 1 <= labels[held_out, rarest].sum() <= count - 1


def test_many_several_labels_keep_their_proportions():
    labels = (np.random.default_rng(0).random((2000, 6)) < [0.5, 0.3, 0.1, 0.05, 0.02, 0.01]).astype(np.float32)
    _, held_out = stratified_split(labels, 0.2, 0)
    assert np.allclose(labels[held_out].sum(0) / labels.sum(0), 0.2, atol=0.05)
    assert abs(len(held_out) / 2000 - 0.2) < 0.03


# TFDS: sets written here by hand, in the form in which TFDS prepares them, without TensorFlow.


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    return tmp_path


def prepare_tfds(folder: Path, splits: dict[str, list[int]], format: str = "array_record", **more) -> None:
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_pb2

    folder.mkdir(parents=True)
    features = {
        "id": tfds.features.Text(),
        "image": tfds.features.Image(shape=(None, None, 3)),
        "label": tfds.features.ClassLabel(names=["ant", "bee"]),
    } | more
    tfds.features.FeaturesDict(features).save_config(str(folder))
    infos = []
    for split, labels in splits.items():
        path = folder / f"tiny-{split}.{format}-00000-of-00001"
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for i, label in enumerate(labels):
            png = io.BytesIO()
            Image.new("RGB", (9, 8), (10 * i, 0, 0)).save(png, "png")
            example = tf_example_pb2.Example()
            example.features.feature["id"].bytes_list.value.append(b"x")
            example.features.feature["image"].bytes_list.value.append(png.getvalue())
            example.features.feature["label"].int64_list.value.append(label)
            writer.write(example.SerializeToString())
        writer.close()
        template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
        infos.append({"name": split, "shardLengths": [str(len(labels))], "filepathTemplate": template})
    info = {"name": "tiny", "version": folder.name, "fileFormat": format, "splits": infos}
    (folder / "dataset_info.json").write_text(json.dumps(info))


def test_tfds_without_tensorflow(prepared):
    prepare_tfds(prepared / "tiny/1.9.0", {"train": [0, 1]})
    prepare_tfds(prepared / "tiny/1.10.0", {"train": [0, 1, 1, -1, 0], "test": [1, 0], "extra": [0]})
    splits = load("tfds:tiny")
    assert splits.classes == ("ant", "bee") and splits.val is not None and splits.test is not None
    assert sorted(splits.train.names + splits.val.names) == ["train/0", "train/1", "train/2", "train/4"]
    assert splits.test.labels.tolist() == [1, 0]
    assert sorted(splits.excluded) == [("extra", "neither train, val nor test"), ("train/3", "no label")]
    images, _, excluded = pipeline.decode_all(splits.test, SMALL)
    assert images[:, 0, 0].tolist() == [[0, 0, 0], [10, 0, 0]] and excluded == []
    assert len(load("tfds:tiny:1.9.0", val_fraction=0.0).train) == 2
    assert len(load(f"tfds:{prepared}/tiny/1.9.0", val_fraction=0.0).train) == 2
    assert "tensorflow" not in sys.modules


def test_tfds_configs(prepared):
    prepare_tfds(prepared / "tiny/big/1.0.0", {"train": [0, 1]})
    assert len(load("tfds:tiny", val_fraction=0.0).train) == len(load("tfds:tiny:big", val_fraction=0.0).train) == 2
    prepare_tfds(prepared / "tiny/small/1.0.0", {"train": [0, 1, 0]})
    assert "several configs: big, small" in message("tfds:tiny")
    assert len(load("tfds:tiny/small", val_fraction=0.0).train) == 3


def test_wrong_tfds(prepared):
    import tensorflow_datasets as tfds

    prepare_tfds(prepared / "tiny/1.0.0", {"test": [0, 1]})
    prepare_tfds(prepared / "record/1.0.0", {"train": [0, 1]}, format="tfrecord")
    prepare_tfds(prepared / "two/1.0.0", {"train": [0, 1]}, mask=tfds.features.Image(shape=(None, None, 1)))
    text = message("tfds:tiny2")
    assert "Did you mean tiny?" in text and "pip install tensorflow" in text and "download_and_prepare" in text
    assert "has no training images: its splits are test" in message("tfds:tiny")
    assert "no version 2.0.0; it has 1.0.0" in message("tfds:tiny:2.0.0")
    assert "were prepared as tfrecord" in message("tfds:record")
    assert "expected one image and one class label, found 2 and 1" in message("tfds:two")
    assert "no name of a TFDS data set" in message("tfds:../tiny")
    (prepared / "tiny/1.0.0/dataset_info.json").write_text("{")
    assert "cannot be read" in message("tfds:tiny")


def test_no_jax_is_imported():
    code = (
        "import sys, jft.data.sources, jft.data.pipeline; assert not {'jax', 'tensorflow', 'grain'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)


@pytest.mark.assets
def test_ants_and_bees(assets):
    splits = load(assets / "data" / "hymenoptera_data")
    assert splits.classes == ("ants", "bees") and splits.val is not None
    assert (len(splits.train), len(splits.val)) == (245, 153)
