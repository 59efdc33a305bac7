"""Where jft keeps what it can compute again; it may be deleted at any time."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """`$JFT_CACHE`, else `$XDG_CACHE_HOME/jft`, else `~/.cache/jft`. It need not exist yet."""
    if folder := os.environ.get("JFT_CACHE"):
        return Path(folder).expanduser()
    if folder := os.environ.get("XDG_CACHE_HOME"):
        return Path(folder).expanduser() / "jft"
    return Path.home() / ".cache" / "jft"
