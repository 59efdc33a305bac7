"""A run's folder as `jft finetune` leaves it, made of random numbers: for the report's tests, and to look at.

>>> python tests/synthetic_run.py FOLDER CLASSES IMAGES [DATA]      # then open FOLDER/report.html
"""

import json
import sys
from pathlib import Path

import numpy as np

from jft import bundle
from jft.models import make_model
from jft.preprocess import Preprocess
from jft.report.log import MetricsLog

STAGES = [
    {"name": "head", "train": ["head"], "epochs": 4.0, "lr": 1e-3},
    {"name": "top", "train": ["head", ["block2", 0.3], ["norm", 0.3]], "epochs": 3.0, "lr": 1e-4},
    {"name": "all", "train": ["*"], "epochs": 3.0, "lr": 3e-5, "layer_decay": 0.7},
]


def make_run(folder: Path, classes: list[str], n: int, data: Path | str | None = None, several: bool = False) -> Path:
    """Write every file of a finished run, its report excepted."""
    rng = np.random.default_rng(0)
    k = len(classes)
    folder.mkdir(parents=True)
    sure = rng.gamma(3.0, 1.5, (n, 1))
    if several:
        labels = (rng.random((n, k)) < 0.3).astype(np.float32)
        probabilities = 1 / (1 + np.exp(-rng.normal(size=(n, k)) - sure * (labels - 0.5)))
        true = ["|".join(np.array(classes)[row > 0]) for row in labels]
    else:
        labels = np.sort(rng.integers(0, k, n)).astype(np.int32)
        meant = np.where(rng.random(n) < 0.9, labels, (labels + rng.integers(1, 4, n)) % k)
        logits = rng.normal(size=(n, k)) + sure * np.eye(k)[meant] + 0.3 * sure * np.eye(k)[labels]
        probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        true = [classes[i] for i in labels]
    probabilities = probabilities.astype(np.float32)
    pictures = sorted(p.relative_to(data).as_posix() for p in data.rglob("*.jp*g")) if isinstance(data, Path) else []
    names = [pictures[i % len(pictures)] if pictures else f"val/{true[i]}/{i:05}.jpg" for i in range(n)]
    np.savez_compressed(folder / "predictions.npz", probabilities=probabilities, labels=labels, names=np.array(names))
    best = probabilities.argmax(1)
    rows = [
        {"path": names[i], "true_label": true[i], "class_index": int(c), "label": classes[c],
         "probability": float(probabilities[i, c]),
         **({f"p:{name}": float(v) for name, v in zip(classes, probabilities[i], strict=True)} if k < 50 else {}),
         "error": ""}
        for i, c in enumerate(best)
    ]  # fmt: skip
    bundle.write_predictions(folder / "predictions.csv", rows)

    model = make_model("tiny_vit", num_classes=k)
    shapes = model.shapes()
    params, stats = ({name: np.zeros(s.shape, s.dtype) for name, s in half.items()} for half in shapes)
    options = {"num_classes": k}
    bundle.save(folder / "model", model_name="tiny_vit", model_options=options, params=params, batch_stats=stats,
                classes=classes, preprocess=Preprocess())  # fmt: skip

    steps = [80, 60, 60]
    with MetricsLog(folder / "metrics.jsonl") as log:
        step = 0
        for stage, count in zip(STAGES, steps, strict=True):
            for i in range(1, count + 1):
                step += 1
                falling = np.exp(-step / 60)
                rate = stage["lr"] * (1 - i / count)
                log.write({"step": step, "stage": stage["name"], "lr": rate,
                           "loss": float(0.1 + falling + 0.1 * rng.random()),
                           "accuracy": float(1 - 0.5 * falling - 0.1 * rng.random())})  # fmt: skip
                if i % 20 == 0:
                    also = {"val_average_precision": float(0.97 - 0.4 * falling)} if several else {}
                    log.write({"step": step, "stage": stage["name"], "val_loss": float(0.2 + falling),
                               "val_accuracy": float(0.93 - 0.4 * falling), **also})  # fmt: skip
    settings = {"data": str(data or "data/flowers"), "model": "tiny_vit", "weights": "w.safetensors", "epochs": 10.0,
                "plan": "lp-ft", "augment": ["crop", "flip"], "preprocess": {"crop_pct": 1.0}}  # fmt: skip
    config = {"config": settings, "stages": STAGES, "classes": classes, "weights": "/data/w.safetensors",
              "weights_sha256": "0123456789abcdef" * 4, "versions": {"python": "3.11.2", "jft": "0.1.0"}}  # fmt: skip
    stages = [
        {"name": s["name"], "steps": c, "epochs": s["epochs"], "lr": s["lr"], "trainable_params": 1000 * (i + 1),
         "val_accuracy": 0.9 + 0.01 * i, "seconds": 12.5 * (i + 1),
         **({"val_average_precision": 0.8 + 0.01 * i} if several else {})}
        for i, (s, c) in enumerate(zip(STAGES, steps, strict=True))
    ]  # fmt: skip
    result = {
        "model": "tiny_vit", "weights": "/data/w.safetensors", "weights_sha256": "0123456789abcdef" * 4,
        "data": settings["data"], "classes": classes, "seed": 0, "plan": "lp-ft",
        "val": {"accuracy": float((best == labels).mean()), "count": n, "best_step": 180} if not several
               else {"accuracy": 0.5, "average_precision": 0.75, "count": n, "best_step": 180},
        "last": {"accuracy": 0.9, "step": 200}, "stages": stages,
        "train": {"count": 4 * n, "per_class": [4 * n // k] * k},
        "excluded": [{"path": "train/x/broken.jpg", "reason": "not an image in a format that Pillow reads"}],
        "seconds": {"total": 95.0, "import": 1.0, "compile": 9.5, "data": 6.0, "features": 4.5, "train": 60.0,
                    "eval": 8.0},
        "memory": {"import": {"process": 4 * 10**8}, "train": {"process": 12 * 10**8, "device_peak": 3 * 10**9}},
        "device": "1 × cpu",
    }  # fmt: skip
    for name, value in (("config.json", config), ("result.json", result)):
        (folder / name).write_text(json.dumps(value))
    return folder


if __name__ == "__main__":
    from jft.report.html import make_report

    where, k, count, *more = sys.argv[1:]
    words = ["ants", "bees"] if k == "2" else [f"species {i:03}" for i in range(int(k))]
    print(make_report(make_run(Path(where), words, int(count), Path(more[0]) if more else None)))
