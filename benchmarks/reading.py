"""Time to read a weight file against the time to read its bytes, and the peak of memory for a ViT-L.

    python benchmarks/reading.py $JFT_ASSETS/weights/*

The figures are those of 7 repetitions' best, from a warm page cache: the least favourable to a reader. The ViT-L is
synthetic, 1.2 GB, written to a temporary folder and read in a process of its own; its peak is told against its size.
"""

import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import numpy as np

REPEATS = 7


def best(work: Callable[[], object]) -> float:
    """Seconds of the fastest of the repetitions."""
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def read(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Every tensor of the file."""
    from jft.weights.readers import open_weights

    with open_weights(path) as file:
        return {name: file.read(name) for name in file.names}


def peak_memory() -> float:
    """The most memory this process has had, in MB (Linux's own count: getrusage's starts with the parent's)."""
    status = pathlib.Path("/proc/self/status").read_text().split("VmHWM:")[1]
    return int(status.split()[0]) * 1024 / 1e6


def load_large(path: str) -> None:
    """In a process of its own: import a ViT-L and print the peak of its memory above that before, in MB."""
    from jft import weights
    from jft.models import make_model

    model = make_model("vit_large_patch16_224")
    before = peak_memory()
    loaded = weights.load(model, path)
    size = sum(a.nbytes for a in loaded.params.values()) / 1e6
    for array in loaded.params.values():  # mapped pages count when they are touched
        array.sum()
    peak = peak_memory() - before
    print(f"ViT-L, {size:.0f} MB: peak {peak:.0f} MB, {peak - size:+.0f} MB over the model")


def main(paths: list[str]) -> None:
    """Print a line for each file, then the ViT-L's."""
    for path in map(pathlib.Path, paths):
        ours, floor = best(lambda path=path: read(path)), best(path.read_bytes)  # type: ignore[misc]
        print(f"{path.name}: {ours * 1e3:.0f} ms, {ours / floor:.2f} × reading its bytes ({floor * 1e3:.0f} ms)")
    from jft import weights
    from jft.models import make_model

    model = make_model("vit_large_patch16_224")
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "large.safetensors"
        arrays = {n: np.full(s.shape, 0.5, np.float32) for n, s in model.shapes()[0].items()}
        weights.export(file, model, arrays, {}, format="timm")
        del arrays
        subprocess.run([sys.executable, __file__, "--large", str(file)], check=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--large"]:
        load_large(sys.argv[2])
    else:
        main(sys.argv[1:])
