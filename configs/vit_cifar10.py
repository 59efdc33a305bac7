"""vit_jax's short fine-tuning of ViT-B/16 (ImageNet-21k) on CIFAR-10: 500 steps.

Source    github.com/google-research/vision_transformer, README, "total_steps 500 / warmup_steps 50"; Dosovitskiy et
          al. 2021, "An image is worth 16×16 words", appendix B.1.1.
Expected  published test accuracy, one run: 98.59 % (CIFAR-100: 89.17 %). Not measured here.
Cost      published: 17 minutes on 8 V100; 500 steps of 512 pictures of 384×384.
Command   jft finetune configs/vit_cifar10.py
"""

import jft


def config() -> jft.Config:
    """SGD with momentum at 0.03, cosine decay, gradients clipped to 1."""
    return jft.Config(
        data="tfds:cifar10",
        model="vit_base_patch16_224",
        weights="hf:timm/vit_base_patch16_224.augreg_in21k",
        plan="flat",
        batch=512,
        epochs=500 * 512 / 49_000,
        optimizer="sgd",
        lr=0.03,
        weight_decay=0.0,
        clip=1.0,
        warmup=50 / 500,
        image_size=384,
        augment=("rrc:0.05", "flip"),
        val_fraction=0.02,
    )
