"""On one GPU: jft against timm with torch.compile, in turns on the same device; nothing has been measured with it yet.

    python benchmarks/gpu.py --torch-python TORCH/bin/python                     all but the job: 5 minutes
    python benchmarks/gpu.py --torch-python … --only job                          10 epochs on 3,680 JPEGs
    JAX_PLATFORMS=cpu python benchmarks/gpu.py --torch-python … --tiny --only vit resnet head idle job
                                                                                       the script itself, on a CPU

`vit`: a training step of everything of ViT-B/16 at 224, bf16 compute with float32 parameters, batch 256. `resnet`: of
ResNet-50, torch's channels-last. Images a second, the share of the device's peak that the model's own operations make
(MFU: three forward passes a step; `--peak` in TFLOP/s, default by the device's name), and peak memory. `head`: a step
of the head through the frozen ViT on resident data, against the forward pass alone. `idle`: the share of a run of steps
from resident data in which the device does nothing, from jax.profiler's trace. `job`: whole processes, `jft finetune`
against the usual torch script (timm's model, pretrained=False on both sides, torchvision's decoding and transforms in
workers, autocast, torch.compile), on 3,680 synthetic JPEGs of 500 × 375.

jft and torch hold their models in processes of their own, and of the device's memory each takes what it needs.
"""

import argparse
import gzip
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import harness

# Dense bf16 peak in TFLOP/s, as the maker tells it.
PEAKS = {"H200": 989.0, "H100 PCIe": 756.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "L4": 121.0, "T4": 65.0}
FULL = {"vit": ("vit_base_patch16_224", 224, 256), "resnet": ("resnet50", 224, 256)}  # model, side, batch
TINY = {"vit": ("vit_tiny_patch16_224", 32, 4), "resnet": ("resnet18", 32, 4)}
STEPS = 20  # dispatched before the clock is looked at


def jft_worker(name: str, size: int, batch: int) -> None:
    """Answers requests: steps of everything, steps of the head, forward passes, a trace of steps."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jft import optim
    from jft.data.prepare import make_prepare
    from jft.models import make_model
    from jft.preprocess import Preprocess
    from jft.step import State, make_eval_step, make_train_step, repeat, supervised

    model = make_model(name, num_classes=1000, image_size=size, dtype="bfloat16")
    rng = np.random.default_rng(0)
    shapes, stats = model.shapes()
    params = {n: jnp.asarray(0.02 * rng.standard_normal(s.shape), jnp.float32) for n, s in shapes.items()}
    batch_stats = {n: jnp.ones(s.shape, s.dtype) for n, s in stats.items()}
    prepare = make_prepare(Preprocess(size=(size, size)), (), train=True)
    resident = 4 * batch
    data = {
        "image": jnp.asarray(rng.integers(0, 256, (resident, size, size, 3)), jnp.uint8),
        "label": jnp.asarray(rng.integers(0, 1000, resident), jnp.int32),
    }
    index = rng.permuted(np.tile(np.arange(resident, dtype=np.int32), (STEPS, 1)), axis=1)[:, :batch]
    cpu = jax.default_backend() == "cpu"

    def trainer(names: list[str], parts: list[str], norms: list[str]) -> Any:
        optimizer = optim.make_optimizer("adamw", lambda step: 1e-4, dict.fromkeys(names, 1.0), weight_decay=0.05)
        objective = supervised(model, train_parts=parts, update_stats=norms, trainable=names)
        step = make_train_step(objective, optimizer, trainable=names, prepare=prepare)
        state = State(
            step=jnp.int32(0),
            params=jax.tree.map(jnp.copy, params),
            batch_stats=jax.tree.map(jnp.copy, batch_stats),
            opt_state=jax.jit(optimizer.init)({n: params[n] for n in names}),
            key=jax.random.key_data(jax.random.key(0)),
        )
        # As jft.train does: looped on the device, but not on a CPU, where gradients of convolutions are slow in a loop.
        compiled = jax.jit(repeat(step, loop=not cpu), donate_argnums=0)

        def run() -> None:
            nonlocal state
            for some in [index[i : i + 1] for i in range(STEPS)] if cpu else [index]:
                state, metrics = compiled(state, data, jnp.asarray(some), jnp.int32(len(some)))
            jax.block_until_ready((state, metrics))

        return run

    every, parts = sorted(params), list(model.parts)
    heads = [n for n in every if n.startswith("head/")]
    forward = make_eval_step(model, prepare=prepare)

    @jax.jit
    def forwards(params: Any, stats: Any, data: Any, index: Any) -> Any:
        def one(total: Any, some: Any) -> tuple[Any, None]:
            batch = {n: v[some] for n, v in data.items()}
            return total + forward(params, stats, batch | {"index": some}).sum(), None

        return jax.lax.scan(one, jnp.float32(0), index)[0]

    made: dict[str, Any] = {"forward": lambda: jax.block_until_ready(forwards(params, batch_stats, data, index))}

    def work(what: str) -> Any:
        if what not in made:
            made[what] = trainer(every, parts, parts) if what == "full" else trainer(heads, ["head"], [])
        return made[what]

    def answer(what: str) -> dict[str, Any]:
        if what == "about":
            return {"device": jax.devices()[0].device_kind, "flops": model.flops()}
        if what == "idle":
            work("full")()
            with tempfile.TemporaryDirectory() as folder:
                with jax.profiler.trace(folder, create_perfetto_trace=True):
                    work("full")()
                return {"idle": idle(Path(folder))}
        memory = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0) / 1e9
        return harness.timed(work(what)) | {"images": STEPS * batch, "memory": memory}

    harness.serve(answer)


def idle(folder: Path) -> float | None:
    """Of a profiler's trace the share of time, from a device's first kernel to its last, in which none runs.

    None where the trace has no device, as on a CPU.
    """
    file = next(folder.rglob("perfetto_trace.json.gz"))
    with gzip.open(file, "rt") as text:
        events = json.load(text)
    events = events["traceEvents"] if isinstance(events, dict) else events
    names = {e["pid"]: e["args"]["name"] for e in events if e.get("name") == "process_name"}
    devices = {pid for pid, name in names.items() if "GPU" in name or "TPU" in name}
    busy = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e.get("ph") == "X" and e["pid"] in devices)
    if not busy:
        return None
    covered, end = 0.0, busy[0][0]
    for start, stop in busy:
        covered += max(stop - max(start, end), 0.0)
        end = max(end, stop)
    return 1 - covered / (end - busy[0][0])


def torch_worker(name: str, size: int, batch: int, compiled: bool) -> None:
    """Answers requests for steps of everything of timm's model, under autocast to bf16."""
    torch = harness.import_torch()
    import timm

    device = "cuda" if torch.cuda.is_available() else "cpu"
    options = {"img_size": size} if name.startswith("vit") else {}
    model = timm.create_model(name, pretrained=False, num_classes=1000, **options).to(device).train()
    layout = torch.contiguous_format if name.startswith("vit") else torch.channels_last
    model = model.to(memory_format=layout)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, weight_decay=0.05, fused=device == "cuda")
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    called = torch.compile(model) if compiled else model
    x = torch.randn(batch, 3, size, size, device=device).to(memory_format=layout)
    y = torch.randint(0, 1000, (batch,), device=device)

    def run() -> None:
        for _ in range(STEPS):
            optimizer.zero_grad()
            with torch.autocast(device, torch.bfloat16):
                loss = torch.nn.functional.cross_entropy(called(x), y)
            loss.backward()
            optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    def answer(what: str) -> dict[str, Any]:
        told = harness.timed(run)
        return told | {
            "images": STEPS * batch,
            "memory": torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else 0,
        }

    harness.serve(answer)


def torch_job(folder: str, name: str, size: int, batch: int, epochs: int, compiled: bool) -> dict[str, Any]:
    """The whole job as it is usually written for torch; its accuracy on the validation images."""
    torch = harness.import_torch()
    import timm
    import torchvision
    from torchvision import transforms

    device = "cuda" if torch.cuda.is_available() else "cpu"
    last = [transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.5,) * 3)]
    resize = [transforms.Resize(round(size / 0.9), transforms.InterpolationMode.BICUBIC)]
    steps = {
        "train": [*resize, transforms.RandomCrop(size), transforms.RandomHorizontalFlip(), *last],
        "val": [*resize, transforms.CenterCrop(size), *last],
    }
    workers = min(harness.cores(), 16)
    loaders = {
        split: torch.utils.data.DataLoader(
            torchvision.datasets.ImageFolder(f"{folder}/{split}", transforms.Compose(how)),
            batch_size=batch,
            shuffle=split == "train",
            drop_last=split == "train",
            num_workers=workers,
            pin_memory=device == "cuda",
            persistent_workers=True,
        )
        for split, how in steps.items()
    }
    options = {"img_size": size} if name.startswith("vit") else {}
    model = timm.create_model(name, pretrained=False, num_classes=2, **options).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, weight_decay=0.05, fused=device == "cuda")
    total = epochs * len(loaders["train"])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-4, max(total, 1), pct_start=0.1)
    torch.set_float32_matmul_precision("high")
    called = torch.compile(model) if compiled else model
    accuracy = 0.0
    for _ in range(epochs):
        model.train()
        for x, y in loaders["train"]:
            x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
            optimizer.zero_grad()
            with torch.autocast(device, torch.bfloat16):
                loss = torch.nn.functional.cross_entropy(called(x), y)
            loss.backward()
            optimizer.step()
            schedule.step()
        model.eval()
        right, count = 0, 0
        with torch.no_grad(), torch.autocast(device, torch.bfloat16):
            for x, y in loaders["val"]:
                right += int((called(x.to(device)).argmax(1).cpu() == y).sum())
                count += len(y)
        accuracy = right / count
    return {"accuracy": accuracy}


def job(given: argparse.Namespace, name: str, size: int, batch: int, folder: Path) -> list[dict[str, Any]]:
    """The whole job of both, in turns, each from an empty cache."""
    from growth import write_images

    count, epochs = (40, 1) if given.tiny else (3680, 10)
    write_images(folder / "data", count, (64, 48) if given.tiny else (500, 375))
    batch, data = min(batch, 8 if given.tiny else 64), str(folder / "data")
    told: dict[str, list[harness.Spent]] = {}
    for turn in range(given.repeat):
        cache, workdir = folder / f"cache{turn}", folder / f"run{turn}"
        command = [sys.executable, "-m", "jft.cli", "finetune", "--data", data, "--model", name, "--weights", "none"]
        command += ["--plan", "flat", "--epochs", epochs, "--batch", batch, "--lr", 1e-4, "--weight-decay", 0.05]
        command += ["--augment", "crop", "flip", "--image-size", size, "--dtype", "bfloat16"]
        command += ["--display", "quiet", "--workdir", workdir]
        told.setdefault("jft", []).append(harness.run([*map(str, command)], JFT_CACHE=str(cache)))
        shutil.rmtree(cache)
        if given.torch_python:
            args = [data, name, size, batch, epochs, not given.tiny]
            spent = harness.run([given.torch_python, __file__, "--job", json.dumps(args)])
            told.setdefault("torch", []).append(spent)
    rows: list[dict[str, Any]] = []
    for who, some in told.items():
        wall, cpu = (harness.median(getattr(s, k) for s in some) for k in ("wall", "cpu"))
        rows.append({"what": "job", "who": who, "seconds": wall, "cpu seconds": cpu, "torch / this": ""})
        if who == "jft" and "torch" in told:
            rows[0]["torch / this"] = f"{harness.median(s.wall for s in told['torch']) / wall:.2f}"
    return rows


def throughput(given: argparse.Namespace, what: str, name: str, size: int, batch: int) -> list[dict[str, Any]]:
    """Steps of everything in turns; with `head` and `idle`, jft's alone."""
    args = [name, str(size), str(batch)]
    workers = {"jft": harness.Worker(sys.executable, __file__, "--worker", "jft", *args)}
    if given.torch_python:
        compiled = [] if given.tiny else ["--compile"]
        workers["torch"] = harness.Worker(given.torch_python, __file__, "--worker", "torch", *args, *compiled)
    about = workers["jft"].ask(what="about")
    peak = given.peak or next((v for k, v in PEAKS.items() if k in about["device"]), None)
    asked = [(who, "full") for who in workers if what in given.only]
    if what == "vit" and "head" in given.only:
        asked += [("jft", "head"), ("jft", "forward")]
    told: dict[tuple[str, str], list[dict[str, Any]]] = {key: [] for key in asked}
    for turn in range(given.repeat + 1):
        for who, work in asked:
            found = workers[who].ask(what=work)
            if turn:  # the first compiles
                told[who, work].append(found)
    rows = []
    for (who, work), some in told.items():
        rate = harness.median(s["images"] / s["wall"] for s in some)
        flops = about["flops"] * {"full": 3, "head": 1, "forward": 1}[work] * rate / 1e12
        rows.append(
            {
                "what": f"{name} {work}",
                "who": who,
                "images / s": rate,
                "TFLOP/s": flops,
                "MFU": f"{flops / peak:.1%}" if peak else "",
                "peak GB": some[-1]["memory"],
                "host cpu s / step": harness.median(s["cpu"] for s in some) / STEPS,
            }
        )
    if what == "vit" and "idle" in given.only:
        share = workers["jft"].ask(what="idle")["idle"]
        print(f"{name}: device idle {'unknown: no device in the trace' if share is None else format(share, '.2%')}\n")
    for worker in workers.values():
        worker.close()
    return rows


def main() -> None:
    """Measure what is asked for and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch-python", metavar="PYTHON", help="an interpreter with torch, torchvision and timm")
    known = ("vit", "resnet", "head", "idle", "job")
    parser.add_argument("--only", nargs="+", choices=known, default=["vit", "resnet", "head", "idle"])
    parser.add_argument("--repeat", type=int, default=5, metavar="N", help="turns of 20 steps (default: 5)")
    parser.add_argument("--peak", type=float, metavar="X", help="of the device in bf16, TFLOP/s")
    parser.add_argument(
        "--tiny", action="store_true", help="small models on small pictures, to try the script on a CPU"
    )
    parser.add_argument("--json", metavar="FILE", help="write all that was measured")
    parser.add_argument("--compile", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    given = parser.parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if given.worker:
        who, name, size, batch = given.worker
        if who == "jft":
            jft_worker(name, int(size), int(batch))
        else:
            torch_worker(name, int(size), int(batch), given.compile)
        return
    if given.job:
        print(json.dumps(torch_job(*json.loads(given.job))))
        return
    begun, settings = time.time(), TINY if given.tiny else FULL
    rows: list[dict[str, Any]] = []
    for what in ("vit", "resnet"):
        if what in given.only or (what == "vit" and {"head", "idle"} & {*given.only}):
            rows += throughput(given, what, *settings[what])
    harness.report(rows, None, given.torch_python)
    jobs: list[dict[str, Any]] = []
    if "job" in given.only:
        with tempfile.TemporaryDirectory() as folder:
            jobs = job(given, *settings["vit"], Path(folder))
        print(harness.table(jobs))
    if given.json:
        found = {"about": harness.about(given.torch_python), "rows": rows, "jobs": jobs, "begun": begun}
        Path(given.json).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
