"""One training step of everything, float32, batch 32: jft's compiled step against torch's, taking turns in one run.

    python benchmarks/step.py --torch-python TORCH/bin/python                ViT-Ti and ResNet-18: 4 minutes
    python benchmarks/step.py --torch-python … --models vit_tiny_patch16_224 vit_small_patch16_224 resnet18 resnet50

Both processes hold the model with Adam's state; one takes `--steps` (3) steps while the other waits for its turn,
`--repeat` times (5) after one turn that is not counted. A turn's first step is not counted either (`first` in the
JSON): steps follow each other in training, and the first after a wait finds its memory given away, which on a virtual
machine can take it half as long again. jft's step takes uint8 pictures and normalises them, torch's normalised ones.
`ratio` is that of the medians, jft's to torch's: below 1 jft is faster. `cpu` is processor time; on a machine that is
busy with other work that of torch counts its threads' spinning too, which `--passive` leaves out.
"""

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any

import harness


def jft_worker(name: str, batch: int, size: int | None) -> None:
    """Answers requests for steps of jft's."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jft import build, optim, shard
    from jft.data.prepare import make_prepare
    from jft.models import make_model
    from jft.preprocess import Preprocess
    from jft.step import State, make_train_step, supervised

    model = make_model(name, num_classes=1000, image_size=size)
    rng = np.random.default_rng(0)
    shapes, stats = model.shapes()
    params = {n: jnp.asarray(0.02 * rng.standard_normal(s.shape), jnp.float32) for n, s in shapes.items()}
    names, parts = sorted(params), list(model.parts)
    optimizer = optim.make_optimizer("adam", lambda step: 1e-3, dict.fromkeys(names, 1.0))
    objective = supervised(model, train_parts=parts, update_stats=parts, trainable=names)
    height, width, _ = model.input_shape
    prepare = make_prepare(Preprocess(size=(height, width)), (), train=True)
    # On a CPU in the pieces that a run takes.
    tokens = build.takes_tokens(model, None, params) if jax.default_backend() == "cpu" else 0
    pieces = build.most_pieces(batch, tokens)
    made = make_train_step(objective, optimizer, trainable=names, prepare=prepare, accumulate=pieces)
    step = shard.jit(made, donate_argnums=0)
    state = State(
        step=jnp.int32(0),
        params=params,
        batch_stats={n: jnp.ones(s.shape, s.dtype) for n, s in stats.items()},
        opt_state=jax.jit(optimizer.init)(params),
        key=jax.random.key_data(jax.random.key(0)),
    )
    data = {
        "image": jnp.asarray(rng.integers(0, 256, (batch, height, width, 3)), jnp.uint8),
        "label": jnp.asarray(rng.integers(0, 1000, batch), jnp.int32),
        "index": jnp.arange(batch, dtype=jnp.int32),
    }

    def once() -> None:
        nonlocal state
        state, metrics = step(state, data)
        jax.block_until_ready((state, metrics))

    harness.serve(lambda steps: turn(once, steps))


def turn(once: Callable[[], None], steps: int) -> dict[str, Any]:
    """Steps, each with what it took, and the memory at most."""
    return {"steps": [harness.timed(once) for _ in range(steps)], "peak": harness.peak_memory()}


def torch_worker(name: str, batch: int, size: int | None) -> None:
    """Answers requests for steps of torch's: timm's ViTs, torchvision's ResNets."""
    torch = harness.import_torch(harness.cores())
    if name.startswith("vit"):
        import timm

        model = timm.create_model(name, pretrained=False, num_classes=1000, **({"img_size": size} if size else {}))
    else:
        import torchvision

        model = torchvision.models.get_model(name, num_classes=1000)
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    side = size or 224
    x, y = torch.randn(batch, 3, side, side), torch.randint(0, 1000, (batch,))

    def once() -> None:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    harness.serve(lambda steps: turn(once, steps))


def main() -> None:
    """Let the two take turns and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch-python", metavar="PYTHON", help="an interpreter with torch, torchvision and timm")
    parser.add_argument("--models", nargs="+", default=["vit_tiny_patch16_224", "resnet18"])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, metavar="N", help="side of the pictures (default: 224)")
    parser.add_argument("--repeat", type=int, default=5, metavar="N", help="turns of each")
    parser.add_argument("--steps", type=int, default=3, metavar="N", help="of a turn, the first not counted")
    parser.add_argument("--passive", action="store_true", help="torch's threads sleep while they wait")
    parser.add_argument("--json", metavar="FILE", help="write all that was measured")
    parser.add_argument("--worker", choices=("jft", "torch"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        {"jft": jft_worker, "torch": torch_worker}[given.worker](given.models[0], given.batch, given.size)
        return

    if given.steps < 2:
        parser.error("--steps: of a turn the first is not counted; 2 at least")
    if given.passive:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    pythons = {"jft": sys.executable} | ({"torch": given.torch_python} if given.torch_python else {})
    rows, measured = [], {}
    for name in given.models:
        args = ["--models", name, "--batch", str(given.batch), *(["--size", str(given.size)] if given.size else [])]
        workers = {who: harness.Worker(p, __file__, "--worker", who, *args) for who, p in pythons.items()}
        told: dict[str, list[dict[str, Any]]] = {who: [] for who in workers}
        for number in range(given.repeat + 1):
            for who, worker in workers.items():
                first, *rest = (found := worker.ask(steps=given.steps))["steps"]
                if number:  # the first turn compiles and allocates
                    told[who].append({"first": first, "steps": rest, "peak": found["peak"]})
        for worker in workers.values():
            worker.close()
        measured[name] = told
        mid = {
            (w, k): harness.median(s[k] for f in t for s in f["steps"])
            for w, t in told.items()
            for k in ("wall", "cpu")
        }
        mid |= {(w, "peak"): max(f["peak"] for f in t) for w, t in told.items()}
        row = {"model": name}
        for key, unit in (("wall", "s"), ("cpu", "cpu s")):
            row |= {f"{who} {unit}": mid[who, key] for who in workers}
            if "torch" in workers:
                row["ratio" if key == "wall" else "by cpu"] = mid["jft", key] / mid["torch", key]
        row |= {f"{who} MB": mid[who, "peak"] for who in workers}
        rows.append(row)
        print(harness.table([row]), file=sys.stderr, flush=True)
    harness.report(rows, given.json, given.torch_python, measured=measured, settings=vars(given))


if __name__ == "__main__":
    main()
