# %% [markdown]
# # On a TPU
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/ORG/jft/blob/main/colab/4_tpu.ipynb)
#
# *Runtime → Change runtime type → TPU.* The same call runs on one core, eight, or none: a batch is cut over the devices
# there are, and gives the same result within rounding.

# %%
# !pip install -q "jax[tpu]" "git+https://github.com/ORG/jft"
import os

import jax
import numpy as np
from sklearn.datasets import load_digits

import jft

TINY = "JFT_TINY" in os.environ  # a test runs this in seconds
jax.devices()

# %% [markdown]
# **Data and settings.** A TPU multiplies in bfloat16; parameters and the optimizer stay float32. The batch is a
# multiple of the number of devices. `sharding="fsdp"` cuts the parameters over them as well, for models that do not
# fit one.

# %%
images, labels = load_digits(return_X_y=True)
images = (images.reshape(-1, 8, 8) * 255 / 16).astype(np.uint8)
count = 48 if TINY else 1000
batch = 8 * jax.device_count() if not TINY else max(8, jax.device_count())
settings = dict(
    data={"train": (images[:count], labels[:count]), "val": (images[1000:1200], labels[1000:1200])},
    model="vit_small_patch16_224", plan="lp-ft", epochs=4, batch=batch, dtype="bfloat16", workdir="runs/tpu",
)  # fmt: skip
if TINY:
    settings |= dict(model="tiny_vit", weights="none", plan="head", epochs=1, dtype="float32")
run = jft.finetune(**settings)

# %% [markdown]
# **Where the time went**, in seconds. The first steps compile; the compiled programs are kept in `~/.cache/jft`.

# %%
print(run.result["device"])
run.result["seconds"]
