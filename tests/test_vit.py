"""The Vision Transformer's variants: parity with timm, transformers and open_clip through goldens, and their names."""

import hashlib
import json
from fnmatch import fnmatchcase
from pathlib import Path

import jax
import numpy as np
import pytest
from generated import OTHER_VITS, VITS, picture, torch_weight, weight
from parity import differences, made_of, relative, run_part

from jft import tree, weights
from jft.convert import import_weights
from jft.errors import UserError
from jft.models import MODELS, make_model
from jft.preprocess import Preprocess
from jft.weights import formats
from jft.weights.export import export_hf, timm_code, timm_options
from jft.weights.resample import resample_pos_embed, resample_rel_pos
from jft.weights.rules import HEAD, to_theirs
from jft.weights.writers import write_npz, write_safetensors

GOLDENS = np.load(Path(__file__).parent / "goldens" / "vit.npz")
FULL = sorted(key.removesuffix("/parts") for key in GOLDENS.files if key.endswith("/parts") and "patch" in key)
REGISTERS = sorted(key.removesuffix("/parts") for key in GOLDENS.files if key.endswith("/parts") and "_vit" in key)
NAMED = sorted(key.split("/")[0] for key in GOLDENS.files if key.endswith("/names"))


def tiny(kind, **options):
    """`tiny_vit` as this variant, of one block where only names matter."""
    return make_model("tiny_vit", **{**(VITS | OTHER_VITS)[kind], "num_classes": 7, **options})


def shapes_of(rules, ours):
    """Names and shapes of what a file in a format holds for this model."""
    return {n: s for r in rules if r.ours for n, s in zip(r.names, r.shapes(ours[r.ours]), strict=True)}


def content_of(model, format):
    """A file's content for this model in this format."""
    ours, _ = formats._shapes(model)
    return {n: torch_weight(n, s) for n, s in shapes_of(weights.FORMATS[format].rules(ours), ours).items()}


def run(model, params, x, stop=None):
    for part in model.span(None, stop):
        x = run_part(model.parts[part], {"params": tree.nest(tree.under(params, part))}, x)
    return x


# --- parity


@pytest.mark.parametrize(
    "case", [*VITS, *(pytest.param(n, marks=() if n == "deit_tiny_patch16_224" else pytest.mark.slow) for n in FULL)]
)
def test_parity_with_timm_after_every_part(case):
    """With the same generated weights: `scripts/vit_goldens.py`. `depth=2`: as wide as the model, two blocks deep.

    Those are run whole by `scripts/check_whole.py`.
    """
    name, options = ("tiny_vit", VITS[case]) if case in VITS else made_of(case)
    for place, off in differences(GOLDENS, case, name, options):
        assert off < 2e-5, place


@pytest.mark.parametrize(
    "case", [pytest.param(n, marks=() if n.startswith("dinov2_vits") else pytest.mark.slow) for n in REGISTERS]
)
def test_parity_with_transformers_after_every_part(case):
    """DINOv2 with registers under its own repository's names, its tensors read by the rules."""
    for place, off in differences(GOLDENS, case, *made_of(case), format="hf"):
        assert off < 2e-5, place


def listed(key):
    """Names and shapes as a golden lists them."""
    return {name: tuple(map(int, shape)) for name, *shape in (str(line).split() for line in GOLDENS[key])}


@pytest.mark.parametrize("kind", OTHER_VITS)
def test_parity_with_transformers_and_open_clip(tmp_path, kind):
    """A file with the library's own names, read without a hint, gives what the library's own model gives."""
    file = {n: torch_weight(n, s) for n, s in listed(f"{kind}/file").items()}
    write_safetensors(tmp_path / "w.safetensors", file)
    model = make_model("tiny_vit", num_classes=10, image_size=24, **OTHER_VITS[kind])
    loaded = weights.load(model, tmp_path / "w.safetensors")
    expected = GOLDENS[f"{kind}/y"]
    has_head = expected.shape[1] == 10
    assert loaded.receipt.format == {"h": "hf", "o": "clip", "t": "torchvision"}[kind[0]]
    assert set(loaded.missing) == (set() if has_head else {"head/kernel", "head/bias"})
    assert set(loaded.receipt.used) | set(loaded.receipt.dropped) == set(file)
    y = run(model, loaded.params, picture(2, 24, 24, 3), None if has_head else HEAD)
    assert relative(y, expected) < 2e-5


@pytest.mark.parametrize("kind", [kind for kind in OTHER_VITS if kind.startswith("hf")])
def test_names_in_memory_of_transformers_5(kind):
    """The names that a state dict saved by hand has."""
    ours, _ = formats._shapes(make_model("tiny_vit", num_classes=10, image_size=24, **OTHER_VITS[kind]))
    format = "hf" if kind in ("hf clip", "hf siglip") else "hf-v5"
    rules = weights.FORMATS[format].rules(ours)
    dropped = [name for rule in rules if not rule.ours for name in rule.names]
    memory = {n: s for n, s in listed(f"{kind}/memory").items() if not any(fnmatchcase(n, p) for p in dropped)}
    named = shapes_of(rules, ours)
    assert memory == {n: s for n, s in named.items() if n in memory} and all(
        HEAD in n or "classifier" in n for n in named.keys() - memory
    )


@pytest.mark.parametrize("name", NAMED)
def test_names_and_shapes_are_timms(name):
    ours, _ = formats._shapes(make_model(name, num_classes=1000))
    named = shapes_of(weights.FORMATS["timm"].rules(ours), ours)
    assert set(ours) == {rule.ours for rule in weights.FORMATS["timm"].rules(ours) if rule.ours}
    lines = sorted(f"{n} {tuple(s)}\n" for n, s in named.items())
    assert hashlib.sha256("".join(lines).encode()).digest() == GOLDENS[f"{name}/names"].tobytes()


@pytest.mark.parametrize("name", [n for n in MODELS if n.startswith("dinov2_vit")])
def test_names_and_shapes_are_transformers(name):
    """Whole models, in memory."""
    ours, _ = formats._shapes(make_model(name, num_classes=10, pool="token_avg"))
    named = shapes_of(weights.FORMATS["hf-v5"].rules(ours), ours)
    named["dinov2_with_registers.embeddings.mask_token"] = (1, ours["norm/scale"][0])
    lines = sorted(f"{n} {tuple(s)}\n" for n, s in named.items())
    assert hashlib.sha256("".join(lines).encode()).digest() == GOLDENS[f"{name}/memory names"].tobytes()


def test_every_variant_is_checked():
    """A golden of every model, and of those that are not run whole the names and shapes as well."""
    kinds = ("deit", "beit", "dinov2", "clip", "siglip")
    assert {n for n in MODELS if any(k in n for k in kinds)} == {made_of(case)[0] for case in (*FULL, *REGISTERS)}
    assert {made_of(case)[0] for case in FULL} == {*NAMED}


# --- weights


# What a file has besides, where the format is told from another by it.
BESIDES = {"dino": "head.last_layer.weight_v", "augreg-in21k": "pre_logits/kernel"}


@pytest.mark.parametrize("kind", [*VITS, *(kind for kind in OTHER_VITS if VITS.get(kind) != OTHER_VITS[kind])])
def test_import_then_export_gives_back_the_same_bytes(tmp_path, kind):
    """In every format that has names for all but the head."""
    model = tiny(kind, depth=1)
    ours, _ = formats._shapes(model)
    able = 0
    for format, module in weights.FORMATS.items():
        rules = module.rules(ours)
        named = {rule.ours for rule in rules if rule.ours}
        if any(not name.startswith(HEAD) for name in ours.keys() - named):
            continue
        able += 1
        content = {n: torch_weight(n, s) for n, s in shapes_of(rules, ours).items()}
        extra = {n: np.zeros((2, 2), np.float32) for n in [BESIDES.get(format)] if n}
        write_safetensors(tmp_path / "in.safetensors", content | extra)
        loaded = weights.load(model, tmp_path / "in.safetensors", format=format)
        assert set(loaded.missing) == ours.keys() - named, format
        assert loaded.receipt.used.keys() == content.keys() and loaded.receipt.dropped.keys() == extra.keys()
        written = to_theirs(rules, loaded.params, np.dtype(np.float32))
        assert written.keys() == content.keys()
        for n, expected in content.items():
            assert written[n].tobytes() == expected.tobytes() and written[n].shape == expected.shape, (format, n)
    assert able >= 4


def test_receipt_of_two_towers(tmp_path):
    """The text tower is named as left out in a line, and a prefix of everything is told."""
    content = {f"module.{n}": torch_weight(n, s) for n, s in listed("hf clip/file").items()}
    write_safetensors(tmp_path / "w.safetensors", content)
    model = make_model("tiny_vit", image_size=24, **{**OTHER_VITS["hf clip"], "projection": None})
    receipt = weights.load(model, tmp_path / "w.safetensors").receipt
    text = [name for name in receipt.dropped if name.startswith("text_model.")]
    assert len(text) > 15 and receipt.prefix == "module."
    assert f"{len(text)} × text_model…" in str(receipt) and "logit_scale" in str(receipt)
    assert "visual_projection.weight dropped (the projection into the space shared with text" in str(receipt)
    assert "'module.' of every name was taken off" in str(receipt)


def test_what_timm_calls_clips_head_is_a_projection_unless_it_classifies(tmp_path):
    """It has no bias, for which timm writes zeros; a classifier's is trained, or its classes have names."""
    model = tiny("clip", depth=1)
    file, content = tmp_path / "w.safetensors", content_of(model, "timm")
    options = {k: v for k, v in VITS["clip"].items()} | {"depth": 1}
    projection = content | {"head.bias": np.zeros_like(content["head.bias"])}
    named = {"config.json": {"label_names": [f"n{i}" for i in range(7)]}}
    for given, configs, classifies in ((content, {}, True), (projection, {}, False), (projection, named, True)):
        write_safetensors(file, given)
        for name, said in configs.items():
            (tmp_path / name).write_text(json.dumps(said))
        for made in (model, tiny("clip", depth=1, num_classes=3)):
            assert weights.head_size(made, file) == (7 if classifies else None)
        loaded = weights.load(model, file)
        assert loaded.receipt.format == "timm" and (not loaded.missing) == classifies
        assert ("which is no classifier" in str(loaded.receipt)) != classifies
        if not classifies:
            with pytest.raises(UserError, match="these weights lack head"):
                import_weights(file, "tiny_vit", tmp_path / "bundle", model_options=options)
    plain = make_model("tiny_vit", depth=1, num_classes=7)  # no CLIP, whose head is what it is called
    content = content_of(plain, "timm")
    write_safetensors(file, content | {"head.bias": np.zeros_like(content["head.bias"])})
    (tmp_path / "config.json").unlink()
    assert weights.head_size(plain, file) == 7


def test_dino_checkpoint_with_its_heads(tmp_path):
    model = tiny("dinov2_reg", depth=1)
    content = content_of(model, "dino")
    assert {"backbone.register_tokens", "backbone.blocks.0.ls1.gamma"} <= content.keys()
    extra = {f"{name}.mlp.0.weight": np.zeros((2, 2), np.float32) for name in ("head", "dino_head", "ibot_head")}
    write_safetensors(tmp_path / "w.safetensors", {f"module.{n}": a for n, a in {**content, **extra}.items()})
    receipt = weights.load(model, tmp_path / "w.safetensors").receipt
    assert receipt.format == "dino" and set(receipt.dropped) == set(extra)
    assert set(receipt.missing) == {"head/kernel", "head/bias"}


def test_masked_autoencoder_with_its_decoder(tmp_path):
    model = make_model("tiny_vit", depth=1)
    content = {n: a for n, a in content_of(model, "timm").items() if not n.startswith("head")}
    extra = {n: np.zeros((2, 2), np.float32) for n in ("mask_token", "decoder_embed.weight", "decoder_blocks.0.x")}
    write_safetensors(tmp_path / "w.safetensors", content | extra)
    receipt = weights.load(model, tmp_path / "w.safetensors").receipt
    assert set(receipt.dropped) == set(extra) and set(receipt.missing) == {"head/kernel", "head/bias"}


def test_siglip_of_big_vision_with_stacked_blocks(tmp_path):
    """SigLIP 2's files keep what a scan runs over in one array; names have `params/` before them."""
    model = tiny("siglip", depth=2)
    flat = {n: a for n, a in content_of(model, "big-vision-two-tower").items() if "head/" not in n}
    stacked = {n.replace("encoderblock_0/", "encoderblock/"): n for n in flat if "encoderblock_0/" in n}
    content = {n: a for n, a in flat.items() if "encoderblock_" not in n} | {
        "txt/x/kernel": np.zeros(2),
        "t": np.zeros(1),
    }
    content |= {
        n: np.stack([flat[place.replace("block_0/", f"block_{i}/")] for i in range(2)]) for n, place in stacked.items()
    }
    write_npz(tmp_path / "w.npz", {f"params/{n}": a for n, a in content.items()})
    loaded = weights.load(model, tmp_path / "w.npz")
    assert loaded.receipt.prefix == "params/" and set(loaded.receipt.dropped) == {"txt/x/kernel", "t"}
    assert any("2 blocks kept in one array each" in note for note in loaded.receipt.notes)
    name = "MultiHeadDotProductAttention_0"
    value = flat[f"img/Transformer/encoderblock_1/{name}/value/kernel"]
    assert value.shape == (32, 2, 16)
    np.testing.assert_array_equal(loaded.params["block1/attn/qkv/kernel"][:, 64:], value.reshape(32, 32))
    key = flat[f"img/MAPHead_0/{name}/key/bias"]
    np.testing.assert_array_equal(loaded.params["pool/qkv/bias"][32:64], key.ravel())

    content["img/Transformer/encoderblock/LayerNorm_0/bias"] = np.zeros((3, 32), np.float32)
    write_npz(tmp_path / "w.npz", content)
    with pytest.raises(UserError, match="not all of as many blocks"):
        weights.load(model, tmp_path / "w.npz")


def test_vit_jax_with_and_without_pre_logits(tmp_path):
    """The head behind a layer that the model has not is left out with it, and only then."""
    model = make_model("tiny_vit", depth=1, num_classes=7)
    content = content_of(model, "augreg")
    assert content["Transformer/encoderblock_0/MultiHeadDotProductAttention_1/out/kernel"].shape == (2, 16, 32)
    write_npz(tmp_path / "w.npz", content)
    loaded = weights.load(model, tmp_path / "w.npz")
    assert loaded.receipt.format == "augreg" and not loaded.missing
    content |= {"pre_logits/kernel": np.zeros((32, 32), np.float32), "pre_logits/bias": np.zeros(32, np.float32)}
    write_npz(tmp_path / "w.npz", {f"opt/target/{n}": a for n, a in content.items()})
    loaded = weights.load(model, tmp_path / "w.npz")
    assert loaded.receipt.format == "augreg-in21k" and set(loaded.missing) == {"head/kernel", "head/bias"}
    assert loaded.receipt.prefix == "opt/target/"


def test_an_activation_that_the_config_has_otherwise_is_told(tmp_path):
    write_safetensors(tmp_path / "w.safetensors", {n: torch_weight(n, s) for n, s in listed("hf clip/file").items()})
    (tmp_path / "config.json").write_text('{"vision_config": {"hidden_act": "quick_gelu"}}')
    options = OTHER_VITS["hf clip"]
    for act in ("gelu", "quick_gelu"):
        model = make_model("tiny_vit", image_size=24, **{**options, "act": act})
        told = "activation quick_gelu; this model has gelu" in str(
            weights.load(model, tmp_path / "w.safetensors").receipt
        )
        assert told == (act == "gelu")


# --- other picture sizes


@pytest.mark.parametrize("kind", ["dinov2_reg", "hf dinov2 registers", "siglip", "beit", "deit_distilled", "hf clip"])
def test_a_model_of_another_size(tmp_path, kind):
    """Positions before the grid stay, whatever tokens have them; the rest is resized to a grid that is no square."""
    model, wide = tiny(kind, depth=1), tiny(kind, depth=1, image_size=(40, 64))
    format = "hf" if kind.startswith("hf") else "timm"
    write_safetensors(tmp_path / "w.safetensors", content_of(model, format))
    square = weights.load(model, tmp_path / "w.safetensors", format=format)
    loaded = weights.load(wide, tmp_path / "w.safetensors", format=format)
    name, resize = (
        ("block0/attn/rel_pos", resample_rel_pos) if kind == "beit" else ("embed/pos_embed", resample_pos_embed)
    )
    np.testing.assert_array_equal(loaded.params[name], resize(square.params[name], (4, 4), (5, 8)))
    assert loaded.receipt.resized == {name: "4×4 → 5×8"}
    prefix = {"dinov2_reg": 0, "siglip": 0, "deit_distilled": 2}.get(kind, 1)
    if kind != "beit":
        np.testing.assert_array_equal(loaded.params[name][:, :prefix], square.params[name][:, :prefix])


def test_relative_positions_as_timm_resizes_them():
    cases = [key for key in GOLDENS.files if key.startswith("relative ")]
    assert len(cases) == 4
    for case in cases:
        old, height, width = map(int, case.split()[1:])
        table = np.random.default_rng(old).normal(size=((2 * old - 1) ** 2 + 3, 2)).astype(np.float32)
        np.testing.assert_allclose(
            resample_rel_pos(table, (old, old), (height, width)), GOLDENS[case], atol=1e-4, rtol=0
        )


def test_weights_of_registers_with_other_positions(tmp_path):
    """timm's and DINOv2's own files differ by the class token's position: neither is taken for the other."""
    write_safetensors(tmp_path / "w.safetensors", content_of(tiny("hf dinov2 registers", depth=1), "dinov2"))
    with pytest.raises(UserError, match="the rest is no square"):
        weights.load(tiny("dinov2_reg", depth=1), tmp_path / "w.safetensors")


# --- mistakes


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"act": "quickgelu"}, "Did you mean quick_gelu"),
        ({"positions": "patch"}, "Did you mean patches"),
        ({"class_token": False}, "has no class token, which pool='token' needs"),
        ({"class_token": False, "relative": True, "pool": "avg"}, "has no class token, which relative=True needs"),
        ({"distilled": True, "pool": "avg"}, "distilled model has"),
        ({"relative": True, "registers": 2}, "patches and a class token alone"),
    ],
)
def test_options_that_do_not_go_together(options, reason):
    with pytest.raises(UserError, match=reason):
        make_model("tiny_vit", **options)


@pytest.mark.parametrize("deep", [True, False])
@pytest.mark.slow
def test_prompts_are_seen_by_the_blocks_and_not_by_the_pool(deep):
    model = make_model("tiny_vit", prompts=3, deep_prompts=deep, pool="avg")
    plain = make_model("tiny_vit", pool="avg")
    params, _ = model.init(jax.random.key(0))
    params["head/kernel"] = jax.random.normal(jax.random.key(1), params["head/kernel"].shape)
    x = jax.numpy.asarray(picture(2, 32, 32, 3))
    assert {n for n in params if n.endswith("prompts")} == {f"block{i}/prompts" for i in range(3 if deep else 1)}
    tokens = model.apply(params, {}, x, stop="pool")[0]
    assert tokens.shape == (2, 17, 32)
    without = plain.apply({n: v for n, v in params.items() if not n.endswith("prompts")}, {}, x)[0]
    assert np.abs(model.apply(params, {}, x)[0] - without).max() > 1e-3


def exported(folder, model, **options):
    """Generated weights out to a Hugging Face folder; the weights, the folder's config.json, and the receipt."""
    params, stats = ({n: weight(n, s.shape) for n, s in shapes.items()} for shapes in model.shapes())
    preprocess = Preprocess(size=model.input_shape[:2])
    given = dict(classes=list("0123456789"), preprocess=preprocess) | options
    receipt = export_hf(folder, model, params, stats, **given)
    return {**params, **stats}, json.loads((folder / "config.json").read_text()), receipt


# What transformers builds from the config, checked by scripts/check_exports.py.
HF_CLASSES = {
    "vit": "ViT",
    "vit quick_gelu": "ViT",
    "deit_distilled": "DeiT",
    "deit3": "Dinov2",
    "dinov2": "Dinov2",
    "dinov2_giant": "Dinov2",
    "dinov2_reg": "Dinov2WithRegisters",
    "hf dinov2 registers": "Dinov2WithRegisters",
    "beit": "Beit",
}


@pytest.mark.parametrize("kind", HF_CLASSES)
def test_export_to_transformers_own_classes(tmp_path, kind):
    """The names it reads, zeros where it has more, and what the model of the folder reads again."""
    options = {"vit": {}, "vit quick_gelu": {"act": "quick_gelu"}, **VITS, **OTHER_VITS}[kind]
    model = make_model("tiny_vit", depth=1, **{**options, **({"mlp_dim": 88} if kind == "dinov2_giant" else {})})
    given, config, receipt = exported(tmp_path / "hf", model)
    (made,) = config["architectures"]
    assert made.startswith(HF_CLASSES[kind] + "ForImageClassification") and config["id2label"]["3"] == "3"
    dino = "Dinov2" in made
    loaded = weights.load(model, tmp_path / "hf", skip=PADDED if dino else ())
    assert loaded.receipt.format == "hf" and set(loaded.missing) == (PADDED if dino else set())
    assert all(np.array_equal(a, given[n]) for n, a in loaded.params.items())
    with weights.open_weights(tmp_path / "hf" / "model.safetensors") as file:
        if not dino:
            return
        head = file.read("classifier.weight")
        assert head.shape == (10, 64)
        padded = options.get("pool") != "token_avg"
        np.testing.assert_array_equal(head[:, :32], given["head/kernel"].T[:, :32])
        assert padded == (not head[:, 32:].any()) and padded == ("filled up with zeros" in str(receipt))
        root = "dinov2_with_registers" if "reg" in kind else "dinov2"
        positions = file.read(f"{root}.embeddings.position_embeddings")
        assert positions.shape == (1, 17, 32)
        if options.get("positions") == "patches":
            assert not positions[:, 0].any()
            np.testing.assert_array_equal(positions[:, 1:], given["embed/pos_embed"])
        assert (f"{root}.embeddings.mask_token" in file.names) == ("reg" in kind)


PADDED = {"head/kernel", "head/bias", "embed/pos_embed"}


@pytest.mark.parametrize("options", [{}, VITS["beit"]], ids=["vit", "beit"])
def test_export_to_transformers_of_another_epsilon(tmp_path, options):
    """Theirs are 1e-12, which config.json says."""
    _, config, _ = exported(tmp_path / "hf", make_model("tiny_vit", depth=1, epsilon=1e-12, **options))
    assert config["layer_norm_eps"] == 1e-12 and config["model_type"] in ("vit", "beit")


def test_export_to_transformers_through_timm(tmp_path):
    """What only timm has a model for, with the options that its name does not say, and timm's own names."""
    model = make_model("vit_tiny_patch16_224", depth=1, pool="avg", image_size=32)
    given, config, receipt = exported(tmp_path / "hf", model, timm_options={"img_size": (32, 32), "global_pool": "avg"})
    assert config["model_type"] == "timm_wrapper" and config["architecture"] == "vit_tiny_patch16_224"
    assert config["model_args"] == {"img_size": [32, 32], "global_pool": "avg"}
    assert "timm, which must be installed" in str(receipt)
    assert not (tmp_path / "hf" / "preprocessor_config.json").exists()  # timm's transform is in the config
    loaded = weights.load(model, tmp_path / "hf")
    assert loaded.preprocess == Preprocess(size=(32, 32)) and not loaded.missing
    assert all(np.array_equal(a, given[n]) for n, a in loaded.params.items())


def test_exports_that_the_library_would_compute_otherwise(tmp_path):
    """transformers' classifiers pool in one way, and its ViT has none of the variants' options."""
    for options in (
        dict(pool="token_avg"),
        dict(pool="avg"),
        dict(pre_norm=True),
        dict(act="swiglu"),
        dict(positions="class", registers=2),
        dict(layer_scale=1e-5, mlp_dim=100),
        dict(layer_scale=1e-5, image_size=(32, 64)),
        dict(layer_scale=1e-5, registers=2, positions="all"),
    ):
        with pytest.raises(UserError, match=r"transformers|no name for"):
            exported(tmp_path / "hf", make_model("tiny_vit", depth=1, **options))
    assert not list(tmp_path.iterdir())


def test_code_for_timm_says_what_the_name_does_not():
    model = make_model("beit_base_patch16_224", image_size=32, depth=1)
    code = timm_code(
        "w.safetensors", model, timm_options(model, formats._shapes(model)[0], make_model("beit_base_patch16_224"))
    )
    assert "img_size=(32, 32)" in code[1] and "act_layer" not in code[1]
    model = make_model("vit_base_patch32_clip_224", act="quick_gelu", depth=1)
    code = timm_code(
        "w.safetensors", model, timm_options(model, formats._shapes(model)[0], make_model("vit_base_patch32_clip_224"))
    )
    assert "act_layer='quick_gelu'" in code[1] and "img_size" not in code[1]
