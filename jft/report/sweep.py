"""The page of a sweep: its trials as a table, and what each field did, as figures."""

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jft import __version__, metrics
from jft.report import html, plots
from jft.report.html import Markup, tag

Row = Mapping[str, Any]
LOSS_NAMES = {"loss": "loss", "log_loss": "log loss"}  # that trials may be chosen by


def page(
    data: str,
    rows: Sequence[Row],
    best: Row,
    names: Sequence[str],
    ranges: Collection[str],
    logarithmic: Collection[str],
    by: str = "",
) -> str:
    """One HTML file that needs nothing beside it, from the rows of a sweep's `result.json`.

    `names` are the fields searched; those in `ranges` are numbers on an axis, in `logarithmic` on a logarithmic one.
    `by` is the loss that the best was chosen by, empty where its accuracy or R² was what it was chosen by.
    """
    title = f"{len(rows)} trials on {Path(data.rstrip('/')).name or data}"
    chosen = ", ".join(f"{n} {v}" for n, v in best["values"].items())
    figure = metrics.headline(best)
    name = metrics.HEADLINES[figure]
    value = metrics.told(figure, best[figure])
    reached = f"{LOSS_NAMES[by]} {loss_told(best[by])}, {name} {value}," if by else f"{name} {value}"
    told = f"The best is trial {best['number']}: validation {reached} with {chosen}."
    more = (
        f"Its {name} on the test set, which no trial was chosen by, is {metrics.told(figure, best[f'test_{figure}'])}."
        if f"test_{figure}" in best
        else f"It was chosen by this {LOSS_NAMES[by] if by else name}, which therefore flatters it; the data have no "
        "test split to tell by."
    )
    sections = [
        ("Result", [tag("p", told), tag("p", more, class_="muted")]),
        ("What each field did", tag("div", _figures(rows, by or figure, names, ranges, logarithmic), class_="figures")),
        ("Trials", _table(rows, figure, names, by)),
    ]
    return html.page(title, "", sections, f"Made by jft {__version__}.")


def loss_told(loss: Any) -> str:
    """A loss as a table has it; one that is no number is its name."""
    return loss if isinstance(loss, str) else f"{loss:.4f}"


def standing(row: Row, key: str) -> tuple[bool, float]:
    """Where a trial stands among the others, the best first: by a loss, or by a figure that is better the higher."""
    value = row.get(key)
    if value is None or isinstance(value, str):
        return row["state"] != "complete", math.inf
    return row["state"] != "complete", value if key in LOSS_NAMES else -value


def _figures(
    rows: Sequence[Row], key: str, names: Sequence[str], ranges: Collection[str], logarithmic: Collection[str]
) -> list[Markup]:
    name_of, percent = (LOSS_NAMES | metrics.HEADLINES)[key], key in ("accuracy", "average_precision")
    title = name_of[0].upper() + name_of[1:]
    scored = [r for r in rows if key in r and not isinstance(r[key], str)]
    if not scored:
        return []
    ended = [r for r in scored if r["state"] == "complete"]
    stopped = [r for r in scored if r["state"] != "complete"]
    best, line = None, []
    for row in ended:
        best = row if best is None else min(best, row, key=lambda r: standing(r, key))
        line.append((float(row["number"]), best[key]))

    def points(some: Sequence[Row], x: Any) -> list[tuple[float, float]]:
        return [(float(x(r)), r[key]) for r in some]

    def figure(caption: str, svg: str) -> Markup:
        return tag("figure", tag("figcaption", caption), Markup(svg))

    def number(row: Row) -> float:
        return row["number"]

    order = plots.scatter(
        f"{title} by trial", "trial", points(ended, number), points(stopped, number), best=line, percent=percent
    )
    figures = [figure(f"Validation {name_of}, trial by trial; the line is the best so far", order)]
    for name in names:
        words = [] if name in ranges else list(dict.fromkeys(r["values"][name] for r in scored))

        def at(row: Row, name: str = name, words: list[str] = words) -> float:
            return words.index(row["values"][name]) if words else float(row["values"][name])

        svg = plots.scatter(
            f"{title} by {name}", name, points(ended, at), points(stopped, at),
            logarithmic=name in logarithmic, names=words, percent=percent,
        )  # fmt: skip
        figures.append(figure(f"Validation {name_of} against {name}", svg))
    return figures


def _table(rows: Sequence[Row], figure: str, names: Sequence[str], by: str) -> Markup:
    def shown(row: Row, key: str) -> str:
        return metrics.told(figure, row[key]) if key in row else ""

    tests = [f"test_{figure}"] if any(f"test_{figure}" in r for r in rows) else []
    losses = [by] if by else []
    scores = [f"validation {LOSS_NAMES[by]}", figure] if by else ["validation"]
    columns = ["trial", *names, *scores, *("test" for _ in tests), "state"]
    lines = [
        tag("tr", tag("th", _link(r), scope="row"), [tag("td", r["values"].get(n, "")) for n in names],
            [tag("td", loss_told(r[n]) if n in r else "") for n in losses],
            tag("td", shown(r, figure)), [tag("td", shown(r, t)) for t in tests],
            tag("td", r.get("error", r["state"]), class_="text"))
        for r in sorted(rows, key=lambda r: standing(r, by or figure))
    ]  # fmt: skip
    heads = tag("tr", [tag("th", c, scope="col", **({"class_": "text"} if c == "state" else {})) for c in columns])
    return tag(
        "div", tag("table", tag("thead", heads), tag("tbody", lines), class_="wide"), class_="scroll", tabindex="0"
    )


def _link(row: Row) -> Any:
    """The trial's number, leading to its report where it has one: the page lies above the trials' folders."""
    report = Path(row.get("folder", "")) / "report.html"
    if not report.is_file():
        return row["number"]
    return tag("a", row["number"], href=quote("/".join(report.parts[-3:])))
