"""Sweeps: the space, trials as runs, pruning, and that a sweep that was stopped goes on as if it had not been."""

import contextlib
import errno
import json
import math
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jft import Stage, cli, features, lock, losses, sweep, train
from jft.checkpoint import Checkpoints
from jft.config import Config, describe, write_json
from jft.errors import MachineError, UserError
from jft.run import MOST_SHARED, Result, Shared, entered, running

pytestmark = pytest.mark.usefixtures("optax_promotion")


def config(folder, workdir, **changes):
    base = Config(
        data=str(folder), model="tiny_vit", weights="none", batch=8, epochs=2.0, lr=1e-2, workdir=str(workdir),
        display="quiet", checkpoint_every=0.0,
    )  # fmt: skip
    return base.replace(**changes)


@pytest.mark.slow
def test_runs_share_features_and_are_the_same_as_alone(folder, tmp_path, monkeypatch):
    computed, rows = [], features.rows
    monkeypatch.setattr(features, "rows", lambda *a, **k: computed.append(1) or rows(*a, **k))
    shared = Shared()
    told = []
    for name in ("a", "b"):
        train.train(config(folder, tmp_path / name, epochs=1.0), shared=shared, watch=told.append)
    assert len(shared.features) == len(computed) == 2
    monkeypatch.setenv("JFT_CACHE", str(tmp_path / "another cache"))
    train.train(config(folder, tmp_path / "c", epochs=1.0))
    logs = {(tmp_path / name / "metrics.jsonl").read_bytes() for name in "abc"}
    assert len(logs) == 1 and len(computed) == 4
    assert [(t["done"], t["final"], t["step"]) for t in told] == [(1.0, True, 4)] * 2


@pytest.mark.slow
def test_seeds_compile_once_and_are_the_same_as_alone(folder, tmp_path, monkeypatch):
    traced, make = [], train.make_leg_step
    monkeypatch.setattr(train, "make_leg_step", lambda *a, **k: traced.append(a[0].seed) or make(*a, **k))

    def run(name, seed, shared, **changes):
        one = config(folder, tmp_path / name, seed=seed, epochs=1.0, **changes)
        train.train(one, shared=shared)
        wanted = ("metrics.jsonl", "model/model.safetensors", "predictions.csv")
        return [(tmp_path / name / file).read_bytes() for file in wanted]

    shared = Shared()
    run("first", 0, shared)
    second = run("second", 1, shared)
    assert traced == [0]
    assert run("at another rate", 1, shared, lr=3e-3) != second
    assert traced == [0, 1]
    for seed in (0, 1):  # weights of the classes are each seed's own
        run(f"weighted {seed}", seed, shared, lr=3e-3, class_weights="inverse")
    assert traced == [0, 1, 0, 1]
    assert run("alone", 1, None) == second
    shared.close()
    assert not shared.programs


def test_the_key_of_shared_features_is_all_they_depend_on():
    from jft.models import make_model

    model = make_model("tiny_vit", num_classes=3)
    params, _ = model.init(jax.random.key(0))
    images = np.zeros((2, 4, 4, 3), np.uint8)

    def key(stop="head", changed="", images=images, also=8):
        values = {n: np.asarray(v) + (1 if n == changed else 0) for n, v in params.items()}
        return features.key(model, stop, values, images, also)

    assert key() == key() == key(changed="head/kernel")
    others = [key("norm"), key(changed="block0/mlp/fc1/kernel"), key(images=images + 1), key(also=16)]
    assert len({key(), *others}) == 5
    shared = Shared()
    for i in range(MOST_SHARED + 1):
        shared.keep(str(i), jax.numpy.zeros(1))
    assert list(shared.features) == [str(i) for i in range(1, MOST_SHARED + 1)]


LR = {"lr": ("log", 1e-5, 1.0)}


class Runs:
    """In place of `train`: accuracy by how near the rate is to 1e-3, in ten validations; it can be stopped in one."""

    def __init__(self, stop_at=None):
        self.stop_at, self.lrs = stop_at, []

    def __call__(self, config, watch, shared):
        if config.plan == "vpt":
            raise UserError("Prompts are for tokens.")
        folder = Path(config.workdir)
        folder.mkdir(parents=True, exist_ok=True)
        self.lrs.append(config.lr)
        for i in range(1, 11):
            accuracy = max(0.0, 1 - 0.2 * abs(math.log10(config.lr / 1e-3))) * i / 10
            if (len(self.lrs), i) == self.stop_at:
                raise train.Interrupted("Stopped after step 3 and saved.")
            watch({"val_accuracy": accuracy, "done": i / 10, "final": i > 2})
        result = {"val": {"accuracy": accuracy, "loss": 1.0}, "seconds": {"total": 1.0}}
        write_json(folder / "result.json", result)
        return Result(folder, result)


def run(monkeypatch, workdir, runs=None, space=LR, several=False, **options):
    runs = runs or Runs()
    monkeypatch.setattr(sweep, "train", runs)
    monkeypatch.setattr(sweep, "_several", lambda config: several)
    return sweep.sweep(config("bees", workdir), space, **options), runs


def test_a_sweep_finds_the_rate_and_stops_bad_trials_early(monkeypatch, tmp_path):
    done, runs = run(monkeypatch, tmp_path / "s", trials=14)
    assert len(done.rows) == 14
    assert abs(math.log10(float(done.best["values"]["lr"]) / 1e-3)) < 0.5
    states = [r["state"] for r in done.rows]
    assert states[: sweep.UNPRUNED] == ["complete"] * sweep.UNPRUNED and "stopped early" in states
    assert done.best["accuracy"] == max(r["accuracy"] for r in done.rows if r["state"] == "complete")
    assert json.loads((done.workdir / "result.json").read_text())["best"] == done.best
    assert all(f"{float(r['values']['lr']):.3g}" == f"{lr:.3g}" for r, lr in zip(done.rows, runs.lrs, strict=True))
    page = (done.workdir / "sweep.html").read_text()
    assert page.count("<svg") == 2 and "no test split" in page and "stopped early" in page
    whole, _ = run(monkeypatch, tmp_path / "w", trials=14, prune=False)
    assert {r["state"] for r in whole.rows} == {"complete"}


def test_a_sweep_that_was_stopped_goes_on_as_if_it_had_not_been(monkeypatch, tmp_path):
    whole, _ = run(monkeypatch, tmp_path / "whole", trials=8)
    with pytest.raises(train.Interrupted, match="In trial 2: Stopped after step 3"):
        run(monkeypatch, tmp_path / "s", Runs(stop_at=(3, 5)), trials=8)
    with pytest.raises(KeyboardInterrupt):  # between a trial's draw and its run

        def killed(config, **kwargs):
            raise KeyboardInterrupt

        run(monkeypatch, tmp_path / "s", killed, trials=8)
    run(monkeypatch, tmp_path / "s", trials=5)
    done, runs = run(monkeypatch, tmp_path / "s", trials=8)
    assert len(runs.lrs) == 3

    def rows(swept):
        return [{k: v for k, v in r.items() if k != "folder"} for r in swept.rows]

    assert rows(done) == rows(whole)
    again, runs = run(monkeypatch, tmp_path / "s", trials=8)
    assert rows(again) == rows(whole) and not runs.lrs


def test_a_space_of_lists_is_gone_through_once(monkeypatch, tmp_path):
    space = {"lr": [1e-4, 1e-3, 1e-2], "weight_decay": [0.0, 1e-4]}
    done, runs = run(monkeypatch, tmp_path / "s", space=space, trials=50)
    assert sorted(runs.lrs) == [1e-4, 1e-4, 1e-3, 1e-3, 1e-2, 1e-2]
    assert done.best["values"]["lr"] == "0.001"


def test_no_trial_begins_after_the_time_is_over(monkeypatch, tmp_path):
    with pytest.raises(UserError, match=r"No trial of .* has ended"):
        run(monkeypatch, tmp_path / "s", seconds=-1.0)


def test_another_space_on_the_folder_is_refused_with_the_differences(monkeypatch, tmp_path):
    run(monkeypatch, tmp_path / "s", trials=1)
    with pytest.raises(UserError, match=re.escape("space.lr")):
        run(monkeypatch, tmp_path / "s", space={"lr": [1e-3]})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(UserError, match="holds no sweep"):
        run(monkeypatch, tmp_path / "other")


def test_a_trial_that_cannot_be_is_told_and_left_behind(monkeypatch, tmp_path):
    plans = {"plan": ["head", "vpt", "full"]}
    done, _ = run(monkeypatch, tmp_path / "s", space=plans)
    assert [r["state"] for r in done.rows] == ["complete", "failed", "complete"]
    assert done.rows[1]["error"] == "Prompts are for tokens."
    for _ in range(2):  # where nothing has begun, the mistake can be mended in the same folder
        with pytest.raises(UserError, match="Prompts are for tokens"):
            run(monkeypatch, tmp_path / "t", space={"plan": ["vpt", "head"]})
    run(monkeypatch, tmp_path / "t", space={"plan": ["head"]})


def diverging(*rates):
    """In place of `train`: these rates diverge, once the run has its folder."""
    runs = Runs()

    def train(config, watch, shared):
        if config.lr in rates:
            Path(config.workdir).mkdir(parents=True)
            raise UserError(f"The loss at {config.lr} was not finite.")
        return runs(config, watch, shared)

    return train


def test_a_first_trial_that_diverges_has_failed_and_the_sweep_goes_on(monkeypatch, tmp_path):
    done, _ = run(monkeypatch, tmp_path / "s", diverging(1.0, 0.1), space={"lr": [1.0, 0.1, 1e-3]})
    assert [r["state"] for r in done.rows] == ["failed", "failed", "complete"]
    assert done.best["number"] == 2


def test_where_every_trial_fails_the_last_ones_error_is_told(monkeypatch, tmp_path):
    space = {"lr": [1.0, 0.1]}
    for _ in range(2):  # the same command tells the same
        with pytest.raises(UserError, match=r"has completed, 2 failed.*trial 1 \(lr 0.1\): The loss at 0.1") as told:
            run(monkeypatch, tmp_path / "s", diverging(1.0, 0.1), space=space)
        assert "--seconds" not in str(told.value) and "--workdir" in str(told.value)


def test_an_error_that_comes_again_fails_the_trial_and_the_sweep_goes_on(monkeypatch, tmp_path):
    space, runs = {"lr": [1.0, 1e-3, 1e-2]}, Runs()

    def failing(config, watch, shared):
        if config.lr in (1.0, 1e-2):  # with the first nothing has a folder yet
            raise ZeroDivisionError(f"at {config.lr}")
        return runs(config, watch, shared)

    def killed(config, watch, shared):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # which says nothing of the trial
        run(monkeypatch, tmp_path / "s", killed, space=space)
    with pytest.raises(ZeroDivisionError):
        run(monkeypatch, tmp_path / "s", failing, space=space)
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, tmp_path / "s", killed, space=space)
    with pytest.raises(ZeroDivisionError, match=re.escape("at 0.01")):
        run(monkeypatch, tmp_path / "s", failing, space=space)
    done, _ = run(monkeypatch, tmp_path / "s", failing, space=space)
    assert [r["state"] for r in done.rows] == ["failed", "complete", "failed"]
    assert done.rows[0]["error"] == "ZeroDivisionError: at 1.0" and runs.lrs == [1e-3]


def test_an_error_that_is_mended_costs_no_trial(monkeypatch, tmp_path):
    def failing(config, watch, shared):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(monkeypatch, tmp_path / "s", failing, space={"lr": [1e-3]})
    done, _ = run(monkeypatch, tmp_path / "s", space={"lr": [1e-3]})
    assert [r["state"] for r in done.rows] == ["complete"]


@pytest.mark.parametrize("error", [PermissionError, MemoryError, OSError(errno.ENOSPC, "No space left on device")])
def test_what_the_machine_says_fails_no_trial_however_often(monkeypatch, tmp_path, error):
    def failing(config, watch, shared):
        Path(config.workdir).mkdir(parents=True, exist_ok=True)
        raise error

    for _ in range(3):
        with pytest.raises((PermissionError, MachineError)):
            run(monkeypatch, tmp_path / "s", failing, space={"lr": [1e-3]})
    done, _ = run(monkeypatch, tmp_path / "s", space={"lr": [1e-3]})
    assert [r["state"] for r in done.rows] == ["complete"]


def full_disk(folder):
    with running(folder):
        raise OSError(errno.ENOSPC, "No space left on device", str(folder / "metrics.jsonl"))


def full_memory(folder):
    with running(folder):
        raise MemoryError


def checkpoint(folder):
    with contextlib.closing(Checkpoints(folder / "checkpoints")) as kept, kept._writing():
        raise ValueError("No space left on device")


def in_use(folder):
    folder.mkdir(parents=True)
    with lock.hold(folder), entered(folder, {}, print):
        pass


def taken_over(folder):
    folder.mkdir(parents=True)
    with lock.hold(folder) as ours:
        (folder / "lock").write_text("{}")
        ours()


def not_writable(folder):
    folder.parent.mkdir()
    (folder.parent / "file").touch()
    with entered(folder.parent / "file" / "run", {}, print):
        pass


def other_images(folder):
    split = SimpleNamespace(about={"count": 2, "names": "0123"})
    train.Run._same_images(SimpleNamespace(data={"train": split}), {"train": 3})


HITS = [full_disk, full_memory, checkpoint, in_use, taken_over, not_writable, other_images]


@pytest.mark.parametrize("hit", HITS)
def test_disk_memory_and_locks_stop_the_sweep_and_cost_no_trial(monkeypatch, tmp_path, hit):
    runs, space = Runs(), {"lr": [1e-4, 1e-3, 1e-2]}

    def failing(config, watch, shared):
        return runs(config, watch, shared) if not runs.lrs else hit(tmp_path / "hit" / "run")

    with pytest.raises(MachineError):
        run(monkeypatch, tmp_path / "s", failing, space=space)
    assert not (tmp_path / "s" / "lock").exists()
    done, runs = run(monkeypatch, tmp_path / "s", runs, space=space)
    assert [r["state"] for r in done.rows] == ["complete"] * 3
    assert runs.lrs == [1e-4, 1e-3, 1e-2]


def test_a_full_disk_that_took_a_part_of_the_studys_last_line_costs_nothing(monkeypatch, tmp_path):
    whole, _ = run(monkeypatch, tmp_path / "whole", trials=6)
    run(monkeypatch, tmp_path / "s", trials=2)
    with open(tmp_path / "s" / "study.journal", "ab") as file:
        file.write(b'{"op_code":4,"wor')
    for trials in (4, 6):
        done, _ = run(monkeypatch, tmp_path / "s", trials=trials)
    assert [r["values"] for r in done.rows] == [r["values"] for r in whole.rows]


def test_two_processes_do_not_share_a_sweep(monkeypatch, tmp_path):
    runs, second = Runs(), []

    def train(config, watch, shared):
        if not second:
            second.append(None)
            with pytest.raises(MachineError, match=r"s is in use: process .* --workdir"):
                run(monkeypatch, tmp_path / "s", runs, trials=3)
            monkeypatch.setattr(sweep, "train", train)
        return runs(config, watch, shared)

    done, _ = run(monkeypatch, tmp_path / "s", train, trials=3)
    assert [r["state"] for r in done.rows] == ["complete"] * 3 and len(runs.lrs) == 3
    dead = {"pid": 1, "host": "here", "place": lock._place(), "started": "-1"}
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "lock").write_text(json.dumps(dead))  # of one that was killed before it wrote anything
    run(monkeypatch, tmp_path / "t", trials=1)


def ended(config, **val):
    folder = Path(config.workdir)
    folder.mkdir(parents=True)
    result = {"val": val, "seconds": {"total": 1.0}}
    write_json(folder / "result.json", result)
    return Result(folder, result)


@pytest.mark.parametrize("loss", ["NaN", "Infinity"])
def test_a_loss_that_is_no_number_is_the_worst(monkeypatch, tmp_path, loss):
    losses = {1e-4: 1.0, 1e-3: loss, 1e-2: 0.5, 1e-1: loss}

    def train(config, watch, shared):
        return ended(config, accuracy=0.5, loss=losses[config.lr])

    done, _ = run(monkeypatch, tmp_path / "s", train, space={"lr": list(losses)})
    assert done.best["values"] == {"lr": "0.01"}
    assert [r["loss"] for r in json.loads((tmp_path / "s" / "result.json").read_text())["trials"]] == [*losses.values()]


def test_a_trial_whose_validations_were_no_numbers_has_none(monkeypatch, tmp_path):
    """Of quantities R² is then −∞, which no JSON holds."""

    def train(config, watch, shared):
        watch({"val_r2": -math.inf if config.lr > 1e-3 else 0.5, "done": 0.5, "final": True})
        if config.lr > 1e-3:
            raise UserError("The loss of 10 steps in a row was not finite.")
        return ended(config, r2=0.5, loss=1.0)

    done, _ = run(monkeypatch, tmp_path / "s", train, space={"lr": [1e-3, 1e-2]})
    assert "r2" not in done.rows[1] and done.rows[1]["state"] == "failed"
    assert json.loads((tmp_path / "s" / "result.json").read_text())["trials"] == done.rows


def several(config, watch, shared):
    """In place of `train`, of several labels an image: the lower the rate, the lower the loss and the accuracy."""
    for i in range(1, 11):
        loss, accuracy = config.lr * (2 - i / 10), config.lr
        told = {"val_accuracy": accuracy, "val_average_precision": 0.5, "val_loss": loss}
        watch(told | {"done": i / 10, "final": True})
    return ended(config, accuracy=accuracy, loss=loss, log_loss=loss / 3, average_precision=0.5)


def test_of_several_labels_an_image_the_loss_chooses_and_prunes(monkeypatch, tmp_path):
    space = {"lr": [1e-4, 2e-4, 3e-4, 4e-4, 1e-1, 5e-5]}
    done, _ = run(monkeypatch, tmp_path / "s", several, space=space, several=True)
    assert [r["state"] for r in done.rows] == [*["complete"] * 4, "stopped early", "complete"]
    assert done.best["values"] == {"lr": "5e-05"} and done.best["loss"] == pytest.approx(5e-5)
    assert done.rows[4]["loss"] > 0.1
    page = (tmp_path / "s" / "sweep.html").read_text()
    assert "validation loss 0.0001, mAP 50.00%, with lr 5e-05" in page and "chosen by this loss" in page
    again, _ = run(monkeypatch, tmp_path / "s", None, space=space)  # it is known without a look at the data
    assert again.best == done.best


def test_losses_of_several_kinds_are_not_held_against_each_other(monkeypatch, tmp_path):
    def train(config, watch, shared):
        loss = 1.0 + 10 * config.label_smoothing
        watch({"val_accuracy": 0.5, "val_loss": loss, "done": 0.5, "final": True})
        return ended(config, accuracy=0.5, loss=loss, log_loss=1.0 - config.label_smoothing, average_precision=0.5)

    space = {"label_smoothing": [0.0, 0.01, 0.02, 0.03, 0.1]}
    done, _ = run(monkeypatch, tmp_path / "s", train, space=space, several=True)
    assert {r["state"] for r in done.rows} == {"complete"} and done.best["values"] == {"label_smoothing": "0.1"}
    assert "validation log loss 0.9000" in (tmp_path / "s" / "sweep.html").read_text()


def test_equal_trials_of_several_losses_are_told_apart_by_the_log_loss(monkeypatch, tmp_path):
    """Of quantities there is none: then the first of them is best."""

    def train(config, watch, shared):
        return ended(config, accuracy=0.5, loss=1.0 + 10 * config.label_smoothing, log_loss=1 - config.label_smoothing)

    space = {"label_smoothing": [0.0, 0.1, 0.01]}
    done, _ = run(monkeypatch, tmp_path / "s", train, space=space)
    assert done.best["values"] == {"label_smoothing": "0.1"} and done.best["log_loss"] == 0.9

    def quantities(config, watch, shared):
        return ended(config, r2=0.5, loss=0.1 if config.loss is losses.huber else 1.0)

    space = {"loss": [losses.squared_error, losses.huber]}
    done, _ = run(monkeypatch, tmp_path / "t", quantities, space=space)
    assert done.best["values"] == {"loss": "jft.losses:squared_error"}


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_of_several_labels_a_loss_that_is_no_number_is_the_worst(monkeypatch, tmp_path, loss):
    losses = {1e-4: 1.0, 1e-3: loss, 1e-2: 0.5}

    def train(config, watch, shared):
        watch({"val_accuracy": 1.0, "val_loss": losses[config.lr], "done": 0.5, "final": True})
        told = losses[config.lr] if math.isfinite(losses[config.lr]) else "NaN"
        return ended(config, accuracy=1.0, loss=told, log_loss=1.0, average_precision=0.5)

    done, _ = run(monkeypatch, tmp_path / "s", train, space={"lr": list(losses)}, several=True)
    assert done.best["values"] == {"lr": "0.01"}


def test_whether_images_have_several_labels_is_read_from_the_data(folder):
    images, labels = np.zeros((4, 8, 8, 3), np.uint8), np.asarray([[0, 1], [1, 1], [1, 0], [0, 0]], np.float32)
    assert sweep._several(Config(data={"train": (images, labels)}))
    assert not sweep._several(Config(data={"train": (images, labels * 0.5 + 0.1)}))
    assert not sweep._several(Config(data=str(folder)))


@pytest.mark.parametrize("trials", [0, -1])
@pytest.mark.parametrize("space", [LR, {"lr": [1e-3, 1e-2]}])
def test_no_trials_are_too_few(tmp_path, space, trials):
    with pytest.raises(UserError, match=f"--trials is {trials}; at least 1 is needed"):
        sweep.sweep(config("bees", tmp_path / "s"), space, trials=trials)


@pytest.mark.parametrize(
    "fields, told",
    [({"seeds": 5}, "--seeds is 5; a trial is one run"), ({"distributed": True}, "--distributed is for")],
)
def test_what_a_trial_cannot_be_is_refused(tmp_path, fields, told):
    with pytest.raises(UserError, match=told):
        sweep.sweep(config("bees", tmp_path / "s", **fields), LR)
    assert not (tmp_path / "s").exists()


def test_a_field_that_every_stage_overrides_is_refused(tmp_path):
    made = config("bees", tmp_path / "s").replace(plan=(Stage("head", ("head",), lr=1e-3),))
    with pytest.raises(UserError, match=r"names 'lr', of which every stage of the plan has its own"):
        sweep.sweep(made, {"lr": [1e-3, 1e-2]})
    assert not (tmp_path / "s").exists()


def test_a_value_that_no_config_takes_is_told_before_any_trial(monkeypatch, tmp_path):
    for name, words in (("loss", ["focal", "focl"]), ("optimizer", ["sgd:momentun=0.8"]), ("augment", [("flp",)])):
        with pytest.raises(UserError, match=r"Did you mean (focal|momentum|flip)"):
            sweep.dimension(Config(), name, words)
    with pytest.raises(UserError, match="no plan 'nonsense'"):
        run(monkeypatch, tmp_path / "s", space={"plan": ["head", "nonsense"]})
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    "space, message",
    [
        ({}, "The space is empty"),
        ({"lt": [1.0]}, "'lt', which is no field of a config. Did you mean lr?"),
        ({"workdir": ["a"]}, "trials cannot differ in it"),
        ({"lr": 1e-3}, "a list of values or"),
        ({"lr": ("log", 1e-2, 1e-3)}, "a lower number above 0 comes first"),
        ({"lr": ("log", 1e-2)}, "('log', lowest, highest)"),
        ({"lr": [1e-3, -1.0]}, "--lr is -1.0; it is above 0"),
        ({"batch": ("linear", 0, 8)}, "--batch is 0; it is at least 1"),
        ({"plan": ("log", 1, 2)}, "plan is no number"),
        ({"preprocess.size": ("linear", 1, 2)}, "preprocess.size is no number"),
        ({"lora.rnk": ("linear", 1, 2)}, "'lora.rnk'; lora has: rank, alpha, targets, dora. Did you mean rank?"),
        ({"lr.x": ("linear", 1, 2)}, "lr has no fields"),
        ({"lr": [1e-3, 1e-3]}, "has a value twice"),
        ({"weight_decay": [0.0], "weight-decay": [0.1]}, "names weight_decay twice"),
    ],
)
def test_spaces_that_cannot_be(space, message, tmp_path):
    with pytest.raises(UserError, match=re.escape(message)):
        sweep.sweep(config("bees", tmp_path / "s"), space)
    assert not (tmp_path / "s").exists()


def test_dimensions_take_the_type_of_their_field():
    base = Config()
    assert sweep.dimension(base, "batch", ("log", 8, 64)).whole
    assert not sweep.dimension(base, "epochs", ("linear", 5, 20)).whole
    assert not sweep.dimension(base, "preprocess.crop_pct", ("linear", 0.8, 1.0)).whole
    assert not sweep.dimension(base, "preprocess.crop_pct", ("log", 1, 2)).whole
    assert not sweep.dimension(base, "lora.alpha", ("linear", 1, 16)).whole
    assert sweep.dimension(base, "lora.rank", ("log", 1, 16)).whole
    assert sweep.dimension(base, "model_options.prompts", ("linear", 5, 20)).whole
    stages = (Stage("a", ("head",)), Stage("b", ("*",)))
    assert list(sweep.dimension(base, "plan", ["head", stages]).choices) == ["head", "a,b"]
    assert list(sweep.dimension(base, "clip", [None, 1.0]).choices) == ["none", "1"]


def test_the_command_lines_space():
    words = [
        "lr=log:1e-5:1e-2",
        "batch=log:8:64",
        "plan=head,lp-ft",
        "augment=none,crop flip",
        "model_options.pool=a,b",
    ]
    space = sweep.parse(Config(), words)
    assert space == {
        "lr": ("log", "1e-5", "1e-2"),
        "batch": ("log", 8, 64),
        "plan": ["head", "lp-ft"],
        "augment": [(), ("crop", "flip")],
        "model_options.pool": ["a", "b"],
    }
    assert sweep.dimension(Config(), "lr", space["lr"]).high == 0.01
    for wrong in ("lr", "lr="):
        with pytest.raises(UserError, match="FIELD=log:LOW:HIGH"):
            sweep.parse(Config(), [wrong])


@pytest.mark.parametrize(
    "words",
    [["lr=1e-3", "lr=1e-2"], ["weight_decay=0,1e-2", "weight-decay=0.5,0.6"], ["lora.rank=1", "lora.rank=log:2:8"]],
)
def test_a_field_is_named_once(words):
    with pytest.raises(UserError, match=r"--over names (lr|weight_decay|lora\.rank) twice"):
        sweep.parse(Config(), words)


def test_the_command_line_names_a_field_in_place_of_the_file():
    over = sweep.parse(Config(), ["weight-decay=0.5", "label-smoothing=0.1"])
    assert over == {"weight_decay": [0.5], "label_smoothing": [0.1]}
    space = sweep.merged({"weight-decay": [0.0], "label_smoothing": [0.2], "lr": [1.0]}, over)
    assert space == {"lr": [1.0], **over}


FILE = """
import functools
import jft
from jft import losses

def own(logits, batch): return losses.cross_entropy(logits, batch)

def rate(peak, steps): return lambda step: peak

def rule(examples, size, batch): return {{"augment": ("flip",)}}

STAGES = (jft.Stage("a", ("head",)), jft.Stage("b", ("*",)))
PARTIAL = functools.partial(losses.cross_entropy, label_smoothing=0.1)

def config(): return jft.Config(data="bees", {fields})

SPACE = {{{space}}}
"""


@pytest.mark.parametrize(
    "space, fields, again",
    [
        ("'plan': ['lp-ft'], 'lr': [0.12345678]", "", "--plan lp-ft --lr 0.12345678"),
        ("'clip': [None]", "", "--clip none"),
        ("'augment': [('crop', 'flip')]", "", "--augment crop,flip"),
        ("'augment': [()]", "", "--augment none"),
        ("'image_size': [(32, 48)], 'balance': [True]", "", "--image-size 32,48 --balance yes"),
        ("'model_options.bias': [-1e-3]", "", "--model_options.bias=-0.001"),
        ("'loss': [own]", "", "--loss {file}:own"),
        ("'augment': [None], 'lr': [1e-2]", "", "--lr 0.01"),
        ("'augment': [None], 'lr': [1e-2]", "augment=('crop',)", None),
        ("'augment': [None], 'lr': [1e-2]", "hyper=rule", None),
        ("'weights': [None]", "weights='none'", None),
        ("'plan': [STAGES]", "", None),
        ("'loss': [PARTIAL]", "", None),
        ("'schedule': [rate]", "", "--schedule {file}:rate"),
        ("'model_options.pool': ['3']", "", None),
    ],
)
def test_the_command_that_is_told_says_what_the_trial_had(monkeypatch, tmp_path, capsys, space, fields, again):
    file, ran = tmp_path / "a.py", []
    file.write_text(FILE.format(space=space, fields=fields))

    def train(config, watch, shared):
        done = ended(config, accuracy=0.5, loss=1.0)
        write_json(done.workdir / "config.json", {"config": describe(config)})
        ran.append(config)
        return done

    monkeypatch.setattr(sweep, "train", train)
    monkeypatch.setattr(sweep, "_several", lambda config: False)
    words = ["--seed", "3", "--workdir", str(tmp_path / "s")]
    assert cli.main(["sweep", str(file), *words]) == 0
    shown = capsys.readouterr().out
    trial = tmp_path / "s" / "trials" / "0"
    if again is None:
        assert "jft finetune" not in shown and f"they are in {trial / 'config.json'}" in shown
        return
    command = shown[shown.index("jft finetune") :].strip()
    assert command == f"jft finetune {file} --seed 3 {again.format(file=file)} --workdir {tmp_path / 's-best'}"
    told = shlex.split(command)[1:]
    options = cli.make_parser([w for w in told if w.startswith(cli.FREE)]).parse_args(told)
    (made,) = cli.configs_of(options).values()
    assert describe(made) == describe(ran[0].replace(workdir=made.workdir, display=made.display))


def test_without_optuna_the_way_out_is_told(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match=re.escape("pip install 'jft[sweep]'")):
        sweep.sweep(config("bees", tmp_path / "s"), LR)


@pytest.mark.slow
def test_the_command_with_real_runs(folder, tmp_path, capsys):
    file = tmp_path / "small.py"
    file.write_text(
        "import jft\n"
        f"def config(): return jft.Config(data={str(folder)!r}, model='tiny_vit', weights='none')\n"
        "SPACE = {'lr': [1e-5, 1e-2]}\n"
    )
    words = ["--epochs", "1", "--batch", "8", "--workdir", str(tmp_path / "s"), "--over", "label_smoothing=0.1"]
    assert cli.main(["sweep", str(file), *words]) == 0
    shown = capsys.readouterr().out
    best = json.loads((tmp_path / "s" / "result.json").read_text())["best"]
    assert f"jft finetune {file} --epochs 1 --batch 8 --lr {best['values']['lr']} --label-smoothing 0.1" in shown
    assert (tmp_path / "s" / "trials" / "1" / "report.html").exists()
