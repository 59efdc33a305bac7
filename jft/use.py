"""Using a model: evaluate it on labelled images, predict on others; a finished run's model, or a pretrained one."""

import contextlib
import glob
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from jft import bundle, losses, metrics, shard, weights
from jft.bundle import Bundle
from jft.code import is_loaded, load_object
from jft.data import order, pipeline, sources
from jft.data.prepare import make_prepare, views, work_size
from jft.errors import UserError
from jft.models import make_model
from jft.models.base import Model
from jft.preprocess import Preprocess
from jft.report.live import make_display
from jft.run import contents, fingerprint, read_json
from jft.step import FEATURES, make_eval_step
from jft.table import Row, Writable, rows_to

CHUNK = 512  # images decoded at a time; two such chunks are in memory, the one that is run and the next
UNKNOWN = "unknown"  # the label below the threshold of that name; its class_index is -1


def open_model(where: str | Path) -> Bundle:
    """The model of a run's folder, of a folder that is a bundle itself, or of `hf:ORG/REPO`, where `jft push` put it.

    Raises UserError where there is none yet.
    """
    where = os.path.expanduser(where)
    folder = Path(where)
    with _reading(folder):
        begun = (folder / "checkpoints").exists() or (folder / "metrics.jsonl").exists()
        if begun and not (folder / "model").is_dir():
            raise UserError(
                f"{folder} holds a run that is not finished. Give its command again, and it goes on to the end."
            )
        return bundle.load(where)


@contextlib.contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """What may not be read is the user's to mend."""
    try:
        yield
    except PermissionError as error:
        raise UserError(f"{error.filename or folder} cannot be read: {error.strerror}.") from None


def pretrained(model: str | None, source: str | None = None) -> Bundle:
    """A pretrained model as it is, its own head included; without a name, weights that are a bundle of ours."""
    source = os.path.expanduser(source) if source else source
    if model is None:
        if source:
            with _reading(Path(source)):
                if found := bundle.find(source):
                    return bundle.load(found)
        raise UserError(f"{source} is no model that jft saved, so --model must say what these weights are of.")
    classes = weights.head_size(make_model(model), source)
    if classes is None:
        raise UserError(f"The weights of {model} have no head, so they tell no classes. Fine-tune them first.")
    built = make_model(model, num_classes=classes)
    loaded = weights.load(built, source)
    if loaded.missing:
        raise UserError(f"The weights lack {', '.join(loaded.missing[:3])}, so there is nothing to predict with.")
    return Bundle(
        built,
        loaded.params,
        loaded.batch_stats,
        labels_of(loaded, classes),
        loaded.preprocess,
        multi_label=loaded.multi_label,
        quantities=loaded.quantities,
    )


def labels_of(loaded: weights.Loaded, count: int) -> tuple[str, ...]:
    """The names of the head's outputs; numbers where the weights tell none, of a single quantity none of its own."""
    if loaded.quantities and count == 1 and not loaded.classes:
        return (sources.VALUE,)
    return loaded.classes or tuple(str(i) for i in range(count))


def _average_of(model: Bundle) -> Callable[[Any], Any]:
    """What makes one answer [b, k] of those of several views [v, b, k]."""
    if model.quantities:
        return _mean
    return _mean_of_several if model.multi_label else losses.average


def _mean(answers: Any) -> Any:
    return answers.mean(0)


def _mean_of_several(answers: Any) -> Any:
    return losses.average(answers, several=True)


def _views(model: Bundle, tta: Sequence[str]) -> tuple[str, ...]:
    """The views asked for, `none` alone being none. Raises UserError for what is none to this model."""
    chosen = () if tuple(tta) == ("none",) else tuple(tta)
    views(model.preprocess, chosen)
    return chosen


class NoneReadable(UserError):
    """Not one image of a data set could be read; `excluded` says why."""

    def __init__(self, excluded: list[tuple[str, str]]):
        super().__init__("None of the images could be read: " + "; ".join(f"{n}: {r}" for n, r in excluded[:3]))
        self.excluded = excluded


@dataclass
class Predicted:
    """Logits (or quantities) of the images that could be read, their places, and what was left out, with the reason."""

    logits: np.ndarray  # float32 [n, classes]
    kept: np.ndarray
    excluded: list[tuple[str, str]]
    features: np.ndarray | None = None  # float32 [n, d], what the head takes


@lru_cache(maxsize=8)  # who predicts again waits for no compilation
def _prediction(
    model: Model, preprocess: Preprocess, tta: tuple[str, ...], average: Callable[[Any], Any], features: bool
) -> Any:
    """A compiled `(params, batch_stats, batch) -> (logits, what the head takes)`, the second with `features` alone."""
    steps = [make_eval_step(model, prepare=view) for view in views(preprocess, tta)]
    plain = make_prepare(preprocess, (), train=False)
    body, top = make_eval_step(model, prepare=plain, stop="head"), make_eval_step(model, start="head")

    @shard.jit
    def step(params: Any, stats: Any, given: Any) -> tuple[Any, Any]:
        taken = body(params, stats, given) if features else None
        if features and not tta:
            return top(params, stats, {FEATURES: taken}), taken
        answers = [one(params, stats, given) for one in steps]
        return average(jnp.stack(answers)) if tta else answers[0], taken

    return step


def run_chunks(
    model: Bundle,
    dataset: sources.Dataset,
    *,
    batch: int = 32,
    display: Any = None,
    tta: Sequence[str] = (),
    features: bool = False,
) -> Iterator[Predicted]:
    """The model over a data set, every image once, `CHUNK` at a time: what is done is handed on, not kept.

    The next images are decoded while the device works. With `tta`, the mean of the probabilities of several views of
    each image (`prepare.views`): flip, corners; `none` alone is none. With `features`, what the head takes of the image
    itself, too.
    """
    display = display or make_display("quiet")
    tta = _views(model, tta)
    # A few images need no whole batch; powers of two are compiled for few sizes.
    batch = min(batch, CHUNK, 1 << max(len(dataset) - 1, 0).bit_length())
    step = _prediction(model.model, model.preprocess, tta, _average_of(model), features)
    size = work_size(model.preprocess, ("crop",)) if "corners" in tta else None
    params, stats = jax.device_put((dict(model.params), dict(model.batch_stats)))

    def decode(start: int) -> Any:
        part = dataset.select(np.arange(start, min(start + CHUNK, len(dataset))))
        try:
            return pipeline.decode_all(part, model.preprocess, size, cache=False)
        except UserError:  # not one of the chunk can be read
            return np.empty((0, *model.preprocess.size, 3), np.uint8), *pipeline.readable(part, model.preprocess)

    starts = range(0, len(dataset), CHUNK)
    with display.task("Predicting", total=len(dataset), unit="images") as advance, ThreadPoolExecutor(1) as ahead:
        waiting = ahead.submit(decode, 0) if starts else None
        for start in starts:
            assert waiting is not None
            images, places, bad = waiting.result()
            if start + CHUNK < len(dataset):
                waiting = ahead.submit(decode, start + CHUNK)
            logits, taken = [np.empty((0, model.model.num_classes), np.float32)], []
            for index, mask in zip(*order.evaluation_batches(len(images), batch), strict=True):
                y, f = step(params, stats, {"image": images[index], "index": index})
                logits.append(np.asarray(y)[mask])
                if f is not None:
                    taken.append(np.asarray(f)[mask].reshape(int(mask.sum()), -1))
                advance(int(mask.sum()))
            advance(len(bad))
            yield Predicted(np.concatenate(logits), places + start, bad, np.concatenate(taken) if taken else None)


def run_model(
    model: Bundle, dataset: sources.Dataset, *, batch: int = 32, display: Any = None, tta: Sequence[str] = ()
) -> Predicted:
    """The model over a data set, every image once; all of it in memory (`run_chunks` hands it on piece by piece)."""
    done = list(run_chunks(model, dataset, batch=batch, display=display, tta=tta))
    empty = np.empty((0, model.model.num_classes), np.float32)
    return Predicted(
        np.concatenate([empty, *(d.logits for d in done)]),
        np.concatenate([np.empty(0, np.int64), *(d.kept for d in done)]),
        [pair for d in done for pair in d.excluded],
    )


def probabilities(logits: np.ndarray, several: bool = False) -> np.ndarray:
    """Softmax of the logits; where an image can have several labels, each class's sigmoid."""
    return np.asarray((jax.nn.sigmoid if several else jax.nn.softmax)(np.asarray(logits, np.float32)))


def evaluate_dataset(
    model: Bundle, dataset: sources.Dataset, display: Any = None, batch: int = 32, tta: Sequence[str] = ()
) -> dict[str, Any]:
    """Metrics over the images of a data set that can be read, and how many were left out.

    Of a model that can say several labels an image with one has a set of one. Raises UserError where the data have
    classes that the model does not know, or several labels an image for a model of one.
    """
    classes = list(model.classes)
    if model.quantities != dataset.quantities:
        says, have = ("numbers", "classes") if model.quantities else ("classes", "numbers")
        raise UserError(f"The model predicts {says}, and the labels of the data are {have}.")
    if dataset.several and not model.multi_label:
        raise UserError(
            "The model says one label an image, and images of these data have several. Give it data of one label an "
            "image (in a CSV, no | in the column label), or fine-tune a model on data of several."
        )
    if unknown := [c for c in dataset.classes if c not in classes]:
        raise UserError(
            f"The data have {'quantities' if model.quantities else 'classes'} that the model does not know: "
            f"{', '.join(unknown[:5])}. "
            f"It knows {len(classes)}: {', '.join(classes[:10])}{', …' if len(classes) > 10 else ''}."
        )
    place = np.array([classes.index(c) for c in dataset.classes])
    done = run_model(model, dataset, batch=batch, display=display, tta=tta)
    if not len(done.kept):
        raise NoneReadable(done.excluded)
    labels = dataset.labels[done.kept]
    left_out = {"left_out": len(done.excluded), "excluded": done.excluded}
    if model.quantities:
        return metrics.quantities(done.logits[:, place], labels, dataset.classes) | left_out
    if labels.ndim == 1:
        labels = place[labels]
        labels = np.eye(len(classes), dtype=np.float32)[labels] if model.multi_label else labels
    else:
        wide = np.zeros((len(labels), len(classes)), labels.dtype)
        wide[:, place] = labels
        labels = wide
    scores = metrics.summary(probabilities(done.logits, model.multi_label), labels, classes)
    return scores | {"count": len(labels)} | left_out


def evaluate(
    where: str | Path | Bundle, data: Any = None, display: Any = None, tta: Sequence[str] = (), batch: int = 32
) -> dict[str, Any]:
    """Metrics of a run's model on its own validation set, or of any model on all of other labelled images.

    Other data with splits are scored on `test`, where there is one, else on `val`.
    """
    model = where if isinstance(where, Bundle) else open_model(where)
    if data is None:
        if isinstance(where, Bundle):
            raise UserError("A model alone has no validation images; give labelled images to score it on.")
        return {"split": "val"} | evaluate_dataset(model, own_validation(where), display, batch, tta)
    code = isinstance(data, str) and ".py:" in data
    name, dataset = sources.to_score(load_object(data)() if code else data)
    return {"split": name if name != "train" else "all"} | evaluate_dataset(model, dataset, display, batch, tta)


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


def own_validation(workdir: str | Path, data: Any = None) -> sources.Dataset:
    """The validation images of a run. Raises UserError where its data are not there now, or have changed.

    Of `data` that were the run's, wherever they lie now, those that it held out; of others their val split, or all.
    """
    if data is not None:
        return _validation_of(workdir, data)
    val = own_splits(workdir).val
    if val is None:
        raise UserError(f"The data of {workdir} have no validation images now. Pass --data.")
    return val


def _validation_of(workdir: str | Path, data: Any) -> sources.Dataset:
    given = load_object(data)() if isinstance(data, str) and ".py:" in data else data
    about = read_json(Path(workdir).expanduser() / "config.json")
    config = about.get("config", {})
    if {"seed", "val_fraction"} <= config.keys():
        splits = sources.load(given, seed=config["seed"], val_fraction=config["val_fraction"])
        if splits.val is not None and about.get("data_sha256") == fingerprint(_as_trained(splits, config)):
            return splits.val
    splits = sources.load(given, val_fraction=0)
    return splits.train if splits.val is None else splits.val


def own_splits(workdir: str | Path) -> sources.Splits:
    """The data of a run as it divided them, `shots` aside. Raises UserError where they are not there, or have changed.

    One image more is enough to divide a folder otherwise, and what the run was trained on would count as validation.
    """
    workdir = Path(workdir).expanduser()
    with _reading(workdir):
        about = read_json(workdir / "config.json")
        if "config" not in about:
            raise UserError(f"{workdir} is a model, not a run, so it names no validation images. Pass --data.")
        config, given = _settings(workdir, about)
        if not (isinstance(config["data"], str) and (Path(given).exists() or ":" in given)):
            raise UserError(
                f"{workdir} was trained on {given}, which is not here now, or was given in Python. Pass --data."
            )
        found = _own_data(workdir, given)
        splits = sources.load(found, seed=config["seed"], val_fraction=config["val_fraction"])
    seen = _as_trained(splits, config)
    # Runs of early versions do not say what they saw.
    had = {key: about.get(key) for key in ("data_sha256", "data_contents")}
    if any(
        isinstance(had[key], str) and had[key] != of(seen) for key, of in zip(had, (fingerprint, contents), strict=True)
    ):
        raise UserError(
            f"{given} has changed since {workdir} was trained on it: its images, their labels, or what "
            f"{sources.QUARANTINE} leaves out. Which were for validation cannot be told now. Undo the change, train "
            "again, or pass --data with images that it was not trained on."
        )
    return splits


def _as_trained(splits: sources.Splits, config: dict[str, Any]) -> sources.Splits:
    """With `shots` images a class, where the run asked for them."""
    if not isinstance(shots := config.get("shots"), int):
        return splits
    from jft.build import few_shots  # of this module's own layer

    return replace(splits, train=few_shots(splits.train, shots, config["seed"]))


def pictures(
    given: Sequence[str | Path], classes: Sequence[str] = (), stdin: Any = None
) -> tuple[sources.Dataset, list[tuple[str, str]]]:
    """The pictures to predict on, in the order given, and what of the folders is none, with the reason.

    Each is a file, a folder (with all below it), a glob such as `photos/**/*.jpg`, a CSV with a column `path` (from
    the CSV's own folder), or `-`, a list of paths on standard input, one a line or ended by zero bytes as `find
    -print0` has them. A file that a list names and that is not there keeps its place, and is left out when it is read.
    Raises UserError for a path that is not there, a glob that matches nothing and a folder of no images.
    """
    names: list[str] = []
    reads: list[Callable[[], Any]] = []
    excluded: list[tuple[str, str]] = []
    for word in given:
        text = str(word)
        listed: Iterable[str | Path] | None = None
        if text == "-":
            listed = _lines((stdin or sys.stdin.buffer).read())
        elif text.lower().endswith(".csv") and os.path.isfile(file := os.path.expanduser(text)):
            listed = _column(Path(file))
        if listed is not None:
            for path in map(Path, listed):
                names.append(sources.shown(str(path)))
                reads.append(partial(sources.read_file, path))
            continue
        found: list[str | Path] = [word]
        if not os.path.exists(os.path.expanduser(text)) and glob.has_magic(text):
            found = list(_outermost(sorted(glob.glob(os.path.expanduser(text), recursive=True))))
            if not found:
                raise UserError(f"Nothing matches {text!r}. Quote a glob, or the shell expands it first.")
        part, bad = sources.unlabelled(found, classes)
        if not len(part) and not bad:
            raise UserError(f"There is no image in {text}, nor in the folders below it.")
        names += part.names
        reads += [partial(part.read, i) for i in range(len(part))]
        excluded += bad
    labels = np.full(len(names), -1, np.int32)
    return sources.Dataset(tuple(names), labels, tuple(classes), lambda i: reads[i]()), excluded


def _outermost(paths: Sequence[str]) -> list[str]:
    """Without what lies in a folder among them, all of which is read: a glob's `**` matches folders and their files."""
    folders = {Path(path) for path in paths if os.path.isdir(path)}
    return [path for path in paths if folders.isdisjoint(Path(path).parents)]


def _lines(content: bytes) -> list[str]:
    lines = content.split(b"\0") if b"\0" in content else content.splitlines()
    return [os.fsdecode(line) for line in lines if line.strip()]


def _column(file: Path) -> list[Path]:
    """The paths of a CSV, from its own folder."""
    rows = sources.csv_rows(file, "path", lambda header: "" if "path" in header else "a column path is expected.")
    found = []
    for _, row in rows:
        paths = (file.parent / text for text in sources.spellings(row["path"]))
        found.append(next((path for path in paths if os.path.isfile(path)), file.parent / row["path"]))
    return found


def predict_rows(
    model: Bundle,
    images: Sequence[Any] | np.ndarray | Path | Image.Image,
    *,
    top_k: int = 1,
    probability_of_each: bool = False,
    temperature: float | str | None = None,
    unknown: float | None = None,
    features: Callable[[Sequence[str], np.ndarray], Any] | None = None,
    batch: int = 32,
    display: Any = None,
    tta: Sequence[str] = (),
) -> Iterator[Row]:
    """A row for each image, as they are done: `path`, `class_index`, `label`, `probability`, `label_2` …, `error`.

    Images are paths as `pictures` takes them, PIL images, or uint8 arrays; one may stand alone. A
    file that cannot be read keeps its row, its label empty and the reason in `error`.
    `probability_of_each` adds a column `p:CLASS` for every class.
    A model of several labels an image adds `labels`, all whose probability is 0.5 or more, joined by `|`.
    A model of quantities gives `path`, `value` (of several `value:NAME` each), `error`, and takes no option of classes.
    `temperature` divides the logits: a number, or "fitted", the one found on the run's validation images. Where the
    largest probability is below `unknown` the label is `unknown`, its class_index -1. `features` is given the paths and
    the features [n, d] of each chunk. No more than two chunks of pictures are in memory, however many there are. Raises
    UserError at once, not with the first row, where there are no images or an option is wrong.
    """
    if model.quantities and (top_k > 1 or probability_of_each or temperature is not None or unknown is not None):
        raise UserError(
            "The model predicts numbers; --top-k, --probabilities, --temperature and --unknown are about classes."
        )
    scale, tta = temperature_of(model, temperature), _views(model, tta)
    if isinstance(images, str | Path | Image.Image) or getattr(images, "ndim", 0) in (2, 3):
        images = [images]
    if not isinstance(images, Sequence | np.ndarray) and not hasattr(images, "__array__"):
        raise UserError(f"Images are paths, PIL images or arrays, or a list of them, not {type(images).__name__}.")
    if top_k < 1 or batch < 1:
        raise UserError(f"top_k is {top_k} and batch {batch}; at least 1 is expected of each.")
    if unknown is not None and not 0 <= unknown <= 1:
        raise UserError(f"--unknown is {unknown}; a probability from 0 to 1 is expected.")
    paths = [i for i in images if isinstance(i, str | Path)]
    if paths and len(paths) < len(images):
        raise UserError("Images are paths, or arrays and PIL images: not both in one call.")
    if paths:
        dataset, excluded = pictures(paths, model.classes)
    else:
        dataset, excluded = sources.arrays(list(images), np.zeros(len(images), np.int32), ["?"]), []
    chunks = run_chunks(model, dataset, batch=batch, display=display, tta=tta, features=features is not None)

    empty = dict.fromkeys(columns(model), "")

    def unread(name: str, reason: str) -> dict[str, Any]:
        return {**empty, "path": name, "error": reason}

    def rows() -> Iterator[Row]:
        begun = 0
        for done in chunks:
            told: dict[int, dict[str, Any]] = {}
            if model.quantities:
                likely = done.logits
            else:
                likely = probabilities(done.logits / np.float32(scale), model.multi_label)
            for place, p in zip(done.kept.tolist(), likely, strict=True):
                if model.quantities:
                    said: dict[str, Any] = {**value_row(p, model.classes)}
                else:
                    said = row(p, model.classes, top_k, unknown, model.multi_label)
                told[place] = {"path": dataset.names[place], **said, "error": ""}
                if probability_of_each:
                    told[place] |= {f"p:{c}": float(v) for c, v in zip(model.classes, p, strict=True)}
            end = min(begun + CHUNK, len(dataset))
            missing = (place for place in range(begun, end) if place not in told)
            told |= {place: unread(name, why) for place, (name, why) in zip(missing, done.excluded, strict=True)}
            if features is not None and done.features is not None:
                features([dataset.names[i] for i in done.kept], done.features)
            yield from (told[place] for place in range(begun, end))
            begun = end
        yield from (unread(name, why) for name, why in excluded)

    return rows()


def write_predictions(
    outs: Sequence[tuple[str | Path | Writable, str | None]],
    model: Bundle,
    images: Sequence[Any],
    *,
    top_k: int = 1,
    probability_of_each: bool = False,
    **options: Any,
) -> tuple[int, int]:
    """Write the rows of `predict_rows`, whose options it takes, as they are done: to files and to open streams.

    Each of `outs` is a place with its kind, see `jft.table.rows_to`. Returns the number of rows, and of those whose
    image cannot be read.
    """
    told = columns(model, top_k, probability_of_each)
    count = bad = 0
    with contextlib.ExitStack() as stack:
        rows = predict_rows(model, images, top_k=top_k, probability_of_each=probability_of_each, **options)
        files = [(os.path.expanduser(out) if isinstance(out, str | Path) else out, kind) for out, kind in outs]
        writes = [stack.enter_context(rows_to(out, told, kind)) for out, kind in files]
        for one in rows:
            for write in writes:
                write([one])
            count, bad = count + 1, bad + bool(one["error"])
    return count, bad


def predict(
    where: str | Path | Bundle, images: Sequence[Any] | np.ndarray | Path | Image.Image, **options: Any
) -> list[dict[str, Any]]:
    """All the rows of `predict_rows`, whose options it takes, of a model or of the folder of one."""
    model = where if isinstance(where, Bundle) else open_model(where)
    return [dict(told) for told in predict_rows(model, images, **options)]


def row(
    p: np.ndarray, classes: Sequence[str], top_k: int = 1, unknown: float | None = None, several: bool = False
) -> dict[str, Any]:
    """The columns of one image's prediction: `class_index`, `label`, `probability`, then `label_2`, …

    Of `several` labels an image also `labels`, after `probability`: all of 0.5 or more, as a CSV of labels has them.

    >>> row(np.array([0.5, 0.1, 0.8]), ["cat", "dog", "sofa"], several=True)["labels"]
    'cat|sofa'
    """
    best = np.argsort(-p, kind="stable")[:top_k]
    told: dict[str, Any] = {"class_index": int(best[0])}
    for rank, i in enumerate(best, 1):
        suffix = "" if rank == 1 else f"_{rank}"
        told |= {f"label{suffix}": classes[i], f"probability{suffix}": float(p[i])}
        if several and rank == 1:
            told["labels"] = "|".join(c for c, v in zip(classes, p, strict=True) if v >= 0.5)
    if unknown is not None and p[best[0]] < unknown:
        told |= {"class_index": -1, "label": UNKNOWN}
    return told


def value_row(y: np.ndarray, names: Sequence[str], kind: str = sources.VALUE) -> dict[str, float]:
    """The columns of one image's quantities: `value`, or where they have names of their own `value:NAME` each.

    >>> value_row(np.array([2.5, 40.0]), ["width", "height"])
    {'value:width': 2.5, 'value:height': 40.0}
    """
    alone = tuple(names) == (sources.VALUE,)
    return {kind if alone else f"{kind}:{name}": float(v) for name, v in zip(names, y, strict=True)}


def columns(model: Bundle, top_k: int = 1, probability_of_each: bool = False) -> dict[str, type]:
    """The columns of `predict_rows` with their types, as `jft.table.rows_to` takes them."""
    classes = model.classes
    if model.quantities:
        return {"path": str, **dict.fromkeys(value_row(np.zeros(len(classes)), classes), float), "error": str}
    told: dict[str, type] = {"path": str, "class_index": int, "label": str, "probability": float}
    if model.multi_label:
        told["labels"] = str
    for rank in range(2, min(top_k, len(classes)) + 1):
        told |= {f"label_{rank}": str, f"probability_{rank}": float}
    if probability_of_each:
        told |= {f"p:{c}": float for c in classes}
    return told | {"error": str}


def temperature_of(model: Bundle, given: float | str | None) -> float:
    """What logits are divided by: 1, a number, or the one fitted on validation images. Raises UserError."""
    if given is None:
        return 1.0
    if given == "fitted":
        if model.temperature is None:
            raise UserError("This model has no fitted temperature: jft fits one when a run ends. Give a number.")
        return model.temperature
    try:
        value = float(given)
    except ValueError:
        value = 0.0
    if not 0 < value < np.inf:
        raise UserError(f"--temperature is {given}; a number above 0 is expected, or `fitted`.")
    return value


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature at which the logits [n, k] give the labels the least log loss (Guo et al. 2017, §4.2).

    `labels` are indices [n], or zeros and ones [n, k] where an image can have several. Within 0.05 to 20: of a set
    without a mistake the least loss is at 0, which would make every answer certain.
    """
    x = np.asarray(logits, np.float64)

    def rises(log_t: float) -> bool:
        # The loss is convex in 1 / t, so one sign of its slope says on which side the least lies.
        z = x / np.exp(log_t)
        if labels.ndim == 2:
            return bool(np.sum((0.5 * (1 + np.tanh(z / 2)) - labels) * x) < 0)
        p = np.exp(z - z.max(axis=1, keepdims=True))
        expected = np.sum(p * x, axis=1) / p.sum(axis=1)
        return bool(np.sum(expected - np.take_along_axis(x, np.asarray(labels)[:, None], axis=1)[:, 0]) < 0)

    low, high = float(np.log(0.05)), float(np.log(20))
    for _ in range(30):  # scipy's minimiser, which takes half a second to import, needs as many
        middle = (low + high) / 2
        low, high = (low, middle) if rises(middle) else (middle, high)
    return float(np.exp((low + high) / 2))
