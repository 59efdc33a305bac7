"""The benchmarks of speed: what they make of their measurements, and that they run, tiny and without their peers."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import gpu
    import growth
    import harness
    import peer

    return {"gpu": gpu, "growth": growth, "harness": harness, "peer": peer}


def test_idle_is_what_no_kernel_covers(scripts, tmp_path):
    name = {"ph": "M", "name": "process_name"}
    kernel = {"ph": "X", "name": "kernel", "pid": 1}
    events = [
        name | {"pid": 1, "args": {"name": "/device:GPU:0"}},
        name | {"pid": 2, "args": {"name": "/host:CPU"}},
        kernel | {"ts": 10, "dur": 4},
        kernel | {"ts": 12, "dur": 3},  # of another stream, beside the first
        kernel | {"ts": 18, "dur": 2},
        {"ph": "X", "name": "python", "pid": 2, "ts": 0, "dur": 50},
    ]
    for listed in (events, events[1:2] + events[-1:]):
        with gzip.open(tmp_path / "perfetto_trace.json.gz", "wt") as file:
            json.dump({"traceEvents": listed}, file)
        found = scripts["gpu"].idle(tmp_path)
        assert found == (pytest.approx(0.3) if listed is events else None)


def test_exponents_are_slopes(scripts):
    rows = [{"n": 10, "s": 1.0}, {"n": 20, "s": 4.0}]
    scripts["growth"].exponents(rows, "n", "s")
    assert rows[1]["exponent of s"] == "2.00"
    scripts["growth"].exponents(rows, "n", "s", power=2)
    assert rows[1]["exponent of s"] == "1.00"


def test_ratios_are_of_medians(scripts):
    told = [
        {"model": "m", "job": job, "wall": wall, "cpu": 2 * wall, "peak": 1.0, "accuracy": 0.5}
        for job, walls in (("torch", (9.0, 10.0, 90.0)), ("cold", (2.0, 1.0, 50.0)))
        for wall in walls
    ]
    torch, cold = scripts["peer"].summary(told)
    assert (torch["torch / this"], cold["torch / this"], cold["by cpu"]) == ("", "5.00", "5.00")
    assert "| 2 " in scripts["harness"].table([cold])


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        "step.py --models tiny_resnet --batch 2 --repeat 1",
        "growth.py --only depth --depths 1 2 --repeat 1",
        "gpu.py --tiny --repeat 1 --only resnet",
    ],
)
def test_a_script_runs(words, tmp_path):
    script, *options = words.split()
    out = tmp_path / "out.json"
    command = [sys.executable, str(FOLDER / script), *options, "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(out.read_text())["about"]["cores"] >= 1
