"""The fine-tuned model as a folder: weights, what they were trained for, and how a picture is prepared for them."""

import csv
import json
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from jft import __version__
from jft.errors import UserError
from jft.models import make_model
from jft.models.base import Model
from jft.preprocess import Preprocess
from jft.weights import open_weights
from jft.weights.writers import write_safetensors

FORMAT = 1


@runtime_checkable
class Writable(Protocol):
    """An open text file, standard output, or whatever else takes text."""

    def write(self, text: str, /) -> Any:
        """Take this text."""


@dataclass(frozen=True)
class Bundle:
    """A model with its weights, its classes in order, and the preprocessing its weights were trained with.

    >>> model = jft.load("runs/bees/model")
    >>> model.predict(["x.jpg"])
    [{'path': 'x.jpg', 'class_index': 1, 'label': 'bees', 'probability': 0.98, 'error': ''}]
    """

    model: Model
    params: Mapping[str, np.ndarray]
    batch_stats: Mapping[str, np.ndarray]
    classes: tuple[str, ...]
    preprocess: Preprocess
    multi_label: bool = False  # whether an image can have several labels: sigmoids, not a softmax

    def predict(self, images: Sequence[Any], top_k: int = 1) -> list[dict[str, Any]]:
        """A row for each image (path, folder, PIL image or uint8 array) as `jft predict` writes it."""
        from jft.use import predict

        return predict(self, images, top_k=top_k)


def save(
    folder: str | Path,
    *,
    model_name: str,
    model_options: Mapping[str, Any],
    params: Mapping[str, np.ndarray],
    batch_stats: Mapping[str, np.ndarray],
    classes: Sequence[str],
    preprocess: Preprocess,
    multi_label: bool = False,
    card: str = "",
) -> None:
    """Write a bundle; the folder appears, or replaces the one there was, when it is whole.

    `model_options` are those of `make_model`, as JSON takes them.
    """
    folder = Path(folder)
    beside = folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}.part")
    beside.mkdir(parents=True)
    try:
        write_safetensors(beside / "model.safetensors", {**params, **batch_stats}, {"format": "jft"})
        with open_weights(beside / "model.safetensors") as file:
            sha256 = file.sha256
        about = {
            "format": FORMAT,
            "jft": __version__,
            "model": model_name,
            "options": dict(model_options),
            "classes": list(classes),
            "multi_label": multi_label,
            "preprocess": asdict(preprocess),
            "batch_stats": sorted(batch_stats),
            "sha256": sha256,
        }
        (beside / "config.json").write_text(json.dumps(about, indent=1) + "\n", encoding="ascii")
        if card:
            (beside / "README.md").write_text(card, encoding="utf-8", errors="replace")
        if folder.exists():
            old = folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}.old")
            folder.rename(old)
            beside.rename(folder)
            shutil.rmtree(old)
        else:
            beside.rename(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def load(folder: str | Path) -> Bundle:
    """The bundle in a folder. Raises UserError where there is none, or where it is damaged or of a newer format."""
    folder = Path(folder)
    file = folder / "config.json"
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
        version = about["format"]
    except FileNotFoundError:
        raise UserError(f"{folder} holds no model: there is no config.json. A run's model is in RUN/model.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is no bundle's, or damaged ({error!r}).") from None
    if version != FORMAT:
        raise UserError(f"{folder} is a bundle of format {version}; this jft {__version__} reads {FORMAT}. Update jft.")
    try:
        name, sha256, classes = str(about["model"]), str(about["sha256"]), tuple(map(str, about["classes"]))
        stats, multi_label = set(about["batch_stats"]), bool(about["multi_label"])
        options, preprocess = _tuples(about["options"]), Preprocess(**_tuples(about["preprocess"]))
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is damaged ({error!r}). Copy the folder again.") from None
    with open_weights(folder / "model.safetensors") as weights:
        if weights.sha256 != sha256:
            raise UserError(
                f"{weights.path} is damaged: its sha256 is not the one in config.json. Train or copy it again."
            )
        arrays = {n: weights.read(n) for n in weights.names}
    model = make_model(name, **options)
    expected = {n: s.shape for shapes in model.shapes() for n, s in shapes.items()}
    found = {n: a.shape for n, a in arrays.items()}
    if expected != found:
        odd = sorted({n for n, _ in expected.items() ^ found.items()})
        raise UserError(f"{folder} does not hold a {name}: {', '.join(odd[:5])} differ.")
    params = {n: a for n, a in arrays.items() if n not in stats}
    batch_stats = {n: a for n, a in arrays.items() if n in stats}
    return Bundle(model, params, batch_stats, classes, preprocess, multi_label)


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON's lists as the tuples they were."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}


def write_predictions(out: str | Path | Writable, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows as CSV: `path,class_index,label,probability`, `label_2,probability_2` …, `error`; whole or not at all.

    Quoted as RFC 4180 has it. Values are written as they are: a path or class that starts with `=` would be a formula
    to a spreadsheet, but with a quote before it the path would name no file.
    """
    known = ["path", "true_label", "class_index", "label", "probability"]
    columns = [c for c in known if c == "path" or any(c in row for row in rows) or c != "true_label"]
    more = {c for row in rows for c in row} - {*known, "error"}
    columns += [*sorted(more, key=lambda c: (int(c.rsplit("_", 1)[1]), c)), "error"]
    if not isinstance(out, str | Path):
        _write_rows(out, columns, rows)
        return
    path = Path(out)
    if not path.parent.is_dir():
        raise UserError(f"{path} cannot be written: there is no folder {path.parent}.")
    beside = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        with open(beside, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            _write_rows(file, columns, rows)
        os.replace(beside, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}.") from None
    finally:
        beside.unlink(missing_ok=True)


def _write_rows(file: Writable, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({c: f"{v:.6g}" if isinstance(v, float) else v for c, v in row.items()})
