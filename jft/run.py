"""A run's folder: entering it, what it must hold to be the same run, and the result that stands in it at the end."""

import contextlib
import hashlib
import importlib.metadata
import json
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jft.config import Config, describe, differences, write_json
from jft.data.sources import Splits
from jft.errors import UserError

COMPILING = ("/jax/core/compile/jaxpr_to_mlir_module_duration", "/jax/core/compile/backend_compile_duration")
compiled: list[float] = []  # seconds of every compilation of this process, wherever it happened


def _listen(event: str, duration_secs: float, **_: Any) -> None:
    if event in COMPILING:
        compiled.append(duration_secs)


jax.monitoring.register_event_duration_secs_listener(_listen)
PHASES = ("import", "compile", "data", "features", "train", "eval")


@dataclass
class Result:
    """A finished run: its folder, and what `result.json` says."""

    workdir: Path
    result: dict[str, Any]

    def evaluate(self, data: Any = None) -> dict[str, Any]:
        """Metrics on the run's own validation set, or on other labelled images."""
        from jft.use import evaluate

        return evaluate(self.workdir, data)

    def predict(self, *images: Any) -> list[dict[str, Any]]:
        """Label and probability of each image: paths, folders, PIL images or arrays."""
        from jft.use import predict

        return predict(self.workdir, images)


@dataclass
class Clock:
    """Seconds spent, by phase and in all; `before` is what earlier sessions of a resumed run spent.

    Functions compile when they are first called, so compilation is taken out of the phase in which it happens.
    """

    by_phase: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    before: float = 0.0
    start: float = field(default_factory=time.perf_counter)

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        begun, known = time.perf_counter(), len(compiled)
        try:
            yield
        finally:
            compiling = sum(compiled[known:])
            self.by_phase["compile"] += compiling
            self.by_phase[phase] += time.perf_counter() - begun - compiling

    @property
    def total(self) -> float:
        return self.before + time.perf_counter() - self.start

    def seconds(self) -> dict[str, float]:
        """As `result.json` has it."""
        return {"total": round(self.total, 3)} | {k: round(v, 3) for k, v in self.by_phase.items()}


def default_workdir(config: Config) -> str:
    """`runs/DATA-MODEL-PLAN`, from the parts of the config a person would name the run by."""
    data = Path(str(config.data)).stem if isinstance(config.data, str | Path) else "data"
    scheme = config.plan if isinstance(config.plan, str) else "plan"
    return f"runs/{data.replace(':', '-')}-{config.model}-{scheme}"


def data_path(config: Config) -> str:
    """The data as they can be found from any folder: an absolute path, or what the config says of other sources."""
    data = config.data
    if isinstance(data, str | Path) and Path(data).expanduser().exists():
        return str(Path(data).expanduser().resolve())
    return str(describe(data))


def fingerprint(splits: Splits) -> str:
    """A hash of the names, labels and classes of every split: what the run is about, wherever its folder lies."""
    digest = hashlib.sha256()
    for split in (splits.train, splits.val, splits.test):
        if split is not None:
            labels = np.asarray(split.labels).tolist()
            digest.update(json.dumps([list(split.names), labels, list(splits.classes)]).encode())
        digest.update(b"|")
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Of Python, of this package and of what it computes with."""
    names = ("jft", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "pillow")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in names}


def read_json(file: Path) -> Any:
    """The JSON of a run's file. Raises UserError where it is missing or damaged."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file.parent} is no run's folder: it has no {file.name}.") from None
    except ValueError as error:
        raise UserError(f"{file} is damaged: {error}. Remove the folder, or name another with --workdir.") from None


def enter(workdir: Path, what: Mapping[str, Any], note: Callable[[str], Any]) -> dict[str, Any] | None:
    """Make or enter a run's folder; returns the result where the run is finished, None where there is work to do.

    Raises UserError where the folder holds another run, with the differences.
    """
    file = workdir / "config.json"
    if not file.exists():
        if workdir.exists() and (not workdir.is_dir() or any(p for p in workdir.iterdir() if p.suffix != ".part")):
            raise UserError(f"{workdir} is not empty and holds no run. Name a new folder with --workdir.")
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            write_json(file, what)
        except OSError as error:
            raise UserError(f"{workdir} cannot be written: {error.strerror}. Name another with --workdir.") from None
        return None
    old, keys = read_json(file), ("config", "weights_sha256", "data_sha256")
    if lines := differences({k: old.get(k) for k in keys}, json.loads(json.dumps({k: what[k] for k in keys}))):
        raise UserError(
            f"{workdir} holds a run of another configuration (there → now):\n  " + "\n  ".join(lines[:20]) + "\n"
            "Name another folder with --workdir, or give the options it was begun with."
        )
    if (workdir / "result.json").exists():
        return read_json(workdir / "result.json")
    note(f"{workdir} holds an interrupted run of this configuration: going on with it.")
    return None
