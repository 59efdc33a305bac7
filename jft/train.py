"""The loop: one call from a config to a fine-tuned model in a folder. It reads in the order in which things happen."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jft import bundle, features, losses, metrics, optim, plan, shard, tree, weights
from jft.build import (
    Leg,
    Split,
    build,
    check,
    choose_loss,
    lay_out,
    load_images,
    make_leg_optimizer,
    make_leg_step,
    memory_budget,
    options_of,
    read_data,
    summarise,
)
from jft.checkpoint import Checkpoints
from jft.config import PLACE, Config, describe, load_object, write_json
from jft.data import order, pipeline, sources
from jft.data.cache import cache_dir
from jft.data.prepare import make_prepare
from jft.errors import UserError
from jft.hyper import settle
from jft.lora import LoraModel, write_adapter
from jft.models.base import Model
from jft.plan import Stage
from jft.report import track
from jft.report.card import model_card
from jft.report.live import make_display
from jft.run import Clock, Result, data_path, default_workdir, enter, fingerprint, versions
from jft.step import State, make_eval_step, repeat
from jft.use import evaluate_dataset, fit_temperature, probabilities, row

MAX_STEPS_PER_DISPATCH = 256
MAX_SKIPPED = 10  # steps in a row with gradients that are not finite, after which a run ends
DISPATCH_SECONDS = 0.5  # how long the host lets go of a run, so that Ctrl-C and the display stay prompt


class Interrupted(Exception):
    """The run was asked to stop; it has saved, and the same command goes on from there."""


def train(
    config: Config,
    *,
    watch: Callable[[dict[str, Any]], Any] | None = None,
    shared: features.Shared | None = None,
) -> Result:
    """Fine-tune as the config says; resumes an interrupted run of the same config, and leaves a finished one alone.

    `watch` is told of every validation: its line in the log, `done`, the share of the run's steps, and `final`, whether
    it is in the last stage. What it raises ends the run where it is. `shared` keeps features from one run to the next.
    Raises UserError for whatever a user can mend, Interrupted when SIGINT or SIGTERM stopped the run (it has saved).
    """
    clock = Clock()
    if config.deterministic and "--xla_gpu_deterministic_ops" not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_deterministic_ops=true"
    compile_cache()
    display = make_display(config.display)
    with contextlib.closing(display):
        with clock("data"):
            splits = read_data(config)
            config = settle(config, splits, display.note)
        for name, reason in splits.excluded:
            display.warn(f"left out: {name}: {reason}")
        with clock("import"):
            model, params, batch_stats, loaded = build(config, splits.classes)
        display.note(str(loaded.receipt))
        stages = plan.resolve(
            config.plan,
            list(params),
            list(model.parts),
            epochs=config.epochs,
            lr=config.lr,
            layer_decay=config.layer_decay,
        )
        check(config, model, stages, splits)
        track.check(config.track, load_object)
        workdir = Path(config.workdir or default_workdir(config))
        what = {
            "config": {k: v for k, v in describe(config).items() if k not in PLACE},
            "data": data_path(config),
            "stages": describe(stages),
            "preprocess": describe(loaded.preprocess),
            "classes": list(splits.classes),
            "weights": str(loaded.path),
            "weights_sha256": loaded.sha256,
            "data_sha256": fingerprint(splits),
            "versions": versions(),
        }
        if finished := enter(workdir, what, display.note):
            display.note(f"{workdir} holds this run, finished. Nothing to do; remove the folder to run it again.")
            return Result(workdir, finished)
        with clock("data"):
            data, left_out = load_images(config, splits, stages, loaded.preprocess, display)
        run = Run(config, workdir, model, loaded, params, batch_stats, stages, data, clock, display)
        run.watch, run.shared = watch, shared
        with contextlib.closing(run), interruptible() as asked_to_stop:
            run.restore()
            run.log.trackers = track.open_trackers(config.track, workdir, what, run.step, load_object, display.warn)
            for leg in run.legs[run.ended :]:
                run.train(leg, asked_to_stop)
            result = Result(workdir, run.finish(splits, [*splits.excluded, *left_out]))
            if asked_to_stop():  # too late for this run, but not for those that a comparison has still to make
                raise Interrupted(f"Stopped. The run in {workdir} was at its end, and is finished.")
            return result


def compile_cache() -> None:
    """Compiled programs outlive the process: the next seed, a resumed run and a repeated one find them."""
    jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Within it SIGINT and SIGTERM ask for a stop, told by the function it gives; a second SIGINT stops at once."""
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return

    def ask(signum: int, frame: Any) -> None:
        if asked and signum == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(signum)

    old = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for s, handler in old.items():
            signal.signal(s, handler)


@dataclass
class Best:
    """The state that validated best so far: what of it differs from the source, and what it said of each image."""

    step: int
    leg: int
    accuracy: float
    loss: float
    params: dict[str, Any]
    batch_stats: dict[str, Any]
    logits: Any

    def position(self) -> dict[str, Any]:
        return {"step": self.step, "leg": self.leg, "accuracy": self.accuracy, "loss": self.loss}

    def arrays(self) -> dict[str, Any]:
        return {"params": self.params, "batch_stats": self.batch_stats, "logits": self.logits}


def distances(
    params: Mapping[str, Any], source: Mapping[str, Any], names: Sequence[str], model: Model
) -> dict[str, float]:
    """How far the weights of each part have come from the source: ‖w − w_s‖ over its parameters of these names."""
    squares = _squares({n: params[n] for n in names}, {n: source[n] for n in names})
    total: dict[str, float] = {}
    for name in names:
        part = plan.part_of(name, model.parts)
        total[part] = total.get(part, 0.0) + float(squares[name])
    return {part: total[part] ** 0.5 for part in model.parts if part in total}


@jax.jit
def _squares(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    return {n: jnp.sum(jnp.square(a[n] - b[n])) for n in a}


@dataclass
class Patience:
    """The best validation of a stage, and how many in a row have not been better."""

    score: tuple[float, float] | None = None  # accuracy, − loss
    stale: int = 0

    def see(self, *score: float) -> None:
        """Count a validation."""
        better = self.score is None or score > tuple(self.score)
        self.score, self.stale = (score, 0) if better else (self.score, self.stale + 1)  # type: ignore[assignment]

    def position(self) -> list[Any]:
        return [self.score, self.stale]

    @classmethod
    def at(cls, score: Sequence[float] | None, stale: int) -> "Patience":
        """From a `position`, which has been JSON."""
        return cls((score[0], score[1]) if score else None, stale)


class Run:
    """A run under way: the state on the devices, the best state so far, and the records of both."""

    def __init__(
        self,
        config: Config,
        workdir: Path,
        model: Model,
        loaded: weights.Loaded,
        params: dict[str, Any],
        batch_stats: dict[str, Any],
        stages: Sequence[Stage],
        data: Mapping[str, Split],
        clock: Clock,
        display: Any,
    ):
        self.config, self.workdir, self.model, self.loaded = config, workdir, model, loaded
        self.data, self.clock, self.display = data, clock, display
        self.mesh = shard.make_mesh()
        self.preprocess = loaded.preprocess
        self.source = {n: v for n, v in (params | batch_stats).items() if n not in loaded.missing}
        self.initial, self.initial_stats = params, batch_stats
        self.legs = lay_out(config, stages, model, len(data["train"].labels))
        self.loss = choose_loss(config, data["train"].labels)
        self.eval_loss = jax.jit(self.loss)
        self.eval_steps: dict[Any, Any] = {}  # compiled, by the span they run
        self.features: dict[tuple[str, str], jax.Array] = {}  # by split and cut; of the leg under way
        self.shared: features.Shared | None = None  # features of all the runs of a comparison or a sweep
        self.watch: Callable[[dict[str, Any]], Any] | None = None  # told of every validation
        self.step = 0
        self.leg = -1  # the number of the leg that the state is of
        self.ended = 0  # how many legs have
        self.state: State | None = None  # distributed over the mesh; None before the first leg
        self.best: Best | None = None
        self.logits: np.ndarray | None = None  # of the last validation
        self.records: list[dict[str, Any]] = []  # what result.json says of the stages that are done
        self.leg_seconds = 0.0  # of the leg under way, in sessions before this one
        self.patience = Patience()  # of the leg under way
        self.skipped = 0  # steps in a row that were not applied
        self.saved_at = time.monotonic()
        self.log = track.Mirror(workdir / "metrics.jsonl")
        self.checkpoints = Checkpoints(workdir / "checkpoints", display.warn)

    def close(self) -> None:
        self.checkpoints.close()
        self.log.close()

    # -- where the state comes from ---------------------------------------------------------------------------------

    def restore(self) -> None:
        """Go to the newest checkpoint that is whole, or to the beginning."""
        for step, position in self.checkpoints.positions():
            leg = self.legs[position["leg"]]
            like = {"state": self._changed(self._fresh(leg, self.initial, self.initial_stats), leg.number)}
            if position["best"]:
                names, stats = self._touched(position["best"]["leg"])
                shape = (len(self.data["val"].labels), self.model.num_classes)
                like["best"] = {
                    "params": tree.split(self.initial, names)[0],
                    "batch_stats": tree.split(self.initial_stats, stats)[0],
                    "logits": np.empty(shape, np.float32),
                }
            found = self.checkpoints.restore(step, like, position["sums"])
            if found is None:
                continue
            saved = found["state"]
            state = State(
                step=saved["step"],
                params=dict(sorted((self.initial | saved["params"]).items())),
                batch_stats=dict(sorted((self.initial_stats | saved["batch_stats"]).items())),
                opt_state=saved["opt_state"],
                key=saved["key"],
                ema=saved["ema"],
            )
            self.state = shard.distribute(state, self.mesh, self.config.sharding)
            self.step, self.leg, self.ended = step, position["leg"], position["ended"]
            self.patience, self.skipped = Patience.at(*position["patience"]), position["skipped"]
            if position["best"]:
                self.best = Best(**position["best"], **found["best"])
            self.records, self.leg_seconds = position["records"], position["leg_seconds"]
            self.logits = found["best"]["logits"] if position["best"] else None
            self.clock.before, self.clock.by_phase = position["seconds"], dict(position["by_phase"])
            self.display.note(f"Resumed after step {step} of {self.legs[-1].last}.")
            break
        self.log.truncate(self.step)

    def _fresh(
        self, leg: Leg, params: Mapping[str, Any], batch_stats: Mapping[str, Any], before: State | None = None
    ) -> State:
        """The state at a leg's first step, with what the config carries over from the leg before."""
        optimizer, _ = make_leg_optimizer(self.config, leg)
        opt_state = jax.jit(optimizer.init)(tree.split(params, leg.trainable)[0])
        if before and self.config.carry:
            opt_state = optim.carry(opt_state, before.opt_state)
        names, stats = self._touched(leg.number) if self.config.ema else ((), ())
        averaged = tree.split(params, names)[0] | tree.split(batch_stats, stats)[0]
        return State(
            step=jnp.asarray(leg.first, jnp.int32),
            params=dict(params),
            batch_stats=dict(batch_stats),
            opt_state=opt_state,
            key=jax.random.key_data(jax.random.key(self.config.seed)),
            ema=averaged | (before.ema if before else {}),
        )

    def _touched(self, leg: int) -> tuple[set[str], set[str]]:
        """The names of parameters and of batch statistics that training has changed by the end of this leg."""
        legs = self.legs[: leg + 1]
        parts = {part for leg in legs for part in leg.update_stats}
        stats = {n for n in self.initial_stats if any(n.startswith(p + "/") for p in parts)}
        return {n for leg in legs for n in leg.trainable}, stats

    def _changed(self, state: State, leg: int) -> dict[str, Any]:
        """What of a state a checkpoint must hold: the rest is in the weight file, whose hash config.json has."""
        names, stats = self._touched(leg)
        return {
            "step": state.step,
            "params": tree.split(state.params, names)[0],
            "batch_stats": tree.split(state.batch_stats, stats)[0],
            "opt_state": state.opt_state,
            "key": state.key,
            "ema": state.ema,
        }

    def _collected(self) -> State:
        assert self.state is not None
        return shard.collect(self.state, self.config.sharding)

    def _save(self, leg: Leg, seconds: float) -> None:
        """Hand the state and the position to Orbax, which writes them in the background."""
        arrays = {"state": self._changed(self._collected(), leg.number)}
        if self.best:
            arrays["best"] = self.best.arrays()
        position = {
            "leg": leg.number,
            "ended": self.ended,
            "patience": self.patience.position(),
            "skipped": self.skipped,
            "best": self.best.position() if self.best else None,
            "records": self.records,
            "leg_seconds": seconds,
            "seconds": self.clock.total,
            "by_phase": self.clock.by_phase,
        }
        self.checkpoints.save(self.step, arrays, position)
        self.saved_at = time.monotonic()

    # -- training ---------------------------------------------------------------------------------------------------

    def train(self, leg: Leg, asked_to_stop: Callable[[], bool]) -> None:
        """Train one stage from wherever it stands to its end, validating, logging and saving on the way."""
        begun = time.perf_counter()
        if self.leg != leg.number:
            self.begin(leg)
        self.display.stage(leg.number + 1, len(self.legs), leg.stage.name, self._describe(leg), leg.last)
        self.log.rates = track.rates(leg.multipliers, {n: plan.part_of(n, self.model.parts) for n in leg.trainable})
        dispatch, schedule = self.compile(leg)

        per_epoch = len(self.data["train"].labels) / self.config.batch
        every = max(1.0, self.config.eval_every * per_epoch)
        validations = {leg.first + round(i * every) for i in range(1, int((leg.last - leg.first) / every) + 1)}
        validations |= {leg.last}
        log_every = int(min(max(per_epoch // 10, 1), 50))
        since_log: list[dict[str, float]] = []
        while self.ended == leg.number:
            begin, clocked = self.step, time.perf_counter()
            with self.clock("train"):
                new = dispatch(min(s for s in validations if s > begin))
            rate = len(new) * self.config.batch / (time.perf_counter() - clocked)
            for step, values in enumerate(new, begin + 1):
                self._watch(leg, step, values.pop("skipped"))
                since_log.append(values)
                if (step - leg.first) % log_every == 0 or step in validations:
                    mean = {name: float(np.mean([m[name] for m in since_log])) for name in values}
                    lr = float(schedule(step - 1 - leg.first))
                    self.log.write({"step": step, "stage": leg.stage.name, "epoch": step / per_epoch, "lr": lr, **mean})
                    since_log = []
            self.step = begin + len(new)
            self.display.step(self.step, self.legs[-1].last, new[-1], rate)
            if self.step in validations:
                self._validate(leg)
            given_up = self.config.patience is not None and self.patience.stale >= self.config.patience
            seconds = self.leg_seconds + time.perf_counter() - begun
            ended, stop = self.step == leg.last or given_up, asked_to_stop()
            if ended:
                if given_up and self.step < leg.last:
                    self.display.note(f"No better validation in {self.patience.stale}: the stage ends.")
                self.ended += 1
                self.records.append(self._record(leg, seconds))
            due = time.monotonic() - self.saved_at > self.config.checkpoint_every
            # Between two lines of the log nothing is saved: a resumed run could not write the second.
            if ended or (not since_log and (stop or due)):
                self._save(leg, seconds)
                if stop and self.ended < len(self.legs):
                    self.checkpoints.wait()
                    raise Interrupted(
                        f"Stopped after step {self.step} of {self.legs[-1].last} and saved in {self.workdir}. "
                        "The same command goes on from there."
                    )

    def _watch(self, leg: Leg, step: int, skipped: float) -> None:
        """Tell of a step whose gradient was not finite, and end the run after too many in a row."""
        self.skipped = self.skipped + 1 if skipped else 0
        if not skipped:
            return
        train = self.data["train"]
        places = order.steps_indices(len(train.labels), self.config.batch, self.config.seed, step - 1, step)[0]
        few = ", ".join(train.dataset.names[i] for i in places[:4])
        self.display.warn(f"Step {step}: the gradient is not finite, and the step is not applied. Its images: {few}, …")
        if self.skipped >= MAX_SKIPPED:
            raise UserError(
                f"The gradients of {self.skipped} steps in a row, up to {step} in stage {leg.stage.name!r}, were not "
                f"finite. {self.workdir} keeps the last state that was. Take a lower --lr or --clip in a new --workdir."
            )

    def begin(self, leg: Leg) -> None:
        """Go to a leg's first step: the parameters as they stand, and what the config carries over."""
        before = self._collected() if self.state else None
        params, stats = (before.params, before.batch_stats) if before else (self.initial, self.initial_stats)
        self.state = shard.distribute(self._fresh(leg, params, stats, before), self.mesh, self.config.sharding)
        self.step, self.leg, self.leg_seconds, self.patience = leg.first, leg.number, 0.0, Patience()

    def _describe(self, leg: Leg) -> str:
        count = sum(int(np.prod(self.initial[n].shape)) for n in leg.trainable)
        return f"{', '.join(summarise(leg.train_parts))}: {count:,} parameters, {leg.last - leg.first} steps"

    def compile(
        self, leg: Leg, splits: Sequence[str] = ("train", "val")
    ) -> tuple[Callable[[int], list[dict[str, float]]], Callable[[int], Any]]:
        """The leg's compiled step with its data: a function that steps towards a step's number and returns metrics.

        Features are kept of these splits.
        """
        assert self.state is not None
        config, train = self.config, self.data["train"]
        self.features = {}
        use_cut = leg.cut if config.features else None
        for split in splits:
            if use_cut and (split == "val" or not leg.augment):
                self._compute_features(split, use_cut)
        start = leg.cut if ("train", leg.cut) in self.features else None

        optimizer, schedule = make_leg_optimizer(config, leg)
        step = make_leg_step(config, self.model, leg, optimizer, self.preprocess, self.source, self.loss, start)
        resident = start is not None or train.images is not None
        parts = self.model.span(start)
        # XLA on a CPU runs the gradient of a convolution inside a loop sixty times slower than outside of one.
        convolves = any(
            v.ndim == 4 and v.shape[:2] != (1, 1) and plan.part_of(n, self.model.parts) in parts
            for n, v in self.initial.items()
        )
        loop = resident and not (jax.default_backend() == "cpu" and convolves)
        run = repeat(step, loop)
        n, batch = len(train.labels), config.batch
        depth = MAX_STEPS_PER_DISPATCH if loop else 1
        placement = "pmap" if config.sharding == "pmap" else "replicate"
        if resident:
            arrays: dict[str, Any] = {"label": train.labels}
            arrays |= {"features": self.features["train", leg.cut]} if start and leg.cut else {"image": train.images}
            data = shard.place(arrays, self.mesh, placement)
        else:
            stream = pipeline.stream(
                train.dataset, self.preprocess, batch, config.seed, self.step, config.threads, train.size
            )
        compiled = shard.compile_steps(run, self.state, self.mesh, config.sharding)
        limit = 1

        def dispatch(until: int) -> list[dict[str, float]]:
            nonlocal limit
            count = min(limit, until - self.step)
            if resident:
                index, given = np.zeros((depth, batch), np.int32), data
                index[:count] = order.steps_indices(n, batch, config.seed, self.step, self.step + count)
            else:
                index, given = np.arange(batch, dtype=np.int32)[None], shard.place(next(stream), self.mesh, placement)
            begun = time.perf_counter()
            self.state, out = compiled(self.state, given, index, np.int32(count))
            values = {name: np.asarray(v)[:count] for name, v in out.items()}
            seconds = time.perf_counter() - begun
            limit = max(1, min(depth, 4 * limit, int(DISPATCH_SECONDS * count / seconds)))
            return [{name: float(v[i]) for name, v in values.items()} for i in range(count)]

        return dispatch, schedule

    def _evaluated(self) -> State:
        """The state that is validated and kept: the averages, where the config asks for them."""
        state = self._collected()
        averages = {n: v for n, v in state.ema.items() if n in state.params}
        stats = {n: v for n, v in state.ema.items() if n in state.batch_stats}
        return state.replace(  # type: ignore[attr-defined]
            params=state.params | averages, batch_stats=state.batch_stats | stats
        )

    # -- evaluation -------------------------------------------------------------------------------------------------

    def _eval_step(self, start: str | None = None, stop: str | None = None) -> Any:
        if (start, stop) not in self.eval_steps:
            prepare = None if start else make_prepare(self.preprocess, (), train=False)
            self.eval_steps[start, stop] = jax.jit(make_eval_step(self.model, prepare=prepare, start=start, stop=stop))
        return self.eval_steps[start, stop]

    def _compute_features(self, split: str, cut: str) -> None:
        """Keep a split's activations at the cut, if they fit."""
        data = self.data[split]
        if features.nbytes(self.model, cut, len(data.labels)) > memory_budget(self.config.resident or 0.5):
            self.display.note(
                f"The features of {split} at {cut} do not fit in memory: the frozen parts run every epoch."
            )
            return
        state, key = self._collected(), None
        with self.clock("features"):
            if self.shared is not None and data.images is not None:
                also = (describe(self.config.lora), self.preprocess, self.config.batch)
                key = features.key(self.model, cut, state.params | state.batch_stats, data.images, *also)
                if key in self.shared:
                    self.features[split, cut] = self.shared[key]
                    return
            with self.display.task(f"Features of {split} at {cut}", total=len(data.labels), unit="images") as advance:
                self.features[split, cut] = features.compute(
                    self._eval_step(stop=cut), state.params, state.batch_stats, self._placed(data), advance
                )
            if self.shared is not None and key:
                features.share(self.shared, key, self.features[split, cut])

    def _placed(self, data: Split) -> Iterator[dict[str, Any]]:
        """Evaluation batches, cut over the mesh."""
        where = shard.over_batch(self.mesh)
        for batch in data.evaluation(self.config.batch):
            yield {"image": jax.device_put(batch["image"], where), "mask": batch["mask"]}

    def _validate(self, leg: Leg) -> None:
        """Score the state on the validation set, and keep it if none was better."""
        val, state = self.data["val"], self._evaluated()
        with self.clock("eval"):
            # Features of the raw weights are no use to averages of parts that trained before.
            averaged_below = any(plan.part_of(n, self.model.parts) in self.model.span(None, leg.cut) for n in state.ema)
            if leg.cut and ("val", leg.cut) in self.features and not averaged_below:
                kept = {"features": self.features["val", leg.cut]}
                logits = np.asarray(self._eval_step(start=leg.cut)(state.params, state.batch_stats, kept))
            else:
                step = self._eval_step()
                logits = np.asarray(features.compute(step, state.params, state.batch_stats, self._placed(val)))
            labels = jnp.asarray(val.labels)
            loss = float(np.mean(np.asarray(self.eval_loss(logits, {"label": labels}), np.float64)))
            accuracy = float(np.mean(np.asarray(losses.correct(jnp.asarray(logits), labels), np.float64)))
            self.patience.see(accuracy, -loss)
            better = self.best is None or (accuracy, -loss) > (self.best.accuracy, -self.best.loss)
            if better:
                names, stats = self._touched(leg.number)
                # Copies: the next step is given the state's own buffers.
                params = jax.tree.map(jnp.copy, tree.split(state.params, names)[0])
                batch_stats = jax.tree.map(jnp.copy, tree.split(state.batch_stats, stats)[0])
                self.best = Best(self.step, leg.number, accuracy, loss, params, batch_stats, logits)
        self.logits = logits
        row: dict[str, Any] = {"step": self.step, "stage": leg.stage.name, "val_loss": loss, "val_accuracy": accuracy}
        moved = sorted(n for n in self._touched(leg.number)[0] if n in self.source)
        if moved:
            row["distance"] = distances(state.params, self.source, moved, self.model)
        self.log.write(row)
        self.display.validation({"accuracy": accuracy, "loss": loss}, best=better)
        if self.watch:
            last = self.legs[-1]
            self.watch(row | {"done": self.step / last.last, "final": leg.number == last.number})

    def _record(self, leg: Leg, seconds: float) -> dict[str, Any]:
        assert self.logits is not None
        return {
            "name": leg.stage.name,
            "steps": self.step - leg.first,
            "epochs": leg.stage.epochs,
            "lr": leg.stage.lr,
            "parts": list(leg.train_parts),
            "trainable_params": sum(int(np.prod(self.initial[n].shape)) for n in leg.trainable),
            "val_accuracy": self._accuracy(self.logits),
            "seconds": round(seconds, 3),
        }

    def _accuracy(self, logits: np.ndarray) -> float:
        labels = jnp.asarray(self.data["val"].labels)
        return float(np.mean(np.asarray(losses.correct(jnp.asarray(logits), labels), np.float64)))

    # -- the end ----------------------------------------------------------------------------------------------------

    def finish(self, splits: sources.Splits, excluded: Sequence[tuple[str, str]]) -> dict[str, Any]:
        """Write the bundle of the best state, the predictions, result.json and the report; returns the result."""
        assert self.best is not None and self.logits is not None
        config, val, classes = self.config, self.data["val"], list(splits.classes)
        params = {n: np.asarray(v) for n, v in (self.initial | self.best.params).items()}
        batch_stats = {n: np.asarray(v) for n, v in (self.initial_stats | self.best.batch_stats).items()}
        made = self.model
        if isinstance(made, LoraModel):
            write_adapter(self.workdir / "adapter.safetensors", made, params)
            params, made = {n: np.asarray(v) for n, v in made.merged(params).items()}, made.plain()
        several = val.labels.ndim == 2
        likely = probabilities(self.best.logits, several)
        scores = metrics.summary(likely, val.labels, classes)
        model = bundle.Bundle(made, params, batch_stats, splits.classes, self.preprocess, several)
        result = {
            "model": config.model,
            "weights": str(self.loaded.path) if self.loaded.path else None,
            "weights_sha256": self.loaded.sha256,
            "data": data_path(config),
            "classes": classes,
            "seed": config.seed,
            "plan": config.plan if isinstance(config.plan, str) else [leg.stage.name for leg in self.legs],
            "val": {**scores, "count": len(val.labels), "loss": self.best.loss, "best_step": self.best.step},
            "last": {"accuracy": self._accuracy(self.logits), "step": self.step},
            "train": {"count": len(self.data["train"].labels)},
            "excluded": [{"path": name, "reason": reason} for name, reason in excluded],
            "stages": self.records,
            "device": f"{jax.device_count()} × {jax.devices()[0].device_kind}",
        }
        if splits.test is not None:
            with self.clock("eval"):
                result["test"] = evaluate_dataset(model, splits.test, self.display)
            for name, reason in result["test"]["excluded"]:
                self.display.warn(f"left out: {name}: {reason}")
        bundle.save(
            self.workdir / "model",
            model_name=config.model,
            model_options={
                "num_classes": len(classes),
                "image_size": list(self.preprocess.size),
                **options_of(config),
            },
            params=params,
            batch_stats=batch_stats,
            classes=classes,
            preprocess=self.preprocess,
            multi_label=several,
            temperature=fit_temperature(self.best.logits, val.labels),
            card=model_card({**result, "origin": self.loaded.receipt.source, "multi_label": several}),
        )
        self._write_predictions(likely)
        result["seconds"] = self.clock.seconds()
        write_json(self.workdir / "result.json", result)
        self._track(result, likely)
        self.display.note(f"Validation accuracy {scores['accuracy']:.2%} of {len(val.labels)} images.")
        self.display.note(f"The model is in {self.workdir / 'model'}.")
        self._report()
        return result

    def _track(self, result: Mapping[str, Any], likely: np.ndarray) -> None:
        """Hand the trackers the most confident mistakes and the result."""
        val = self.data["val"].dataset
        wrong = track.mistakes(likely, val.labels, result["classes"]) if self.log.trackers.opened else []
        for rank, (i, told) in enumerate(wrong, 1):
            if (pixels := track.thumbnail(val.read(i))) is not None:
                self.log.trackers.picture(self.step, f"mistakes/{rank:02} {told}", pixels)
        self.log.trackers.close(result)

    def _report(self) -> None:
        """Draw the report; the run is finished by now, so a report that fails is told and costs nothing else."""
        from jft.report.html import make_report

        try:
            self.display.note(f"The report is in {make_report(self.workdir, self.data['val'].dataset)}.")
        except Exception as error:
            self.display.warn(f"The report could not be made: {type(error).__name__}: {error}")

    def _write_predictions(self, likely: np.ndarray) -> None:
        """predictions.csv, a row for each validation image, and all the probabilities beside it."""
        val = self.data["val"]
        names, labels, classes = val.dataset.names, val.labels, val.dataset.classes
        rows = []
        for name, label, p in zip(names, labels, likely, strict=True):
            true = (
                classes[int(label)]
                if labels.ndim == 1
                else "|".join(c for c, y in zip(classes, label, strict=True) if y)
            )
            rows.append({"path": name, "true_label": true, **row(p, classes), "error": ""})
        bundle.write_predictions(self.workdir / "predictions.csv", rows)
        beside = self.workdir / ".predictions.npz"
        np.savez_compressed(beside, probabilities=likely, labels=labels, names=np.array(names))
        beside.replace(self.workdir / "predictions.npz")
