"""A linear probe, then everything from there, against either alone.

Source    Kumar et al. 2022, "Fine-tuning can distort pretrained features and underperform out-of-distribution",
          tables 1 and 2.
Expected  published, mean over their sets: in distribution full 85.1, probe 82.9, LP-FT 85.7 %; out of it full 59.3,
          probe 66.2, LP-FT 68.9 %. Not measured here on those sets; on ants and bees see benchmarks/README.md.
Cost      20 epochs of the data given, for each of three ways.
Command   jft finetune configs/lp_ft.py --data bees/
"""

import jft

PROBE = jft.Stage("probe", ("head",), lr=1e-2, share=1, augment=())
TUNE = jft.Stage("tune", ("*",), lr=1e-3, share=1, batch_norm="frozen")


def config() -> dict[str, jft.Config]:
    """SGD with momentum 0.9 and cosine decay; BatchNorms keep the statistics of the source in all of them."""
    common = jft.Config(model="resnet50", optimizer="sgd", batch=64, epochs=20, weight_decay=0.0, seeds=5)
    return {
        "probe": common.replace(plan=(PROBE,)),
        "full": common.replace(plan=(TUNE,)),
        "LP-FT": common.replace(plan=(PROBE, TUNE)),
    }
