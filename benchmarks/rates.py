"""The learning-rate finder's suggestion, and a published rule's, against a grid: within a point of the best rate?

    python benchmarks/rates.py $JFT_ASSETS rates.csv                 every line that is not there yet
    python benchmarks/rates.py $JFT_ASSETS rates.csv --plan head     of one plan; --model and --data likewise
    python benchmarks/rates.py $JFT_ASSETS rates.csv --table         what has been measured, as Markdown

The runs are those of transfer.py on all images: as many steps, as many pixels, the accuracy of the last state. The
finder is asked once a seed, with that seed. `preset` is the rate of the plan itself.

`--plan hyper` is a rule's: `bit` for the ResNet, `vit` for the ViT, everything trained by its optimizer and schedule
in its 500 steps, at multiples of its rate for 512 images. The steps are of 64 images of 32 pixels, an eighth of the
images that it asks for and a sixteenth of the pixels: what a core does in minutes. `--plan hyper64` is the same with
half the images and twice the side. The finder is not asked.
"""

import itertools
import tempfile
import time
from pathlib import Path

import numpy as np
import transfer

import jft
from jft import hyper
from jft.run import Shared
from jft.train import train

GRIDS = {
    "head": (1e-4, 1e-3, 1e-2, 1e-1, 1.0),
    "full": (1e-5, 1e-4, 1e-3, 1e-2, 1e-1),  # of the head; the rest has a tenth
    "flat": (1e-6, 1e-5, 1e-4, 1e-3, 1e-2),
    "hyper": (0.1, 0.3, 1, 3, 10),  # of the rule's own
    "hyper64": (0.1, 0.3, 1, 3, 10),
}
RULES = {"vit_tiny_patch16_224": "vit", "resnet18": "bit"}
STEPS = {"hyper": (64, 32), "hyper64": (32, 64)}  # images and pixels of a rule's steps


def config(assets: Path, data: str, model: str, plan: str, seed: int, workdir: str) -> jft.Config:
    """The run of a line, at the plan's or the rule's own rate."""
    made = transfer.config(assets, data, model, None, plan if plan not in STEPS else "full", seed, workdir)
    if plan not in STEPS:
        return made
    batch, pixels = STEPS[plan]
    count = len(transfer.images(assets / "data" / transfer.DATA[data])["train"])
    rule = RULES[model]
    told = hyper.RULES[rule](count, (pixels, pixels))
    kept = {name: getattr(made, name) for name in made.given - {"plan", "augment"}}  # which the rule tells
    run = {"hyper": rule, "lr": told["lr"], "epochs": told["epochs"] * batch / hyper.BATCH}
    return jft.Config(**kept | run | {"batch": batch, "image_size": pixels})


def measure(assets: Path, file: Path, plans: list[str], models: list[str], sets: list[str], seeds: range) -> None:
    """Train at every rate of the grid, at the suggestion and at the plan's own, a line for each."""
    done = {tuple(row[f] for f in transfer.FIELDS[:5]) for row in transfer.read(file)}
    shared = Shared()
    for plan, model, data in itertools.product(plans, models, sets):
        asked = () if plan in STEPS else ("preset", "finder")
        for seed, what in itertools.product(seeds, (*GRIDS[plan], *asked)):
            found: float | None = None
            key = (data, model, "all", f"{plan}, {what if isinstance(what, str) else f'{what:g}'}", str(seed))
            if key in done:
                continue
            with tempfile.TemporaryDirectory() as folder:
                made = config(assets, data, model, plan, seed, folder + "/run")
                begun = time.process_time()
                if what == "finder":
                    found = jft.find_lr(made).suggestion
                    if found is None:
                        print(*key, "no suggestion", sep=", ", flush=True)
                        continue
                rate = {"preset": None, "finder": found}.get(what) if isinstance(what, str) else what
                rate = rate * made.lr if rate and plan in STEPS else rate
                result = train(made if rate is None else made.replace(lr=rate), shared=shared).result
                row = dict(zip(transfer.FIELDS[:5], key, strict=True)) | {
                    "accuracy": f"{result['last']['accuracy']:.4f}",
                    "steps": result["last"]["step"],
                    "seconds": f"{time.process_time() - begun:.1f}",
                    "trained": f"{found:g}" if what == "finder" else result["stages"][0]["trainable_params"],
                }
            transfer.write(file, [row])
            print(*row.values(), sep=", ", flush=True)


def table(rows: list[dict[str, str]]) -> str:
    """A line for each plan, model and data set: the grid's best, the finder's and the plan's own, means over seeds."""
    lines = ["| plan | model | data | best of the grid | at | finder | suggests | plan's own |", "|---" * 8 + "|"]
    groups = dict.fromkeys((r["method"].split(", ")[0], r["model"], r["data"]) for r in rows)
    for plan, model, data in groups:
        cells: dict[str, list[float]] = {}
        suggested = []
        for r in rows:
            if (r["method"].split(", ")[0], r["model"], r["data"]) == (plan, model, data):
                what = r["method"].split(", ")[1]
                cells.setdefault(what, []).append(100 * float(r["accuracy"]))
                suggested += [float(r["trained"])] if what == "finder" else []
        means = {what: float(np.mean(v)) for what, v in cells.items()}
        best = max((w for w in means if w not in ("finder", "preset")), key=lambda w: means[w], default="")
        own = "1" if plan in STEPS else "preset"
        shown = [f"{means[w]:.1f} ({len(cells[w])})" if w in means else "" for w in (best, "finder", own)]
        rates = f"{min(suggested):g} to {max(suggested):g}" if suggested else ""
        lines.append(f"| {plan} | {model} | {data} | {shown[0]} | {best} | {shown[1]} | {rates} | {shown[2]} |")
    return "\n".join(lines)


def main() -> None:
    parser = transfer.make_parser(__doc__)
    parser.add_argument("--plan", choices=GRIDS)
    parser.add_argument("--model", choices=transfer.MODELS)
    parser.add_argument("--data", choices=transfer.DATA)
    parser.add_argument("--seeds", default="0:5", help="from:to, the second not included (default: %(default)s)")
    o = parser.parse_args()
    if not o.table:
        chosen = ([one] if one else list(all_) for one, all_ in ((o.plan, GRIDS), (o.model, transfer.MODELS)))
        measure(
            o.assets, o.file, *chosen, [o.data] if o.data else list(transfer.DATA), range(*map(int, o.seeds.split(":")))
        )
    print(table(transfer.read(o.file)))


if __name__ == "__main__":
    main()
