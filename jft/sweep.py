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
from jft.data import sources
from jft.errors import MachineError, UserError, near
from jft.files import PART, writing
from jft.hyper import follow_weights
from jft.plan import overridden
from jft.report.live import make_display
from jft.report.sweep import LOSS_NAMES, loss_told, page, standing
from jft.run import Shared, data_path, default_workdir, read_json, running
from jft.train import Interrupted, train

Space = Mapping[str, Any]  # by field: a list of values, or ("log" | "linear", lowest, highest)
TRIALS = 20
SCALES = ("log", "linear")
UNPRUNED = 4  # trials that end by themselves before any is stopped early
WORST = 0.2  # share of a run's steps before which none is
LOSSES = {"label_smoothing", "class_weights", "loss"}  # between trials that differ in these the loss tells nothing


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

    Where an image can have several labels the lowest validation loss is best, by which a run's own best state is
    chosen too; of trials that differ in what the loss is, the lowest log loss, and none of them is stopped early.

    A space of lists alone is gone through whole, else 20 trials are drawn (tree-structured Parzen estimator, Bergstra
    et al. 2011, "Algorithms for hyper-parameter optimization"); `trials` is their number in all, and after `seconds`
    none begins. A trial below the median of those before it at the same share of its last stage is stopped (`prune`).
    Trials are runs in `WORKDIR/trials/N`; the same call on an interrupted sweep goes on with it, and draws what it
    would have drawn. A trial whose values no run takes, or with which it diverges, has failed, and the sweep goes on;
    so has one with another error, which is raised, if it comes again when the same call tries the trial once more.
    Raises UserError where no trial completes or the first can have no run, MachineError where disk, memory or a lock
    stop a trial and the sweep with it, Interrupted when a trial was asked to stop (it has saved).

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
    names = [d.name for d in dimensions]
    if "plan" not in names and (dead := sorted(overridden(config.plan).intersection(names))):
        raise UserError(f"The space names {dead[0]!r}, of which every stage of the plan has its own.")
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise UserError(f"The space names {twice[0]} twice: - and _ are the same in a field's name.")
    grid = _grid(dimensions)
    total = (len(grid) or TRIALS) if trials is None else min(trials, len(grid) or trials)
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
        if "several" not in study.user_attrs:
            study.set_user_attr("several", _several(config))
        comparable = "log_loss" if LOSSES & set(names) else "loss"
        by = comparable if study.user_attrs["several"] else ""
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
            told = _try(optuna, study, trial, config, dimensions, workdir, shared, by)
            display.note(told)
            advance(1)
        rows = [_row(t, dimensions, workdir, comparable) for t in study.trials if t.state.name != "WAITING"]
        done = [r for r in rows if r["state"] == "complete"]
        if not done:
            raise UserError(_none_completed(workdir, rows, total))
        best = max(done, key=lambda r: _score(r, by, comparable))
        _report(workdir, config, dimensions, rows, best, display, by)
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
    if "." in name:
        hint = _inner(name)
    kinds = (hint,) if typing.get_origin(hint) is tuple else typing.get_args(hint) or (hint,)
    if hint is Any:
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


def _inner(name: str) -> Any:
    """The type of `lora.alpha`; Any of the architecture's options, which it checks itself."""
    field, _, inner = name.partition(".")
    metadata = Config.__dataclass_fields__[field].metadata
    if "fields" not in metadata:
        raise UserError(f"The space names {name!r}: {field} has no fields.")
    if metadata["fields"] is None:
        return Any
    hints = typing.get_type_hints(metadata["fields"])
    if inner not in hints:
        raise UserError(f"The space names {name!r}; {field} has: {', '.join(hints)}.{near(inner, hints)}")
    return hints[inner]


def parse(config: Config, words: Sequence[str]) -> dict[str, Any]:
    """A space from command-line words: `lr=log:1e-5:1e-2`, `plan=head,lp-ft`, `augment=crop flip,none`.

    Raises UserError for a word that is none, and where two name one field, as `lr` and `lr`, `image-size` and
    `image_size` do.
    """
    space: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or not text:
            raise UserError(f"--over {word}: FIELD=log:LOW:HIGH, FIELD=linear:LOW:HIGH or FIELD=A,B,… is expected.")
        name = name.replace("-", "_")
        if name in space:
            raise UserError(f"--over names {name} twice. Give all its values in one: --over {name}=A,B,…")
        scale, *ends = text.split(":")
        if scale in SCALES:
            space[name] = (scale, *(int(e) if e.lstrip("-").isdigit() else e for e in ends))
        else:
            space[name] = [_get(override(config, name, [value]), name) for value in text.split(",")]
    return space


def merged(space: Space, over: Space) -> dict[str, Any]:
    """A space with what `parse` made of a command line: its fields in place of the same ones, however spelled."""
    return {n: given for n, given in space.items() if n.replace("-", "_") not in over} | dict(over)


def again(config: Config, space: Space, best: Mapping[str, Any]) -> dict[str, str] | None:
    """Words, by field, that set a trial's values anew over the sweep's config; None where no words do.

    Stages, functions that no field takes by name, and the default of a list of words, whose `none` is an empty list,
    have no word; a default that the config has anyway is left out. What the trial had is read from its config.json.
    """
    recorded = read_json(Path(best["folder"]) / "config.json")["config"]
    dimensions = [dimension(config, name, given) for name, given in space.items()]
    made, words = config, {}
    try:
        for d in dimensions:
            word = best["values"][d.name]
            changed = override(made, d.name, [word])
            value, read = d.choices.get(word), _get(changed, d.name)
            if callable(value) and read is not value:
                return None
            if d.choices and value is None and read is not None and _get(made, d.name) is None:
                continue
            made, words[d.name] = changed, word
        config_check(made)
        now = json.loads(json.dumps(describe(follow_weights(made))))
    except UserError:
        return None
    if overridden(made.plan) & words.keys():  # which no command line may name
        return None
    for d in dimensions:
        field = d.name.partition(".")[0]
        # What is left out a rule may set.
        if _at(now, d.name) != _at(recorded, d.name) or (made.hyper is not None and field not in made.given):
            return None
    return words


def _several(config: Config) -> bool:
    """Whether an image of the data can have several labels."""
    if config.data is None:  # which the first trial tells
        return False
    data = config.data() if callable(config.data) else config.data
    return sources.load(data, val_fraction=0).train.several


def _none_completed(workdir: Path, rows: Sequence[Mapping[str, Any]], total: int) -> str:
    """What is told where no trial has a result."""
    failed = [r for r in rows if "error" in r]
    if not failed:
        return f"No trial of {workdir} has ended. Give it more --seconds."
    last = failed[-1]
    more = "Give it more --seconds, or other values" if len(rows) < total else "Give other values"
    return (
        f"No trial of {workdir} has completed, {len(failed)} failed. The last, trial {last['number']} "
        f"({', '.join(f'{n} {v}' for n, v in last['values'].items())}): {last['error']}\n"
        f"{more} in a new --workdir."
    )


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
    by: str,
) -> str:
    """Run a trial to its end, or on to it, and tell the study; returns a line about it.

    `by` is the loss that trials are chosen by, empty where their accuracy or R² is what they are.
    """
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
        if row["final"] and place not in reported and by != "log_loss":
            reported.add(place)
            figure = by or metrics.headline(row, "val_")
            trial.set_user_attr("figure", figure)
            trial.report(_fit(row["val_loss"]) if by else row[f"val_{figure}"], place)
            if row["done"] < 1 and trial.should_prune():
                raise optuna.TrialPruned

    def failed(told: str) -> None:
        trial.set_user_attr("error", told)
        study.tell(trial, state=optuna.trial.TrialState.FAIL)

    name = f"trial {trial.number}: {', '.join(f'{n} {_word(v)}' for n, v in values.items())}"
    try:
        with running(folder):
            result = train(one, watch=watch, shared=shared).result
    except optuna.TrialPruned:
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        return f"{name}: stopped early"
    except (MachineError, PermissionError, BrokenPipeError):
        raise  # says nothing of these values: the same command goes on with this trial
    except UserError as error:
        failed(str(error))
        if not folder.exists() and len(_ended(study)) == 1:  # a mistake, and nothing has begun: it can be mended
            raise
        return f"{name}: {error}"
    except Interrupted as stopped:
        raise Interrupted(f"In trial {trial.number}: {stopped}") from None
    except Exception as error:
        told = f"{type(error).__name__}: {error}"
        if "fault" in trial.user_attrs:
            failed(told)
            return f"{name}: {told}"
        # It may be mended by the next call, which tries the trial once more; but for a run the sweep would begin anew.
        trial.set_user_attr("fault", told)
        folder.parent.mkdir(exist_ok=True)
        raise
    scores = result["val"]
    study.tell(trial, _fit(scores[by]) if by else scores[metrics.headline(scores)])
    return f"{name}: {_told(scores, by)}"


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
    return _at(vars(config), name.replace("-", "_"))


def _at(fields: Mapping[str, Any], name: str) -> Any:
    field, _, inner = name.partition(".")
    return fields[field].get(inner) if inner else fields[field]


def _word(value: Any) -> str:
    """A value as a command line has it, where it can; stages by their names."""
    if value is None or value == ():
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return short if float(short := f"{value:g}") == value else repr(float(value))
    if isinstance(value, tuple | list):
        return ",".join(v.name if hasattr(v, "name") else _word(v) for v in value)
    told = describe(value)
    return told if isinstance(told, str) else json.dumps(told)


def _row(trial: Any, dimensions: Sequence[Dimension], workdir: Path, comparable: str) -> dict[str, Any]:
    """A trial's line: what was tried, and what `result.json` of its run says, or how far it went.

    `comparable` is the loss that means the same in every trial.
    """
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
        figure, scores = metrics.headline(result["val"]), result["val"]
        row |= {k: scores[k] for k in (figure, "loss", comparable) if k in scores}
        row["seconds"] = result["seconds"]["total"]
        row |= {f"test_{figure}": result["test"][figure]} if "test" in result else {}
    elif scores := [v for v in trial.intermediate_values.values() if math.isfinite(v)]:
        figure = trial.user_attrs.get("figure", "accuracy")
        row[figure] = -max(scores) if figure in LOSS_NAMES else max(scores)
    return row | ({"error": trial.user_attrs["error"]} if "error" in trial.user_attrs else {})


def _fit(loss: Any) -> float:
    """How low a loss is: one that is no number, of which `result.json` has the name, is never low."""
    return -loss if not isinstance(loss, str) and math.isfinite(loss) else -math.inf


def _score(row: Mapping[str, Any], by: str, comparable: str) -> tuple[float, float]:
    """By which one complete trial is better than another, as `train.Run` says it of validations.

    Quantities have no loss that is `comparable` where trials differ in theirs: then the first of equal ones is best.
    """
    figure = row[metrics.headline(row)]
    if by:
        return _fit(row[by]), figure
    return figure, _fit(row[comparable]) if comparable in row else 0.0


def _told(scores: Mapping[str, Any], by: str) -> str:
    """`97.12%`, `log loss 0.1234, accuracy 97.12%`."""
    figure = metrics.headline(scores)
    value = metrics.told(figure, scores[figure])
    return f"{LOSS_NAMES[by]} {loss_told(scores[by])}, {figure} {value}" if by else value


def _report(
    workdir: Path,
    config: Config,
    dimensions: Sequence[Dimension],
    rows: Sequence[Mapping[str, Any]],
    best: Mapping[str, Any],
    display: Any,
    by: str,
) -> None:
    """The table, `result.json` and `sweep.html`."""
    names = [d.name for d in dimensions]
    figure = metrics.headline(best)
    ranked = sorted(rows, key=lambda r: (r is not best, *standing(r, by or figure)))

    def told(row: Mapping[str, Any], key: str) -> str:
        return metrics.told(figure, row[key]) if key in row else ""

    def loss(row: Mapping[str, Any]) -> list[str]:
        return [loss_told(row[by]) if by in row else ""] if by else []

    tests = [f"test_{figure}"] if any(f"test_{figure}" in r for r in rows) else []
    scores = [f"validation {LOSS_NAMES[by]}", figure] if by else ["validation"]
    display.table(
        [
            [
                r["number"], *(r["values"].get(n, "") for n in names), *loss(r), told(r, figure),
                *(told(r, t) for t in tests), f"{r['seconds']:.1f}" if "seconds" in r else r["state"],
            ]
            for r in ranked
        ],
        ["trial", *names, *scores, *("test" for _ in tests), "seconds"],
        title=str(workdir),
    )  # fmt: skip
    write_json(workdir / "result.json", {"best": best, "trials": list(rows)})
    logarithmic = {d.name for d in dimensions if d.scale == "log"}
    ranges = {d.name for d in dimensions if not d.choices}
    with writing(workdir / "sweep.html") as part:
        part.write_text(page(data_path(config), rows, best, names, ranges, logarithmic, by), "utf-8", "replace")
    display.note(f"Pictures are in {workdir / 'sweep.html'}.")
