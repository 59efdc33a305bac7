"""The README.md of a model's folder: what it is, how good, how to use it; a model card as the hub reads it."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from jft import metrics
from jft.weights.formats import FORMATS
from jft.weights.rules import Source

MAX_CLASSES = 100  # named in the card; config.json has them all
# The hub's names of licences, https://huggingface.co/docs/hub/repositories-licenses
_HUB_LICENCES = {"apache-2.0", "bsd-3-clause", "mit", "cc-by-4.0", "cc-by-nc-4.0", "cc-by-sa-4.0"}
# Key in `val`, the hub's name of the metric (https://huggingface.co/metrics), and what the table says.
_METRICS = (
    ("accuracy", "accuracy", "Accuracy"),
    ("top5_accuracy", "top5_accuracy", "Top-5 accuracy"),
    ("balanced_accuracy", "balanced_accuracy", "Balanced accuracy"),
    ("average_precision", "mAP", "Mean average precision"),
    ("f1_macro", "f1", "F1, mean over classes"),
    ("auroc", "roc_auc", "AUROC"),
    ("log_loss", "log_loss", "Log loss (nats)"),
    ("ece", "ece", "Expected calibration error"),
    ("r2", "r_squared", "R²"),
    ("mae", "mae", "Mean absolute error"),
    ("rmse", "rmse", "Root mean square error"),
)
_SHARES = {"accuracy", "top5_accuracy", "balanced_accuracy"}


def model_card(about: Mapping[str, Any]) -> str:
    """A model card in Markdown, with the hub's metadata in front.

    `about` is what `result.json` says of the run. More keys are used where they are there: `origin`, where the source
    weights came from (a receipt's `source`: `hf:ORG/REPO@COMMIT:FILE` or a path), `origins` of an average of runs from
    several, and `multi_label`; `average`, a sentence on what the weights are an average of, and `chosen`, which says
    what of the model the validation images chose. Of a run of `quantities` the classes are these. Paths are cut to
    their last part: a card is made to be shared.

    >>> bundle.save(…, card=model_card({**result, "origin": loaded.receipt.source}))
    """
    several_sources = bool(about.get("origins"))
    repo = None if several_sources else _repo(about.get("origin"))
    source = _source(repo)
    classes = [str(c) for c in about["classes"]]
    several = bool(about.get("multi_label"))
    name, data = str(about["model"]), _data(str(about["data"]))
    asked = "all that apply, of" if several else "one of"
    named = "quantities" if about.get("quantities") else "classes"
    what = f"Tells of a picture {asked} {len(classes)} classes"
    if about.get("quantities"):
        what = "a number" if len(classes) == 1 else f"{len(classes)} numbers"
        what = f"Predicts {what} from a picture"
    lines = [
        f"# {_text(name)}, fine-tuned on {_text(data)}",
        f"{what}. {' '.join(filter(None, ('Fine-tuned with jft', _plan(about))))}, {_from(about, repo)}."
        + (f" {about['average']}" if about.get("average") else ""),
        "## Use",
        '```python\nimport jft\n\nmodel = jft.load("path/to/this/folder")\nmodel.predict(["picture.jpg"])\n```',
        "Or `jft predict path/to/this/folder pictures/ --out predictions.csv`. The weights are in `model.safetensors`; "
        f"`config.json` has the {named} in order and says how a picture is prepared; the lines above see to it.",
        "## Results",
        _results(about),
        f"## {named.capitalize()}",
        _listed(classes),
    ]
    if stages := about.get("stages"):
        lines += ["## Training", _stages(stages)]
    if several_sources:
        told = (
            f"The source weights are {_sources(about['origins'])}. Their licences bind these too: state them here "
            "before you share them."
        )
        lines += ["## Source weights and licence", told]
    elif source or repo:
        lines += ["## Source weights and licence", _licence(repo, source)]
    elif about.get("weights"):
        unknown = (
            f"The source weights are the file {_text(PurePath(str(about['weights'])).name)}; what licence they are "
            "under, that file does not say. It binds these too: state it here before you share them."
        )
        lines += ["## Source weights and licence", unknown]
    return _front(about, name, data, repo, source, several) + "\n" + "\n\n".join(lines) + "\n"


def _front(
    about: Mapping[str, Any], name: str, data: str, repo: str | None, source: Source | None, several: bool
) -> str:
    """The metadata between its dashes. Every string is written as JSON, which YAML reads as it stands."""
    task = "image-feature-extraction" if about.get("quantities") else "image-classification"
    lines = ["library_name: jft", f"pipeline_tag: {task}"]
    if source:
        known = source.licence.lower()
        if known in _HUB_LICENCES:
            lines.append(f"license: {known}")
        else:
            lines += ["license: other", f"license_name: {_yaml(source.licence)}"]
    if repo:
        lines += [f"base_model: {_yaml(repo)}", "base_model_relation: finetune"]
    lines += [
        "tags:",
        "- jft",
        "- jax",
        "- image-regression" if about.get("quantities") else "- image-classification",
        *(["- multi-label"] if several else []),
    ]
    lines += ["metrics:", *(f"- {hub}" for key, hub, _ in _METRICS if key in about["val"])]
    kind = "csv" if data.endswith(".csv") else "imagefolder"
    lines += ["model-index:", f"- name: {_yaml(f'{name} on {data}')}", "  results:"]
    for split, scores in (("test", about.get("test") or {}), ("validation", about["val"])):
        values = [(hub, told, scores[key]) for key, hub, told in _METRICS if key in scores]
        if values:
            lines += [
                "  - task:",
                f"      type: {'image-regression' if about.get('quantities') else 'image-classification'}",
                "    dataset:",
                f"      name: {_yaml(data)}",
                f"      type: {kind}",
                f"      split: {split}",
                "    metrics:",
            ]
        for hub, told, value in values:
            lines += [f"    - type: {hub}", f"      name: {_yaml(told)}", f"      value: {value:.6g}"]
    return "\n".join(["---", *lines, "---", ""])


def _yaml(text: str) -> str:
    return json.dumps(text.encode("utf-8", "backslashreplace").decode())


def _text(text: str) -> str:
    """Text that Markdown leaves as it is."""
    plain = " ".join(text.encode("utf-8", "backslashreplace").decode().split())
    return re.sub(r"([\\`*\[\]<>|#&~]|(?<!\w)_|_(?!\w))", r"\\\1", plain)


def _data(given: str) -> str:
    """The data's name: of a folder, a file, a TFDS set; arrays have none."""
    return "arrays of images" if "sha256:" in given else PurePath(given).name or given


def _repo(origin: Any) -> str | None:
    found = re.match(r"hf:([^@:]+)", str(origin or ""))
    return found[1] if found else None


def _link(repo: str) -> str:
    return f"[{repo}](https://huggingface.co/{repo})"


def _sources(origins: Sequence[str]) -> str:
    """Several sources of weights by name: repositories, files, or nothing."""
    files = (f"the file {_text(PurePath(o).name)}" if o else "random weights" for o in origins)
    return ", ".join(_link(repo) if (repo := _repo(o)) else file for o, file in zip(origins, files, strict=True))


def _source(repo: str | None) -> Source | None:
    """What is known of a repository: only for our own sources is the licence certain."""
    uri = f"hf:{repo}"
    return next((s for f in FORMATS.values() for s in f.SOURCES.values() if re.split("[@#]", s.uri)[0] == uri), None)


def _plan(about: Mapping[str, Any]) -> str:
    plan = about.get("plan")
    if isinstance(plan, str):
        return f"by the plan `{plan}`"
    return f"in {len(plan)} stages" if plan else ""


def _from(about: Mapping[str, Any], repo: str | None) -> str:
    if about.get("origins"):
        return f"from {_sources(about['origins'])}"
    if not about.get("weights"):
        return "from random weights"
    told = _link(repo) if repo else f"the file {_text(Path(str(about['weights'])).name)}"
    sha256 = about.get("weights_sha256")
    return f"from {told}" + (f" (sha256 `{sha256[:16]}…`)" if sha256 else "")


def _results(about: Mapping[str, Any]) -> str:
    splits = {"Validation": about["val"], **({"Test": about["test"]} if about.get("test") else {})}
    rows = [["", *splits], ["---", *("---:" for _ in splits)]]
    rows.append(["Images", *(f"{scores['count']:,}" for scores in splits.values())])
    for key, _, told in _METRICS:
        if any(key in scores for scores in splits.values()):
            rows.append([told, *(_figure(key, scores) for scores in splits.values())])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    figure = metrics.headline(about["val"])
    intervals = "Intervals are Wilson's, at 95 %. " if "accuracy" in about["val"] else ""
    chosen = about.get("chosen", "The state that was kept is the best of the run on the validation images")
    leans = f"{chosen}, so their {metrics.HEADLINES[figure]} leans to the high side." if chosen else ""
    return f"{table}\n\n{intervals}{leans}".rstrip()


def _figure(key: str, scores: Mapping[str, Any]) -> str:
    if key not in scores:
        return ""
    if key not in _SHARES:
        return f"{scores[key]:.4g}" if key in ("mae", "rmse") else f"{scores[key]:.3f}"
    if key != "accuracy":
        return f"{scores[key]:.1%}"
    low, high = metrics.wilson(round(scores[key] * scores["count"]), scores["count"])
    return f"**{scores[key]:.1%}** ({low:.1%} to {high:.1%})"


def _listed(classes: Sequence[str]) -> str:
    more = len(classes) - MAX_CLASSES
    return ", ".join(map(_text, classes[:MAX_CLASSES])) + (f" and {more} more, in `config.json`." if more > 0 else ".")


def _stages(stages: Sequence[Mapping[str, Any]]) -> str:
    figure = next((metrics.headline(s, "val_") for s in stages), "accuracy")
    rows = [
        f"| Stage | Epochs | Peak rate | Parameters trained | Validation {metrics.HEADLINES[figure]} after it |",
        "|---|---:|---:|---:|---:|",
    ]
    for s in stages:
        cells = [_text(str(s["name"]))]
        for key, how in (
            ("epochs", ".3g"),
            ("lr", ".2g"),
            ("trainable_params", ","),
            (f"val_{figure}", ".3f" if figure == "r2" else ".1%"),
        ):
            value = s.get(key)
            cells.append("" if value is None else format(float(value) if key == f"val_{figure}" else value, how))
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _licence(repo: str | None, source: Source | None) -> str:
    link = _link(repo or "")
    if source is None:
        return f"The source weights are those of {link}; their licence, stated there, binds these too."
    return (
        f"The source weights ({link}, trained on {source.data}, {source.paper}) are under {source.licence}, which "
        "these, made from them, carry on. The training images may have terms of their own."
    )
