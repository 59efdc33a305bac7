"""Two processes of two devices each do what one process does: the same run to float rounding, written once."""

import json
import os
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest

from jft.bundle import load

CONFIG = """
from jft import Config, Stage


def config():
    plan = (
        Stage("head", ("head",), epochs=1, lr=0.01, augment=()),
        Stage("top", ("head", ("block*", 0.5)), epochs=2, lr=0.01),
    )
    return Config(model="tiny_vit", weights="none", plan=plan, batch=8, val_fraction=0.3, eval_every=1,
                  display="plain", warmup=0.0)
"""


def start(folder, tmp_path, workdir, *options, devices, environment=None):
    file = tmp_path / "config.py"
    file.write_text(CONFIG)
    flags = f"--xla_force_host_platform_device_count={devices}"
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "JFT_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "jft.cli", "finetune", file, "--data", folder, "--workdir", workdir, *options]
    return subprocess.Popen(
        [str(c) for c in command], env=env | (environment or {}), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def start_two(folder, tmp_path, workdir, *options):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [
        start(
            folder, tmp_path, workdir, "--distributed", *options, devices=2,
            environment={
                "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(i)
            },
        )
        for i in range(2)
    ]  # fmt: skip


def end(*processes):
    told = [p.communicate(timeout=900)[0] for p in processes]
    assert [p.returncode for p in processes] == [0] * len(processes), "\n".join(told)
    return told


def same(a, b):
    a, b = load(a / "model"), load(b / "model")
    for name in a.params:
        np.testing.assert_allclose(a.params[name], b.params[name], rtol=2e-3, atol=2e-4, err_msg=name)


@pytest.mark.slow
def test_two_processes_equal_one(folder, tmp_path):
    """FSDP over four devices in two processes, streamed, as one device has it; then one device goes on from there."""
    end(start(folder, tmp_path, tmp_path / "one", devices=1))
    told = end(*start_two(folder, tmp_path, tmp_path / "two", "--sharding", "fsdp", "--resident", "0"))
    same(tmp_path / "one", tmp_path / "two")
    one, two = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "two"))
    assert one["val"]["count"] == two["val"]["count"] == 12
    assert two["device"].startswith("4 ×")
    steps = [json.loads(line)["step"] for line in (tmp_path / "two/metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and "model is in" in told[0] and "model is in" not in told[1]

    left = tmp_path / "two"
    (left / "result.json").unlink()
    newest = max((left / "checkpoints").glob("[0-9]*"), key=lambda p: int(p.name))
    shutil.rmtree(newest)
    end(start(folder, tmp_path, left, "--sharding", "fsdp", "--resident", "0", devices=1))
    same(tmp_path / "one", left)


@pytest.mark.slow
def test_the_first_process_speaks_for_all(folder, tmp_path):
    """A folder that holds something else is refused by every process, with the reason."""
    (tmp_path / "w").mkdir()
    (tmp_path / "w/notes.txt").write_text("mine")
    processes = start_two(folder, tmp_path, tmp_path / "w")
    told = [p.communicate(timeout=900)[0] for p in processes]
    assert [p.returncode for p in processes] == [2, 2] and all("holds no run" in t for t in told), told
