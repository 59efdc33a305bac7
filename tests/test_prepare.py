"""Preparation on the device: the centre is the evaluation crop, chance hangs on key and example alone."""

import re
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jft import words
from jft.data import decode
from jft.data.augment import flip
from jft.data.order import tickets
from jft.data.prepare import ALL, crop, key_of, make_prepare, options, pad, parse, rrc, views, work_size
from jft.errors import UserError
from jft.preprocess import Preprocess

SMALL = Preprocess(size=(8, 6), mean=(0.5, 0.4, 0.3), std=(0.1, 0.2, 0.3))
WORK = (13, 12)


def batch(n: int = 5, seed: int = 0, size: tuple[int, int] = WORK) -> dict:
    images = np.random.default_rng(seed).integers(0, 256, (n, *size, 3), np.uint8)
    return {"image": jnp.asarray(images), "label": jnp.arange(n), "index": jnp.arange(n, dtype=jnp.int32) * 7}


def test_evaluation_is_the_crop_normalised_as_by_torchvision():
    picture = np.random.default_rng(0).integers(0, 256, (31, 40, 3), np.uint8)
    expected = (decode.render(picture, SMALL).astype(np.float32) / 255 - SMALL.mean) / np.asarray(SMALL.std)
    given = {"image": jnp.asarray(decode.render(picture, SMALL, WORK))[None], "label": jnp.zeros(1, jnp.int32)}
    for train in (False, True):
        prepared = jax.jit(make_prepare(SMALL, (), train))(given)
        assert prepared["image"].dtype == jnp.float32 and prepared["label"].shape == (1,)
        np.testing.assert_allclose(prepared["image"][0], expected, atol=2e-6)
    # No augmentation has a part in evaluation.
    plain = np.asarray(make_prepare(SMALL)(given)["image"])
    for augment in (("crop", "flip"), ("rrc", "trivial", "erase:1", "mixup", "cutmix")):
        prepared = make_prepare(SMALL, augment, train=False)(given)
        assert (np.asarray(prepared["image"]) == plain).all() and (prepared["label"] == given["label"]).all()


COLOURS = ("pad", "rotate", "trivial", "jitter:hue=0.1", "grey", "blur", "erase:1")


@pytest.mark.parametrize("augment", [("crop", "flip"), ("rrc", "flip"), COLOURS])
def test_chance_hangs_on_key_and_example_alone(augment):
    prepare = jax.jit(make_prepare(SMALL, augment, train=True))
    given, key = batch(), jax.random.key(3)
    images = prepare(given, key)["image"]
    assert images.shape == (5, 8, 6, 3)
    assert (prepare(given, key)["image"] == images).all()
    assert (prepare(given, jax.random.key(4))["image"] != images).any()
    order = np.array([3, 1, 4, 0, 2])
    assert (prepare({name: leaf[order] for name, leaf in given.items()}, key)["image"] == images[order]).all()
    # Beside other examples an example meets the same fate, and the same picture under another index another.
    others = batch(seed=1) | {"index": jnp.array([100, 101, 14, 102, 103], jnp.int32)}
    others["image"] = others["image"].at[2].set(given["image"][2])
    assert (prepare(others, key)["image"][2] == images[2]).all()
    twins = given | {"image": jnp.repeat(given["image"][:1], 5, 0)}
    assert len({image.tobytes() for image in np.asarray(prepare(twins, key)["image"])}) > 2


def test_an_image_that_comes_again_in_a_batch_is_another_picture():
    """Of 5 shots, or of a class that --balance repeats: else the step were one of a smaller batch."""
    given, key = batch(1), jax.random.key(0)
    prepare = jax.jit(make_prepare(SMALL, ("crop", "flip", "mixup:1"), train=True, num_classes=8))
    four = {n: jnp.repeat(leaf, 4, 0) for n, leaf in given.items()}
    done = prepare(four | {"ticket": tickets(np.zeros((1, 4), np.int32), 1)[0], "label": jnp.arange(4)}, key)
    assert len({image.tobytes() for image in np.asarray(done["image"])}) == 4
    assert len(np.unique(np.asarray(done["label"]).max(-1))) == 4  # the shares of mixing
    pictures = jax.jit(make_prepare(SMALL, ("crop", "flip"), train=True))
    again = pictures(four | {"ticket": jnp.arange(4, dtype=jnp.int32)}, key)["image"]
    first = pictures(given, key)["image"][0]  # the first time is what one alone is
    np.testing.assert_allclose(again[0], first, atol=1e-5)


def test_the_number_of_devices_plays_no_part():
    augment = ("crop", "flip", "mixup", "cutmix")
    prepare = jax.jit(make_prepare(SMALL, augment, train=True, num_classes=16))
    given, key = batch(16), jax.random.key(0)
    sharding = jax.sharding.NamedSharding(
        jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)), jax.sharding.PartitionSpec("data")
    )
    expected = prepare(given, key)
    spread = prepare(jax.device_put(given, sharding), key)
    assert len(spread["image"].sharding.device_set) == 8
    pieces = jax.tree.map(lambda leaf: leaf.reshape(8, 2, *leaf.shape[1:]), given)
    mapped = make_prepare(SMALL, augment, train=True, num_classes=16, axis_name="data")
    mapped = jax.pmap(mapped, axis_name="data", in_axes=(0, None))(pieces, key)
    for name in ("image", "label", "hard_label"):
        assert (np.asarray(spread[name]) == np.asarray(expected[name])).all()
        assert (np.asarray(mapped[name]).reshape(expected[name].shape) == np.asarray(expected[name])).all()


def test_crop_takes_every_window_and_no_other():
    image = jnp.asarray(np.arange(10 * 8, dtype=np.uint8).reshape(10, 8, 1))
    keys = jax.random.split(jax.random.key(0), 500)
    windows = np.asarray(jax.jit(jax.vmap(lambda key: crop(image, SMALL, key)))(keys))
    corners = {(int(w[0, 0, 0]) // 8, int(w[0, 0, 0]) % 8) for w in windows}
    assert corners == {(top, left) for top in range(3) for left in range(3)}
    for window in windows[:20]:
        top, left = divmod(int(window[0, 0, 0]), 8)
        assert (window == np.asarray(image)[top : top + 8, left : left + 6]).all()


def test_pad_crop_is_the_evaluation_crop_moved_over_black():
    image = jnp.asarray(batch(1, seed=2)["image"][0]) // 2 + 100  # nowhere black
    preprocess = Preprocess(size=(8, 8))
    still = pad(image, preprocess, jax.random.key(0), share=0.0)
    centre = np.asarray(image)[2:10, 2:10]
    assert (np.asarray(still) == centre).all()
    keys = jax.random.split(jax.random.key(0), 200)
    seen = set()
    for window in np.asarray(jax.jit(jax.vmap(lambda key: pad(image, preprocess, key, share=0.25)))(keys)):
        rows, columns = np.flatnonzero(window.any((1, 2))), np.flatnonzero(window.any((0, 2)))
        down, right = 8 - len(rows), 8 - len(columns)
        down, right = (-down if rows[0] == 0 else down), (-right if columns[0] == 0 else right)
        expected = np.roll(centre, (down, right), (0, 1))
        inside = window.any(-1)
        assert (window[inside] == expected[inside]).all() and inside.sum() == len(rows) * len(columns)
        seen.add((down, right))
    assert len(seen) == 25  # two pixels each way
    mirrored = pad(image, preprocess, keys[0], fill="reflect")
    assert mirrored.min() >= 100


def test_flip_exchanges_left_and_right_for_half():
    image = jnp.asarray(batch(1)["image"][0], jnp.float32)
    keys = jax.random.split(jax.random.key(1), 400)
    flipped = np.asarray(jax.jit(jax.vmap(lambda key: flip(image, key)))(keys))
    whether = (flipped == np.asarray(image)[:, ::-1]).all((1, 2, 3))
    assert (whether | (flipped == np.asarray(image)).all((1, 2, 3))).all() and 150 < whether.sum() < 250


def test_rrc_draws_area_and_ratio_as_asked_and_stays_inside():
    # The picture holds its own coordinates, so that a window tells where it was cut.
    size = (60, 80)
    preprocess = Preprocess(size=(16, 16), interpolation="bilinear")
    y, x = np.mgrid[: size[0], : size[1]].astype(np.float32)
    image = jnp.asarray(np.stack([y, x, np.full_like(y, 100)], 2).astype(np.uint8))
    keys = jax.random.split(jax.random.key(0), 400)
    windows = np.asarray(jax.jit(jax.vmap(lambda key: rrc(image, preprocess, key)))(keys))
    assert np.abs(windows[..., 2] - 100).max() < 1e-3  # weights sum to one: nothing outside is taken for black
    # Between two pixels well inside the window the coordinates rise by the window's size over the result's.
    high, wide = (
        (windows[:, 10, 8, 0] - windows[:, 5, 8, 0]) / 5 * 16,
        (windows[:, 8, 10, 1] - windows[:, 8, 5, 1]) / 5 * 16,
    )
    area, ratio = high * wide / (60 * 80), wide / high
    assert area.min() > 0.06 and area.max() < 1.05 and 0.40 < area.mean() < 0.48  # torchvision: 0.439
    assert ratio.min() > 0.7 and ratio.max() < 1.4
    assert windows[..., 0].min() < 3 and windows[..., 0].max() > 57 and windows[..., 1].max() > 76
    # A whole picture that no ratio fits gives as much of it as the ratio allows, about its centre.
    thin = jnp.zeros((10, 100, 3), jnp.uint8).at[:, 46:54].set(200)
    centre = rrc(thin, preprocess, keys[0], scale=(1.0, 1.0))
    assert centre[8, 8, 0] > 199 and centre[8, 0, 0] < 1


def test_rrc_resizes_as_pillow_does():
    preprocess = Preprocess(size=(9, 9), interpolation="bicubic")
    picture = np.random.default_rng(0).integers(0, 256, (30, 30, 3), np.uint8)
    whole = rrc(jnp.asarray(picture), preprocess, jax.random.key(0), scale=(1.0, 1.0), ratio=(1.0, 1.0))
    from PIL import Image

    expected = np.asarray(Image.fromarray(picture).resize((9, 9), Image.Resampling.BICUBIC))
    assert np.abs(np.asarray(whole) - expected).max() < 1.01


def test_adding_an_augmentation_changes_nothing_for_the_others():
    given, key = batch(), jax.random.key(0)
    cropped = np.asarray(make_prepare(SMALL, ("crop",), train=True)(given, key)["image"])
    both = np.asarray(make_prepare(SMALL, ("crop", "flip"), train=True)(given, key)["image"])
    same = (cropped == both).all((1, 2, 3)) | (cropped[:, :, ::-1] == both).all((1, 2, 3))
    assert same.all()
    assert jax.random.key_data(key_of("crop", key)).tolist() != jax.random.key_data(key_of("flip", key)).tolist()


def test_working_sizes():
    preprocess = Preprocess()
    assert work_size(preprocess) == work_size(preprocess, ("flip",)) == (224, 224)
    assert work_size(preprocess, ("crop", "flip")) == work_size(preprocess, ("rrc",)) == (256, 256)
    assert work_size(preprocess, ("pad", "mixup:0.2")) == (224, 224) and work_size(preprocess, ("rrc:0.3",)) == (
        256,
        256,
    )
    assert work_size(preprocess, ["crop", "rrc"]) == (256, 256)  # of two stages
    whole = Preprocess(size=(32, 32), crop_pct=1.0)
    assert work_size(whole, ("crop",)) == (40, 40) and work_size(whole, ("rrc",)) == (32, 32)
    assert work_size(Preprocess(squash=True), ("crop",)) == (280, 280)
    assert work_size(Preprocess(size=(100, 300), crop_pct=0.5), ("crop",)) == (200, 600)


def test_mixing_weighs_pictures_and_labels_alike():
    # Pictures of one value each, so that pixels tell their weights.
    given = {"image": jnp.zeros((6, *WORK, 3), jnp.uint8).at[::2].set(255), "label": jnp.arange(6) % 4}
    given["index"] = jnp.arange(6, dtype=jnp.int32)
    preprocess = Preprocess(size=(8, 6), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    light = np.array([1.0, 0.0] * 3)
    label = np.eye(5)[np.arange(6) % 4]
    for augment in (("cutmix",), ("mixup:1", "cutmix")):
        mixed = jax.jit(make_prepare(preprocess, augment, train=True, num_classes=5))(given, jax.random.key(1))
        assert mixed["label"].shape == (6, 5) and mixed["label"].dtype == jnp.float32
        np.testing.assert_allclose(mixed["label"].sum(-1), 1, rtol=1e-6)
        # Its own share, read off the picture, is its label's weight; the rest is the one before it.
        area = np.asarray(mixed["image"]).mean((1, 2, 3))
        own = np.where(light == 1, area, 1 - area)[:, None]
        np.testing.assert_allclose(mixed["label"], own * label + (1 - own) * np.roll(label, 1, 0), atol=1e-5)
        assert (mixed["hard_label"] == mixed["label"].argmax(-1)).all() and mixed["hard_label"].dtype == jnp.int32
    never = jax.jit(make_prepare(SMALL, ("cutmix:p=0",), train=True, num_classes=5))(given, jax.random.key(1))
    plain = jax.jit(make_prepare(SMALL))(given)
    assert (never["image"] == plain["image"]).all() and (never["label"] == label).all()


def test_mixing_other_labels():
    given, key = batch(4), jax.random.key(0)
    several = jnp.array([[1, 1, 0], [0, 0, 0], [1, 1, 1], [0, 1, 0]], jnp.float32)
    prepare = jax.jit(make_prepare(SMALL, ("mixup:1",), train=True))
    mixed = prepare(given | {"label": several}, key)
    number = prepare(given | {"label": several[:, 1]}, key)
    assert "hard_label" not in mixed and mixed["label"].shape == (4, 3)
    assert (number["label"] == mixed["label"][:, 1]).all()
    with pytest.raises(ValueError, match="num_classes"):
        prepare(given, key)


def test_augmentations_have_one_order():
    given, key = batch(), jax.random.key(0)
    one = jax.jit(make_prepare(SMALL, ("crop", "rotate:90", "erase:1"), train=True))(given, key)["image"]
    other = jax.jit(make_prepare(SMALL, ("erase:1", "rotate:90", "crop"), train=True))(given, key)["image"]
    assert (one == other).all()
    # What a turn lets in is black before normalisation; what is erased is the mean, 0, after it.
    pixels = np.asarray(one).reshape(-1, 3)
    black = -np.array(SMALL.mean) / np.array(SMALL.std)
    assert (np.abs(pixels - black) < 1e-5).all(1).any() and (pixels == 0).all(1).any()
    assert list(ALL) == [
        "crop", "rrc", "pad", "flip", "vflip", "rotate", "randaugment", "trivial", "jitter", "grey", "blur", "erase",
        "mixup", "cutmix",
    ]  # fmt: skip


def test_views():
    given = {"image": batch(3)["image"]}
    plain = np.asarray(make_prepare(SMALL)(given)["image"])
    cut = replace(SMALL, crop_pct=0.5)  # so that there is something beyond the crop
    centre, mirrored = (np.asarray(view(given)["image"]) for view in views(SMALL))
    assert (centre == plain).all() and (mirrored == plain[:, :, ::-1]).all()
    ten = [np.asarray(view(given)["image"]) for view in views(cut, ("corners", "flip"))]
    assert len(ten) == 10 and (ten[0] == plain).all() and (ten[7] == ten[2][:, :, ::-1]).all()
    raw = (np.asarray(given["image"][:, -8:, -6:]) / 255 - SMALL.mean) / np.array(SMALL.std)
    np.testing.assert_allclose(ten[4], raw, atol=2e-6)  # the lower right
    with pytest.raises(UserError, match=r"no view 'flips'\. Did you mean flip"):
        views(SMALL, ("flips",))
    for whole in (Preprocess((8, 6), crop_pct=1.0), Preprocess((8, 8), crop_pct=0.5, squash=True)):
        assert len(views(whole)) == 2
        with pytest.raises(UserError, match="crop leaves nothing: take --tta flip"):
            views(whole, ("flip", "corners"))
    with pytest.raises(ValueError, match="larger than the crop"):
        views(cut, ("corners",))[1]({"image": given["image"][:, :8, :6]})


def test_options_in_text():
    assert parse("flip") == ("flip", {})
    assert parse("mixup:0.4") == ("mixup", {"alpha": 0.4})
    assert parse("randaugment:m=15:n=3") == parse("randaugment:15:3") == ("randaugment", {"m": 15, "n": 3})
    assert parse("rrc:0.3") == ("rrc", {"scale": (0.3, 1.0)})
    assert parse("blur:0.2:0.5..3") == ("blur", {"p": 0.2, "sigma": (0.5, 3.0)})
    assert parse("erase:fill=noise") == ("erase", {"fill": "noise"})
    assert parse("jitter:0.2:hue=0.1:brightness=0.8")[1] == {"strength": 0.2, "hue": 0.1, "brightness": 0.8}
    given, key = batch(), jax.random.key(0)
    strong = jax.jit(make_prepare(SMALL, ("flip:1",), train=True))(given, key)["image"]
    upright = jax.jit(make_prepare(SMALL))(given)["image"]
    assert (strong == upright[:, :, ::-1]).all()
    assert (jax.jit(make_prepare(SMALL, ("vflip:1",), train=True))(given, key)["image"] == upright[:, ::-1]).all()
    for name in ALL:  # every option's default is a value that may be given
        for option, (_, default) in options(name).items():
            if isinstance(default, float | int):
                assert parse(f"{name}:{option}={default}") == (name, {option: default})


def test_the_table_of_the_docs_has_every_augmentation_with_its_options():
    page = (Path(__file__).parent.parent / "docs" / "data.md").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in page.splitlines() if line.count(" | ") == 2 and line.startswith("| `")]
    told = {row[0].strip("|` "): re.sub(r"\(.*?\)", "", row[2]).strip("| ") for row in rows}
    expected = {}
    for name in ALL:
        defaults = [(o, default) for o, (_, default) in options(name).items()]
        expected[name] = " ".join(f"`{o}`" if d is None else f"`{o}={words.written(d)}`" for o, d in defaults)
    assert {name: " ".join(t.split()) for name, t in told.items()} == expected and list(told) == list(ALL)


@pytest.mark.parametrize(
    "text, told",
    [
        ("mixup:-1", "alpha is '-1'; it is a number from 0.01 to 100"),
        ("mixup:nan", "alpha is 'nan'"),
        ("mixup:alpha=", "alpha is ''"),
        ("randaugment:2.5", "m is '2.5'; it is a whole number from 0 to 30"),
        ("randaugment:levels=9", r"no option for 'levels=9'\. Its options: m=9, n=2"),
        ("mixup:alhpa=1", r"Did you mean alpha\?"),
        ("mixup:0.2:alpha=0.3", "was given alpha twice"),
        ("crop:3", r"Its options: none"),
        ("erase:fill=nois", r"fill is 'nois'; it is one of mean, noise\. Did you mean noise"),
        ("rrc:0.5..0.2", r"scale is '0\.5\.\.0\.2'; it is a range LOW\.\.HIGH, or LOW, from 0\.0001 to 1"),
        ("mixup(0.2)", r"no augmentation 'mixup\(0\.2\)'\. Did you mean mixup"),
    ],
)
def test_wrong_options_in_text(text, told):
    with pytest.raises(UserError, match=told):
        parse(text)


def test_wrong_augmentations():
    with pytest.raises(UserError, match=r"no augmentation 'flips'\. Did you mean flip"):
        make_prepare(SMALL, ("flips",), train=True)
    with pytest.raises(UserError, match="Did you mean grey"):
        make_prepare(SMALL, ("grayscale",), train=True)
    with pytest.raises(UserError, match="Known: crop, rrc, pad, flip"):
        work_size(SMALL, ("?",))
    with pytest.raises(UserError, match="do not go together"):
        make_prepare(SMALL, ("crop", "rrc"))
    with pytest.raises(UserError, match="do not go together"):
        make_prepare(SMALL, ("flip", "flip"))
    with pytest.raises(UserError, match="one of randaugment, trivial at most"):
        make_prepare(SMALL, ("trivial", "flip", "randaugment:5"))
    with pytest.raises(ValueError, match="need a key"):
        make_prepare(SMALL, ("flip",), train=True)(batch())
