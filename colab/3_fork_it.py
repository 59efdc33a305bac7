# %% [markdown]
# # Fork it: a new objective in one cell
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/ORG/jft/blob/main/colab/3_fork_it.ipynb)
#
# A research idea is a function and a config; no file of jft is edited. Here: R-Drop (Liang et al. 2021), which asks two
# passes with different dropout for the same answer, against plain training on the same data.

# %%
# !pip install -q "git+https://github.com/ORG/jft"
import os

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits

import jft
from jft import losses
from jft.step import truth

TINY = "JFT_TINY" in os.environ  # a test runs this in seconds
images, labels = load_digits(return_X_y=True)
images = (images.reshape(-1, 8, 8) * 255 / 16).astype(np.uint8).repeat(4, 1).repeat(4, 2)
count = 48 if TINY else 400
DATA = {"train": (images[:count], labels[:count]), "val": (images[1000:1200], labels[1000:1200])}

# %% [markdown]
# **The whole idea.** The outer function is given the model and what trains; the inner one is differentiated. It returns
# what is minimised, what is logged, and the BatchNorm statistics after the step.


# %%
def r_drop(model, *, train_parts, update_stats, loss, alpha=1.0, **_):
    def objective(params, batch_stats, batch, key):
        def answer(key):
            given = batch[model.input]
            logits, stats = model.apply(
                params, batch_stats, given, train=train_parts, update_stats=update_stats, key=key
            )
            return logits.astype(jnp.float32), stats

        (a, stats), (b, _) = (answer(k) for k in jax.random.split(key))
        p, q = jax.nn.log_softmax(a), jax.nn.log_softmax(b)
        apart = 0.5 * jnp.sum((jnp.exp(p) - jnp.exp(q)) * (p - q), -1).mean()
        fit = 0.5 * (loss(a, batch) + loss(b, batch)).mean()
        return fit + alpha * apart, ({"loss": fit, "accuracy": losses.correct(a, truth(batch)).mean()}, stats)

    return objective


# %% [markdown]
# **Against plain training**, everything else the same; a table with mean and spread over the seeds ends it.

# %%
common = jft.Config(
    data=DATA, model="tiny_vit", model_options={"depth": 1 if TINY else 4}, weights="none", plan="full",
    lr=1e-3, dropout=0.1, batch=24, augment=(),
    epochs=1 if TINY else 20, seeds=1 if TINY else 3, workdir="runs/r-drop",
)  # fmt: skip
done = jft.finetune({"plain": common, "r-drop": common.replace(objective=r_drop)})
[(row["name"], round(row["accuracy"], 3)) for row in done.rows]
