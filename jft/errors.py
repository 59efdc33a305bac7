"""The error a user's mistake becomes: one message, no traceback, exit code 2."""

import contextlib
import difflib
import errno
import re
import sysconfig
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path

# What moves a terminal's cursor, changes its state, breaks a line or turns the direction of writing, and halves of
# characters, which nothing can encode.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)  # of a disk that takes no more


def disk(error: OSError, where: object) -> str:
    """What an error of `FULL` says of the disk: `where` is told where the error names no file.

    >>> disk(OSError(errno.ENOSPC, "No space left on device", "a.npz"), "runs")
    'a.npz cannot be written: No space left on device'
    """
    done = "read or written" if error.errno == errno.EIO else "written"
    return f"{error.filename or where} cannot be {done}: {error.strerror}"


class UserError(Exception):
    """What was given, what was expected, and the way out, in one message for the user."""


class MachineError(UserError):
    """Disk, memory, a lock or unreadable data are in the way, not what was asked for: the same command goes on."""


def theirs(error: BaseException) -> str | None:
    """Where the user's own code, called by ours, raised an error, and its last lines; None where ours did.

    Frames of installed packages and of Python's library count for whoever called them.
    """
    ours = Path(__file__).parent
    libraries = tuple(map(Path, dict.fromkeys(sysconfig.get_paths()[k] for k in ("stdlib", "purelib", "platlib"))))

    def installed(file: Path) -> bool:
        return str(file).startswith("<") or any(map(file.is_relative_to, libraries))

    frames = traceback.extract_tb(error.__traceback__)
    called = [f for f in frames if Path(f.filename).is_relative_to(ours) or not installed(Path(f.filename))]
    if not called or Path(called[-1].filename).is_relative_to(ours):
        return None
    last = called[-1]
    own = [f for f in called if not Path(f.filename).is_relative_to(ours)][-3:]
    lines = traceback.format_list([f for f in frames if f in own or f is frames[-1]])
    told = f"{last.filename}, line {last.lineno}: {type(error).__name__}: {error}"
    return "\n".join([told, *map(str.rstrip, lines)])


@contextlib.contextmanager
def asked(what: str) -> Iterator[None]:
    """Turns what a function of the user's, or its use, raises within it into a UserError that begins so."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        told = theirs(error)
        if not told and not isinstance(error, TypeError | ValueError | AttributeError):
            raise
        raise UserError(f"{what}: {told or error}") from error


def near(given: str, known: Iterable[str], n: int = 5, cutoff: float = 0.5) -> str:
    """A sentence that names what `given` may have meant, or an empty string.

    >>> near("resnet5", ["resnet50", "vit"])
    ' Did you mean resnet50?'
    """
    close = difflib.get_close_matches(given, list(known), n=n, cutoff=cutoff)
    return f" Did you mean {', '.join(close)}?" if close else ""


def brief(text: str, limit: int = 1200) -> str:
    """The text, `printable`, its middle left out where it is longer: what a hostile file says of itself may be."""
    half = limit // 2
    return printable(text if len(text) <= limit else f"{text[:half]} … {text[-half:]}", keep="\n")


def printable(text: str, keep: str = "") -> str:
    """The text with control characters as escapes, those in `keep` aside: a name from a file does nothing but stand.

    >>> print(printable("\\x1b[2Jcat.png"))
    \\x1b[2Jcat.png
    """
    return _CONTROL.sub(lambda found: found[0] if found[0] in keep else ascii(found[0])[1:-1], text)
