"""What a person sees while a run works: a live view on a terminal or in a notebook, plain or JSON lines, nothing."""

import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jft import metrics
from jft.errors import UserError, printable
from jft.report.log import plain

MODES = ("auto", "plain", "quiet", "json")
PLAIN_SECONDS = 10.0  # between two lines of progress where there is no terminal
LIVE_SECONDS = 0.1  # between two looks at the figures of a step
NOTEBOOK_SECONDS = 1.0  # between two drawings of a notebook's view, each of which is a message to a browser
MEMORY_SECONDS = 1.0  # between two looks at the memory
KEPT = 512  # losses that the view's line is drawn of
SPARK, ASCII_SPARK = "▁▂▃▄▅▆▇█", "_.,-~+*#"
SPARK_WIDTH = 32


def make_display(mode: str = "auto") -> "Display":
    """The display of this name; `auto` is live where standard output is a terminal, else plain lines."""
    if mode not in MODES:
        raise UserError(f"There is no display {mode!r}; it is one of {', '.join(MODES)}.")
    if mode == "quiet":
        return Display()
    if mode == "json":
        return JsonDisplay()
    from rich.console import Console

    # Rich's own way in a notebook draws nothing between two lines and needs widgets that may not be installed.
    console = Console(highlight=False, soft_wrap=True, force_jupyter=False)
    if mode == "auto" and (update := notebook()):
        return NotebookDisplay(console, update)
    if mode == "auto" and console.is_terminal and not console.is_dumb_terminal:
        return LiveDisplay(console)
    return PlainDisplay(console)


def duration(seconds: float) -> str:
    """`8 s`, `2:05`, `1:02:05`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    minutes, s = divmod(seconds, 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


def _ended(label: str, done: int, unit: str, seconds: float) -> str:
    """`Decoding train: 245 images in 2 s`."""
    what = unit.removesuffix("s") if done == 1 else unit
    return f"{label}: {done} {what} in {duration(seconds) if seconds >= 1 else f'{seconds:.2g} s'}"


def figures(values: Mapping[str, float]) -> str:
    """`loss 0.312, accuracy 94.1 %`."""
    return ", ".join(f"{metrics.HEADLINES.get(k, k)} {_told(k, v)}" for k, v in values.items())


def _told(name: str, value: float) -> str:
    return f"{value:.1%}" if name.endswith(("accuracy", "average_precision", "mAP")) else f"{value:.3g}"


def sparkline(values: Sequence[float], width: int = SPARK_WIDTH, ascii: bool = False) -> str:
    """A line of blocks between the least and the largest of the values, the mean of neighbours where there are more.

    >>> sparkline([3, 2, 1, 1], 4)
    '█▅▁▁'
    """
    real = [v for v in values if math.isfinite(v)]
    if not real:
        return ""
    count = min(width, len(real))
    cells = [real[i * len(real) // count : (i + 1) * len(real) // count] for i in range(count)]
    means = [sum(cell) / len(cell) for cell in cells]
    low, high = min(means), max(means)
    blocks = ASCII_SPARK if ascii else SPARK
    steps = len(blocks) - 1
    return "".join(blocks[round(steps * (m - low) / (high - low)) if high > low else 0] for m in means)


def size(count: float) -> str:
    """`3 kB`, `512 MB`, `1.4 GB`."""
    if count < 1e6:
        return f"{max(count / 1e3, 1):.0f} kB" if count else "0 kB"
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def memory() -> dict[str, int]:
    """Bytes of this process and, where a device tells, of the first device: in use, at most so far, its limit."""
    told = {}
    with suppress(OSError, ValueError, IndexError):  # Linux alone has it
        told["process"] = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    if jax := sys.modules.get("jax"):  # the view of a command that does not compute does not load it
        stats = jax.local_devices()[0].memory_stats() or {}
        known = (("device", "bytes_in_use"), ("device_peak", "peak_bytes_in_use"), ("device_limit", "bytes_limit"))
        told |= {name: int(stats[key]) for name, key in known if key in stats}
    return told


def notebook() -> Callable[[str], Any] | None:
    """Where this is a notebook: a function that shows a text in the cell's output, in place of the one before."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    if ipython is None or getattr(shell, "kernel", None) is None:
        return None
    from IPython.display import display

    handle = display({"text/plain": ""}, raw=True, display_id=True)
    return lambda text: handle.update({"text/plain": text}, raw=True)


class Patient:
    """A stream whose failures fail no run: it replaces what it cannot encode, and is silent once nobody can read it."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.gone = stream, stream is None

    def write(self, text: str) -> int:
        """Write what can be written; returns the length of the text, as streams do."""
        if not self.gone:
            encoding = getattr(self.stream, "encoding", None) or "utf-8"
            try:
                self.stream.write(text.encode(encoding, "replace").decode(encoding))
            except (OSError, ValueError) as error:
                self._leave(error)
        return len(text)

    def flush(self) -> None:
        """Hand on what was written."""
        if not self.gone:
            try:
                self.stream.flush()
            except (OSError, ValueError) as error:
                self._leave(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def _leave(self, error: Exception) -> None:
        self.gone = True
        with suppress(OSError, ValueError):
            print(f"jft: nothing more can be printed ({error}); the run goes on.", file=sys.stderr)
        # Python flushes standard output once more when it ends, and would end with an error of its own.
        with suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.stream.fileno())
            os.close(null)


def _shown(values: Mapping[str, float]) -> dict[str, float]:
    return {k: values[k] for k in ("loss", "accuracy", "penalty") if k in values}


class Display:
    """Says nothing: the quiet display, and what every other starts from."""

    def __init__(self) -> None:
        self.begun: tuple[float, int] | None = None  # when the first steps of this stage were done, and how many
        self.stage_end: int | None = None  # the run's step at which the stage ends
        self.memory: dict[str, int] = {}
        self.memory_at = -math.inf

    @contextmanager
    def task(self, label: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        """Long work of `total` units; gives a function to be called with how many more are done."""
        yield lambda n: None

    def stage(self, number: int, count: int, name: str, detail: str, last: int | None = None) -> None:
        """A stage begins; `last` is the run's step with which it ends."""
        self.stage_end, self.begun = last, None

    def step(self, done: int, total: int, values: Mapping[str, float], rate: float) -> None:
        """So many of the run's steps are done; `rate` is images a second."""

    def validation(self, values: Mapping[str, float], best: bool, step: int, total: int, loss: float) -> None:
        """The state was scored after `step` of the run's steps; `loss` is the mean of training since the last time."""

    def note(self, text: str) -> None:
        """Something worth knowing."""

    def warn(self, text: str) -> None:
        """Something that may be wrong; told in every mode but quiet."""

    def table(self, rows: Sequence[Sequence[Any]], columns: Sequence[str], title: str = "") -> None:
        """Rows under their columns."""

    def close(self) -> None:
        """Nothing more is to be shown."""

    def left(self, done: int, total: int) -> float | None:
        """Seconds until the step `total` at the pace of this stage; its first call, which compiles, is not counted."""
        now = time.monotonic()
        if self.begun is None:
            self.begun = (now, done)
            return None
        since, first = self.begun
        return (now - since) / (done - first) * (total - done) if done > first else None

    def left_of(self, done: int, total: int) -> dict[str, float]:
        """Seconds left for the `stage` and the `run`, where they can be told."""
        run = self.left(done, total)
        if run is None:
            return {}
        stage = run if self.stage_end is None else run * (self.stage_end - done) / max(total - done, 1)
        return {"stage": stage, "run": run}

    def look(self) -> dict[str, int]:
        """The memory, as it was at most a second ago."""
        now = time.monotonic()
        if now - self.memory_at >= MEMORY_SECONDS:
            self.memory, self.memory_at = memory(), now
        return self.memory


class JsonDisplay(Display):
    """One JSON object a line on standard output, for programs that watch a run."""

    def __init__(self) -> None:
        super().__init__()
        self.out, self.told = Patient(sys.stdout), -LIVE_SECONDS

    def _tell(self, event: str, **values: Any) -> None:
        self.out.write(json.dumps({"event": event, **plain(values)}, allow_nan=False) + "\n")
        self.out.flush()

    @contextmanager
    def task(self, label: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        begun = time.monotonic()
        self._tell("task", label=label, total=total, unit=unit)
        yield lambda n: None
        self._tell("task_done", label=label, seconds=round(time.monotonic() - begun, 3))

    def stage(self, number: int, count: int, name: str, detail: str, last: int | None = None) -> None:
        super().stage(number, count, name, detail, last)
        self._tell("stage", number=number, of=count, name=name, detail=detail)

    def step(self, done: int, total: int, values: Mapping[str, float], rate: float) -> None:
        now, left = time.monotonic(), self.left_of(done, total)
        if now - self.told >= LIVE_SECONDS or done >= total:
            self.told = now
            more = {f"{name}_seconds_left": round(seconds, 1) for name, seconds in left.items()}
            memory = {"memory": told} if (told := self.look()) else {}
            self._tell("step", step=done, of=total, images_per_second=round(rate, 1), **values, **more, **memory)

    def validation(self, values: Mapping[str, float], best: bool, step: int, total: int, loss: float) -> None:
        self._tell("validation", best=best, step=step, of=total, train_loss=loss, **values)

    def note(self, text: str) -> None:
        self._tell("note", text=text)

    def warn(self, text: str) -> None:
        self._tell("warning", text=text)

    def table(self, rows: Sequence[Sequence[Any]], columns: Sequence[str], title: str = "") -> None:
        self._tell("table", title=title, columns=list(columns), rows=[list(map(str, row)) for row in rows])


class PlainDisplay(Display):
    """Lines for a log file: what happens, and progress every few seconds."""

    def __init__(self, console: Any) -> None:
        super().__init__()
        console.file = Patient(console.file)
        self.console = console
        self.told = time.monotonic()

    def _print(self, text: str, style: str | None = None) -> None:
        # Names and reasons come from files: nothing in them is markup, or moves the cursor.
        text = printable(text, keep="\n\t")
        if self.console.color_system is None:  # rich would take ten times as long to write the same
            self.console.file.write(f"{text}\n")
            self.console.file.flush()
        else:
            self.console.print(text, style=style, markup=False, emoji=False)

    def _due(self) -> bool:
        now = time.monotonic()
        if now - self.told < PLAIN_SECONDS:
            return False
        self.told = now
        return True

    @contextmanager
    def task(self, label: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        begun, done = time.monotonic(), 0
        self.told = begun

        def advance(n: int) -> None:
            nonlocal done
            done += n
            if self._due():
                rate = done / max(time.monotonic() - begun, 1e-9)
                self._print(
                    f"{label}: {done}/{total} {unit}, {rate:.3g}/s, {duration((total - done) / max(rate, 1e-9))} left"
                )

        yield advance
        seconds = time.monotonic() - begun
        self._print(_ended(label, done, unit, seconds))

    def stage(self, number: int, count: int, name: str, detail: str, last: int | None = None) -> None:
        super().stage(number, count, name, detail, last)
        self.told = time.monotonic()
        self._print(f"Stage {number} of {count}, {name}: {detail}", "bold")

    def step(self, done: int, total: int, values: Mapping[str, float], rate: float) -> None:
        left = self.left_of(done, total)
        if self._due():
            end = f", {duration(left['run'])} left" if left else ""
            self._print(f"step {done}/{total}  {figures(_shown(values))}, {rate:,.0f} images/s{end}")

    def validation(self, values: Mapping[str, float], best: bool, step: int, total: int, loss: float) -> None:
        scored = f"validation {figures(values)}{'  best so far' if best else ''}"
        self._print(f"  step {step}/{total}: train loss {_told('loss', loss)}, {scored}")

    def note(self, text: str) -> None:
        self._print(text)

    def warn(self, text: str) -> None:
        self._print(f"warning: {text}", "yellow")

    def table(self, rows: Sequence[Sequence[Any]], columns: Sequence[str], title: str = "") -> None:
        from rich.table import Table
        from rich.text import Text

        table = Table(title=Text(title) if title else None)
        for i, column in enumerate(columns):
            table.add_column(Text(printable(column)), justify="left" if i == 0 else "right")
        for row in rows:
            table.add_row(*(Text(printable(str(cell))) for cell in row))
        self.console.print(table)


@dataclass
class Task:
    """Work of so many units, some of them done."""

    label: str
    total: int
    unit: str
    begun: float
    done: int = 0

    def told(self) -> str:
        """How much is done, at what rate, and how long the rest takes."""
        rate = self.done / max(time.monotonic() - self.begun, 1e-9)
        left = f", {duration((self.total - self.done) / rate)} left" if rate else ""
        return f"{self.done:,}/{self.total:,} {self.unit}, {rate:.3g}/s{left}"


class ViewDisplay(PlainDisplay):
    """A view that is drawn again and again in the same place, and the lines above it that stay."""

    def __init__(self, console: Any) -> None:
        super().__init__(console)
        self.tasks: list[Task] = []
        self.title, self.detail = "", ""
        self.at: tuple[int, int] | None = None  # steps done, of
        self.values: dict[str, float] = {}
        self.rate = 0.0
        self.remaining: dict[str, float] = {}
        self.losses: deque[float] = deque(maxlen=KEPT)
        self.scores: list[float] = []  # of the validations
        self.figure = "accuracy"  # what they are of
        self.warnings, self.last_warning = 0, ""
        self.drawn = -math.inf

    def draw(self) -> None:
        """Show the view as it is now."""

    @contextmanager
    def task(self, label: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        task = Task(label, total, unit, time.monotonic())
        self.tasks.append(task)

        def advance(n: int) -> None:
            task.done += n
            self.draw()

        try:
            yield advance
        finally:
            self.tasks.remove(task)
        seconds = time.monotonic() - task.begun
        self._print(_ended(label, task.done, unit, seconds))

    def stage(self, number: int, count: int, name: str, detail: str, last: int | None = None) -> None:
        super().stage(number, count, name, detail, last)
        self.title, self.detail = f"stage {number} of {count}, {name}", detail
        self.losses.clear()  # a stage's losses begin where the last one's did not end
        self.remaining = {}
        self.draw()

    def step(self, done: int, total: int, values: Mapping[str, float], rate: float) -> None:
        self.remaining = self.left_of(done, total)
        self.at, self.values, self.rate = (done, total), dict(values), rate
        if "loss" in values:
            self.losses.append(values["loss"])
        self.draw()

    def validation(self, values: Mapping[str, float], best: bool, step: int, total: int, loss: float) -> None:
        super().validation(values, best, step, total, loss)
        self.figure = metrics.headline(values)
        self.scores.append(values.get(self.figure, 0.0))
        self.draw()

    def warn(self, text: str) -> None:
        super().warn(text)
        self.warnings, self.last_warning = self.warnings + 1, text
        self.draw()

    def lines(self, width: int) -> list[str]:
        """The view, each line of at most so many characters."""
        ascii = getattr(self.console.options, "ascii_only", False)
        block, rest = ("#", "-") if ascii else ("━", "─")
        lines = []
        for task in list(self.tasks):  # a thread of its own draws a terminal
            share = task.done / task.total if task.total else 0.0
            lines.append(f"{task.label}  {_bar(share, block, rest)}  {task.told()}")
        if self.at:
            done, total = self.at
            lines.append(f"{self.title}: {self.detail}")
            left = ""
            if self.remaining:
                stage, run = (duration(self.remaining[of]) for of in ("stage", "run"))
                # A later stage that trains more takes longer a step.
                left = (
                    f"  {run} left"
                    if self.stage_end in (None, total)
                    else f"  stage {stage} left, run {run} at this pace"
                )
            lines.append(f"step {done:,}/{total:,}  {_bar(done / total, block, rest)}  {self.rate:,.0f} images/s{left}")
            lines.append(
                f"train       {sparkline(list(self.losses), ascii=ascii):{SPARK_WIDTH}}  {figures(_shown(self.values))}"
            )
            if self.scores:
                told = f"{figures({self.figure: self.scores[-1]})}, best {_told(self.figure, max(self.scores))}"
                lines.append(f"validation  {sparkline(list(self.scores), ascii=ascii):{SPARK_WIDTH}}  {told}")
        if self.at and (bytes_of := self.look()):
            names = {"process": "process", "device": "device", "device_peak": "at most", "device_limit": "of"}
            lines.append("memory      " + ", ".join(f"{names[k]} {size(v)}" for k, v in bytes_of.items()))
        if self.warnings:
            many = "1 warning" if self.warnings == 1 else f"{self.warnings} warnings, the last"
            lines.append(f"{many}: {self.last_warning}")
        return [line if len(line) <= width else line[: max(width - 1, 0)] + ("." if ascii else "…") for line in lines]


def _bar(share: float, block: str, rest: str, width: int = 24) -> str:
    done = round(width * min(max(share, 0.0), 1.0))
    return block * done + rest * (width - done)


class LiveDisplay(ViewDisplay):
    """A terminal's view, drawn four times a second; it goes when the run ends, and the lines above it stay.

    Lines wait for the next drawing: to print one alone draws the view anew, which takes longer than a small step.
    """

    def __init__(self, console: Any) -> None:
        super().__init__(console)
        from rich.live import Live
        from rich.text import Text

        self.waiting: deque[tuple[str, str]] = deque()
        waiting = self.waiting

        class View(Live):
            def refresh(self) -> None:
                with self._lock:
                    lines = [waiting.popleft() for _ in range(len(waiting))]
                if lines:  # and the view below them
                    texts = (Text(printable(text, keep="\n\t"), style) for text, style in lines)
                    self.console.print(Text("\n").join(texts))
                else:
                    super().refresh()

        self.live = View(
            console=console, transient=True, refresh_per_second=4, get_renderable=self._view, vertical_overflow="crop"
        )
        self.live.start()

    def _print(self, text: str, style: str | None = None) -> None:
        if self.live.is_started:
            self.waiting.append((text, style or ""))
        else:
            super()._print(text, style)

    def table(self, rows: Sequence[Sequence[Any]], columns: Sequence[str], title: str = "") -> None:
        self.live.refresh()
        super().table(rows, columns, title)

    def _view(self) -> Any:
        from rich.text import Text

        text = Text("\n".join(self.lines(self.console.width)), no_wrap=True)
        text.highlight_regex(r"━+", "cyan")
        text.highlight_regex(r"[▁-█]{2,}", "green")
        text.highlight_regex(r"(?m)^stage \d+ of \d+, [^:]*", "bold")
        text.highlight_regex(r"(?m)^\d+ warnings?", "yellow")
        return text

    def close(self) -> None:
        self.live.stop()


class NotebookDisplay(ViewDisplay):
    """A notebook's view: one output that is replaced once a second; what stays is printed below it as lines."""

    def __init__(self, console: Any, update: Callable[[str], Any]) -> None:
        super().__init__(console)
        self.update = update

    def draw(self) -> None:
        now = time.monotonic()
        if now - self.drawn >= NOTEBOOK_SECONDS:
            self.drawn = now
            self.update("\n".join(self.lines(110)))

    def close(self) -> None:
        self.update("")
