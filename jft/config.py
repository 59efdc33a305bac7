"""The configuration of a run: frozen, written to config.json, and made from Python files and command-line options."""

import dataclasses
import hashlib
import inspect
import json
import math
import numbers
import operator
import os
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from jft.code import load_file, load_object, names_object, theirs
from jft.errors import UserError, brief, near
from jft.files import writing
from jft.plan import Lora, Plan, Stage, preset
from jft.preprocess import Preprocess
from jft.words import Words, name_of


def _opt(default: Any, help: str, **bounds: Any) -> Any:
    return field(default=default, metadata={"help": help} | bounds)


@dataclass(frozen=True)
class Config:
    """Everything a run needs; every field has a default but `data`."""

    given: ClassVar[frozenset[str]] = frozenset()  # fields that somebody set, if to the default: `hyper` spares them

    def __new__(cls, *args: Any, **fields: Any) -> "Config":
        config = super().__new__(cls)
        known = [f.name for f in dataclasses.fields(cls)]
        for name in fields:
            if name not in known:
                raise UserError(f"A config has no field {name!r}.{near(name, known)} Its fields: {', '.join(known)}.")
        object.__setattr__(config, "given", frozenset([*known[: len(args)], *fields]))
        return config

    def __post_init__(self) -> None:
        for name in (f.name for f in dataclasses.fields(self) if f.name != "data"):
            value = getattr(self, name)
            if (own := _without_numpy(value)) is not value:
                object.__setattr__(self, name, own)
        for name in ("workdir", "weights"):  # a shell leaves the ~ of --workdir=~/x, and Python knows none
            if isinstance(path := getattr(self, name), str | Path):
                object.__setattr__(self, name, os.path.expanduser(path))

    data: Any | Callable = _opt(
        None,
        "labelled images: a folder of class folders (or of train/ val/ [test/] with class folders), a CSV with "
        "path,label[,split] (path,value[,split] to predict a number), tfds:NAME; in Python also arrays",
    )
    model: str = _opt("resnet50", "the pretrained model, by name; `jft models` lists them")
    weights: Any | Callable = _opt(
        None,
        "where its weights come from: a file (.safetensors .pth .npz), a folder, hf:ORG/REPO, https://…#sha256=…, "
        "gs://BUCKET/FILE; none = from scratch; default: the model's own source",
    )
    keep_head: bool = _opt(
        False, "keep the weights' own head, where it has as many classes as the data, in their order"
    )
    plan: Plan = _opt(
        "head",
        "what trains when: head, full, flat, gradual, lp-ft, top-K, bitfit, norm, lora, vpt, surgical, surgical-first, "
        "surgical-middle, surgical-last; or file.py:name, a function (parts, lr) -> stages; in Python also stages",
    )
    hyper: str | Callable | None = _opt(
        None,
        "a published rule for every field not set: bit, vit; or module:name, a function (examples, size, batch) -> "
        "fields",
    )
    epochs: float | None = _opt(
        None, "passes over the training set, over all stages together; default: the plan's (10, gradual 15)", above=0
    )
    batch: int = _opt(32, "images a step, over all devices together", least=1)
    lr: float | None = _opt(
        None,
        "peak learning rate of the fastest group, a new head; pretrained parts have a tenth or less, in the plan flat "
        "the same; default: 1e-3, flat 1e-4",
        above=0,
    )
    seed: int = _opt(
        0,
        "random number seed of the split, the new head, the order of the images and their augmentation",
        least=0,
        most=2**32 - 1,  # jax takes no more bits
    )
    workdir: str | None = _opt(None, "the run's folder, W; default: runs/DATA-MODEL-PLAN")
    optimizer: Any | Callable = _opt(
        "adamw",
        "what takes the steps: adamw, adam, sgd, lion, lamb, muon, schedule-free, schedule-free-sgd, with options as "
        "adamw:b2=0.95 or sgd:momentum=0.95:nesterov=yes; or module:name or file.py:name, a function (weight_decay, "
        "mask) -> optax transformation, without a rate",
        words="jft.optim:OPTIMIZERS",
    )
    weight_decay: float = _opt(
        1e-4,
        "share of a kernel taken off a step, times the rate; biases, norms and position embeddings are spared",
        least=0,
    )
    schedule: str | Callable | None = _opt(
        None,
        "course of the learning rate in a stage: cosine, linear, constant, step, one-cycle, with options as "
        "cosine:end=0.01; or module:name, a function (peak, steps); default: cosine, and constant for schedule-free",
        words="jft.optim:SCHEDULES",
    )
    warmup: float = _opt(0.1, "share of a stage's steps in which the rate rises to its peak", least=0, below=1)
    clip: float | None = _opt(1.0, "largest global norm of the gradients that train; none = no clipping", above=0)
    augment: tuple[str, ...] | None = _opt(
        None,
        "random changes of the training images: crop, rrc, pad, flip, vflip, rotate, randaugment, trivial, jitter, "
        "grey, blur, erase, mixup, cutmix; strengths as mixup:0.2, randaugment:m=9:n=2; none = nothing; default: crop "
        "flip, and nothing for a linear probe",
        words="jft.data.prepare:AUGMENTS",
    )
    label_smoothing: float = _opt(0.0, "share of the label spread over all classes", least=0, below=1)
    class_weights: str | Mapping[str, float] | None = _opt(
        None,
        "weights of the classes in the loss: inverse, to the number of their images, or effective, to the effective "
        "number (Cui et al. 2019); or of each, as ants=2,bees=0.5, in Python a dict",
    )
    loss: str | Callable | None = _opt(
        None,
        "L(f, D): cross-entropy, focal, binary-cross-entropy, binary-focal, asymmetric, squared-error, huber, with "
        "options as focal:gamma=3; or module:name, a function (logits, batch) -> [b]; default: cross-entropy, binary "
        "where images have several labels, the squared error of numbers",
        words="jft.losses:LOSSES",
    )
    penalty: str | Callable | None = _opt(
        None,
        "R(f, f_s) in L + λR: l2-sp, l2, with options as l2-sp:new=0.01; or module:name, a function (params, source) "
        "-> scalar",
        words="jft.penalties:PENALTIES",
    )
    penalty_weight: float = _opt(0.0, "λ in L + λR, the factor of --penalty", least=0)
    penalty_decoupled: bool = _opt(
        False, "the penalty's gradient joins the step past the optimizer, as AdamW's weight decay does, not in the loss"
    )
    balance: bool = _opt(False, "show every class equally often, those of few images again sooner")
    shots: int | None = _opt(None, "train on so many images a class, drawn by seed; default: all", least=1)
    seeds: int = _opt(1, "repeat the run with so many seeds and tell mean and spread", least=1)
    val_fraction: float = _opt(
        0.2, "share of the images held out, class by class, where the data have no val split", least=0, below=1
    )
    eval_every: float = _opt(1.0, "epochs between validations; each stage also ends with one", above=0)
    probe: str | None = _opt(
        None,
        "score the features too, as they are at each validation, by a probe fitted to the training images: one more "
        "pass over these, but where the head alone trains",
        choices=("knn", "ridge", "logistic"),
    )
    snapshots: bool = _opt(False, "keep the weights of every validation, for `jft average W --snapshots`")
    checkpoint_every: float = _opt(60.0, "seconds between checkpoints; each stage also ends with one", least=0)
    layer_decay: float | None = _opt(
        None, "layer-wise decay of the rate, the factor from a part to the part below it, e.g. 0.75", above=0, most=1
    )
    carry: bool = _opt(False, "carry the optimizer's state from stage to stage; what begins to train begins anew")
    ema: float | None = _opt(
        None, "decay of a moving average of the weights, e.g. 0.999, which is then validated and kept", above=0, below=1
    )
    sam: float = _opt(0.0, "radius ρ of sharpness-aware minimisation, e.g. 0.05; twice the time", least=0)
    patience: int | None = _opt(
        None,
        "end a stage after so many validations in a row without a better one; the next goes on from its last state, "
        "and the model kept is the best of all stages; default: never",
        least=1,
    )
    on_nan: str = _opt(
        "stop",
        "after ten steps in a row that are not finite: stop, or rollback to the last good checkpoint at half the rate",
        choices=("stop", "rollback"),
    )
    lora: Mapping[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": "low-rank updates: rank (of the plan lora 8), alpha (the scale times the rank; default: the rank), "
            "targets (patterns over kernels; default: all below the head), dora (yes: also the columns' norms)",
            "fields": Lora,
        },
    )
    model_options: Mapping[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": "settings of the architecture, of a ViT among others pool (avg, token, …), prompts (how many; of "
            "the plan vpt 10), deep_prompts (no: before the first block alone; default: before each)",
            "fields": None,
        },
    )
    image_size: int | tuple[int, int] | None = _opt(
        None, "side of the images in pixels, or height and width; default: the weights'", least=1
    )
    preprocess: Mapping[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": "what differs from the weights' own preprocessing: --preprocess.crop_pct 1.0",
            "fields": Preprocess,
        },
    )
    dropout: float = _opt(
        0.0,
        "share of activations dropped before the head (and in a ViT's blocks), in parts that train",
        least=0,
        below=1,
    )
    drop_path: float = _opt(0.0, "stochastic depth's rate at the last block, in parts that train", least=0, below=1)
    dtype: str = _opt(
        "auto",
        "number type of the computation: float32, bfloat16, float16; parameters stay float32; auto: bfloat16 on a GPU "
        "or TPU, float32 on a CPU",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    remat: str = _opt(
        "none",
        "recompute activations in the backward pass: full (least memory, a third more time), or dots, which keeps what "
        "matrix products gave",
        choices=("none", "dots", "full"),
    )
    accumulate: int | None = _opt(
        None,
        "pieces a batch is taken in, their gradients averaged; default: as few as memory allows, a ViT's on a CPU in "
        "pieces of some 1,500 tokens (8 images of 224 pixels), which is faster",
        least=1,
    )
    sharding: str = _opt(
        "replicate", "how the state lies on the devices: replicate, fsdp, pmap", choices=("replicate", "fsdp", "pmap")
    )
    tensor: int = _opt(
        1, "devices that share each layer of a ViT (tensor parallelism); the others share batches", least=1
    )
    distributed: bool = _opt(False, "be one process of several, on one or many hosts: docs/scaling.md")
    features: str = _opt(
        "memory",
        "run frozen parts once per image, where nothing random is before or in them, and keep what they give: memory, "
        "disk (where memory does not hold it), none",
        choices=("memory", "disk", "none"),
    )
    features_dtype: str = _opt(
        "float32",
        "number type that features are kept in: float32, bfloat16, float16",
        choices=("float32", "bfloat16", "float16"),
    )
    views: int | None = _opt(
        None, "keep features of so many augmented views an image, taken in turn, instead of augmenting anew", least=1
    )
    resident: float = _opt(
        0.5, "keep images or features in memory if they fit this share of what is free; 0 = stream", least=0, most=1
    )
    threads: int | None = _opt(None, "threads that decode images; default: the processor's cores", least=1)
    display: str = _opt(
        "auto",
        "what is shown: auto (a view on a terminal, else lines), plain, quiet, json",
        choices=("auto", "plain", "quiet", "json"),
    )
    track: tuple[Any, ...] = _opt(
        (), "also log to tensorboard, mlflow, or module:name, a function (workdir, about, step) -> Tracker"
    )
    deterministic: bool = _opt(
        False,
        "bit-equal repetition on a GPU too, some tenths slower (on a CPU it always is); in a process where jax has "
        "computed nothing yet",
    )
    objective: str | Callable | None = _opt(
        None,
        "what is minimised: distil, which holds the source's features, lwf, which holds its head's answers, with "
        "options as distil:at=pool:weight=0.1; or module:name; default: L(f, D) + λ R(f, f_s)",
        words="jft.distil:OBJECTIVES",
    )

    def replace(self, **changes: Any) -> "Config":
        """A copy with these fields changed."""
        new = dataclasses.replace(self, **changes)
        object.__setattr__(new, "given", self.given | changes.keys())
        return new


BOUNDS: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "above": ("above {}", operator.gt),
    "least": ("at least {}", operator.ge),
    "below": ("below {}", operator.lt),
    "most": ("at most {}", operator.le),
    "choices": ("one of {}", lambda value, known: value in known),
}


def check(config: Config) -> None:
    """Raises UserError for a field whose value is of another type or out of its bounds, and for a plan that is none."""
    hints = typing.get_type_hints(Config)
    for f in dataclasses.fields(config):
        given, inside = getattr(config, f.name), f.metadata.get("fields")
        _check_type(flag(f.name), given, hints[f.name])
        for name, value in given.items() if inside else ():
            kinds = _hints(inside)
            if name not in kinds:
                raise _no_option(f"{f.name}.{name}", str(name), kinds)
            _check_type(f"--{f.name}.{name}", value, kinds[name])
    for f in dataclasses.fields(config):
        given = getattr(config, f.name)
        if "words" in f.metadata and given != f.default and (known := words_of(f.name)):  # no default imports jax
            several = given if isinstance(given, tuple | list) else (given,)
            for word in (w for w in several if isinstance(w, str)):
                if name_of(word) in known or not names_object(word):
                    known.parse(word)
    if isinstance(config.plan, str):
        preset(config.plan)
    elif isinstance(config.plan, tuple | list):
        check_stages(config.plan)
    for f in dataclasses.fields(config):
        bounds = {b: limit for b, limit in f.metadata.items() if b in BOUNDS}
        given = getattr(config, f.name)
        for value in given if isinstance(given, tuple) else (given,):
            if value is None or all(BOUNDS[b][1](value, limit) for b, limit in bounds.items()):
                continue
            asked = " and ".join(
                BOUNDS[b][0].format(", ".join(limit) if b == "choices" else limit) for b, limit in bounds.items()
            )
            hint = near(str(value), bounds.get("choices", ()))
            raise UserError(f"{flag(f.name)} is {value}; it is {asked}.{hint}")


def check_stages(stages: Iterable[Stage]) -> None:
    """Raises UserError for a stage's field whose value is of another type."""
    for stage in stages:
        for name, hint in _hints(Stage).items():
            _check_type(f"Stage {stage.name!r}: {name}", getattr(stage, name), hint)


def flag(name: str) -> str:
    """The option of a field: `--keep-head`, `--preprocess.crop_pct`."""
    return f"--{name if '.' in name else name.replace('_', '-')}"


def _hints(cls: Any) -> dict[str, Any]:
    """The fields of a dataclass, with their types."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def _no_option(path: str, name: str, known: Mapping[str, Any]) -> UserError:
    return UserError(f"There is no option --{path}.{near(name, known)} It has: {', '.join(known)}.")


def _without_numpy(value: Any) -> Any:
    """The value, its numpy numbers made Python's, which JSON has; itself where there are none."""
    if hasattr(value, "dtype") and getattr(value, "shape", None) == ():
        return value.item()
    if isinstance(value, tuple | list):
        items = [_without_numpy(item) for item in value]
        return value if all(map(operator.is_, items, value)) else type(value)(items)
    if isinstance(value, Mapping):
        found = {name: _without_numpy(item) for name, item in value.items()}
        return value if all(map(operator.is_, found.values(), value.values())) else found
    if isinstance(value, Stage):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        found = _without_numpy(fields)
        return value if found is fields else dataclasses.replace(value, **found)
    return value


def _check_type(what: str, value: Any, hint: Any) -> None:
    if _fits(value, hint):
        return
    told = ""
    if isinstance(value, str) and any(typing.get_args(h)[:1] in ((str,), (Any,)) for h in _options(hint)):
        told = f" It is written {tuple(value.split())!r}."  # else it would be taken letter by letter
    finite = "a finite " if isinstance(value, float) and not math.isfinite(value) else ""
    raise UserError(f"{what} is {brief(repr(value), 200)}; {finite}{_expected(hint)} is expected.{told}")


def _kind(hint: Any) -> Any:
    return typing.get_origin(hint) or hint


def _options(hint: Any) -> list[Any]:
    return list(typing.get_args(hint)) if _is_union(hint) else [hint]


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a field's type: numpy's numbers are numbers, whole ones also where others are expected."""
    if _is_union(hint):
        return any(_fits(value, option) for option in typing.get_args(hint))
    kind, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind is Any:
        return True
    if kind is Callable:
        return callable(value)
    if kind is tuple:
        if not isinstance(value, tuple | list):
            return False
        kinds = inner[:1] * len(value) if inner[-1] is Ellipsis else inner
        return len(value) == len(kinds) and all(map(_fits, value, kinds))
    if kind is float:  # JSON has nothing that is not finite
        return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    if kind is int:
        return isinstance(value, numbers.Integral) and not isinstance(value, bool)
    return isinstance(value, kind)


TYPES = {Callable: "function", Mapping: "dict"}  # as a message names them
WORDS = {**TYPES, bool: "yes or no", int: "a whole number", float: "a number"}  # one about the command line


def _expected(hint: Any, names: Mapping[Any, str] = TYPES) -> str:
    """A type as a message names it.

    >>> _expected(str | tuple[int, int] | None)
    'str or tuple of 2 int'
    """
    told = []
    for option in _options(hint):
        kind, inner = typing.get_origin(option) or option, typing.get_args(option)
        if kind is tuple:
            count = "" if inner[-1] is Ellipsis else f"{len(inner)} "
            told.append(f"tuple of {count}{_expected(inner[0])}")
        elif kind is not types.NoneType:
            told.append(names.get(kind) or str(getattr(kind, "__name__", kind)))
    return " or ".join(told)


# Fields that say where and how loudly a run happens, not what it is: two runs may differ in them and be the same.
PLACE = (
    "workdir", "display", "track", "checkpoint_every", "threads", "resident", "features", "distributed",
    "tensor", "seeds",
)  # fmt: skip


def describe(value: Any) -> Any:
    """A config's value as JSON: functions and classes by import path, arrays and Pillow's images by their hash."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: describe(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(k): describe(v) for k, v in value.items()}
    if isinstance(value, Sequence):
        return [describe(v) for v in value]
    if hasattr(value, "func"):  # functools.partial
        return {"partial": describe(value.func), "args": describe(value.args), "keywords": describe(value.keywords)}
    if callable(value):
        return import_path(value)
    if hasattr(value, "tobytes"):
        kind = f"{value.dtype}{list(value.shape)}" if hasattr(value, "dtype") else f"{value.mode}{list(value.size)}"
        return f"{kind} sha256:{hashlib.sha256(value.tobytes()).hexdigest()[:16]}"  # of an array, or Pillow's image
    raise UserError(f"A config cannot hold {value!r}: numbers, strings, tuples, functions and arrays can be written.")


def import_path(function: Any) -> str:
    """`module:name`, or `file.py:name` where the function comes from a config file."""
    module = inspect.getmodule(function)
    file = getattr(module, "__config_file__", None)
    name = getattr(function, "__qualname__", f"<{type(function).__name__}>")  # of an object, which no path leads to
    of = getattr(function, "__self__", None)
    if of is not None and not isinstance(of, type | types.ModuleType):
        name = f"<{type(of).__name__}>.{function.__name__}"
    return f"{file or getattr(function, '__module__', '?')}:{name}"


def words_of(field: str) -> Words | None:
    """The words that a field takes beside functions, `jft.losses.LOSSES` of `loss`; None where it has none."""
    where = next((f.metadata.get("words") for f in dataclasses.fields(Config) if f.name == field), None)
    return load_object(where) if where else None  # imported here alone: a config needs no jax


def _is_word(field: str, word: str) -> bool:
    """Whether a word is one that the field knows, with options: `distil:pool` is no `module:name`."""
    words = words_of(field)
    return words is not None and name_of(word) in words


def method(config: Config, field: str) -> Callable[..., Any] | None:
    """The function that a field names or holds, its options given; None where it has none.

    >>> method(Config(loss="focal:gamma=3"), "loss")
    functools.partial(<function focal at …>, gamma=3.0)

    Raises UserError for a word that is none.
    """
    given, words = getattr(config, field), words_of(field)
    assert words is not None
    return None if given is None else words.find(given)


def load_config(path: str | Path) -> Config | dict[str, Config]:
    """What a config file's `config()` returns: a Config, or named Configs to be compared."""
    module = load_file(path)
    if not hasattr(module, "config"):
        raise UserError(f"{path} has no function config(); it should return a jft.Config, or a dict of them.")
    with theirs(str(path), Path(path)):
        made = module.config()
    configs = made if isinstance(made, dict) else {"": made}
    if not configs or not all(isinstance(c, Config) for c in configs.values()):
        raise UserError(
            f"config() of {path} returned {type(made).__name__}; a jft.Config or a dict of them is expected."
        )
    for config in configs.values():
        try:
            check(config)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
    return made


def parse(name: str, text: str | list[str], hint: Any) -> Any:
    """A command-line value as a field of this type. Raises UserError naming the field, the text and the type."""
    options = _options(hint)
    words = text if isinstance(text, list) else [text]
    if types.NoneType in options and [w.lower() for w in words] == ["none"]:
        several = any(typing.get_args(option)[-1:] == (Ellipsis,) for option in options)
        return () if several else None  # of a list none is nothing, where None may stand for its default
    if Callable in map(_kind, options) and len(words) == 1 and names_object(words[0]) and not _is_word(name, words[0]):
        return (known.find if (known := words_of(name)) else load_object)(words[0])
    for option in options:
        origin = _kind(option)
        try:
            if origin is tuple:
                kinds = typing.get_args(option)
                items = [part for w in words for part in w.replace(",", " ").split()]
                if items == ["none"]:
                    return ()
                if kinds[-1] is not Ellipsis and len(kinds) != len(items):
                    continue
                return tuple(parse(name, item, kinds[0]) for item in items)
            if len(words) != 1:
                continue
            if origin is bool:
                return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[words[0].lower()]
            if origin in (int, float):
                return origin(words[0])
            if origin in (str, Any):
                return words[0]
            if origin is Callable:
                return load_object(words[0])
        except (ValueError, KeyError):
            continue
    raise UserError(f"{flag(name)} was given {' '.join(words)!r}; {_expected(hint, WORDS)} is expected.")


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def override(config: Config, path: str, words: list[str]) -> Config:
    """The config with one field, `lr` or `preprocess.crop_pct`, set from command-line words."""
    name, _, rest = path.replace("-", "_").partition(".")
    hints = typing.get_type_hints(type(config))
    if name not in hints:
        raise UserError(f"There is no option --{path}.{near(name, hints)} `--help` lists them all.")
    if rest:
        metadata = {f.name: f for f in dataclasses.fields(type(config))}[name].metadata
        if "fields" not in metadata:
            raise UserError(f"--{path}: {name} has no fields.")
        if metadata["fields"] is None:  # whoever takes them knows their names and checks them
            kind: Any = tuple[int, ...] if "," in "".join(words) else int | float | bool | None | str
        else:
            fields = typing.get_type_hints(metadata["fields"])
            if rest not in fields:
                raise _no_option(path, rest, fields)
            kind = fields[rest]
        value = {**getattr(config, name), rest: parse(path, words, kind)}
        return config.replace(**{name: value})
    return config.replace(**{name: parse(path, words, hints[name])})


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all."""
    # ASCII: the name of a file or class may hold bytes that are no UTF-8.
    text = json.dumps(value, indent=1, allow_nan=False) + "\n"
    with writing(path) as part:
        part.write_text(text, encoding="ascii")


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """`field: old → new`, for every field in which two described configs differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = list(dict.fromkeys([*old, *new]))
        return [line for k in keys for line in differences(old.get(k), new.get(k), f"{path}.{k}" if path else k)]
    return [] if old == new else [f"{path}: {json.dumps(old)} → {json.dumps(new)}"]
