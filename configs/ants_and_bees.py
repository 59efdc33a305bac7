"""PyTorch's transfer-learning tutorial: ants against bees, 244 training and 153 validation pictures.

Source    S. Chilamkurthy, "Transfer learning for computer vision tutorial", pytorch.org/tutorials: ResNet-18, best
          validation accuracy 93.5 % with everything tuned, 94.8 % with the head alone; one run each, best of 25 epochs.
Expected  best validation accuracy, mean ± std, with the ResNet-18 of $JFT_ASSETS: head 95.9 ± 0.3 % (5 seeds), gradual
          95.9 ± 0.3 % (5 seeds; what its later stages add and cost: benchmarks/README.md).
Cost      head 25 s, gradual 5 minutes a seed on 2 CPU cores.
Command   jft finetune configs/ants_and_bees.py --data hymenoptera_data --weights resnet18.pth
"""

import jft


def config() -> dict[str, jft.Config]:
    """The tutorial's two ways, feature extraction and fine-tuning, the second in stages."""
    common = jft.Config(model="resnet18", seeds=5)
    return {"head": common, "gradual": common.replace(plan="gradual")}
