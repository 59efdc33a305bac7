"""Checkpoints: what training has changed, and the position it was changed to, written by Orbax and checked by us."""

import contextlib
import hashlib
import json
import logging
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jft.errors import MachineError

KEPT = 2  # the newest, and the one before it in case the newest is damaged
OLD = "old"  # where steps go to be removed: a process that is killed at it leaves half of one, which is none to read


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


@dataclass
class Keep:
    """Orbax's policy of what stays: the newest steps, and the newest of those that a run may have to go back to."""

    anchors: set[int] = field(default_factory=set)

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """For each of the checkpoints, in order of their steps, whether it stays."""
        steps = sorted(c.step for c in checkpoints)
        kept = {*steps[-KEPT:], *sorted(self.anchors.intersection(steps))[-1:]}
        return [c.step in kept for c in checkpoints]


@dataclass
class Quiet:
    """Keeps to itself what TensorStore raises in its threads when a read or write ends that a failed one was beside."""

    rest: Callable[[Any], Any]

    def __call__(self, unraisable: Any) -> None:
        """Hand on everything else."""
        if str(unraisable.exc_value) != "Event loop is closed":
            self.rest(unraisable)


class Checkpoints:
    """The folder of a run's checkpoints: the newest and the one before it, each whole or absent.

    Orbax writes in the background and renames a step into place when it is complete. A bit that flips on the disk
    afterwards it does not see, so every leaf carries a checksum, and so does the position, verified on restore.
    """

    def __init__(self, folder: Path, warn: Callable[[str], Any] = print):
        # Orbax tells of every save and failure, and asyncio of each read that was left after one failed: ours to tell.
        for name in ("absl", "asyncio"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        if not isinstance(sys.unraisablehook, Quiet):
            sys.unraisablehook = Quiet(sys.unraisablehook)
        self.folder = folder.absolute()
        self.warn = warn
        self.keep = Keep()
        self._open()

    def _open(self) -> None:
        self._sweep()
        process = jax.process_index()  # of several, one writes, and waits for none of the others
        alone = ocp.options.MultiprocessingOptions(
            primary_host=process, active_processes={process}, barrier_sync_key_prefix=f"jft{process}"
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self.keep,
            todelete_subdir=OLD,
            enable_async_checkpointing=True,
            # Threads that write would wait minutes for a folder that another could not make.
            async_options=ocp.options.AsyncOptions(create_directories_asynchronously=False),
            **({"multiprocessing_options": alone, "create": False} if jax.process_count() > 1 else {}),
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        self.manager = ocp.CheckpointManager(self.folder, options=options)

    def _sweep(self) -> None:
        """Remove what a save that was killed or failed left behind; the run's lock says that nobody is writing it."""
        for left in (*self.folder.glob("*.orbax-checkpoint-tmp*"), self.folder / OLD):
            shutil.rmtree(left, ignore_errors=True)

    def save(self, step: int, tree: Any, position: Mapping[str, Any], anchor: bool = False) -> None:
        """Write the pytree of arrays and the JSON beside it; returns when they are copied, before they lie on disk.

        A step that is there already is left alone: the same step of the same run holds the same bytes. The newest
        `anchor` is kept however many follow it. Raises UserError where this save or the one before cannot be written.
        """
        if step in self.manager.all_steps():
            return
        names = leaf_names(tree)
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
        sums = dict(zip(names, map(checksum, leaves), strict=True))
        text = json.dumps({"step": step, "anchor": anchor, "sums": sums, **position})
        self.wait()
        with self._writing():
            self.manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(dict(zip(names, leaves, strict=True))),
                    position=ocp.args.JsonSave({"text": text, "sum": _sum(text)}),
                ),
            )
        if anchor:
            self.keep.anchors.add(step)

    def positions(self) -> list[tuple[int, dict[str, Any]]]:
        """Steps that can be restored, newest first, with the JSON saved beside each."""
        found = []
        for step in sorted(self.manager.all_steps(), reverse=True):
            try:
                item = self.manager.restore(step, args=ocp.args.Composite(position=ocp.args.JsonRestore()))
                text = item["position"]["text"]
                if _sum(text) != item["position"]["sum"]:
                    raise ValueError("its checksum is wrong")
                position = json.loads(text)
                if position["step"] != step:
                    raise ValueError(f"it is of step {position['step']}")
            except Exception as error:  # Orbax raises many kinds; whatever it is, the step before is tried
                self._set_aside(step, f"its position cannot be read ({_short(error)})")
                continue
            found.append((step, position))
            if position["anchor"]:
                self.keep.anchors.add(step)
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
            self._set_aside(step, f"it cannot be read ({_short(error)})")
            return None
        for name, leaf in zip(names, leaves, strict=True):
            if checksum(leaf) != sums[name]:
                self._set_aside(step, f"the checksum of {name} is wrong")
                return None
        return jax.tree.unflatten(jax.tree.structure(like), leaves)

    def forget_after(self, step: int) -> None:
        """Remove the steps after this one: the run goes another way from here."""
        self.close()
        later = [int(p.name) for p in self.folder.iterdir() if p.name.isdigit() and int(p.name) > step]
        for one in sorted(later, reverse=True):
            (self.folder / OLD).mkdir(exist_ok=True)
            (self.folder / str(one)).rename(self.folder / OLD / str(one))
            self.keep.anchors.discard(one)
        self._open()

    def _set_aside(self, step: int, reason: str) -> None:
        self.warn(f"Checkpoint {step} in {self.folder} is damaged: {reason}. It is set aside; the one before is used.")
        self.manager.close()
        aside = self.folder.with_name(self.folder.name + "-damaged")
        aside.mkdir(exist_ok=True)
        shutil.rmtree(aside / str(step), ignore_errors=True)
        (self.folder / str(step)).rename(aside / str(step))
        self.keep.anchors.discard(step)
        self._open()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns what Orbax raises where a save fails, this one's or the one's before, into one message."""
        try:
            yield
        except Exception as error:  # ValueError, OSError, or whatever a thread of Orbax died of
            # The manager would raise it once more at the next save, and its other threads may still be writing.
            with contextlib.suppress(Exception):
                self.manager.wait_until_finished()
            with contextlib.suppress(Exception):
                self.manager.close()
            _join_writers()
            self._open()
            steps = self.manager.all_steps()
            last = f"The last whole one is of step {max(steps)}." if steps else "There is none before it."
            raise MachineError(
                f"A checkpoint cannot be written to {self.folder}: {_short(error)}. {last} "
                "When that is mended, the same command goes on from there."
            ) from error

    def wait(self) -> None:
        """Return when everything saved lies on the disk. Raises UserError where it cannot be written."""
        with self._writing():
            self.manager.wait_until_finished()
        shutil.rmtree(self.folder / OLD, ignore_errors=True)

    def close(self) -> None:
        """Wait, then let go of Orbax's threads. Raises UserError where the last save cannot be written."""
        try:
            self.wait()
        finally:
            self.manager.close()
            self._sweep()  # TensorStore may end a write of a failed save, which nothing can wait for, after the sweep


def _join_writers() -> None:
    """Wait for the threads of a failed save: Orbax leaves them at the first that fails, and they make files on."""
    for thread in threading.enumerate():
        if type(thread).__module__.startswith("orbax."):
            threading.Thread.join(thread)  # Orbax's own join raises what the thread died of


def _sum(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _short(error: BaseException) -> str:
    """What of an error of Orbax or TensorStore a person can use: they write of every layer the error came through."""
    told = " ".join(str(error).split())
    for known in ("No space left on device", "File too large", "Disk quota exceeded", "Input/output error"):
        if known in told:
            return known
    return f"{type(error).__name__}: {told[:200]}" if told else type(error).__name__
