"""Records what timm's, transformers' and open_clip's variants of ViT do with generated weights, for tests/test_vit.py.

Needs torch, torchvision, timm, transformers and open_clip, not jax: python scripts/vit_goldens.py tests/goldens/vit.npz
Patterns of names behind the file record those models alone anew: … vit.npz 'beit*'
The models that are there two blocks deep are recorded whole, one at a time, with --whole:
… --whole tests/goldens/vit_whole.npz 'vit_giant*'. `scripts/check_whole.py` runs them.
"""

import argparse
import hashlib
import re
import tempfile
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

import goldens  # declares what torchvision needs, and has the names that all of timm's ViTs share
import numpy as np
import open_clip
import timm
import torch
import transformers
from generated import OTHER_VITS, VITS, case, picture, size, sketch, torch_weight, weight
from safetensors.torch import load_file, save_file

CLASSES = 10
SIDE = 24  # of the pictures for other libraries than timm
SIDE_14 = 42  # with patches of 14; transformers takes positions to be those of a square

MODELS = [f"deit_{size}_patch16_224" for size in ("tiny", "small", "base")]
MODELS += [f"deit_{size}_distilled_patch16_224" for size in ("tiny", "small", "base")]
MODELS += [f"deit3_{size}_patch16_224" for size in ("small", "base", "large")]
MODELS += [f"vit_{size}_patch14_{reg}dinov2" for size in ("small", "base", "large", "giant") for reg in ("", "reg4_")]
MODELS += [
    f"vit_{size}_clip_{act}224"
    for size in ("base_patch32", "base_patch16", "large_patch14")
    for act in ("", "quickgelu_")
]
MODELS += [f"vit_base_patch16_siglip_{side}" for side in (224, 256, 384)]
MODELS += [f"vit_large_patch16_siglip_{side}" for side in (256, 384)]
MODELS += [f"vit_so400m_patch{patch}_siglip_{side}" for patch, side in ((14, 224), (14, 384), (16, 256), (16, 384))]
MODELS += [f"{beit}_{size}_patch16_224" for beit in ("beit", "beitv2") for size in ("base", "large")]
# Recorded whole before; of the others those of more than 100 M parameters are recorded as wide as they are, but two
# blocks deep: the other blocks differ by their numbers alone. The names and shapes of all of them are recorded.
WHOLE = {"vit_large_patch14_dinov2", "vit_large_patch14_clip_quickgelu_224", "vit_so400m_patch14_siglip_384"}
# Under the names of DINOv2's own repository, which transformers has too.
REGISTERS = {f"dinov2_vit{size[0]}14_reg": size for size in ("small", "base", "large", "giant")}
WIDTHS = dict(small=(384, 12, 6), base=(768, 12, 12), large=(1024, 24, 16), giant=(1536, 40, 24))

# Tables of relative positions resized from a square grid.
RELATIVE = [(4, (6, 6)), (14, (24, 24)), (4, (3, 5)), (5, (4, 2))]

# Their names to ours, besides those in goldens.py and as apart from jft.weights.
NAMES = [
    (r"^(cls_token|dist_token|reg_token|pos_embed)$", r"embed.\1"),
    (r"^norm_pre\.", r"embed.norm."),
    (r"^attn_pool\.", r"pool."),
    (r"^head_dist\.weight", r"head.dist_kernel"),
    (r"^head_dist\.bias", r"head.dist_bias"),
    (r"\.gamma_(\d)$", r".ls\1.gamma"),
    (r"\.relative_position_bias_table$", r".rel_pos"),
]


def ours(name: str, value: torch.Tensor) -> str:
    """Our name of a tensor of timm's."""
    for pattern, replacement in NAMES:
        name = re.sub(pattern, replacement, name)
    return goldens.ours(name, value)


def fill(model: torch.nn.Module) -> None:
    """Give every tensor its generated value."""
    with torch.no_grad():
        for name, value in model.state_dict().items():
            axes = {4: (3, 2, 0, 1), 2: (1, 0)}.get(value.ndim, tuple(range(value.ndim)))
            if name.endswith("table"):
                axes = (0, 1)
            if packed := re.match(
                r"attn_pool\.(q|kv)\.(weight|bias)", name
            ):  # one array of ours, the query's share first
                dim = value.shape[-1] if value.ndim == 2 else value.shape[0] // len(packed[1])
                whole = weight(
                    *{2: ("pool/qkv/kernel", (dim, 3 * dim)), 1: ("pool/qkv/bias", (3 * dim,))}[value.ndim]
                ).T
                value.copy_(torch.from_numpy((whole[:dim] if packed[1] == "q" else whole[dim:]).copy()))
                continue
            shape = tuple(np.array(value.shape)[np.argsort(axes)])
            value.copy_(torch.from_numpy(weight(ours(name, value), shape).transpose(axes).copy()))


def tap(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What every part of ours gives, filled in as the model runs."""
    seen: dict[str, torch.Tensor] = {}
    model.blocks[0].register_forward_pre_hook(lambda m, args: seen.__setitem__("embed", args[0]))
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda m, args, y, i=i: seen.__setitem__(f"block{i}", y))
    model.norm.register_forward_hook(lambda m, args, y: seen.__setitem__("norm", y))

    def pool(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        seen["pool"] = seen["norm"][:, :2] if hasattr(model, "head_dist") else args[0]

    model.head.register_forward_pre_hook(pool)
    model.register_forward_hook(lambda m, args, y: seen.__setitem__("head", y))
    return seen


def tiny(kind: str) -> torch.nn.Module:
    """timm's model with the options of `tiny_vit` in `VITS`."""
    options = dict(VITS[kind])
    known = dict(
        img_size=size("tiny_vit"), patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=CLASSES, qkv_bias=True
    )
    if kind == "beit":
        known |= dict(use_abs_pos_emb=False, use_rel_pos_bias=True, init_values=options["layer_scale"])
        return timm.models.beit.Beit(**known)
    gated = options.get("act") == "swiglu"
    known |= dict(
        mlp_ratio=options.get("mlp_dim", 128) / 32 * (2 if gated else 1),
        init_values=options.get("layer_scale"),
        class_token=options.get("class_token", True),
        reg_tokens=options.get("registers", 0),
        no_embed_class=options.get("positions") == "patches",
        pre_norm=options.get("pre_norm", False),
        global_pool=options.get("pool", "token"),
        norm_layer=lambda *args, **kwargs: torch.nn.LayerNorm(*args, eps=options.get("epsilon", 1e-6), **kwargs),
    )
    if gated:
        known |= dict(mlp_layer=timm.layers.SwiGLUPacked, act_layer=torch.nn.SiLU)
    elif options.get("act"):
        known |= dict(act_layer=options["act"])
    if options.get("distilled"):
        return timm.models.deit.VisionTransformerDistilled(**known)
    return timm.models.VisionTransformer(**known)


def record(key: str, model: torch.nn.Module, pixels: np.ndarray) -> dict[str, np.ndarray]:
    """The logits and a sketch of every part's output, in the order of the parts."""
    fill(model.eval())
    seen = tap(model)
    with torch.no_grad():
        logits = model(torch.from_numpy(pixels.transpose(0, 3, 1, 2)))
    sketches = [sketch(y.numpy()) for y in seen.values()]
    return {f"{key}/logits": logits.numpy(), f"{key}/parts": np.stack(sketches).astype(np.float32)}


def digest(shapes: dict[str, tuple[int, ...]]) -> np.ndarray:
    """SHA-256 of the sorted lines `name shape`."""
    lines = sorted(f"{name} {tuple(shape)}\n" for name, shape in shapes.items())
    return np.frombuffer(hashlib.sha256("".join(lines).encode()).digest(), np.uint8)


# --- transformers and open_clip


def hugging_face(kind: str) -> tuple[torch.nn.Module, object]:
    """A tiny model of transformers', and what it makes of pictures."""
    options = OTHER_VITS[kind]
    tower = dict(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=options.get("mlp_dim", 128),
        image_size=SIDE,
        patch_size=8,
        layer_norm_eps=options.get("epsilon", 1e-6),
    )
    classes = dict(num_labels=CLASSES)
    text = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    match kind.removeprefix("hf "):
        case "vit":
            made = transformers.ViTForImageClassification(transformers.ViTConfig(**tower, **classes))
        case "mae":
            config = transformers.ViTMAEConfig(
                **tower,
                mask_ratio=0.0,
                decoder_hidden_size=16,
                decoder_num_attention_heads=2,
                decoder_num_hidden_layers=1,
                decoder_intermediate_size=16,
            )
            # What is in front of the last norm's class token does not depend on the order of the patches.
            made = transformers.ViTMAEForPreTraining(config)
            return made, lambda m, x: m.vit(x).last_hidden_state[:, 0]
        case "deit":
            made = transformers.DeiTForImageClassificationWithTeacher(transformers.DeiTConfig(**tower, **classes))
        case "dinov2":
            made = transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**tower, **classes))
        case "dinov2 swiglu":
            # The library makes the width of the gated unit two thirds of this, rounded up to a multiple of 8.
            config = transformers.Dinov2Config(**tower, **classes, use_swiglu_ffn=True, mlp_ratio=2)
            made = transformers.Dinov2ForImageClassification(config)
        case "dinov2 registers":
            config = transformers.Dinov2WithRegistersConfig(**tower, **classes, num_register_tokens=4)
            made = transformers.Dinov2WithRegistersForImageClassification(config)
        case "clip":
            made = transformers.CLIPModel(
                transformers.CLIPConfig(vision_config=tower, text_config=text, projection_dim=options["projection"])
            )
            return made, lambda m, x: m.visual_projection(m.vision_model(x).pooler_output)
        case "siglip":
            made = transformers.SiglipModel(transformers.SiglipConfig(vision_config=tower, text_config=text))
            return made, lambda m, x: m.vision_model(x).pooler_output
        case "beit":
            config = transformers.BeitConfig(
                **tower, **classes, use_relative_position_bias=True, use_mean_pooling=True, layer_scale_init_value=0.1
            )
            made = transformers.BeitForImageClassification(config)
    return made, lambda m, x: m(x).logits


def opened(made: torch.nn.Module) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """The model with generated weights, opened from a file of the library's own names; and that file's content."""
    with tempfile.TemporaryDirectory() as folder:
        made.save_pretrained(folder)
        path = str(Path(folder) / "model.safetensors")
        content = {n: torch.from_numpy(torch_weight(n, tuple(t.shape))) for n, t in load_file(path).items()}
        save_file(content, path, {"format": "pt"})
        return type(made).from_pretrained(folder).eval(), content


def record_hugging_face(kind: str, pixels: torch.Tensor) -> dict[str, np.ndarray]:
    """What the model gives, opened from a file of the library's own names; the names there and in memory."""
    made, run = hugging_face(kind)
    again, content = opened(made)
    with torch.no_grad():
        y = run(again, pixels)
    return {
        f"{kind}/y": y.numpy(),
        f"{kind}/file": np.array([f"{n} {' '.join(map(str, t.shape))}" for n, t in sorted(content.items())]),
        f"{kind}/memory": np.array(
            [f"{n} {' '.join(map(str, t.shape))}" for n, t in sorted(made.state_dict().items())]
        ),
    }


def record_torchvision(kind: str, pixels: torch.Tensor) -> dict[str, np.ndarray]:
    """The logits of its ViT."""
    model = goldens.torchvision.models.VisionTransformer(SIDE, 8, 3, 2, 32, 128, num_classes=CLASSES).eval()
    content = {n: torch.from_numpy(torch_weight(n, tuple(t.shape))) for n, t in model.state_dict().items()}
    model.load_state_dict(content)
    with torch.no_grad():
        y = model(pixels)
    names = np.array([f"{n} {' '.join(map(str, t.shape))}" for n, t in sorted(content.items())])
    return {f"{kind}/y": y.numpy(), f"{kind}/file": names}


def record_open_clip(kind: str, pixels: torch.Tensor) -> dict[str, np.ndarray]:
    """The embedding of pictures."""
    options = OTHER_VITS[kind]
    model = open_clip.model.CLIP(
        options["projection"],
        dict(layers=3, width=32, head_width=16, patch_size=8, image_size=SIDE),
        dict(context_length=4, vocab_size=9, width=16, heads=2, layers=1),
        quick_gelu=options.get("act") == "quick_gelu",
    ).eval()
    content = {n: torch.from_numpy(torch_weight(n, tuple(t.shape))) for n, t in model.state_dict().items()}
    model.load_state_dict(content)
    with torch.no_grad():
        y = model.encode_image(pixels)
    names = np.array([f"{n} {' '.join(map(str, t.shape))}" for n, t in sorted(content.items())])
    return {f"{kind}/y": y.numpy(), f"{kind}/file": names}


def record_registers(name: str, deep: bool = False) -> dict[str, np.ndarray]:
    """DINOv2 with registers in transformers: the logits, every part's output, and all names and shapes.

    The large ones are two blocks deep if they are not to be `deep`.
    """
    dim, depth, heads = WIDTHS[REGISTERS[name]]
    known = dict(hidden_size=dim, num_attention_heads=heads, patch_size=14, num_labels=CLASSES, num_register_tokens=4)
    known |= dict(use_swiglu_ffn=REGISTERS[name] == "giant")
    kind = transformers.Dinov2WithRegistersForImageClassification
    with torch.device("meta"):
        whole = kind(transformers.Dinov2WithRegistersConfig(**known, num_hidden_layers=depth, image_size=518))
    options = {"pool": "token_avg"} | ({} if depth == 12 or deep else {"depth": 2})
    config = transformers.Dinov2WithRegistersConfig(
        **known, num_hidden_layers=options.get("depth", depth), image_size=SIDE_14
    )
    made, _ = opened(kind(config))
    seen: dict[str, torch.Tensor] = {}
    base = made.dinov2_with_registers
    blocks = next(m for m in base.modules() if isinstance(m, torch.nn.ModuleList))
    for i, block in enumerate(blocks):
        if not i:
            block.register_forward_pre_hook(lambda m, args: seen.__setitem__("embed", args[0]))
        block.register_forward_hook(lambda m, args, y, i=i: seen.__setitem__(i, y[0] if isinstance(y, tuple) else y))
    base.layernorm.register_forward_hook(lambda m, args, y: seen.__setitem__("norm", y))
    made.classifier.register_forward_pre_hook(lambda m, args: seen.__setitem__("pool", args[0]))
    made.classifier.register_forward_hook(lambda m, args, y: seen.__setitem__("head", y))
    with torch.no_grad():
        logits = made(torch.from_numpy(picture(2, SIDE_14, SIDE_14, 3).transpose(0, 3, 1, 2).copy())).logits
    parts = np.stack([sketch(y.numpy()) for y in seen.values()]).astype(np.float32)
    names = digest({n: tuple(t.shape) for n, t in whole.state_dict().items()})
    key = case(name, **options)
    return {f"{key}/logits": logits.numpy(), f"{key}/parts": parts, f"{name}/memory names": names}


def is_large(name: str) -> bool:
    """Whether a model is recorded two blocks deep beside the others."""
    if name in REGISTERS:
        return WIDTHS[REGISTERS[name]][1] > 12
    with torch.device("meta"):
        return name not in WHOLE and sum(p.numel() for p in timm.create_model(name).parameters()) >= 100e6


def record_timm(name: str, deep: bool = False) -> dict[str, np.ndarray]:
    """One of timm's models, and its names and shapes; the large ones two blocks deep if they are not to be `deep`."""
    with torch.device("meta"):
        whole = timm.create_model(name, num_classes=1000)
    options = {"depth": 2} if is_large(name) and not deep else {}
    made = timm.create_model(name, img_size=size(name), num_classes=CLASSES, **options)
    names = digest({n: tuple(t.shape) for n, t in whole.state_dict().items()})
    return record(case(name, **options), made, picture(2, *size(name), 3)) | {f"{name}/names": names}


def record_relative() -> dict[str, np.ndarray]:
    """Tables of relative positions, resized."""
    arrays = {}
    for old, new in RELATIVE:
        table = np.random.default_rng(old).normal(size=((2 * old - 1) ** 2 + 3, 2)).astype(np.float32)
        shape = ((2 * new[0] - 1) * (2 * new[1] - 1) + 3, 2)
        resized = timm.layers.resize_rel_pos_bias_table(torch.from_numpy(table), list(new), shape)
        arrays[f"relative {old} {new[0]} {new[1]}"] = resized.numpy()
    return arrays


def main(path: str, patterns: Sequence[str], deep: bool) -> None:
    """Record every model, or those whose names match a pattern, into one file, and keep what else it has."""
    pixels = torch.from_numpy(picture(2, SIDE, SIDE, 3).transpose(0, 3, 1, 2).copy())
    tasks: dict[str, Callable[[], dict[str, np.ndarray]]] = {}
    for kind in VITS:
        tasks[kind] = partial(lambda kind: record(kind, tiny(kind), picture(2, *size("tiny_vit"), 3)), kind)
    for kind in OTHER_VITS:
        records = {"h": record_hugging_face, "o": record_open_clip, "t": record_torchvision}
        tasks[kind] = partial(records[kind[0]], kind, pixels)
    tasks |= {"relative": record_relative}
    models = {name: record_timm for name in MODELS} | {name: record_registers for name in REGISTERS}
    if deep:
        tasks, models = {}, {name: kind for name, kind in models.items() if is_large(name)}
    tasks |= {name: partial(kind, name, deep) for name, kind in models.items()}
    for name, task in tasks.items():
        if any(fnmatchcase(name, pattern) for pattern in patterns or ["*"]):
            print(name, flush=True)
            kept = dict(np.load(path)) if Path(path).exists() else {}
            found = {key: value for key, value in task().items() if not deep or "names" not in key}
            np.savez_compressed(path, **(kept | found))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", metavar="FILE.npz")
    parser.add_argument("patterns", nargs="*", metavar="PATTERN")
    parser.add_argument("--whole", action="store_true", help="the large models alone, at their whole depth")
    options = parser.parse_args()
    main(options.path, options.patterns, options.whole)
