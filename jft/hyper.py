"""Published rules for what a config leaves open: from the number of images and their size to fields of a Config."""

import dataclasses
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jft.config import Config, check
from jft.data.decode import quiet
from jft.data.sources import Dataset, Splits
from jft.errors import UserError, asked, brief, near
from jft.plan import overridden
from jft.weights import locate, native

Rule = Callable[..., dict[str, Any]]  # (examples, size, batch) -> fields

BATCH = 512  # of both papers; their rates are scaled from it in proportion to the batch (Goyal et al. 2017)
GRID = (1e-3, 3e-3, 1e-2, 3e-2)  # the rates that the ViT paper chooses from (table 4), at batch 512


def bit(examples: int, size: tuple[int, int], batch: int = BATCH) -> dict[str, Any]:
    """BiT-HyperRule, for pictures of (height, width): Kolesnikov et al. 2020, "Big Transfer (BiT)", section 3.3.

    500, 10,000 or 20,000 steps of 512 images for fewer than 20,000, than 500,000, or more; with other batches as many
    images are seen. SGD with momentum 0.9 at 0.003, a tenth of it after 30, 60 and 90 % of the steps, no weight
    decay. Pictures smaller than 96×96 are resized to 160 and cropped to 128, others to 448 and 384
    (the released code: 512 and 480); here the shorter side is, and evaluation keeps its own centre crop. Mixup 0.1 from
    20,000 images on.
    """
    crop, resize = (128, 160) if size[0] * size[1] < 96 * 96 else (384, 448)
    return {
        "plan": "flat",
        **_length(examples),
        "optimizer": "sgd",
        "lr": 0.003 * batch / BATCH,
        "schedule": "step",
        "weight_decay": 0.0,
        "clip": None,
        "image_size": crop,
        "preprocess": {"crop_pct": crop / resize},
        "augment": ("crop", "flip", *(["mixup:alpha=0.1"] if examples >= 20_000 else [])),
    }


def vit(examples: int, size: tuple[int, int], batch: int = BATCH) -> dict[str, Any]:
    """Fine-tuning of Dosovitskiy et al. 2021, "An image is worth 16×16 words", appendix B.1.1, and vit_jax's configs.

    SGD with momentum 0.9, cosine decay, gradients clipped to 1, no weight decay, 384 pixels whatever the size,
    random windows of 5 % of the area or more, and flips. They choose the rate from `GRID`; here it is 0.01, which they
    use where they do not choose (VTAB). Steps as in BiT's rule, which are theirs for CIFAR, Pets, Flowers and ImageNet.
    """
    return {
        "plan": "flat",
        **_length(examples),
        "optimizer": "sgd",
        "lr": 0.01 * batch / BATCH,
        "schedule": "cosine",
        "weight_decay": 0.0,
        "clip": 1.0,
        "image_size": 384,
        "augment": ("rrc:0.05", "flip"),
    }


RULES: dict[str, Rule] = {"bit": bit, "vit": vit}


def _length(examples: int) -> dict[str, float]:
    """Passes over the images and the share of them in which the rate rises, as the released code has them."""
    steps, rise = (500, 100) if examples < 20_000 else (10_000, 500) if examples < 500_000 else (20_000, 500)
    return {"epochs": steps * BATCH / examples, "warmup": rise / steps}


def settle(config: Config, splits: Splits, note: Callable[[str], Any] = lambda text: None) -> Config:
    """The config with what its weights and its `hyper` say of these data, where it sets nothing itself; tells of it.

    Settling twice changes nothing more. Raises UserError for a rule that does not exist.
    """
    config = follow_weights(config)
    if config.hyper is None:
        return config
    if isinstance(config.hyper, str) and config.hyper not in RULES:
        raise UserError(
            f"There is no rule {config.hyper!r} for --hyper.{near(config.hyper, RULES)} Rules: {', '.join(RULES)}; "
            "or a function (examples, size, batch) -> fields."
        )
    rule = RULES[config.hyper] if isinstance(config.hyper, str) else config.hyper
    size = picture_size(splits.train)
    with asked("The function of --hyper, (examples, size, batch) -> fields, cannot be taken"):
        said = rule(len(splits.train), size, config.batch)
    if not isinstance(said, Mapping):
        raise UserError(f"The function of --hyper gave {brief(repr(said), 200)}; a dict of fields is expected.")
    fields = dict(said)
    if unknown := sorted(map(str, fields.keys() - {f.name for f in dataclasses.fields(Config)})):
        raise UserError(f"--hyper sets {unknown[0]!r}, which is no field of a config.")
    if isinstance(fields.get("preprocess"), Mapping):
        fields["preprocess"] = {**fields["preprocess"], **config.preprocess}
    kept = (config.given | overridden(config.plan)) - {"preprocess"}
    chosen = {n: v for n, v in fields.items() if n not in kept}
    settled = config.replace(**chosen)
    check(settled)
    if told := ", ".join(f"{n} {v:.4g}" if isinstance(v, float) else f"{n} {v}" for n, v in chosen.items()):
        note(f"By --hyper for {len(splits.train)} images of about {size[1]}×{size[0]} pixels: {told}.")
    return settled


def follow_weights(config: Config) -> Config:
    """The config with its weights' own file and model, where jft saved them (a run, a bundle, `hf:`).

    A model that the config names stays.
    """
    if not isinstance(config.weights, str | Path) or config.weights == "none":
        return config
    where = Path(config.weights) / "model"
    named, run = "model" in config.given, (where / "config.json").is_file()
    if named and not run:
        return config
    weights = str(where if run else config.weights)
    if found := native.described(locate(weights).configs):
        model, options = found
        also = {} if named else {"model": model, "model_options": {**options, **config.model_options}}
        return config.replace(weights=weights, **also)
    return config


def picture_size(dataset: Dataset, sample: int = 32) -> tuple[int, int]:
    """Height and width of the picture of median area among some, spread evenly; those that cannot be read not counted.

    Raises UserError where none can.
    """
    sizes = []
    for i in np.unique(np.linspace(0, len(dataset) - 1, sample).astype(int)):
        try:
            content = dataset.read(int(i))
            if isinstance(content, bytes):
                with quiet(), Image.open(io.BytesIO(content)) as picture:
                    sizes.append((picture.height, picture.width))
            else:
                sizes.append((content.shape[0], content.shape[1]))
        except (OSError, ValueError):  # told where the pictures are decoded
            continue
    if not sizes:
        raise UserError(f"None of {sample} pictures can be read, so --hyper cannot tell their size.")
    return sorted(sizes, key=lambda s: s[0] * s[1])[len(sizes) // 2]
