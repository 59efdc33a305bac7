"""The whole job, from the start of a process to a validated model: `jft finetune` against torch doing the same.

    python benchmarks/peer.py $JFT_ASSETS --torch-python TORCH/bin/python                     ViT-Ti, once: 2 minutes
    python benchmarks/peer.py $JFT_ASSETS --torch-python … --models vit_tiny_patch16_224 resnet18 resnet50 --repeat 5

Ants and bees, the backbone frozen, a fixed crop, 10 epochs, batch 32, Adam at 1e-3, validated after every epoch. The
torch job is the usual one: torchvision's ImageFolder and transforms, a DataLoader with workers, the frozen backbone in
evaluation mode under `no_grad`, run at every step. It reads the same weights, and the machine's cores are its threads.

For each repetition, which is also the seed, the jobs take turns: torch; jft with an empty cache (`cold`); jft with
decoded images and compiled programs in the cache, but no features (`warm`); jft with those too (`again`). Ratios are of
medians, torch's seconds to jft's; `cpu` is processor time. `--torch-python` is an interpreter that has torch,
torchvision and timm; without it the jft jobs run alone.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import harness

WEIGHTS = {
    "vit_tiny_patch16_224": "vit_tiny_patch16_224.safetensors",
    "resnet18": "resnet18_imagenet_ktb.pth",
    "resnet50": "resnet50_imagenet_ktb.safetensors",
}
VIT = ((0.5,) * 3, (0.5,) * 3, 248, "BICUBIC")  # mean, std, the shorter side before the crop, interpolation
RESNET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 256, "BILINEAR")
STATES = ("cold", "warm", "again")


def torch_job(assets: Path, folder: Path, name: str, epochs: int, seed: int, workers: int) -> dict[str, Any]:
    """The peer's job, in a process of its own; returns its accuracy."""
    torch = harness.import_torch(harness.cores())
    import timm
    import torchvision
    from torchvision import transforms

    torch.manual_seed(seed)
    mean, std, resized, interpolation = VIT if name.startswith("vit") else RESNET
    crop = transforms.Compose(
        [
            transforms.Resize(resized, interpolation=transforms.InterpolationMode[interpolation]),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
        ]
    )
    data = {s: torchvision.datasets.ImageFolder(folder / s, crop) for s in ("train", "val")}
    loaders = {
        s: torch.utils.data.DataLoader(
            d, batch_size=32, shuffle=s == "train", num_workers=workers, persistent_workers=workers > 0
        )
        for s, d in data.items()
    }
    classes = len(data["train"].classes)
    file = assets / "weights" / WEIGHTS[name]
    if name.startswith("vit"):
        model = timm.create_model(name, pretrained=False, checkpoint_path=str(file))
        width = model.head.in_features
        model.head = torch.nn.Identity()
    else:
        model = torchvision.models.get_model(name)
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            model.load_state_dict(load_file(file))
        else:
            model.load_state_dict(torch.load(file, weights_only=True))
        width = model.fc.in_features
        model.fc = torch.nn.Identity()
    model.eval().requires_grad_(False)
    head = torch.nn.Linear(width, classes)
    optimizer = torch.optim.Adam(head.parameters(), 1e-3)
    best = 0.0
    for _ in range(epochs):
        for x, y in loaders["train"]:
            with torch.no_grad():
                features = model(x)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(head(features), y).backward()
            optimizer.step()
        right = 0
        with torch.no_grad():
            for x, y in loaders["val"]:
                right += int((head(model(x)).argmax(1) == y).sum())
        best = max(best, right / len(data["val"]))
    return {"accuracy": best, "count": len(data["val"])}


def jft_job(given: argparse.Namespace, name: str, seed: int, cache: Path, workdir: Path) -> harness.Spent:
    """Our job, in a process of its own."""
    file, epochs = given.assets / "weights" / WEIGHTS[name], given.epochs
    command = [sys.executable, "-m", "jft.cli", "finetune", "--data", given.data, "--model", name, "--weights", file]
    command += ["--plan", "head", "--augment", "none", "--epochs", epochs, "--batch", 32, "--optimizer", "adam"]
    command += ["--lr", 1e-3, "--schedule", "constant", "--warmup", 0, "--seed", seed, "--display", "quiet"]
    return harness.run([*map(str, command), "--workdir", str(workdir)], JFT_CACHE=str(cache))


def main() -> None:
    """Run the jobs in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("assets", type=Path, help="the folder with weights and data/hymenoptera_data")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="train/ and val/ (default: the ants and bees)")
    parser.add_argument("--torch-python", metavar="PYTHON", help="an interpreter with torch, torchvision and timm")
    parser.add_argument("--models", nargs="+", choices=WEIGHTS, default=["vit_tiny_patch16_224"])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--repeat", type=int, default=1, metavar="N", help="(default: 1; 5 for figures to tell)")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="of torch's DataLoader (default: 2)")
    parser.add_argument("--json", metavar="FILE", help="write all that was measured")
    parser.add_argument("--job", nargs=2, metavar=("MODEL", "SEED"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    given.data = given.data or given.assets / "data/hymenoptera_data"
    if given.job:
        name, seed = given.job
        print(json.dumps(torch_job(given.assets, given.data, name, given.epochs, int(seed), given.workers)))
        return

    measured: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        cache, workdir = Path(folder) / "cache", Path(folder) / "run"
        for seed in range(given.repeat):
            for name in given.models:
                if given.torch_python:
                    args = [
                        __file__,
                        given.assets,
                        "--data",
                        given.data,
                        "--epochs",
                        given.epochs,
                        "--workers",
                        given.workers,
                    ]
                    spent = harness.run([given.torch_python, *map(str, args), "--job", name, str(seed)])
                    found = spent.last()
                    measured.append(_row(name, "torch", seed, spent, found["accuracy"]))
                shutil.rmtree(cache, ignore_errors=True)
                for state in STATES:
                    if state == "warm":
                        shutil.rmtree(cache / "features")
                    spent = jft_job(given, name, seed, cache, workdir)
                    result = json.loads((workdir / "result.json").read_text())
                    shutil.rmtree(workdir)
                    row = _row(name, state, seed, spent, result["val"]["accuracy"])
                    measured.append(row | {"phases": result["seconds"]})
    harness.report(
        summary(measured),
        given.json,
        given.torch_python,
        measured=measured,
        settings={k: str(v) for k, v in vars(given).items()},
    )


def _row(name: str, job: str, seed: int, spent: harness.Spent, accuracy: float) -> dict[str, Any]:
    row = {"model": name, "job": job, "seed": seed, "wall": spent.wall, "cpu": spent.cpu, "peak": spent.peak}
    print(f"{name} {job}: {spent.wall:.1f} s, {spent.cpu:.1f} s cpu, {accuracy:.1%}", file=sys.stderr, flush=True)
    return row | {"accuracy": accuracy}


def summary(measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line for each model and job: medians, accuracy over the seeds, and torch's time as a multiple of ours."""
    rows = []
    for name in dict.fromkeys(m["model"] for m in measured):
        of = {j: [m for m in measured if (m["model"], m["job"]) == (name, j)] for j in ("torch", *STATES)}
        for job, some in of.items():
            if not some:
                continue
            wall, cpu = (harness.median(m[k] for m in some) for k in ("wall", "cpu"))
            scores = [m["accuracy"] for m in some]
            spread = f" ({min(scores):.1%} to {max(scores):.1%})" if len(scores) > 1 else ""
            row = {"model": name, "job": job, "seconds": wall, "cpu seconds": cpu, "peak MB": some[0]["peak"]}
            row |= {"accuracy": f"{sum(scores) / len(scores):.1%}{spread}", "torch / this": "", "by cpu": ""}
            if of["torch"] and job != "torch":
                row["torch / this"] = f"{harness.median(m['wall'] for m in of['torch']) / wall:.2f}"
                row["by cpu"] = f"{harness.median(m['cpu'] for m in of['torch']) / cpu:.2f}"
            rows.append(row)
    return rows


if __name__ == "__main__":
    main()
