"""The error a user's mistake becomes: one message, no traceback, exit code 2."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """What was given, what was expected, and the way out, in one message for the user."""


def near(given: str, known: Iterable[str], n: int = 5) -> str:
    """A sentence that names what `given` may have meant, or an empty string.

    >>> near("resnet5", ["resnet50", "vit"])
    ' Did you mean resnet50?'
    """
    close = difflib.get_close_matches(given, list(known), n=n, cutoff=0.5)
    return f" Did you mean {', '.join(close)}?" if close else ""
