"""A lock that keeps two processes out of one folder: a file that says who holds it, and that he is still there."""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from jft.errors import MachineError

NAME = "lock"
BEAT = 10.0  # seconds between two signs of life
PATIENCE = 60.0  # without one, a process that cannot be looked at from here is taken for dead


@contextlib.contextmanager
def hold(folder: Path, note: Callable[[str], Any] = print) -> Iterator[Callable[[], None]]:
    """Hold the lock of a folder, which must exist. Raises UserError, with who holds it, where another process does.

    Gives a function that raises UserError where the lock has been lost, to be asked before anything is written.

    The lock is a file that appears at once and whole, by `link` or O_EXCL, which is atomic on network file systems
    too, where `flock` may be missing, or known to one host only. Whether a process of this host lives is asked of the
    kernel: where it was killed, its lock is taken over at once. Of one in another host or container only the signs of
    life can be seen, the changes of the file's time: its lock is watched, and taken over after a minute without any.
    No clocks of two machines are compared.
    """
    file, mine = folder / NAME, _mine()
    while not _make(file, mine):
        found = _read(file)
        if found is None:  # let go of just now
            continue
        if _alive(found) or (not _near(found) and _beats(file, found, note)):
            raise MachineError(
                f"{folder} is in use: {_who(found)} has worked on it since {found.get('since', '?')}. Wait for it, "
                f"stop it, or name another folder with --workdir. (If there is no such process, remove {file}.)"
            )
        if _read(file) == found and _break(file, found):
            note(f"{folder} was held by {_who(found)}, which is gone.")
    stop = threading.Event()
    beats = threading.Thread(target=_beat, args=(file, stop), name="jft-lock", daemon=True)
    beats.start()

    def check() -> None:
        if _read(file) != mine:
            raise MachineError(
                f"Another process has taken {folder} over while this one gave no sign of life (suspended, or cut off "
                "from the file system). This one stops and leaves the folder to it."
            )

    try:
        yield check
    finally:
        stop.set()
        beats.join()
        if _read(file) == mine:
            file.unlink(missing_ok=True)


def clear(folder: Path) -> None:
    """Take away the lock that a process of this host left in a folder when it was killed."""
    file = folder / NAME
    found = _read(file)
    if found and _near(found) and not _alive(found):
        _break(file, found)


def _mine() -> dict[str, Any]:
    pid = os.getpid()
    since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    return {
        "pid": pid,
        "host": socket.gethostname(),
        "since": since,
        "place": _place(),
        "started": _started(pid),
        "id": uuid.uuid4().hex,
    }


def _who(found: dict[str, Any]) -> str:
    return f"process {found.get('pid', '?')} on {found.get('host', '?')}"


def _place() -> list[str]:
    """Within what a process number means one process: this host, as it was started, and on Linux its container."""
    place = [socket.gethostname()]
    with contextlib.suppress(OSError):
        place.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        place.append(os.readlink("/proc/self/ns/pid"))
    return place


def _started(pid: int) -> str | None:
    """When a process began, in the kernel's ticks; None where that cannot be known. A zombie is no process any more."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state == "Z" else rest[18]


def _near(found: dict[str, Any]) -> bool:
    """Whether the holder's number means something here."""
    return found.get("place") == _place()


def _alive(found: dict[str, Any]) -> bool:
    if not _near(found) or not isinstance(found.get("pid"), int):
        return False
    if found.get("started") is not None:  # a number that has gone to another process since is another time
        return _started(found["pid"]) == found["started"]
    try:
        os.kill(found["pid"], 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _beats(file: Path, found: dict[str, Any], note: Callable[[str], Any]) -> bool:
    """Watch a lock; whether it changes before patience ends."""
    note(f"{file} is held from {found.get('host', '?')}: watching for up to {PATIENCE:.0f} s whether it still lives.")
    before, until = _time(file), time.monotonic() + PATIENCE
    while time.monotonic() < until:
        time.sleep(min(0.5, PATIENCE / 10))
        if _read(file) != found:
            return False  # let go of, or taken by another: look anew
        if _time(file) != before:
            return True
    return False


def _time(file: Path) -> int:
    """When the file was last changed, in its file system's clock. Opened first: NFS may answer `stat` from memory."""
    try:
        with open(file, "rb") as opened:
            return os.fstat(opened.fileno()).st_mtime_ns
    except OSError:
        return 0


def _beat(file: Path, stop: threading.Event) -> None:
    while not stop.wait(BEAT):
        with contextlib.suppress(OSError):
            os.utime(file)


def _make(file: Path, mine: dict[str, Any]) -> bool:
    """Write the lock; False where there is one."""
    text = json.dumps(mine).encode()
    beside = file.with_name(f"{NAME}.{mine['id']}.part")
    try:
        beside.write_bytes(text)
        try:
            os.link(beside, file)
        except FileExistsError:
            return False
        except OSError:  # a file system without links: whoever dies between the two lines leaves an empty lock
            with open(file, "xb") as opened:
                opened.write(text)
    except FileExistsError:
        return False
    finally:
        beside.unlink(missing_ok=True)
    return True


def _read(file: Path) -> dict[str, Any] | None:
    """What a lock says; nothing of one that was never written out, None where there is none."""
    try:
        found = json.loads(file.read_bytes())
        return found if isinstance(found, dict) else {}
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}


def _break(file: Path, found: dict[str, Any]) -> bool:
    """Take a dead process's lock away. False where another process has been quicker, and its lock stands."""
    aside = file.with_name(f"{NAME}.{uuid.uuid4().hex}.part")
    try:
        file.rename(aside)
    except FileNotFoundError:
        return False
    if _read(aside) == found:
        aside.unlink()
        return True
    with contextlib.suppress(OSError):  # it was another's, made in between: give it back
        os.link(aside, file)
    aside.unlink(missing_ok=True)
    return False
