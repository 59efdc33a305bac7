"""A config that cannot be: refused before anything is read, with what was expected, and where the fault stands."""

import json
import math
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jft import Stage, build, cli, distil, losses, optim, penalties, plan
from jft.code import load_object
from jft.config import Config, check, describe, load_config, method, override
from jft.errors import UserError


def made(cls, *args, **fields):
    """What a program makes that no test's own type checks look at."""
    value = cls(*args)
    for name, given in fields.items():
        object.__setattr__(value, name, given)
    return value


STAGE = partial(made, Stage, "a", ("head",))
WRONG = {
    "a str for a number": (dict(epochs="3"), "--epochs is '3'; float is expected."),
    "a str for a whole number": (dict(batch="32"), "--batch is '32'; int is expected."),
    "a str for a rate": (dict(lr="1e-3"), "--lr is '1e-3'; float is expected."),
    "a share of an image": (dict(batch=32.5), "--batch is 32.5; int is expected."),
    "a bool for a number": (dict(lr=True), "--lr is True; float is expected."),
    "a number for a bool": (dict(balance=3), "--balance is 3; bool is expected."),
    "a number for a name": (dict(model=50), "--model is 50; str is expected."),
    "a number for a function": (dict(penalty=0.1), "--penalty is 0.1; str or function is expected."),
    "a seed below 0": (dict(seed=-1), "--seed is -1; it is at least 0"),
    "a seed jax would cut": (dict(seed=2**32), "--seed is 4294967296; it is at least 0 and at most 4294967295"),
    "without end": (dict(epochs=math.inf), "--epochs is inf; a finite float is expected."),
    "no number": (dict(epochs=math.nan), "--epochs is nan; a finite float is expected."),
    "one where several are": (dict(augment="crop"), "--augment is 'crop'; tuple of str is expected. It is"),
    "several in one": (dict(augment="crop flip"), "It is written ('crop', 'flip')"),
    "one tracker": (dict(track="mlflow"), "It is written ('mlflow',)"),
    "three sides": (dict(image_size=(1, 2, 3)), "--image-size is (1, 2, 3); int or tuple of 2 int is expected."),
    "a misspelt setting": (dict(preprocess={"crop_pc": 1}), "no option --preprocess.crop_pc. Did you mean crop_pct"),
    "another": (dict(lora={"rnk": 8}), "no option --lora.rnk. Did you mean rank?"),
    "a setting's type": (dict(preprocess={"crop_pct": "1"}), "--preprocess.crop_pct is '1'; float is expected."),
    "one target": (dict(lora={"targets": "block*"}), "--lora.targets is 'block*'; tuple of str is expected."),
    "no dict": (dict(preprocess=0.9), "--preprocess is 0.9; dict is expected."),
    "no stages": (dict(plan=("head",)), "--plan is ('head',); str or tuple of Stage or function is expected."),
    "a stage's patterns": (dict(plan=(STAGE(train="head"),)), "Stage 'a': train is 'head'; tuple of str or tuple of"),
    "a stage's epochs": (dict(plan=(STAGE(epochs="3"),)), "Stage 'a': epochs is '3'; float is expected."),
}  # fmt: skip


@pytest.mark.parametrize(("fields", "message"), WRONG.values(), ids=WRONG)
def test_a_value_that_cannot_be_is_refused(fields, message):
    with pytest.raises(UserError, match=re.escape(message)):
        check(made(Config, **fields))


def test_what_may_be_is_not_refused():
    check(
        made(Config, epochs=3, lr=np.float32(1e-3), batch=np.int64(8), augment=["crop"], image_size=(32, 64), clip=None)
    )
    check(Config(preprocess={"mean": [0.5, 0.5, 0.5], "crop_pct": 1}, lora={"rank": 8, "alpha": None}, seed=2**32 - 1))
    check(
        made(Config, plan=[STAGE(train=["head", ("stage4", 0)])], penalty=partial(max), model_options={"pool": "avg"})
    )
    check(Config(data={"train": ([], [])}, weights=Path("x.pth"), track=(print, "mlflow"), optimizer=print))


def test_pillows_images_are_told_by_their_hash():
    pictures = [Image.new("L", (2, 3), shade) for shade in (1, 2)]
    one, other = describe({"train": (pictures, [0, 1])})["train"][0]
    assert one.startswith("L[2, 3] sha256:") and one != other
    assert describe(np.zeros(2, np.uint8)).startswith("uint8[2] sha256:")


@pytest.mark.parametrize("make", [Config, Config().replace])
def test_an_unknown_field_names_near_ones(make):
    with pytest.raises(UserError, match=r"no field 'epoch'\. Did you mean epochs"):
        make(epoch=3)


def test_home_is_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = Config(workdir="~/runs/x", weights="~/x.pth")
    assert (config.workdir, config.weights) == (f"{tmp_path}/runs/x", f"{tmp_path}/x.pth")
    options = cli.make_parser().parse_args(["finetune", "--workdir=~/x"])
    assert cli.configs_of(options)[""].workdir == f"{tmp_path}/x"


FILES = {
    "syntax": ("def config():\n    return jft.Config(\n", 2, "SyntaxError"),
    "field": ("import jft\n\ndef config():\n    return jft.Config(epoch=3)\n", 4, "Did you mean epochs"),
    "module": ("import jft\nimport scipi\n", 2, "ModuleNotFoundError: No module named 'scipi'"),
    "name": ("import jft\ndef config():\n    return jft.Config(lr=rate)\n", 3, "NameError: name 'rate' is not defined"),
    "call": (
        "import jft, json\ndef read():\n    return json.loads('{')\ndef config():\n    return jft.Config(**read())\n",
        3, "JSONDecodeError",
    ),
    "type": (
        "import jft\ndef config():\n    made = jft.Config()\n    vars(made)['epochs'] = '3'\n    return made\n",
        None, "--epochs is '3'; float is expected.",
    ),
    "arguments": ("def config(lr):\n    return lr\n", None, "missing 1 required positional argument"),
}  # fmt: skip


def test_stages_of_a_function_are_checked_as_those_of_a_tuple_are():
    def wrong(parts, lr, batch_norm=False):
        assert not batch_norm
        return (made(Stage, "a", ("head",), epochs="3"),)

    config = Config(plan=wrong, model="tiny_vit", weights="none")
    model = build.model_of(config, 3)
    for given in ("gradual", plan.gradual):  # whose epochs are its own, by name and as a function
        stages = build.resolve(config.replace(plan=given), model, model.shapes()[0])
        assert sum(s.epochs for s in stages) == pytest.approx(15)
    with pytest.raises(UserError, match="Stage 'a': epochs is '3'; float is expected"):
        build.resolve(config, model, model.shapes()[0])


@pytest.mark.parametrize(("text", "line", "message"), FILES.values(), ids=FILES)
def test_a_fault_in_a_config_file_is_told_with_its_line(text, line, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("bees.py").write_text(text)
    assert cli.main(["finetune", "bees.py"]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"jft: bees.py{f', line {line}' if line else ''}: "), told
    assert message in told and "report" not in told and "Traceback" not in told
    if "'{'" in text:  # the code that failed, from the user's first line on, none of jft's
        assert "read()" in told and "json.loads('{')" in told and "config.py" not in told


def test_the_module_of_a_function_is_told_too(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine_broken.py").write_text("import math\nx = 1 / 0\n")
    with pytest.raises(UserError, match=r"(?s)'mine_broken:f': mine_broken: ZeroDivisionError.*line 2.*x = 1 / 0"):
        load_object("mine_broken:f")
    with pytest.raises(UserError, match=r"No module named 'jft\.penaltys'"):
        load_object("jft.penaltys:l2_sp")


def test_a_fault_of_ours_below_a_config_stays_one(tmp_path, monkeypatch, capsys):
    file = tmp_path / "bees.py"
    file.write_text("import jft.plan\ndef config():\n    return jft.plan.part_of('a', ['b'])\n")
    assert cli.main(["finetune", str(file)]) == 1
    assert "a fault of ours (KeyError)" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--loss", "--penalty"])
def test_a_function_of_the_users_that_fails_within_a_run_is_told_as_theirs(
    option, folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(
        "import jax.numpy as jnp\ndef wrong(a, b):\n    return jnp.dot(jnp.ones(3), jnp.ones(7))\n"
    )
    made = ["finetune", "--data", str(folder), "--model", "tiny_vit", "--weights", "none", "--batch", "8"]
    assert cli.main([*made, option, "own.py:wrong", *(["--penalty-weight", "1"] if "penalty" in option else [])]) == 2
    told = capsys.readouterr().err
    assert f"{tmp_path / 'own.py'}, line 3: TypeError: " in told, told
    assert "return jnp.dot(jnp.ones(3), jnp.ones(7))" in told and "ours" not in told and "step.py" not in told
    assert ("for logits (8, 3)" in told) == (option == "--loss")


def test_a_method_is_a_word_with_its_options_or_a_function():
    """In Python and on the command line alike; values without a name are the options' in their order."""
    for field, given, function, options in (
        ("loss", "focal:gamma=3", losses.focal, {"gamma": 3.0}),
        ("loss", "focal:3", losses.focal, {"gamma": 3.0}),
        ("loss", "binary-focal:alpha=none", losses.binary_focal, {"alpha": None}),
        ("penalty", "l2-sp:new=0.01", penalties.l2_sp, {"new": 0.01}),
        ("objective", "distil:pool:weight=0.1", distil.features, {"at": "pool", "weight": 0.1}),
        ("objective", "distil:pool", distil.features, {"at": "pool"}),
        ("optimizer", "sgd:momentum=0.95:nesterov=yes", optim.sgd, {"momentum": 0.95, "nesterov": True}),
        ("schedule", "cosine:end=0.01", optim.cosine, {"end": 0.01}),
    ):
        for config in (Config(**{field: given}), override(Config(), field, [given])):
            check(config)
            found = method(config, field)
            assert (found.func, found.keywords) == (function, options), given
            assert describe(config)[field] == given
    for field, given in (
        ("optimizer", "jft.optim:lion"),
        ("schedule", "jft.optim:linear"),
    ):  # of functions by a path too
        assert method(Config(**{field: given}), field) is load_object(given)
    for given in ("jft.losses:focal", losses.focal, "focal"):
        assert method(Config(loss=given), "loss") is losses.focal
    assert method(override(Config(), "loss", ["jft.losses:focal"]), "loss") is losses.focal
    assert method(Config(), "loss") is None


@pytest.mark.parametrize(
    ("field", "given", "message"),
    [
        ("loss", "focl", "There is no loss 'focl'. Did you mean focal"),
        ("penalty", "l2_sp", "There is no penalty 'l2_sp'. Did you mean l2-sp"),
        ("objective", "features", "Known: distil, lwf; or module:name, a function (model"),
        ("loss", "focal:gama=3", "The loss 'focal:gama=3' has no option for 'gama=3'. Did you mean gamma?"),
        ("loss", "focal:gamma=-1", "gamma is '-1'; it is a number from 0 to 100"),
        ("loss", "focal:label_smoothing=0.1", "has no option for 'label_smoothing=0.1'. Its options: gamma=2."),
        ("optimizer", "sgd:nesterov=perhaps", "nesterov is 'perhaps'; it is one of yes, no."),
        ("optimizer", "adamw:b2=1", "b2 is '1'; it is a number from 0 to 0.999999."),
        ("optimizer", "sgd:momentum=0.5:momentum=0.9", "was given momentum twice. Its options: momentum=0.9"),
        ("objective", "distl:pool", "No module named 'distl'. Did you mean distil?"),
        ("schedule", "onecycle", "Did you mean one-cycle?"),
    ],
)
def test_a_word_that_names_no_method_is_told_with_those_there_are(field, given, message):
    with pytest.raises(UserError, match=re.escape(message)):
        method(Config(**{field: given}), field)


def test_words_that_name_no_function_are_told():
    with pytest.raises(UserError, match=r"'x' names no function; module:name or file\.py:name is expected\."):
        load_object("x")


def test_a_field_that_takes_a_function_takes_it_by_where_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text("def f(*_):\n    return ()\n")
    for name in ("optimizer", "schedule", "hyper", "plan", "loss", "penalty", "objective", "data", "weights"):
        assert getattr(override(Config(), name, ["own.py:f"]), name)() == (), name
    assert override(Config(), "optimizer", ["jft.optim:lion"]).optimizer.__name__ == "lion"
    Path("a").touch()
    Path("a:b").mkdir()
    words = {"data": ("tfds:mnist", "a:b"), "weights": ("hf:timm/vit", "gs://b/f.npz", "https://x.org/a.pth"),
             "optimizer": ("adamw",), "plan": ("top-3",), "augment": ("mixup:0.2",), "model": ("a.b:c",)}  # fmt: skip
    for name, values in words.items():
        for word in values:
            assert getattr(override(Config(), name, [word]), name) in (word, (word,))
    for word, message in (("own.py:g", "there is no g in own.py"), ("jft.optim:lio", "Did you mean lion"),
                          ("no_such:f", "No module named 'no_such'"), ("no.py:f", "no file no.py")):  # fmt: skip
        with pytest.raises(UserError, match=message):
            override(Config(), "optimizer", [word])


def test_a_path_to_a_file_of_functions_is_told_in_one_way(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text("import jft\ndef loss(logits, batch):\n    return logits\n")
    from jft.config import describe

    assert describe(load_object("./own.py:loss")) == "own.py:loss"
    assert json.dumps(describe(load_object("own.py:loss"))) == '"own.py:loss"'
    with pytest.raises(UserError, match="no function config"):
        load_config("own.py")


def test_numbers_of_numpy_become_pythons():
    plan = (made(Stage, "a", ("head",), train=("head", ("block1", np.float32(0.5))), lr=np.float64(0.1)),)
    found = made(Config, seed=np.int64(3), image_size=np.int64(32), preprocess={"crop_pct": np.float32(1)}, plan=plan)
    found.__post_init__()
    kinds = [type(v) for v in (found.seed, found.image_size, found.preprocess["crop_pct"], found.plan[0].train[1][1])]
    assert kinds == [int, int, float, float] and type(found.plan[0].lr) is float
    json.dumps(describe(found))
    arrays = (np.zeros(3), np.zeros(3))
    assert Config(data=arrays).data is arrays


def test_options_of_an_architecture_may_be_true_or_false():
    words = {"true": True, "false": False, "none": None, "3": 3, "0.5": 0.5, "token": "token"}
    for word, value in words.items():
        found = override(Config(), "model_options.x", [word]).model_options["x"]
        assert found == value and type(found) is type(value)


def test_options_that_a_run_sets_itself_are_no_architectures(tmp_path):
    with pytest.raises(UserError, match=r"--model_options.dropout is no option .*: --dropout sets it"):
        build.plain_model(Config(model="tiny_vit", model_options={"dropout": 0.1}), 3)
    with pytest.raises(UserError, match=r"--preprocess.mean has 1 number; 3 are expected"):
        build.build(Config(model="tiny_vit", weights="none", preprocess={"mean": (0.5,)}), ["a", "b"])
