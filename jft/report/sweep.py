"""The page of a sweep: its trials as a table, and what each field did, as figures."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from jft import __version__
from jft.report import html, plots
from jft.report.html import Markup, tag

Row = Mapping[str, Any]


def page(
    data: str,
    rows: Sequence[Row],
    best: Row,
    names: Sequence[str],
    ranges: Collection[str],
    logarithmic: Collection[str],
) -> str:
    """One HTML file that needs nothing beside it, from the rows of a sweep's `result.json`.

    `names` are the fields searched; those in `ranges` are numbers on an axis, in `logarithmic` on a logarithmic one.
    """
    title = f"{len(rows)} trials on {data}"
    chosen = ", ".join(f"{n} {v}" for n, v in best["values"].items())
    told = f"The best is trial {best['number']}: validation accuracy {best['accuracy']:.2%} with {chosen}."
    more = (
        f"Its accuracy on the test set, which no trial was chosen by, is {best['test_accuracy']:.2%}."
        if "test_accuracy" in best
        else "It was chosen by this accuracy, which therefore flatters it; the data have no test split to tell by."
    )
    sections = [
        ("Result", [tag("p", told), tag("p", more, class_="muted")]),
        ("What each field did", tag("div", _figures(rows, names, ranges, logarithmic), class_="figures")),
        ("Trials", _table(rows, names)),
    ]
    return html.page(title, "", sections, f"Made by jft {__version__}.")


def _figures(
    rows: Sequence[Row], names: Sequence[str], ranges: Collection[str], logarithmic: Collection[str]
) -> list[Markup]:
    scored = [r for r in rows if "accuracy" in r]
    ended = [r for r in scored if r["state"] == "complete"]
    stopped = [r for r in scored if r["state"] != "complete"]
    best, line = 0.0, []
    for row in ended:
        best = max(best, row["accuracy"])
        line.append((float(row["number"]), best))

    def points(some: Sequence[Row], x: Any) -> list[tuple[float, float]]:
        return [(float(x(r)), r["accuracy"]) for r in some]

    def figure(caption: str, svg: str) -> Markup:
        return tag("figure", tag("figcaption", caption), Markup(svg))

    def number(row: Row) -> float:
        return row["number"]

    order = plots.scatter("Accuracy by trial", "trial", points(ended, number), points(stopped, number), best=line)
    figures = [figure("Validation accuracy, trial by trial; the line is the best so far", order)]
    for name in names:
        words = [] if name in ranges else list(dict.fromkeys(r["values"][name] for r in scored))

        def at(row: Row, name: str = name, words: list[str] = words) -> float:
            return words.index(row["values"][name]) if words else float(row["values"][name])

        svg = plots.scatter(
            f"Accuracy by {name}", name, points(ended, at), points(stopped, at),
            logarithmic=name in logarithmic, names=words,
        )  # fmt: skip
        figures.append(figure(f"Validation accuracy against {name}", svg))
    return figures


def _table(rows: Sequence[Row], names: Sequence[str]) -> Markup:
    def shown(row: Row, key: str) -> str:
        return f"{row[key]:.2%}" if key in row else ""

    tests = ["test_accuracy"] if any("test_accuracy" in r for r in rows) else []
    columns = ["trial", *names, "validation", *("test" for _ in tests), "state"]
    lines = [
        tag("tr", tag("th", r["number"], scope="row"), [tag("td", r["values"].get(n, "")) for n in names],
            tag("td", shown(r, "accuracy")), [tag("td", shown(r, t)) for t in tests],
            tag("td", r.get("error", r["state"]), class_="text"))
        for r in sorted(rows, key=lambda r: (r["state"] != "complete", -r.get("accuracy", -1.0)))
    ]  # fmt: skip
    heads = tag("tr", [tag("th", c, scope="col", **({"class_": "text"} if c == "state" else {})) for c in columns])
    return tag("div", tag("table", tag("thead", heads), tag("tbody", lines), class_="wide"), class_="scroll")
