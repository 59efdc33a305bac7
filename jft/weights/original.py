"""The names in ViTs' own files where they are not timm's: DeiT-III, DINO, DINOv2, CLIP, and open_clip around timm's."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from jft.weights import vit
from jft.weights.rules import HEAD, LINEAR, Leading, Rule, Source, linear, norm, present

Shapes = Mapping[str, tuple[int, ...]]
TEXT = "the text tower and what joins it to the pictures'"
PROJECTION = "the projection into the space shared with text; the model option projection keeps it"


@dataclass(frozen=True)
class Original:
    """A format of rules alone."""

    rules: Callable[[Shapes], tuple[Rule, ...]]
    SOURCES: dict[str, Source] = field(default_factory=dict)


def _deit3(ours: Shapes) -> tuple[Rule, ...]:
    scaled = "block0/ls1/gamma" in ours and not vit.is_beit(ours)
    return vit.rules(ours, scale="gamma_{}") if scaled else ()


def _dinov2(ours: Shapes) -> tuple[Rule, ...]:
    """None where nothing in DINOv2's files differs from timm's names."""
    if "block0/norm1/scale" not in ours or not ("embed/reg_token" in ours or vit.is_gated(ours)):
        return ()
    return vit.rules(ours, registers="register_tokens", mlp=("w12", "w3") if vit.is_gated(ours) else ("fc1", "fc2"))


def _dino(ours: Shapes) -> tuple[Rule, ...]:
    """A whole checkpoint: the model under `backbone.`, and beside it the heads of the training."""
    if "block0/norm1/scale" not in ours:
        return ()
    heads = Rule(("head.*", "dino_head.*", "ibot_head.*"), None, why="the head of the self-supervised training")
    return (*_below("backbone.", _dinov2(ours) or vit.rules(ours)), heads)


def _open_clip(ours: Shapes) -> tuple[Rule, ...]:
    if "block0/norm1/scale" not in ours:
        return ()
    found = _below("visual.trunk.", vit.rules(ours))
    joined = Rule(
        "visual.head.proj.weight", "projection/kernel" if "projection/kernel" in ours else None, LINEAR, why=PROJECTION
    )
    return (*found, joined, Rule(("text.*", "logit_scale", "logit_bias"), None, why=TEXT))


def _clip(ours: Shapes) -> tuple[Rule, ...]:
    if "embed/norm/scale" not in ours:
        return ()
    found = [
        Rule("visual.class_embedding", "embed/cls_token", Leading(2)),
        Rule("visual.positional_embedding", "embed/pos_embed", Leading(1), resize=True),
        *(replace(rule, theirs="visual.conv1.weight") for rule in vit.rules(ours) if rule.ours == "embed/patch/kernel"),
        *norm("visual.ln_pre", "embed/norm"),
        *norm("visual.ln_post", "norm"),
    ]
    for i in range(vit.depth(ours)):
        theirs, block = f"visual.transformer.resblocks.{i}", f"block{i}"
        found += [*norm(f"{theirs}.ln_1", f"{block}/norm1"), *norm(f"{theirs}.ln_2", f"{block}/norm2")]
        found += [
            Rule(f"{theirs}.attn.in_proj_weight", f"{block}/attn/qkv/kernel", LINEAR),
            Rule(f"{theirs}.attn.in_proj_bias", f"{block}/attn/qkv/bias"),
        ]
        found += linear(f"{theirs}.attn.out_proj", f"{block}/attn/proj")
        found += [
            *linear(f"{theirs}.mlp.c_fc", f"{block}/mlp/fc1"),
            *linear(f"{theirs}.mlp.c_proj", f"{block}/mlp/fc2"),
        ]
    # Kept as [in, out], other than torch's linear layers.
    found.append(Rule("visual.proj", "projection/kernel" if "projection/kernel" in ours else None, why=PROJECTION))
    text = ("transformer.*", "token_embedding.weight", "positional_embedding", "ln_final.*", "text_projection")
    found.append(Rule((*text, "text.*", "logit_scale", "logit_bias", "attn_mask"), None, why=TEXT))
    found.append(Rule(("input_resolution", "context_length", "vocab_size"), None, why="a number of the configuration"))
    return present(found, ours)


def _below(prefix: str, rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """The rules of the body, every name of theirs with a prefix."""
    body = (rule for rule in rules if not (rule.ours or "").startswith(HEAD + "/"))
    return tuple(replace(rule, theirs=tuple(prefix + name for name in rule.names)) for rule in body)


DEIT3, DINOV2, DINO, CLIP, OPEN_CLIP = (Original(rules) for rules in (_deit3, _dinov2, _dino, _clip, _open_clip))
