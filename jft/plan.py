"""The plan: which names train, at which multiple of the learning rate, for how long. Data, stage after stage."""

import contextlib
import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from jft import tree
from jft.errors import UserError, asked, brief, near

# Parts behind the last block. In layer-wise decay they share the head's depth, as in MAE's and BEiT's code.
TOP = ("norm", "pool", "projection", "head")

# Of a new head's rate for pretrained parts: a tenth. Where these have BatchNorms a hundredth, and the source's running
# statistics: with 5 images a class a ResNet-18 then had 73 and 50 % of two data sets right, 68 and 41 at a tenth and by
# batches' statistics. At a tenth and the source's it had 22 % of CIFAR-10, 57 by batches': weights that move as far no
# longer fit them (benchmarks/README.md).
SHARE, SHARE_BATCH_NORM = 0.1, 0.01

# Of the rate of a head that is trained already, which is a tenth of a new one's, for pretrained parts. Adam moves every
# weight by about its rate a step, whatever the gradient: of 153 ants and bees a ResNet-18 with a new head's 1e-3 lost 8
# in eight steps of its last stage at 2e-4, and 8 in the four stages of `gradual` at 1e-5; at 3e-6 the loss fell.
PRETRAINED_RATE = 0.03


@dataclass(frozen=True)
class Stage:
    """A stretch of training during which one set of parameters trains.

    `train` lists patterns, `"head"` or `("stage4", 0.1)`: a glob over names or over anything above them, and its
    multiple of the learning rate (1 where none is given, 0 for frozen). The first match wins; what none matches is
    frozen.

    >>> Stage("top", train=("head", ("stage4", 0.1)), epochs=5, lr=1e-3)
    """

    name: str
    train: tuple[str | tuple[str, float], ...]
    epochs: float | None = None  # passes over the training set; None: its `share` of the run's epochs
    share: float = 1.0  # of the run's epochs, against the other stages' shares
    lr: float | None = None  # peak learning rate of a multiple of 1; None: the run's
    layer_decay: float = 1.0  # the rate's factor from a part to the part below it
    schedule: str | Callable | None = None  # a name or a function (peak, steps) -> rate by step; None: the run's
    warmup: float | None = None  # share of the stage's steps spent rising to the peak; None: the run's
    batch_norm: str = "auto"  # auto: batch statistics in parts that train; frozen: running statistics everywhere
    augment: tuple[str, ...] | None = None  # None: the run's
    surgical: bool = False  # each part's rate scaled by its relative gradient norm, from 0 to 1

    def patterns(self) -> list[tuple[str, float]]:
        """`train` with every multiplier spelt out."""
        return [(p, 1.0) if isinstance(p, str) else (p[0], float(p[1])) for p in self.train]


@dataclass(frozen=True)
class Lora:
    """Low-rank updates of kernels: W + α/r · A B, flattened to [fan in, out] (Hu et al. 2022, section 4.1).

    Of a kernel `block0/attn/qkv/kernel` they are `block0/attn/qkv/lora_a` and `lora_b`. With `dora` the sum is given
    the norms of W's columns times a learnt `lora_m` (Liu et al. 2024, equation 5, the norm taken as a constant in the
    gradient as in their section 4.3).
    """

    rank: int = 0  # 0: none
    alpha: float | None = None  # None: the rank, so that the scale is 1
    targets: tuple[str, ...] = ("*",)  # patterns over kernels; those of the first part and of the head never count
    dora: bool = False


def overridden(plan: object) -> frozenset[str]:
    """The fields of a config that count for nothing beside a plan of stages, each of which has its own.

    >>> sorted(overridden((Stage("head", ("head",), lr=1e-3, epochs=2),)))
    ['epochs', 'lr']
    """
    usual = {"lr": None, "epochs": None, "augment": None, "layer_decay": 1.0, "schedule": None, "warmup": None}
    stages = plan if isinstance(plan, tuple) else ()
    return frozenset(n for n, none in usual.items() if stages and all(getattr(s, n) != none for s in stages))


def lora_of(plan: object, given: Mapping[str, Any]) -> Lora:
    """The low-rank updates a config asks for: those of the plan `lora` have rank 8 where none is given.

    Raises UserError for that plan with a rank below 1.
    """
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    made = Lora(**{"rank": 8 if plan == "lora" else 0, **values})
    if plan == "lora" and made.rank < 1:
        raise UserError(f"--lora.rank is {made.rank}; the plan lora needs at least 1.")
    return made


def part_of(name: str, parts: Iterable[str]) -> str:
    """The part a parameter belongs to."""
    for part in parts:
        if name.startswith(part + "/"):
            return part
    raise KeyError(name)


def parts_with(names: Iterable[str], parts: Iterable[str]) -> list[str]:
    """The parts, in their order, that hold any of these parameters."""
    names = list(names)
    return [p for p in parts if any(n.startswith(p + "/") for n in names)]


def multipliers(stage: Stage, names: Sequence[str], parts: Sequence[str]) -> dict[str, float]:
    """Each parameter's multiple of the stage's learning rate; 0 is frozen.

    Raises UserError for a pattern that decides nothing and for a stage that trains nothing.
    """
    values = tree.first_match(stage.patterns(), names, 0.0)
    if any(v < 0 for v in values.values()):
        raise UserError(f"Stage {stage.name!r} has a negative multiplier; 0 freezes, above 0 trains.")
    if not any(values.values()):
        raise UserError(f"Stage {stage.name!r} trains nothing: no pattern of {stage.train} has a multiplier above 0.")
    if stage.layer_decay == 1.0:
        return values
    depth = depths(names, parts)
    top = max(depth.values())
    return {n: v * stage.layer_decay ** (top - depth[part_of(n, parts)]) for n, v in values.items()}


def depths(names: Iterable[str], parts: Sequence[str]) -> dict[str, int]:
    """The depth of every part that has parameters, counted from the input; the last norm and pool count as the head."""
    depth: dict[str, int] = {}
    for part in parts_with(names, parts):
        below = [p for p in depth if p not in TOP]
        depth[part] = len(below)
    return depth


def labels(legs: Sequence[Mapping[str, float]], carry: bool = False) -> dict[str, str]:
    """For `optax.multi_transform` in the last of these stages' multipliers: a group an age, `frozen` for the rest.

    Parameters that began to train in the same stage, and have trained ever since, share a group: one optimizer's count
    is right for all of them. Without `carry` every stage begins anew, so all that trains is of one age.
    """
    last = len(legs) - 1
    found = {}
    for name, value in legs[last].items():
        since = last
        while carry and since and legs[since - 1][name]:
            since -= 1
        found[name] = f"since{since}" if value else "frozen"
    return found


def trainable(multipliers: Mapping[str, float]) -> frozenset[str]:
    """The names that train."""
    return frozenset(n for n, v in multipliers.items() if v)


def groups(parts: Sequence[str], count: int = 4) -> list[tuple[str, ...]]:
    """The backbone's parts in `count` or so coarse groups from the input up: a ResNet's stages, even runs of blocks."""
    body = [p for p in parts if p not in TOP]
    prefixes = list(dict.fromkeys(p.split("/")[0] for p in body))
    stem = [p for p in prefixes if p in ("stem", "embed")]
    rest = [p for p in prefixes if p not in stem]
    count = min(count, len(rest))
    cuts = [round(i * len(rest) / count) for i in range(count + 1)] if count else []
    made = [tuple(rest[a:b]) for a, b in zip(cuts, cuts[1:], strict=False)]
    return [tuple(stem) + made[0], *made[1:]] if made else [tuple(stem)]


def head(parts: Sequence[str], lr: float | None = None) -> tuple[Stage, ...]:
    """Linear probe: the head alone."""
    return (Stage("head", ("head",), lr=lr or 1e-3, augment=()),)


def flat(parts: Sequence[str], lr: float | None = None) -> tuple[Stage, ...]:
    """Everything at once and at one rate, the new head too, as published recipes have it."""
    return (Stage("flat", ("*",), lr=lr or 1e-4),)


def _beside(batch_norm: bool) -> tuple[float, str]:
    """The share of a new head's rate for pretrained parts beside it, and the stage's `batch_norm`."""
    return (SHARE_BATCH_NORM, "frozen") if batch_norm else (SHARE, "auto")


def full(
    parts: Sequence[str], lr: float | None = None, *, new_head: bool = True, batch_norm: bool = False
) -> tuple[Stage, ...]:
    """Everything at once, pretrained parts at a tenth of the new head's rate; with no head that is new it is `flat`.

    Where these have BatchNorms, a hundredth and their running statistics. A head begins at zero, and at their rate does
    not arrive in a short run: after 100 steps on CIFAR-10 ViT-Ti has 51 of 100 right at 1e-4 for all and 69 with 1e-3
    for the head (benchmarks/README.md).
    """
    if not new_head:
        return flat(parts, lr)
    share, mode = _beside(batch_norm)
    return (Stage("full", ("head", ("*", share)), lr=lr or 1e-3, batch_norm=mode),)


def lp_ft(parts: Sequence[str], lr: float | None = None, *, batch_norm: bool = False) -> tuple[Stage, ...]:
    """Linear probe, then everything from there (Kumar et al. 2022, "Fine-tuning can distort pretrained features").

    Then all have the rate that `full` gives pretrained parts.
    """
    lr = lr or 1e-3
    share, mode = _beside(batch_norm)
    return (
        replace(head(parts, lr)[0], share=0.5),
        Stage("full", ("*",), share=0.5, lr=lr * share, batch_norm=mode),
    )


def gradual(parts: Sequence[str], lr: float | None = None) -> tuple[Stage, ...]:
    """The head, then group after group of parts from the top, each lower group at 1/2.6 of the rate above it.

    Gradual unfreezing and discriminative rates as in ULMFiT (Howard and Ruder 2018, sections 3.2 and 3.3). The head,
    once trained, has a tenth of its rate, the highest group `PRETRAINED_RATE` of that. BatchNorms keep their running
    statistics: a stage of a few batches would replace most of what they have seen.
    """
    top_down = groups(parts)[::-1]
    last = [p for p in parts if p in TOP and p != "head"]
    stages = [replace(head(parts, lr)[0], share=2.0 * len(top_down))]  # of 15 epochs 10: as long as the plan `head`
    for n in range(1, len(top_down) + 1):
        train = [("head", 1.0)] + [(p, PRETRAINED_RATE) for p in last]
        for depth, group in enumerate(top_down[:n]):
            train += [(prefix, PRETRAINED_RATE * 2.6**-depth) for prefix in group]
        stages.append(Stage(f"{top_down[n - 1][0]} and up", tuple(train), lr=(lr or 1e-3) / 10, batch_norm="frozen"))
    return tuple(stages)


def top(parts: Sequence[str], lr: float | None = None, *, k: int, batch_norm: bool = False) -> tuple[Stage, ...]:
    """The last `k` parts that the head's own depth does not hold, and the head; their rates are `full`'s."""
    body = [p for p in parts if p not in TOP]
    if not 1 <= k <= len(body):
        raise UserError(f"The plan top-{k} asks for {k} parts; there are 1 to {len(body)} below the head.")
    rest = (*body[-k:], *(p for p in parts if p in TOP and p != "head"))
    share, mode = _beside(batch_norm)
    return (Stage(f"top-{k}", ("head", *((p, share) for p in rest)), lr=lr or 1e-3, batch_norm=mode),)


def surgical(
    parts: Sequence[str], lr: float | None = None, *, where: str = "auto", batch_norm: bool = False
) -> tuple[Stage, ...]:
    """One third of the parts and the head; by default all, each at a rate after its relative gradient norm.

    The part of the largest has the rate that `full` gives pretrained parts, and so has a third that is named.

    Lee et al. 2023, "Surgical fine-tuning improves adaptation to distribution shifts": first blocks for shifts of the
    input, last blocks for shifts of the output; Auto-RGN chooses by itself.
    """
    share, mode = _beside(batch_norm)
    if where == "auto":
        return (Stage("surgical", ("head", ("*", share)), lr=lr or 1e-3, batch_norm=mode, surgical=True),)
    third = groups(parts, 3)[("first", "middle", "last").index(where)]
    return (Stage(f"surgical-{where}", ("head", *((p, share) for p in third)), lr=lr or 1e-3, batch_norm=mode),)


def bitfit(parts: Sequence[str], lr: float | None = None) -> tuple[Stage, ...]:
    """The biases and the head (Ben Zaken et al. 2022); BatchNorms keep their running statistics."""
    return (Stage("bitfit", ("head", "*bias"), lr=lr or 1e-3, batch_norm="frozen"),)


def norm(parts: Sequence[str], lr: float | None = None) -> tuple[Stage, ...]:
    """Scales and biases of the normalisations, and the head (Frankle et al. 2021, "Training BatchNorm and only …").

    BatchNorms keep their running statistics, as in `bitfit`.
    """
    return (Stage("norm", ("head", "*norm*"), lr=lr or 1e-3, batch_norm="frozen"),)


def lora(parts: Sequence[str], lr: float | None = None) -> tuple[Stage, ...]:
    """Low-rank updates of the kernels and the head (Hu et al. 2022); the rank is `--lora.rank`, by default 8."""
    return (Stage("lora", ("head", "*/lora_*"), lr=lr or 1e-3, batch_norm="frozen"),)


def vpt(parts: Sequence[str], lr: float | None = None) -> tuple[Stage, ...]:
    """A ViT's prompts and the head (Jia et al. 2022); their number is `--model_options.prompts`, by default 10."""
    return (Stage("vpt", ("head", "*/prompts"), lr=lr or 1e-3),)


PLANS: dict[str, Callable[..., tuple[Stage, ...]]] = {
    "head": head,
    "full": full,
    "flat": flat,
    "gradual": gradual,
    "lp-ft": lp_ft,
    **{f"top-{k}": partial(top, k=k) for k in (1, 2, 3)},  # any other number too
    **{f"surgical-{where}": partial(surgical, where=where) for where in ("first", "middle", "last")},
    "surgical": surgical,
    "bitfit": bitfit,
    "norm": norm,
    "lora": lora,
    "vpt": vpt,
}

Plan = str | tuple[Stage, ...] | Callable[..., tuple[Stage, ...]]


def preset(name: str) -> Callable[..., tuple[Stage, ...]]:
    """The function `(parts, lr)` of a preset's name. Raises UserError for a name that is none."""
    if found := re.fullmatch(r"top-(\d+)", name):
        return partial(top, k=int(found[1]))
    if name not in PLANS:
        raise UserError(f"There is no plan {name!r}.{near(name, PLANS)} Plans: {', '.join(PLANS)}; or stages.")
    return PLANS[name]


def resolve(
    plan: Plan,
    names: Sequence[str],
    parts: Sequence[str],
    *,
    epochs: float | None = None,
    lr: float | None,
    layer_decay: float | None = None,
    new_head: bool = True,
    batch_norm: bool = False,
) -> tuple[Stage, ...]:
    """The stages of a preset's name, a function `(parts, lr)` or a tuple, with every stage's epochs and rate set.

    A function with parameters `new_head` or `batch_norm` is told whether the head begins at zero beside pretrained
    parts, and whether there are pretrained BatchNorms.

    Epochs are the total over all stages, divided by their shares; where None are given, 10, of `gradual` 15. A
    stage with epochs of its own keeps them, and so does one with a `layer_decay`. Raises UserError for an unknown name,
    no stages, two stages of one name, and whatever `multipliers` finds wrong.
    """
    users = not isinstance(plan, str)
    if isinstance(plan, str):
        plan = preset(plan)
    if epochs is None:
        # The head's ten, then the rest; a caller may have wrapped it.
        epochs = 15.0 if callable(plan) and inspect.unwrap(plan) is inspect.unwrap(gradual) else 10.0
    if callable(plan):
        wanted = inspect.signature(plan).parameters
        about = {"new_head": new_head, "batch_norm": batch_norm}
        what = "The plan's function, (parts, lr) -> stages, cannot be taken"
        with asked(what) if users else contextlib.nullcontext():
            stages = plan(parts_with(names, parts), lr, **{k: v for k, v in about.items() if k in wanted})
        if not isinstance(stages, Sequence) or not all(isinstance(s, Stage) for s in stages):
            raise UserError(f"The plan's function gave {brief(repr(stages), 200)}; a tuple of jft.Stage is expected.")
    else:
        stages = tuple(plan)
    if not stages:
        raise UserError("The plan has no stages; it needs at least one.")
    if len({s.name for s in stages}) != len(stages):
        raise UserError(f"Two stages share a name: {', '.join(s.name for s in stages)}. Give each its own.")
    for stage in stages:
        if stage.epochs is None and not stage.share > 0:
            raise UserError(f"Stage {stage.name!r} has share={stage.share:g}; its share of the epochs is above 0.")
    total = sum(s.share for s in stages if s.epochs is None)
    done = []
    for stage in stages:
        own = stage.epochs if stage.epochs is not None else epochs * stage.share / total
        if own <= 0:
            raise UserError(f"Stage {stage.name!r} has {own:g} epochs; it needs more than 0.")
        if stage.lr is not None and stage.lr <= 0:
            raise UserError(f"Stage {stage.name!r} has lr={stage.lr:g}; a rate is above 0 (a multiplier of 0 freezes).")
        if not 0 < stage.layer_decay <= 1:
            raise UserError(f"Stage {stage.name!r} has layer_decay={stage.layer_decay:g}; it is above 0 and at most 1.")
        if stage.batch_norm not in ("auto", "frozen"):
            raise UserError(f"Stage {stage.name!r} has batch_norm={stage.batch_norm!r}; it is 'auto' or 'frozen'.")
        stage = replace(stage, epochs=own, lr=stage.lr or lr or 1e-3)
        if layer_decay is not None and stage.layer_decay == 1.0:
            stage = replace(stage, layer_decay=layer_decay)
        multipliers(stage, names, parts)
        done.append(stage)
    return tuple(done)
