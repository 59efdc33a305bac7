"""From an encoded picture, or an array of pixels, to the uint8 RGB picture that a model is shown."""

import contextlib
import functools
import io
import re
import warnings
from collections.abc import Iterator

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from jft.errors import UserError, near, printable
from jft.preprocess import INTERPOLATIONS as NAMES
from jft.preprocess import Preprocess

VERSION = 2  # part of every cache key: raise it whenever the same file may come out as other bytes

INTERPOLATIONS = {name: Image.Resampling[name.upper()] for name in NAMES}

# EPS is a program that Pillow hands to Ghostscript; the others are stubs that recognise a file and cannot read it.
REFUSED_FORMATS = {"EPS", "BUFR", "GRIB", "HDF5", "MPEG", "WMF"}


# What passes for a picture by its name and is none, by its first bytes.
FOREIGN = {
    b"\x89PNG": "a PNG whose beginning is damaged",
    b"\xff\xd8\xff": "a JPEG whose beginning is damaged",
    b"GIF8": "a GIF whose beginning is damaged",
    b"II*\0": "a TIFF that is damaged, or of a kind that Pillow does not read",
    b"MM\0*": "a TIFF that is damaged, or of a kind that Pillow does not read",
    b"BM": "a BMP whose beginning is damaged",
    b"%PDF": "a PDF",
    b"%!PS": "PostScript, which is a program",
    b"PK\3\4": "a zip archive",
    b"\x1f\x8b": "a gzip archive",
    b"version https://git-lfs": "a Git LFS pointer; run `git lfs pull` where it was cloned",
    b"<": "a web page, or other markup",
    b"{": "JSON, or other text",
}
HEIF = (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftypmsf1", b"ftypheim", b"ftypheis", b"ftyphevc")


class DecodeError(ValueError):
    """Why this picture cannot be used, in a few words."""


@functools.cache
def formats() -> tuple[str, ...]:
    """The formats accepted, by Pillow's names: all it reads but those in REFUSED_FORMATS."""
    Image.init()
    return tuple(name for name in Image.OPEN if name not in REFUSED_FORMATS)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep Pillow's warnings about odd files off the screen: what makes a picture unusable is an error of ours.

    Not safe to enter from several threads at once (Python's warning filters are shared): enter it around them.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
        warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
        yield


def to_rgb(picture: bytes | np.ndarray | Image.Image) -> Image.Image:
    """Any picture (a file's bytes, pixels, or Pillow's) as 8-bit RGB, upright. Raises DecodeError.

    Turned by its EXIF orientation; the first frame of an animation; 16-bit scaled to 8; what is transparent shows
    white, as on a page: dropping the alpha channel would show whatever colours were left below it.
    """
    if isinstance(picture, np.ndarray):
        return _from_pixels(picture)
    try:
        if isinstance(picture, Image.Image):
            return _convert(_upright(picture))
        if not picture:
            raise DecodeError("empty file")
        with Image.open(io.BytesIO(picture), formats=formats()) as image:
            _check_pixels(image.width, image.height)
            image.load()
            return _convert(_upright(image))
    except (DecodeError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise DecodeError(_foreign(picture)) from None  # type: ignore[arg-type]
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DecodeError(
            f"more pixels than the limit of {Image.MAX_IMAGE_PIXELS}, which they exceed by far: a decompression bomb?"
        ) from None
    except Exception as error:  # Pillow raises nearly every kind on a damaged file
        raise DecodeError(_reason(error)) from None


def _foreign(content: bytes) -> str:
    """What a file is that is no picture to Pillow."""
    if not content.strip(b"\0"):
        return "not an image: zero bytes alone"
    if content[4:12] in HEIF:
        return "not an image that Pillow reads: HEIC. Convert it to JPEG or PNG"
    kind = next((kind for start, kind in FOREIGN.items() if content.lstrip()[: len(start)] == start), None)
    return f"not an image: {kind}" if kind else "not an image in a format that Pillow reads"


def _reason(error: Exception) -> str:
    """What Pillow said, on one line, without the addresses of its objects."""
    said = re.sub(r"<_io\.BytesIO[^>]*>", "it", str(error)) or type(error).__name__
    return printable(" ".join(said.split()))[:200]


def render(
    picture: bytes | np.ndarray, preprocess: Preprocess, work_size: tuple[int, int] | None = None
) -> UInt8[np.ndarray, "h w 3"]:
    """The working image: the resized picture around its evaluation crop, `work_size` (height, width) pixels.

    Its centre window (`window_offset`) is, to the byte, the evaluation crop of torchvision's pipeline (Resize of the
    shorter side, CenterCrop; of a crop that is no square timm's, see `Preprocess`), whatever the working size;
    `work_size=None` gives that crop alone. What lies outside the picture is black. Raises DecodeError.

    >>> render(open("cat.jpg", "rb").read(), Preprocess()).shape
    (224, 224, 3)
    """
    height, width = preprocess.size
    work_height, work_width = work_size or preprocess.size
    if work_height < height or work_width < width:
        raise ValueError(f"a working image of {work_size} cannot hold the evaluation crop of {preprocess.size}")
    image = to_rgb(picture)
    try:
        image = _resize(image, preprocess)
    except (DecodeError, MemoryError, UserError):
        raise
    except Exception as error:
        raise DecodeError(_reason(error)) from None
    top = _crop_start(image.height, height) - window_offset(work_height, height)
    left = _crop_start(image.width, width) - window_offset(work_width, width)
    return np.asarray(image.crop((left, top, left + work_width, top + work_height)))


def window_offset(work: int, size: int) -> int:
    """Where the evaluation crop of `size` pixels begins in a working image of `work` pixels.

    Rounded as torchvision rounds a centre crop, so that a working image no larger than the resized picture needs no
    padding, whether their difference is odd or even.
    """
    return round((work - size) / 2)


def resampling(preprocess: Preprocess) -> Image.Resampling:
    """Pillow's filter for the preprocessing's interpolation. Raises UserError for an unknown one."""
    try:
        return INTERPOLATIONS[preprocess.interpolation]
    except KeyError:
        raise UserError(
            f"There is no interpolation {preprocess.interpolation!r}."
            f"{near(preprocess.interpolation, INTERPOLATIONS)} Known: {', '.join(INTERPOLATIONS)}."
        ) from None


def _crop_start(length: int, crop: int) -> int:
    # torchvision pads what is smaller by the floor of half the difference, and rounds half to even when cutting.
    return round((length - crop) / 2) if length >= crop else -((crop - length) // 2)


def resized(size: tuple[int, int], preprocess: Preprocess) -> tuple[int, int]:
    """Width and height that a picture of these is resized to, before its centre is cut out. Raises DecodeError."""
    width, height = size
    if preprocess.squash:
        return preprocess.size[1], preprocess.size[0]
    high, wide = preprocess.sides
    if preprocess.size[0] != preprocess.size[1]:
        scale = max(high / height, wide / width)
        size = (round(scale * width), round(scale * height))
    elif width <= height:
        size = (wide, int(wide * height / width))
    else:
        size = (int(high * width / height), high)
    _check_pixels(*size, f" (what {width} x {height} are resized to)")
    return size


def _resize(image: Image.Image, preprocess: Preprocess) -> Image.Image:
    size = resized(image.size, preprocess)
    return image if size == image.size else image.resize(size, resampling(preprocess))


def _check_pixels(width: int, height: int, why: str = "") -> None:
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise DecodeError(f"{width} x {height} pixels{why} exceed the limit of {limit}")


def _upright(image: Image.Image) -> Image.Image:
    try:
        if image.getexif().get(ExifTags.Base.Orientation, 1) == 1:
            return image
        turned = ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF says nothing about the pixels
        return image
    return turned if turned is not None else image


def _convert(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode.startswith("I;16"):
        return _from_pixels(np.asarray(image).astype(np.uint16))
    if image.mode == "I":
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise DecodeError("32-bit integers beyond 0..65535: save it with 8 or 16 bits")
        return _from_pixels(values.astype(np.uint8 if values.max() <= 255 else np.uint16))
    if image.mode == "F":
        values = np.asarray(image)
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 255):
            raise DecodeError("floating-point pixels beyond 0..1 and 0..255: save it with 8 or 16 bits")
        return _from_pixels(np.rint(values * (255 if values.max() <= 1 else 1)).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("LA") if image.mode == "La" else image
        image = image.convert("RGBA")
        page = Image.new("RGBA", image.size, (255, 255, 255, 255))
        page.alpha_composite(image)
        image = page
    return image.convert("RGB")


def _from_pixels(pixels: np.ndarray) -> Image.Image:
    """[h, w], [h, w, 1 | 3 | 4] of uint8, or of uint16 whose high byte is taken as Pillow does for 16-bit RGB."""
    if pixels.dtype == np.uint16:
        pixels = (pixels >> 8).astype(np.uint8)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] not in (3, 4)):
        raise DecodeError(f"an array {pixels.dtype} {list(pixels.shape)} is no picture: expected uint8 [h, w, 3]")
    if pixels.size == 0:
        raise DecodeError("no pixels")
    return _convert(Image.fromarray(np.ascontiguousarray(pixels)))
