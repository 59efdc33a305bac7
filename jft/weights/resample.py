"""Position embeddings resized to another grid, as timm's `resample_abs_pos_embed` does it with PyTorch."""

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
