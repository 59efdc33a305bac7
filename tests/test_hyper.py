"""Rules for what a config leaves open: the published numbers, and that whatever a user set stays."""

import copy
import dataclasses
import pickle

import numpy as np
import pytest

from jft import build, cli, hyper
from jft.config import Config, override
from jft.data import sources
from jft.data.prepare import parse
from jft.errors import UserError
from jft.preprocess import Preprocess

LARGE = (375, 500)


@pytest.mark.parametrize(
    "examples, steps, warmup, mixup",
    [(244, 500, 100, False), (19_999, 500, 100, False), (20_000, 10_000, 500, True), (500_000, 20_000, 500, True)],
)
def test_bit_has_the_papers_numbers(examples, steps, warmup, mixup):
    rule = hyper.bit(examples, LARGE)
    assert rule["epochs"] * examples / 512 == pytest.approx(steps)
    assert rule["warmup"] * steps == pytest.approx(warmup)
    assert (rule["lr"], rule["optimizer"], rule["schedule"], rule["weight_decay"]) == (0.003, "sgd", "step", 0.0)
    assert any(a.startswith("mixup") for a in rule["augment"]) == mixup


@pytest.mark.parametrize("size, crop, resized", [((32, 32), 128, 160), ((95, 95), 128, 160), ((96, 96), 384, 448)])
def test_bit_chooses_the_resolution_by_area(size, crop, resized):
    rule = hyper.bit(1000, size)
    assert rule["image_size"] == crop
    assert Preprocess(size=(crop, crop), **rule["preprocess"]).resize == resized


def test_the_rate_is_scaled_with_the_batch_and_the_images_seen_are_not():
    for rule in (hyper.bit, hyper.vit):
        whole, small = rule(1000, LARGE), rule(1000, LARGE, 32)
        assert small["lr"] == pytest.approx(whole["lr"] / 16)
        assert {k: v for k, v in small.items() if k != "lr"} == {k: v for k, v in whole.items() if k != "lr"}


def test_vit_has_the_papers_numbers():
    rule = hyper.vit(244, LARGE)
    assert rule["lr"] in hyper.GRID
    assert (rule["clip"], rule["schedule"], rule["image_size"], rule["weight_decay"]) == (1.0, "cosine", 384, 0.0)
    assert parse(rule["augment"][0]) == ("rrc", {"scale": (0.05, 1.0)})  # vit_jax's area_range


def test_a_config_knows_what_was_set():
    assert Config("bees", batch=32).given == {"data", "batch"}
    assert Config(batch=32).replace(epochs=10.0).given == {"batch", "epochs"}
    assert override(Config(), "epochs", ["10"]).given == {"epochs"}
    config = Config(batch=32)
    assert copy.deepcopy(config).given == pickle.loads(pickle.dumps(config)).given == {"batch"}
    assert config == Config() and "given" not in [f.name for f in dataclasses.fields(config)]


@pytest.fixture(scope="module")
def splits(folder):
    return sources.load(str(folder))


def test_what_was_set_wins_even_where_it_is_the_default(splits):
    told = []
    config = Config(hyper="bit", plan="head", epochs=10.0, preprocess={"interpolation": "bicubic"})
    settled = hyper.settle(config, splits, told.append)
    assert (settled.plan, settled.epochs) == ("head", 10.0)
    assert (settled.optimizer, settled.lr, settled.clip) == ("sgd", 0.003 / 16, None)
    assert settled.image_size == 128
    assert settled.preprocess == {"crop_pct": 0.8, "interpolation": "bicubic"}
    assert told[0].startswith("By --hyper for 30 images of about 40×36 pixels: warmup 0.2, optimizer sgd, lr 0.0001875")
    assert hyper.settle(settled, splits) == settled
    assert hyper.settle(Config(), splits) == Config()


def test_a_rule_of_ones_own(splits):
    assert hyper.settle(Config(hyper=lambda n, size, batch: {"lr": n / batch}, batch=10), splits).lr == 3.0
    with pytest.raises(UserError, match="sets 'rate', which is no field"):
        hyper.settle(Config(hyper=lambda *_: {"rate": 1.0}), splits)
    with pytest.raises(UserError, match=r"--lr is -1\.0; it is above 0"):
        hyper.settle(Config(hyper=lambda *_: {"lr": -1.0}), splits)
    with pytest.raises(UserError, match=r"--hyper, \(examples, size, batch\) -> fields, cannot be taken: .*positional"):
        hyper.settle(Config(hyper=lambda n: {}), splits)
    with pytest.raises(UserError, match="of --hyper gave None; a dict of fields is expected"):
        hyper.settle(Config(hyper=lambda *_: None), splits)


def test_an_unknown_rule_is_told_with_near_names(splits):
    with pytest.raises(UserError, match=r"no rule 'bti'.*Did you mean bit\?.*Rules: bit, vit"):
        hyper.settle(Config(hyper="bti"), splits)


def test_the_size_is_the_median_of_those_that_can_be_read():
    contents = [b"no picture", *(np.zeros((side, 10, 3), np.uint8) for side in (10, 20, 90))]
    labels = np.zeros(4, np.int32)
    dataset = sources.Dataset(("a", "b", "c", "d"), labels, ("x",), lambda i: contents[i])
    assert hyper.picture_size(dataset) == (20, 10)
    with pytest.raises(UserError, match="cannot tell their size"):
        hyper.picture_size(dataset.select([0]))


@pytest.mark.usefixtures("optax_promotion")
def test_the_command_line(folder, capsys):
    words = ["plan", "--data", str(folder), "--model", "tiny_vit", "--hyper", "bit", "--fast", "--epochs", "4"]
    assert cli.main([*words, "--image-size", "16"]) == 0
    assert "flat, 4 epochs" in capsys.readouterr().out


def test_every_field_of_a_rule_can_be_run():
    for rule in hyper.RULES.values():
        for examples in (100, 100_000):
            config = Config(hyper="bit").replace(**rule(examples, LARGE))
            build.check_augment(config.augment)
