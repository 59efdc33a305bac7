"""What `jft export` writes for a model with options, and what it refuses because the tool would compute otherwise."""

import json

import numpy as np
import pytest

from jft import bundle
from jft.convert import export_model
from jft.errors import UserError
from jft.models import make_model
from jft.preprocess import Preprocess


def save(run, name, **options):
    """A run's bundle of this model, all of its weights 0."""
    model = make_model(name, num_classes=2, **options)
    params, stats = ({n: np.zeros(s.shape, np.float32) for n, s in shapes.items()} for shapes in model.shapes())
    bundle.save(
        run / "model",
        model_name=name,
        model_options={"num_classes": 2, **options},
        params=params,
        batch_stats=stats,
        classes=("ant", "bee"),
        preprocess=Preprocess(size=model.input_shape[:2]),
    )
    return run


def test_options_that_timm_and_torchvision_are_told(tmp_path):
    run = save(tmp_path, "vit_tiny_patch16_224", pool="avg", image_size=32)
    made = export_model(run, "timm").code[1]
    assert "create_model('vit_tiny_patch16_224', num_classes=2" in made
    assert "img_size=(32, 32), global_pool='avg'" in made
    export_model(run, "hf")
    config = json.loads((run / "hf" / "config.json").read_text())
    assert config["model_type"] == "timm_wrapper" and config["model_args"]["global_pool"] == "avg"
    assert config["label_names"] == ["ant", "bee"]
    with pytest.raises(UserError, match="no name for block0"):
        export_model(run, "torchvision")


@pytest.mark.parametrize(
    ("name", "options", "formats"),
    [
        ("vit_tiny_patch16_224", {"depth": 1, "image_size": 32}, {"hf"}),  # its depth is in transformers' config alone
        ("tiny_vit", {}, {"hf"}),
        ("tiny_vgg", {}, set()),
        ("tiny_resnet", {}, {"hf"}),
    ],
)
def test_tools_without_such_a_model_are_refused(tmp_path, name, options, formats):
    run = save(tmp_path, name, **options)
    for format in ("timm", "torchvision", "hf"):
        if format in formats:
            assert export_model(run, format).path.exists()
            continue
        with pytest.raises(UserError, match=r"no model called|no name for|none with these|no classifier of its own"):
            export_model(run, format)
    assert {p.name for p in run.iterdir()} == {"model", *formats}
