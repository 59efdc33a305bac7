"""Methods through the loop: what is validated is what is kept, what is asked for is felt and told."""

import json
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jft import Stage, build, distil, losses, plan
from jft.config import Config
from jft.errors import UserError
from jft.penalties import l2, l2_sp
from jft.preview import preview
from jft.step import State, supervised
from jft.train import train
from jft.use import evaluate, open_model
from jft.weights import open_weights, scratch
from jft.weights.writers import write_safetensors

pytestmark = pytest.mark.usefixtures("optax_promotion")


@pytest.fixture(scope="module")
def config(folder):
    return Config(
        data=str(folder), model="tiny_vit", weights="none", batch=8, epochs=2, lr=1e-2, augment=(), display="quiet"
    )  # of the plan `head`: little to compile


def test_schedule_free_keeps_what_it_validates(config, tmp_path):
    """Over two stages, the second of which begins where the averages of the first ended."""
    stages = (Stage("bias", ("head/bias",), lr=1e-2), Stage("head", ("head",), lr=1e-2))
    made = config.replace(plan=stages, optimizer="schedule-free", snapshots=True, workdir=str(tmp_path / "a"))
    run = train(made)
    assert evaluate(run.workdir)["accuracy"] == run.result["val"]["accuracy"]
    files = {int(f.stem): f for f in (run.workdir / "snapshots").iterdir()}
    with open_weights(files[run.result["val"]["best_step"]]) as file:
        best = {n: np.array(file.read(n)) for n in file.names}
    assert best.keys() == {"head/kernel", "head/bias"}
    for name, value in best.items():
        np.testing.assert_array_equal(open_model(run.workdir).params[name], value)
    rates = [line["lr"] for line in lines_of(run) if "lr" in line]
    assert rates[-1] == pytest.approx(1e-2)  # constant: cosine would have ended near 0


def lines_of(run):
    return [json.loads(line) for line in (run.workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_decoupled_penalty_pulls_and_is_told(config, tmp_path):
    """AdamW would give a penalty in the loss the same step as any other gradient; past it λ counts as it is."""
    ends = []
    for weight in (0.0, 50.0):
        folder = tmp_path / str(weight)
        run = train(config.replace(penalty=l2, penalty_decoupled=True, penalty_weight=weight, workdir=str(folder)))
        ends.append(np.linalg.norm(open_model(run.workdir).params["head/kernel"]))
        assert all(("penalty" in line) == ("loss" in line) for line in lines_of(run))
    assert lines_of(run)[0]["penalty"] >= 0 and ends[1] < 0.5 * ends[0]


@pytest.mark.slow
def test_low_rank_updates_are_told_and_pulled_as_kernels(config, tmp_path):
    body = {n: np.asarray(v) for n, v in build.plain_model(config, 3).init(jax.random.key(0))[0].items()}
    write_safetensors(tmp_path / "a.safetensors", {n: v for n, v in body.items() if not n.startswith("head/")})
    made = config.replace(plan="lora", lora={"rank": 2}, penalty=l2_sp, weights=str(tmp_path / "a.safetensors"))
    ends = []
    for decoupled, weight in ((False, 1e-6), (True, 1e-6), (True, 200.0)):
        folder = str(tmp_path / f"{decoupled}-{weight}")
        run = train(made.replace(penalty_decoupled=decoupled, penalty_weight=weight, workdir=folder))
        first = lines_of(run)[0]["penalty"]
        assert first == 0  # B is zero, and so is a new head
        ends.append([line["distance"] for line in lines_of(run) if "distance" in line][-1])
    assert all(end.keys() >= {"block0", "block2"} and "head" not in end for end in ends)
    assert sum(ends[2].values()) < 0.8 * sum(ends[1].values())


def test_the_answers_of_the_weights_own_head_are_held(config, tmp_path):
    """Learning without Forgetting by a word: the head is read from the weights, the model's own is of other classes."""
    values = {n: np.asarray(v) for n, v in build.plain_model(config, 5).init(jax.random.key(0))[0].items()}
    bias = np.random.default_rng(0).normal(size=5).astype(np.float32)
    head = {"head/kernel": np.zeros_like(values["head/kernel"]), "head/bias": bias}
    write_safetensors(tmp_path / "a.safetensors", values | head)
    made = config.replace(
        plan=(Stage("norm", ("head", "norm")),), objective="lwf:weight=0.5:temperature=3", epochs=1,
        weights=str(tmp_path / "a.safetensors"), workdir=str(tmp_path / "run"),
    )  # fmt: skip
    own = config.replace(objective=partial(distil.answers, source_head={"kernel": 0, "bias": 0}))
    assert build.takes_head(made) and not build.takes_head(own) and not build.takes_head(config)
    p = np.asarray(jax.nn.softmax(bias / 3))  # of every image, whatever its features
    for line in lines_of(train(made)):
        if "penalty" in line:
            assert line["penalty"] == pytest.approx(0.5 * 9 * -float((p * np.log(p)).sum()), rel=1e-5)


@pytest.mark.parametrize(
    "asked",
    [
        dict(penalty=l2_sp),
        dict(penalty=l2_sp, penalty_decoupled=True),
        dict(objective=partial(distil.features, at="norm")),
    ],
)
def test_pretrained_values_are_arguments_of_a_step_and_no_constants_of_it(config, asked):
    """Of a large model they would be more than a compiler takes: it is traced here without any value at all."""
    model = build.model_of(config, 3)
    params, stats = model.shapes()
    image = jax.ShapeDtypeStruct((8, *model.input_shape), "uint8")
    batch = {"image": image, "label": jax.ShapeDtypeStruct((8,), "int32"), "index": jax.ShapeDtypeStruct((8,), "int32")}

    def arguments(made):
        stages = plan.resolve("full", list(params), list(model.parts), epochs=1, lr=1e-2, layer_decay=None)
        (leg,) = build.lay_out(made, stages, model, 8)
        state = State(
            step=jax.ShapeDtypeStruct((), "int32"), params=params, batch_stats=stats, source=params | stats,
            opt_state=jax.eval_shape(build.make_leg_optimizer(made, leg)[0].init, params),
            key=jax.ShapeDtypeStruct((2,), "uint32"),
        )  # fmt: skip
        step = build.make_leg_step(made, model, leg, scratch(model).preprocess, losses.cross_entropy, None)
        text = jax.jit(lambda *given: step(*given)[0].params).lower(state, batch).as_text()  # those that are used
        return re.search(r"@main\((.*?)\) -> ", text, re.S)[1].count("%arg")

    assert build.needs_source(config.replace(**asked)) and not build.needs_source(config)
    assert arguments(config.replace(**asked)) - arguments(config) >= len(params) - 4  # but head and norm


def objective_of(**metrics):
    """An objective that minimises nothing, with these metrics."""

    def made(model, **_):
        return lambda params, stats, batch, key: (jnp.zeros(()), (jax.tree.map(jnp.asarray, metrics), dict(stats)))

    return made


@pytest.mark.parametrize("sharding", ["replicate", "pmap"])
def test_an_objective_is_looked_at_before_the_run_and_by_a_plan_that_is_only_shown(config, sharding):
    made = config.replace(plan="full", model="tiny_resnet", augment=("crop", "mixup"), sharding=sharding)
    splits, model = build.read_data(made), build.model_of(made, 3)
    stages = build.resolve(made, model, model.shapes()[0])

    def mixed(model, *, loss, **_):
        def objective(params, stats, batch, key):
            assert batch["label"].shape == batch["image"].shape[:1] + (3,) and batch["hard_label"].ndim == 1
            return supervised(model, loss=loss, **_)(params, stats, batch, key)

        return objective

    build.check(made.replace(objective=mixed), model, stages, splits)
    with pytest.raises(UserError, match="--objective, a function"):
        preview(made.replace(objective=losses.focal), compile=False)
    with pytest.raises(UserError, match="'loss' is the one that a run needs"):
        preview(made.replace(objective=objective_of(accuracy=0.0)), compile=False)


@pytest.mark.slow
def test_strengths_name_what_another_stage_trains(config, tmp_path):
    """The new head while the body trains, and low-rank updates while the head does."""
    for name, stages, options in (
        ("head", (Stage("head", ("head",)), Stage("body", ("block1",))), {}),
        ("block*", (Stage("head", ("head",)), Stage("lora", ("*/lora_*",))), {"lora": {"rank": 2}}),
    ):
        penalty = partial(l2_sp, strengths=((name, 0.0),))
        made = config.replace(plan=stages, penalty=penalty, penalty_weight=0.01, epochs=2, **options)
        assert train(made.replace(workdir=str(tmp_path / str(len(options))))).result["stages"][1]["steps"]


def test_wrong_combinations_are_refused(config, tmp_path):
    for options, message in (
        (dict(optimizer="schedule-free", carry=True), "leave out --carry"),
        (dict(optimizer="schedule-free-sgd", ema=0.9), "leave out --ema"),
        (dict(penalty_decoupled=True), "there is none"),
        (dict(snapshots=True, plan="lora"), "not low-rank updates"),
        (dict(penalty=l2_sp), "counts for nothing without its factor"),
        (dict(penalty_weight=0.1), "and there is none"),
        (dict(lora={"alpha": 16.0}, plan="full"), "--lora.alpha is about low-rank updates, and there are none"),
        (dict(lora={"alpha": 0.0}, plan="lora"), "it is above 0"),
        (dict(loss=losses.squared_error), "which have one label an image; for them are cross-entropy"),
        (dict(loss=partial(losses.huber, delta=2.0)), "huber is not for these data"),
        (dict(loss="focl"), "There is no loss 'focl'. Did you mean focal"),
        (dict(objective="lwf", model="deit_tiny_distilled_patch16_224"), "has bias, dist_bias, dist_kernel, kernel"),
        (dict(optimizer="jft.optim:adamx"), "Did you mean adam"),
        (dict(objective="lwf", plan="full"), "takes the head that came with the weights, and there is none"),
        (dict(optimizer=lambda decay, mask: optax.adamw(1e-3, weight_decay=decay)), "it applies a learning rate"),
        (dict(optimizer=optax.adamw(1e-3)), r"a function \(weight_decay, mask\)"),
        (dict(optimizer=optax.adamw), "No optimizer, which is"),
        (dict(optimizer=lambda rate: optax.sgd(rate)), "No optimizer, .* takes 1 positional argument"),
        (dict(schedule=optax.constant_schedule(1e-3)), r"a function \(peak, steps\)"),
        (dict(plan=(Stage("all", ("*",), schedule=lambda peak, steps: None),)), "No schedule, which is"),
        (dict(objective=partial(distil.features, at="nowhere")), "nowhere"),
        (dict(objective=partial(distil.features, wieght=0.1)), "unexpected keyword argument 'wieght'"),
        (dict(objective=distil.features, plan="full"), "so they give no features before head"),
        (dict(penalty=partial(l2_sp, strengths=(("haed", 0.1),)), penalty_weight=0.1), "'haed' matches no parameter"),
        (dict(penalty=lambda *_: l2_sp(*_, strengths=(("haed", 0.1),)), penalty_weight=0.1), "'haed' matches no"),
        (dict(penalty=lambda params: 0.0, penalty_weight=0.1), "--penalty cannot be taken: .* takes 1 positional"),
        (dict(penalty=lambda params, source: jnp.ones(2), penalty_weight=0.1), r"gives \(2,\); a scalar"),
        (dict(objective=losses.focal), r"--objective, a function \(model, …\) .* cannot be taken: "),
        (dict(objective=lambda *_, **__: None), "--objective, a function .*cannot be taken: "),
        (dict(objective=objective_of(accuracy=0.0)), "metrics of --objective are accuracy; 'loss' is the one"),
        (dict(objective=objective_of(loss=np.zeros(8))), r"the metrics loss \(8,\) and .*; a scalar, and a pair"),
        (dict(objective=lambda *_, **__: lambda *_: jnp.zeros(())), "--objective gives .*; a scalar, and a pair"),
        (dict(views=2, plan="head", augment=None), "--views 2 keeps .* Say --augment crop flip"),
        (dict(views=2, plan="full", augment=("flip",)), "--views 2 keeps .* Leave it out"),
        (dict(views=2, augment=("flip",), features="none"), "--features none keeps none"),
        (dict(plan="vpt", model="tiny_resnet"), "prompts beside a ViT's tokens; tiny_resnet has none"),
    ):
        with pytest.raises(UserError, match=message):
            train(config.replace(workdir=str(tmp_path / "run"), **options))
        assert not (tmp_path / "run").exists()


def test_balance_draws_by_class(config, folder, tmp_path):
    """Of a set with one image of a class and ten of another, both come equally often."""
    splits = build.read_data(config)
    few = np.flatnonzero(splits.train.labels != 0)[:10].tolist() + np.flatnonzero(splits.train.labels == 0)[:1].tolist()
    chosen = splits.train.select(few)
    made = config.replace(
        data=lambda: {"train": chosen, "val": splits.val}, balance=True, plan="head", workdir=str(tmp_path / "run"),
        epochs=1,
    )  # fmt: skip
    assert train(made).result["train"]["count"] == 11


@pytest.mark.slow
def test_what_comes_again_is_drawn_anew_alike_from_memory_and_as_a_stream(config, tmp_path):
    made = config.replace(shots=1, balance=True, augment=("crop", "flip"), batch=16, epochs=20)
    runs = [train(made.replace(resident=r, workdir=str(tmp_path / str(r)))) for r in (0.5, 0.0)]
    a, b = ([line["loss"] for line in lines_of(r) if "loss" in line] for r in runs)
    np.testing.assert_allclose(a, b, rtol=1e-4)
