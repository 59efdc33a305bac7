"""A training step's memory: the compiler's count before the first step against what the process then takes.

python benchmarks/memory.py --model vit_large_patch16_224 --batch 8 --accumulate 4
"""

import argparse
import resource

import jax
import jax.numpy as jnp
import numpy as np

from jft import optim, shard
from jft.models import make_model
from jft.step import State, make_train_step, repeat, supervised


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--remat", default="none", choices=("none", "dots", "full"))
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    model = make_model(options.model, num_classes=10, dtype=options.dtype, remat=options.remat)
    shapes, stat_shapes = model.shapes()
    params, stats = ({n: np.full(v.shape, 0.01, v.dtype) for n, v in tree.items()} for tree in (shapes, stat_shapes))
    optimizer = optim.make_optimizer(
        "adamw", optim.make_schedule("constant", 1e-3, 10, 0.0), dict.fromkeys(params, 1.0)
    )
    objective = supervised(model, train_parts=[*model.parts], update_stats=[*model.parts], trainable=frozenset(params))
    step = make_train_step(
        objective, optimizer, trainable=frozenset(params), prepare=lambda batch, key: batch,
        accumulate=options.accumulate,
    )  # fmt: skip
    mesh = shard.make_mesh(jax.devices()[:1])
    state = State(
        step=jnp.asarray(0, jnp.int32), params=params, batch_stats=stats, opt_state=jax.jit(optimizer.init)(params),
        key=jax.random.key_data(jax.random.key(0)),
    )  # fmt: skip
    state = shard.place(state, mesh)
    batch = {
        "image": np.zeros((options.batch, *model.input_shape), np.float32),
        "label": np.zeros(options.batch, np.int32),
    }
    batch = shard.place(batch, mesh)
    index, count = np.zeros((1, options.batch), np.int32), np.int32(1)
    program = shard.compile_steps(repeat(step, resident=False), state, mesh, resident="cut").lower(
        state, batch, index, count
    )
    compiled = program.compile()
    memory = compiled.memory_analysis()
    told = shard.temporary(compiled)
    free = shard.agree(resident())
    state, metrics = compiled(state, batch, index, count)
    jax.block_until_ready(metrics)
    held, needs, took = (n / 1e6 for n in (memory.argument_size_in_bytes, told, peak() - free))
    what = f"{options.model}, batch {options.batch} in {options.accumulate}"
    print(f"{what}: state and batch {held:,.0f} MB; a step told beforehand {needs:,.0f} MB, taken {took:,.0f} MB")


def resident() -> float:
    """Bytes that the process holds now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def peak() -> float:
    """Bytes that the process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
