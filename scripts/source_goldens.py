"""Records what timm says of the pictures and the licence of the default weights, for tests/test_weights.py.

Needs timm, and a list of models: jft models --json | python scripts/source_goldens.py tests/goldens/sources.json
"""

import json
import sys

import goldens  # noqa: F401  declares what torchvision needs
import timm

KEYS = ("input_size", "crop_pct", "crop_mode", "interpolation", "mean", "std", "license")


def main(path: str) -> None:
    """Write {architecture.tag: what its configuration says}."""
    found = {}
    for row in json.load(sys.stdin):
        if (row["weights"] or "").startswith("hf:timm/"):
            name = row["weights"].removeprefix("hf:timm/")
            told = timm.get_pretrained_cfg(name, allow_unregistered=False).to_dict()
            found[name] = {key: told[key] for key in KEYS}
    with open(path, "w") as file:
        file.write("{\n" + ",\n".join(f'"{name}": {json.dumps(told)}' for name, told in found.items()) + "\n}\n")


if __name__ == "__main__":
    main(sys.argv[1])
