"""From a config to what a run needs: its data, its model with weights, and its stages laid out over the data."""

import contextlib
import hashlib
import inspect
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial, wraps
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from jft import features, losses, metrics, optim, penalties, plan, shard, tree, weights
from jft.config import Config, check_stages, describe, import_path, method
from jft.config import check as config_check
from jft.data import order, pipeline, sources
from jft.data.check import at_start, summary
from jft.data.decode import resampling
from jft.data.prepare import MIXERS, make_prepare, work_size
from jft.data.prepare import check as check_augment
from jft.diagnose import Suspect, make_diagnosis
from jft.errors import UserError, asked, brief
from jft.lora import LoraModel, with_lora
from jft.memory import available
from jft.models import MODELS, make_model
from jft.models.base import Model
from jft.plan import Stage
from jft.preprocess import Preprocess
from jft.step import SOURCE_HEAD, Batch, Metrics, Objective, State, TrainStep, make_train_step, supervised
from jft.weights import locate, native
from jft.words import name_of

FAR = 10  # of a mean or standard deviation of pixels from 0 to 1: what is more is meant for 0 to 255
PIECE = 1500  # tokens that a piece of a batch has at least on a CPU
PRODUCT = "/patch/kernel"  # kept as a convolution's kernel and used as a matrix product's


def read_data(config: Config) -> sources.Splits:
    """The splits the config names, with `shots` images a class where it asks for them."""
    config_check(config)
    if config.data is None:
        raise UserError("No data given. --data takes a folder of class folders, a CSV with path,label, or tfds:NAME.")
    data = config.data() if callable(config.data) else config.data
    splits = sources.load(data, seed=config.seed, val_fraction=config.val_fraction)
    if config.shots is not None:
        splits = replace(splits, train=few_shots(splits.train, config.shots, config.seed))
    if splits.val is None:
        raise UserError("The data have no validation split, and --val-fraction 0 holds nothing out to make one.")
    return splits


def model_of(config: Config, num_classes: int) -> Model:
    """The architecture the config names, its options set, with low-rank updates where the config asks for them."""
    model = plain_model(config, num_classes)
    lora = plan.lora_of(config.plan, config.lora)
    return with_lora(model, lora) if lora.rank else model


def options_of(config: Config) -> dict[str, Any]:
    """The architecture's options: the plan `vpt` needs prompts, and raises UserError for a model that takes none."""
    if config.plan != "vpt":
        return dict(config.model_options)
    if config.model in MODELS and "prompts" not in inspect.signature(MODELS[config.model]).parameters:
        raise UserError(
            f"The plan vpt trains prompts beside a ViT's tokens; {config.model} has none. --plan lora, for one."
        )
    return {"prompts": 10, **config.model_options}


def compute_dtype(config: Config) -> str:
    """What the run computes in, on the devices at hand."""
    if config.dtype != "auto":
        return config.dtype
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def plain_model(config: Config, num_classes: int, prompts: bool = True) -> Model:
    """The architecture the config names, its options set; without `prompts` as its pretrained weights have it."""
    options = {n: v for n, v in options_of(config).items() if prompts or n not in ("prompts", "deep_prompts")}
    own = {
        "num_classes": num_classes,
        "image_size": config.image_size,
        "dtype": compute_dtype(config),
        "dropout": config.dropout,
        "drop_path": config.drop_path,
        "remat": config.remat,
        "axis_name": shard.DATA if config.sharding == "pmap" else None,
    }
    if twice := sorted(own.keys() & options.keys()):
        name = twice[0]
        way = f"--{name.replace('_', '-')} sets it" if hasattr(config, name) else "the run itself sets it"
        raise UserError(f"--model_options.{name} is no option of the architecture's own: {way}.")
    return make_model(config.model, **own, **options)


def build(config: Config, classes: Sequence[str]) -> tuple[Model, dict[str, Any], dict[str, Any], weights.Loaded]:
    """The model for these classes, its parameters and statistics (pretrained, or fresh), and where they come from."""
    source = config.weights() if callable(config.weights) else config.weights
    prompted = bool(options_of(config).get("prompts")) and _has_prompts(source)
    model, plain = model_of(config, len(classes)), plain_model(config, len(classes), prompts=prompted)
    loaded = weights.scratch(plain) if source == "none" else weights.load(plain, source, keep_head=config.keep_head)
    if config.keep_head and any(name.startswith("head/") for name in loaded.missing):
        raise UserError(
            f"--keep-head: the weights have no head of {len(classes)} outputs, which the data need. Leave it out for a "
            "new head."
        )
    if takes_head(config):
        head = {} if source == "none" else weights.read_head(plain, source)
        if head.keys() != {"kernel", "bias"}:
            raise UserError("--objective takes the head that came with the weights, and there is none in them.")
        loaded = replace(loaded, head=head)
    params: dict[str, Any] = dict(loaded.params)
    stats: dict[str, Any] = dict(loaded.batch_stats)
    plain = plain_model(config, len(classes))
    added = [n for n in plain.shapes()[0] if n not in params and n not in loaded.missing]  # prompts
    if missing := (*loaded.missing, *added):
        loaded = replace(loaded, missing=missing)
        fresh_params, fresh_stats = plain.init(jax.random.key(config.seed), plan.parts_with(missing, model.parts))
        params = fresh_params | params
        stats = fresh_stats | stats
    if isinstance(model, LoraModel):
        updates = model.init_updates(jax.random.key(config.seed))
        params |= updates
        loaded = replace(loaded, missing=(*loaded.missing, *sorted(updates)))
    preprocess = replace(loaded.preprocess, **config.preprocess)
    _check_preprocess(preprocess, model)
    return model, dict(sorted(params.items())), dict(sorted(stats.items())), replace(loaded, preprocess=preprocess)


def _check_preprocess(preprocess: Preprocess, model: Model) -> None:
    """Raises UserError for a preprocessing that does not exist or that the model cannot take."""
    resampling(preprocess)
    if tuple(preprocess.size) != tuple(model.input_shape[:2]):
        size, takes = (",".join(map(str, s)) for s in (preprocess.size, model.input_shape[:2]))
        raise UserError(f"--preprocess.size is {size}, and the model takes {takes}. --image-size {size} changes both.")
    for name in ("mean", "std"):
        if len(values := getattr(preprocess, name)) != model.input_shape[-1]:
            count = f"{len(values)} number{'s' if len(values) != 1 else ''}"
            raise UserError(f"--preprocess.{name} has {count}; {model.input_shape[-1]} are expected, one a channel.")
    if not 0 < preprocess.crop_pct <= 1:
        raise UserError(f"--preprocess.crop_pct is {preprocess.crop_pct}; a share above 0 and at most 1 is expected.")
    if min(preprocess.std) <= 0:
        raise UserError(f"--preprocess.std is {preprocess.std}; every one is above 0.")
    if max(map(abs, (*preprocess.mean, *preprocess.std))) > FAR:
        raise UserError(
            f"--preprocess: the mean is {preprocess.mean} and std {preprocess.std}. Pixels are from 0 to 1 here; "
            "figures for 0 to 255 are divided by 255."
        )


def _has_prompts(source: Any) -> bool:
    """Whether weights are those of a run that trained prompts."""
    if not isinstance(source, str | Path) or source == "none":
        return False
    found = native.described(locate(source).configs)
    return bool(found and found[1].get("prompts"))


def resolve(config: Config, model: Model, names: Iterable[str]) -> tuple[plan.Stage, ...]:
    """The stages of a config's plan over these parameters of its model. Raises UserError as `plan.resolve` does."""
    given = config.plan
    if callable(given):
        function = given

        @wraps(function)  # whose parameters are looked at
        def given(*args: Any, **options: Any) -> Any:
            stages = function(*args, **options)
            if isinstance(stages, Sequence) and all(isinstance(s, Stage) for s in stages):
                check_stages(stages)
            return stages

    return plan.resolve(
        given,
        list(names),
        list(model.parts),
        epochs=config.epochs,
        lr=config.lr,
        layer_decay=config.layer_decay,
        new_head=config.weights != "none" and not config.keep_head,
        batch_norm=config.weights != "none" and bool(model.shapes()[1]),
    )


@dataclass(frozen=True)
class Scale:
    """Mean and standard deviation of each quantity over the training images: a model learns (value − mean) / std.

    Whatever a quantity's unit is, a new head then begins at its mean, and the rates that suit classes suit it too.
    """

    mean: np.ndarray  # float64 [k]
    std: np.ndarray

    @classmethod
    def of(cls, labels: Float[np.ndarray, "n k"]) -> "Scale":
        std = labels.std(0)
        return cls(labels.mean(0), np.where(metrics.differ(labels) & (std > 0), std, 1.0))

    def units(self, labels: Float[np.ndarray, "n k"]) -> Float[np.ndarray, "n k"]:
        """What training takes, float32."""
        return ((labels - self.mean) / self.std).astype(np.float32)

    def values(self, outputs: Float[np.ndarray, "n k"]) -> Float[np.ndarray, "n k"]:
        """What a model that was trained so says, in the quantities' own units."""
        return np.asarray(outputs, np.float64) * self.std + self.mean

    def into_head(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The parameters of a model that says `values` itself: its head's kernels and biases hold the scale.

        Of a head that is the mean of two, as DeiT's distilled one, both do.

        >>> scale.into_head({"head/kernel": kernel, "head/bias": bias})["head/bias"]  # bias * std + mean
        """
        told = dict(params)
        for name in (n for n in params if n.startswith("head/") and n.endswith(("kernel", "bias"))):
            scaled = np.asarray(params[name], np.float64) * self.std
            told[name] = (scaled + self.mean if name.endswith("bias") else scaled).astype(np.float32)
        return told


@dataclass
class Split:
    """One split ready to be read: decoded whole where it fits, else read again and again.

    Training takes `labels`, where these are quantities in units of `scale`; the dataset has them as they were given.
    """

    dataset: sources.Dataset
    preprocess: Preprocess
    size: tuple[int, int]  # of the working images
    images: np.ndarray | None  # uint8 [n, *size, 3]
    threads: int | None
    scale: "Scale | None" = None

    @cached_property
    def taken(self) -> sources.Dataset:
        """The data set with its labels as training takes them."""
        given = self.dataset
        return replace(given, labels=self.scale.units(given.labels)) if self.scale else given

    @property
    def labels(self) -> np.ndarray:
        return self.taken.labels

    @cached_property
    def about(self) -> dict[str, Any]:
        """How many images could be read, and which: a hash of their names."""
        names = json.dumps(list(self.dataset.names)).encode()
        return {"count": len(self.dataset), "names": hashlib.sha256(names).hexdigest()[:16]}

    def evaluation(self, batch: int) -> Iterator[dict[str, np.ndarray]]:
        """Every example once, in order; the last batch is filled up with rows that its `mask` leaves out."""
        if self.images is None:
            yield from pipeline.evaluation_stream(self.taken, self.preprocess, batch, self.threads, self.size)
            return
        for index, mask in zip(*order.evaluation_batches(len(self.labels), batch), strict=True):
            yield {"image": self.images[index], "label": self.labels[index], "index": index, "mask": mask}


def augmentation(config: Config, stage: Stage) -> tuple[str, ...]:
    """Of this stage: a preset yields to what the config asks for, a stage that somebody wrote does not."""
    if config.augment is not None and (isinstance(config.plan, str) or stage.augment is None):
        return tuple(config.augment)
    return ("crop", "flip") if stage.augment is None else stage.augment


def load_images(
    config: Config, splits: sources.Splits, stages: Sequence[Stage], preprocess: Preprocess, display: Any
) -> tuple[dict[str, Split], list[tuple[str, str]]]:
    """The training and validation images, those that cannot be read left out, and which these were.

    What else is odd about the data, and costs nothing to find, is told (see `jft.data.check`).
    """
    for line in summary(at_start(splits)):
        display.warn(line)
    names = {name for stage in stages for name in augmentation(config, stage)}
    # A head that is kept says the quantities as they are.
    scale = Scale.of(splits.train.labels) if splits.train.quantities and not config.keep_head else None
    data, left_out = {}, []
    for split, dataset in (("train", splits.train), ("val", splits.val)):
        assert dataset is not None
        size = work_size(preprocess, sorted(names)) if split == "train" else preprocess.size
        fits = image_bytes(config, size, len(dataset)) <= memory_budget(config.resident)
        images = None
        with display.task(f"Decoding {split}", total=len(dataset), unit="images") as advance:
            tell = _differences(advance)
            if fits:
                images, kept, bad = pipeline.decode_all(dataset, preprocess, size, config.threads, tell)
            else:
                kept, bad = pipeline.readable(dataset, preprocess, config.threads, tell)
                pipeline.require(kept, bad)
        for name, reason in bad:
            display.warn(f"left out: {name}: {reason}")
        left_out += bad
        data[split] = Split(dataset.select(kept), preprocess, size, images, config.threads, scale)
        if not fits:
            display.note(f"The images of {split} do not fit in memory (--resident): they are decoded every epoch.")
    had = splits.train.labels
    missing = [
        c for i, c in enumerate(splits.classes) if _has_class(had, i) and not _has_class(data["train"].labels, i)
    ]
    if missing and not splits.train.quantities:
        raise UserError(f"No image of {', '.join(missing[:5])} could be read for training. The reasons are above.")
    if splits.test is not None and not pipeline.any_readable(splits.test, preprocess):
        display.warn("Not one image of test can be read: the run will have no figures of it.")
    return data, left_out


def _has_class(labels: np.ndarray, i: int) -> bool:
    return bool((labels == i if labels.ndim == 1 else labels[:, i] > 0).any())


def image_bytes(config: Config, size: tuple[int, int], count: int) -> int:
    """Of so many images on each device: those with memory of their own hold a share, those of a CPU have one memory."""
    shares = 1 if jax.default_backend() == "cpu" else jax.device_count() // config.tensor
    return -(-3 * size[0] * size[1] * count // shares)


def _differences(advance: Callable[[int], Any]) -> Callable[[int, int], None]:
    """From "so many done of so many" to "so many more done"."""
    told = [0]

    def tell(done: int, total: int) -> None:
        advance(done - told[0])
        told[0] = done

    return tell


def _no_classes(dataset: sources.Dataset) -> str:
    return "quantities" if dataset.quantities else "several labels an image"


def few_shots(dataset: sources.Dataset, shots: int, seed: int) -> sources.Dataset:
    """The first `shots` examples of each class in an order drawn by seed: fewer are always among more."""
    return dataset.select(draw_shots(dataset, shots, seed))


def draw_shots(dataset: sources.Dataset, shots: int, seed: int) -> Int[np.ndarray, " n"]:
    """The places of `few_shots`, rising. Raises UserError for labels that are no classes."""
    if dataset.labels.ndim != 1:
        raise UserError(f"--shots draws images by class; these data have {_no_classes(dataset)}.")
    if shots < 1:
        raise UserError(f"--shots is {shots}; at least 1 image a class is needed.")
    shuffled = order.permutation(len(dataset), seed, 1)
    chosen = [shuffled[dataset.labels[shuffled] == c][:shots] for c in range(len(dataset.classes))]
    return np.sort(np.concatenate(chosen))


def memory_free() -> int:
    """Bytes of a device's memory that nothing uses; on a CPU those that the machine can give this process."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"] - stats.get("bytes_in_use", 0))
    return available()


def memory_budget(share: float) -> int:
    """Bytes of data that may lie on each device: this share of what is free, in every process the same."""
    return int(shard.agree(share * memory_free(), min))


def convolves(model: Model, cut: str | None, params: Mapping[str, Any]) -> bool:
    """Whether gradients of what lies from the cut on go through a convolution that is more than a matrix product."""
    parts = model.span(cut)
    kernels = (v for n, v in params.items() if plan.part_of(n, model.parts) in parts and not n.endswith(PRODUCT))
    return any(len(v.shape) == 4 and tuple(v.shape[:2]) != (1, 1) for v in kernels)


def takes_tokens(model: Model, cut: str | None, params: Mapping[str, Any]) -> int:
    """Tokens an example that gradients go through matrix products of, as a transformer's; 0 where there are none."""
    parts = model.span(cut)
    products = any(n.endswith("/kernel") and plan.part_of(n, model.parts) in parts[:-1] for n in params)
    if not products or convolves(model, cut, params):
        return 0
    return max((s[0] for s in map(model.shape_before, parts[1:]) if len(s) == 2), default=0)


def most_pieces(batch: int, tokens: int) -> int:
    """The most pieces of a batch that have `PIECE` tokens each at least."""
    return max((n for n in range(1, batch + 1) if batch % n == 0 and batch // n * tokens >= PIECE), default=1)


@dataclass(frozen=True)
class Leg:
    """A stage on this run's data: what trains, and which of the run's steps are its own."""

    number: int
    stage: Stage
    multipliers: dict[str, float]
    labels: dict[str, str]  # of the optimizer's groups
    trainable: frozenset[str]
    train_parts: tuple[str, ...]
    update_stats: tuple[str, ...]  # parts whose BatchNorms use and move with the batch
    cut: str | None  # the first part that trains; those before it can be run once
    augment: tuple[str, ...]
    first: int
    last: int


def lay_out(config: Config, stages: Sequence[Stage], model: Model, examples: int) -> list[Leg]:
    """The legs of a plan: `round(epochs · examples / batch)` steps a stage, at least one."""
    params, stats = model.shapes()
    legs: list[Leg] = []
    step = 0
    for number, stage in enumerate(stages):
        values = plan.multipliers(stage, list(params), list(model.parts))
        trainable = plan.trainable(values)
        parts = plan.parts_with(trainable, model.parts)
        norms = plan.parts_with(stats, parts) if stage.batch_norm == "auto" else []
        last = step + max(1, round((stage.epochs or 0) * examples / config.batch))
        legs.append(
            Leg(
                number, stage, values, plan.labels([*(g.multipliers for g in legs), values], config.carry),
                trainable, tuple(parts), tuple(norms),
                features.cut(model, trainable), augmentation(config, stage), step, last,
            )
        )  # fmt: skip
        step = last
    return legs


def usual_pieces(config: Config, model: Model, leg: Leg, params: Mapping[str, Any]) -> int:
    """In how many pieces a batch of this leg is taken where nothing asks for others.

    A transformer's step of 32 images takes a fifth less time in four of them on a CPU: less memory is touched anew.
    """
    if jax.default_backend() != "cpu" or leg.update_stats or config.objective:
        return 1
    share = config.batch // shard.make_mesh(model=config.tensor).shape[shard.DATA]
    return most_pieces(share, takes_tokens(model, leg.cut, params))


def check(
    config: Config,
    model: Model,
    stages: Sequence[Stage],
    splits: sources.Splits,
    missing: Collection[str] = (),
) -> None:
    """Raises UserError for whatever of a config would otherwise stop a run after its folder has been made.

    `missing` are the names that the weights are known to lack: a penalty or an objective is tried without their values.
    """
    if config.tensor > 1 and config.sharding == "pmap":
        raise UserError("--tensor goes with --sharding replicate or fsdp, not with pmap.")
    if config.sharding == "pmap" and jax.process_count() > 1:
        raise UserError("--sharding pmap is for one process; --distributed goes with replicate or fsdp.")
    share = shard.make_mesh(model=config.tensor).shape[shard.DATA] * (config.accumulate or 1)
    if config.batch % share:
        pieces = f" in {config.accumulate} pieces" if config.accumulate else ""
        raise UserError(
            f"--batch {config.batch} cannot be shared by {jax.device_count() // config.tensor} devices{pieces}; take a "
            f"multiple of {share}."
        )
    if optim.is_free(config.optimizer) and (config.carry or config.ema):
        raise UserError(
            f"--optimizer {describe(config.optimizer)} averages the weights of each stage itself: leave out "
            f"{'--carry' if config.carry else '--ema'}."
        )
    if config.penalty_decoupled and (config.penalty is None or config.objective):
        raise UserError("--penalty-decoupled is about --penalty, and there is none, or an --objective of its own.")
    if config.penalty is not None and not config.penalty_weight and "penalty_weight" not in config.given:
        raise UserError("--penalty counts for nothing without its factor: --penalty-weight 0.01, for one.")
    if config.penalty_weight and config.penalty is None and config.objective is None:
        raise UserError("--penalty-weight is the factor of a --penalty, and there is none; l2-sp is one.")
    if config.lora and not isinstance(model, LoraModel):
        raise UserError(
            f"--lora.{next(iter(config.lora))} is about low-rank updates, and there are none: take --plan lora, or "
            "--lora.rank 8 and stages that train */lora_*."
        )
    if config.balance and splits.train.labels.ndim != 1:
        other = "" if splits.train.quantities else " Take --class-weights, for one."
        raise UserError(f"--balance draws images by class; these data have {_no_classes(splits.train)}.{other}")
    if splits.train.quantities and config.probe == "logistic":
        raise UserError("--probe logistic tells classes; these data have quantities: --probe ridge, or knn.")
    if splits.train.quantities and (config.class_weights or config.label_smoothing):
        option = "--class-weights" if config.class_weights else "--label-smoothing"
        raise UserError(f"{option} is about classes; these data have quantities.")
    if config.snapshots and isinstance(model, LoraModel):
        raise UserError("--snapshots holds whole weights, not low-rank updates; `jft average` takes several runs' too.")
    _check_loss(method(config, "loss"), splits.train)
    loss, label = choose_loss(config, splits.train), splits.train.labels
    logits = jax.ShapeDtypeStruct((config.batch, model.num_classes), np.float32)
    dtype = label.dtype if label.ndim == 1 else np.float32
    given = {"label": jax.ShapeDtypeStruct((config.batch, *label.shape[1:]), dtype)}
    taken = f"labels {given['label'].shape} of these data, {given['label'].dtype}, for logits {logits.shape}"
    with asked(f"The loss cannot take {taken}"):
        told = jax.eval_shape(loss, logits, given).shape
    if told != (config.batch,):
        raise UserError(f"The loss gives {told} for a batch of {config.batch}; one value per example is expected.")
    heads = {n.removeprefix("head/") for n in model.shapes()[0] if n.startswith("head/") and "/lora_" not in n}
    if takes_head(config) and heads != {"kernel", "bias"}:
        raise UserError(
            f"The objective takes a head of one kernel and bias; that of {model.name} has {', '.join(sorted(heads))}. "
            "--objective distil holds the features themselves."
        )
    legs = lay_out(config, stages, model, len(splits.train))
    _check_views(config, legs)
    if penalty := method(config, "penalty"):
        _check_strengths(penalty, model)
    for leg in legs:
        check_augment(leg.augment)
        if config.views and leg.cut and (mixers := [a for a in leg.augment if a.split(":")[0] in MIXERS]):
            raise UserError(f"--views keeps what single images give; {', '.join(mixers)} mixes images. Leave one out.")
        with asked("No schedule, which is a name or a function (peak, steps) -> optax schedule"):
            float(make_leg_schedule(config, leg)(0))
        _check_optimizer(config, model, leg)
        if penalty:
            _check_penalty(penalty, model, leg, missing)
        if config.objective is not None:
            _check_objective(config, model, leg, loss, given, missing)


def check_first(config: Config, splits: sources.Splits) -> None:
    """`check` as far as it needs no weights: a mistake in an option is told before any are fetched or read."""
    model = model_of(config, len(splits.classes))
    _check_preprocess(replace(weights.default_preprocess(model)[0], **config.preprocess), model)
    check(config, model, resolve(config, model, model.shapes()[0]), splits)


def check_missing(
    config: Config, model: Model, stages: Sequence[Stage], splits: sources.Splits, missing: Collection[str]
) -> None:
    """`check` again, once the names that the weights lack are known, where something takes the pretrained values."""
    if missing and needs_source(config):
        check(config, model, stages, splits, missing)


def _check_views(config: Config, legs: Sequence[Leg]) -> None:
    """Raises UserError for views that no stage would keep."""
    if config.views is None:
        return
    if config.features == "none":
        raise UserError("--views is about features that are kept, and --features none keeps none. Leave one out.")
    if any(leg.cut and leg.augment for leg in legs):
        return
    way_out = "Say --augment crop flip, for one" if any(leg.cut for leg in legs) else "Leave it out"
    raise UserError(
        f"--views {config.views} keeps features of augmented images from below what trains, and no stage of this plan "
        f"has both frozen parts there and an augmentation. {way_out}."
    )


def _check_optimizer(config: Config, model: Model, leg: Leg) -> None:
    """Raises UserError for an optimizer of the user's that is none, or that applies a learning rate itself."""
    shapes = model.shapes()[0]
    trained = {n: shapes[n] for n in sorted(leg.trainable)}
    with asked(
        "No optimizer, which is a name or a function (weight_decay, mask) -> optax transformation without a rate"
    ):
        optimizer, _ = make_leg_optimizer(config, leg)
        if isinstance(config.optimizer, str) and name_of(config.optimizer) in optim.OPTIMIZERS:
            return
        jax.eval_shape(lambda params: optimizer.update(params, optimizer.init(params), params), trained)
        plain = optim.OPTIMIZERS.find(config.optimizer)(0.0, optim.decays)

    def along() -> Any:
        ones = {n: jnp.ones(s.shape, s.dtype) for n, s in trained.items()}
        updates = plain.update(ones, plain.init(ones), ones)[0]
        return sum(jnp.sum(u) for u in updates.values())

    if float(jax.jit(along)()) < 0:
        raise UserError(
            "The optimizer gives steps down the gradient, so it applies a learning rate, and the run's own would turn "
            "them uphill. Leave the rate out: optax.scale_by_adam() in place of optax.adam(…), optax.trace(0.9) of "
            "optax.sgd(…, momentum=0.9)."
        )


def _check_strengths(penalty: Callable[..., Any], model: Model) -> None:
    """Raises UserError for a pattern of a penalty that names none of the model's parameters."""
    params, stats = model.shapes()
    # What else is wrong a leg's own parameters show: of those that never train it may want nothing.
    with contextlib.suppress(TypeError, ValueError, LookupError, AttributeError), penalties.whole_model():
        jax.eval_shape(penalty, _effective(model, params), params | stats)


def _effective(model: Model, trainable: Collection[str]) -> Any:
    """The shapes that a penalty sees where these train."""
    return jax.eval_shape(lambda params: model.effective(params, trainable), model.shapes()[0])


def _check_penalty(penalty: Callable[..., Any], model: Model, leg: Leg, missing: Collection[str]) -> None:
    """Raises UserError for a penalty that is none of a leg's parameters and of the pretrained values there are."""
    params, stats = model.shapes()
    source = {n: shape for n, shape in (params | stats).items() if n not in missing}
    with asked("--penalty cannot be taken"):
        told = jax.eval_shape(penalty, _effective(model, leg.trainable), source)
        if jnp.shape(told) != ():
            raise UserError(f"--penalty gives {jnp.shape(told)}; a scalar is expected.")


def _check_objective(
    config: Config,
    model: Model,
    leg: Leg,
    loss: Callable[..., Any],
    labels: Mapping[str, Any],
    missing: Collection[str],
) -> None:
    """Raises UserError for an objective that a leg cannot make, or that does not give what a step needs."""
    if config.sharding == "pmap":  # whose axis there is only within it
        config = config.replace(sharding="replicate")
        model = model_of(config, model.num_classes)
    params, stats = model.shapes()
    source = source_shapes(config, params | stats, missing)
    preprocess = Preprocess(size=(model.input_shape[0], model.input_shape[1]))
    prepare = make_prepare(preprocess, leg.augment, train=True, num_classes=model.num_classes)
    batch = {
        **labels,
        "index": jax.ShapeDtypeStruct((config.batch,), np.int32),
        model.input: jax.ShapeDtypeStruct((config.batch, *work_size(preprocess, leg.augment), 3), np.uint8),
    }

    def trace(params: Any, stats: Any, source: Any, batch: Any, key: Any) -> Any:
        objective = make_leg_objective(config, model, leg, source, loss, None)
        return objective(params, stats, prepare(batch, key), key)

    with asked("--objective, a function (model, …) -> (params, batch_stats, batch, key) -> …, cannot be taken"):
        told = jax.eval_shape(trace, params, stats, source, batch, jax.eval_shape(lambda: jax.random.key(0)))
    expected = (
        "a scalar, and a pair: metrics by name, each a scalar, 'loss' among them, and the batch statistics afterwards"
    )
    try:
        value, (reported, after) = told
        fits = value.shape == () and not any(m.shape for m in reported.values()) and set(after) == set(stats)
    except (TypeError, ValueError, AttributeError):
        raise UserError(f"--objective gives {brief(str(told), 200)}; {expected} are expected.") from None
    if "loss" not in reported:
        raise UserError(f"The metrics of --objective are {', '.join(reported)}; 'loss' is the one that a run needs.")
    if not fits:
        shapes = ", ".join(f"{name} {m.shape}" for name, m in reported.items())
        raise UserError(
            f"--objective gives {value.shape}, the metrics {shapes} and {len(after)} of {len(stats)} statistics; "
            f"{expected} are expected."
        )


def make_leg_step(
    config: Config,
    model: Model,
    leg: Leg,
    preprocess: Preprocess,
    loss: Callable[..., Any],
    start: str | None,
    pieces: int = 1,
    unroll: bool = False,
) -> TrainStep:
    """The train step of a leg, from features at `start` or from images, the batch taken in so many pieces."""
    axis_name = shard.DATA if config.sharding == "pmap" else None
    prepare = make_prepare(preprocess, leg.augment, train=True, num_classes=model.num_classes, axis_name=axis_name)
    mesh = shard.make_mesh(model=config.tensor)

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        penalty, frozen = method(config, "penalty"), tree.split(state.params, leg.trainable)[1]
        pull: Callable[[Any], Any] | None = None
        if penalty and config.penalty_decoupled:

            def pull(train: Mapping[str, Any]) -> Any:
                now = model.effective(tree.merge(dict(train), frozen), leg.trainable)
                return config.penalty_weight * penalty(now, state.source)

        # Put together where it is traced: the source's values are arguments of the compiled program. As constants they
        # would be written out in it, twice their size, and 2 GB are more than a compiler takes.
        made = make_train_step(
            make_leg_objective(config, model, leg, state.source, loss, start),
            make_leg_optimizer(config, leg, pull)[0],
            trainable=leg.trainable,
            prepare=(lambda batch, key: batch) if start else prepare,
            ema=config.ema or 0.0,
            sam=config.sam,
            accumulate=pieces,
            unroll=unroll,
            gather=partial(shard.gathered, mesh=mesh) if config.sharding == "fsdp" else None,
            axis_name=axis_name,
        )
        return made(state, batch)

    return step


def needs_source(config: Config) -> bool:
    """Whether the steps of a run need the pretrained values."""
    return config.penalty is not None or config.objective is not None


def takes_head(config: Config) -> bool:
    """Whether the objective asks for the weights' own head, by a parameter `source_head` that nobody has set."""
    objective = method(config, "objective")
    try:
        asked = inspect.signature(objective).parameters.get("source_head") if objective else None
    except (TypeError, ValueError):  # of what has no signature; whether it can be called is told where it is
        return False
    return asked is not None and asked.default is asked.empty


def source_shapes(config: Config, shapes: Mapping[str, Any], missing: Collection[str]) -> dict[str, Any]:
    """What a run is to hold of the pretrained values, of a model's shapes and the names that the weights lack."""
    source = {n: shape for n, shape in shapes.items() if n not in missing}
    if takes_head(config):  # of other classes than the model's; nothing hangs on how many
        source |= {SOURCE_HEAD + n: shapes[f"head/{n}"] for n in ("kernel", "bias")}
    return source


def make_leg_objective(
    config: Config,
    model: Model,
    leg: Leg,
    source: Mapping[str, Any],
    loss: Callable[..., Any],
    start: str | None,
) -> Objective:
    """What a leg minimises: the config's objective, or a loss over labelled examples."""
    penalty, objective = method(config, "penalty"), method(config, "objective") or supervised
    if penalty and config.penalty_decoupled:  # told here, and felt in the optimizer
        told = penalty
        penalty = lambda params, source: jax.lax.stop_gradient(told(params, source))  # noqa: E731
    head = {n.removeprefix(SOURCE_HEAD): v for n, v in source.items() if n.startswith(SOURCE_HEAD)}
    given = {"source_head": head} if takes_head(config) else {}
    return objective(
        model,
        train_parts=leg.train_parts,
        update_stats=leg.update_stats,
        trainable=leg.trainable,
        loss=loss,
        penalty=penalty,
        penalty_weight=config.penalty_weight,
        source={n: v for n, v in source.items() if not n.startswith(SOURCE_HEAD)},
        start=start,
        **given,
    )


def make_leg_diagnosis(
    config: Config,
    model: Model,
    leg: Leg,
    preprocess: Preprocess,
    loss: Callable[..., Any],
) -> Callable[[State, Mapping[str, Any], int], Suspect | None]:
    """A function `(state, batch, step)`: where the numbers of the images that were this step's stop being finite."""
    diagnose = make_diagnosis(
        model,
        lambda source: make_leg_objective(config, model, leg, source, loss, None),
        loss,
        trainable=leg.trainable,
        train_parts=leg.train_parts,
        update_stats=leg.update_stats,
    )
    prepare = make_prepare(preprocess, leg.augment, train=True, num_classes=model.num_classes)

    def of_step(state: State, batch: Mapping[str, Any], step: int) -> Suspect | None:
        augment_key, model_key = jax.random.split(jax.random.fold_in(jax.random.wrap_key_data(state.key), step - 1))
        return diagnose(state, jax.jit(prepare)(dict(batch), augment_key), model_key)

    return of_step


def make_leg_schedule(config: Config, leg: Leg) -> Callable[[int], Any]:
    """The learning rate of a leg, of a multiple of 1, by its step."""
    stage = leg.stage
    assert stage.lr is not None  # plan.resolve has set it
    name = stage.schedule or config.schedule or optim.usual_schedule(config.optimizer)
    warmup = config.warmup if stage.warmup is None else stage.warmup
    return optim.make_schedule(name, stage.lr, leg.last - leg.first, warmup)


def make_leg_optimizer(
    config: Config, leg: Leg, pull: Callable[[Any], Any] | None = None
) -> tuple[Any, Callable[[int], Any]]:
    """The optimizer of a leg over the parameters that train in it, and its learning rate by the leg's step.

    `pull` is the penalty as a function of them, for one that is decoupled; what has no need of steps needs none.
    """
    schedule = make_leg_schedule(config, leg)
    optimizer = optim.make_optimizer(
        config.optimizer,
        schedule,
        leg.multipliers,
        leg.labels,
        weight_decay=config.weight_decay,
        clip=config.clip,
        surgical={n: plan.part_of(n, leg.train_parts) for n in leg.trainable} if leg.stage.surgical else None,
        pull=pull,
    )
    return optimizer, schedule


def _check_loss(loss: Any, data: sources.Dataset) -> None:
    """Raises UserError for a loss of ours on labels that it is not for: it would learn something else, or nothing."""
    loss = loss.func if isinstance(loss, partial) else loss
    of_classes: tuple[Any, ...] = (losses.cross_entropy, losses.focal)
    of_several: tuple[Any, ...] = (losses.binary_cross_entropy, losses.binary_focal, losses.asymmetric)
    of_quantities: tuple[Any, ...] = (losses.squared_error, losses.huber)
    # A binary loss of one label an image is as good as any: a sigmoid a class.
    fit = of_quantities if data.quantities else of_several if data.several else (*of_classes, *of_several)
    if loss in fit or loss not in (*of_classes, *of_several, *of_quantities):
        return
    labels = "quantities" if data.quantities else "several labels an image" if data.several else "one label an image"
    names = {f: name for name, f in losses.LOSSES.items()}
    known = ", ".join(names[f] for f in fit)
    raise UserError(f"--loss {names[loss]} is not for these data, which have {labels}; for them are {known}.")


def choose_loss(config: Config, data: sources.Dataset) -> Callable[..., Any]:
    """The config's loss with what it asks of it, or that of the data's labels.

    Cross-entropy of classes, binary where an image can have several, the squared error of quantities.
    """
    usual = losses.binary_cross_entropy if data.several else losses.cross_entropy
    loss = method(config, "loss") or (losses.squared_error if data.quantities else usual)
    options: dict[str, Any] = {"label_smoothing": config.label_smoothing} if config.label_smoothing else {}
    if config.class_weights:
        given = config.class_weights
        if isinstance(given, str) and "=" not in given:
            options["class_weights"] = losses.class_weights(data.labels, len(data.classes), given)
        else:
            options["class_weights"] = losses.named_weights(given, data.classes)
    for name in options:
        if not _takes(loss, name):
            raise UserError(
                f"--{name.replace('_', '-')} is given to the loss as {name}=…, and {import_path(loss)} has no such "
                "parameter."
            )
    return partial(loss, **options) if options else loss


def _takes(function: Callable[..., Any], name: str) -> bool:
    """Whether a function can be given a parameter by this name; of what has no signature it is supposed."""
    try:
        known = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return True
    return name in known or any(p.kind is p.VAR_KEYWORD for p in known.values())


def summarise(parts: Sequence[str]) -> list[str]:
    """Part names with runs of blocks folded: stage4/block0, stage4/block1 → stage4; block9, block10 → block9-10."""
    short: list[str] = []
    for part in parts:
        top = part.split("/")[0]
        if short and short[-1] == top:
            continue
        if short and top.startswith("block") and short[-1].startswith("block"):
            short[-1] = short[-1].split("-")[0] + "-" + top.removeprefix("block")
            continue
        short.append(top)
    return short
