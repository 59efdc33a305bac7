"""The report of a run: one HTML file that needs nothing beside it, made from the run's folder alone."""

import base64
import html
import io
import json
import re
import shlex
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib import resources
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from jft import metrics
from jft.data.sources import Dataset
from jft.errors import UserError
from jft.files import writing
from jft.report import log, plots

TABLE_CLASSES = 12  # a confusion matrix of more classes is drawn, not written
MISTAKES, UNSURE, SUSPECTS, PAIRS, EXCLUDED, FIGURES = 16, 8, 12, 15, 100, 12  # at most so many are shown
NAMED_CLASSES = 40  # a drawn confusion matrix of more classes numbers them
CONFIG = "CONFIG.py"
CALLED = (  # fields that may be functions
    "data", "weights", "plan", "optimizer", "schedule", "hyper", "loss", "penalty", "objective", "track",
)  # fmt: skip
_FUNCTION = re.compile(r"(?!tfds:|hf:|gs:)([\w.]+|.*\.py):[A-Za-z_<][\w.<>]*")  # `module:name`, `file.py:name`
EXPLAINED = "explained.npz"  # what `jft report --explain` found with the model at hand
THUMBNAIL = 240  # pixels of its longer side: sharp on a phone's screen


class Markup(str):
    """HTML that is safe to stand in the page; every other string is escaped before it does."""


def tag(name: str, /, *children: Any, **attributes: Any) -> Markup:
    """An element. Children are markup, text, lists of these, or None; `class_` is the attribute `class`.

    >>> tag("p", "a < b", class_="small")
    '<p class="small">a &lt; b</p>'
    """
    told = "".join(f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(v))}"' for key, v in attributes.items())
    return Markup(f"<{name}{told}>" + ("" if name in ("img", "meta") else f"{join(children)}</{name}>"))


def join(children: Iterable[Any]) -> Markup:
    """Markup as it is, text escaped, lists flattened, None left out."""
    out: list[str] = []
    for child in children:
        if isinstance(child, Markup):
            out.append(child)
        elif isinstance(child, list | tuple):
            out.append(join(child))
        elif child is not None:
            out.append(html.escape(str(child)))
    return Markup("".join(out))


Read = Callable[[str], bytes | np.ndarray | None]


@dataclass(frozen=True)
class Run:
    """What a run's folder holds, as far as it is there."""

    folder: Path
    config: Mapping[str, Any]
    result: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]  # of the metrics log
    classes: Sequence[str]
    names: Sequence[str]  # of the validation images
    labels: np.ndarray  # [n], or [n, k] where an image may have several, or where they are quantities
    probabilities: np.ndarray  # [n, k]; of quantities what was predicted
    read: Read  # a picture by its name; None where it is not to be found
    bundle: Mapping[str, Any] = field(default_factory=dict)  # config.json of the model
    explained: Mapping[str, Any] = field(default_factory=dict)  # arrays of `jft.explain`, if it has been run
    quantities: bool = False  # whether the labels are numbers, and `classes` their names

    @property
    def several(self) -> bool:
        """Whether an image may have several labels."""
        return self.labels.ndim == 2 and not self.quantities

    @property
    def figure(self) -> str:
        """What runs like this one are compared by, a key of `metrics.HEADLINES`."""
        return metrics.figure(self.quantities, any("val_average_precision" in row for row in self.rows))


def make_report(workdir: str | Path, images: Dataset | None = None) -> Path:
    """Write `report.html` into a run's folder from what lies there, and return its path.

    Its pictures come from `images`, else from the folder or CSV that the run was given, if it is still there. An
    interrupted run gets a report of what there is. Raises UserError where the folder is no run's.
    """
    run = read_run(Path(workdir), images)
    answers = [
        ("Classes", _classes),
        ("Calibration", _calibration),
        ("Mistakes", _mistakes),
        ("Explanations", _reasons),
        ("Labels to check", _suspects),
    ]
    if run.quantities:
        answers = [("Predictions", _agreement), ("Largest errors", _largest)]
    sections = [
        ("Result", _result(run)),
        ("What was trained when", _stages(run)),
        ("Curves", _curves(run)),
        ("Distance travelled", _distance(run)),
        *((title, section(run)) for title, section in answers),
        ("Data", _data(run)),
        ("Time", _time(run)),
        ("How to repeat it", _repeat(run)),
    ]
    path = run.folder / "report.html"
    title = f"{_model(run)} on {data_name(run)}"
    made = f"Made by jft {_versions(run).get('jft', '')} from the files in {run.folder.name}."
    with writing(path) as part:
        part.write_text(page(title, _subtitle(run), sections, made), "utf-8", "replace")
    return path


def read_run(folder: Path, images: Dataset | None = None) -> Run:
    """The files of a run's folder. Raises UserError where there is no config.json."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is no run's folder: it has no config.json. `jft finetune --workdir` makes one.")
    config, result = read_json(folder / "config.json"), read_json(folder / "result.json")
    rows = log.read(folder / "metrics.jsonl") if (folder / "metrics.jsonl").is_file() else []
    classes = [str(c) for c in result.get("classes") or config.get("classes") or []]
    names: list[str] = []
    labels, probabilities = np.zeros(0, np.int64), np.zeros((0, len(classes)), np.float32)
    quantities = bool(result.get("quantities")) or any("val_r2" in row for row in rows)
    if (folder / "predictions.npz").is_file():
        try:
            # Opened here: np.load leaves a damaged archive open.
            with open(folder / "predictions.npz", "rb") as raw, np.load(raw, allow_pickle=False) as file:
                quantities = "values" in file.files
                names, labels = [str(n) for n in file["names"]], file["labels"]
                probabilities = file["values" if quantities else "probabilities"]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{folder / 'predictions.npz'} is damaged: {error}") from None
        if not quantities:
            labels = labels.astype(bool if labels.ndim == 2 else np.int64)
        if probabilities.shape[1] != len(classes):
            classes = classes or [str(i) for i in range(probabilities.shape[1])]
    data = str(result.get("data") or (config.get("config") or {}).get("data") or ".")
    about = read_json(folder / "model" / "config.json")
    explained = read_explained(folder)
    read = _reader(data, images)
    return Run(folder, config, result, rows, classes, names, labels, probabilities, read, about, explained, quantities)


_TOGETHER = (
    ("shown", "classes", "maps", "neighbours", "neighbour_labels", "neighbour_pixels", "pixels", "similarity"),
    ("suspect_names", "suspect_count", "suspect_label", "suspect_pixels", "suspect_probability", "suspect_said"),
    ("probe_accuracy", "probe_count", "suspect_names"),
)


def read_explained(folder: Path) -> dict[str, np.ndarray]:
    """What `jft.explain` left in a run's folder; nothing where it has not been run, or of another model."""
    try:
        with open(folder / EXPLAINED, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{folder / EXPLAINED} is damaged: {error}. Remove it.") from None
    of = read_json(folder / "model" / "config.json").get("sha256")
    if str(found.get("sha256")) != str(of):
        return {}
    for first, *others in _TOGETHER:
        if first in found and (lacking := [k for k in others if k not in found]):
            raise UserError(f"{folder / EXPLAINED} is damaged: it lacks {', '.join(lacking)}. Remove it.")
    return found


def read_json(path: Path) -> dict[str, Any]:
    """What a file holds; nothing where it is not there. Raises UserError where it is damaged."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}") from None
    return found if isinstance(found, dict) else {}


# -- the page ---------------------------------------------------------------------------------------------------------


def page(title: str, subtitle: str, sections: Sequence[tuple[str, Any]], footer: str) -> str:
    """A whole page that needs nothing beside it: sections with their titles; those without content are left out."""
    sections = [(name, content) for name, content in sections if content]
    style = (resources.files("jft.report") / "style.css").read_text("utf-8")
    ids = {name: re.sub(r"\W+", "-", name.lower()) for name, _ in sections}
    body = tag(
        "main",
        tag("header", tag("h1", title), tag("p", subtitle, class_="muted") if subtitle else None),
        tag("nav", [tag("a", name, href=f"#{ids[name]}") for name, _ in sections], aria_label="Sections"),
        [
            tag("section", tag("h2", name, id=f"{ids[name]}-title"), content, id=ids[name],
                aria_labelledby=f"{ids[name]}-title")
            for name, content in sections
        ],
        tag("footer", footer),
    )  # fmt: skip
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        # The page needs nothing from outside; this keeps it so, whatever a class or a file is called.
        tag("meta", http_equiv="Content-Security-Policy",
            content="default-src 'none'; img-src data:; style-src 'unsafe-inline'"),
        tag("title", title),
        Markup(f"<style>\n{style}</style>"),
    )  # fmt: skip
    return f'<!DOCTYPE html>\n<html lang="en">{head}<body>{body}</body></html>\n'


def _model(run: Run) -> str:
    return str(run.result.get("model") or _settings(run).get("model") or "model")


def _settings(run: Run) -> Mapping[str, Any]:
    return run.config.get("config") or {}


def _versions(run: Run) -> Mapping[str, Any]:
    return run.config.get("versions") or {}


def data_name(run: Run) -> str:
    """The last part of what a run was given as data."""
    given = str(run.result.get("data") or _settings(run).get("data") or "data")
    return Path(given.rstrip("/")).name or given


def _what(run: Run) -> str:
    if run.quantities:
        return "quantity" if len(run.classes) == 1 else "quantities"
    return "classes"


def _subtitle(run: Run) -> str:
    plan = run.result.get("plan") or _settings(run).get("plan")
    said = [
        f"{len(run.classes)} {_what(run)}" if run.classes else "",
        f"plan {plan}" if isinstance(plan, str) else "",
        f"seed {run.result['seed']}" if "seed" in run.result else "",
        str(run.result.get("device", "")),
    ]
    return " · ".join(s for s in said if s)


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[Any]],
    caption: str = "",
    text: Sequence[int] = (),
    **attributes: Any,
) -> Markup:
    """A table whose first column names the rows; columns in `text` are set left, as the first is."""
    align = [{"class_": "text"} if i in text else {} for i in range(len(columns))]
    shown = tag(
        "div",
        tag(
            "table",
            tag("thead", tag("tr", [tag("th", c, scope="col", **a) for c, a in zip(columns, align, strict=True)])),
            tag(
                "tbody",
                [
                    tag("tr", tag("th", row[0], scope="row"),
                        [tag("td", cell, **a) for cell, a in zip(row[1:], align[1:], strict=True)])
                    for row in rows
                ],
            ),
            **attributes,
        ),
        class_="scroll", tabindex="0",
    )  # fmt: skip
    # Not a caption: that would be as wide as the table, and be cut where the table is scrolled.
    return join([tag("p", caption, class_="small muted") if caption else None, shown])


def _bar(share: Any) -> Markup:
    return tag("span", tag("i", style=f"--share: {100 * share:.1f}%"), class_="bar", aria_hidden="true")


def percent(value: Any) -> str:
    """A share as `93.1 %`."""
    return f"{100 * value:.1f}\N{NO-BREAK SPACE}%"


def seconds(value: float) -> str:
    """A duration: `12.5 s`, `3 min 4 s`, `2 h 5 min`."""
    minutes, seconds = divmod(round(value), 60)
    told = f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {seconds} s"
    return (told if minutes else f"{value:.1f} s").replace(" ", "\N{NO-BREAK SPACE}")


# -- sections ---------------------------------------------------------------------------------------------------------


def _result(run: Run) -> Any:
    if not run.result:
        return tag("p", "This run has not finished: the same command goes on with it. Below is what there is so far.")
    if run.quantities:
        return _quantities(run)
    scores = dict(run.result.get("val") or {})
    if len(run.labels):
        scores |= metrics.summary(run.probabilities, run.labels, run.classes)
    n = int(scores.get("count", 0))
    ranges = metrics.intervals(run.probabilities, run.labels) if len(run.labels) else {}
    tiles = []
    if "accuracy" in scores and n:
        right = round(scores["accuracy"] * n)
        low, high = metrics.wilson(right, n)
        ends = f"95 % interval {100 * low:.1f} to {100 * high:.1f} %".replace(" %", "\N{NO-BREAK SPACE}%")
        told = f"{right:,} of {n:,} images right; {ends}"
        name = "Validation accuracy, all labels right" if run.several else "Validation accuracy"
        tiles.append(_tile(name, percent(scores["accuracy"]), told, **({} if run.several else {"class_": "main"})))
    test = run.result.get("test") or {}
    if "accuracy" in test:
        told = f"of {test.get('count', 0):,} images"
        if test.get("count"):
            low, high = metrics.wilson(round(test["accuracy"] * test["count"]), test["count"])
            told += f"; 95\N{NO-BREAK SPACE}% interval {100 * low:.1f} to {100 * high:.1f}\N{NO-BREAK SPACE}%"
        if run.several:
            if "average_precision" in test:
                of = f"mean over classes, of {test.get('count', 0):,} images"
                precision = percent(test["average_precision"])
                tiles.insert(0, _tile("Test mean average precision", precision, of, class_="main"))
            tiles.append(_tile("Test accuracy, all labels right", percent(test["accuracy"]), told))
        else:
            tiles.append(_tile("Test accuracy", percent(test["accuracy"]), told, class_="main"))
    if len(run.labels) and not run.several:
        often = np.bincount(run.labels, minlength=len(run.classes))
        answer = f"always answering “{run.classes[int(often.argmax())]}”"
        tiles.append(_tile("Majority baseline", percent(often.max() / n), answer))
    if run.several and len(run.labels) and (some := run.labels.any(axis=0)).any():
        chance = percent(run.labels.mean(axis=0)[some].mean())
        tiles.append(_tile("Chance baseline", chance, "mean average precision of answers at random"))
    if "probe_accuracy" in run.explained:
        told = f"logistic regression on {int(run.explained['probe_count']):,} images' features, pretrained weights"
        name = "Linear probe, all labels right" if run.several else "Linear probe baseline"
        tiles.append(_tile(name, percent(float(run.explained["probe_accuracy"])), told))
    if isinstance((last := run.result.get("last") or {}).get(run.figure), int | float):
        kept = f"; the model kept is that of step {scores['best_step']:,}" if "best_step" in scores else ""
        best = f"after the last step{kept}"
        what = "Last state, mean average precision" if run.several else "Last state"
        tiles.append(_tile(what, percent(last[run.figure]), best))
    shown: Sequence[tuple[str, str, bool, str]] = (
        (
            "average_precision",
            f"{'Validation m' if run.several else 'M'}ean average precision",
            True,
            "mean over classes",
        ),
        ("top5_accuracy", "Top-5 accuracy", True, "the right class among the five likeliest"),
        ("balanced_accuracy", "Balanced accuracy", True, "the mean over classes"),
        ("f1_macro", "F1, macro", False, f"mean over classes{_undefined(run)}"),
        ("f1_micro", "F1, micro", False, "over all labels") if run.several else ("", "", False, ""),
        ("auroc", "AUROC", False, "each class against the rest"),
        ("log_loss", "Log loss", False, "nats; 0 is perfect"),
        ("ece", "Calibration error", True, "expected (ECE), 15 bins; 0 is perfect"),
    )
    for key, name, share, note in shown:
        if key in scores:
            if key in ranges:
                low, high = (100 * v for v in ranges[key]) if share else ranges[key]
                ends = f"{low:.1f} to {high:.1f} %" if share else f"{low:.3f} to {high:.3f}"
                note += f"; 95 % interval {ends}".replace(" %", "\N{NO-BREAK SPACE}%")
            main = {"class_": "main"} if key == "average_precision" and run.several else {}
            tile = _tile(name, percent(scores[key]) if share else f"{scores[key]:.3f}", note, **main)
            tiles.insert(0 if main else len(tiles), tile)
    if total := (run.result.get("seconds") or {}).get("total"):
        tiles.append(_tile("Time", seconds(total), "from the command to the result"))
    how = [
        "The intervals say how far a figure would move with other images of the same kind: Wilson's for accuracies, "
        "else the bootstrap's of 1,000 resamples. Another training seed moves it too; ",
        tag("code", "--seeds 5"),
        " measures that. The model kept is the one that did best on these images, so their figures are a little too "
        "good; those of a test split are not.",
    ]
    return [tag("dl", tiles, class_="tiles"), tag("p", how, class_="small muted after") if ranges else None]


def _undefined(run: Run) -> str:
    """What the mean F1 of several labels does with classes that it has no figure of, where there are any."""
    if not run.several or not len(run.labels) or ((run.probabilities >= 0.5) | run.labels).any(axis=0).all():
        return ""
    return "; one neither labelled nor said counts as 0"


def _quantities(run: Run) -> Any:
    """What a run of quantities reached: R² and errors of each, beside those of always saying the mean."""
    tiles, splits = [], (("test", "Test"), ("val", "Validation"))
    for split, name in splits:
        if (scores := run.result.get(split) or {}) and "r2" in scores:
            told = f"share of the variance explained, of {scores['count']:,} images"
            if split == "val" and len(run.labels) > 1:
                low, high = metrics.bootstrap_mean(credit(run))
                told += f"; 95 % interval {low:.3f} to {high:.3f}"
            if len(run.classes) > 1:
                told += f"; the mean of {len(run.classes)}"
            tiles.append(_tile(f"{name} R²", f"{scores['r2']:.3f}", told, class_="main"))
    if "r2" in (last := run.result.get("last") or {}):
        best = (run.result.get("val") or {}).get("best_step")
        kept = f"; the model kept is that of step {best:,}" if best is not None else ""
        tiles.append(_tile("Last state, R²", f"{float(last['r2']):.3f}", f"after the last step{kept}"))
    if total := (run.result.get("seconds") or {}).get("total"):
        tiles.append(_tile("Time", seconds(total), "from the command to the result"))
    rows = []
    for split, name in splits:
        scores = run.result.get(split) or {}
        for i, quantity in enumerate(run.classes):
            of = (scores.get("each") or {}).get(quantity) or scores
            if "mae" not in of:
                continue
            mean = (run.result.get("train") or {}).get("mean")
            always = (
                number(abs(run.labels[:, i] - mean[i]).mean()) if mean and split == "val" and len(run.labels) else ""
            )
            rows.append((quantity, name.lower(), f"{of['r2']:.3f}", number(of["mae"]), always, number(of["rmse"])))
    columns = (
        "quantity",
        "split",
        "R²",
        "mean absolute error",
        "that of always saying the mean",
        "root mean square error",
    )
    how = (
        "The model kept is the one that did best on the validation images, so their figures are a little too good; "
        "those of a test split are not. The interval says how far R² would move with other images of the same kind."
    )
    return [tag("dl", tiles, class_="tiles"), table(columns, rows, text=(1,), class_="wide"),
            tag("p", how, class_="small muted after")]  # fmt: skip


def number(value: float) -> str:
    """A quantity, to four digits."""
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def credit(run: Run) -> Any:
    """What each validation image adds to the run's figure, which is their mean.

    Of classes whether it is right; of quantities 1 − (y − ŷ)² / the mean of (y − ȳ)², the mean over them.
    """
    if run.quantities:
        squares = np.square(run.probabilities - run.labels)
        spread = np.square(run.labels - run.labels.mean(0)).mean(0)
        return np.where(spread > 0, 1 - squares / np.where(spread > 0, spread, 1), squares == 0).mean(1)
    if run.several:
        return np.all((run.probabilities >= 0.5) == run.labels, axis=1)
    return run.probabilities.argmax(axis=1) == run.labels


def _agreement(run: Run) -> Any:
    """Predicted against true values, a figure for each quantity."""
    if not len(run.labels):
        return None
    shown = run.classes[:FIGURES]
    drawn = [
        figure(name, plots.agreement(f"{name}: predicted against true", run.labels[:, i], run.probabilities[:, i]))
        for i, name in enumerate(shown)
    ]
    told = "A point for each validation image; on the line both agree."
    if len(shown) < len(run.classes):
        told += f" The first {len(shown)} of {len(run.classes)} quantities."
    return [tag("p", told, class_="small muted"), tag("div", drawn, class_="figures")]


def _largest(run: Run) -> Any:
    """The images whose values are furthest off."""
    if not len(run.labels):
        return None
    order = metrics.furthest(run.probabilities, run.labels)[:MISTAKES]
    told = []
    for i in order:
        c = metrics.worst_quantity(run.probabilities[i], run.labels[i], run.labels)
        name = [tag("b", run.classes[c]), " "] if len(run.classes) > 1 else []
        told.append([*name, tag("b", number(run.labels[i, c])), f", predicted {number(run.probabilities[i, c])}"])
    why = "Look for wrong labels, and for what these pictures have in common."
    return [tag("p", why), _pictures(run, order, told)]


def _tile(name: str, value: str, note: str = "", **attributes: Any) -> Markup:
    return tag("div", tag("dt", name), tag("dd", value, tag("small", note) if note else None), **attributes)


def _stages(run: Run) -> Any:
    done = list(run.result.get("stages") or [])
    if not done:
        return None
    key = f"val_{run.figure}"
    numbers = [
        (
            f"{i}. {s.get('name', '')}",
            f"{s.get('steps', 0):,}",
            f"{s['epochs']:.3g}" if s.get("epochs") is not None else "",
            f"{s['lr']:.2g}" if s.get("lr") is not None else "",
            f"{s.get('trainable_params', 0):,}",
            "" if key not in s else percent(float(s[key])) if key != "val_r2" else f"{float(s[key]):.3f}",
            seconds(s.get("seconds", 0)),
        )
        for i, s in enumerate(done, 1)
    ]
    reached = f"validation {metrics.HEADLINES[run.figure]} after it"
    columns = ("stage", "steps", "epochs", "peak rate", "parameters trained", reached, "time")
    names = [str(s.get("name", "")) for s in done]
    numbered = table(columns, numbers, class_="wide")
    try:
        parts, rates = _rates(run)
    except Exception:  # a model or a plan that this version cannot build: the table tells enough
        return numbered
    groups = [
        (f"{i}. {name}", told, f"{rate:.2g}")
        for i, (name, of) in enumerate(zip(names, rates, strict=False), 1)
        for told, rate in _groups(parts, of)
    ]
    each = [tag("summary", "Peak learning rate of each group"), table(("stage", "parts", "rate"), groups, text=(1,))]
    return [_parts(parts, rates, names), numbered, tag("details", each)]


def _groups(parts: Sequence[str], rates: Sequence[float]) -> list[tuple[str, float]]:
    """Neighbouring parts of the same rate, the frozen left out: `stage3/block0 to head` and the rate."""
    runs = [
        (rate, [p for p, _ in members]) for rate, members in groupby(zip(parts, rates, strict=True), lambda m: m[1])
    ]
    return [(of[0] if len(of) == 1 else f"{of[0]} to {of[-1]}", rate) for rate, of in runs if rate]


def _parts(parts: Sequence[str], rates: Sequence[Sequence[float]], names: Sequence[str]) -> Any:
    """A row for each stage, a box for each part of the model; tinted where it trains, by its learning rate."""
    groups = [(key, list(members)) for key, members in groupby(range(len(parts)), lambda i: _group(parts[i]))]
    used = [r for rate in rates for r in rate if r]
    low, high = np.log(min(used)), np.log(max(used))
    cells: list[Markup] = [tag("span")]
    for _, members in groups:
        first, last = parts[members[0]], parts[members[-1]]
        digits = re.sub(r"^\D*", "", last)
        told = (
            first if len(members) == 1 and "/" not in first else _group(first) if "/" in first else f"{first}–{digits}"
        )
        cells.append(tag("span", told, class_="name"))
    for i, (name, rate) in enumerate(zip(names, rates, strict=False), 1):
        cells.append(tag("span", f"{i}. {name}", class_="stage", title=name))
        for _, members in groups:
            boxes = []
            for m in members:
                on = {}
                if rate[m]:
                    tint = 0.3 + 0.7 * (np.log(rate[m]) - low) / (high - low) if high > low else 1.0
                    on = {"class_": "on", "style": f"--share: {tint:.2f}"}
                boxes.append(tag("i", title=parts[m] + (f": rate {rate[m]:.2g}" if rate[m] else ": frozen"), **on))
            trained = [parts[m] for m in members if rate[m]]
            alt = f"{name}: {', '.join(trained)} trained" if trained else f"{name}: frozen"
            cells.append(tag("span", boxes, class_="group", role="img", aria_label=alt))
    columns = " ".join(f"minmax(min-content, {len(members)}fr)" for _, members in groups)
    explain = "Parts of the model from the input (left) to the head: tinted where trained, stronger for a higher rate."
    return [
        tag("p", explain, class_="muted small"),
        tag("div", tag("div", cells, class_="parts", style=f"grid-template-columns: max-content {columns}"),
            class_="scroll", tabindex="0"),
    ]  # fmt: skip


def _group(part: str) -> str:
    """What neighbouring parts are drawn together as: stage4 of stage4/block1, block of block11."""
    return part.split("/")[0] if "/" in part else part.rstrip("0123456789")


def _rates(run: Run) -> tuple[list[str], list[list[float]]]:
    """The model's parts, and for each stage the peak learning rate of each; 0 where it is frozen."""
    from jft.lora import with_lora
    from jft.models import make_model
    from jft.plan import Stage, lora_of, multipliers, part_of

    options = {k: tuple(v) if isinstance(v, list) else v for k, v in run.bundle["options"].items()}
    model = make_model(run.bundle["model"], **options)
    config = run.config["config"]
    if (lora := lora_of(config["plan"], config.get("lora", {}))).rank:
        model = with_lora(model, lora)
    parts, names = list(model.parts), list(model.shapes()[0])
    rates = []
    for told in run.config["stages"]:
        train = tuple(p if isinstance(p, str) else (p[0], p[1]) for p in told["train"])
        stage = Stage(**{**told, "train": train})
        rate = dict.fromkeys(parts, 0.0)
        for name, multiple in multipliers(stage, names, parts).items():
            part = part_of(name, parts)
            rate[part] = max(rate[part], multiple * (stage.lr or 1.0))
        rates.append(list(rate.values()))
    return parts, rates


def _curves(run: Run) -> Any:
    firsts: dict[str, int] = {}
    for row in run.rows:
        if "stage" in row and "step" in row:
            firsts.setdefault(str(row["stage"]), int(row["step"]))
    if run.result.get("stages"):  # where a stage began, not where it first logged
        step = 0
        for stage in run.result["stages"]:
            firsts[str(stage.get("name", ""))] = step
            step += int(stage.get("steps", 0))
    stages = list(firsts.items())
    loss, val_loss = series(run, "loss"), series(run, "val_loss")
    right, val_right = series(run, run.figure), series(run, f"val_{run.figure}")
    name = metrics.HEADLINES[run.figure]
    name = name[0].upper() + name[1:]
    asked = (run.config.get("config") or {}).get("probe")
    probe, probed = f"{name} of a {asked} probe of the features", series(run, f"val_{asked}")
    rate = series(run, "lr")
    drawn = [
        ("Loss", plots.curve("Loss over the steps", loss, val_loss, stages)) if loss or val_loss else None,
        (name, plots.curve(f"{name} over the steps", right, val_right, stages, percent=not run.quantities))
        if right or val_right
        else None,
        (probe, plots.curve(f"{probe} over the steps", [], probed, stages, percent=not run.quantities))
        if probed
        else None,
        ("Learning rate of each group", plots.rates("Learning rate over the steps", _group_rates(run, rate), stages))
        if rate
        else None,
    ]
    figures = [figure(*d) for d in drawn if d]
    if not figures:
        return None
    bad = sum(not np.isfinite(value) for _, value in loss)
    told = f"The training loss was not a finite number in {bad} of {len(loss)} rows of the log." if bad else ""
    last = max((s for s, _ in (*loss, *val_loss, *right, *val_right, *rate)), default=0)
    listed = plots.stage_labels(stages, last) != [name for name, _ in stages]
    key = "Stages: " + ", ".join(f"{i} {name}" for i, (name, _) in enumerate(stages, 1)) + "." if listed else ""
    return [
        tag("div", figures, class_="figures"),
        tag("p", key, class_="muted small") if key and len(stages) > 1 else None,
        tag("p", told, class_="bad") if told else None,
    ]


def _group_rates(run: Run, rate: Sequence[tuple[int, float]]) -> list[list[tuple[int, float]]]:
    """The learning rate over the steps of each group of parts in each stage, the fastest last."""
    try:
        parts, peaks = _rates(run)
    except Exception:  # see `_stages`
        return [list(rate)]
    told = [[p for _, p in _groups(parts, of)] for of in peaks]
    lines = []
    for stage, of in zip(run.config["stages"], told, strict=True):
        steps = {int(r["step"]) for r in run.rows if r.get("stage") == stage["name"] and "lr" in r}
        own = [(s, v) for s, v in rate if s in steps]
        lines += [[(s, v * peak / (stage.get("lr") or 1.0)) for s, v in own] for peak in sorted(set(of)) if own]
    return lines or [list(rate)]


def _distance(run: Run) -> Any:
    """How far each part has come from the pretrained weights, at the last validation."""
    rows = [row["distance"] for row in run.rows if isinstance(row.get("distance"), dict)]
    if not rows or not (last := {part: float(v) for part, v in rows[-1].items()}):
        return None
    most = max((v for v in last.values() if np.isfinite(v)), default=0.0) or 1.0
    cells = [
        (
            part,
            f"{v:.3g}",
            _bar(v / most if np.isfinite(v) else 0.0),
            Markup(
                plots.sparkline(f"Distance of {part} over the validations", [float(r.get(part, 0.0)) for r in rows])
            ),
        )
        for part, v in last.items()
    ]
    told = "‖w − w_s‖ of what has trained, at the last validation and on the way there: what fine-tuning had to change."
    columns = ("part", "distance from the pretrained weights", "", "over the validations")
    return [tag("p", told, class_="muted small"), table(columns, cells)]


def series(run: Run, key: str) -> list[tuple[int, float]]:
    """A figure of the log, by step."""
    return [
        (int(row["step"]), float(row[key]))
        for row in run.rows
        if "step" in row and isinstance(row.get(key), int | float)
    ]


def figure(caption: str, svg: str, **attributes: Any) -> Markup:
    """A drawing with its caption."""
    return tag("figure", tag("figcaption", caption), Markup(svg), **attributes)


def _classes(run: Run) -> Any:
    if not len(run.labels):
        return None
    if run.several:
        return _labels(run)
    counts = metrics.confusion(run.probabilities, run.labels)
    right, support, often = np.diag(counts), counts.sum(1), counts.sum(0)
    parts: list[Any] = [tag("h3", "Confusion")]
    if len(run.classes) <= TABLE_CLASSES:
        explain = "Rows: the true class. Columns: what the model said. Numbers of validation images."
        parts += [tag("p", explain, class_="muted small"), _confusion_table(run, counts)]
    else:
        explain = (
            "Each row is a true class, each column what was said, strong where it happened often: "
            "right answers are blue, on the diagonal, mistakes orange."
        )
        parts += [
            tag("p", explain, class_="muted small"),
            tag("figure", Markup(plots.heatmap(counts, run.classes if len(counts) <= NAMED_CLASSES else ())),
                class_="square"),
        ]  # fmt: skip
    wrong = counts - np.diag(right)
    worst = [divmod(int(i), len(counts)) for i in np.argsort(-wrong, axis=None, kind="stable")[:PAIRS]]
    pairs = [
        (_called(run, true), _called(run, said), f"{wrong[true, said]:,}", percent(wrong[true, said] / support[true]))
        for true, said in worst
        if wrong[true, said]
    ]
    if pairs and len(run.classes) > 2:
        parts += [
            tag("h3", "Most often confused"),
            tag("p", "A number before a class is its place in the figure.", class_="muted small")
            if len(counts) > NAMED_CLASSES
            else None,
            table(("true class", "taken for", "images", "of the class"), pairs, text=(1,)),
        ]
    return [*parts, _per_class(run, right, support, often, wrong)]


def _called(run: Run, c: int) -> str:
    """A class by its name, with its number where a figure has that alone."""
    return f"{c} · {run.classes[c]}" if len(run.classes) > NAMED_CLASSES and not run.several else run.classes[c]


def _labels(run: Run) -> Any:
    """Class by class where an image may have several: what was found, missed and wrongly said, at 0.5."""
    said, true = run.probabilities >= 0.5, run.labels
    right, support, often = (said & true).sum(0), true.sum(0), said.sum(0)
    found = metrics.per_class(right, support, often)
    rows = []
    for c in np.lexsort((np.arange(len(support)), found["f1"])):
        area = metrics.average_precision(run.probabilities[:, c : c + 1], true[:, c : c + 1])
        rows.append(
            (
                run.classes[c],
                f"{right[c]:,}",
                f"{support[c] - right[c]:,}",
                f"{often[c] - right[c]:,}",
                percent(found["precision"][c]) if often[c] else "–",
                percent(found["recall"][c]) if support[c] else "–",
                _bar(found["recall"][c]),
                f"{found['f1'][c]:.3f}" if support[c] or often[c] else "–",
                "–" if area is None else percent(area),
            )
        )
    caption = "The worst F1 first. A label is said where its probability is at least 0.5; average precision needs none."
    columns = ("class", "found", "missed", "wrongly said", "precision", "recall", "", "F1", "average precision")
    return [tag("h3", "Class by class"), *_long_table(columns, rows, caption)]


def _long_table(columns: Sequence[str], rows: Sequence[Any], caption: str, text: Sequence[int] = ()) -> list[Any]:
    """A table whose rows after the twentieth are folded away."""
    first, rest = rows[:20], rows[20:]
    more = None
    if rest:
        told = tag("summary", f"The other {len(rest)} classes")
        more = tag("details", told, table(columns, rest, "", text, class_="wide"))
    return [table(columns, first, caption, text, class_="wide"), more]


def _confusion_table(run: Run, counts: np.ndarray) -> Markup:
    def head(name: str, scope: str) -> Markup:
        told = plots.short(name, 24)
        return tag("th", told, scope=scope, **({"title": name} if told != name else {}))

    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    rows = []
    for i, name in enumerate(run.classes):
        cells = [
            tag("td", f"{counts[i, j]:,}", class_="right" if i == j else "wrong",
                style=f"--share: {0.45 * share[i, j] + (0.06 if counts[i, j] else 0):.3f}", title=percent(share[i, j]))
            for j in range(len(counts))
        ]  # fmt: skip
        rows.append(tag("tr", head(name, "row"), cells))
    return tag(
        "div",
        tag(
            "table",
            tag("thead", tag("tr", tag("td"), [head(name, "col") for name in run.classes])),
            tag("tbody", rows),
            class_="confusion", aria_label="Confusion matrix",
        ),
        class_="scroll", tabindex="0",
    )  # fmt: skip


def _per_class(run: Run, right: np.ndarray, support: np.ndarray, often: np.ndarray, wrong: np.ndarray) -> Any:
    found = metrics.per_class(right, support, often)
    columns = ("class", "images", "precision", "recall", "", "F1", "mostly taken for")
    rows = []
    for c in np.lexsort((np.arange(len(support)), found["f1"])):  # the worst first
        there = support[c] > 0
        rows.append(
            (
                _called(run, int(c)),
                f"{support[c]:,}",
                percent(found["precision"][c]) if often[c] else "–",
                percent(found["recall"][c]) if there else "–",
                _bar(found["recall"][c]),
                f"{found['f1'][c]:.3f}" if there or often[c] else "–",
                run.classes[wrong[c].argmax()] if wrong[c].any() else "",
            )
        )
    caption = (
        "The worst F1 first. Precision: of the images said to be of the class, those that are. "
        "Recall: of its images, those found."
    )
    return [tag("h3", "Class by class"), *_long_table(columns, rows, caption, (6,))]


def _calibration(run: Run) -> Any:
    if not len(run.labels):
        return None
    p, labels = metrics.pairs(run.probabilities, run.labels) if run.several else (run.probabilities, run.labels)
    count, confidence, right = metrics.calibration(p, labels)
    error = metrics.ece(p, labels)
    sure, correct = p.max(axis=1), p.argmax(axis=1) == labels
    gap = sure.mean() - correct.mean()
    lean = "over-confident" if gap > 0 else "under-confident"
    told = (
        f"When the model says 90 %, is it right nine times in ten? On average confidence and accuracy lie "
        f"{percent(error)} apart (expected calibration error); the mean confidence is {percent(sure.mean())}, the "
        f"accuracy {percent(correct.mean())}"
        + (", every label of every image counted as an answer, yes or no" if run.several else "")
        + (f": the model is {lean}." if abs(gap) > 0.01 else ".")
    )
    return [
        tag("p", told),
        tag("p", _temperature(run)) if run.bundle.get("temperature") else None,
        tag(
            "div",
            figure("Reliability: accuracy by confidence", plots.reliability(count, confidence, right)),
            figure(
                "How sure the model is",
                plots.confidences(sure[correct], sure[~correct], "labels" if run.several else "images"),
            ),
            class_="figures",
        ),
    ]


def _temperature(run: Run) -> Any:
    """What dividing the logits by the temperature of least log loss does."""
    temperature = float(run.bundle["temperature"])
    then = metrics.tempered(run.probabilities, temperature, run.several)
    before, after = (metrics.summary(q, run.labels, run.classes) for q in (run.probabilities, then))
    told = (
        f"The temperature of least log loss here is {temperature:.3g}: logits divided by it bring the calibration "
        f"error from {percent(before['ece'])} to {percent(after['ece'])} "
        f"and the log loss from {before['log_loss']:.3f} to {after['log_loss']:.3f}, on the images that it was fitted "
        "to. "
    )
    return [told, tag("code", "jft predict --temperature fitted"),
            " applies it; no answer changes by it, only how sure it sounds."]  # fmt: skip


def _told(run: Run, i: int) -> list[Any]:
    """What is wrong with the answer for an image: `ants taken for bees, 97 %`."""
    p = run.probabilities[i]
    if run.several:
        worst = int(abs(p - run.labels[i]).argmax())
        how = "missed" if run.labels[i, worst] else "said, not labelled"
        return [tag("b", run.classes[worst]), f" {how}, {percent(p[worst])}"]
    label, said = run.classes[run.labels[i]], run.classes[int(p.argmax())]
    return [tag("b", label), " taken for ", tag("b", said), f", {percent(p.max())}"]


def _mistakes(run: Run) -> Any:
    if not len(run.labels):
        return None
    p, parts = run.probabilities, []
    wrong = metrics.mistakes(p, run.labels).tolist()
    if order := wrong[:MISTAKES]:
        shown = "all of them" if len(order) == len(wrong) else f"the {len(order)} most confident"
        images = "image" if len(wrong) == 1 else "images"
        look = "Look for wrong labels, and for what the classes have in common."
        why = f"{len(wrong):,} {images} wrong; {shown}, the surest first. {look}"
        parts += [
            tag("h3", "Most confident mistakes"),
            tag("p", why),
            _pictures(run, order, [_told(run, i) for i in order]),
        ]
    else:
        parts.append(tag("p", "None: every validation image is right."))
    if p.shape[1] > 1 or run.several:
        unsure = metrics.uncertain(p, run.several)[:UNSURE].tolist()
        told = [_unsure(run, i) for i in unsure]
        what = "A label of these is near 50 %" if run.several else "The two likeliest classes are nearly equal here"
        parts += [tag("h3", "Most uncertain"), tag("p", f"{what}: label more pictures like these."),
                  _pictures(run, unsure, told)]  # fmt: skip
    if not run.explained:
        more = (
            " adds where the model looked (Grad-CAM), the nearest training images and a linear probe to compare with."
        )
        parts.append(tag("p", tag("code", f"jft report {run.folder.name} --explain"), more, class_="small muted after"))
    return parts


def _unsure(run: Run, i: int) -> list[Any]:
    p = run.probabilities[i]
    if run.several:
        c = int(abs(p - 0.5).argmin())
        truth = "It is there." if run.labels[i, c] else "It is not there."
        return [tag("b", run.classes[c]), f" {percent(p[c])}? ", truth]
    a, b = np.argsort(-p, kind="stable")[:2].tolist()
    truth = "Right." if a == run.labels[i] else f"It is {run.classes[run.labels[i]]}."
    one, other = (
        [tag("b", run.classes[a]), f" {percent(p[a])} or "],
        [tag("b", run.classes[b]), f" {percent(p[b])}? "],
    )
    return [*one, *other, truth]


def _suspects(run: Run) -> Any:
    """Labels that are probably wrong: of validation images, and where the model was asked again, of training ones."""
    if not len(run.labels) or run.probabilities.shape[1] < 2:
        return None
    found = metrics.suspects(run.probabilities, run.labels).tolist()
    how = (
        "Images whose label may be wrong, by confident learning (Northcutt et al. 2021): the model gives another class "
        "at least the probability that images of that class usually get. The surest first. Look before you change a "
        "label: some of these images are only hard."
    )
    parts: list[Any] = [tag("p", how, class_="small muted"), tag("h3", f"Validation images: {_count(len(found))}")]
    if shown := found[:SUSPECTS]:
        parts.append(_pictures(run, shown, [_told(run, i) if run.several else _labelled(run, i) for i in shown]))
    if "suspect_names" not in run.explained:
        return parts
    names = [str(n) for n in run.explained["suspect_names"]]
    said = [
        ["labelled ", tag("b", run.classes[a]), ", looks like ", tag("b", run.classes[b]), f", {percent(q)}"]
        if a >= 0
        else [tag("b", run.classes[b]), f" {percent(q)}"]
        for a, b, q in zip(*(run.explained[f"suspect_{k}"].tolist() for k in ("label", "said", "probability")),
                           strict=True)
    ]  # fmt: skip
    told = (
        f"Of {int(run.explained['probe_count']):,} training images, by linear probes on the pretrained features, "
        "each image judged by probes fitted without it."
    )
    count = int(run.explained["suspect_count"])
    parts += [tag("h3", f"Training images: {_count(count)}"), tag("p", told, class_="small muted")]
    pixels = run.explained["suspect_pixels"]
    parts.append(_pictures(run, names, said, pixels) if names else None)
    return parts


def _count(n: int) -> str:
    return f"{n:,}" if n else "none"


def _labelled(run: Run, i: int) -> list[Any]:
    p, label = run.probabilities[i], run.labels[i]
    said = int(np.where(np.arange(len(p)) == label, -1, p).argmax())
    given = f" ({percent(p[label])}), looks like "
    return ["labelled ", tag("b", run.classes[label]), given, tag("b", run.classes[said]), f" ({percent(p[said])})"]


def _reasons(run: Run) -> Any:
    """For a few mistakes: what of the picture spoke for the answer, and the training images that it resembles."""
    held = run.explained
    if "shown" not in held or not len(held["shown"]):
        return None
    rows = []
    for row, name in enumerate(map(str, held["shown"])):
        if name not in run.names:
            continue
        i = run.names.index(name)
        pixels = held["pixels"][row]
        cells = [_cell(_drawn(pixels), f"Validation image {name}", _told(run, i))]
        for place, c in enumerate(held["classes"][row].tolist()):
            title = ["speaks for ", tag("b", run.classes[c])]
            picture = _drawn(plots.heat(pixels, held["maps"][row, place]))
            cells.append(_cell(picture, f"What of {name} speaks for {run.classes[c]}", title))
        nearest = (held[key][row] for key in ("neighbours", "neighbour_labels", "similarity", "neighbour_pixels"))
        for near, label, like, pixels in zip(*nearest, strict=True):
            cells.append(_cell(_drawn(pixels), f"Training image {near}", [tag("b", str(label)), f", {like:.2f}"]))
        rows.append(tag("li", cells))
    which = "the two labels that are most wrong" if run.several else "the class said and for the true one"
    told = (
        "Each row: the image as the model saw it; where Grad-CAM (Selvaraju et al. 2017) finds what speaks for "
        f"{which}, orange where it is strong; then the training images whose features lie "
        "nearest, with their labels and cosine similarities. Neighbours of the wrong class: the classes look alike "
        "there, or the neighbours' labels are wrong."
    )
    return [tag("p", told), tag("ul", rows, class_="reasons")]


def _cell(picture: tuple[str, bool], alt: str, told: Any) -> Markup:
    source, small = picture
    style = {"class_": "small"} if small else {}
    return tag("figure", tag("img", src=source, alt=alt, loading="lazy", **style), tag("figcaption", told))


def _pictures(
    run: Run, which: Sequence[int] | Sequence[str], told: Sequence[Any], pixels: Iterable[np.ndarray] | None = None
) -> Markup:
    """Pictures with what is told of each; a table where there is not one picture to be found.

    `which` are places among the validation images, or names of training images, whose pictures are `pixels`.
    """
    names = [w if isinstance(w, str) else run.names[w] for w in which]
    kind = "Validation" if pixels is None else "Training"
    sources = [_thumbnail(run, name) for name in names] if pixels is None else [_drawn(p) for p in pixels]
    if not any(sources):
        return table(("image", "what the model said of it"), list(zip(names, told, strict=True)), text=(1,))
    items = []
    for name, text, found in zip(names, told, sources, strict=True):
        picture: Markup = tag("span", "no picture", class_="none")
        if found:
            source, small = found
            style = {"class_": "small"} if small else {}
            picture = tag("img", src=source, alt=f"{kind} image {name}", loading="lazy", **style)
        items.append(tag("li", picture, tag("p", text, tag("span", name, class_="path"))))
    return tag("ul", items, class_="pictures")


def _thumbnail(run: Run, name: str) -> tuple[str, bool] | None:
    """A picture as a data URL, and whether it has few pixels; None where it is not to be found or not to be read."""

    from jft.data.decode import quiet, to_rgb

    try:
        content = run.read(name)
        if content is None:
            return None
        with quiet():
            image = to_rgb(content)
    except (OSError, ValueError, UserError):  # a DecodeError is a ValueError
        return None
    return _url(image)


def _drawn(pixels: np.ndarray) -> tuple[str, bool]:
    """As `_thumbnail`, of a picture at hand."""
    from PIL import Image

    return _url(Image.fromarray(pixels))


def _url(image: Any) -> tuple[str, bool]:
    from PIL import Image

    small = max(image.size) <= 64
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    if small:
        image.save(file, "PNG")
    else:
        image.save(file, "JPEG", quality=72, optimize=True)
    return f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(file.getvalue()).decode()}", small


def _reader(data: str, images: Dataset | None) -> Read:
    """How to come by a picture of the run's data: from the data set, if given, else from the files it named."""
    place = {name: i for i, name in enumerate(images.names)} if images is not None else {}
    given = Path(data).expanduser()
    folder = given if given.is_dir() else given.parent if given.is_file() else None

    def read(name: str) -> bytes | np.ndarray | None:
        if images is not None and name in place:
            return images.read(place[name])
        if folder is None or Path(name).is_absolute() or ".." in Path(name).parts:
            return None
        return (folder / name).read_bytes() if (folder / name).is_file() else None

    return read


def _data(run: Run) -> Any:
    parts: list[Any] = []
    rows = []
    for key, name in (("train", "training"), ("val", "validation"), ("test", "test")):
        split = run.result.get(key) or {}
        if "count" in split:
            rows.append((name, f"{split['count']:,}"))
    source = run.result.get("data") or _settings(run).get("data")
    if source:
        parts.append(tag("p", "From ", tag("b", source), "."))
    if rows:
        parts.append(table(("split", "images"), rows))
    if run.quantities and (trained := run.result.get("train") or {}).get("mean"):
        kinds = ("mean", "std", "min", "max")
        of_each = [(c, *(number(trained[k][i]) for k in kinds)) for i, c in enumerate(run.classes)]
        names = ("quantity", "mean", "standard deviation", "least", "largest")
        parts.append(table(names, of_each, "Of the training images."))
    elif len(run.labels):
        support = run.labels.sum(0) if run.several else np.bincount(run.labels, minlength=len(run.classes))
        few, most = int(support.min()), int(support.max())
        count = f"{few:,} to {most:,} images" if few < most else "1 image" if few == 1 else f"{few:,} images"
        told = f"The validation set has {count} a class."
        if few < 20:
            told += " A class of fewer than 20 says little about itself: one image is 5 points or more."
        parts.append(tag("p", told, class_="small muted after"))
        trained = (run.result.get("train") or {}).get("per_class")
        if trained and len(trained) == len(run.classes):
            counts = zip(run.classes, trained, support.tolist(), strict=True)
            cells = [(c, f"{a:,}", _bar(a / max(*trained, 1)), f"{b:,}") for c, a, b in counts]
            each = table(("class", "training images", "", "validation images"), cells)
            parts.append(tag("details", tag("summary", "Images of each class"), each))
    out = [(str(e.get("path", "")), str(e.get("reason", ""))) for e in run.result.get("excluded") or []]
    if out:
        more = f" The first {EXCLUDED} are shown." if len(out) > EXCLUDED else ""
        parts += [
            tag("h3", f"Left out: {len(out):,}"),
            tag("p", f"These could not be used, for training or for validation.{more}"),
            table(("file", "reason"), out[:EXCLUDED], text=(1,)),
        ]
    elif run.result:
        parts.append(tag("p", "No image was left out.", class_="after"))
    return parts


def _time(run: Run) -> Any:
    spent = dict(run.result.get("seconds") or {})
    total = spent.pop("total", 0.0)
    if not total:
        return None
    names = {
        "import": "reading weights",
        "compile": "compiling",
        "data": "reading and decoding images",
        "features": "frozen parts, once per image",
        "train": "training",
        "eval": "validation",
        "save": "saving",
    }
    peaks = run.result.get("memory") or {}
    kinds = {"process": "memory of the process", "device_peak": "memory of the device"}
    kinds = {k: told for k, told in kinds.items() if any(k in of for of in peaks.values())}
    rows = []
    for phase, value in [*spent.items(), ("everything else", max(total - sum(spent.values()), 0.0))]:
        memory = [_bytes(peaks.get(phase, {}).get(kind)) for kind in kinds]
        share = min(value / total, 1)
        rows.append((names.get(phase, phase), seconds(value), percent(value / total), _bar(share), *memory))
    most = [_bytes(max(of.get(kind, 0) for of in peaks.values())) for kind in kinds]
    caption = (
        "Memory: the most that was in use when the phase ended; of a device, its peak until then." if kinds else ""
    )
    columns = ("phase", "time", "share", "", *kinds.values())
    return table(columns, [*rows, ("all", seconds(total), "", "", *most)], caption, class_="wide")


def _bytes(count: int | None) -> str:
    if not count:
        return ""
    return (f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB").replace(" ", "\N{NO-BREAK SPACE}")


def _repeat(run: Run) -> Any:
    parts: list[Any] = []
    if settings := _settings(run):
        command, left = _command(settings)
        parts.append(tag("pre", command))
        if left:
            told = (
                f" is a Python file whose config() sets {', '.join(left)}: no command line can. See config.json below."
            )
            parts.append(tag("p", tag("code", CONFIG), told, class_="small"))
    facts = [
        ("data", run.result.get("data")),
        ("seed", run.result.get("seed")),
        ("weights", run.config.get("weights")),
        ("sha256 of the weights", run.config.get("weights_sha256") or run.result.get("weights_sha256")),
        ("sha256 of names, labels and classes", run.config.get("data_sha256")),
        ("device", run.result.get("device")),
        *_versions(run).items(),
    ]
    parts.append(table(("what", "which"), [(k, v) for k, v in facts if v is not None and v != ""], text=(1,)))
    whole = json.dumps(run.config, indent=1, ensure_ascii=False)
    return [*parts, tag("details", tag("summary", "config.json"), tag("pre", whole))]


def _command(settings: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The command line of a config, and the fields that no command line can hold."""
    from jft.config import Config, describe, flag

    usual = describe(Config())
    nested = {f.name for f in fields(Config) if "fields" in f.metadata}
    words, left = [], []
    for name, value in settings.items():
        if value == usual.get(name):
            continue
        inner = {f"{name}.{key}": v for key, v in value.items()} if name in nested else {name: value}
        if all(_in_words(name, v) for v in inner.values()):
            words += [f"{flag(option)} {shlex.quote(word(v))}" for option, v in inner.items()]
        else:
            left.append(name)
    return " \\\n  ".join([f"jft finetune {CONFIG}" if left else "jft finetune", *words]), left


def _in_words(name: str, value: Any) -> bool:
    """Whether a command line can say what `describe` made of a field's value."""
    if isinstance(value, list):
        return all(not isinstance(v, list) and _in_words(name, v) for v in value)
    if not isinstance(value, str):
        return not isinstance(value, dict)
    if name in CALLED and _FUNCTION.fullmatch(value):
        return "<" not in value and not value.startswith("__main__:")
    return name not in CALLED or " sha256:" not in value


def word(value: Any) -> str:
    """A value as the command line takes it: `none`, `3`, `crop,flip`."""
    if value is None or value == []:
        return "none"
    if isinstance(value, list):
        return ",".join(map(str, value))
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).lower() if isinstance(value, bool) else str(value)
