"""Where else a run is watched: TensorBoard, MLflow, or whatever a config names, behind one small interface."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jft import metrics
from jft.errors import UserError, near
from jft.files import writing
from jft.report.log import MetricsLog, plain

PICTURE = 160  # pixels, the longer side of a picture that is kept
HELD_SECONDS = 1.0  # that rows of the log wait for others
SHOWN_SECONDS = 30.0  # between two writings to the disk, as often as TensorBoard looks


class Tracker:
    """Keeps nothing: what every other starts from, and all that one has to say.

    >>> class Printed(Tracker):
    ...     def scalars(self, step, values):
    ...         print(step, values)
    >>> jft.finetune(data="bees/", track=(Printed,))
    """

    def __init__(self, workdir: Path, about: Mapping[str, Any], step: int) -> None:
        """A run begins in its folder, or goes on after `step`; `about` is what its config.json says."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Figures of a step by name: `loss`, `lr/all`, `distance/stage4/block0`, …"""

    def picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        """A picture, uint8 [h, w, 3]."""

    def rewind(self, step: int) -> None:
        """The run goes back to the state after `step`, and takes the steps that follow anew."""

    def flush(self) -> None:
        """A checkpoint is written: what was given up to now must outlive the process."""

    def close(self, result: Mapping[str, Any] | None) -> None:
        """The run is done, as result.json says, or stopped (None)."""


class Trackers(Tracker):
    """Several as one. One that fails is told of, once, and left: a run does not end because nobody can watch it."""

    def __init__(self, opened: Sequence[Tracker], warn: Callable[[str], Any]) -> None:
        self.opened, self.warn = list(opened), warn

    def _each(self, method: str, *args: Any) -> None:
        for tracker in list(self.opened):
            try:
                getattr(tracker, method)(*args)
            except Exception as error:
                self.opened.remove(tracker)
                name = type(tracker).__name__
                self.warn(f"{name} failed and is left; the run goes on without it: {type(error).__name__}: {error}")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._each("scalars", step, values)

    def picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        self._each("picture", step, name, pixels)

    def rewind(self, step: int) -> None:
        self._each("rewind", step)

    def flush(self) -> None:
        self._each("flush")

    def close(self, result: Mapping[str, Any] | None) -> None:
        self._each("close", result)
        self.opened = []


class Mirror(MetricsLog):
    """The metrics log of a run, whose figures go to its trackers as well, with the learning rate of each group.

    Rows that come quickly wait for a second to be written together: one at a time, between two steps, each takes
    several times as long. A killed run loses those; they lie after its last checkpoint, so it writes them again.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self.trackers = Trackers([], print)
        self.rates: dict[str, float] = {}  # multiples of the rate, by what has them
        self.waiting: list[tuple[Mapping[str, Any], dict[str, float]]] = []  # rows with the rates of their time
        self.written = -math.inf

    def write(self, row: Mapping[str, Any]) -> None:
        self.waiting.append((row, self.rates))
        if time.monotonic() - self.written >= HELD_SECONDS:
            self.hand_on()

    def hand_on(self) -> None:
        """Write the rows that wait, and tell the trackers of them."""
        rows, self.waiting = self.waiting, []
        self.write_all(row for row, _ in rows)
        for row, rates in rows if self.trackers.opened else ():
            if values := flat(row):
                groups = {f"lr/{name}": row["lr"] * by for name, by in rates.items()} if "lr" in row else {}
                self.trackers.scalars(int(row["step"]), values | groups)
        self.written = time.monotonic()

    def truncate(self, step: int) -> None:
        self.hand_on()
        super().truncate(step)
        self.trackers.rewind(step)

    def flush(self) -> None:
        self.hand_on()
        super().flush()
        self.trackers.flush()

    def close(self) -> None:
        try:
            self.hand_on()
        finally:
            super().close()
            self.trackers.close(None)


def rates(multipliers: Mapping[str, float], parts: Mapping[str, str], order: Sequence[str]) -> dict[str, float]:
    """The multiples of a stage's rate, each by the parts that have it: `head`, `stage3/block0 to stage4/block1`.

    `parts` are those of the parameters that train, by name; `order` is theirs.

    >>> rates({"a/w": 0.1, "b/w": 0.1, "head/w": 1.0}, {"a/w": "a", "b/w": "b", "head/w": "head"}, ["a", "b", "head"])
    {'a to b': 0.1, 'head': 1.0}
    """
    by: dict[float, set[str]] = {}
    for name, part in parts.items():
        by.setdefault(multipliers[name], set()).add(part)
    told = {}
    for value, some in by.items():
        ordered = [part for part in order if part in some]
        told[ordered[0] if len(ordered) == 1 else f"{ordered[0]} to {ordered[-1]}"] = value
    return told


def open_trackers(
    given: Sequence[str | Callable[..., Tracker]],
    workdir: Path,
    about: Mapping[str, Any],
    step: int,
    load: Callable[[str], Any],
    warn: Callable[[str], Any],
) -> Trackers:
    """The trackers a config names: `tensorboard`, `mlflow`, `module:name`, or functions (workdir, about, step).

    `load` finds the object at `module:name`. Raises UserError for a name that is none.
    """
    opened = []
    for which in given:
        make = _maker(which, load)
        try:
            opened.append(make(workdir, about, step))
        except Exception as error:
            warn(f"{which} cannot be opened; the run goes on without it: {type(error).__name__}: {error}")
    return Trackers(opened, warn)


def check(given: Sequence[str | Callable[..., Tracker]], load: Callable[[str], Any]) -> None:
    """Raises UserError for a tracker that is not there, before a run begins."""
    for which in given:
        _maker(which, load)


def _maker(which: str | Callable[..., Tracker], load: Callable[[str], Any]) -> Callable[..., Tracker]:
    if callable(which):
        return which
    if which in TRACKERS:
        TRACKERS[which][1]()
        return TRACKERS[which][0]
    if ":" in which:
        return load(which)
    raise UserError(f"There is no tracker {which!r}.{near(which, TRACKERS)} Known: {', '.join(TRACKERS)}, module:name.")


def flat(row: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a row of metrics.jsonl by name: `{"distance": {"head": 1.0}}` is `distance/head`; its step is not.

    >>> flat({"step": 3, "stage": "head", "loss": 0.5, "distance": {"head": 1.0}})
    {'loss': 0.5, 'distance/head': 1.0}
    """
    found: dict[str, float] = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}/")
            continue
        value = value.item() if hasattr(value, "item") else value  # a NumPy or JAX scalar
        if isinstance(value, int | float) and not isinstance(value, bool) and name != "step":
            found[prefix + name] = float(value)
    return found


def settings(about: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the config that say what a run is, as numbers, booleans and short texts."""
    told = {}
    for name, value in about.get("config", {}).items():
        if value not in (None, [], {}, ""):
            told[name] = value if isinstance(value, bool | int | float) else str(plain(value))[:250]
    return told


def plan_text(about: Mapping[str, Any]) -> str:
    """The stages as a table in Markdown."""
    lines = ["| stage | trains | epochs | rate |", "|---|---|---:|---:|"]
    for stage in about.get("stages", []):
        trains = ", ".join(p if isinstance(p, str) else f"{p[0]} × {p[1]:g}" for p in stage["train"])
        lines.append(f"| {stage['name']} | {trains} | {stage['epochs'] or 0:.3g} | {stage['lr'] or 0:.2g} |")
    return "\n".join(lines)


def scores(result: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a finished run: `val/accuracy`, `test/accuracy`, `seconds/total`, …"""
    return flat({key: result[key] for key in ("val", "test", "seconds") if isinstance(result.get(key), Mapping)})


class TensorBoard(Tracker):
    """Event files in the run's folder: `tensorboard --logdir runs`. Through tensorboardX, which needs no TensorFlow."""

    def __init__(self, workdir: Path, about: Mapping[str, Any], step: int) -> None:
        # Not its SummaryWriter, whose two threads take five times as long to hand an event on as it takes to write it.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.summary import text

        folder = workdir / "tensorboard"
        again = folder.exists()
        folder.mkdir(exist_ok=True)
        # Files are named by the second they are begun in; the suffix keeps a quick resume from writing over its past.
        self.writer = EventsWriter(str(folder / "events"), f".{step:09}")
        self.about, self.step, self.flushed = about, step, -math.inf
        if again:
            self.rewind(step if step else -1)
        if not step:
            self._add(text("plan", plan_text(about)), 0)

    def _add(self, summary: Any, step: int) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self.writer.write_event(Event(wall_time=time.time(), step=step, summary=summary))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        from tensorboardX.proto.summary_pb2 import Summary

        self.step = step
        # One event a row: each has a checksum, which tensorboardX computes in Python.
        self._add(Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()]), step)
        if time.monotonic() - self.flushed >= SHOWN_SECONDS:
            self.flush()

    def rewind(self, step: int) -> None:
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        # TensorBoard leaves out what was written before this from the next step on, which is written again.
        start = SessionLog(status=SessionLog.START)
        self.writer.write_event(Event(wall_time=time.time(), step=step + 1, session_log=start))

    def picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        from tensorboardX.summary import image

        self._add(image(name, pixels, dataformats="HWC"), step)

    def flush(self) -> None:
        self.writer.flush()
        self.flushed = time.monotonic()

    def close(self, result: Mapping[str, Any] | None) -> None:
        if result is not None:
            from tensorboardX.summary import hparams

            # SummaryWriter.add_hparams would open a folder, and so a run, of its own beside this one.
            told = {f"hparam/{name}": value for name, value in scores(result).items()}
            for summary in hparams(settings(self.about), told):
                self._add(summary, 0)
            self.scalars(self.step, told)
        self.writer.close()


class MLflow(Tracker):
    """A run at $MLFLOW_TRACKING_URI, else where MLflow puts it, in the experiment $MLFLOW_EXPERIMENT_NAME, else jft."""

    def __init__(self, workdir: Path, about: Mapping[str, Any], step: int) -> None:
        import os

        from mlflow import MlflowClient

        self.client = MlflowClient()
        self.told: dict[str, int] | None = None  # of a run that goes on: the last step that each figure was told of
        file = workdir / "mlflow.txt"
        if file.exists():
            self.run, self.told = file.read_text(encoding="utf-8").strip(), {}
            self.client.update_run(self.run, "RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "jft")
        found = self.client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self.client.create_experiment(name)
        self.run = self.client.create_run(experiment, run_name=workdir.name).info.run_id
        with writing(file) as part:
            part.write_text(self.run + "\n", encoding="utf-8")
        for key, value in settings(about).items():
            self.client.log_param(self.run, key, value)
        self.client.log_text(self.run, plan_text(about), "plan.md")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        new = {name: value for name, value in values.items() if step > self._last(name)}
        self.client.log_batch(self.run, metrics=[Metric(name, value, now, step) for name, value in new.items()])

    def _last(self, name: str) -> int:
        """The last step that a figure was told of before this session; nothing is taken back from MLflow."""
        if self.told is None:
            return -1
        if name not in self.told:
            known = self.client.get_metric_history(self.run, name)
            self.told[name] = max((metric.step for metric in known), default=-1)
        return self.told[name]

    def picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        from PIL import Image

        self.client.log_image(self.run, Image.fromarray(pixels), artifact_file=f"{name}.png")

    def close(self, result: Mapping[str, Any] | None) -> None:
        for name, value in scores(result).items() if result is not None else ():
            self.client.log_metric(self.run, name, value)
        self.client.set_terminated(self.run, "FINISHED" if result is not None else "KILLED")


def _needs(module: str, extra: str) -> Callable[[], None]:
    def check() -> None:
        from importlib.util import find_spec

        if find_spec(module) is None:
            raise UserError(f'track={extra} needs {module}: pip install "jft[{extra}]".')

    return check


TRACKERS: dict[str, tuple[Callable[..., Tracker], Callable[[], None]]] = {
    "tensorboard": (TensorBoard, _needs("tensorboardX", "tensorboard")),
    "mlflow": (MLflow, _needs("mlflow", "mlflow")),
}


def mistakes(
    probabilities: np.ndarray, labels: np.ndarray, classes: Sequence[str], count: int = 16
) -> list[tuple[int, str]]:
    """The most confident mistakes, the surest first: their places, and `ants taken for bees, 0.98`.

    Where an image can have several labels, one is a mistake by the label that is furthest off, if by more than half.
    """
    if labels.ndim == 2:
        off = abs(probabilities - labels)
        worst, sure = off.argmax(axis=1), off.max(axis=1)
        wrong = np.flatnonzero(sure > 0.5)
        told = [f"{classes[worst[i]]} {'missed' if labels[i, worst[i]] else 'said'}, {sure[i]:.2f}" for i in wrong]
    else:
        said, sure = probabilities.argmax(axis=1), probabilities.max(axis=1)
        wrong = np.flatnonzero(said != labels)
        told = [f"{classes[labels[i]]} taken for {classes[said[i]]}, {sure[i]:.2f}" for i in wrong]
    order = np.argsort(-sure[wrong], kind="stable")[:count]
    return [(int(wrong[i]), told[i]) for i in order]


def furthest(values: np.ndarray, labels: np.ndarray, names: Sequence[str], count: int = 16) -> list[tuple[int, str]]:
    """The images whose quantities are furthest off: their places, and `width 3.2, predicted 1.9`."""
    told = []
    for i in metrics.furthest(values, labels)[:count]:
        c = metrics.worst_quantity(values[i], labels[i], labels)
        told.append((i, f"{names[c]} {labels[i, c]:.4g}, predicted {values[i, c]:.4g}"))
    return told


def thumbnail(content: Any) -> np.ndarray | None:
    """A picture, from a file's bytes or pixels, at most `PICTURE` wide and high; None where it cannot be read."""
    from PIL import Image

    from jft.data.decode import quiet, to_rgb

    try:
        with quiet():
            image = to_rgb(content)
    except (OSError, ValueError):
        return None
    image.thumbnail((PICTURE, PICTURE), Image.Resampling.LANCZOS)
    return np.asarray(image, np.uint8)
