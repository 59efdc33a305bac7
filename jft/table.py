"""Tables written row by row, whole or not at all: CSV, TSV, JSON lines, parquet; and features, as .npz or parquet."""

import csv
import json
import re
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from jft.errors import UserError
from jft.files import writing

Row = Mapping[str, Any]
FORMULA = ("=", "+", "-", "@", "\t", "\r", "＝", "＋", "－", "＠")
NUMBER = re.compile(r"[-+]?[0-9.]+(e[-+]?[0-9]+)?")
KINDS = {
    "": "csv", ".csv": "csv", ".txt": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl",
    ".parquet": "parquet",
}  # fmt: skip
PROBABILITIES = ("probability", "p:")  # how the names of their columns begin
GROUP = 8192  # rows in memory before a parquet file gets them


@runtime_checkable
class Writable(Protocol):
    """An open text file, standard output, or whatever else takes text."""

    def write(self, text: str, /) -> Any:
        """Take this text."""


def kind_of(path: str | Path) -> str:
    """What a table is written as by its file's ending: csv, tsv, jsonl or parquet. Raises UserError for any other."""
    ending = Path(path).suffix.lower()
    if ending not in KINDS:
        raise UserError(
            f"{path}: a table is written as {', '.join(filter(None, KINDS))}, or without an ending as CSV; {ending} is "
            "none of them. Give the file another ending."
        )
    return KINDS[ending]


def check(path: Path) -> None:
    """Raises UserError where no table can be written to this path, before the work of making one."""
    if kind_of(path) == "parquet":
        _pyarrow()
    _check_place(path)


def _check_place(path: Path) -> None:
    if not path.parent.is_dir():
        raise UserError(f"{path} cannot be written: there is no folder {path.parent}.")
    if path.is_dir():
        raise UserError(f"{path} cannot be written: it is a folder.")


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A file to write to that takes the place of `path` once all of it is written. Raises UserError."""
    _check_place(path)
    try:
        with writing(path) as part:
            yield part
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}.") from None


@contextmanager
def rows_to(
    out: str | Path | Writable, columns: Mapping[str, type], kind: str | None = None
) -> Iterator[Callable[[Iterable[Row]], None]]:
    """A function that appends rows to a file, which appears when all are written, or to an open stream.

    `columns` are names with their types: str, int or float; a cell that is missing, None or empty is empty. `kind` is
    csv, tsv (tabs for commas), jsonl or parquet, by default what the file's ending says. CSV is quoted as RFC 4180 has
    it, and no cell of it is a formula to a spreadsheet (see `harmless`). Raises UserError for an ending of no table.

    >>> with rows_to("preds.csv", {"path": str, "probability": float}) as write:
    ...     write([{"path": "x.jpg", "probability": 0.98}])
    """
    if not isinstance(out, str | Path):
        yield _text_writer(out, columns, kind or "csv")
        return
    path = Path(out)
    kind = kind or kind_of(path)
    with beside(path) as part:
        if kind == "parquet":
            with _parquet(part, columns) as write:
                yield write
        else:
            with open(part, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
                yield _text_writer(file, columns, kind)


def _text_writer(file: Writable, columns: Mapping[str, type], kind: str) -> Callable[[Iterable[Row]], None]:
    if kind == "jsonl":

        def write_json(rows: Iterable[Row]) -> None:
            for row in rows:
                file.write(json.dumps({c: row[c] for c in columns if c in row}, ensure_ascii=False) + "\n")

        return write_json
    tabs = "\t" if kind == "tsv" else ","
    writer = csv.DictWriter(file, list(columns), restval="", lineterminator="\n", delimiter=tabs)
    writer.writeheader()

    def write_csv(rows: Iterable[Row]) -> None:
        for row in rows:
            writer.writerow({c: _number(c, v) if isinstance(v, float) else harmless(c, v) for c, v in row.items()})

    return write_csv


def _number(column: str, value: float) -> str:
    """A probability to six digits; a quantity to all it has, of a float32 the fewest that say which it is."""
    if column.startswith(PROBABILITIES):
        return f"{value:.6g}"
    with np.errstate(over="ignore"):
        single = np.float32(value)
    return repr(float(str(single)) if float(single) == value else float(value))


def harmless(column: str, value: Any) -> Any:
    """A cell that no spreadsheet takes for a formula: `=x.png` as `./=x.png`, the same file; other text after a quote.

    Numbers as text stay as they are (OWASP, "CSV Injection").
    """
    if not isinstance(value, str) or not value.startswith(FORMULA) or NUMBER.fullmatch(value):
        return value
    return f"./{value}" if column == "path" else f"'{value}"


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError('Parquet needs pyarrow: pip install "jft[parquet]". CSV and .jsonl need nothing.') from None
    return pyarrow


@contextmanager
def _parquet(path: Path, columns: Mapping[str, type]) -> Iterator[Callable[[Iterable[Row]], None]]:
    pa = _pyarrow()
    kinds = {str: pa.string(), int: pa.int64(), float: pa.float64()}
    schema = pa.schema([(name, kinds[kind]) for name, kind in columns.items()])
    waiting: list[dict[str, Any]] = []
    with pa.parquet.ParquetWriter(str(path), schema) as writer:

        def flush() -> None:
            writer.write_table(pa.Table.from_pylist(waiting, schema))
            waiting.clear()

        def write(rows: Iterable[Row]) -> None:
            for row in rows:
                waiting.append(
                    {c: None if kind is not str and row.get(c) == "" else row.get(c) for c, kind in columns.items()}
                )
                if len(waiting) >= GROUP:
                    flush()

        yield write
        flush()


@contextmanager
def features_to(out: str | Path) -> Iterator[Callable[[Sequence[str], np.ndarray], None]]:
    """A function that appends names and features, float32 [n, d], to a .npz or .parquet file, written as they come.

    The .npz has `features` [n, d] and `paths` [n]; the parquet the columns `path` and `features`, a list of d.
    """
    path = Path(out)
    if path.suffix.lower() not in (".npz", ".parquet"):
        raise UserError(f"--features {path}: features are written as .npz or .parquet.")
    with (
        beside(path) as part,
        (_features_parquet if path.suffix.lower() == ".parquet" else _features_npz)(part) as write,
    ):
        yield write


@contextmanager
def _features_parquet(path: Path) -> Iterator[Callable[[Sequence[str], np.ndarray], None]]:
    pa = _pyarrow()
    writer: Any = None

    def write(names: Sequence[str], rows: np.ndarray) -> None:
        nonlocal writer
        kind = pa.list_(pa.float32(), rows.shape[1])
        schema = pa.schema([("path", pa.string()), ("features", kind)])
        writer = writer or pa.parquet.ParquetWriter(str(path), schema)
        flat = pa.array(np.ascontiguousarray(rows, np.float32).reshape(-1))
        columns = [pa.array(list(names), pa.string()), pa.FixedSizeListArray.from_arrays(flat, type=kind)]
        writer.write_table(pa.Table.from_arrays(columns, schema=schema))

    try:
        yield write
        if writer is None:
            raise UserError("There is no image to take features of, so no file of them was written.")
    finally:
        if writer is not None:
            writer.close()


@contextmanager
def _features_npz(path: Path) -> Iterator[Callable[[Sequence[str], np.ndarray], None]]:
    paths: list[str] = []
    width = 0
    # An .npy says in its first bytes how many rows follow, so they wait in a file of their own until that is known.
    with tempfile.TemporaryFile(dir=path.parent) as raw:

        def write(names: Sequence[str], rows: np.ndarray) -> None:
            nonlocal width
            paths.extend(names)
            width = rows.shape[1]
            raw.write(np.ascontiguousarray(rows, np.float32).tobytes())

        yield write
        raw.seek(0)
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            with archive.open("features.npy", "w", force_zip64=True) as member:
                header = {"descr": "<f4", "fortran_order": False, "shape": (len(paths), width)}
                np.lib.format.write_array_header_2_0(member, header)
                shutil.copyfileobj(raw, member, 1 << 20)
            with archive.open("paths.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.array(paths, str), allow_pickle=False)
