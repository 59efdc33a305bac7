"""Files that appear whole or not at all."""

import ctypes
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PART = ".part"  # the ending of what is being written; what a killed process left of it may be removed


def sweep(folder: Path, age: float = 86400) -> None:
    """Remove what writers that were killed left in a folder, when it is older than `age` seconds."""
    for left in folder.glob(f"*{PART}"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > age:
                left.unlink()


def exchange(one: Path, other: Path) -> bool:
    """Let two paths change places, at no moment without either; False where the system or the disk cannot (Linux can).

    >>> exchange(Path("model.part"), Path("model"))
    True
    """
    try:
        rename = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(rename(here, os.fsencode(one), here, os.fsencode(other), swap) == 0)


@contextmanager
def writing(path: str | Path) -> Iterator[Path]:
    """A file to write, which takes the place of `path` once all of it is written; no other process writes to it.

    Raises OSError where it cannot be written; then, as after any other exception, what stood at `path` still does.

    >>> with writing("classes.txt") as part:
    ...     part.write_text("ant\\nbee\\n")
    """
    path = Path(path)
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}{PART}")
    try:
        yield part
        os.replace(part, path)
    except OSError as error:
        if error.filename in (str(part), part):  # nobody knows this name
            error.filename = str(path)
        raise
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)
