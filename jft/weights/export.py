"""The way out: arrays under a format's names, Hugging Face's folders, and the code that opens them elsewhere."""

import contextlib
import json
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jft.errors import UserError, near
from jft.preprocess import Preprocess
from jft.weights import torchvision, transformers
from jft.weights.formats import FORMATS, Model, Receipt, some, with_heads
from jft.weights.readers import open_weights
from jft.weights.rules import Rule, to_theirs
from jft.weights.writers import write_npz, write_safetensors

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float64": np.float64}
PROCESSORS = ("transformers", "timm")  # whose image processor a Hugging Face folder names
PICTURE = "ImageOps.exif_transpose(Image.open('x.jpg')).convert('RGB')"  # as jft reads it: upright, in colours


def export(
    path: str | Path,
    model: Model,
    params: Mapping[str, np.ndarray],
    batch_stats: Mapping[str, np.ndarray],
    *,
    format: str,
    dtype: str = "float32",
    about: Mapping[str, Any] | None = None,
    more: Mapping[str, tuple[int, ...]] | None = None,
) -> Receipt:
    """Write a model's arrays under a format's names, as `.safetensors` or `.npz`; the inverse of `load`.

    `about` goes into the header of a `.safetensors`, where `load` finds all of it but the model's name again. `more`
    are names and shapes to be written as zeros.

    >>> export("resnet50.safetensors", model, params, batch_stats, format="timm")
    """
    arrays = {name: np.asarray(array) for name, array in {**params, **batch_stats}.items()}
    rules = named(format, model, {name: array.shape for name, array in arrays.items()})
    check_range(model, arrays, dtype)
    tensors = to_theirs(rules, arrays, dtype_of(dtype))
    tensors |= {name: np.zeros(shape, dtype_of(dtype)) for name, shape in (more or {}).items()}
    path = Path(path)
    if path.suffix == ".npz":
        write_npz(path, tensors)
    elif path.suffix == ".safetensors":
        # transformers refuses a safetensors file that does not say for which library it was laid out.
        header = {"format": "jft" if format == "jft" else "pt"}
        height, width, *_ = model.input_shape
        if height != width:  # or else 2×8 positions would be taken to be 4×4
            header["image_size"] = json.dumps([height, width])
        if about:
            header["jft"] = json.dumps(about)
        write_safetensors(path, tensors, header)
    else:
        raise UserError(f"Weights are written as .safetensors or .npz; {path.name} ends in neither.")
    constants = [name for rule in rules if rule.ours is None and rule.fill is not None for name in rule.names]
    constants += more or []
    with open_weights(path) as file:
        return Receipt(
            model=model.name,
            source=str(path),
            format=format,
            sha256=file.sha256,
            used={name: rule.ours for rule in rules if rule.ours for name in rule.names},
            notes=(f"written as the format has them, without meaning here: {some(constants)}",) if constants else (),
            direction="to",
        )


def named(format: str, model: Model, ours: Mapping[str, tuple[int, ...]]) -> tuple[Rule, ...]:
    """The format's rules for these arrays. Raises UserError where it has no name for one."""
    if format not in FORMATS:
        raise UserError(f"There is no weight format {format!r}.{near(format, FORMATS)} Known: {', '.join(FORMATS)}.")
    ours = with_heads(ours, model)
    rules = FORMATS[format].rules(ours)
    if unnamed := sorted(set(ours) - {rule.ours for rule in rules}):
        able = [name for name in FORMATS if set(ours) <= {rule.ours for rule in FORMATS[name].rules(ours)}]
        raise UserError(
            f"The format {format} has no name for {some(unnamed)} of {model.name}. "
            f"Formats that have: {', '.join(able)}."
        )
    return rules


def dtype_of(name: str) -> np.dtype:
    """The NumPy dtype in which weights are written."""
    if name not in DTYPES:
        raise UserError(f"Weights are written as {', '.join(DTYPES)}, not {name!r}.{near(name, DTYPES)}")
    return np.dtype(DTYPES[name])


def check_range(model: Model, arrays: Mapping[str, np.ndarray], dtype: str) -> None:
    """Raises UserError where numbers would become infinite as this type."""

    def lost(array: np.ndarray) -> bool:
        with np.errstate(over="ignore"):
            cast = array.astype(dtype_of(dtype), copy=False)
        return cast is not array and bool((np.isinf(cast) & np.isfinite(array)).any())

    if names := [name for name, array in arrays.items() if lost(array)]:
        raise UserError(
            f"{dtype} ends at {float(ml_dtypes.finfo(dtype_of(dtype)).max):g}, and {some(names)} of {model.name} has "
            f"larger numbers. Keep them in another type: --dtype {'bfloat16' if dtype == 'float16' else 'float32'}."
        )


def about(
    model: Model, classes: Sequence[str], preprocess: Preprocess, *, multi_label: bool = False, quantities: bool = False
) -> dict[str, Any]:
    """What a file of weights should say of itself."""
    said = {"model": model.name, "classes": list(classes), "preprocess": asdict(preprocess)}
    kinds = {"multi_label": multi_label, "quantities": quantities}
    return said | {kind: True for kind, true in kinds.items() if true}


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to write into, which appears under its name when it is whole."""
    beside = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.part")
    beside.mkdir()
    try:
        yield beside
        beside.rename(path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def export_hf(
    folder: str | Path,
    model: Any,
    params: Mapping[str, np.ndarray],
    batch_stats: Mapping[str, np.ndarray],
    *,
    classes: Sequence[str],
    preprocess: Preprocess,
    problem: str = transformers.ONE,
    dtype: str = "float32",
    card: str = "",
    timm_options: Mapping[str, Any] | None = None,
    processor: str = "transformers",
) -> Receipt:
    """Write a folder that transformers' Auto classes open: the model, its classes and its image processor.

    The model is one of the library's own where it has it; otherwise, where `timm_options` are given, the options of
    `timm.create_model` beside the name and the number of classes, it is timm's, which the library wraps. `card` is the
    bundle's own model card, which becomes the folder's. `processor` is one of `PROCESSORS`. Raises UserError where the
    library has neither model, or timm's transform is not ours.
    """
    by_timm = timm_prepares(processor, preprocess)
    folder = Path(folder)
    files: dict[str, Mapping[str, Any]] = {}
    notes: list[str] = []
    wide = transformers.widened(model, params)
    ours = {name: tuple(array.shape) for name, array in {**wide, **batch_stats}.items()}
    try:
        named("hf", model, ours)
        files["config.json"] = transformers.config(model, ours, classes, problem)
        format, more = "hf", transformers.unused(ours)
        padded = [name for name in params if wide[name].shape != params[name].shape]
        notes += [f"filled up with zeros, which change nothing: {', '.join(padded)}"] if padded else []
    except UserError:
        if timm_options is None:
            raise
        named("timm", model, {name: tuple(array.shape) for name, array in {**params, **batch_stats}.items()})
        files["config.json"] = transformers.timm_config(model, timm_options, classes, preprocess, problem)
        format, wide, more = "timm", dict(params), {}
        notes.append("transformers has this model through timm, which must be installed beside it")
    if by_timm:
        files["config.json"] = {**files["config.json"], **transformers.timm_processor(preprocess)}
    elif format == "hf" or not _timm_has(preprocess):
        made = transformers.processor(preprocess)
        files["preprocessor_config.json"] = made
        if format == "timm":  # or else the library takes timm's transform for a model that is timm's
            files["config.json"] = {**files["config.json"], "image_processor_type": made["image_processor_type"]}
        notes += _processor_notes(preprocess)
    with new_folder(folder) as beside:
        weights = beside / "model.safetensors"
        receipt = export(weights, model, wide, batch_stats, format=format, dtype=dtype, more=more)
        for name, content in files.items():
            (beside / name).write_text(json.dumps(content, indent=2) + "\n", encoding="ascii")
        lines = hf_code("FOLDER_OR_REPOSITORY", format == "timm", by_timm)
        readme = _card(model.name, classes, preprocess, card, lines)
        (beside / "README.md").write_text(readme, "utf-8", "backslashreplace")
    return Receipt(**{**vars(receipt), "source": str(folder), "notes": (*receipt.notes, *notes)})


def timm_prepares(processor: str, preprocess: Preprocess) -> bool:
    """Whether the image processor asked for is timm's. Raises UserError for an unknown one, or other pixels."""
    if processor not in PROCESSORS:
        raise UserError(
            f"There is no image processor {processor!r}.{near(processor, PROCESSORS)} Known: {', '.join(PROCESSORS)}."
        )
    if processor == "timm" and not _timm_has(preprocess):
        height, width = preprocess.size
        raise UserError(
            f"The transform that timm makes for {height}×{width} pixels, which is no square, resizes bilinearly, and "
            f"jft by {preprocess.interpolation}. Export without --processor timm."
        )
    return processor == "timm"


def _timm_has(preprocess: Preprocess) -> bool:
    """Whether timm's own transform gives the pixels of `preprocess`."""
    return preprocess.squash or _square(preprocess) or preprocess.interpolation == "bilinear"


def _square(preprocess: Preprocess) -> bool:
    return preprocess.size[0] == preprocess.size[1]


def _processor_notes(preprocess: Preprocess) -> tuple[str, ...]:
    if preprocess.squash:
        return ("the image processor gives jft's pixels with backend='pil'; torchvision's backend rounds otherwise",)
    exact = "; --processor timm gives jft's pixels, and wants timm installed where the folder is opened"
    if not _square(preprocess):
        own = "the image processor is transformers' own, which leaves the sides of pictures that are no square black"
        return (own + (exact if _timm_has(preprocess) else ""),)
    return (
        "the image processor is transformers' own: where the crop leaves 3, 7, 11 … pixels over, it cuts one pixel "
        "further up or left than jft" + (exact if _timm_has(preprocess) else ""),
    )


def _card(model: str, classes: Sequence[str], preprocess: Preprocess, card: str, lines: Sequence[str]) -> str:
    """The bundle's own model card with another library's name and use; without one, the little that is known."""
    code = "\n".join(lines)
    use = f"""## Use
```python
{code}
```

Pictures are {_words(preprocess)}."""
    if "\n## Use\n" in card:
        card = card.replace("library_name: jft", "library_name: transformers")
        return re.sub(r"(?<=\n)## Use\n.*?(?=\n\n## |$)", lambda _: use, card, count=1, flags=re.DOTALL)
    listed = ", ".join(classes[:100]) + (f" and {len(classes) - 100} more" if len(classes) > 100 else "")
    return f"""---
library_name: transformers
pipeline_tag: image-classification
tags:
- jft
- image-classification
---
# {model}, {len(classes)} classes

{use}

## Classes

{listed}.
"""


def _words(preprocess: Preprocess) -> str:
    height, width = preprocess.size
    how = (
        f"resized to {height}×{width} whole"
        if preprocess.squash
        else f"resized to {preprocess.resize} pixels on the shorter side, of which the centre {height}×{width} is taken"
        if _square(preprocess)
        else f"resized to cover {'×'.join(map(str, preprocess.sides))}, of which the centre {height}×{width} is taken"
    )
    mean, std = (", ".join(f"{v:g}" for v in values) for values in (preprocess.mean, preprocess.std))
    return f"{how} ({preprocess.interpolation}), divided by 255, less the mean ({mean}), divided by ({std})"


# --- the code that opens an export


def timm_options(model: Model, ours: Mapping[str, tuple[int, ...]], default: Model) -> dict[str, Any]:
    """What `timm.create_model` is told beside name and classes; `default` is the model of this name without options."""
    options: dict[str, Any] = {}
    usual = {name: tuple(leaf.shape) for name, leaf in default.shapes()[0].items()}
    patch = "embed/patch/kernel"
    if patch in ours and model.input_shape != default.input_shape:
        options["img_size"] = tuple(model.input_shape[:2])
    if patch in ours and ours[patch][:2] != usual[patch][:2]:
        options["patch_size"] = ours[patch][0]
    act, usual_act = (getattr(getattr(m, "parts", {}).get("block0"), "act", None) for m in (model, default))
    if act != usual_act:
        options["act_layer"] = act
    if "pool/norm/scale" in ours and "pool/norm/scale" not in usual:
        options["global_pool"] = "avg"
    return options


def timm_code(path: str | Path, model: Model, options: Mapping[str, Any]) -> list[str]:
    """Lines of Python that load the file with timm; `options` are those of `timm_options`."""
    told = {"num_classes": model.num_classes, "checkpoint_path": str(path), **options}
    listed = ", ".join(f"{name}={value!r}" for name, value in told.items())
    return ["import timm", f"model = timm.create_model({model.name!r}, {listed}).eval()"]


def torchvision_code(path: str | Path, model: Model) -> list[str]:
    """Lines of Python that load the file with torchvision."""
    name = torchvision.HAS[model.name]
    size = f", image_size={model.input_shape[0]}" if name.startswith("vit") else ""
    return [
        "import torchvision",
        "from safetensors.torch import load_file",
        f"model = torchvision.models.get_model({name!r}, num_classes={model.num_classes}{size}).eval()",
        f"model.load_state_dict(load_file({str(path)!r}))",
    ]


def transform_code(preprocess: Preprocess) -> list[str]:
    """Lines of Python that prepare a PIL picture as jft does, with torchvision's transforms."""
    size, filter = tuple(preprocess.size), f"T.InterpolationMode.{preprocess.interpolation.upper()}"
    resize = f"T.Resize({size}, {filter})" if preprocess.squash else f"T.Resize({preprocess.resize}, {filter})"
    if not preprocess.squash and not _square(preprocess):
        cover = f"ImageOps.cover(p, {preprocess.sides[::-1]}, Image.Resampling.{preprocess.interpolation.upper()})"
        resize = f"T.Lambda(lambda p: {cover})"
    steps = [resize, *([] if preprocess.squash else [f"T.CenterCrop({size})"]), "T.ToTensor()"]
    steps.append(f"T.Normalize({tuple(preprocess.mean)}, {tuple(preprocess.std)})")
    return [
        "from PIL import Image, ImageOps",
        "from torchvision import transforms as T",
        f"transform = T.Compose([{', '.join(steps)}])",
        f"logits = model(transform({PICTURE})[None])",
    ]


def hf_code(folder: str | Path, through_timm: bool = False, by_timm: bool = False) -> list[str]:
    """Lines of Python that open the folder with transformers; its model may be timm's, or its image processor alone."""
    what = "this model" if through_timm else "this image processor"
    return [
        *([f"# transformers opens {what} through timm: pip install timm"] if through_timm or by_timm else []),
        "from PIL import Image, ImageOps",
        "from transformers import AutoImageProcessor, AutoModelForImageClassification",
        f"processor = AutoImageProcessor.from_pretrained({str(folder)!r})",
        f"model = AutoModelForImageClassification.from_pretrained({str(folder)!r})",
        f"picture = {PICTURE}",
        "logits = model(**processor(images=picture, return_tensors='pt')).logits",
    ]
