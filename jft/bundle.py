"""The fine-tuned model as a folder: weights, what they were trained for, and how a picture is prepared for them."""

import hashlib
import json
import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jft import __version__
from jft.data.sources import VALUE
from jft.errors import UserError, brief, printable
from jft.files import exchange
from jft.models import make_model
from jft.models.base import Model
from jft.preprocess import Preprocess
from jft.table import Writable, rows_to
from jft.weights import locate, native, open_weights
from jft.weights.writers import write_safetensors

MAX_OPTION = 1_000_000  # of the numbers that describe a model
FORMAT = 2  # 1 had no checksum of its description


@dataclass(frozen=True)
class Bundle:
    """A model with its weights, its classes in order, and the preprocessing its weights were trained with.

    >>> model = jft.load("runs/bees")
    >>> model.predict(["x.jpg"])
    [{'path': 'x.jpg', 'class_index': 1, 'label': 'bees', 'probability': 0.98, 'error': ''}]
    """

    model: Model
    params: Mapping[str, np.ndarray]
    batch_stats: Mapping[str, np.ndarray]
    classes: tuple[str, ...]
    preprocess: Preprocess
    multi_label: bool = False  # whether an image can have several labels: sigmoids, not a softmax
    temperature: float | None = None  # fitted on the run's validation images; predictions apply it when asked
    quantities: bool = False  # whether it says numbers, named by `classes`, instead of classes

    def predict(self, images: Any, top_k: int = 1, **options: Any) -> list[dict[str, Any]]:
        """A row for each image (path, folder, glob, PIL image or uint8 array) as `jft predict` has it; a list, or one.

        The options are those of `jft.use.predict_rows`, such as `temperature`, `unknown` and `tta`.
        """
        from jft.use import predict

        return predict(self, images, top_k=top_k, **options)


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
    temperature: float | None = None,
    quantities: bool = False,
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
            "temperature": temperature,
            "quantities": quantities,
            "preprocess": asdict(preprocess),
            "batch_stats": sorted(batch_stats),
            "sha256": sha256,
        }
        about["sum"] = _sum(about)
        (beside / "config.json").write_text(json.dumps(about, indent=1) + "\n", encoding="ascii")
        if card:
            (beside / "README.md").write_text(card, encoding="utf-8", errors="replace")
        if not folder.exists():
            beside.rename(folder)
        elif not exchange(beside, folder):  # or else the old one lies there now
            old = folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}.old")
            folder.rename(old)
            beside.rename(folder)
            shutil.rmtree(old)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def folder_of(where: str | Path) -> Path:
    """The folder of the bundle in a run's folder, in a bundle's, or at `hf:ORG/REPO`, whether or not there is one."""
    folder = locate(where).path.parent if str(where).startswith("hf:") else Path(where).expanduser()
    return folder / "model" if (folder / "model" / "config.json").is_file() else folder


def load(where: str | Path) -> Bundle:
    """The model in a run's folder, in a bundle's, or at `hf:ORG/REPO`, where `jft push` put it.

    Raises UserError where there is none, or where it is damaged or of a newer format.
    """
    folder = folder_of(where)
    file = folder / "config.json"
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
        version, digest = about["format"], _sum(about)
    except FileNotFoundError:
        runs = [file.parent for of in ("*/seed*", "trials/*") for file in sorted(folder.glob(f"{of}/config.json"))]
        if runs:
            raise UserError(f"{folder} holds {len(runs)} runs. Name one of them, such as {runs[0]}.") from None
        if not folder.exists():
            raise UserError(f"There is no folder {folder}.") from None
        raise UserError(f"{folder} holds no model: there is no config.json. A run's model is in RUN/model.") from None
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise UserError(f"{file} is no bundle's, or damaged ({error!r}).") from None
    if version == FORMAT and about.get("sum") != digest:
        raise UserError(f"{file} is damaged, or was changed by hand: its checksum is wrong. Copy or train it again.")
    if version not in (1, FORMAT):
        raise UserError(f"{folder} is a bundle of format {version}; this jft {__version__} reads {FORMAT}. Update jft.")
    try:
        name, sha256 = str(about["model"]), str(about["sha256"])
        classes = tuple(printable(str(n)) for n in about["classes"])
        stats, multi_label = set(about["batch_stats"]), bool(about["multi_label"])
        temperature = None if about.get("temperature") is None else float(about["temperature"])
        quantities = bool(about.get("quantities"))  # older descriptions say nothing of it
        options, preprocess = _tuples(about["options"]), Preprocess(**_tuples(about["preprocess"])).checked()
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{file} is damaged ({error!r}). Copy the folder again.") from None
    with open_weights(folder / "model.safetensors") as weights:
        if weights.sha256 != sha256:
            raise UserError(
                f"{weights.path} is damaged: its sha256 is not the one in config.json. Train or copy it again."
            )
        arrays = {n: weights.read(n) for n in weights.names}
    model, expected = _described(file, name, options, len(arrays))
    if len(classes) != model.num_classes:
        raise UserError(
            f"{file} is damaged: it names {len(classes)} classes of a head of {model.num_classes}. "
            "Copy the folder again."
        )
    found = {n: a.shape for n, a in arrays.items()}
    if expected != found:
        odd = sorted({n for n, _ in expected.items() ^ found.items()})
        raise UserError(f"{folder} does not hold a {name}: {', '.join(odd[:5])} differ.")
    params = {n: a for n, a in arrays.items() if n not in stats}
    batch_stats = {n: a for n, a in arrays.items() if n in stats}
    return Bundle(model, params, batch_stats, classes, preprocess, multi_label, temperature, quantities)


def _described(
    file: Path, name: str, options: Mapping[str, Any], tensors: int
) -> tuple[Model, dict[str, tuple[int, ...]]]:
    """The model of a description that may be a stranger's, and its shapes. Raises UserError."""
    for option, value in options.items():
        for number in value if isinstance(value, tuple) else (value,):
            # No model has more blocks than its file has tensors; one of 10**9 would be built before it is refused.
            limit = tensors if option in ("depth", "layers", "depths") else MAX_OPTION
            if isinstance(number, int) and abs(number) > limit:
                raise UserError(f"{file} is damaged: its option {option!r} is {number}. Copy the folder again.")
    try:
        model = make_model(name, **options)
        return model, {n: s.shape for shapes in model.shapes() for n, s in shapes.items()}
    except (UserError, MemoryError):
        raise
    except Exception as error:  # whatever a model's own code makes of numbers that no model has
        raise UserError(f"{file} describes no {brief(name, 80)} that there can be: {brief(str(error), 300)}") from None


def find(source: str | Path) -> Path | None:
    """The folder of the bundle that is meant by weights (a run, a bundle, `hf:ORG/REPO`); None where it is none."""
    if not str(source).startswith("hf:") and (Path(source) / "model" / "config.json").is_file():
        return Path(source) / "model"
    located = locate(source)
    return located.path.parent if native.described(located.configs) else None


def _sum(about: Mapping[str, Any]) -> str:
    """A digest of a bundle's description, the digest itself aside."""
    text = json.dumps({k: v for k, v in about.items() if k != "sum"}, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON's lists as the tuples they were."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}


def write_predictions(out: str | Path | Writable, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows as CSV: `path,class_index,label,probability`, `label_2,probability_2` …, `error`; whole or not at all.

    Rows of several labels an image have `labels` too. Columns `p:CLASS`, a class's probability each, come in the order
    of the first row. Rows of quantities have the columns of the first.
    """
    if rows and any(column.partition(":")[0] == VALUE for column in rows[0]):
        with rows_to(out, {column: type(value) for column, value in rows[0].items()}, "csv") as write:
            write(rows)
        return
    known = ["path", "true_label", "class_index", "label", "probability", "labels"]
    columns = [c for c in known if c not in ("true_label", "labels") or any(c in row for row in rows)]
    each = [c for row in rows[:1] for c in row if c.startswith("p:")]
    more = {c for row in rows for c in row} - {*known, *each, "error"}
    columns += [*sorted(more, key=lambda c: (int(c.rsplit("_", 1)[1]), c)), *each, "error"]
    with rows_to(out, dict.fromkeys(columns, str), "csv") as write:
        write(rows)
