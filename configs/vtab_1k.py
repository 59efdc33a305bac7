"""VTAB-1k's protocol, light: 800 images to train, 200 to choose, the test set to tell; ViT-B/16, five ways.

Source    Zhai et al. 2019, "A large-scale study of representation learning"; figures from Jia et al. 2022, "Visual
          prompt tuning", table 1 (augreg ImageNet-21k weights), and for LoRA from Zhang et al. 2022, "Neural prompt
          search".
Expected  published test accuracy, mean over the 19 tasks: head 52.9, full 65.6, BitFit 62.1, VPT-deep 69.4, LoRA 72.3
          %, each at the best of a search of rates. This is one task of them. Not measured here.
Cost      100 epochs of 800 pictures of 224×224: 80,000 passes of ViT-B/16 a way.
Command   jft finetune configs/vtab_1k.py
"""

from functools import partial

import numpy as np

import jft
from jft.data import order, sources


def thousand(task: str) -> dict[str, sources.Dataset]:
    """800 and 200 of the training images, the same ones always, and all that test."""
    splits = sources.load(task, val_fraction=0)
    chosen = order.permutation(len(splits.train), 0)[:1000]
    found = {"train": np.sort(chosen[:800]), "val": np.sort(chosen[800:])}
    return {name: splits.train.select(index) for name, index in found.items()} | (
        {"test": splits.test} if splits.test else {}
    )


def config() -> dict[str, jft.Config]:
    """The ways side by side; for another task change its name here, for its own rate give `--lr` or `jft sweep`."""
    common = jft.Config(
        data=partial(thousand, "tfds:caltech101"),
        model="vit_base_patch16_224",
        weights="hf:timm/vit_base_patch16_224.augreg_in21k",
        batch=64,
        epochs=100,
        augment=(),
        preprocess={"squash": True},
    )
    return {
        "head": common.replace(plan="head"),
        "full": common.replace(plan="flat"),
        "BitFit": common.replace(plan="bitfit"),
        "VPT-deep": common.replace(plan="vpt", model_options={"prompts": 10, "deep_prompts": True}),
        "LoRA": common.replace(plan="lora", lora={"rank": 8}),
    }
