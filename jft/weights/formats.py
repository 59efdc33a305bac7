"""Pretrained weights into a model, by the format whose rules explain every tensor."""

import contextlib
import json
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from jft.errors import UserError, near, printable
from jft.preprocess import Preprocess
from jft.weights import augreg, big_vision, bit, native, original, timm, torchvision, transformers
from jft.weights.hub import Located, locate, with_header
from jft.weights.layout import contiguous
from jft.weights.readers import WeightFile, open_weights
from jft.weights.resample import resample_pos_embed, resample_rel_pos
from jft.weights.rules import HEAD, Match, Rule, Shapes, Source, match, shown


class Format(Protocol):
    """A module of rules, or an object like one."""

    @property
    def SOURCES(self) -> Mapping[str, Source]:
        """Weights in this format to be had, by model."""

    @property
    def rules(self) -> Callable[[Mapping[str, tuple[int, ...]]], tuple[Rule, ...]]:
        """Rules for a model's names and shapes; none where the format has no such model."""


_PROJECTION = "CLIP's projection into the space shared with text, which is no classifier"

# Where two formats mean the same by the same names, the first is the one that is named.
FORMATS: dict[str, Format] = {
    "torchvision": torchvision,
    "torchvision-v1": torchvision.FIRST,
    "timm": timm,
    "hf": transformers.HF,
    "hf-v5": transformers.HF_V5,
    "hf-bare": transformers.HF_BARE,
    "hf-bare-v5": transformers.HF_BARE_V5,
    "deit3": original.DEIT3,
    "dino": original.DINO,
    "dinov2": original.DINOV2,
    "clip": original.CLIP,
    "open-clip": original.OPEN_CLIP,
    "augreg": augreg.AUGREG,
    "augreg-in21k": augreg.WITH_PRE_LOGITS,
    "big-vision": big_vision.PLAIN,
    "big-vision-two-tower": big_vision.TWO_TOWER,
    "bit": bit,
    "jft": native,
}


@runtime_checkable
class Model(Protocol):
    """What is asked of a model: `jft.models.base.Model` has it."""

    @property
    def name(self) -> str:
        """As in the table of models."""

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of one example."""

    @property
    def num_classes(self) -> int:
        """Of the head."""

    def shapes(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Shapes of parameters and of batch statistics, by name."""


@dataclass(frozen=True)
class Receipt:
    """What was done with every tensor of a file, and with every array of the model that the file did not fill."""

    model: str
    source: str
    format: str
    sha256: str
    prefix: str = ""
    used: dict[str, str] = field(default_factory=dict)  # their name → ours
    dropped: dict[str, str] = field(default_factory=dict)  # their name → why
    replaced: dict[str, str] = field(default_factory=dict)  # our name → why
    resized: dict[str, str] = field(default_factory=dict)  # our name → from what to what
    missing: tuple[str, ...] = ()  # our names, freshly initialised
    not_finite: tuple[str, ...] = ()  # their names
    preprocess: str = ""  # where the preprocessing was found
    notes: tuple[str, ...] = ()
    direction: str = "from"  # `to` a file for an export

    def json(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in vars(self).items()}

    def __str__(self) -> str:
        if not self.source:
            return f"{self.model}: {len(self.missing)} tensors freshly initialised, no pretrained weights"
        lines = [f"{self.model} {self.direction} {self.source} ({self.format}, sha256 {self.sha256[:12]}…)"]
        counts = [f"{len(self.used)} tensors {'used' if self.direction == 'from' else 'written'}"]
        for what, why in _grouped(self.dropped):
            counts.append(f"{what} dropped ({why})")
        lines.append("  " + "; ".join(counts))
        if self.replaced:
            lines.append("  replaced: " + "; ".join(f"{name} ({why})" for name, why in self.replaced.items()))
        lines += [f"  resized: {name} ({how})" for name, how in self.resized.items()]
        fresh = [name for name in self.missing if name not in self.replaced]
        if fresh:
            lines.append(f"  not in the file, freshly initialised: {some(fresh)}")
        if self.prefix:
            lines.append(f"  the prefix {self.prefix!r} of every name was taken off")
        lines += [f"  {note}" for note in (self.preprocess, *self.notes) if note]
        if self.not_finite:
            lines.append(f"  warning: NaN or infinity in {some(list(self.not_finite))}")
        return "\n".join(map(printable, lines))  # names in a file may hold anything


def _grouped(reasons: Mapping[str, str]) -> list[tuple[str, str]]:
    by_reason: dict[str, list[str]] = {}
    for name, why in reasons.items():
        by_reason.setdefault(why, []).append(name)
    return [(some(names), why) for why, names in by_reason.items()]


def some(names: list[str], limit: int = 4) -> str:
    """A few names and how many more; names alike but for their place are told by their endings or their beginning."""
    if len(names) > limit:
        endings = {name.rpartition(".")[2] for name in names}
        if len(endings) == 1:
            return f"{len(names)} × …{names[0][-len(endings.pop()) - 1 :]}"
        beginnings: dict[str, int] = {}
        for name in names:
            beginning = re.split(r"[./]", name)[0]
            beginnings[beginning] = beginnings.get(beginning, 0) + 1
        if len(beginnings) <= limit:
            return ", ".join(
                f"{count} × {beginning}…" if count > 1 else beginning for beginning, count in beginnings.items()
            )
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


@dataclass(frozen=True)
class Loaded:
    """Weights as NumPy arrays under a model's names, with what belongs to them."""

    params: dict[str, np.ndarray]
    batch_stats: dict[str, np.ndarray]
    missing: tuple[str, ...]  # names to be freshly initialised, such as a new head's
    receipt: Receipt
    preprocess: Preprocess
    classes: tuple[str, ...] | None  # of the head, where it was kept and they are known
    sha256: str | None
    path: Path | None
    multi_label: bool = False  # whether that head is known to tell of several labels an image
    quantities: bool = False  # or of quantities, whose names are `classes`
    head: Mapping[str, np.ndarray] = field(default_factory=dict)  # the weights' own, where an objective takes it


def default_source(name: str) -> Source:
    """The source a model of this name has without anybody naming one. Raises UserError where there is none."""
    for module in FORMATS.values():
        if name in module.SOURCES:
            return module.SOURCES[name]
    known = sorted({name for module in FORMATS.values() for name in module.SOURCES})
    raise UserError(
        f"{name} has no default weights; pass a file, hf:ORG/REPO, or `none` to start from scratch. "
        f"Models with default weights: {', '.join(known)}."
    )


def load(
    model: Model,
    source: str | Path | None = None,
    *,
    format: str | None = None,
    keep_head: bool = True,
    skip: Collection[str] = (),
) -> Loaded:
    """Pretrained weights for a model, as float32 arrays under its names.

    `source` is a file, a folder, `hf:ORG/REPO[@REVISION][:FILE]`, `https://…#sha256=HEX`, or None for the model's
    default. The format is the one whose rules explain every tensor of the file and fill every name of the model; the
    head may be absent, and is left to fresh initialisation (`missing`) where its classes are of another number or
    `keep_head` is false. `skip` holds patterns of their or our names to leave out on purpose. Raises UserError with the
    differences where no format fits.

    >>> loaded = load(make_model("resnet50", num_classes=2), "resnet50.safetensors")
    >>> print(loaded.receipt)
    """
    uri = default_source(model.name).uri if source is None else source
    located = locate(uri)
    ours, stats = _shapes(model)
    with open_weights(located.path) as file:
        chosen, found = _choose(model, ours, file, located, format, keep_head, skip)
        sizes = _sizes(with_header(located, file.metadata), file.metadata)
        sizes += [_size(model)] if chosen == "jft" else []  # which may be of any grid, and an .npz does not say
        _resize_other_grids(found, model, ours, sizes)
        arrays: dict[str, np.ndarray] = {}
        resized: dict[str, str] = {}
        not_finite: list[str] = []
        for rule in (*found.use, *found.resize):
            assert rule.ours is not None
            array, finite = _converted(rule, file)
            if not finite:
                not_finite.extend(rule.names)
            if rule in found.resize:
                array, resized[rule.ours] = _resize(
                    array, model, ours, rule.ours, sizes, f"{file.path}: {rule.names[0]!r}"
                )
            arrays[rule.ours] = array
        notes = [*file.notes, *_cast_note(file, found), *_epsilon_note(model, located), *_act_note(model, located)]
        notes += _padding_note(located)
        sha256 = file.sha256
    located = with_header(located, file.metadata)
    preprocess, told = _preprocess(model, chosen, located)
    receipt = Receipt(
        model=model.name,
        source=located.origin,
        format=chosen,
        sha256=sha256,
        prefix=file.prefix,
        used={name: rule.ours or "" for rule in (*found.use, *found.resize) for name in rule.names},
        dropped=found.drop,
        replaced=found.replace,
        resized=resized,
        missing=tuple(sorted(found.missing)),
        not_finite=tuple(not_finite),
        preprocess=told,
        notes=tuple(notes),
    )
    headless = any(name.startswith(HEAD + "/") for name in found.missing)
    classes = None if headless else located.classes
    answer = None if headless else located.answer(model.num_classes)
    return Loaded(
        params={name: array for name, array in arrays.items() if name not in stats},
        batch_stats={name: array for name, array in arrays.items() if name in stats},
        missing=receipt.missing,
        receipt=receipt,
        preprocess=preprocess,
        classes=classes if classes and len(classes) == model.num_classes else None,
        sha256=sha256,
        path=located.path,
        multi_label=answer == transformers.SEVERAL,
        quantities=answer == transformers.NUMBERS,
    )


def head_size(
    model: Model, source: str | Path | None = None, *, format: str | None = None, skip: Collection[str] = ()
) -> int | None:
    """The number of classes of the head in these weights, whatever the model's; None where they have no head.

    >>> n = head_size(make_model("resnet50"), "food101.pth")
    >>> model = make_model("resnet50", num_classes=n)
    """
    with _head_rules(model, source, format, skip) as (file, rules):
        for rule in rules:
            # The operation on a byte broadcast to their shape has our shape; our last axis is the classes.
            return rule.op.to_ours(*(np.broadcast_to(np.uint8(0), file.shape(name)) for name in rule.names)).shape[-1]
    return None


def read_head(
    model: Model, source: str | Path | None = None, *, format: str | None = None, skip: Collection[str] = ()
) -> dict[str, np.ndarray]:
    """`kernel` [d, k] and `bias` [k] of the head in these weights, whatever the model's; nothing where there is none.

    >>> read_head(make_model("resnet50", num_classes=2), "resnet50.safetensors")["kernel"].shape
    (2048, 1000)
    """
    with _head_rules(model, source, format, skip) as (file, rules):
        return {(rule.ours or "").removeprefix(f"{HEAD}/"): _converted(rule, file)[0] for rule in rules}


@contextlib.contextmanager
def _head_rules(
    model: Model, source: str | Path | None, format: str | None, skip: Collection[str]
) -> Iterator[tuple[WeightFile, list[Rule]]]:
    """A weight file, open, and the rules of the head that it has."""
    located = locate(default_source(model.name).uri if source is None else source)
    ours, _ = _shapes(model)
    with open_weights(located.path) as file:
        chosen, found = _choose(model, ours, file, located, format, True, skip)
        projections = {name for name, why in found.drop.items() if why == _PROJECTION}
        yield (
            file,
            [
                rule
                for rule in FORMATS[chosen].rules(ours)
                if (rule.ours or "").startswith(f"{HEAD}/") and set(rule.names) <= set(file.names) - projections
            ],
        )


def scratch(model: Model) -> Loaded:
    """No weights: every name of the model is missing."""
    names = tuple(sorted(_shapes(model)[0]))
    receipt = Receipt(model.name, "", "", "", missing=names)
    return Loaded({}, {}, names, receipt, Preprocess(size=_size(model)), None, None, None)


def _choose(
    model: Model,
    ours: Mapping[str, tuple[int, ...]],
    file: WeightFile,
    located: Located,
    format: str | None,
    keep_head: bool,
    skip: Collection[str],
) -> tuple[str, Match]:
    if format is not None and format not in FORMATS:
        raise UserError(f"There is no weight format {format!r}.{near(format, FORMATS)} Known: {', '.join(FORMATS)}.")
    theirs = {name: (file.shape(name), file.dtype(name)) for name in file.names}
    tried: dict[str, tuple[tuple[Rule, ...], Match]] = {}
    for name in (format,) if format else FORMATS:
        if rules := FORMATS[name].rules(ours):
            tried[name] = (rules, match(rules, ours, theirs, keep_head=keep_head, skip=skip))
    if not tried:
        raise UserError(f"The format {format} has no names for {model.name}.")
    fitting = {name: pair for name, pair in tried.items() if pair[1].fits}
    if not fitting:
        raise UserError(_misfit(model.name, file, {name: found for name, (_, found) in tried.items()}))
    first, (_, found) = next(iter(fitting.items()))
    if others := [name for name, (_, other) in fitting.items() if other.reading != found.reading]:
        raise UserError(
            f"{file.path} can be read in more than one way: as {first} and as {', '.join(others)}, with different "
            f"results. Say which it is: `jft import … --format {first} --out W.safetensors` makes a file that has one "
            f"meaning; in Python, load(…, format={first!r})."
        )
    if first == "timm" and (heads := _projection(fitting[first][0], ours, file, located)):
        found = match(fitting[first][0], ours, theirs, skip=(*skip, f"{HEAD}/*"))
        found.drop |= dict.fromkeys(heads, _PROJECTION)
    return first, found


def _projection(
    rules: Sequence[Rule], ours: Mapping[str, tuple[int, ...]], file: WeightFile, located: Located
) -> list[str]:
    """What timm calls a CLIP's head and is its projection into the space shared with text; nothing of a classifier's.

    The projection has no bias: timm writes zeros for it. That of a classifier is trained, or its classes have names.
    """
    if "embed/norm/scale" not in ours or with_header(located, file.metadata).classes:
        return []
    heads = {rule.ours: rule.names[0] for rule in rules if rule.ours in (f"{HEAD}/kernel", f"{HEAD}/bias")}
    names = [name for name in heads.values() if name in file.names]
    return names if len(names) == 2 and not np.any(file.read(heads[f"{HEAD}/bias"]) != 0) else []


def _misfit(model: str, file: WeightFile, tried: Mapping[str, Match]) -> str:
    closest = min(tried, key=lambda name: len(tried[name].differences))
    differences = tried[closest].differences
    count = {sign: sum(line.startswith(sign) for line in differences) for sign in "-+~"}
    among = f", the closest of {', '.join(tried)}" if len(tried) > 1 else ""
    return (
        f"{file.path} holds other weights than {model} needs. As {closest} names them{among}:\n{shown(differences)}\n"
        f"{len(tried[closest].use)} of the model's arrays fit, {count['-']} are missing, {count['+']} of the file's "
        f"tensors are not used, {count['~']} differ. Choose the model that these weights are of, or leave tensors "
        "out on purpose: `jft import … --skip NAME --out W.safetensors`; in Python, load(…, skip=('NAME', …))."
    )


def _converted(rule: Rule, file: WeightFile) -> tuple[np.ndarray, bool]:
    array = rule.op.to_ours(*(file.read(name) for name in rule.names))
    with np.errstate(over="ignore"):  # a float64 too large for float32 shows as an infinity, which is reported
        array = contiguous(array, np.dtype(np.float32))
    return array, bool(np.isfinite(array).all())


def _cast_note(file: WeightFile, found: Match) -> list[str]:
    dtypes = [str(file.dtype(name)) for rule in (*found.use, *found.resize) for name in rule.names]
    others = sorted({d for d in dtypes if d != "float32"})
    return [f"converted to float32: {sum(d == o for d in dtypes)} tensors of {o}" for o in others]


def _epsilon_note(model: Any, located: Located) -> list[str]:
    """transformers keeps the epsilon of its LayerNorms in `config.json`, and its default is not timm's."""
    theirs = located.configs.get("config.json", {}).get("layer_norm_eps")
    ours = getattr(getattr(model, "parts", {}).get("norm"), "epsilon", None)
    if not isinstance(theirs, float) or ours is None or theirs == ours:
        return []
    return [f"config.json says that LayerNorms add {theirs:g} to the variance; this model adds {ours:g}"]


def _act_note(model: Any, located: Located) -> list[str]:
    """The same names hold for CLIP with the exact GELU and with OpenAI's; `config.json` tells them apart."""
    config = located.configs.get("config.json", {})
    tower = config.get("vision_config")
    theirs = (tower if isinstance(tower, dict) else config).get("hidden_act")
    theirs = {"gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}.get(str(theirs), theirs)
    ours = getattr(getattr(model, "parts", {}).get("block0"), "act", None)
    if theirs is None or ours is None or theirs == ours or ours == "swiglu":
        return []
    return [f"config.json says that MLPs have the activation {theirs}; this model has {ours}: see its option act"]


def _padding_note(located: Located) -> list[str]:
    """transformers' BiT can pad as TensorFlow does, by the picture's size; ours pads as timm's."""
    theirs = located.configs.get("config.json", {}).get("global_padding")
    return [f"config.json pads convolutions by {theirs!r}; this model by half of the filter"] if theirs else []


def _sizes(located: Located, metadata: Mapping[str, str]) -> list[tuple[int, int]]:
    """Heights and widths of pictures for which a file, or the JSON beside it, says that its weights are."""
    config = located.configs.get("config.json", {})
    tower = config.get("vision_config")
    said = [config.get("image_size"), tower.get("image_size") if isinstance(tower, dict) else None]
    with contextlib.suppress(KeyError, ValueError, RecursionError):
        said.insert(0, json.loads(metadata["image_size"]))
    found = [[size] * 2 if isinstance(size, int) else size for size in said if isinstance(size, int | list)]
    found += [list(located.preprocess.size)] if located.preprocess else []
    return [(s[0], s[1]) for s in found if len(s) == 2 and all(isinstance(n, int) and n > 0 for n in s)]


def _resize_other_grids(
    found: Match, model: Model, ours: Mapping[str, tuple[int, ...]], sizes: Sequence[tuple[int, int]]
) -> None:
    """Have position embeddings resized too that are as many as the model's and lie on another grid: 4×4, not 2×8."""
    for rule in [rule for rule in found.use if rule.resize]:
        assert rule.ours is not None
        relative, grid = rule.ours.endswith("rel_pos"), _grid(model.input_shape, ours)
        if _their_grid(_cells(grid, relative), ours, sizes, relative) not in (grid, None):
            found.use.remove(rule)
            found.resize.append(rule)


def _resize(
    array: np.ndarray,
    model: Model,
    ours: Mapping[str, tuple[int, ...]],
    name: str,
    sizes: Sequence[tuple[int, int]],
    where: str,
) -> tuple[np.ndarray, str]:
    new_grid, relative = _grid(model.input_shape, ours), name.endswith("rel_pos")
    axis = 0 if relative else 1
    count, prefix = array.shape[axis], ours[name][axis] - _cells(new_grid, relative)
    if (grid := _their_grid(count - prefix, ours, sizes, relative)) is None:
        raise UserError(
            f"{where} has {count} positions, {prefix} of them beside the grid: the rest is no square, so its "
            "height and width are unknown and it cannot be resized. Make the model at the size of its training; "
            "or other tokens have positions in these weights than the model's option positions gives them to."
        )
    resize = resample_rel_pos if relative else resample_pos_embed
    return resize(array, grid, new_grid), f"{grid[0]}×{grid[1]} → {new_grid[0]}×{new_grid[1]}"


def _grid(size: Sequence[int], ours: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
    """How many patches a picture of this height and width has, one below the other and side by side."""
    patch = ours["embed/patch/kernel"]
    return size[0] // patch[0], size[1] // patch[1]


def _cells(grid: tuple[int, int], relative: bool) -> int:
    """The positions of a grid; of a table of relative ones the rows: one for every offset between two patches."""
    return (2 * grid[0] - 1) * (2 * grid[1] - 1) if relative else grid[0] * grid[1]


def _their_grid(
    count: int, ours: Mapping[str, tuple[int, ...]], sizes: Sequence[tuple[int, int]], relative: bool
) -> tuple[int, int] | None:
    """The grid of so many positions: that of the first size which has as many, else a square; None if neither is."""
    for size in sizes:
        grid = _grid(size, ours)
        if min(grid) > 0 and _cells(grid, relative) == count:
            return grid
    root = math.isqrt(max(count, 0))
    if root == 0 or root * root != count or (relative and root % 2 == 0):
        return None
    return ((root + 1) // 2,) * 2 if relative else (root, root)


def _shapes(model: Model) -> tuple[Shapes, set[str]]:
    """Every name's shape, and which names are batch statistics."""
    params, stats = model.shapes()
    return with_heads({name: tuple(leaf.shape) for name, leaf in (params | stats).items()}, model), set(stats)


def with_heads(ours: Mapping[str, tuple[int, ...]], model: Any) -> Shapes:
    """Names and shapes with what they do not tell: the number of attention heads of a model that has them."""
    return Shapes(ours, heads=getattr(getattr(model, "parts", {}).get("block0"), "heads", 0))


def _size(model: Model) -> tuple[int, int]:
    height, width, *_ = model.input_shape
    return height, width


def default_preprocess(model: Model, format: str | None = None) -> tuple[Preprocess, str]:
    """The preprocessing of the model's default weights at the model's own size, and a sentence on whose it is."""
    size = _size(model)
    for name in ((format,) if format else ()) + tuple(FORMATS):
        if source := FORMATS[name].SOURCES.get(model.name):
            return replace(source.preprocess, size=size), f"preprocessing: assumed to be that of {source.uri}"
    return Preprocess(size=size), "preprocessing: unknown, assumed to be torchvision's"


def _preprocess(model: Model, format: str, located: Located) -> tuple[Preprocess, str]:
    if found := located.preprocess:
        return replace(found, size=_size(model)), "preprocessing: from the JSON beside the weights"
    return default_preprocess(model, format)
