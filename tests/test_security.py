"""What strangers' files can do: nothing. Published exploits, archives that lie, run folders that name code."""

import functools
import io
import json
import os
import pickle
import shutil
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from test_readers import F32, ONE, checkpoint, group, name, program, refusal, text, torch_file

from jft import bundle, cli, use, weights
from jft.code import load_file
from jft.data.sources import load
from jft.errors import UserError, brief, printable
from jft.models import make_model
from jft.report.html import read_json as report_json
from jft.report.live import make_display
from jft.run import read_json as run_json
from jft.weights.readers import open_weights
from jft.weights.unpickle import Refused, unpickle
from jft.weights.writers import write_safetensors

# Functions that published exploits and the tests of pickle scanners call (PickleScan's and ModelScan's advisories,
# JFrog's and ReversingLabs' reports on the Hub, Fickling's tests), those that lists of forbidden names forgot too.
EXPLOITED = (Path(__file__).parent / "exploited.txt").read_text().split()


def calls(target: str, command: bytes) -> dict[str, bytes]:
    """Every way in which a pickle can have a function called."""
    module, _, attribute = target.rpartition(".")
    argument, by_name = text(command.decode()), name(module, attribute)
    stacked = text(module) + text(attribute) + b"\x93"
    return {
        "reduce": program(by_name + group(argument) + b"R"),
        "protocol 0": b"c" + f"{module}\n{attribute}\n".encode() + b"(S'" + command + b"'\ntR.",
        "stack_global": b"\x80\x04" + stacked + group(argument) + b"R.",
        "stack_global by memo": b"\x80\x04" + text(attribute) + b"\x94" + text(module) + b"\x94h\x01h\x00\x93)R.",
        "dotted": b"\x80\x04" + text(target.partition(".")[0]) + text(target.partition(".")[2]) + b"\x93)R.",
        "inst": b"(S'" + command + b"'\n" + f"i{module}\n{attribute}\n".encode() + b".",
        "obj": b"(" + by_name + argument + b"o.",
        "newobj": program(by_name + group(argument) + b"\x81"),
        "newobj_ex": b"\x80\x04" + by_name + group(argument) + b"}\x92.",
        "build": program(by_name + b")\x81" + table_of(argument) + b"b"),
        "in a value": program(b"}(" + text("w") + ONE + text("x") + by_name + group(argument) + b"Ru"),
        "as a key": program(b"}(" + by_name + group(argument) + b"R" + text("x") + b"u"),
        "popped": program(by_name + group(argument) + b"R0" + checkpoint(w=ONE)),
        "broken after it": program(by_name + group(argument) + b"R")[:-1] + b"X\xff\xff\xff\xff",
        "persistent id": program(by_name + group(argument) + b"RQ"),
        "through getattr": program(name("builtins", "getattr") + group(by_name, text("__call__")) + b"R"),
        "by extension": program(b"\x82\x05" + group(argument) + b"R"),
        "in an inert": program(name("argparse", "Namespace") + group(by_name + group(argument) + b"R") + b"R"),
        "reduce with a list": program(by_name + b"](" + argument + b"e\x85R"),
    }  # fmt: skip


def table_of(argument: bytes) -> bytes:
    return b"}(" + text("__setstate__") + argument + b"u"


def test_every_way_of_calling_every_exploited_function_is_refused(tmp_path):
    marker = tmp_path / "executed"
    before = set(sys.modules)
    for target in EXPLOITED:
        for way, content in calls(target, f"touch {marker}".encode()).items():
            with pytest.raises(Refused) as caught:
                unpickle(content)
            assert 10 < len(str(caught.value)) < 400, (target, way)
            if way in ("reduce", "stack_global", "newobj", "obj", "popped", "broken after it"):
                assert f"`{target}`" in str(caught.value), (target, way)
    assert not marker.exists() and set(sys.modules) - before <= {"pickletools"}


def test_what_a_whole_file_says_of_them(tmp_path):
    for way, content in calls("os.system", b"true").items():
        with zipfile.ZipFile(tmp_path / "w.pth", "w") as archive:
            archive.writestr("archive/data.pkl", content)
            archive.writestr("archive/data/0", F32.tobytes())
        message = refusal(tmp_path / "w.pth")
        assert "pickle" in message and "\n" not in message and len(message) < 800, way


def plain(content: bytes) -> dict[str, bytes]:
    magic = pickle.dumps(0x1950A86A20F9469CFC6C, 2)
    return {
        "legacy, before 1.6": magic + pickle.dumps(1001, 2) + pickle.dumps({}, 2) + content,
        "a pickle alone": content,
        "protocol 0 alone": b"cos\nsystem\n(S'true'\ntR.",
        "tar, before 0.1.10": b"sys_info".ljust(257, b"\0") + b"ustar\x0000" + bytes(248) + content,
        "7z, as the nullifAI files": b"7z\xbc\xaf\x27\x1c" + content,
        "gzip": b"\x1f\x8b\x08" + content,
        "a pickle with an archive after it": content + zip_of({"archive/data.pkl": program(checkpoint(w=ONE))}),
        "a pickle in a safetensors file": struct.pack("<Q", len(content)) + content,
        "keras": b"\x89HDF\r\n\x1a\n" + content,
        "joblib": b"\x80\x04\x95" + content,
        "an array of objects": b"\x93NUMPY\x01\0v\0{'descr': '|O', 'fortran_order': False, 'shape': (1,), }" + content,
    }  # fmt: skip


def zip_of(members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for member, content in members.items():
            archive.writestr(member, content)
    return file.getvalue()


def test_files_that_are_no_archive_are_refused_by_name(tmp_path):
    marker = tmp_path / "executed"
    for kind, content in plain(calls("os.system", f"touch {marker}".encode())["reduce"]).items():
        for ending in (".pth", ".bin", ".weights"):
            (tmp_path / f"w{ending}").write_bytes(content)
            assert len(refusal(tmp_path / f"w{ending}")) < 900, kind
    assert not marker.exists()


def patched(content: bytes, signature: bytes, at: int, new: bytes, last: bool = False) -> bytes:
    place = content.rindex(signature) if last else content.index(signature)
    return content[: place + at] + new + content[place + at + len(new) :]


@functools.cache
def tricks() -> dict[str, bytes]:
    """Archives that mean one thing to one reader and another to another, or more than they are."""
    good = {"archive/data.pkl": program(checkpoint(w=ONE)), "archive/data/0": F32.tobytes()}
    evil = calls("os.system", b"true")["reduce"]
    whole = zip_of(good)
    twice = zip_of(good | {"archive/dat0.pkl": evil}).replace(b"archive/dat0.pkl", b"archive/data.pkl")
    return {
        "a name twice": twice,
        "two pickles": zip_of(good | {"other/data.pkl": evil}),
        "a path that climbs": zip_of({"../../etc/data.pkl": evil}),
        "an absolute path": zip_of({"/tmp/data.pkl": evil}),
        "no pickle": zip_of({"archive/data/0": F32.tobytes()}),
        "the encrypted flag": patched(whole, b"PK\x01\x02", 8, b"\x01\0"),
        "a local name that differs": whole.replace(b"archive/data.pkl", b"archive/dat0.pkl", 1),
        "a size that lies": patched(whole, b"PK\x01\x02", 24, struct.pack("<I", 2**31)),
        "a place that lies": patched(whole, b"PK\x01\x02", 42, struct.pack("<I", 2**31), last=True),
        "a directory that overlaps": patched(whole, b"PK\x01\x02", 42, struct.pack("<I", 0), last=True),
        "a directory at the wrong place": patched(whole, b"PK\x05\x06", 16, struct.pack("<I", 7)),
        "compressed": zip_of(good, zipfile.ZIP_DEFLATED),
        "a bomb": zip_of({"archive/data.pkl": bytes(1 << 22), "archive/data/0": b""}, zipfile.ZIP_DEFLATED),
        "torchscript": zip_of(good | {"archive/constants.pkl": evil, "archive/code/__torch__.py": b"import os"}),
        "a method that nobody has": patched(whole, b"PK\x01\x02", 10, struct.pack("<H", 99)),
        "cut in the directory": whole[:-30],
        "only the end of one": whole[whole.index(b"PK\x05\x06") :],
    }  # fmt: skip


@pytest.mark.parametrize("trick", sorted(tricks()))
def test_archives_that_play_tricks_are_refused(tmp_path, trick):
    (tmp_path / "w.pth").write_bytes(tricks()[trick])
    message = refusal(tmp_path / "w.pth")
    assert message.count("\n") == 0 and len(message) < 800
    assert [p.name for p in tmp_path.iterdir()] == ["w.pth"]


def test_members_that_nobody_asks_for_are_never_looked_at(tmp_path):
    """A pickle under another name (CVE-2025-1889), and one behind a picture: what is not read cannot do harm."""
    evil = calls("os.system", b"true")["reduce"]
    others = {"config": evil, "../../x": evil, "data.pkl.bak": evil}
    path = torch_file(tmp_path / "w.pth", checkpoint(w=ONE), {"0": F32.tobytes()}, **others)
    with open_weights(path) as file:
        assert file.names == ("w",)
    assert [p.name for p in tmp_path.iterdir()] == ["w.pth"]


def test_a_message_shows_no_more_than_text_and_not_too_much(tmp_path):
    assert printable("a\x1b[2J\r\n\u202eb\x9b\ud800") == "a\\x1b[2J\\r\\n\\u202eb\\x9b\\ud800"
    assert printable("é 日本 👩‍🔬\n", keep="\n") == "é 日本 👩‍🔬\n" and len(brief("x" * 10**6)) < 1300
    path = torch_file(tmp_path / "w.pth", name("os\x1b[2J", "s" * 5000) + b")R")
    message = refusal(path)
    assert "\x1b" not in message and len(message) < 2000


def test_the_command_line_prints_no_control_characters(tmp_path, capsys):
    path = torch_file(tmp_path / "w.pth", name("os\x1b[2J", "system") + b")R")
    assert cli.main(["import", str(path), "--model", "tiny_resnet"]) == 2
    assert cli.main(["data", "check", str(tmp_path / "\x1b[31mno")]) == 2
    assert "\x1b" not in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["plain", "json"])
def test_no_display_prints_control_characters(mode, capsys):
    display = make_display(mode)
    display.warn("left out: \x1b[2J\x07\u202e.jpg: no")
    display.note("two\nlines")
    display.table([["\x1b[31mants", "1"]], ["class\x1b", "n"], "a title")
    with display.task("Decoding", total=1, unit="images") as advance:
        advance(1)
    display.close()
    shown = capsys.readouterr().out
    assert not set(shown) & {"\x1b", "\x07", "\u202e"} and "left out: " in shown


# What weights say of themselves, in their header and in the JSON beside them

DEEP = "[" * 100_000  # deeper than Python reads
TIMM = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3}
HF = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "resample": 3}
HF |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
ODD = {  # what each is: the file, what it holds, a word of the refusal or of what is read all the same
    "deep config": ("config.json", DEEP, "no JSON"),
    "deep processor": ("preprocessor_config.json", DEEP, "no JSON"),
    "half a config": ("config.json", "{", "no JSON"),
    "deep header": ("jft", DEEP, None),
    "deep size": ("image_size", DEEP, None),
    "deep index": ("model.safetensors.index.json", DEEP, "no index"),
    "epsilon a text": ("config.json", {"layer_norm_eps": "abc"}, None),
    "epsilon a list": ("config.json", {"layer_norm_eps": [1]}, None),
    "epsilon an endless integer": ("config.json", {"layer_norm_eps": 10**400}, None),
    "labels in lists": ("config.json", {"label_names": [["a"], ["b"]], "label_descriptions": {}}, None),
    "resized to nothing": ("preprocessor_config.json", HF | {"size": {"shortest_edge": 0}}, "cannot be read"),
    "infinite input": ("config.json", {"pretrained_cfg": TIMM | {"input_size": [3, float("inf"), 32]}}, "cannot be"),
    "infinite crop": (
        "preprocessor_config.json",
        HF | {"crop_size": {"height": float("inf"), "width": 32}},
        "cannot be read",
    ),
    "endless mean": ("config.json", {"preprocess": {"mean": [10**400, 0, 0]}}, "cannot be read"),
    "two means": ("config.json", {"pretrained_cfg": TIMM | {"mean": [0.5, 0.5]}}, "cannot be read"),
    "no deviation": ("preprocessor_config.json", HF | {"image_std": [0, 0, 0]}, "cannot be read"),
    "negative crop": ("config.json", {"pretrained_cfg": TIMM | {"crop_pct": -1}}, "cannot be read"),
    "mean not a number": ("config.json", {"preprocess": {"mean": [float("nan")] * 3}}, "cannot be read"),
}


@pytest.mark.parametrize("what", ODD)
def test_odd_json_about_weights_ends_in_a_message_or_is_passed_over(tmp_path, what, monkeypatch):
    file, said, refused = ODD[what]
    model = make_model("tiny_vit", num_classes=2, depth=1)
    arrays = {n: np.zeros(s.shape, np.float32) for n, s in model.shapes()[0].items()}
    said = said if isinstance(said, str) else json.dumps(said)
    if file.endswith(".index.json"):
        path = tmp_path / file
        monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: str(path))
    else:
        path = tmp_path / "w.safetensors"
        write_safetensors(path, arrays, None if file.endswith(".json") else {file: said})
    if file.endswith(".json"):
        (tmp_path / file).write_text(said)
    source = "hf:org/tiny" if file.endswith(".index.json") else path
    if refused is None:
        assert not weights.load(model, source).missing
        return
    with pytest.raises(UserError, match=refused) as caught:
        weights.load(model, source)
    assert len(str(caught.value)) < 700


def test_names_in_weights_are_printed_as_escapes(tmp_path, capsys):
    """A tensor's in the receipt, where it would forge a line of its own; a class's from the moment it is read."""
    model = make_model("tiny_vit", num_classes=2, depth=1)
    arrays = {n: np.zeros(s.shape, np.float32) for n, s in model.shapes()[0].items()}
    weights.export(tmp_path / "w.safetensors", model, arrays, {}, format="hf")
    with open_weights(tmp_path / "w.safetensors") as file:
        tensors = {n: file.read(n) for n in file.names}
    evil = "decoder.\x1b[31m\n  forged"
    write_safetensors(tmp_path / "w.safetensors", tensors | {evil: np.zeros(1, np.float32)})
    words = ["import", str(tmp_path / "w.safetensors"), "--model", "tiny_vit", "--model_options.depth=1"]
    assert cli.main(words) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and "\n  forged" not in shown and "decoder.\\x1b[31m\\n  forged dropped" in shown
    write_safetensors(tmp_path / "other.safetensors", tensors | {f"x{evil}": np.zeros(1, np.float32)})
    assert cli.main([words[0], str(tmp_path / "other.safetensors"), *words[2:]]) == 2
    shown = capsys.readouterr().err
    assert "\n  forged" not in shown and "+ xdecoder.\\x1b[31m\\n  forged" in shown
    for told in ({"id2label": {"0": "\x1b[2Ja", "1": "b"}}, {"classes": ["\x1b[2Ja", "b"]}):
        (tmp_path / "config.json").write_text(json.dumps(told))
        assert weights.load(model, tmp_path / "w.safetensors").classes == ("\\x1b[2Ja", "b")


def test_deep_json_in_a_runs_folder_ends_in_a_message(tmp_path):
    (tmp_path / "config.json").write_text(DEEP)
    for read in (run_json, report_json):
        with pytest.raises(UserError, match="damaged"):
            read(tmp_path / "config.json")


# A run's folder is data


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    import jax

    workdir = tmp_path_factory.mktemp("security") / "run"
    words = f"finetune --data {folder} --model tiny_vit --weights none --epochs 1 --batch 8 --workdir {workdir}"
    with jax.numpy_dtype_promotion("standard"):
        assert cli.main([*words.split(), "--display", "quiet"]) == 0
    return workdir


def replaced(value, evil: str):
    """The JSON with every text in it, and every number and null, the import path of something evil."""
    if isinstance(value, dict):
        return {k: replaced(v, evil) for k, v in value.items()}
    if isinstance(value, list):
        return [replaced(v, evil) for v in value]
    return evil


@pytest.mark.parametrize("which", ["fields", "data", "everything", "tfds"])
def test_what_a_hostile_run_folder_names_is_neither_imported_nor_fetched(
    run, folder, tmp_path, which, capsys, monkeypatch
):
    marker, hostile = tmp_path / "executed", tmp_path / "run"
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w')\ndef f(*args): return 0\n")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "features.json").write_text('{"pythonClassName": "evil.f"}')
    monkeypatch.syspath_prepend(tmp_path)
    shutil.copytree(run, hostile)
    about = json.loads((hostile / "config.json").read_text())
    evil = f"{tmp_path / 'evil.py'}:f"
    if which == "fields":
        for field in ("loss", "penalty", "objective", "optimizer", "schedule", "hyper", "weights", "plan"):
            about["config"][field] = "evil:f" if field != "loss" else evil
        about["weights"] = "hf:evil/model"
        about["weights_sha256"] = "0" * 64
    elif which == "data":
        about["data"] = about["config"]["data"] = evil
    elif which == "tfds":
        about["data"] = about["config"]["data"] = f"tfds:{tmp_path / 'set'}"
    else:
        about = replaced(about, evil)
    (hostile / "config.json").write_text(json.dumps(about))
    for words in (["evaluate"], ["report"], ["average"], ["export", "--format", "safetensors"]):
        code = cli.main([words[0], str(hostile), *words[1:]])
        shown = capsys.readouterr()
        harmless = words[0] in ("report", "export") or (which, words[0]) == ("fields", "evaluate")
        assert code == (0 if harmless else 2), (words, shown.err)
        assert "Traceback" not in shown.err
    picture = next(folder.rglob("*.png"))
    assert cli.main(["predict", str(hostile), str(picture), "--out", str(tmp_path / "p.csv")]) == 0
    assert not marker.exists() and "evil" not in sys.modules


def test_data_that_are_code_are_run_where_the_user_names_them(run, folder, tmp_path):
    hostile = tmp_path / "run"
    shutil.copytree(run, hostile)
    recipe = tmp_path / "recipe.py"
    recipe.write_text(f"def data():\n    return {str(folder)!r}\n")
    about = json.loads((hostile / "config.json").read_text())
    about["data"] = about["config"]["data"] = f"{recipe}:data"
    (hostile / "config.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match=f"--data {recipe}:data"):
        use.evaluate(hostile)
    assert use.evaluate(hostile, f"{recipe}:data")["count"] == 36
    load_file(recipe)  # as `jft finetune recipe.py` does: it is this process's own now
    assert use.evaluate(hostile)["count"] == len(use.own_validation(run))


FORMULAS = ["=cmd|' /C calc'!A0", "+1+1", "-2+3", "@SUM(1)", '=HYPERLINK("http://x")', "＝1+1", "-1", "+3.5e2", "ok=1"]


def test_no_cell_is_a_formula(tmp_path):
    import csv

    rows = [{"path": f, "class_index": 0, "label": f, "probability": -0.5, "error": f} for f in FORMULAS]
    bundle.write_predictions(tmp_path / "p.csv", rows)
    with open(tmp_path / "p.csv", newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    for row, given in zip(found, FORMULAS, strict=True):
        for column in ("path", "label", "error"):
            assert row[column].removeprefix("'").removeprefix("./") == given
            assert not row[column].startswith(("=", "@", "＝")) and row[column] not in ("+1+1", "-2+3")
        assert row["probability"] == "-0.5" and os.path.normpath(row["path"]) == os.path.normpath(given)
    assert [row["label"] for row in found][-3:] == FORMULAS[-3:]


def test_a_table_never_leads_out_of_its_folder(tmp_path):
    for i in range(4):
        (tmp_path / "in" / f"{i}.png").parent.mkdir(exist_ok=True)
        np.zeros(1).tofile(tmp_path / "in" / f"{i}.png")
    np.zeros(1).tofile(tmp_path / "secret.png")
    climbs = [
        "../secret.png",
        "x/../../secret.png",
        str(tmp_path / "secret.png"),
        "./../secret.png",
        "..",
        "/",
        "\\..\\x",
        "~/x",
    ]
    for path in climbs:
        (tmp_path / "in" / "index.csv").write_text(f"path,label\n0.png,a\n1.png,b\n{path},a\n")
        with pytest.raises(UserError, match=r"outside|do not exist"):
            load(tmp_path / "in" / "index.csv")
