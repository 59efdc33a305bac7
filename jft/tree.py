"""Parameters by name: a tree is a flat dict from names such as `stage4/block0/conv1/kernel` to arrays."""

import fnmatch
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from jft.errors import UserError, near

Tree = dict[str, Any]


def flatten(nested: Mapping[str, Any], prefix: str = "") -> Tree:
    """Nested dicts to names joined by `/`.

    >>> flatten({"head": {"kernel": 1}})
    {'head/kernel': 1}
    """
    flat: Tree = {}
    for key, value in nested.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{name}/")
        else:
            flat[name] = value
    return flat


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Names joined by `/` back to nested dicts, the inverse of `flatten`."""
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        *path, leaf = name.split("/")
        node = nested
        for key in path:
            node = node.setdefault(key, {})
        node[leaf] = value
    return nested


def under(flat: Mapping[str, Any], prefix: str) -> Tree:
    """The leaves below `prefix`, their names without it."""
    return {name[len(prefix) + 1 :]: leaf for name, leaf in flat.items() if name.startswith(prefix + "/")}


def split(flat: Mapping[str, Any], names: Collection[str]) -> tuple[Tree, Tree]:
    """Two halves: the leaves in `names`, and the rest."""
    return {n: v for n, v in flat.items() if n in names}, {n: v for n, v in flat.items() if n not in names}


def merge(*halves: Mapping[str, Any]) -> Tree:
    """One tree from halves that share no name, the inverse of `split`. Raises ValueError where they do."""
    whole: Tree = {}
    for half in halves:
        if both := whole.keys() & half.keys():
            raise ValueError(f"the halves share {sorted(both)[:3]}")
        whole |= half
    return dict(sorted(whole.items()))


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern names this leaf: a glob over the whole name (`*` crosses `/`), or over anything above it.

    >>> matches("stage4", "stage4/block0/conv1/kernel"), matches("*/bias", "head/bias"), matches("stage", "stage4/x")
    (True, True, False)
    """
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, pattern + "/*")


def first_match(patterns: Iterable[tuple[str, Any]], names: Iterable[str], default: Any) -> Tree:
    """For each name the value of the first pattern that matches it, else `default`.

    Raises UserError for a pattern that decides nothing: one that matches no name, or only names decided before it.
    """
    names, patterns = list(names), list(patterns)
    values, used = {}, set()
    for name in names:
        values[name] = default
        for i, (pattern, value) in enumerate(patterns):
            if matches(pattern, name):
                values[name] = value
                used.add(i)
                break
    for i, (pattern, _) in enumerate(patterns):
        if i in used:
            continue
        if any(matches(pattern, name) for name in names):
            raise UserError(
                f"The pattern {pattern!r} decides nothing: an earlier pattern takes every name it matches. "
                "The first match wins, so put the narrower pattern first."
            )
        known = sorted({"/".join(name.split("/")[: i + 1]) for name in names for i in range(name.count("/") + 1)})
        raise UserError(
            f"The pattern {pattern!r} matches no parameter.{near(pattern, known)} "
            "`jft plan --names` prints every parameter's name."
        )
    return values
