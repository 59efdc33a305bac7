"""jft's own names, one to one: what `model/` bundles and `--format safetensors` exports hold."""

from collections.abc import Mapping
from typing import Any

from jft.weights.rules import Rule, Source

SOURCES: dict[str, Source] = {}


def rules(ours: Mapping[str, tuple[int, ...]]) -> tuple[Rule, ...]:
    """A rule for every name, as it is."""
    return tuple(Rule(name, name, resize=name.endswith(("embed/pos_embed", "attn/rel_pos"))) for name in ours)


def described(configs: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """The model and its options in the config.json of a bundle, out of the JSON beside weights; None of any other's.

    The number of classes and the size of the pictures are not among the options: they are the next data's.
    """
    about = configs.get("config.json", {})
    if not {"format", "model", "options", "preprocess", "sha256"} <= about.keys():
        return None
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in about["options"].items()}
    return str(about["model"]), {k: v for k, v in options.items() if k not in ("num_classes", "image_size")}
