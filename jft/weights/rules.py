"""Rules: their parameter name ↔ ours, with an invertible operation; and what of a file they explain."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Protocol, runtime_checkable

import numpy as np

from jft.errors import printable
from jft.preprocess import Preprocess

HEAD = "head"  # the part that may be absent from a file, or made for other classes


class Shapes(dict[str, tuple[int, ...]]):
    """A model's names and shapes, and what these do not tell but some formats spell out: its attention heads."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], heads: int = 0):
        super().__init__(shapes)
        self.heads = heads


@runtime_checkable
class Op(Protocol):
    """Their arrays to our one, and back."""

    def to_ours(self, *theirs: np.ndarray) -> np.ndarray:
        """Our array from theirs, in the order of the rule's names."""

    def to_theirs(self, ours: np.ndarray) -> tuple[np.ndarray, ...]:
        """Their arrays from ours."""


@dataclass(frozen=True)
class Transpose:
    """Axes in another order: `axes` are theirs in our order."""

    axes: tuple[int, ...] | None = None  # None: as they are

    def to_ours(self, *theirs: np.ndarray) -> np.ndarray:
        """A view of theirs."""
        return theirs[0] if self.axes is None else theirs[0].transpose(self.axes)

    def to_theirs(self, ours: np.ndarray) -> tuple[np.ndarray, ...]:
        """A view of ours."""
        return (ours if self.axes is None else ours.transpose(np.argsort(self.axes)),)


@dataclass(frozen=True)
class Reshape:
    """Another shape, e.g. for a linear layer kept as a 1×1 convolution; `op` follows on our side."""

    theirs: tuple[int, ...]
    between: tuple[int, ...]
    op: Op = Transpose()

    def to_ours(self, *theirs: np.ndarray) -> np.ndarray:
        """Theirs reshaped to `between`, then the operation."""
        return self.op.to_ours(theirs[0].reshape(self.between))

    def to_theirs(self, ours: np.ndarray) -> tuple[np.ndarray, ...]:
        """The operation undone, then the shape."""
        return (self.op.to_theirs(ours)[0].reshape(self.theirs),)


@dataclass(frozen=True)
class Concat:
    """Parts kept apart by them and joined by us along `axis`, e.g. query, key and value: so many, or shares of it."""

    parts: int | tuple[int, ...]
    axis: int = -1
    op: Op = Transpose()

    def to_ours(self, *theirs: np.ndarray) -> np.ndarray:
        """Each part by `op`, then joined."""
        return np.concatenate([self.op.to_ours(part) for part in theirs], self.axis)

    def to_theirs(self, ours: np.ndarray) -> tuple[np.ndarray, ...]:
        """Cut into parts, then `op` undone on each."""
        shares = (1,) * self.parts if isinstance(self.parts, int) else self.parts
        cuts = np.cumsum(shares)[:-1] * ours.shape[self.axis] // sum(shares)
        return tuple(self.op.to_theirs(part)[0] for part in np.split(ours, cuts, self.axis))


@dataclass(frozen=True)
class Leading:
    """`count` leading axes of length 1 that we have and they leave out."""

    count: int

    def to_ours(self, *theirs: np.ndarray) -> np.ndarray:
        """A view of theirs."""
        return theirs[0].reshape((1,) * self.count + theirs[0].shape)

    def to_theirs(self, ours: np.ndarray) -> tuple[np.ndarray, ...]:
        """A view of ours."""
        return (ours.reshape(ours.shape[self.count :]),)


SAME = Transpose()
LINEAR = Transpose((1, 0))  # (out, in) ↔ (in, out)
CONV = Transpose((2, 3, 1, 0))  # OIHW ↔ HWIO


@dataclass(frozen=True)
class Rule:
    """One array of ours and where a format keeps it; several of theirs may make one of ours.

    A rule without ours names what the format carries and we leave out, by a pattern if need be; `fill` is then what an
    export writes there, and `why` is told.

    >>> Rule("fc.weight", "head/kernel", LINEAR)
    >>> Rule("bn1.num_batches_tracked", None, fill=np.int64(0))
    >>> Rule("text_model.*", None, why="the text tower")
    """

    theirs: str | tuple[str, ...]
    ours: str | None
    op: Op = SAME
    fill: np.generic | None = None
    resize: bool = False  # a position embedding, which may be resized to the model's grid
    why: str = "the format has it, the model does not"
    needed: bool = False  # a file without it is of another format, though ours has no place for it

    @property
    def names(self) -> tuple[str, ...]:
        """Their names, as a tuple in any case."""
        return (self.theirs,) if isinstance(self.theirs, str) else self.theirs

    def shapes(self, ours: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """The shapes theirs must have for ours to have this one."""
        # A broadcast byte has any shape and takes no memory, so the operation itself answers.
        return tuple(part.shape for part in self.op.to_theirs(np.broadcast_to(np.uint8(0), ours)))


@dataclass(frozen=True)
class Source:
    """Weights to be had: where, and what was done to the pictures they were trained on."""

    uri: str
    preprocess: Preprocess
    data: str  # what they were trained on, the last last
    licence: str
    paper: str


def linear(theirs: str, ours: str) -> list[Rule]:
    """The rules of a fully connected layer."""
    return [Rule(f"{theirs}.weight", f"{ours}/kernel", LINEAR), Rule(f"{theirs}.bias", f"{ours}/bias")]


def conv(theirs: str, ours: str) -> list[Rule]:
    """The rules of a convolution."""
    return [Rule(f"{theirs}.weight", f"{ours}/kernel", CONV), Rule(f"{theirs}.bias", f"{ours}/bias")]


def norm(theirs: str, ours: str) -> list[Rule]:
    """The rules of a LayerNorm or GroupNorm."""
    return [Rule(f"{theirs}.weight", f"{ours}/scale"), Rule(f"{theirs}.bias", f"{ours}/bias")]


def batch_norm(theirs: str, ours: str) -> list[Rule]:
    """The rules of a BatchNorm, running statistics included."""
    return [
        *norm(theirs, ours),
        Rule(f"{theirs}.running_mean", f"{ours}/mean"),
        Rule(f"{theirs}.running_var", f"{ours}/var"),
        Rule(f"{theirs}.num_batches_tracked", None, fill=np.int64(0)),
    ]


def present(rules: Sequence[Rule], ours: Collection[str]) -> tuple[Rule, ...]:
    """The rules whose array this model has: a layer without bias has no rule for one."""
    return tuple(rule for rule in rules if rule.ours is None or rule.ours in ours)


def to_theirs(rules: Sequence[Rule], ours: Mapping[str, np.ndarray], dtype: np.dtype) -> dict[str, np.ndarray]:
    """Our arrays under a format's names; mostly views, so that a writer holds one tensor at a time."""
    tensors: dict[str, np.ndarray] = {}
    for rule in rules:
        if rule.ours is None:
            if rule.fill is not None:
                tensors |= {name: np.asarray(rule.fill) for name in rule.names}
        else:
            parts = rule.op.to_theirs(ours[rule.ours].astype(dtype, copy=False))
            tensors |= dict(zip(rule.names, parts, strict=True))
    return tensors


def is_float(dtype: np.dtype) -> bool:
    """Whether these are floating-point numbers; NumPy itself does not count those of ml_dtypes among them."""
    return dtype.kind == "f" or dtype.name in ("bfloat16", "float8_e4m3fn", "float8_e5m2")


@dataclass
class Match:
    """A format's rules held against a file: what each is for, and the differences that no rule explains."""

    use: list[Rule] = field(default_factory=list)
    drop: dict[str, str] = field(default_factory=dict)  # their name → why it is left out
    resize: list[Rule] = field(default_factory=list)
    replace: dict[str, str] = field(default_factory=dict)  # our name → why the file's is not taken
    missing: list[str] = field(default_factory=list)  # our names to be freshly initialised
    differences: list[str] = field(default_factory=list)

    @property
    def reading(self) -> set[Rule]:
        """What is taken from the file; two formats of one reading are one."""
        return {*self.use, *self.resize}

    @property
    def fits(self) -> bool:
        """Whether nothing is left unexplained."""
        return not self.differences


def match(
    rules: Sequence[Rule],
    ours: Mapping[str, tuple[int, ...]],
    theirs: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    *,
    keep_head: bool = True,
    skip: Collection[str] = (),
) -> Match:
    """Hold rules against a model's names and shapes and a file's names, shapes and dtypes.

    Unexplained differences start with `-` (missing in the file), `+` (in the file, used by nothing) or `~` (another
    shape or dtype). `skip` holds patterns of their or our names that are left out, or freshly initialised, on purpose.
    """
    result = Match()
    known: set[str] = set()
    filled: set[str] = set()

    def skipped(*names: str) -> bool:
        return any(fnmatchcase(name, pattern) for name in names for pattern in skip)

    for rule in rules:
        if rule.ours is None:
            there = [
                n for p in rule.names for n in ((p,) if "*" not in p else theirs) if fnmatchcase(n, p) and n in theirs
            ]
            known.update(there)
            result.drop |= {name: rule.why for name in there}
            if rule.needed and not there:
                result.differences += [f"- {name}" for name in rule.names]
            continue
        known.update(rule.names)
        there = [name for name in rule.names if name in theirs]
        filled.add(rule.ours)
        head = rule.ours.startswith(HEAD + "/")
        if skipped(rule.ours, *rule.names):
            result.drop |= {name: "left out on request" for name in there}
            result.missing.append(rule.ours)
            continue
        if len(there) < len(rule.names):
            if head and not there:
                result.missing.append(rule.ours)
            else:
                absent = [name for name in rule.names if name not in theirs]
                result.differences += [f"- {name}  ({rule.ours} {ours[rule.ours]})" for name in absent]
            continue
        wrong = []
        for name, expected in zip(rule.names, rule.shapes(ours[rule.ours]), strict=True):
            shape, dtype = theirs[name]
            if not is_float(dtype):
                result.differences.append(f"~ {name}: the file has {dtype} numbers, expected floating point")
            elif shape != expected:
                wrong.append((name, shape, expected))
        if head and (wrong or not keep_head):
            shapes = " and ".join(str(theirs[name][0]) for name in rule.names)
            result.replace[rule.ours] = f"{shapes} in the file" if wrong else "a new one was asked for"
            result.drop |= {name: "the head is new" for name in rule.names}
            result.missing.append(rule.ours)
        elif wrong and rule.resize and all(len(s) == len(e) and s[-1] == e[-1] for _, s, e in wrong):
            result.resize.append(rule)
        elif wrong:
            result.differences += [f"~ {n}: {s} in the file, {e} in the model ({rule.ours})" for n, s, e in wrong]
        else:
            result.use.append(rule)
    for name in theirs:
        if name not in known:
            if skipped(name):
                result.drop[name] = "left out on request"
            else:
                result.differences.append(f"+ {name}  {theirs[name][0]}")
    for name in ours:
        if name not in filled:
            if skipped(name) or name.startswith(HEAD + "/"):
                result.missing.append(name)
            else:
                result.differences.append(f"- nothing in this format makes {name} {ours[name]}")
    _whole_head(result, ours)
    return result


def _whole_head(result: Match, ours: Mapping[str, tuple[int, ...]]) -> None:
    """A head is kept or made anew as a whole: a new kernel under an old bias would be neither."""
    if not any(name.startswith(HEAD + "/") for name in result.missing):
        return
    for rule in [rule for rule in result.use if rule.ours and rule.ours.startswith(HEAD + "/")]:
        assert rule.ours is not None
        result.use.remove(rule)
        result.missing.append(rule.ours)
        result.replace[rule.ours] = "the rest of the head is new"
        result.drop |= {name: "the head is new" for name in rule.names}


def shown(differences: Sequence[str], limit: int = 6) -> str:
    """The differences, a few of each kind, and how many there are."""
    lines = []
    for sign, meaning in (("-", "missing in the file"), ("+", "in the file, not in the model"), ("~", "different")):
        some = [line for line in differences if line.startswith(sign)]
        lines += [f"  {printable(line)}" for line in some[:limit]]
        if len(some) > limit:
            lines.append(f"  {sign} … and {len(some) - limit} more {meaning}")
    return "\n".join(lines)
