"""Several runs side by side: named configs, each over several seeds, and the table of what they reached."""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jft import metrics, shard
from jft.config import Config, write_json
from jft.errors import UserError
from jft.report.live import make_display
from jft.report.several import make_comparison, mean_interval, place
from jft.run import Shared, default_workdir
from jft.train import train


@dataclass
class Comparison:
    """Runs side by side: their folder and a row for each config."""

    workdir: Path
    rows: list[dict[str, Any]]


def compare(configs: Mapping[str, Config]) -> Comparison:
    """Train every config with each of its seeds, `seed`, `seed + 1`, …, and tell mean and spread of each.

    The accuracy is the test set's where the data have one, so that choosing the best state on the validation set does
    not flatter it. Runs lie in `WORKDIR/NAME/seedN`; those that are finished are not run again.
    """
    first = next(iter(configs.values()))
    workdir = Path(first.workdir or default_workdir(first) + "-seeds")
    folders = {str(Path(c.workdir)) if c.workdir else "none" for c in configs.values()}
    if len(folders) > 1:
        raise UserError(
            f"The configs name {len(folders)} folders ({', '.join(sorted(folders))}), and a comparison has one, with a "
            "folder in it for each. Name it with --workdir, or give all configs the same workdir."
        )
    places: dict[str, str] = {}
    for name in configs:
        other = places.setdefault(place(name), name)
        if other != name:
            raise UserError(f"The configs {other!r} and {name!r} would share the folder {place(name)}: rename one.")
    if any(c.distributed for c in configs.values()):
        raise UserError(
            "--distributed is for one run; start those of a comparison, --seed by --seed, one after another."
        )
    if (workdir / "config.json").exists():
        raise UserError(f"{workdir} holds a single run. Name another folder for a comparison with --workdir.")
    rows = []
    display = make_display(first.display)
    total = sum(c.seeds for c in configs.values())
    with (
        contextlib.closing(Shared()) as shared,
        contextlib.closing(display),
        display.task("Runs", total=total, unit="runs") as advance,
    ):
        for name, config in configs.items():
            results = []
            for seed in range(config.seed, config.seed + config.seeds):
                folder = workdir / place(name) / f"seed{seed}"
                quiet = "quiet" if config.display in ("auto", "plain") else config.display
                one = config.replace(seed=seed, seeds=1, workdir=str(folder), display=quiet)
                results.append(train(one, shared=shared).result)
                advance(1)
            rows.append(summarise(name, results))
        reached, seeds = f"{rows[0]['on']} {metrics.HEADLINES[metrics.headline(rows[0])]}", {r["seeds"] for r in rows}
        if max(seeds) > 1:
            reached += ", mean ± std" + (f" of {max(seeds)} seeds" if len(seeds) == 1 else "")
        columns = {
            "": [r["name"] for r in rows],
            reached: [shown(r) for r in rows],
            **({"seeds": [r["seeds"] for r in rows]} if len(seeds) > 1 else {}),
            "trained at most": [f"{r['trainable_params']:,}" for r in rows],
            "s a run": [f"{r['seconds']:.1f}" for r in rows],
        }
        display.table(list(zip(*columns.values(), strict=True)), list(columns), title=str(workdir))
    write_json(workdir / "result.json", {"rows": rows})
    if shard.first():
        try:
            display.note(f"The comparison is in {make_comparison([workdir], workdir / 'report.html')}.")
        except Exception as error:  # the runs are finished: a page that fails is told and costs nothing else
            display.warn(f"The comparison's page could not be made: {type(error).__name__}: {error}")
    return Comparison(workdir, rows)


def summarise(name: str, results: list[dict[str, Any]]) -> dict[str, Any]:
    """One config's row: mean, standard deviation and 95 % interval of the mean over its seeds."""
    on = "test" if "test" in results[0] else "val"
    figure = metrics.headline(results[0][on])
    values = np.array([r[on][figure] for r in results])
    n = len(values)
    std = float(values.std(ddof=1)) if n > 1 else 0.0
    return {
        "name": name,
        "on": on,
        figure: float(values.mean()),
        "std": std,
        "interval": list(mean_interval(values.tolist())) if n > 1 else None,
        "values": values.tolist(),
        "seeds": n,
        "trainable_params": max(s["trainable_params"] for r in results for s in r["stages"]),
        "seconds": float(np.mean([r["seconds"]["total"] for r in results])),
    }


def shown(row: Mapping[str, Any]) -> str:
    """`93.1 % ± 0.8`."""
    figure = metrics.headline(row)
    if figure == "r2":
        return f"{row['r2']:.3f}" + (f" ± {row['std']:.3f}" if row["seeds"] > 1 else "")
    return f"{100 * row[figure]:.1f} %" + (f" ± {100 * row['std']:.1f}" if row["seeds"] > 1 else "")
