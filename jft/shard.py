"""Devices: the mesh, how state and batches lie on it (data-parallel, FSDP), and the pmap variant."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jft.errors import UserError

DATA = "data"
SHARDINGS = ("replicate", "fsdp", "pmap")


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of one axis, `data`, over these devices or all there are."""
    devices = list(devices or jax.devices())
    return jax.make_mesh((len(devices),), (DATA,), axis_types=(AxisType.Auto,), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def over_batch(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Axis `axis` of the array is cut into one piece a device."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, DATA))


def shardings(tree: Any, mesh: Mesh, sharding: str = "replicate") -> Any:
    """A sharding for every leaf: `replicate`, or `fsdp`, which cuts each leaf's longest axis that divides evenly.

    FSDP follows ZeRO-3 (Rajbhandari et al. 2020): the compiler gathers a layer's weights where they are used.
    """
    if sharding not in SHARDINGS:
        raise UserError(f"There is no sharding {sharding!r}; it is one of {', '.join(SHARDINGS)}.")

    def place(leaf: Any) -> NamedSharding:
        if sharding == "fsdp" and mesh.size > 1:
            axes = [i for i, size in enumerate(leaf.shape) if size and size % mesh.size == 0]
            if axes:
                return over_batch(mesh, max(axes, key=lambda i: leaf.shape[i]))
        return replicated(mesh)

    return jax.tree.map(place, tree)


def place(tree: Any, mesh: Mesh, sharding: str = "replicate") -> Any:
    """The tree on the devices; for `pmap` every leaf gets a leading axis, one copy a device."""
    if sharding == "pmap":
        stack = over_batch(mesh)
        return jax.tree.map(lambda leaf: jax.device_put(jnp.stack([leaf] * mesh.size), stack), tree)
    return jax.tree.map(jax.device_put, tree, shardings(tree, mesh, sharding))


def distribute(tree: Any, mesh: Mesh, sharding: str = "replicate") -> Any:
    """`place` in buffers of its own: donating what `device_put` gave could take the caller's own array away."""
    return place(jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), tree), mesh, sharding)


def collect(tree: Any, sharding: str = "replicate") -> Any:
    """What `distribute` spread out, as arrays of their own shape again."""
    return jax.tree.map(lambda leaf: leaf[0], tree) if sharding == "pmap" else tree


def compile_steps(run: Callable, state: Any, mesh: Mesh, sharding: str = "replicate") -> Callable:
    """`step.repeat(step)` for states and data that `distribute` placed; the state given to it is donated.

    For `pmap` the step must have been made with `axis_name=DATA`.
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
    return jax.jit(
        run,
        in_shardings=(where, whole, over_batch(mesh, 1), whole),
        out_shardings=(where, whole),
        donate_argnums=0,
    )
