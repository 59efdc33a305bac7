"""The loop on a tiny model: what a run leaves behind, and law 5: stopped anywhere and resumed is never stopped."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import closing
from dataclasses import replace

import jax
import numpy as np
import pytest
from PIL import Image

import jft
from jft import Stage, build, checkpoint, hyper, lock, metrics, probes, train, use
from jft.bundle import load
from jft.config import Config
from jft.data import sources
from jft.errors import UserError
from jft.lora import read_adapter
from jft.preprocess import Preprocess
from jft.report.live import make_display
from jft.run import entered

pytestmark = pytest.mark.usefixtures("optax_promotion")
PLAN = (Stage("head", ("head",), epochs=2, augment=()), Stage("top", ("head", ("block2", 0.5)), epochs=2))


def config(folder, workdir, **changes) -> Config:
    """Two stages, one on cached features and one augmented, so that every kind of randomness is in the run."""
    base = Config(
        data=str(folder), model="tiny_vit", weights="none", plan=PLAN, batch=8, lr=1e-2, workdir=str(workdir),
        display="quiet", dropout=0.1, drop_path=0.1, checkpoint_every=0.0,
    )  # fmt: skip
    return base.replace(**changes)


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    with jax.numpy_dtype_promotion("standard"):
        return train.train(config(folder, tmp_path_factory.mktemp("finished") / "run"))


def traces(workdir):
    """All that a run computes, as bytes: the model, the log, the predictions and the last checkpoint's leaves."""
    found = {f: (workdir / f).read_bytes() for f in ("model/model.safetensors", "metrics.jsonl", "predictions.csv")}
    found["checkpoint"] = position(workdir)["sums"]
    return found


def position(workdir):
    """Of the last checkpoint."""
    with closing(checkpoint.Checkpoints(workdir / "checkpoints")) as kept:
        return kept.positions()[0][1]


def test_a_run_leaves_what_the_contract_names(finished, folder):
    w, r = finished.workdir, finished.result
    expected = ["checkpoints", "config.json", "metrics.jsonl", "model", "predictions.csv", "predictions.npz"]
    assert set(expected + ["report.html", "result.json"]) <= {p.name for p in w.iterdir()}
    assert json.loads((w / "result.json").read_text()) == r
    assert json.loads((w / "config.json").read_text())["weights"] is None
    assert r["classes"] == ["blue", "grün & <b>", "red"]
    assert (r["val"]["count"], r["train"]) == (6, {"count": 30, "per_class": [10, 10, 10]})
    assert set(r["memory"]) <= set(r["seconds"]) and all(m["process"] > 10**7 for m in r["memory"].values())
    with open(w / "predictions.csv", newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            assert sum(float(row[f"p:{c}"]) for c in r["classes"]) == pytest.approx(1, abs=1e-4)
    assert [(s["name"], s["steps"]) for s in r["stages"]] == [("head", 8), ("top", 8)]
    assert r["stages"][0]["trainable_params"] == 3 * 32 + 3
    assert set(r["seconds"]) == {"total", "import", "compile", "data", "features", "train", "eval", "save"}
    rows = [json.loads(line) for line in (w / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if "loss" in row]
    assert steps == list(range(1, 17))
    assert all(np.isfinite(row["loss"]) for row in rows if "loss" in row)


def test_val_is_the_accuracy_of_the_model_that_was_written(finished):
    assert finished.evaluate()["accuracy"] == finished.result["val"]["accuracy"]
    model = load(finished.workdir / "model")
    assert model.classes == tuple(finished.result["classes"])


def test_the_first_loss_is_ln_k(finished):
    first = json.loads((finished.workdir / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(np.log(3), rel=1e-6)


def test_a_finished_run_is_left_alone(finished, folder):
    before = {p: p.stat().st_mtime_ns for p in finished.workdir.rglob("*")}
    again = train.train(config(folder, finished.workdir))
    assert again.result == finished.result
    assert before == {p: p.stat().st_mtime_ns for p in finished.workdir.rglob("*")}


def test_what_a_killed_process_was_writing_is_removed_at_the_next_start(finished, folder, tmp_path):
    """Before the folder had a config, and after it had its result: the report was under way."""
    page, begun = finished.workdir / "report.html", tmp_path / "run"
    page.unlink()
    begun.mkdir()
    left = [page.with_name("report.html.0a1b2c3d.part"), begun / "config.json.0a1b2c3d.part"]
    for part in left:
        part.write_text("half")
    train.train(config(folder, finished.workdir))
    assert page.exists()
    with entered(begun, {"config": {}}, print) as (result, _):
        assert result is None and (begun / "config.json").exists()
    assert not any(part.exists() for part in left)


def test_another_config_on_the_folder_is_refused_with_the_differences(finished, folder):
    with pytest.raises(UserError, match=r"(?s)another configuration.*batch: 8 → 16"):
        train.train(config(folder, finished.workdir, batch=16))


# The first step after the boundary between the stages, and, where there is time, others.
@pytest.mark.parametrize("at", [9, *(pytest.param(k, marks=pytest.mark.slow) for k in (1, 5, 8, 12, 16))])
def test_a_run_that_crashed_anywhere_ends_bit_equal(finished, folder, tmp_path, crash, at):
    """Crash when the line of this step is written: in stage 1, at the boundary, in stage 2, before the very end."""
    crash(config(folder, tmp_path / "run"), at)
    train.train(config(folder, tmp_path / "run"))
    assert traces(tmp_path / "run") == traces(finished.workdir)


@pytest.mark.slow
def test_an_image_that_can_no_longer_be_read_stops_a_resumed_run(folder, tmp_path, crash, monkeypatch):
    """The images left are others in another order: going on would be another run."""
    monkeypatch.setattr(train, "contents", lambda splits: "")  # as where these are none of those that are looked at
    shutil.copytree(folder, tmp_path / "data")
    made = config(tmp_path / "data", tmp_path / "run")
    one, other = (tmp_path / "data/red" / f"{i}.png" for i in (2, 3))
    content = {file: file.read_bytes() for file in (one, other)}
    one.write_bytes(content[one][:40])
    crash(made, 9)
    other.write_bytes(content[other][:40])
    with pytest.raises(UserError, match=r"Of (train|val) \d+ images could be read .* and \d+ can be now"):
        train.train(made)
    one.write_bytes(content[one])
    with pytest.raises(UserError, match=r"Of (train|val) (\d+) images could be read .* and \2 others can be now"):
        train.train(made)
    one.write_bytes(content[one][:40])
    other.write_bytes(content[other])
    assert train.train(made).result["val"]["count"] in (5, 6)


KILLER = """
import os, signal, sys
import jax
jax.config.update("jax_default_matmul_precision", "highest")
from jft import checkpoint, train
save, left = checkpoint.Checkpoints.save, [int(sys.argv[1])]
def kill(self, step, *args):
    save(self, step, *args)
    print("state of step", step, flush=True)
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL if sys.argv[2] == "kill" else signal.SIGINT)
checkpoint.Checkpoints.save = kill
from jft.cli import main
sys.exit(main(sys.argv[3:]))
"""


def start(saves, how, *arguments):
    env = os.environ | {"XLA_FLAGS": "", "JFT_CACHE": os.environ["JFT_CACHE"], "PYTHONWARNINGS": "error"}
    command = [sys.executable, "-c", KILLER, str(saves), how, "finetune", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=900)


@pytest.mark.slow
def test_killed_by_the_system_and_begun_again_ends_bit_equal(folder, tmp_path):
    """SIGKILL in stage 1, at the boundary, in stage 2, while a checkpoint is being written; Ctrl-C saves and stops."""

    def arguments(name):
        return (
            f"--data {folder} --model tiny_vit --weights none --plan lp-ft --epochs 4 --batch 8 --lr 1e-2 "
            f"--dropout 0.1 --augment flip --checkpoint-every 0 --display plain --workdir {tmp_path / name}"
        ).split()

    reference = start(-1, "kill", *arguments("reference"))
    assert reference.returncode == 0, reference.stderr
    assert "Validation accuracy" in reference.stdout
    # A call takes several steps, more or fewer by the model and the machine: which are saved the reference tells.
    steps = [int(s) for s in re.findall(r"^state of step (\d+)$", reference.stdout, re.M)]
    boundary = steps.index(steps[-1] // 2)
    for name, saved, how in (
        ("one", 0, "kill"),
        ("boundary", boundary, "kill"),
        ("two", boundary + 1, "kill"),
        ("int", 1, "int"),
    ):
        assert saved < len(steps) - 1, steps  # or nothing is left to do
        stopped = start(saved + 1, how, *arguments(name))
        if how == "kill":
            assert stopped.returncode == -signal.SIGKILL, stopped.stderr
        else:
            assert stopped.returncode == 130, stopped.stderr
            assert "Ctrl-C again stops at once" in stopped.stderr and "saved" in stopped.stderr
            assert "goes on from there" in stopped.stderr
        assert not (tmp_path / name / "result.json").exists()
        again = start(-1, "kill", *arguments(name))
        assert again.returncode == 0, again.stderr
        assert traces(tmp_path / name) == traces(tmp_path / "reference"), name


# A read that fails leaves Orbax's other reads to end in an event loop that is closed.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_used(finished, folder, tmp_path, crash):
    crash(config(folder, tmp_path / "run"), 12)
    newest = max((tmp_path / "run/checkpoints").iterdir(), key=lambda p: int(p.name) if p.name.isdigit() else -1)
    for file in (newest / "state").rglob("*"):
        if file.is_file() and "/d/" in str(file):
            data = bytearray(file.read_bytes())
            data[len(data) // 2] ^= 1
            file.write_bytes(data)
    train.train(config(folder, tmp_path / "run"))
    assert (tmp_path / "run/checkpoints-damaged" / newest.name).is_dir()
    assert traces(tmp_path / "run") == traces(finished.workdir)


def test_frozen_bytes_do_not_change_over_a_whole_run(folder, tmp_path):
    """Law 1 through import, training, checkpoint and bundle."""
    source = train.train(config(folder, tmp_path / "source", plan="full", epochs=1))
    weights = str(source.workdir / "model/model.safetensors")
    run = train.train(config(folder, tmp_path / "run", weights=weights, plan=PLAN[1:], keep_head=True))
    a, b = load(source.workdir / "model"), load(run.workdir / "model")
    moved = {n for n in a.params if a.params[n].tobytes() != b.params[n].tobytes()}
    assert moved == {n for n in a.params if n.startswith(("head/", "block2/"))}


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"features": "none"}, {"resident": 0.0}])
def test_features_and_residence_do_not_change_the_result(finished, folder, tmp_path, options):
    """Where the numbers come from (cache, memory, stream) is a matter of speed."""
    run = train.train(config(folder, tmp_path / "run", **options))
    a, b = load(finished.workdir / "model"), load(run.workdir / "model")
    for name in a.params:
        np.testing.assert_allclose(a.params[name], b.params[name], rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["fsdp", "pmap"])
def test_shardings_agree_through_the_loop(folder, tmp_path, sharding):
    plain = dict(dropout=0.0, drop_path=0.0, plan=PLAN, model="tiny_resnet")
    plain["plan"] = (Stage("top", ("head", "stage4"), epochs=1),)
    one = train.train(config(folder, tmp_path / "one", **plain))
    two = train.train(config(folder, tmp_path / "two", sharding=sharding, **plain))
    a, b = load(one.workdir / "model"), load(two.workdir / "model")
    for name in a.params:
        np.testing.assert_allclose(a.params[name], b.params[name], rtol=2e-3, atol=2e-4, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("free", ["less", "more"])
def test_a_run_goes_on_with_the_images_where_they_were(folder, tmp_path, crash, monkeypatch, capsys, free):
    """Whether they lie in memory is another program, which rounds otherwise; how much is free changes all the time."""
    size = 3 * 32 * 32 * 30
    begun, now = (size / 0.49, size / 0.6) if free == "less" else (size / 0.6, size / 0.4)

    def with_free(count):
        monkeypatch.setattr(build, "memory_free", lambda: int(count))

    made = config(folder, tmp_path / "run", plan=(replace(PLAN[1], augment=("flip",)),))
    with_free(begun)
    crash(made, 5)
    shutil.copytree(tmp_path / "run", tmp_path / "otherwise")
    whole = train.train(config(folder, tmp_path / "whole", plan=made.plan))
    with_free(now)
    train.train(made)
    assert traces(tmp_path / "run") == traces(whole.workdir)
    assert position(tmp_path / "run")["places"] == position(whole.workdir)["places"]
    assert "within rounding" not in "".join(capsys.readouterr())
    train.train(
        made.replace(workdir=str(tmp_path / "otherwise"), resident=0.0 if free == "less" else 0.9, display="plain")
    )
    assert "within rounding of" in "".join(capsys.readouterr())


def test_bad_images_are_named_counted_and_left_out(folder, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(folder, data / "train")
    (data / "train" / "red" / "text.jpg").write_text("not an image")
    (data / "train" / "blue" / "empty.png").write_bytes(b"")
    (data / "test" / "red").mkdir(parents=True)
    (data / "test" / "red" / "all.png").write_text("not an image")
    result = train.train(config(data, tmp_path / "run", plan=PLAN[:1], display="plain")).result
    excluded = {e["path"]: e["reason"] for e in result["excluded"]}
    assert {name.split("/")[-1] for name in excluded} == {"text.jpg", "empty.png", "all.png"}
    assert result["train"]["count"] + result["val"]["count"] == 36
    assert "test" not in result and (tmp_path / "run/model").is_dir()  # a test that says nothing costs no run
    told = "".join(capsys.readouterr())
    assert 0 < told.index("Not one image of test can be read") < told.index("Not one image of test could be read")


@pytest.mark.parametrize("resident", [0.5, 0.0])
def test_a_split_or_a_class_without_a_readable_image_is_told(folder, resident):
    splits = build.read_data(Config(data=str(folder)))
    matrix = np.eye(3, dtype=np.float32)[splits.train.labels]
    several = replace(splits, train=replace(splits.train, labels=matrix, read=unreadable(splits.train, 2)))
    for broken, told in (
        (replace(splits, train=replace(splits.train, read=lambda i: b"text")), "None of the 30 images can be used"),
        (replace(splits, val=replace(splits.val, read=lambda i: b"text")), "None of the 6 images can be used"),
        (replace(splits, train=replace(splits.train, read=unreadable(splits.train, 2))), "No image of red could"),
        (several, "No image of red could be read for training"),
    ):
        with pytest.raises(UserError, match=told), closing(make_display("quiet")) as display:
            build.load_images(Config(resident=resident), broken, PLAN, Preprocess((8, 8)), display)


def unreadable(dataset, label):
    """How its pictures are read, if those of a label cannot be."""
    return lambda i: b"text" if dataset.labels[i] == label else dataset.read(i)


def test_shots_are_nested_and_drawn_by_seed(folder):
    splits = build.read_data(Config(data=str(folder)))
    one, three = (set(build.few_shots(splits.train, k, 0).names) for k in (1, 3))
    assert len(one) == 3 and len(three) == 9 and one < three
    assert one != set(build.few_shots(splits.train, 1, 1).names)


def test_in_python_as_short_as_promised(folder, tmp_path):
    options = dict(model="tiny_vit", weights="none", batch=8, epochs=1, workdir=str(tmp_path / "w"), display="quiet")
    run = jft.finetune(data=str(folder), **options)
    picture = next((folder / "red").iterdir())
    (row,) = run.predict(picture)
    assert row["path"].endswith(picture.name) and row["label"] in run.result["classes"]
    assert 1 / 3 <= row["probability"] <= 1


EVERYTHING = dict(ema=0.5, carry=True, patience=1, eval_every=0.25, sam=0.01, optimizer="adam", lr=0.3)


@pytest.mark.slow
def test_averages_patience_and_carried_state_resume_bit_equal(folder, tmp_path, crash):
    """Law 5 with all that a state can hold besides weights and an optimizer; a stage that patience ends included."""
    whole = train.train(config(folder, tmp_path / "whole", **EVERYTHING))
    steps = [s["steps"] for s in whole.result["stages"]]
    assert min(steps) < 8, "patience ended no stage: this test tests nothing"
    crash(config(folder, tmp_path / "run", **EVERYTHING), 10)
    assert [s["steps"] for s in train.train(config(folder, tmp_path / "run", **EVERYTHING)).result["stages"]] == steps
    assert traces(tmp_path / "run") == traces(whole.workdir)


@pytest.mark.slow
def test_steps_that_are_not_finite_are_told_and_end_the_run_at_last(folder, tmp_path, capsys):
    plan = (Stage("all", ("*",), epochs=20, lr=0.1),)
    with pytest.raises(UserError, match="10 steps in a row"):
        train.train(config(folder, tmp_path / "run", plan=plan, loss=nan_loss, display="plain"))
    shown = capsys.readouterr()
    assert "Step 1: the loss or gradient is not finite" in shown.out + shown.err
    assert "The first number that is not finite is in the loss, of 8 of 8 images" in shown.out + shown.err


@pytest.mark.slow
def test_a_run_too_short_for_ten_steps_ends_too_where_none_was_applied(folder, tmp_path, capsys):
    made = config(folder, tmp_path / "run", plan=(Stage("all", ("*",), epochs=0.5, lr=0.1),), loss=nan_loss)
    with pytest.raises(UserError, match=r"of \d steps in a row"):
        train.train(made.replace(display="plain"))
    assert "best so far" not in capsys.readouterr().out


def nan_loss(logits, batch):
    return logits.sum(-1) * np.float32(np.nan)


@pytest.mark.slow
def test_low_rank_updates_through_the_loop(folder, tmp_path):
    run = train.train(config(folder, tmp_path / "run", plan="lora", lora={"rank": 2}, epochs=2))
    assert run.evaluate()["accuracy"] == run.result["val"]["accuracy"]
    assert (run.workdir / "adapter.safetensors").stat().st_size < 40_000
    assert not any("lora" in n for n in load(run.workdir / "model").params)


@pytest.mark.slow
def test_prompts_through_the_loop(folder, tmp_path):
    source = train.train(config(folder, tmp_path / "source", plan="full", epochs=0.5)).workdir
    file = str(source / "model/model.safetensors")
    run = train.train(
        config(folder, tmp_path / "run", plan="vpt", weights=file, epochs=1, model_options={"prompts": 3})
    )
    a, b = load(source / "model").params, load(run.workdir / "model").params
    assert b.keys() - a.keys() == {f"block{i}/prompts" for i in range(3)}
    assert {n for n in a if a[n].tobytes() != b[n].tobytes()} == {"head/kernel", "head/bias"}
    again = read_adapter(run.workdir / "adapter.safetensors", load(run.workdir / "model").model, a)
    assert again.keys() == b.keys() and all(again[n].tobytes() == b[n].tobytes() for n in b)
    assert run.evaluate()["accuracy"] == run.result["val"]["accuracy"]
    next_run = hyper.follow_weights(Config(data=str(folder), weights=str(run.workdir), plan="full"))
    _, params, _, loaded = build.build(next_run, ["a", "b"])  # from what was tuned, prompts and all
    assert loaded.missing == ("head/bias", "head/kernel")
    assert all(np.asarray(params[n]).tobytes() == b[n].tobytes() for n in b if n not in loaded.missing)


def test_a_stop_asked_for_at_the_very_end_is_not_forgotten(folder, tmp_path, monkeypatch):
    """The run is finished by then; a comparison must not go on to the next."""
    finish = train.Run.finish

    def late(self, *arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return finish(self, *arguments)

    monkeypatch.setattr(train.Run, "finish", late)
    with pytest.raises(train.Interrupted, match="is finished"):
        jft.finetune(config(folder, tmp_path / "runs", plan=PLAN[:1], epochs=1, seeds=2))
    assert len(list((tmp_path / "runs").rglob("result.json"))) == 1


@pytest.mark.slow
def test_of_several_labels_the_best_state_is_that_of_the_least_loss(tmp_path):
    """Not of most images with every label right, which rises and falls with a few of them."""
    rng = np.random.default_rng(0)
    data = {
        s: [(Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8)), "ab"[i % 2] + "|c" * (i % 3 == 0))
            for i in range(12)]
        for s in ("train", "val")
    }  # fmt: skip
    for split, rows in data.items():
        for i, (image, _) in enumerate(rows):
            image.save(tmp_path / f"{split}{i}.png")
    lines = [f"{split}{i}.png,{labels},{split}" for split, rows in data.items() for i, (_, labels) in enumerate(rows)]
    (tmp_path / "labels.csv").write_text("path,label,split\n" + "\n".join(lines) + "\n")
    plan = (Stage("head", ("head",), epochs=6, lr=0.3, augment=()),)
    run = train.train(config(tmp_path / "labels.csv", tmp_path / "run", plan=plan, batch=8))
    rows = [json.loads(line) for line in (run.workdir / "metrics.jsonl").read_text().splitlines()]
    seen = {row["step"]: row["val_loss"] for row in rows if "val_loss" in row}
    assert run.result["val"]["best_step"] == min(seen, key=seen.get) and len(seen) > 3
    # And told by its mAP, in a validation's line as in the result.
    of_best = next(row for row in rows if "val_loss" in row and row["step"] == run.result["val"]["best_step"])
    for name in ("average_precision", "accuracy"):
        assert of_best[f"val_{name}"] == pytest.approx(run.result["val"][name], abs=1e-12)
        assert run.result["last"][name] == run.result["stages"][-1][f"val_{name}"]


def probe_of(workdir, folder, kind):
    """What a probe of the written model's features reaches, all computed anew."""
    model, splits = load(workdir / "model"), sources.load(str(folder))
    x, test = (
        np.concatenate([chunk.features for chunk in use.run_chunks(model, split, features=True)])
        for split in (splits.train, splits.val)
    )
    said = probes.answers(kind, x, splits.train.labels, test, len(splits.classes))
    return metrics.accuracy(said, splits.val.labels)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["knn", "ridge"])
def test_a_probe_is_of_the_features_as_they_are(folder, tmp_path, kind):
    """Of a head's stage kept ones, then of what has trained: the last state is the only one of its stage."""
    plan = (Stage("head", ("head",), epochs=2, lr=1e-3), Stage("top", ("block*", "head"), epochs=2, lr=1e-2))
    one = train.train(config(folder, tmp_path / "one", plan=plan[:1], probe=kind))
    rows = [json.loads(line) for line in (one.workdir / "metrics.jsonl").read_text().splitlines()]
    told = [row[f"val_{kind}"] for row in rows if "val_loss" in row]
    assert told == [pytest.approx(probe_of(one.workdir, folder, kind))] * 2
    made = config(folder, tmp_path / "two", plan=plan[1:], probe=kind, eval_every=9, augment=("flip",))
    two = train.train(made)
    assert two.result["last"][kind] == pytest.approx(probe_of(two.workdir, folder, kind))
    assert "probe" in (two.workdir / "report.html").read_text()


def test_quantities_have_no_logistic_probe(folder, tmp_path):
    values = {"train": (np.arange(768, dtype=np.uint8).reshape(4, 8, 8, 3), np.arange(4.0))}
    with pytest.raises(UserError, match="--probe ridge"):
        train.train(config(folder, tmp_path / "run", data=lambda: values, probe="logistic"))
    assert not (tmp_path / "run").exists()


def test_an_image_size_that_the_model_does_not_take_is_refused(folder, tmp_path):
    with pytest.raises(UserError, match="--image-size 48,48 changes both"):
        train.train(config(folder, tmp_path / "run", preprocess={"size": (48, 48)}))
    assert not (tmp_path / "run").exists()


def test_a_run_killed_at_its_very_end_is_tidied(finished, folder):
    """After its result, before its report was drawn and its lock let go of."""
    report, left = finished.workdir / "report.html", finished.workdir / lock.NAME
    report.unlink()
    dead = subprocess.Popen(["true"])
    dead.wait()
    left.write_text(json.dumps({**lock._mine(), "pid": dead.pid}))
    again = train.train(config(folder, finished.workdir))
    assert report.exists() and again.result == finished.result and not left.exists()
