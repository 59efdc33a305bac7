"""Averages of weights: between a source and what was tuned from it (WiSE-FT), over runs or over one run's (soups)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jft import bundle, metrics, shard, weights
from jft.bundle import Bundle
from jft.config import write_json
from jft.data import order, pipeline, sources
from jft.data.prepare import make_prepare
from jft.errors import UserError
from jft.models import make_model
from jft.report.card import model_card
from jft.report.live import make_display
from jft.run import read_json
from jft.step import make_eval_step
from jft.use import fit_temperature, open_model, own_validation, probabilities
from jft.weights import default_source

ALPHAS = tuple(i / 10 for i in range(11))
Arrays = Mapping[str, np.ndarray]


def interpolate(source: Arrays, tuned: Arrays, alpha: float) -> dict[str, Any]:
    """(1 − α) source + α tuned, where the source has the name; the tuned value, as a new head's, where it has not.

    WiSE-FT: Wortsman et al. 2022, "Robust fine-tuning of zero-shot models", equation 1. Exactly the ends at 0 and 1.
    """

    a, b = np.float32(1 - alpha), np.float32(alpha)

    def between(name: str, v: Any) -> Any:
        if name not in source or alpha == 1:
            return v
        return source[name] if alpha == 0 else a * source[name] + b * v

    return {name: between(name, v) for name, v in tuned.items()}


def mean(trees: Sequence[Arrays]) -> dict[str, np.ndarray]:
    """The mean of several trees of the same names and shapes, summed in float64."""
    return {n: np.asarray(np.mean([t[n] for t in trees], axis=0, dtype=np.float64), np.float32) for n in trees[0]}


def greedy_soup(trees: Sequence[Arrays], score: Callable[[Arrays], float]) -> tuple[list[int], list[float]]:
    """Which trees to average, and the score after each trial: best first, each kept if the mean does not get worse.

    Wortsman et al. 2022, "Model soups", recipe 1.
    """
    alone = [score(tree) for tree in trees]
    ranked = sorted(range(len(trees)), key=lambda i: -alone[i])
    kept, best, told = [ranked[0]], alone[ranked[0]], [alone[ranked[0]]]
    for i in ranked[1:]:
        found = score(mean([trees[j] for j in (*kept, i)]))
        told.append(found)
        if found >= best:
            kept, best = [*kept, i], found
    return kept, told


@dataclass
class Averaged:
    """What an average wrote, and what each candidate reached on the validation images.

    That is `figure`: accuracy, R² of quantities, mAP of several labels, of which all being right says little.
    """

    path: Path
    rows: list[dict[str, Any]]
    score: float
    figure: str = "accuracy"


def wise_ft(
    workdir: str | Path,
    alphas: Sequence[float] = ALPHAS,
    out: str | Path | None = None,
    display: Any = None,
    data: Any = None,
) -> Averaged:
    """Interpolate a run's model with its source, choose α on the run's validation set, write `out` (`W/wise-ft`).

    `data` are the run's, where they have moved or were arrays, or other labelled images (`use.own_validation`).
    """
    workdir, display = Path(workdir), display or make_display("quiet")
    out = _free(out or workdir / "wise-ft")
    model, about = open_model(workdir), read_json(workdir / "config.json")
    if about["weights_sha256"] is None:
        raise UserError(f"{workdir} was trained from scratch: there is no source to interpolate with.")
    source = str(about["weights"])
    if source.startswith(("hf:", "http:", "https:")) or not Path(source).exists():
        raise UserError(f"{workdir} began from {source[:200]}, which is no file here now.")
    # Prompts are no source's: they stay as they were tuned.
    plain = make_model(model.model.name, **{n: v for n, v in _options(workdir).items() if "prompts" not in n})
    loaded = weights.load(plain, about["weights"], keep_head=about["config"]["keep_head"])
    if loaded.sha256 != about["weights_sha256"]:
        raise UserError(f"{about['weights']} is not the file that {workdir} began from: its sha256 differs.")
    params, stats, source_arrays = model.params, model.batch_stats, {**loaded.params, **loaded.batch_stats}
    if all(np.array_equal(v, source_arrays[n]) for n, v in {**params, **stats}.items() if n in source_arrays):
        raise UserError(
            f"{workdir} trained the head, or what else its source lacks, and nothing besides: there is nothing to "
            "interpolate. WiSE-FT wants a run that trained the backbone: --plan full, or lp-ft."
        )
    validation = Validation(model, own_validation(workdir, data), display)

    def at(alpha: float) -> Bundle:
        return replace(
            model,
            params=interpolate(loaded.params, params, alpha),
            batch_stats=interpolate(loaded.batch_stats, stats, alpha),
        )

    rows, figure = [], _figure(model)
    with display.task("Interpolating", total=len(alphas), unit="models") as advance:
        for alpha in alphas:
            rows.append({"alpha": alpha, figure: validation.score(at(alpha))})
            advance(1)
    # Of equals the one nearest to the tuned weights: nothing speaks for leaving them.
    alpha = max(rows, key=lambda row: (row[figure], row["alpha"]))["alpha"]
    told = {
        "average": f"The weights are (1 − α) × the source's + α × the fine-tuned ones, with α = {alpha:g}, the best of "
        f"{len(alphas)} on the validation images (WiSE-FT, https://arxiv.org/abs/2109.01903).",
        "chosen": "α was chosen on the validation images",
    }
    return _write(out, at(alpha), _options(workdir), [workdir], told, rows, validation)


def soup(
    workdirs: Sequence[str | Path],
    out: str | Path | None = None,
    greedy: bool = True,
    display: Any = None,
    data: Any = None,
) -> Averaged:
    """Average the models of several runs of one architecture on one data set, all or greedily; write `out`.

    Scored on their validation set; a greedy soup has seen it, so that its accuracy there flatters it a little. Raises
    UserError where the models differ in more than their values, and where the runs held out different images: each was
    then trained on what another was validated on. `data` as in `wise_ft`.
    """
    display = display or make_display("quiet")
    folders = [Path(w) for w in workdirs]
    out = _free(out or folders[0].parent / "soup")
    models = [open_model(folder) for folder in folders]
    first = models[0]
    for folder, model in zip(folders, models, strict=True):
        same = model.classes == first.classes and {n: v.shape for n, v in model.params.items()} == {
            n: v.shape for n, v in first.params.items()
        }
        same = same and model.quantities == first.quantities
        if not same or model.preprocess != first.preprocess:
            raise UserError(f"{folder} and {folders[0]} cannot be averaged: model, classes or preprocessing differ.")
    held_out = [frozenset(own_validation(folder, data).names) for folder in folders]
    for folder, names in zip(folders, held_out, strict=True):
        if names != held_out[0]:
            raise UserError(
                f"{folder} and {folders[0]} held out different images, as the seed draws them, so each was trained on "
                "what the other was validated on, and no score of their mean would be honest. Give the data a val "
                "split (folders train/ and val/, or a column split), or average runs of one seed that differ otherwise."
            )
    trees = [{**m.params, **m.batch_stats} for m in models]
    return _soup(first, trees, [str(f) for f in folders], folders, out, greedy, display, data)


def soup_of_run(
    workdir: str | Path, greedy: bool = True, out: str | Path | None = None, display: Any = None, data: Any = None
) -> Averaged:
    """Average the weights that one run had at its validations, all or greedily; write `out` (`W/soup`).

    The run was trained with `snapshots`. Running statistics of BatchNorms are averaged as the weights are. Raises
    UserError where there are no snapshots. `data` as in `wise_ft`.
    """
    workdir, display = Path(workdir), display or make_display("quiet")
    out = _free(out or workdir / "soup")
    model = open_model(workdir)
    files = sorted((workdir / "snapshots").glob("*.safetensors"))
    if not files:
        raise UserError(
            f"{workdir} has no snapshots. Train it with --snapshots, which keeps those of every validation."
        )
    trees = []
    for path in files:
        with weights.open_weights(path) as file:
            trees.append({**model.params, **model.batch_stats} | {n: file.read(n) for n in file.names})
    names = [f"step {int(path.stem)}" for path in files]
    return _soup(model, trees, names, [workdir], out, greedy, display, data)


def _soup(
    first: Bundle,
    trees: Sequence[Arrays],
    names: Sequence[str],
    folders: Sequence[Path],
    out: Path,
    greedy: bool,
    display: Any,
    data: Any,
) -> Averaged:
    """A soup of trees of the run or runs in `folders`."""
    validation = Validation(first, own_validation(folders[0], data), display)
    score_of = validation.score

    def as_model(tree: Arrays) -> Bundle:
        return replace(
            first,
            params={n: tree[n] for n in first.params},
            batch_stats={n: tree[n] for n in first.batch_stats},
        )

    scores = [score_of(as_model(tree)) for tree in trees]
    figure = _figure(first)
    rows: list[dict[str, Any]] = [{"run": n, figure: s} for n, s in zip(names, scores, strict=True)]
    kept = greedy_soup(trees, lambda tree: score_of(as_model(tree)))[0] if greedy else list(range(len(trees)))
    for i, row in enumerate(rows):
        row["in_soup"] = i in kept
    made = as_model(mean([trees[i] for i in kept]))
    of = "states that one run had at its validations" if len(folders) == 1 else "runs"
    how = "added one by one while validation does not get worse" if greedy else "all there are"
    told = {
        "average": f"The weights are the mean of those of {len(kept)} of {len(trees)} {of}, {how} (a model soup, "
        "https://arxiv.org/abs/2203.05482).",
        # Of a run the best state on these images was kept; its snapshots are whatever it came by.
        "chosen": "What was averaged was chosen on the validation images" if greedy or len(folders) > 1 else "",
    }
    averaged = [folders[i] for i in sorted(kept)] if len(folders) > 1 else folders
    return _write(out, made, _options(folders[0]), averaged, told, rows, validation)


class Validation:
    """Images that other weights of a model are scored on, decoded and compiled once."""

    def __init__(self, model: Bundle, dataset: sources.Dataset, display: Any, batch: int = 32):
        if tuple(dataset.classes) != tuple(model.classes) or dataset.quantities != model.quantities:
            raise UserError(
                f"The model knows {', '.join(model.classes[:5])}, the images are of {', '.join(dataset.classes[:5])}. "
                "Give --data with the model's own classes."
            )
        self.images, kept, _ = pipeline.decode_all(dataset, model.preprocess)
        self.labels, self.batch = dataset.labels[kept], batch
        self.step = shard.jit(make_eval_step(model.model, prepare=make_prepare(model.preprocess)))

    def logits(self, of: Bundle) -> np.ndarray:
        """What these weights say of each image."""
        params, stats = jax.device_put((dict(of.params), dict(of.batch_stats)))
        found = []
        for index, mask in zip(*order.evaluation_batches(len(self.images), self.batch), strict=True):
            found.append(np.asarray(self.step(params, stats, {"image": self.images[index], "index": index}))[mask])
        return np.concatenate(found)

    def scores(self, of: Bundle, logits: np.ndarray) -> dict[str, Any]:
        """All figures of what they say."""
        if of.quantities:
            return metrics.quantities(logits, self.labels, of.classes)
        return metrics.summary(probabilities(logits, self.labels.ndim == 2), self.labels, list(of.classes))

    def score(self, of: Bundle) -> float:
        """Their `_figure`. Raises UserError where the labels allow none."""
        found = self.scores(of, self.logits(of))
        if (figure := _figure(of)) not in found:
            raise UserError("The validation images show none of the labels, so that no average can be chosen by them.")
        return float(found[figure])


def _figure(model: Bundle) -> str:
    return metrics.figure(model.quantities, model.multi_label)


def _options(workdir: Path) -> dict[str, Any]:
    about = read_json(workdir / "model" / "config.json")
    return {k: tuple(v) if isinstance(v, list) else v for k, v in about["options"].items()}


def _free(out: str | Path) -> Path:
    """The folder to write to. Raises UserError where one is there that holds anything but a model of ours.

    A bundle takes the place of the folder there is: of an older average it may, of pictures or a run it must not.
    """
    path = Path(out).expanduser()
    ours = (path / "model.safetensors").is_file() and (path / "config.json").is_file()
    if path.exists() and not ours and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{path} is there and is no model of jft, so it is not written over. Name another --out.")
    return path


def _write(
    path: Path,
    model: Bundle,
    options: Mapping[str, Any],
    folders: Sequence[Path],
    told: dict[str, Any],
    rows: list[dict[str, Any]],
    validation: Validation,
) -> Averaged:
    """Write the average of the run or runs in `folders`, with a card that has what is `told` of it."""
    logits = validation.logits(model)
    scores, figure = validation.scores(model, logits), _figure(model)
    bundle.save(
        path,
        model_name=model.model.name,
        model_options=options,
        params=model.params,
        batch_stats=model.batch_stats,
        classes=model.classes,
        preprocess=model.preprocess,
        multi_label=model.multi_label,
        temperature=None if model.quantities else fit_temperature(logits, validation.labels),
        quantities=model.quantities,
        card=model_card(_about(model, folders) | {"val": scores} | told),
    )
    write_json(path / "average.json", {"rows": rows, figure: scores[figure]})
    return Averaged(path, rows, float(scores[figure]), figure)


def _about(model: Bundle, folders: Sequence[Path]) -> dict[str, Any]:
    """What a card says of the run or runs that were averaged; of several what is the same in all."""
    runs = [read_json(folder / "config.json") for folder in folders]
    plans = [run["config"]["plan"] for run in runs]
    began = {run["weights_sha256"]: _origin(model, run) for run in runs}
    return {
        "model": model.model.name,
        "data": runs[0]["data"],
        "classes": model.classes,
        "multi_label": model.multi_label,
        "quantities": model.quantities,
        "plan": plans[0] if all(plan == plans[0] for plan in plans) else None,
        "weights": runs[0]["weights"] if runs[0]["weights_sha256"] else None,
        "weights_sha256": runs[0]["weights_sha256"],
        "origin": next(iter(began.values())),
        "origins": list(began.values()) if len(began) > 1 else None,
    }


def _origin(model: Bundle, run: Mapping[str, Any]) -> str:
    """Where a run's source weights came from: the repository, where its config or its model's default names one.

    Empty of a run from scratch.
    """
    given = run["config"]["weights"]
    if run["weights_sha256"] is None:
        return ""
    if given is None:
        return default_source(model.model.name).uri
    return given if isinstance(given, str) and given.startswith("hf:") else str(run["weights"])
