"""A picture sheet of what a check of the data found: thumbnails under headings, drawn by Pillow."""

import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from jft.data.check import KINDS, LEFT_OUT, SUSPICIOUS, Finding, Report
from jft.data.decode import DecodeError, quiet, to_rgb
from jft.data.sources import Splits
from jft.files import writing

COLUMNS, TILE, GAP, MARGIN, CAPTION = 6, 184, 16, 32, 50
PER_KIND = 36
UNSEEN = 12  # of those that cannot be shown
MAX_NAMES = 6  # of pictures that are alike
INK, FAINT, LINE, PAPER, CARD, RED = "#1c1f24", "#6b7280", "#d5d9e0", "#f4f5f7", "#ffffff", "#b42318"


def draw(report: Report, splits: Splits) -> Image.Image:
    """The suspicious pictures and those that cannot be used, by kind, pictures that are alike side by side."""
    places = {name: (data, i) for data in splits.sets().values() for i, name in enumerate(data.names)}
    rows = list(_rows(report))
    width = 2 * MARGIN + COLUMNS * TILE + (COLUMNS - 1) * GAP
    height = 2 * MARGIN + 64 + sum(_height(row) for row in rows)
    sheet = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN, MARGIN), _fit(pen, report.data, _font(24), width - 2 * MARGIN), INK, _font(24))
    found = sum(len(f.names) for f in report.of(LEFT_OUT, SUSPICIOUS))
    told = f"{report.images} entries, {found} shown or counted here" if rows else "Nothing that looks wrong."
    pen.text((MARGIN, MARGIN + 34), told, FAINT, _font(14))
    y = MARGIN + 64
    with quiet():
        for row in rows:
            if isinstance(row, str):
                pen.text((MARGIN, y + 18), _fit(pen, row, _font(18), width - 2 * MARGIN), INK, _font(18))
            else:
                for column, (name, detail, first) in enumerate(row):
                    x = MARGIN + column * (TILE + GAP)
                    _tile(sheet, pen, (x, y), name, detail, _picture(places, name), first)
            y += _height(row)
    return sheet


Tile = tuple[str, str, bool]


def _rows(report: Report) -> Iterator[str | list[Tile]]:
    """Headings, and rows of up to COLUMNS tiles; a group of pictures that are alike is not broken over kinds."""
    for kind, (level, heading) in KINDS.items():
        findings = [f for f in report.findings if f.kind == kind]
        if level not in (LEFT_OUT, SUSPICIOUS) or not findings:
            continue
        yield f"{heading} ({len(findings)})"
        grouped = any(len(f.names) > 1 for f in findings)
        count = PER_KIND // 3 if grouped else UNSEEN if level == LEFT_OUT else PER_KIND
        shown, rest = findings[:count], len(findings) - count
        if grouped:
            for finding in shown:
                yield _group(finding)
        else:
            tiles = [(f.names[0], f.detail, False) for f in shown if f.names]
            for begin in range(0, len(tiles), COLUMNS):
                yield tiles[begin : begin + COLUMNS]
        if rest > 0:
            yield f"… and {rest} more, in report.txt"


def _group(finding: Finding) -> list[Tile]:
    names = finding.names[:MAX_NAMES]
    more = f" (+{len(finding.names) - MAX_NAMES})" if len(finding.names) > MAX_NAMES else ""
    return [(name, finding.detail + more if i == 0 else "", i == 0) for i, name in enumerate(names)]


def _height(row: str | Sequence[Tile]) -> int:
    return 52 if isinstance(row, str) else TILE + CAPTION + GAP


def _picture(places: dict, name: str) -> Image.Image | None:
    if name not in places:
        return None
    dataset, i = places[name]
    try:
        image = to_rgb(dataset.read(i))
    except (DecodeError, OSError):
        return None
    image.thumbnail((TILE - 2, TILE - 2), Image.Resampling.LANCZOS)
    return image


def _tile(
    sheet: Image.Image, pen: ImageDraw.ImageDraw, at: tuple[int, int], name: str, detail: str,
    image: Image.Image | None, first: bool,
) -> None:  # fmt: skip
    x, y = at
    pen.rectangle((x, y, x + TILE - 1, y + TILE - 1), CARD, INK if first else LINE, 2 if first else 1)
    if image is None:
        for line, words in enumerate(textwrap.wrap(detail, 24)[:10]):
            pen.text((x + 12, y + 12 + 17 * line), _fit(pen, words, _font(13), TILE - 24), RED, _font(13))
    else:
        sheet.paste(image, (x + (TILE - image.width) // 2, y + (TILE - image.height) // 2))
        pen.rectangle((x, y, x + TILE - 1, y + TILE - 1), None, INK if first else LINE, 2 if first else 1)
    folder, _, file = name.rpartition("/")
    captions = [(file, INK), (folder, FAINT)] + ([(detail, FAINT)] if image is not None else [])
    for line, (words, colour) in enumerate(captions):
        pen.text((x, y + TILE + 3 + 15 * line), _fit(pen, words, _font(12), TILE), colour, _font(12))


_fonts: dict[int, ImageFont.FreeTypeFont | ImageFont.ImageFont] = {}


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    if size not in _fonts:
        _fonts[size] = ImageFont.load_default(size)
    return _fonts[size]


def _fit(pen: ImageDraw.ImageDraw, words: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """The words, their middle left out where they are too wide."""
    words = words[:500].replace("×", "x")  # which Pillow's own font lacks
    if isinstance(font, ImageFont.ImageFont):  # Pillow's own, where it was built without FreeType: Latin letters alone
        words = words.encode("latin-1", "replace").decode("latin-1")
    if pen.textlength(words, font) <= width:
        return words
    half = len(words) // 2
    while half > 1 and pen.textlength(f"{words[:half]}…{words[-half:]}", font) > width:
        half -= 1
    return f"{words[:half]}…{words[-half:]}"


def write_sheet(path: Path, report: Report, splits: Splits) -> Path:
    """Draw the sheet into a PNG, which appears when it is whole."""
    with writing(path) as part:
        draw(report, splits).save(part, format="PNG", optimize=True)
    return path
