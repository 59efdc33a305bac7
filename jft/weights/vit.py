"""timm's names of the Vision Transformer and its variants, which the files of DeiT, MAE, DINO and BEiT share."""

from collections.abc import Mapping
from dataclasses import replace

from jft.preprocess import Preprocess
from jft.weights.rules import LINEAR, Concat, Rule, Source, conv, linear, norm, present

PRETRAINING = "for masked pretraining alone"

_IMAGENET = Preprocess(crop_pct=0.9, interpolation="bicubic")
_HALF = replace(_IMAGENET, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
_CLIP = replace(
    _IMAGENET, mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711), crop_pct=1.0
)
_DINOV2 = replace(_IMAGENET, size=(518, 518), crop_pct=1.0)
_APACHE = "Apache-2.0"
_1K, _22K = "ImageNet-1k", "ImageNet-22k, then ImageNet-1k"

# The same models' weights from self-supervised training: hf:timm/vit_base_patch16_224.mae, …vit_small_patch16_224.dino.
SOURCES = {
    name: Source(f"hf:timm/{repository or name}.{tag}", preprocess, data, _APACHE, f"https://arxiv.org/abs/{paper}")
    for names, repository, tag, preprocess, data, paper in (
        (
            tuple(
                f"deit_{size}_{kind}patch16_224" for size in ("tiny", "small", "base") for kind in ("", "distilled_")
            ),
            *("", "fb_in1k", _IMAGENET, _1K, "2012.12877"),
        ),
        (
            tuple(f"deit3_{size}_patch16_224" for size in ("small", "base", "large")),
            *("", "fb_in22k_ft_in1k", replace(_IMAGENET, crop_pct=1.0), _22K, "2204.07118"),
        ),
        (
            tuple(f"vit_{size}_patch14_dinov2" for size in ("small", "base", "large", "giant")),
            *("", "lvd142m", _DINOV2, "LVD-142M, without labels", "2304.07193"),
        ),
        (
            tuple(f"vit_{size}_patch14_reg4_dinov2" for size in ("small", "base", "large", "giant")),
            *("", "lvd142m", _DINOV2, "LVD-142M, without labels", "2309.16588"),
        ),
        *(
            (
                (f"vit_{size}_clip_quickgelu_224",),
                f"vit_{size}_clip_224",
                "openai",
                preprocess,
                "WIT-400M",
                "2103.00020",
            )
            for size, preprocess in (
                ("base_patch32", replace(_CLIP, crop_pct=0.9)),
                ("base_patch16", replace(_CLIP, crop_pct=0.9)),
                ("large_patch14", _CLIP),
            )
        ),
        *(
            ((f"vit_{size}_clip_224",), "", "laion2b", preprocess, "LAION-2B", "2212.07143")
            for size, preprocess in (
                ("base_patch32", replace(_CLIP, crop_pct=0.9)),
                ("base_patch16", _CLIP),
                ("large_patch14", replace(_HALF, crop_pct=1.0)),
            )
        ),
        *(
            ((f"vit_{size}_siglip_{side}",), "", tag, replace(_HALF, size=(side, side)), "WebLI", paper)
            for size, side, tag, paper in (
                *(("base_patch16", side, "v2_webli", "2502.14786") for side in (224, 256, 384)),
                *(("large_patch16", side, "v2_webli", "2502.14786") for side in (256, 384)),
                ("so400m_patch14", 224, "v2_webli", "2502.14786"),
                ("so400m_patch14", 384, "webli", "2303.15343"),
                *(("so400m_patch16", side, "v2_webli", "2502.14786") for side in (256, 384)),
            )
        ),
        (
            ("beit_base_patch16_224", "beit_large_patch16_224"),
            *("", "in22k_ft_in22k_in1k", _HALF, _22K, "2106.08254"),
        ),
        (("beitv2_base_patch16_224",), "", "in1k_ft_in22k_in1k", _IMAGENET, f"{_1K}, {_22K}", "2208.06366"),
        (
            ("beitv2_large_patch16_224",),
            *("", "in1k_ft_in22k_in1k", replace(_IMAGENET, crop_pct=0.95), f"{_1K}, {_22K}", "2208.06366"),
        ),
    )
    for name in names
}


def rules(
    ours: Mapping[str, tuple[int, ...]],
    *,
    registers: str = "reg_token",
    scale: str = "ls{}.gamma",
    mlp: tuple[str, str] = ("fc1", "fc2"),
) -> tuple[Rule, ...]:
    """The rules for a model with these names and shapes; a family's own files may name some otherwise."""
    if is_beit(ours):
        scale = "gamma_{}"
    found = [
        Rule("cls_token", "embed/cls_token"),
        Rule("dist_token", "embed/dist_token"),
        Rule(registers, "embed/reg_token"),
        Rule("pos_embed", "embed/pos_embed", resize=True),
        *conv("patch_embed.proj", "embed/patch"),
        *norm("norm_pre", "embed/norm"),
    ]
    for i in range(depth(ours)):
        theirs, block = f"blocks.{i}", f"block{i}"
        found += norm(f"{theirs}.norm1", f"{block}/norm1")
        found += linear(f"{theirs}.attn.qkv", f"{block}/attn/qkv")
        found += [Rule(f"{theirs}.attn.{part}_bias", f"{block}/attn/{part}_bias") for part in "qv"]
        found.append(Rule(f"{theirs}.attn.relative_position_bias_table", f"{block}/attn/rel_pos", resize=True))
        found += linear(f"{theirs}.attn.proj", f"{block}/attn/proj")
        found += norm(f"{theirs}.norm2", f"{block}/norm2")
        found += [
            *linear(f"{theirs}.mlp.{mlp[0]}", f"{block}/mlp/fc1"),
            *linear(f"{theirs}.mlp.{mlp[1]}", f"{block}/mlp/fc2"),
        ]
        found += [Rule(f"{theirs}.{scale.format(j)}", f"{block}/ls{j}/gamma") for j in (1, 2)]
    found += norm("norm", "norm")
    if "pool/latent" not in ours:
        found += norm("fc_norm", "pool/norm")
    else:
        found.append(Rule("attn_pool.latent", "pool/latent"))
        parts = Concat((1, 2), -1, LINEAR), Concat((1, 2))
        for ending, name, op in zip(("weight", "bias"), ("kernel", "bias"), parts, strict=True):
            found.append(Rule((f"attn_pool.q.{ending}", f"attn_pool.kv.{ending}"), f"pool/qkv/{name}", op))
        found += linear("attn_pool.proj", "pool/proj")
        found += norm("attn_pool.norm", "pool/norm")
        found += [*linear("attn_pool.mlp.fc1", "pool/mlp/fc1"), *linear("attn_pool.mlp.fc2", "pool/mlp/fc2")]
    found += linear("head", "head")
    found += [Rule("head_dist.weight", "head/dist_kernel", LINEAR), Rule("head_dist.bias", "head/dist_bias")]
    found.append(Rule(("mask_token", "decoder_*"), None, why=PRETRAINING))
    if is_beit(ours):
        found.append(Rule("blocks.*.attn.relative_position_index", None, why="it follows from the picture's size"))
    return present(found, ours)


def depth(ours: Mapping[str, tuple[int, ...]]) -> int:
    """The number of blocks."""
    i = 0
    while f"block{i}/norm1/scale" in ours:
        i += 1
    return i


def is_beit(ours: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether it has positions relative to each other."""
    return "block0/attn/rel_pos" in ours


def is_gated(ours: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether the MLPs' first layer makes gates as well: twice the width of the second."""
    return ours["block0/mlp/fc1/kernel"][1] != ours["block0/mlp/fc2/kernel"][0]
