"""What a run promises when something goes wrong: the lock, damage, full disks, numbers that are not finite."""

import errno
import itertools
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from synthetic_run import make_run
from test_train import config, traces

from jft import build, bundle, checkpoint, distil, lock, sanity, train, trial
from jft.checkpoint import Checkpoints
from jft.cli import main
from jft.config import Config
from jft.data import sources
from jft.diagnose import make_diagnosis
from jft.errors import UserError
from jft.models import make_model
from jft.plan import Stage
from jft.preprocess import Preprocess
from jft.report.html import make_report
from jft.report.log import MetricsLog
from jft.run import running
from jft.step import State, supervised
from jft.weights import scratch

pytestmark = pytest.mark.usefixtures("optax_promotion")
SCRIPTS = Path(__file__).parents[1] / "scripts"
SHORT = (Stage("head", ("head",), epochs=2, augment=()), Stage("top", ("head", ("block2", 0.5)), epochs=2))

# -- the lock ---------------------------------------------------------------------------------------------------------


def holder(**changes):
    """What the lock of another process of this host says."""
    return {**lock._mine(), "id": "another", **changes}


@pytest.fixture
def sleeper():
    process = subprocess.Popen(["sleep", "3600"])
    yield process
    process.kill()
    process.wait()


def test_a_held_folder_is_refused_and_let_go_of(tmp_path):
    told = rf"in use: process {os.getpid()} on \S+ has worked"
    with lock.hold(tmp_path), pytest.raises(UserError, match=told), lock.hold(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []
    with lock.hold(tmp_path):
        pass


def test_a_living_process_keeps_its_lock_and_a_dead_one_loses_it(tmp_path, sleeper):
    held = holder(pid=sleeper.pid, started=lock._started(sleeper.pid))
    (tmp_path / "lock").write_text(json.dumps(held))
    with pytest.raises(UserError, match=f"process {sleeper.pid} on .* since {held['since'][:10]}"), lock.hold(tmp_path):
        pass
    sleeper.kill()
    while lock._started(sleeper.pid):  # a zombie then: killed, and nobody has asked for its end
        time.sleep(0.01)
    said = []
    with lock.hold(tmp_path, said.append):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
    assert "which is gone" in said[0]


def test_a_number_that_another_process_has_now_holds_nothing(tmp_path):
    (tmp_path / "lock").write_text(json.dumps(holder(started="1")))
    with lock.hold(tmp_path, lambda said: None):
        pass


@pytest.mark.parametrize("lives", [True, False])
def test_another_hosts_lock_is_watched_for_signs_of_life(tmp_path, monkeypatch, lives):
    monkeypatch.setattr(lock, "PATIENCE", 600 if lives else 0.2)
    file = tmp_path / "lock"
    file.write_text(json.dumps(holder(host="elsewhere", place=["elsewhere"])))
    stop = threading.Event()

    def beat():
        for moment in itertools.count(1):
            if stop.wait(0.05):
                return
            os.utime(file, (moment, moment))

    beats = threading.Thread(target=beat)
    if lives:
        beats.start()
        with pytest.raises(UserError, match=r"on elsewhere"), lock.hold(tmp_path, lambda said: None):
            pass
        stop.set()
        beats.join()
    else:
        with lock.hold(tmp_path, lambda said: None):
            pass


def test_an_empty_lock_of_a_process_that_died_writing_it_is_watched_too(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE", 0.2)
    (tmp_path / "lock").touch()
    with lock.hold(tmp_path, lambda said: None):
        pass


def test_a_lock_that_was_lost_is_noticed_and_left_alone(tmp_path):
    with lock.hold(tmp_path) as check:
        check()
        (tmp_path / "lock").write_text(json.dumps(holder()))
        with pytest.raises(UserError, match=r"taken .* over"):
            check()
    assert (tmp_path / "lock").exists()


def test_a_lock_made_while_a_dead_one_was_looked_at_is_given_back(tmp_path):
    (tmp_path / "lock").write_text(json.dumps(holder(id="new")))
    assert not lock._break(tmp_path / "lock", holder(id="old"))
    assert json.loads((tmp_path / "lock").read_text())["id"] == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["lock"]


def test_a_file_system_without_links_has_locks_too(tmp_path, monkeypatch):
    def link(a, b):
        raise OSError(errno.EPERM, "no links")

    monkeypatch.setattr(os, "link", link)
    with lock.hold(tmp_path), pytest.raises(UserError, match=r"in use"), lock.hold(tmp_path):
        pass


def test_a_run_that_another_process_works_on_is_refused(folder, tmp_path, sleeper):
    (tmp_path / "lock").write_text(json.dumps(holder(pid=sleeper.pid, started=lock._started(sleeper.pid))))
    with pytest.raises(UserError, match=f"in use: process {sleeper.pid}"):
        train.train(config(folder, tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["lock"]


# -- checkpoints that are damaged, or cannot be written ---------------------------------------------------------------


def tree(step):
    return {"a": np.arange(5000, dtype=np.float32) + step, "b": {"c": np.int32(step)}}


def restored(kept):
    for step, position in kept.positions():
        found = kept.restore(step, tree(0), position["sums"])
        if found is not None:
            return step, found, position
    return None


def test_no_damage_of_any_file_of_a_checkpoint_loads_silently(tmp_path):
    """Some damage is harmless: to what Orbax writes and nobody reads. scripts/flip.py does this a thousand times."""
    kept = Checkpoints(tmp_path / "checkpoints", lambda said: None)
    for step in (1, 2):
        kept.save(step, tree(step), {"note": "a" * step})
    kept.close()
    rng, seen = random.Random(0), set()
    newest, aside = tmp_path / "checkpoints/2", tmp_path / "checkpoints-damaged/2"
    for file in [f for f in newest.rglob("*") if f.is_file()]:
        whole = file.read_bytes()
        flipped = bytearray(whole)
        flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        for damaged in (bytes(flipped), whole[: rng.randrange(len(whole))]):
            file.write_bytes(damaged)
            said = []
            kept = Checkpoints(tmp_path / "checkpoints", said.append)
            step, found, position = restored(kept)
            kept.close()
            assert step == 2 or "damaged" in said[0]
            assert all(np.array_equal(x, y) for x, y in zip(*map(jax.tree.leaves, (found, tree(step))), strict=True))
            assert position["note"] == "a" * step
            seen.add(step)
            if aside.exists():
                aside.rename(newest)
            file.write_bytes(whole)
    assert seen == {1, 2}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("limit", [0, 150, 400, 10_000])
def test_a_checkpoint_that_cannot_be_written_is_told_and_the_one_before_stands(tmp_path, limit):
    """Every file that is longer than a limit fails, after a part of it was written: as on a full disk."""
    kept = Checkpoints(tmp_path / "checkpoints")
    kept.save(1, tree(1), {})
    kept.wait()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(UserError, match=r"cannot be written.*File too large.*of step 1"):
            kept.save(2, tree(2), {})
            kept.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert kept.manager.all_steps() == [1]
    kept.save(3, tree(3), {})
    kept.close()
    kept = Checkpoints(tmp_path / "checkpoints")
    assert sorted(kept.manager.all_steps()) == [1, 3]
    assert restored(kept)[0] == 3
    kept.close()


def no_room_for(monkeypatch, folder):
    """A folder of this name cannot be made."""
    mkdir = os.mkdir

    def full(path, *args, **kwargs):
        if os.path.basename(path) == folder:
            raise OSError(errno.ENOSPC, "No space left on device", path)
        return mkdir(path, *args, **kwargs)

    monkeypatch.setattr(os, "mkdir", full)


@pytest.mark.parametrize("folder", ["2.orbax-checkpoint-tmp", "state.orbax-checkpoint-tmp"])
def test_a_folder_that_cannot_be_made_leaves_no_thread_waiting_for_it(tmp_path, monkeypatch, folder):
    """Such a thread waits for five minutes, and the process with it."""
    kept = Checkpoints(tmp_path / "checkpoints")
    kept.save(1, tree(1), {})

    no_room_for(monkeypatch, folder)
    with pytest.raises(UserError, match=r"cannot be written.*No space left on device.*of step 1"):
        kept.save(2, tree(2), {})
        kept.wait()
    assert [t.name for t in threading.enumerate() if type(t).__module__.startswith("orbax.")] == []
    kept.close()


def test_a_kill_while_old_steps_are_removed_leaves_none_that_seems_damaged(tmp_path, monkeypatch):
    """Half a step is not to be met among the whole ones: it would be told, and set aside, as damaged."""
    said, removed, remove = [], [], shutil.rmtree
    folder = tmp_path / "checkpoints"
    kept = Checkpoints(folder, said.append)
    monkeypatch.setattr(shutil, "rmtree", lambda path, *args, **kwargs: removed.append(Path(path)))  # killed at it
    for step in range(1, 6):
        kept.save(step, tree(step), {})
    kept.wait()
    kept.forget_after(4)
    assert folder / "old" in removed and not [p for p in removed if p.parent == folder and p.name.isdigit()]
    assert sorted(p.name for p in (folder / "old").iterdir()) == ["1", "2", "3", "5"]
    (folder / "old/2/position/metadata").unlink()
    kept.close()
    monkeypatch.setattr(shutil, "rmtree", remove)
    kept = Checkpoints(folder, said.append)
    assert [step for step, _ in kept.positions()] == [4] and restored(kept)[0] == 4
    assert not (folder / "old").exists() and said == []
    kept.close()


def test_a_step_that_is_not_what_its_name_says_is_set_aside(tmp_path):
    said, folder, aside = [], tmp_path / "checkpoints", tmp_path / "checkpoints-damaged"
    kept = Checkpoints(folder, said.append)
    for step in (1, 2):
        kept.save(step, tree(step), {})
    kept.close()
    (folder / "2").rename(folder / "5")
    kept = Checkpoints(folder, said.append)
    ((step, position),) = kept.positions()
    assert step == 1 and "it is of step 2" in said[0]
    for _ in range(2):  # the second takes the place of the first
        assert kept.restore(1, {"a": tree(1)["a"]}, position["sums"]) is None
        assert "other leaves than this run: b.c" in said[-1] and kept.positions() == []
        kept.save(1, tree(1), {})
        kept.wait()
    assert sorted(p.name for p in aside.iterdir()) == ["1", "5"]
    kept.close()


def test_a_checksum_is_of_dtype_shape_and_bytes():
    zeros = np.zeros(4, np.float32)
    others = [zeros.reshape(2, 2), zeros.astype(np.int32), zeros + np.float32(1), np.zeros((4, 2), np.float32)[:, 0]]
    sums = [checkpoint.checksum(x) for x in (zeros, *others)]
    assert len(set(sums)) == 4 and sums[0] == sums[4]
    # Checkpoints of versions to come are read with the same sums.
    assert checkpoint.checksum(np.arange(3, dtype=np.float32)) == "9cbe10b06208af98b37665dc3d0e2b98"
    assert checkpoint.leaf_names({"b": {"c": 1}, "a/d": 2}) == ["a.d", "b.c"]


@pytest.mark.parametrize(
    "error, told",
    [
        *((OSError(f"a\n  layer: {known}, and more"), known) for known in map(os.strerror, (28, 27, 122, 5))),
        (ValueError("x" * 300), "ValueError: " + "x" * 200),
        (KeyError(), "KeyError"),
    ],
)
def test_an_error_of_orbax_is_told_short(error, told):
    assert checkpoint._short(error) == told


def test_what_a_killed_save_left_is_removed_at_the_next_start(tmp_path):
    (tmp_path / "2.orbax-checkpoint-tmp/state").mkdir(parents=True)
    Checkpoints(tmp_path).close()
    assert list(tmp_path.iterdir()) == []


def test_the_newest_anchor_is_kept_and_what_came_after_can_be_forgotten(tmp_path):
    kept = Checkpoints(tmp_path / "checkpoints")
    for step in range(1, 8):
        kept.save(step, tree(step), {}, anchor=step in (1, 3))
    kept.close()
    kept = Checkpoints(tmp_path / "checkpoints")
    assert [step for step, _ in kept.positions()] == [7, 6, 3]
    kept.save(8, tree(8), {})
    kept.save(9, tree(9), {}, anchor=True)
    kept.wait()
    assert kept.keep.anchors == {3, 9}
    kept.forget_after(3)
    assert [(step, position["anchor"]) for step, position in kept.positions()] == [(3, True)]
    assert kept.keep.anchors == {3}
    kept.close()


def test_a_changed_position_is_noticed(tmp_path):
    said = []
    kept = Checkpoints(tmp_path / "checkpoints", said.append)
    for step in (1, 2):
        kept.save(step, tree(step), {"best": 0.25})
    kept.close()
    (file,) = (tmp_path / "checkpoints/2/position").glob("metadata")
    file.write_bytes(file.read_bytes().replace(b"0.25", b"0.26"))
    kept = Checkpoints(tmp_path / "checkpoints", said.append)
    assert [step for step, _ in kept.positions()] == [1]
    assert "its checksum is wrong" in said[0]
    kept.close()


def test_what_cannot_be_written_is_told_when_the_folder_is_closed(tmp_path, monkeypatch):
    kept = Checkpoints(tmp_path / "checkpoints")

    no_room_for(monkeypatch, "1.orbax-checkpoint-tmp")
    with pytest.raises(UserError, match=r"cannot be written.*There is none before it"):
        kept.save(1, tree(1), {})
        kept.close()


def test_only_what_a_failed_save_leaves_is_kept_quiet():
    told = []
    quiet = checkpoint.Quiet(told.append)
    for text in ("Event loop is closed", "something else"):
        quiet(SimpleNamespace(exc_value=RuntimeError(text)))
    assert [str(t.exc_value) for t in told] == ["something else"]


def test_a_log_line_that_a_full_disk_took_a_part_of_is_written_whole_or_told(tmp_path):
    class Full:
        def __init__(self, file, room):
            self.file, self.room = file, room

        def write(self, data):
            taken = bytes(data[: self.room])
            if not taken:
                raise OSError(errno.ENOSPC, "No space left on device")
            self.room -= len(taken)
            return self.file.write(taken)

        def close(self):
            self.file.close()

    log = MetricsLog(tmp_path / "log.jsonl")
    log._file = Full(log._file, 20)
    log.write({"step": 1})
    with pytest.raises(OSError, match=r"No space"):
        log.write({"step": 2})
    log.close()
    assert (tmp_path / "log.jsonl").read_bytes() == b'{"step": 1}\n{"step":'
    with MetricsLog(tmp_path / "log.jsonl") as log:
        log.write({"step": 2})
    assert (tmp_path / "log.jsonl").read_bytes() == b'{"step": 1}\n{"step": 2}\n'


def test_every_flipped_bit_of_a_bundles_description_is_refused(tmp_path):
    model = make_model("tiny_vit", num_classes=2)
    params, stats = jax.tree.map(np.asarray, model.init(jax.random.key(0)))
    about = dict(model_name="tiny_vit", model_options={"num_classes": 2}, classes=["ants", "bees"])
    bundle.save(tmp_path / "model", params=params, batch_stats=stats, preprocess=Preprocess(), **about)
    bundle.load(tmp_path / "model")
    file = tmp_path / "model/config.json"
    whole = file.read_bytes()
    for place, bit in itertools.product(range(0, len(whole), 3), range(8)):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << bit
        try:
            changed = json.loads(bytes(flipped)) != json.loads(whole)
        except ValueError:
            changed = True
        if changed:  # not a space for a tab between two fields
            file.write_bytes(flipped)
            with pytest.raises(UserError):
                bundle.load(tmp_path / "model")


# -- memory, disk, formats --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error, told",
    [
        (OSError(errno.ENOSPC, "No space left on device", "/w/x"), "/w/x cannot be written: No space left.*goes on"),
        (OSError(errno.EIO, "Input/output error", "/w/x"), "/w/x cannot be read or written: Input.*goes on"),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes."), "(?s)9 bytes.*--remat"),
        (MemoryError(), "Out of memory: no more memory"),
    ],
)
def test_a_full_disk_and_a_full_memory_are_told_with_the_way_out(tmp_path, error, told):
    with pytest.raises(UserError, match=told), running(tmp_path):
        raise error


def test_a_report_on_a_full_disk_is_told_and_the_one_before_stands(tmp_path, monkeypatch, capsys):
    folder = make_run(tmp_path / "run", ["ants", "bees"], 4)
    before = make_report(folder).read_bytes()
    files = sorted(folder.iterdir())

    def full(self, *args):
        self.touch()
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_text", full)
    assert main(["report", str(folder)]) == 2
    assert "cannot be written: No space left on device. When that is mended" in capsys.readouterr().err
    assert sorted(folder.iterdir()) == files and (folder / "report.html").read_bytes() == before


def test_other_errors_are_not_the_users(tmp_path):
    for error in (OSError(errno.EBADF, "Bad file"), jax.errors.JaxRuntimeError("INTERNAL: odd")):
        with pytest.raises(type(error)), running(tmp_path):
            raise error


@pytest.mark.slow
def test_a_run_that_filled_disk_and_memory_ends_as_one_that_did_not(folder, tmp_path, monkeypatch):
    whole = train.train(config(folder, tmp_path / "whole", plan=SHORT))
    one = config(folder, tmp_path / "run", plan=SHORT)

    def once(owner, name, error):
        real = getattr(owner, name)

        def fail(*args, **kwargs):
            monkeypatch.setattr(owner, name, real)
            raise error

        monkeypatch.setattr(owner, name, fail)

    full = OSError(errno.ENOSPC, "No space left on device")
    no_memory = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")
    for owner, name, error in (
        (train.Run, "begin", no_memory),
        (MetricsLog, "write_all", full),
        (train.Checkpoints, "save", full),
        (train.Run, "_validate", no_memory),
        (train.bundle, "save", full),
        (train.Run, "_write_predictions", full),
        (train, "write_json", full),
    ):
        once(owner, name, error)
        with pytest.raises(UserError, match=r"(?s)last good state|goes on from there"):
            train.train(one)
        assert not (tmp_path / "run/lock").exists()
    assert traces(train.train(one).workdir) == traces(whole.workdir)


@pytest.mark.parametrize("found, told", [(99, "Update jft"), (None, "version it was begun with")])
def test_a_folder_of_another_format_is_refused_with_the_way_out(folder, tmp_path, monkeypatch, found, told):
    monkeypatch.setattr(train.Run, "restore", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train.train(config(folder, tmp_path / "run"))
    file = tmp_path / "run/config.json"
    about = json.loads(file.read_text())
    del about["format"]
    file.write_text(json.dumps({**about, **({"format": found} if found else {})}))
    with pytest.raises(UserError, match=told):
        train.train(config(folder, tmp_path / "run"))


# -- numbers ----------------------------------------------------------------------------------------------------------

LIMIT = 4.0


def fragile(logits, batch):
    """Cross-entropy that is no number once a logit is large: what a rate too high ends in, and a lower one does not."""
    from jft.losses import cross_entropy

    return cross_entropy(logits, batch) + jnp.where(jnp.abs(logits).max() > LIMIT, jnp.nan, 0.0)


@pytest.mark.slow
def test_a_run_that_diverges_goes_back_with_a_lower_rate_and_resumes_bit_equal(
    folder, tmp_path, monkeypatch, capsys, crash
):
    monkeypatch.setattr(train, "MAX_SKIPPED", 3)
    plan = (Stage("head", ("head",), epochs=4, augment=(), schedule="constant", warmup=0.0),)
    options = dict(plan=plan, loss=fragile, on_nan="rollback", lr=6e-2, display="plain", dropout=0.0)
    whole = train.train(config(folder, tmp_path / "whole", **options))
    shown = capsys.readouterr()
    gone_back = whole.result["rollbacks"]
    assert 1 <= len(gone_back) <= 3 and all(r["to"] < r["step"] for r in gone_back)
    assert "Back to step" in shown.out + shown.err and "in the loss" in shown.out + shown.err
    rows = [json.loads(line) for line in (whole.workdir / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 15
    for line in (3, 11, 20):
        crash(config(folder, tmp_path / "run", **options), line=line)
    resumed = train.train(config(folder, tmp_path / "run", **options))
    assert resumed.result["rollbacks"] == gone_back
    assert traces(tmp_path / "run") == traces(whole.workdir)


def diagnosis(model, loss=None, **options):
    parts = tuple(model.parts)
    names = dict(trainable=frozenset(model.shapes()[0]), train_parts=parts, update_stats=())
    objective = options.get("objective") or supervised(model, loss=loss, **names)
    look = make_diagnosis(model, lambda source: objective, loss, **names)
    return lambda params, stats, batch, key: look(State(0, params, stats, (), None), batch, key)


def per_example(logits, batch):
    return jnp.where(batch["label"] == 2, jnp.nan, logits.sum(-1))


def steep(logits, batch):
    """Finite everywhere, and its slope at 0 is not."""
    return jnp.sqrt(jnp.abs(logits).sum(-1) * 0.0)


@pytest.mark.slow
def test_the_first_part_that_is_not_finite_is_named():
    model = make_model("tiny_vit", num_classes=3)
    params, stats = model.init(jax.random.key(0))
    rng = np.random.default_rng(0)
    image = rng.standard_normal((4, *model.input_shape)).astype(np.float32)
    batch = {"image": image, "label": np.array([0, 1, 2, 2], np.int32)}
    names, key = ["a", "b", "c", "d"], jax.random.key(0)

    def fine(logits, batch):
        return logits.sum(-1)

    look = diagnosis(model, fine)
    assert look(params, stats, batch, key) is None
    bad = image.copy()
    bad[1, 0, 0, 0] = np.inf
    assert look(params, stats, batch | {"image": bad}, key).told(names).endswith("of 1 of 4 images (b).")
    name = "block1/attn/qkv/kernel"
    found = look(params | {name: params[name] * np.float32(np.nan)}, stats, batch, key)
    assert (found.where, found.part) == ("weights", "block1")
    found = look(params | {name: params[name] * np.float32(1e30)}, stats, batch, key)
    assert (found.where, found.part, found.examples) == ("forward", "block1", (0, 1, 2, 3))
    found = diagnosis(model, per_example)(params, stats, batch, key)
    assert (found.where, found.examples) == ("loss", (2, 3))
    found = diagnosis(model, steep)(params, stats, batch, key)
    assert (found.where, found.part) == ("gradient", "head")


# -- before the run ---------------------------------------------------------------------------------------------------


def images(labels, classes=("ants", "bees")):
    return sources.arrays(np.zeros((len(labels), 4, 4, 3), np.uint8), np.array(labels), classes)


def test_labels_that_say_nothing_are_refused_or_told():
    varied, same = images([0, 1, 1]), images([1, 1])

    def splits(a, b):
        return sources.Splits(a, b, None, a.classes, [])

    assert sanity.labels(splits(varied, varied)) == []
    assert "validation images are 'bees'" in sanity.labels(splits(varied, same))[0]
    with pytest.raises(UserError, match=r"All 2 training images are 'bees'"):
        sanity.labels(splits(same, varied))
    many = images(np.array([[1, 0], [1, 1]]))
    assert "ants" in sanity.labels(splits(many, many))[0] and "bees" not in sanity.labels(splits(many, many))[0]


def loaded(classes, missing=()):
    return replace(scratch(make_model("tiny_vit", num_classes=2)), classes=classes, missing=tuple(missing))


def test_a_kept_head_has_the_datas_classes_in_their_order():
    data = ("ants", "bees")
    assert sanity.kept_head(loaded(data), data) == []
    assert "do not name" in sanity.kept_head(loaded(None), data)[0]
    assert "other names" in sanity.kept_head(loaded(("ants", "wasps")), data)[0]
    with pytest.raises(UserError, match=r"another order: output 0 is its 'bees'"):
        sanity.kept_head(loaded(("bees", "ants")), data)


def test_a_head_that_does_not_fit_is_not_kept_without_a_word(tmp_path):
    config = Config(model="tiny_vit", weights="none", keep_head=True)
    with pytest.raises(UserError, match="--keep-head: the weights have no head of 3 outputs"):
        build.build(config, ["a", "b", "c"])


def test_settings_that_count_for_nothing_and_rates_for_another_optimizer_are_told():
    assert sanity.settings(Config(schedule="one-cycle")) == sanity.settings(Config(optimizer="sgd", lr=0.1)) == []
    assert "one-cycle has a rise of its own" in sanity.settings(Config(schedule="one-cycle", warmup=0.3))[0]
    assert "those count twice" in sanity.settings(Config(balance=True, class_weights="inverse"))[0]
    assert "sgd may want quite another" in sanity.settings(Config(optimizer="sgd"))[0]
    assert sanity.settings(Config(val_fraction=0.1)) == sanity.settings(Config(), held_out=False) == []
    assert "the data have a validation split" in sanity.settings(Config(val_fraction=0.1), held_out=False)[0]


def test_what_counts_for_nothing_over_the_stages_is_told():
    def told(plan, model="tiny_vit", **fields):
        made = Config(plan=plan, model=model, data="x", **fields)
        architecture = build.model_of(made, 3)
        stages = build.resolve(made, architecture, architecture.shapes()[0])
        return sanity.over_legs(made, architecture, build.lay_out(made, stages, architecture, 32))

    at = partial(distil.features, at="pool")
    for fields, message in (
        (dict(carry=True), "carry counts for nothing: the plan has one stage"),
        (dict(layer_decay=0.5), "layer_decay 0.5 counts for nothing"),
        (dict(drop_path=0.3), "drop_path 0.3 counts for nothing"),
        (dict(objective=at), "holds the features before pool, and no stage trains"),
    ):
        assert message in told("head", **fields)[0]
        assert told("lp-ft", **fields) == []
    free = dict(optimizer="schedule-free", model="tiny_resnet")
    assert "gather their statistics beside it" in told("flat", **free)[0]
    assert told("head", **free) == told("full", **free) == told("flat", optimizer="schedule-free") == []


def test_a_run_of_few_steps_is_told():
    (told,) = sanity.few_steps(Config(batch=32), 3, 10)
    assert "Only 3 steps on 10 images in batches of 32: --epochs 160" in told
    assert sanity.few_steps(Config(batch=32), 50, 160) == sanity.few_steps(Config(epochs=1.0), 3, 10) == []


def test_the_first_loss_is_held_against_guessing():
    pixels = np.zeros((3, 1, 1), np.uint8)
    three, four = (sanity.guessing(sources.arrays(pixels, labels)) for labels in ([0, 1, 2], np.eye(3, 4)))
    assert sanity.first_loss(1.1, three, True) == (
        "The loss at the start is 1.100; guessing gives ln 3 = 1.099.",
        False,
    )
    assert sanity.first_loss(9.0, three, True)[1] and not sanity.first_loss(9.0, three, False)[1]
    assert sanity.first_loss(float("nan"), three, True)[1]
    assert sanity.first_loss(2.8, four, True) == (
        "The loss at the start is 2.800; guessing gives 4 ln 2 = 2.773.",
        False,
    )


@pytest.mark.slow
def test_a_dry_run_goes_through_everything_and_leaves_nothing(folder, tmp_path):
    found = trial.dry_run(config(folder, tmp_path / "run", plan=SHORT))
    assert [s["steps"] for s in found.stages] == [1, 1] and found.losses[0] == pytest.approx(np.log(3), rel=1e-6)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_trial_of_fewer_images_than_classes_has_the_weights_of_all(folder, tmp_path):
    """And tells of no guess, which would be of another loss."""
    some = np.random.default_rng(0).integers(0, 255, (30, 32, 32, 3)).astype(np.uint8), np.arange(30) % 10
    made = config(folder, tmp_path / "run", data=lambda: {"train": some, "val": some}, plan=SHORT)
    found = trial.dry_run(made.replace(class_weights="inverse"))
    assert found.losses[0] == pytest.approx(np.log(10), rel=1e-6)  # as many images a class
    assert found.guess is None and found.json()["guessing"] is None and "guessing" not in trial.text(found, "dry-run")


def test_a_batch_larger_than_the_training_set_is_learned_in_as_many_steps(folder, tmp_path, monkeypatch):
    made, taken = config(folder, tmp_path / "run", plan=SHORT, batch=64), []
    monkeypatch.setattr(trial.Run, "advance", lambda run, *_: taken.append([leg.last - leg.first for leg in run.legs]))
    with pytest.raises(IndexError):  # no loss was written
        trial.overfit(made)
    assert taken == [[30, 30]]


@pytest.mark.slow
def test_one_batch_is_learned_or_the_user_is_told(folder, tmp_path):
    one = config(folder, tmp_path / "run", plan=(Stage("all", ("*",), epochs=1, lr=3e-3),))
    found = trial.overfit(one)
    assert found.losses[-1] < 0.1 * found.losses[0] and len(found.losses) == 60
    with pytest.raises(UserError, match=r"One batch was not learned: its loss went from 1.099"):
        trial.overfit(one.replace(plan=(Stage("all", ("*",), epochs=1, lr=1e-7),)))
    assert list(tmp_path.iterdir()) == []


# -- the scripts, in small ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="looks at processes as Linux shows them")
@pytest.mark.parametrize(
    "script", ["kill.py --kills 2", "kill.py --kills 2 --signal TERM", "flip.py --model tiny_vit --flips 60 --cuts 20"]
)
def test_what_the_scripts_hold_runs_to(folder, tmp_path, script):
    name, *words = script.split()
    words += ["--data", str(folder)] if name == "flip.py" else []
    command = [sys.executable, str(SCRIPTS / name), *words, "--out", str(tmp_path / "out.json")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"XLA_FLAGS": ""}, timeout=3600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    told = json.loads((tmp_path / "out.json").read_text())
    assert told.get("unequal", told.get("silent")) == []
