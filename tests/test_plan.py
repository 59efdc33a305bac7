"""Plans as data: presets over real part lists, layer-wise decay, shares of the epochs, and what is refused."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jft import Config, cli, plan, sanity
from jft.build import resolve
from jft.errors import UserError
from jft.models import MODELS, make_model
from jft.plan import Stage


def names_and_parts(name):
    model = make_model(name, num_classes=2)
    return list(model.shapes()[0]), list(model.parts)


RESNET, VIT = names_and_parts("resnet18"), names_and_parts("vit_tiny_patch16_224")


@pytest.mark.parametrize("model", [RESNET, VIT, names_and_parts("tiny_resnet"), names_and_parts("tiny_vit")])
@pytest.mark.parametrize("preset", [p for p in plan.PLANS if p not in ("lora", "vpt")])  # which add names
def test_every_preset_resolves_on_every_family(preset, model):
    names, parts = model
    stages = plan.resolve(preset, names, parts, epochs=10, lr=None)
    assert sum(s.epochs for s in stages) == pytest.approx(10)
    assert all(s.lr > 0 for s in stages)


PRESETS = {  # but gradual: one stage of everything in it, or (name, what trains, rate) of each
    "head": [("head", ("head",), 1e-3)],
    "full": [("full", ("head", ("*", 0.1)), 1e-3)],
    "flat": [("flat", ("*",), 1e-4)],
    "lp-ft": [("head", ("head",), 1e-3), ("full", ("*",), 1e-4)],
    "top-1": [("top-1", ("head", ("stage4/block1", 0.1), ("pool", 0.1)), 1e-3)],
    "top-2": [("top-2", ("head", ("stage4/block0", 0.1), ("stage4/block1", 0.1), ("pool", 0.1)), 1e-3)],
    "top-3": [
        ("top-3", ("head", ("stage3/block1", 0.1), ("stage4/block0", 0.1), ("stage4/block1", 0.1), ("pool", 0.1)), 1e-3)
    ],
    "top-4": [
        (
            "top-4",
            (
                "head",
                ("stage3/block0", 0.1),
                ("stage3/block1", 0.1),
                ("stage4/block0", 0.1),
                ("stage4/block1", 0.1),
                ("pool", 0.1),
            ),
            1e-3,
        )
    ],
    "surgical-first": [("surgical-first", ("head", ("stem", 0.1), ("stage1", 0.1)), 1e-3)],
    "surgical-middle": [("surgical-middle", ("head", ("stage2", 0.1), ("stage3", 0.1)), 1e-3)],
    "surgical-last": [("surgical-last", ("head", ("stage4", 0.1)), 1e-3)],
    "surgical": [("surgical", ("head", ("*", 0.1)), 1e-3)],
    "bitfit": [("bitfit", ("head", "*bias"), 1e-3)],
    "norm": [("norm", ("head", "*norm*"), 1e-3)],
    "lora": [("lora", ("head", "*/lora_*"), 1e-3)],
    "vpt": [("vpt", ("head", "*/prompts"), 1e-3)],
}


def test_presets_are_what_they_say():
    assert {*PRESETS, "gradual"} == {*plan.PLANS, "top-4"}
    for name, stages in PRESETS.items():
        made = plan.preset(name)(RESNET[1], None)
        assert [(s.name, s.train, s.lr) for s in made] == stages
        assert [s.share for s in made] == [1 / len(made)] * len(made)
        assert all(s.surgical == (name == "surgical") for s in made)
        assert all((s.batch_norm == "frozen") == (name in ("bitfit", "norm", "lora")) for s in made)
        assert all((s.augment == ()) == (s.name == "head") for s in made)
        given = plan.preset(name)(RESNET[1], 2e-2)
        assert given[0].lr == 2e-2 and [s.train for s in given] == [s.train for s in made]


def test_beside_pretrained_batch_norms_presets_keep_the_statistics_and_a_hundredth_of_the_rate():
    """Of a model that has them, and weights to keep; other presets are the same with and without."""
    sizes = {"resnet18": RESNET, "vit_tiny_patch16_224": VIT}
    for name, (names, parts) in sizes.items():
        model, norms = make_model(name, num_classes=2), name == "resnet18"
        for preset in ("full", "top-2", "surgical", "surgical-first", "surgical-middle", "surgical-last"):
            made = Config(model=name, plan=preset, weights="source.npz")
            for config, kept in ((made, norms), (made.replace(weights="none"), False)):
                (stage,) = resolve(config, model, names)
                flat = preset == "full" and config.weights == "none"
                assert stage.batch_norm == ("frozen" if kept else "auto")
                assert set(plan.multipliers(stage, names, parts).values()) - {0.0} == (
                    {1.0} if flat else {1.0, 0.01 if kept else 0.1}
                )
        probe, rest = resolve(Config(model=name, plan="lp-ft", weights="source.npz", lr=2e-3), model, names)
        assert (probe.lr, probe.batch_norm) == (2e-3, "auto")
        assert (rest.lr, rest.batch_norm) == ((2e-5, "frozen") if norms else (2e-4, "auto"))
    for preset in ("head", "flat", "gradual", "bitfit", "norm"):
        with_, without = (plan.resolve(preset, *RESNET, lr=None, batch_norm=known) for known in (True, False))
        assert with_ == without


def test_a_plans_own_function_is_told_what_it_asks_for():
    def asks(parts, lr, batch_norm):
        return (Stage("all", ("*",), batch_norm="frozen" if batch_norm else "auto"),)

    def plain(parts, lr):
        return (Stage("all", ("*",)),)

    (stage,) = plan.resolve(asks, *RESNET, lr=None, batch_norm=True)
    assert stage.batch_norm == "frozen"
    (stage,) = plan.resolve(plain, *RESNET, lr=None, batch_norm=True)
    assert stage.batch_norm == "auto"


def test_full_is_flat_where_no_head_is_new_beside_pretrained_parts():
    """One that was kept with its weights, and one of a model that begins from nothing."""
    model = make_model("resnet18", num_classes=2)
    given = Config(model="resnet18", plan="full", weights="r18.safetensors", lr=2e-3)
    told = {"full": {1.0, 0.01}, "flat": {1.0}}
    for made, name in (
        (given, "full"),
        (given.replace(keep_head=True), "flat"),
        (given.replace(weights="none"), "flat"),
    ):
        (stage,) = resolve(made, model, RESNET[0])
        assert (stage.name, stage.lr, set(plan.multipliers(stage, *RESNET).values())) == (name, 2e-3, told[name])


def test_what_no_stage_trains_and_no_weights_have_is_told():
    names, parts = (
        ["embed/kernel", "block0/prompts", "block1/prompts", "head/kernel"],
        ["embed", "block0", "block1", "head"],
    )
    missing = ("block0/prompts", "block1/prompts", "head/kernel")
    (told,) = sanity.never_trained(names, parts, missing, plan.resolve("head", names, parts, lr=None))
    assert told.startswith("No stage trains block0/prompts, block1/prompts, which") and "2 arrays" in told
    for preset in ("vpt", "full", "lp-ft"):
        assert sanity.never_trained(names, parts, missing, plan.resolve(preset, names, parts, lr=None)) == []


def test_top_k_is_of_the_parts_there_are():
    tiny = names_and_parts("tiny_resnet")
    for k in (0, 7):
        with pytest.raises(UserError, match=f"asks for {k} parts; there are 1 to 6 below"):
            plan.resolve(f"top-{k}", *tiny, lr=None)
    rates = plan.multipliers(plan.resolve("top-6", *tiny, lr=None)[0], *tiny)
    assert set(rates) == set(tiny[0]) and {n for n, v in rates.items() if v != 0.1} == {"head/kernel", "head/bias"}


def test_low_rank_updates_are_the_plans_or_asked_for():
    assert plan.lora_of("head", {}) == plan.Lora() == plan.Lora(rank=0, alpha=None, targets=("*",), dora=False)
    assert plan.lora_of("lora", {}) == plan.Lora(rank=8)
    assert plan.lora_of("full", {"rank": 2, "targets": ["a", "b"]}) == plan.Lora(rank=2, targets=("a", "b"))
    with pytest.raises(UserError, match=r"--lora\.rank is 0; the plan lora needs at least 1"):
        plan.lora_of("lora", {"rank": 0})
    with pytest.raises(KeyError):
        plan.part_of("nowhere/kernel", RESNET[1])


def trained(stage, model):
    return plan.parts_with(plan.trainable(plan.multipliers(stage, *model)), model[1])


def test_head_is_the_head_alone():
    (stage,) = plan.resolve("head", *RESNET, epochs=3, lr=None)
    assert trained(stage, RESNET) == ["head"]


def test_gradual_unfreezes_from_the_top_and_ends_with_everything():
    stages = plan.resolve("gradual", *RESNET, epochs=10, lr=None)
    sets = [set(trained(s, RESNET)) for s in stages]
    assert all(a < b for a, b in zip(sets, sets[1:], strict=False))
    assert sets[0] == {"head"}
    assert sets[1] == {"stage4/block0", "stage4/block1", "head"}
    assert sets[-1] == set(plan.parts_with(*RESNET))


def test_gradual_begins_with_the_whole_plan_of_the_head():
    """So that what unfreezing gives or costs is told against the linear probe; `--epochs` is a total all the same."""
    probe, first = (plan.resolve(name, *RESNET, lr=None)[0] for name in ("head", "gradual"))
    assert first == dataclasses.replace(probe, share=first.share) and first.epochs == 10
    for preset, epochs, total in (("gradual", None, 15), (plan.gradual, None, 15), ("gradual", 6, 6)):
        assert sum(s.epochs or 0 for s in plan.resolve(preset, *RESNET, epochs=epochs, lr=None)) == total


def test_gradual_rates_fall_by_2_6_a_group():
    last = plan.resolve("gradual", *VIT, epochs=10, lr=1e-3)[-1]
    rates = plan.multipliers(last, *VIT)
    assert (last.lr, rates["head/kernel"]) == (1e-4, 1.0)
    assert rates["block11/attn/qkv/kernel"] == rates["norm/scale"] == pytest.approx(0.03)
    assert rates["block8/attn/qkv/kernel"] == pytest.approx(0.03 / 2.6)
    assert rates["embed/pos_embed"] == rates["block0/norm1/bias"] == pytest.approx(0.03 / 2.6**3)


def test_layer_decay_counts_as_mae_does():
    """embed is layer 0, block i layer i + 1, the last norm and the head one layer above the last block."""
    rates = plan.multipliers(Stage("s", ("*",), layer_decay=0.75), *VIT)
    assert rates["head/kernel"] == rates["norm/scale"] == 1.0
    assert rates["block11/mlp/fc1/kernel"] == pytest.approx(0.75)
    assert rates["block0/mlp/fc1/kernel"] == pytest.approx(0.75**12)
    assert rates["embed/cls_token"] == pytest.approx(0.75**13)


def test_lr_is_the_fastest_groups():
    for preset in plan.PLANS.keys() - {"lora", "vpt"}:
        stages = plan.resolve(preset, *RESNET, epochs=4, lr=0.02)
        fastest = max(s.lr * max(plan.multipliers(s, *RESNET).values()) for s in stages)
        assert fastest == pytest.approx(0.02), preset


def test_own_epochs_are_kept_and_the_rest_shared():
    stages = (Stage("a", ("head",), epochs=2), Stage("b", ("*",), share=1), Stage("c", ("*",), share=3))
    resolved = plan.resolve(stages, *RESNET, epochs=8, lr=None)
    assert [s.epochs for s in resolved] == [2, 2, 6]


def test_what_every_stage_overrides_counts_for_nothing(tmp_path):
    """It is refused on the command line, told in a config, and left out of what a rule of `hyper` says."""
    both = (Stage("a", ("head",), lr=1e-2, epochs=1, augment=()), Stage("b", ("*",), epochs=1, lr=1e-3))
    assert plan.overridden(both) == {"lr", "epochs"}
    assert plan.overridden((Stage("a", ("head",)),)) == plan.overridden("full") == frozenset()
    made = Config(plan=both, epochs=7, augment=("flip",))
    assert sanity.settings(made) == ["epochs 7 counts for nothing: every stage of the plan has its own."]
    assert sanity.settings(Config(plan=both)) == sanity.settings(Config(epochs=7)) == []
    file = tmp_path / "c.py"
    file.write_text(
        "import jft\nboth = (jft.Stage('a', ('head',), lr=1e-2), jft.Stage('b', ('*',), lr=1e-3))\n"
        "def config():\n    return jft.Config(plan=both)\n"
    )
    parser = cli.make_parser()
    with pytest.raises(UserError, match="--lr would count for nothing"):
        cli.configs_of(parser.parse_args(["finetune", str(file), "--lr", "0.5"]))
    assert cli.configs_of(parser.parse_args(["finetune", str(file), "--epochs", "3"]))[""].epochs == 3


def test_labels_are_for_multi_transform():
    multipliers = plan.multipliers(Stage("s", ("head", ("stage4", 0.1))), *RESNET)
    head = plan.multipliers(Stage("h", ("head",)), *RESNET)
    labels = plan.labels([head, multipliers])
    assert labels["head/bias"] == labels["stage4/block0/conv1/kernel"] == "since1"
    assert labels["stem/conv/kernel"] == "frozen"
    carried = plan.labels([head, multipliers], carry=True)
    assert carried["head/bias"] == "since0" and carried["stage4/block0/conv1/kernel"] == "since1"
    assert plan.labels([multipliers, head, multipliers], carry=True)["stage4/block0/conv1/kernel"] == "since2"


@pytest.mark.parametrize(
    ("given_plan", "message"),
    [
        ("haed", "Did you mean head"),
        ((), "no stages"),
        ((Stage("a", ("haed",)),), "matches no parameter. Did you mean head"),
        ((Stage("a", (("head", 0.0),)),), "trains nothing"),
        ((Stage("a", ("head",)), Stage("a", ("*",))), "share a name"),
        ((Stage("a", ("head",), epochs=0),), "more than 0"),
        ((Stage("a", ("head",)), Stage("b", ("*",), share=-1)), "share=-1; its share of the epochs is above 0"),
        ((Stage("a", ("*",), layer_decay=-0.5),), "layer_decay=-0.5; it is above 0 and at most 1"),
        ((Stage("a", ("*",), layer_decay=1.5),), "at most 1"),
        ((Stage("a", (("head", -1.0),)),), "negative"),
        ((Stage("a", ("head",), batch_norm="off"),), "'auto' or 'frozen'"),
        (lambda: (), r"plan's function, \(parts, lr\) -> stages, cannot be taken: .*positional"),
        (lambda parts, lr: 1 / 0, "cannot be taken: .*ZeroDivisionError"),
        (lambda parts, lr: ["head"], r"gave \['head'\]; a tuple of jft.Stage is expected"),
        (lambda parts, lr: None, "gave None; a tuple of jft.Stage"),
    ],
)
def test_refused(given_plan, message):
    with pytest.raises(UserError, match=message):
        plan.resolve(given_plan, *RESNET, epochs=1, lr=None)


@given(st.sampled_from(sorted(MODELS)))
def test_groups_hold_every_part_of_the_body_once(name):
    parts = list(make_model(name).parts)
    prefixes = [p for group in plan.groups(parts) for p in group]
    body = {p.split("/")[0] for p in parts if p not in plan.TOP}
    assert sorted(prefixes) == sorted(body)
