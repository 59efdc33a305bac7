"""Where jft keeps what it can compute again; it may be deleted at any time."""

import contextlib
import os
import time
from pathlib import Path

from jft.files import PART, sweep


def cache_dir() -> Path:
    """`$JFT_CACHE`, else `$XDG_CACHE_HOME/jft`, else `~/.cache/jft`. It need not exist yet."""
    if folder := os.environ.get("JFT_CACHE"):
        return Path(folder).expanduser()
    if folder := os.environ.get("XDG_CACHE_HOME"):
        return Path(folder).expanduser() / "jft"
    return Path.home() / ".cache" / "jft"


def used(path: Path) -> None:
    """Note that a file was used now, for `make_room`."""
    with contextlib.suppress(OSError):  # removed since, or another user's: it is read all the same
        os.utime(path)


def make_room(path: Path, size: int, most: float, age: float = 0.0) -> None:
    """Remove the files beside `path` that were used longest ago, until `size` more bytes fit into `most`.

    Those used less than `age` seconds ago stay, whatever fits. Other processes write and remove here too; on POSIX one
    that has a file mapped keeps it.
    """
    sweep(path.parent)
    others = []
    for other in path.parent.iterdir():
        with contextlib.suppress(OSError):
            status = other.stat()
            if other != path and other.suffix != PART and status.st_mtime <= time.time() - age:
                others.append((status.st_mtime, status.st_size, other))
    size += sum(length for _, length, _ in others)  # of those that may go
    for _, length, other in sorted(others):
        if size > most:
            size -= length
            with contextlib.suppress(OSError):
                other.unlink()
