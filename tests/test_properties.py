"""Laws of plans, rules, splits, schedules and lists, whatever is put into them; those of trees are in test_tree.py."""

import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from jft import optim, plan, tree
from jft.data import check, sources
from jft.errors import UserError, brief, printable
from jft.models import make_model
from jft.plan import Stage
from jft.weights.rules import CONV, LINEAR, SAME, Concat, Leading, Reshape

MODEL = make_model("tiny_vit", num_classes=3)
NAMES, PARTS = list(MODEL.shapes()[0]), list(MODEL.parts)
PATTERNS = sorted({p for n in NAMES for p in (n, n.split("/")[0], f"*/{n.rsplit('/', 1)[-1]}")} | {"*"})

entries = st.tuples(st.sampled_from(PATTERNS), st.sampled_from([0.0, 0.1, 0.5, 1.0, 3.0]))
stages = st.lists(
    st.builds(
        lambda train, epochs, decay: (tuple(train), epochs, decay),
        st.lists(entries, min_size=1, max_size=4, unique_by=lambda e: e[0]),
        st.one_of(st.none(), st.floats(0.5, 4)),
        st.one_of(st.just(1.0), st.floats(0.3, 1.0)),
    ),
    min_size=1, max_size=3,
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(stages, st.floats(1, 50))
def test_a_plan_is_refused_or_keeps_its_laws(described, epochs):
    given_plan = tuple(
        Stage(f"s{i}", train=train, epochs=own, layer_decay=decay) for i, (train, own, decay) in enumerate(described)
    )
    try:
        resolved = plan.resolve(given_plan, NAMES, PARTS, epochs=epochs, lr=1e-3)
    except UserError as error:
        assert str(error)
        return
    for before, stage in zip(given_plan, resolved, strict=True):
        assert stage.lr is not None and stage.lr > 0 and stage.epochs is not None and stage.epochs > 0
        assert before.epochs is None or stage.epochs == before.epochs
        values = plan.multipliers(stage, NAMES, PARTS)
        assert values.keys() <= set(NAMES) and all(v >= 0 for v in values.values())
        trained = plan.trainable(values)
        assert trained
        for name in NAMES:  # the first match wins, and what none names is frozen
            first = next((m for pattern, m in stage.train if tree.matches(pattern, name)), 0.0)
            assert (name in trained) == (first > 0), name
        assert plan.parts_with(trained, PARTS) == [
            p for p in PARTS if any(plan.part_of(n, PARTS) == p for n in trained)
        ]
    if any(s.epochs is None for s in given_plan):
        shared = [s.epochs for s, before in zip(resolved, given_plan, strict=True) if before.epochs is None]
        assert sum(shared) == pytest.approx(epochs)
    multipliers = [plan.multipliers(s, NAMES, PARTS) for s in resolved]
    labels = plan.labels(multipliers)
    assert {n for n, label in labels.items() if label != "frozen"} == plan.trainable(multipliers[-1])
    assert set(labels) == set(NAMES)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_every_operation_of_a_rule_is_undone_to_the_byte(data):
    a, b, c, d = (data.draw(st.integers(1, 4)) for _ in range(4))
    parts = data.draw(st.integers(1, 3))
    shares = tuple(data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=3)))
    op, ours = data.draw(
        st.sampled_from(
            [
                (SAME, (a, b, c)),
                (LINEAR, (a, b)),
                (CONV, (a, b, c, d)),
                (Leading(2), (1, 1, a, b)),
                (Reshape((b, a, 1, 1), (b, a), LINEAR), (a, b)),
                (Concat(parts, -1, LINEAR), (a, parts * b)),
                (Concat(parts, 0), (parts * a, b)),
                (Concat(shares, -1, LINEAR), (a, sum(shares) * b)),
            ]
        )
    )
    array = np.random.default_rng(0).standard_normal(ours).astype(np.float32)
    theirs = op.to_theirs(array)
    again = op.to_ours(*theirs)
    assert again.shape == array.shape and again.tobytes() == array.tobytes()
    back = op.to_theirs(again)
    assert [t.tobytes() for t in back] == [t.tobytes() for t in theirs]


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["cosine", "linear", "constant", "step", "one-cycle"]),
    st.floats(1e-6, 10), st.integers(1, 400), st.floats(0, 0.95),
)  # fmt: skip
def test_a_schedule_stays_between_zero_and_its_peak(name, peak, steps, warmup):
    with jax.numpy_dtype_promotion("standard"):
        schedule = optim.make_schedule(name, peak, steps, warmup)
        places = sorted({0, 1, steps // 3, steps // 2, round(warmup * steps), max(steps - 2, 0), steps - 1})
        rates = [float(schedule(i)) for i in places]
    assert all(0 <= r <= peak * (1 + 1e-5) and np.isfinite(r) for r in rates)
    rise = round(warmup * steps)
    if name != "one-cycle":
        risen = [r for i, r in zip(places, rates, strict=True) if i < rise]
        fallen = [r for i, r in zip(places, rates, strict=True) if i >= rise]
        assert risen == sorted(risen) and fallen == sorted(fallen, reverse=True)
        assert not rise or rates[0] > 0


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 40), st.integers(2, 4), st.floats(0.05, 0.9), st.integers(0, 5), st.data())
def test_what_a_list_leaves_out_moves_no_other_picture(n, k, fraction, seed, data):
    labels = np.arange(n * k, dtype=np.int32) % k
    names = tuple(f"{i}.png" for i in range(n * k))
    whole = sources.Dataset(names, labels, tuple("abcd"[:k]), lambda i: b"")
    kept, held = sources.stratified_split(labels, fraction, seed)
    out = data.draw(st.sets(st.sampled_from(names), max_size=5))
    train, val = whole.select(kept), whole.select(held)
    survivors = {int(label) for name, label in zip(train.names, train.labels, strict=True) if name not in out}
    assume(len(survivors) == k and set(val.names) - out)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "quarantine.txt"
        file.write_text("".join(f"{name}\tany reason\n" for name in sorted(out)))
        left = sources._without_quarantined(sources.Splits(train, val, None, whole.classes, []), file)
    assert left.train.names == tuple(n for n in train.names if n not in out)
    assert left.val is not None and left.val.names == tuple(n for n in val.names if n not in out)
    assert {name for name, _ in left.excluded} == out and left.unknown == ()


@given(st.text())
def test_what_is_printable_has_no_control_character_and_stays_what_it_is(text):
    shown = printable(text)
    assert printable(shown) == shown and all(c.isprintable() or ord(c) > 127 for c in shown)
    shown.encode("utf-8")
    assert "\n" not in shown and "\x1b" not in shown and len(brief(text * 50)) <= 8 * 1300
    if text.isascii() and text.isprintable():
        assert shown == text


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1000), st.integers(20, 100), st.floats(0.9, 1.1))
def test_a_perceptual_hash_hardly_minds_contrast_and_brightness(seed, shift, gain):
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(0, 100, (5, 5))
    grey = np.kron(coarse, np.ones((7, 7)))[:32, :32].astype(np.float32)
    other = check.perceptual_hash(grey * np.float32(gain) + np.float32(shift))
    assert (check.perceptual_hash(grey) ^ other).bit_count() <= 4
