"""What a person sees while a run works: a live view on a terminal, plain lines elsewhere, nothing, or JSON lines."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from jft.errors import UserError
from jft.report.log import plain

MODES = ("auto", "plain", "quiet", "json")
PLAIN_SECONDS = 10.0  # between two lines of progress where there is no terminal
LIVE_SECONDS = 0.1  # between two looks at the figures of a step


def make_display(mode: str = "auto") -> "Display":
    """The display of this name; `auto` is live where standard output is a terminal, else plain lines."""
    if mode not in MODES:
        raise UserError(f"There is no display {mode!r}; it is one of {', '.join(MODES)}.")
    if mode == "quiet":
        return Display()
    if mode == "json":
        return JsonDisplay()
    from rich.console import Console

    # In a notebook too: plain lines are kept with it, and rich's bars there need widgets that may not be installed.
    console = Console(highlight=False, soft_wrap=True, force_jupyter=False)
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


def figures(values: Mapping[str, float]) -> str:
    """`loss 0.312, accuracy 94.1 %`."""
    return ", ".join(f"{k} {v:.1%}" if "accuracy" in k else f"{k} {v:.3g}" for k, v in values.items())


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


class Display:
    """Says nothing: the quiet display, and what every other starts from."""

    def __init__(self) -> None:
        self.begun: tuple[float, int] | None = None  # when the first steps of this session were done, and how many

    @contextmanager
    def task(self, label: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        """Long work of `total` units; gives a function to be called with how many more are done."""
        yield lambda n: None

    def stage(self, number: int, count: int, name: str, detail: str) -> None:
        """A stage begins."""

    def step(self, done: int, total: int, values: Mapping[str, float], rate: float) -> None:
        """So many of the run's steps are done; `rate` is images a second."""

    def validation(self, values: Mapping[str, float], best: bool) -> None:
        """The state was scored."""

    def note(self, text: str) -> None:
        """Something worth knowing."""

    def warn(self, text: str) -> None:
        """Something that may be wrong; told in every mode but quiet."""

    def table(self, rows: Sequence[Sequence[Any]], columns: Sequence[str], title: str = "") -> None:
        """Rows under their columns."""

    def close(self) -> None:
        """Nothing more is to be shown."""

    def left(self, done: int, total: int) -> float | None:
        """Seconds until the last step at the pace of this session; the first call, which compiles, is not counted."""
        now = time.monotonic()
        if self.begun is None:
            self.begun = (now, done)
            return None
        since, first = self.begun
        return (now - since) / (done - first) * (total - done) if done > first else None


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

    def stage(self, number: int, count: int, name: str, detail: str) -> None:
        self._tell("stage", number=number, of=count, name=name, detail=detail)

    def step(self, done: int, total: int, values: Mapping[str, float], rate: float) -> None:
        now = time.monotonic()
        if now - self.told >= LIVE_SECONDS or done >= total:
            self.told = now
            self._tell("step", step=done, of=total, images_per_second=round(rate, 1), **values)

    def validation(self, values: Mapping[str, float], best: bool) -> None:
        self._tell("validation", best=best, **values)

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
        # Names and reasons come from files: nothing in them is markup.
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
        self._print(f"{label}: {done} {unit} in {duration(seconds) if seconds >= 1 else f'{seconds:.2g} s'}")

    def stage(self, number: int, count: int, name: str, detail: str) -> None:
        self._print(f"Stage {number} of {count}, {name}: {detail}", "bold")

    def step(self, done: int, total: int, values: Mapping[str, float], rate: float) -> None:
        left = self.left(done, total)
        if self._due():
            self._print(self._progress(done, total, values, rate, left))

    def _progress(self, done: int, total: int, values: Mapping[str, float], rate: float, left: float | None) -> str:
        shown = {k: values[k] for k in ("loss", "accuracy", "penalty") if k in values}
        end = "" if left is None else f", {duration(left)} left"
        return f"step {done}/{total}  {figures(shown)}, {rate:,.0f} images/s{end}"

    def validation(self, values: Mapping[str, float], best: bool) -> None:
        self._print(f"  validation: {figures(values)}{'  best so far' if best else ''}")

    def note(self, text: str) -> None:
        self._print(text)

    def warn(self, text: str) -> None:
        self._print(f"warning: {text}", "yellow")

    def table(self, rows: Sequence[Sequence[Any]], columns: Sequence[str], title: str = "") -> None:
        from rich.table import Table
        from rich.text import Text

        table = Table(title=Text(title) if title else None)
        for i, column in enumerate(columns):
            table.add_column(Text(column), justify="left" if i == 0 else "right")
        for row in rows:
            table.add_row(*(Text(str(cell)) for cell in row))
        self.console.print(table)


class LiveDisplay(PlainDisplay):
    """A terminal's view: bars with rate and time left, the last figures, and the lines above them."""

    def __init__(self, console: Any) -> None:
        super().__init__(console)
        from rich.progress import BarColumn, Progress, TextColumn

        self.progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[told]}", markup=False),
            console=console,
            transient=True,
            refresh_per_second=4,
        )
        self.progress.start()
        self.bar: Any = None
        self.drawn = 0.0
        self.stage_name = ""
        self.last_validation = ""

    @contextmanager
    def task(self, label: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        begun, done = time.monotonic(), 0
        bar = self.progress.add_task(label, total=total or None, told="")

        def advance(n: int) -> None:
            nonlocal done
            done += n
            rate = done / max(time.monotonic() - begun, 1e-9)
            left = duration((total - done) / rate) if rate else "?"
            self.progress.update(bar, completed=done, told=f"{done}/{total} {unit}, {rate:.3g}/s, {left} left")

        try:
            yield advance
        finally:
            self.progress.remove_task(bar)
        seconds = time.monotonic() - begun
        self._print(f"{label}: {done} {unit} in {duration(seconds) if seconds >= 1 else f'{seconds:.2g} s'}")

    def stage(self, number: int, count: int, name: str, detail: str) -> None:
        super().stage(number, count, name, detail)
        self.stage_name = f"stage {number}/{count}"

    def step(self, done: int, total: int, values: Mapping[str, float], rate: float) -> None:
        left = self.left(done, total)
        now = time.monotonic()
        if now - self.drawn < LIVE_SECONDS and done < total:
            return
        self.drawn = now
        if self.bar is None:
            self.bar = self.progress.add_task("", total=total, told="")
        told = self._progress(done, total, values, rate, left) + self.last_validation
        self.progress.update(self.bar, description=self.stage_name, completed=done, told=told)

    def validation(self, values: Mapping[str, float], best: bool) -> None:
        super().validation(values, best)
        self.last_validation = f", validation {values.get('accuracy', 0):.1%}"

    def close(self) -> None:
        self.progress.stop()
