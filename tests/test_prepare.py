"""Preparation on the device: the centre is the evaluation crop, chance hangs on key and example alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jft.data import decode
from jft.data.prepare import AUGMENTATIONS, WINDOWS, crop, flip, key_of, make_prepare, rrc, work_size
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
    prepared = make_prepare(SMALL, ("crop", "flip"), train=False)(given)
    np.testing.assert_allclose(prepared["image"][0], expected, atol=2e-6)


@pytest.mark.parametrize("augment", [("crop", "flip"), ("rrc", "flip")])
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


def test_the_number_of_devices_plays_no_part():
    prepare = jax.jit(make_prepare(SMALL, ("crop", "flip"), train=True))
    given, key = batch(16), jax.random.key(0)
    sharding = jax.sharding.NamedSharding(
        jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)), jax.sharding.PartitionSpec("data")
    )
    spread = prepare(jax.device_put(given, sharding), key)["image"]
    assert len(spread.sharding.device_set) == 8
    assert (np.asarray(spread) == np.asarray(prepare(given, key)["image"])).all()


def test_crop_takes_every_window_and_no_other():
    image = jnp.asarray(np.arange(10 * 8, dtype=np.uint8).reshape(10, 8, 1))
    keys = jax.random.split(jax.random.key(0), 500)
    windows = np.asarray(jax.jit(jax.vmap(lambda key: crop(image, SMALL, key)))(keys))
    corners = {(int(w[0, 0, 0]) // 8, int(w[0, 0, 0]) % 8) for w in windows}
    assert corners == {(top, left) for top in range(3) for left in range(3)}
    for window in windows[:20]:
        top, left = divmod(int(window[0, 0, 0]), 8)
        assert (window == np.asarray(image)[top : top + 8, left : left + 6]).all()


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
    assert work_size(preprocess, ["crop", "rrc"]) == (256, 256)  # of two stages
    whole = Preprocess(size=(32, 32), crop_pct=1.0)
    assert work_size(whole, ("crop",)) == (40, 40) and work_size(whole, ("rrc",)) == (32, 32)
    assert work_size(Preprocess(squash=True), ("crop",)) == (280, 280)
    assert work_size(Preprocess(size=(100, 300), crop_pct=0.5), ("crop",)) == (200, 300)


def test_wrong_augmentations():
    assert set(WINDOWS) | set(AUGMENTATIONS) >= {"crop", "rrc", "flip"}
    with pytest.raises(UserError, match=r"no augmentation 'flips'\. Did you mean flip"):
        make_prepare(SMALL, ("flips",), train=True)
    with pytest.raises(UserError, match="Known: crop, rrc, flip"):
        work_size(SMALL, ("?",))
    with pytest.raises(UserError, match="do not go together"):
        make_prepare(SMALL, ("crop", "rrc"))
    with pytest.raises(UserError, match="do not go together"):
        make_prepare(SMALL, ("flip", "flip"))
    with pytest.raises(ValueError, match="need a key"):
        make_prepare(SMALL, ("flip",), train=True)(batch())
