"""Runs the largest ViTs whole, with generated weights, against timm and transformers; tests run them two blocks deep.

Needs jft; what the references give lies in tests/goldens/vit_whole.npz. With an interpreter that has torch, timm,
transformers and open_clip it is recorded anew first (5 GB of memory for the giants):

    python scripts/check_whole.py [--torch-python $T] [PATTERN…]

Exit code 1 where the logits, or what a part gives, is off by more than 1e-4 of its norm.
"""

import argparse
import math
import subprocess
import sys
import time
from fnmatch import fnmatchcase
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import jax
import numpy as np
from parity import differences, made_of

from jft.models import make_model

ROOT = Path(__file__).resolve().parent.parent
GOLDENS = ROOT / "tests" / "goldens" / "vit_whole.npz"
TOLERANCE = 1e-4


def check(goldens: dict[str, np.ndarray], case: str) -> bool:
    """Compare one model; prints a line of a table."""
    start = time.monotonic()
    name, options = made_of(case)
    count = sum(math.prod(leaf.shape) for leaf in make_model(name, **options).shapes()[0].values())
    *parts, (_, logits) = differences(goldens, case, name, options, "hf" if name.startswith("dinov2_vit") else None)
    place, worst = max(parts, key=lambda found: found[1])
    seconds = time.monotonic() - start
    row = (name, f"{count / 1e6:.0f} M", len(parts), f"{worst:.1e} ({place})", f"{logits:.1e}", f"{seconds:.0f} s")
    print("|", " | ".join(map(str, row)), "|", flush=True)
    return max(worst, logits) <= TOLERANCE


def main() -> int:
    """Check every model, or those whose names match a pattern."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("patterns", nargs="*", metavar="PATTERN", default=["*"])
    parser.add_argument("--torch-python", metavar="PATH", help="record the references anew with this interpreter")
    options = parser.parse_args()
    if options.torch_python:
        script = ROOT / "scripts" / "vit_goldens.py"
        subprocess.run([options.torch_python, script, "--whole", GOLDENS, *options.patterns], check=True)
    jax.config.update("jax_default_matmul_precision", "highest")
    goldens = dict(np.load(GOLDENS))
    cases = [key.removesuffix("/parts") for key in goldens if key.endswith("/parts")]
    cases = [case for case in cases if any(fnmatchcase(made_of(case)[0], pattern) for pattern in options.patterns)]
    print("| model | parameters | parts | worst part | logits | time |\n|---|---|---|---|---|---|")
    good = [check(goldens, case) for case in cases]
    return 0 if good and all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
