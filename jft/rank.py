"""Which pretrained model for these images: scores from features computed once, and what fine-tuning would cost."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import comb
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jft import features, metrics, probes, shard, weights
from jft.build import Scale, Split, draw_shots, memory_budget
from jft.data import order, pipeline, sources
from jft.data.prepare import make_prepare
from jft.errors import UserError, near
from jft.models import MODELS, make_model
from jft.models.base import Model
from jft.preprocess import Preprocess
from jft.report.live import duration, make_display
from jft.run import compile_cache
from jft.step import FEATURES, make_eval_step
from jft.use import probabilities

# What models can be ordered by, and what each is. The first is the default: it alone is measured on images that the
# probe has not seen, is what a head stage reaches when trained to its end, and is in the same units for every model.
# LogME and LEEP are told by the images they were fitted to, and are for where fitting a probe is too dear.
METRICS = {
    "linear": "a linear probe on images it was not fitted to, ties by its log loss",
    "knn": "nearest neighbours (20, cosine), ties by their log loss",
    "logme": "LogME, the log evidence of a linear model of the labels",
    "leep": "LEEP, what the source's own classes tell of the labels (N-LEEP where a model has no head)",
    "mean-rank": "the mean place by the others",
}
ROWS = 1024  # of features given to a head at a time


@dataclass(frozen=True)
class Ranking:
    """Models in order, the best first, with what they were ordered by and scored on."""

    rows: list[dict[str, Any]]
    metric: str
    figure: str  # of probes: accuracy, average_precision where an image may have several labels, r2 of quantities
    fitted: int  # images
    scored: int
    scored_on: str
    classes: tuple[str, ...]
    epochs: float  # of the stages whose cost is told
    batch: int
    excluded: list[tuple[str, str]]
    device: str

    def json(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        return {"ordered_by": METRICS[self.metric]} | vars(self) | {"classes": list(self.classes)}


def parse_models(words: Sequence[str]) -> list[tuple[str, str | None]]:
    """Names and NAME=WEIGHTS, separated by commas or spaces, as pairs (name, weights or None for the default).

    Raises UserError for a name that is no model.

    >>> parse_models(["resnet18=a.pth,resnet50", "vit_tiny_patch16_224=hf:timm/vit"])
    [('resnet18', 'a.pth'), ('resnet50', None), ('vit_tiny_patch16_224', 'hf:timm/vit')]
    """
    pairs: list[tuple[str, str | None]] = []
    for word in (piece for w in words for piece in w.split(",") if piece.strip()):
        name, given, source = word.strip().partition("=")
        if name not in MODELS:
            raise UserError(
                f"There is no model {name!r}.{near(name, MODELS)} --models takes NAME or NAME=WEIGHTS, separated by "
                "commas; `jft models` prints the names."
            )
        if given and not source:
            raise UserError(f"{word!r} names no weights; NAME=WEIGHTS is expected, or NAME alone for its default.")
        pairs.append((name, source or None))
    return pairs


def rank(
    data: Any,
    models: Sequence[str | tuple[str, str | None]],
    *,
    metric: str = "linear",
    shots: int | None = None,
    seed: int = 0,
    batch: int = 32,
    epochs: float = 10.0,
    image_size: int | None = None,
    resident: float = 0.5,
    threads: int | None = None,
    display: Any = None,
) -> Ranking:
    """Score pretrained models on labelled images by their features before the head, computed once for each.

    `models` are names, or pairs of a name and weights as `weights.load` takes them (`none`: fresh ones). Where the data
    have a validation split, probes are fitted to the training images and scored on it; else to all images, each scored
    by a probe fitted without it (a linear one in 5 folds, of which one is enough above 5,000 images). `shots` is the
    most images a class to fit to; without a validation split they are scored on as many others a class, where there are
    any. `epochs` and `batch` are of the stages whose cost is told. Raises UserError.

    >>> rank("bees/", ["resnet18", ("resnet50", "resnet50.pth")]).rows[0]["model"]
    'resnet50'
    """
    pairs = [m if isinstance(m, tuple) else (m, None) for m in models]
    if metric not in METRICS:
        raise UserError(f"There is no metric {metric!r}.{near(metric, METRICS)} Known: {', '.join(METRICS)}.")
    if not pairs or len(set(pairs)) < len(pairs):
        raise UserError("A model is named twice, with the same weights." if pairs else "There are no models to rank.")
    if batch < 1 or not epochs > 0:
        raise UserError(f"--batch is {batch} and --epochs {epochs:g}; at least 1 and above 0 are expected.")
    compile_cache()
    display = display or make_display("quiet")
    candidates = [_open(name, source, image_size) for name, source in pairs]  # what is wrong with any, before the work
    splits = sources.load(data, seed=seed, val_fraction=0)
    for name, reason in splits.excluded:
        display.warn(f"left out: {name}: {reason}")
    train, others = splits.train, splits.val
    if shots is not None:
        train, not_drawn = _draw(splits.train, shots, seed)
        others = not_drawn if others is None else others
    if metric == "leep" and train.labels.ndim == 2:
        have = "quantities" if train.quantities else "several"
        raise UserError(f"LEEP is for one label an image, and these data have {have}. Take another --metric.")
    mixture = any(candidate.head is None for candidate in candidates)
    if metric == "leep" and mixture and not probes.gaussians(len(train), len(splits.classes)):
        raise _no_leep()
    images = Images([train] if others is None else [train, others], resident, threads, display)

    rows, hits = [], []
    for candidate in candidates:
        row, seen = _see(candidate, images, batch, display)
        with display.task(f"Probes of {candidate.name}", total=1, unit="model") as advance:
            scores, hit = _score(seen, images, splits.classes, mixture, seed)
            advance(1)
        rows.append(row | scores | {"cost": _cost(candidate, row, images, len(splits.classes), batch, epochs)})
        hits.append(hit)
    ordered = _order(rows, hits, metric)
    labels = images.labels[0]
    if others is not None and splits.val is None:
        where = f"{len(hits[0])} images that were not drawn, by probes fitted to {len(labels)}"
    elif others is not None:
        where = f"{len(hits[0])} validation images, by probes fitted to {len(labels)}"
    elif len(hits[0]) == len(labels):
        where = f"{len(labels)} images, each by a probe fitted without it"
    else:
        where = f"{len(hits[0])} of {len(labels)} images, by a probe fitted to the others"
    return Ranking(
        rows=ordered,
        metric=metric,
        figure=_figure(images),
        fitted=len(labels),
        scored=len(hits[0]),
        scored_on=where,
        classes=splits.classes,
        epochs=epochs,
        batch=batch,
        excluded=[*splits.excluded, *images.excluded],
        device=jax.devices()[0].device_kind,
    )


def _draw(dataset: sources.Dataset, shots: int, seed: int) -> tuple[sources.Dataset, sources.Dataset | None]:
    """`shots` images a class to fit to, and as many others of it to score on, None where no class has more.

    Left out in turn, so few would say nothing: a probe that lacks one of two images of a class is below chance on it.
    """
    drawn, more = (draw_shots(dataset, k, seed) for k in (shots, 2 * shots))
    rest = np.setdiff1d(more, drawn)
    return dataset.select(drawn), dataset.select(rest) if len(rest) else None


def _no_leep() -> UserError:
    return UserError(
        "There are too few images to order models by LEEP: not every model has a head of its own, so it needs N-LEEP, "
        f"whose Gaussians are one for each class at least, of {probes.EXAMPLES} images each. Take --metric linear or "
        "logme, or leave out the models without a head."
    )


@dataclass(frozen=True)
class Candidate:
    """A model to be scored, its head that of its weights."""

    name: str
    source: str | None
    model: Model
    head: int | None  # classes of the weights' own head


@dataclass(frozen=True)
class Seen:
    """What a model gave: features for each set of images, and its own head's probabilities of the first."""

    sets: list[np.ndarray]  # float32 [n, d]
    told: np.ndarray | None  # [n, z]


def _open(name: str, source: str | None, image_size: int | None) -> Candidate:
    options: dict[str, Any] = {} if image_size is None else {"image_size": image_size}
    model = make_model(name, **options)
    head = None if source == "none" else weights.head_size(model, source)
    return Candidate(name, source, make_model(name, num_classes=head or 1, **options), head)


class Images:
    """The sets of images, decoded once for each preprocessing that differs in more than mean and standard deviation."""

    def __init__(self, sets: Sequence[sources.Dataset], resident: float, threads: int | None, display: Any):
        self.sets, self.resident, self.threads, self.display = sets, resident, threads, display
        self.excluded: list[tuple[str, str]] = []
        self.kept: list[np.ndarray] | None = None  # of each set, the same for all models
        self.decoded: dict[Preprocess, list[Split]] = {}
        self.seconds = 0.0

    @property
    def labels(self) -> list[np.ndarray]:
        """Of each set, those of images that could be read."""
        assert self.kept is not None
        return [s.labels[kept] for s, kept in zip(self.sets, self.kept, strict=True)]

    def splits(self, preprocess: Preprocess) -> list[Split]:
        """The sets as working images. Raises UserError where another preprocessing could read other images."""
        key = replace(preprocess, mean=(), std=())
        if key not in self.decoded:
            begun = time.perf_counter()
            done = [self._decode(s, preprocess, i) for i, s in enumerate(self.sets)]
            self.seconds += time.perf_counter() - begun
            kept = [k for _, k, _ in done]
            if self.kept is None:
                self.kept = kept
                self.excluded = [pair for *_, bad in done for pair in bad]
                for name, reason in self.excluded:
                    self.display.warn(f"left out: {name}: {reason}")
            if any(len(a) != len(b) or (a != b).any() for a, b in zip(kept, self.kept, strict=True)):
                odd = {n for *_, bad in done for n, _ in bad} ^ {n for n, _ in self.excluded}
                raise UserError(f"Only some models can take {', '.join(sorted(odd)[:5])}. Take these images away.")
            self.decoded[key] = [split for split, *_ in done]
        return [replace(split, preprocess=preprocess) for split in self.decoded[key]]

    def _decode(self, dataset: sources.Dataset, preprocess: Preprocess, i: int) -> tuple[Split, np.ndarray, Any]:
        height, width = preprocess.size
        what = f"Decoding the images {('fitted to', 'scored on')[i]} at {height}×{width}, {preprocess.interpolation}"
        fits = 3 * height * width * len(dataset) <= memory_budget(self.resident)
        images = None
        with self.display.task(what, total=len(dataset), unit="images") as advance:
            told = 0

            def tell(done: int, total: int) -> None:
                nonlocal told
                advance(done - told)
                told = done

            if fits:
                images, kept, bad = pipeline.decode_all(dataset, preprocess, preprocess.size, self.threads, tell)
            else:
                kept, bad = pipeline.readable(dataset, preprocess, self.threads, tell)
        return Split(dataset.select(kept), preprocess, preprocess.size, images, self.threads), kept, bad


def _see(candidate: Candidate, images: Images, batch: int, display: Any) -> tuple[dict[str, Any], Seen]:
    """What one model makes of the images, and what that took."""
    begun = time.perf_counter()
    model, source = candidate.model, candidate.source
    loaded = weights.scratch(model) if source == "none" else weights.load(model, source)
    params: dict[str, Any] = loaded.params
    stats: dict[str, Any] = loaded.batch_stats
    if source == "none":
        params, stats = model.init(jax.random.key(0))
    params, stats = jax.device_put((params, stats))
    imported = time.perf_counter()
    splits = images.splits(loaded.preprocess)
    decoded = time.perf_counter()
    prepare = make_prepare(loaded.preprocess, (), train=False)
    picture = jax.ShapeDtypeStruct((batch, *splits[0].size, 3), np.uint8)
    lowered = shard.jit(make_eval_step(model, prepare=prepare, stop="head")).lower(params, stats, {"image": picture})
    compiled = lowered.compile()
    cost, memory = compiled.cost_analysis() or {}, compiled.memory_analysis()
    ready = time.perf_counter()
    total = sum(len(split.labels) for split in splits)
    with display.task(f"Features of {candidate.name}", total=total, unit="images") as advance:
        sets = [
            features.compute(
                lambda p, s, b: compiled(p, s, {"image": b["image"]}), params, stats, split.evaluation(batch), advance
            )
            for split in splits
        ]
    seconds = time.perf_counter() - ready
    told = None
    if candidate.head:
        told = probabilities(_head(model, params, stats, np.asarray(sets[0])))
    flat = [np.asarray(x).reshape(len(x), -1) for x in sets]
    if not all(np.isfinite(x).all() for x in flat):
        raise UserError(f"The features of {candidate.name} ({loaded.receipt.source}) are not finite; leave it out.")
    row = {
        "model": candidate.name,
        "weights": loaded.receipt.source or "none",
        "weights_sha256": loaded.sha256,
        "input": list(loaded.preprocess.size),
        "source_classes": candidate.head,
        "features": flat[0].shape[1],
        "flops": float(cost.get("flops", 0)) / batch or None,
        "forward_bytes": int(memory.temp_size_in_bytes) if memory is not None else None,
        "images_per_second": total / seconds,
        "seconds": {
            "import": imported - begun,
            "decode": decoded - imported,
            "compile": ready - decoded,
            "features": seconds,
        },
    }
    return row, Seen(flat, told)


def _head(model: Model, params: Any, stats: Any, x: np.ndarray) -> np.ndarray:
    """The logits of the model's own head."""
    step = shard.jit(make_eval_step(model, start="head"))
    rows = zip(*order.evaluation_batches(len(x), min(ROWS, len(x))), strict=True)
    return np.asarray(features.compute(step, params, stats, ({FEATURES: x[i], "mask": mask} for i, mask in rows)))


def _figure(images: Images) -> str:
    return metrics.figure(images.sets[0].quantities, images.labels[0].ndim == 2)


def _score_quantities(seen: Seen, images: Images, names: Sequence[str]) -> tuple[dict[str, Any], np.ndarray]:
    """The scores of a model for quantities, and the squared error of its linear probe on each of the images scored.

    The linear probe is ridge regression. Each quantity is held in its standard deviations, so that all count alike.
    """
    begun = time.perf_counter()
    for labels, what in zip(images.labels, ("fitted to", "scored on"), strict=False):
        if not metrics.differ(labels).any():
            raise UserError(f"No quantity differs between the images {what}, so that no model can be ranked by them.")
    scale = Scale.of(images.labels[0])
    y = scale.units(images.labels[0])
    x, axes = seen.sets[0], probes.Axes(seen.sets[0])
    linear = probes.ridge(x, y, y.shape[1], axes=axes)
    if len(seen.sets) > 1:
        truth = scale.units(images.labels[1])
        found = {"linear": linear.scores(seen.sets[1]), "knn": probes.knn(x, y, seen.sets[1], y.shape[1])}
    else:
        truth = y
        assert linear.held_out is not None
        found = {"linear": linear.held_out, "knn": probes.knn(x, y, None, y.shape[1])}
    told: dict[str, Any] = {name: {"r2": metrics.quantities(p, truth, names)["r2"]} for name, p in found.items()}
    told["linear"]["penalty"] = linear.penalty
    scores = told | {"logme": probes.logme(x, y, y.shape[1]), "leep": None, "nleep": None}
    return scores | {"probe_seconds": time.perf_counter() - begun}, np.square(found["linear"] - truth).mean(axis=1)


def _score(
    seen: Seen, images: Images, classes: Sequence[str], mixture: bool, seed: int
) -> tuple[dict[str, Any], np.ndarray]:
    """All scores of a model, and for which of the images scored its linear probe is right; of quantities its errors."""
    if images.sets[0].quantities:
        return _score_quantities(seen, images, classes)
    begun = time.perf_counter()
    labels, count, several = images.labels[0], len(classes), images.labels[0].ndim == 2
    x, axes = seen.sets[0], probes.Axes(seen.sets[0])
    folds = probes.choosing_folds(labels, seed)
    linear = probes.logistic(x, labels, count, folds=folds, axes=axes)
    ridge = probes.ridge(x, labels, count, axes=axes)
    if len(seen.sets) > 1:
        test, truth = seen.sets[1], images.labels[1]
        found = {"linear": linear.scores(test), "ridge": ridge.scores(test)}
        votes = probes.knn(x, labels, test, count)
    else:
        assert linear.held_out is not None and ridge.held_out is not None
        rows = np.flatnonzero(folds >= 0)  # all models are scored on the same images, by every probe
        truth = labels[rows]
        found = {"linear": linear.held_out[rows], "ridge": ridge.held_out[rows]}
        votes = probes.knn(x, labels, None, count)[rows]
    likely = {"linear": probabilities(found["linear"], several), "knn": votes}
    summaries = {name: metrics.summary(p, truth, classes) for name, p in likely.items()}
    figure = _figure(images)
    if figure not in summaries["linear"]:
        raise UserError("The images to be scored show none of the labels, so that no model can be ranked by them.")
    told = {name: {k: v for k, v in s.items() if k in (figure, "log_loss")} for name, s in summaries.items()}
    if several:
        hit = ((likely["linear"] >= 0.5) == (truth > 0)).all(axis=1)
    else:
        hit = likely["linear"].argmax(axis=1) == truth
        told["linear"]["interval"] = list(metrics.wilson(int(hit.sum()), len(hit)))
        told["ridge"] = {"accuracy": metrics.accuracy(found["ridge"], truth)}
    told["linear"]["penalty"] = linear.penalty
    scores: dict[str, Any] = told | {"logme": probes.logme(x, labels, count), "leep": None, "nleep": None}
    if not several:
        scores["leep"] = None if seen.told is None else probes.leep(seen.told, labels, count)
        scores["nleep"] = probes.nleep(x, labels, count, seed=seed, axes=axes) if mixture else None
    return scores | {"probe_seconds": time.perf_counter() - begun}, hit


def _order(rows: Sequence[dict[str, Any]], hits: Sequence[np.ndarray], metric: str) -> list[dict[str, Any]]:
    """The rows, best first by the metric, each with its mean place and how it stands to the first."""

    def probe(name: str) -> list[Any]:
        figure = next(f for f in metrics.HEADLINES if f in rows[0][name])
        return [(row[name][figure], -row[name].get("log_loss", 0.0)) for row in rows]

    keys: dict[str, list[Any]] = {"linear": probe("linear"), "knn": probe("knn"), "logme": [r["logme"] for r in rows]}
    # LEEP over a source's classes and over clusters are not to be compared: one of them for all models.
    which = "leep" if all(row["leep"] is not None for row in rows) else "nleep"
    if all(row[which] is not None for row in rows):
        keys["leep"] = [row[which] for row in rows]
    places = {
        name: [sum(b > a for b in values) + sum(b == a for b in values) / 2 + 0.5 for a in values]
        for name, values in keys.items()
    }
    keys["mean-rank"] = [-float(np.mean([places[name][i] for name in places])) for i in range(len(rows))]
    if metric not in keys:  # of images that could not be read, too few were left
        raise _no_leep()
    by = sorted(range(len(rows)), key=lambda i: keys[metric][i], reverse=True)
    return [
        {"place": place, **rows[i], "mean_place": -keys["mean-rank"][i], "p_first": sign_test(hits[i], hits[by[0]])}
        for place, i in enumerate(by, 1)
    ]


def sign_test(one: np.ndarray, other: np.ndarray) -> float:
    """How probable so unequal a split of the images that one of two models does better on would be by chance.

    Two-sided, over the images on which they differ; where each is right or wrong it is McNemar's test in its exact form
    (McNemar 1947).
    """
    a, b = int((one > other).sum()), int((other > one).sum())
    return min(1.0, 2 * sum(comb(a + b, i) for i in range(min(a, b) + 1)) / 2 ** (a + b))


def _cost(
    candidate: Candidate, row: dict[str, Any], images: Images, classes: int, batch: int, epochs: float
) -> dict[str, Any]:
    """What a head stage and the training of everything would cost here: seconds, and bytes on the device.

    A head stage runs the model once over the images, as was measured, and the rest of it is nothing beside that. A step
    of everything is three forward passes, as measured (the backward pass has twice the FLOPs of the forward); each
    epoch ends with a validation. Bytes of everything are weights, gradients, Adam's two moments, and the activations
    that the backward pass needs, from shapes: at most what the compiler, which fuses some away, will take.
    """
    model = candidate.model
    body = {n: v for n, v in model.shapes()[0].items() if not n.startswith("head/")}
    params = sum(int(np.prod(v.shape)) for v in body.values()) + (row["features"] + 1) * classes
    n, m = len(images.labels[0]), sum(len(labels) for labels in images.labels[1:])
    pixels = batch * int(np.prod(model.input_shape))
    return {
        "params": params,
        "head": {
            "seconds": (n + m) / row["images_per_second"],
            "bytes": 4 * params + (row["forward_bytes"] or 0) + pixels + 4 * row["features"] * (n + m),
        },
        "full": {
            "seconds": epochs * (3 * n + m) / row["images_per_second"],
            "bytes": 16 * params + pixels + residual_bytes(model, batch),
        },
    }


def residual_bytes(model: Model, batch: int) -> int:
    """Bytes that a backward pass through everything before the head keeps of the forward pass, from shapes alone."""
    params, stats = model.shapes()
    parts = tuple(model.span(None, "head"))
    x = jax.ShapeDtypeStruct((batch, *model.input_shape), jnp.float32)

    def kept(params: Any, stats: Any, x: Any) -> Any:
        def forward(params: Any) -> Any:
            return model.apply(params, stats, x, stop="head", train=parts, update_stats=parts, key=jax.random.key(0))

        return jax.vjp(forward, params, has_aux=True)[1]

    return sum(v.size * v.dtype.itemsize for v in jax.tree.leaves(jax.eval_shape(kept, params, stats, x)))


def text(done: Ranking) -> str:
    """A ranking for people."""
    leep = "leep" if all(row["leep"] is not None for row in done.rows) else "nleep"
    none = done.figure == "r2"  # LEEP is of classes
    columns = ["", "model", "linear", "kNN", "LogME", *([] if none else [{"leep": "LEEP", "nleep": "N-LEEP"}[leep]])]
    table = [[*columns, "params", "FLOPs", "images/s", "head", "full", "memory"]]
    for row in done.rows:
        cost = row["cost"]
        cells = [
            str(row["place"]),
            row["model"],
            metrics.told(done.figure, row["linear"][done.figure]),
            metrics.told(done.figure, row["knn"][done.figure]),
            f"{row['logme']:.3f}",
            *([] if none else ["–" if row[leep] is None else f"{row[leep]:.3f}"]),
            f"{cost['params'] / 1e6:.1f} M",
            f"{row['flops'] / 1e9:.2f} G" if row["flops"] else "–",
            f"{row['images_per_second']:.3g}",
            duration(cost["head"]["seconds"]),
            duration(cost["full"]["seconds"]),
            f"{cost['full']['bytes'] / 1e9:.1f} GB",
        ]
        table.append(cells)
    wide = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "  ".join(c.ljust(w) if i == 1 else c.rjust(w) for i, (c, w) in enumerate(zip(line, wide, strict=True)))
        for line in table
    ]
    names = [row["model"] for row in done.rows]
    lines += [f"{row['place']}: {row['weights']}" for row in done.rows if names.count(row["model"]) > 1]
    figure = metrics.HEADLINES["r2"] if none else done.figure.replace("_", " ")
    by = METRICS[done.metric].partition(", ties")[0] if none else METRICS[done.metric]
    lines += ["", f"Ordered by {by}.", f"linear, kNN: {figure} on {done.scored_on}."]
    close = [f"{row['place']} (p = {row['p_first']:.2g})" for row in done.rows[1:] if row["p_first"] > 0.05]
    if close:
        lines.append(f"Too few images to tell the linear probe of the first from: {', '.join(close)}.")
    lines += [
        f"head, full: estimates for {done.epochs:g} epochs, batch {done.batch} on this {done.device}:",
        "head runs the model over the images once, a step of full counts as three forward passes.",
        "memory: of full, at most.",
    ]
    return "\n".join(lines)
