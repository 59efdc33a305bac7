"""What `jft export` and `jft import` write, and what they refuse because a tool would compute otherwise."""

import ast
import builtins
import json
import re
import shutil
import sys
from types import ModuleType, SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from generated import picture, weight
from PIL import Image

from jft import bundle, cli, use, weights
from jft.convert import _options_of_timm, as_timm, export_model, import_weights
from jft.errors import UserError
from jft.models import make_model
from jft.preprocess import Preprocess
from jft.weights.export import about, hf_code, timm_code, timm_prepares, torchvision_code, transform_code
from jft.weights.writers import write_safetensors


def save(
    run,
    name,
    values=lambda name, shape: np.zeros(shape, np.float32),
    multi_label=False,
    quantities=False,
    **options,
):
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
        multi_label=multi_label,
        quantities=quantities,
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
    assert config["model_type"] == "timm_wrapper" and "image_processor_type" not in config  # timm's, which is jft's
    assert not (done.path / "preprocessor_config.json").exists() and "--processor" not in str(done.receipt)
    with pytest.raises(UserError, match="no square"):
        timm_prepares("timm", Preprocess((32, 64), interpolation="bicubic"))
    code = next(line for line in transform_code(Preprocess((32, 64))) if "Compose" in line)
    assert "ImageOps.cover(p, (73, 36), Image.Resampling.BILINEAR)), T.CenterCrop((32, 64))" in code


@pytest.mark.parametrize(
    ("name", "options", "formats"),
    [
        ("vit_tiny_patch16_224", {"depth": 1, "image_size": 32}, {"hf"}),  # its depth is in transformers' config alone
        ("tiny_vit", {}, {"hf"}),
        ("tiny_vgg", {}, set()),
        ("tiny_resnet", {}, {"hf"}),
        ("vit_tiny_patch16_224", {"act": "swiglu", "image_size": 32}, set()),
    ],
)
def test_tools_without_such_a_model_are_refused(tmp_path, name, options, formats):
    run = save(tmp_path, name, **options)
    for format in ("timm", "torchvision", "hf"):
        if format in formats:
            assert export_model(run, format).path.exists()
            continue
        with pytest.raises(
            UserError, match=r"no model called|no name for|none with these|no classifier of its own|cannot be"
        ):
            export_model(run, format)
    assert {p.name for p in run.iterdir()} == {"model", *formats}


def test_activations_that_timm_is_not_told():
    """Its BEiT takes none, and its MLPs with gates are of another class."""
    for name, options, told in (
        ("beit_base_patch16_224", {"act": "quick_gelu"}, None),
        ("beit_base_patch16_224", {}, {}),
        ("vit_giant_patch14_dinov2", {"act": "gelu"}, None),
        ("vit_tiny_patch16_224", {"act": "quick_gelu"}, {"act_layer": "quick_gelu"}),
    ):
        model = make_model(name, num_classes=2, **options)
        params = {n: np.broadcast_to(np.float32(0), s.shape) for n, s in model.shapes()[0].items()}
        assert _options_of_timm(bundle.Bundle(model, params, {}, ("ant", "bee"), Preprocess())) == told


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


KINDS = {"multi_label": (True, False), "quantities": (False, True)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("format", ["safetensors", "hf"])
def test_what_the_answers_are_is_not_lost(tmp_path, kind, format):
    """Several labels an image, or quantities: through an export, as pretrained weights and imported again."""
    run = save(tmp_path / "run", "tiny_vit", weight, depth=1, **{kind: True})
    done = export_model(run, format)
    pictures = [np.full((32, 32, 3), 128, np.uint8)]
    given = bundle.load(run / "model")
    import_weights(done.path, "tiny_vit", tmp_path / "back", model_options={"depth": 1})
    import_weights(done.path, "tiny_vit", tmp_path / "own.safetensors", model_options={"depth": 1})
    for made in (bundle.load(tmp_path / "back"), weights.load(given.model, tmp_path / "own.safetensors")):
        assert (made.multi_label, made.quantities) == KINDS[kind] and made.classes == ("ant", "bee")
    assert bundle.load(tmp_path / "back").predict(pictures) == given.predict(pictures)
    new = weights.load(make_model("tiny_vit", num_classes=3, depth=1), done.path)
    assert not (new.multi_label or new.quantities) and new.classes is None


def test_pretrained_weights_say_what_their_answers_are(tmp_path):
    """Ours in a file's header; others in transformers' words, where the number of their labels is the head's."""
    model = make_model("tiny_vit", num_classes=1)
    params = {n: weight(n, s.shape) for n, s in model.shapes()[0].items()}
    told = about(model, ["value"], Preprocess(size=(32, 32)), quantities=True)
    weights.export(tmp_path / "own.safetensors", model, params, {}, format="timm", about=told)
    (row,) = use.predict(
        use.pretrained("tiny_vit", str(tmp_path / "own.safetensors")), [np.zeros((32, 32, 3), np.uint8)]
    )
    assert set(row) == {"path", "value", "error"}

    weights.export(tmp_path / "hf.safetensors", model, params, {}, format="hf")
    for names, quantities in (({"0": "LABEL_0"}, True), ({"0": "LABEL_0", "1": "LABEL_1"}, False)):
        config = {"problem_type": "regression", "id2label": names}
        (tmp_path / "config.json").write_text(json.dumps(config))
        made = use.pretrained("tiny_vit", str(tmp_path / "hf.safetensors"))
        assert made.quantities == quantities and made.classes == (("value",) if quantities else ("0",))


@pytest.mark.parametrize("processor", ["transformers", "timm"])
def test_code_for_transformers_runs(tmp_path, monkeypatch, capsys, processor):
    """The lines printed, and those of the card, against a library that answers without computing."""
    run = save(tmp_path, "tiny_vit", depth=1)
    done = export_model(run, "hf", processor=processor)
    Image.new("L", (9, 7), 128).save(tmp_path / "x.jpg")
    seen = []

    def model(**given):
        return SimpleNamespace(logits=np.array([[0.0, 1.0]]))

    def processor_of(folder):
        return lambda images, return_tensors: seen.append((images.mode, images.size)) or {"pixel_values": images}

    model.config = SimpleNamespace(id2label={0: "ant", 1: "bee"})
    stub = ModuleType("transformers")
    stub.AutoImageProcessor = SimpleNamespace(from_pretrained=processor_of)
    stub.AutoModelForImageClassification = SimpleNamespace(from_pretrained=lambda folder: model)
    monkeypatch.setitem(sys.modules, "transformers", stub)
    monkeypatch.chdir(tmp_path)
    exec(compile("\n".join(done.code), "printed", "exec"), {})
    assert capsys.readouterr().out == "bee\n" and seen == [("RGB", (9, 7))]
    card = re.search(r"```python\n(.*?)```", (done.path / "README.md").read_text(), re.DOTALL)
    exec(compile(card[1], "card", "exec"), {})


@pytest.mark.parametrize("kind, said", [("multi_label", "{'ant': 0.5, 'bee': 0.75}"), ("quantities", "[0.0, 1.0986]")])
def test_code_for_transformers_answers_as_the_model_does(tmp_path, capsys, kind, said):
    """Several labels are told by the probability of each, quantities by their values; there is no one class."""
    last = export_model(save(tmp_path, "tiny_vit", depth=1, **{kind: True}), "hf", processor="timm").code[-1]
    found = np.array([[0.0, 1.0986]])

    class Logits(np.ndarray):
        def sigmoid(self):
            return (1 / (1 + np.exp(-np.asarray(self)))).round(4)

    model = SimpleNamespace(config=SimpleNamespace(id2label={0: "ant", 1: "bee"}))
    exec(compile(last, "printed", "exec"), {"model": model, "logits": found.view(Logits)})
    assert capsys.readouterr().out == said + "\n"


def test_code_imports_what_it_uses():
    """Every name in the lines for another tool is imported or assigned before."""
    transform = [transform_code(Preprocess(squash=squash)) for squash in (False, True)]
    for lines in (
        *(hf_code("w", *kinds) for kinds in ((False, False), (True, False), (False, True))),
        *([*timm_code("w", make_model("resnet18"), {"img_size": (32, 32)}), *lines] for lines in transform),
        *([*torchvision_code("w", make_model("vit_base_patch16_224")), *lines] for lines in transform),
    ):
        known = set(dir(builtins))
        for statement in ast.parse("\n".join(lines)).body:
            names = {node.id: type(node.ctx) for node in ast.walk(statement) if isinstance(node, ast.Name)}
            used = {name for name, context in names.items() if context is ast.Load}
            assert used <= known, (used - known, lines)
            known |= set(names) - used
            if isinstance(statement, ast.Import | ast.ImportFrom):
                known |= {(alias.asname or alias.name).split(".")[0] for alias in statement.names}
        assert "logits" in known


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


def test_numbers_that_a_type_cannot_hold_are_refused(tmp_path):
    run = save(tmp_path, "tiny_vit", lambda name, shape: np.full(shape, 1e6, np.float32), depth=1)
    for format in ("npz", "hf", "stablehlo"):
        with pytest.raises(UserError, match=r"float16 ends at 65504, and .*--dtype bfloat16"):
            export_model(run, format, dtype="float16")
    assert {p.name for p in run.iterdir()} == {"model"}
    assert export_model(run, "npz", dtype="bfloat16").path.exists()


def test_a_home_is_found_and_a_repository_needs_another_place(tmp_path, monkeypatch):
    save(tmp_path / "run", "tiny_resnet")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert export_model("~/run", "npz").path == tmp_path / "run" / "jft.npz"
    with pytest.raises(UserError, match="--out is needed"):
        export_model("hf:me/bees", "npz")


def test_a_receipt_without_a_place_is_told_before_anything_is_written(tmp_path, capsys):
    run = save(tmp_path / "run", "tiny_vit", depth=1)
    words = ["export", str(run), "--format", "hf"]
    assert cli.main([*words, "--receipt", str(tmp_path / "no" / "receipt.json")]) == 2
    assert "there is no folder" in capsys.readouterr().err and not (run / "hf").exists()
    assert cli.main([*words, "--receipt", str(run / "hf" / "receipt.json")]) == 0  # in what it makes
    assert (run / "hf" / "receipt.json").exists()
    words = ["import", str(run / "hf"), "--model", "tiny_vit", "--model_options.depth=1"]
    assert cli.main([*words, "--out", str(tmp_path / "b"), "--receipt", str(tmp_path / "no" / "receipt.json")]) == 2
    assert not (tmp_path / "b").exists()


CARD = "---\nlibrary_name: jft\nlicense: cc-by-nc-4.0\n---\n# bees\n\n## Use\nso\n\n## Figures\n0.98\n"


@pytest.mark.parametrize("card", ["cached", "fetched", "out of reach", "none"])
def test_the_card_of_a_repository_comes_along(tmp_path, monkeypatch, caplog, card):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
    repo = tmp_path / "hf" / "models--me--bees"
    snapshot = repo / "snapshots" / "0123abc"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0123abc")
    save(tmp_path / "run", "tiny_vit", depth=1)
    shutil.copytree(tmp_path / "run" / "model", snapshot)
    (repo / ".no_exist" / "0123abc").mkdir(parents=True)
    (repo / ".no_exist" / "0123abc" / "preprocessor_config.json").touch()
    if card == "cached":
        (snapshot / "README.md").write_text(CARD)

    def info(*_, **__):
        if card == "out of reach":
            raise OSError("Name or service not known")
        files = ["config.json", "model.safetensors", *(["README.md"] if card == "fetched" else [])]
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in files])

    def fetch(repo, name, revision):
        assert (repo, name, revision) == ("me/bees", "README.md", "0123abc")
        (snapshot / name).write_text(CARD)
        return str(snapshot / name)

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", info)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    made = export_model("hf:me/bees", "hf", tmp_path / "out").path / "README.md"
    assert ("license: cc-by-nc-4.0" in made.read_text()) == (card in ("cached", "fetched"))
    assert ("says nothing of figures and licence" in caplog.text) == (card == "out of reach")


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
