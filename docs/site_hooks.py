"""What mkdocs does with these pages beyond its own: links out of docs/, and docstrings as the reference shows them.

Only `mkdocs build` reads this file; it is no page of the site.
"""

import ast
import re
import runpy
from pathlib import Path
from typing import Any

import griffe

ROOT = Path(__file__).parent.parent


def on_config(config: Any) -> Any:
    """The repository's address is that of the notebooks."""
    repository = runpy.run_path(str(ROOT / "scripts" / "notebooks.py"))["REPOSITORY"]
    config.repo_url, config.repo_name = f"https://github.com/{repository}", repository
    config.edit_uri = None
    return config


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links to files beside docs/ lead to the repository, since the site does not have them."""
    up = "../" * (page.file.src_uri.count("/") + 1)
    return markdown.replace(f"]({up}", f"]({config.repo_url}/blob/main/")


class Plain(griffe.Extension):
    """jft's docstrings are plain text: examples begin with `>>>`, and fields are told in a comment or by `_opt`."""

    def on_object(self, *, obj: griffe.Object, loader: Any, **kwargs: Any) -> None:
        if obj.docstring is None:
            return
        obj.docstring.value = fenced(obj.docstring.value)
        if obj.is_class and "dataclass" in obj.labels:
            _tell_fields(obj)


def fenced(text: str) -> str:
    """Every example in a block of its own."""
    return re.sub(r"(?m)(?:^>>> .*\n?(?:.+\n?)*)", lambda m: f"```pycon\n{m[0].rstrip()}\n```\n", text)


def _tell_fields(obj: griffe.Object) -> None:
    """A table of a dataclass's fields at the end of its docstring."""
    tree = ast.parse(obj.source).body[0]
    assert isinstance(tree, ast.ClassDef) and obj.docstring
    lines = obj.source.splitlines()
    told = []
    for field in (node for node in tree.body if isinstance(node, ast.AnnAssign)):
        name, call = ast.unparse(field.target), field.value
        help, default = lines[field.end_lineno - 1].partition("  # ")[2], None
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "_opt":
            help, default = ast.literal_eval(call.args[1]), ast.unparse(call.args[0])
        elif isinstance(call, ast.Call) and (metadata := [k.value for k in call.keywords if k.arg == "metadata"]):
            help, default = ast.literal_eval(metadata[0].values[0]), "{}"
        if default is not None:
            for parameter in obj.parameters:
                if parameter.name == name:
                    parameter.default = default
        if help:
            told.append(f"    {name}: {help}")
    if told:
        obj.docstring.value += "\n\nAttributes:\n" + "\n".join(told)
