"""The Vision Transformer's variants: parity with timm, transformers and open_clip through goldens, and their names."""

from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from generated import VITS, picture, size, sketch, weight

from jft import tree
from jft.models import make_model

GOLDENS = np.load(Path(__file__).parent / "goldens" / "vit.npz")
FULL = sorted(key.split("/")[0] for key in GOLDENS.files if key.endswith("/parts") and "patch" in key)


def relative(a, b):
    return np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b)


@partial(jax.jit, static_argnums=0)
def run_part(module, variables, x):
    """A part in evaluation. Equal modules share a compilation, so that a deep model costs what its blocks cost."""
    return module.apply(variables, x, train=False, use_running_average=True)


@pytest.mark.parametrize(
    "name", [*VITS, *(pytest.param(n, marks=() if n == "deit_tiny_patch16_224" else pytest.mark.slow) for n in FULL)]
)
def test_parity_with_timm_after_every_part(name):
    """With the same generated weights: `scripts/vit_goldens.py`."""
    made = "tiny_vit" if name in VITS else name
    model = make_model(made, num_classes=10, image_size=size(made), **VITS.get(name, {}))
    params, _ = model.shapes()
    expected = GOLDENS[f"{name}/parts"]
    assert len(expected) == len(model.parts)
    x = picture(2, *model.input_shape)
    for (part, module), golden in zip(model.parts.items(), expected, strict=True):
        variables = {n: weight(f"{part}/{n}", s.shape) for n, s in tree.under(params, part).items()}
        x = run_part(module, {"params": tree.nest(variables)}, x)
        assert relative(sketch(x), golden) < 2e-5, part
    assert relative(x, GOLDENS[f"{name}/logits"]) < 2e-5
