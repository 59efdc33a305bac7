"""Stop a run at random moments, again and again, and compare what it ends with to that of a run that never stopped.

    python scripts/kill.py --kills 100                     # SIGKILL
    python scripts/kill.py --kills 100 --signal TERM       # and the last step is saved each time

The run has two stages, mixup, moving averages, early stopping, and a checkpoint after every step. Each attempt is a
process of its own, forked from this one, which has imported everything and computed nothing.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES, EACH = 3, 12
RUN = (
    "--model tiny_vit --weights none --plan lp-ft --epochs 8 --batch 8 --lr 0.03 --dropout 0.1 "
    "--augment mixup:0.2 flip --ema 0.9 --patience 4 --eval-every 0.5 --checkpoint-every 0 "
    "--on-nan rollback --display plain"
)


def pictures(root: Path) -> None:
    """A few noisy pictures of each of three colours."""
    rng = np.random.default_rng(0)
    for i in range(CLASSES):
        (root / f"class{i}").mkdir(parents=True)
        for j in range(EACH):
            pixels = rng.integers(0, 200, (36, 40, 3))
            pixels[..., i] += 30
            Image.fromarray(pixels.astype(np.uint8)).save(root / f"class{i}" / f"{j}.png")


def start(arguments: list[str], log: Path) -> int:
    """A process that runs the command line; returns its number."""
    pid = os.fork()
    if pid:
        return pid
    try:
        out = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        import jax

        from jft import train
        from jft.cli import main

        keep, jax_update = train.compile_cache, jax.config.update

        def all_of_them() -> None:
            keep()
            jax_update("jax_persistent_cache_min_compile_time_secs", 0.0)

        train.compile_cache = all_of_them
        code = main(arguments)
        sys.stdout.flush()
        os._exit(code)
    except BaseException as error:
        print(f"harness: {error!r}", file=sys.stderr, flush=True)
        os._exit(99)


def preload() -> None:
    """Import all that a run does, without starting JAX's devices: processes are forked from this one."""
    import grain
    import jax
    import optax
    import orbax.checkpoint
    import rich.console

    import jft.cli
    import jft.compare
    import jft.models
    import jft.report.html
    import jft.train
    import jft.use  # noqa: F401

    assert not jax._src.xla_bridge._backends, "devices must not be started before a fork"
    del grain, optax, orbax, rich


def traces(workdir: Path) -> dict[str, object]:
    """All that a run computes: its files to the byte, the leaves of its last checkpoint, its result but for seconds."""
    whole = ("model/model.safetensors", "model/config.json", "metrics.jsonl", "predictions.csv")
    found: dict[str, object] = {name: (workdir / name).read_bytes() for name in whole}
    result = json.loads((workdir / "result.json").read_text())
    for measured in ("seconds", "memory"):
        result.pop(measured, None)
    for stage in result["stages"]:
        del stage["seconds"]
    found["result.json"] = result
    last = max(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())
    text = json.loads((workdir / "checkpoints" / str(last) / "position" / "metadata").read_text())["text"]
    found["checkpoint"] = json.loads(text)["sums"]
    found["files"] = sorted(p.name for p in workdir.iterdir()) + [str(last)]
    return found


def seconds(pid: int) -> float:
    """Processor seconds that a process has used: unlike the wall clock's, the same on a busy machine."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def saved(workdir: Path) -> tuple[int, int]:
    """The newest checkpoint's step, and that of the last line of the log."""
    steps = [int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()]
    lines = (workdir / "metrics.jsonl").read_bytes().splitlines()
    return max(steps, default=0), json.loads(lines[-1])["step"] if lines else 0


def main() -> None:
    """Stop, begin again, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--signal", choices=("KILL", "TERM"), default="KILL")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no attempt after so many")
    parser.add_argument("--out", metavar="FILE.json")
    options = parser.parse_args()
    how, rng, begun = signal.Signals[f"SIG{options.signal}"], random.Random(options.seed), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="jft-kill-") as folder:
        root = Path(folder)
        os.environ |= {"JFT_CACHE": str(root / "cache"), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
        pictures(root / "data")
        preload()

        def arguments(name: str) -> list[str]:
            return ["finetune", "--data", str(root / "data"), "--workdir", str(root / name), *RUN.split()]

        lasted = 0.0
        for name in ("warm", "reference"):  # the first compiles
            _, status, usage = os.wait4(start(arguments(name), root / f"{name}.log"), 0)
            lasted = usage.ru_utime + usage.ru_stime
            assert status == 0, (root / f"{name}.log").read_text()[-3000:]
        reference = traces(root / "reference")
        assert traces(root / "warm") == reference
        stages = [s["steps"] for s in reference["result.json"]["stages"]]  # type: ignore[index]
        told = {
            "signal": options.signal,
            "kills": 0,
            "in_training": 0,
            "in_save": 0,
            "unsaved": 0,
            "before_the_loop": 0,
            "runs": 0,
        }
        told |= {"unequal": [], "stage_steps": stages, "cpu_seconds_of_a_run": round(lasted, 1)}
        print(f"reference: {lasted:.1f} processor seconds, steps of its stages {stages}", flush=True)
        while told["kills"] < options.kills and time.monotonic() - begun < options.seconds:
            name = f"run{told['runs']}"
            log = root / f"{name}.log"
            while True:
                pid = start(arguments(name), log)
                # Between the first line of a program and its end; a third is sent while a checkpoint is written.
                until, in_save = rng.uniform(0, lasted), rng.random() < 1 / 3
                sent, status = False, 0
                while not status:
                    done, status = os.waitpid(pid, os.WNOHANG)
                    if done:
                        break
                    saving = any((root / name / "checkpoints").glob("*.orbax-checkpoint-tmp*"))
                    enough = told["kills"] >= options.kills or sent or time.monotonic() - begun > options.seconds
                    if not enough and seconds(pid) > until and (saving or not in_save):
                        os.kill(pid, how)
                        sent = True
                    time.sleep(0.02)
                code = os.waitstatus_to_exitcode(status)
                told["kills"] += sent
                told["in_training"] += sent and (root / name / "metrics.jsonl").exists()
                if code == 0:
                    break
                if how == signal.SIGKILL:
                    assert code == -signal.SIGKILL, log.read_text()[-3000:]
                    told["in_save"] += any((root / name / "checkpoints").glob("*.orbax-checkpoint-tmp*"))
                elif code == -signal.SIGTERM:
                    told["before_the_loop"] += 1
                else:
                    assert code == 130, log.read_text()[-3000:]
                    if (root / name / "result.json").exists():
                        break
                    step, logged = saved(root / name)
                    told["unsaved"] += step != logged
            told["runs"] += 1
            found = traces(root / name)
            odd = [key for key in reference if found[key] != reference[key]]
            if odd:
                both = {"files": found["files"], "expected": reference["files"]}
                told["unequal"].append({"run": name, "differs": odd, **both, "log": log.read_text()[-4000:]})
            print(f"{name}: {told['kills']} so far, {odd or 'equal'}", flush=True)
        told["seconds"] = round(time.monotonic() - begun, 1)
        print(json.dumps(told, indent=1))
        if options.out:
            Path(options.out).write_text(json.dumps(told, indent=1) + "\n")
        sys.exit(bool(told["unequal"] or told["unsaved"]))


if __name__ == "__main__":
    main()
