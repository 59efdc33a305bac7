"""The metrics log of a run: `metrics.jsonl`, one JSON object a line, appended and never rewritten while training."""

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jft.errors import UserError
from jft.files import writing

# JSON has no NaN and no infinities. Their names as strings (protobuf's JSON does the same) keep a diverged loss
# visible, which null would not, and float(…) and pandas read them back.
_UNREAL = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_encode = json.JSONEncoder(allow_nan=False, default=lambda value: plain(value)).encode


class MetricsLog:
    """An append-only file of rows such as `{"step": 120, "stage": "head", "loss": 0.31}`.

    A row reaches the operating system before `write` returns, in one call, so a killed run loses at most half of its
    last line; opening the log again removes that half.

    >>> log = MetricsLog("runs/bees/metrics.jsonl")
    >>> log.write({"step": 1, "stage": "head", "loss": 0.69})
    >>> log.truncate(step=0)          # on resume: forget what lies after the restored step
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._mend()
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115  (closed by close)

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row. Values may be numbers, strings, lists, dicts, and NumPy or JAX scalars."""
        self.write_all([row])

    def write_all(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows, in one call."""
        lines = b"".join(_line(row) for row in rows)
        while lines:  # a full disk takes a part; asked for the rest it says why
            lines = lines[self._file.write(lines) or 0 :]

    def flush(self) -> None:
        """Return when all rows lie on the disk: a checkpoint that outlives the power must not outlive its rows."""
        os.fsync(self._file.fileno())

    def truncate(self, step: int) -> None:
        """Remove the rows whose `step` is greater than `step`; rows without a step stay."""
        kept = [line for line, row in _rows(self.path) if not row.get("step", step) > step]
        with writing(self.path) as part:
            part.write_bytes(b"".join(kept))
            self._file.close()
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115

    def close(self) -> None:
        """Close the file; a closed log takes no more rows."""
        self._file.close()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _mend(self) -> None:
        if not self.path.exists() or (content := self.path.read_bytes()).endswith(b"\n") or not content:
            return
        with open(self.path, "r+b") as file:
            file.truncate(content.rfind(b"\n") + 1)


def read(path: str | Path) -> list[dict[str, Any]]:
    """All rows of a log; a half-written last line is left out, NaN and infinities are floats again.

    Raises UserError where a line before the last is damaged: that is no interrupted write.
    """
    return [row for _, row in _rows(Path(path))]


def _rows(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Each whole line and its meaning."""
    whole = path.read_bytes().rpartition(b"\n")[0]
    rows = []
    for number, line in enumerate(whole.split(b"\n") if whole else [], 1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("not an object")
        except ValueError as error:
            raise UserError(
                f"{path}, line {number}: expected one JSON object, found {line[:60]!r} ({error}). "
                "Remove that line, or restore the file."
            ) from None
        rows.append((line + b"\n", {key: _real(value) for key, value in row.items()}))
    return rows


def _line(row: Mapping[str, Any]) -> bytes:
    try:
        return _encode(row).encode() + b"\n"
    except ValueError:  # NaN and infinities, or an array, which `plain` tells
        return _encode(plain(row)).encode() + b"\n"


def plain(value: Any) -> Any:
    """The value as JSON takes it: NumPy and JAX scalars as numbers, NaN and infinities by name."""
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if hasattr(value, "item"):  # a NumPy or JAX scalar
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _real(value: Any) -> Any:
    if isinstance(value, str):
        return _UNREAL.get(value, value)
    if isinstance(value, dict):
        return {key: _real(inner) for key, inner in value.items()}
    return value
