"""The metrics log, the live display, and the report of a run."""

import json
import math

import numpy as np
import pytest

from jft.errors import UserError
from jft.report import log


def test_log_reads_what_was_written(tmp_path):
    with log.MetricsLog(path := tmp_path / "new" / "metrics.jsonl") as file:
        file.write({"step": 1, "stage": "头 \udcff", "loss": np.float32(0.5), "lr": {"head": 0.1}, "best": True})
        file.write({"step": np.int64(2), "loss": math.nan, "norm": -math.inf, "lr": {"head": np.float32("inf")}})
    rows = log.read(path)
    assert rows[0] == {"step": 1, "stage": "头 \udcff", "loss": 0.5, "lr": {"head": 0.1}, "best": True}
    assert math.isnan(rows[1]["loss"]) and rows[1]["norm"] == -math.inf and rows[1]["lr"]["head"] == math.inf
    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_log_is_flushed_and_appended_to(tmp_path):
    path = tmp_path / "m.jsonl"
    with log.MetricsLog(path) as first:
        first.write({"step": 1})
        assert log.read(path) == [{"step": 1}]  # seen while the writer is still open
    with log.MetricsLog(path) as second:
        second.write({"step": 2})
    assert log.read(path) == [{"step": 1}, {"step": 2}]


def test_log_truncates_and_goes_on(tmp_path):
    path = tmp_path / "m.jsonl"
    with log.MetricsLog(path) as file:
        file.truncate(0)  # nothing there yet
        for step in range(1, 6):
            file.write({"step": step, "loss": math.nan})
        file.write({"note": "no step"})
        before = path.read_bytes().splitlines()
        file.truncate(3)
        file.write({"step": 4})
    assert [row.get("step") for row in log.read(path)] == [1, 2, 3, None, 4]
    assert path.read_bytes().splitlines()[:3] == before[:3]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("half", ['{"step": 2, "lo', '{"step": 2}'])
def test_half_a_last_line_is_removed(tmp_path, half):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n' + half)
    assert log.read(path) == [{"step": 1}]
    with log.MetricsLog(path) as file:
        file.write({"step": 2})
    assert log.read(path) == [{"step": 1}, {"step": 2}]


def test_nothing_but_half_a_line(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"st')
    assert log.read(path) == []
    log.MetricsLog(path).close()
    assert path.read_bytes() == b""


@pytest.mark.parametrize("bad", ["garbage", "[1]", ""])
def test_damage_inside_the_log_is_named(tmp_path, bad):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n' + bad + '\n{"step": 3}\n')
    with pytest.raises(UserError, match="line 2"):
        log.read(path)
