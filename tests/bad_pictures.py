"""A folder of about a hundred kinds of files that are no usable pictures, beside good ones and odd but good ones."""

import base64
import gzip
import io
import os
import socket
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


def picture(seed: int = 0, mode: str = "RGB", size: tuple[int, int] = (40, 36)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encoded(format: str, image: Image.Image | None = None, **options) -> bytes:
    file = io.BytesIO()
    (image or picture()).save(file, format=format, **options)
    return file.getvalue()


def chunk(name: bytes, content: bytes, crc: int | None = None) -> bytes:
    sum_ = zlib.crc32(name + content) if crc is None else crc
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", sum_)


PNG = b"\x89PNG\r\n\x1a\n"


def png(
    width: int,
    height: int,
    depth: int = 8,
    kind: int = 0,
    pixels: bytes | None = None,
    more: bytes = b"",
    interlace: int = 0,
) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, interlace)
    return (
        PNG
        + chunk(b"IHDR", header)
        + more
        + chunk(b"IDAT", zlib.compress(bytes(64)) if pixels is None else pixels)
        + chunk(b"IEND", b"")
    )


def patched(content: bytes, at: int, new: bytes) -> bytes:
    return content[:at] + new + content[at + len(new) :]


def bmp(width: int, height: int, bits: int = 24, compression: int = 0) -> bytes:
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54 + 64, 0, 0, 54) + header + bytes(64)


def tiff(entries: list[tuple[int, int, int, int]], following: int = 0) -> bytes:
    """Entries are tag, type, count, value."""
    body = b"".join(struct.pack("<HHII", *entry) for entry in sorted(entries))
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + body + struct.pack("<I", following) + bytes(64)


def grey_tiff(width: int, height: int, compression: int = 1, offset: int = 8, depth: int = 8) -> bytes:
    tags = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, depth), (259, 3, 1, compression), (262, 3, 1, 1),
            (273, 4, 1, offset), (277, 3, 1, 1), (278, 4, 1, height), (279, 4, 1, width * height % 2**32)]  # fmt: skip
    return tiff(tags)


def jpeg_with(sof: int = 0xC0, height: int = 36, width: int = 40, components: int = 3) -> bytes:
    good = encoded("JPEG")
    at = good.index(b"\xff\xc0")
    return (
        good[:at]
        + bytes([0xFF, sof])
        + good[at + 2 : at + 5]
        + struct.pack(">HHB", height, width, components)
        + good[at + 10 :]
    )


def floats(values: list[float], mode: str) -> bytes:
    return encoded(
        "TIFF", Image.fromarray(np.resize(np.array(values, np.float32 if mode == "F" else np.int32), (8, 8)))
    )


def archive() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as made:
        made.writestr("x.jpg", encoded("JPEG"))
    return file.getvalue()


def webp_canvas(width: int, height: int) -> bytes:
    size = lambda n: (n - 1).to_bytes(3, "little")  # noqa: E731
    body = b"VP8X" + struct.pack("<I", 10) + bytes(4) + size(width) + size(height)
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


def icon(inner: bytes, count: int = 1) -> bytes:
    entry = struct.pack("<BBBBHHII", 0, 0, 0, 0, 1, 32, len(inner), 22)
    return struct.pack("<HHH", 0, 1, count) + entry * min(count, 1) + inner


def bad() -> dict[str, bytes]:
    """File name and content of everything that no training should see."""
    jpeg, whole = encoded("JPEG"), {f: encoded(f) for f in ("PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "TGA", "ICO")}
    noise = np.random.default_rng(1).bytes(4096)
    made = {
        # cut
        "cut/jpeg_half.jpg": jpeg[: len(jpeg) // 2],
        "cut/jpeg_almost_whole.jpg": jpeg[: len(jpeg) - 40],
        "cut/jpeg_in_header.jpg": jpeg[:100],
        "cut/jpeg_three_bytes.jpg": jpeg[:3],
        "cut/progressive.jpg": (p := encoded("JPEG", progressive=True))[: len(p) // 2],
        "cut/png_half.png": whole["PNG"][: len(whole["PNG"]) // 2],
        "cut/png_signature.png": PNG,
        "cut/png_in_header.png": whole["PNG"][:20],
        "cut/gif.gif": whole["GIF"][: len(whole["GIF"]) // 2],
        "cut/gif_header.gif": whole["GIF"][:10],
        "cut/webp.webp": whole["WEBP"][: len(whole["WEBP"]) // 2],
        "cut/webp_header.webp": whole["WEBP"][:16],
        "cut/bmp.bmp": whole["BMP"][: len(whole["BMP"]) // 2],
        "cut/bmp_header.bmp": whole["BMP"][:30],
        "cut/tiff.tif": whole["TIFF"][: len(whole["TIFF"]) // 2],
        "cut/tiff_header.tif": whole["TIFF"][:8],
        "cut/ppm.ppm": whole["PPM"][: len(whole["PPM"]) // 2],
        "cut/tga.tga": whole["TGA"][: len(whole["TGA"]) // 2],
        "cut/ico.ico": whole["ICO"][: len(whole["ICO"]) // 2],
        "cut/download.jpg.jpg": jpeg[:4096][:512],
        # other things under a picture's name
        "else/empty.jpg": b"",
        "else/one_byte.png": b"\x89",
        "else/spaces.jpg": b" " * 100,
        "else/zeros.jpg": bytes(4096),
        "else/ones.jpg": b"\xff" * 4096,
        "else/noise.jpg": noise,
        "else/text.jpg": b"no picture, but text",
        "else/utf16.jpg": "text".encode("utf-16"),
        "else/page.jpg": b"<!DOCTYPE html><html><title>404 Not Found</title></html>",
        "else/json.jpg": b'{"error": "rate limit"}',
        "else/drawing.png": b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>',
        "else/paper.jpg": b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj\n",
        "else/zip.jpg": archive(),
        "else/gzip.jpg": gzip.compress(jpeg, mtime=0),
        "else/tar.jpg": bytes(257) + b"ustar\x0000" + bytes(300),
        "else/film.jpg": b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom" + noise,
        "else/heic.jpg": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + noise,
        "else/song.jpg": b"ID3\x04\0\0\0\0\0\0" + noise,
        "else/wave.jpg": b"RIFF\x24\0\0\0WAVEfmt " + noise,
        "else/program.jpg": b"MZ\x90\0" + noise,
        "else/elf.jpg": b"\x7fELF\x02\x01\x01" + noise,
        "else/script.jpg": b"#!/bin/sh\ntouch /tmp/executed\n",
        "else/pickle.jpg": b"cos\nsystem\n(S'touch /tmp/executed'\ntR.",
        "else/database.jpg": b"SQLite format 3\0" + noise,
        "else/pointer.jpg": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "else/base64.jpg": base64.b64encode(jpeg),
        "else/dataurl.png": b"data:image/png;base64," + base64.b64encode(whole["PNG"]),
        "else/postscript.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n(x) run\n",
        "else/postscript.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n(x) run\n",
        "else/metafile.wmf": b"\xd7\xcd\xc6\x9a" + bytes(60),
        "else/hdf.jpg": b"\x89HDF\r\n\x1a\n" + noise,
        "else/scan.jpg": bytes(128) + b"DICM" + noise,
        "else/array.png": b"\x93NUMPY\x01\0v\0{'descr': '|u1', 'fortran_order': False, 'shape': (8,), }\n" + bytes(8),
        "else/notes.txt": b"left over",
        "else/labels.csv": b"path,label\n",
        # damaged
        "damaged/jpeg_no_size.jpg": jpeg_with(height=0, width=0),
        "damaged/jpeg_lossless.jpg": jpeg_with(sof=0xC3),
        "damaged/jpeg_arithmetic.jpg": jpeg_with(sof=0xCB),
        "damaged/jpeg_five_components.jpg": jpeg_with(components=5),
        "damaged/jpeg_no_scan.jpg": jpeg[: jpeg.index(b"\xff\xda")] + b"\xff\xd9",
        "damaged/jpeg_no_tables.jpg": jpeg[:2] + jpeg[jpeg.index(b"\xff\xc0") :],
        "damaged/jpeg_marker_too_long.jpg": patched(jpeg, 4, b"\xff\xff"),
        "damaged/png_header_sum.png": patched(whole["PNG"], 29, b"\0\0\0\0"),
        "damaged/png_no_width.png": png(0, 8),
        "damaged/png_kind_seven.png": png(8, 8, kind=7),
        "damaged/png_depth_three.png": png(8, 8, depth=3),
        "damaged/png_bad_stream.png": png(8, 8, pixels=b"no zlib stream at all"),
        "damaged/png_short_stream.png": png(200, 200),
        "damaged/png_no_pixels.png": png(8, 8)[:33] + chunk(b"IEND", b""),
        "damaged/png_unknown_chunk.png": png(8, 8, more=b"\0\0\0\x04\x01\x02\x03\x04abcd\0\0\0\0"),
        "damaged/png_chunk_beyond_the_end.png": png(8, 8, more=b"\x7f\xff\xff\xffIDAT"),
        "damaged/gif_no_frames.gif": b"GIF89a\x10\0\x10\0\0\0\0;",
        "damaged/webp_bad_frame.webp": patched(whole["WEBP"], 20, b"\xff" * 20),
        "damaged/webp_no_frame.webp": webp_canvas(16, 16),
        "damaged/bmp_seven_bits.bmp": bmp(8, 8, bits=7),
        "damaged/bmp_compression.bmp": bmp(8, 8, compression=99),
        "damaged/bmp_pixels_missing.bmp": bmp(100, 100),
        "damaged/tiff_no_tags.tif": tiff([]),
        "damaged/tiff_compression.tif": grey_tiff(8, 8, compression=60000),
        "damaged/tiff_strip_beyond_the_end.tif": grey_tiff(8, 8, offset=2**31),
        "damaged/tiff_depth.tif": grey_tiff(8, 8, depth=13),
        "damaged/tiff_circle.tif": tiff([(256, 4, 1, 8)], following=8),
        "damaged/ppm_negative.ppm": b"P6 -4 -4 255\n" + bytes(48),
        "damaged/ppm_words.ppm": b"P6 four four 255\n" + bytes(48),
        "damaged/ico_without_pictures.ico": icon(b"", 0),
        "damaged/ico_of_noise.ico": icon(noise[:200]),
        "damaged/xpm.xpm": b"/* XPM */\nstatic char *x[] = {\n\"9 9 2 1\",\n",
        "damaged/xbm.xbm": b"#define x_width 99999\n#define x_height 9\nstatic char x_bits[] = {\n",
        "damaged/jp2.jp2": b"\0\0\0\x0cjP  \r\n\x87\n" + noise,
        "damaged/j2k.j2k": b"\xff\x4f\xff\x51" + noise,
        "damaged/psd.psd": b"8BPS\0\x01" + bytes(6) + struct.pack(">HIIHH", 3, 8, 8, 8, 3) + noise[:4],
        "damaged/dds.dds": b"DDS " + struct.pack("<I", 124) + bytes(20),
        "damaged/avif.avif": b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf" + noise,
        "damaged/qoi.qoi": b"qoif" + struct.pack(">IIBB", 8, 8, 3, 0),
        # too large for their bytes
        "bomb/png_square.png": png(60_000, 60_000),
        "bomb/png_line.png": png(2**31 - 1, 1),
        "bomb/png_text.png": png(8, 8, more=chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 26), 9))),
        "bomb/png_tall_when_resized.png": png(1, 5_000_000, pixels=zlib.compress(bytes(2 * 5_000_000))),
        "bomb/gif.gif": b"GIF89a" + struct.pack("<HH", 65535, 65535) + b"\0\0\0,"
        + struct.pack("<HHHH", 0, 0, 65535, 65535) + b"\0\x08\0;",
        "bomb/bmp.bmp": bmp(30_000, 30_000),
        "bomb/tiff.tif": grey_tiff(100_000, 100_000),
        "bomb/ppm.ppm": b"P6 99999 99999 255\n" + bytes(48),
        "bomb/webp.webp": webp_canvas(16_384, 16_384),
        "bomb/jpeg.jpg": jpeg_with(height=65_500, width=65_500),
        "bomb/ico.ico": icon(png(30_000, 30_000, kind=6)),
        "bomb/xbm.xbm": b"#define x_width 99999\n#define x_height 99999\nstatic char x_bits[] = {\n0};",
        # beyond what 8 bits can show
        "numbers/not_a_number.tif": floats([0.5, float("nan")], "F"),
        "numbers/infinite.tif": floats([0.5, float("inf")], "F"),
        "numbers/negative.tif": floats([0.5, -3.0], "F"),
        "numbers/thousands.tif": floats([0.5, 5000.0], "F"),
        "numbers/integers.tif": floats([-7, 100_000], "I"),
    }  # fmt: skip
    return made


def odd_but_good() -> dict[str, bytes]:
    """What is a picture, though not as one expects it: used, whatever its name says."""
    turned = Image.Exif()
    turned[274] = 6
    deep = Image.fromarray(np.arange(1600, dtype=np.uint16).reshape(40, 40) * 40)
    frames = [picture(i, "P") for i in range(3)]
    return {
        "png_named.jpg": encoded("PNG", picture(1)),
        "jpeg_named.png": encoded("JPEG", picture(2)),
        "gif_named.jpeg": encoded("GIF", picture(3)),
        "webp_named.jpg": encoded("WEBP", picture(4)),
        "no_ending": encoded("PNG", picture(5)),
        "CAPITALS.JPG": encoded("JPEG", picture(6)),
        "cmyk.jpg": encoded("JPEG", picture(7, "CMYK")),
        "grey.jpg": encoded("JPEG", picture(8, "L")),
        "one_bit.png": encoded("PNG", picture(9, "1")),
        "palette.png": encoded("PNG", picture(10, "P")),
        "transparent.png": encoded("PNG", picture(11, "RGBA")),
        "sixteen_bits.png": encoded("PNG", deep),
        "turned.jpg": encoded("JPEG", picture(12), exif=turned),
        "animated.gif": encoded("GIF", frames[0], save_all=True, append_images=frames[1:]),
        "progressive.jpg": encoded("JPEG", picture(13), progressive=True),
        "with_more_after_it.jpg": encoded("JPEG", picture(14)) + b"PK\x03\x04 and a payload",
        "float.tif": floats([0.25, 0.5, 1.0], "F"),
        "bad exif.jpg": encoded("JPEG", picture(15), exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + bytes(20)),
    }


def make(root: Path, good: int = 12) -> tuple[dict[str, str], list[str]]:
    """Class folders `ants` and `bees` in `root`; returns the bad names (shown as jft does) and the good ones.

    The value of a bad name is a word that its reason has.
    """
    named: dict[str, str] = {}
    fine: list[str] = []
    for label, c in enumerate(("ants", "bees")):
        (root / c).mkdir(parents=True)
        for i in range(good):
            picture(100 + 50 * label + i).save(root / c / f"{i}.png")
            fine.append(f"{c}/{i}.png")
    for number, (name, content) in enumerate(bad().items()):
        place = Path(("ants", "bees")[number % 2]) / name
        (root / place.parent).mkdir(exist_ok=True)
        (root / place).write_bytes(content)
        named[place.as_posix()] = ""
    for number, (name, content) in enumerate(odd_but_good().items()):
        place = Path(("bees", "ants")[number % 2]) / name
        (root / place).write_bytes(content)
        fine.append(place.as_posix())
    # names that want to be more than names, of files that are no pictures
    for name, shown in {
        "\x1b[2J\x1b[31m.jpg": "\\x1b[2J\\x1b[31m.jpg",
        "a\nleft out: b.jpg": "a\\nleft out: b.jpg",
        "<script>alert(1)<script>.jpg": "<script>alert(1)<script>.jpg",
        "=cmd|' C'!A0.jpg": "=cmd|' C'!A0.jpg",
        "$(touch executed).jpg": "$(touch executed).jpg",
        "\u202egpj.exe.jpg": "\\u202egpj.exe.jpg",
        f"{'long' * 60}.jpg": f"{'long' * 60}.jpg",
    }.items():
        (root / "ants" / name).write_bytes(b"")
        named[f"ants/{shown}"] = "empty"
    with open(os.fsencode(root / "ants") + b"/\xff\xfe.jpg", "wb"):
        named["ants/\\xff\\xfe.jpg"] = "empty"
    # what is no file at all
    (root / "ants" / "nowhere.jpg").symlink_to("gone.jpg")
    (root / "ants" / "circle.jpg").symlink_to("circle.jpg")
    os.mkfifo(root / "ants" / "pipe.jpg")
    with open(root / "bees" / "hole.jpg", "wb") as file:
        file.truncate(1 << 40)
    named |= {
        "ants/nowhere.jpg": "nowhere",
        "ants/circle.jpg": "circle",
        "ants/pipe.jpg": "pipe",
        "bees/hole.jpg": "limit",
    }
    here = os.getcwd()
    with socket.socket(socket.AF_UNIX) as made:
        os.chdir(root / "bees")  # the path of a socket is short
        try:
            made.bind("socket.jpg")
        finally:
            os.chdir(here)
    named["bees/socket.jpg"] = "socket"
    (root / "ants" / "again").symlink_to(root / "ants")
    return named, fine
