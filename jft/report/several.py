"""The page that compares runs: what each reached, what they did differently, and how they went."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from jft import __version__, metrics, table
from jft.errors import UserError
from jft.report import html, plots
from jft.report.html import Markup, Run, tag

DRAWN = 6  # runs whose curves are drawn: more nobody can tell apart
CLASSES = 15  # those that the runs differ in most
# Student's t at 97.5 % for 1 to 9 degrees of freedom: the 95 % interval of a mean over 2 to 10 runs.
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)

Group = tuple[str, list[Run]]


def make_comparison(folders: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Write a page that compares runs, by default `comparison.html` beside the first, and return its path.

    Runs in folders `NAME/seed0`, `NAME/seed1`, … are one row, with mean and spread. Raises UserError where a folder is
    no finished run's.
    """
    paths = list(dict.fromkeys(p for folder in folders for p in _runs(Path(folder))))
    groups = _grouped([html.read_run(p) for p in paths])
    for run in (r for _, runs in groups for r in runs):
        if run.figure not in (run.result.get("val") or {}):
            raise UserError(f"{run.folder} holds a run that is not finished, so there is nothing to compare yet.")
    if len({r.quantities for _, runs in groups for r in runs}) > 1:
        raise UserError("Some of these runs predict numbers and others classes: there is nothing to compare.")
    target = Path(out) if out else Path(folders[0]).resolve().parent / "comparison.html"
    count = sum(len(runs) for _, runs in groups)
    data = sorted({html.data_name(r) for _, runs in groups for r in runs})
    sections = [
        ("Result", _result(groups, target)),
        ("What they did differently", _settings(groups)),
        ("Curves", _curves(groups)),
        ("Where they differ", _classes(groups)),
        ("Time", _time(groups)),
    ]
    told = " · ".join(f"{name} ({len(runs)} seeds)" if len(runs) > 1 else name for name, runs in groups[:8])
    text = html.page(f"{count} runs on {', '.join(data)}", told, sections, f"Made by jft {__version__}.")
    with table.beside(target) as part:
        part.write_text(text, "utf-8", "replace")
    return target


def is_comparison(folder: str | Path) -> bool:
    """Whether a folder holds the runs of a comparison, `NAME/seedN`, and is no run itself."""
    return not (Path(folder) / "config.json").is_file() and any(Path(folder).glob("*/seed*/config.json"))


def place(name: str) -> str:
    """A config's folder within the comparison's."""
    return (name or "runs").replace(" ", "-").replace("/", "-")


def _runs(folder: Path) -> list[Path]:
    """A run's folder itself, or the runs of a comparison's folder, in its order."""
    if (folder / "config.json").is_file():
        return [folder]
    rows = html.read_json(folder / "result.json").get("rows") or []
    order = {place(str(r["name"])): i for i, r in enumerate(rows)}
    runs = [p.parent for p in folder.glob("*/seed*/config.json")]
    found = sorted(runs, key=lambda p: (order.get(p.parent.name, len(order)), p))
    if not found:
        raise UserError(f"{folder} is no run's folder, nor one of a comparison: it has no config.json.")
    return found


def _grouped(runs: Sequence[Run]) -> list[Group]:
    """Runs that differ in their seed alone together, each group by the shortest name that tells it from the others."""
    by: dict[Path, list[Run]] = {}
    for run in runs:
        seeded = re.fullmatch(r"seed-?\d+", run.folder.name)
        by.setdefault(run.folder.resolve().parent if seeded else run.folder.resolve(), []).append(run)
    depth = 1
    while len({p.parts[-depth:] for p in by}) < len(by):
        depth += 1
    return [("/".join(p.parts[-depth:]), of) for p, of in by.items()]


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the mean of a few values, by Student's t."""
    n = len(values)
    half = (T[n - 2] if n <= len(T) + 1 else 1.96) * float(np.std(values, ddof=1)) / math.sqrt(n)
    return float(np.mean(values)) - half, float(np.mean(values)) + half


def _reached(runs: Sequence[Run], split: str) -> tuple[float, tuple[float, float]] | None:
    """Accuracy, mAP or R² on a split with its interval: of the mean over seeds, or of one run; None without it.

    Of one run's accuracy by Wilson's interval, of the others by the bootstrap, where its predictions are at hand.
    """
    scores = [r.result.get(split) or {} for r in runs]
    values = [s[runs[0].figure] for s in scores if runs[0].figure in s]
    if len(values) < len(runs):
        return None
    if len(values) > 1:
        return float(np.mean(values)), mean_interval(values)
    if runs[0].figure == "accuracy":
        n = scores[0]["count"]
        return values[0], metrics.wilson(round(values[0] * n), n)
    if split != "val" or not len(runs[0].labels):
        return values[0], (values[0], values[0])
    if runs[0].quantities:
        return values[0], metrics.bootstrap_mean(html.credit(runs[0]))
    found = metrics.intervals(runs[0].probabilities, runs[0].labels)
    return values[0], found.get("average_precision", (values[0], values[0]))


def _result(groups: Sequence[Group], target: Path) -> Any:
    splits = [s for s in ("test", "val") if all(_reached(runs, s) for _, runs in groups)]
    rows, points = [], []
    first = groups[0]
    quantities, figure = first[1][0].quantities, first[1][0].figure
    name_of = metrics.HEADLINES[figure]
    names = {"test": f"test {name_of}", "val": f"validation {name_of}"}
    shown = {"log_loss": "log loss", "ece": "calibration error"}
    if quantities:
        shown = {"mae": "mean absolute error", "rmse": "root mean square error"}
    # Of several quantities each has its own.
    shown = {k: v for k, v in shown.items() if any(k in r.result["val"] for _, runs in groups for r in runs)}
    compared = len(groups) > 1
    for name, runs in groups:
        cells = []
        for split in splits:
            found = _reached(runs, split)
            assert found is not None
            mean, (low, high) = found
            low, high = low if quantities else max(low, 0.0), min(high, 1.0)
            if quantities:
                cells += [f"{mean:.3f}", f"{low:.3f} to {high:.3f}"]
            else:
                cells += [html.percent(mean), f"{100 * low:.1f} to {100 * high:.1f}"]
            if split == splits[0]:
                points.append((name, mean, low, high))
        if compared:
            cells.append("" if runs is first[1] else _paired(first[1], runs))
        for key in shown:
            values = [r.result["val"][key] for r in runs if key in r.result["val"]]
            cells.append((html.number(np.mean(values)) if quantities else f"{np.mean(values):.3f}") if values else "")
        cells.append(
            f"{max((s.get('trainable_params', 0) for r in runs for s in r.result.get('stages', [])), default=0):,}"
        )
        cells.append("from scratch" if not runs[0].result.get("weights") else Path(str(runs[0].result["weights"])).name)
        rows.append((_links(name, runs, target), len(runs), *cells))
    columns = ["run", "seeds"]
    for split in splits:
        columns += [names[split], "95 % interval"]
    gap = ["difference to the first"] if compared else []
    columns += [*gap, *shown.values(), "trained at most", "weights"]
    one = "Wilson's" if figure == "accuracy" else "the bootstrap's"
    right = "accuracy (all labels right)" if first[1][0].several else "accuracy"
    how = (
        "Several seeds: their mean, with the interval of the mean over seeds (Student's t), which says what another "
        f"training would reach. One run: {one} interval, which says what other images would give; where these "
        "overlap, train more seeds before you choose."
    )
    if compared:
        how += (
            f" Difference to the first: of the validation {name_of if quantities else f'{right}, in points,'} on the "
            "same images, with the interval of 1,000 resamples of them; one that holds 0 shows no difference yet."
        )
    title = names[splits[0]][0].upper() + names[splits[0]][1:]
    drawn = plots.ranges(f"{title} with intervals", points, percent=not quantities)
    return [
        html.figure(title, drawn, class_="square"),
        html.table(columns, rows, class_="wide"),
        tag("p", how, class_="small muted after"),
    ]


def _links(name: str, runs: Sequence[Run], target: Path) -> list[Any]:
    """The name, leading to the run's own report; of several seeds the name and a link for each."""
    if len(runs) == 1:
        return [_link(name, runs[0], target)]
    seeds = [[" ", _link(r.folder.name, r, target)] for r in runs]
    return [tag("span", name), tag("span", seeds, class_="path")]


def _link(name: str, run: Run, target: Path) -> Markup:
    """A name, leading to the run's own report where there is one, from where the page lies."""
    report = run.folder.resolve() / "report.html"
    if not report.is_file():
        return tag("span", name)
    try:
        there = report.relative_to(target.resolve().parent).as_posix()
    except ValueError:
        return tag("span", name)
    return tag("a", name, href=quote(there))


def _paired(first: Sequence[Run], other: Sequence[Run]) -> str:
    """The difference to the first in points, with its interval over the images, where both were asked the same."""
    how, times = ("+.3f", 1) if first[0].quantities else ("+.1f", 100)
    known = [(r.names, r.labels) for r in (*first, *other)]
    if not len(known[0][0]) or any(n != known[0][0] or not np.array_equal(v, known[0][1]) for n, v in known):
        return "other images"
    gap = np.mean([html.credit(r) for r in other], axis=0) - np.mean([html.credit(r) for r in first], axis=0)
    low, high = metrics.bootstrap_mean(gap)
    return f"{times * gap.mean():{how}} ({times * low:{how}} to {times * high:{how}})"


def _settings(groups: Sequence[Group]) -> Any:
    """The fields of the configurations that are not the same in all."""
    from jft.config import PLACE

    flat = [_flat(runs[0].config.get("config") or {}) for _, runs in groups]
    ours = {*PLACE, *(["seed"] if any(len(runs) > 1 for _, runs in groups) else [])}
    keys = [k for k in dict.fromkeys(k for f in flat for k in f) if k.split(".")[0] not in ours]
    # A stage that others do not have says nothing by its defaults.
    keys = [k for k in keys if len(told := {f.get(k, "") for f in flat}) > 1 and told - {"", "default"}]
    if not keys:
        return tag("p", "Nothing: the configurations are the same.")
    rows = [(k, *(f.get(k, "") for f in flat)) for k in keys]
    columns = ("field", *(name for name, _ in groups))
    return html.table(columns, rows, text=range(1, len(columns)), class_="wide")


def _flat(value: Any, prefix: str = "") -> dict[str, str]:
    """A configuration as `preprocess.crop_pct` → its value as text."""
    if isinstance(value, Mapping) and value:
        return {k: v for key, inner in value.items() for k, v in _flat(inner, f"{prefix}{key}.").items()}
    if isinstance(value, list) and value and all(isinstance(v, Mapping) for v in value):  # stages
        return {k: v for i, inner in enumerate(value, 1) for k, v in _flat(inner, f"{prefix}{i}.").items()}
    return {prefix.rstrip("."): "default" if value is None else html.word(value)}


def _curves(groups: Sequence[Group]) -> Any:
    shown = groups[:DRAWN]
    figures = []
    figure = groups[0][1][0].figure
    for key, caption, percent in (
        (f"val_{figure}", f"Validation {metrics.HEADLINES[figure]}", figure != "r2"),
        ("val_loss", "Validation loss", False),
    ):
        lines = [html.series(runs[0], key) for _, runs in shown]
        if any(lines):
            figures.append(html.figure(caption, plots.lines(f"{caption} over the steps", lines, percent=percent)))
    if not figures:
        return None
    legend = [tag("li", tag("i", class_=f"swatch c{i}", aria_hidden="true"), name) for i, (name, _) in enumerate(shown)]
    more = f"The first {DRAWN} are drawn. " if len(groups) > DRAWN else ""
    seeds = "Of several seeds, the first." if any(len(runs) > 1 for _, runs in shown) else ""
    return [
        tag("div", figures, class_="figures"),
        tag("ul", legend, class_="key"),
        tag("p", more + seeds, class_="small muted"),
    ]


def _classes(groups: Sequence[Group]) -> Any:
    """Recall of the classes in which the runs differ most, where they have the same classes."""
    runs = [r for _, of in groups for r in of]
    if (
        len(groups) < 2
        or runs[0].quantities
        or any(list(r.classes) != list(runs[0].classes) or not len(r.labels) for r in runs)
    ):
        return None
    recall = np.stack([np.mean([_recall(r) for r in of], axis=0) for _, of in groups])
    spread = np.nan_to_num(recall.max(axis=0) - recall.min(axis=0), nan=-1.0)
    order = [c for c in np.argsort(-spread, kind="stable")[:CLASSES] if spread[c] > 0]
    if not order:
        return None
    rows = [(runs[0].classes[c], *(html.percent(v) for v in recall[:, c])) for c in order]
    told = "Recall, the share of a class's validation images that are found: the classes in which the runs differ most."
    return [tag("p", told, class_="small muted"), html.table(("class", *(n for n, _ in groups)), rows)]


def _recall(run: Run) -> np.ndarray:
    if run.several:
        right, support = ((run.probabilities >= 0.5) & run.labels).sum(axis=0), run.labels.sum(axis=0)
    else:
        counts = metrics.confusion(run.probabilities, run.labels)
        right, support = np.diag(counts), counts.sum(axis=1)
    return np.where(support > 0, right / np.maximum(support, 1), np.nan)


def _time(groups: Sequence[Group]) -> Any:
    phases = list(dict.fromkeys(k for _, runs in groups for r in runs for k in r.result.get("seconds") or {}))
    if not phases:
        return None
    rows = [
        (
            name,
            *(
                html.seconds(float(np.mean([(r.result.get("seconds") or {}).get(p, 0.0) for r in runs])))
                for p in phases
            ),
        )
        for name, runs in groups
    ]
    told = "Of several seeds, the mean." if any(len(runs) > 1 for _, runs in groups) else ""
    return html.table(("run", *phases), rows, told, class_="wide")
