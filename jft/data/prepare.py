"""On the device: from uint8 working images to what the model takes, augmented and normalised as its weights want."""

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, UInt8

from jft.data.decode import window_offset
from jft.errors import UserError, near
from jft.preprocess import Preprocess

Batch = dict[str, Any]
Prepare = Callable[..., Batch]


def center(image: UInt8[Array, "H W c"], preprocess: Preprocess) -> Float[Array, "h w c"]:
    """The evaluation crop."""
    (height, width), (work_height, work_width) = preprocess.size, image.shape[:2]
    top, left = window_offset(work_height, height), window_offset(work_width, width)
    return image[top : top + height, left : left + width].astype(jnp.float32)


def crop(image: UInt8[Array, "H W c"], preprocess: Preprocess, key: Key[Array, ""]) -> Float[Array, "h w c"]:
    """A window of the evaluation crop's size anywhere in the working image."""
    height, width = preprocess.size
    room = np.array([image.shape[0] - height, image.shape[1] - width], np.float32)
    # Not randint: three times the random bits, and seconds of compilation.
    top, left = jnp.minimum(jnp.floor(jax.random.uniform(key, (2,)) * (room + 1)), room).astype(jnp.int32)
    window = jax.lax.dynamic_slice(image, (top, left, jnp.zeros_like(top)), (height, width, image.shape[2]))
    return window.astype(jnp.float32)


RESIZE = {"nearest": "linear", "box": "linear", "bilinear": "linear", "bicubic": "cubic", "lanczos": "lanczos3"}


def rrc(
    image: UInt8[Array, "H W c"],
    preprocess: Preprocess,
    key: Key[Array, ""],
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Float[Array, "h w c"]:
    """A window of random area (a fraction of the whole) and aspect ratio, resized to the evaluation crop's size.

    As torchvision's RandomResizedCrop: of ten draws the first that fits, else as much of the whole as the ratio
    allows. Szegedy et al. 2015, "Going deeper with convolutions".
    """
    height, width = image.shape[:2]
    draws = jax.random.uniform(key, (22,))
    area = height * width * (scale[0] + (scale[1] - scale[0]) * draws[:10])
    aspect = jnp.exp(np.log(ratio[0]) + np.log(ratio[1] / ratio[0]) * draws[10:20])
    sizes = jnp.rint(jnp.sqrt(jnp.stack([area / aspect, area * aspect], 1)))  # (10, 2): height, width
    whole = jnp.array([height, width], jnp.float32)
    fits = (sizes <= whole[None]).all(1) & (sizes > 0).all(1)
    fallback = np.rint([min(height, width / ratio[0]), min(width, height * ratio[1])]).astype(np.float32)
    size = jnp.where(fits.any(), sizes[jnp.argmax(fits)], jnp.asarray(fallback))
    start = jnp.where(fits.any(), jnp.floor(draws[20:] * (whole - size + 1)), jnp.floor((whole - size) / 2))
    zoom = jnp.array(preprocess.size, jnp.float32) / size
    # At the window's edges the filter sees the pixels beyond it, where torchvision, which cuts first, repeats the edge.
    pixels = jax.image.scale_and_translate(
        image.astype(jnp.float32),
        (*preprocess.size, image.shape[2]),
        (0, 1),
        zoom,
        -start * zoom,
        method=RESIZE[preprocess.interpolation],
        antialias=True,
    )
    return jnp.clip(pixels, 0, 255)


def flip(image: Float[Array, "h w c"], key: Key[Array, ""]) -> Float[Array, "h w c"]:
    """Left and right exchanged, for every other image."""
    return jnp.where(jax.random.bernoulli(key), image[:, ::-1], image)


# The first kind chooses what of the working image is seen; one at most, and without one it is the centre. The second
# kind changes what is seen: float32 in 0..1 of the evaluation crop's size.
WINDOWS: dict[str, Callable[..., Array]] = {"crop": crop, "rrc": rrc}
AUGMENTATIONS: dict[str, Callable[[Array, Array], Array]] = {"flip": flip}


def make_prepare(preprocess: Preprocess, augment: Sequence[str] = (), train: bool = False) -> Prepare:
    """A pure function `prepare(batch, key) -> batch` that turns "image" from uint8 working images into float32.

    In training the augmentations named in `augment` are applied in their order, by default none; in evaluation, the
    centre is taken and `key` may be None. What becomes of an image depends on the key and on its entry in "index",
    not on its place in the batch nor on the devices. Raises UserError for an unknown augmentation.

    >>> prepare = make_prepare(Preprocess(), ("crop", "flip"), train=True)
    >>> prepare({"image": images, "index": index, "label": labels}, jax.random.fold_in(key, step))["image"].shape
    (32, 224, 224, 3)
    """
    check(augment)
    names = tuple(augment) if train else ()
    window = next((name for name in names if name in WINDOWS), None)
    changes = [name for name in names if name in AUGMENTATIONS]
    mean, std = np.array(preprocess.mean, np.float32)[None, None], np.array(preprocess.std, np.float32)[None, None]

    def evaluated(image: Array) -> Array:
        return (center(image, preprocess) / 255 - mean) / std

    def trained(image: Array, key: Array) -> Array:
        pixels = WINDOWS[window](image, preprocess, key_of(window, key)) if window else center(image, preprocess)
        pixels = pixels / 255
        for name in changes:
            pixels = AUGMENTATIONS[name](pixels, key_of(name, key))
        return (pixels - mean) / std

    def prepare(batch: Mapping[str, Any], key: Array | None = None) -> Batch:
        if not names:
            return dict(batch) | {"image": jax.vmap(evaluated)(batch["image"])}
        if key is None:
            raise ValueError(f"the augmentations {', '.join(names)} need a key")
        keys = jax.vmap(lambda index: jax.random.fold_in(key, index))(batch["index"])
        return dict(batch) | {"image": jax.vmap(trained)(batch["image"], keys)}

    return prepare


def key_of(name: str, key: Array) -> Array:
    """A key of its own for each augmentation, so that adding one changes nothing for the others."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def check(augment: Sequence[str]) -> None:
    """Raises UserError for a name that is no augmentation, a name given twice, or two that choose the window."""
    check_names(augment)
    if len(set(augment)) < len(augment) or len(set(augment) & set(WINDOWS)) > 1:
        raise UserError(
            f"The augmentations {', '.join(augment)} do not go together: each may be named once, "
            f"and one of {', '.join(WINDOWS)} at most."
        )


def check_names(augment: Iterable[str]) -> None:
    """Raises UserError for a name that is no augmentation."""
    known = [*WINDOWS, *AUGMENTATIONS]
    for name in augment:
        if name not in known:
            raise UserError(f"There is no augmentation {name!r}.{near(name, known)} Known: {', '.join(known)}.")


def work_size(preprocess: Preprocess, augment: Iterable[str] = ()) -> tuple[int, int]:
    """Height and width of the working images that serve every one of these augmentations, and evaluation.

    Without a random window the evaluation crop. With one, the square of the resized picture's shorter side; where
    `crop` would have no room in it (nothing is cut off in evaluation), an eighth of the size is added on every side.
    """
    names = set(augment)
    check_names(names)
    height, width = preprocess.size
    if not names & set(WINDOWS):
        return height, width
    resized = 0 if preprocess.squash else preprocess.resize
    room = (max(height, resized), max(width, resized))
    if "crop" in names and room == (height, width):
        room = (height + 2 * (height // 8), width + 2 * (width // 8))
    return room
