"""Layers are an import order: a module imports from those below it and from its own package, at the top of its file."""

import ast
from pathlib import Path

import pytest

import jft

LAYERS = (
    {"errors", "files", "memory", "preprocess", "__version__"},
    {"code"},
    {"words"},
    {"table", "tree", "losses", "metrics", "probes", "checkpoint", "lock", "data.cache"},
    {"plan", "shard", "models", "data", "weights", "penalties"},
    {"optim", "step", "features", "lora"},
    {"distil", "config", "report", "diagnose"},
    {"bundle", "run", "hyper"},
    {"use", "build", "sanity", "stablehlo"},
    {"train", "preview", "convert", "average", "rank", "push", "explain"},
    {"compare", "finder", "trial"},
    {"api", "sweep"},
    {"cli"},
)
ROOT = Path(jft.__file__).parent
FILES = sorted(f for f in ROOT.rglob("*.py") if f != ROOT / "__init__.py")


def name_of(file):
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def layer(name):
    for i, names in enumerate(LAYERS):
        if name in names:
            return i
    package = name.split(".")[0]
    assert package != name, f"{name} is in no layer: put it where it belongs"
    return layer(package)


def imported(file):
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module == "jft":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jft."):
            yield node.module.removeprefix("jft.")
        elif isinstance(node, ast.Import):
            yield from (a.name.removeprefix("jft.") for a in node.names if a.name.startswith("jft."))


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_imports_go_down(file):
    mine = name_of(file)
    for other in imported(file):
        if other.split(".")[0] != mine.split(".")[0]:
            assert layer(other) < layer(mine), f"{mine} imports {other}, which is not below it"


def test_models_and_weights_know_nothing_of_each_other():
    for file in FILES:
        mine = name_of(file).split(".")[0]
        others = {other.split(".")[0] for other in imported(file)}
        assert not (mine == "models" and "weights" in others) and not (mine == "weights" and "models" in others), file


def test_neither_tensorflow_nor_torch_is_imported():
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            modules = (
                [a.name for a in node.names] if isinstance(node, ast.Import)
                else [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            )  # fmt: skip
            assert not {m.split(".")[0] for m in modules} & {"tensorflow", "torch", "torchvision", "timm"}, file
