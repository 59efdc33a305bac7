"""`report.html`: a run on one page that needs no network, made from the files in the run's folder."""

import os
from html import escape
from pathlib import Path
from typing import Any

from jft.metrics import wilson
from jft.run import read_json


def make_report(workdir: str | Path) -> Path:
    """Write `report.html` into a run's folder, from the files there alone; returns its path.

    Raises UserError where the folder holds no finished run.
    """
    workdir = Path(workdir)
    result = read_json(workdir / "result.json")
    path, beside = workdir / "report.html", workdir / "report.html.part"
    beside.write_text(_page(result), encoding="utf-8", errors="backslashreplace")
    os.replace(beside, path)
    return path


def _page(result: dict[str, Any]) -> str:
    val = result["val"]
    low, high = wilson(round(val["accuracy"] * val["count"]), val["count"])
    title = escape(f"{result['model']} on {Path(result['data']).name}")
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><h1>{title}</h1>"
        f"<p>Validation accuracy {val['accuracy']:.1%} ({low:.1%} to {high:.1%}) of {val['count']} images.</p></html>\n"
    )
