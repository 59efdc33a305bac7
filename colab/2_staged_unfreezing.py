# %% [markdown]
# # Staged unfreezing, understood
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/ORG/jft/blob/main/colab/2_staged_unfreezing.ipynb)
#
# What happens to a pretrained network when all of it is trained at once, and when the head goes first? A small network
# learns the handwritten digits 0-4; it is then fine-tuned on a few examples of 5-9 in three ways. Minutes on a CPU.

# %%
# !pip install -q "git+https://github.com/ORG/jft" matplotlib
import os

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits

import jft
from jft.report.log import read
from jft.weights import export

TINY = "JFT_TINY" in os.environ  # a test runs this in seconds
pictures, labels = load_digits(return_X_y=True)
pictures = (pictures.reshape(-1, 8, 8) * 255 / 16).astype(np.uint8).repeat(4, 1).repeat(4, 2)


def task(low, high, count):
    """Training and validation pictures of the digits from `low` up to and without `high`."""
    chosen = np.flatnonzero((labels >= low) & (labels < high))
    x, y = pictures[chosen], labels[chosen] - low
    return {"train": (x[:count], y[:count]), "val": (x[count : count + 200], y[count : count + 200])}


# %% [markdown]
# **The source network**, trained on 0-4 and written as a file of weights like any other.

# %%
common = dict(
    model="tiny_resnet",
    model_options={"depths": (1, 1) if TINY else (1, 1, 1), "bottleneck": False, "width": 16},
    augment=(),
    preprocess={"crop_pct": 1.0},
    batch=24,
    display="quiet",
)
source = jft.finetune(
    data=task(0, 5, 96 if TINY else 600),
    weights="none",
    plan="full",
    lr=3e-3,
    epochs=1 if TINY else 12,
    workdir="runs/source",
    **common,
)
model = jft.load(source.workdir)
export("source.safetensors", model.model, model.params, model.batch_stats, format="timm")
source.result["val"]["accuracy"]

# %% [markdown]
# **Three plans** for 5-9, on few examples. A plan is a tuple of stages, a stage names what trains. What is not named is
# frozen: no gradient, no optimizer state, BatchNorm statistics that stand still.

# %%
plans = {
    "head": (jft.Stage("head", ("head",), lr=1e-2),),
    "full": (jft.Stage("all", ("*",), lr=1e-2),),
    "staged": (jft.Stage("head", ("head",), lr=1e-2), jft.Stage("all", ("*",), lr=3e-3)),
}
if TINY:
    plans = {"staged": plans["staged"]}
few = task(5, 10, 48)
runs = {
    name: jft.finetune(
        data=few, weights="source.safetensors", plan=plan, epochs=2 if TINY else 40, workdir=f"runs/{name}", **common
    )
    for name, plan in plans.items()
}
{name: round(run.result["val"]["accuracy"], 3) for name, run in runs.items()}

# %% [markdown]
# **Validation along the way.** The staged run's second stage begins from a head that already fits.

# %%
rows = {
    name: [row for row in read(run.workdir / "metrics.jsonl") if "val_accuracy" in row] for name, run in runs.items()
}
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.5))
for name, of in rows.items():
    left.plot([row["step"] for row in of], [row["val_accuracy"] for row in of], label=name)
left.set(xlabel="step", ylabel="validation accuracy")
left.legend()

# %% [markdown]
# **How far each part went.** ‖w − w_s‖ of each part at the end: trained at once at a high rate, the early parts travel
# far from what they knew; frozen they do not move at all.

# %%
for name, of in rows.items():
    went = of[-1].get("distance", {})
    parts = [part for part in model.model.parts if part != "head"]
    right.plot(parts, [went.get(part, 0.0) for part in parts], marker="o", label=name)
right.tick_params(axis="x", rotation=45)
right.set(ylabel="distance from the source")
right.legend()
figure.tight_layout()
figure.savefig("plans.png")
