"""jft fine-tunes pretrained vision models in JAX.

>>> import jft
>>> run = jft.finetune(data="bees/", model="resnet50")
>>> run.evaluate()
>>> run.predict("x.jpg")
"""

import importlib
from typing import Any

__version__ = "0.1.0"

# Names come from their modules when first asked for, so that `import jft` and `jft --help` need not wait for jax.
_FROM = {
    "Config": "jft.config",
    "Stage": "jft.plan",
    "Preprocess": "jft.preprocess",
    "UserError": "jft.errors",
    "arrays": "jft.data.sources",
    "find_lr": "jft.finder",
    "finetune": "jft.api",
    "load": "jft.bundle",
    "make_model": "jft.models",
}
__all__ = sorted(_FROM)


def __getattr__(name: str) -> Any:
    if name in _FROM:
        return getattr(importlib.import_module(_FROM[name]), name)
    raise AttributeError(f"module 'jft' has no attribute {name!r}")
