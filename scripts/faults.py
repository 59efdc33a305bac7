"""Make every file operation of saving fail, one at a time, and operations of whole runs: the last good state stands.

    python scripts/faults.py --runs 40        # needs a C compiler and Linux

Operations are counted below the folder alone (opens for writing, writes, renames, links, new folders, syncs). The
one of number k fails with an error (`fail`), or finds the disk full as do all after it (`full`), or writes a half
first (`short`). A checkpoint is saved, and a report drawn anew, with each k; whole runs are begun with a random k in
their folder, or in a cache that is empty, end with exit code 2 or go on, and are begun again with the disk mended, to
end bit-equal to a run that never failed.
"""

import argparse
import collections
import contextlib
import ctypes
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from kill import RUN, pictures, preload, start, traces

MODES = {"fail": 1, "full": 2, "short": 3}


def tree(step: int) -> dict[str, np.ndarray]:
    """A state that is another at every step."""
    return {"a": np.arange(20_000, dtype=np.float32) + step, "b": np.int32(step)}


def save(folder: Path, k: int, mode: str) -> tuple[str, int]:
    """Save a second checkpoint with a fault; what became of it, and how many operations there were."""
    from jft.checkpoint import Checkpoints
    from jft.errors import UserError

    faults = ctypes.CDLL(None)
    faults.faults_arm.argtypes = (ctypes.c_char_p, ctypes.c_long, ctypes.c_int)
    kept = Checkpoints(folder, lambda said: None)
    kept.save(1, tree(1), {})
    kept.wait()
    faults.faults_arm(bytes(folder) + b"/", k, MODES[mode])
    became = "saved"
    try:
        kept.save(2, tree(2), {})
        kept.wait()
    except UserError as error:
        became = "told" if "cannot be written" in str(error) else f"WRONGLY TOLD: {error}"
    except BaseException as error:
        became = f"NOT TOLD: {error!r}"
    count = faults.faults_count()
    faults.faults_arm(bytes(folder) + b"/", 0, 0)
    with contextlib.suppress(UserError):
        kept.close()
    kept = Checkpoints(folder, lambda said: None)
    for step, position in kept.positions():
        found = kept.restore(step, tree(0), position["sums"])
        if found is not None:
            if not np.array_equal(found["a"], tree(step)["a"]):
                became = "SILENT"
            if became == "saved" and step != 2:
                became = "saved, and then found damaged: the one before"
            break
    else:
        became = "LOST"
    kept.save(3, tree(3), {})
    kept.close()
    left = {p.name for p in folder.iterdir()} - {"1", "2", "3"}
    return (f"LEFT: {left}" if left else became), count


def in_child(function: Any, *arguments: Any) -> Any:
    """What a function returns in a process of its own."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 2)
            text = json.dumps(function(*arguments))
        except BaseException as error:
            text = json.dumps([f"CRASHED: {error!r}", 0])
        os.write(write, text.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as file:
        text = file.read()
    os.waitpid(pid, 0)
    return json.loads(text) if text else ["CRASHED", 0]


def arm(folder: Path, k: int, mode: str) -> None:
    """In this process and those forked from it."""
    faults = ctypes.CDLL(None)
    faults.faults_arm.argtypes = (ctypes.c_char_p, ctypes.c_long, ctypes.c_int)
    faults.faults_arm(bytes(folder) + b"/", k, MODES.get(mode, 0))


def main() -> None:
    """Every operation of a save, then some of whole runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--every", type=int, default=1, help="of a save's operations try each so-manieth")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=1e9, help="begin nothing after so many")
    parser.add_argument("--out", metavar="FILE.json")
    options = parser.parse_args()
    if "JFT_FAULTS" not in os.environ:  # begin again with the shim below everything
        with tempfile.TemporaryDirectory(prefix="jft-faults-") as folder:
            shim = Path(folder) / "faults.so"
            source = Path(__file__).with_suffix(".c")
            subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", shim, source, "-ldl", "-pthread"], check=True)
            env = os.environ | {"LD_PRELOAD": str(shim), "JFT_FAULTS": "1"}
            sys.exit(subprocess.run([sys.executable, __file__, *sys.argv[1:]], env=env).returncode)
    begun, rng = time.monotonic(), random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="jft-faults-") as folder:
        root = Path(folder)
        os.environ |= {"JFT_CACHE": str(root / "cache"), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
        pictures(root / "data")
        preload()
        told: dict[str, Any] = {"save": {}, "runs": collections.Counter()}
        for mode in MODES:
            outcomes: collections.Counter[str] = collections.Counter()
            _, count = in_child(save, root / f"save-{mode}", 0, mode)
            for k in range(1, count + 1, options.every):
                if time.monotonic() - begun < options.seconds:
                    became, _ = in_child(save, root / f"save-{mode}-{k}", k, mode)
                    outcomes[became] += 1
            told["save"][mode] = {"operations": count, **outcomes}
            print(mode, told["save"][mode], flush=True)

        def command(*arguments: str) -> tuple[int, str]:
            log = root / "log"
            log.unlink(missing_ok=True)
            code = os.waitstatus_to_exitcode(os.waitpid(start(list(arguments), log), 0)[1])
            return code, log.read_text(errors="replace")

        def run(name: str, cache: str) -> tuple[int, str]:
            os.environ["JFT_CACHE"] = str(root / cache)
            return command("finetune", "--data", str(root / "data"), "--workdir", str(root / name), *RUN.split())

        failures: list[dict[str, Any]] = []

        def fault(said: str, **which: Any) -> None:
            failures.append({**which, "said": said[-1500:]})
            print(failures[-1], flush=True)

        def judge(code: int, said: str, **which: Any) -> None:
            if code not in (0, 2) or "Traceback" in said:
                fault(said, **which, code=code)

        operations = {}
        for name, where in (("cached", "cache0"), ("reference", "reference")):
            arm(root / where, 0, "")
            code, said = run(name, "cache0")
            operations[where] = ctypes.CDLL(None).faults_count()
            assert code == 0, said[-3000:]
        reference = traces(root / "reference")
        told["operations_of_a_run"] = {"folder": operations["reference"], "cache": operations["cache0"]}

        page = root / "reference" / "report.html"
        whole, files, told["report"] = page.read_bytes(), sorted(page.parent.iterdir()), collections.Counter()
        arm(page.parent, 0, "")
        assert command("report", str(page.parent))[0] == 0
        told["operations_of_a_report"] = ctypes.CDLL(None).faults_count()
        for mode in MODES:
            for k in range(1, told["operations_of_a_report"] + 1):
                arm(page.parent, k, mode)
                code, said = command("report", str(page.parent))
                arm(page.parent, 0, "")
                told["report"][f"{mode}: exit code {code}"] += 1
                judge(code, said, report=mode, k=k)
                if page.read_bytes() != whole or sorted(page.parent.iterdir()) != files:
                    fault(said, report=mode, k=k, left=[p.name for p in page.parent.iterdir()])
        print("report", dict(told["report"]), flush=True)

        for i in range(1, options.runs + 1):
            if time.monotonic() - begun > options.seconds:
                break
            name, mode, part = f"run{i}", rng.choice(list(MODES)), rng.choice(["folder", "folder", "cache"])
            cache = f"cache{i}" if part == "cache" else "cache0"
            which = {"part": part, "mode": mode, "k": rng.randrange(1, told["operations_of_a_run"][part])}
            arm(root / (cache if part == "cache" else name), which["k"], mode)
            code, said = run(name, cache)
            arm(root / name, 0, "")
            told["runs"][f"{part}, {mode}: exit code {code}"] += 1
            judge(code, said, **which)
            code, said = run(name, cache)
            found = traces(root / name) if code == 0 else {}
            if odd := [key for key in reference if key != "files" and found.get(key) != reference[key]]:
                fault(said, **which, then=code, differs=odd)
            print(name, which, code, len(failures), flush=True)
        told |= {"failures": failures, "seconds": round(time.monotonic() - begun)}
        print(json.dumps(told, indent=1))
        if options.out:
            Path(options.out).write_text(json.dumps(told, indent=1) + "\n")
        sys.exit(bool(failures))


if __name__ == "__main__":
    main()
