"""Runs a model part by part with generated weights, beside what a reference made of the same."""

from collections.abc import Iterator, Mapping
from functools import partial

import jax
import numpy as np
from generated import picture, size, sketch, torch_weight, weight

from jft import tree, weights
from jft.models import make_model
from jft.weights import formats


def relative(a, b) -> float:
    """‖a − b‖ / ‖b‖."""
    return float(np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b))


# Compiles in two thirds of the time, for what runs a few times.
quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@partial(quick_jit, static_argnums=0)
def run_part(module, variables, x):
    """A part in evaluation. Equal modules share a compilation, so that a deep model costs what its blocks cost."""
    return module.apply(variables, x, train=False, use_running_average=True)


_KEPT: dict[tuple[str, tuple[int, ...]], np.ndarray] = {}
_ROOM = 600_000_000  # bytes: VGG's fully connected layers, or the blocks of a ViT-B


def kept_weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """`weight`, the latest of which are kept: models of the same width have most of them in common."""
    key = name, tuple(shape)
    array = _KEPT.pop(key) if key in _KEPT else weight(*key)
    if array.nbytes > 1_000_000:
        _KEPT[key] = array  # the latest is the last
        while sum(each.nbytes for each in _KEPT.values()) > _ROOM:
            del _KEPT[next(iter(_KEPT))]
    return array


def made_of(case: str) -> tuple[str, dict]:
    """A golden's name and options, as `generated.case` writes them.

    >>> made_of("tiny_vit depth=2 pool=avg")
    ('tiny_vit', {'depth': 2, 'pool': 'avg'})
    """
    name, *options = case.split(" ")
    found = dict(option.split("=") for option in options)
    return name, {key: int(value) if value.isdigit() else value for key, value in found.items()}


def differences(
    goldens: Mapping[str, np.ndarray], case: str, name: str, options: dict, format: str | None = None
) -> Iterator[tuple[str, float]]:
    """How far each part's output is from the golden's, as a share of it; last the logits.

    Weights are generated for one part at a time, so that a giant needs the memory of a block: under our names or, where
    a format is given, under that format's names, and read by its rules.
    """
    side = size(name) if format is None else 42  # transformers takes positions to be those of a square
    model = make_model(name, num_classes=10, image_size=side, **options)
    ours, stats = formats._shapes(model)
    rules = {rule.ours: rule for rule in weights.FORMATS[format].rules(ours) if rule.ours} if format else {}
    assert not rules or rules.keys() == ours.keys()

    def value(n: str) -> np.ndarray:
        if not rules:
            return kept_weight(n, ours[n])
        theirs = zip(rules[n].names, rules[n].shapes(ours[n]), strict=True)
        return rules[n].op.to_ours(*(torch_weight(t, shape) for t, shape in theirs))

    x = picture(2, *model.input_shape)
    expected = goldens[f"{case}/parts"]
    assert len(expected) == len(model.parts)
    for (part, module), golden in zip(model.parts.items(), expected, strict=True):
        variables: dict[str, dict[str, np.ndarray]] = {"params": {}, "batch_stats": {}}
        for n in tree.under(ours, part):
            variables["batch_stats" if f"{part}/{n}" in stats else "params"][n] = value(f"{part}/{n}")
        x = run_part(module, {kind: tree.nest(values) for kind, values in variables.items()}, x)
        yield part, relative(sketch(np.asarray(x)), golden)
    yield "logits", relative(x, goldens[f"{case}/logits"])
