"""A search over fields of a config: every trial a run of its own, chosen by Optuna from those before it."""

import contextlib
import importlib
import itertools
import json
import math
import os
import time
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jft import lock, metrics
from jft.config import PLACE, Config, describe, differences, override, write_json
from jft.config import check as config_check
from jft.errors import MachineError, UserError, near
from jft.files import PART, writing
from jft.report.live import make_display
from jft.report.sweep import page
from jft.run import Shared, data_path, default_workdir, read_json, running
from jft.train import Interrupted, train

Space = Mapping[str, Any]  # by field: a list of values, or ("log" | "linear", lowest, highest)
TRIALS = 20
SCALES = ("log", "linear")
UNPRUNED = 4  # trials that end by themselves before any is stopped early
WORST = 0.2  # share of a run's steps before which none is


@dataclass(frozen=True)
class Dimension:
    """A field, `lr` or `preprocess.crop_pct`, and what it may be."""

    name: str
    choices: Mapping[str, Any]  # by the word that a command line has for it; empty for a range
    scale: str = ""
    low: float = 0.0
    high: float = 0.0
    whole: bool = False

    def described(self) -> Any:
        """As `sweep.json` has it."""
        return list(self.choices) or [self.scale, self.low, self.high]


@dataclass(frozen=True)
class Swept:
    """A sweep: its folder, a row for every trial, and that of the best."""

    workdir: Path
    rows: list[dict[str, Any]]
    best: dict[str, Any]


def sweep(
    config: Config, space: Space, *, trials: int | None = None, seconds: float | None = None, prune: bool = True
) -> Swept:
    """Search for the values of `space` with the best validation accuracy (of quantities R²); returns the trials.

    A space of lists alone is gone through whole, else 20 trials are drawn (tree-structured Parzen estimator, Bergstra
    et al. 2011, "Algorithms for hyper-parameter optimization"); `trials` is their number in all, and after `seconds`
    none begins. A trial below the median of those before it at the same share of its last stage is stopped (`prune`).
    Trials are runs in `WORKDIR/trials/N`; the same call on an interrupted sweep goes on with it, and draws what it
    would have drawn. A trial whose values no run takes, or with which it diverges, has failed, and the sweep goes on.
    Raises UserError, MachineError where disk, memory or a lock stop a trial and the sweep with it, Interrupted when a
    trial was asked to stop (it has saved).

    >>> sweep(Config(data="bees/"), {"lr": ("log", 1e-5, 1e-2), "plan": ["head", "lp-ft"]}).best["values"]
    """
    optuna = _optuna()
    if config.distributed:
        raise UserError("--distributed is for one run. Leave it out here, and give it to the best trial's command.")
    if config.seeds > 1:
        raise UserError(
            f"--seeds is {config.seeds}; a trial is one run, of --seed. Take --seeds 1 here, and give --seeds "
            f"{config.seeds} to the best trial's command, which then tells mean and spread."
        )
    dimensions = [dimension(config, name, given) for name, given in space.items()]
    if not dimensions:
        raise UserError("The space is empty. Name fields with --over lr=log:1e-5:1e-2 or in the config file's SPACE.")
    grid = _grid(dimensions)
    total = min(trials or len(grid), len(grid)) if grid else trials or TRIALS
    if total < 1:
        raise UserError(f"--trials is {trials}; at least 1 is needed.")
    workdir = Path(config.workdir or default_workdir(config) + "-sweep")
    begun, display = time.monotonic(), make_display(config.display)
    with (
        contextlib.closing(Shared()) as shared,
        contextlib.closing(display),
        _entered(workdir, config, dimensions, display.note) as ours,
        running(workdir),
        display.task("Trials", total=total, unit="trials") as advance,
    ):
        study = _study(optuna, workdir, prune)
        advance(len(_ended(study)))
        while True:
            ours()
            under_way = [t for t in study.trials if t.state.name == "RUNNING"]
            late = seconds is not None and time.monotonic() - begun > seconds
            if not under_way and (late or len(_ended(study)) >= total):
                break
            number = under_way[0].number if under_way else len(study.trials)
            # A sampler of its own for each trial: an interrupted sweep draws what it would have drawn.
            study.sampler = optuna.samplers.TPESampler(seed=(config.seed + 7919 * number) % 2**32)
            if under_way:
                trial = optuna.trial.Trial(study, under_way[0]._trial_id)
            else:
                if grid and not any(t.state.name == "WAITING" for t in study.trials):
                    study.enqueue_trial(grid[number % len(grid)])
                trial = study.ask()
            told = _try(optuna, study, trial, config, dimensions, workdir, shared)
            display.note(told)
            advance(1)
        rows = [_row(t, dimensions, workdir) for t in study.trials if t.state.name != "WAITING"]
        done = [r for r in rows if r["state"] == "complete"]
        if not done:
            raise UserError(f"No trial of {workdir} has ended. Give it more --seconds.")
        best = max(done, key=lambda r: (r[metrics.headline(r)], _fit(r)))
        _report(workdir, config, dimensions, rows, best, display)
    return Swept(workdir, rows, best)


def dimension(config: Config, name: str, given: Any) -> Dimension:
    """A field's dimension from what a space says of it. Raises UserError for fields and values that cannot be."""
    name = name.replace("-", "_")
    field, _, inner = name.partition(".")
    hints = {n: h for n, h in typing.get_type_hints(Config).items() if n in Config.__dataclass_fields__}
    if field not in hints or field == "given":
        raise UserError(f"The space names {name!r}, which is no field of a config.{near(field, hints)}")
    if field in PLACE or field == "data":
        raise UserError(f"The space names {name!r}: trials cannot differ in it.")
    if isinstance(given, tuple) and given and given[0] in SCALES:
        return _range(config, name, hints[field], given)
    if not isinstance(given, Sequence) or isinstance(given, str) or not given or given[:1] == ("log",):
        raise UserError(f"The space of {name} is {given!r}; {EXPECTED}")
    choices: dict[str, Any] = {}
    for value in given:
        choices.setdefault(_word(value), value)
    if len(choices) < len(given):
        raise UserError(f"The space of {name} has a value twice: {', '.join(map(_word, given))}.")
    if not inner:
        for value in choices.values():
            config_check(config.replace(**{name: value}))
    return Dimension(name, choices)


EXPECTED = "a list of values or ('log', lowest, highest), ('linear', lowest, highest) is expected."


def _range(config: Config, name: str, hint: Any, given: tuple) -> Dimension:
    try:
        scale, low, high = given
        low, high = float(low), float(high)
    except (TypeError, ValueError):
        raise UserError(f"The space of {name} is {given!r}; {EXPECTED}") from None
    if not (math.isfinite(low) and math.isfinite(high) and low < high) or (scale == "log" and low <= 0):
        above = " above 0" if scale == "log" else ""
        raise UserError(f"The space of {name} goes from {low:g} to {high:g}; a lower number{above} comes first.")
    kinds = typing.get_args(hint) or (hint,)
    if "." in name:
        whole = all(isinstance(end, int) for end in given[1:])
    elif float in kinds:
        whole = False
    elif int in kinds:
        whole = True
    else:
        raise UserError(f"The space of {name} is a range, but {name} is no number. Give a list of values.")
    made = Dimension(name, {}, scale, low, high, whole)
    if "." not in name:
        for end in (low, high):
            config_check(config.replace(**{name: int(end) if whole else end}))
    return made


def parse(config: Config, words: Sequence[str]) -> dict[str, Any]:
    """A space from command-line words: `lr=log:1e-5:1e-2`, `plan=head,lp-ft`, `augment=crop flip,none`."""
    space: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or not text:
            raise UserError(f"--over {word}: FIELD=log:LOW:HIGH, FIELD=linear:LOW:HIGH or FIELD=A,B,… is expected.")
        scale, *ends = text.split(":")
        if scale in SCALES:
            space[name] = (scale, *(int(e) if e.lstrip("-").isdigit() else e for e in ends))
        else:
            space[name] = [_get(override(config, name, [value]), name) for value in text.split(",")]
    return space


def _optuna() -> Any:
    try:
        optuna = importlib.import_module("optuna")
        importlib.import_module("optuna.storages.journal")
    except ImportError as error:
        raise UserError(f"jft sweep needs Optuna 4 or newer ({error}). Install it: pip install 'jft[sweep]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


@contextlib.contextmanager
def _entered(
    workdir: Path, config: Config, dimensions: Sequence[Dimension], note: Callable[[str], Any]
) -> Iterator[Callable[[], None]]:
    """Make or enter a sweep's folder and hold its lock; gives the lock's own check, see `lock.hold`.

    A sweep in which no run has begun is begun anew.
    """
    file, names = workdir / "sweep.json", {d.name for d in dimensions}
    what = {
        "config": {k: v for k, v in describe(config).items() if k not in PLACE and k not in names},
        "space": {d.name: d.described() for d in dimensions},
    }
    if (
        workdir.exists()
        and not file.exists()
        and (not workdir.is_dir() or any(p.name != lock.NAME and p.suffix != PART for p in workdir.iterdir()))
    ):
        raise UserError(f"{workdir} is not empty and holds no sweep. Name a new folder with --workdir.")
    with contextlib.ExitStack() as held:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            ours = held.enter_context(lock.hold(workdir, note))
            journal = workdir / "study.journal"
            if not (workdir / "trials").exists():
                for left in (journal, workdir / "study.journal.lock"):
                    left.unlink(missing_ok=True)
                write_json(file, what)
            elif journal.exists():
                _mend(journal)
        except OSError as error:
            raise MachineError(f"{workdir} cannot be written: {error.strerror}. Name another with --workdir.") from None
        if lines := differences(read_json(file), json.loads(json.dumps(what))):
            raise UserError(
                f"{workdir} holds another sweep (there → now):\n  " + "\n  ".join(lines[:20]) + "\n"
                "Name another folder with --workdir, or give the options it was begun with."
            )
        yield ours


def _mend(journal: Path) -> None:
    """Cut off the part of a line that a full disk or a kill left: Optuna would write on in it, and read none after."""
    text = journal.read_bytes()
    if (whole := text.rfind(b"\n") + 1) < len(text):
        os.truncate(journal, whole)


def _study(optuna: Any, workdir: Path, prune: bool) -> Any:
    pruner = optuna.pruners.MedianPruner(n_startup_trials=UNPRUNED, n_warmup_steps=round(100 * WORST))
    backend = optuna.storages.journal.JournalFileBackend(str(workdir / "study.journal"))
    return optuna.create_study(
        storage=optuna.storages.JournalStorage(backend),
        study_name="sweep",
        direction="maximize",
        pruner=pruner if prune else optuna.pruners.NopPruner(),
        load_if_exists=True,
    )


def _grid(dimensions: Sequence[Dimension]) -> list[dict[str, str]]:
    """Every combination of a space of lists; nothing where the space has ranges."""
    if not all(d.choices for d in dimensions):
        return []
    names = [d.name for d in dimensions]
    return [dict(zip(names, words, strict=True)) for words in itertools.product(*(d.choices for d in dimensions))]


def _ended(study: Any) -> list[Any]:
    return [t for t in study.trials if t.state.is_finished()]


def _try(
    optuna: Any,
    study: Any,
    trial: Any,
    config: Config,
    dimensions: Sequence[Dimension],
    workdir: Path,
    shared: Shared,
) -> str:
    """Run a trial to its end, or on to it, and tell the study; returns a line about it."""
    values = {d.name: _drawn(d, _suggest(trial, d)) for d in dimensions}
    reported = set(study.trials[trial.number].intermediate_values)
    folder = workdir / "trials" / str(trial.number)
    quiet = "quiet" if config.display in ("auto", "plain") else config.display
    one = config.replace(workdir=str(folder), display=quiet, seeds=1)
    for name, value in values.items():
        one = _set(one, name, value)

    def watch(row: Mapping[str, Any]) -> None:
        # Of the last stage only: what a plan gains in it, its first stages do not show.
        place = round(100 * row["done"])
        if row["final"] and place not in reported:
            reported.add(place)
            figure = metrics.headline(row, "val_")
            trial.set_user_attr("figure", figure)
            trial.report(row[f"val_{figure}"], place)
            if row["done"] < 1 and trial.should_prune():
                raise optuna.TrialPruned

    name = f"trial {trial.number}: {', '.join(f'{n} {_word(v)}' for n, v in values.items())}"
    try:
        result = train(one, watch=watch, shared=shared).result
    except optuna.TrialPruned:
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        return f"{name}: stopped early"
    except MachineError:  # says nothing of these values: the same command goes on with this trial
        raise
    except UserError as error:
        trial.set_user_attr("error", str(error))
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
        if all(t.state.name == "FAIL" for t in _ended(study)):
            raise
        return f"{name}: {error}"
    except Interrupted as stopped:
        raise Interrupted(f"In trial {trial.number}: {stopped}") from None
    figure = metrics.headline(result["val"])
    study.tell(trial, result["val"][figure])
    return f"{name}: {metrics.told(figure, result['val'][figure])}"


def _suggest(trial: Any, d: Dimension) -> Any:
    if d.choices:
        return trial.suggest_categorical(d.name, list(d.choices))
    if d.whole:
        return trial.suggest_int(d.name, int(d.low), int(d.high), log=d.scale == "log")
    return trial.suggest_float(d.name, d.low, d.high, log=d.scale == "log")


def _drawn(d: Dimension, suggested: Any) -> Any:
    """The value of a suggestion: three digits of a number, which a command line can repeat."""
    if d.choices:
        return d.choices[suggested]
    return suggested if d.whole else min(max(float(f"{suggested:.3g}"), d.low), d.high)


def _set(config: Config, name: str, value: Any) -> Config:
    field, _, inner = name.partition(".")
    return config.replace(**{field: {**getattr(config, field), inner: value} if inner else value})


def _get(config: Config, name: str) -> Any:
    field, _, inner = name.replace("-", "_").partition(".")
    return getattr(config, field)[inner] if inner else getattr(config, field)


def _word(value: Any) -> str:
    """A value as a command line has it, where it can; stages by their names."""
    if value is None or value == ():
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple | list):
        return ",".join(v.name if hasattr(v, "name") else _word(v) for v in value)
    told = describe(value)
    return told if isinstance(told, str) else json.dumps(told)


def _row(trial: Any, dimensions: Sequence[Dimension], workdir: Path) -> dict[str, Any]:
    """A trial's line: what was tried, and what `result.json` of its run says, or how far it went."""
    folder = workdir / "trials" / str(trial.number)
    known = [d for d in dimensions if d.name in trial.params]
    row = {
        "number": trial.number,
        "values": {d.name: _word(_drawn(d, trial.params[d.name])) for d in known},
        "state": {"PRUNED": "stopped early", "FAIL": "failed"}.get(trial.state.name, trial.state.name.lower()),
        "folder": str(folder),
    }
    if trial.state.name == "COMPLETE":
        result = read_json(folder / "result.json")
        figure = metrics.headline(result["val"])
        row |= {k: result["val"][k] for k in (figure, "loss")} | {"seconds": result["seconds"]["total"]}
        row |= {f"test_{figure}": result["test"][figure]} if "test" in result else {}
    elif scores := [v for v in trial.intermediate_values.values() if math.isfinite(v)]:
        row[trial.user_attrs.get("figure", "accuracy")] = max(scores)
    return row | ({"error": trial.user_attrs["error"]} if "error" in trial.user_attrs else {})


def _fit(row: Mapping[str, Any]) -> float:
    """How low a complete trial's loss is: one that is no number, of which `result.json` has the name, is never low."""
    return -math.inf if isinstance(row["loss"], str) else -row["loss"]


def _report(
    workdir: Path,
    config: Config,
    dimensions: Sequence[Dimension],
    rows: Sequence[Mapping[str, Any]],
    best: Mapping[str, Any],
    display: Any,
) -> None:
    """The table, `result.json` and `sweep.html`."""
    names = [d.name for d in dimensions]
    figure = metrics.headline(best)
    ranked = sorted(rows, key=lambda r: (r is not best, r["state"] != "complete", -r.get(figure, -math.inf)))

    def told(row: Mapping[str, Any], key: str) -> str:
        return metrics.told(figure, row[key]) if key in row else ""

    tests = [f"test_{figure}"] if any(f"test_{figure}" in r for r in rows) else []
    display.table(
        [
            [
                r["number"], *(r["values"].get(n, "") for n in names), told(r, figure),
                *(told(r, t) for t in tests), f"{r['seconds']:.1f}" if "seconds" in r else r["state"],
            ]
            for r in ranked
        ],
        ["trial", *names, "validation", *("test" for _ in tests), "seconds"],
        title=str(workdir),
    )  # fmt: skip
    write_json(workdir / "result.json", {"best": best, "trials": list(rows)})
    logarithmic = {d.name for d in dimensions if d.scale == "log"}
    ranges = {d.name for d in dimensions if not d.choices}
    with writing(workdir / "sweep.html") as part:
        part.write_text(page(data_path(config), rows, best, names, ranges, logarithmic), "utf-8", "replace")
    display.note(f"Pictures are in {workdir / 'sweep.html'}.")
