"""Using a model: evaluate it on labelled images, predict on others; a finished run's model, or a pretrained one."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jft import bundle, losses, metrics, weights
from jft.bundle import Bundle
from jft.config import is_loaded, load_object
from jft.data import order, pipeline, sources
from jft.data.prepare import views, work_size
from jft.errors import UserError
from jft.models import make_model
from jft.report.live import make_display
from jft.run import read_json
from jft.step import make_eval_step

CHUNK = 1024  # images decoded at a time


def open_model(where: str | Path) -> Bundle:
    """The model of a run's folder, or of a folder that is a bundle itself. Raises UserError where there is none yet."""
    folder = Path(where)
    if (folder / "model").is_dir():
        return bundle.load(folder / "model")
    if (folder / "checkpoints").exists() or (folder / "metrics.jsonl").exists():
        raise UserError(
            f"{folder} holds a run that is not finished. Give its command again, and it goes on to the end."
        )
    return bundle.load(folder)


def pretrained(model: str, source: str | None = None) -> Bundle:
    """A pretrained model as it is, its own head included."""
    classes = weights.head_size(make_model(model), source)
    if classes is None:
        raise UserError(f"The weights of {model} have no head, so they tell no classes. Fine-tune them first.")
    built = make_model(model, num_classes=classes)
    loaded = weights.load(built, source)
    if loaded.missing:
        raise UserError(f"The weights lack {', '.join(loaded.missing[:3])}, so there is nothing to predict with.")
    names = loaded.classes or tuple(str(i) for i in range(classes))
    return Bundle(built, loaded.params, loaded.batch_stats, names, loaded.preprocess)


@dataclass
class Predicted:
    """Logits of the images that could be read, their places in the data set, and what was left out, with the reason."""

    logits: np.ndarray  # float32 [n, classes]
    kept: np.ndarray
    excluded: list[tuple[str, str]]


def run_model(
    model: Bundle, dataset: sources.Dataset, *, batch: int = 32, display: Any = None, tta: Sequence[str] = ()
) -> Predicted:
    """The model over a data set, every image once, decoding `CHUNK` images at a time.

    With `tta`, the mean of the probabilities of several views of each image (`prepare.views`): flip, corners.
    """
    display = display or make_display("quiet")
    steps = [make_eval_step(model.model, prepare=view) for view in views(model.preprocess, tta)]
    size = work_size(model.preprocess, ("crop",)) if "corners" in tta else None

    @jax.jit
    def step(params: Any, stats: Any, given: Any) -> Any:
        answers = [one(params, stats, given) for one in steps]
        return losses.average(jnp.stack(answers), model.multi_label) if tta else answers[0]

    params, stats = jax.device_put((dict(model.params), dict(model.batch_stats)))
    logits, kept, excluded = [], [], []
    with display.task("Predicting", total=len(dataset), unit="images") as advance:
        for start in range(0, len(dataset), CHUNK):
            part = dataset.select(np.arange(start, min(start + CHUNK, len(dataset))))
            try:
                images, places, bad = pipeline.decode_all(part, model.preprocess, size, cache=False)
            except UserError:  # not one of the chunk can be read
                places, bad = pipeline.readable(part, model.preprocess)
                images = np.empty((0, *model.preprocess.size, 3), np.uint8)
            excluded += bad
            kept.append(places + start)
            for index, mask in zip(*order.evaluation_batches(len(images), batch), strict=True):
                y = np.asarray(step(params, stats, {"image": images[index], "index": index}))
                logits.append(y[mask])
                advance(int(mask.sum()))
            advance(len(bad))
    empty = np.empty((0, model.model.num_classes), np.float32)
    return Predicted(np.concatenate([empty, *logits]), np.concatenate([*kept, np.empty(0, np.int64)]), excluded)


def probabilities(logits: np.ndarray, several: bool = False) -> np.ndarray:
    """Softmax of the logits; where an image can have several labels, each class's sigmoid."""
    return np.asarray((jax.nn.sigmoid if several else jax.nn.softmax)(np.asarray(logits, np.float32)))


def evaluate_dataset(
    model: Bundle, dataset: sources.Dataset, display: Any = None, batch: int = 32, tta: Sequence[str] = ()
) -> dict[str, Any]:
    """Metrics over the images of a data set that can be read, and how many were left out.

    Raises UserError where the data have classes that the model does not know.
    """
    classes = list(model.classes)
    if unknown := [c for c in dataset.classes if c not in classes]:
        raise UserError(
            f"The data have classes that the model does not know: {', '.join(unknown[:5])}. "
            f"It knows {len(classes)}: {', '.join(classes[:10])}{', …' if len(classes) > 10 else ''}."
        )
    place = np.array([classes.index(c) for c in dataset.classes])
    done = run_model(model, dataset, batch=batch, display=display, tta=tta)
    if not len(done.kept):
        raise UserError("None of the images could be read: " + "; ".join(f"{n}: {r}" for n, r in done.excluded[:3]))
    labels = dataset.labels[done.kept]
    if labels.ndim == 1:
        labels = place[labels]
    else:
        wide = np.zeros((len(labels), len(classes)), labels.dtype)
        wide[:, place] = labels
        labels = wide
    scores = metrics.summary(probabilities(done.logits, labels.ndim == 2), labels, classes)
    return scores | {"count": len(labels), "left_out": len(done.excluded), "excluded": done.excluded}


def evaluate(workdir: str | Path, data: Any = None, display: Any = None, tta: Sequence[str] = ()) -> dict[str, Any]:
    """Metrics of a run's model on its own validation set, or on all of other labelled images.

    Other data with splits are scored on `test`, where there is one, else on `val`.
    """
    model = open_model(workdir)
    if data is None:
        return {"split": "val"} | evaluate_dataset(model, own_validation(workdir), display, tta=tta)
    code = isinstance(data, str) and ".py:" in data
    splits = sources.load(load_object(data)() if code else data, val_fraction=0)
    name = "test" if splits.test else "val" if splits.val else "train"
    found = evaluate_dataset(model, getattr(splits, name), display, tta=tta)
    return {"split": name if name != "train" else "all"} | found


def _settings(workdir: str | Path, about: Any) -> tuple[dict[str, Any], str]:
    """What config.json says of the run, and of where its data lie."""
    match about:
        case {"config": {"data": _, "seed": int(), "val_fraction": int() | float()}, "data": str()}:
            return about["config"], about["data"]
    raise UserError(f"{Path(workdir) / 'config.json'} is damaged, or no run's. Pass --data.")


def _own_data(workdir: str | Path, given: str) -> Any:
    """The data a run's folder names, which is data itself: what it names is never run, unless this process has."""
    if ".py:" in given:
        if not is_loaded(given):
            raise UserError(
                f"{workdir} was trained on {given}, which is code, and what a run's folder names is never run. "
                f"If you trust that file, say so: --data {given}."
            )
        return load_object(given)()
    if given.startswith("tfds:") and (Path(given.removeprefix("tfds:")).expanduser() / "features.json").exists():
        raise UserError(f"{workdir} was trained on {given}, whose metadata name code. Pass --data {given}.")
    return given


def own_validation(workdir: str | Path) -> sources.Dataset:
    """The validation images of a run. Raises UserError where its data are not there now."""
    about = read_json(Path(workdir) / "config.json")
    config, given = _settings(workdir, about)
    if not (isinstance(config["data"], str) and (Path(given).exists() or ":" in given)):
        raise UserError(
            f"{workdir} was trained on {given}, which is not here now, or was given in Python. Pass --data."
        )
    found = _own_data(workdir, given)
    splits = sources.load(found, seed=config["seed"], val_fraction=config["val_fraction"])
    assert splits.val is not None  # the run had one
    return splits.val


def predict(
    where: str | Path | Bundle,
    images: Sequence[Any],
    *,
    top_k: int = 1,
    batch: int = 32,
    display: Any = None,
    tta: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """A row for each image: `path`, `class_index`, `label`, `probability` (then `label_2` …), or `error`.

    Images are paths of files and folders, PIL images, or uint8 arrays. A file that cannot be read keeps its row, its
    label empty and the reason in `error`.
    """
    model = where if isinstance(where, Bundle) else open_model(where)
    paths = [i for i in images if isinstance(i, str | Path)]
    if paths and len(paths) < len(images):
        raise UserError("Images are paths, or arrays and PIL images: not both in one call.")
    if paths:
        dataset, excluded = sources.unlabelled(paths, model.classes)
    else:
        dataset, excluded = sources.arrays(list(images), np.zeros(len(images), np.int32), ["?"]), []
    done = run_model(model, dataset, batch=batch, display=display, tta=tta)
    likely = probabilities(done.logits, model.multi_label)
    rows = {
        dataset.names[place]: {"path": dataset.names[place], **row(p, model.classes, top_k), "error": ""}
        for place, p in zip(done.kept, likely, strict=True)
    }
    for name, reason in (*excluded, *done.excluded):
        rows[name] = {"path": name, "class_index": "", "label": "", "probability": "", "error": reason}
    order_of = [*dataset.names, *(name for name, _ in excluded)]
    return [rows[name] for name in order_of]


def row(p: np.ndarray, classes: Sequence[str], top_k: int = 1) -> dict[str, Any]:
    """The columns of one image's prediction: `class_index`, `label`, `probability`, then `label_2`, …"""
    best = np.argsort(-p, kind="stable")[:top_k]
    told: dict[str, Any] = {"class_index": int(best[0])}
    for rank, i in enumerate(best, 1):
        suffix = "" if rank == 1 else f"_{rank}"
        told |= {f"label{suffix}": classes[i], f"probability{suffix}": float(p[i])}
    return told
