"""A run's folder: entering it, what it must hold to be the same run, and the result that stands in it at the end."""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jft import lock
from jft.config import PLACE, Config, describe, differences, write_json
from jft.data.cache import cache_dir
from jft.data.sources import Splits
from jft.errors import FULL, MachineError, UserError, disk
from jft.files import PART
from jft.report.live import memory

FORMAT = 1  # of a run's folder; runs from before there were numbers have none in config.json
COMPILING = ("/jax/core/compile/jaxpr_to_mlir_module_duration", "/jax/core/compile/backend_compile_duration")
compiled: list[float] = []  # seconds of every compilation of this process, wherever it happened


def _listen(event: str, duration_secs: float, **_: Any) -> None:
    if event in COMPILING:
        compiled.append(duration_secs)


jax.monitoring.register_event_duration_secs_listener(_listen)
PHASES = ("import", "compile", "data", "features", "train", "eval", "save")
DETERMINISTIC = "--xla_gpu_deterministic_ops=true"
TOO_LATE = f"--deterministic has no effect here: jax has begun. Start the process with XLA_FLAGS={DETERMINISTIC}."
SAMPLE = 32  # images of each split that are read to tell a data set from another one with the same names
MOST_SHARED = 4  # arrays of features: training and validation at two cuts


class Shared:
    """What the runs of a comparison or a sweep, one after another in one process, keep for each other.

    Features, by their `features.key`; and what was traced and compiled, for runs that differ in their seed alone.
    """

    def __init__(self) -> None:
        self.features: dict[str, Any] = {}
        self.config: Config | None = None  # what `programs` are of
        self.programs: list[tuple[Any, Any]] = []  # each with what it depends on besides

    def keep(self, name: str, features: Any) -> None:
        """Keep activations for runs to come; the oldest go where they get too many."""
        while len(self.features) >= MOST_SHARED:
            del self.features[next(iter(self.features))]
        self.features[name] = features

    def program(self, about: Any, make: Callable[[], Any]) -> Any:
        """What `make` gives, or gave before for an equal `about`."""
        for other, made in self.programs:
            if other == about:
                return made
        made = make()
        self.programs.append((about, made))
        return made

    def enter(self, config: Config) -> None:
        """Before a run: forget what was compiled for another config."""
        if self.config is None or not _alike(config, self.config):
            self.close()
        self.config = config

    def close(self) -> None:
        """Forget all that was compiled, which jax would keep for as long as the process lives."""
        self.programs.clear()
        jax.clear_caches()


def _alike(a: Config, b: Config) -> bool:
    """Whether two configs differ in nothing that a compiled step knows of."""

    def same(one: Any, other: Any) -> bool:
        try:
            return one is other or bool(one == other)
        except ValueError:  # arrays
            return False

    unknown = {"seed", "seeds", "workdir", "display", "track", "checkpoint_every", "threads", "given"}
    return all(same(getattr(a, f.name), getattr(b, f.name)) for f in fields(Config) if f.name not in unknown)


@dataclass
class Result:
    """A finished run: its folder, and what `result.json` says."""

    workdir: Path
    result: dict[str, Any]

    def evaluate(self, data: Any = None) -> dict[str, Any]:
        """Metrics on the run's own validation set, or on other labelled images."""
        from jft.use import evaluate

        return evaluate(self.workdir, data)

    def predict(self, *images: Any, **options: Any) -> list[dict[str, Any]]:
        """Label and probability of each image: paths, folders, PIL images or arrays, or one list or batch of them.

        The options are those of `jft.use.predict_rows`.

        >>> run.predict("photos/", top_k=3)
        """
        from jft.use import predict

        batch = len(images) == 1 and (isinstance(images[0], list | tuple) or getattr(images[0], "ndim", 0) == 4)
        return predict(self.workdir, images[0] if batch else images, **options)


@dataclass
class Clock:
    """Seconds spent, by phase and in all; `before` is what earlier sessions of a resumed run spent.

    Functions compile when they are first called, so compilation is taken out of the phase in which it happens. What is
    traced to be compiled ahead of its first call counts as compiling too.
    """

    by_phase: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    memory: dict[str, dict[str, int]] = field(default_factory=dict)  # bytes, at most, whenever a phase had ended
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
            most = self.memory.setdefault(phase, {})
            for where, count in memory().items():
                if where in ("process", "device_peak"):
                    most[where] = max(most.get(where, 0), count)

    @property
    def total(self) -> float:
        return self.before + time.perf_counter() - self.start

    def seconds(self) -> dict[str, float]:
        """As `result.json` has it."""
        return {"total": round(self.total, 3)} | {k: round(v, 3) for k, v in self.by_phase.items()}


@contextlib.contextmanager
def running(workdir: Path) -> Iterator[None]:
    """Turns a full disk and a full memory, wherever they are met in a run, into one message with the ways out."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise MachineError(
            f"{disk(error, workdir)}. The run's last good state is in {workdir}: when that is "
            "mended, the same command goes on from there."
        ) from error
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        told = (str(error) or "no more memory").strip().splitlines()[0][:200]
        raise MachineError(
            f"Out of memory: {told}\nThe run's last good state is in {workdir}. --resident 0 or a machine with more "
            "memory goes on from there. With a new --workdir: a smaller --batch, --accumulate, --remat full, or a plan "
            "that trains less."
        ) from error


def default_workdir(config: Config) -> str:
    """`runs/DATA-MODEL-PLAN`, from the parts of the config a person would name the run by."""
    data = Path(str(config.data)).stem if isinstance(config.data, str | Path) else "data"
    scheme = config.plan if isinstance(config.plan, str) else "plan"
    return f"runs/{data.replace(':', '-')}-{config.model}-{scheme}"


def data_path(config: Config) -> str:
    """The data as they can be found from any folder: an absolute path, or what the config says of other sources."""
    data = config.data
    if isinstance(data, str | Path) and Path(data).expanduser().exists():
        return os.path.abspath(Path(data).expanduser())  # no link followed: a CSV's images lie beside the link
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


def contents(splits: Splits) -> str:
    """A hash of some images of every split: `fingerprint` is the same for copies that were resized or changed."""
    digest = hashlib.sha256()
    for split in filter(None, (splits.train, splits.val, splits.test)):
        for i in np.unique(np.linspace(0, len(split) - 1, SAMPLE).astype(int)).tolist():
            content: Any = b""
            with contextlib.suppress(OSError, ValueError):  # told where the images are decoded
                content = split.read(i)
            content = content if isinstance(content, bytes) else np.asarray(content).tobytes()
            digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Of Python, of this package and of what it computes with."""
    names = ("jft", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "pillow")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in names}


def make_deterministic() -> bool:
    """Have XLA use deterministic operations alone; False where that has no effect any more, on a GPU.

    XLA reads its flags once, with the first use of a device, as `jax.devices()` is in a notebook.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if DETERMINISTIC.split("=")[0] in flags:
        return True
    if not _begun():
        os.environ["XLA_FLAGS"] = f"{flags} {DETERMINISTIC}".strip()
        return True
    return jax.default_backend() != "gpu"


def _begun() -> bool:
    """Whether jax has used a device. To ask it for the devices would be their first use."""
    try:
        from jax._src.xla_bridge import backends_are_initialized
    except ImportError:  # it is not public: without it nobody is warned
        return False
    return bool(backends_are_initialized())


def compile_cache() -> None:
    """Compiled programs outlive the process: the next seed, a resumed run and a repeated one find them."""
    folder = cache_dir() / "xla"
    with contextlib.suppress(OSError):  # a cache that cannot be written is none
        check_compiled(folder)
    # JAX finds a program again under the very path alone under which it was written.
    jax.config.update("jax_compilation_cache_dir", str(folder.resolve()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def check_compiled(folder: Path) -> None:
    """Remove compiled programs that were cut short when a process was killed; each file is looked at once.

    JAX writes them in place, warns of a damaged one at every run, and never writes it again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stamp, now = folder / "checked", time.time()
    since = stamp.stat().st_mtime if stamp.exists() else 0.0
    for file in folder.glob("*-cache"):
        with contextlib.suppress(FileNotFoundError):  # another process's sweep
            if file.stat().st_mtime >= since - 1 and not _whole(file.read_bytes()):
                file.unlink()
    stamp.touch()
    os.utime(stamp, (now, now))


def _whole(entry: bytes) -> bool:
    if entry.startswith(b"\x28\xb5\x2f\xfd"):  # zstandard's, where that is installed
        return True
    reader = zlib.decompressobj()
    try:
        reader.decompress(entry)
    except zlib.error:
        return False
    return reader.eof


def read_json(file: Path) -> Any:
    """The JSON of a run's file. Raises UserError where it is missing or damaged."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file.parent} is no run's folder: it has no {file.name}.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is damaged: {error}. Remove the folder, or name another with --workdir.") from None


@contextlib.contextmanager
def entered(
    workdir: Path, what: Mapping[str, Any], note: Callable[[str], Any]
) -> Iterator[tuple[dict[str, Any] | None, Callable[[], None]]]:
    """Make or enter a run's folder and hold its lock; gives the result where the run is finished, else None.

    Also gives the lock's own check, see `lock.hold`. A finished run is only read, and not locked. Raises UserError
    where the folder holds another run, with the differences, where another process works on it, or where it cannot be
    written.
    """
    if finished := _look(workdir, what):
        with contextlib.suppress(OSError):  # a folder that can only be read is as good
            lock.clear(workdir)
            # The run was killed after its result: what it had of the report is drawn anew, and nobody is writing it.
            if not (workdir / "report.html").exists() and not (workdir / lock.NAME).exists():
                _sweep(workdir)
        yield finished, lambda: None
        return
    with contextlib.ExitStack() as held:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            check = held.enter_context(lock.hold(workdir, note))
            finished = _look(workdir, what)  # once more: until now another process may have worked on it
            if finished is None:
                _sweep(workdir)
                if (workdir / "config.json").exists():
                    note(f"{workdir} holds an interrupted run of this configuration: going on with it.")
                    _follow(workdir / "config.json", what)
                else:
                    write_json(workdir / "config.json", {"format": FORMAT, **what})
        except OSError as error:
            raise MachineError(f"{workdir} cannot be written: {error.strerror}. Name another with --workdir.") from None
        yield finished, check


def _sweep(workdir: Path) -> None:
    """Remove what a process that was killed had written beside its final place; nobody else is writing here."""
    for left in workdir.iterdir():
        if left.suffix in (PART, ".old") and left.is_dir():
            shutil.rmtree(left)
        elif left.suffix == PART:
            left.unlink()


def _follow(file: Path, what: Mapping[str, Any]) -> None:
    """Note in a run's config.json where its data and weights lie now: who reads it looks for them there."""
    old, new = read_json(file), json.loads(json.dumps(what))
    moved = {k: new[k] for k in ("data", "weights") if k in new}
    fields = {k: new["config"][k] for k in ("data", "weights") if k in new["config"]}
    if (now := {**old, **moved, "config": old["config"] | fields}) != old:
        write_json(file, now)


def _forget_places(old: dict[str, Any], new: dict[str, Any]) -> None:
    """Leave out of two runs' configs where their data and weights lie, if these are the same."""

    def same(key: str) -> bool:
        return old.get(key) is not None and old.get(key) == new.get(key)

    known = all(isinstance(about["config"].get("data"), str) for about in (old, new))
    if known and (same("data") or same("data_contents")):
        for about in (old, new):
            del about["config"]["data"]
    if same("weights_sha256") and same("preprocess"):  # what lies beside weights says how images are prepared for them
        for about in (old, new):
            about["config"].pop("weights", None)


def _look(workdir: Path, what: Mapping[str, Any]) -> dict[str, Any] | None:
    """The result of the run in a folder; None where there is none yet, or no run. Raises UserError for another run."""
    file = workdir / "config.json"
    if not file.exists():
        if workdir.exists() and (
            not workdir.is_dir() or any(p.name != lock.NAME and p.suffix != PART for p in workdir.iterdir())
        ):
            raise UserError(f"{workdir} is not empty and holds no run. Name a new folder with --workdir.")
        return None
    old = read_json(file)
    keys: tuple[str, ...] = ("config", "weights_sha256", "data_sha256", "data_contents")
    finished = (workdir / "result.json").exists()
    check_format(workdir, old, finished)
    # A field that the run was begun without has its default.
    defaults = {k: v for k, v in describe(Config()).items() if k not in PLACE}
    old["config"] = defaults | old["config"]
    asked = json.loads(json.dumps(what))
    _forget_places(old, asked)
    old.setdefault("data_contents", asked.get("data_contents"))  # runs of early versions do not say
    # Of one version's preset another may make other stages.
    before, now = ({"stages": {s["name"]: s for s in about.get("stages", ())}} for about in (old, asked))
    # Another seed, or share, draws other images of the same data: to tell of it once is enough.
    drawn = any(old["config"].get(k) != asked["config"].get(k) for k in ("data", "seed", "shots", "val_fraction"))
    keys = keys[:2] if drawn else keys
    old, asked = ({k: about.get(k) for k in keys} for about in (old, asked))
    if lines := differences(old, asked) or differences(before, now):
        others = {k for k in keys if old[k] != asked[k]} == {"data_contents"}
        raise UserError(
            f"{workdir} holds a run of another configuration (there → now):\n  " + "\n  ".join(lines[:20]) + "\n"
            f"{'The images have changed, under the same names. ' if others else ''}"
            "Name another folder with --workdir, or give the options it was begun with."
        )
    return read_json(workdir / "result.json") if finished else None


def check_format(workdir: Path, about: Mapping[str, Any], finished: bool = True) -> None:
    """Raises UserError where this jft cannot read a run's folder, or go on with the run; `about` is its config.json."""
    found, by = about.get("format", 0), about.get("versions", {}).get("jft", "?")
    if found == FORMAT or (found == 0 and finished):  # of what a finished run holds nothing has changed since
        return
    what = f"{workdir} holds a run's folder of format {found}, written by jft {by}; this jft has format {FORMAT}"
    if isinstance(found, int) and found < FORMAT:
        raise UserError(
            f"{what}, and its checkpoints cannot be gone on from. End the run with the version it was begun with, "
            "or begin anew with another --workdir."
        )
    raise UserError(f"{what}. Update jft, or name another folder with --workdir.")
