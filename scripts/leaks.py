"""Train again and again in one process: memory, threads, open files, processes and shared memory stay what they were.

python scripts/leaks.py --runs 50
python scripts/leaks.py --runs 50 --own      without what TensorStore keeps of every array saved or read (see `own`)
"""

import argparse
import contextlib
import ctypes
import gc
import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

from kill import pictures


def held() -> dict[str, float]:
    """What this process holds: resident megabytes, threads of Python and of the system, files, children.

    What has been freed is given back first: the C library keeps it, in pieces, for allocations to come.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library has no such function
        ctypes.CDLL(None).malloc_trim(0)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    tasks = Path("/proc/self/task")
    return {
        "rss_mb": round(int(status["VmRSS"].split()[0]) / 1024, 1),
        "python_threads": threading.active_count(),
        "threads": len(list(tasks.iterdir())),
        "files": len(os.listdir("/proc/self/fd")) - 1,
        "children": len((tasks / str(os.getpid()) / "children").read_text().split()),
        "shared_memory": len(os.listdir("/dev/shm")) if Path("/dev/shm").exists() else 0,
    }


def own() -> None:
    """Have TensorStore tell a spec, which Orbax asks of every array, by a way that frees what it told.

    Up to 0.1.86 at least it never does: two strings for each pair, 0.3 kB an array. Here all specs are of files, so
    that the path says everything of one; a product cannot say that of those of others.
    """
    import tensorstore as ts

    ts.KvStore.Spec.to_json = lambda self, **_: {"driver": "file", "path": self.path}


def main() -> None:
    """Train, look, train again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no run after so many")
    parser.add_argument("--own", action="store_true", help="without what TensorStore is known to keep")
    parser.add_argument("--out", metavar="FILE.json")
    options = parser.parse_args()
    if options.own:
        own()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="jft-leaks-") as folder:
        root = Path(folder)
        os.environ["JFT_CACHE"] = str(root / "cache")
        pictures(root / "data")
        from jft.config import Config
        from jft.train import train

        rows = []
        for i in range(options.runs):
            if time.monotonic() - begun > options.seconds:
                break
            train(
                Config(
                    data=str(root / "data"),
                    model="tiny_vit",
                    weights="none",
                    plan="lp-ft",
                    epochs=2,
                    batch=8,
                    seed=i,
                    ema=0.9,
                    checkpoint_every=0.0,
                    workdir=str(root / f"run{i}"),
                    display="quiet",
                )
            )
            rows.append(held())
            print(i, rows[-1], flush=True)
        # The first runs fill caches that are bounded; growth is what the last half adds.
        half = len(rows) // 2
        told = {
            "runs": len(rows),
            "first": rows[0],
            "middle": rows[half],
            "last": rows[-1],
            "mb_a_run": round((rows[-1]["rss_mb"] - rows[half]["rss_mb"]) / max(1, len(rows) - 1 - half), 2),
            "rss_mb": [row["rss_mb"] for row in rows],
        }
        print(json.dumps(told))
        if options.out:
            Path(options.out).write_text(json.dumps(told, indent=1) + "\n")
        grown = any(rows[-1][k] > rows[half][k] for k in ("python_threads", "threads", "files", "children"))
        sys.exit(grown)


if __name__ == "__main__":
    main()
