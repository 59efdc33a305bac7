"""The recipes: each loads, says what a recipe must say, and those that need no data of their own run in tiny."""

from pathlib import Path

import pytest

import jft
from jft.config import Config, describe, load_config

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.py"))
pytestmark = pytest.mark.usefixtures("optax_promotion")


@pytest.mark.parametrize("file", CONFIGS, ids=lambda f: f.stem)
def test_a_recipe_says_where_it_is_from_and_what_to_expect(file):
    text = file.read_text(encoding="utf-8")
    for word in ("Source", "Expected", "Cost", "Command"):
        assert f"\n{word} " in text.split('"""')[1], f"{file.name} does not say its {word}"
    assert f"jft finetune configs/{file.name}" in text


@pytest.mark.parametrize("file", [f for f in CONFIGS if f.stem != "digits"], ids=lambda f: f.stem)
def test_a_recipe_runs_on_a_small_stand_in(file, folder, tmp_path):
    """Its own plan, objective and optimizer, on a tiny model and three dozen pictures, for an epoch."""
    made = load_config(file)
    configs = {"": made} if isinstance(made, Config) else made
    name, config = next(iter(configs.items()))
    model = "tiny_resnet" if "resnet" in config.model else "tiny_vit"
    small = config.replace(
        data=str(folder), model=model, weights="none", epochs=0.5, batch=8, seeds=1, shots=None, image_size=None,
        preprocess={}, workdir=str(tmp_path / "run"), display="quiet", model_options={},
    )  # fmt: skip
    result = jft.finetune(small).result
    assert result["val"]["count"] == 6 and result["stages"][-1]["steps"] >= 1
    assert describe(small)
