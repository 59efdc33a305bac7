"""The command line: parses, calls, prints. What is done is done elsewhere, and imported only when it is needed."""

import argparse
import codecs
import contextlib
import copy
import dataclasses
import io
import json
import os
import sys
import textwrap
import traceback
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jft import __version__
from jft.code import load_file
from jft.config import Config, flag, load_config, override
from jft.errors import FULL, UserError, disk, near, printable, theirs
from jft.plan import overridden

EXAMPLES = {
    "": """
  jft finetune --data bees/ --model resnet18                    a folder of class folders to a model
  jft finetune --data bees/ --predict photos/ --out preds.csv   and other pictures labelled by it
  jft finetune --data bees/ --weights vit.safetensors --model vit_tiny_patch16_224 --plan gradual
  jft finetune configs/digits.py                                a recipe
  jft predict runs/bees-resnet18-head photos/ --out preds.csv""",
    "finetune": """
  jft finetune --data bees/                                     linear probe of a ResNet-50, about a minute on a CPU
  jft finetune --data bees/ --predict photos/ --out preds.csv   train, then predict other pictures
  jft finetune --data bees/ --plan lp-ft --epochs 20 --seeds 5  five runs, mean and spread
  jft finetune --data labels.csv --model vit_small_patch16_224  a CSV, the model's default weights
  jft finetune configs/digits.py --epochs 3                     a recipe with one field changed""",
    "plan": """
  jft plan --data bees/ --model resnet50 --plan gradual
  jft plan --data bees/ --model vit_base_patch16_224 --plan full --batch 64 --json""",
    "lr": """
  jft lr --data bees/ --model resnet50                          a rate for the head
  jft lr --data bees/ --plan lp-ft --stage full                 for its second stage; the first is trained before
  jft lr --data bees/ --plan full --plot lr.svg --json""",
    "rank": """
  jft rank --data bees/ --models resnet18,resnet50,vit_tiny_patch16_224
  jft rank --data bees/ --models resnet50=mine.pth,resnet50=hf:timm/resnet50.a1_in1k --metric knn
  jft rank --data labels.csv --models resnet50 vit_base_patch16_224 --shots 50 --json""",
    "sweep": """
  jft sweep --data bees/ --over lr=log:1e-5:1e-2 --over plan=head,lp-ft
  jft sweep configs/bees.py --trials 40 --seconds 3600          the space is the file's SPACE; --over adds to it
  jft sweep --data bees/ --over weight_decay=0,1e-4,1e-2 --over "augment=none,crop flip"   lists alone: all of them""",
    "evaluate": """
  jft evaluate runs/bees-resnet50-head
  jft evaluate runs/bees-resnet50-head --data more-bees/ --json
  jft evaluate hf:ORG/bees --data more-bees/                    a model that was pushed""",
    "predict": """
  jft predict runs/bees-resnet50-head photos/ x.jpg --out preds.csv
  jft predict runs/bees-resnet50-head 'photos/**/*.jpg' --top-k 3 --unknown 0.5 --temperature fitted
  find photos -name '*.jpg' | jft predict runs/bees-resnet50-head - --features features.npz --out preds.parquet
  jft predict --model resnet50 --weights resnet50.safetensors photos/ --top-k 5""",
    "export": """
  jft export runs/bees-resnet50-head --format timm
  jft export runs/bees-resnet50-head --format hf --out bees-hf/ --receipt receipt.json
  jft export runs/bees-resnet50-head --format hf --processor timm
  jft export runs/bees-resnet50-head --format stablehlo --preprocess-inside --dtype bfloat16""",
    "import": """
  jft import resnet50.pth --model resnet50                      what would be used of it, and how
  jft import hf:google/vit-base-patch16-224 --model vit_base_patch16_224 --out vit-base/
  jft import old.pth --model resnet50 --skip 'ema.*' --out resnet50.safetensors""",
    "average": """
  jft average runs/bees-resnet50-full                           WiSE-FT: between the pretrained and the tuned weights
  jft average runs/bees/runs/seed* --out bees-soup              a greedy soup of runs that share a validation set
  jft average runs/bees-resnet50-full --snapshots               of one run's validations (trained with --snapshots)""",
    "push": """
  jft push runs/bees-resnet50-head me/bees                      the model's folder, to a public repository
  jft push runs/bees-resnet50-head me/bees --private --yes
  jft predict hf:me/bees photos/                                what others do with it""",
    "report": """
  jft report runs/bees-resnet50-head
  jft report runs/bees-resnet50-head --explain                  Grad-CAM, nearest training images, a linear probe
  jft report runs/bees-* --out bees.html                        all of them on one page""",
    "data": """
  jft data check bees/                                          what is wrong with the pictures, if anything
  jft data check labels.csv --out look/                         a report, a sheet of the suspicious, a list to leave out
  jft data check bees/ --json""",
    "models": """
  jft models
  jft models 'vit_*_patch16*'""",
}
TTA = "test-time augmentation, the mean over views: flip, corners (of what the crop cuts off), or none (default: none)"
LINES = "\n\t"  # that a message may have
FEW = 5  # models of which `jft models` tells more than fits a line
FREE = ("--model_options.", "--model-options.")
PLACEHOLDER = {"data": "PATH", "weights": "FILE", "plan": "PLAN", "workdir": "W", "image_size": "N"}
# What options are called elsewhere, and here.
ELSEWHERE = {
    "learning-rate": "lr", "batch-size": "batch", "num-epochs": "epochs", "freeze": "plan", "img-size": "image-size",
    "dataset": "data", "workers": "threads", "num-workers": "threads", "output": "out", "output-dir": "workdir",
    "early-stopping": "patience", "early-stop": "patience",
}  # fmt: skip
# Headings of the fields of a config in a help, by the first field below each.
SECTIONS = {
    "data": "what is trained on what",
    "optimizer": "optimisation",
    "augment": "augmentation and loss",
    "balance": "examples, seeds, validation, checkpoints",
    "layer_decay": "more ways to train",
    "lora": "the model and its input",
    "dtype": "devices and memory",
    "display": "what is shown, and the rest",
}


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Wraps what is no list of examples, and shows one spelling of an option."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        raw = text.startswith("examples:")
        return super()._fill_text(text, width, indent) if raw else textwrap.fill(text, width)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        shown = copy.copy(action)
        shown.option_strings = _spellings(action)
        return super()._format_action_invocation(shown)


def _spellings(action: argparse.Action) -> list[str]:
    """What an option is called, without the second spelling that has _ for -."""
    return [o for o in action.option_strings if "_" not in o or o.replace("_", "-") not in action.option_strings]


class Parser(argparse.ArgumentParser):
    """argparse whose errors name the way out."""

    def error(self, message: str) -> typing.NoReturn:
        known = [s for a in self._actions for s in _spellings(a) if s.startswith("--") and not s.endswith(".FIELD")]
        words = [w.split("=")[0] for w in message.split() if w.startswith("--")]
        hint = ""
        if words and "unrecognized" in message:
            meant = f"--{ELSEWHERE.get(words[0][2:].replace('_', '-'), '')}"
            hint = f" Did you mean {meant}?" if meant in known else near(words[0], known, 3, 0.6)
        self.exit(2, f"{self.prog}: {message}.{hint} See `{self.prog} --help`.\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns 0 on success, 2 for the user's mistake, 1 for a fault of ours, 130 when interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    codecs.register_error("jft", _escaped)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # whatever it is encoded in: a redirect on Windows has no λ
            stream.reconfigure(errors="jft")
    try:
        return run(argv)
    except UserError as error:
        print(f"jft: {printable(str(error), keep=LINES)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("jft: stopped.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if type(error).__name__ == "Interrupted":  # of jft.train, not imported here
            print(f"jft: {error}", file=sys.stderr)
            return 130
        if _by_hand(error):
            print("jft: stopped.", file=sys.stderr)
            return 130
        if isinstance(error, OSError) and error.errno in FULL:
            print(
                f"jft: {printable(disk(error, 'A file'))}. When that is mended, give the same command again.",
                file=sys.stderr,
            )
            return 2
        if isinstance(error, PermissionError) and error.filename is not None:
            print(
                f"jft: {printable(str(error.filename))} cannot be read or written: {error.strerror}. Its owner can "
                "permit it; or name another place.",
                file=sys.stderr,
            )
            return 2
        if told := theirs(error):
            print(f"jft: {printable(told, keep=LINES)}", file=sys.stderr)
            return 2
        traceback.print_exc()
        print(f"jft: a fault of ours ({type(error).__name__}). Please report it with the lines above.", file=sys.stderr)
        return 1


def _escaped(error: UnicodeError) -> tuple[str, int]:
    """What cannot be encoded as JSON has it, \\u00d7 for ×, so that printed JSON stays JSON."""
    assert isinstance(error, UnicodeEncodeError)
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end


def _by_hand(error: BaseException | None) -> bool:
    """Whether Ctrl-C is what an error was made of: jaxlib, while it is imported, makes an ImportError of it."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def run(argv: list[str]) -> int:
    """Parse and carry out; raises what `main` turns into exit codes."""
    parser = make_parser([word for word in argv if word.startswith(FREE)])
    if not argv:
        parser.print_help()
        return 0
    if argv[0] not in EXAMPLES and not argv[0].startswith("-"):
        raise UserError(f"There is no command {argv[0]!r}.{near(argv[0], EXAMPLES)} `jft --help` lists them.")
    options, unknown = parser.parse_known_args(argv)
    if unknown:
        options.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    code = options.run(options)
    return code or 0


def make_parser(free: Sequence[str] = ()) -> argparse.ArgumentParser:
    """All commands and their options; those of a run are made from the fields of `Config`.

    `free` are words such as `--model_options.pool`, whose fields no table lists.
    """
    parser = Parser(
        prog="jft",
        description="Fine-tune pretrained vision models in JAX: import weights, decide what trains when, train, look.",
        epilog=_examples(""),
        formatter_class=Formatter,
    )
    parser.add_argument("--version", action="version", version=f"jft {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", parser_class=Parser)

    def command(name: str, help: str, function: Any, description: str = "") -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=help,
            description=f"{help}. {description}".strip(),
            epilog=_examples(name),
            formatter_class=Formatter,
            allow_abbrev=False,
        )
        sub.set_defaults(run=function, parser=sub)
        return sub

    finetune = command(
        "finetune",
        "Fine-tune a model on labelled images",
        _finetune,
        "The same command on an interrupted run goes on with it, on a finished one changes nothing.",
    )
    _config_options(finetune, free)
    finetune.add_argument(
        "--dry-run",
        action="store_true",
        help="take one batch through all that the run will do, and leave nothing behind",
    )
    finetune.add_argument(
        "--overfit", action="store_true", help="train on one batch alone, to see that it can be learned; leaves nothing"
    )
    finetune.add_argument(
        "--predict", nargs="+", metavar="IMAGES",
        help="when the run is finished, predict these images with its model, as `jft predict` does: files, folders, "
        "globs or a CSV; of one run, not of a comparison (default: none)",
    )  # fmt: skip
    finetune.add_argument(
        "--out", metavar="FILE", help="with --predict: the .csv, .tsv, .jsonl or .parquet (default: W/predicted.csv)"
    )
    finetune.add_argument(
        "--json", action="store_true",
        help="print the result as JSON, with --predict its file as `predicted`, and nothing else on stdout",
    )  # fmt: skip

    plan = command("plan", "Print what would train when, and what it costs; trains nothing", _plan)
    _config_options(plan, free)
    plan.add_argument("--names", action="store_true", help="print the name of every parameter that trains")
    plan.add_argument("--fast", action="store_true", help="leave out FLOPs and memory, which need a compilation")
    plan.add_argument("--json", action="store_true", help="print as JSON")

    rate = command(
        "lr",
        "Suggest a learning rate",
        _lr,
        "Takes steps at rates that rise until the loss diverges (Smith 2017), four times from the same weights, and "
        "names half the geometric mean of the rate at which the mean loss fell fastest and of that of its minimum. "
        "It has the options of finetune and leaves nothing behind.",
    )
    _config_options(rate, free)
    rate.add_argument(
        "--stage", metavar="NAME", help="a stage of the plan; those before it are trained first (default: the first)"
    )
    rate.add_argument("--plot", metavar="FILE.svg", help="draw the losses over the rates as an SVG")
    rate.add_argument("--json", action="store_true", help="print as JSON")

    ranked = command(
        "rank",
        "Choose a pretrained model for labelled images; trains nothing",
        _rank,
        "Each model runs once over the images; its features are scored by a linear probe, nearest neighbours, "
        "LogME and LEEP, with what fine-tuning it would cost.",
    )
    ranked.add_argument("--data", required=True, metavar="PATH", help="as for finetune; a test split is not looked at")
    ranked.add_argument(
        "--models", required=True, nargs="+", metavar="NAME[=FILE]",
        help="models, separated by commas or spaces, with weights (a file, hf:ORG/REPO, none) or their own source's",
    )  # fmt: skip
    ranked.add_argument(
        "--metric", default="linear", metavar="M",
        help="order by linear (its accuracy), knn, logme, leep or mean-rank (default: linear)",
    )  # fmt: skip
    ranked.add_argument(
        "--shots", type=int, metavar="N",
        help="fit to N images a class, drawn by seed; without a val split N others are scored (default: all)",
    )  # fmt: skip
    ranked.add_argument(
        "--image-size", type=int, metavar="N", help="side of the pictures in pixels (default: each model's own)"
    )
    ranked.add_argument("--batch", type=int, default=32, metavar="N", help="images at a time (default: 32)")
    ranked.add_argument(
        "--epochs",
        type=float,
        default=10,
        metavar="N",
        help="passes over the images of which the costs are told (default: 10)",
    )
    ranked.add_argument(
        "--seed", type=int, default=0, metavar="N", help="random number seed of folds and shots (default: 0)"
    )
    ranked.add_argument("--json", action="store_true", help="print as JSON")

    swept = command(
        "sweep",
        "Search for the values of some fields",
        _sweep,
        "Every trial is one run, in W/trials, without --seeds and --distributed; the same command on an interrupted "
        "sweep goes on with it. A config file may "
        'say SPACE = {"lr": ("log", 1e-5, 1e-2), "plan": ["head", "lp-ft"]}. Needs Optuna: pip install "jft[sweep]".',
    )
    _config_options(swept, free)
    swept.add_argument(
        "--over", action="append", default=[], metavar="FIELD=SPACE",
        help="the values of a field: log:LOW:HIGH, linear:LOW:HIGH, or A,B,…; repeatable",
    )  # fmt: skip
    swept.add_argument("--trials", type=int, metavar="N", help="trials in all (default: 20; all of a space of lists)")
    swept.add_argument(
        "--seconds", type=float, metavar="S", help="begin no trial after so many seconds; the same command goes on"
    )
    swept.add_argument("--no-prune", action="store_true", help="run every trial to its end")
    swept.add_argument("--json", action="store_true", help="print the trials as JSON")

    evaluate = command(
        "evaluate", "Score a run's model", _evaluate,
        "On its own validation images, or on any labelled images; every image counts exactly once.",
    )  # fmt: skip
    evaluate.add_argument("workdir", nargs="?", metavar="W", help="a run's or model's folder, or hf:ORG/REPO")
    evaluate.add_argument("--data", metavar="PATH", help="other labelled images (default: the run's validation set)")
    _model_options(evaluate)
    evaluate.add_argument("--json", action="store_true", help="print as JSON (default: a line a figure)")

    predict = command(
        "predict",
        "Predict the classes of images",
        _predict,
        "Images are files, folders, globs in quotes, a CSV with a column path, or - for paths on standard input. They "
        "are decoded, run and written piece by piece, so there may be any number of them.",
    )
    predict.add_argument(
        "paths",
        nargs="+",
        metavar="W, IMAGES…",
        help="a run's or model's folder or hf:ORG/REPO (not with --model or --weights), then images",
    )
    predict.usage = "jft predict W IMAGES… [options]\n       jft predict --model NAME --weights FILE IMAGES… [options]"
    predict.add_argument(
        "--out",
        metavar="FILE",
        help="write a .csv, .tsv, .jsonl or .parquet, whole or not at all (default: print a CSV)",
    )
    predict.add_argument("--top-k", type=int, default=1, metavar="K", help="classes told for each image (default: 1)")
    predict.add_argument(
        "--probabilities", action="store_true", help="add a column p:CLASS for every class (default: no)"
    )
    predict.add_argument(
        "--unknown", type=float, metavar="P",
        help="call an image unknown whose largest probability, from 0 to 1, is below P (default: no)",
    )  # fmt: skip
    predict.add_argument(
        "--temperature", metavar="T",
        help="divide logits by a number above 0, or with `fitted` by that of the run's validation images (default: 1)",
    )  # fmt: skip
    predict.add_argument(
        "--features", metavar="FILE", help="write what the head takes, float32, as .npz or .parquet (default: no)"
    )
    _model_options(predict)
    predict.add_argument("--json", action="store_true", help="print JSON lines instead of CSV (default: no)")

    report = command(
        "report",
        "Draw the report of a run, or compare several",
        _report,
        "Runs draw theirs at the end; an unfinished one gets what it has. Of several runs, or of a comparison's "
        "folder, one page: a table with intervals, what they did differently, their curves.",
    )
    report.add_argument("workdirs", nargs="+", metavar="W", help="a run's folder; several, or that of a comparison")
    report.add_argument(
        "--explain",
        action="store_true",
        help="one run: run the model again for Grad-CAM, nearest training images, a linear probe (default: no)",
    )
    report.add_argument(
        "--images", type=int, default=2000, metavar="N",
        help="with --explain: at most N training and N validation images are run (default: 2000)",
    )  # fmt: skip
    report.add_argument(
        "--data", metavar="D", help="one run: its data, where they have moved (default: where they were)"
    )
    report.add_argument(
        "--out", metavar="FILE",
        help="several: the page (default: comparison.html beside the first, W/report.html of a comparison's folder)",
    )  # fmt: skip

    average = command(
        "average",
        "Average weights: a run's with its source (WiSE-FT), or several runs' (model soup)",
        _average,
        "One run: α is chosen on its validation set. Several: added one by one while validation does not get worse.",
    )
    average.add_argument("workdirs", nargs="+", metavar="W", help="one run's folder, or several runs' of one model")
    average.add_argument("--snapshots", action="store_true", help="one run: a soup of the weights of its validations")
    average.add_argument("--uniform", action="store_true", help="soups: average them all")
    average.add_argument(
        "--data", metavar="D",
        help="the runs' data, where they have moved or were given in Python; others are scored on their val split, or "
        "all of them (default: where they were)",
    )  # fmt: skip
    average.add_argument(
        "--out",
        metavar="FOLDER",
        help="the model's folder (default: W/wise-ft, W/soup of --snapshots; of several soup, beside the first)",
    )
    average.add_argument("--json", action="store_true", help="print as JSON")

    out = command("export", "Write a run's model as another tool reads it", _export)
    out.add_argument("workdir", metavar="W", help="a run's folder, or a model's")
    out.add_argument(
        "--format",
        required=True,
        metavar="FORMAT",
        help="whose: timm, torchvision, hf (transformers), safetensors or npz (our names), stablehlo (a program); or "
        "the original authors' names: augreg, big-vision, bit, deit3",
    )
    out.add_argument("--out", metavar="PATH", help="file or, for hf and stablehlo, folder (default: in W)")
    out.add_argument("--dtype", default="float32", metavar="T", help="type of the numbers: float32, float16, bfloat16")
    out.add_argument(
        "--preprocess-inside", action="store_true", help="stablehlo: take uint8 pictures, normalise inside"
    )
    out.add_argument(
        "--processor",
        metavar="WHOSE",
        help="hf: the folder's image processor. transformers (default): needs nothing besides, but cuts one pixel "
        "further up or left than jft where the crop leaves 3, 7, 11 … over. timm: jft's very pixels, where timm is "
        "installed",
    )
    _receipt_options(out)

    taken = command(
        "import",
        "Convert weights of any format, without training",
        _import,
        "Prints what is done with every tensor; writes nothing without --out.",
    )
    taken.add_argument(
        "source", metavar="SOURCE", help="a file, a folder, hf:ORG/REPO, https://…#sha256=… or gs://BUCKET/FILE"
    )
    taken.add_argument("--model", required=True, metavar="NAME", help="what they are weights of, see `jft models`")
    taken.add_argument("--out", metavar="PATH", help="a .safetensors or .npz under jft's names, else a model's folder")
    taken.add_argument("--format", metavar="FORMAT", help="whose names the weights have; default: those that fit")
    taken.add_argument("--skip", action="append", default=[], metavar="PATTERN", help="names to leave out; repeatable")
    taken.add_argument(
        "--image-size", type=int, metavar="N", help="side of the pictures in pixels (default: the model's own)"
    )
    for word in dict.fromkeys(w.split("=")[0] for w in free):
        taken.add_argument(word, dest=f"field:{word[2:]}", nargs=1, help=argparse.SUPPRESS)
    taken.add_argument(
        "--model_options.FIELD", metavar="VALUE", dest="_", help="of the architecture: --model_options.pool token_avg"
    )
    _receipt_options(taken)

    pushed = command(
        "push",
        "Share a run's model on the Hugging Face hub",
        _push,
        "Uploads the model's folder alone (README.md, config.json, model.safetensors), told before and asked for.",
    )
    pushed.add_argument("workdir", metavar="W", help="a run's or model's folder")
    pushed.add_argument("repo", metavar="ORG/REPO", help="the repository, made where it is not there")
    pushed.add_argument("--private", action="store_true", help="for you and your organisation alone (default: public)")
    pushed.add_argument("--yes", action="store_true", help="do not ask before the upload (default: ask)")

    data = command(
        "data",
        "Look at a data set: pictures unreadable, alike, misnamed, nearly empty; classes imbalanced",
        _data,
        "Nothing is changed. A file quarantine.txt in the data's folder, or beside the CSV, names pictures that "
        "training leaves out; --out writes one to look through.",
    )
    data.add_argument("what", choices=("check",), metavar="check", help="what to do: check")
    data.add_argument("data", metavar="PATH", help="folder of class folders (or of train/ val/), CSV, or tfds:NAME")
    data.add_argument(
        "--out", metavar="FOLDER", help="write report.txt, report.json, sheet.png, quarantine.txt (default: nothing)"
    )
    data.add_argument("--json", action="store_true", help="print as JSON")

    models = command("models", "List the architectures", _models)
    models.add_argument("pattern", nargs="?", default="*", metavar="PATTERN", help="a glob over names (default: all)")
    models.add_argument("--json", action="store_true", help="print as JSON")
    for sub in commands.choices.values():
        _tell_defaults(sub)
    return parser


def _tell_defaults(parser: argparse.ArgumentParser) -> None:
    """The default of every option that its help does not tell itself."""
    for action in parser._actions:
        told = action.help in (None, argparse.SUPPRESS) or "default" in (action.help or "") or action.required
        told = told or action.default == argparse.SUPPRESS  # --help
        if action.option_strings and not told:
            value = "no" if action.const is True else "none" if action.default in (None, []) else action.default
            action.help = f"{action.help} (default: {value})"


def _model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch", type=int, default=32, metavar="N", help="images at a time (default: 32)")
    parser.add_argument("--tta", nargs="+", default=[], metavar="VIEW", help=TTA)
    parser.add_argument("--model", metavar="NAME", help="a pretrained model as it is (default: W's)")
    parser.add_argument(
        "--weights", metavar="FILE",
        help="of --model (default: its own source); or, without --model, a model that jft saved or pushed",
    )  # fmt: skip


def _receipt_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--receipt", metavar="FILE.json", help="write what became of every tensor")
    parser.add_argument("--json", action="store_true", help="print the receipt as JSON")


def _examples(name: str) -> str:
    return f"examples:{EXAMPLES[name]}"


def _config_options(parser: argparse.ArgumentParser, free: Sequence[str]) -> None:
    parser.usage = f"{parser.prog} [CONFIG.py] [options]"
    parser.add_argument(
        "config", nargs="?", metavar="CONFIG.py",
        help="a Python file whose config() returns a jft.Config, or several by name; options set fields over it",
    )  # fmt: skip
    group: Any = parser
    for word in dict.fromkeys(w.split("=")[0] for w in free):
        group.add_argument(word, dest=f"field:{word[2:]}", nargs=1, help=argparse.SUPPRESS)
    for field in dataclasses.fields(Config):
        if field.name in SECTIONS:
            group = parser.add_argument_group(SECTIONS[field.name])
        default = field.default
        hint = field.metadata["help"]
        if "default" not in hint and default is not dataclasses.MISSING and default is not None:
            shown = "no" if default is False else "yes" if default is True else "none" if default == () else default
            hint += f" (default: {f'{shown:g}' if isinstance(shown, float) else shown})"
        flags = list(dict.fromkeys([f"--{field.name.replace('_', '-')}", f"--{field.name}"]))
        inside = field.metadata.get("fields")
        for inner in dataclasses.fields(inside) if inside else ():
            _option(
                group, [f"--{field.name}.{inner.name}"], f"{field.name}.{inner.name}", inner.type, argparse.SUPPRESS
            )
        if "fields" in field.metadata:
            group.add_argument(f"--{field.name}.FIELD", metavar="VALUE", dest="_", help=hint)
            continue
        _option(group, flags, field.name, field.type, hint.replace("%", "%%"))


def _option(group: Any, flags: list[str], name: str, kind: Any, help: str) -> None:
    words: dict[str, Any] = {"nargs": 1}
    if "tuple" in str(kind) and "Stage" not in str(kind):
        words = {"nargs": "+"}
    elif kind in (bool, "bool"):
        words = {"nargs": "?", "const": "yes"}
    usual = "yes|no" if kind is bool else "X" if "float" in str(kind) else "N" if "int" in str(kind) else "NAME"
    metavar = PLACEHOLDER.get(name, usual)
    group.add_argument(*flags, dest=f"field:{name}", metavar=metavar, help=help, **words)


def configs_of(options: argparse.Namespace, suffix: str = "") -> dict[str, Config]:
    """The configs of a command line: those of its file or the default, with its options set in each.

    Where none names a folder they get one by the name of the file, with a suffix.
    """
    made = load_config(options.config) if options.config else Config()
    configs = {"": made} if isinstance(made, Config) else dict(made)
    for key, words in vars(options).items():
        if key.startswith("field:") and words is not None:
            name = key.removeprefix("field:")
            words = [words] if isinstance(words, str) else words
            configs = {label: override(config, name, words) for label, config in configs.items()}
            if all(name in overridden(config.plan) for config in configs.values()):
                raise UserError(
                    f"{flag(name)} would count for nothing: every stage of the "
                    "plan has its own. Change it there, or leave it out of the stages that should follow the option."
                )
    if options.config and not any(c.workdir for c in configs.values()):
        if not suffix and len(configs) == 1 and next(iter(configs.values())).seeds > 1:
            suffix = "-seeds"  # not in the way of the same file with one
        configs = {
            label: c.replace(workdir=f"runs/{Path(options.config).stem}{suffix}") for label, c in configs.items()
        }
    return configs


def _finetune(options: argparse.Namespace) -> None:
    from jft.api import finetune
    from jft.compare import Comparison
    from jft.report.live import make_display
    from jft.use import open_model, write_predictions

    configs = configs_of(options)
    if options.predict or options.out:
        _check_predict(configs, options)
    if options.dry_run or options.overfit:
        _try_out(configs, options)
        return
    if options.json:
        configs = {name: c.replace(display="quiet") for name, c in configs.items()}
    done = finetune(configs)
    told: Any = done.rows if isinstance(done, Comparison) else done.result
    if options.predict:
        (config,) = configs.values()
        out = options.out or str(done.workdir / "predicted.csv")
        with contextlib.closing(make_display(config.display)) as display:
            count, bad = write_predictions([(out, None)], open_model(done.workdir), options.predict, display=display)
        told = {**told, "predicted": {"file": out, "rows": count, "unreadable": bad}}
        _tell_rows(count, bad, out)
    if options.json:
        print(json.dumps(told, indent=1, ensure_ascii=False))


def _check_predict(configs: dict[str, Config], options: argparse.Namespace) -> None:
    """Raises UserError for images that are not there and a file that cannot be written, before a run is made."""
    from jft import table
    from jft.use import pictures

    if not options.predict:
        options.parser.error("--out is the file of --predict")
    config, runs = next(iter(configs.values())), sum(c.seeds for c in configs.values())
    if runs > 1 or config.distributed or options.dry_run or options.overfit:
        what = f"this makes {runs}" if runs > 1 else "not of --distributed, --dry-run or --overfit"
        raise UserError(
            f"--predict is of one run, {what}. Use `jft predict W IMAGES…` with the folder of a finished run."
        )
    for word in options.predict:
        if word == "-":
            raise UserError("--predict takes no - for standard input; give a CSV with a column path.")
        if word.endswith(".py"):
            raise UserError(f"--predict was given {word}, which is no image. A config file stands before the options.")
    found, _ = pictures(options.predict)
    if not len(found):
        raise UserError(f"There is no image in {', '.join(options.predict)} to predict.")
    if options.out:
        table.kind_of(options.out)
        if not (config.workdir and Path(options.out).parent == Path(config.workdir)):
            table.check(Path(options.out))  # the run's own folder is made by the run


def _try_out(configs: dict[str, Config], options: argparse.Namespace) -> None:
    from jft import trial

    told = []
    for name, config in configs.items():
        for what, function in (("dry-run", trial.dry_run), ("overfit", trial.overfit)):
            if vars(options)[what.replace("-", "_")]:
                found = function(config)
                told.append({"config": name, "trial": what} | found.json())
                if not options.json:
                    print("\n".join([*([name] if name else []), trial.text(found, what)]))
    if options.json:
        _print_json(told)


def _print_json(told: list[dict[str, Any]]) -> None:
    """What one config gave as an object, what several gave as a list of them; numbers that are none by name."""
    from jft.report.log import plain

    print(json.dumps(plain(told if len(told) > 1 else told[0]), indent=1, allow_nan=False))


def _plan(options: argparse.Namespace) -> None:
    from jft.preview import preview, text

    found = []
    for name, config in configs_of(options).items():
        told = preview(config, compile=not options.fast)
        found.append({"config": name} | told)
        if not options.json:
            print(text(name, told, options.names))
    if options.json:
        _print_json(found)


def _lr(options: argparse.Namespace) -> None:
    from jft.files import writing
    from jft.finder import find_lr, svg, text
    from jft.report.several import place

    if options.plot and Path(options.plot).suffix != ".svg":
        raise UserError(f"--plot {options.plot}: an SVG is drawn, and its name ends in .svg.")
    told = []
    for name, config in configs_of(options).items():
        found = find_lr(config.replace(display="quiet") if options.json else config, options.stage)
        if options.plot:
            file = Path(options.plot)
            file = file.with_stem(f"{file.stem}-{place(name)}") if name else file
            try:
                with writing(file) as part:
                    part.write_text(svg(found), encoding="utf-8")
            except OSError as error:
                raise UserError(f"--plot {file} cannot be written: {error.strerror}.") from None
        told.append({"config": name} | found.json())
        if not options.json:
            print("\n".join([name, text(found)] if name else [text(found)]))
    if options.json:
        _print_json(told)


def _rank(options: argparse.Namespace) -> None:
    from jft.rank import parse_models, rank, text
    from jft.report.live import make_display

    display = make_display("quiet" if options.json else "auto")
    with contextlib.closing(display):
        done = rank(
            options.data,
            parse_models(options.models),
            metric=options.metric,
            shots=options.shots,
            seed=options.seed,
            batch=options.batch,
            epochs=options.epochs,
            image_size=options.image_size,
            display=display,
        )
    print(json.dumps(done.json(), indent=1, ensure_ascii=False) if options.json else text(done))


def _sweep(options: argparse.Namespace) -> None:
    import shlex

    from jft import sweep

    configs = configs_of(options, "-sweep")
    if len(configs) > 1:
        raise UserError(f"{options.config} has {len(configs)} configs; a sweep takes one.")
    config = next(iter(configs.values()))
    space = getattr(load_file(options.config), "SPACE", {}) if options.config else {}
    space = sweep.merged(space, sweep.parse(config, options.over))
    done = sweep.sweep(
        config.replace(display="quiet") if options.json else config,
        space,
        trials=options.trials,
        seconds=options.seconds,
        prune=not options.no_prune,
    )
    if options.json:
        print(json.dumps({"best": done.best, "trials": done.rows}, indent=1, ensure_ascii=False))
        return
    there, found = f"\nThe best trial is a run already: {done.best['folder']}.", sweep.again(config, space, done.best)
    if found is None:
        file = Path(done.best["folder"]) / "config.json"
        print(f"{there} No command line says its values; they are in {file}.")
        return
    words = ["jft", "finetune", *([options.config] if options.config else [])]
    given = {k.removeprefix("field:"): v for k, v in vars(options).items() if k.startswith("field:") and v is not None}
    given = {k.replace("-", "_"): v for k, v in given.items() if k != "workdir"}
    for name, value in (given | found).items():
        values = [value] if isinstance(value, str) else list(value)
        # Of what looks like an option argparse asks where it belongs.
        alone = len(values) == 1 and values[0].startswith("-")
        words += [f"{flag(name)}={values[0]}"] if alone else [flag(name), *values]
    # The folder that a run has by itself may hold another one, or be the sweep's.
    words += ["--workdir", f"{str(done.workdir).removesuffix('-sweep')}-best"]
    print(f"{there} To run it again:\n  {shlex.join(words)}")


def _evaluate(options: argparse.Namespace) -> None:
    from jft.report.live import make_display
    from jft.use import evaluate, pretrained

    given = options.workdir
    if (given is None) == (options.model is None and options.weights is None):
        raise UserError("Name one model: a run's folder, or --weights (with --model, where jft did not save them).")
    if given is None and options.data is None:
        raise UserError("--data names the labelled images to score this model on.")
    with contextlib.closing(make_display("quiet" if options.json else "auto")) as display:
        model = pretrained(options.model, options.weights) if given is None else given
        scores = evaluate(model, options.data, display, options.tta, _at_least_one(options, "batch"))
    if options.json:
        print(json.dumps(scores, indent=1, ensure_ascii=False))
        return
    each = [(f"{name} {kind}", value) for name, told in scores.get("each", {}).items() for kind, value in told.items()]
    for name, value in [*((n, v) for n, v in scores.items() if n not in ("excluded", "each")), *each]:
        print(f"{name:18} {value:.4f}" if isinstance(value, float) else f"{name:18} {value}")
    for name, reason in scores["excluded"]:
        print(f"left out: {name}: {reason}")


def _at_least_one(options: argparse.Namespace, name: str) -> int:
    if (value := getattr(options, name)) < 1:
        raise UserError(f"--{name.replace('_', '-')} is {value}; it is at least 1.")
    return value


def _predict(options: argparse.Namespace) -> None:
    from jft.report.live import make_display
    from jft.table import features_to, kind_of
    from jft.use import open_model, pretrained, write_predictions

    top_k, batch = _at_least_one(options, "top_k"), _at_least_one(options, "batch")
    if options.out:
        kind_of(options.out)
    if options.model or options.weights:
        model, images = pretrained(options.model, options.weights), options.paths
    else:
        model, images = open_model(options.paths[0]), options.paths[1:]
    if not images:
        raise UserError("No images given. Name files, folders, globs, a CSV or - after the run's folder.")
    kind = "jsonl" if options.json else "csv"
    printed = [(sys.stdout, kind)] if options.json or not options.out else []
    if (
        printed
        and kind == "csv"
        and isinstance(sys.stdout, io.TextIOWrapper)
        and sys.stdout.encoding.lower() == "utf-8"
    ):
        sys.stdout.reconfigure(errors="surrogateescape")  # as in a file: a name that is no UTF-8 stays what it is
    with contextlib.ExitStack() as stack:
        # What is printed has standard output to itself.
        display = stack.enter_context(contextlib.closing(make_display("quiet" if printed else "auto")))
        count, bad = write_predictions(
            [*([(options.out, None)] if options.out else []), *printed],
            model,
            images,
            top_k=top_k,
            probability_of_each=options.probabilities,
            temperature=options.temperature,
            unknown=options.unknown,
            features=stack.enter_context(features_to(options.features)) if options.features else None,
            batch=batch,
            display=display,
            tta=options.tta,
        )
    if options.out:
        _tell_rows(count, bad, options.out)


def _tell_rows(count: int, bad: int, out: Any) -> None:
    few = f", {bad} of them without a label: see the column error" if bad else ""
    print(f"{count} {'row' if count == 1 else 'rows'} in {out}{few}", file=sys.stderr)


def _report(options: argparse.Namespace) -> None:
    from jft.report.html import make_report
    from jft.report.live import make_display
    from jft.report.several import is_comparison, make_comparison

    first = options.workdirs[0]
    if len(options.workdirs) > 1 or is_comparison(first):
        if options.explain or options.data:
            options.parser.error("--explain and --data are of one run")
        whole = str(Path(first) / "report.html") if len(options.workdirs) == 1 else None
        print(make_comparison(options.workdirs, options.out or whole))
        return
    if options.out:
        options.parser.error("--out is of several runs: one has its report in its folder")
    if options.images < 1:
        raise UserError(f"--images is {options.images}; at least 1 is needed.")
    if options.explain:
        from jft.explain import explain

        with contextlib.closing(make_display("auto")) as display:
            explain(first, options.data, images=options.images, display=display)
    images = None
    if options.data:
        from jft.explain import data_of

        images = data_of(first, options.data).val
    print(make_report(first, images))


def _average(options: argparse.Namespace) -> None:
    from jft.average import soup, soup_of_run, wise_ft
    from jft.report.live import make_display

    if options.snapshots and len(options.workdirs) > 1:
        options.parser.error("--snapshots are of one run")
    if options.uniform and not options.snapshots and len(options.workdirs) == 1:
        options.parser.error("--uniform is of a soup: name several runs, or --snapshots of one")
    display = make_display("quiet" if options.json else "auto")
    if options.snapshots:
        done = soup_of_run(options.workdirs[0], not options.uniform, options.out, display, options.data)
    elif len(options.workdirs) == 1:
        done = wise_ft(options.workdirs[0], out=options.out, display=display, data=options.data)
    else:
        done = soup(options.workdirs, options.out, not options.uniform, display, options.data)
    if options.json:
        print(json.dumps({"path": str(done.path), done.figure: done.score, "rows": done.rows}, indent=1))
        return
    from jft import metrics

    name = metrics.HEADLINES[done.figure]
    for row in done.rows:
        what = f"α {row['alpha']:.1f}" if "alpha" in row else f"{row['run']}{'' if row['in_soup'] else ' (left out)'}"
        print(f"{what}: validation {name} {metrics.told(done.figure, row[done.figure])}")
    print(f"{done.path}: validation {name} {metrics.told(done.figure, done.score)}")


def _export(options: argparse.Namespace) -> None:
    from jft.convert import check_receipt, default_out, export_model, write_receipt

    if options.receipt:
        check_receipt(options.receipt, options.out or default_out(options.workdir, options.format))
    done = export_model(
        options.workdir,
        options.format,
        options.out,
        preprocess_inside=options.preprocess_inside,
        dtype=options.dtype,
        processor=options.processor,
    )
    if options.receipt:
        write_receipt(options.receipt, done.receipt.json())
    if options.json:
        print(json.dumps(done.receipt.json(), indent=1))
        return
    print(done.receipt)
    if done.code:
        print("\n" + "\n".join(done.code))


def _import(options: argparse.Namespace) -> None:
    from jft.convert import check_receipt, import_weights, write_receipt

    if options.receipt:
        check_receipt(options.receipt, options.out)
    config = Config()
    for key, words in vars(options).items():
        if key.startswith("field:") and words is not None:
            config = override(config, key.removeprefix("field:"), words)
    read, written = import_weights(
        options.source,
        options.model,
        options.out,
        format=options.format,
        skip=options.skip,
        image_size=options.image_size,
        model_options=config.model_options,
    )
    told = read.json() | {"written": written.json() if written else None}
    if options.receipt:
        write_receipt(options.receipt, told)
    if options.json:
        print(json.dumps(told, indent=1))
        return
    print(read)
    print(written if written else "nothing written: no --out")


def _push(options: argparse.Namespace) -> None:
    from jft.push import push

    def confirm(told: str) -> bool:
        print(told, file=sys.stderr)
        if options.yes:
            return True
        if not sys.stdin.isatty():
            raise UserError("Nothing was uploaded: there is nobody to ask. With --yes it is not asked.")
        print("Upload? [y/N] ", end="", file=sys.stderr, flush=True)
        return sys.stdin.readline().strip().lower() in ("y", "yes")

    print(push(options.workdir, options.repo, private=options.private, confirm=confirm))


def _data(options: argparse.Namespace) -> None:
    from jft.data import check, sources
    from jft.report.live import make_display
    from jft.report.sheet import write_sheet

    splits = sources.load(options.data, val_fraction=0)
    total = sum(map(len, splits.sets().values()))
    display = make_display("quiet" if options.json else "auto")
    with contextlib.closing(display), display.task("Looking at", total=total, unit="images") as advance:
        report = check.check(splits, options.data, progress=lambda done, total: advance(1))
    print(json.dumps(report.json(), indent=1) if options.json else check.text(report))
    if options.out:
        out = check.write(report, options.out, options.data)
        write_sheet(out / "sheet.png", report, splits)
        print(f"\nreport.txt, report.json, sheet.png and quarantine.txt are in {out}.", file=sys.stderr)


def _models(options: argparse.Namespace) -> None:
    import fnmatch

    import numpy as np

    from jft.models import MODELS, make_model
    from jft.weights import FORMATS

    names = [n for n in MODELS if fnmatch.fnmatchcase(n, options.pattern) or options.pattern in n]
    if not names:
        raise UserError(f"No model's name matches {options.pattern!r}.{near(options.pattern, MODELS)}")
    rows: list[dict[str, Any]] = []
    for name in names:
        model = make_model(name)
        source = next((m.SOURCES[name] for m in FORMATS.values() if name in m.SOURCES), None)
        rows.append(
            {
                "name": name,
                "params": sum(int(np.prod(s.shape)) for s in model.shapes()[0].values()),
                "flops": model.flops(),
                "input": list(model.input_shape[:2]),
                "parts": len(model.parts),
                "weights": source.uri if source else None,
                "licence": source.licence if source else None,
                "trained_on": source.data if source else None,
                "paper": source.paper if source else None,
            }
        )
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    width = max(len(n) for n in names)
    print(f"{'name':{width}}  {'parameters':>11}  {'GMACs':>6}  {'input':>9}  default weights")
    for row in rows:
        size = "×".join(map(str, row["input"]))
        origin = f"{row['weights']} ({row['licence']})" if row["weights"] else "none: pass --weights"
        macs = f"{row['flops'] / 2e9:.2f}"
        print(f"{row['name']:{width}}  {row['params'] / 1e6:>9.2f} M  {macs:>6}  {size:>9}  {origin}")
        if len(rows) <= FEW and row["weights"]:
            print(f"{'':{width}}  trained on {row['trained_on']}; {row['paper']}")


if __name__ == "__main__":
    sys.exit(main())
