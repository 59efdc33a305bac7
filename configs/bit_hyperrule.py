"""BiT-M ResNet-50x1 on CIFAR by BiT-HyperRule, whole and with 5 images a class.

Source    Kolesnikov et al. 2020, "Big Transfer (BiT)", section 3.3; github.com/google-research/big_transfer, README.
Expected  published test accuracy, at least 5 runs (jax): CIFAR-10 97.3, CIFAR-100 86.4; CIFAR-10 with 5 a class
          median 82.4 [76.7, 85.4] %; there at batch 128 and rate 0.001. Not measured here.
Cost      10,000 steps (few images: 500) of 512 pictures of 128×128.
Command   jft finetune configs/bit_hyperrule.py
"""

import jft


def config() -> dict[str, jft.Config]:
    """Rate, steps, resolution and mixup are the rule's, from the number of images and their size."""
    common = jft.Config(model="resnetv2_50x1_bit", hyper="bit", batch=512, val_fraction=0.02, seeds=5)
    return {
        "CIFAR-10": common.replace(data="tfds:cifar10"),
        "CIFAR-100": common.replace(data="tfds:cifar100"),
        "CIFAR-10, 5 a class": common.replace(data="tfds:cifar10", shots=5),
    }
