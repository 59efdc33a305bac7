"""The loop: one call from a config to a fine-tuned model in a folder. It reads in the order in which things happen."""

import contextlib
import itertools
import os
import signal
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jft import bundle, features, losses, metrics, optim, plan, probes, sanity, shard, tree, weights
from jft.build import (
    Leg,
    Split,
    build,
    check_first,
    check_missing,
    choose_loss,
    compute_dtype,
    convolves,
    image_bytes,
    lay_out,
    load_images,
    make_leg_diagnosis,
    make_leg_optimizer,
    make_leg_step,
    memory_budget,
    memory_free,
    needs_source,
    options_of,
    read_data,
    resolve,
    summarise,
    usual_pieces,
)
from jft.checkpoint import Checkpoints
from jft.code import load_object
from jft.config import PLACE, Config, describe, write_json
from jft.data import order, pipeline, sources
from jft.data.prepare import make_prepare
from jft.errors import MachineError, UserError
from jft.files import writing
from jft.hyper import settle
from jft.lora import LoraModel, added, write_adapter
from jft.models.base import Model
from jft.plan import Stage
from jft.report import track
from jft.report.card import model_card
from jft.report.live import make_display
from jft.report.log import plain
from jft.run import (
    TOO_LATE,
    Clock,
    Result,
    Shared,
    compile_cache,
    contents,
    data_path,
    default_workdir,
    entered,
    fingerprint,
    make_deterministic,
    running,
    versions,
)
from jft.step import FEATURES, SOURCE_HEAD, State, make_eval_step, repeat
from jft.use import NoneReadable, evaluate_dataset, fit_temperature, probabilities, row, value_row
from jft.weights.writers import write_safetensors

MAX_STEPS_PER_DISPATCH = 256
EACH = 10**6  # probabilities that predictions.csv holds at most; predictions.npz has all there are
MAX_SKIPPED = 10  # steps in a row that were not finite, after which a run ends or goes back
MAX_ROLLBACKS, ROLLBACK_RATE = 3, 0.5  # how often it goes back, and what becomes of the learning rate each time
LESS = 1.5  # times --resident, within the free memory: what a run that goes on may keep of what it kept before
DISPATCH_SECONDS = 0.5  # how long the host lets go of a run, so that Ctrl-C and the display stay prompt


class Interrupted(Exception):
    """The run was asked to stop; it has saved, and the same command goes on from there."""


def train(
    config: Config,
    *,
    watch: Callable[[dict[str, Any]], Any] | None = None,
    shared: Shared | None = None,
) -> Result:
    """Fine-tune as the config says; resumes an interrupted run of the same config, and leaves a finished one alone.

    `watch` is told of every validation: its line in the log, `done`, the share of the run's steps, and `final`, whether
    it is in the last stage. What it raises ends the run where it is. What is `shared` with other runs is not made anew.
    Raises UserError for whatever a user can mend, Interrupted when SIGINT or SIGTERM stopped the run (it has saved).
    """
    clock = Clock()
    late = config.deterministic and not make_deterministic()
    compile_cache()
    if config.distributed:
        shard.join()
    display = make_display(config.display if shard.first() else "quiet")
    with contextlib.closing(display):
        if late:
            display.warn(TOO_LATE)
        with clock("data"):
            splits = read_data(config)
            config = settle(config, splits, display.note)
        for name, reason in splits.excluded:
            display.warn(f"left out: {name}: {reason}")
        check_first(config, splits)
        track.check(config.track, load_object)
        with clock("import"):
            model, params, batch_stats, loaded = build(config, splits.classes)
        display.note(str(loaded.receipt))
        stages = resolve(config, model, params)
        check_missing(config, model, stages, splits, loaded.missing)
        kept = sanity.kept_head(loaded, splits.classes) if config.keep_head else []
        left = sanity.never_trained(list(params), list(model.parts), loaded.missing, stages)
        few = sanity.too_few(splits, config.shots)
        for odd in sanity.labels(splits) + few + kept + left + sanity.settings(config, splits.held_out):
            display.warn(odd)
        workdir = Path(config.workdir or default_workdir(config))
        what = {
            "config": {k: v for k, v in describe(config).items() if k not in PLACE},
            "data": data_path(config),
            "stages": describe(stages),
            "preprocess": describe(loaded.preprocess),
            "classes": list(splits.classes),
            "weights": str(loaded.path) if loaded.path else None,
            "weights_sha256": loaded.sha256,
            "data_sha256": fingerprint(splits),
            "data_contents": contents(splits),
            "versions": versions(),
        }
        with shared_entry(workdir, what, display.note) as (finished, ours, workdir), running(workdir):
            if finished:
                if not (workdir / "report.html").exists():  # the run was killed after its result, before this
                    draw_report(workdir, splits.val, display)
                display.note(f"{workdir} holds this run, finished. Nothing to do; remove the folder to run it again.")
                return Result(workdir, finished)
            with clock("data"):
                data, left_out = load_images(config, splits, stages, loaded.preprocess, display)
            run = Run(config, workdir, model, loaded, params, batch_stats, stages, data, clock, display)
            few = sanity.few_steps(config, run.legs[-1].last, len(data["train"].labels))
            for odd in few + sanity.over_legs(config, model, run.legs):
                display.warn(odd)
            run.watch, run.ours = watch, ours
            if shared is not None:
                shared.enter(config)
                run.shared = shared
            with contextlib.closing(run), interruptible() as asked_to_stop:
                run.restore()
                trackers = config.track if shard.first() else ()
                run.log.trackers = track.open_trackers(trackers, workdir, what, run.step, load_object, display.warn)
                run.advance(len(run.legs), asked_to_stop)
                ours()
                result = Result(workdir, run.finish(splits, [*splits.excluded, *left_out]))
                if asked_to_stop():  # too late for this run, but not for those that a comparison has still to make
                    raise Interrupted(f"Stopped. The run in {workdir} was at its end, and is finished.")
                return result


@contextlib.contextmanager
def shared_entry(
    workdir: Path, what: Mapping[str, Any], note: Callable[[str], Any]
) -> Iterator[tuple[dict[str, Any] | None, Callable[[], None], Path]]:
    """`run.entered` by the first process alone; all get its result, the others a folder that nobody looks at."""
    with contextlib.ExitStack() as stack:
        held: list[Callable[[], None]] = []

        def enter() -> dict[str, Any] | None:
            finished, ours = stack.enter_context(entered(workdir, what, note))
            held.append(ours)
            return finished

        finished = shard.together(enter)
        if not shard.first():
            workdir = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="jft-")))
        yield finished, held[0] if held else lambda: None, workdir


def draw_report(workdir: Path, val: sources.Dataset | None, display: Any) -> None:
    """The report of a run that is finished: one that fails is told, and costs nothing else."""
    from jft.report.html import make_report

    if not shard.first():
        return
    try:
        display.note(f"The report is in {make_report(workdir, val)}.")
    except Exception as error:
        display.warn(f"The report could not be made: {type(error).__name__}: {error}")


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
        if signum == signal.SIGINT:  # by hand, and a step may take long; nothing else may be called here
            with contextlib.suppress(OSError):
                os.write(2, b"\nStopping after what is under way, and saving; Ctrl-C again stops at once.\n")

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
    accuracy: float  # of quantities R²
    loss: float
    params: dict[str, Any]
    batch_stats: dict[str, Any]
    logits: Any

    def position(self) -> dict[str, Any]:
        return {"step": self.step, "leg": self.leg, "accuracy": self.accuracy, "loss": self.loss}

    def arrays(self) -> dict[str, Any]:
        return {"params": self.params, "batch_stats": self.batch_stats, "logits": self.logits}


def distances(
    params: Mapping[str, Any], source: Mapping[str, Any], trained: Collection[str], model: Model
) -> dict[str, float]:
    """How far the weights of each part have come from the source: ‖w − w_s‖ over what of it these have moved.

    A kernel with low-rank updates counts as it is applied.
    """
    moved = jax.eval_shape(lambda p: model.effective(p, trained), dict(params))
    names = sorted(n for n in moved if n in source)
    if not names:
        return {}
    found = _squares(model, dict(params), {n: source[n] for n in names}, frozenset(trained))
    squares = shard.fetch(found).tolist()
    total: dict[str, float] = {}
    for name, square in zip(names, squares, strict=True):
        part = plan.part_of(name, model.parts)
        total[part] = total.get(part, 0.0) + square
    return {part: total[part] ** 0.5 for part in model.parts if part in total}


@partial(jax.jit, static_argnums=(0, 3))
def _squares(model: Model, params: dict[str, Any], source: dict[str, Any], trained: frozenset[str]) -> Any:
    now = model.effective(params, trained)
    # One array: a transfer for each parameter would cost more than the sums.
    return jnp.stack([jnp.sum(jnp.square(now[n] - source[n])) for n in sorted(source)])


MEMORY = "memory"


def _place(in_memory: bool, on_disk: bool = False) -> str:
    return MEMORY if in_memory else "disk" if on_disk else "nowhere"


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
        loss: Callable[..., Any] | None = None,  # by default the config's over these data
    ):
        self.config, self.workdir, self.model, self.loaded = config, workdir, model, loaded
        self.data, self.clock, self.display = data, clock, display
        self.mesh = shard.make_mesh(model=config.tensor)
        self.preprocess = loaded.preprocess
        self.source = {n: v for n, v in (params | batch_stats).items() if n not in loaded.missing}
        self.source |= {SOURCE_HEAD + n: v for n, v in loaded.head.items()}
        if jax.process_count() > 1:
            params, batch_stats = shard.fetch((params, batch_stats))
        self.initial, self.initial_stats = params, batch_stats
        self.stages = stages
        self.rollbacks: list[dict[str, Any]] = []  # what result.json says of them
        self.legs = self._lay_out()
        train = data["train"].taken
        self.order = order.Order(len(train), config.seed, train.labels if config.balance else None)
        self.loss = loss or choose_loss(config, train)
        val = data["val"].dataset
        # What a validation is told by. There is no mAP without one image that has a label.
        self.figure = metrics.figure(val.quantities, val.several and bool(val.labels.any()))
        self.eval_loss, self.eval_correct = jax.jit(self.loss), jax.jit(losses.correct)
        self.eval_steps: dict[Any, Any] = {}  # compiled, by the span they run
        self.features: dict[
            tuple[str, str], Any
        ] = {}  # by split and cut, of the leg under way; on the devices or mapped
        self.shared: Shared | None = None  # with the other runs of a comparison or a sweep
        self.watch: Callable[[dict[str, Any]], Any] | None = None  # told of every validation
        self.ours: Callable[[], None] = lambda: None  # raises where another process has taken the folder over
        self.step = 0
        self.leg = -1  # the number of the leg that the state is of
        self.ended = 0  # how many legs have
        self.state: State | None = None  # distributed over the mesh; None before the first leg
        self.best: Best | None = None
        # Of the last validation the accuracy, of quantities R², of several labels mAP too, and what a probe reached.
        self.reached: dict[str, float] = {}
        self.probed: tuple[int, float] | None = None  # a leg whose features do not move, and what a probe made of them
        self.records: list[dict[str, Any]] = []  # what result.json says of the stages that are done
        self.leg_seconds = 0.0  # of the leg under way, in sessions before this one
        self.patience = Patience()  # of the leg under way
        self.skipped = 0  # steps in a row that were not applied
        self.losses: list[float] = []  # of steps since the last validation
        self.pieces = 0  # that batches of the leg under way are taken in; 0 before that is known
        # Where the images, and features of the leg under way, lie, by which programs differ; and where they lay when
        # the state was saved.
        self.places: dict[str, str] = {"images": _place(data["train"].images is not None)}
        self.places_before: dict[str, str] = {}
        self.resident_before: float | None = None
        self.saved_at = time.monotonic()
        self.log = track.Mirror(workdir / "metrics.jsonl")
        self.checkpoints = Checkpoints(workdir / "checkpoints", display.warn)

    def close(self) -> None:
        try:
            self.checkpoints.close()
        finally:
            self.log.close()
            if self.shared is None:  # else whoever shares it does
                jax.clear_caches()

    # -- where the state comes from ---------------------------------------------------------------------------------

    def restore(self) -> None:
        """Go to the newest checkpoint that is whole, or to the beginning."""
        if position := self._go_to(lambda position: True):
            self.clock.before, self.clock.by_phase = position["seconds"], self.clock.by_phase | position["by_phase"]
            self.display.note(f"Resumed after step {self.step} of {self.legs[-1].last}.")

    def _same_images(self, before: Mapping[str, Any]) -> None:
        """Raises MachineError where other images can be read than when the state was saved: the order would differ."""
        for name, saved in before.items():
            now = self.data[name].about
            if saved in (now, now["count"]):  # an earlier version saved the count alone
                continue
            count = saved["count"] if isinstance(saved, dict) else saved
            others = " others" if count == now["count"] else ""
            raise MachineError(
                f"Of {name} {count} images could be read when this run was saved, and {now['count']}{others} can be "
                "now; those left out are told above. When it is as before, the same command goes on; name another "
                "--workdir to train on what there is."
            )

    def _go_to(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any] | None:
        """Take the state of the newest checkpoint that is whole and `wanted`, and its position; or the first state."""
        self.state, self.best, self.reached, self.probed = None, None, {}, None
        self.step, self.leg, self.ended, self.records, self.leg_seconds = 0, -1, 0, [], 0.0
        self.patience, self.skipped = Patience(), 0
        self.places_before = {}
        for step, position in shard.together(self.checkpoints.positions):
            if not wanted(position):
                continue
            self._same_images(position.get("images", {}))  # none where an earlier version saved
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
            found = self.checkpoints.restore(step, like, position["sums"]) if shard.first() else None
            if not shard.agree(found is not None):
                continue
            found = shard.broadcast(found or jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), like))
            saved = found["state"]
            state = State(
                step=saved["step"],
                params=dict(sorted((self.initial | saved["params"]).items())),
                batch_stats=dict(sorted((self.initial_stats | saved["batch_stats"]).items())),
                opt_state=saved["opt_state"],
                key=saved["key"],
                ema=saved["ema"],
                source=self._source_of_steps(),
            )
            self.state = shard.distribute(state, self.mesh, self.config.sharding)
            self.step, self.leg, self.ended = step, position["leg"], position["ended"]
            self.patience, self.skipped = Patience.at(*position["patience"]), position["skipped"]
            self.pieces = position["pieces"]
            # None where an earlier version saved.
            self.places_before, self.resident_before = position.get("places", {}), position.get("resident")
            self._place_images()
            if position["best"]:
                self.best = Best(**position["best"], **found["best"])
            self.records, self.leg_seconds = position["records"], position["leg_seconds"]
            self.reached, self.rollbacks = position.get("reached", {}), position["rollbacks"]
            break
        else:
            position, self.rollbacks = None, []
        self.legs = self._lay_out()
        self.log.truncate(self.step)
        return position

    def _lay_out(self) -> list[Leg]:
        """The legs, at the rate that rollbacks have left."""
        rate = ROLLBACK_RATE ** len(self.rollbacks)
        stages = [replace(s, lr=s.lr * rate) for s in self.stages if s.lr is not None]  # `resolve` has set them all
        return lay_out(self.config, stages, self.model, len(self.data["train"].labels))

    def _roll_back(self, leg: Leg, step: int) -> None:
        """Go back to the last good checkpoint with a lower rate, after too many steps that were not finite.

        Good are those of a validation, if no step just before was left out: when these are saved depends on no clock,
        so a run that is killed and resumed goes back to where one that never stopped goes.
        """
        done = [*self.rollbacks, {"step": step, "stage": leg.stage.name}]
        told = (
            f"The loss or gradient of {self.skipped} steps in a row, up to {step} in stage {leg.stage.name!r}, was not "
            "finite."
        )
        if self.config.on_nan != "rollback" or len(done) > MAX_ROLLBACKS:
            tried = f"The rate was halved {MAX_ROLLBACKS} times before. " if len(self.rollbacks) else ""
            also = "" if tried else ", or --on-nan rollback,"
            raise UserError(
                f"{told} {tried}{self.workdir} keeps the last state that was. Take a lower --lr or --clip{also} in a "
                "new --workdir; look at the images named above."
            )
        self.checkpoints.wait()
        self._go_to(lambda position: position["anchor"])
        self.checkpoints.forget_after(self.step)
        self.rollbacks = [*done[:-1], {**done[-1], "to": self.step}]
        self.legs = self._lay_out()
        rate = ROLLBACK_RATE ** len(self.rollbacks)
        self.display.warn(f"{told} Back to step {self.step}, with {rate:g} of the learning rate.")

    def _fresh(
        self, leg: Leg, params: Mapping[str, Any], batch_stats: Mapping[str, Any], before: State | None = None
    ) -> State:
        """The state at a leg's first step, with what the config carries over from the leg before."""
        init = self._program(("init", leg), lambda: jax.jit(make_leg_optimizer(self.config, leg)[0].init))
        opt_state = init(tree.split(params, leg.trainable)[0])
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
            source=self._source_of_steps(),
        )

    def _source_of_steps(self) -> dict[str, Any]:
        return self.source if needs_source(self.config) else {}

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

    def _save(self, leg: Leg, seconds: float, anchor: bool = False) -> None:
        """Hand the state and the position to Orbax, which writes them in the background."""
        self.ours()
        self.log.flush()
        arrays = {"state": self._changed(self._collected(), leg.number)}
        if self.best:
            arrays["best"] = self.best.arrays()
        position = {
            "leg": leg.number,
            "ended": self.ended,
            "patience": self.patience.position(),
            "skipped": self.skipped,
            "pieces": self.pieces,
            "places": self.places,
            "resident": self.config.resident,
            "reached": self.reached,
            "rollbacks": self.rollbacks,
            "best": self.best.position() if self.best else None,
            "records": self.records,
            "images": {name: split.about for name, split in self.data.items()},
            "leg_seconds": seconds,
            "seconds": self.clock.total,
            "by_phase": self.clock.by_phase,
        }
        with self.clock("save"):
            arrays = shard.fetch(arrays)
            if shard.first():
                self.checkpoints.save(self.step, arrays, position, anchor)
        self.saved_at = time.monotonic()

    # -- training ---------------------------------------------------------------------------------------------------

    def advance(self, legs: int, asked_to_stop: Callable[[], bool]) -> None:
        """Train until so many of the stages have ended."""
        while self.ended < legs:
            self.train(self.legs[self.ended], asked_to_stop)

    def train(self, leg: Leg, asked_to_stop: Callable[[], bool]) -> None:
        """Train one stage from wherever it stands to its end, validating, logging and saving on the way.

        It returns before its end where it has gone back to an earlier state.
        """
        begun = time.perf_counter()
        if self.leg != leg.number:
            with self.clock("train"):
                self.begin(leg)
        self.display.stage(leg.number + 1, len(self.legs), leg.stage.name, self._describe(leg), leg.last)
        self.log.rates = track.rates(
            leg.multipliers, {n: plan.part_of(n, self.model.parts) for n in leg.trainable}, leg.train_parts
        )
        dispatch, schedule = self.compile(leg)
        # All at once: a call of a compiled function takes longer than the rest of a row of the log.
        steps = jnp.arange(leg.last - leg.first)
        lr_at = self._program(("rates", leg), lambda: np.asarray(jax.jit(jax.vmap(schedule))(steps)))

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
            if begin == 0 and not self.rollbacks:
                self._tell_start(new[0]["loss"])
            for step, values in enumerate(new, begin + 1):
                if self._watch(leg, step, values.pop("skipped")):
                    self._roll_back(leg, step)
                    return
                since_log.append(values)
                self.losses.append(values["loss"])
                if (step - leg.first) % log_every == 0 or step in validations:
                    mean = {name: sum(m[name] for m in since_log) / len(since_log) for name in values}
                    lr = float(lr_at[step - 1 - leg.first])
                    self.log.write({"step": step, "stage": leg.stage.name, "epoch": step / per_epoch, "lr": lr, **mean})
                    since_log = []
            self.step = begin + len(new)
            self.display.step(self.step, self.legs[-1].last, new[-1], rate)
            sound = self.step in validations and self._validate(leg)
            given_up = self.config.patience is not None and self.patience.stale >= self.config.patience
            seconds = self.leg_seconds + time.perf_counter() - begun
            ended, stop = self.step == leg.last or given_up, bool(shard.agree(asked_to_stop()))
            if ended:
                if given_up and self.step < leg.last:
                    self.display.note(f"No better validation in {self.patience.stale}: the stage ends.")
                self.ended += 1
                self.records.append(self._record(leg, seconds))
            due = bool(shard.agree(time.monotonic() - self.saved_at > self.config.checkpoint_every))
            # What a rollback would go back to.
            anchor = self.config.on_nan == "rollback" and sound and not self.skipped
            # Between two lines of the log nothing is saved: a resumed run could not write the second.
            if ended or (not since_log and (stop or due or anchor)):
                self._save(leg, seconds, anchor)
                if stop and self.ended < len(self.legs):
                    self.checkpoints.wait()
                    raise Interrupted(
                        f"Stopped after step {self.step} of {self.legs[-1].last} and saved in {self.workdir}. "
                        "The same command goes on from there."
                    )

    def _tell_start(self, loss: float) -> None:
        """Tell of the first loss, where what it should be is known."""
        if sanity.comparable(self.config):
            train = self.data["train"].dataset
            if train.quantities and not self.data["train"].scale:  # a kept head's, in units of their own
                return
            fresh = any(name.startswith("head/") for name in self.loaded.missing)
            told, odd = sanity.first_loss(loss, sanity.guessing(train), fresh)
            (self.display.warn if odd else self.display.note)(told)

    def _watch(self, leg: Leg, step: int, skipped: float) -> bool:
        """Tell of a step that was left out, its loss or gradient not finite; whether too many were in a row."""
        self.skipped = self.skipped + 1 if skipped else 0
        if not skipped:
            return False
        train = self.data["train"]
        places = self.order.take((step - 1) * self.config.batch, step * self.config.batch)
        names = [train.dataset.names[i] for i in places]
        self.log.write({"step": step, "stage": leg.stage.name, "skipped": names})
        few = ", ".join(names[:4]) + (", …" if len(names) > 4 else "")
        told = f"Step {step}: the loss or gradient is not finite, and the step is not applied. Its images: {few}."
        self.display.warn(f"{told} {self._suspect(leg, step, names)}" if self.skipped == 1 else told)
        # Of a stage too short for so many it is too many if all of its steps were.
        return self.skipped >= MAX_SKIPPED or (step == leg.last and self.skipped >= leg.last - leg.first)

    def _suspect(self, leg: Leg, step: int, names: list[str]) -> str:
        """Where the numbers of a step's batch stop being finite, found by running it once more, from its images.

        With the weights as they are now: those the step had, unless steps of the same dispatch were applied after it.
        """
        train, config = self.data["train"], self.config
        args = (config.batch, config.seed, step - 1, config.threads, train.size, train.images)
        batch = next(pipeline.stream(train.taken, self.preprocess, *args, balance=config.balance))
        look = make_leg_diagnosis(config, self.model, leg, self.preprocess, self.loss)
        suspect = look(shard.fetch(self._collected()), batch, step)
        return suspect.told(names) if suspect else "Run once more with the weights as they are now, all is finite."

    def begin(self, leg: Leg) -> None:
        """Go to a leg's first step: the parameters as they stand, and what the config carries over."""
        before = self._collected() if self.state else None
        if before and (averaged := optim.averaged(before.opt_state, before.params)):
            before = before.replace(params=before.params | averaged)  # type: ignore[attr-defined]
        params, stats = (before.params, before.batch_stats) if before else (self.initial, self.initial_stats)
        self.state = shard.distribute(self._fresh(leg, params, stats, before), self.mesh, self.config.sharding)
        self.step, self.leg, self.leg_seconds, self.patience = leg.first, leg.number, 0.0, Patience()
        self.pieces, self.places_before = 0, {}

    def _fits(self, what: str, size: int) -> bool:
        """Whether so many bytes may lie on each device; of a run that goes on, as before where that can be.

        Memory is never as free as it was, and a program that is given what lies there rounds otherwise than one that is
        not. Another --resident is followed at once.
        """
        share, before = self.config.resident, self.places_before.get(what)
        if before and share == self.resident_before:
            return before == MEMORY and size <= memory_budget(min(LESS * share, 1.0))
        return size <= memory_budget(share)

    def _place_images(self) -> None:
        """Have the training images in memory, or not, as when the state was saved, where that can be."""
        train, before = self.data["train"], self.places_before.get("images", self.places["images"])
        if before != self.places["images"] and self.config.resident == self.resident_before:
            if before != MEMORY:
                train.images = None
            elif self._fits("images", image_bytes(self.config, train.size, len(train.dataset))):
                train.images = pipeline.decode_all(train.dataset, train.preprocess, train.size, train.threads)[0]
            self.places["images"] = _place(train.images is not None)

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
        start = self._keep_features(leg, splits)
        _, schedule = make_leg_optimizer(config, leg)
        n, batch, views = len(train.labels), config.batch, (config.views or 1) if start and leg.augment else 1
        arrays: dict[str, Any] = {"label": np.concatenate([train.labels] * views)}
        if start:
            arrays["features"] = self.features["train", start]
        elif train.images is not None:
            arrays[self.model.input] = train.images
        mapped = start is not None and not isinstance(arrays["features"], jax.Array)
        resident = len(arrays) > 1 and not mapped
        # XLA on a CPU runs the gradient of a convolution inside a loop sixty times slower than outside of one.
        slow = jax.default_backend() == "cpu" and convolves(self.model, leg.cut, self.initial)
        loop = resident and not slow
        usual = usual_pieces(config, self.model, leg, self.initial)
        depth = MAX_STEPS_PER_DISPATCH if loop else 1
        placement = "pmap" if config.sharding == "pmap" else "replicate"

        def indices(first: int, last: int) -> np.ndarray:
            places = first * batch, last * batch
            chosen = self.order.take(*places).reshape(-1, batch)
            if not start:
                return order.tickets(chosen, n)
            # Of kept features nothing is drawn anew.
            return chosen if views == 1 else chosen + n * (self.order.passes(*places).reshape(chosen.shape) % views)

        def batches() -> Iterator[dict[str, Any]]:
            """From the step under way on, of the rows that this process's devices hold, laid on them."""
            mine = shard.rows(self.mesh, batch)
            read: Iterator[dict[str, Any]]
            if mapped:
                picks = (indices(step, step + 1)[0][mine] for step in itertools.count(self.step))
                read = ({"index": pick} | {name: array[pick] for name, array in arrays.items()} for pick in picks)
            else:
                read = pipeline.stream(
                    train.taken, self.preprocess, batch, config.seed, self.step, config.threads, train.size,
                    rows=mine, balance=config.balance,
                )  # fmt: skip
            for one in read:
                yield shard.put_rows(one, self.mesh, batch, config.sharding)

        # Each device holds everything if it can; else its share, and a batch is gathered from all of them.
        whole = not resident or self._fits("whole", sum(v.nbytes for v in arrays.values()))
        spread = not whole and config.sharding != "pmap" and self.mesh.shape[shard.DATA] > 1
        self.places["whole"] = _place(not spread)
        if self.places_before not in ({}, self.places):
            self.display.warn(
                "Not the same images or features are kept in memory as when this run was saved (--resident, "
                "--features): the end is within rounding of that of a run that was never stopped, not the same bytes."
            )
        if spread:
            self.display.note("The examples lie spread over the devices: one does not hold them all.")
            data = shard.spread(arrays, self.mesh)
        elif resident:
            data = shard.place(arrays, self.mesh, placement)
        else:
            stream = batches()
            data = next(stream)
        index = np.zeros((depth, batch), np.int32)
        most = batch // self.mesh.shape[shard.DATA]
        # As many as before a stop, where the devices there are now can have as many.
        for pieces in range(min(self.pieces or config.accumulate or usual, most), most + 1):
            if most % pieces:
                continue

            def make(pieces: int = pieces, drawn: int | None = None if start else n) -> Any:
                step = make_leg_step(config, self.model, leg, self.preprocess, self.loss, start, pieces, slow)
                placed = "replicate" if resident and not spread else "cut"
                steps = shard.compile_steps(
                    repeat(step, loop, resident, drawn), self.state, self.mesh, config.sharding, placed
                )
                if config.sharding == "pmap":
                    return steps
                return steps.lower(self.state, data, shard.indices(index, self.mesh), np.int32(1)).compile()

            shapes = {n: (v.shape, v.dtype) for n, v in data.items()}
            with self.clock("compile"):
                compiled = self._program(("step", leg, start, pieces, loop, resident, spread, slow, n, shapes), make)
            if config.sharding == "pmap":
                break
            needs, free = shard.agree(shard.temporary(compiled)), shard.agree(memory_free(), min)
            if needs <= free or config.accumulate or self.pieces or pieces == most:
                break
            self.display.note(
                f"A step in {pieces} pieces needs {needs / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free."
            )
        if pieces > usual and not (config.accumulate or self.pieces):
            also = " BatchNorms that train see one piece at a time." if leg.update_stats else ""
            self.display.note(f"Each batch is taken in {pieces} pieces, their gradients averaged (--accumulate).{also}")
        self.pieces = pieces
        limit = 1

        def dispatch(until: int) -> list[dict[str, float]]:
            nonlocal limit, data
            count = min(limit, until - self.step)
            if resident:
                index[:count] = indices(self.step, self.step + count)
            begun = time.perf_counter()
            self.state, out = compiled(self.state, data, shard.indices(index, self.mesh), np.int32(count))
            if not resident:
                data = next(stream)  # read and laid on the devices while they work
            # Quantities are neither right nor wrong, whatever an objective tells of them.
            values = {n: np.asarray(v)[:count] for n, v in out.items() if n != "accuracy" or self.figure != "r2"}
            seconds = time.perf_counter() - begun
            limit = max(1, min(depth, 4 * limit, int(shard.agree(DISPATCH_SECONDS * count / seconds, min))))
            return [{name: float(v[i]) for name, v in values.items()} for i in range(count)]

        return dispatch, schedule

    def _evaluated(self) -> State:
        """The state that is validated and kept: the averages, where the config asks for them."""
        state = self._collected()
        averages = optim.averaged(state.opt_state, state.params)
        averages |= {n: v for n, v in state.ema.items() if n in state.params}
        stats = {n: v for n, v in state.ema.items() if n in state.batch_stats}
        return state.replace(  # type: ignore[attr-defined]
            params=state.params | averages, batch_stats=state.batch_stats | stats
        )

    # -- evaluation -------------------------------------------------------------------------------------------------

    def _eval_step(self, start: str | None = None, stop: str | None = None) -> Any:
        def make() -> Any:
            prepare = None if start else make_prepare(self.preprocess, (), train=False)
            step = make_eval_step(self.model, prepare=prepare, start=start, stop=stop)
            return shard.compile_evaluation(step, self.mesh)

        if (start, stop) not in self.eval_steps:
            self.eval_steps[start, stop] = self._program(("evaluation", start, stop), make)
        return self.eval_steps[start, stop]

    def _program(self, about: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """What `make` gives, or gave to a run that differs in its seed alone.

        Such runs have equal programs where their weights and classes are; weights of classes are drawn with the data.
        """
        if self.shared is None or self.config.class_weights:
            return make()
        of_run = (self.loaded.sha256, self.loaded.missing, self.preprocess, self.model)
        return self.shared.program((*about, *of_run), make)

    def _keep_features(self, leg: Leg, splits: Sequence[str]) -> str | None:
        """Keep activations of these splits at the leg's cut, where that pays; the part that training starts from."""
        self.features, config = {}, self.config
        self.places = {"images": self.places["images"]}
        if not leg.cut or config.features == "none":
            return None
        if leg.augment and config.views is None and "train" in splits:
            train = self.data["train"]
            kept = features.nbytes(self.model, leg.cut, len(train.labels), config.features_dtype)
            if kept <= memory_budget(config.resident):
                self.display.note(
                    f"The parts before {leg.cut} are frozen and run anew for every augmented image. --views 10 runs "
                    "them for ten views an image, taken in turn; --augment none once per image."
                )
        for split in splits:
            if split == "val" or not leg.augment or config.views:
                self._compute_features(split, leg.cut, leg)
        return leg.cut if ("train", leg.cut) in self.features else None

    def _compute_features(self, split: str, cut: str, leg: Leg) -> None:
        """Keep a split's activations at the cut, on the devices or, if asked, on the disk."""
        data, config, dtype = self.data[split], self.config, self.config.features_dtype
        views = config.views if split == "train" and leg.augment else None
        rows = len(data.labels) * (views or 1)
        size = features.nbytes(self.model, cut, rows, dtype)
        fits = self._fits(split, size)
        self.places[split] = _place(fits, config.features == "disk")
        if not fits and config.features != "disk":
            self.display.note(
                f"The features of {split} at {cut}, {size / 1e9:.1f} GB, do not fit in memory: the frozen parts run "
                "every epoch. --features disk keeps them on the disk."
            )
            return
        state = self._collected()
        with self.clock("features"):
            name = None
            if data.images is not None:
                also: tuple[Any, ...] = (describe(config.lora), self.preprocess, config.batch, config.sharding)
                also += (dtype, compute_dtype(config), (views, leg.augment, config.seed) if views else ())
                span, variables = self.model.span(None, cut), state.params | state.batch_stats
                below = {n: v for n, v in variables.items() if plan.part_of(n, self.model.parts) in span}
                name = features.key(self.model, cut, shard.fetch(below), data.images, *also)
            kept = self.shared.features.get(name) if self.shared is not None and name else None
            if kept is None:
                kept = self._read_features(split, cut, views, rows, name, fits)
            if fits:
                kept = shard.place(kept, self.mesh)
            if self.shared is not None and name:
                self.shared.keep(name, kept)
            self.features[split, cut] = kept

    def _read_features(
        self, split: str, cut: str, views: int | None, rows: int, name: str | None, fits: bool
    ) -> np.ndarray:
        """Features from the disk, or computed, and then kept there where they are few or memory does not hold them."""
        dtype, shape = self.config.features_dtype, features.shape(self.model, cut, rows)
        # What one process finds another may not: only a process that is alone looks.
        alone = jax.process_count() == 1
        if name and alone and (found := features.load(name, shape, dtype)) is not None:
            return found
        state, data = self._collected(), self.data[split]
        step = self._view_step(cut) if views else self._eval_step(stop=cut)
        with self.display.task(f"Features of {split} at {cut}", total=rows, unit="images") as advance:
            args = (state.params, state.batch_stats, self._placed(data, views), advance)
            pieces = (piece.astype(jnp.dtype(dtype)) for piece in features.rows(step, *args))
            if not fits:
                name = name or f"run-{uuid.uuid4().hex}-{split}"
                features.save(name, pieces, needed=True)
                mapped = features.load(name, shape, dtype)
                assert mapped is not None, "just written"
                return mapped
            kept = np.concatenate(list(pieces))
        if name and alone and kept.nbytes <= features.MOST_KEPT:
            try:
                features.save(name, [kept])
            except OSError as error:
                self.display.warn(f"The features of {split} cannot be kept for later runs: {error}.")
        return kept

    def _view_step(self, cut: str) -> Any:
        """Features before `cut` of augmented images: a batch's `key` says of which view."""
        leg = self.legs[self.leg]
        prepare = make_prepare(self.preprocess, leg.augment, train=True, num_classes=self.model.num_classes)
        step = make_eval_step(
            self.model, prepare=lambda batch, key: prepare(batch, jax.random.wrap_key_data(batch["key"])), stop=cut
        )
        return self._program(("views", cut, leg.augment), lambda: shard.compile_evaluation(step, self.mesh))

    def _placed(self, data: Split, views: int | None = None) -> Iterator[dict[str, Any]]:
        """Evaluation batches, cut over the mesh; of each view in turn, with its `key`."""
        where, key = shard.over_batch(self.mesh), jax.random.fold_in(jax.random.key(self.config.seed), 0x5EE)
        for view in range(views or 1):
            of_view = {"key": jax.random.key_data(jax.random.fold_in(key, view))} if views else {}
            for batch in data.evaluation(self.config.batch):
                cut = {n: shard.put(batch[n], where) for n in ("image", "index")}
                yield cut | of_view | {"mask": batch["mask"]}

    def _logits(self, state: State, cut: str) -> np.ndarray:
        """Of the validation images, from their kept features: a head's of all at once, other parts' by the batch."""
        kept, step = self.features["val", cut], self._eval_step(start=cut)
        n = len(kept)
        small = self.model.span(cut) == [cut] and isinstance(kept, jax.Array)
        batch = n if small else min(n, self.config.batch)
        # The last batch takes some rows of the one before again: all are of one shape, and compiled once.
        firsts = [*range(0, n - batch, batch), n - batch]
        found = [step(state.params, state.batch_stats, {FEATURES: kept[i : i + batch]}) for i in firsts]
        pieces = [np.asarray(piece) for piece in found]
        pieces[-1] = pieces[-1][batch * len(pieces) - n :]
        return np.concatenate(pieces)

    def _validate(self, leg: Leg) -> bool:
        """Score the state on the validation set, and keep it if none was better; whether its loss is a number."""
        val, state = self.data["val"], self._evaluated()
        with self.clock("eval"):
            # Features of the raw weights are no use to averages of parts that trained before.
            averaged_below = any(plan.part_of(n, self.model.parts) in self.model.span(None, leg.cut) for n in state.ema)
            if leg.cut and ("val", leg.cut) in self.features and not averaged_below:
                logits = self._logits(state, leg.cut)
            else:
                step = self._eval_step()
                logits = np.asarray(features.compute(step, state.params, state.batch_stats, self._placed(val)))
            labels, finite = jnp.asarray(val.labels), bool(np.isfinite(logits).all())
            loss = float(np.mean(np.asarray(self.eval_loss(logits, {"label": labels}), np.float64)))
            if val.dataset.quantities:  # in their own units R² is the same
                accuracy = metrics.quantities(logits, val.labels, val.dataset.classes)["r2"] if finite else -np.inf
                self.reached = {"r2": accuracy}
            else:
                accuracy = float(np.mean(np.asarray(self.eval_correct(logits, labels), np.float64)))
                self.reached = {"accuracy": accuracy}
            if self.figure == "average_precision":
                precision = metrics.average_precision(probabilities(logits, True), val.labels) if finite else None
                self.reached[self.figure] = -np.inf if precision is None else precision
            if self.config.probe:
                self.reached[self.config.probe] = self._probe(self.config.probe, state, leg, averaged_below)
            # However many are right, no result can be made of a state with an answer that is no number.
            scored = (accuracy, loss) if finite else (-np.inf, np.nan)
            score = self._score(*scored)
            self.patience.see(*score)
            better = self.best is None or score > self._score(self.best.accuracy, self.best.loss)
            if better:
                names, stats = self._touched(leg.number)
                # Copies: the next step is given the state's own buffers.
                params, batch_stats = shard.copy(
                    (tree.split(state.params, names)[0], tree.split(state.batch_stats, stats)[0])
                )
                self.best = Best(self.step, leg.number, *scored, params, batch_stats, logits)
        if self.config.snapshots:
            self._snapshot(state)
        row: dict[str, Any] = {"step": self.step, "stage": leg.stage.name, "val_loss": loss}
        row |= {f"val_{name}": value for name, value in self.reached.items()}
        if moved := distances(state.params, self.source, self._touched(leg.number)[0], self.model):
            row["distance"] = moved
        self.log.write(row)
        train_loss = float(np.mean(self.losses)) if self.losses else np.nan  # none where a run went on to score
        self.losses = []
        told = {self.figure: self.reached[self.figure], "loss": loss}
        if self.config.probe:
            told[f"{self.config.probe} {metrics.HEADLINES[self.figure]}"] = self.reached[self.config.probe]
        self.display.validation(told, better and bool(np.isfinite(loss)), self.step, self.legs[-1].last, train_loss)
        if self.watch:
            last = self.legs[-1]
            self.watch(row | {"done": self.step / last.last, "final": leg.number == last.number})
        return bool(np.isfinite(loss))

    def _probe(self, probe: str, state: State, leg: Leg, moved: bool) -> float:
        """What a probe of the features before the head, fitted to the training images as they are, reaches.

        `moved`: averages make features of their own, also where nothing before the head trains.
        """
        still = leg.cut == "head" and not moved
        if still and self.probed and self.probed[0] == leg.number:
            return self.probed[1]
        x, test = (self._features(split, state, leg, still) for split in ("train", "val"))
        train, val = self.data["train"], self.data["val"]
        value = -np.inf
        if np.isfinite(x).all() and np.isfinite(test).all():
            said = probes.answers(probe, x, train.labels, test, self.model.num_classes, self.config.seed)
            if val.dataset.quantities:
                value = metrics.quantities(said.astype(np.float32), val.labels, val.dataset.classes)["r2"]
            elif self.figure == "average_precision":
                value = metrics.average_precision(said, val.labels) or 0.0
            elif val.dataset.several:
                value = float(
                    np.mean(((said >= (0.0 if probe == "logistic" else 0.5)) == (val.labels > 0)).all(axis=1))
                )
            else:
                value = metrics.accuracy(said, val.labels)
        if still:
            self.probed = leg.number, value
        return value

    def _features(self, split: str, state: State, leg: Leg, still: bool) -> np.ndarray:
        """What the head is given of each image of a split, not augmented: float32 [n, d]; `still`: as it was kept."""
        data, views = self.data[split], split == "train" and leg.augment and self.config.views
        kept = self.features.get((split, "head")) if still and not views else None
        if kept is None:
            step = self._eval_step(stop="head")
            kept = features.compute(step, state.params, state.batch_stats, self._placed(data))
        return np.asarray(kept, np.float32).reshape(len(data.labels), -1)

    def _score(self, accuracy: float, loss: float) -> tuple[float, float]:
        """By which one validation is better than another: accuracy, then the loss, which is not if it is no number.

        Of several labels an image the loss alone: how often all of them are right says little. Of quantities too.
        """
        fit = -loss if np.isfinite(loss) else -np.inf
        return (accuracy, fit) if self.data["val"].labels.ndim == 1 else (fit, accuracy)

    def _snapshot(self, state: State) -> None:
        """Write what of a validated state the whole plan changes, for soups (`jft.average.soup_of_run`)."""
        names, stats = self._touched(len(self.legs) - 1)
        kept = shard.fetch(tree.split(state.params, names)[0] | tree.split(state.batch_stats, stats)[0])
        if scale := self.data["val"].scale:
            kept = scale.into_head(kept)
        if shard.first():
            folder = self.workdir / "snapshots"
            folder.mkdir(exist_ok=True)
            write_safetensors(folder / f"{self.step:08d}.safetensors", kept, {"format": "jft"})

    def _record(self, leg: Leg, seconds: float) -> dict[str, Any]:
        return {
            "name": leg.stage.name,
            "steps": self.step - leg.first,
            "epochs": leg.stage.epochs,
            "lr": leg.stage.lr,
            "parts": list(leg.train_parts),
            "trainable_params": sum(int(np.prod(self.initial[n].shape)) for n in leg.trainable),
            **{f"val_{name}": plain(value) for name, value in self.reached.items()},
            "seconds": round(seconds, 3),
        }

    # -- the end ----------------------------------------------------------------------------------------------------

    def finish(self, splits: sources.Splits, excluded: Sequence[tuple[str, str]]) -> dict[str, Any]:
        """Write the bundle of the best state, the predictions, result.json and the report; returns the result."""
        assert self.best is not None
        config, val, classes = self.config, self.data["val"], list(splits.classes)
        params = shard.fetch(dict(self.initial) | self.best.params)
        batch_stats = shard.fetch(dict(self.initial_stats) | self.best.batch_stats)
        made = self.model
        if val.scale:
            params = val.scale.into_head(params)
        if any(map(added, params)):
            write_adapter(self.workdir / "adapter.safetensors", made, params)
        if isinstance(made, LoraModel):
            params, made = {n: np.asarray(v) for n, v in made.merged(params).items()}, made.plain()
        several, quantities, labels = val.dataset.several, val.dataset.quantities, val.dataset.labels
        trained = self.data["train"].dataset.labels
        if quantities:
            likely = val.scale.values(self.best.logits) if val.scale else self.best.logits
            scores = metrics.quantities(likely, labels, classes)
            spread = {"mean": trained.mean(0), "std": trained.std(0), "min": trained.min(0), "max": trained.max(0)}
            of_train = {name: figure.tolist() for name, figure in spread.items()}
        else:
            likely = probabilities(self.best.logits, several)
            scores = metrics.summary(likely, labels, classes)
            per_class = (trained > 0).sum(axis=0) if several else np.bincount(trained, minlength=len(classes))
            of_train = {"per_class": per_class.tolist()}
        model = bundle.Bundle(
            made, params, batch_stats, splits.classes, self.preprocess, several, quantities=quantities
        )
        listed = [{"path": name, "reason": reason} for name, reason in excluded]
        result = {
            "model": config.model,
            "weights": str(self.loaded.path) if self.loaded.path else None,
            "weights_sha256": self.loaded.sha256,
            "data": data_path(config),
            "classes": classes,
            "seed": config.seed,
            "plan": config.plan if isinstance(config.plan, str) else [leg.stage.name for leg in self.legs],
            "val": {**scores, "count": len(val.labels), "loss": plain(self.best.loss), "best_step": self.best.step},
            "last": {**{name: plain(value) for name, value in self.reached.items()}, "step": self.step},
            "train": {"count": len(trained), **of_train},
            "excluded": listed,
            "stages": self.records,
            "device": f"{jax.device_count()} × {jax.devices()[0].device_kind}",
        }
        if quantities:
            result["quantities"] = True
        if self.rollbacks:
            result["rollbacks"] = self.rollbacks
        if splits.test is not None:
            try:
                with self.clock("eval"):
                    bad = (tested := evaluate_dataset(model, splits.test, self.display))["excluded"]
                result["test"] = tested
            except NoneReadable as error:
                bad = error.excluded
                listed += [{"path": name, "reason": reason} for name, reason in bad]
                self.display.warn("Not one image of test could be read: there are no figures of it.")
            for name, reason in bad:
                self.display.warn(f"left out: {name}: {reason}")
        with self.clock("save"):
            bundle.save(
                self.workdir / "model",
                model_name=config.model,
                model_options={
                    "num_classes": len(classes),
                    "image_size": list(self.preprocess.size),
                    **({} if compute_dtype(config) == "float32" else {"dtype": compute_dtype(config)}),
                    **options_of(config),
                },
                params=params,
                batch_stats=batch_stats,
                classes=classes,
                preprocess=self.preprocess,
                multi_label=several,
                temperature=None if quantities else fit_temperature(self.best.logits, labels),
                quantities=quantities,
                card=model_card({**result, "origin": self.loaded.receipt.source, "multi_label": several}),
            )
            self._write_predictions(likely)
            self.checkpoints.wait()  # what cannot be saved is told before the run counts as finished
        result["seconds"] = self.clock.seconds()
        result["memory"] = self.clock.memory
        write_json(self.workdir / "result.json", result)
        self._track(result, likely)
        told = metrics.told(self.figure, scores[self.figure])
        what = f"{metrics.HEADLINES[self.figure]} {told}"
        if several:
            right = f"{metrics.told('accuracy', scores['accuracy'])} have all labels right"
            what = f"{what} ({right})" if self.figure != "accuracy" else right
        self.display.note(f"Validation {what} of {len(val.labels)} images.")
        self.display.note(f"The model is in {self.workdir / 'model'}.")
        draw_report(self.workdir, self.data["val"].dataset, self.display)
        return result

    def _track(self, result: Mapping[str, Any], likely: np.ndarray) -> None:
        """Hand the trackers the most confident mistakes and the result."""
        self.log.flush()
        val = self.data["val"].dataset
        find = track.furthest if val.quantities else track.mistakes
        wrong = find(likely, val.labels, result["classes"]) if self.log.trackers.opened else []
        for rank, (i, told) in enumerate(wrong, 1):
            if (pixels := track.thumbnail(val.read(i))) is not None:
                self.log.trackers.picture(self.step, f"mistakes/{rank:02} {told}", pixels)
        self.log.trackers.close(result)

    def _write_predictions(self, likely: np.ndarray) -> None:
        """predictions.csv, a row for each validation image, and all the probabilities beside it."""
        val = self.data["val"]
        names, labels, classes = val.dataset.names, val.dataset.labels, val.dataset.classes
        rows: list[dict[str, Any]] = []
        for name, label, p in zip(names, labels, likely, strict=True):
            if val.dataset.quantities:
                true_values = value_row(label, classes, f"true_{sources.VALUE}")
                rows.append({"path": name, **true_values, **value_row(p, classes), "error": ""})
                continue
            true = (
                classes[int(label)]
                if labels.ndim == 1
                else "|".join(c for c, y in zip(classes, label, strict=True) if y)
            )
            each = {f"p:{c}": float(v) for c, v in zip(classes, p, strict=True)} if likely.size <= EACH else {}
            said = row(p, classes, several=val.dataset.several)
            rows.append({"path": name, "true_label": true, **said, **each, "error": ""})
        bundle.write_predictions(self.workdir / "predictions.csv", rows)
        with writing(self.workdir / "predictions.npz") as part, open(part, "wb") as file:
            told = {"labels": labels, "names": np.array(names)}
            told["values" if val.dataset.quantities else "probabilities"] = likely
            np.savez_compressed(file, allow_pickle=False, **told)
