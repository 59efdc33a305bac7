"""Changes to one picture on the device, by a key: geometry, colour, erasing, and what mixes it with another.

Pictures are float32 [h, w, c]. Strengths are keyword options; a config names them in text (`jft.words`).
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key


def warp(image: Float[Array, "h w c"], inverse: Float[Array, "2 3"]) -> Float[Array, "h w c"]:
    """Every pixel taken, bilinearly, from where `inverse` sends its middle; black from outside.

    `inverse` maps (x, y, 1) to (x, y), in pixels from the upper left corner: Pillow's `transform(AFFINE, BILINEAR)`.
    """
    height, width, _ = image.shape
    x, y = np.arange(width, dtype=np.float32)[None] + 0.5, np.arange(height, dtype=np.float32)[:, None] + 0.5
    from_x, from_y = (row[0] * x + row[1] * y + row[2] for row in inverse)
    inside = (from_x >= 0) & (from_x < width) & (from_y >= 0) & (from_y < height)
    left, top = jnp.floor(from_x - 0.5), jnp.floor(from_y - 0.5)
    right, below = (from_x - 0.5 - left)[..., None], (from_y - 0.5 - top)[..., None]
    rows = [jnp.clip(top.astype(jnp.int32) + i, 0, height - 1) for i in (0, 1)]
    columns = [jnp.clip(left.astype(jnp.int32) + i, 0, width - 1) for i in (0, 1)]
    upper, lower = (image[row, columns[0]] * (1 - right) + image[row, columns[1]] * right for row in rows)
    return jnp.where(inside[..., None], upper * (1 - below) + lower * below, 0.0)


def flip(image: Float[Array, "h w c"], key: Key[Array, ""], *, p: float = 0.5) -> Float[Array, "h w c"]:
    """Left and right exchanged, with probability p."""
    return jnp.where(jax.random.bernoulli(key, p), image[:, ::-1], image)


def vflip(image: Float[Array, "h w c"], key: Key[Array, ""], *, p: float = 0.5) -> Float[Array, "h w c"]:
    """Top and bottom exchanged, with probability p: for what has no up, as seen from above or through a microscope."""
    return jnp.where(jax.random.bernoulli(key, p), image[::-1], image)


def rotate(image: Float[Array, "h w c"], key: Key[Array, ""], *, degrees: float = 15.0) -> Float[Array, "h w c"]:
    """Turned about its middle by an angle drawn evenly from ±degrees; what comes in from outside is black."""
    angle = jax.random.uniform(key, minval=-degrees, maxval=degrees)
    return warp(image, _rotation(image.shape[0], image.shape[1], angle))


def _rotation(height: int, width: int, degrees: Float[Array, ""]) -> Float[Array, "2 3"]:
    angle = degrees * (np.pi / 180)  # counter-clockwise, as seen
    cos, sin, x, y = jnp.cos(angle), jnp.sin(angle), width / 2, height / 2
    return jnp.stack([cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y]).reshape(2, 3)


def luma(image: Float[Array, "h w 3"]) -> Float[Array, "h w 1"]:
    """Brightness as television weighs the colours (ITU-R BT.601) and Pillow's mode L, not rounded."""
    # Written out: over an axis of three, XLA's reductions on a CPU take ten times as long.
    return 0.299 * image[..., :1] + 0.587 * image[..., 1:2] + 0.114 * image[..., 2:]


def jitter(
    image: Float[Array, "h w 3"],
    key: Key[Array, ""],
    *,
    strength: float = 0.4,
    hue: float = 0.0,
    brightness: float | None = None,
    contrast: float | None = None,
    saturation: float | None = None,
) -> Float[Array, "h w 3"]:
    """Brightness, contrast and saturation, in an order drawn by chance, each by a factor within 1 ± strength; then hue.

    `brightness`, `contrast` and `saturation` are strengths of their own; `hue` is the largest turn, in turns (0 to
    0.5). As torchvision's ColorJitter (which draws the place of hue too), on values within 0..1.
    """
    strengths = np.array([strength if s is None else s for s in (brightness, contrast, saturation)], np.float32)
    draws = jax.random.uniform(key, (7,))
    low, high = np.maximum(1 - strengths, 0), 1 + strengths
    factors, order = low + (high - low) * draws[:3], jnp.argsort(draws[3:6])
    for i in range(3):
        grey = luma(image)
        towards = jnp.select(
            [order[i] == 0, order[i] == 1], [jnp.zeros_like(grey), jnp.full_like(grey, grey.mean())], grey
        )
        image = jnp.clip(towards + factors[order[i]] * (image - towards), 0, 1)
    return turn_hue(image, hue * (2 * draws[6] - 1)) if hue else image


def turn_hue(image: Float[Array, "h w 3"], turns: Float[Array, ""]) -> Float[Array, "h w 3"]:
    """Hue turned in HSV, by turns within ±0.5; values within 0..1. As torchvision's adjust_hue."""
    red, green, blue = image[..., 0], image[..., 1], image[..., 2]
    value = jnp.maximum(jnp.maximum(red, green), blue)
    chroma = value - jnp.minimum(jnp.minimum(red, green), blue)
    safe = jnp.where(chroma > 0, chroma, 1.0)
    sixths = jnp.select(
        [value == red, value == green], [(green - blue) / safe, 2 + (blue - red) / safe], 4 + (red - green) / safe
    )
    # From hue to colours without a branch: each colour is full, rising, absent or falling along the circle.
    place = sixths[..., None] + 6 * turns + np.array([5, 3, 1], np.float32)[None, None]
    place = place - 6 * jnp.floor(place / 6)
    return value[..., None] - chroma[..., None] * jnp.clip(jnp.minimum(place, 4 - place), 0, 1)


def grey(image: Float[Array, "h w 3"], key: Key[Array, ""], *, p: float = 0.1) -> Float[Array, "h w 3"]:
    """Without its colours, with probability p."""
    return jnp.where(jax.random.bernoulli(key, p), luma(image), image)


def blur(
    image: Float[Array, "h w c"], key: Key[Array, ""], *, p: float = 0.5, sigma: tuple[float, float] = (0.1, 2.0)
) -> Float[Array, "h w c"]:
    """With probability p blurred by a Gaussian of a width drawn from `sigma`, in pixels.

    The kernel reaches a twentieth of the side (at least a pixel), edges mirrored. Chen et al. 2020, "A simple framework
    for contrastive learning", appendix A.
    """
    draws = jax.random.uniform(key, (2,))
    width = sigma[0] + (sigma[1] - sigma[0]) * draws[1]
    return jnp.where(draws[0] < p, gaussian(image, width), image)


def gaussian(image: Float[Array, "h w c"], sigma: Float[Array, ""]) -> Float[Array, "h w c"]:
    """Blurred by a Gaussian of `sigma` pixels that reaches a twentieth of the side, edges mirrored."""
    # As two products with banded matrices: on a CPU as fast as sums of shifted pictures, elsewhere faster.
    down, across = (_gaussian_matrix(side, sigma) for side in image.shape[:2])
    image = jnp.einsum("ij,jwc->iwc", down, image, precision="highest")
    return jnp.einsum("ij,hjc->hic", across, image, precision="highest")


def _gaussian_matrix(side: int, sigma: Float[Array, ""]) -> Float[Array, "n n"]:
    reach = min(max(1, side // 20), side - 1)
    distance = np.arange(-reach, reach + 1)
    weights = jnp.exp(-((distance.astype(np.float32) / sigma) ** 2) / 2)
    source = np.arange(side)[:, None] + distance[None]
    mirrored = np.abs(side - 1 - np.abs(side - 1 - source)) if side > 1 else np.zeros_like(source)
    rows = np.broadcast_to(np.arange(side)[:, None], source.shape)
    matrix = jnp.zeros((side, side), jnp.float32)
    return matrix.at[rows, mirrored].add(jnp.broadcast_to((weights / weights.sum())[None], source.shape))


# RandAugment and TrivialAugment: one operation at a time on 8-bit values, as the originals have it. Each is a warp, a
# blend with another picture, or a table of 256 values: under vmap all are computed and one chosen, so they are few.
OPERATIONS = (
    "identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate", "brightness", "color", "contrast",
    "sharpness", "posterize", "solarize", "auto_contrast", "equalize",
)  # fmt: skip
LEVELS = 30  # a magnitude is so many of as many parts of an operation's range
SIGNED = np.array([1 <= i <= 9 for i in range(len(OPERATIONS))])


def randaugment(image: Float[Array, "h w 3"], key: Key[Array, ""], *, m: int = 9, n: int = 2) -> Float[Array, "h w 3"]:
    """n operations, each drawn evenly from 14, at magnitude m of 30, on values within 0..1.

    Operations and ranges are torchvision's RandAugment, bilinear (timm counts to 10: its m9 is 27 here). Cubuk et al.
    2019, "RandAugment: practical automated data augmentation with a reduced search space".
    """
    values = randaugment_values(m, (image.shape[0], image.shape[1]))
    return _chain(image, jax.random.uniform(key, (n, 3)), values[None])


def randaugment_values(m: int, size: tuple[int, int]) -> Float[np.ndarray, "14"]:
    """The value of each operation at magnitude m, for a picture of this height and width."""
    width, height = 150 / 331 * size[1], 150 / 331 * size[0]
    ranges = [0, 0.3, 0.3, width, height, 30, 0.9, 0.9, 0.9, 0.9, 0, 0, 0, 0]
    values = np.array(ranges) * m / LEVELS
    values[10:12] = 8 - round(4 * m / LEVELS), 255 * (1 - m / LEVELS)
    return values.astype(np.float32)


def trivial(image: Float[Array, "h w 3"], key: Key[Array, ""]) -> Float[Array, "h w 3"]:
    """One operation of 14 at any magnitude, both drawn evenly, on values within 0..1.

    Operations and ranges are torchvision's TrivialAugmentWide, bilinear. Müller and Hutter 2021, "TrivialAugment:
    tuning-free yet state-of-the-art data augmentation".
    """
    return _chain(image, jax.random.uniform(key, (1, 3)), trivial_values())


def trivial_values() -> Float[np.ndarray, "31 14"]:
    """The value of each operation at each magnitude from 0 to 30."""
    share = np.arange(LEVELS + 1) / LEVELS
    values = share[:, None] * np.array([0, 0.99, 0.99, 32, 32, 135, 0.99, 0.99, 0.99, 0.99, 0, 0, 0, 0])
    values[:, 10], values[:, 11] = 8 - np.rint(6 * share), 255 * (1 - share)
    return values.astype(np.float32)


def _chain(
    image: Float[Array, "h w 3"], draws: Float[Array, "n 3"], table: Float[np.ndarray, "m 14"]
) -> Float[Array, "h w 3"]:
    """Operations drawn one after another, each at a level drawn from the rows of `table`."""

    def one(image: Array, draw: Array) -> tuple[Array, None]:
        which = (draw[0] * len(OPERATIONS)).astype(jnp.int32)
        value = jnp.asarray(table)[(draw[1] * len(table)).astype(jnp.int32), which]
        value = jnp.where(jnp.asarray(SIGNED)[which] & (draw[2] < 0.5), -value, value)
        return operate(image, which, value), None

    # A loop, so that n operations compile as fast as one.
    return jax.lax.scan(one, jnp.rint(image * 255), draws)[0] / 255


def operate(image: Float[Array, "h w 3"], which: Int[Array, ""], value: Float[Array, ""]) -> Float[Array, "h w 3"]:
    """The operation OPERATIONS[which] on a picture of whole numbers within 0..255, which the result is too.

    `value` is in the operation's own unit: a slope, pixels (to the left and up), degrees counter-clockwise, a factor
    less 1, bits kept, a threshold. As Pillow's ImageEnhance, ImageOps and transform, within 1.
    """

    def of(name: str) -> Bool[Array, ""]:
        return which == OPERATIONS.index(name)

    one, moved = jnp.ones(()), -jnp.trunc(value)
    inverse = jnp.stack([
        one, jnp.where(of("shear_x"), value, 0), jnp.where(of("translate_x"), moved, 0),
        jnp.where(of("shear_y"), value, 0), one, jnp.where(of("translate_y"), moved, 0),
    ]).reshape(2, 3)  # fmt: skip
    inverse = jnp.where(of("rotate"), _rotation(image.shape[0], image.shape[1], value), inverse)
    warped = jnp.floor(warp(image, inverse))  # Pillow cuts off, too

    brightness = jnp.floor(luma(image) + 0.5)
    towards = jnp.select(
        [of("brightness"), of("color"), of("contrast")],
        [
            jnp.zeros_like(image),
            jnp.broadcast_to(brightness, image.shape),
            jnp.full_like(image, jnp.floor(brightness.mean() + 0.5)),
        ],
        _smooth(image),
    )
    blended = jnp.floor(jnp.clip(towards + (1 + value) * (image - towards), 0, 255))

    whole = image.astype(jnp.int32)
    # Shifts by up to 7: no bit count makes more of a byte.
    bits = jnp.clip(8 - value.astype(jnp.int32), 0, 7)
    posterized = jnp.left_shift(jnp.right_shift(whole, bits), bits)
    solarized = jnp.where(image < value, whole, 255 - whole)
    low, high = whole.min((0, 1), keepdims=True), whole.max((0, 1), keepdims=True)
    stretched = jnp.where(high > low, (whole - low) * 255 // jnp.maximum(high - low, 1), whole)
    tabled = jnp.select(
        [of("posterize"), of("solarize"), of("auto_contrast")], [posterized, solarized, stretched], _equalize(whole)
    ).astype(jnp.float32)
    return jnp.select([which < 6, which < 10], [warped, blended], tabled)


def _smooth(image: Float[Array, "h w c"]) -> Float[Array, "h w c"]:
    """Pillow's SMOOTH: nine pixels, the middle weighing 5 of 13, rounded; the border is left as it is."""
    height, width, channels = image.shape
    # With pixels and channels on one axis: a fifth of the time on a CPU.
    flat = image.reshape(height, width * channels)
    rows = flat[:-2] + flat[1:-1] + flat[2:]
    near = rows[:, : -2 * channels] + rows[:, channels:-channels] + rows[:, 2 * channels :]
    smooth = jnp.floor((near + 4 * flat[1:-1, channels:-channels]) / 13 + 0.5)
    inner = np.pad(np.ones(smooth.shape, bool), ((1, 1), (channels, channels)))
    return jnp.where(inner, jnp.pad(smooth, ((1, 1), (channels, channels))), flat).reshape(image.shape)


def _equalize(image: Int[Array, "h w c"]) -> Int[Array, "h w c"]:
    height, width, channels = image.shape
    place = image + 256 * np.arange(channels, dtype=np.int32)[None, None]
    histogram = jnp.zeros(256 * channels, jnp.int32).at[place.reshape(-1)].add(1, mode="promise_in_bounds")
    histogram = histogram.reshape(channels, 256)
    last = jnp.take_along_axis(histogram, image.max((0, 1))[:, None], 1)
    step = (height * width - last) // 255
    below = jnp.cumsum(histogram, 1) - histogram
    table = jnp.clip((step // 2 + below) // jnp.maximum(step, 1), 0, 255)
    table = jnp.where(step > 0, table, np.arange(256, dtype=np.int32)[None])
    return table.reshape(-1).at[place].get(mode="promise_in_bounds")


def draw_window(
    draws: Float[Array, "22"],
    size: tuple[int, int],
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[Float[Array, "2"], Float[Array, "2"], Bool[Array, ""]]:
    """Of ten windows of random area (a share of the whole) and aspect ratio the first that fits: start, size, whether.

    Both are (height, width) in whole pixels; where none fits they are the first's, and wrong.
    """
    height, width = size
    area = height * width * (scale[0] + (scale[1] - scale[0]) * draws[:10])
    aspect = jnp.exp(np.log(ratio[0]) + np.log(ratio[1] / ratio[0]) * draws[10:20])
    sizes = jnp.rint(jnp.sqrt(jnp.stack([area / aspect, area * aspect], 1)))  # (10, 2): height, width
    whole = jnp.array([height, width], jnp.float32)
    fits = (sizes <= whole[None]).all(1) & (sizes > 0).all(1)
    window = sizes[jnp.argmax(fits)]
    return jnp.floor(draws[20:] * (whole - window + 1)), window, fits.any()


def erase(
    image: Float[Array, "h w c"],
    key: Key[Array, ""],
    *,
    p: float = 0.25,
    scale: tuple[float, float] = (0.02, 1 / 3),
    ratio: tuple[float, float] = (0.3, 1 / 0.3),
    fill: Literal["mean", "noise"] = "mean",
) -> Float[Array, "h w c"]:
    """With probability p a window, of random area (a share of the whole) and ratio, replaced; on normalised values.

    By 0, the mean of the data, or by normal noise, pixel by pixel (timm's const and pixel). Zhong et al. 2017, "Random
    erasing data augmentation".
    """
    where, noise = jax.random.split(key)
    draws = jax.random.uniform(where, (23,))
    start, size, fits = draw_window(draws[:22], (image.shape[0], image.shape[1]), scale, ratio)
    inside = _box(image.shape[0], image.shape[1], start, start + size) & fits & (draws[22] < p)
    other = jax.random.normal(noise, image.shape) if fill == "noise" else jnp.zeros_like(image)
    return jnp.where(inside, other, image)


def _box(height: int, width: int, start: Float[Array, "2"], stop: Float[Array, "2"]) -> Bool[Array, "h w 1"]:
    y, x = jnp.arange(height, dtype=jnp.float32)[:, None, None], jnp.arange(width, dtype=jnp.float32)[None, :, None]
    return (y >= start[0]) & (y < stop[0]) & (x >= start[1]) & (x < stop[1])


def beta(draw: Float[Array, ""], alpha: float) -> Float[Array, ""]:
    """The quantile of Beta(alpha, alpha) at `draw`, within 0..1, of 4096 that weigh the same."""
    from scipy.special import betaincinv  # slow to import

    # jax.random.beta compiles for four seconds, and rejects in a loop.
    n = 4096
    table = betaincinv(alpha, alpha, (np.arange(n) + 0.5) / n).astype(np.float32)
    return jnp.asarray(table)[jnp.minimum((draw * n).astype(jnp.int32), n - 1)]


def mixup(
    size: tuple[int, int], key: Key[Array, ""], *, alpha: float = 0.2, p: float = 1.0
) -> tuple[Float[Array, "h w 1"], Float[Array, ""]]:
    """The weight of a picture's own pixels beside its partner's, even all over, and that of its label.

    λ ~ Beta(alpha, alpha), with probability p; else 1. Zhang et al. 2018, "mixup: beyond empirical risk minimization".
    """
    draws = jax.random.uniform(key, (2,))
    own = jnp.where(draws[1] < p, beta(draws[0], alpha), 1.0)
    return jnp.full((*size, 1), own), own


def cutmix(
    size: tuple[int, int], key: Key[Array, ""], *, alpha: float = 1.0, p: float = 1.0
) -> tuple[Float[Array, "h w 1"], Float[Array, ""]]:
    """1 where a picture keeps its pixels, 0 in the box that its partner fills; and the share of those kept.

    The box has the picture's proportions, an area of 1 − λ with λ ~ Beta(alpha, alpha), and its middle anywhere; what
    lies outside is cut off, and the share counted after that. Yun et al. 2019, "CutMix", algorithm A1.
    """
    draws = jax.random.uniform(key, (4,))
    whole = np.array(size, np.float32)
    half = whole * jnp.sqrt(1 - beta(draws[0], alpha)) / 2
    middle = jnp.floor(whole * draws[1:3])
    start = jnp.clip(jnp.floor(middle - half), 0, whole)
    stop = jnp.clip(jnp.floor(middle + half), 0, whole)
    stop = jnp.where(draws[3] < p, stop, start)
    own = jnp.where(_box(size[0], size[1], start, stop), 0.0, 1.0)
    return own, 1 - (stop - start).prod() / whole.prod()
