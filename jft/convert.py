"""Models out to other tools and weights in from them, without training: what `jft export` and `jft import` do."""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from jft import bundle, weights
from jft.bundle import Bundle
from jft.errors import UserError, near
from jft.models import make_model
from jft.models.base import Model
from jft.stablehlo import export_stablehlo, stablehlo_code
from jft.table import beside
from jft.use import labels_of, open_model
from jft.weights import hub, torchvision, transformers
from jft.weights.export import (
    about,
    export_hf,
    hf_code,
    named,
    timm_code,
    timm_options,
    torchvision_code,
    transform_code,
)
from jft.weights.formats import Receipt, some
from jft.weights.vit import is_beit

# Each format, and the file or folder it makes where none is named.
EXPORTS = {
    "timm": "timm.safetensors",
    "torchvision": "torchvision.safetensors",
    "hf": "hf",
    "safetensors": "jft.safetensors",
    "npz": "jft.npz",
    "stablehlo": "stablehlo",
}


def _is_names(format: str) -> bool:
    """Whether a format is names of arrays and nothing else: the original authors', and one that a fork adds."""
    return format in weights.FORMATS and format not in EXPORTS and format != "jft" and not format.startswith("hf")


@dataclass(frozen=True)
class Exported:
    """What an export wrote, and the lines of Python that open it elsewhere."""

    path: Path
    receipt: Receipt
    code: tuple[str, ...]


def export_model(
    where: str | Path,
    format: str,
    out: str | Path | None = None,
    *,
    preprocess_inside: bool = False,
    dtype: str = "float32",
    processor: str | None = None,
) -> Exported:
    """Write the model of a run's folder, or of a bundle, as another tool reads it; by default into `where`.

    `format` is one of `EXPORTS`, or of `weights.FORMATS` for a file of arrays under its names. `dtype` is that of the
    weights; `preprocess_inside` makes a StableHLO program take uint8 pictures. `processor` says whose image processor
    an `hf` folder names: `transformers`, as where nothing is said, or `timm`. Raises UserError where there is something
    already, or nothing of the tool's could load it.

    >>> print("\\n".join(export_model("runs/bees", "timm").code))
    """
    if format not in EXPORTS and not _is_names(format):
        raise UserError(f"There is no format {format!r}.{near(format, EXPORTS)} Known: {', '.join(EXPORTS)}.")
    if preprocess_inside and format != "stablehlo":
        raise UserError(f"--preprocess-inside is for stablehlo, which is a program; {format} holds weights alone.")
    if processor is not None and format != "hf":
        raise UserError(f"--processor is for hf, whose folder names an image processor; {format} has none.")
    if out is None and str(where).startswith("hf:"):
        raise UserError(f"--out is needed: {where} is no folder to write into.")
    model = open_model(where)
    path = Path(out) if out is not None else default_out(where, format)
    ending = Path(default_out(where, format)).suffix
    either = _is_names(format) and path.suffix == ".npz"  # as the authors' own files are
    if path.suffix != ending and not either and (ending or path.suffix in (".safetensors", ".npz", ".pth")):
        raise UserError(
            f"--format {format} writes {'a file ending in ' + ending if ending else 'a folder'}; {path} is none."
        )
    _vacant(path)
    if format == "hf":
        receipt, code = _write_hf(model, path, dtype, _card(where), processor or "transformers")
    elif format == "stablehlo":
        receipt = export_stablehlo(path, model, preprocess_inside=preprocess_inside, dtype=dtype)
        code = stablehlo_code(path, preprocess_inside)
    else:
        receipt, code = _write_file(model, path, dtype, format)
    return Exported(path, receipt, tuple(code))


def default_out(where: str | Path, format: str) -> Path:
    """The file or folder that an export makes where none is named."""
    return Path(where).expanduser() / EXPORTS.get(format, f"{format}.safetensors" if _is_names(format) else "")


def _write_hf(model: Bundle, path: Path, dtype: str, card: str, processor: str) -> tuple[Receipt, list[str]]:
    receipt = export_hf(
        path,
        model.model,
        model.params,
        model.batch_stats,
        classes=model.classes,
        preprocess=model.preprocess,
        problem=_problem(model),
        dtype=dtype,
        card=card,
        timm_options=_options_of_timm(model),
        processor=processor,
    )
    lines = hf_code(path, receipt.format == "timm", processor == "timm")
    return receipt, [*lines, f"print({_SAID[_problem(model)]})"]


# What a model answers for one picture, in the words of transformers: its class, each class's probability, its numbers.
_SAID = {
    transformers.ONE: "model.config.id2label[int(logits.argmax())]",
    transformers.SEVERAL: "dict(zip(model.config.id2label.values(), logits.sigmoid()[0].tolist()))",
    transformers.NUMBERS: "logits[0].tolist()",
}


def _problem(model: Bundle) -> str:
    """What transformers calls it."""
    if model.quantities:
        return transformers.NUMBERS
    return transformers.SEVERAL if model.multi_label else transformers.ONE


def _write_file(model: Bundle, path: Path, dtype: str, format: str) -> tuple[Receipt, list[str]]:
    model = as_timm(model) if format == "timm" else model
    made = model.model
    names = "jft" if format in ("safetensors", "npz") else format
    load = _opening(format, model, path) if format in ("timm", "torchvision") else []
    kinds = {"multi_label": model.multi_label, "quantities": model.quantities}
    told = about(made, model.classes, model.preprocess, **kinds)
    receipt = weights.export(path, made, model.params, model.batch_stats, format=names, dtype=dtype, about=told)
    if not load:
        return receipt, []
    few = len(model.classes) <= 20
    what = "quantities" if model.quantities else "classes"
    labels = f"{what} = {list(model.classes)}" if few else f"# the {what} are in the file's header, under 'jft'"
    return receipt, [*load, *transform_code(model.preprocess), labels]


def _opening(format: str, model: Bundle, path: Path) -> list[str]:
    """The lines that open an export in timm or torchvision.

    Raises UserError where the tool has no names for the model, or has them, but no model that would load the file.
    """
    made = model.model
    named(format, made, {n: tuple(a.shape) for n, a in {**model.params, **model.batch_stats}.items()})
    if format == "timm" and (options := _options_of_timm(model)) is not None:
        return timm_code(path, made, options)
    if format == "torchvision" and made.name in torchvision.HAS and _is_default(made, {}) and _square(made):
        return torchvision_code(path, made)
    raise UserError(
        f"{format} has no model called {made.name}, or none with these options, so nothing of it could load the file. "
        f"--format safetensors, npz and stablehlo hold any model; in Python, jft.weights.export(…, format={format!r}) "
        f"writes the arrays under {format}'s names all the same."
    )


def as_timm(model: Bundle) -> Bundle:
    """DINOv2 with registers under its own name as timm has it: the class token's position is part of the token."""
    made = model.model
    size = {"s": "small", "b": "base", "l": "large", "g": "giant"}.get(made.name.removeprefix("dinov2_vit")[:1], "")
    if not made.name.startswith("dinov2_vit") or not _is_default(made, {}):
        return model
    height, width, *_ = made.input_shape
    like = make_model(f"vit_{size}_patch14_reg4_dinov2", num_classes=made.num_classes, image_size=(height, width))
    positions = model.params["embed/pos_embed"]
    token = model.params["embed/cls_token"] + positions[:, :1]
    params = {**model.params, "embed/cls_token": token, "embed/pos_embed": positions[:, 1:]}
    return replace(model, model=like, params=params)


def _square(made: Model) -> bool:
    """Whether torchvision's ViT, which knows one side, can have these pictures; other families take any."""
    return not made.name.startswith("vit") or made.input_shape[0] == made.input_shape[1]


def _options_of_timm(model: Bundle) -> dict[str, Any] | None:
    """What `timm.create_model` is told to make this model, beside its name and classes; None where it has none such."""
    made = model.model
    if made.name.startswith(("tiny_", "dinov2_")):
        return None
    ours = {name: tuple(array.shape) for name, array in model.params.items()}
    default = make_model(made.name)
    options = timm_options(made, ours, default)
    # timm's BEiT takes no activation, and its MLP with gates is another class, which no activation's name makes.
    if "act_layer" in options and (
        is_beit(ours) or "swiglu" in (made.parts["block0"].act, default.parts["block0"].act)
    ):
        return None
    names = {"patch_size": "patch", "act_layer": "act", "global_pool": "pool"}
    like = {names[name]: value for name, value in options.items() if name in names}
    return options if _is_default(made, like) else None


def _is_default(made: Model, options: dict[str, Any]) -> bool:
    """Whether the model is what its name and these options make, however it was trained."""
    height, width, *_ = made.input_shape
    like = make_model(made.name, num_classes=made.num_classes, image_size=(height, width), **options)
    manner = {"parent", "name", "dtype", "drop_path", "dropout", "axis_name"}

    def told(part: Any) -> dict[str, Any]:
        return {f.name: getattr(part, f.name) for f in fields(part) if f.name not in manner}

    pairs = zip(made.parts.values(), like.parts.values(), strict=False)
    return [*made.parts] == [*like.parts] and all(type(a) is type(b) and told(a) == told(b) for a, b in pairs)


def _card(where: str | Path) -> str:
    """The model card of a bundle, which has its figures and the licence of its weights; empty where it has none."""
    file = hub.card(hub.locate(where)) if str(where).startswith("hf:") else bundle.folder_of(where) / "README.md"
    return file.read_text("utf-8", "replace") if file and file.is_file() else ""


def _vacant(path: Path) -> None:
    if path.exists():
        raise UserError(f"{path} exists already. Remove it, or name another place with --out.")
    if not path.absolute().parent.is_dir():
        raise UserError(f"{path} cannot be written: there is no folder {path.parent}.")


def import_weights(
    source: str | Path,
    name: str,
    out: str | Path | None = None,
    *,
    format: str | None = None,
    skip: Collection[str] = (),
    image_size: int | None = None,
    model_options: Mapping[str, Any] | None = None,
) -> tuple[Receipt, Receipt | None]:
    """Read weights of any format into the model `name`, and write them as jft's; nothing is trained.

    `out` is a `.safetensors` or `.npz` of arrays under our names, or else a folder, a bundle that `jft predict` and
    `jft export` take. `model_options` are those of `make_model`. Returns what was read and what was written. Without
    `out` nothing is: the receipt alone tells.

    >>> read, written = import_weights("resnet50.pth", "resnet50", "resnet50.safetensors")
    """
    path = Path(out) if out is not None else None
    if path is not None:
        if path.suffix in _OTHERS:
            raise UserError(f"{path}: .safetensors and .npz files are written, or a folder; {path.suffix} is none.")
        _vacant(path)
    options = dict(model_options or {}) | ({} if image_size is None else {"image_size": image_size})
    classes = weights.head_size(make_model(name, **options), source, format=format, skip=skip)
    if classes is not None:
        options["num_classes"] = classes
    model = make_model(name, **options)
    loaded = weights.load(model, source, format=format, skip=skip)
    if path is None:
        return loaded.receipt, None
    labels = labels_of(loaded, model.num_classes)
    if path.suffix in (".safetensors", ".npz"):
        kinds = {"multi_label": loaded.multi_label, "quantities": loaded.quantities}
        told = about(model, labels, loaded.preprocess, **kinds)
        if not loaded.classes:
            del told["classes"]
        written = weights.export(path, model, loaded.params, loaded.batch_stats, format="jft", about=told)
        return loaded.receipt, written
    if loaded.missing:
        raise UserError(
            f"A bundle is a whole model, and these weights lack {some(list(loaded.missing))}. "
            "Write a .safetensors, which may be without, or fine-tune: `jft finetune --weights …` makes a new head."
        )
    bundle.save(
        path,
        model_name=name,
        model_options=options | {"image_size": list(model.input_shape[:2])},
        params=loaded.params,
        batch_stats=loaded.batch_stats,
        classes=labels,
        preprocess=loaded.preprocess,
        multi_label=loaded.multi_label,
        quantities=loaded.quantities,
    )
    with weights.open_weights(path / "model.safetensors") as file:
        used = {n: n for n in file.names}
        written = Receipt(name, str(path), "jft", file.sha256, used=used, direction="to")
    return loaded.receipt, written


_OTHERS = (".pth", ".pt", ".bin", ".ckpt", ".h5", ".msgpack", ".onnx", ".pkl")


def check_receipt(path: str | Path, out: str | Path | None) -> None:
    """Raises UserError where a receipt has no place, before what it tells of is done; `out`, to be made, is one."""
    folder = Path(path).absolute().parent
    if not folder.is_dir() and (out is None or folder != Path(out).absolute()):
        raise UserError(f"{path} cannot be written: there is no folder {Path(path).parent}.")


def write_receipt(path: str | Path, told: Any) -> None:
    """A receipt as a JSON file. Raises UserError where it cannot be written."""
    with beside(Path(path)) as part:
        part.write_text(json.dumps(told, indent=1) + "\n", encoding="ascii")
