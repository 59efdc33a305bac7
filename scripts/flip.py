"""Flip bits of a run's files and cut them short, one at a time, and load each: nothing damaged may load silently.

    python scripts/flip.py --model vit_tiny_patch16_224 --weights W.safetensors --data hymenoptera_data/train

A small run is made first. Files of its newest checkpoint, of the cache (decoded images, features, compiled programs)
and of the model's folder are damaged in turn, half of the time a file chosen from all alike, half of the time a bit
from all bits. What is loaded must be what was there, or be refused, or, of a checkpoint, be the one before it.
"""

import argparse
import collections
import contextlib
import json
import logging
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np


def damage(file: Path, rng: random.Random, how: str) -> bytes:
    """Flip a bit of a file, or cut it somewhere; returns what it held."""
    whole = file.read_bytes()
    data = bytearray(whole)
    if how == "flip":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    else:
        del data[rng.randrange(len(data)) :]
    file.write_bytes(data)
    return whole


def choose(files: list[Path], rng: random.Random) -> Path:
    """A file, each as likely as another; or one after its size."""
    return rng.choice(files) if rng.random() < 0.5 else rng.choices(files, [f.stat().st_size for f in files])[0]


def same(a: Any, b: Any) -> bool:
    """Whether two trees of arrays hold the same bytes."""
    return a.keys() == b.keys() and all(
        np.asarray(a[n]).dtype == np.asarray(b[n]).dtype and np.asarray(a[n]).tobytes() == np.asarray(b[n]).tobytes()
        for n in a
    )


class CheckpointTarget:
    """A run's checkpoints: restored as a run does, the newest first."""

    def __init__(self, folder: Path):
        from jft.checkpoint import Checkpoints

        self.folder, self.make = folder, Checkpoints
        kept = self.make(folder, print)
        self.states = {}
        for step, position in kept.positions():
            like = self._like(kept, step)
            self.states[step] = (kept.restore(step, like, position["sums"]), position)
        kept.close()
        self.newest = max(self.states)
        self.files = [f for f in (folder / str(self.newest)).rglob("*") if f.is_file()]

    def _like(self, kept: Any, step: int) -> dict[str, np.ndarray]:
        import orbax.checkpoint as ocp

        item = kept.manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore()))
        return {name: np.asarray(leaf) for name, leaf in item["state"].items()}

    def load(self, file: Path) -> str:
        """What became of it: identical, the one before, refused, or SILENT."""
        said: list[str] = []
        kept = self.make(self.folder, said.append)
        try:
            for step, position in kept.positions():
                state, original = self.states[step]
                found = kept.restore(step, state, position["sums"])
                if found is None:
                    continue
                if not same(found, state) or position != original:
                    return "SILENT"
                return "identical" if step == self.newest else "the one before" if said else "SILENT"
            return "refused"
        finally:
            kept.close()
            aside = self.folder.with_name(self.folder.name + "-damaged") / str(self.newest)
            if aside.exists():
                aside.rename(self.folder / str(self.newest))


class BundleTarget:
    """A run's model."""

    def __init__(self, folder: Path):
        from jft import bundle

        self.folder, self.bundle = folder, bundle
        self.original = bundle.load(folder)
        self.files = [f for f in folder.rglob("*") if f.is_file()]

    def load(self, file: Path) -> str:
        from jft.errors import UserError

        try:
            found = self.bundle.load(self.folder)
        except UserError:
            return "refused"
        whole = all(
            getattr(found, n) == getattr(self.original, n)
            for n in ("classes", "preprocess", "multi_label", "temperature")
        )
        equal = same(found.params, self.original.params) and same(found.batch_stats, self.original.batch_stats)
        shapes = found.model.shapes() == self.original.model.shapes()
        return "identical" if whole and equal and shapes else "SILENT"


class DecodedTarget:
    """The cache of decoded images: what it holds, or what is decoded again."""

    def __init__(self, folder: Path, dataset: Any, preprocess: Any):
        self.arguments = (dataset, preprocess)
        before = set(folder.rglob("*"))
        self.images = np.array(self._decode())
        self.files = [f for f in folder.rglob("*.u8") if f not in before]
        self.logged: list[Any] = []
        handler = logging.Handler()
        handler.emit = self.logged.append  # type: ignore[method-assign]
        logging.getLogger("jft.data.pipeline").addHandler(handler)
        logging.getLogger("jft.data.pipeline").propagate = False

    def _decode(self) -> np.ndarray:
        from jft.data.pipeline import decode_all

        return decode_all(*self.arguments)[0]

    def load(self, file: Path) -> str:
        self.logged.clear()
        found = self._decode()
        if found.tobytes() != self.images.tobytes():
            return "SILENT"
        return "decoded again" if self.logged else "identical"


class FeaturesTarget:
    """The cache of features: those of some images before the model's last block, or none."""

    def __init__(self, model: Any):
        from jft import features
        from jft.plan import TOP

        body = [part for part in model.parts if part not in TOP]
        self.shape, self._load = features.shape(model, body[-1], 24), features.load
        self.saved = np.random.default_rng(0).standard_normal(self.shape, np.float32)
        features.save("some", [self.saved[:10], self.saved[10:]])
        self.files = [features._file("some")]
        logging.getLogger("jft.features").propagate = False
        logging.getLogger("jft.features").addHandler(logging.NullHandler())

    def load(self, file: Path) -> str:
        found = self._load("some", self.shape)
        if found is None:
            return "computed again"
        return "identical" if found.tobytes() == self.saved.tobytes() else "SILENT"


class CompiledTarget:
    """The cache of compiled programs: JAX reads and decompresses an entry, or compiles anew."""

    def __init__(self, folder: Path):
        from jax._src import compilation_cache

        self.expand = compilation_cache.decompress_executable
        self.files = [f for f in folder.glob("*-cache") if f.stat().st_size]
        self.originals = {f: self.expand(f.read_bytes()) for f in self.files}

    def load(self, file: Path) -> str:
        try:
            return "identical" if self.expand(file.read_bytes()) == self.originals[file] else "SILENT"
        except Exception:  # JAX takes any for an entry that is not there
            return "refused"


def main() -> None:
    """Make a run, damage it, load it, count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--weights", default="none")
    parser.add_argument("--plan", default="full")
    parser.add_argument("--flips", type=int, default=1000)
    parser.add_argument("--cuts", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after so many")
    parser.add_argument("--out", metavar="FILE.json")
    options = parser.parse_args()
    rng, begun = random.Random(options.seed), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="jft-flip-") as folder:
        root = Path(folder)
        os.environ["JFT_CACHE"] = str(root / "cache")
        from jft.config import Config
        from jft.data import sources
        from jft.train import train

        run = train(Config(
            data=options.data, model=options.model, weights=options.weights, plan=options.plan, shots=4, epochs=2,
            batch=4, checkpoint_every=0.0, workdir=str(root / "run"), display="quiet", dtype="float32",
        ))  # fmt: skip
        some = sources.load(options.data, val_fraction=0).train.select(np.arange(24))
        bundle = BundleTarget(run.workdir / "model")
        targets = {
            "checkpoint": CheckpointTarget(run.workdir / "checkpoints"),
            "model": bundle,
            "features": FeaturesTarget(bundle.original.model),
            "decoded images": DecodedTarget(root / "cache", some, bundle.original.preprocess),
            "compiled programs": CompiledTarget(root / "cache" / "xla"),
        }
        told: dict[str, Any] = {
            "run": f"{options.model} {options.plan}",
            "bytes": {name: sum(f.stat().st_size for f in t.files) for name, t in targets.items()},
            "files": {name: len(t.files) for name, t in targets.items()},
        }
        counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        silent = []
        hows = ["flip"] * options.flips + ["cut"] * options.cuts
        rng.shuffle(hows)
        names = ["checkpoint"] * 3 + ["model"] * 2 + ["decoded images", "features", "compiled programs"]
        for how in hows:
            if time.monotonic() - begun > options.seconds:
                break
            name = rng.choice(names)
            target = targets[name]
            file = choose(target.files, rng)
            whole = damage(file, rng, how)
            with open(os.devnull, "w") as null, contextlib.redirect_stderr(null):
                became = target.load(file)
            counts[f"{name}, {how}"][became] += 1
            if became == "SILENT":
                silent.append(f"{name}: {file.relative_to(root)} ({how})")
            file.write_bytes(whole)
        told |= {"outcomes": {k: dict(v) for k, v in sorted(counts.items())}, "silent": silent}
        told |= {"loads": sum(sum(c.values()) for c in counts.values()), "seconds": round(time.monotonic() - begun)}
        print(json.dumps(told, indent=1))
        if options.out:
            Path(options.out).write_text(json.dumps(told, indent=1) + "\n")
        sys.exit(bool(silent))


if __name__ == "__main__":
    main()
