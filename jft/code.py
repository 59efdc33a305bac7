"""Python of the user's by where it is, `module:name` or `file.py:name`; what fails in it is told as theirs."""

import contextlib
import hashlib
import importlib
import importlib.util
import os
import re
import sys
import traceback
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jft.errors import UserError, near

HERE = Path(__file__).parent


def load_object(path: str) -> Any:
    """The object at `module:name` or `file.py:name`. Python files are code: run only those you trust.

    Raises UserError where there is none.
    """
    where, _, name = path.partition(":")
    if not name:
        raise UserError(f"{path!r} names no function; module:name or file.py:name is expected.")
    if where.endswith(".py"):
        if not os.path.isfile(where):
            raise UserError(f"{path!r}: there is no file {where}.")
        value: Any = load_file(where)
    else:
        with theirs(f"{path!r}: {where}"):
            value = importlib.import_module(where)
    for attribute in name.split("."):
        if not hasattr(value, attribute):
            raise UserError(f"{path!r}: there is no {attribute} in {where}.{near(attribute, dir(value))}")
        value = getattr(value, attribute)
    return value


def names_object(word: str) -> bool:
    """Whether a word has the form `module:name` or `file.py:name`, and is no file and no data set's name.

    >>> [names_object(word) for word in ("own.py:f", "jft.optim:lion", "adamw", "tfds:mnist", "hf:timm/vit")]
    [True, True, False, False, False]
    """
    form = re.fullmatch(r"(.+\.py|[^\W\d][\w.]*):[^\W\d][\w.]*", word)
    return form is not None and form[1] not in ("tfds", "hf", "gs") and not os.path.exists(word)


def is_loaded(path: str) -> bool:
    """Whether this process has already run the file of `file.py:name`, because somebody asked for it."""
    return _module_name(Path(path.rpartition(":")[0])) in sys.modules


def _module_name(file: Path) -> str:
    return f"jft_config_{hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:12]}"


def load_file(path: str | Path) -> types.ModuleType:
    """Run a Python file as a module of its own. Raises UserError where there is none."""
    file = Path(path)
    if file.suffix != ".py" and file.exists():
        raise UserError(
            f"{path} is no config, which is a Python file whose config() returns a Config. Labelled images are given "
            f"as --data {path}."
        )
    if not file.is_file():
        raise UserError(f"There is no config {str(path)!r}. A config is a Python file whose config() returns a Config.")
    name = _module_name(file)
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    module.__config_file__ = str(file)  # type: ignore[attr-defined]
    sys.modules[name] = module
    try:
        with theirs(str(path), file):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


@contextlib.contextmanager
def theirs(name: str, file: Path | None = None) -> Iterator[None]:
    """Turns what the user's code raises within it into a UserError that says where; what ours does is left as it is."""
    file = file and file.absolute()
    try:
        yield
    except SyntaxError as error:
        where = f"{name if file and _same(error.filename, file) else error.filename}, line {error.lineno}"
        line = f"\n  {error.text.strip()}" if error.text else ""
        raise UserError(f"{where}: {type(error).__name__}: {error.msg}{line}") from None
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [i for i, f in enumerate(frames) if (_same(f.filename, file) if file else f.name == "<module>")]
        where = f"{name}, line {frames[own[-1]].lineno}" if own and file else name
        if isinstance(error, UserError):
            raise type(error)(f"{where}: {error}") from error
        below = frames[own[-1 if file else 0] :] if own else []
        if not isinstance(error, ImportError) and any(Path(f.filename).parent.is_relative_to(HERE) for f in below):
            raise
        shown = traceback.format_list([frames[i] for i in dict.fromkeys([*own[-2:], len(frames) - 1])] if own else [])
        raise UserError("\n".join([f"{where}: {type(error).__name__}: {error}", *map(str.rstrip, shown)])) from error


def _same(name: str | None, file: Path) -> bool:
    return name is not None and os.path.abspath(name) == os.path.abspath(file)
