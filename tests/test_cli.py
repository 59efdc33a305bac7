"""The command line as a user meets it: help, the whole way, and every kind of wrong input with its one message."""

import csv
import dataclasses
import errno
import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from jft import cli, config
from jft.errors import UserError

pytestmark = pytest.mark.usefixtures("optax_promotion")
COMMANDS = (
    "finetune",
    "plan",
    "rank",
    "lr",
    "sweep",
    "evaluate",
    "predict",
    "export",
    "import",
    "report",
    "data",
    "models",
)


def test_help_needs_no_jax():
    code = "import sys; from jft.cli import main; main(['--help']); sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "examples:" in shown and f"jft {command}" in shown
    assert "SUPPRESS" not in shown and "--keep_head" not in shown  # argparse's own words; a second spelling


def test_every_field_of_a_config_is_an_option_with_a_sentence():
    for field in dataclasses.fields(config.Config):
        assert len(field.metadata["help"]) > 10, field.name


def command(folder, workdir):
    words = f"finetune --data {folder} --model tiny_vit --weights none --epochs 2 --batch 8 --workdir {workdir}"
    return [*words.split(), "--display", "plain", "--preprocess.crop_pct", "1.0"]


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    import jax

    workdir = tmp_path_factory.mktemp("cli") / "run"
    with jax.numpy_dtype_promotion("standard"):
        assert cli.main([*command(folder, workdir), "--predict", str(folder / "red")]) == 0
    return workdir


def table(file):
    return list(csv.DictReader(file.read_text(encoding="utf-8").splitlines()))


def test_evaluate_tells_what_the_run_told(run, capsys):
    assert cli.main(["evaluate", str(run), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["accuracy"] == json.loads((run / "result.json").read_text())["val"]["accuracy"]
    assert (told["split"], told["count"], told["left_out"]) == ("val", 6, 0)


def test_evaluate_counts_every_image_of_other_data_once(run, folder, capsys):
    assert cli.main(["evaluate", str(run), "--data", str(folder), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["split"], told["count"]) == ("all", 36)


def test_predict_has_a_row_for_everything_it_was_given(run, folder, tmp_path):
    bad = tmp_path / "text.jpg"
    bad.write_text("no image")
    out = tmp_path / "preds.csv"
    assert cli.main(["predict", str(run), str(folder / "red"), str(bad), "--out", str(out), "--top-k", "2"]) == 0
    rows = table(out)
    assert list(rows[0]) == [
        "path", "class_index", "label", "probability", "label_2", "probability_2", "error",
    ]  # fmt: skip
    assert len(rows) == 13
    (wrong,) = [r for r in rows if r["error"]]
    assert wrong["path"].endswith("text.jpg") and wrong["label"] == ""
    assert all(r["label"] in ("blue", "grün & <b>", "red") for r in rows if not r["error"])


def test_predict_of_the_validation_images_is_what_the_run_wrote(run, folder, tmp_path):
    mine = {r["path"]: r for r in table(run / "predictions.csv")}
    out = tmp_path / "preds.csv"
    assert cli.main(["predict", str(run), *(str(folder / name) for name in mine), "--out", str(out)]) == 0
    for row in table(out):
        (same,) = [r for name, r in mine.items() if row["path"].endswith(name)]
        assert row["label"] == same["label"]
        assert float(row["probability"]) == pytest.approx(float(same["probability"]), rel=1e-4)


def test_finetune_predicts_what_predict_does_and_again_on_a_finished_run(run, folder, tmp_path, capsys):
    one, two = tmp_path / "one.csv", tmp_path / "two.jsonl"
    assert cli.main(["predict", str(run), str(folder / "red"), "--out", str(one)]) == 0
    assert (run / "predicted.csv").read_bytes() == one.read_bytes()
    before = (run / "config.json").read_text()
    capsys.readouterr()
    words = ["--predict", str(folder / "blue"), str(folder / "red"), "--out", str(two), "--json"]
    assert cli.main([*command(folder, run), *words]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["predicted"] == {"file": str(two), "rows": 24, "unreadable": 0}
    assert told["classes"] == ["blue", "grün & <b>", "red"] and len(two.read_text().splitlines()) == 24
    assert (run / "config.json").read_text() == before and "predict" not in before


def test_plan_trains_nothing_and_tells_all(folder, tmp_path, capsys):
    words = f"plan --data {folder} --model tiny_resnet --plan lp-ft --batch 8 --json"
    assert cli.main(words.split()) == 0
    told = json.loads(capsys.readouterr().out)
    assert [s["name"] for s in told["stages"]] == ["head", "full"]
    head = told["stages"][0]
    # On so small a model the preparation of the images counts; law 2's own test is in test_step.py.
    assert head["step"]["flops"] < 1.05 * told["forward"]["flops"]
    assert head["batch_norm"]["batch statistics"] == []
    assert head["optimizer_bytes"] < 3 * 4 * head["trainable_params"]
    assert told["stages"][-1]["step"]["flops"] > 2 * told["forward"]["flops"]
    assert cli.main([*words.split()[:-1], "--fast", "--names"]) == 0
    assert "head/kernel" in capsys.readouterr().out


def test_plan_says_how_it_steps_and_counts_in_words(folder, tmp_path, capsys):
    words = f"plan --data {folder} --model tiny_vit --fast --batch 32 --hyper vit --epochs 1 --warmup 0.2"
    assert cli.main(words.split()) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("By --hyper for 30 images of about 40×36 pixels: ") and "optimizer sgd" in shown
    assert "3 classes, 30 training images at 384×384 pixels" in shown and "1 epoch, 1 step\n" in shown
    assert "optimizer     sgd, weight decay 0, cosine, warm-up 0.2 of the steps; " in shown
    (tmp_path / "p").symlink_to(folder)
    names = [f"p/red/{i}.png" for i in range(6)]
    for header, labels, told in (
        ("path,value:a,value:b", [f"{i},2" for i in range(6)], "2 quantities"),
        ("path,value", list("012345"), "1 quantity"),
        ("path,label", ["a", "a|b"] * 3, "2 labels"),
    ):
        lines = [header, *(f"{name},{label}" for name, label in zip(names, labels, strict=True))]
        (tmp_path / "l.csv").write_text("\n".join(lines))
        options = ["--model", "tiny_vit", "--fast", "--optimizer", "schedule-free", "--schedule", "one-cycle"]
        assert cli.main(["plan", "--data", str(tmp_path / "l.csv"), *options]) == 0
        shown = capsys.readouterr().out
        assert f", {told}, " in shown and "schedule-free, weight decay 0.0001, one-cycle; " in shown


@pytest.mark.slow
def test_plan_tells_the_memory_of_the_pieces_that_a_run_takes(folder, capsys):
    told = []
    for pieces in (1, 4):
        words = f"plan --data {folder} --model tiny_vit --plan full --batch 32 --accumulate {pieces} --json"
        assert cli.main(words.split()) == 0
        told.append(json.loads(capsys.readouterr().out)["stages"][0]["step"])
    whole, parted = told
    assert parted["pieces"] == 4 and "pieces" not in whole and parted["flops"] == whole["flops"]
    assert parted["temporary_bytes"] < whole["temporary_bytes"]


def test_models_lists_by_pattern(capsys):
    assert cli.main(["models", "resnet*"]) == 0
    shown = capsys.readouterr().out
    assert "resnet50" in shown and "25.56 M" in shown and "vit" not in shown
    assert " 4.09 " in shown  # GMACs, torchvision's documentation


def test_models_tells_more_of_a_few(capsys):
    assert cli.main(["models", "vit_base_patch16_224"]) == 0
    shown = capsys.readouterr().out
    assert "17.56" in shown and "arxiv.org/abs/2106.10270" in shown and "ImageNet-21k" in shown


def test_a_config_file_and_options_over_it(folder, tmp_path):
    file = tmp_path / "recipe.py"
    file.write_text(
        f"import jft\ndef config():\n    return jft.Config(data={str(folder)!r}, lr=0.5, augment=('flip',))\n"
    )
    options = cli.make_parser().parse_args(
        ["finetune", str(file), "--lr", "0.1", "--preprocess.mean", "0.5", "0.5", "0.5", "--weight-decay", "0"]
    )
    (made,) = cli.configs_of(options).values()
    assert (made.lr, made.augment, made.weight_decay) == (0.1, ("flip",), 0.0)
    assert made.preprocess == {"mean": (0.5, 0.5, 0.5)} and made.workdir == "runs/recipe"


def wrong_inputs(folder, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    one = tmp_path / "one"
    (one / "cats").mkdir(parents=True)
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(one / "cats" / "a.png")
    Image.fromarray(np.ones((8, 8, 3), np.uint8)).save(one / "cats" / "b.png")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(b"\x40\0\0\0\0\0\0\0{")
    other = tmp_path / "other.safetensors"
    from jft.weights.writers import write_safetensors

    write_safetensors(other, {"conv1.weight": np.zeros((4, 3, 7, 7), np.float32)})
    good = ["--data", str(folder), "--model", "tiny_resnet", "--weights", "none", "--batch", "8"]
    return {
        "no data": (["finetune"], "No data given"),
        "no such folder": (["finetune", "--data", "nowhere/at/all"], "nowhere/at/all"),
        "no images": (["finetune", "--data", str(empty)], "no images"),
        "one class": (["finetune", "--data", str(one)], "class"),
        "unknown model": (["finetune", *good, "--model", "resnet5"], "Did you mean resnet"),
        "unknown plan": (["finetune", *good, "--plan", "gradul"], "Did you mean gradual"),
        "plan before network": (["finetune", "--data", str(folder), "--plan", "gradul"], "There is no plan"),
        "truncated weights": (["finetune", *good, "--weights", str(cut)], "cut.safetensors"),
        "other weights": (["finetune", *good, "--weights", str(other)], "- "),
        "no such weights": (["finetune", *good, "--weights", "no/such.pth"], "such.pth"),
        "bad number": (["finetune", *good, "--lr", "fast"], "--lr was given 'fast'; a number is expected"),
        "unknown augmentation": (["finetune", *good, "--augment", "flop"], "Did you mean flip"),
        "unknown optimizer": (["finetune", *good, "--optimizer", "adamm"], "Did you mean adam"),
        "no such image": (["finetune", *good, "--predict", "no/such.jpg"], "no/such.jpg"),
        "no image": (["finetune", *good, "--predict", str(empty)], "no image"),
        "predict of several": (["finetune", *good, "--seeds", "2", "--predict", str(folder)], "of one run"),
        "nowhere to write": (
            ["finetune", *good, "--predict", str(folder), "--out", str(tmp_path / "none" / "p.csv")],
            "no folder",
        ),
        "out of nothing": (["finetune", *good, "--out", "p.csv"], "--predict"),
        "unknown nested field": (["finetune", *good, "--preprocess.crop", "1"], "crop"),
        "neither yes nor no": (["finetune", *good, "--keep-head", "maybe"], "given 'maybe'; yes or no is expected"),
        "no such config": (["finetune", "nothing.py"], "nothing.py"),
        "data for a config": (["finetune", str(folder)], f"Labelled images are given as --data {folder}."),
        "a text for a config": (["finetune", "words.md"], "words.md is no config, which is a Python file"),
        "unknown command": (["finetun"], "There is no command 'finetun'. Did you mean finetune?"),
        "no run": (["evaluate", str(empty)], "no model"),
        "no images to predict": (["predict", str(empty), "x.jpg"], "no model"),
        "unknown model name": (["models", "resnext999"], "No model"),
    }  # fmt: skip


@pytest.fixture
def cases(folder, tmp_path):
    return wrong_inputs(folder, tmp_path)


def test_wrong_input_is_one_message_and_exit_code_2(cases, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "words.md").write_text("words")
    for name, (words, message) in cases.items():
        try:
            code = cli.main(words)
        except SystemExit as stop:  # argparse's own way out
            code = stop.code
        shown = capsys.readouterr()
        assert code == 2, (name, shown)
        assert message in shown.err, (name, shown.err)
        assert "Traceback" not in shown.err, name
        assert not (tmp_path / "runs").exists(), f"{name} left a run folder behind"


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("--epoch", "--epochs"),
        ("--keep-hed", "--keep-head, --seed"),  # one spelling of each
        ("--learning_rate", "--lr"),
        ("--batch-size", "--batch"),
        ("--early-stopping", "--patience"),
        ("--preproces.size", "--preprocess.size, --preprocess.std, --preprocess.mean"),  # and no FIELD
    ],
)
def test_an_unknown_option_names_near_ones(given, meant, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["finetune", given, "3"])
    assert stop.value.code == 2
    assert f"Did you mean {meant}?" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["finetune"], ["finetune", "--dry-run"], ["finetune", "--overfit"], ["lr"]])
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--augment=flop", "Did you mean flip"),
        ("--optimizer=adamm", "Did you mean adam"),
        ("--schedule=nope", "nope"),
        ("--class-weights=nope", "nope"),
        ("--preprocess.crop_pct=0", "crop_pct is 0"),
        ("--preprocess.mean 120 120 120", "divided by 255"),
        ("--loss=jft.losses:correct --class-weights=inverse", "given to the loss as class_weights=…"),
        ("--track=nope", "There is no tracker 'nope'"),
    ],
)
def test_a_mistake_in_an_option_is_told_before_weights_are_read(command, option, message, folder, capsys):
    words = [*command, "--data", str(folder), "--model", "tiny_vit", "--weights", "no/such.pth", *option.split()]
    ignored = {"--track": ["finetune --dry-run", "finetune --overfit", "lr"], "--augment": ["finetune --overfit"]}
    if " ".join(command) not in ignored.get(option.split("=")[0], []):
        assert cli.main(words) == 2
        told = capsys.readouterr().err
        assert message in told and "such.pth" not in told


def test_what_options_are_called_elsewhere_leads_to_one_of_ours():
    ours = {f.name.replace("_", "-") for f in dataclasses.fields(config.Config)} | {"out"}
    assert set(cli.ELSEWHERE.values()) <= ours and not cli.ELSEWHERE.keys() & ours


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_whatever_stdout_is_encoded_in_all_is_told(encoding, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw := io.BytesIO(), encoding, newline="\n"))
    assert cli.main(["models", "resnet18"]) == 0
    with pytest.raises(SystemExit):
        cli.main(["finetune", "--help"])
    sys.stdout.flush()
    assert rb"L + \u03bb" in raw.getvalue() and "224×224".encode(encoding, "jft") in raw.getvalue()


def test_printed_json_stays_json_in_any_encoding(monkeypatch):
    from jft import use

    told = {"split": "val", "classes": ["é", "×", "蚂", "\U0001f41d", "\udcff"]}
    monkeypatch.setattr(use, "evaluate", lambda *_: told)
    for encoding in ("ascii", "cp1252", "utf-8"):
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw := io.BytesIO(), encoding))
        assert cli.main(["evaluate", "run", "--json"]) == 0
        sys.stdout.flush()
        assert json.loads(raw.getvalue().decode(encoding)) == told


def test_a_name_that_is_no_utf8_stays_what_it_is_in_a_printed_table(monkeypatch):
    from jft import use

    def written(outs, *_, **__):
        outs[0][0].write("photos/\udcff.png\n")
        return 1, 0

    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw := io.BytesIO(), "utf-8", newline="\n"))
    monkeypatch.setattr(use, "write_predictions", written)
    monkeypatch.setattr(use, "open_model", lambda _: None)
    assert cli.main(["predict", "run", "photos"]) == 0
    sys.stdout.flush()
    assert raw.getvalue() == b"photos/\xff.png\n"


def test_ctrl_c_while_a_module_is_imported_is_no_fault_of_ours(monkeypatch, capsys):
    def importing(_):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise ImportError("initialization failed") from None  # as jaxlib does; the context stays

    monkeypatch.setattr(cli, "run", importing)
    assert cli.main(["plan"]) == 130
    assert capsys.readouterr().err == "jft: stopped.\n"


def test_of_several_configs_json_is_one_list_and_of_one_an_object(tmp_path, monkeypatch, capsys):
    from jft import finder, preview, trial

    def found(*_, **__):
        rates, losses = np.geomspace(1e-6, 1, 9), np.linspace(1, 0.5, 9)
        return finder.Found(rates, losses, 0.01, "head", 1e-3, "--lr 0.01")

    one = trial.Trial(config.Config(), [], [1.0, 0.5], None, 1, 1)
    monkeypatch.setattr(preview, "preview", lambda *_, **__: {"forward": {"flops": float("nan")}})
    monkeypatch.setattr(finder, "find_lr", found)
    monkeypatch.setattr(trial, "dry_run", lambda _: one)
    monkeypatch.setattr(trial, "overfit", lambda _: one)
    monkeypatch.chdir(tmp_path)
    text = "from jft import Config\n\n\ndef config():\n    return {}\n"
    (tmp_path / "two.py").write_text(text.format("{'a/b': Config(), 'c': Config()}"))
    (tmp_path / "one.py").write_text(text.format("Config()"))
    for words in (["plan"], ["lr", "--plot", "x.svg"], ["finetune", "--dry-run"], ["finetune", "--overfit"]):
        assert cli.main([words[0], "two.py", *words[1:], "--json"]) == 0
        told = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
        assert [of["config"] for of in told] == ["a/b", "c"]
        assert cli.main([words[0], "one.py", *words[1:], "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["config"] == ""
    assert {p.name for p in tmp_path.glob("*.svg")} == {"x.svg", "x-a-b.svg", "x-c.svg"}


def test_overrides_are_typed():
    base = config.Config()
    assert config.override(base, "image-size", ["224", "192"]).image_size == (224, 192)
    assert config.override(base, "clip", ["none"]).clip is None
    assert config.override(base, "augment", ["none"]).augment in ((), None)
    assert config.override(base, "model_options.pool", ["avg"]).model_options == {"pool": "avg"}
    assert config.override(base, "penalty", ["jft.penalties:l2_sp"]).penalty.__name__ == "l2_sp"
    with pytest.raises(UserError, match="Did you mean epochs"):
        config.override(base, "epoch", ["3"])


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM])
def test_what_may_not_be_read_is_one_line_with_its_name(monkeypatch, capsys, number):
    def refuse(*_):
        raise PermissionError(number, os.strerror(number), "runs/a\x1b/config.json")

    monkeypatch.setattr(cli, "configs_of", refuse)
    assert cli.main(["finetune", "--data", "bees"]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"jft: runs/a\\x1b/config.json cannot be read or written: {os.strerror(number)}. ")
    assert told.count("\n") == 1
