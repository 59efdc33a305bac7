"""`jft rank` against fine-tuning: do three weight files come in the same order, and in what share of the time?

    python benchmarks/ranking.py $JFT_ASSETS ranking.csv             every line that is not there yet
    python benchmarks/ranking.py $JFT_ASSETS ranking.csv --table     what has been measured, as Markdown

20 images a class, 128 pixels. A rank is one call for the three; fine-tuning is the plan `full` at its own rate, or
`head`, 80 steps of 8 images, the accuracy of the last state on images that neither saw, mean ± standard deviation over
seeds. Seconds are the processor's, those of a rank for all three and of fine-tuning for one, the median.
"""

import itertools
import tempfile
import time
from pathlib import Path

import numpy as np
import transfer

from jft.rank import rank
from jft.run import Shared
from jft.train import train

SHOTS, STEPS, PIXELS = 20, 80, 128
PLANS, SEEDS = ("head", "full"), range(3)


def measure(assets: Path, file: Path) -> None:
    """A line for each model of a rank and for each run."""
    done = {tuple(row[f] for f in transfer.FIELDS[:5]) for row in transfer.read(file)}
    for data in transfer.DATA:
        if (data, next(iter(transfer.FILES)), str(SHOTS), "rank", "0") not in done:
            begun = time.process_time()
            models = [(name, str(assets / "weights" / weights)) for name, weights in transfer.FILES.items()]
            found = rank(transfer.images(assets / "data" / transfer.DATA[data]), models, shots=SHOTS, image_size=PIXELS)
            spent = {"steps": 0, "seconds": f"{time.process_time() - begun:.1f}", "trained": 0}
            scores = {row["model"]: {"accuracy": f"{row['linear']['accuracy']:.4f}"} | spent for row in found.rows}
            about = {"data": data, "shots": SHOTS, "method": "rank", "seed": 0}
            transfer.write(file, [about | {"model": model} | told for model, told in scores.items()])
        shared = Shared()
        for plan, model, seed in itertools.product(PLANS, transfer.FILES, SEEDS):
            key = dict(zip(transfer.FIELDS, (data, model, str(SHOTS), plan, str(seed)), strict=False))
            if tuple(key.values()) in done:
                continue
            with tempfile.TemporaryDirectory() as folder:
                made = transfer.config(assets, data, model, SHOTS, plan, seed, folder + "/run")
                made = made.replace(image_size=PIXELS, epochs=made.epochs * STEPS / transfer.STEPS[SHOTS])
                begun = time.process_time()
                result = train(made, shared=shared).result
            row = key | {
                "accuracy": f"{result['last']['accuracy']:.4f}",
                "steps": result["last"]["step"],
                "seconds": f"{time.process_time() - begun:.1f}",
                "trained": result["stages"][0]["trainable_params"],
            }
            transfer.write(file, [row])
            print(*row.values(), sep=", ", flush=True)


def table(rows: list[dict[str, str]]) -> str:
    """A line for each data set and model, in the order of the rank."""
    lines = ["| data | model | rank | " + " | ".join(PLANS) + " | s |", "|---" * (4 + len(PLANS)) + "|"]
    for data in transfer.DATA:
        mine = [r for r in rows if r["data"] == data]
        for ranked in (r for r in mine if r["method"] == "rank"):
            cells, seconds = [f"{100 * float(ranked['accuracy']):.1f}"], [ranked["seconds"]]
            for plan in PLANS:
                runs = [r for r in mine if (r["method"], r["model"]) == (plan, ranked["model"])]
                scores = [100 * float(r["accuracy"]) for r in runs]
                spread = f" ± {np.std(scores, ddof=1):.1f}" if len(scores) > 1 else ""
                cells.append(f"{np.mean(scores):.1f}{spread}" if scores else "")
                seconds.append(f"{np.median([float(r['seconds']) for r in runs]):.1f}" if runs else "")
            lines.append(f"| {data} | {ranked['model']} | {' | '.join(cells)} | {', '.join(seconds)} |")
    return "\n".join(lines)


def main() -> None:
    options = transfer.make_parser(__doc__).parse_args()
    if not options.table:
        measure(options.assets, options.file)
    print(table(transfer.read(options.file)))


if __name__ == "__main__":
    main()
