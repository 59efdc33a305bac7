"""What a person or a program sees while a run works: plain lines, JSON lines, nothing, and the live view."""

import io
import json
import math
import subprocess
import sys
import types

import pytest
from rich.console import Console

from jft.errors import UserError
from jft.report import live

REAL_MEMORY = live.memory
HOSTILE = "[red]x[/] :smile: [/nope] <b>"


@pytest.fixture
def now(monkeypatch):
    """A clock that moves when it is told to."""
    time = [100.0]
    monkeypatch.setattr(live.time, "monotonic", lambda: time[0])

    def pass_(seconds: float) -> None:
        time[0] += seconds

    return pass_


@pytest.fixture(autouse=True)
def little(monkeypatch):
    """Memory that stands still."""
    monkeypatch.setattr(live, "memory", lambda: {"process": 1_400_000_000})


def use(display: live.Display, now=lambda seconds: None) -> None:
    """Everything a run does with a display."""
    with display.task("Decoding " + HOSTILE, total=10, unit="images") as advance:
        for _ in range(10):
            now(2.0)
            advance(1)
    display.stage(1, 2, HOSTILE, "head: 386 parameters, 8 steps", last=12)
    for step in range(1, 9):
        now(5.0)
        display.step(step, 16, {"loss": 0.5 / step, "accuracy": 0.25, "grad_norm": 3.0}, 1234.5)
    display.validation({"accuracy": 0.75, "loss": 0.25}, best=True, step=20, total=40, loss=0.5)
    display.note("note " + HOSTILE)
    display.warn("left out: " + HOSTILE)
    display.table([[HOSTILE, 1.5], ["b", None]], ["name " + HOSTILE, "value"], title="table " + HOSTILE)
    display.close()


def test_plain_prints_lines_and_no_markup(now, capsys):
    use(live.make_display("plain"), now)
    out, err = capsys.readouterr()
    assert err == "" and "\x1b" not in out and "\r" not in out
    lines = out.splitlines()
    assert f"Decoding {HOSTILE}: 10 images in 20 s" in lines
    assert f"Decoding {HOSTILE}: 5/10 images, 0.5/s, 10 s left" in lines
    assert f"Stage 1 of 2, {HOSTILE}: head: 386 parameters, 8 steps" in lines
    assert "  step 20/40: train loss 0.5, validation accuracy 75.0%, loss 0.25  best so far" in lines
    assert f"note {HOSTILE}" in lines and f"warning: left out: {HOSTILE}" in lines
    assert out.count(HOSTILE) >= 8


def test_plain_tells_progress_every_ten_seconds_with_the_time_left(now, capsys):
    use(live.make_display("plain"), now)
    steps = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert steps == [
        "step 2/16  loss 0.25, accuracy 25.0%, 1,234 images/s, 1:10 left",
        "step 4/16  loss 0.125, accuracy 25.0%, 1,234 images/s, 1:00 left",
        "step 6/16  loss 0.0833, accuracy 25.0%, 1,234 images/s, 50 s left",
        "step 8/16  loss 0.0625, accuracy 25.0%, 1,234 images/s, 40 s left",
    ]


def test_auto_is_plain_where_there_is_no_terminal(monkeypatch):
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    assert type(live.make_display("auto")) is live.PlainDisplay


def test_json_is_one_object_a_line(now, capsys):
    use(live.make_display("json"), now)
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [e["event"] for e in events] == [
        "task", "task_done", "stage", *["step"] * 8, "validation", "note", "warning", "table",
    ]  # fmt: skip
    by = {e["event"]: e for e in events}
    assert by["task"] == {"event": "task", "label": "Decoding " + HOSTILE, "total": 10, "unit": "images"}
    assert by["task_done"]["seconds"] == 20
    assert by["step"] == {
        "event": "step", "step": 8, "of": 16, "images_per_second": 1234.5, "loss": 0.0625, "accuracy": 0.25,
        "grad_norm": 3.0, "stage_seconds_left": 20.0, "run_seconds_left": 40.0, "memory": {"process": 1_400_000_000},
    }  # fmt: skip
    assert by["validation"] == {
        "event": "validation", "best": True, "step": 20, "of": 40, "train_loss": 0.5, "accuracy": 0.75, "loss": 0.25
    }  # fmt: skip
    assert by["note"]["text"] == "note " + HOSTILE
    assert by["table"]["rows"] == [[HOSTILE, "1.5"], ["b", "None"]]


def test_json_stays_json_when_the_loss_is_none_any_more(capsys):
    display = live.make_display("json")
    display.step(1, 2, {"loss": float("nan"), "grad_norm": float("inf")}, 1.0)
    display.note("\udcff")

    def fail(name):
        raise AssertionError(f"{name} is not JSON")

    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[0], parse_constant=fail)["loss"] == "NaN"
    assert len(lines) == 2


def test_quiet_says_nothing(capsys):
    use(live.make_display("quiet"))
    assert capsys.readouterr() == ("", "")


def test_an_unknown_mode_is_refused():
    with pytest.raises(UserError, match=r"loud.*auto, plain, quiet, json"):
        live.make_display("loud")


def terminal(width: int = 100) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, highlight=False, soft_wrap=True)


def test_live_shows_names_as_they_are_and_leaves_no_bar(now):
    console = terminal()
    use(live.LiveDisplay(console), now)
    out = console.file.getvalue()
    for line in (f"Stage 1 of 2, {HOSTILE}", f"note {HOSTILE}", f"left out: {HOSTILE}", "table " + HOSTILE):
        assert line in out
    assert "step 8/16" in out and "20 s left, run 40 s at this pace" in out
    assert "1,234 images/s" in out and "memory      process 1.4 GB" in out
    assert "loss 0.0625, accuracy 25.0%" in out and "█▄▃▂▂▁▁▁" in out
    assert "accuracy 75.0%, best 75.0%" in out and "1 warning" in out
    assert out.endswith("\x1b[?25h") or out.rstrip().endswith("\x1b[2K")  # the bar is gone, the cursor is back
    assert out.count("\x1b[?25l") == out.count("\x1b[?25h")


@pytest.mark.parametrize("width", [20, 40, 200])
def test_live_fits_any_width(now, width):
    use(live.LiveDisplay(terminal(width)), now)


@pytest.mark.parametrize(
    ("values", "width", "line"),
    [
        ([], 4, ""), ([1.0], 4, "▁"), ([2.0, 2.0], 4, "▁▁"), ([3, 2, 1, 1], 4, "█▅▁▁"), ([0, 1, 7, 7], 2, "▁█"),
        ([math.nan, 1, math.inf, 2], 4, "▁█"), (list(range(1000)), 8, "▁▂▃▄▅▆▇█"),
    ],
)  # fmt: skip
def test_a_sparkline_goes_from_the_least_to_the_largest(values, width, line):
    assert live.sparkline(values, width) == line
    assert len(live.sparkline(values, width, ascii=True)) == len(line)


def test_a_line_of_losses_is_of_the_stage_alone(now):
    display = live.ViewDisplay(terminal())
    for number in (1, 2):
        display.stage(number, 2, "s", "d", last=2 * number)
        for step in (1, 2):
            display.step(2 * number - 2 + step, 4, {"loss": float(step)}, 1.0)
    assert list(display.losses) == [1.0, 2.0]


def test_a_notebook_has_one_output_that_is_replaced(now, monkeypatch, capsys):
    shown: list[str] = []

    class Handle:
        def update(self, data, raw):
            assert raw
            shown.append(data["text/plain"])

    def display(data, raw, display_id):
        assert data == {"text/plain": ""} and raw and display_id
        return Handle()

    ipython, module = types.ModuleType("IPython"), types.ModuleType("IPython.display")
    shell = types.SimpleNamespace(kernel=object())
    ipython.get_ipython, module.display = lambda: shell, display
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    made = live.make_display("auto")
    assert isinstance(made, live.NotebookDisplay)
    use(made, now)
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\r" not in out and "validation accuracy 75.0%" in out
    assert any("step 8/16" in text for text in shown) and shown[-1] == ""
    assert len(shown) < 25
    del shell.kernel  # a terminal's IPython
    assert type(live.make_display("auto")) is not live.NotebookDisplay


def test_memory_is_that_of_the_process():
    pytest.importorskip("resource")
    told = REAL_MEMORY()
    assert not sys.platform.startswith("linux") or 10_000_000 < told["process"] < 1e12


def test_close_may_be_called_twice_and_after_a_failure():
    display = live.LiveDisplay(terminal())
    with pytest.raises(ZeroDivisionError), display.task("a", 1, "images"):
        raise ZeroDivisionError
    display.close()
    display.close()


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(0, "0 s"), (7.6, "8 s"), (59.4, "59 s"), (59.6, "1:00"), (125, "2:05"), (3599.7, "1:00:00"), (3725, "1:02:05")],
)
def test_duration(seconds, told):
    assert live.duration(seconds) == told


def test_time_left_counts_this_session_alone(now):
    display = live.Display()
    assert display.left(100, 200) is None  # resumed at 99; the first call compiles
    now(10)
    assert display.left(110, 200) == 90
    assert display.left(200, 200) == 0
    assert live.Display().left(5, 5) is None


def test_plain_survives_an_ascii_terminal(monkeypatch):
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding="ascii", line_buffering=True)
    monkeypatch.setattr(live.sys, "stdout", out)
    display = live.PlainDisplay(Console(file=out, highlight=False, soft_wrap=True))
    display.note("grün, 头")
    display.table([["grün", "头"]], ["é", "b"])
    out.flush()
    assert b"gr?n" in raw.getvalue()


@pytest.mark.parametrize("mode", ["plain", "json"])
def test_a_reader_that_leaves_ends_no_run(mode):
    """As `jft finetune | head -1` does: the rest is not printed, and the exit code is the run's own."""
    code = f"""
import sys
from jft.report import live
display = live.make_display({mode!r})
for i in range(20000):
    display.note("line " + str(i))
display.close()
sys.exit(7)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        assert b"line 0" in process.stdout.readline()
        process.stdout.close()
        told = process.stderr.read().decode()
        assert process.wait() == 7
    assert "the run goes on" in told and "Traceback" not in told and "Exception ignored" not in told


def test_no_standard_output_at_all(monkeypatch):
    monkeypatch.setattr(live.sys, "stdout", None)
    for mode in live.MODES:
        use(live.make_display(mode))


def test_a_closed_stream_is_given_up(capsys):
    out = io.StringIO()
    display = live.PlainDisplay(Console(file=out))
    display.note("before")
    out.close()
    display.note("after")
    display.note("again")
    assert capsys.readouterr().err.count("nothing more can be printed") == 1


def test_a_dumb_terminal_gets_lines(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes this for a terminal
    monkeypatch.setenv("TERM", "dumb")
    assert type(live.make_display("auto")) is live.PlainDisplay
