"""What was done to a picture before it met these weights: size, crop, interpolation, mean and standard deviation."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

INTERPOLATIONS = ("bilinear", "bicubic", "lanczos", "nearest", "box")


@dataclass(frozen=True)
class Preprocess:
    """The evaluation transform bound to a set of weights.

    The shorter side is resized to `resize` pixels, the centre of `size` cut out, values divided by 255, the mean taken
    off and the result divided by the standard deviation. Where `size` is no square, the picture is resized to the least
    that covers `sides`, as timm does. With `squash` it is resized to `size` whole, its aspect ratio lost, as CLIP-like
    and vit_jax pipelines do.
    """

    size: tuple[int, int] = (224, 224)  # height, width in pixels
    crop_pct: float = 0.875
    interpolation: str = "bilinear"  # one of INTERPOLATIONS
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    squash: bool = False

    def __post_init__(self) -> None:
        for name in ("size", "mean", "std"):  # lists, where they come from JSON
            object.__setattr__(self, name, tuple(getattr(self, name)))

    def checked(self) -> "Preprocess":
        """The same, where pictures can be prepared so. Raises ValueError for what a stranger's JSON may say instead."""

        def numbers(values: Sequence[object], count: int, above: float = -math.inf) -> bool:
            return len(values) == count and all(
                isinstance(v, int | float) and math.isfinite(v) and v > above for v in values
            )

        for name, values, right in (
            ("size", self.size, numbers(self.size, 2, 0) and all(isinstance(n, int) for n in self.size)),
            ("crop_pct", self.crop_pct, numbers([self.crop_pct], 1, 0)),
            ("interpolation", self.interpolation, self.interpolation in INTERPOLATIONS),
            ("mean", self.mean, numbers(self.mean, 3)),
            ("std", self.std, numbers(self.std, 3, 0)),
        ):
            if not right:
                raise ValueError(f"{name} {repr(values)[:200]}")
        return self

    @property
    def sides(self) -> tuple[int, int]:
        """What a picture is resized to cover, height and width in pixels: `floor(size / crop_pct)`, as timm does."""
        high, wide = (_floor(side / self.crop_pct) for side in self.size)
        return high, wide

    @property
    def resize(self) -> int:
        """The shorter of these: the picture's own shorter side after resizing, where `size` is a square."""
        return min(self.sides)


def _floor(side: float) -> int:
    # 384 / (384 / 450) is a hair below 450; of crop_pct as timm has them, 0.875 to 0.965, none comes so near.
    return round(side) if abs(side - round(side)) < 1e-6 else math.floor(side)
