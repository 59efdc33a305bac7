"""A head on cached features: epochs a second after the first, and a step with a frozen backbone against the pass alone.

    python benchmarks/features.py $JFT_ASSETS                       ViT-Ti and ResNet-18, ants and bees: 2 minutes
    python benchmarks/features.py $JFT_ASSETS --models vit_tiny_patch16_224 --epochs 200 --forward

`jft finetune --plan head --augment none --epochs 400`, validated every 50 epochs and, for the second figure, after
every one; the features come from the cache after the first run. Epochs a second are counted from the first validation
to the last, whatever lies between. That training from features equals running the backbone at every step is a test
(tests/test_features.py). `--forward` lets a step through the frozen backbone and a plain forward pass take turns, both
on the same 32 pictures: the ratio of the medians says what freezing leaves to pay for.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import harness

WEIGHTS = {"vit_tiny_patch16_224": "vit_tiny_patch16_224.safetensors", "resnet18": "resnet18_imagenet_ktb.pth"}


def rate(assets: Path, name: str, epochs: int, every: int, workdir: str) -> dict[str, Any]:
    """A run's epochs a second between its first and its last validation."""
    import jft
    from jft.train import train

    config = jft.Config(
        data=str(assets / "data/hymenoptera_data"),
        model=name,
        weights=str(assets / "weights" / WEIGHTS[name]) if name in WEIGHTS else "none",
        plan="head",
        augment=(),
        epochs=epochs,
        eval_every=every,
        workdir=workdir,
        display="quiet",
    )
    seen: list[tuple[int, float, float]] = []
    result = train(config, watch=lambda row: seen.append((row["step"], time.perf_counter(), time.process_time())))
    (first, begun, cpu), (last, ended, cpu_end) = seen[0], seen[-1]
    done = (last - first) * 32 / result.result["train"]["count"]
    return {
        "epochs / s": done / (ended - begun),
        "epochs / cpu s": done / (cpu_end - cpu),
        "accuracy": result.result["val"]["accuracy"],
        "features s": result.result["seconds"]["features"],
    }


def forward(name: str, repeat: int, batch: int = 32) -> dict[str, float]:
    """A training step of the head through the frozen backbone, and the forward pass alone: medians."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jft import optim, shard
    from jft.models import make_model
    from jft.step import State, make_eval_step, make_train_step, supervised

    model = make_model(name, num_classes=2)
    rng = np.random.default_rng(0)
    shapes, stats = model.shapes()
    params = {n: jnp.asarray(0.02 * rng.standard_normal(s.shape), jnp.float32) for n, s in shapes.items()}
    batch_stats = {n: jnp.ones(s.shape, s.dtype) for n, s in stats.items()}
    names = [n for n in params if n.startswith("head/")]
    optimizer = optim.make_optimizer("adam", lambda step: 1e-3, dict.fromkeys(names, 1.0))
    objective = supervised(model, train_parts=["head"], update_stats=[], trainable=names)
    step = shard.jit(make_train_step(objective, optimizer, trainable=names, prepare=lambda batch, key: dict(batch)))
    evaluate = shard.jit(make_eval_step(model))
    data = {
        "image": jnp.asarray(rng.standard_normal((batch, *model.input_shape)), jnp.float32),
        "label": jnp.asarray(rng.integers(0, 2, batch), jnp.int32),
        "index": jnp.arange(batch, dtype=jnp.int32),
    }
    opt_state, key = optimizer.init({n: params[n] for n in names}), jax.random.key_data(jax.random.key(0))
    state = State(step=jnp.int32(0), params=params, batch_stats=batch_stats, opt_state=opt_state, key=key)
    works = {
        "step": lambda: jax.block_until_ready(step(state, data)),
        "forward": lambda: jax.block_until_ready(evaluate(params, batch_stats, data)),
    }
    for work in works.values():
        work()
    told: dict[str, list[dict[str, float]]] = {n: [] for n in works}
    for _ in range(repeat):
        for n, work in works.items():
            told[n].append(harness.timed(work))
    mid = {n: {k: harness.median(t[k] for t in some) for k in ("wall", "cpu")} for n, some in told.items()}
    ratios = {f"step / forward{end}": mid["step"][k] / mid["forward"][k] for k, end in (("wall", ""), ("cpu", ", cpu"))}
    return {"forward images / s": batch / mid["forward"]["wall"]} | ratios


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("assets", type=Path, help="the folder with weights and data/hymenoptera_data")
    parser.add_argument("--models", nargs="+", default=list(WEIGHTS), help="others are run with fresh weights")
    parser.add_argument("--epochs", type=int, default=400)
    parser.add_argument("--repeat", type=int, default=1, metavar="N", help="runs of each kind (default: 1)")
    parser.add_argument("--forward", action="store_true", help="also a frozen step against the forward pass")
    parser.add_argument("--json", metavar="FILE", help="write all that was measured")
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["JFT_CACHE"] = f"{folder}/cache"
        for name in given.models:
            for every, epochs in ((given.epochs // 8, given.epochs), (1, max(given.epochs // 4, 2))):
                some = [
                    rate(given.assets, name, epochs, every, f"{folder}/{name}-{every}-{i}") for i in range(given.repeat)
                ]
                mid = {k: harness.median(s[k] for s in some) for k in some[0]}
                rows.append({"model": name, "validated every": every, **mid})
                print(rows[-1], file=sys.stderr, flush=True)
        alone = [{"model": n, **forward(n, max(given.repeat, 5))} for n in given.models] if given.forward else []
    harness.report(rows, given.json, forward=alone)
    print(harness.table(alone))


if __name__ == "__main__":
    main()
