"""The learning-rate finder: a run's own steps at rates that rise until the loss diverges, and the rate they suggest."""

import contextlib
import copy
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float

from jft import plan
from jft.build import Leg, build, check_first, check_missing, load_images, read_data, resolve
from jft.config import Config, method
from jft.errors import UserError, near
from jft.hyper import settle
from jft.models.base import Model
from jft.report import plots
from jft.report.live import make_display
from jft.run import Clock, compile_cache
from jft.step import FEATURES, Batch, Objective, supervised
from jft.train import Run

LOWEST, HIGHEST = 1e-6, 10.0
SIGMA = 2.0  # steps over which losses are averaged
EFFECTIVE = 2 * SIGMA * math.sqrt(math.pi)  # independent losses in such an average
STEPS, PASSES = 60, 10  # of a sweep, and how often it may go through a small training set
IN_TRAINING, AS_VALIDATED = 0.5, 1.0  # the share of the mean that is suggested, by what the losses are
SWEEPS = 4  # whose losses are averaged: with one, seeds moved the suggestion two or three times, and noise hid falls


@dataclass(frozen=True)
class Found:
    """The losses of a stage's first steps at rising rates, and the rate they suggest; None where no rate helped."""

    rates: Float[np.ndarray, " n"]
    losses: Float[np.ndarray, " n"]  # of the step's batch, before the step at this rate, means over the sweeps; where
    # BatchNorms train, by their running statistics
    suggestion: float | None
    stage: str = ""
    usual: float | None = None  # the stage's rate if nothing is found
    option: str = ""  # how a command or a config sets the suggestion

    def json(self) -> dict[str, Any]:
        """What a program reads; losses beyond all numbers are left out."""
        return {
            "stage": self.stage,
            "suggestion": self.suggestion,
            "option": self.option,
            "usual": self.usual,
            "rates": self.rates.tolist(),
            "losses": self.losses.tolist(),
            "smoothed": smooth(self.losses).tolist(),
        }


def find_lr(config: Config, stage: str | None = None) -> Found:
    """A learning rate for one stage of the config's plan, by default the first.

    The range test of Smith 2017, "Cyclical learning rates for training neural networks", section 3.3, with rates that
    rise exponentially from 1e-6 to 10 over 60 steps, fewer where these were more than ten passes over the images: four
    times from the same weights, on other images, the losses averaged. The stages before it are trained first, as the
    plan has them. Nothing is left behind: no run's folder, and no cache but those of decoded images, features and
    compiled programs. Raises UserError for whatever a run would refuse.

    >>> found = jft.find_lr(Config(data="bees/", plan="full"))
    >>> jft.finetune(data="bees/", plan="full", lr=found.suggestion)
    """
    compile_cache()
    display = make_display(config.display)
    with contextlib.closing(display):
        splits = read_data(config)
        config = settle(config, splits, display.note)
        check_first(config, splits)
        model, params, batch_stats, loaded = build(config, splits.classes)
        names = list(params)
        stages = resolve(config, model, names)
        check_missing(config, model, stages, splits, loaded.missing)
        number = _number(stages, stage)
        stages = stages[: number + 1]
        data, _ = load_images(config, splits, stages, loaded.preprocess, display)
        with tempfile.TemporaryDirectory(prefix="jft-lr-") as folder:
            run = Run(config, Path(folder), model, loaded, params, batch_stats, stages, data, Clock(), display)
            with contextlib.closing(run):
                run.advance(number, lambda: False)
                steps = min(STEPS, max(STEPS // 3, round(PASSES * len(data["train"].labels) / config.batch)))
                rates, losses = range_test(run, run.legs[number], np.geomspace(LOWEST, HIGHEST, steps))
    share = AS_VALIDATED if run.legs[number].update_stats else IN_TRAINING
    found = Found(rates, losses, suggest(rates, losses, share), stages[number].name, stages[number].lr)
    return replace(found, option=_option(config, model, names, number, found.suggestion))


def range_test(
    run: Run, leg: Leg, rates: Float[np.ndarray, " steps"]
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Rates until the loss diverged, and mean losses, of sweeps that start at a run's state and leave it as it is."""
    ratio = float(rates[1] / rates[0])
    rising = replace(
        leg.stage,
        lr=float(rates[0]),
        schedule=lambda lowest, steps: optax.exponential_decay(lowest, 1, ratio),
        warmup=0.0,
    )
    leg = replace(leg, stage=rising, last=leg.first + SWEEPS * len(rates))
    trial = copy.copy(run)  # its state is its own from `begin` on, and steps write nothing down
    if leg.update_stats:
        trial.config = run.config.replace(objective=as_validated(method(run.config, "objective") or supervised))
    trial.begin(leg)
    dispatch, _ = trial.compile(leg, ("train",))
    curves: list[list[float]] = []
    with run.display.task(f"Rates for {leg.stage.name}", total=SWEEPS * len(rates), unit="steps") as advance:
        for sweep in range(SWEEPS):
            reached = trial.step
            if sweep:
                trial.state = run.state
                trial.begin(leg)
                trial.step = reached  # the images go on
            losses: list[float] = []
            while len(losses) < len(rates) and diverged(losses) is None:
                new = [metrics["loss"] for metrics in dispatch(reached + len(rates))]
                trial.step += len(new)
                losses += new
                advance(len(new))
            curves.append(losses[: diverged(losses)])
    end = min(map(len, curves))
    if not end:
        raise UserError(
            f"The first loss of stage {leg.stage.name} is no finite number, so no rate can be found. `jft finetune` "
            "with the same options names the images of such a step and the part of the model it begins in."
        )
    return rates[:end], np.mean([losses[:end] for losses in curves], axis=0)


def as_validated(objective: Callable[..., Objective]) -> Callable[..., Objective]:
    """The same objective, telling the loss of a step's batch by the running statistics of BatchNorms.

    In training each batch is normalised by its own, and the loss goes on falling at rates at which the running ones,
    which validation uses, come too late for the weights.
    """

    @wraps(objective)  # whose parameters are looked at
    def make(model: Model, *, loss: Callable[..., Any], start: str | None = None, **given: Any) -> Objective:
        within = objective(model, loss=loss, start=start, **given)

        def told(params: Any, batch_stats: Any, batch: Batch, key: Any) -> Any:
            value, (metrics, after) = within(params, batch_stats, batch, key)
            logits, _ = model.apply(params, batch_stats, batch[FEATURES if start else model.input], start=start)
            fit = jax.lax.stop_gradient(loss(logits.astype(jnp.float32), batch).mean())
            return value, (metrics | {"loss": fit}, after)

        return told

    return make


def diverged(losses: Sequence[float], factor: float = 4.0) -> int | None:
    """The number of losses until they are no numbers or, averaged, above `factor` times their best and their first.

    The average is exponential with 0.8, corrected for its beginning; the factor is fastai's.

    >>> diverged([1.0, 0.5, math.nan]), diverged([1.0, 0.9, 0.8])
    (2, None)
    """
    mean, best, first = 0.0, math.inf, losses[0] if losses else 0.0
    for i, loss in enumerate(losses):
        if not math.isfinite(loss):
            return i
        mean = 0.8 * mean + 0.2 * loss
        now = mean / (1 - 0.8 ** (i + 1))
        best = min(best, now)
        if now > factor * best and now > first:
            return i + 1
    return None


def smooth(losses: Float[np.ndarray, " n"], sigma: float = SIGMA) -> Float[np.ndarray, " n"]:
    """Means weighted by a Gaussian of `sigma` steps around each: unlike a running average they come no later."""
    i = np.arange(len(losses))
    weights = np.exp(-((i[:, None] - i[None]) ** 2) / (2 * sigma**2))
    return weights @ losses / weights.sum(1)


def suggest(
    rates: Float[np.ndarray, " n"], losses: Float[np.ndarray, " n"], share: float = IN_TRAINING
) -> float | None:
    """A share of the geometric mean of the rate at which the smoothed loss falls fastest and of that of its minimum.

    Both are what fastai's finder looks at in such a curve ("steep" and "minimum"). At the first alone a ViT that trains
    whole at one rate lost five points on real images; at a third of the mean `full` lost as many where there were ten
    classes to learn. Losses `as_validated` turn sooner, and half the mean would be too little (benchmarks/README.md).
    None where the fall to the minimum is less than six standard errors of the
    smoothed loss, as it is in 97 of 100 curves of noise, or less than 0.5 % of the first loss.
    """
    smoothed = smooth(losses)
    low = int(np.argmin(smoothed)) if len(losses) else 0
    noise = float(np.std((losses - smoothed)[: low + 1])) / math.sqrt(EFFECTIVE) if low else 0.0
    if low < 2 or smoothed[0] - smoothed[low] < max(6 * noise, 0.005 * abs(smoothed[0])):
        return None
    slope = np.gradient(smoothed, np.log(rates))
    steepest = rates[int(np.argmin(slope[: low + 1]))]
    return float(f"{share * math.sqrt(steepest * rates[low]):.2g}")


def text(found: Found, rows: int = 30, width: int = 40) -> str:
    """The losses for people: a row a rate with its smoothed loss as a bar, and the suggestion."""
    smoothed = smooth(found.losses)
    told = [f"stage {found.stage}", f"{'rate':>9}  {'loss':>8}  {'smoothed':>8}"]
    full = 1.3 * float(smoothed[0]) if len(smoothed) else 1.0
    near_it = int(np.argmin(np.abs(np.log(found.rates / found.suggestion)))) if found.suggestion else -1
    every = -(-len(smoothed) // rows)
    for i in range(near_it % every if found.suggestion else 0, len(smoothed), every):
        bar = "█" * round(width * min(float(smoothed[i]) / full, 1.0)) + ("…" if smoothed[i] > full else "")
        mark = "  ← suggestion" if i == near_it else ""
        told.append(f"{found.rates[i]:9.2e}  {found.losses[i]:8.4f}  {smoothed[i]:8.4f}  {bar}{mark}")
    if found.suggestion is None:
        told.append("\nNo rate lowered the loss: no suggestion. More images a step (--batch) make it less noisy.")
    else:
        own = f"in this stage, where the plan's own is {found.usual:g}"
        shared = found.option.startswith("--lr ") and found.option != f"--lr {found.suggestion:g}"
        own = f"{found.suggestion:g} {own}; other stages move with it" if shared else own
        told.append(f"\nsuggestion: {found.option}  ({own})")
    return "\n".join(told)


def svg(found: Found) -> str:
    """The same as a picture that stands alone."""
    rates, losses = found.rates.tolist(), found.losses.tolist()
    smoothed = smooth(found.losses).tolist()
    title = f"Loss against learning rate in stage {found.stage}"
    points, curve = (list(zip(rates, values, strict=True)) for values in (losses, smoothed))
    return plots.standalone(plots.rate_curve(title, points, curve, found.suggestion))


def _number(stages: Sequence[plan.Stage], name: str | None) -> int:
    names = [s.name for s in stages]
    if name is not None and name not in names:
        raise UserError(f"The plan has no stage {name!r}.{near(name, names)} Its stages: {', '.join(names)}.")
    return names.index(name) if name else 0


def _option(config: Config, model: Model, names: Sequence[str], number: int, rate: float | None) -> str:
    """`--lr 0.001`: what gives the stage this rate. A preset may give it a share of --lr only."""
    if rate is None:
        return ""
    one, two = (resolve(config.replace(lr=lr), model, names)[number].lr or 0.0 for lr in (1.0, 2.0))
    if two == one:
        return f"lr={rate:g} in the stage itself"
    return f"--lr {rate / one:g}"
