"""Fine-tuning of a ViT-B/16 pretrained by MAE on ImageNet, with layer-wise decay of the rate, mixup and CutMix.

Source    He et al. 2022, "Masked autoencoders are scalable vision learners", table 9;
          github.com/facebookresearch/mae, FINETUNE.md.
Expected  published top-1, 4 seeds: 83.57 ± 0.08 %. Not measured here. Its RandAugment is timm's rand-m9-mstd0.5-inc1:
          each operation is applied with probability one half, its magnitude varies with a standard deviation of 0.5.
          Here each operation drawn is applied, at one magnitude, and the operations are torchvision's.
Cost      published: 7 hours on 32 V100; 100 epochs of 1.28 million pictures of 224×224.
Command   jft finetune configs/mae.py --data imagenet/
"""

import jft


def config() -> jft.Config:
    """Base rate 5e-4 for 256 images, decayed by 0.65 from each block to the one below it."""
    batch = 1024
    return jft.Config(
        model="vit_base_patch16_224",
        weights="hf:timm/vit_base_patch16_224.mae",
        model_options={"pool": "avg"},
        plan="flat",
        batch=batch,
        epochs=100,
        optimizer="adamw",
        lr=5e-4 * batch / 256,
        layer_decay=0.65,
        weight_decay=0.05,
        clip=None,
        warmup=5 / 100,
        drop_path=0.1,
        label_smoothing=0.1,
        augment=(
            "rrc",
            "flip",
            "randaugment:m=27:n=2",  # timm's m9: it counts to 10, not to 30
            "erase:p=0.25:fill=noise",
            "mixup:alpha=0.8",
            "cutmix:alpha=1.0",
        ),
    )
