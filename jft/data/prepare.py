"""On the device: from uint8 working images to what the model takes, augmented and normalised as its weights want."""

import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, UInt8

from jft.data.augment import (
    LEVELS,
    blur,
    cutmix,
    draw_window,
    erase,
    flip,
    grey,
    jitter,
    mixup,
    randaugment,
    rotate,
    trivial,
    vflip,
)
from jft.data.decode import window_offset
from jft.errors import UserError, near
from jft.preprocess import Preprocess
from jft.words import Words

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


def pad(
    image: UInt8[Array, "H W c"],
    preprocess: Preprocess,
    key: Key[Array, ""],
    *,
    share: float = 1 / 8,
    fill: Literal["black", "reflect", "edge"] = "black",
) -> Float[Array, "h w c"]:
    """A window of the evaluation crop's size anywhere in that crop with `share` of its sides added all around.

    Four pixels for 32, as is usual with CIFAR (Lee et al. 2015, "Deeply-supervised nets").
    """
    rim = [(math.floor(share * side),) * 2 for side in preprocess.size]
    mode = {"black": "constant", "reflect": "reflect", "edge": "edge"}[fill]
    return crop(jnp.pad(center(image, preprocess).astype(jnp.uint8), [*rim, (0, 0)], mode=mode), preprocess, key)


RESIZE = {"nearest": "linear", "box": "linear", "bilinear": "linear", "bicubic": "cubic", "lanczos": "lanczos3"}


def rrc(
    image: UInt8[Array, "H W c"],
    preprocess: Preprocess,
    key: Key[Array, ""],
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Float[Array, "h w c"]:
    """A window of random area (a fraction of the whole) and aspect ratio, resized to the evaluation crop's size.

    The whole is the working image, the centre square of the picture when it has been shrunk (`work_size`), where
    torchvision's RandomResizedCrop takes the picture as it is: small windows are blurred more, and the ends of long
    pictures are never seen. Windows are drawn as there: of ten draws the first that fits, else as much of the whole as
    the ratio allows. Szegedy et al. 2015, "Going deeper with convolutions".
    """
    height, width = image.shape[:2]
    start, size, fits = draw_window(jax.random.uniform(key, (22,)), (height, width), scale, ratio)
    fallback = np.rint([min(height, width / ratio[0]), min(width, height * ratio[1])]).astype(np.float32)
    size = jnp.where(fits, size, fallback)
    start = jnp.where(fits, start, jnp.floor((np.array([height, width], np.float32) - size) / 2))
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


# In the order in which they are done, whatever the order in which they are named.
# Which part of the working image is seen; one at most, and without one it is the centre:
WINDOWS: dict[str, Callable[..., Array]] = {"crop": crop, "rrc": rrc, "pad": pad}
# What changes it: float32 in 0..1 of the evaluation crop's size.
AUGMENTATIONS: dict[str, Callable[..., Array]] = {
    "flip": flip,
    "vflip": vflip,
    "rotate": rotate,
    "randaugment": randaugment,
    "trivial": trivial,
    "jitter": jitter,
    "grey": grey,
    "blur": blur,
}
# After normalisation:
ERASERS: dict[str, Callable[..., Array]] = {"erase": erase}
# Last, pictures and labels are mixed with those of the next example; with both, one or the other by chance.
MIXERS: dict[str, Callable[..., tuple[Array, Array]]] = {"mixup": mixup, "cutmix": cutmix}
ALL = WINDOWS | AUGMENTATIONS | ERASERS | MIXERS
# By the names that other tools give them.
ELSEWHERE = {"grayscale": "grey", "greyscale": "grey", "gray": "grey", "colorjitter": "jitter", "hflip": "flip"}
ALONE = (tuple(WINDOWS), ("randaugment", "trivial"))  # of each of these one at most

# By an option's name, for it means the same wherever it occurs: the least and the greatest value.
BOUNDS = {
    "p": (0.0, 1.0),
    "share": (0.0, 1.0),
    "scale": (1e-4, 1.0),
    "ratio": (0.01, 100.0),
    "degrees": (0.0, 180.0),
    "m": (0.0, LEVELS),
    "n": (1.0, 16.0),
    "strength": (0.0, 10.0),
    "brightness": (0.0, 10.0),
    "contrast": (0.0, 10.0),
    "saturation": (0.0, 10.0),
    "hue": (0.0, 0.5),
    "sigma": (0.01, 1000.0),
    "alpha": (0.01, 100.0),
}


AUGMENTS = Words("augmentation", ALL, BOUNDS, ELSEWHERE)
parse, options = AUGMENTS.parse, AUGMENTS.options


def make_prepare(
    preprocess: Preprocess,
    augment: Sequence[str] = (),
    train: bool = False,
    num_classes: int | None = None,
    axis_name: str | None = None,
) -> Prepare:
    """A pure function `prepare(batch, key) -> batch` that turns "image" from uint8 working images into float32.

    In training the augmentations named in `augment` are applied, by default none; in evaluation, the centre is taken
    and `key` may be None. An augmentation is its name, or that with options (`parse`): "randaugment:m=9:n=2". They are
    done in one order, however they are named: the window, geometry, policies, colour, normalisation, erasing, mixing.

    What becomes of an image depends on the key and on its entry in "ticket" (`order.tickets`), or in "index" where a
    batch has none, not on its place in the batch nor on the devices. Only mixup and cutmix look at another: each
    example's partner is the one before it in the batch, the first's the last, also over the devices of a pmap whose
    axis is named. They make class indices [b] in "label" into
    soft labels [b, num_classes], with "hard_label", the class that weighs most; labels of floating point are mixed as
    they are. Raises UserError for an unknown augmentation.

    >>> prepare = make_prepare(Preprocess(), ("crop", "flip"), train=True)
    >>> prepare({"image": images, "index": index, "label": labels}, jax.random.fold_in(key, step))["image"].shape
    (32, 224, 224, 3)
    """
    check(augment)
    given = dict(map(parse, augment)) if train else {}
    chosen = [name for name in ALL if name in given]
    window = next((name for name in chosen if name in WINDOWS), None)
    mixers = [name for name in chosen if name in MIXERS]
    mean, std = np.array(preprocess.mean, np.float32)[None, None], np.array(preprocess.std, np.float32)[None, None]

    def evaluated(image: Array) -> Array:
        return (center(image, preprocess) / 255 - mean) / std

    def trained(image: Array, key: Array) -> Array:
        if window:
            pixels = WINDOWS[window](image, preprocess, key_of(window, key), **given[window])
        else:
            pixels = center(image, preprocess)
        pixels = pixels / 255
        for name in chosen:
            if name in AUGMENTATIONS:
                pixels = AUGMENTATIONS[name](pixels, key_of(name, key), **given[name])
        pixels = (pixels - mean) / std
        for name in chosen:
            if name in ERASERS:
                pixels = ERASERS[name](pixels, key_of(name, key), **given[name])
        return pixels

    def weights(key: Array) -> tuple[Array, Array]:
        drawn = [MIXERS[name](preprocess.size, key_of(name, key), **given[name]) for name in mixers]
        if len(drawn) == 1:
            return drawn[0]
        first = jax.random.bernoulli(key_of(" or ".join(mixers), key))
        return jax.tree.map(lambda a, b: jnp.where(first, a, b), *drawn)

    def prepare(batch: Mapping[str, Any], key: Array | None = None) -> Batch:
        if not chosen:
            return dict(batch) | {"image": jax.vmap(evaluated)(batch["image"])}
        if key is None:
            raise ValueError(f"the augmentations {', '.join(chosen)} need a key")
        keys = jax.vmap(lambda ticket: jax.random.fold_in(key, ticket))(batch.get("ticket", batch["index"]))
        done = dict(batch) | {"image": jax.vmap(trained)(batch["image"], keys)}
        return mix(done, *jax.vmap(weights)(keys), num_classes, axis_name) if mixers else done

    return prepare


def mix(
    batch: Mapping[str, Any],
    pixels: Float[Array, "b h w 1"],
    share: Float[Array, " b"],
    num_classes: int | None = None,
    axis_name: str | None = None,
) -> Batch:
    """Each example mixed with the one before it: its own pixels weigh `pixels`, its own label `share`."""
    label = batch["label"]
    hard = jnp.issubdtype(label.dtype, jnp.integer) and label.ndim == 1
    if hard and num_classes is None:
        raise ValueError("to mix class indices, make_prepare needs num_classes")
    label = jax.nn.one_hot(label, num_classes) if hard and num_classes else label.astype(jnp.float32)
    share = share.reshape(-1, *[1] * (label.ndim - 1))
    # p + w·(x − p) would not give back x where w is 1.
    image = pixels * batch["image"] + (1 - pixels) * before(batch["image"], axis_name)
    label = share * label + (1 - share) * before(label, axis_name)
    mixed = dict(batch) | {"image": image, "label": label}
    return mixed | {"hard_label": label.argmax(-1).astype(jnp.int32)} if hard else mixed


def before(x: Array, axis_name: str | None = None) -> Array:
    """For every example the one before it in the whole batch, for the first the last, on any number of devices."""
    if axis_name is None:
        return jnp.roll(x, 1, axis=0)
    n = jax.lax.axis_size(axis_name)
    last = jax.lax.ppermute(x[-1:], axis_name, [(i, (i + 1) % n) for i in range(n)])
    return jnp.concatenate([last, x[:-1]])


VIEWS = ("flip", "corners")


def views(preprocess: Preprocess, names: Sequence[str] = ("flip",)) -> tuple[Prepare, ...]:
    """Test-time augmentation: `prepare` for the evaluation crop, then for every other view of a picture.

    `corners` adds the windows at the corners of the working image, for which it must be larger than the crop
    (`work_size(preprocess, ("crop",))` is); `flip` doubles the views. Both are the ten of Krizhevsky et al. 2012.
    `losses.average` turns the views' logits into one. Raises UserError for an unknown view, and for `corners` where
    evaluation cuts nothing off: beyond its crop the working image would be black.

    >>> [view({"image": images})["image"].shape for view in views(Preprocess())]
    [(32, 224, 224, 3), (32, 224, 224, 3)]
    """
    for name in names:
        if name not in VIEWS:
            raise UserError(f"There is no view {name!r}.{near(name, VIEWS)} Known: {', '.join(VIEWS)}.")
    if "corners" in names and _room(preprocess) == preprocess.size:
        raise UserError(
            "Corners are windows of what the crop leaves, and these weights' crop leaves nothing: take --tta flip."
        )
    height, width = preprocess.size
    centre = make_prepare(preprocess)

    def corner(bottom: bool, right: bool) -> Prepare:
        def prepare(batch: Mapping[str, Any], key: Array | None = None) -> Batch:
            high, wide = batch["image"].shape[1:3]
            if (high, wide) == (height, width):
                raise ValueError("the corners are the centre: working images larger than the crop are needed")
            top, left = bottom * (high - height), right * (wide - width)
            return centre(dict(batch) | {"image": batch["image"][:, top : top + height, left : left + width]})

        return prepare

    def flipped(view: Prepare) -> Prepare:
        def prepare(batch: Mapping[str, Any], key: Array | None = None) -> Batch:
            return (done := view(batch)) | {"image": done["image"][:, :, ::-1]}

        return prepare

    chosen: tuple[Prepare, ...] = (centre,)
    if "corners" in names:
        chosen += tuple(corner(bottom, right) for bottom in (False, True) for right in (False, True))
    return chosen + tuple(map(flipped, chosen)) if "flip" in names else chosen


def key_of(name: str, key: Array) -> Array:
    """A key of its own for each augmentation, so that adding one changes nothing for the others."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def check(augment: Iterable[str]) -> None:
    """Raises UserError for a name or an option that is none, a name given twice, or two that exclude each other."""
    names = [parse(text)[0] for text in augment]
    for alone in ALONE:
        if len(set(names)) < len(names) or len(set(names) & set(alone)) > 1:
            raise UserError(
                f"The augmentations {', '.join(names)} do not go together: each may be named once, "
                f"and one of {', '.join(alone)} at most."
            )


def work_size(preprocess: Preprocess, augment: Iterable[str] = ()) -> tuple[int, int]:
    """Height and width of the working images that serve every one of these augmentations, and evaluation.

    Without `crop` and `rrc` the evaluation crop. With one, what the resized picture covers (`Preprocess.sides`); where
    `crop` would have no room in it (nothing is cut off in evaluation), an eighth of the size is added on every side.
    """
    names = {parse(text)[0] for text in augment}
    height, width = preprocess.size
    if not names & {"crop", "rrc"}:
        return height, width
    room = _room(preprocess)
    if "crop" in names and room == (height, width):
        room = (height + 2 * (height // 8), width + 2 * (width // 8))
    return room


def _room(preprocess: Preprocess) -> tuple[int, int]:
    """Height and width of what is there of every picture: the evaluation crop, and what that cuts off of each."""
    height, width = preprocess.size
    high, wide = (0, 0) if preprocess.squash else preprocess.sides
    return max(height, high), max(width, wide)
