"""What watching a run costs: the live view, metrics.jsonl and TensorBoard, as a share of the time that training takes.

    python benchmarks/overhead.py [--model tiny_resnet] [--plan full] [--epochs 30] [--repeats 3] [--data … --weights …]

Within one run: the time the training thread spends in the view, the log and the tracker, and the processor time of the
two threads that draw the view and write the event files, over the time of training and validating. The median of
several runs. Without --data, noise of 32×32 pixels: the smaller the steps the larger the share, so it is a bad case.
"""

import argparse
import io
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from rich.console import Console

import jft
from jft import train
from jft.report import live, track

BACKGROUND = ("_RefreshThread", "_EventLoggerThread")  # of rich and of tensorboardX


class Meter:
    """Seconds spent in calls of the training thread, and by the threads behind them."""

    def __init__(self) -> None:
        self.calls, self.inside = 0.0, False
        self.threads: dict[threading.Thread, float] = {}

    def wrap(self, owner: Any, name: str) -> None:
        """Time a method, where it is not called by another that is timed."""
        function = getattr(owner, name)

        def timed(*args: Any, **options: Any) -> Any:
            if self.inside or threading.current_thread() is not threading.main_thread():
                return function(*args, **options)
            self.inside, begun = True, time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                self.inside = False
                self.calls += time.perf_counter() - begun

        setattr(owner, name, timed)

    def look_behind(self, close: Callable[..., Any]) -> Callable[..., Any]:
        """The function, after the processor time of the threads that it ends has been read."""

        def before(*args: Any) -> Any:
            for thread in threading.enumerate():
                if type(thread).__name__ in BACKGROUND and thread.ident is not None:
                    self.threads[thread] = time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
            return close(*args)

        return before


def main() -> None:
    """Run, and print a line for each run and the median."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny_resnet")
    parser.add_argument("--plan", default="full")
    parser.add_argument("--data")
    parser.add_argument("--weights", default="none")
    parser.add_argument("--epochs", type=float, default=30)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()

    rng = np.random.default_rng(0)
    noise = {
        s: (rng.integers(0, 256, (n, 32, 32, 3), np.uint8), np.arange(n) % 4) for s, n in (("train", 512), ("val", 128))
    }
    console = Console(file=io.StringIO(), force_terminal=True, width=120, highlight=False, soft_wrap=True)
    train.make_display = lambda mode: live.LiveDisplay(console)
    meter = Meter()
    for name in ("stage", "step", "validation", "note", "warn"):
        meter.wrap(live.LiveDisplay, name)
    meter.wrap(track.Mirror, "write")
    meter.wrap(track.Trackers, "flush")
    live.LiveDisplay.close = meter.look_behind(live.LiveDisplay.close)
    track.TensorBoard.close = meter.look_behind(track.TensorBoard.close)

    shares = []
    for repeat in range(given.repeats):
        meter.calls = 0.0
        meter.threads.clear()
        with tempfile.TemporaryDirectory() as folder:
            options = {"preprocess": {"crop_pct": 1.0}} if given.data is None else {}
            run = jft.finetune(
                data=given.data or noise, model=given.model, plan=given.plan, weights=given.weights,
                epochs=given.epochs, seed=repeat, workdir=f"{folder}/run", track=("tensorboard",), **options,
            )  # fmt: skip
            seconds, steps = run.result["seconds"], run.result["last"]["step"]
        training = seconds["train"] + seconds["eval"]
        behind = sum(meter.threads.values())
        shares.append((meter.calls + behind) / training)
        print(
            f"{steps} steps, {training:.2f} s of training: {meter.calls:.3f} s in calls, {behind:.3f} s behind: "
            f"{shares[-1]:.2%}", flush=True,
        )  # fmt: skip
    print(f"median {statistics.median(shares):.2%}")


if __name__ == "__main__":
    main()
