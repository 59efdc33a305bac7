"""Weights into models and out again: rules, the choice of format, heads, position embeddings, sources, receipts."""

import errno
import hashlib
import http.server
import io
import json
import math
import re
import sys
import threading
import tracemalloc
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import jax
import ml_dtypes
import numpy as np
import pytest

from jft import cli, weights
from jft.errors import UserError
from jft.models import MODELS, make_model
from jft.preprocess import Preprocess
from jft.weights import formats, hub, native, rules
from jft.weights.resample import resample_pos_embed
from jft.weights.rules import CONV, HEAD, LINEAR, Concat, Reshape, Rule, Transpose
from jft.weights.writers import write_npz, write_safetensors

GOLDENS = Path(__file__).parent / "goldens"
TINY = [name for name in MODELS if name.startswith("tiny")]
PAIRS = [
    (name, format)
    for name in TINY
    for format, module in weights.FORMATS.items()
    if f"{HEAD}/kernel" in {rule.ours for rule in module.rules(formats._shapes(make_model(name))[0])}
]


def random(shape: tuple[int, ...], name: str, dtype=np.float32) -> np.ndarray:
    """Values that depend on the name and the shape alone."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def theirs(model, format: str, dtype=np.float32) -> dict[str, np.ndarray]:
    """A file's content for this model in this format, made from the rules' names and shapes."""
    ours, _ = formats._shapes(model)
    found = {}
    for rule in weights.FORMATS[format].rules(ours):
        if rule.ours is None:
            found |= {name: np.array(0, np.int64) for name in rule.names if rule.fill is not None}
        else:
            found |= {n: random(s, n, dtype) for n, s in zip(rule.names, rule.shapes(ours[rule.ours]), strict=True)}
    return found


@pytest.fixture(scope="module")
def resnet():
    return make_model("tiny_resnet", num_classes=7)


@pytest.fixture(scope="module")
def vit():
    return make_model("tiny_vit", num_classes=7)


# --- rules


@pytest.mark.parametrize(
    ("op", "shapes"),
    [
        (Transpose(), [(3, 4)]),
        (LINEAR, [(3, 4)]),
        (CONV, [(2, 3, 4, 5)]),
        (Reshape((6, 4, 1, 1), (6, 4), LINEAR), [(6, 4, 1, 1)]),
        (Concat(3, -1, LINEAR), [(2, 5)] * 3),
        (Concat(3, 0), [(4,)] * 3),
        (Reshape((-1, 4, 1, 1), (-1, 4), LINEAR), [(6, 4, 1, 1)]),
        (Reshape((5, -1), (5, 4, 2, 3), CONV), [(5, 24)]),
    ],
)
def test_operations_are_invertible(op, shapes):
    parts = [random(shape, f"{i}") for i, shape in enumerate(shapes)]
    ours = op.to_ours(*parts)
    for part, back in zip(parts, op.to_theirs(ours), strict=True):
        np.testing.assert_array_equal(part, back)
    names = tuple(f"{i}" for i in range(len(shapes)))
    assert Rule(names, "x", op).shapes(ours.shape) == tuple(shapes)


def test_what_operations_do():
    kernel = random((2, 3, 4, 5), "k")
    assert CONV.to_ours(kernel)[1, 2, 0, 1] == kernel[1, 0, 1, 2]
    q, k, v = (random((2, 5), n) for n in "qkv")
    np.testing.assert_array_equal(Concat(3, -1, LINEAR).to_ours(q, k, v), np.concatenate([q, k, v]).T)


def test_torchvision_flattens_a_vggs_channels_before_its_positions():
    ours, _ = formats._shapes(make_model("tiny_vgg"))
    (rule,) = [r for r in weights.FORMATS["torchvision"].rules(ours) if r.ours == "fc1/kernel"]
    x, theirs = random((2, 2, 32), "x"), random((24, 32 * 2 * 2), "fc1")  # NHWC without N
    expected = theirs @ x.transpose(2, 0, 1).ravel()
    np.testing.assert_allclose(np.einsum("hwc,hwcd->d", x, rule.op.to_ours(theirs)), expected, rtol=1e-4)


@pytest.mark.slow
def test_names_and_shapes_are_those_of_the_library():
    """Every model that timm or torchvision has: the rules make exactly its state dict's names and shapes."""
    goldens = json.loads((GOLDENS / "names.json").read_text())
    for name in goldens["timm"]:
        ours, _ = formats._shapes(make_model(name))
        for format in goldens:
            lines = []
            for rule in weights.FORMATS[format].rules(ours):
                if rule.ours is None and rule.fill is None:
                    continue
                shapes = rule.shapes(ours[rule.ours]) if rule.ours else [()] * len(rule.names)
                lines += [f"{n} {tuple(s)}\n" for n, s in zip(rule.names, shapes, strict=True)]
            digest = hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()
            assert digest == goldens[format].get(name, digest), (format, name)


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
@pytest.mark.parametrize(("name", "format"), PAIRS)
def test_import_then_export_gives_back_the_same_bytes(tmp_path, name, format, suffix):
    model = make_model(name, num_classes=7)
    content = theirs(model, format)
    path = tmp_path / f"in{suffix}"
    (write_npz if suffix == ".npz" else write_safetensors)(path, content)
    loaded = weights.load(model, path, format=format)
    assert not loaded.missing
    assert set(loaded.receipt.used) | set(loaded.receipt.dropped) == set(content)
    receipt = weights.export(tmp_path / f"out{suffix}", model, loaded.params, loaded.batch_stats, format=format)
    assert receipt.used == loaded.receipt.used and "tiny" in str(receipt)
    with weights.open_weights(tmp_path / f"out{suffix}") as file:
        assert set(file.names) == set(content)
        for n, expected in content.items():
            assert file.read(n).tobytes() == expected.tobytes() and file.shape(n) == expected.shape


SEEN: set[tuple] = set()  # operations and shapes of which the bytes have been compared: blocks repeat them
BESIDES = {"augreg-in21k": {"pre_logits/kernel": (2, 2), "pre_logits/bias": (2,)}}  # what a format is told by


@pytest.mark.parametrize("name", MODELS)
def test_every_model_in_every_format(name):
    """Every tensor's bytes come back (of more than 4 M numbers: its shape), and no format is taken for another.

    Of at most two blocks a stage: the others differ by their numbers, and all names are compared with the libraries'.
    """
    made = {option: value for option, value in MODELS[name].keywords.items() if option.startswith("depth")}
    few = {o: min(v, 2) if o == "depth" else tuple(min(d, 2) for d in v) for o, v in made.items()}
    model = make_model(name, **few)
    ours, _ = formats._shapes(model)
    body = {n for n in ours if not n.startswith(HEAD + "/")}
    able = []
    every = {format: found for format, module in weights.FORMATS.items() if (found := module.rules(ours))}
    for format in every:
        rules_of = [rule for rule in every[format] if rule.ours]
        if not body <= {rule.ours for rule in rules_of}:
            continue
        able.append(format)
        file = dict(BESIDES.get(format, {}))
        for rule in rules_of:
            shapes = rule.shapes(ours[rule.ours])
            file |= dict(zip(rule.names, shapes, strict=True))
            if (rule.op, shapes) not in SEEN:
                SEEN.add((rule.op, shapes))
                small = max(map(np.prod, shapes)) <= 2**22
                parts = [
                    np.arange(np.prod(s), dtype=np.uint8).reshape(s) if small else np.broadcast_to(np.uint8(0), s)
                    for s in shapes
                ]
                there = rule.op.to_ours(*parts)
                assert there.shape == ours[rule.ours], rule
                if small:
                    back = rule.op.to_theirs(there)
                    assert [b.tobytes() for b in back] == [p.tobytes() for p in parts], rule
        assert len(file) == sum(len(rule.names) for rule in rules_of) + len(BESIDES.get(format, {}))
        held = {name: (shape, np.dtype("f4")) for name, shape in file.items()}
        fitting = {n: m for n, r in every.items() if (m := rules.match(r, ours, held)).fits}
        assert format in fitting and not any(m.reading != fitting[format].reading for m in fitting.values()), format
    assert "jft" in able and len(able) > (0 if "dinov2_" in name else 1)


@pytest.mark.parametrize("name", TINY)
def test_loaded_arrays_are_those_the_model_takes(tmp_path, name):
    model = make_model(name, num_classes=7)
    write_safetensors(tmp_path / "w.safetensors", theirs(model, "timm"))
    loaded = weights.load(model, tmp_path / "w.safetensors")
    params, stats = model.shapes()
    assert {n: (a.shape, a.dtype) for n, a in loaded.params.items()} == {
        n: (s.shape, s.dtype) for n, s in params.items()
    }
    assert {n: a.shape for n, a in loaded.batch_stats.items()} == {n: s.shape for n, s in stats.items()}
    assert loaded.receipt.format in ("timm", "torchvision")
    assert all(a.flags.c_contiguous for a in (*loaded.params.values(), *loaded.batch_stats.values()))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_dtypes_are_converted_told_and_given_back(tmp_path, vit, dtype):
    content = theirs(vit, "timm", dtype if dtype != np.float64 else np.float32)
    content = {n: a.astype(dtype) for n, a in content.items()}
    write_safetensors(tmp_path / "in.safetensors", content)
    loaded = weights.load(vit, tmp_path / "in.safetensors")
    assert {a.dtype for a in loaded.params.values()} == {np.dtype(np.float32)}
    name = np.dtype(dtype).name
    assert any(f"{len(content)} tensors of {name}" in note for note in loaded.receipt.notes)
    weights.export(tmp_path / "out.safetensors", vit, loaded.params, {}, format="timm", dtype=name)
    with weights.open_weights(tmp_path / "out.safetensors") as file:
        assert all(file.read(n).tobytes() == expected.tobytes() for n, expected in content.items())


# --- the choice of format and its errors


def difference_lines(error: Exception) -> list[str]:
    return [line.strip() for line in str(error).splitlines() if re.match(r"  [-+~] ", line)]


def test_only_the_unexplained_differences_are_shown(tmp_path, resnet):
    content = theirs(resnet, "torchvision")
    content["layer1.0.extra"] = content.pop("layer1.0.conv1.weight")
    content["bn1.weight"] = content["bn1.weight"][:-1]
    content["bn1.bias"] = np.zeros(content["bn1.bias"].shape, np.int32)
    write_safetensors(tmp_path / "w.safetensors", content)
    with pytest.raises(UserError) as caught:
        weights.load(resnet, tmp_path / "w.safetensors")
    assert difference_lines(caught.value) == [
        "- layer1.0.conv1.weight  (stage1/block0/conv1/kernel (1, 1, 4, 4))",
        "+ layer1.0.extra  (4, 4, 1, 1)",
        "~ bn1.weight: (3,) in the file, (4,) in the model (stem/norm/scale)",
        "~ bn1.bias: the file has int32 numbers, expected floating point",
    ]
    assert str(tmp_path / "w.safetensors") in str(caught.value) and "skip=" in str(caught.value)


def test_weights_of_another_architecture(tmp_path, resnet, vit):
    write_safetensors(tmp_path / "w.safetensors", theirs(vit, "timm"))
    with pytest.raises(UserError, match="other weights than tiny_resnet needs") as caught:
        weights.load(resnet, tmp_path / "w.safetensors")
    lines = difference_lines(caught.value)
    assert len(lines) < 40 and any("more" in line for line in lines)
    counts = re.search(r"(\d+) of the model's arrays fit, (\d+) are missing, (\d+) of", str(caught.value))
    assert counts and int(counts[3]) == len(theirs(vit, "timm"))


def test_skip_leaves_out_on_purpose(tmp_path, resnet):
    content = theirs(resnet, "torchvision") | {"ema.decay": np.array(0.9, np.float32)}
    del content["bn1.weight"]
    write_safetensors(tmp_path / "w.safetensors", content)
    loaded = weights.load(resnet, tmp_path / "w.safetensors", skip=("ema.*", "stem/norm/*"))
    assert set(loaded.missing) == {f"stem/norm/{n}" for n in ("scale", "bias", "mean", "var")}
    assert loaded.receipt.dropped["ema.decay"] == loaded.receipt.dropped["bn1.bias"] == "left out on request"


def test_a_format_named(tmp_path, vit):
    write_safetensors(tmp_path / "w.safetensors", theirs(vit, "timm"))
    assert weights.load(vit, tmp_path / "w.safetensors", format="timm").receipt.format == "timm"
    with pytest.raises(UserError, match="As jft names them"):
        weights.load(vit, tmp_path / "w.safetensors", format="jft")
    with pytest.raises(UserError, match="Did you mean timm"):
        weights.load(vit, tmp_path / "w.safetensors", format="tim")
    with pytest.raises(UserError, match="no names for tiny_vit"):
        weights.load(vit, tmp_path / "w.safetensors", format="bit")


def test_two_formats_that_mean_different_things(tmp_path, vit, monkeypatch):
    """Two readings of one file with different results are an error; with the same rules they are one."""
    timm = weights.FORMATS["timm"]

    def swapped(ours):
        other = {"block0/norm1/bias": "block0/norm2/bias", "block0/norm2/bias": "block0/norm1/bias"}
        return tuple(Rule(r.theirs, other.get(r.ours, r.ours), r.op, r.fill, r.resize) for r in timm.rules(ours))

    write_safetensors(tmp_path / "w.safetensors", theirs(vit, "timm"))
    monkeypatch.setitem(weights.FORMATS, "same", SimpleNamespace(rules=timm.rules, SOURCES={}))
    assert weights.load(vit, tmp_path / "w.safetensors").receipt.format == "timm"
    monkeypatch.setitem(weights.FORMATS, "swapped", SimpleNamespace(rules=swapped, SOURCES={}))
    with pytest.raises(UserError, match="more than one way: as timm and as swapped"):
        weights.load(vit, tmp_path / "w.safetensors")
    assert weights.load(vit, tmp_path / "w.safetensors", format="swapped").receipt.format == "swapped"


# --- the head


def test_a_new_head_for_other_classes(tmp_path, resnet):
    write_safetensors(tmp_path / "w.safetensors", theirs(resnet, "torchvision"))
    other = make_model("tiny_resnet", num_classes=3)
    loaded = weights.load(other, tmp_path / "w.safetensors")
    assert loaded.missing == ("head/bias", "head/kernel") and not any(n.startswith(HEAD) for n in loaded.params)
    assert set(loaded.receipt.replaced) == {"head/bias", "head/kernel"} and "head/kernel ((7, 128) in the file)" in str(
        loaded.receipt
    )
    assert loaded.receipt.dropped["fc.weight"] == "the head is new"
    assert weights.head_size(other, tmp_path / "w.safetensors") == 7
    own = weights.read_head(other, tmp_path / "w.safetensors")

    kept = weights.load(resnet, tmp_path / "w.safetensors")
    assert not kept.missing and "head/kernel" in kept.params
    for name in ("kernel", "bias"):
        np.testing.assert_array_equal(own[name], kept.params[f"head/{name}"])
    fresh = weights.load(resnet, tmp_path / "w.safetensors", keep_head=False)
    assert fresh.missing == ("head/bias", "head/kernel")


def test_no_head_or_half_a_head(tmp_path, vit):
    content = theirs(vit, "timm")
    del content["head.weight"]
    write_safetensors(tmp_path / "half.safetensors", content)
    loaded = weights.load(vit, tmp_path / "half.safetensors")
    assert loaded.missing == ("head/bias", "head/kernel") and loaded.receipt.dropped["head.bias"] == "the head is new"
    del content["head.bias"]
    write_safetensors(tmp_path / "none.safetensors", content)
    loaded = weights.load(vit, tmp_path / "none.safetensors")
    assert loaded.missing == ("head/bias", "head/kernel") and not loaded.receipt.dropped
    assert "not in the file, freshly initialised: head" in str(loaded.receipt)
    assert weights.head_size(vit, tmp_path / "none.safetensors") is None
    assert weights.read_head(vit, tmp_path / "none.safetensors") == {}


def test_scratch(vit):
    loaded = weights.scratch(vit)
    assert set(loaded.missing) == set(vit.shapes()[0]) and not loaded.params
    assert "no pretrained weights" in str(loaded.receipt)


# --- position embeddings


def test_position_embeddings_as_timm_resizes_them():
    goldens = np.load(GOLDENS / "pos_embed.npz")
    assert len(goldens.files) == 6
    for case in goldens.files:
        old, height, width, prefix = map(int, case.split())
        embedding = np.random.default_rng(old).normal(size=(1, prefix + old * old, 3)).astype(np.float32)
        resized = resample_pos_embed(embedding, (old, old), (height, width))
        assert resized.dtype == np.float32
        np.testing.assert_allclose(resized, goldens[case], atol=1e-5, rtol=0)
        np.testing.assert_array_equal(resized[:, :prefix], embedding[:, :prefix])


def test_a_model_of_another_size(tmp_path, vit):
    content = theirs(vit, "timm")  # 32 × 32 pixels, patches of 8: 4 × 4
    write_safetensors(tmp_path / "w.safetensors", content)
    wide = make_model("tiny_vit", num_classes=7, image_size=(40, 64))
    loaded = weights.load(wide, tmp_path / "w.safetensors")
    expected = resample_pos_embed(content["pos_embed"], (4, 4), (5, 8))
    np.testing.assert_array_equal(loaded.params["embed/pos_embed"], expected)
    assert loaded.receipt.resized == {"embed/pos_embed": "4×4 → 5×8"} and loaded.preprocess.size == (40, 64)

    weights.export(tmp_path / "wide.safetensors", wide, loaded.params, {}, format="timm")
    again = weights.load(wide, tmp_path / "wide.safetensors")
    np.testing.assert_array_equal(again.params["embed/pos_embed"], expected)
    weights.export(tmp_path / "wide.npz", wide, loaded.params, {}, format="timm")  # which says nothing of the size
    with pytest.raises(UserError, match="no square"):
        weights.load(vit, tmp_path / "wide.npz")


def test_as_many_positions_on_another_grid(tmp_path, vit):
    """4×4 positions are resized for a model of 2×8; those of 2×8 stay, where it is known that they are that."""
    content = theirs(vit, "timm")
    write_safetensors(tmp_path / "w.safetensors", content)
    wide = make_model("tiny_vit", num_classes=7, image_size=(16, 64))
    loaded = weights.load(wide, tmp_path / "w.safetensors")
    expected = resample_pos_embed(content["pos_embed"], (4, 4), (2, 8))
    np.testing.assert_array_equal(loaded.params["embed/pos_embed"], expected)
    assert loaded.receipt.resized == {"embed/pos_embed": "4×4 → 2×8"}
    assert not weights.load(vit, tmp_path / "w.safetensors").receipt.resized

    for place, format in (("timm.safetensors", "timm"), ("own.safetensors", "jft"), ("own.npz", "jft")):
        weights.export(tmp_path / place, wide, loaded.params, {}, format=format)
        again = weights.load(wide, tmp_path / place)
        np.testing.assert_array_equal(again.params["embed/pos_embed"], expected)
        assert not again.receipt.resized
    back = weights.load(vit, tmp_path / "timm.safetensors")
    assert back.receipt.resized == {"embed/pos_embed": "2×8 → 4×4"}

    (tmp_path / "beside").mkdir()
    write_safetensors(tmp_path / "beside" / "w.safetensors", content)
    for size, told in (
        ([16, 64], {}),
        (32, {"embed/pos_embed": "4×4 → 2×8"}),
        (["x", 3], {"embed/pos_embed": "4×4 → 2×8"}),
    ):
        (tmp_path / "beside" / "config.json").write_text(json.dumps({"image_size": size}))
        assert weights.load(wide, tmp_path / "beside").receipt.resized == told


# --- receipts


def test_receipt(tmp_path, resnet):
    content = theirs(resnet, "torchvision")
    content["bn1.weight"][1] = np.nan
    content["layer1.0.bn1.bias"][0] = np.inf
    write_safetensors(tmp_path / "w.safetensors", {f"module.{n}": a for n, a in content.items()})
    receipt = weights.load(make_model("tiny_resnet", num_classes=2), tmp_path / "w.safetensors").receipt
    as_json = json.loads(json.dumps(receipt.json()))
    assert set(as_json["used"]) | set(as_json["dropped"]) == set(content)
    assert not set(as_json["used"]) & set(as_json["dropped"])
    assert as_json["sha256"] == hashlib.sha256((tmp_path / "w.safetensors").read_bytes()).hexdigest()
    assert as_json["used"]["conv1.weight"] == "stem/conv/kernel"
    printed = str(receipt)
    assert "warning: NaN or infinity in bn1.weight, layer1.0.bn1.bias" in printed
    assert "'module.'" in printed and "num_batches_tracked" in printed
    assert f"{len(receipt.used)} tensors used" in printed and receipt.sha256[:12] in printed
    assert all(len(line) < 160 for line in printed.splitlines()[1:])


def test_peak_memory_is_the_model_and_one_tensor(tmp_path):
    side, count = 256, 24
    shapes = {f"{i}/kernel": jax.ShapeDtypeStruct((side, side), np.float32) for i in range(count)}
    model = SimpleNamespace(name="m", input_shape=(8, 8, 3), num_classes=2, shapes=lambda: (shapes, {}))
    path = tmp_path / "w.safetensors"
    write_safetensors(path, {f"{i}.weight": np.full((side, side), i, np.float32) for i in range(count)})
    listed = SimpleNamespace(
        rules=lambda ours: tuple(Rule(f"{i}.weight", f"{i}/kernel", LINEAR) for i in range(count)), SOURCES={}
    )
    size = side * side * 4
    weights.FORMATS["listed"] = listed
    try:
        weights.load(model, path)  # what is cached at the first use is not the reading's
        tracemalloc.start()
        loaded = weights.load(model, path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        del weights.FORMATS["listed"]
    assert len(loaded.params) == count
    assert peak < (count + 2.5) * size  # the tensor as it lies in the file and as it is wanted, and which are finite


# --- where weights come from


def test_local_folders(tmp_path, vit):
    with pytest.raises(UserError, match="no weights in the folder"):
        weights.load(vit, tmp_path)
    with pytest.raises(UserError, match="no weight file"):
        weights.load(vit, tmp_path / "w.safetensors")
    write_safetensors(tmp_path / "a.safetensors", theirs(vit, "timm"))
    assert weights.load(vit, tmp_path).path == tmp_path / "a.safetensors"
    write_safetensors(tmp_path / "b.safetensors", theirs(vit, "timm"))
    with pytest.raises(UserError, match=r"a\.safetensors, b\.safetensors"):
        weights.load(vit, tmp_path)
    content = theirs(vit, "timm")
    names = sorted(content)
    write_safetensors(tmp_path / "model-1.safetensors", {n: content[n] for n in names[:9]})
    write_safetensors(tmp_path / "model-2.safetensors", {n: content[n] for n in names[9:]})
    places = {n: f"model-{1 + (i >= 9)}.safetensors" for i, n in enumerate(names)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert "2 shards" in str(weights.load(vit, tmp_path).receipt)
    for wrong in ("s3://bucket/w.npz", "http://example.com/w.pth"):
        with pytest.raises(UserError, match="none of them"):
            weights.load(vit, wrong)


def test_a_runs_folder_is_its_model(tmp_path, vit):
    (tmp_path / "predictions.npz").write_bytes(b"what it said of images")
    with pytest.raises(UserError, match="no weights in the folder"):
        hub.locate(tmp_path)
    (tmp_path / "model").mkdir()
    write_safetensors(tmp_path / "model" / "model.safetensors", theirs(vit, "timm"))
    about = {"format": 1, "model": vit.name, "options": {}, "preprocess": {}, "sha256": ""}
    (tmp_path / "model" / "config.json").write_text(json.dumps(about))
    found = hub.locate(tmp_path)
    assert found.path == tmp_path / "model" / "model.safetensors" and found.configs["config.json"] == about


TIMM_CONFIG = {
    "architecture": "vit_tiny_patch16_224",
    "pretrained_cfg": {
        "input_size": [3, 224, 224],
        "crop_pct": 0.95,
        "crop_mode": "squash",
        "interpolation": "bicubic",
        "mean": [0.1, 0.2, 0.3],
        "std": [0.4, 0.5, 0.6],
    },
    "label_names": [f"n{i}" for i in range(7)],
    "label_descriptions": {f"n{i}": f"thing {i}" for i in range(7)},
}


def test_a_folder_that_may_not_be_read(tmp_path, monkeypatch):
    def denied(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_dir", denied)
    with pytest.raises(UserError, match=r"w cannot be read: Permission denied"):
        hub.locate(tmp_path / "w")


def test_the_json_beside_the_weights(tmp_path, vit):
    write_safetensors(tmp_path / "model.safetensors", theirs(vit, "timm"))
    plain = weights.load(vit, tmp_path)
    assert plain.classes is None and "unknown" in plain.receipt.preprocess
    (tmp_path / "config.json").write_text(json.dumps(TIMM_CONFIG))
    loaded = weights.load(vit, tmp_path)
    assert loaded.preprocess == Preprocess((32, 32), 0.95, "bicubic", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), squash=True)
    assert loaded.classes == tuple(f"thing {i}" for i in range(7)) and "JSON beside" in str(loaded.receipt)
    assert weights.load(make_model("tiny_vit", num_classes=2), tmp_path).classes is None

    broken = {"pretrained_cfg": TIMM_CONFIG["pretrained_cfg"] | {"interpolation": "magic"}}
    (tmp_path / "config.json").write_text(json.dumps(broken))
    with pytest.raises(UserError, match="cannot be read"):
        weights.load(vit, tmp_path)


PLAIN = {"resample": 3, "do_normalize": False}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (  # ViT
            {"size": {"height": 224, "width": 224}, "resample": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
            Preprocess((224, 224), 1.0, "bilinear", (0.5,) * 3, (0.5,) * 3, squash=True),
        ),
        (  # CLIP, DINOv2
            {
                "size": {"shortest_edge": 256},
                "crop_size": {"height": 224, "width": 224},
                "do_center_crop": True,
                "resample": 3,
                "image_mean": [0.485, 0.456, 0.406],
                "image_std": [0.229, 0.224, 0.225],
            },
            Preprocess((224, 224), 0.875, "bicubic"),
        ),
        (  # ConvNeXt and ResNet
            {
                "size": {"shortest_edge": 224},
                "crop_pct": 0.875,
                "resample": 3,
                "image_mean": [0.485, 0.456, 0.406],
                "image_std": [0.229, 0.224, 0.225],
            },
            Preprocess((224, 224), 0.875, "bicubic"),
        ),
        (  # ConvNeXt, as it was written first
            {"size": 224, "crop_pct": 0.875, "feature_extractor_type": "ConvNextFeatureExtractor"} | PLAIN,
            Preprocess((224, 224), 0.875, "bicubic", (0.0,) * 3, (1.0,) * 3),
        ),
        (
            {"size": {"shortest_edge": 224}, "crop_pct": None, "image_processor_type": "ConvNextImageProcessor"}
            | PLAIN,
            Preprocess((224, 224), 0.875, "bicubic", (0.0,) * 3, (1.0,) * 3),
        ),
        (  # which cuts nothing off from 384 on
            {"size": {"shortest_edge": 384}, "crop_pct": 0.875} | PLAIN,
            Preprocess((384, 384), 1.0, "bicubic", (0.0,) * 3, (1.0,) * 3, squash=True),
        ),
        (  # DeiT, of square pictures
            {"size": {"height": 256, "width": 256}, "crop_size": 224, "do_center_crop": True} | PLAIN,
            Preprocess((224, 224), 0.875, "bicubic", (0.0,) * 3, (1.0,) * 3),
        ),
        (
            {"size": {"height": 224, "width": 224}, "crop_size": 224, "do_center_crop": True} | PLAIN,
            Preprocess((224, 224), 1.0, "bicubic", (0.0,) * 3, (1.0,) * 3, squash=True),
        ),
        (
            {"size": 224, "do_normalize": False},
            Preprocess((224, 224), 1.0, "bilinear", (0.0,) * 3, (1.0,) * 3, squash=True),
        ),
    ],
)
def test_hugging_face_preprocessing(config, expected):
    located = hub.Located(Path("w"), "w", {"preprocessor_config.json": config})
    assert located.preprocess == expected


def test_what_a_config_says_that_the_names_do_not(tmp_path):
    """transformers' BiT can pad as TensorFlow does."""
    model = make_model("tiny_bit", num_classes=7)
    write_safetensors(tmp_path / "w.safetensors", theirs(model, "hf"))
    for padding in (None, "SAME"):
        (tmp_path / "config.json").write_text(json.dumps({"global_padding": padding}))
        receipt = weights.load(model, tmp_path / "w.safetensors").receipt
        assert receipt.format == "hf" and ("pads convolutions by 'SAME'" in str(receipt)) == bool(padding)


def test_hugging_face_class_names():
    def classes(names):
        return hub.Located(Path("w"), "w", {"config.json": {"id2label": names}}).classes

    assert classes({"1": "bee", "0": "ant"}) == ("ant", "bee")
    assert classes({"0": "LABEL_0", "1": "LABEL_1"}) is None
    assert classes({"0": "ant", "2": "bee"}) is None


@pytest.fixture
def hf_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
    return tmp_path / "hf"


def test_hugging_face_cache_first(hf_cache, vit, monkeypatch):
    def no_network(*_, **__):
        raise AssertionError("the network was asked although the file is in the cache")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", no_network)
    repo = hf_cache / "models--org--tiny"
    snapshot = repo / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0123abc")
    write_safetensors(snapshot / "model.safetensors", theirs(vit, "timm"))
    (snapshot / "config.json").write_text(json.dumps(TIMM_CONFIG))
    loaded = weights.load(vit, "hf:org/tiny")
    assert loaded.receipt.source == "hf:org/tiny@0123abc:model.safetensors" and loaded.classes is not None
    assert weights.load(vit, "hf:org/tiny@0123abc:model.safetensors").sha256 == loaded.sha256
    with pytest.raises(UserError, match="the network was asked"):
        hub.locate("hf:org/tiny@other")


@pytest.fixture
def alone(hf_cache, vit):
    """A cache as timm leaves it: the weights, and not the JSON beside them."""
    repo = hf_cache / "models--org--tiny"
    (repo / "snapshots" / "0123abc").mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0123abc")
    write_safetensors(repo / "snapshots" / "0123abc" / "model.safetensors", theirs(vit, "timm"))
    return repo


def test_the_json_of_cached_weights_is_fetched(alone, vit, monkeypatch):
    fetched = []

    def fetch(repo, name, revision=None):
        fetched.append((repo, name, revision))
        (alone / "snapshots" / revision / name).write_text(json.dumps(TIMM_CONFIG))

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: None)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    for _ in range(2):
        loaded = weights.load(vit, "hf:org/tiny")
        assert loaded.receipt.preprocess == "preprocessing: from the JSON beside the weights" and loaded.classes
        assert fetched == [("org/tiny", "config.json", "0123abc")]  # of the weights' own commit, whatever main is now


def test_json_that_cannot_be_fetched_is_told_and_what_is_missing_is_not_asked_for(alone, vit, monkeypatch, caplog):
    asked = []

    def unreachable(*arguments, **_):
        asked.append(arguments)
        raise OSError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", unreachable)
    for _ in range(2):
        assert weights.load(vit, "hf:org/tiny").receipt.source == "hf:org/tiny@0123abc:model.safetensors"
    (said,) = [r.getMessage() for r in caplog.records]
    assert len(asked) == 1
    for part in ("org/tiny without config.json and preprocessor_config.json", "Name or service not known"):
        assert part in said
    monkeypatch.setattr(hub, "_asked", {})
    for name in ("config.json", "preprocessor_config.json"):
        (alone / ".no_exist" / "0123abc").mkdir(parents=True, exist_ok=True)
        (alone / ".no_exist" / "0123abc" / name).touch()
    weights.load(vit, "hf:org/tiny")
    assert len(asked) == 1


def test_hugging_face_without_network(hf_cache, vit, monkeypatch):
    asked = []

    def unreachable(*arguments, **_):
        asked.append(arguments)
        raise OSError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", unreachable)
    with pytest.raises(UserError) as caught:
        weights.load(vit, "hf:org/tiny")
    assert len(asked) == 1
    for part in ("org/tiny", "model.safetensors", str(hf_cache), "--weights FOLDER/", "Name or service not known"):
        assert part in str(caught.value)
    with pytest.raises(UserError, match=r"timm/resnet50\.tv_in1k"):
        hub.locate(weights.default_source("resnet50").uri)
    for wrong in ("hf:tiny", "hf:org/tiny:../w.npz", "hf:org/tiny:/etc/w.npz", "hf:org/a/b"):
        with pytest.raises(UserError, match="no Hugging Face source"):
            hub.locate(wrong)


def test_hugging_face_fetches_what_is_needed(hf_cache, vit, monkeypatch):
    snapshot = hf_cache / "models--org--tiny" / "snapshots" / "0123abc"
    fetched = []

    def fetch(repo, name, revision=None):
        fetched.append((repo, name, revision))
        snapshot.mkdir(parents=True, exist_ok=True)
        if name == "config.json":
            (snapshot / name).write_text(json.dumps(TIMM_CONFIG))
        else:
            write_safetensors(snapshot / name, theirs(vit, "timm"))
        return str(snapshot / name)

    files = [
        SimpleNamespace(rfilename=n) for n in ("README.md", "config.json", "pytorch_model.bin", "model.safetensors")
    ]
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: SimpleNamespace(siblings=files))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    loaded = weights.load(vit, "hf:org/tiny@v1")
    assert fetched == [("org/tiny", "config.json", "v1"), ("org/tiny", "model.safetensors", "v1")]
    assert loaded.receipt.source == "hf:org/tiny@0123abc:model.safetensors"


def test_addresses_need_a_checksum(vit, tmp_path, monkeypatch):
    write_safetensors(tmp_path / "w.safetensors", theirs(vit, "timm"))
    content = (tmp_path / "w.safetensors").read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    asked = []

    def urlopen(address, timeout):
        asked.append(address)
        return io.BytesIO(content)

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    with pytest.raises(UserError, match="needs the SHA-256"):
        weights.load(vit, "https://example.com/w.safetensors")
    address = f"https://example.com/../w.safetensors?x=1#sha256={digest}"
    first = weights.load(vit, address)
    assert weights.load(vit, address).sha256 == first.sha256 == digest and len(asked) == 1
    with pytest.raises(UserError, match=f"SHA-256 {digest}, expected 0000"):
        weights.load(vit, "https://example.com/w.safetensors#sha256=" + "0" * 64)
    assert first.path is not None
    assert [p.name for p in first.path.parent.parent.rglob("*") if p.is_file()] == ["w.safetensors"]

    def offline(address, timeout):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", offline)
    with pytest.raises(UserError, match="no network"):
        weights.load(vit, "https://example.com/w.safetensors#sha256=" + "1" * 64)


def test_buckets(vit, tmp_path, monkeypatch):
    """A public object without gcsfs, any with it; kept, and checked against a checksum where one is given."""
    write_safetensors(tmp_path / "w.safetensors", theirs(vit, "timm"))
    content = (tmp_path / "w.safetensors").read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    asked: list[str] = []

    def urlopen(address, timeout):
        asked.append(address)
        if "missing" in address:
            raise urllib.error.HTTPError(address, 403, "Forbidden", {}, None)
        return io.BytesIO(content)

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    installed: list[str] = []
    monkeypatch.setattr(hub.importlib.util, "find_spec", lambda name: name if name in installed else None)
    for _ in range(2):
        loaded = weights.load(vit, "gs://vit_models/a b/w.safetensors")
        assert loaded.sha256 == digest and loaded.receipt.source == "gs://vit_models/a b/w.safetensors"
    assert asked == ["https://storage.googleapis.com/vit_models/a%20b/w.safetensors"]
    weights.load(vit, f"gs://vit_models/w.safetensors#sha256={digest}")
    with pytest.raises(UserError, match="expected 0000"):
        weights.load(vit, "gs://vit_models/w.safetensors#sha256=" + "0" * 64)
    with pytest.raises(
        UserError, match=r"Forbidden.*pip install 'jft\[gcs\]'.*gcloud storage cp gs://vit_models/missing"
    ):
        weights.load(vit, "gs://vit_models/missing.npz")
    for wrong in ("gs://bucket", "gs://bucket/", "gs://bucket/w.npz#sha=1"):
        with pytest.raises(UserError, match="no object in a bucket"):
            weights.load(vit, wrong)

    installed.append("gcsfs")
    opened = SimpleNamespace(open=lambda address, mode: SimpleNamespace(open=lambda: io.BytesIO(content)))
    monkeypatch.setitem(sys.modules, "fsspec", opened)
    assert weights.load(vit, "gs://private/w.safetensors").sha256 == digest and len(asked) == 4


def test_a_connection_that_breaks_off_keeps_nothing(vit, tmp_path, monkeypatch):
    """Without a checksum nothing else tells a file's first half from the whole."""
    write_safetensors(tmp_path / "w.safetensors", theirs(vit, "timm"))
    content = (tmp_path / "w.safetensors").read_bytes()
    sent = [content[:-1], content]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(sent.pop(0))

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        real, here = urllib.request.urlopen, f"http://127.0.0.1:{server.server_port}/w.safetensors"
        monkeypatch.setattr(urllib.request, "urlopen", lambda address, timeout: real(here, timeout=timeout))
        with pytest.raises(UserError, match=rf"broke off after {len(content) - 1:,} of {len(content):,} bytes"):
            weights.load(vit, "gs://breaking/w.safetensors")
        path = weights.load(vit, "gs://breaking/w.safetensors").path
        server.shutdown()
    assert path is not None and path.read_bytes() == content
    assert [p.name for p in path.parent.iterdir()] == ["w.safetensors"]


def test_default_sources():
    for module in weights.FORMATS.values():
        for name, source in module.SOURCES.items():
            assert name in MODELS and source.uri.startswith("hf:") and source.licence and source.paper
            assert source.preprocess.checked().size == make_model(name).input_shape[:2]
            assert source.data and source.paper.startswith("https://arxiv.org/abs/")
    named = {name for module in weights.FORMATS.values() for name in module.SOURCES}
    assert {name for name in MODELS if not name.startswith("tiny_")} - named == {"vit_large_patch14_224"}  # nobody's
    assert weights.default_source("resnet50").preprocess == Preprocess()
    assert weights.default_source("vit_base_patch16_224").preprocess.mean == (0.5, 0.5, 0.5)
    with pytest.raises(UserError, match="no default weights"):
        weights.default_source("tiny_vit")


def test_the_table_of_models_as_json(capsys):
    assert cli.main(["models", "--json", "vit_small_patch8_224"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row.pop("flops") / 2e9 == pytest.approx(22.4, abs=0.1)
    assert row == {
        "name": "vit_small_patch8_224",
        "params": 22_055_272,
        "input": [224, 224],
        "parts": 16,
        "weights": "hf:timm/vit_small_patch8_224.dino",
        "licence": "Apache-2.0",
        "trained_on": "ImageNet-1k, without labels",
        "paper": "https://arxiv.org/abs/2104.14294",
    }


def test_default_sources_are_as_timm_describes_them():
    """Size, crop, filter, mean and deviation, and the licence: `scripts/source_goldens.py`."""
    goldens = json.loads((GOLDENS / "sources.json").read_text())
    seen = set()
    for module in weights.FORMATS.values():
        for source in module.SOURCES.values():
            if not source.uri.startswith("hf:timm/"):
                continue
            told = goldens[source.uri.removeprefix("hf:timm/")]
            seen.add(source.uri.removeprefix("hf:timm/"))
            expected = Preprocess(
                size=tuple(told["input_size"][1:]),
                crop_pct=told["crop_pct"],
                interpolation=told["interpolation"],
                mean=tuple(told["mean"]),
                std=tuple(told["std"]),
                squash=told["crop_mode"] == "squash",
            )
            assert source.preprocess == expected, source.uri
            assert told["license"] in (None, source.licence.lower()), (source.uri, told["license"])
    assert seen == goldens.keys()


def test_exports_that_cannot_be(tmp_path, vit, resnet):
    params = {n: np.zeros(s.shape, np.float32) for n, s in vit.shapes()[0].items()}
    for path, options, reason in (
        ("w.safetensors", {"format": "tim"}, "Did you mean timm"),
        ("w.safetensors", {"format": "bit"}, "no name for"),
        ("w.pth", {"format": "timm"}, r"\.safetensors or \.npz"),
        ("w.npz", {"format": "timm", "dtype": "float8"}, "float32, float16"),
    ):
        with pytest.raises(UserError, match=reason):
            weights.export(tmp_path / path, vit, params, {}, **options)
    assert not list(tmp_path.iterdir())


def test_rules_are_enumerated_once():
    for name in TINY:
        ours, _ = formats._shapes(make_model(name))
        for format, module in weights.FORMATS.items():
            found = module.rules(ours)
            named = [n for rule in found for n in rule.names]
            filled = [rule.ours for rule in found if rule.ours]
            assert len(set(named)) == len(named) and len(set(filled)) == len(filled)
            head = {n for n in ours if n.startswith(HEAD + "/")}  # as a whole or not at all
            assert not found or set(filled) in (set(ours), set(ours) - head), format
    assert rules.match((), {}, {}).fits


# --- the size before the crop


def test_the_shorter_side_is_what_was_asked_for():
    """Of any shorter side and crop, and as timm's floor has it for crop_pct as timm has them."""
    for size in (32, 224, 384, 518):
        for side in range(size, 2 * size + 1):
            assert Preprocess((size, size), size / side).resize == side
    for pct in (0.8, 0.875, 0.88, 0.9, 0.922, 0.94, 0.95, 0.96, 0.965, 0.97, 0.98, 1.0):
        for size in range(16, 1025):
            assert Preprocess((size, size), pct).resize == math.floor(size / pct)


# --- bundles as weights


def test_what_a_bundle_says_of_its_model():
    """Its options without those of the next run; one whose description is damaged is refused."""
    about = {"format": 2, "model": "tiny_vit", "preprocess": {}, "sha256": ""}
    options = {"depth": 2, "depths": [1, 2], "num_classes": 3, "image_size": [32, 32], "dtype": "bfloat16"}
    found = native.described({"config.json": about | {"options": options}})
    assert found == ("tiny_vit", {"depth": 2, "depths": (1, 2)})
    assert native.described({"config.json": about}) is None
    with pytest.raises(UserError, match=r"has \"options\": \[\], where a bundle has"):
        native.described({"config.json": about | {"options": []}})


# --- the real files


REAL = {
    "resnet18": "resnet18_imagenet_ktb.pth",
    "resnet50": "resnet50_imagenet_ktb.safetensors",
    "vit_tiny_patch16_224": "vit_tiny_patch16_224.safetensors",
}


@pytest.mark.assets
@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(REAL))
def test_real_weights(assets, tmp_path, name):
    """Every tensor is accounted for, the logits are the reference's, and an export gives back every byte."""
    model = make_model(name)
    path = assets / "weights" / REAL[name]
    loaded = weights.load(model, path)
    assert not loaded.missing and not loaded.receipt.replaced and not loaded.receipt.not_finite

    inputs = np.load(assets / "reference" / "inputs_8.npz")["vit_uint8" if "vit" in name else "resnet_uint8"]
    key = {"vit_tiny_patch16_224": "vit_tiny"}.get(name, name)
    logits = np.load(assets / "reference" / "logits_200.npz")[f"{key}_logits"][:8]
    mean, std = (np.array(v, np.float32) for v in (loaded.preprocess.mean, loaded.preprocess.std))
    x = (inputs.astype(np.float32) / np.float32(255) - mean) / std
    y = jax.jit(lambda p, s, x: model.apply(p, s, x)[0])(loaded.params, loaded.batch_stats, x)
    np.testing.assert_allclose(np.asarray(y), logits, atol=1e-4, rtol=0)

    weights.export(tmp_path / "out.safetensors", model, loaded.params, loaded.batch_stats, format="timm")
    with weights.open_weights(path) as before, weights.open_weights(tmp_path / "out.safetensors") as after:
        assert set(loaded.receipt.used) | set(loaded.receipt.dropped) == set(before.names) == set(after.names)
        for n in loaded.receipt.used:
            assert before.read(n).tobytes() == after.read(n).tobytes()
        assert all(n.endswith("num_batches_tracked") for n in loaded.receipt.dropped)
