"""Augmentations of one picture: the operations are torchvision's and Pillow's, chances and strengths what was asked."""

import colorsys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from PIL import Image, ImageEnhance, ImageOps

from jft.data import augment

GOLDENS = np.load(Path(__file__).parent / "goldens" / "augment.npz")
PICTURE = jnp.asarray(GOLDENS["picture"], jnp.float32) / 255
operate = jax.jit(jax.vmap(augment.operate, (None, 0, 0)))


def many(function, count: int = 200, image=PICTURE, **options) -> np.ndarray:
    keys = jax.random.split(jax.random.key(0), count)
    return np.asarray(jax.jit(jax.vmap(lambda key: function(image, key, **options)))(keys))


@pytest.mark.parametrize("policy, level", [("randaugment", 9), ("randaugment", 30), ("trivial", 9), ("trivial", 30)])
def test_operations_and_their_ranges_are_torchvisions(policy, level):
    values = augment.trivial_values()[level] if policy == "trivial" else augment.randaugment_values(level, (20, 17))
    np.testing.assert_allclose(values, GOLDENS[f"{policy} {level} values"], rtol=1e-6, atol=1e-5)
    which, given = [], []
    for i, value in enumerate(values):
        for sign in (1, -1) if augment.SIGNED[i] else (1,):
            which.append(i)
            given.append(sign * value)
    results = np.asarray(operate(jnp.rint(255 * PICTURE), jnp.array(which), jnp.array(given)))
    for i, result, expected in zip(which, results, GOLDENS[f"{policy} {level}"], strict=True):
        # To the byte, but where a warp's position is rounded otherwise than in Pillow's doubles.
        warped = augment.OPERATIONS[i] in ("shear_x", "shear_y", "rotate")
        different = np.abs(result - expected)
        assert different.max() <= (1 if warped else 0), augment.OPERATIONS[i]
        assert (different > 0).mean() < 0.05, augment.OPERATIONS[i]


def test_operations_on_a_larger_picture_are_pillows():
    # Noise on a slope, and a channel without values: counts and ranges unlike those of the small picture.
    rng = np.random.default_rng(0)
    pixels = (np.arange(20 * 17 * 3).reshape(20, 17, 3) // 9 + rng.integers(0, 60, (20, 17, 3))).astype(np.uint8)
    pixels[..., 1] = 77
    image = Image.fromarray(pixels)
    expected = {
        "auto_contrast": ImageOps.autocontrast(image),
        "equalize": ImageOps.equalize(image),
        "contrast": ImageEnhance.Contrast(image).enhance(1.6),
        "sharpness": ImageEnhance.Sharpness(image).enhance(1.6),
        "solarize": ImageOps.solarize(image, 100),
        "posterize": ImageOps.posterize(image, 3),
    }
    values = [0.6, 0.6, 0.6, 0.6, 100, 3]
    which = [augment.OPERATIONS.index(name) for name in expected]
    results = operate(jnp.asarray(pixels, jnp.float32), jnp.array(which), jnp.array(values, jnp.float32))
    for result, (name, other) in zip(results, expected.items(), strict=True):
        assert np.abs(np.asarray(result) - np.asarray(other)).max() <= 1, name


def test_equalize_counts_as_pillow_does():
    pixels = np.random.default_rng(0).integers(40, 200, (50, 70, 3)).astype(np.uint8)
    result = jax.jit(augment._equalize)(jnp.asarray(pixels, jnp.int32))
    assert (np.asarray(result) == np.asarray(ImageOps.equalize(Image.fromarray(pixels)))).all()


def test_policies_draw_every_operation():
    # Operations leave 8-bit values, and what they make differs from key to key.
    done = many(augment.randaugment, 60, m=30, n=2)
    assert np.abs(done * 255 - np.rint(done * 255)).max() < 1e-3 and done.min() >= 0 and done.max() <= 1
    assert len({picture.tobytes() for picture in done}) > 40
    trivial = many(augment.trivial, 60)
    assert (np.abs(trivial - np.asarray(PICTURE)).max((1, 2, 3)) < 1e-6).any()  # the identity
    assert len({picture.tobytes() for picture in trivial}) > 30


def test_warps():
    square = PICTURE[:17]
    angles = jnp.array([0.0, 90.0, 180.0, -90.0])
    turned = jax.jit(jax.vmap(lambda angle: augment.warp(square, augment._rotation(17, 17, angle))))(angles)
    assert (turned[0] == square).all()
    for image, turns in zip(turned, (0, 1, 2, -1), strict=True):  # counter-clockwise
        np.testing.assert_allclose(image[1:-1, 1:-1], np.rot90(square, turns)[1:-1, 1:-1], atol=1e-4)
    # A turned white picture is black at the corners, the more the larger the angle.
    light = many(augment.rotate, image=jnp.ones((20, 20, 1)), degrees=30.0).mean((1, 2, 3))
    assert 0.82 < light.min() < 0.87 and light.max() > 0.99


@pytest.mark.parametrize("turn", [-0.4, -0.1, 0.2, 0.5])
def test_hue_is_turned_as_torchvision_does(turn):
    turned = np.asarray(augment.turn_hue(PICTURE, jnp.float32(turn)))
    np.testing.assert_allclose(turned, GOLDENS[f"hue {turn}"], atol=1e-5)
    hue, saturation, value = colorsys.rgb_to_hsv(*np.asarray(PICTURE[3, 4], float))
    np.testing.assert_allclose(turned[3, 4], colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value), atol=1e-5)


def test_jitter_draws_each_strength():
    dim = 0.3 * PICTURE
    factors = many(augment.jitter, image=dim, strength=0.0, brightness=0.6) / np.asarray(dim)
    assert factors.std((1, 2, 3)).max() < 1e-4
    assert 0.4 <= factors.min() < 0.45 and 1.55 < factors.max() < 1.601
    # Saturation and hue leave grey alone; contrast leaves its mean.
    grey = 0.4 + 0.1 * jnp.broadcast_to(dim[..., :1], dim.shape)
    changed = many(augment.jitter, 20, image=grey, strength=0.9, brightness=0.0, contrast=0.0, hue=0.5)
    np.testing.assert_allclose(changed, np.broadcast_to(grey, changed.shape), atol=1e-6)
    changed = many(augment.jitter, 20, image=grey, strength=0.5, brightness=0.0)
    np.testing.assert_allclose(changed.mean((1, 2, 3)), float(grey.mean()), rtol=1e-5)
    assert changed.std((1, 2, 3)).max() > 1.3 * changed.std((1, 2, 3)).min()


def test_grey_and_blur_by_their_probability():
    both = many(lambda image, key: jnp.stack([f(image, key, p=0.3) for f in (augment.grey, augment.blur)]), 300)
    left = (both == np.asarray(PICTURE)).all((2, 3, 4))
    assert (left.mean(0) > 0.6).all() and (left.mean(0) < 0.8).all()
    np.testing.assert_allclose(both[~left[:, 0], 0], both[~left[:, 0], 0, :, :, :1].repeat(3, -1), atol=1e-6)


def test_blur_is_torchvisions():
    blurred = jax.jit(augment.gaussian)
    for sigma in (0.3, 2.0):
        np.testing.assert_allclose(blurred(PICTURE, jnp.float32(sigma)), GOLDENS[f"blur {sigma}"], atol=1e-6)
    # It keeps what is even, and mirrored edges.
    even = jnp.full((60, 9, 1), 0.3)
    np.testing.assert_allclose(blurred(even, jnp.float32(1.5)), even, rtol=1e-6)
    one = blurred(jnp.zeros((60, 9, 1)).at[30, 4].set(1.0), jnp.float32(1.0))
    assert (np.asarray(one[:, 4, 0]) > 0).sum() == 7 and float(one.sum()) == pytest.approx(1)


def test_erased_windows():
    image = jnp.ones((30, 40, 2))
    done = many(augment.erase, 400, image=image, p=0.5)
    gone = (done == 0).all(-1)
    share = gone.mean((1, 2))
    assert 0.42 < (share > 0).mean() < 0.58
    assert share[share > 0].min() > 0.015 and 0.3 < share.max() < 0.35
    for window in gone[share > 0][:50]:  # a rectangle, whole
        assert np.outer(window.any(1), window.any(0))[window.any(1)].sum() == window.sum()
    noisy = many(augment.erase, 20, image=image, p=1.0, fill="noise", scale=(0.25, 0.25))
    noise = noisy[noisy != 1]
    assert noise.mean() == pytest.approx(0, abs=0.05) and noise.std() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 5.0])
def test_beta_is_beta(alpha):
    draws = jax.random.uniform(jax.random.key(0), (2000,))
    drawn = jax.vmap(lambda draw: augment.beta(draw, alpha))(draws)
    assert scipy.stats.kstest(np.asarray(drawn), scipy.stats.beta(alpha, alpha).cdf).pvalue > 0.01


def test_the_shares_of_mixup_and_cutmix_are_those_of_their_pixels():
    def drawn(key):
        return [augment.mixup((20, 30), key), augment.cutmix((20, 30), key), augment.cutmix((20, 30), key, p=0.5)]

    keys = jax.random.split(jax.random.key(0), 300)
    mixup, cutmix, seldom = jax.jit(jax.vmap(drawn))(keys)
    for own, share in (mixup, cutmix, seldom):
        np.testing.assert_allclose(own.mean((1, 2, 3)), share, atol=1e-5)
        assert share.min() >= 0 and share.max() <= 1
    assert set(np.unique(cutmix[0])) == {0.0, 1.0}
    assert 0.4 < (np.asarray(seldom[1]) == 1).mean() < 0.65
    # Boxes are cut off at the edges, so that more is left than λ, whose mean is a half.
    assert 0.6 < float(cutmix[1].mean()) < 0.75 and 0.4 < float(mixup[1].mean()) < 0.6
