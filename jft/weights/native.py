"""jft's own names, one to one: what `model/` bundles and `--format safetensors` exports hold."""

from collections.abc import Mapping

from jft.weights.rules import Rule, Source

SOURCES: dict[str, Source] = {}


def rules(ours: Mapping[str, tuple[int, ...]]) -> tuple[Rule, ...]:
    """A rule for every name, as it is."""
    return tuple(Rule(name, name, resize=name.endswith(("embed/pos_embed", "attn/rel_pos"))) for name in ours)
