"""Tables: what a file's ending makes of them, and numbers that are read back as they were."""

import csv
import json

import numpy as np
import pytest

from jft import cli, table
from jft.errors import UserError

COLUMNS = {"path": str, "probability": float, "p:a": float, "value:year": float}
DIGITS = [1234567.0, 20231128.0, 0.1, -1e-9, 1e300, 123456789.123, float("inf")]


def written(path, rows):
    with table.rows_to(path, COLUMNS) as write:
        write(rows)
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize("value", DIGITS)
def test_quantities_keep_all_their_digits_and_probabilities_six(tmp_path, value):
    text = written(tmp_path / "a.csv", [{"path": "x", "probability": 1 / 3, "p:a": 2 / 3, "value:year": value}])
    (row,) = csv.DictReader(text.splitlines())
    assert float(row["value:year"]) == value
    assert (row["probability"], row["p:a"]) == ("0.333333", "0.666667")


def test_a_float32_has_no_more_digits_than_say_which_it_is(tmp_path):
    for value, told in ((np.float32(0.3), "0.3"), (np.float32(1234567.0), "1234567.0"), (np.float32(1e-7), "1e-07")):
        text = written(tmp_path / "a.csv", [{"path": "x", "value:year": float(value)}])
        assert text.splitlines()[1] == f"x,,,{told}" and np.float32(told) == value


def test_the_ending_says_what_is_written(tmp_path):
    row = {"path": "a,b.png", "value:year": 2.5}
    assert written(tmp_path / "a.tsv", [row]) == "path\tprobability\tp:a\tvalue:year\na,b.png\t\t\t2.5\n"
    assert [json.loads(line) for line in written(tmp_path / "a.NDJSON", [row]).splitlines()] == [row]
    for name in ("a", "a.txt", "a.CSV"):
        assert written(tmp_path / name, [row]).splitlines()[1] == '"a,b.png",,,2.5'


@pytest.mark.parametrize("name", ["preds.json", "preds.json5", "preds.xlsx", "preds.csv.gz"])
def test_another_ending_is_refused_before_any_work(tmp_path, name, capsys):
    for refused in (lambda: table.check(tmp_path / name), lambda: written(tmp_path / name, [])):
        with pytest.raises(UserError, match=r"\.csv, \.txt, \.tsv, \.jsonl, \.ndjson, \.parquet, or without"):
            refused()
    for words in (
        ["predict", str(tmp_path / "no-run"), "x.png", "--out", str(tmp_path / name)],
        ["finetune", "--data", str(tmp_path), "--predict", str(tmp_path), "--out", str(tmp_path / name)],
        ["finetune", "--workdir", str(tmp_path), "--predict", str(tmp_path), "--out", str(tmp_path / name)],
    ):
        (tmp_path / "x.png").write_bytes(b"")
        assert cli.main(words) == 2 and "a table is written as" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["x.png"]
