"""How time and memory grow with images, resolution and depth, and whether a long run leaks.

    python benchmarks/growth.py                                      100 to 10,000 images: 3 minutes
    python benchmarks/growth.py --images 100 1000 10000 100000 --only images        by hand
    python benchmarks/growth.py --only leak --epochs 200

`images`: `jft finetune --plan head` (or another plan) on synthetic JPEGs of 64 × 48 by a tiny ResNet, each size in a
process of its own with an empty cache. `resolution` and `depth`: a training step of everything, batch 8, of a small
ResNet and a small ViT: compilation, seconds, and the compiler's count of temporary memory. An `exponent` is the slope
from the line before, both on logarithmic scales: 1 is linear growth, of resolution in pixels. `leak`: resident memory
of a run of so many epochs, of a head from features and of everything, after a tenth of it and at the end.
"""

import argparse
import json
import math
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import harness


def write_images(folder: Path, n: int, size: tuple[int, int] = (64, 48)) -> None:
    """`n` noisy JPEGs of two classes, a tenth of them for validation."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for i in range(n):
        split = "val" if i % 10 == 9 else "train"
        file = folder / split / ("dark", "light")[i // 2 % 2] / f"{i:06}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 128, (size[1] // 8, size[0] // 8, 3), np.uint8) + np.uint8(128 * (i // 2 % 2))
        Image.fromarray(pixels).resize(size).save(file, quality=85)


def images_job(folder: str, plan: str, workdir: str) -> dict[str, Any]:
    """A run on a folder of images; what it took."""
    import jft

    cpu = time.process_time()
    done = jft.finetune(
        data=folder, model="tiny_resnet", weights="none", plan=plan, epochs=3, augment=(), workdir=workdir,
        display="quiet",
    )  # fmt: skip
    seconds = done.result["seconds"]
    seconds["cpu"] = time.process_time() - cpu
    return {**seconds, "peak": harness.peak_memory()}


def leak_job(folder: str, plan: str, epochs: int, workdir: str) -> dict[str, Any]:
    """Resident memory, in MB, after every validation of a run."""
    import jft
    from jft.train import train

    seen: list[float] = []
    config = jft.Config(
        data=folder, model="tiny_resnet", weights="none", plan=plan, epochs=epochs, augment=(), workdir=workdir,
        display="quiet",
    )  # fmt: skip
    train(config, watch=lambda row: seen.append(harness.memory()))
    return {"memory": seen}


def step_job(kind: str, size: int, repeat: int) -> dict[str, float]:
    """A training step of everything: seconds to compile, seconds, and MB of temporary memory."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jft import optim, shard
    from jft.models import make_model
    from jft.models.vit import make_vit
    from jft.step import State, make_train_step, supervised

    if kind == "depth":
        model = make_vit("vit", dim=64, depth=size, heads=2, patch=8, num_classes=10, image_size=64)
    else:
        model = make_model("tiny_resnet", image_size=size)
    rng = np.random.default_rng(0)
    shapes, stats = model.shapes()
    params = {n: jnp.asarray(0.02 * rng.standard_normal(s.shape), jnp.float32) for n, s in shapes.items()}
    names, parts, batch = sorted(params), list(model.parts), 8
    optimizer = optim.make_optimizer("adam", lambda step: 1e-3, dict.fromkeys(names, 1.0))
    objective = supervised(model, train_parts=parts, update_stats=parts, trainable=names)
    step = shard.jit(make_train_step(objective, optimizer, trainable=names, prepare=lambda batch, key: dict(batch)))
    state = State(
        step=jnp.int32(0),
        params=params,
        batch_stats={n: jnp.ones(s.shape, s.dtype) for n, s in stats.items()},
        opt_state=jax.jit(optimizer.init)(params),
        key=jax.random.key_data(jax.random.key(0)),
    )
    data = {
        "image": jnp.asarray(rng.standard_normal((batch, *model.input_shape)), jnp.float32),
        "label": jnp.asarray(rng.integers(0, 10, batch), jnp.int32),
        "index": jnp.arange(batch, dtype=jnp.int32),
    }
    begun = time.process_time()
    compiled = step.lower(state, data).compile()
    compiling = time.process_time() - begun
    some = [harness.timed(lambda: jax.block_until_ready(compiled(state, data))) for _ in range(repeat + 1)][1:]
    temporary = compiled.memory_analysis().temp_size_in_bytes / 1e6
    return {"compile cpu s": compiling, "cpu s": harness.median(s["cpu"] for s in some), "temporary MB": temporary}


def exponents(rows: list[dict[str, Any]], x: str, y: str, power: int = 1) -> None:
    """Adds to each row the slope from the one before, on logarithmic scales; `power` of `x` is what it grows with."""
    rows[0][f"exponent of {y}"] = ""
    for before, row in zip(rows, rows[1:], strict=False):
        slope = math.log(row[y] / before[y]) / math.log(row[x] / before[x]) / power
        row[f"exponent of {y}"] = f"{slope:.2f}"


def child(*args: Any, **environment: str) -> dict[str, Any]:
    """A job in a process of its own; the JSON that it prints last."""
    return harness.run([sys.executable, __file__, "--job", json.dumps(args)], **environment).last()


JOBS = {"images": images_job, "leak": leak_job, "step": step_job}


def main() -> None:
    """Run the jobs and print a table for each question."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[100, 1000, 10_000], metavar="N")
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 64, 128, 256], metavar="N")
    parser.add_argument("--depths", type=int, nargs="+", default=[3, 6, 12, 24], metavar="N")
    parser.add_argument("--epochs", type=int, default=200, metavar="N", help="of the runs that could leak")
    parser.add_argument("--plan", default="head", help="of the runs on so many images (default: head)")
    parser.add_argument("--repeat", type=int, default=5, metavar="N", help="steps that are timed (default: 5)")
    parser.add_argument("--only", nargs="+", choices=("images", "resolution", "depth", "leak"))
    parser.add_argument("--json", metavar="FILE", help="write all that was measured")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.job:
        name, *args = json.loads(given.job)
        print(json.dumps(JOBS[name](*args)))
        return

    wanted = given.only or ("images", "resolution", "depth", "leak")
    found: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        if "images" in wanted:
            rows = found["images"] = []
            for n in given.images:
                write_images(Path(folder) / str(n), n)
                told = child("images", f"{folder}/{n}", given.plan, f"{folder}/run{n}", JFT_CACHE=f"{folder}/cache{n}")
                rows.append({"images": n, "cpu s": told["cpu"], "seconds": told["total"], "peak MB": told["peak"]})
                rows[-1] |= {k: told[k] for k in ("data", "features", "train", "eval")}
            exponents(rows, "images", "cpu s")
            exponents(rows, "images", "peak MB")
            _show("images", rows)
        for kind, sizes, power in (("resolution", given.sizes, 2), ("depth", given.depths, 1)):
            if kind in wanted:
                rows = found[kind] = [{kind: n, **child("step", kind, n, given.repeat)} for n in sizes]
                for y in ("cpu s", "temporary MB", "compile cpu s"):
                    exponents(rows, kind, y, power)
                _show(kind, rows)
        if "leak" in wanted:
            write_images(Path(folder) / "few", 160)
            rows = found["leak"] = []
            for plan in ("head", "full"):
                environment = {"JFT_CACHE": f"{folder}/cache"}
                seen = child("leak", f"{folder}/few", plan, given.epochs, f"{folder}/{plan}", **environment)["memory"]
                early, late = seen[max(len(seen) // 10 - 1, 0)], seen[-1]
                row = {"plan": plan, "epochs": len(seen), "MB after a tenth": early, "MB at the end": late}
                rows.append(row | {"growth": f"{late / early - 1:+.2%}"})
            _show("leak", rows)
    harness.report([], given.json, **found)


def _show(title: str, rows: list[dict[str, Any]]) -> None:
    print(f"{title}\n\n{harness.table(rows)}\n", flush=True)


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main()
