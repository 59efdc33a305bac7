"""Devices and processes: the mesh, how state and batches lie on it (data-parallel, FSDP, tensor-parallel), and pmap."""

import fnmatch
import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jft.errors import UserError

DATA, MODEL = "data", "model"  # the mesh's axes
SHARDINGS = ("replicate", "fsdp", "pmap")

# Which axis of a parameter is cut over `model`: a block's first products by columns and its second by rows, so that
# each device has its own heads and hidden units and a block communicates twice (Shoeybi et al. 2019, Megatron-LM).
TENSOR_PARALLEL = (
    ("*/attn/qkv/*", -1),
    ("*/attn/proj/kernel", 0),
    ("*/mlp/fc1/*", -1),
    ("*/mlp/fc2/kernel", 0),
)


@functools.cache
def compiler_options() -> dict[str, str]:
    """What XLA is told besides: on a CPU, to leave to YNNPACK, which jaxlib brings along, nothing but reductions.

    By default it also gets convolutions and products. The gradient of a 3×3 kernel, 64 channels of 56 × 56 and 32
    images, takes it 700 ms and XLA itself 95; a step of ResNet-18 10.3 s instead of 3.8 (2 cores, jaxlib 0.10 and 0.12
    alike). Nothing where this jaxlib has no such option, or where XLA_FLAGS speak of it.
    """
    name = "xla_cpu_experimental_ynn_fusion_type"
    options = {name: "LIBRARY_FUSION_TYPE_REDUCE"}
    if jax.default_backend() != "cpu" or name in os.environ.get("XLA_FLAGS", ""):
        return {}
    try:
        jax.jit(lambda: 0, compiler_options=options).lower().compile()
    except jax.errors.JaxRuntimeError:  # it has gone, or has another name
        return {}
    return options


def jit(function: Callable, **options: Any) -> Any:
    """`jax.jit` of what is called from Python, with `compiler_options`."""
    return jax.jit(function, compiler_options=compiler_options() or None, **options)


def make_mesh(devices: Sequence[jax.Device] | None = None, model: int = 1) -> Mesh:
    """A mesh of axes `data` and `model`, the second of so many devices, over these devices or all there are.

    Raises UserError where the devices cannot be divided so.
    """
    devices = list(devices or jax.devices())
    if len(devices) % model:
        raise UserError(f"--tensor {model}: {len(devices)} devices cannot be divided into groups of {model}.")
    axes = (AxisType.Auto, AxisType.Auto)
    return jax.make_mesh((len(devices) // model, model), (DATA, MODEL), axis_types=axes, devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def over_batch(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Axis `axis` of the array is cut into one piece for each place along `data`."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, DATA))


def shardings(tree: Any, mesh: Mesh, sharding: str = "replicate") -> Any:
    """A sharding for every leaf: `replicate`, or `fsdp`, which cuts each leaf's longest axis that divides evenly.

    FSDP follows ZeRO-3 (Rajbhandari et al. 2020): the compiler gathers a layer's weights where they are used. Where the
    mesh has a `model` axis, `TENSOR_PARALLEL` comes first; optimizer state lies as the parameter it is of.
    """
    if sharding not in SHARDINGS:
        raise UserError(f"There is no sharding {sharding!r}; it is one of {', '.join(SHARDINGS)}.")
    data, model = mesh.shape[DATA], mesh.shape[MODEL]

    def place(path: Any, leaf: Any) -> NamedSharding:
        spec: list[str | None] = [None] * len(leaf.shape)
        name = next((k.key for k in reversed(path) if isinstance(k, jax.tree_util.DictKey)), "")
        axis = next((axis for pattern, axis in TENSOR_PARALLEL if fnmatch.fnmatchcase(str(name), pattern)), None)
        if model > 1 and axis is not None and spec and leaf.shape[axis] % model == 0:
            spec[axis] = MODEL
        if sharding == "fsdp" and data > 1:
            axes = [i for i, size in enumerate(leaf.shape) if size and size % data == 0 and spec[i] is None]
            if axes:
                spec[max(axes, key=lambda i: leaf.shape[i])] = DATA
        return NamedSharding(mesh, PartitionSpec(*spec) if any(spec) else PartitionSpec())

    return jax.tree_util.tree_map_with_path(place, tree)


def gathered(params: Any, mesh: Mesh) -> Any:
    """Within a compiled step: parameters that FSDP has cut, whole on every device, but for what `model` shares.

    Left to itself the partitioner may keep them cut and move activations instead, which are more.
    """
    return jax.lax.with_sharding_constraint(params, shardings(params, mesh))


def put(leaf: Any, where: NamedSharding) -> jax.Array:
    """An array that every process holds, on the devices of all of them."""
    if jax.process_count() == 1:
        return jax.device_put(leaf, where)
    whole = fetch(leaf)
    return jax.make_array_from_callback(whole.shape, where, lambda at: whole[at])


def fetch(tree: Any) -> Any:
    """Every leaf whole, as a numpy array, in every process; all of them must ask together."""

    def whole(leaf: Any) -> np.ndarray:
        if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            leaf = multihost_utils.process_allgather(leaf, tiled=True)
        return np.asarray(leaf)

    return jax.tree.map(whole, tree)


def place(tree: Any, mesh: Mesh, sharding: str = "replicate") -> Any:
    """The tree on the devices; for `pmap` every leaf gets a leading axis, one copy a device."""
    if sharding == "pmap":
        stack = NamedSharding(mesh, PartitionSpec((DATA, MODEL)))
        return jax.tree.map(lambda leaf: jax.device_put(jnp.stack([leaf] * mesh.size), stack), tree)
    return jax.tree.map(put, tree, shardings(tree, mesh, sharding))


def distribute(tree: Any, mesh: Mesh, sharding: str = "replicate") -> Any:
    """`place` in buffers of its own: donating what `device_put` gave could take the caller's own array away."""
    if jax.process_count() > 1:
        return place(tree, mesh, sharding)
    leaves, form = jax.tree.flatten(tree)
    groups: dict[Any, list[int]] = {}  # what lies on the same devices is copied by one program
    for i, leaf in enumerate(leaves):
        groups.setdefault(frozenset(leaf.sharding.device_set) if isinstance(leaf, jax.Array) else None, []).append(i)
    for chosen in groups.values():
        for i, copied in zip(chosen, copy([leaves[i] for i in chosen]), strict=True):
            leaves[i] = copied
    return place(jax.tree.unflatten(form, leaves), mesh, sharding)


@jax.jit
def copy(arrays: Any) -> Any:
    """Every leaf in a buffer of its own."""
    return jax.tree.map(jnp.copy, arrays)


def spread(arrays: Mapping[str, Any], mesh: Mesh) -> dict[str, jax.Array]:
    """Arrays cut over the devices along their first axis, filled up with their first rows where it does not divide."""
    where, share = over_batch(mesh), mesh.shape[DATA]
    return {n: put(np.concatenate([v, v[: -len(v) % share]]), where) for n, v in arrays.items()}


def collect(tree: Any, sharding: str = "replicate") -> Any:
    """What `distribute` spread out, as arrays of their own shape again."""
    if sharding == "pmap":
        # From the first device's own piece: indexing the whole would be a collective for every leaf.
        return jax.tree.map(lambda leaf: np.asarray(leaf.addressable_shards[0].data)[0], tree)
    return tree


def rows(mesh: Mesh, batch: int) -> np.ndarray:
    """Which rows of a batch this process's devices hold: those that it has to read."""
    held = over_batch(mesh).addressable_devices_indices_map((batch,))
    return np.unique(np.concatenate([np.arange(batch)[at] for at in held.values()]))


def put_rows(data: Mapping[str, np.ndarray], mesh: Mesh, batch: int, sharding: str = "replicate") -> dict[str, Any]:
    """A batch cut over the devices, of which every process gives its `rows`."""
    if sharding == "pmap":
        stack = NamedSharding(mesh, PartitionSpec((DATA, MODEL)))
        cut = {n: v.reshape(mesh.size, batch // mesh.size, *v.shape[1:]) for n, v in data.items()}
        return {n: jax.device_put(v, stack) for n, v in cut.items()}
    where = over_batch(mesh)
    return {
        n: jax.make_array_from_process_local_data(where, np.ascontiguousarray(v), (batch, *v.shape[1:]))
        for n, v in data.items()
    }


def compile_steps(
    run: Callable, state: Any, mesh: Mesh, sharding: str = "replicate", resident: str = "replicate"
) -> Any:
    """`step.repeat(step)` for states and data that `distribute` placed; the state given to it is donated.

    Data are `replicate`d over the devices, or `cut` over them: whole sets, or batches of `put_rows`. For `pmap` the
    step must have been made with `axis_name=DATA`.
    """
    if sharding == "pmap":
        mapped = jax.pmap(
            run, axis_name=DATA, in_axes=(0, 0, 1, None), devices=list(mesh.devices.flat), donate_argnums=0
        )

        def call(state: Any, data: Any, index: Any, count: Any) -> Any:
            n, b = index.shape
            state, metrics = mapped(state, data, np.asarray(index).reshape(n, mesh.size, b // mesh.size), count)
            return state, collect(metrics, sharding)

        return call
    whole, where = replicated(mesh), shardings(state, mesh, sharding)
    return jit(
        run,
        in_shardings=(where, over_batch(mesh) if resident == "cut" else whole, over_batch(mesh, 1), whole),
        out_shardings=(where, whole),
        donate_argnums=0,
    )


def compile_evaluation(step: Callable, mesh: Mesh) -> Any:
    """An evaluation step whose result every process can read."""
    # In one process it can without a collective, and is spared one: XLA's CPU runtime has as many threads as devices,
    # and two programs with collectives that overlap can wait for each other for ever.
    return jit(step, out_shardings=replicated(mesh)) if jax.process_count() > 1 else jit(step)


def indices(index: np.ndarray, mesh: Mesh) -> Any:
    """The indices [n, b] of the steps of a dispatch, as compiled steps take them."""
    return index if jax.process_count() == 1 else put(index, over_batch(mesh, 1))


def temporary(compiled: Any) -> int:
    """Bytes that a compiled program needs on each device besides its arguments, as its compiler counts them."""
    memory = compiled.memory_analysis()
    if memory is None:
        return 0
    return int(memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes)


# Several processes, each with devices of its own: all run the same program, and the first alone writes.


def join() -> None:
    """Become one process of several: as JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID say, or as the
    cluster (a TPU pod, Slurm, Open MPI, Kubernetes) tells JAX. Raises UserError where nobody does.
    """
    if jax.distributed.is_initialized():
        return
    number = {n: os.environ.get(f"JAX_{n.upper()}") for n in ("num_processes", "process_id")}
    try:
        jax.distributed.initialize(**{n: int(v) for n, v in number.items() if v})  # type: ignore[arg-type]
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"--distributed: {error} Start one process a host under Slurm or on a TPU pod, or set "
            "JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES and JAX_PROCESS_ID."
        ) from None


def first() -> bool:
    """Whether this process is the one that writes."""
    return jax.process_index() == 0


def agree(value: float, how: Callable[[list[Any]], Any] = max) -> Any:
    """One number of every process's own, the same in all of them."""
    if jax.process_count() == 1:
        return value
    return how(np.asarray(multihost_utils.process_allgather(np.asarray(value, np.float64))).tolist())


def broadcast(tree: Any) -> Any:
    """The first process's arrays, in all of them; the others give arrays of the same shapes."""
    if jax.process_count() == 1:
        return tree
    return jax.tree.map(np.asarray, multihost_utils.broadcast_one_to_all(tree))


def together(function: Callable[[], Any]) -> Any:
    """What the function gives to the first process, which alone calls it: JSON, in all of them; its UserError too."""
    if jax.process_count() == 1:
        return function()
    text = b""
    if first():
        try:
            text = json.dumps([function(), None]).encode()
        except UserError as error:
            text = json.dumps([None, str(error)]).encode()
    length = int(broadcast(np.asarray(len(text), np.int32)))
    told = broadcast(np.frombuffer(text.ljust(length, b" "), np.uint8))
    value, refused = json.loads(told.tobytes())
    if refused is not None:
        raise UserError(refused)
    return value
