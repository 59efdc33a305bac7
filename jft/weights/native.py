"""jft's own names, one to one: what `model/` bundles and `--format safetensors` exports hold."""

from collections.abc import Mapping
from typing import Any

from jft.errors import UserError, brief
from jft.weights.rules import Rule, Source

SOURCES: dict[str, Source] = {}


def rules(ours: Mapping[str, tuple[int, ...]]) -> tuple[Rule, ...]:
    """A rule for every name, as it is."""
    return tuple(Rule(name, name, resize=name.endswith(("embed/pos_embed", "attn/rel_pos"))) for name in ours)


def described(configs: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """The model and its options in the config.json of a bundle, out of the JSON beside weights; None of any other's.

    The number of classes, the size of the pictures and the dtype are not among the options: they are the next run's.
    Raises UserError for options that are none.
    """
    about = configs.get("config.json", {})
    if not {"format", "model", "options", "preprocess", "sha256"} <= about.keys():
        return None
    if not isinstance(about["options"], dict):
        raise UserError(
            f'The config.json beside the weights has "options": {brief(str(about["options"]), 80)}, where a bundle has '
            "the options of its model by name. Copy the folder again, or move its config.json away and name the model."
        )
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in about["options"].items()}
    return str(about["model"]), {k: v for k, v in options.items() if k not in ("num_classes", "image_size", "dtype")}
