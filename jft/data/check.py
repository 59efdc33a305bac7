"""What spoils a data set before a model sees it: pictures unreadable, alike, misnamed, empty; nothing is changed."""

import io
import os
import stat
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from jft.data import decode
from jft.data.pipeline import Progress, content_digest, default_threads, in_order
from jft.data.sources import QUARANTINE, Dataset, Excluded, Splits
from jft.errors import UserError, printable
from jft.files import writing
from jft.preprocess import Preprocess

TINY = 16  # pixels of the shorter side
HUGE = 40_000_000  # pixels
STRIP = 8  # times longer than wide
ONE_COLOUR = 0.9  # share of a picture; that of real photographs rarely passes 0.85
FLAT = 2.0  # standard deviation of the grey values, of 255
STYLE = 0.1  # of the pictures: what more of them have is how this data set is, not a fault of some
IMBALANCE = 10  # times as many images in the largest class as in the smallest
FEW = 5  # images of a class
NEAR_BITS = 5  # of the 64 of a perceptual hash
NEAR_GREY = 8.0  # mean difference of the small pictures, of 255
LISTED = 20  # lines of a kind in the text
START_FILES = 50_000  # beyond which a start does not touch every file

LEFT_OUT, SUSPICIOUS, NOTE = "left out", "suspicious", "note"

# Every kind of finding: how much it matters and its heading, in the order in which they are told.
KINDS = {
    "unusable": (LEFT_OUT, "Cannot be used; training leaves them out"),
    "quarantined": (LEFT_OUT, f"Left out by {QUARANTINE}"),
    "leak": (SUSPICIOUS, "The same picture in several splits: scores will be too good"),
    "conflict": (SUSPICIOUS, "The same picture under different labels"),
    "duplicate": (SUSPICIOUS, "The same picture more than once"),
    "near leak": (SUSPICIOUS, "Pictures that look alike in several splits"),
    "near conflict": (SUSPICIOUS, "Pictures that look alike under different labels"),
    "near duplicate": (SUSPICIOUS, "Pictures that look alike"),
    "empty": (SUSPICIOUS, "Nearly one colour, as placeholders are"),
    "size": (SUSPICIOUS, "Sizes that are hardly of photographs"),
    "link": (SUSPICIOUS, "Links that lead out of the folder"),
    "unknown": (NOTE, f"Named by {QUARANTINE} and not there"),
    "format": (NOTE, "Not in the format that the name says; read by content"),
    "class": (NOTE, "Classes"),
    "odd": (NOTE, "Converted when read"),
}
# A picture beyond the first of these is what the list of a check takes out; of the others a person decides.
LISTED_OUT = ("leak", "duplicate", "empty")

# Whose first bytes tell them, of those that are common enough to be mistaken for each other.
SNIFFED = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "JPEG2000", "PSD", "ICO", "PPM", "AVIF")
SAME_FORMAT = {("JPEG", "MPO"), ("BMP", "DIB"), ("ICO", "CUR")}


@dataclass(frozen=True)
class Finding:
    """Something found of some pictures, `names`; of pictures that are alike, the one to keep comes first."""

    kind: str
    names: tuple[str, ...]
    detail: str


@dataclass(frozen=True)
class Report:
    """What a check found. `counts` are the images that can be used, by split and class (of quantities: all)."""

    data: str
    images: int
    counts: dict[str, dict[str, int]]
    sizes: tuple[tuple[int, int], ...]  # smallest, median and largest width and height
    findings: tuple[Finding, ...]
    quantities: bool = False

    def of(self, *levels: str) -> list[Finding]:
        """The findings that matter so much, the worst first."""
        return [f for f in self.findings if KINDS[f.kind][0] in levels]

    def json(self) -> dict[str, Any]:
        """As `--json` prints it."""
        told = {kind: sum(f.kind == kind for f in self.findings) for kind in KINDS}
        return {
            "data": self.data,
            "images": self.images,
            "usable": sum(sum(c.values()) for c in self.counts.values()),
            "counts": self.counts,
            "sizes": [list(size) for size in self.sizes],
            "found": {kind: n for kind, n in told.items() if n},
            "findings": [{"level": KINDS[f.kind][0], **asdict(f)} for f in self.findings],
        }


@dataclass(frozen=True)
class Facts:
    """What one look at a picture tells; `reason` says why it cannot be used."""

    digest: bytes = b""
    reason: str = ""
    format: str = ""
    size: tuple[int, int] = (0, 0)
    oddities: tuple[str, ...] = ()
    hash: int = 0
    small: np.ndarray = field(default_factory=lambda: np.zeros((16, 16), np.uint8))
    one_colour: float = 0.0
    spread: float = 0.0


def check(splits: Splits, data: str = "data", threads: int | None = None, progress: Progress | None = None) -> Report:
    """Look at every picture of every split. `progress(done, total)` is called as they are read."""
    places = [(split, dataset, i) for split, dataset in splits.sets().items() for i in range(len(dataset))]
    facts = []
    with decode.quiet():
        decode.formats()
        for fact in in_order(lambda n: look(places[n][1], places[n][2]), len(places), threads or default_threads()):
            facts.append(fact)
            if progress:
                progress(len(facts), len(places))
    pictures = [_Picture(split, dataset, i, fact) for (split, dataset, i), fact in zip(places, facts, strict=True)]
    usable = [p for p in pictures if not p.facts.reason]
    findings = [Finding("unusable", (p.name,), p.facts.reason) for p in pictures if p.facts.reason]
    findings += _excluded(splits.excluded)
    exact, single = _exact(usable)
    findings += exact
    findings += _empty(usable) + _sizes(usable) + _near(single)
    findings += _links(splits) + _formats((p.name, p.ending, p.facts.format) for p in usable) + _odd(usable)
    findings += _unknown(splits)
    counts = {
        split: _counts(dataset, [p.i for p in usable if p.split == split]) for split, dataset in splits.sets().items()
    }
    findings += [] if splits.train.quantities else _classes(counts)
    order = list(KINDS)
    findings.sort(key=lambda f: (order.index(f.kind), f.names))
    areas = sorted((p.facts.size for p in usable), key=lambda s: s[0] * s[1])
    sizes = (areas[0], areas[len(areas) // 2], areas[-1]) if areas else ()
    entries = len(pictures) + len(splits.excluded)
    return Report(data, entries, counts, sizes, tuple(findings), splits.train.quantities)


def at_start(splits: Splits) -> list[Finding]:
    """What costs next to nothing to find: a few bytes of each file, and the whole of those that may be the same.

    Of more than START_FILES files only the classes, links and lists are looked at.
    """
    findings: list[Finding] = []
    files = [(split, dataset, i) for split, dataset in splits.sets().items() for i in range(len(dataset.files or ()))]
    if len(files) <= START_FILES:
        seen = list(in_order(lambda n: _glance(*files[n][1:]), len(files), default_threads()))
        alike: dict[tuple[bytes, ...], list[_Picture]] = defaultdict(list)
        for (split, dataset, i), parts in zip(files, seen, strict=True):
            if parts:
                alike[parts].append(_Picture(split, dataset, i, Facts()))
        for group in alike.values():
            if len(group) > 1:
                findings += _exact([p.hashed() for p in group])[0]
        findings = [f for f in findings if f.kind != "duplicate"]
        findings += _formats(
            (dataset.names[i], _ending(dataset.files[i]), sniff(parts[1]))
            for (_, dataset, i), parts in zip(files, seen, strict=True)
            if parts and dataset.files
        )
    findings += _links(splits) + _unknown(splits)
    findings += _classes({s: _counts(d, range(len(d))) for s, d in splits.sets().items() if d.labels.ndim == 1})
    return findings


def _glance(dataset: Dataset, i: int) -> tuple[bytes, ...]:
    """A file's size and a few bytes of its beginning, middle and end; nothing where it cannot be read or is empty."""
    assert dataset.files is not None
    try:
        status = os.stat(dataset.files[i])
        if not stat.S_ISREG(status.st_mode) or not status.st_size:
            return ()
        with open(dataset.files[i], "rb", buffering=0) as file:
            parts = [str(status.st_size).encode()]
            for place in (0, status.st_size // 2, max(status.st_size - 64, 0)):
                file.seek(place)
                parts.append(file.read(64))
            return tuple(parts)
    except OSError:  # decoding will name it
        return ()


def summary(findings: Sequence[Finding], names: int = 3) -> list[str]:
    """A line for each kind: how many, and the first few."""
    lines = []
    for kind, (_, heading) in KINDS.items():
        found = [f for f in findings if f.kind == kind]
        if kind == "class":
            lines += [f.detail for f in found]
        elif found:
            few = "; ".join(_line(f) for f in found[:names])
            more = f"; and {len(found) - names} more" if len(found) > names else ""
            lines.append(f"{heading} ({len(found)}): {few}{more}.")
    return lines


def text(report: Report) -> str:
    """The report as a person reads it."""
    splits = ", ".join(f"{split} {sum(classes.values())}" for split, classes in report.counts.items())
    known = {c for classes in report.counts.values() for c in classes}
    labels = f"numbers ({', '.join(known)})" if report.quantities else f"{len(known)} classes"
    lines = [f"{report.data}: {report.images} entries, {labels}; images that can be used: {splits}"]
    if report.sizes:
        small, middle, large = (f"{w}×{h}" for w, h in report.sizes)
        lines.append(f"sizes: {small} to {large} pixels, the median {middle}")
    for kind, (_, heading) in KINDS.items():
        found = [f for f in report.findings if f.kind == kind]
        if found:
            lines += ["", f"{heading} ({len(found)})"]
            lines += [f"  {_line(f)}" for f in found[:LISTED]]
            if len(found) > LISTED:
                lines.append(f"  … and {len(found) - LISTED} more (--json or --out has them all)")
    if not report.of(LEFT_OUT, SUSPICIOUS):
        lines += ["", "Nothing that looks wrong."]
    return "\n".join(lines)


def quarantine(report: Report) -> str:
    """A list to be looked through and put beside the data as `quarantine.txt`: what to leave out, and in comments what
    somebody has to decide."""
    lines = [
        f"# Pictures to leave out, a name and a reason on each line. Look through it, then put it as {QUARANTINE} into",
        "# the folder of the data, or beside the CSV. Remove the # before a name to leave that picture out too.",
    ]
    done: set[str] = set()
    for finding in report.of(SUSPICIOUS):
        certain = finding.kind in LISTED_OUT
        alike = "duplicate" in finding.kind or "leak" in finding.kind
        for name in finding.names[1:] if alike else finding.names:
            if name not in done:
                done.add(name)
                told = f"{'./' if name.startswith('#') else ''}{name}"  # which would else be a comment
                why = f"{finding.kind}: {finding.detail}".removesuffix(": ")
                lines.append(f"{'' if certain else '# '}{told}\t{why}")
    return "\n".join(lines) + "\n"


def write(report: Report, folder: str | Path, data: str | Path | None = None) -> Path:
    """Write report.txt, report.json and a quarantine list to look through. Raises UserError."""
    import json

    out = Path(folder)
    if data is not None and Path(data).exists():
        root = Path(data) if Path(data).is_dir() else Path(data).parent
        if out.resolve().is_relative_to(root.resolve()) and Path(data).is_dir():
            raise UserError(f"--out {out} lies in the data, which a check leaves as they are; name another folder.")
        if out.resolve() == root.resolve():
            raise UserError(f"--out {out} is the CSV's folder, where a {QUARANTINE} takes effect; name another one.")
    written = {
        "report.txt": text(report) + "\n",
        "report.json": json.dumps(report.json(), indent=1) + "\n",
        QUARANTINE: quarantine(report),
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, content in written.items():
            with writing(out / name) as part:
                part.write_text(content, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror}.") from None
    return out


# One picture


@dataclass(frozen=True)
class _Picture:
    split: str
    dataset: Dataset
    i: int
    facts: Facts

    @property
    def name(self) -> str:
        return self.dataset.names[self.i]

    @property
    def ending(self) -> str:
        return _ending(self.dataset.files[self.i]) if self.dataset.files else ""

    @property
    def label(self) -> str:
        label = self.dataset.labels[self.i]
        if self.dataset.quantities:
            return ", ".join(f"{name} {float(v)!r}" for name, v in zip(self.dataset.classes, label, strict=True))
        if np.ndim(label):
            return "|".join(self.dataset.classes[c] for c in np.flatnonzero(label))
        return self.dataset.classes[int(label)] if label >= 0 else ""

    def hashed(self) -> "_Picture":
        try:
            digest = content_digest(self.dataset.read(self.i))
        except OSError:
            digest = b""
        return _Picture(self.split, self.dataset, self.i, Facts(digest))


def look(dataset: Dataset, i: int) -> Facts:
    """Everything about a picture that one reading tells."""
    try:
        content = dataset.read(i)
    except MemoryError:
        raise
    except Exception as error:  # what a source raises is its own affair
        return Facts(reason=f"cannot be read: {printable(getattr(error, 'strerror', None) or str(error))}")
    digest = content_digest(content)
    try:
        name, oddities = _header(content) if isinstance(content, bytes) else ("", ())
        image = decode.to_rgb(content)
        decode.resized(image.size, Preprocess())
    except decode.DecodeError as error:
        return Facts(digest, str(error))
    grey = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.BOX), np.float32)
    colours = image.resize(tuple(min(n, 64) for n in image.size), Image.Resampling.BOX)  # type: ignore[arg-type]
    coarse = np.asarray(colours, np.int32) >> 4
    share = np.bincount((coarse @ np.array([256, 16, 1], np.int32)).ravel()).max() / coarse[..., 0].size
    small = grey.reshape(16, 2, 16, 2).mean((1, 3)).astype(np.uint8)
    return Facts(digest, "", name, image.size, oddities, perceptual_hash(grey), small, float(share), float(grey.std()))


def perceptual_hash(grey: np.ndarray) -> int:
    """64 bits of a 32×32 picture's low frequencies that a new size or compression hardly changes (Zauner 2010, pHash).

    A bit for each of the lowest 8×8 coefficients of the cosine transform: whether it is above their median.
    """
    from scipy.fft import dctn  # slow to import, and runs import this file

    low = np.asarray(dctn(grey, norm="ortho"))[:8, :8].ravel()
    low[0] = 0  # the mean: brightness is no likeness
    return int.from_bytes(np.packbits(low > np.median(low)).tobytes(), "big")


def sniff(beginning: bytes) -> str:
    """The format of a file by its first bytes, as Pillow calls it; empty where they do not tell."""
    for name in SNIFFED:
        accept = _accepts().get(name)
        if accept and accept(beginning) is True:
            return name
    return ""


@cache
def _accepts() -> Mapping[str, Any]:
    known = decode.formats()
    return {name: Image.OPEN[name][1] for name in known}


def _header(content: bytes) -> tuple[str, tuple[str, ...]]:
    """Format, and what of the picture has to be converted. Raises DecodeError where Pillow does not know it."""
    try:
        with Image.open(io.BytesIO(content), formats=decode.formats()) as image:
            oddities = []
            kinds = {
                "CMYK": "CMYK",
                "P": "palette",
                "PA": "palette",
                "1": "1 bit",
                "L": "grey",
                "LA": "grey",
                "F": "float",
            }
            if image.mode in kinds:
                oddities.append(kinds[image.mode])
            elif image.mode.startswith("I"):
                oddities.append("16 bits or more")
            elif image.mode not in ("RGB", "RGBA", "RGBX"):
                oddities.append(image.mode)
            if image.has_transparency_data:
                oddities.append("transparency")
            if getattr(image, "is_animated", False) and image.format != "MPO":
                oddities.append("several frames")
            if image.getexif().get(ExifTags.Base.Orientation, 1) not in (0, 1):
                oddities.append("turned by EXIF")
            return image.format or "", tuple(oddities)
    except MemoryError:
        raise
    except Exception:  # what is wrong with it is for decoding to say, or does not keep it from being decoded
        return "", ()


def _ending(file: Path) -> str:
    """The format that a file's name promises; empty where it promises none."""
    Image.init()
    return Image.registered_extensions().get(file.suffix.lower(), "")


# Findings


def _line(finding: Finding) -> str:
    return (
        ", ".join(finding.names[:6])
        + (f" and {len(finding.names) - 6} more" if len(finding.names) > 6 else "")
        + (f": {finding.detail}" if finding.detail and finding.names else finding.detail)
    )


def _excluded(excluded: Excluded) -> list[Finding]:
    kinds = (("quarantined" if r.startswith(f"in {QUARANTINE}") else "unusable", n, r) for n, r in excluded)
    return [Finding(kind, (name,), reason) for kind, name, reason in kinds]


def _unknown(splits: Splits) -> list[Finding]:
    return [Finding("unknown", (name,), "") for name in splits.unknown]


def _alike(pictures: Sequence[_Picture], near: str = "") -> Finding:
    """Of pictures that are the same: under different labels, in several splits, or merely more than once."""
    labels, splits = {p.label for p in pictures}, {p.split for p in pictures}
    kind = "conflict" if len(labels) > 1 else "leak" if len(splits) > 1 else "duplicate"
    # What is kept is what is measured on: the test set's, then the validation set's.
    ordered = sorted(pictures, key=lambda p: (("test", "val", "train").index(p.split), p.name))
    told = []
    if len(splits) > 1:
        told.append("in " + " and ".join(sorted(splits)))
    if len(labels) > 1:
        told.append("labelled " + " and ".join(sorted(label or "nothing" for label in labels)))
    return Finding(near + kind, tuple(p.name for p in ordered), "; ".join(told))


def _exact(pictures: Sequence[_Picture]) -> tuple[list[Finding], list[_Picture]]:
    """Findings of equal content, and the pictures with one of each content."""
    groups: dict[bytes, list[_Picture]] = defaultdict(list)
    for picture in pictures:
        groups[picture.facts.digest].append(picture)
    same = [group for digest, group in groups.items() if digest and len(group) > 1]
    return [_alike(group) for group in same], [group[0] for group in groups.values()]


def _near(pictures: Sequence[_Picture]) -> list[Finding]:
    """Pictures whose hashes differ in at most NEAR_BITS bits, and whose small copies are alike.

    Two hashes that differ in at most k bits are equal in one of k + 1 bands: only those of a band are compared.
    """
    clear = [p for p in pictures if p.facts.spread > FLAT and p.facts.one_colour < ONE_COLOUR]
    hashes = np.array([p.facts.hash for p in clear], np.uint64)
    small = np.array([p.facts.small for p in clear], np.float32).reshape(len(clear), 256)
    small -= small.mean(1, keepdims=True)
    parent = list(range(len(clear)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    edges = np.linspace(0, 64, NEAR_BITS + 2).astype(int)
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        band = (hashes >> np.uint64(low)) & np.uint64((1 << int(high - low)) - 1)
        order = np.argsort(band, kind="stable")
        for group in np.split(order, np.flatnonzero(np.diff(band[order])) + 1):
            for place, i in enumerate(group[:-1]):
                others = group[place + 1 :]
                others = others[np.bitwise_count(hashes[others] ^ hashes[i]) <= NEAR_BITS]
                for j in others[np.abs(small[others] - small[i]).mean(1) <= NEAR_GREY] if len(others) else ():
                    parent[root(int(i))] = root(int(j))
    groups: dict[int, list[_Picture]] = defaultdict(list)
    for i, picture in enumerate(clear):
        groups[root(i)].append(picture)
    return [_alike(group, "near ") for group in groups.values() if len(group) > 1]


def _rare(kind: str, found: list[Finding], total: int) -> list[Finding]:
    """The findings, or how many there are where they are how the data are."""
    if len(found) <= max(STYLE * total, 3):
        return found
    return [Finding("class", (), f"{len(found)} of {total} pictures: {KINDS[kind][1].lower()}; so these data are.")]


def _empty(pictures: Sequence[_Picture]) -> list[Finding]:
    flat = [Finding("empty", (p.name,), "one colour") for p in pictures if p.facts.spread < FLAT]
    nearly = [
        Finding("empty", (p.name,), f"{p.facts.one_colour:.0%} of it is one colour")
        for p in pictures
        if p.facts.one_colour >= ONE_COLOUR and p.facts.spread >= FLAT
    ]
    return flat + _rare("empty", nearly, len(pictures))


def _sizes(pictures: Sequence[_Picture]) -> list[Finding]:
    found = []
    for p in pictures:
        (w, h) = p.facts.size
        what = (
            "tiny"
            if min(w, h) < TINY
            else "huge"
            if w * h > HUGE
            else "a strip"
            if max(w, h) > STRIP * min(w, h)
            else ""
        )
        if what:
            found.append(Finding("size", (p.name,), f"{what}, {w}×{h} pixels"))
    return _rare("size", found, len(pictures))


def _links(splits: Splits) -> list[Finding]:
    """Files that lie elsewhere than their names say: they are used, since links are how large data are shared."""
    if splits.root is None:
        return []
    root = os.path.realpath(splits.root)
    folders: dict[Path, str] = {}  # where the files of a folder lie, where that is outside
    found = []

    def outside(path: Path) -> str:
        where = os.path.realpath(path)
        return "" if os.path.commonpath([root, where]) == root else where

    for dataset in splits.sets().values():
        for name, file in zip(dataset.names, dataset.files or (), strict=False):
            if file.parent not in folders:
                folders[file.parent] = outside(file.parent)
            parent = folders[file.parent]
            where = outside(file) if os.path.islink(file) else parent and os.path.join(parent, file.name)
            if where:
                found.append(Finding("link", (name,), f"is {printable(where)}"))
    return found


def _formats(named: Iterable[tuple[str, str, str]]) -> list[Finding]:
    """From name, format by the ending, and format by the content."""
    return [
        Finding("format", (name,), f"is {found}, named as {promised}")
        for name, promised, found in named
        if promised and found and promised != found and (promised, found) not in SAME_FORMAT
    ]


def _odd(pictures: Sequence[_Picture]) -> list[Finding]:
    names: dict[str, list[str]] = defaultdict(list)
    for p in pictures:
        for oddity in p.facts.oddities:
            names[oddity].append(p.name)
    return [Finding("odd", tuple(some), f"{oddity} ({len(some)} of {len(pictures)})") for oddity, some in names.items()]


def _counts(dataset: Dataset, indices: Iterable[int]) -> dict[str, int]:
    if dataset.quantities:
        return {", ".join(dataset.classes): len(list(indices))}
    chosen = dataset.labels[np.fromiter(indices, np.int64)]
    if dataset.labels.ndim == 2:
        return {c: int(n) for c, n in zip(dataset.classes, chosen.sum(0), strict=True)}
    count = Counter(chosen.tolist())
    return {c: count[i] for i, c in enumerate(dataset.classes)}


def _classes(counts: Mapping[str, Mapping[str, int]]) -> list[Finding]:
    found = []
    for split, classes in counts.items():
        if not classes:
            continue
        least, most = min(classes, key=lambda c: classes[c]), max(classes, key=lambda c: classes[c])
        if classes[most] > IMBALANCE * max(classes[least], 1):
            found.append(
                f"{split} is imbalanced: {classes[most]} of {most}, {classes[least]} of {least}; "
                "--class-weights may help."
            )
        for bound, what in ((0, "no images"), (1, "one image")):
            few = [c for c, n in classes.items() if n == bound]
            if few and (split == "train" or bound == 0):
                shown = ", ".join(map(repr, few[:5])) + (f" and {len(few) - 5} more" if len(few) > 5 else "")
                found.append(f"{split} has {what} of {shown}.")
        few = [c for c, n in classes.items() if 1 < n < FEW]
        if few and split == "train":
            shown = ", ".join(map(repr, few[:5])) + (f" and {len(few) - 5} more" if len(few) > 5 else "")
            found.append(f"train has fewer than {FEW} images of {shown}.")
    alike: dict[str, list[str]] = defaultdict(list)
    for name in sorted({c for classes in counts.values() for c in classes}):
        alike[" ".join(name.casefold().replace("_", " ").split())].append(name)
    for names in alike.values():
        if len(names) > 1:
            found.append(f"{', '.join(map(repr, names))} are {len(names)} classes: is it one, written in several ways?")
    return [Finding("class", (), detail) for detail in found]
