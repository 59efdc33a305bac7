"""Records what torchvision and timm make of seeded pictures and logits, for the tests. Needs torch, torchvision, timm.

python scripts/augment_goldens.py tests/goldens/augment.npz
"""

import sys

import numpy as np
import torch

# Builds without torchvision's compiled operators lack these two, which importing it asks for.
try:
    torch.ops.torchvision.nms  # noqa: B018
except (AttributeError, RuntimeError):
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from PIL import Image
from timm.loss import AsymmetricLossMultiLabel
from torchvision.ops import sigmoid_focal_loss
from torchvision.transforms import InterpolationMode, autoaugment
from torchvision.transforms import functional as F

LEVELS = (9, 30)


def picture() -> np.ndarray:
    """Colours that run across 20 × 17 pixels, with some noise: neither all values nor only a few occur."""
    y, x, c = np.mgrid[:20, :17, :3]
    noise = np.random.default_rng(0).integers(0, 25, (20, 17, 3))
    return (20 + 9 * x + 2 * y * c + noise).clip(0, 250).astype(np.uint8)


def operations() -> dict[str, np.ndarray]:
    """By policy and level: every operation's result, with the sign plus and minus; and the values they were given."""
    image, arrays = Image.fromarray(picture()), {"picture": picture()}
    spaces = {
        "randaugment": autoaugment.RandAugment()._augmentation_space(31, (20, 17)),
        "trivial": autoaugment.TrivialAugmentWide()._augmentation_space(31),
    }
    for policy, space in spaces.items():
        for level in LEVELS:
            values = [float(values[level]) if values.ndim else 0.0 for values, _ in space.values()]
            results = [
                [
                    np.asarray(autoaugment._apply_op(image, op, sign * v, InterpolationMode.BILINEAR, None))
                    for op, v, (_, signed) in zip(space, values, space.values(), strict=True)
                    for sign in ([1, -1] if signed else [1])
                ]
            ]
            arrays[f"{policy} {level}"] = np.concatenate(results)
            arrays[f"{policy} {level} values"] = np.array(values, np.float32)
    return arrays


def colours() -> dict[str, np.ndarray]:
    """Hue turned and Gaussian blur, of floats within 0..1."""
    image = torch.from_numpy(picture()).permute(2, 0, 1).float() / 255
    arrays = {f"hue {turn}": F.adjust_hue(image, turn) for turn in (-0.4, -0.1, 0.2, 0.5)}
    arrays |= {f"blur {sigma}": F.gaussian_blur(image, [3, 3], [sigma, sigma]) for sigma in (0.3, 2.0)}
    return {name: array.permute(1, 2, 0).numpy() for name, array in arrays.items()}


def losses() -> dict[str, np.ndarray]:
    """Of seeded logits and labels, many an example: each example's sum over the classes."""
    rng = np.random.default_rng(1)
    logits, label = rng.normal(size=(6, 5)).astype(np.float32) * 4, (rng.random((6, 5)) < 0.4).astype(np.float32)
    x, y = torch.from_numpy(logits), torch.from_numpy(label)
    arrays = {"logits": logits, "label": label}
    for gamma, alpha in ((2.0, 0.25), (0.5, -1.0)):
        arrays[f"focal {gamma} {alpha}"] = sigmoid_focal_loss(x, y, alpha, gamma).sum(-1).numpy()
    for neg, pos, clip in ((4.0, 0.0, 0.05), (2.0, 1.0, 0.0)):
        loss = AsymmetricLossMultiLabel(neg, pos, clip, reduction="none")
        arrays[f"asymmetric {neg} {pos} {clip}"] = loss(x, y).sum(-1).numpy()
    return arrays


if __name__ == "__main__":
    np.savez_compressed(sys.argv[1], **operations(), **colours(), **losses())
