"""Hugging Face transformers' names (ViTs, ResNet, BiT, ConvNeXt), and the JSON of its models and processors.

Files keep the names of transformers 4, which version 5 still writes and reads; in memory version 5 has others for ViT,
and a state dict saved by hand has those. A model without its task's head (`ViTModel`) leaves out the prefix and has a
pooler.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jft.errors import UserError
from jft.preprocess import Preprocess
from jft.weights import original, vit
from jft.weights.rules import LINEAR, Concat, Leading, Rule, Source, batch_norm, conv, linear, norm, present
from jft.weights.torchvision import blocks as cnn_blocks

# What the library calls one label an image, several, and quantities.
ONE, SEVERAL, NUMBERS = "single_label_classification", "multi_label_classification", "regression"

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class BlockNames:
    """Where a generation of the library keeps what a ViT's block holds."""

    block: str
    query: str
    key: str
    value: str
    proj: str
    fc1: str
    fc2: str
    gated: tuple[str | tuple[str, str], str]  # of DINOv2's giant, the first layer in one or in two
    relative: str  # BEiT's biases by relative position


_V4 = BlockNames(
    block="encoder.layer.{}",
    query="attention.attention.query",
    key="attention.attention.key",
    value="attention.attention.value",
    proj="attention.output.dense",
    fc1="intermediate.dense",
    fc2="output.dense",
    gated=("mlp.weights_in", "mlp.weights_out"),
    relative="attention.attention.relative_position_bias",
)
_V5 = BlockNames(
    block="layers.{}",
    query="attention.q_proj",
    key="attention.k_proj",
    value="attention.v_proj",
    proj="attention.o_proj",
    fc1="mlp.fc1",
    fc2="mlp.fc2",
    gated=(("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),
    relative="relative_position_bias",
)


@dataclass(frozen=True)
class Names:
    """A format: the names of a generation, of a model with the head of its task or of a bare one."""

    blocks: BlockNames
    bare: bool = False
    SOURCES: dict[str, Source] = field(default_factory=dict)

    def rules(self, ours: Shapes) -> tuple[Rule, ...]:
        """The rules for a model with these names and shapes; none for a family that the library has not."""
        # Some have the same names in both generations, so the first has them for both.
        family = _family(ours)
        if family is None or (family is not _vit and self.blocks is _V5):
            return ()
        return present(family(ours, self.blocks, self.bare), ours)


_BARE = {
    f"dinov2_vit{size[0]}14_reg": Source(
        f"hf:facebook/dinov2-with-registers-{size}",
        Preprocess(size=(518, 518), interpolation="bicubic"),
        "LVD-142M, without labels",
        "Apache-2.0",
        "https://arxiv.org/abs/2309.16588",
    )
    for size in ("small", "base", "large", "giant")
}
HF, HF_V5 = Names(_V4), Names(_V5)
HF_BARE, HF_BARE_V5 = Names(_V4, bare=True, SOURCES=_BARE), Names(_V5, bare=True)


def _vit(ours: Shapes, names: BlockNames, bare: bool) -> list[Rule]:
    kind = _kind(ours)
    root = "" if bare else f"{kind}."
    dino, beit, gated = kind.startswith("dinov2"), kind == "beit", vit.is_gated(ours)
    embeddings = f"{root}embeddings"
    found = [
        Rule(f"{embeddings}.cls_token", "embed/cls_token"),
        Rule(f"{embeddings}.distillation_token", "embed/dist_token"),
        Rule(f"{embeddings}.register_tokens", "embed/reg_token"),
        Rule(f"{embeddings}.position_embeddings", "embed/pos_embed", resize=True),
        *conv(f"{embeddings}.patch_embeddings.projection", "embed/patch"),
    ]
    for i in range(vit.depth(ours)):
        theirs, block = root + (_V4 if dino else names).block.format(i), f"block{i}"
        qkv = [f"{theirs}.{part}" for part in (names.query, names.key, names.value)]
        for j, name in ((1, "before"), (2, "after")):
            found += norm(f"{theirs}.norm{j}" if dino else f"{theirs}.layernorm_{name}", f"{block}/norm{j}")
            scale = f"layer_scale{j}.lambda1" if dino else f"lambda_{j}"
            found.append(Rule(f"{theirs}.{scale}", f"{block}/ls{j}/gamma"))
        found.append(Rule(tuple(f"{part}.weight" for part in qkv), f"{block}/attn/qkv/kernel", Concat(3, -1, LINEAR)))
        if beit:
            table = f"{theirs}.{names.relative}.relative_position_bias_table"
            found += [Rule(f"{qkv[k]}.bias", f"{block}/attn/{'qkv'[k]}_bias") for k in (0, 2)]
            found.append(Rule(table, f"{block}/attn/rel_pos", resize=True))
        else:
            found.append(Rule(tuple(f"{part}.bias" for part in qkv), f"{block}/attn/qkv/bias", Concat(3)))
        found += linear(f"{theirs}.{names.proj}", f"{block}/attn/proj")
        fc1, fc2 = names.gated if gated else (_V5.fc1, _V5.fc2) if dino else (names.fc1, names.fc2)
        found += linear(f"{theirs}.{fc2}", f"{block}/mlp/fc2")
        if isinstance(fc1, str):
            found += linear(f"{theirs}.{fc1}", f"{block}/mlp/fc1")
        else:
            halves = [f"{theirs}.{half}" for half in fc1]
            found += [
                Rule(tuple(f"{half}.weight" for half in halves), f"{block}/mlp/fc1/kernel", Concat(2, -1, LINEAR)),
                Rule(tuple(f"{half}.bias" for half in halves), f"{block}/mlp/fc1/bias", Concat(2)),
            ]
    found += norm(f"{root}layernorm", "norm")
    found.append(Rule(f"{embeddings}.mask_token", None, why=vit.PRETRAINING))
    if beit:
        found += norm(f"{root}pooler.layernorm", "pool/norm")
        found.append(Rule("*.relative_position_index", None, why="it follows from the picture's size"))
    if bare:
        pooler = Rule(("pooler.dense.weight", "pooler.dense.bias"), None, why="it belongs to no classifier")
        return [*found, pooler] if kind in ("vit", "deit") else found
    if kind == "vit":
        found.append(Rule("decoder.*", None, why=vit.PRETRAINING))  # ViTMAEForPreTraining
    if kind == "deit":
        second = [Rule("distillation_classifier.weight", "head/dist_kernel", LINEAR)]
        second.append(Rule("distillation_classifier.bias", "head/dist_bias"))
        return [*found, *linear("cls_classifier", "head"), *second]
    if dino and ours.get("head/kernel", (0,))[0] != 2 * ours["embed/patch/kernel"][-1]:
        why = "it follows the class token and the patches' mean: the model option pool='token_avg'"
        return [*found, Rule(("classifier.weight", "classifier.bias"), None, why=why)]
    return [*found, *linear("classifier", "head")]


def _kind(ours: Shapes) -> str:
    """The library's name of a ViT's family."""
    if vit.is_beit(ours):
        return "beit"
    if "block0/ls1/gamma" in ours:
        return "dinov2_with_registers" if "embed/reg_token" in ours else "dinov2"
    return "deit" if "embed/dist_token" in ours else "vit"


def _tower(ours: Shapes, names: BlockNames, bare: bool) -> list[Rule]:
    """CLIP's or SigLIP's tower of pictures. Neither's classifier in the library pools as the model itself does."""
    root = "" if bare else "vision_model."
    found = [
        Rule(f"{root}embeddings.class_embedding", "embed/cls_token", Leading(2)),
        Rule(f"{root}embeddings.position_embedding.weight", "embed/pos_embed", Leading(1), resize=True),
        *conv(f"{root}embeddings.patch_embedding", "embed/patch"),
        *norm(f"{root}pre_layrnorm", "embed/norm"),
        *norm(f"{root}post_layernorm", "norm"),
    ]
    for i in range(vit.depth(ours)):
        theirs, block = f"{root}encoder.layers.{i}", f"block{i}"
        qkv = [f"{theirs}.self_attn.{part}_proj" for part in "qkv"]
        found += [*norm(f"{theirs}.layer_norm1", f"{block}/norm1"), *norm(f"{theirs}.layer_norm2", f"{block}/norm2")]
        found += [
            Rule(tuple(f"{part}.weight" for part in qkv), f"{block}/attn/qkv/kernel", Concat(3, -1, LINEAR)),
            Rule(tuple(f"{part}.bias" for part in qkv), f"{block}/attn/qkv/bias", Concat(3)),
        ]
        found += linear(f"{theirs}.self_attn.out_proj", f"{block}/attn/proj")
        found += [*linear(f"{theirs}.mlp.fc1", f"{block}/mlp/fc1"), *linear(f"{theirs}.mlp.fc2", f"{block}/mlp/fc2")]
    if "pool/latent" in ours:
        found += [
            Rule(f"{root}head.probe", "pool/latent"),
            Rule(f"{root}head.attention.in_proj_weight", "pool/qkv/kernel", LINEAR),
            Rule(f"{root}head.attention.in_proj_bias", "pool/qkv/bias"),
        ]
        found += [*linear(f"{root}head.attention.out_proj", "pool/proj"), *norm(f"{root}head.layernorm", "pool/norm")]
        found += [*linear(f"{root}head.mlp.fc1", "pool/mlp/fc1"), *linear(f"{root}head.mlp.fc2", "pool/mlp/fc2")]
    found.append(Rule(f"{root}embeddings.position_ids", None, why="it counts"))
    if bare:
        return found
    text = ("text_model.*", "text_projection.*", "logit_scale", "logit_bias")
    projection = "projection/kernel" if "projection/kernel" in ours else None
    return [
        *found,
        Rule("visual_projection.weight", projection, LINEAR, why=original.PROJECTION),
        Rule(text, None, why=original.TEXT),
        Rule(
            ("classifier.weight", "classifier.bias"), None, why="it follows the mean of the patches, not this pooling"
        ),
    ]


def _resnet(ours: Shapes, names: BlockNames, bare: bool) -> list[Rule]:
    root = "" if bare else "resnet."

    def layer(theirs: str, kernel: str, scale: str) -> list[Rule]:
        return conv(f"{theirs}.convolution", kernel) + batch_norm(f"{theirs}.normalization", scale)

    found = layer(f"{root}embedder.embedder", "stem/conv", "stem/norm")
    for block in cnn_blocks(ours):
        stage, _, place = block.removeprefix("stage").partition("/block")
        theirs = f"{root}encoder.stages.{int(stage) - 1}.layers.{place}"
        for i in range(_convs(ours, block)):
            found += layer(f"{theirs}.layer.{i}", f"{block}/conv{i + 1}", f"{block}/norm{i + 1}")
        if f"{block}/shortcut/conv/kernel" in ours:
            found += layer(f"{theirs}.shortcut", f"{block}/shortcut/conv", f"{block}/shortcut/norm")
    return found if bare else [*found, *linear("classifier.1", "head")]


def _bit(ours: Shapes, names: BlockNames, bare: bool) -> list[Rule]:
    root = "" if bare else "bit."
    found = conv(f"{root}embedder.convolution", "stem/conv")
    for block in cnn_blocks(ours):
        stage, _, place = block.removeprefix("stage").partition("/block")
        theirs = f"{root}encoder.stages.{int(stage) - 1}.layers.{place}"
        found += conv(f"{theirs}.downsample.conv", f"{block}/shortcut")
        for i in (1, 2, 3):
            found += [*norm(f"{theirs}.norm{i}", f"{block}/norm{i}"), *conv(f"{theirs}.conv{i}", f"{block}/conv{i}")]
    found += norm(f"{root}norm", "norm")
    return found if bare else [*found, *linear("classifier.1", "head")]


def _convnext(ours: Shapes, names: BlockNames, bare: bool) -> list[Rule]:
    root = "" if bare else "convnext."
    found = conv(f"{root}embeddings.patch_embeddings", "stem/patch")
    found += norm(f"{root}embeddings.layernorm", "stem/norm")
    for block in cnn_blocks(ours):
        stage, _, place = block.removeprefix("stage").partition("/block")
        theirs = f"{root}encoder.stages.{int(stage) - 1}"
        found += norm(f"{theirs}.downsampling_layer.0", f"{block}/downsample/norm")
        found += conv(f"{theirs}.downsampling_layer.1", f"{block}/downsample/conv")
        theirs += f".layers.{place}"
        found.append(Rule(f"{theirs}.layer_scale_parameter", f"{block}/layer_scale/gamma"))
        found += [*conv(f"{theirs}.dwconv", f"{block}/conv"), *norm(f"{theirs}.layernorm", f"{block}/norm")]
        found += [*linear(f"{theirs}.pwconv1", f"{block}/fc1"), *linear(f"{theirs}.pwconv2", f"{block}/fc2")]
    found += norm(f"{root}layernorm", "norm")
    return found if bare else [*found, *linear("classifier", "head")]


def _family(ours: Shapes) -> Callable[[Shapes, BlockNames, bool], list[Rule]] | None:
    if "embed/patch/kernel" in ours:
        return _tower if "embed/norm/scale" in ours or "pool/latent" in ours else _vit
    if "stage1/block0/shortcut/kernel" in ours:
        return _bit
    if "stem/patch/kernel" in ours:
        return _convnext
    return _resnet if {"stem/conv/kernel", "stem/norm/scale"} <= ours.keys() else None


def _convs(ours: Shapes, block: str) -> int:
    return sum(f"{block}/conv{i}/kernel" in ours for i in (1, 2, 3))


# --- config.json


def config(model: Any, ours: Shapes, classes: Sequence[str], problem: str = ONE) -> dict[str, Any]:
    """What `config.json` says of a classifier, so that the library builds the same one; `ours` are those of `widened`.

    Raises UserError for a model that none of the library's own computes.
    """
    family = _family(ours)
    if family is None or family is _tower:
        raise UserError(
            f"transformers has no classifier of its own that computes what {model.name} does. "
            "Export it to timm, or as stablehlo."
        )
    configs: dict[Any, Callable[[Any, Shapes], dict[str, Any]]]
    configs = {_vit: _vit_config, _resnet: _resnet_config, _bit: _bit_config, _convnext: _convnext_config}
    return {
        **configs[family](model, ours),
        "num_channels": 3,
        "id2label": {str(i): name for i, name in enumerate(classes)},
        "label2id": {name: i for i, name in enumerate(classes)},
        "problem_type": problem,
    }


def timm_config(
    model: Any, options: Mapping[str, Any], classes: Sequence[str], preprocess: Preprocess, problem: str = ONE
) -> dict[str, Any]:
    """What `config.json` says of a model that the library has through timm alone; `options` are `create_model`'s."""
    return {
        "architectures": ["TimmWrapperForImageClassification"],
        "model_type": "timm_wrapper",
        "architecture": model.name,
        "model_args": dict(options),
        "num_classes": len(classes),
        "label_names": list(classes),
        "problem_type": problem,
        "pretrained_cfg": _pretrained_cfg(preprocess),
    }


def timm_processor(preprocess: Preprocess) -> dict[str, Any]:
    """What `config.json` says beside the model, so that the library prepares pictures by timm's own transform."""
    return {"image_processor_type": "TimmWrapperImageProcessor", "pretrained_cfg": _pretrained_cfg(preprocess)}


def _pretrained_cfg(preprocess: Preprocess) -> dict[str, Any]:
    height, width = preprocess.size
    return {
        "input_size": [3, height, width],
        "crop_pct": 1.0 if preprocess.squash else preprocess.crop_pct,  # timm cuts what it has squashed
        "crop_mode": "squash" if preprocess.squash else "center",
        "interpolation": preprocess.interpolation,
        "mean": list(preprocess.mean),
        "std": list(preprocess.std),
    }


def widened(model: Any, params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The parameters as the library's own classifier takes them: zeros where it has more, and so computes the same.

    DINOv2's classifier sees the class token and the patches' mean, and its class token has a position.
    """
    params = dict(params)
    shapes = {name: array.shape for name, array in params.items()}
    if _family(shapes) is not _vit or not _kind(shapes).startswith("dinov2"):
        return params
    kernel, positions = params["head/kernel"], params.get("embed/pos_embed")
    if len(kernel) == shapes["embed/patch/kernel"][-1] and type(model.parts["pool"]).__name__ == "TokenPool":
        params["head/kernel"] = np.concatenate([kernel, np.zeros_like(kernel)])
    if positions is not None and _placed(model, shapes) == 0 and "embed/cls_token" in params:
        params["embed/pos_embed"] = np.concatenate([np.zeros_like(positions[:, :1]), positions], axis=1)
    return params


def _placed(model: Any, ours: Shapes) -> int:
    """How many tokens beside the patches have a position."""
    patch = ours["embed/patch/kernel"]
    return ours["embed/pos_embed"][1] - (model.input_shape[0] // patch[0]) * (model.input_shape[1] // patch[1])


def unused(ours: Shapes) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what the library's own class has for training alone, and misses in a file without."""
    if _family(ours) is _vit and _kind(ours) == "dinov2_with_registers":
        return {"dinov2_with_registers.embeddings.mask_token": (1, ours["embed/patch/kernel"][-1])}
    return {}


@dataclass(frozen=True)
class _Kind:
    """A class of the library's for ViTs: its name, our options that it has, its pools, tokens that have a position."""

    name: str
    embed: tuple[str, ...] = ()
    pools: tuple[str, ...] = ("TokenPool",)
    placed: int = 1
    square: bool = False  # its pictures; others would be taken to have a square's positions


_KINDS = {
    "vit": _Kind("ViTForImageClassification"),
    "deit": _Kind("DeiTForImageClassificationWithTeacher", ("distilled",), placed=2),
    "beit": _Kind("BeitForImageClassification", ("positions",), ("MeanPool",), 0, square=True),
    "dinov2": _Kind("Dinov2ForImageClassification", ("positions",), ("TokenPool", "TokenMeanPool"), square=True),
    "dinov2_with_registers": _Kind(
        "Dinov2WithRegistersForImageClassification",
        ("positions", "registers"),
        ("TokenPool", "TokenMeanPool"),
        square=True,
    ),
}
_ACTS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu", "swiglu": "silu"}


def _vit_config(model: Any, ours: Shapes) -> dict[str, Any]:
    name = _kind(ours)
    kind = _KINDS[name]
    blocks = [part for part in model.parts if part.startswith("block")]
    first, dim = model.parts["block0"], ours["embed/patch/kernel"][-1]
    height, width = model.input_shape[:2]
    for block in blocks:
        _plain(model, block, {"heads", "mlp", "act", "epsilon", "layer_scale", "grid"})
    _plain(model, "embed", {"patch", "dim", "epsilon", *kind.embed})  # of the norm that a pre_norm would have
    if type(model.parts["pool"]).__name__ not in kind.pools:
        raise _unlike(model, f"it pools by {type(model.parts['pool']).__name__}")
    if (placed := _placed(model, ours) if "embed/pos_embed" in ours else 0) != kind.placed:
        raise _unlike(model, f"{placed} tokens beside the patches have positions")
    if kind.square and height != width:
        raise _unlike(model, f"its pictures are {height}×{width}, and it takes positions to be those of a square")
    epsilons = {getattr(model.parts[part], "epsilon", first.epsilon) for part in (*blocks, "norm", "pool")}
    if len(epsilons) > 1:
        raise _unlike(model, "its LayerNorms add different numbers to the variance")
    made = {
        "architectures": [kind.name],
        "model_type": name,
        "hidden_size": dim,
        "num_hidden_layers": len(blocks),
        "num_attention_heads": first.heads,
        "hidden_act": _ACTS[first.act],
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": first.epsilon,
        "patch_size": ours["embed/patch/kernel"][0],
        "image_size": height if height == width else [height, width],
    }
    hidden, gated = ours["block0/mlp/fc2/kernel"][0], vit.is_gated(ours)
    if name.startswith("dinov2"):
        # The width of a gated MLP is two thirds of what the ratio says, rounded up to a multiple of 8.
        ratios = [r for r in range(1, 17) if ((r * dim * 2 // 3 + 7) // 8 * 8 if gated else r * dim) == hidden]
        if not ratios:
            raise _unlike(model, f"its MLPs are {hidden} wide beside {dim} channels")
        made |= {"mlp_ratio": ratios[0], "use_swiglu_ffn": gated, "use_mask_token": False, "qkv_bias": True}
        return made | ({"num_register_tokens": ours["embed/reg_token"][1]} if "embed/reg_token" in ours else {})
    if gated:
        raise _unlike(model, f"its activation is {first.act}")
    made["intermediate_size"] = hidden
    if name != "beit":
        return made | {"qkv_bias": "block0/attn/qkv/bias" in ours}
    return made | {
        "use_mask_token": False,
        "use_absolute_position_embeddings": False,
        "use_relative_position_bias": True,
        "use_shared_relative_position_bias": False,
        "layer_scale_init_value": float(first.layer_scale or 0.0),
        "use_mean_pooling": True,
    }


def _resnet_config(model: Any, ours: Shapes) -> dict[str, Any]:
    bottleneck = _convs(ours, "stage1/block0") == 3
    outs = []
    _plain(model, "stem", {"width"})
    for s, blocks in enumerate(_stages(ours)):
        out = ours[f"{blocks[0]}/conv{3 if bottleneck else 2}/kernel"][-1]
        outs.append(out)
        for b, block in enumerate(blocks):
            _plain(model, block, {"convs"})
            stride, inner = 2 if s > 0 and b == 0 else 1, out // 4
            expected = [(3, out, stride, 1), (3, out, 1, 1)]
            if bottleneck:
                expected = [(1, inner, 1, 1), (3, inner, stride, 1), (1, out, 1, 1)]
            if [tuple(conv) for conv in model.parts[block].convs] != expected:
                raise _unlike(model, f"its {block} has other convolutions")
    return {
        "architectures": ["ResNetForImageClassification"],
        "model_type": "resnet",
        "embedding_size": ours["stem/conv/kernel"][-1],
        "hidden_sizes": outs,
        "depths": [len(blocks) for blocks in _stages(ours)],
        "layer_type": "bottleneck" if bottleneck else "basic",
        "hidden_act": "relu",
        "downsample_in_first_stage": False,
        "downsample_in_bottleneck": False,
    }


def _bit_config(model: Any, ours: Shapes) -> dict[str, Any]:
    stages = _stages(ours)
    return {
        "architectures": ["BitForImageClassification"],
        "model_type": "bit",
        "embedding_size": ours["stem/conv/kernel"][-1],
        "hidden_sizes": [ours[f"{blocks[0]}/conv3/kernel"][-1] for blocks in stages],
        "depths": [len(blocks) for blocks in stages],
        "layer_type": "preactivation",
        "hidden_act": "relu",
        "global_padding": None,  # by half of the filter, whatever the picture's size
        "num_groups": model.parts["norm"].groups,
    }


def _convnext_config(model: Any, ours: Shapes) -> dict[str, Any]:
    stages = _stages(ours)
    return {
        "architectures": ["ConvNextForImageClassification"],
        "model_type": "convnext",
        "num_stages": len(stages),
        "hidden_sizes": [ours[f"{blocks[0]}/fc2/kernel"][-1] for blocks in stages],
        "depths": [len(blocks) for blocks in stages],
        "patch_size": ours["stem/patch/kernel"][0],
        "hidden_act": "gelu",
        "layer_norm_eps": model.parts["norm"].epsilon,
        "image_size": model.input_shape[0],
    }


def _stages(ours: Shapes) -> list[list[str]]:
    """The blocks of every stage."""
    stages: dict[str, list[str]] = {}
    for block in cnn_blocks(ours):
        stages.setdefault(block.split("/")[0], []).append(block)
    return [*stages.values()]


# How a part computes or is trained, not what.
_MANNER = {"parent", "name", "dtype", "drop_path", "axis_name"}


def _plain(model: Any, part: str, known: Collection[str]) -> None:
    """Refuse a part with an option that the library's own model would leave out without a word."""
    module = model.parts[part]
    for option in dataclasses.fields(module):
        value = getattr(module, option.name)
        if option.name not in {*known, *_MANNER} and value != option.default:
            raise _unlike(model, f"its {part} has {option.name}={value!r}")


def _unlike(model: Any, what: str) -> UserError:
    return UserError(f"transformers' own model cannot be {model.name}: {what}. Export it to timm, or as stablehlo.")


# --- preprocessor_config.json

_PIL_CODES = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4}


def processor(preprocess: Preprocess) -> dict[str, Any]:
    """What `preprocessor_config.json` says, so that an image processor gives the pixels of `preprocess`.

    BitImageProcessor is the plain one that resizes the shorter side to any number of pixels and cuts the centre out;
    ViTImageProcessor only squashes. Where an odd number of pixels is left over by the crop, the library rounds down and
    torchvision, and so jft, to the even number: the crop then lies one pixel apart in a quarter of all sizes. None of
    the library's processors rounds as torchvision does in versions 4 and 5 both, but the one that calls timm: that is
    what `timm_processor` names.
    """
    height, width = preprocess.size
    window = {"height": height, "width": width}
    if preprocess.squash:
        kind: dict[str, Any] = {"image_processor_type": "ViTImageProcessor", "size": window}
    else:
        kind = {
            "image_processor_type": "BitImageProcessor",
            "size": {"shortest_edge": preprocess.resize},
            "do_center_crop": True,
            "crop_size": window,
        }
    return {
        **kind,
        "do_convert_rgb": True,
        "do_resize": True,
        "resample": _PIL_CODES[preprocess.interpolation],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess.mean),
        "image_std": list(preprocess.std),
    }
