"""Trackers: each step once, resumed or not; what a fork writes; one that fails ends no run."""

import math
import sys
import types

import numpy as np
import pytest
from PIL import Image

from jft.code import load_object
from jft.errors import UserError
from jft.report import track
from jft.report.log import read

ABOUT = {
    "config": {"model": "tiny_vit", "lr": 0.1, "keep_head": False, "augment": ["crop", "flip"], "clip": None},
    "stages": [
        {"name": "head", "train": ["head"], "epochs": 1.0, "lr": 1e-3},
        {"name": "all", "train": ["head", ["*", 0.1]], "epochs": 2.0, "lr": 1e-4},
    ],
}
RESULT = {"val": {"accuracy": 0.5, "count": 6}, "seconds": {"total": 1.5}, "model": "tiny_vit"}


class Kept(track.Tracker):
    """What a fork writes."""

    def __init__(self, workdir, about, step):
        self.rows, self.said = [], [("open", step)]

    def scalars(self, step, values):
        self.rows.append((step, values))

    def close(self, result):
        self.said.append(("close", result))


def test_a_row_goes_to_the_trackers_with_the_rate_of_each_group(tmp_path):
    log = track.Mirror(tmp_path / "metrics.jsonl")
    log.trackers = track.open_trackers((Kept, f"{__name__}:Kept"), tmp_path, {}, 0, load_object, pytest.fail)
    one, two = log.trackers.opened
    log.rates = {"head": 1.0, "stage4": 0.1}
    log.write({"step": 3, "stage": "head", "lr": 0.5, "loss": np.float32(2.0)})
    log.write({"step": 3, "stage": "head", "val_accuracy": 0.25, "distance": {"head": 1.5, "stem": 0}})
    log.write({"step": 4, "stage": "head", "skipped": ["a.jpg"]})
    log.rates = {}  # of the next stage
    log.flush()
    assert one.rows == two.rows == [
        (3, {"lr": 0.5, "loss": 2.0, "lr/head": 0.5, "lr/stage4": 0.05}),
        (3, {"val_accuracy": 0.25, "distance/head": 1.5, "distance/stem": 0.0}),
    ]  # fmt: skip
    log.trackers.close(RESULT)
    log.close()
    assert one.said == [("open", 0), ("close", RESULT)]  # and not once more as a run that was stopped


def test_rows_that_come_quickly_are_written_together_and_none_is_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(track, "HELD_SECONDS", math.inf)

    def steps():
        return [row["step"] for row in read(tmp_path / "metrics.jsonl")]

    log = track.Mirror(tmp_path / "metrics.jsonl")
    log.trackers = track.open_trackers((Kept,), tmp_path, {}, 0, load_object, pytest.fail)
    (told,) = log.trackers.opened
    for step in (1, 2, 3):
        log.write({"step": step, "loss": math.nan if step == 2 else 1.0})
    assert steps() == [1] and len(told.rows) == 1
    log.truncate(2)
    assert steps() == [1, 2] and [step for step, _ in told.rows] == [1, 2, 3]  # and the trackers go back themselves
    log.write({"step": 3, "loss": 1.0})
    log.flush()
    log.write({"step": 4, "loss": 1.0})
    assert steps() == [1, 2, 3]
    log.close()
    assert steps() == [1, 2, 3, 4] and [step for step, _ in told.rows] == [1, 2, 3, 3, 4]


def test_one_that_fails_is_told_of_once_and_left(tmp_path):
    class Broken(Kept):
        def scalars(self, step, values):
            raise ConnectionError("nobody there")

    def never(workdir, about, step):
        raise OSError("no disk")

    told: list[str] = []
    both = track.open_trackers((Broken, never, Kept), tmp_path, {}, 0, load_object, told.append)
    for step in (1, 2):
        both.scalars(step, {"loss": 1.0})
    assert len(told) == 2 and "no disk" in told[0] and "Broken failed" in told[1] and "nobody there" in told[1]
    assert [type(t) for t in both.opened] == [Kept] and len(both.opened[0].rows) == 2


def test_an_unknown_tracker_is_refused(monkeypatch):
    with pytest.raises(UserError, match="Did you mean tensorboard"):
        track.check(("tensorbord",), load_object)
    with pytest.raises(UserError, match="no Nothing in"):
        track.check((f"{__name__}:Nothing",), load_object)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'pip install "jft\[mlflow\]"'):
        track.check(("mlflow",), load_object)


def events(folder):
    """What TensorBoard would show: events in the order of the files, those purged by a later session left out."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    found = []
    for file in sorted(folder.iterdir()):
        content = file.read_bytes()
        while content:
            length = int.from_bytes(content[:8], "little")
            event = Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]
            if event.session_log.status == SessionLog.START:
                found = [e for e in found if e.step < event.step]
            found.append(event)
    return found


def scalars(folder):
    return [
        (e.step, v.tag, v.simple_value) for e in events(folder) for v in e.summary.value if v.HasField("simple_value")
    ]


def test_tensorboard_shows_each_step_once_after_a_resume_and_a_way_back(tmp_path):
    pytest.importorskip("tensorboardX")
    first = track.TensorBoard(tmp_path, ABOUT, 0)
    for step in (1, 2, 3):
        first.scalars(step, {"loss": float(step), "lr/stage3 to stage4": 0.1})
    first.flush()  # and killed
    second = track.TensorBoard(tmp_path, ABOUT, 2)
    second.scalars(3, {"loss": 3.5})
    second.rewind(2)
    second.scalars(3, {"loss": 30.0})
    second.picture(3, "mistakes/01 a taken for b, 0.98", np.zeros((4, 5, 3), np.uint8))
    second.close(RESULT)
    first.close(None)
    told = scalars(tmp_path / "tensorboard")
    assert [t for t in told if t[1] == "loss"] == [(1, "loss", 1.0), (2, "loss", 2.0), (3, "loss", 30.0)]
    assert (3, "hparam/val/accuracy", 0.5) in told
    values = [v for e in events(tmp_path / "tensorboard") for v in e.summary.value]
    (plan,) = [v.tensor.string_val[0].decode() for v in values if v.tag == "plan/text_summary"]
    assert "| all | head, * × 0.1 | 2 | 0.0001 |" in plan
    assert any(v.image.height == 4 and v.image.width == 5 for v in values)
    assert {v.tag for v in values} >= {"_hparams_/session_start_info", "_hparams_/experiment"}
    assert all(p.is_file() for p in (tmp_path / "tensorboard").iterdir())  # one run, not one for the hparams beside it


class Client:
    """As much of MLflow's client as is used; what a server would keep."""

    runs: dict = {}  # noqa: RUF012

    def get_experiment_by_name(self, name):
        assert name == "jft"

    def create_experiment(self, name):
        return "7"

    def create_run(self, experiment, run_name):
        self.runs["r1"] = {"metrics": [], "params": {}, "status": "RUNNING", "files": {}}
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id="r1"))

    def update_run(self, run, status):
        self.runs[run]["status"] = status

    set_terminated = update_run

    def log_param(self, run, key, value):
        self.runs[run]["params"][key] = value

    def log_text(self, run, text, name):
        self.runs[run]["files"][name] = text

    def log_image(self, run, image, artifact_file):
        assert isinstance(image, Image.Image)
        self.runs[run]["files"][artifact_file] = image.size

    def log_batch(self, run, metrics):
        self.runs[run]["metrics"] += metrics

    def log_metric(self, run, key, value):
        self.runs[run]["metrics"].append((key, value, 0, 0))

    def get_metric_history(self, run, key):
        return [types.SimpleNamespace(step=m[3]) for m in self.runs[run]["metrics"] if m[0] == key]


def test_mlflow_is_told_each_step_once(tmp_path, monkeypatch):
    mlflow, entities = types.ModuleType("mlflow"), types.ModuleType("mlflow.entities")
    mlflow.MlflowClient, entities.Metric = Client, lambda *args: args
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    first = track.MLflow(tmp_path, ABOUT, 0)
    for step in (1, 2, 3):
        first.scalars(step, {"loss": float(step)})
    second = track.MLflow(tmp_path, ABOUT, 2)
    for step in (3, 4):
        second.scalars(step, {"loss": float(step), "val_loss": 1.0})
    second.picture(4, "mistakes/01 a", np.zeros((4, 5, 3), np.uint8))
    second.close(RESULT)
    run = Client.runs["r1"]
    assert len(Client.runs) == 1 and run["status"] == "FINISHED"
    assert [(m[0], m[3]) for m in run["metrics"] if m[0] == "loss"] == [("loss", s) for s in (1, 2, 3, 4)]
    assert [m[3] for m in run["metrics"] if m[0] == "val_loss"] == [3, 4]
    assert run["params"] == {"model": "tiny_vit", "lr": 0.1, "keep_head": False, "augment": "['crop', 'flip']"}
    assert run["files"]["mistakes/01 a.png"] == (5, 4) and "| head |" in run["files"]["plan.md"]
    assert ("val/accuracy", 0.5, 0, 0) in run["metrics"]


def test_rates_are_told_by_the_parts_that_have_them():
    parts = {"b/w": "b", "head/w": "head", "a/w": "a", "b/v": "b"}
    by = {"a/w": 0.1, "b/w": 0.1, "b/v": 0.1, "head/w": 1.0}
    assert track.rates(by, parts, ["a", "b", "head"]) == {"a to b": 0.1, "head": 1.0}


def test_mistakes_are_the_surest_first():
    p = np.array([[0.9, 0.1], [0.2, 0.8], [0.3, 0.7], [0.6, 0.4]], np.float32)
    assert track.mistakes(p, np.array([0, 0, 0, 1]), ["x", "y"]) == [
        (1, "x taken for y, 0.80"), (2, "x taken for y, 0.70"), (3, "y taken for x, 0.60"),
    ]  # fmt: skip
    several = np.array([[1, 0], [1, 1], [0, 0], [0, 0]], np.float32)
    assert track.mistakes(p, several, ["x", "y"], 2) == [(1, "x missed, 0.80"), (2, "y said, 0.70")]


def test_a_thumbnail_is_small_and_of_a_bad_file_there_is_none():
    assert track.thumbnail(np.zeros((400, 800, 3), np.uint8)).shape == (80, 160, 3)
    assert track.thumbnail(b"no image") is None


@pytest.mark.slow
@pytest.mark.usefixtures("optax_promotion")
def test_a_run_tells_its_trackers_all(tmp_path):
    import jft

    made = []

    class Told(Kept):
        def __init__(self, workdir, about, step):
            super().__init__(workdir, about, step)
            self.pictures: list[str] = []
            made.append(self)

        def picture(self, step, name, pixels):
            assert pixels.dtype == np.uint8 and max(pixels.shape) <= track.PICTURE
            self.pictures.append(name)

    rng = np.random.default_rng(0)
    pixels, labels = rng.integers(0, 256, (32, 32, 32, 3), np.uint8), np.arange(32) % 3  # nothing to be learned
    run = jft.finetune(
        data={"train": (pixels[:16], labels[:16]), "val": (pixels[16:], labels[16:])},
        model="tiny_vit", weights="none", epochs=1, batch=8, display="quiet",
        preprocess={"crop_pct": 1.0}, workdir=str(tmp_path / "run"), track=(Told,),
    )  # fmt: skip
    (told,) = made
    assert told.said[0] == ("open", 0) and told.said[1:] == [("close", run.result)]
    names = {name for _, values in told.rows for name in values}
    assert {"loss", "accuracy", "lr", "lr/head", "grad_norm", "val_loss", "val_accuracy"} <= names
    logged = [(row["step"], row["loss"]) for row in read(run.workdir / "metrics.jsonl") if "loss" in row]
    assert [(step, values["loss"]) for step, values in told.rows if "loss" in values] == logged
    wrong = run.result["val"]["count"] - round(run.result["val"]["accuracy"] * run.result["val"]["count"])
    assert len(told.pictures) == wrong > 0 and told.pictures[0].startswith("mistakes/01 ")
    assert 0.05 <= jft.load(run.workdir).temperature <= 20
    assert "track" not in (run.workdir / "config.json").read_text()
