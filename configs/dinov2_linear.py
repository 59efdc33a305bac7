"""A linear probe of DINOv2's features, the rate chosen by a sweep.

Source    Oquab et al. 2024, "DINOv2: Learning robust visual features without supervision", table 4; eval/linear.py of
          github.com/facebookresearch/dinov2.
Expected  published ImageNet top-1: ViT-S/14 81.1, B 84.5, L 86.3, g 86.5 %, the best of heads on the class tokens of
          1 or 4 blocks, with or without the mean of the patches; here it is that of the last one. Not measured here.
Cost      10 epochs with augmentation: the backbone runs on every picture of every epoch, forward alone.
Command   jft finetune configs/dinov2_linear.py --data imagenet/
"""

import jft

# For `jft sweep configs/dinov2_linear.py --data imagenet/`: the 13 rates of the published code, for 256 images.
SPACE = {"lr": [1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1]}


def config() -> jft.Config:
    """SGD with momentum 0.9, no decay, cosine to zero without warm-up."""
    return jft.Config(
        model="vit_small_patch14_dinov2",
        plan="head",
        image_size=224,
        preprocess={"crop_pct": 224 / 256},
        optimizer="sgd",
        lr=5e-3,
        weight_decay=0.0,
        clip=None,
        warmup=0.0,
        batch=256,
        epochs=10,
        augment=("rrc", "flip"),
    )
