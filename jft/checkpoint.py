"""Checkpoints: what training has changed, and the position it was changed to, written by Orbax and checked by us."""

import hashlib
import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

FORMAT = 1


def leaf_names(tree: Any) -> list[str]:
    """A name for every leaf of a pytree, in the order of `jax.tree.leaves`: its path, joined by dots."""
    paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [jax.tree_util.keystr(path, simple=True, separator=".").replace("/", ".") for path, _ in paths]


def checksum(leaf: np.ndarray) -> str:
    """A digest of a leaf's dtype, shape and bytes."""
    leaf = np.ascontiguousarray(leaf)
    digest = hashlib.blake2b(f"{leaf.dtype} {leaf.shape}".encode(), digest_size=16)
    digest.update(leaf.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


class Checkpoints:
    """The folder of a run's checkpoints: the newest and the one before it, each whole or absent.

    Orbax writes in the background and renames a step into place when it is complete. A bit that flips on the disk
    afterwards it does not see, so every leaf carries a checksum, verified on restore.
    """

    def __init__(self, folder: Path, warn: Callable[[str], Any] = print):
        logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax tells of every save; ours to tell
        self.folder = folder.absolute()
        self.warn = warn
        self._open()

    def _open(self) -> None:
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=True)
        self.manager = ocp.CheckpointManager(self.folder, options=options)

    def save(self, step: int, tree: Any, position: Mapping[str, Any]) -> None:
        """Write the pytree of arrays and the JSON beside it; returns when they are copied, before they lie on disk.

        A step that is there already is left alone: the same step of the same run holds the same bytes.
        """
        if step in self.manager.all_steps():
            return
        names = leaf_names(tree)
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
        sums = dict(zip(names, map(checksum, leaves), strict=True))
        self.manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(dict(zip(names, leaves, strict=True))),
                position=ocp.args.JsonSave({"format": FORMAT, "sums": sums, **position}),
            ),
        )

    def positions(self) -> list[tuple[int, dict[str, Any]]]:
        """Steps that can be restored, newest first, with the JSON saved beside each."""
        found = []
        for step in sorted(self.manager.all_steps(), reverse=True):
            try:
                item = self.manager.restore(step, args=ocp.args.Composite(position=ocp.args.JsonRestore()))
                found.append((step, dict(item["position"])))
            except Exception as error:  # Orbax raises many kinds; whatever it is, the step before is tried
                self._set_aside(step, f"its position cannot be read ({type(error).__name__})")
        return found

    def restore(self, step: int, like: Any, sums: Mapping[str, str]) -> Any | None:
        """The pytree saved at `step`, as numpy arrays in the shape of `like`; None if it is damaged, and set aside."""
        names = leaf_names(like)
        target = {
            name: np.empty(leaf.shape, leaf.dtype) for name, leaf in zip(names, jax.tree.leaves(like), strict=True)
        }
        if target.keys() != sums.keys():
            odd = sorted(target.keys() ^ sums.keys())
            self._set_aside(step, f"it holds other leaves than this run: {', '.join(odd[:3])}")
            return None
        try:
            item = self.manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target)))
            leaves = [np.asarray(item["state"][name]) for name in names]
        except Exception as error:
            self._set_aside(step, f"it cannot be read ({type(error).__name__})")
            return None
        for name, leaf in zip(names, leaves, strict=True):
            if checksum(leaf) != sums[name]:
                self._set_aside(step, f"the checksum of {name} is wrong")
                return None
        return jax.tree.unflatten(jax.tree.structure(like), leaves)

    def _set_aside(self, step: int, reason: str) -> None:
        self.warn(f"Checkpoint {step} in {self.folder} is damaged: {reason}. It is set aside; the one before is used.")
        self.manager.close()
        aside = self.folder.with_name(self.folder.name + "-damaged")
        aside.mkdir(exist_ok=True)
        shutil.rmtree(aside / str(step), ignore_errors=True)
        (self.folder / str(step)).rename(aside / str(step))
        self._open()

    def wait(self) -> None:
        """Return when everything saved lies on the disk."""
        self.manager.wait_until_finished()

    def close(self) -> None:
        """Wait, then let go of Orbax's threads."""
        self.manager.close()
