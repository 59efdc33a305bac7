"""Position embeddings resized to another grid, as timm's `resample_abs_pos_embed` does it with PyTorch, and BEiT's."""

import math

import numpy as np
from jaxtyping import Float


def bicubic_weights(size: int, new: int) -> Float[np.ndarray, "new size"]:
    """Each new position as a weighted sum of the old: PyTorch's antialiased bicubic interpolation along one axis.

    Keys's kernel with a = −1/2 (Pillow's; PyTorch's own without antialiasing has −3/4), widened where the grid
    shrinks, cut off and renormalised at the borders.
    """
    scale = size / new
    widen = max(scale, 1.0)
    weights = np.zeros((new, size))
    for i in range(new):
        centre = scale * (i + 0.5)
        first = max(math.floor(centre - 2 * widen + 0.5), 0)
        last = min(math.floor(centre + 2 * widen + 0.5), size)
        x = np.abs((np.arange(first, last) - centre + 0.5) / widen)
        near = (1.5 * x - 2.5) * x * x + 1
        far = ((-0.5 * x + 2.5) * x - 4) * x + 2
        row = np.where(x < 1, near, np.where(x < 2, far, 0.0))
        weights[i, first:last] = row / row.sum()
    return weights


def resample_pos_embed(
    embedding: Float[np.ndarray, "1 n d"], grid: tuple[int, int], new_grid: tuple[int, int]
) -> Float[np.ndarray, "1 m d"]:
    """Resize the positions of a (height, width) grid; those before them, such as the class token's, stay."""
    prefix = embedding.shape[1] - grid[0] * grid[1]
    tokens = embedding[0, prefix:].reshape(*grid, -1).astype(np.float64)
    rows, columns = bicubic_weights(grid[0], new_grid[0]), bicubic_weights(grid[1], new_grid[1])
    resized = np.einsum("ih,jw,hwd->ijd", rows, columns, tokens, optimize=True)
    flat = resized.reshape(1, -1, embedding.shape[2]).astype(embedding.dtype)
    return np.concatenate([embedding[:, :prefix], flat], axis=1)


def resample_rel_pos(
    table: Float[np.ndarray, "n h"], grid: tuple[int, int], new_grid: tuple[int, int]
) -> Float[np.ndarray, "m h"]:
    """Resize a table of biases by relative position; its last three rows, the class token's, stay.

    As BEiT's fine-tuning and timm's `resize_rel_pos_bias_table`: the offsets lie on a geometric progression, finer near
    the centre, and what lies between them is interpolated linearly.
    """
    cells, rest = table[:-3].astype(np.float64), table[-3:]
    rows, columns = (_rel_pos_weights(2 * a - 1, 2 * b - 1) for a, b in zip(grid, new_grid, strict=True))
    cells = cells.reshape(2 * grid[0] - 1, 2 * grid[1] - 1, -1)
    resized = np.einsum("ih,jw,hwd->ijd", rows, columns, cells, optimize=True)
    return np.concatenate([resized.reshape(-1, table.shape[1]).astype(table.dtype), rest])


def _rel_pos_weights(size: int, new: int) -> Float[np.ndarray, "new size"]:
    """Each new offset as a weighted sum of the old along one axis; both sizes are odd."""
    half, new_half = size // 2, new // 2
    low, high = 1.01, 1.5
    while high - low > 1e-6:  # the ratio with which as many steps as there were reach as far as there is now
        ratio = (low + high) / 2
        low, high = (low, ratio) if (1 - ratio**half) / (1 - ratio) > new_half else (ratio, high)
    steps = np.cumsum(ratio ** np.arange(half))
    old = np.concatenate([-steps[::-1], [0.0], steps])
    return np.stack([np.interp(np.arange(-new_half, new_half + 1), old, row) for row in np.eye(size)], axis=1)
