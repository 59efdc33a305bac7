"""Records what timm's resample_abs_pos_embed makes of seeded embeddings, for the tests. Needs torch and timm.

python scripts/pos_embed_goldens.py tests/goldens/pos_embed.npz
"""

import sys

import numpy as np
import torch
from timm.layers import resample_abs_pos_embed

CASES = [(14, (24, 24), 1), (14, (9, 17), 1), (14, (7, 7), 0), (16, (16, 10), 5), (7, (14, 3), 1), (4, (4, 5), 2)]


def main(path: str) -> None:
    """Write for each case its input and output, under names that spell the case out."""
    arrays = {}
    for old, new, prefix in CASES:
        embedding = np.random.default_rng(old).normal(size=(1, prefix + old * old, 3)).astype(np.float32)
        resized = resample_abs_pos_embed(torch.from_numpy(embedding), list(new), num_prefix_tokens=prefix)
        arrays[f"{old} {new[0]} {new[1]} {prefix}"] = resized.numpy()
    np.savez_compressed(path, **arrays)


if __name__ == "__main__":
    main(sys.argv[1])
