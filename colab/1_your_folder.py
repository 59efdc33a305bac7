# %% [markdown]
# # Your folder of pictures to a model, in five cells
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/ORG/jft/blob/main/colab/1_your_folder.ipynb)
#
# A folder with a folder of pictures for each class is all it takes. Without one, this notebook makes a small one of
# scikit-learn's handwritten digits, so that every cell runs as it stands.

# %%
# !pip install -q "git+https://github.com/ORG/jft"
import os

import jft

TINY = "JFT_TINY" in os.environ  # a test runs this in seconds

# %% [markdown]
# **1. The data.** Put the path of your folder here (`/content/drive/MyDrive/bees`, say).

# %%
DATA = ""

if not DATA:
    from pathlib import Path

    from PIL import Image
    from sklearn.datasets import load_digits

    DATA = "digits"
    pictures, labels = load_digits(return_X_y=True)
    for i in range(60 if TINY else 1000):
        place = Path(DATA) / str(labels[i])
        place.mkdir(parents=True, exist_ok=True)
        pixels = (pictures[i].reshape(8, 8) * 255 / 16).astype("uint8")
        Image.fromarray(pixels).resize((64, 64)).save(place / f"{i}.png")

# %% [markdown]
# **2. Train.** `lp-ft` trains the head first, then everything at a fraction of its rate. What is imported, what trains,
# and how long is left is shown as it goes; stopped and run again, the cell goes on where it was.

# %%
small = dict(model="tiny_resnet", weights="none", epochs=1, batch=8, plan="head") if TINY else {}
run = jft.finetune(**(dict(data=DATA, model="resnet18", plan="lp-ft", epochs=6) | small))

# %% [markdown]
# **3. How good is it?** `report.html` in the run's folder has the pictures it is wrong about, too.

# %%
print(run.workdir / "report.html")
{name: value for name, value in run.evaluate().items() if name != "excluded"}

# %% [markdown]
# **4. Predict.** Files, folders, globs; PIL images and arrays too.

# %%
run.predict(DATA)[:3]

# %% [markdown]
# **5. Take it along.** The folder `model/` is all there is to keep; anywhere else it is opened in two lines. `jft push`
# shares it on the Hugging Face hub.

# %%
model = jft.load(run.workdir)
model.predict([DATA], top_k=2, unknown=0.5, temperature="fitted")[:3]
