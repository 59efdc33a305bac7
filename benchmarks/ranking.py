"""`jft rank` against fine-tuning: do three weight files come in the same order, and in what share of the time?

    python benchmarks/ranking.py $JFT_ASSETS ranking.csv             every line that is not there yet
    python benchmarks/ranking.py $JFT_ASSETS ranking.csv --table     what has been measured, as Markdown

20 images a class, drawn by the seed, 128 pixels. A rank is one call for the three; fine-tuning is the plan `full` at
its own rate, or `head`, 80 steps of 8 of the same images, the accuracy of the last state on images that neither saw,
mean ± standard deviation over seeds. Seconds are the processor's, those of a rank for all three and of fine-tuning for
one, the median.
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
PLANS, SEEDS = ("head", "full"), range(5)


def measure(assets: Path, file: Path) -> None:
    """A line for each model of a rank and for each run."""
    done = {tuple(row[f] for f in transfer.FIELDS[:5]) for row in transfer.read(file)}
    for data in transfer.DATA:
        images = transfer.images(assets / "data" / transfer.DATA[data])
        models = [(name, str(assets / "weights" / weights)) for name, weights in transfer.FILES.items()]
        for seed in SEEDS:
            if (data, models[0][0], str(SHOTS), "rank", str(seed)) in done:
                continue
            begun = time.process_time()
            found = rank(images, models, shots=SHOTS, image_size=PIXELS, seed=seed)
            spent = {"steps": 0, "seconds": f"{time.process_time() - begun:.1f}", "trained": 0}
            scores = {row["model"]: {"accuracy": f"{row['linear']['accuracy']:.4f}"} | spent for row in found.rows}
            about = {"data": data, "shots": SHOTS, "method": "rank", "seed": seed}
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
    """A line for each data set and model, the best first by the mean of the ranks."""
    columns = ("rank", *PLANS)
    lines = ["| data | model | " + " | ".join(columns) + " | s |", "|---" * (3 + len(columns)) + "|"]
    for data in transfer.DATA:
        told = []
        for model in transfer.FILES:
            runs = {c: [r for r in rows if (r["data"], r["model"], r["method"]) == (data, model, c)] for c in columns}
            scores = {c: [100 * float(r["accuracy"]) for r in mine] for c, mine in runs.items() if mine}
            spread = {c: f" ± {np.std(found, ddof=1):.1f}" if len(found) > 1 else "" for c, found in scores.items()}
            cells = [f"{np.mean(scores[c]):.1f}{spread[c]}" if c in scores else "" for c in columns]
            seconds = [f"{np.median([float(r['seconds']) for r in m]):.1f}" if m else "" for m in runs.values()]
            told.append(
                (-np.mean(scores.get("rank", 0)), f"| {data} | {model} | {' | '.join(cells)} | {', '.join(seconds)} |")
            )
        lines += [line for _, line in sorted(told)]
    return "\n".join(lines)


def main() -> None:
    options = transfer.make_parser(__doc__).parse_args()
    if not options.table:
        measure(options.assets, options.file)
    print(table(transfer.read(options.file)))


if __name__ == "__main__":
    main()
