"""The frozen-prefix cache: on the disk, of augmented views, and never stale; and a batch taken in pieces for memory."""

import json
import os
import threading
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jft import Config, Stage, build, features, train
from jft.bundle import load
from jft.errors import MachineError
from jft.models import make_model
from jft.step import State

pytestmark = pytest.mark.usefixtures("optax_promotion")
PLAN = (Stage("head", ("head",), epochs=2, lr=0.05),)


def config(folder, workdir, **fields):
    given = dict(model="tiny_vit", weights="none", plan=PLAN, batch=8, augment=(), display="quiet", warmup=0.0)
    return Config(data=str(folder), workdir=str(workdir), **(given | fields))


def same(a, b, **tolerance):
    a, b = load(a.workdir / "model"), load(b.workdir / "model")
    for name in a.params:
        np.testing.assert_allclose(a.params[name], b.params[name], err_msg=name, **tolerance)


@pytest.fixture(scope="module")
def plain(folder, tmp_path_factory):
    """A run that runs the frozen parts every step."""
    patch = pytest.MonkeyPatch()
    patch.setenv("JFT_CACHE", str(tmp_path_factory.mktemp("cache")))
    with jax.numpy_dtype_promotion("standard"):
        yield train.train(config(folder, tmp_path_factory.mktemp("plain") / "run", features="none"))
    patch.undo()


def test_saved_features_are_loaded_whole_or_not_at_all(caplog):
    x = np.random.default_rng(0).normal(size=(5, 3, 2)).astype(np.float32)
    features.save("a", [x[:2], x[2:]])
    assert features.load("a", x.shape).tobytes() == x.tobytes()
    assert features.load("b", x.shape) is None and features.load("a", (4, 3, 2)) is None
    file = features._file("a")
    raw = bytearray(file.read_bytes())
    for place in (0, 77, len(raw) - 9, len(raw) - 1):
        damaged = bytearray(raw)
        damaged[place] ^= 4
        file.write_bytes(damaged)
        assert features.load("a", x.shape) is None
    assert "computing them again" in caplog.text
    assert [p.name for p in file.parent.iterdir()] == ["a"]


def test_what_was_used_longest_ago_makes_room(monkeypatch):
    monkeypatch.setattr(features, "MOST_ON_DISK", 100)
    for name in ("a", "b", "c"):
        features.save(name, [np.zeros(8, np.float32)])  # 44 bytes each
    assert sorted(p.name for p in features._file("a").parent.iterdir()) == ["b", "c"]


def test_what_another_process_is_writing_does_not_make_room(monkeypatch):
    x = np.arange(2**18, dtype=np.float32)
    monkeypatch.setattr(features, "MOST_ON_DISK", 1.2 * x.nbytes)

    def slowly():
        yield x[: 2**17]
        features.save("b", [x])  # as another process might, which ends first
        yield x[2**17 :]

    features.save("a", slowly())
    folder = features._file("a").parent
    assert features.load("a", x.shape) is not None and [p.name for p in folder.iterdir()] == ["a"]
    for name, age in (("killed.part", 2 * 86400), ("young.part", 3600)):
        (folder / name).touch()
        os.utime(folder / name, (time.time() - age,) * 2)
    (folder / "gone").symlink_to(folder / "nowhere")  # is listed and cannot be looked at, as one removed in between
    features.save("c", [x])
    assert sorted(p.name for p in folder.iterdir()) == ["c", "gone", "young.part"]


def test_many_that_save_and_make_room_at_once_all_end(monkeypatch):
    monkeypatch.setattr(features, "MOST_ON_DISK", 1000)
    failed = []

    def many(who):
        try:
            for i in range(100):
                features.save(f"{who}-{i % 5}", [np.zeros(64, np.float32)] * 2)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=many, args=(who,)) for who in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert not list(features._file("").glob("*.part"))


@pytest.mark.slow
def test_a_cache_that_cannot_be_written_is_told_where_a_run_needs_it(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "cache_dir", lambda: tmp_path / "file")
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        features.save("a", [np.zeros(1)])
    with pytest.raises(MachineError, match=r"file/features cannot be written: .*JFT_CACHE"):
        features.save("a", [np.zeros(1)], needed=True)
    monkeypatch.setattr(train, "memory_budget", lambda share: 0)
    with pytest.raises(MachineError, match="cannot be written"):
        train.train(config(folder, tmp_path / "run", features="disk"))
    monkeypatch.undo()
    monkeypatch.setenv("JFT_CACHE", str(tmp_path / "cache"))
    train.train(config(folder, tmp_path / "run", features="disk"))


def test_the_key_is_of_all_that_features_depend_on():
    model, images = make_model("tiny_vit", num_classes=2), np.zeros((2, 4, 4, 3), np.uint8)
    params, _ = model.init(jax.random.key(0))
    params = {n: np.asarray(v) for n, v in params.items()}
    key = features.key(model, "head", params, images)
    moved = {n: v + (n == "block0/attn/qkv/kernel") * np.float32(1e-6) for n, v in params.items()}
    head = {n: v + (n.startswith("head/")) * np.float32(1) for n, v in params.items()}
    assert key == features.key(model, "head", head, images)  # what comes after the cut does not matter
    others = [
        features.key(model, "head", moved, images),
        features.key(model, "block1", params, images),
        features.key(model, "head", params, images + 1),
        features.key(model, "head", params, images, "bfloat16"),
        features.key(make_model("tiny_vit", num_classes=2, dtype="bfloat16"), "head", params, images),
    ]
    assert len({key, *others}) == 6


@pytest.mark.slow
def test_features_from_the_disk_change_nothing(plain, folder, tmp_path, monkeypatch):
    """Computed and kept, read again by the next run, and mapped where memory does not hold them."""
    first = train.train(config(folder, tmp_path / "first"))
    kept = list(features._file("").iterdir())
    assert len(kept) == 2
    monkeypatch.setattr(features, "rows", None)  # nothing is computed again
    second = train.train(config(folder, tmp_path / "second"))
    same(first, second, rtol=0, atol=0)
    same(plain, first, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(train, "memory_budget", lambda share: 0)
    mapped = train.train(config(folder, tmp_path / "mapped", features="disk"))
    same(first, mapped, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_views_are_taken_in_turn(folder, tmp_path):
    """With one view every pass sees the same features; with two the second pass sees others."""
    run = {n: train.train(config(folder, tmp_path / str(n), augment=("flip",), views=n)) for n in (1, 2)}
    logs = {n: [json.loads(x) for x in (r.workdir / "metrics.jsonl").read_text().splitlines()] for n, r in run.items()}
    losses = {n: [row["loss"] for row in rows if "loss" in row] for n, rows in logs.items()}
    half = len(losses[1]) // 2
    np.testing.assert_allclose(losses[1][: half - 1], losses[2][: half - 1], rtol=1e-5)
    assert not np.allclose(losses[1][half:], losses[2][half:], rtol=1e-5)
    with pytest.raises(build.UserError, match="mixup mixes images"):
        train.train(config(folder, tmp_path / "mix", augment=("mixup",), views=2))


@pytest.mark.slow
def test_a_step_that_memory_does_not_hold_is_taken_in_pieces(plain, folder, tmp_path, monkeypatch):
    """Before the first step, from the compiler's own count; the result is that of the whole batch."""
    needed = []
    count = train.shard.temporary
    monkeypatch.setattr(train.shard, "temporary", lambda compiled: needed.append(count(compiled)) or needed[-1])
    monkeypatch.setattr(train, "memory_free", lambda: 0 if len(needed) < 2 else 2**40)
    monkeypatch.setattr(train.shard, "make_mesh", lambda model=1, make=train.shard.make_mesh: make(jax.devices()[:2]))
    pieces = train.train(config(folder, tmp_path / "pieces", features="none"))
    assert len(needed) == 2
    same(plain, pieces, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_on_a_cpu_a_transformer_takes_a_batch_in_pieces(folder, tmp_path, monkeypatch):
    """As few tokens at a time as keep the processor busy, with the result of the whole batch."""
    assert [build.most_pieces(32, tokens) for tokens in (0, 37, 197, 785)] == [1, 1, 4, 16]
    monkeypatch.setattr(train.shard, "make_mesh", lambda model=1, make=train.shard.make_mesh: make(jax.devices()[:1]))
    vit, seen, make = make_model("tiny_vit"), [], train.make_leg_step
    tokens = vit.shape_before("block0")[0]
    monkeypatch.setattr(train, "make_leg_step", lambda *args: seen.append(args[6:]) or make(*args))
    monkeypatch.setattr(build, "PIECE", 4 * tokens)
    given = dict(plan="full", epochs=1, features="none", lr=1e-2, optimizer="sgd")  # Adam enlarges a zero's rounding
    runs = [train.train(config(folder, tmp_path / str(n), accumulate=n, **given)) for n in (1, None)]
    assert seen == [(1, False), (2, False)]
    same(*runs, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_pieces_of_one_device_are_no_snare_for_more(folder, tmp_path, monkeypatch, crash):
    """A run that took a batch of 8 in 8 pieces goes on where each of two devices has 4 images."""
    mesh, count = train.shard.make_mesh, [1]
    monkeypatch.setattr(train.shard, "make_mesh", lambda model=1: mesh(jax.devices()[: count[0]]))
    monkeypatch.setattr(build, "PIECE", 1)
    made = config(folder, tmp_path / "run", plan="full", epochs=2, features="none", checkpoint_every=0.0)
    crash(made, 6)
    count[0] = 2
    assert train.train(made).result["last"]["step"] == 8


def test_validation_from_features_is_by_the_batch_but_for_a_head():
    seen = []

    def step(params, stats, batch):
        seen.append(len(batch["features"]))
        return 2 * batch["features"]

    kept = {("val", cut): np.arange(7.0)[:, None] for cut in ("block1", "head")}
    kept["val", "head"] = jax.numpy.asarray(kept["val", "head"])
    run = SimpleNamespace(
        features=kept, config=Config(batch=3), model=make_model("tiny_vit"), _eval_step=lambda start: step
    )
    state = State(step=None, params={}, batch_stats={}, opt_state=None, key=None, ema={}, source={})
    for cut, expected in (("block1", [3, 3, 3]), ("head", [7])):
        np.testing.assert_array_equal(train.Run._logits(run, state, cut), 2 * np.asarray(kept["val", cut]))
        assert seen == expected
        seen.clear()


def test_a_state_with_an_answer_that_is_no_number_is_never_best(folder, tmp_path, monkeypatch):
    """However many others are right: no predictions could be written of it."""
    logits, calls = train.Run._logits, []

    def broken(run, state, cut):
        found = logits(run, state, cut).copy()
        calls.append(run.step)
        labels = run.data["val"].labels
        found[:] = np.arange(3)[None] == (labels[:, None] if len(calls) == 2 else 0)
        if len(calls) == 2:
            found[0] = np.nan
        return found

    monkeypatch.setattr(train.Run, "_logits", broken)
    run = train.train(config(folder, tmp_path / "run"))
    assert calls == [4, 8] and run.result["val"]["best_step"] == 4


def test_what_is_taken_in_pieces():
    vit = make_model("tiny_vit")
    tokens = vit.shape_before("block0")[0]
    for model, cut, expected in (
        (vit, None, tokens),
        (vit, "block1", tokens),
        (vit, "norm", 0),
        (vit, "head", 0),
        (make_model("tiny_resnet"), None, 0),
        (make_model("tiny_convnext"), None, 0),
    ):
        assert build.takes_tokens(model, cut, model.shapes()[0]) == expected


def test_examples_that_one_device_does_not_hold_lie_spread(plain, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "memory_budget", lambda share: 1000)
    cut = []
    spread = train.shard.spread
    monkeypatch.setattr(train.shard, "spread", lambda arrays, mesh: cut.append(spread(arrays, mesh)) or cut[-1])
    run = train.train(config(folder, tmp_path / "run", features="none"))
    image = cut[0]["image"]
    assert len(image) % 8 == 0 and image.addressable_shards[0].data.shape[0] == len(image) // 8
    same(plain, run, rtol=1e-4, atol=1e-5)
