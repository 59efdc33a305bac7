"""Records a digest of every parameter's name and shape in timm's and torchvision's models. Needs torch and both.

python scripts/name_goldens.py tests/goldens/names.json
"""

import hashlib
import json
import sys

import goldens  # declares what torchvision needs
import timm
import torch
import torchvision

CNNS = [name for name in (*goldens.RESNETS, *goldens.VGGS, *goldens.CONVNEXTS) if not name.startswith("tiny")]
TIMM_CNNS = [name for name in (*goldens.VARIANTS, *goldens.BITS) if not name.startswith("tiny")]
VITS = [
    f"vit_{size}_patch{patch}_224"
    for size in ("tiny", "small", "base", "large", "huge")
    for patch in (8, 14, 16, 32)
    if f"vit_{size}_patch{patch}_224" in timm.list_models()
]


TORCHVISION_VITS = {f"vit_{s}_patch{p}_224": f"vit_{s[0]}_{p}" for s in ("base", "large") for p in (16, 32)}
TORCHVISION_VITS["vit_huge_patch14_224"] = "vit_h_14"


def digest(model: torch.nn.Module) -> str:
    """SHA-256 of the sorted lines `name shape`."""
    lines = sorted(f"{name} {tuple(value.shape)}\n" for name, value in model.state_dict().items())
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def main(path: str) -> None:
    """Write {format: {model: digest}}."""
    with torch.device("meta"):
        found = {
            "timm": {name: digest(timm.create_model(name, num_classes=1000)) for name in (*CNNS, *TIMM_CNNS, *VITS)},
            "torchvision": {
                name: digest(torchvision.models.get_model(theirs))
                for name, theirs in ({name: name for name in CNNS} | TORCHVISION_VITS).items()
            },
        }
    with open(path, "w") as file:
        json.dump(found, file, indent=1)
        file.write("\n")


if __name__ == "__main__":
    main(sys.argv[1])
