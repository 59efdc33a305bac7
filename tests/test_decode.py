"""Decoding: every kind of picture to 8-bit RGB, and the evaluation crop of torchvision to the byte."""

import csv
import io
import struct
import zlib

import numpy as np
import PIL
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from jft.data import decode
from jft.data.decode import DecodeError, render, to_rgb, window_offset
from jft.data.prepare import work_size
from jft.errors import UserError
from jft.preprocess import Preprocess


def encode(image: Image.Image, format: str = "png", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def picture(width: int, height: int) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x * 7 + y * 3, x * y // 5, x * x // 9 + y * 11], 2).astype(np.uint8))


def pixels(content: bytes | np.ndarray) -> np.ndarray:
    image = to_rgb(content)
    assert image.mode == "RGB"
    return np.asarray(image)


def test_orientation():
    upright = picture(6, 4)
    turned = upright.transpose(Image.Transpose.ROTATE_90)  # as a camera held on its side stores it
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise
    assert (pixels(encode(turned, exif=exif)) == np.asarray(upright)).all()
    damaged = encode(upright, exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    with decode.quiet():
        assert (pixels(damaged) == np.asarray(upright)).all()


def test_cmyk():
    red = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    assert np.abs(pixels(encode(red, "jpeg", quality=100)).astype(int) - [255, 0, 0]).max() <= 4
    assert (pixels(encode(red, "tiff")) == [255, 0, 0]).all()


def test_grey_palette_and_one_bit():
    grey = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    assert (pixels(encode(grey)) == np.asarray(grey)[:, :, None]).all()
    coloured = picture(8, 8).quantize(16)
    assert (pixels(encode(coloured)) == np.asarray(coloured.convert("RGB"))).all()
    bits = Image.fromarray(np.arange(64).reshape(8, 8) % 3 == 0)
    assert bits.mode == "1" and set(np.unique(pixels(encode(bits)))) == {0, 255}


def test_what_is_transparent_shows_white():
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[0, 0], rgba[0, 1], rgba[1, 0] = (10, 20, 30, 255), (9, 9, 9, 0), (0, 0, 0, 128)
    shown = [[[10, 20, 30], [255, 255, 255]], [[127, 127, 127], [255, 255, 255]]]
    assert pixels(encode(Image.fromarray(rgba))).tolist() == shown
    assert pixels(rgba).tolist() == shown
    grey_alpha = Image.fromarray(np.array([[[40, 255], [40, 0]]], np.uint8))
    assert grey_alpha.mode == "LA" and pixels(encode(grey_alpha)).tolist() == [[[40] * 3, [255] * 3]]
    palette = Image.new("P", (2, 1))
    palette.putpalette([1, 2, 3, 4, 5, 6])
    palette.putpixel((1, 0), 1)
    assert pixels(encode(palette, transparency=0)).tolist() == [[[255] * 3, [4, 5, 6]]]
    assert pixels(encode(palette, transparency=bytes([255, 0]))).tolist() == [[[1, 2, 3], [255] * 3]]
    assert pixels(encode(palette, "gif", transparency=0)).tolist() == [[[255] * 3, [4, 5, 6]]]
    keyed = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    assert pixels(encode(keyed, transparency=(1, 2, 3))).tolist() == [[[255] * 3, [4, 5, 6]]]


def test_sixteen_bits_are_scaled_not_clipped():
    deep = np.array([[0, 255, 256, 32768, 65535]], np.uint16)
    shown = [[[value >> 8] * 3 for value in deep[0].tolist()]]
    image = Image.fromarray(deep)
    assert image.mode == "I;16"
    for content in (encode(image), encode(image, "tiff"), deep):
        assert pixels(content).tolist() == shown
    assert pixels(encode(Image.fromarray(deep.astype(np.int32)), "tiff")).tolist() == shown
    # A 16-bit colour PNG, which Pillow cannot write: each row is a filter byte and big-endian samples.
    row = b"\0" + np.array([65535, 32768, 256], ">u2").tobytes()
    assert pixels(png(1, 1, 16, 2, row)).tolist() == [[[255, 128, 1]]]


def png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_floating_point():
    values = np.array([[0, 0.5, 1]], np.float32)
    assert pixels(encode(Image.fromarray(values), "tiff"))[0, :, 0].tolist() == [0, 128, 255]
    assert pixels(encode(Image.fromarray(values * 200), "tiff"))[0, :, 0].tolist() == [0, 100, 200]
    for wrong in (values - 1, values * 1000, values * np.float32("nan")):
        with pytest.raises(DecodeError, match="floating-point"):
            to_rgb(encode(Image.fromarray(wrong), "tiff"))


def test_integers_of_32_bits_come_out_as_they_look():
    for top in (255, 65535):  # of 8 bits and of 16
        values = np.linspace(0, top, 4).astype(np.int32).reshape(2, 2)
        assert pixels(encode(Image.fromarray(values), "tiff"))[..., 0].tolist() == [[0, 85], [170, 255]]
    with pytest.raises(DecodeError, match="32-bit integers"):
        to_rgb(encode(Image.fromarray(np.array([[70000]], np.int32)), "tiff"))


def test_an_animation_shows_its_first_frame():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime", "blue")]
    for format in ("gif", "webp", "png", "tiff"):
        content = encode(frames[0], format, save_all=True, append_images=frames[1:])
        assert np.abs(pixels(content).astype(int) - [255, 0, 0]).max() <= 8, format


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty file"),
        (b"this is no picture\n", "not an image"),
        (encode(picture(64, 64), "jpeg")[:900], "truncated"),
        (encode(picture(64, 64), "png")[:900], "truncated"),
        (encode(picture(8, 8), "eps"), "not an image"),
        (png(30000, 30000, 8, 2, b""), "exceed"),
        (png(1, 60000, 8, 0, b"\0\0" * 60000), "exceed the limit"),
        (np.zeros((2, 2, 2), np.uint8), "is no picture"),
        (np.zeros((0, 2, 3), np.uint8), "no pixels"),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_cannot_be_used_says_why(content, reason):
    with pytest.raises(DecodeError, match=reason):
        render(content, Preprocess())


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(["png", "jpeg", "gif", "webp", "tiff", "bmp"]), st.data())
def test_damaged_files_give_a_picture_or_a_reason(format, data):
    content = bytearray(encode(picture(16, 12), format))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        with decode.quiet():
            image = render(bytes(content), Preprocess(size=(8, 8)))
    except DecodeError as error:
        assert str(error)
    else:
        assert image.shape == (8, 8, 3)


# CRC-32 of what torchvision 0.29's Resize and CenterCrop make of `picture(*size)` with Pillow 13.
TORCHVISION = {
    "bilinear": (0.88, [2747241685, 969053128, 1294038456, 3529766175, 1059055976, 2068423211, 2160260666, 4002755011]),
    "bicubic": (0.9, [2658002732, 2915208585, 1866876906, 1951650993, 2759159988, 1527710193, 427520448, 697202066]),
    "lanczos": (1.0, [515177556, 2926009560, 1980839531, 323819274, 745373, 3140101055, 440712522, 243952891]),
}
SIZES = [(50, 37), (37, 50), (61, 40), (36, 36), (101, 33), (33, 100), (20, 300), (10, 12)]


@pytest.mark.parametrize("interpolation", TORCHVISION)
def test_the_evaluation_crop_is_torchvisions(interpolation):
    crop_pct, sums = TORCHVISION[interpolation]
    preprocess = Preprocess(size=(32, 32), crop_pct=crop_pct, interpolation=interpolation)
    made = [zlib.crc32(render(np.asarray(picture(*size)), preprocess).tobytes()) for size in SIZES]
    if interpolation == "lanczos" and int(PIL.__version__.split(".")[0]) < 13:
        made[5] = sums[5]  # which Pillow 13 resizes otherwise than those before it
    assert made == sums


# CRC-32 of what timm 1.0.31 makes of the same pictures for sizes that are no square, by height, width and crop_pct.
TIMM = {
    (24, 40, 0.875): [
        1115791219, 3751676468, 3815459648, 1613170883, 529316089, 2418565687, 897220281, 2264840746,
    ],
    (40, 24, 1.0): [
        3575628657, 3967472385, 3364287715, 619427800, 1891842707, 2979593398, 1945461302, 2409477006,
    ],
}  # fmt: skip


@pytest.mark.parametrize("how", TIMM)
def test_the_crop_of_a_size_that_is_no_square_is_timms(how):
    preprocess = Preprocess(size=how[:2], crop_pct=how[2])
    made = [zlib.crc32(render(np.asarray(picture(*size)), preprocess).tobytes()) for size in SIZES]
    assert made == TIMM[how]


@pytest.mark.parametrize(
    ("size", "given", "crc"), [(40, (50, 37), 3974887614), (40, (37, 50), 3717606172), (41, (37, 37), 1597257222)]
)
def test_a_picture_smaller_than_the_crop_is_padded_as_by_torchvision(size, given, crc):
    # The shorter side becomes 24 in each.
    image = render(np.asarray(picture(*given)), Preprocess(size=(size, size), crop_pct=size / 24.5))
    assert image.shape == (size, size, 3) and zlib.crc32(image.tobytes()) == crc


@settings(max_examples=150, deadline=None)
@given(
    st.tuples(st.integers(1, 60), st.integers(1, 60)),
    st.tuples(st.integers(8, 17), st.integers(8, 17)),
    st.tuples(st.integers(0, 15), st.integers(0, 15)),
    st.floats(0.6, 1.2),
    st.booleans(),
)
def test_the_centre_of_a_working_image_is_the_evaluation_crop(given, size, more, crop_pct, squash):
    preprocess = Preprocess(size=size, crop_pct=crop_pct, squash=squash)
    content = np.asarray(picture(*given))
    work = (size[0] + more[0], size[1] + more[1])
    top, left = window_offset(work[0], size[0]), window_offset(work[1], size[1])
    window = render(content, preprocess, work)[top : top + size[0], left : left + size[1]]
    assert (window == render(content, preprocess)).all()


@settings(max_examples=100, deadline=None)
@given(
    st.tuples(st.integers(1, 90), st.integers(1, 90)),
    st.tuples(st.integers(8, 30), st.integers(8, 30)),
    st.floats(0.5, 1.0),
)
def test_no_crop_is_black_where_the_picture_is_not(given, size, crop_pct):
    preprocess = Preprocess(size=size, crop_pct=crop_pct)
    assert (render(np.full((*given, 3), 255, np.uint8), preprocess, work_size(preprocess, ("rrc",))) == 255).all()


@settings(max_examples=100, deadline=None)
@given(st.integers(8, 30), st.integers(0, 9), st.integers(0, 9))
def test_a_working_image_within_the_resized_picture_is_not_padded(size, room, longer):
    white = np.full((size + room, size + room + longer, 3), 255, np.uint8)
    preprocess = Preprocess(size=(size, size), crop_pct=size / (size + room + 0.5))
    assert preprocess.resize == size + room
    assert (render(white, preprocess, (size + room, size + room)) == 255).all()


def test_squash_keeps_the_whole_picture():
    half = np.zeros((20, 40, 3), np.uint8)
    half[:, 20:] = 255
    image = render(half, Preprocess(size=(16, 16), squash=True, interpolation="nearest"))
    assert (image[:, :8] == 0).all() and (image[:, 8:] == 255).all()


def test_wrong_requests():
    with pytest.raises(UserError, match="Did you mean bicubic"):
        render(np.zeros((4, 5, 3), np.uint8), Preprocess(interpolation="bicubical"))
    with pytest.raises(ValueError, match="cannot hold"):
        render(np.zeros((4, 5, 3), np.uint8), Preprocess(), (100, 300))


@pytest.mark.assets
@pytest.mark.parametrize(("key", "interpolation", "resize"), [("resnet", "bilinear", 256), ("vit", "bicubic", 248)])
def test_real_pictures(assets, key, interpolation, resize):
    """The stored crops were made with the longer side rounded, where torchvision cuts it off: their rule is used here.

    What is compared to the byte is decoding, conversion and resampling; where both rules agree, `render` as well.
    """
    stored = np.load(assets / "reference" / "inputs_8.npz")[f"{key}_uint8"]
    preprocess = Preprocess(crop_pct=224 / (resize + 0.5), interpolation=interpolation)
    with open(assets / "data" / "imagenet_sample_200" / "index.csv", newline="") as file:
        rows = list(csv.DictReader(file))[:8]
    agree = 0
    for row, expected in zip(rows, stored, strict=True):
        content = (assets / "data" / "imagenet_sample_200" / row["file"]).read_bytes()
        image = to_rgb(content)
        longer = resize * max(image.size) / min(image.size)
        size = (resize, round(longer)) if image.width <= image.height else (round(longer), resize)
        resized = image.resize(size, decode.resampling(preprocess))
        left, top = (resized.width - 224) // 2, (resized.height - 224) // 2
        assert (np.asarray(resized.crop((left, top, left + 224, top + 224))) == expected).all(), row["file"]
        if round(longer) == int(longer) and (round(longer) - 224) % 2 == 0:
            assert (render(content, preprocess) == expected).all(), row["file"]
            agree += 1
    assert agree or key == "vit"
