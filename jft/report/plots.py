"""The report's figures as small SVGs to stand in a page: their colours and type are those of its style sheet."""

import base64
import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources

import numpy as np
from jaxtyping import Float, Int, Shaped, UInt8

MAX_POINTS = 400  # of a curve: more than a screen shows
LETTER = 7.5  # units that a letter takes, at most


@dataclass(frozen=True)
class Frame:
    """A figure's paper, `width` by `height` units, and the ranges of x and y that its inner rectangle shows."""

    x: tuple[float, float]
    y: tuple[float, float]
    width: float = 360
    height: float = 230
    left: float = 60
    top: float = 24
    right: float = 18
    bottom: float = 42

    def at_x(self, x: float) -> float:
        """Units from the left edge."""
        return self.left + (x - self.x[0]) / (self.x[1] - self.x[0]) * (self.width - self.left - self.right)

    def at_y(self, y: float) -> float:
        """Units from the upper edge."""
        return (
            self.height
            - self.bottom
            - (y - self.y[0]) / (self.y[1] - self.y[0]) * (self.height - self.top - self.bottom)
        )


def curve(
    title: str,
    train: Sequence[tuple[int, float]],
    val: Sequence[tuple[int, float]],
    stages: Sequence[tuple[str, int]],
    *,
    percent: bool = False,
) -> str:
    """A figure over the run's steps: training as a line, validation as points; `stages` are names and first steps."""
    steps = [s for s, _ in (*train, *val)]
    values = [v for _, v in (*train, *val) if math.isfinite(v)]
    first, last = min([*steps, *(s for _, s in stages)]), max(steps)
    frame = Frame((first, max(last, first + 1)), _range(values, (0.0, 1.0) if percent else (0.0, math.inf)))
    out = [_axes(frame, ticks(frame.x, whole=True), ticks(frame.y), _share if percent else _number, "step", "")]
    named = stage_labels(stages, last)
    for i, (_, begin) in enumerate(stages if len(stages) > 1 else ()):
        x = frame.at_x(begin)
        if i:
            out.append(f'<path class="edge" d="M{x:.1f} {frame.top}V{frame.height - frame.bottom}"/>')
        out.append(f'<text x="{x + 3:.1f}" y="{frame.top - 6}">{escape(named[i])}</text>')
    if train:
        out.append(_line(frame, _thinned(train), "train"))
    if val:
        out.append(_line(frame, val, "val", dots=True))
    if train and val:
        out.append(_legend(frame, (("train", "training"), ("val", "validation"))))
    return _svg(frame, title, out)


def rates(title: str, lines: Sequence[Sequence[tuple[int, float]]], stages: Sequence[tuple[str, int]]) -> str:
    """Learning rates over the steps, a line for each group of parts in each stage, on a logarithmic axis.

    Rates of zero, at the ends of schedules, are left out.
    """
    drawn = [[(x, math.log10(y)) for x, y in _thinned(line) if y > 0] for line in lines]
    points = [p for line in drawn for p in line]
    steps = [x for x, _ in points] + [s for _, s in stages] or [0]
    top = max([y for _, y in points], default=0.0)
    low = max(min([y for _, y in points], default=-1.0), top - 6)  # a cosine's last steps would flatten all others
    frame = Frame((min(steps), max(*steps, min(steps) + 1)), (low - 0.1, top + 0.1))
    marks = ticks(frame.y, whole=frame.y[1] - frame.y[0] > 2)
    out = [_axes(frame, ticks(frame.x, whole=True), marks, lambda y: f"{10**y:.1g}", "step", "", x_told=_number)]
    named = stage_labels(stages, int(max(steps)))
    for i, (_, begin) in enumerate(stages if len(stages) > 1 else ()):
        x = frame.at_x(begin)
        if i:
            out.append(f'<path class="edge" d="M{x:.1f} {frame.top}V{frame.height - frame.bottom}"/>')
        out.append(f'<text x="{x + 3:.1f}" y="{frame.top - 6}">{escape(named[i])}</text>')
    out += [_line(frame, [(x, max(y, low)) for x, y in line], "train") for line in drawn]
    return _svg(frame, title, out)


def lines(title: str, curves: Sequence[Sequence[tuple[int, float]]], *, percent: bool = False) -> str:
    """Several runs' curves over the steps, in the colours `c0`, `c1`, … of the style sheet."""
    points = [p for curve in curves for p in curve if math.isfinite(p[1])]
    steps = [x for x, _ in points] or [0]
    frame = Frame((min(0, *steps), max(*steps, 1)), _range([y for _, y in points], (0.0, 1.0 if percent else math.inf)))
    out = [_axes(frame, ticks(frame.x, whole=True), ticks(frame.y), _share if percent else _number, "step", "")]
    out += [_line(frame, curve, f"c{i}", dots=len(curve) < 30) for i, curve in enumerate(curves)]
    return _svg(frame, title, out)


def ranges(title: str, rows: Sequence[tuple[str, float, float, float]], *, percent: bool = True) -> str:
    """Shares with their intervals, one below the other: name, share, lower and upper end."""
    told = _share if percent else _number
    edge = 22 + max(_width(short(name)) for name, *_ in rows)
    height = 26 * len(rows) + 44
    low, high = min(r[2] for r in rows), max(r[3] for r in rows)
    frame = Frame(_range([low, high], (0.0, 1.0)), (len(rows), 0), 460, height, edge, 4, 18, 40)
    out = [_axes(frame, ticks(frame.x), [], told, "", "", x_told=told)]
    for i, (name, share, start, end) in enumerate(rows):
        y = frame.at_y(i + 0.5)
        out.append(f'<text class="end" x="{edge - 8:.1f}" y="{y + 4:.1f}">{_named(name)}</text>')
        out.append(f'<path class="line train" d="M{frame.at_x(start):.1f} {y:.1f}H{frame.at_x(end):.1f}"/>')
        out.append(f'<path class="dots train" d="M{frame.at_x(share):.1f} {y:.1f}h0"/>')
    return _svg(frame, title, out)


def sparkline(title: str, values: Sequence[float]) -> str:
    """A few values as a line without axes, from zero."""
    frame = Frame((0, max(len(values) - 1, 1)), (0, max([v for v in values if math.isfinite(v)], default=0.0) or 1.0),
                  width=120, height=24, left=4, top=4, right=4, bottom=4)  # fmt: skip
    points = [(float(i), v) for i, v in enumerate(values)]
    return _svg(frame, title, [_line(frame, points, "train"), _dots(frame, points[-1:], "train")], "plot spark")


def heat(pixels: UInt8[np.ndarray, "h w c"], weights: UInt8[np.ndarray, "a b"]) -> UInt8[np.ndarray, "h w 3"]:
    """A picture in grey, orange where the weights (0 to 255) are large."""
    from PIL import Image

    size = (pixels.shape[1], pixels.shape[0])
    grown = Image.fromarray(weights.astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
    share = 0.75 * np.asarray(grown, np.float32)[..., None] / 255
    grey = pixels.astype(np.float32).mean(axis=2, keepdims=True) * np.float32(0.85)
    return (grey * (1 - share) + share * np.array([[[255, 120, 20]]], np.float32)).clip(0, 255).astype(np.uint8)


def rate_curve(
    title: str, losses: Sequence[tuple[float, float]], smoothed: Sequence[tuple[float, float]], chosen: float | None
) -> str:
    """Losses as points and their smoothed curve against learning rates on a logarithmic axis; one of them marked."""
    top = 1.3 * max(smoothed[0][1], 1e-12)  # where it diverges, a loss would leave no room for what is before it

    def decades(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
        return [(math.log10(x), y if y <= top else math.nan) for x, y in points]

    frame = Frame(
        (math.log10(losses[0][0]), math.log10(max(losses[-1][0], 1.01 * losses[0][0]))),
        _range([y for _, y in decades([*losses, *smoothed]) if math.isfinite(y)], (0.0, math.inf)),
    )
    out = [_axes(frame, ticks(frame.x, whole=True), ticks(frame.y), _number, "learning rate", "loss", x_told=_power)]
    if chosen is not None:
        x = frame.at_x(math.log10(chosen))
        out.append(f'<path class="edge" d="M{x:.1f} {frame.top}V{frame.height - frame.bottom}"/>')
        out.append(f'<text x="{x + 3:.1f}" y="{frame.top - 6}">{chosen:g}</text>')
    out.append(_dots(frame, decades(losses), "train"))
    out.append(_line(frame, decades(smoothed), "val"))
    out.append(_legend(frame, (("train", "mean of steps"), ("val", "smoothed"))))
    return _svg(frame, title, out)


def scatter(
    title: str,
    x_title: str,
    ended: Sequence[tuple[float, float]],
    stopped: Sequence[tuple[float, float]],
    *,
    logarithmic: bool = False,
    names: Sequence[str] = (),
    best: Sequence[tuple[float, float]] = (),
    percent: bool = True,
) -> str:
    """Shares against a number, or against `names` where x counts these; `best` is a line.

    `ended` are blue, `stopped`, which went only part of the way, orange.
    """

    def placed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
        return [(math.log10(x) if logarithmic else x, y) for x, y in points]

    ended, stopped, best = placed(ended), placed(stopped), placed(best)
    xs, ys = zip(*ended, *stopped, strict=True)
    air = 0.5 if names else 0.04 * (max(xs) - min(xs)) or 0.5
    frame = Frame((min(xs) - air, max(xs) + air), _range(ys, (0.0, 1.0)))
    if names:
        frame = Frame((-0.5, len(names) - 0.5), frame.y)
    marks = [float(i) for i in range(len(names))] or ticks(frame.x, whole=x_title == "trial")
    if logarithmic:  # whole powers where there are two of them or more, else what lies between too
        marks = ticks(frame.x, whole=frame.x[1] - frame.x[0] > 2)
    told = (lambda x: names[round(x)]) if names else (lambda x: f"{10**x:.2g}") if logarithmic else _number
    y_told = _share if percent else _number
    out = [_axes(frame, marks, ticks(frame.y), y_told, escape(x_title), "", x_told=lambda x: escape(told(x)))]
    out += [_line(frame, best, "train"), _dots(frame, ended, "train"), _dots(frame, stopped, "val")]
    if stopped:
        out.append(_legend(frame, (("train", "to the end"), ("val", "stopped early"))))
    return _svg(frame, title, out)


def agreement(title: str, true: Float[np.ndarray, " n"], said: Float[np.ndarray, " n"]) -> str:
    """What was said against what is true, a point each, with the line on which the two agree."""
    span = _range([*true.tolist(), *said.tolist()], (-math.inf, math.inf))
    frame = Frame(span, span, width=360, height=360, top=10)
    marks, (low, high) = ticks(span), span
    out = [_axes(frame, marks, marks, _number, "true", "predicted")]
    ends = (f"{frame.at_x(v):.1f} {frame.at_y(v):.1f}" for v in (low, high))
    out.append(f'<path class="edge" d="M{"L".join(ends)}"/>')
    out.append(_dots(frame, list(zip(true.tolist(), said.tolist(), strict=True)), "train"))
    return _svg(frame, title, out)


def standalone(svg: str) -> str:
    """A figure as a file of its own, with the style that a page would give it."""
    style = (resources.files("jft.report") / "style.css").read_text("utf-8")
    return svg.replace(
        '<svg class="plot"',
        '<svg xmlns="http://www.w3.org/2000/svg" class="plot" font-family="system-ui, sans-serif"',
        1,
    ).replace(">", f"><style>{style}</style>", 1)


def stage_labels(stages: Sequence[tuple[str, int]], last: int) -> list[str]:
    """What a curve calls its stages: by name where every name fits over its stretch, else by number."""
    if not stages:
        return []
    begins = [begin for _, begin in stages]
    room = 280 / max(last - begins[0], 1)
    ends = [*begins[1:], last]
    fit = all((end - begin) * room > LETTER * len(name) for (name, begin), end in zip(stages, ends, strict=True))
    return [name if fit else str(i) for i, (name, _) in enumerate(stages, 1)]


def reliability(
    count: Int[np.ndarray, " bins"], confidence: Float[np.ndarray, " bins"], right: Float[np.ndarray, " bins"]
) -> str:
    """Accuracy against confidence in each interval: on the diagonal, the model is right as often as it says."""
    frame, bins = Frame((0, 1), (0, 1.02), height=270, top=8), len(count)
    out = [_axes(frame, _FIFTHS, _FIFTHS, _share, "confidence", "accuracy", x_told=_share)]
    for i in np.flatnonzero(count):
        told = f"confidence {i / bins:.0%} to {(i + 1) / bins:.0%}: {count[i]:,} images, {right[i]:.0%} right"
        out.append(_bar(frame, i / bins, (i + 1) / bins, 0.0, float(right[i]), "train", told))
    out.append(f'<path class="edge" d="M{frame.at_x(0)} {frame.at_y(0)}L{frame.at_x(1)} {frame.at_y(1):.1f}"/>')
    met = [(float(confidence[i]), float(right[i])) for i in np.flatnonzero(count)]
    out.append(_line(frame, met, "val", dots=True))
    return _svg(frame, "Reliability: accuracy against confidence", out)


def confidences(right: Float[np.ndarray, " n"], wrong: Float[np.ndarray, " m"], of: str = "images") -> str:
    """How sure the model is where it is right, and where it is wrong."""
    edges = np.linspace(0, 1, 26)
    good, bad = np.histogram(right, edges)[0], np.histogram(wrong, edges)[0]
    frame = Frame((0, 1), (0, 1.05 * max(int((good + bad).max()), 1)), height=270, top=8)
    out = [_axes(frame, _FIFTHS, ticks(frame.y, whole=True), _number, "confidence", of, x_told=_share)]
    for low, high, g, b in zip(edges[:-1].tolist(), edges[1:].tolist(), good.tolist(), bad.tolist(), strict=True):
        told = f"confidence {low:.0%} to {high:.0%}: {g:,} right, {b:,} wrong"
        if g:
            out.append(_bar(frame, low, high, 0, g, "train", told))
        if b:
            out.append(_bar(frame, low, high, g, g + b, "val", told))
    out.append(_legend(frame, (("train", "right"), ("val", "wrong"))))
    return _svg(frame, "Confidence of right and wrong predictions", out)


def heatmap(counts: Int[np.ndarray, "k k"], names: Sequence[str] = ()) -> str:
    """A confusion matrix too large for numbers: each row's shares as tints, right ones blue, wrong ones orange.

    With `names` the classes are written at its edges, else numbered.
    """
    from PIL import Image

    k = len(counts)
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    # The tint is the alpha: it works on a light and on a dark page. The power makes a few mistakes in many visible.
    picture = np.zeros((k, k, 4), np.uint8)
    picture[..., :3] = (240, 110, 30)
    np.einsum("iic->ic", picture)[:, :3] = (59, 130, 246)
    picture[..., 3] = np.rint(255 * share**0.35)
    Image.fromarray(picture).save(file := io.BytesIO(), "PNG", optimize=True)
    png = base64.b64encode(file.getvalue()).decode()
    edge = 22 + max((_width(short(n)) for n in names), default=0)
    frame = Frame((0, k), (k, 0), width=640, height=640, left=max(64, edge), top=14, bottom=max(56, edge))
    left, top = frame.left, frame.top
    below = frame.height - frame.bottom
    out = [
        f'<image x="{left}" y="{top}" width="{frame.width - left - frame.right}" '
        f'height="{below - top}" preserveAspectRatio="none" href="data:image/png;base64,{png}"/>'
    ]
    if names:
        for i, name in enumerate(map(_named, names)):
            x, y = frame.at_x(i + 0.5), frame.at_y(i + 0.5) + 4
            out.append(f'<text class="end" x="{left - 6:.1f}" y="{y:.1f}">{name}</text>')
            turned = f"translate({x + 4:.1f} {below + 8:.1f}) rotate(-90)"
            out.append(f'<text class="end" transform="{turned}">{name}</text>')
    else:
        for v, t in [(i + 0.5, str(i)) for i in map(int, ticks((0, k - 1), whole=True))]:
            out.append(f'<text class="mid" x="{frame.at_x(v):.1f}" y="{below + 20:.1f}">{t}</text>')
            out.append(f'<text class="end" x="{left - 8}" y="{frame.at_y(v) + 4:.1f}">{t}</text>')
        out.append(_titles(frame, "predicted class, by number", "true class, by number"))
    return _svg(frame, f"Confusion matrix of {k} classes", out)


def short(name: str, most: int = 16) -> str:
    """A name with its middle left out where it is longer: what tells names apart is often their end.

    >>> short("species of ant 01")
    'species…f ant 01'
    """
    return name if len(name) <= most else f"{name[: (most - 1) // 2]}…{name[-(most // 2) :]}"


def _named(name: str) -> str:
    """A shortened name as the inside of a text, with the whole one to point at."""
    whole = f"<title>{escape(name)}</title>" if len(name) > len(short(name)) else ""
    return whole + escape(short(name))


def _width(text: str) -> float:
    """Units that a text takes, at most."""
    return sum(12.5 if letter in "WMmw@%" or ord(letter) >= 0x2E80 else LETTER for letter in text)


def ticks(span: tuple[float, float], count: int = 6, whole: bool = False) -> list[float]:
    """Round numbers within a range, about `count` of them, evenly spaced.

    >>> ticks((0.13, 0.92))
    [0.2, 0.4, 0.6, 0.8]
    """
    low, high = min(span), max(span)
    rough = max((high - low) / count, 1e-300)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    if whole:
        step = max(round(step), 1)
    return [round(i * step, 12 - math.floor(math.log10(step))) for i in range(math.ceil(low / step - 1e-9),
            math.floor(high / step + 1e-9) + 1)]  # fmt: skip


_FIFTHS = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]


def _range(values: Sequence[float], bounds: tuple[float, float]) -> tuple[float, float]:
    """Where the values lie, with some air, yet not beyond what such values can be."""
    if not values:
        return 0.0, 1.0
    low, high = min(values), max(values)
    air = 0.06 * (high - low) or 0.1 * abs(high) or 0.1
    floor, ceiling = min(bounds[0], low), max(bounds[1], high)
    return max(low - air, floor), min(high + air, ceiling + air / 3)


def _number(value: float) -> str:
    if abs(value) >= 10_000:
        return f"{value / 1e6:.3g}M" if abs(value) >= 1e6 else f"{value / 1e3:.3g}k"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _power(value: float) -> str:
    """The number whose decimal logarithm this is."""
    return f"{10**value:g}"


def _share(value: float) -> str:
    return f"{100 * value:.3g}%"


def _axes(
    frame: Frame,
    xs: Iterable[float],
    ys: Iterable[float],
    told: Callable[[float], str],
    x_title: str,
    y_title: str,
    x_told: Callable[[float], str] = _number,
) -> str:
    """Grid lines with their numbers, and what they are numbers of."""
    out, below = [], frame.height - frame.bottom
    for v in xs:
        x = frame.at_x(v)
        out.append(f'<path class="grid" d="M{x:.1f} {frame.top}V{below}"/>')
        out.append(f'<text class="mid" x="{x:.1f}" y="{below + 16}">{x_told(v)}</text>')
    for v in ys:
        y = frame.at_y(v)
        out.append(f'<path class="grid" d="M{frame.left} {y:.1f}H{frame.width - frame.right}"/>')
        out.append(f'<text class="end" x="{frame.left - 8}" y="{y + 4:.1f}">{told(v)}</text>')
    return "".join([*out, _titles(frame, x_title, y_title)])


def _titles(frame: Frame, x_title: str, y_title: str) -> str:
    y = (frame.top + frame.height - frame.bottom) / 2
    out = f'<text x="{frame.left}" y="{frame.height - 7}">{x_title}</text>'
    return out + (f'<text class="mid" transform="translate(13 {y}) rotate(-90)">{y_title}</text>' if y_title else "")


def _line(frame: Frame, points: Sequence[tuple[float, float]], kind: str, dots: bool = False) -> str:
    """Points joined by a line, with a gap where a value is not finite."""
    path, pen = [], "M"
    for x, y in points:
        if not math.isfinite(y):
            pen = "M"
            continue
        path.append(f"{pen}{frame.at_x(x):.1f} {frame.at_y(y):.1f}")
        pen = "L"
    return (f'<path class="line {kind}" d="{"".join(path)}"/>' if path else "") + (
        _dots(frame, points, kind) if dots else ""
    )


def _dots(frame: Frame, points: Sequence[tuple[float, float]], kind: str) -> str:
    """Each point as a line of no length with round ends."""
    marks = "".join(f"M{frame.at_x(x):.1f} {frame.at_y(y):.1f}h0" for x, y in points if math.isfinite(y))
    return f'<path class="dots {kind}" d="{marks}"/>' if marks else ""


def _bar(frame: Frame, low: float, high: float, bottom: float, top: float, kind: str, told: str) -> str:
    x, y = frame.at_x(low) + 0.5, frame.at_y(top)
    width, height = frame.at_x(high) - frame.at_x(low) - 1, frame.at_y(bottom) - y
    return (
        f'<rect class="bar-{kind}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}">'
        f"<title>{told}</title></rect>"
    )


def _legend(frame: Frame, entries: Sequence[tuple[str, str]]) -> str:
    """Below the axes at the right, where no curve can run through it."""
    # One text, so that the spaces in it are right in every font.
    told = "\N{NO-BREAK SPACE}\N{NO-BREAK SPACE} ".join(
        f'<tspan class="{kind}">●</tspan>\N{NO-BREAK SPACE}{name}' for kind, name in entries
    )
    return f'<text class="end" x="{frame.width - frame.right}" y="{frame.height - 7}">{told}</text>'


def _thinned(points: Sequence[tuple[int, float]]) -> list[tuple[float, float]]:
    """At most `MAX_POINTS` means of neighbours; a gap where a value is not finite."""
    table: Shaped[np.ndarray, "n 2"] = np.array(points, np.float64)
    table[~np.isfinite(table)] = np.nan
    groups = np.array_split(table, min(len(table), MAX_POINTS))
    return [(float(x), float(y)) for x, y in (group.mean(axis=0) for group in groups)]


def _svg(frame: Frame, title: str, parts: Sequence[str], kind: str = "plot") -> str:
    return (
        f'<svg class="{kind}" viewBox="0 0 {frame.width} {frame.height}" role="img" aria-label="{escape(title)}">'
        f"{''.join(parts)}</svg>"
    )
