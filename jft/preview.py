"""What a plan will train, and what a step of it costs, from shapes and compiled code; nothing is trained or read."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jft import features, optim, plan, shard, tree
from jft.build import (
    Leg,
    check,
    choose_loss,
    convolves,
    lay_out,
    make_leg_optimizer,
    make_leg_step,
    model_of,
    needs_source,
    read_data,
    resolve,
    source_shapes,
    summarise,
    usual_pieces,
)
from jft.config import Config, describe
from jft.data.prepare import work_size
from jft.data.sources import Splits
from jft.hyper import settle
from jft.models.base import Model
from jft.preprocess import Preprocess
from jft.step import State, make_eval_step
from jft.weights import default_preprocess
from jft.words import name_of


def preview(config: Config, compile: bool = True) -> dict[str, Any]:
    """For each stage: what trains at which rate, parameters, optimizer bytes, FLOPs and memory of a step, BatchNorms.

    FLOPs and memory are the compiler's own counts for the step it compiled, on the device at hand, the memory with the
    batch in the pieces that a run takes; without `compile` they are left out. Raises UserError for whatever the run
    itself would refuse of data and plan.
    """
    config = config.replace(sharding="replicate")
    splits = read_data(config)
    notes: list[str] = []
    config = settle(config, splits, notes.append)
    model = model_of(config, len(splits.classes))
    preprocess = replace(default_preprocess(model)[0], **config.preprocess)
    params, stats = model.shapes()
    stages = resolve(config, model, params)
    check(config, model, stages, splits)
    legs = lay_out(config, stages, model, len(splits.train))
    forward = _cost(_forward(config, model, params, stats)) if compile else {}
    return {
        "notes": notes,
        "model": model.name,
        "image_size": list(model.input_shape[:2]),
        "params": _count(params, params),
        "params_bytes": 4 * _count(params, params),
        "classes": len(splits.classes),
        "labels": "quantities" if splits.train.quantities else "labels" if splits.train.several else "classes",
        "train_images": len(splits.train),
        "batch": config.batch,
        "forward": forward,
        "stages": [_stage(config, model, preprocess, splits, leg, params, stats, compile) for leg in legs],
    }


def _stage(
    config: Config,
    model: Model,
    preprocess: Preprocess,
    splits: Splits,
    leg: Leg,
    params: dict[str, Any],
    stats: dict[str, Any],
    compile: bool,
) -> dict[str, Any]:
    optimizer, _ = make_leg_optimizer(config, leg)
    trainable, _ = tree.split(params, leg.trainable)
    norms = plan.parts_with(stats, model.parts)
    rates: dict[float, list[str]] = {}
    for name in sorted(leg.trainable):
        rates.setdefault(leg.multipliers[name] * (leg.stage.lr or 0.0), []).append(name)
    cached = bool(leg.cut and config.features != "none" and (config.views or not leg.augment))
    kept = len(splits.train) * ((config.views or 1) if leg.augment else 1)
    told: dict[str, Any] = {
        "name": leg.stage.name,
        "epochs": leg.stage.epochs,
        "steps": leg.last - leg.first,
        "trains": summarise(leg.train_parts),
        "groups": [
            {"lr": lr, "params": _count(params, names), "names": names}
            for lr, names in sorted(rates.items(), reverse=True)
        ],
        "trainable_params": _count(params, leg.trainable),
        "optimizer": describe(config.optimizer),
        "weight_decay": config.weight_decay,
        "schedule": describe(leg.stage.schedule or config.schedule or optim.usual_schedule(config.optimizer)),
        "warmup": config.warmup if leg.stage.warmup is None else leg.stage.warmup,
        "optimizer_bytes": optim.state_bytes(optimizer, trainable),
        "batch_norm": {
            "batch statistics": summarise(leg.update_stats),
            "running statistics": summarise([p for p in norms if p not in leg.update_stats]),
        },
        "augment": list(leg.augment),
        "features_at": leg.cut if cached else None,
        "features_bytes": features.nbytes(model, leg.cut, kept, config.features_dtype) if leg.cut and cached else 0,
    }
    if compile:
        pieces = config.accumulate or usual_pieces(config, model, leg, params)
        for name, start in {"step": None, **({"step_from_features": leg.cut} if cached else {})}.items():
            given = (config, model, preprocess, splits, leg, optimizer, params, stats, start)
            told[name] = _cost(_step(*given))
            if pieces > 1:  # of a loop the compiler counts one turn
                told[name] = _cost(_step(*given, pieces)) | {"pieces": pieces, "flops": told[name]["flops"]}
    return told


def _count(params: dict[str, Any], names: Sequence[str] | Any) -> int:
    return sum(int(np.prod(params[n].shape)) for n in names)


def _images(config: Config, size: Sequence[int], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((config.batch, *size, 3), dtype)


def _forward(config: Config, model: Model, params: Any, stats: Any) -> Any:
    batch = {model.input: _images(config, model.input_shape[:2], jnp.float32)}
    return jax.jit(make_eval_step(model)).lower(params, stats, batch)


def _step(
    config: Config,
    model: Model,
    preprocess: Preprocess,
    splits: Splits,
    leg: Leg,
    optimizer: Any,
    params: Any,
    stats: Any,
    start: str | None,
    pieces: int = 1,
) -> Any:
    state = State(
        step=jax.ShapeDtypeStruct((), jnp.int32),
        params=params,
        batch_stats=stats,
        opt_state=jax.eval_shape(optimizer.init, tree.split(params, leg.trainable)[0]),
        key=jax.ShapeDtypeStruct((2,), jnp.uint32),
        source=source_shapes(config, params | stats, [n for n in params if n.startswith("head/")])
        if needs_source(config)
        else {},
    )
    labels = splits.train.labels
    batch = {
        "label": jax.ShapeDtypeStruct(
            (config.batch, *labels.shape[1:]), jnp.float32 if labels.ndim == 2 else labels.dtype
        ),
        "index": jax.ShapeDtypeStruct((config.batch,), jnp.int32),
    }
    if start:
        x = _images(config, model.input_shape[:2], jnp.float32)
        shape = jax.eval_shape(lambda p, s, x: model.apply(p, s, x, stop=start)[0], params, stats, x)
        batch["features"] = jax.ShapeDtypeStruct(shape.shape, jnp.float32)
    else:
        batch["image"] = _images(config, work_size(preprocess, leg.augment), jnp.uint8)
    unroll = jax.default_backend() == "cpu" and convolves(model, leg.cut, params)
    step = make_leg_step(config, model, leg, preprocess, choose_loss(config, splits.train), start, pieces, unroll)
    return jax.jit(step, donate_argnums=0).lower(state, batch)


def _cost(lowered: Any) -> dict[str, float]:
    """FLOPs, and bytes of temporary memory, of the compiled program."""
    # Neither changes with what LLVM does to a CPU's program afterwards, which is half of the time of compiling it.
    quick = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else {}
    compiled = lowered.compile(compiler_options=quick | shard.compiler_options())
    cost = compiled.cost_analysis()
    memory = compiled.memory_analysis()
    found = {"flops": float((cost or {}).get("flops", float("nan")))}
    if memory is not None:
        found["temporary_bytes"] = int(memory.temp_size_in_bytes)
    return found


def text(name: str, told: dict[str, Any], names: bool = False) -> str:
    """A preview for people; with `names`, every parameter that trains."""
    forward = told["forward"].get("flops")
    lines = [*([name] if name else []), *told["notes"]]
    lines.append(
        f"{told['model']}: {told['params']:,} parameters ({_bytes(told['params_bytes'])}), "
        f"{_many(told['classes'], told['labels'])}, {_many(told['train_images'], 'training images')} at "
        f"{'×'.join(map(str, told['image_size']))} pixels, batch {told['batch']}"
        + (f", forward pass {_flops(forward)}" if forward else "")
    )
    for i, stage in enumerate(told["stages"], 1):
        total, share = len(told["stages"]), stage["trainable_params"] / told["params"]
        long = f"{_many(stage['epochs'], 'epochs', '.3g')}, {_many(stage['steps'], 'steps', '')}"
        lines.append(f"\nstage {i} of {total}: {stage['name']}, {long}")
        trains = ", ".join(stage["trains"])
        lines.append(f"  trains        {trains}: {_many(stage['trainable_params'], 'parameters')} ({share:.1%})")
        for group in stage["groups"]:
            arrays = f"{_many(group['params'], 'parameters')} in {_many(len(group['names']), 'arrays')}"
            lines.append(f"  learning rate {group['lr']:.3g}: {arrays}")
            if names:
                lines += [f"    {n}" for n in group["names"]]
        # one-cycle has a rise of its own
        rise = f", warm-up {stage['warmup']:.3g} of the steps" if name_of(stage["schedule"]) != "one-cycle" else ""
        how = f"{stage['optimizer']}, weight decay {stage['weight_decay']:.3g}, {stage['schedule']}{rise}"
        lines.append(f"  optimizer     {how}; {_bytes(stage['optimizer_bytes'])} of state")
        modes = [f"{mode} in {', '.join(parts)}" for mode, parts in stage["batch_norm"].items() if parts]
        if modes:
            lines.append(f"  BatchNorm     {'; '.join(modes)}")
        lines.append(f"  augmentation  {', '.join(stage['augment']) or 'none'}")
        if "step" in stage:
            flops, memory = stage["step"]["flops"], stage["step"].get("temporary_bytes", 0)
            ratio = f", {flops / forward:.2f} × the forward pass" if forward else ""
            pieces = f", in {stage['step']['pieces']} pieces" if "pieces" in stage["step"] else ""
            lines.append(f"  a step        {_flops(flops)}{ratio}, {_bytes(memory)} of temporaries{pieces}")
        if stage["features_at"]:
            kept = f"the parts before {stage['features_at']} run once: {_bytes(stage['features_bytes'])} kept"
            after = f"; then a step is {_flops(stage['step_from_features']['flops'])}" if "step" in stage else ""
            lines.append(f"  features      {kept}{after}")
    return "\n".join(lines)


def _many(n: float, what: str, how: str = ",") -> str:
    """`1 epoch`, `2 epochs`, `1 quantity`, `1 class`: of a word in the plural."""
    one = {"quantities": "quantity", "classes": "class"}.get(what, what.removesuffix("s"))
    return f"{n:{how}} {one if n == 1 else what}"


def _bytes(n: float) -> str:
    return _scaled(n, ("B", "kB", "MB", "GB", "TB"))


def _flops(n: float) -> str:
    return _scaled(n, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP"))


def _scaled(n: float, units: Sequence[str]) -> str:
    for unit in units[:-1]:
        if n < 1000:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.3g} {units[-1]}"
