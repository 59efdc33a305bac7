"""What watching a run costs: the live view, metrics.jsonl and TensorBoard, as a share of the time that training takes.

    python benchmarks/overhead.py [--model tiny_resnet] [--plan full] [--epochs 30] [--repeats 3] [--images 512]
    python benchmarks/overhead.py --data PATH --model NAME --weights FILE …

Within one run, from its first validation to its last. Told: the processor time that the training thread spends in the
view, the log and the tracker, over the time that the rest of the process would take if it used every core; processor
time, because other work on the machine does not change it, and as if on every core, because while the training thread
is busy elsewhere all of them wait. Drawn: the share of one core that the view's own thread takes, four times a second
however long a step is. The median of several runs. Without --data, so many images of noise of 32×32 pixels, and a
quarter as many to validate on: the smaller the steps, the larger the share.
"""

import argparse
import io
import os
import statistics
import tempfile
import threading
import time
from typing import Any

import numpy as np
from rich.console import Console

import jft
from jft import train
from jft.report import live, track

DRAWS = "_RefreshThread"  # rich's
CORES = len(os.sched_getaffinity(0))


class Meter:
    """Processor seconds spent in calls of the training thread, and looks at all the process has spent."""

    def __init__(self) -> None:
        self.calls, self.inside = 0.0, False
        self.looks: list[np.ndarray] = []  # calls, drawing, everything; the last in seconds of the clock

    def wrap(self, owner: Any, name: str, look: bool = False) -> None:
        """Time a method, where it is not called by another that is timed; with `look`, look after each call."""
        function = getattr(owner, name)

        def timed(*args: Any, **options: Any) -> Any:
            if self.inside or threading.current_thread() is not threading.main_thread():
                return function(*args, **options)
            self.inside, begun = True, time.thread_time()
            try:
                return function(*args, **options)
            finally:
                self.inside = False
                self.calls += time.thread_time() - begun
                if look:
                    self.look()

        setattr(owner, name, timed)

    def look(self) -> None:
        """Keep what has been spent up to now."""
        drawing = 0.0
        for thread in threading.enumerate():
            if type(thread).__name__ == DRAWS and thread.ident is not None:
                drawing += time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
        self.looks.append(np.array((self.calls, drawing, time.process_time(), time.perf_counter())))


def main() -> None:
    """Run, and print a line for each run and the median."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny_resnet")
    parser.add_argument("--plan", default="full")
    parser.add_argument("--data")
    parser.add_argument("--weights", default="none")
    parser.add_argument("--epochs", type=float, default=30)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()

    rng = np.random.default_rng(0)
    sizes = {"train": given.images, "val": given.images // 4}
    noise = {s: (rng.integers(0, 256, (n, 32, 32, 3), np.uint8), np.arange(n) % 4) for s, n in sizes.items()}
    console = Console(file=io.StringIO(), force_terminal=True, width=120, highlight=False, soft_wrap=True)
    train.make_display = lambda mode: live.LiveDisplay(console)
    meter = Meter()
    for name in ("stage", "step", "note", "warn"):
        meter.wrap(live.LiveDisplay, name)
    meter.wrap(live.LiveDisplay, "validation", look=True)
    meter.wrap(track.Mirror, "write")
    meter.wrap(track.Trackers, "flush")

    shares = []
    for repeat in range(given.repeats):
        meter.looks.clear()
        with tempfile.TemporaryDirectory() as folder:
            options = {"preprocess": {"crop_pct": 1.0}} if given.data is None else {}
            jft.finetune(
                data=given.data or noise, model=given.model, plan=given.plan, weights=given.weights,
                epochs=given.epochs, seed=repeat, workdir=f"{folder}/run", track=("tensorboard",),
                image_size=given.image_size, **options,
            )  # fmt: skip
        told, drawing, everything, clock = meter.looks[-1] - meter.looks[0]
        training = (everything - told - drawing) / CORES
        shares.append(told / training + drawing / clock)
        print(
            f"training {training:.2f} s on {CORES} cores; told {told:.3f} s, {told / training:.2%}; drawn "
            f"{drawing / clock:.2%} of the time; together {shares[-1]:.2%}", flush=True,
        )  # fmt: skip
    print(f"median {statistics.median(shares):.2%}")


if __name__ == "__main__":
    main()
