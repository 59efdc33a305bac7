"""The report's figures: SVG drawn by matplotlib, whose colours are the page's own, so that they turn dark with it."""

import io
import re
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Drawn in colours that occur nowhere else, which then become CSS variables: matplotlib knows no variables.
INK, MUTED, LINE, BLUE, ORANGE = "#010101", "#020202", "#030303", "#040404", "#050505"
_VARIABLES = {INK: "--ink", MUTED: "--muted", LINE: "--line", BLUE: "--blue", ORANGE: "--orange"}
MAX_POINTS = 400  # of a curve: more than a screen shows


def curve(
    title: str,
    train: Sequence[tuple[int, float]],
    val: Sequence[tuple[int, float]],
    stages: Sequence[tuple[str, int]],
    *,
    percent: bool = False,
) -> str:
    """A figure over the run's steps: training as a line, validation as points; `stages` are names and first steps."""
    figure, axes = _figure(4.6, 2.6)
    if train:
        x, y = _thinned(train)
        axes.plot(x, y, color=BLUE, linewidth=1.4, label="training")
    if val:
        x, y = np.array(val, np.float64).T
        axes.plot(x, y, color=ORANGE, linewidth=1.4, marker="o", markersize=3.5, label="validation")
    for i, (name, first) in enumerate(stages):
        if i:
            axes.axvline(first, color=MUTED, linewidth=0.8, linestyle=(0, (3, 3)))
        if len(stages) > 1:
            told = name if len(stages) <= 4 and len(name) <= 12 else str(i + 1)
            axes.annotate(told, (first, 1), xycoords=("data", "axes fraction"), xytext=(3, -8),
                          textcoords="offset points", fontsize=8.5, color=MUTED)  # fmt: skip
    if percent:
        axes.yaxis.set_major_formatter(lambda v, _: f"{v:.0%}" if abs(100 * v - round(100 * v)) < 1e-6 else f"{v:.1%}")
    if train and val:
        _legend(axes)
    axes.set_xlabel("step")
    return _svg(figure, title)


def reliability(
    count: Int[np.ndarray, " bins"], confidence: Float[np.ndarray, " bins"], right: Float[np.ndarray, " bins"]
) -> str:
    """Accuracy against confidence in each interval: on the diagonal, the model is right as often as it says."""
    figure, axes = _figure(4.6, 3.4)
    width, some = 1 / len(count), count > 0
    left = np.arange(len(count)) * width
    axes.bar(left[some], right[some], width * 0.92, align="edge", color=BLUE, alpha=0.75, linewidth=0)
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (3, 3)))
    axes.plot(confidence[some], right[some], color=ORANGE, linewidth=1.2, marker="o", markersize=3.5)
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="confidence", ylabel="accuracy")
    _percent(axes.xaxis)
    _percent(axes.yaxis)
    return _svg(figure, "Reliability: accuracy against confidence")


def confidences(right: Float[np.ndarray, " n"], wrong: Float[np.ndarray, " m"]) -> str:
    """How sure the model is where it is right, and where it is wrong."""
    figure, axes = _figure(4.6, 3.4)
    edges = np.linspace(0, 1, 26)
    axes.hist([right, wrong], edges, stacked=True, color=[BLUE, ORANGE], alpha=0.8, linewidth=0,
              label=["right", "wrong"], rwidth=0.92)  # fmt: skip
    axes.set(xlim=(0, 1), xlabel="confidence", ylabel="images")
    axes.yaxis.get_major_locator().set_params(integer=True)
    _percent(axes.xaxis)
    _legend(axes)
    return _svg(figure, "Confidence of right and wrong predictions")


def heatmap(counts: Int[np.ndarray, "k k"]) -> str:
    """A confusion matrix too large for numbers: each row's shares as tints, right ones blue, wrong ones orange."""
    figure, axes = _figure(6.4, 6.2)
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    # The tint is the alpha: it works on a light and on a dark page. The power makes a few mistakes in many visible.
    picture = np.zeros((*counts.shape, 4), np.uint8)
    picture[..., :3] = (240, 110, 30)
    np.einsum("iic->ic", picture)[:, :3] = (59, 130, 246)
    picture[..., 3] = np.rint(255 * share**0.35)
    axes.imshow(picture, interpolation="none", aspect="equal")
    axes.set(xlabel="predicted class, by index", ylabel="true class, by index")
    axes.grid(visible=False)
    return _svg(figure, "Confusion matrix")


def _figure(width: float, height: float) -> tuple["Figure", Any]:
    from matplotlib.figure import Figure  # takes half a second, and only a report needs it

    # Margins in inches, not a layout engine: it would draw everything twice.
    figure = Figure(figsize=(width, height))
    left, right, bottom, top = 0.68, 0.2, 0.5, 0.26
    axes = figure.add_axes((left / width, bottom / height, 1 - (left + right) / width, 1 - (bottom + top) / height))
    axes.grid(color=LINE, linewidth=0.7)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(LINE)
    axes.tick_params(colors=MUTED, labelsize=9.5, length=0, pad=5)
    axes.xaxis.label.set(color=MUTED, fontsize=9.5)
    axes.yaxis.label.set(color=MUTED, fontsize=9.5)
    return figure, axes


def _legend(axes: Any) -> None:
    """Above the axes, where no curve can run through it."""
    axes.legend(frameon=False, fontsize=9, labelcolor=INK, handlelength=1.2, ncols=2, loc="lower right",
                bbox_to_anchor=(1, 1.05), borderaxespad=0, borderpad=0)  # fmt: skip


def _percent(axis: Any) -> None:
    axis.set_ticks(np.linspace(0, 1, 6), [f"{v:.0%}" for v in np.linspace(0, 1, 6)])


def _thinned(points: Sequence[tuple[int, float]]) -> tuple[np.ndarray, np.ndarray]:
    """At most `MAX_POINTS` means of neighbours; a gap where a value is not finite."""
    x, y = np.array(points, np.float64).T
    y[~np.isfinite(y)] = np.nan
    groups = np.array_split(np.arange(len(x)), min(len(x), MAX_POINTS))
    return np.array([x[g].mean() for g in groups]), np.array([y[g].mean() for g in groups])


def _svg(figure: "Figure", title: str) -> str:
    """The figure as an `<svg>` to stand in a page: text as text, ids of its own, colours by variables, no size."""
    import matplotlib

    prefix = re.sub(r"\W+", "-", title.lower())
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": prefix, "text.parse_math": False}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # Stage names may be in scripts that matplotlib's font lacks; the browser's has them.
        warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)
        file = io.StringIO()
        figure.savefig(
            file, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", svg)
    svg = (
        re.sub(r'\bid="', f'id="{prefix}-', svg)
        .replace("url(#", f"url(#{prefix}-")
        .replace('href="#', f'href="#{prefix}-')
    )
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    box = re.search(r'viewBox="([^"]*)"', svg)
    assert box is not None
    head = f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{box[1]}" role="img" aria-label="{title}">'
    return re.sub(r"<svg[^>]*>", head, svg, count=1)
