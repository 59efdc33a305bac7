"""The learning-rate finder: its rule on curves whose answer is known, and that it leaves nothing behind."""

import dataclasses
import json
import math
import os
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import jax
import numpy as np
import pytest

from jft import Stage, cli, find_lr, finder
from jft.config import Config
from jft.errors import UserError
from jft.losses import cross_entropy
from jft.models import make_model
from jft.step import supervised

pytestmark = pytest.mark.usefixtures("optax_promotion")
RATES = np.geomspace(1e-6, 10, 60)


def valley(steepest, noise=0.0):
    """Falls from ln 2 by a logistic curve of the rate's logarithm, and rises again two decades later."""
    decades = np.log10(RATES / steepest)
    losses = 0.7 - 0.6 / (1 + np.exp(-4 * decades)) + np.maximum(decades - 2, 0) ** 2
    return losses + noise * np.random.default_rng(0).standard_normal(len(losses))


@pytest.mark.parametrize("steepest", [1e-4, 1e-3, 3e-2])
def test_the_suggestion_is_half_the_mean_of_the_steepest_fall_and_the_minimum(steepest):
    lowest = RATES[np.argmin(finder.smooth(valley(steepest)))]
    between = math.sqrt(steepest * lowest) / 2
    assert finder.suggest(RATES, valley(steepest)) == pytest.approx(between, rel=0.2)
    assert finder.suggest(RATES, valley(steepest, noise=0.05)) == pytest.approx(between, rel=1.0)


@pytest.mark.parametrize("losses", [np.full(60, 0.7), 0.7 + np.linspace(0, 1, 60), np.empty(0), np.array([0.7])])
def test_no_suggestion_where_no_rate_helps(losses):
    assert finder.suggest(RATES[: len(losses)], losses) is None


def test_noise_is_no_fall_and_a_small_fall_without_noise_is_one():
    """A new head over ten classes falls by 2 to 4 % before a backbone at the same rate breaks."""
    noise = np.random.default_rng(0).standard_normal((300, len(RATES)))
    assert sum(finder.suggest(RATES, 2.3 + 0.1 * row) is not None for row in noise) <= 12
    small = 2.3 + 0.1 * (valley(1e-3) - 0.7)
    assert all(finder.suggest(RATES, small + 0.005 * row) is not None for row in noise)


def test_smoothing_keeps_lines_and_moves_no_step():
    assert finder.smooth(np.full(9, 0.7)) == pytest.approx(np.full(9, 0.7))
    step = np.repeat([1.0, 0.0], 20)
    assert finder.smooth(step)[19] + finder.smooth(step)[20] == pytest.approx(1.0)


def test_divergence():
    assert finder.diverged([]) is None
    assert finder.diverged([1.0, 0.5, 0.4, 0.9, 0.5]) is None  # noise
    assert finder.diverged([1.0, 0.5, math.nan, 0.1]) == 2
    assert finder.diverged([1.0, 0.5, math.inf]) == 2
    assert finder.diverged([1.0, 0.1, 0.1, 9.0, 9.0]) == 4
    assert finder.diverged([1.0] + [0.01] * 40 + [0.2] * 9) is None  # four times the best, yet below the first


def config(folder, **changes):
    base = Config(data=str(folder), model="tiny_vit", weights="none", batch=8, display="quiet", plan="head")
    return base.replace(**changes)


@pytest.fixture(scope="module")
def found(folder, tmp_path_factory):
    here = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("empty"))
    with jax.numpy_dtype_promotion("standard"):
        result = find_lr(config(folder))
    assert not list(Path.cwd().iterdir())
    os.chdir(here)
    return result


def test_a_rate_is_found(found):
    assert found.losses[0] == pytest.approx(math.log(3), rel=1e-6)
    assert len(found.rates) == len(found.losses) and np.isfinite(found.losses).all()
    assert found.rates[1] / found.rates[0] == pytest.approx(1e7 ** (1 / 37), rel=1e-6)  # ten passes over 30 images
    assert found.suggestion is not None and 1e-5 < found.suggestion < 1
    assert (found.stage, found.option) == ("head", f"--lr {found.suggestion:g}")


def test_the_same_again(found, folder):
    assert find_lr(config(folder)).losses.tolist() == found.losses.tolist()


def test_nothing_is_left_behind_and_the_state_is_as_it_was(folder, monkeypatch, tmp_path):
    """In the second stage of a plan, whose state is that of the first stage's end."""
    seen = []

    def watched(run, leg, rates):
        before = jax.tree.map(np.asarray, (run.state, run.initial))
        told = test(run, leg, rates)
        after = jax.tree.map(np.asarray, (run.state, run.initial))
        jax.tree.map(np.testing.assert_array_equal, before, after)
        seen.append((run.step, leg.first, run.workdir))
        return told

    test = finder.range_test
    monkeypatch.setattr(finder, "range_test", watched)
    monkeypatch.setenv("JFT_CACHE", str(tmp_path))
    plan = (Stage("head", ("head",), epochs=1, augment=()), Stage("on", ("head",), epochs=1, lr=1e-3, augment=()))
    told = find_lr(config(folder, plan=plan), "on")
    ((step, first, folder_of_run),) = seen
    assert step == first == 4 and not folder_of_run.exists()
    assert {p.name for p in tmp_path.iterdir()} <= {"decoded", "features", "xla"}
    assert told.losses[0] < math.log(3)
    assert told.option == f"lr={told.suggestion:g} in the stage itself"


def test_where_batch_norms_train_the_loss_is_that_of_a_validation():
    """What is minimised and what becomes of the statistics stay; the loss told is by the running ones."""
    model = make_model("tiny_resnet", num_classes=3)
    params, stats = model.init(jax.random.key(0))
    keys = jax.random.split(jax.random.key(1), 3)
    params = params | {"head/kernel": jax.random.normal(keys[0], params["head/kernel"].shape)}
    batch = {"image": 3 + jax.random.normal(keys[1], (4, *model.input_shape)), "label": jax.numpy.arange(4) % 3}
    given = dict(train_parts=[*model.parts], update_stats=[*model.parts], trainable=set(params), loss=cross_entropy)
    plain, told = (make(model, **given) for make in (supervised, finder.as_validated(supervised)))
    (value, (metrics, after)), (also, (shown, now)) = (f(params, stats, batch, keys[2]) for f in (plain, told))
    assert value == also == metrics["loss"] and shown["accuracy"] == metrics["accuracy"]
    jax.tree.map(np.testing.assert_array_equal, after, now)
    logits, _ = model.apply(params, stats, batch["image"])
    assert shown["loss"] == pytest.approx(float(cross_entropy(logits, batch).mean()), rel=1e-5)
    assert abs(shown["loss"] - value) > 0.01


@pytest.mark.slow
def test_sweeps_start_alike_and_see_other_images(folder, monkeypatch):
    """The mean of four is not the first; only where nothing is learned yet, by a head of zeros, are they equal."""
    four = find_lr(config(folder))
    monkeypatch.setattr(finder, "SWEEPS", 1)
    one = find_lr(config(folder))
    assert four.losses[0] == pytest.approx(one.losses[0], rel=1e-6) == pytest.approx(math.log(3), rel=1e-6)
    shorter = min(len(four.losses), len(one.losses))
    assert not np.allclose(four.losses[:shorter], one.losses[:shorter], rtol=1e-3)
    small = one.rates[:shorter] < 1e-5  # where nothing is learned yet
    np.testing.assert_allclose(four.losses[:shorter][small], one.losses[:shorter][small], rtol=0.01)


def test_a_first_loss_that_is_no_number_is_told(folder):
    def broken(logits, labels):
        return jax.numpy.full(logits.shape[0], jax.numpy.nan)

    with pytest.raises(UserError, match="first loss of stage head is no finite number"):
        find_lr(config(folder, loss=broken))


def test_a_preset_that_divides_the_rate_is_told_the_whole():
    for name, share in (("tiny_vit", 0.1), ("tiny_resnet", 0.01)):
        model, made = make_model(name), Config(model=name, plan="lp-ft", weights="source.npz")
        told = [finder._option(made, model, list(model.shapes()[0]), stage, 0.002) for stage in (0, 1)]
        assert told == ["--lr 0.002", f"--lr {0.002 / share:g}"]


def test_a_rate_that_other_stages_share_is_told_beside_its_own():
    told = finder.Found(RATES, valley(1e-3), 0.002, "full", usual=0.0001, option="--lr 0.02")
    assert "--lr 0.02  (0.002 in this stage, where the plan's own is 0.0001; other stages move with it)" in finder.text(
        told
    )
    alone = finder.text(dataclasses.replace(told, option="--lr 0.002"))
    assert "--lr 0.002  (in this stage, where the plan's own is 0.0001)" in alone


def test_an_unknown_stage_is_told_with_near_names(folder):
    with pytest.raises(UserError, match=re.escape("no stage 'ful'. Did you mean full?")):
        find_lr(config(folder, plan="lp-ft"), "ful")


def test_the_command(found, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(finder, "find_lr", lambda config, stage: found)
    words = ["lr", "--data", str(folder), "--plot", str(tmp_path / "lr.svg")]
    assert cli.main(words) == 0
    assert f"suggestion: --lr {found.suggestion:g}" in capsys.readouterr().out
    assert ET.parse(tmp_path / "lr.svg").getroot().tag.endswith("svg")
    assert cli.main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["suggestion"] == found.suggestion
    assert cli.main([*words[:-1], str(tmp_path / "none" / "lr.svg")]) == 2
