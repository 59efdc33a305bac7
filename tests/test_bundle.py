"""The bundle: what is saved is what is loaded, damage is refused; its model card; predictions as CSV."""

import csv
import json
import shutil
import sys
import warnings
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jft import bundle, cli
from jft.errors import UserError
from jft.models import make_model
from jft.preprocess import Preprocess
from jft.report.card import model_card

CLASSES = ("a", "grün, <b>")
DEEP = "[" * 100_000  # deeper than Python reads
PREPROCESS = Preprocess(size=(40, 32), crop_pct=0.9, mean=(0.5, 0.4, 0.3), interpolation="bicubic")


def save(folder: Path, **changes) -> dict:
    """Write a bundle of a tiny ResNet with noise for weights; returns what was given."""
    model = make_model("tiny_resnet", num_classes=2)
    rng = np.random.default_rng(0)
    params, stats = ({n: rng.random(s.shape, np.float32) for n, s in of.items()} for of in model.shapes())
    given = {
        "model_name": "tiny_resnet", "model_options": {"num_classes": 2, "image_size": [40, 32]}, "params": params,
        "batch_stats": stats, "classes": CLASSES, "preprocess": PREPROCESS,
    }  # fmt: skip
    bundle.save(folder, **(given | changes))
    return given | changes


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bundle") / "model"
    save(folder)
    return folder


@pytest.fixture
def copy(good, tmp_path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "model"))


def edit(folder: Path, **changes) -> None:
    about = json.loads((folder / "config.json").read_text())
    about = {k: v for k, v in (about | changes).items() if v is not None}
    (folder / "config.json").write_text(json.dumps(about | {"sum": bundle._sum(about)}))  # as a forger would


def test_what_is_saved_is_loaded(tmp_path):
    given = save(tmp_path / "model", multi_label=True, card="# A card\n")
    found = bundle.load(str(tmp_path / "model"))
    assert (found.classes, found.preprocess, found.multi_label) == (CLASSES, PREPROCESS, True)
    assert (found.model.name, found.model.num_classes, found.model.input_shape[:2]) == ("tiny_resnet", 2, (40, 32))
    for wanted, arrays in ((given["params"], found.params), (given["batch_stats"], found.batch_stats)):
        assert list(arrays) and arrays.keys() == wanted.keys()
        assert all(arrays[n].dtype == np.float32 and arrays[n].tobytes() == wanted[n].tobytes() for n in wanted)
    assert (tmp_path / "model" / "README.md").read_text() == "# A card\n"


def test_a_loaded_model_predicts(good):
    rng = np.random.default_rng(1)
    pictures = [Image.fromarray(rng.integers(0, 255, (50, 60, 3), np.uint8)) for _ in range(3)]
    rows = bundle.load(good).predict(pictures, top_k=2)
    assert [set(r) for r in rows] == [
        {"path", "class_index", "label", "probability", "label_2", "probability_2", "error"}
    ] * 3
    for row in rows:
        assert row["label"] == CLASSES[row["class_index"]]
        assert row["probability"] + row["probability_2"] == pytest.approx(1, abs=1e-6)


def test_saving_again_replaces_and_leaves_nothing_beside(tmp_path):
    save(tmp_path / "model", card="old")
    save(tmp_path / "model", classes=("c", "d"))
    assert bundle.load(tmp_path / "model").classes == ("c", "d")
    assert not (tmp_path / "model" / "README.md").exists()
    assert list(tmp_path.iterdir()) == [tmp_path / "model"]


def test_saving_again_leaves_no_moment_without_a_model(tmp_path, monkeypatch):
    """A kill before what was replaced is removed leaves the new one in place; without the system's help, at the end."""
    if sys.platform == "linux":
        save(tmp_path / "model")
        with monkeypatch.context() as context:
            context.setattr(Path, "rename", lambda *_: pytest.fail("it was renamed away"))
            save(tmp_path / "model", classes=("c", "d"))
        assert bundle.load(tmp_path / "model").classes == ("c", "d")
    monkeypatch.setattr(bundle, "exchange", lambda one, other: False)
    save(tmp_path / "model", classes=("e", "f"))
    assert bundle.load(tmp_path / "model").classes == ("e", "f")
    assert list(tmp_path.iterdir()) == [tmp_path / "model"]


def test_what_fails_leaves_the_old_bundle(tmp_path):
    save(tmp_path / "model")
    with pytest.raises(TypeError):
        save(tmp_path / "model", model_options={"num_classes": object()})
    assert bundle.load(tmp_path / "model").classes == CLASSES
    assert list(tmp_path.iterdir()) == [tmp_path / "model"]


@pytest.mark.parametrize("place", [-1, 20000, 100])
def test_a_flipped_byte_is_noticed(copy, place):
    file = copy / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors"):
        bundle.load(copy)


def test_half_a_file_is_noticed(copy):
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"model\.safetensors"):
        bundle.load(copy)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(copy, name):
    (copy / name).unlink()
    with pytest.raises(UserError, match=name):
        bundle.load(copy)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", DEEP, '{"model": "x"}', '{"format": 1, "sha256": "0"}', "null", "\udcff"]
)
def test_a_damaged_description_is_refused(copy, text):
    (copy / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=r"config\.json|model\.safetensors"):
        bundle.load(copy)


@pytest.mark.parametrize("missing", ["model", "options", "classes", "multi_label", "preprocess", "batch_stats"])
def test_a_description_that_lacks_something_is_refused(copy, missing):
    edit(copy, **{missing: None})
    with pytest.raises(UserError, match=rf"config\.json.*{missing}"):
        bundle.load(copy)


@pytest.mark.parametrize(
    "odd",
    [
        {"size": (0, 32)},
        {"crop_pct": -1.0},
        {"crop_pct": float("inf")},
        {"interpolation": "foo"},
        {"mean": (0.5, 0.5)},
        {"mean": (float("nan"), 0.5, 0.5)},
        {"std": (0.0, 0.2, 0.2)},
    ],
    ids=str,
)
def test_preprocessing_that_cannot_be_is_refused(copy, odd):
    edit(copy, preprocess={**asdict(PREPROCESS), **odd})
    with pytest.raises(UserError, match=rf"config\.json is damaged .*{next(iter(odd))}"):
        bundle.load(copy)


def test_more_or_fewer_classes_than_the_head_has_are_refused(copy):
    for classes in (["a"], ["a", "b", "c"]):
        edit(copy, classes=classes)
        with pytest.raises(UserError, match=rf"names {len(classes)} classes of a head of 2"):
            bundle.load(copy)


def test_class_names_are_escaped_when_they_are_read(copy):
    edit(copy, classes=["\x1b[2Ja", "b"])
    assert bundle.load(copy).classes == ("\\x1b[2Ja", "b")


def test_a_newer_format_says_to_update(copy):
    edit(copy, format=bundle.FORMAT + 1)
    with pytest.raises(UserError, match=rf"format {bundle.FORMAT + 1}.*Update jft"):
        bundle.load(copy)


@pytest.mark.parametrize(
    "changes", [{"model": "tiny_vit"}, {"options": {"num_classes": 3, "image_size": [40, 32]}}, {"model": "no_such"}]
)
def test_another_architecture_is_refused(copy, changes):
    edit(copy, **changes)
    with pytest.raises(UserError):
        bundle.load(copy)


@pytest.mark.parametrize(
    "options",
    [
        {"depth": 10**18},
        {"heads": 0},
        {"dim": 10**12},
        {"dim": 3},
        {"projection": {}},
        {"nonsense": 1},
        {"mlp_dim": "x"},
    ],
    ids=str,
)
def test_a_description_of_what_cannot_be_is_refused(copy, options):
    edit(copy, model="tiny_vit", options={"num_classes": 2, "image_size": [32, 32], **options})
    with pytest.raises(UserError, match=r"config\.json|cannot be made|no option"):
        bundle.load(copy)


def test_a_description_changed_by_hand_is_noticed(copy):
    about = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(about | {"classes": ["b", "a"]}))
    with pytest.raises(UserError, match="checksum"):
        bundle.load(copy)


def test_a_folder_without_a_model_says_where_one_is(tmp_path):
    with pytest.raises(UserError, match="RUN/model"):
        bundle.load(tmp_path)


def test_a_comparisons_folder_says_that_its_runs_have_models(tmp_path):
    for seed in (1, 0):
        (tmp_path / "runs" / f"seed{seed}").mkdir(parents=True)
        (tmp_path / "runs" / f"seed{seed}" / "config.json").write_text("{}")
    (tmp_path / "result.json").write_text('{"rows": []}')
    for command in (["evaluate"], ["predict", "x.png"], ["average"]):
        with pytest.raises(UserError, match=r"holds 2 runs.*such as .*runs/seed0\."):
            cli.run([command[0], str(tmp_path), *command[1:]])


def test_predictions_are_read_back_whatever_they_hold(tmp_path):
    names = ['a,b "quoted".png', "new\nline.png", "=cmd|calc", "头.png", "\udcff.png"]
    rows = [
        {"path": n, "class_index": i, "label": 'x, "y"', "probability": 1 / 3, "label_2": "z", "error": ""}
        for i, n in enumerate(names)
    ]
    rows.append({"path": "bad.png", "error": "not an image"})
    bundle.write_predictions(tmp_path / "p.csv", rows)
    with open(tmp_path / "p.csv", encoding="utf-8", errors="surrogateescape", newline="") as file:
        found = list(csv.DictReader(file))
    assert list(found[0]) == ["path", "class_index", "label", "probability", "label_2", "error"]
    assert [row["path"] for row in found] == [n.replace("=cmd", "./=cmd") for n in names] + ["bad.png"]
    assert {row["probability"] for row in found} == {"0.333333", ""}
    assert found[-1] == dict.fromkeys(found[0], "") | {"path": "bad.png", "error": "not an image"}
    assert list(tmp_path.iterdir()) == [tmp_path / "p.csv"]


def test_predictions_keep_their_columns_in_order(capsys):
    row = {f"{c}_{i}": 0 for i in (10, 2) for c in ("probability", "label")}
    bundle.write_predictions(sys.stdout, [{"error": "", "path": "a", "true_label": "t", **row}])
    assert capsys.readouterr().out.splitlines()[0] == (
        "path,true_label,class_index,label,probability,label_2,probability_2,label_10,probability_10,error"
    )
    bundle.write_predictions(sys.stdout, [{"error": "", "path": "a", "p:b_2": 0.5, "p:a": 0.5}])
    assert capsys.readouterr().out.splitlines()[0] == "path,class_index,label,probability,p:b_2,p:a,error"
    bundle.write_predictions(sys.stdout, [{"path": "a", "labels": "a|b", "error": "", "p:a": 0.5}])
    assert capsys.readouterr().out.splitlines() == [
        "path,class_index,label,probability,labels,p:a,error", "a,,,,a|b,0.5,"
    ]  # fmt: skip
    bundle.write_predictions(sys.stdout, [])
    assert capsys.readouterr().out == "path,class_index,label,probability,error\n"


def test_predictions_that_cannot_be_written_say_so(tmp_path):
    with pytest.raises(UserError, match="no folder"):
        bundle.write_predictions(tmp_path / "none" / "p.csv", [])
    (tmp_path / "p.csv").mkdir()
    with pytest.raises(UserError, match="cannot be written"):
        bundle.write_predictions(tmp_path / "p.csv", [])
    assert list(tmp_path.iterdir()) == [tmp_path / "p.csv"]


# The card

RESULT = {
    "model": "vit_tiny_patch16_224", "weights": "/home/someone/w.safetensors", "weights_sha256": "ab" * 32,
    "data": "/home/someone/bees: and *ants*", "classes": list("abc"), "plan": "lp-ft",
    "val": {"count": 40, "accuracy": 0.95, "f1_macro": 0.94, "auroc": 0.99},
    "test": {"count": 10, "accuracy": 0.9},
    "stages": [{"name": "head", "epochs": 1.0, "lr": 1e-3, "trainable_params": 1234, "val_accuracy": 0.95}],
}  # fmt: skip


def hub_card(**changes):
    """The card as the hub's own client reads it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from huggingface_hub import ModelCard

        return ModelCard(model_card(RESULT | changes))


def test_the_hub_reads_the_card():
    found = hub_card(origin="hf:timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k@0123:model.safetensors")
    assert found.data.library_name == "jft" and found.data.pipeline_tag == "image-classification"
    assert found.data.license == "apache-2.0"
    assert found.data.base_model == "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    assert found.data.eval_results[0].dataset_name == "bees: and *ants*"
    assert [(r.dataset_split, r.metric_type, r.metric_value) for r in found.data.eval_results] == [
        ("test", "accuracy", 0.9), ("validation", "accuracy", 0.95), ("validation", "f1", 0.94),
        ("validation", "roc_auc", 0.99),
    ]  # fmt: skip
    assert "**95.0%** (83.5% to 98.6%)" in found.text and "**90.0%**" in found.text
    assert "Apache-2.0" in found.text and "1,234" in found.text and "jft.load(" in found.text
    assert "/home/someone" not in found.content


def test_the_card_claims_no_licence_that_it_does_not_know():
    for origin in ("hf:someone/else@1:w.safetensors", "/home/someone/w.safetensors", None):
        found = hub_card(origin=origin)
        assert found.data.license is None
        assert "Apache" not in found.content
        assert found.data.base_model == ("someone/else" if origin and origin.startswith("hf:") else None)
    assert "state it here before you share" in found.text and "licence" not in hub_card(weights=None).text
    assert "random weights" in hub_card(weights=None).text


def test_the_card_of_an_average_says_that_it_is_one():
    told = {"average": "The weights are a mean.", "chosen": "α was chosen on the validation images", "test": None}
    found = hub_card(**told, origin="hf:someone/else@1:w", plan=None)
    assert "Fine-tuned with jft, from [someone/else]" in found.text and "The weights are a mean." in found.text
    assert "α was chosen on the validation images, so their accuracy leans" in found.text
    assert "the best of the run" not in found.text and "leans" not in hub_card(chosen="").text
    found = hub_card(origins=["hf:someone/else@1:w", "/home/someone/w.safetensors", ""], origin="hf:someone/else@1:w")
    both = "[someone/else](https://huggingface.co/someone/else), the file w.safetensors, random weights"
    assert found.text.count(both) == 2 and found.data.base_model is None and "/home" not in found.content


def test_the_card_writes_names_as_they_are():
    hostile = ["<script>alert(1)</script>", "a|b", "*x*", "[red](x)", "one\ntwo", "\udcff", "_under_", "in_side"]
    found = hub_card(classes=hostile, multi_label=True, data='a"b: \\c\n---\nlicense: mit', stages=[])
    for written in (r"\<script\>", r"a\|b", r"\*x\*", r"\[red\](x)", "one two", r"\_under\_", "in_side"):
        assert written in found.text
    assert "multi-label" in found.data.tags and found.data.license is None
    assert "and 50 more" in hub_card(classes=[f"c{i}" for i in range(150)]).text
