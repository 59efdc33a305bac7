"""What a model goes by: Grad-CAM of its mistakes, the training images nearest to them, a linear probe beside it."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from jft import metrics, probes, shard, weights
from jft.build import few_shots
from jft.bundle import Bundle
from jft.code import load_object
from jft.data import pipeline
from jft.data.prepare import make_prepare
from jft.data.sources import Dataset, Splits, load
from jft.errors import UserError
from jft.files import writing
from jft.models.base import Model
from jft.report import html
from jft.run import read_json
from jft.step import make_eval_step
from jft.use import Predicted, open_model, own_splits, probabilities, run_chunks

NEIGHBOURS, SUSPECTS = 3, 12


def explain(
    workdir: str | Path,
    data: Any = None,
    *,
    images: int = 2000,
    shown: int = 6,
    batch: int = 32,
    display: Any = None,
) -> Path:
    """Run a finished run's model over its data once more, and write what it found beside the run, for the report.

    `explained.npz` holds, of the `shown` most confident mistakes (then of the most uncertain), the picture as the model
    saw it, Grad-CAM for the class said and the true one, and the training images of nearest features; and, of the
    pretrained weights' features, the validation accuracy of a logistic probe and the training labels that probes
    without them doubt. At most `images` of the training and of the validation images are looked at, drawn at random.
    `data` are the run's data, where they are no longer where they were. Raises UserError where the run has not
    finished, or its data are not there.
    """
    folder = Path(workdir)
    run, model = html.read_run(folder), open_model(folder)
    if run.quantities:
        raise UserError("--explain is about classes; this run predicts quantities.")
    if not len(run.labels):
        raise UserError(f"{folder} has no predictions.npz, which every finished run has: there is nothing to explain.")
    splits = own_splits(folder) if data is None else data_of(folder, data)
    whole = splits.val
    assert whole is not None
    config = read_json(folder / "config.json")["config"]
    if config.get("shots") is not None:
        splits = replace(splits, train=few_shots(splits.train, config["shots"], config["seed"]))
    rng = np.random.default_rng(0)
    train, val = (_some(part, images, rng) for part in (splits.train, whole))
    found: dict[str, Any] = {"sha256": np.array(str(run.bundle.get("sha256")))}

    seen = _features(model, train, batch, display)
    place = {name: i for i, name in enumerate(whole.names)}
    order = metrics.mistakes(run.probabilities, run.labels).tolist()
    if run.probabilities.shape[1] > 1:
        order += [i for i in metrics.uncertain(run.probabilities, run.several).tolist()[:shown] if i not in set(order)]
    order = [i for i in order if run.names[i] in place][:shown]
    if order:
        chosen = whole.select(np.array([place[run.names[i]] for i in order]))
        pixels, kept, _ = pipeline.decode_all(chosen, model.preprocess, cache=False)
        order = [order[i] for i in kept]
        found |= _near(model, pixels, seen, train) | _maps(model, pixels, run, order)
        found |= {"shown": np.array([run.names[i] for i in order]), "pixels": pixels}
    if (source := _source(folder, model)) is not None:
        same = all(np.array_equal(source.params[n], v) for n, v in model.params.items() if not n.startswith("head/"))
        frozen = seen if same else _features(source, train, batch, display)
        found |= _probe(frozen, train, _features(source, val, batch, display), val)
        doubted = found.pop("suspect_places")
        found["suspect_pixels"] = _pixels(model, train, doubted) if len(doubted) else np.zeros((0, 1, 1, 3), np.uint8)
    out = folder / html.EXPLAINED
    with writing(out) as part, open(part, "wb") as file:
        np.savez_compressed(file, **found)
    return out


def data_of(workdir: str | Path, data: Any) -> Splits:
    """Data given anew, divided as a run divided its own; `FILE.py:FUNCTION` is run. Raises UserError without any."""
    config = read_json(Path(workdir) / "config.json").get("config", {})
    if not {"seed", "val_fraction"} <= set(config):
        raise UserError(f"{Path(workdir) / 'config.json'} does not say how the run divided its data.")
    code = isinstance(data, str) and ".py:" in data
    splits = load(load_object(data)() if code else data, seed=config["seed"], val_fraction=config["val_fraction"])
    if splits.val is None:
        raise UserError(f"{data} has no validation images.")
    return splits


def _some(dataset: Dataset, most: int, rng: np.random.Generator) -> Dataset:
    """The data set, or so many of its examples, in its order."""
    if len(dataset) <= most:
        return dataset
    return dataset.select(np.sort(rng.choice(len(dataset), most, replace=False)))


def _features(model: Bundle, dataset: Dataset, batch: int, display: Any) -> Predicted:
    """What the head takes of each image that can be read."""
    done = list(run_chunks(model, dataset, batch=batch, display=display, features=True))
    features = [d.features for d in done if d.features is not None]
    if not features:
        raise UserError("None of the images could be read: " + "; ".join(f"{n}: {r}" for n, r in done[0].excluded[:3]))
    return Predicted(
        np.concatenate([d.logits for d in done]), np.concatenate([d.kept for d in done]), [], np.concatenate(features)
    )


def _near(model: Bundle, pixels: np.ndarray, seen: Predicted, train: Dataset) -> dict[str, np.ndarray]:
    """The training images whose features have the largest cosine with those of the pictures."""
    prepare = make_prepare(model.preprocess, (), train=False)
    body = make_eval_step(model.model, prepare=prepare, stop="head")
    given = {"image": pixels, "index": np.arange(len(pixels), dtype=np.int32)}
    own = np.asarray(shard.jit(body)(dict(model.params), dict(model.batch_stats), given)).reshape(len(pixels), -1)
    assert seen.features is not None
    similar = _unit(own) @ _unit(seen.features).T
    nearest = np.argsort(-similar, axis=1, kind="stable")[:, :NEIGHBOURS]
    names = np.array([[train.names[seen.kept[j]] for j in row] for row in nearest])
    labels = np.array([[_label(train, int(seen.kept[j])) for j in row] for row in nearest])
    return {
        "neighbours": names,
        "neighbour_labels": labels,
        "neighbour_pixels": _pixels(model, train, seen.kept[nearest]),
        "similarity": np.take_along_axis(similar, nearest, axis=1).astype(np.float32),
    }


def _pixels(model: Bundle, dataset: Dataset, places: Int[np.ndarray, "*m"]) -> UInt8[np.ndarray, "*m h w 3"]:
    """Pictures that have been read before, as the model sees them."""
    few, back = np.unique(places, return_inverse=True)
    pixels, _, _ = pipeline.decode_all(dataset.select(few), model.preprocess, cache=False)
    return pixels[back.reshape(places.shape)]


def _unit(x: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def _label(dataset: Dataset, i: int) -> str:
    label = dataset.labels[i]
    if dataset.labels.ndim == 1:
        return dataset.classes[int(label)]
    return "|".join(c for c, y in zip(dataset.classes, label, strict=True) if y) or "none"


def _maps(model: Bundle, pixels: np.ndarray, run: html.Run, order: Sequence[int]) -> dict[str, np.ndarray]:
    """Grad-CAM of two classes each: the one said and the true one; of several labels, the two most wrong."""
    p, labels = run.probabilities[list(order)], run.labels[list(order)]
    if run.several:
        classes = np.argsort(-abs(p - labels), axis=1, kind="stable")[:, :2]
    else:
        likely = np.argsort(-p, axis=1, kind="stable")
        other = np.where(likely[:, 0] == labels, likely[:, 1 % p.shape[1]], labels)  # of a right answer: the next
        classes = np.stack([likely[:, 0], other], axis=1)
    found = grad_cam(model, pixels, classes.astype(np.int32))
    return {"classes": classes, "maps": found}


def grad_cam(
    model: Bundle, pixels: UInt8[np.ndarray, "b h w 3"], classes: Int[np.ndarray, "b m"]
) -> UInt8[np.ndarray, "b m y x"]:
    """What of each picture speaks for each of the classes, 0 to 255 (Grad-CAM, Selvaraju et al. 2017, equations 1, 2).

    `pixels` are working images, of the preprocessing's size. The activations are those that the last part with places
    takes: of a convolutional network its head, of a Vision Transformer the last block, behind which the patches no
    longer reach the class token. Their channels are weighted by the mean gradient of the class's logit; what is left of
    the sum above zero is the map, its largest value 255. Of a model without places the maps are `[b, m, 1, 1]`.
    """
    part = places(model.model)
    if part is None:
        return np.zeros((*classes.shape, 1, 1), np.uint8)
    prepare = make_prepare(model.preprocess, (), train=False)
    given = {"image": pixels, "index": np.arange(len(pixels), dtype=np.int32)}
    body = make_eval_step(model.model, prepare=prepare, stop=part)
    shape = model.model.shape_before(part)
    height, width = shape[:2] if len(shape) == 3 else grid(shape[0], model.preprocess.size)

    def logit(h: Array, params: Any, stats: Any, c: Array) -> Array:
        y, _ = model.model.apply(params, stats, h, start=part)
        return jnp.take_along_axis(y.astype(jnp.float32), c[:, None], axis=1).sum()

    @shard.jit
    def maps(params: Any, stats: Any, given: Any, classes: Array) -> Float[Array, "m b y x"]:
        h = body(params, stats, given)

        def one(c: Array) -> Array:
            a, g = (
                v.reshape(len(v), -1, v.shape[-1])[:, -height * width :]
                for v in (h, jax.grad(logit)(h, params, stats, c))
            )
            found = jax.nn.relu((a * g.mean(axis=1, keepdims=True)).sum(axis=-1))
            return (found / jnp.maximum(found.max(axis=1, keepdims=True), 1e-12)).reshape(-1, height, width)

        return jax.lax.map(one, classes)

    found = maps(dict(model.params), dict(model.batch_stats), given, classes.T)
    return np.rint(255 * np.asarray(found)).astype(np.uint8).transpose(1, 0, 2, 3)


def places(model: Model) -> str | None:
    """The last part that takes something with places, more than one, and mixes them; None where there is none."""
    for part in reversed(list(model.parts)):
        shape = model.shape_before(part)
        if len(shape) == 3 and shape[0] * shape[1] > 1 and part != next(iter(model.parts)):
            return part
        if len(shape) == 2 and shape[0] > 1 and part.startswith("block"):  # what comes behind acts on each token alone
            return part
    return None


def grid(tokens: int, size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of the patches among the tokens of a picture of (height, width): the most that are square.

    >>> grid(197, (224, 224))
    (14, 14)
    """
    for patch in range(1, max(size) + 1):
        rows, columns = size[0] // patch, size[1] // patch
        if rows * columns <= tokens and size[0] % patch == 0 and size[1] % patch == 0:
            return rows, columns
    side = math.isqrt(tokens)
    return side, side


def _source(folder: Path, model: Bundle) -> Bundle | None:
    """The model with the weights that the run began with, its head aside; None where there are none or not any more."""
    about = read_json(folder / "config.json")
    where = about.get("weights")
    if not where or not Path(where).exists():
        return None
    loaded = weights.load(model.model, where)
    if loaded.sha256 != about.get("weights_sha256") or any(not n.startswith("head/") for n in loaded.missing):
        return None
    params = dict(model.params) | {n: v for n, v in loaded.params.items() if not n.startswith("head/")}
    stats = dict(model.batch_stats) | loaded.batch_stats
    return Bundle(model.model, params, stats, model.classes, model.preprocess, model.multi_label)


def _probe(seen: Predicted, train: Dataset, asked: Predicted, val: Dataset) -> dict[str, np.ndarray]:
    """A logistic probe's accuracy on the validation images, and the training labels that held-out probes doubt."""
    assert seen.features is not None and asked.features is not None
    labels, k, several = train.labels[seen.kept], len(train.classes), train.labels.ndim == 2
    folds = probes.make_folds(labels, min(probes.FOLDS, len(labels)))
    probe = probes.logistic(seen.features, labels, k, folds=folds)
    likely = probabilities(probe.scores(asked.features), several)
    accuracy = metrics.summary(likely, val.labels[asked.kept], list(val.classes))["accuracy"]
    assert probe.held_out is not None
    told = probabilities(probe.held_out, several)
    doubted = metrics.suspects(told, labels)
    first = doubted[:SUSPECTS]
    rows = np.arange(len(first))
    if several:
        said = abs(told[first] - labels[first]).argmax(axis=1)
        given = np.full(len(first), -1)
    else:
        given = labels[first].astype(np.int64)
        others = told[first].copy()
        others[rows, given] = -1
        said = others.argmax(axis=1)
    return {
        "probe_accuracy": np.array(accuracy),
        "probe_count": np.array(len(labels)),
        "suspect_count": np.array(len(doubted)),
        "suspect_places": seen.kept[first],
        "suspect_names": np.array([train.names[seen.kept[i]] for i in first], dtype=str),
        "suspect_label": given,
        "suspect_said": said,
        "suspect_probability": told[first][rows, said].astype(np.float64),
    }
