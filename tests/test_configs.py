"""The recipes: each loads, says what a recipe must say, fits its own model, and runs in tiny on a stand-in."""

from pathlib import Path

import pytest

import jft
from jft import plan
from jft.build import lay_out, make_leg_optimizer, model_of
from jft.config import Config, check, describe, load_config
from jft.data.prepare import check as check_augment
from jft.data.prepare import parse

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.py"))
QUICK = "ants_and_bees"
TINY = {"resnetv2": "tiny_bit", "resnet": "tiny_resnet", "vit": "tiny_vit"}
pytestmark = pytest.mark.usefixtures("optax_promotion")


def configs_of(file):
    made = load_config(file)
    return {"": made} if isinstance(made, Config) else made


@pytest.mark.parametrize("file", CONFIGS, ids=lambda f: f.stem)
def test_a_recipe_says_where_it_is_from_and_what_to_expect(file):
    text = file.read_text(encoding="utf-8")
    for word in ("Source", "Expected", "Cost", "Command"):
        assert f"\n{word} " in text.split('"""')[1], f"{file.name} does not say its {word}"
    assert f"jft finetune configs/{file.name}" in text


@pytest.mark.parametrize("file", CONFIGS, ids=lambda f: f.stem)
def test_a_recipe_fits_its_own_model(file):
    """Every pattern names a parameter of the model at its own size, and every word of the config is known."""
    for config in configs_of(file).values():
        check(config)
        model = model_of(config, 7)
        names, parts = list(model.shapes()[0]), list(model.parts)
        stages = plan.resolve(
            config.plan, names, parts, epochs=config.epochs, lr=config.lr, layer_decay=config.layer_decay
        )
        for leg in lay_out(config, stages, model, 10 * config.batch):
            check_augment(leg.augment)
            make_leg_optimizer(config, leg)
        assert describe(config)


def test_recipes_have_the_numbers_of_their_sources():
    """In our units: vit_jax's and big_vision's windows from 5 % of the area, timm's magnitude 9 of 10, 27 of our 30."""
    made = {file.stem: configs_of(file) for file in CONFIGS}
    sets = made["big_vision_transfer"]
    for config in (made["vit_cifar10"][""], sets["oxford_iiit_pet"], sets["oxford_flowers102"]):
        assert parse(config.augment[0]) == ("rrc", {"scale": (0.05, 1.0)})
    assert dict(map(parse, made["mae"][""].augment))["randaugment"] == {"m": 27, "n": 2}


@pytest.mark.parametrize(
    "file",
    [pytest.param(f, marks=() if f.stem == QUICK else pytest.mark.slow) for f in CONFIGS if f.stem != "digits"],
    ids=lambda f: f.stem,
)
def test_a_recipe_runs_on_a_small_stand_in(file, folder, tmp_path):
    """Its own plan, objective, optimizer and augmentation, on a tiny model and three dozen pictures, for an epoch."""
    name, config = next(iter(configs_of(file).items()))
    config = config.replace(
        data=str(folder), model=next(tiny for kind, tiny in TINY.items() if config.model.startswith(kind)),
        weights="none", epochs=0.5, batch=8, seeds=1, shots=None, image_size=32, val_fraction=0.2, eval_every=1.0,
        workdir=str(tmp_path / "run"), display="quiet",
    )  # fmt: skip
    if not isinstance(config.plan, str):
        config = config.replace(plan=tuple(jft.Stage(**{**vars(s), "epochs": None}) for s in config.plan))
    result = jft.finetune(config).result
    assert result["val"]["count"] == 6 and result["stages"][-1]["steps"] >= 1
