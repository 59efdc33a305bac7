"""big_vision's transfer of ViT-B/32 (augreg, ImageNet-21k) to CIFAR-10, CIFAR-100, Pets and Flowers.

Source    github.com/google-research/big_vision, configs/transfer.py; the weights are those that Steiner et al. 2022,
          "How to train your ViT?", recommend.
Expected  published test accuracy, mean of 5 [range]: CIFAR-10 98.55 [98.46, 98.60], CIFAR-100 91.35 [91.09, 91.62],
          Pets 93.78 [93.62, 94.00], Flowers 99.43 [99.42, 99.45] %. Not measured here.
Cost      10,000 steps (Pets and Flowers 500) of 512 pictures of 384×384: about 13 TFLOP a step's 512 forward passes.
Command   jft finetune configs/big_vision_transfer.py
"""

import jft

# Its images for training and steps, its share held out, and the rate and window its authors chose for it.
SETS = {
    "cifar10": (49_000, 10_000, 0.02, 0.003, "crop"),
    "cifar100": (49_000, 10_000, 0.02, 0.01, "crop"),
    "oxford_iiit_pet": (3_312, 500, 0.1, 0.003, "rrc:0.05"),
    "oxford_flowers102": (918, 500, 0.1, 0.003, "rrc:0.05"),
}
BATCH = 512


def config() -> dict[str, jft.Config]:
    """The four sets side by side; the accuracy is the test split's."""
    return {
        name: jft.Config(
            data=f"tfds:{name}",
            model="vit_base_patch32_224",
            weights="hf:timm/vit_base_patch32_224.augreg_in21k",
            plan="flat",
            batch=BATCH,
            epochs=steps * BATCH / examples,
            eval_every=0.1 * steps * BATCH / examples,
            optimizer="sgd",
            lr=rate,
            weight_decay=0.0,
            clip=1.0,
            warmup=(500 if steps > 500 else 100) / steps,
            image_size=384,
            preprocess={"crop_pct": 384 / 448},
            augment=(window, "flip"),
            val_fraction=held_out,
            seeds=5,
        )
        for name, (examples, steps, held_out, rate, window) in SETS.items()
    }
