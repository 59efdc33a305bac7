"""What the measurements of speed share: processes that take turns, what they spend, tables, the machine.

Seconds of a clock depend on what else runs; processor time (user + system, of all threads and child processes) much
less, though threads that spin while they wait, as OpenMP's do, spend more of it on a machine that is busy.
"""

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class Spent:
    """What a process took from its start to its end."""

    wall: float  # seconds
    cpu: float  # seconds of all its threads and children
    peak: float  # MB resident
    output: str  # its standard output

    def last(self) -> dict[str, Any]:
        """The JSON on the last line of its output."""
        return json.loads(self.output.strip().splitlines()[-1])


def run(command: Sequence[str], **environment: str) -> Spent:
    """A process to its end. Raises SystemExit with what it said where it fails."""
    begun = time.perf_counter()
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            list(map(str, command)), stdout=subprocess.PIPE, stderr=errors, text=True, env=os.environ | environment
        )
        assert process.stdout is not None
        told = process.stdout.read()
        _, status, used = os.wait4(process.pid, 0)
        wall = time.perf_counter() - begun
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            errors.seek(0)
            failed = errors.read()[-3000:]
            raise SystemExit(f"{' '.join(map(str, command))} ended with {process.returncode}:\n{failed}")
    return Spent(wall, used.ru_utime + used.ru_stime, used.ru_maxrss / 1e3, told)


class Worker:
    """A process that answers requests one at a time, so that two can take turns within one run."""

    def __init__(self, python: str, script: str, *args: str):
        self.process = subprocess.Popen(
            [python, script, *args], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        """Its answer. Raises SystemExit where it has died, which it says itself on the error stream."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(request) + "\n")
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{' '.join(self.process.args)} has died")  # type: ignore[arg-type]
        return json.loads(line)

    def close(self) -> None:
        """Let it end."""
        self.process.communicate()


def serve(answer: Callable[..., dict[str, Any]]) -> None:
    """The worker's side: `answer(**request)` for each line, whatever else is printed going to the error stream."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for line in sys.stdin:
        out.write(json.dumps(answer(**json.loads(line))) + "\n")


def timed(work: Callable[[], Any]) -> dict[str, float]:
    """Seconds and processor seconds of this process for a piece of work, which must not return before it is done."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def peak_memory() -> float:
    """The most memory this process has had, in MB (Linux's own count: getrusage's starts with the parent's)."""
    return _status("VmHWM")


def memory() -> float:
    """The memory this process has, in MB."""
    return _status("VmRSS")


def _status(field: str) -> float:
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) * 1024 / 1e6


def import_torch(threads: int | None = None) -> Any:
    """torch, with the operators declared that torchvision asks for where its own do not load."""
    import torch

    if threads:
        torch.set_num_threads(threads)
    try:
        torch.ops.torchvision.nms  # noqa: B018
    except (AttributeError, RuntimeError):
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        torch.jft_library = library  # goes with the module, not with this function
    return torch


def cores() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0))


def about(torch_python: str | None = None) -> dict[str, Any]:
    """The machine and the versions that a figure was made with."""
    names = ("jft", "jax", "jaxlib", "flax")
    found: dict[str, Any] = {
        "processor": _processor(),
        "cores": cores(),
        "load": [round(x, 2) for x in os.getloadavg()],
        "python": platform.python_version(),
        **{n: importlib.metadata.version(n) for n in names},
    }
    if torch_python:
        asked = "import importlib.metadata as m; print(*[m.version(n) for n in ('torch', 'torchvision', 'timm')])"
        versions = subprocess.run([torch_python, "-c", asked], capture_output=True, text=True, check=True).stdout
        found |= dict(zip(("torch", "torchvision", "timm"), versions.split(), strict=True))
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def median(values: Iterable[float]) -> float:
    """The median, which one slow repetition does not move."""
    return statistics.median(values)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of equal keys as Markdown."""
    if not rows:
        return ""
    shown = [[_short(row[k]) for k in rows[0]] for row in rows]
    widths = [max(len(str(k)), *(len(r[i]) for r in shown)) for i, k in enumerate(rows[0])]
    lines = [[str(k) for k in rows[0]], ["-" * w for w in widths], *shown]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines)


def _short(value: Any) -> str:
    return (
        f"{value:.3g}"
        if isinstance(value, float) and abs(value) < 100
        else f"{value:.0f}"
        if isinstance(value, float)
        else str(value)
    )


def report(rows: Sequence[Mapping[str, Any]], where: str | None, torch_python: str | None = None, **more: Any) -> None:
    """Print the machine and the table; with `where`, write them and what else there is as JSON."""
    machine = about(torch_python)
    print(", ".join(f"{k} {v}" for k, v in machine.items()), table(rows), sep="\n\n", flush=True)
    if where:
        Path(where).write_text(json.dumps({"about": machine, "rows": list(rows), **more}, indent=1) + "\n")
