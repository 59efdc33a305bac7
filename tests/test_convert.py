"""What `jft export` and `jft import` write, and what they refuse because a tool would compute otherwise."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from generated import picture, weight

from jft import bundle, cli, weights
from jft.convert import as_timm, export_model, import_weights
from jft.errors import UserError
from jft.models import make_model
from jft.preprocess import Preprocess
from jft.weights.writers import write_safetensors


def save(run, name, values=lambda name, shape: np.zeros(shape, np.float32), **options):
    """A run's bundle of this model, all of its weights 0 if nothing else is said."""
    model = make_model(name, num_classes=2, **options)
    params, stats = ({n: values(n, s.shape) for n, s in shapes.items()} for shapes in model.shapes())
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
    assert "pip install timm" in export_model(run, "hf").code[0]
    assert "pip install timm" in (run / "hf" / "README.md").read_text()
    config = json.loads((run / "hf" / "config.json").read_text())
    assert config["model_type"] == "timm_wrapper" and config["model_args"]["global_pool"] == "avg"
    assert config["label_names"] == ["ant", "bee"]
    with pytest.raises(UserError, match="no name for block0"):
        export_model(run, "torchvision")


def test_a_folder_for_transformers_names_its_own_image_processor_or_timms(tmp_path):
    """Its own without more; timm's where it is asked for, or where the model is timm's and the pictures are square."""
    run = save(tmp_path, "tiny_vit", depth=1)
    own = export_model(run, "hf", tmp_path / "own")
    timm = export_model(run, "hf", tmp_path / "timm", processor="timm")
    told = json.loads((own.path / "preprocessor_config.json").read_text())
    config = json.loads((own.path / "config.json").read_text())
    assert told["image_processor_type"] == "BitImageProcessor" and "pretrained_cfg" not in config
    assert "--processor timm gives jft's pixels" in str(own.receipt) and "pip install" not in own.code[0]
    assert {p.name for p in own.path.iterdir()} - {p.name for p in timm.path.iterdir()} == {"preprocessor_config.json"}
    told = json.loads((timm.path / "config.json").read_text())
    assert told.items() > config.items() and told["image_processor_type"] == "TimmWrapperImageProcessor"
    assert not timm.receipt.notes and "image processor through timm: pip install timm" in timm.code[0]
    assert timm.code[0] in (timm.path / "README.md").read_text()
    model = bundle.load(run / "model")
    read, exact = (weights.load(model.model, done.path).preprocess for done in (own, timm))
    assert exact == model.preprocess and (read.size, read.resize) == (exact.size, exact.resize)

    wide = save(tmp_path / "wide", "vit_tiny_patch16_224", pool="avg", image_size=(32, 64))
    done = export_model(wide, "hf")
    config = json.loads((done.path / "config.json").read_text())
    assert config["model_type"] == "timm_wrapper" and config["image_processor_type"] == "BitImageProcessor"
    assert "--processor" not in str(done.receipt)
    with pytest.raises(UserError, match="no square"):
        export_model(wide, "hf", tmp_path / "other", processor="timm")


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


def test_dinov2_with_registers_becomes_timms():
    """Whose class token holds its position."""
    model = make_model("dinov2_vits14_reg", num_classes=2, image_size=28)
    params = {n: weight(n, s.shape) for n, s in model.shapes()[0].items() if n.startswith("embed")}
    given = bundle.Bundle(model, params, {}, ("ant", "bee"), Preprocess(size=(28, 28)))
    made = as_timm(given)
    assert made.model.name == "vit_small_patch14_reg4_dinov2" and made.model.input_shape == model.input_shape
    assert {n: a.shape for n, a in made.params.items()} == {
        n: s.shape for n, s in made.model.shapes()[0].items() if n.startswith("embed")
    }
    x = jnp.asarray(picture(2, 28, 28, 3))
    before, after = (
        m.model.apply({n: jnp.asarray(a) for n, a in m.params.items()}, {}, x, stop="block0")[0] for m in (given, made)
    )
    np.testing.assert_array_equal(before, after)
    other = bundle.Bundle(make_model("tiny_vit"), {}, {}, (), Preprocess())
    assert as_timm(other) is other


@pytest.mark.parametrize("format", ["safetensors", "npz"])
def test_own_formats_give_back_everything(tmp_path, format):
    run = save(tmp_path, "tiny_resnet", weight)
    done = export_model(run, format)
    assert done.path == run / f"jft.{format}" and not done.code
    given = bundle.load(run / "model")
    loaded = weights.load(given.model, done.path)
    assert loaded.receipt.format == "jft" and not loaded.missing
    for before, after in ((given.params, loaded.params), (given.batch_stats, loaded.batch_stats)):
        assert {n: a.tobytes() for n, a in after.items()} == {n: np.asarray(a).tobytes() for n, a in before.items()}
    if format == "safetensors":  # whose header says more than names
        assert loaded.classes == ("ant", "bee") and loaded.preprocess == given.preprocess


def test_mistakes_of_an_export(tmp_path):
    run = save(tmp_path, "tiny_resnet")
    for arguments, options, reason in (
        (("timmm",), {}, "Did you mean timm"),
        (("npz",), {"preprocess_inside": True}, "--preprocess-inside is for stablehlo"),
        (("npz", tmp_path / "w.pth"), {}, r"a file ending in \.npz"),
        (("hf", tmp_path / "w.npz"), {}, "writes a folder"),
        (("npz", tmp_path / "no" / "w.npz"), {}, "there is no folder"),
        (("npz",), {"dtype": "int8"}, "float32, float16"),
        (("timm",), {"processor": "timm"}, "--processor is for hf"),
        (("hf",), {"processor": "tim"}, "Did you mean timm"),
    ):
        with pytest.raises(UserError, match=reason):
            export_model(run, *arguments, **options)
    export_model(run, "npz")
    with pytest.raises(UserError, match="exists already"):
        export_model(run, "npz")
    assert {p.name for p in run.iterdir()} == {"model", "jft.npz"}


def test_import_without_training(tmp_path, capsys):
    """To arrays under our names, to a bundle, or to nothing but the receipt; the head's classes are the file's."""
    run = save(tmp_path, "tiny_resnet", weight)
    given = bundle.load(run / "model")
    theirs = tmp_path / "theirs.safetensors"
    weights.export(theirs, given.model, given.params, given.batch_stats, format="torchvision")
    read, written = import_weights(theirs, "tiny_resnet")
    assert written is None and read.format == "torchvision" and not read.missing

    assert cli.main(["import", str(theirs), "--model", "tiny_resnet", "--out", str(tmp_path / "own.npz"),
                     "--receipt", str(tmp_path / "receipt.json")]) == 0  # fmt: skip
    assert "tensors used" in capsys.readouterr().out
    receipt = json.loads((tmp_path / "receipt.json").read_text())
    assert "fc.weight" in json.dumps(receipt) and "head/kernel" in json.dumps(receipt)
    with weights.open_weights(tmp_path / "own.npz") as file:
        assert file.read("head/kernel").tobytes() == np.asarray(given.params["head/kernel"]).tobytes()

    import_weights(theirs, "tiny_resnet", tmp_path / "bundle")
    made = bundle.load(tmp_path / "bundle")
    assert made.model.num_classes == 2 and made.classes == ("0", "1")
    np.testing.assert_array_equal(made.params["stem/conv/kernel"], given.params["stem/conv/kernel"])

    dino = save(tmp_path / "dino", "tiny_vit", weight, layer_scale=1e-5, pool="token_avg", depth=1)
    export_model(dino, "hf")
    options = ["--model_options.layer_scale", "1e-5", "--model_options.pool", "token_avg", "--model_options.depth=1"]
    assert (
        cli.main(["import", str(dino / "hf"), "--model", "tiny_vit", "--out", str(tmp_path / "dino.npz"), *options])
        == 0
    )
    with weights.open_weights(tmp_path / "dino.npz") as file:
        assert file.shape("head/kernel") == (64, 2)

    headless = {n: a for n, a in given.params.items() if not n.startswith("head")}
    write_safetensors(tmp_path / "headless.safetensors", {**headless, **given.batch_stats})
    import_weights(tmp_path / "headless.safetensors", "tiny_resnet", tmp_path / "headless.npz")
    with pytest.raises(UserError, match="A bundle is a whole model, and these weights lack"):
        import_weights(tmp_path / "headless.safetensors", "tiny_resnet", tmp_path / "other")
    assert not (tmp_path / "other").exists()
