"""Memory and communication of a training step against docs/scaling.md's arithmetic, from compiled code alone.

Nothing is computed: the step is compiled for so many virtual CPU devices, and the compiler's own count of bytes on
each device, and the collectives in its program, are set beside the formulas.

    python benchmarks/scaling.py --model vit_base_patch16_224 --devices 1 8 64 --sharding fsdp
"""

import argparse
import json
import math
import os
import re
import subprocess
import sys
from functools import partial

BYTES = {"f32": 4, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "u8": 1, "pred": 1}


def arithmetic(model, batch: int, devices: int, tensor: int, sharding: str, remat: str, dtype_bytes: int) -> dict:
    """Bytes on each device: state and gradients (16 a parameter for AdamW), activations kept for the backward pass."""
    import numpy as np

    params = model.shapes()[0]
    p = sum(int(np.prod(v.shape)) for v in params.values())
    cut = ("attn/qkv/", "attn/proj/kernel", "mlp/fc1/", "mlp/fc2/kernel")
    shared = sum(int(np.prod(v.shape)) for n, v in params.items() if any(c in n for c in cut))
    mine = shared / tensor + (p - shared)
    data = devices // tensor
    held = mine / data if sharding == "fsdp" else mine
    depth = sum(part.startswith("block") for part in model.parts)
    d = params["block0/attn/proj/kernel"].shape[0]
    hidden = params["block0/mlp/fc1/kernel"].shape[1]
    tokens = params["embed/pos_embed"].shape[1]
    heads = model.parts["block0"].heads
    images = batch / data
    # A block keeps of each token its input, two normalised inputs, q, k and v, the heads' outputs, the stream between,
    # and the hidden units before and after the activation; and a weight for each pair of tokens of each head, twice.
    block = images * tokens * (5 * d + (3 * d + 2 * hidden) / tensor) * dtype_bytes
    block += images * heads / tensor * tokens**2 * (4 + dtype_bytes)
    kept = depth * images * tokens * d * dtype_bytes + block if remat == "full" else depth * block
    gradient = 4 * p * (data - 1) / data if data > 1 else 0.0
    stream = images * tokens * d * dtype_bytes
    return {
        "params": p,
        "state": 12 * held,
        "gradients": 4 * held,
        "activations": kept,
        "data_communication": 2 * gradient / tensor,
        "tensor_communication": depth * 4 * 2 * stream * (tensor - 1) / tensor,
    }


def compiled(model, batch: int, tensor: int, sharding: str) -> dict:
    """The same from the step as XLA compiles it for these devices."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jft import optim, shard
    from jft.step import State, make_train_step, repeat, supervised

    params, stats = model.shapes()
    ones = dict.fromkeys(params, 1.0)
    optimizer = optim.make_optimizer("adamw", optim.make_schedule("constant", 1e-3, 10, 0.0), ones)
    objective = supervised(model, train_parts=[*model.parts], update_stats=[], trainable=frozenset(params))
    mesh = shard.make_mesh(model=tensor)
    step = make_train_step(
        objective,
        optimizer,
        trainable=frozenset(params),
        prepare=lambda batch, key: batch,
        gather=partial(shard.gathered, mesh=mesh),
    )
    state = State(
        step=jax.ShapeDtypeStruct((), jnp.int32), params=params, batch_stats=stats,
        opt_state=jax.eval_shape(optimizer.init, params), key=jax.ShapeDtypeStruct((2,), jnp.uint32),
    )  # fmt: skip
    data = {
        "image": jax.ShapeDtypeStruct((batch, *model.input_shape), jnp.float32),
        "label": jax.ShapeDtypeStruct((batch,), jnp.int32),
    }
    run = shard.compile_steps(repeat(step, resident=False), state, mesh, sharding, "cut")
    program = run.lower(state, data, np.zeros((1, batch), np.int32), np.int32(1)).compile()
    memory = program.memory_analysis()
    found: dict[str, float] = {}
    for shape, kind in re.findall(
        r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all)(?:-start)?\(", program.as_text()
    ):
        size = sum(
            BYTES.get(dtype, 4) * math.prod(int(n) for n in dims.split(",") if n)
            for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", shape)
        )
        found[kind] = found.get(kind, 0) + size
    return {"arguments": memory.argument_size_in_bytes, "temporaries": memory.temp_size_in_bytes, "collectives": found}


def one(options: argparse.Namespace) -> None:
    from jft.models import make_model

    model = make_model(options.model, dtype=options.dtype, remat=options.remat)
    args = (options.batch, options.tensor, options.sharding)
    told = arithmetic(
        model, options.batch, options.devices[0], *args[1:], options.remat, 2 if options.dtype != "float32" else 4
    )
    print(json.dumps(told | ({} if options.dry else compiled(model, *args))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--per-device", type=int, default=4, help="images a device")
    parser.add_argument("--tensor", type=int, default=1)
    parser.add_argument("--sharding", default="fsdp", choices=("fsdp", "replicate"))
    parser.add_argument("--remat", default="none", choices=("none", "dots", "full"))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--dry", action="store_true", help="the arithmetic alone")
    parser.add_argument("--batch", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.batch:
        one(options)
        return
    print("| devices | state + gradients | arguments | activations | temporaries | communication | collectives |")
    print("|---|---|---|---|---|---|---|")
    for devices in options.devices:
        batch = options.per_device * devices // options.tensor
        command = [sys.executable, __file__, "--model", options.model, "--devices", str(devices), "--batch", str(batch)]
        for name in ("tensor", "sharding", "remat", "dtype"):
            command += [f"--{name}", str(getattr(options, name))]
        command += ["--dry"] * options.dry
        count = 1 if options.dry else devices
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={count}",
        }
        told = json.loads(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)
        gb = {k: f"{v / 1e9:.3f} GB" for k, v in told.items() if isinstance(v, int | float)}
        talk = (told["data_communication"] + told["tensor_communication"]) / 1e9
        moved = ", ".join(f"{k} {v / 1e9:.3f}" for k, v in sorted(told.get("collectives", {}).items()))
        state = f"{told['state'] / 1e9:.3f} + {told['gradients'] / 1e9:.3f} GB"
        print(
            f"| {devices} | {state} | {gb.get('arguments', '')} | {gb['activations']} | {gb.get('temporaries', '')} "
            f"| {talk:.3f} GB | {moved} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
