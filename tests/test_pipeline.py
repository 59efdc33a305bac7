"""Pipeline: the order and its laws, decoding in threads, a cache never stale, streams equal to resident data."""

import io
import itertools
import os
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from jft.data import decode, pipeline
from jft.data.cache import cache_dir
from jft.data.order import Order, batch_indices, evaluation_batches, permutation, steps_indices, tickets
from jft.data.sources import Dataset, arrays, load
from jft.errors import UserError
from jft.preprocess import Preprocess

SMALL = Preprocess(size=(8, 8))


def noise(n: int, seed: int = 0) -> Dataset:
    pictures = np.random.default_rng(seed).integers(0, 256, (n, 12, 14, 3), np.uint8)
    return arrays(pictures, np.arange(n) % 3)


@pytest.fixture
def pictures(tmp_path):
    """A folder of six files, two of which are no pictures."""
    for i in range(6):
        path = tmp_path / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        if i == 2:
            path.with_suffix(".jpg").write_text("no picture")
        elif i == 5:
            path.write_bytes(b"")
        else:
            Image.new("RGB", (10, 12), (40 * i, 0, 0)).save(path)
    return tmp_path


# Order


@settings(deadline=None)
@given(st.integers(1, 50), st.integers(0, 2**32), st.integers(0, 10**9))
def test_every_epoch_is_a_permutation(n, seed, epoch):
    order = Order(n, seed).take(epoch * n, (epoch + 1) * n)
    assert order.dtype == np.int32 and sorted(order) == list(range(n))
    assert [Order(n, seed)[epoch * n + i] for i in range(n)] == order.tolist()


def test_every_epoch_and_every_seed_is_another_order():
    epochs = (
        Order(50, 0).take(0, 50 * 20).reshape(20, 50).tolist() + Order(50, 1).take(0, 50 * 20).reshape(20, 50).tolist()
    )
    assert len({tuple(epoch) for epoch in epochs}) == 40
    # Not even nearly the same: each example comes at about every place.
    firsts = Order(5, 3).take(0, 5 * 1000).reshape(1000, 5)
    counts = np.stack([np.bincount(firsts[:, i], minlength=5) for i in range(5)])
    assert counts.min() > 150 and counts.max() < 250


def test_a_balanced_order_has_every_class_equally_often():
    """Of 20, 7 and 3 examples: ten an epoch, all of a class before any of it comes again, and any position alone."""
    labels = np.random.default_rng(0).permutation(np.repeat(np.int32([0, 1, 2]), [20, 7, 3]))
    order = Order(30, 5, labels)
    drawn = order.take(0, 30 * 7).reshape(7, 30)
    assert [np.bincount(labels[epoch]).tolist() for epoch in drawn] == [[10, 10, 10]] * 7
    for c, size in enumerate((20, 7, 3)):
        of_class = drawn.ravel()[labels[drawn.ravel()] == c]
        for epoch in range(7):  # the order within an epoch is that of the whole, so count over what has come by its end
            counts = np.bincount(of_class[: 10 * (epoch + 1)], minlength=30)[labels == c]
            assert counts.max() - counts.min() <= 1 and len(counts) == size
    assert [order[i] for i in (0, 29, 30, 200, 3)] == [drawn.ravel()[i] for i in (0, 29, 30, 200, 3)]
    np.testing.assert_array_equal(Order(30, 5, labels).take(24, 72), drawn.ravel()[24:72])


def test_what_does_not_divide_evenly_goes_to_the_classes_in_turn():
    labels = np.repeat(np.int32([0, 1, 2]), [4, 2, 2])
    counts = np.array([np.bincount(labels[Order(8, 0, labels).epoch(e)]) for e in range(9)])
    assert (counts.max(1) - counts.min(1) <= 1).all() and (counts.sum(1) == 8).all()
    assert counts.sum(0).tolist() == [24, 24, 24]


def test_the_order_stays_what_it_was():
    """Interrupted runs are resumed by newer versions: this order may never change."""
    assert permutation(8, 1, 2).tolist() == [7, 1, 3, 0, 4, 2, 6, 5]
    assert batch_indices(6, 4, seed=5, step=1).tolist() == [0, 1, 2, 0]


@settings(deadline=None)
@given(st.integers(1, 20), st.integers(1, 50), st.integers(0, 9), st.integers(0, 30), st.integers(0, 8))
def test_batches_run_across_epochs_from_any_step(n, batch, seed, start, steps):
    whole = Order(n, seed).take(0, (start + steps) * batch)
    rows = steps_indices(n, batch, seed, start, start + steps)
    assert rows.shape == (steps, batch) and (rows.ravel() == whole[start * batch :]).all()
    for i in range(steps):
        assert (rows[i] == batch_indices(n, batch, seed, start + i)).all()


def test_an_example_that_comes_again_in_a_batch_has_another_ticket():
    """The first time it is its index, as where nothing comes twice, and each batch counts anew."""
    assert tickets(np.array([[2, 0, 2, 2], [0, 1, 2, 0]], np.int32), 3).tolist() == [[2, 0, 5, 8], [0, 1, 2, 3]]
    labels = np.array([0] * 18 + [1] * 2, np.int32)
    drawn = Order(20, 1, labels).take(0, 160).reshape(10, 16)
    found = tickets(drawn, 20)
    assert (found % 20 == drawn).all() and all(len(set(row)) == 16 for row in found.tolist())
    n = 2**30  # of so many that int32 holds no third time
    assert tickets(np.full((1, 3), n - 1, np.int32), n).tolist() == [[n - 1] * 3]


def test_how_often_an_example_came_before():
    for order in (Order(7, 3), Order(7, 3, np.array([0, 0, 0, 0, 0, 1, 1], np.int32))):
        drawn, passes = order.take(0, 42).tolist(), order.passes(0, 42)
        for example in np.unique(drawn):
            assert sorted(passes[np.array(drawn) == example]) == list(range(drawn.count(example)))
        assert (order.passes(11, 29) == passes[11:29]).all()


@settings(deadline=None)
@given(st.integers(0, 100), st.integers(1, 30))
def test_evaluation_has_each_example_once(n, batch):
    indices, mask = evaluation_batches(n, batch)
    assert indices.shape == mask.shape == (-(-n // batch), batch)
    assert indices[mask].tolist() == list(range(n)) and (indices[~mask] == 0).all()


# Streams


@pytest.mark.parametrize("threads", [1, 3])
def test_a_stream_gives_the_resident_batches(threads):
    dataset = noise(10)
    images, kept, _ = pipeline.decode_all(dataset, SMALL, (10, 11))
    assert (kept == np.arange(10)).all()
    for start, source in ((0, None), (7, None), (7, images)):
        batches = pipeline.stream(dataset, SMALL, 4, 3, start, threads, (10, 11), source)
        for step, batch in enumerate(itertools.islice(batches, 6), start):
            index = batch_indices(10, 4, 3, step)
            assert batch["index"].dtype == batch["label"].dtype == np.int32
            assert (batch["index"] == index).all() and (batch["label"] == dataset.labels[index]).all()
            assert (batch["image"] == images[index]).all() and batch["image"].dtype == np.uint8
    rows = np.array([1, 2, 5])  # of one process of several: where in a batch an example comes again, all have to know
    batches = pipeline.stream(dataset, SMALL, 12, 3, 2, threads, (10, 11), images, rows)
    for step, batch in enumerate(itertools.islice(batches, 3), 2):
        expected = tickets(steps_indices(10, 12, 3, step, step + 1), 10)[0, rows]
        assert (batch["ticket"] == expected).all() and batch["ticket"].dtype == np.int32
        assert (batch["index"] == expected % 10).all()


def test_an_evaluation_stream_has_each_example_once():
    dataset = noise(10)
    images, _, _ = pipeline.decode_all(dataset, SMALL)
    batches = list(pipeline.evaluation_stream(dataset, SMALL, 4, threads=2))
    mask = np.concatenate([b["mask"] for b in batches])
    assert [len(b["image"]) for b in batches] == [4, 4, 4] and mask.sum() == 10
    assert (np.concatenate([b["index"] for b in batches])[mask] == np.arange(10)).all()
    assert (np.concatenate([b["image"] for b in batches])[mask] == images).all()


def test_a_stream_names_the_picture_that_it_cannot_read(pictures):
    dataset = load(pictures, val_fraction=0.0).train
    with pytest.raises(UserError, match=r"a/2.jpg cannot be used: not an image|b/5.png cannot be used: empty file"):
        for _ in itertools.islice(pipeline.stream(dataset, SMALL, 6, 0), 2):
            pass
    kept, excluded = pipeline.readable(dataset, SMALL)
    assert [name for name, _ in excluded] == ["a/2.jpg", "b/5.png"]
    batch = next(pipeline.stream(dataset.select(kept), SMALL, 4, 0))
    assert sorted(batch["image"][:, 4, 4, 0]) == [0, 40, 120, 160]


# Decoding


@pytest.mark.parametrize("on_disk", [True, False])
def test_bad_pictures_are_named_and_left_out(pictures, on_disk):
    dataset = load(pictures, val_fraction=0.0).train
    told = []
    for _ in range(2):  # decoded, then found in the cache
        images, kept, excluded = pipeline.decode_all(
            dataset, SMALL, threads=2, progress=lambda *done: told.append(done), cache=on_disk
        )
        assert [dataset.names[i] for i in kept] == ["a/0.png", "a/4.png", "b/1.png", "b/3.png"]
        assert images[:, 4, 4, 0].tolist() == [0, 160, 40, 120] and images.shape == (4, 8, 8, 3)
        assert [name for name, _ in excluded] == ["a/2.jpg", "b/5.png"]
        assert "not an image" in excluded[0][1] and excluded[1][1] == "empty file"
    assert told[:6] == [(i + 1, 6) for i in range(6)] and told[-1] == (6, 6)
    assert [name for name, _ in pipeline.readable(dataset, SMALL)[1]] == ["a/2.jpg", "b/5.png"]


def test_none_that_can_be_read_is_an_error(pictures):
    dataset = load(pictures, val_fraction=0.0).train
    with pytest.raises(UserError, match=r"None of the 2 images can be used: a/2.jpg \(not an image"):
        pipeline.decode_all(dataset.select([1, 5]), SMALL)


def test_a_file_that_vanished_is_named(pictures):
    dataset = load(pictures, val_fraction=0.0).train
    (pictures / "a" / "0.png").unlink()
    _, _, excluded = pipeline.decode_all(dataset, SMALL)
    assert excluded[0] == ("a/0.png", "cannot be read: No such file or directory")


def test_an_unknown_interpolation_is_no_fault_of_the_pictures():
    with pytest.raises(UserError, match="no interpolation"):
        pipeline.decode_all(noise(2), Preprocess(interpolation="cubical"))


def test_threads_keep_the_order_and_only_a_little_ahead():
    ahead, lock = [0, 0], threading.Lock()

    def slow(i: int) -> int:
        with lock:
            ahead[0] += 1
            ahead[1] = max(ahead[1], ahead[0])
        time.sleep(0.0001 * (i % 3))
        return i

    taken = []
    for value in pipeline.in_order(slow, 300, 3):
        with lock:
            ahead[0] -= 1
        taken.append(value)
    assert taken == list(range(300)) and ahead[1] <= 8 * 3 + 1


def test_equal_pictures_have_equal_digests(pictures):
    dataset = load(pictures, val_fraction=0.0).train
    (pictures / "b" / "copy.png").write_bytes((pictures / "a" / "0.png").read_bytes())
    more = load(pictures, val_fraction=0.0).train
    digests = dict(zip(more.names, pipeline.content_hashes(more), strict=True))
    assert digests["a/0.png"] == digests["b/copy.png"] and len(set(digests.values())) == 6
    (pictures / "a" / "0.png").unlink()
    assert pipeline.content_hashes(dataset)[0] == b""
    wide, high = (arrays(np.zeros((1, *shape), np.uint8), [0]) for shape in ((2, 8), (4, 4)))
    assert pipeline.content_hashes(wide) != pipeline.content_hashes(high)


# Cache


def files() -> list:
    folder = cache_dir() / "decoded"
    return sorted(folder.iterdir()) if folder.is_dir() else []


@pytest.fixture
def decoded(monkeypatch):
    """Counts the pictures that are rendered."""
    count = [0]
    render = decode.render

    def counting(*args, **kwargs):
        count[0] += 1
        return render(*args, **kwargs)

    monkeypatch.setattr(decode, "render", counting)
    return count


def test_the_second_time_nothing_is_decoded(pictures, decoded):
    dataset = load(pictures, val_fraction=0.0).train
    first = pipeline.decode_all(dataset, SMALL)
    assert decoded == [6] and len(files()) == 1
    second = pipeline.decode_all(dataset, SMALL)
    assert decoded == [6]
    assert (first[0] == second[0]).all() and (first[1] == second[1]).all() and first[2] == second[2]
    assert (pipeline.decode_all(dataset, SMALL, cache=False)[0] == second[0]).all()


def test_names_and_dates_play_no_part_but_content_does(pictures, decoded):
    def load_all() -> Dataset:
        return load(pictures, val_fraction=0.0).train

    Image.new("RGB", (10, 12), (0, 0, 0)).save(pictures / "a" / "0.png", "bmp")  # has the same size whatever it shows
    pipeline.decode_all(load_all(), SMALL)
    path = pictures / "a" / "0.png"
    os.utime(path, (1, 1))
    path.rename(path.with_name("0 renamed.png"))
    images, _, _ = pipeline.decode_all(load_all(), SMALL)
    assert decoded == [6] and images[0, 0, 0, 0] == 0

    path = path.with_name("0 renamed.png")
    before = path.stat()
    changed = io.BytesIO()
    Image.new("RGB", (10, 12), (7, 0, 0)).save(changed, "bmp")
    assert len(changed.getvalue()) == before.st_size
    path.write_bytes(changed.getvalue())
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # size and date as before
    assert pipeline.decode_all(load_all(), SMALL)[0][0, 0, 0, 0] == 7 and decoded == [12]


def test_all_that_decoding_depends_on_has_a_file_of_its_own(monkeypatch):
    dataset = noise(3)
    results = [
        pipeline.decode_all(dataset, preprocess, size)[0]
        for preprocess, size in (
            (SMALL, None),
            (SMALL, (9, 10)),
            (Preprocess(size=(8, 8), interpolation="bicubic"), None),
            (Preprocess(size=(8, 8), crop_pct=1.0), None),
            (Preprocess(size=(8, 8), squash=True), None),
        )
    ]
    assert len(files()) == 5 and len({result.tobytes() for result in results}) == 5
    pipeline.decode_all(dataset, Preprocess(size=(8, 8), mean=(0.5, 0.5, 0.5)))  # normalised on the device
    assert len(files()) == 5
    pipeline.decode_all(dataset.select([1, 0, 2]), SMALL)
    monkeypatch.setattr(decode, "VERSION", decode.VERSION + 1)
    pipeline.decode_all(dataset, SMALL)
    assert len(files()) == 7


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_damaged_file_is_made_again(data):
    dataset = noise(3)
    expected = pipeline.decode_all(dataset, SMALL, cache=False)[0]
    pipeline.decode_all(dataset, SMALL)
    [path] = files()
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        bit = data.draw(st.integers(0, 8 * len(content) - 1))
        content[bit // 8] ^= 1 << bit % 8
    else:
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    path.write_bytes(content)
    assert pipeline._read(path, (8, 8), 3, 1) is None
    assert (pipeline.decode_all(dataset, SMALL)[0] == expected).all()
    assert pipeline._read(path, (8, 8), 3, 1) is not None


def test_a_foreign_file_is_replaced():
    dataset = noise(3)
    pipeline.decode_all(dataset, SMALL)
    [path] = files()
    other = pipeline.decode_all(noise(4), SMALL)
    for wrong in (b"", b"x" * 100, next(p for p in files() if p != path).read_bytes()):
        path.write_bytes(wrong)
        assert len(pipeline.decode_all(dataset, SMALL)[0]) == 3
    assert len(other[0]) == 4


def test_without_a_place_for_the_cache_pictures_are_decoded_into_memory(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("JFT_CACHE", str(tmp_path / "file"))
    assert len(pipeline.decode_all(noise(3), SMALL)[0]) == 3
    assert "cannot be kept" in caplog.text


def test_a_full_disk_leaves_nothing_behind(monkeypatch, caplog):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert len(pipeline.decode_all(noise(3), SMALL)[0]) == 3
    assert files() == [] and "No space left" in caplog.text


def test_a_picture_that_changes_while_it_is_read_is_not_kept(caplog):
    """The digest is taken first; had it been stored, the pixels of one file would be found under another's."""
    dataset, reads = noise(3), itertools.count()

    def read(i: int) -> np.ndarray:
        return dataset.read(i) if next(reads) < 3 else dataset.read((i + 1) % 3)

    images, _, _ = pipeline.decode_all(Dataset(dataset.names, dataset.labels, dataset.classes, read), SMALL)
    assert files() == [] and "changed while it was read" in caplog.text
    assert (images == pipeline.decode_all(dataset.select([1, 2, 0]), SMALL)[0]).all()


def test_what_was_used_longest_ago_makes_room(monkeypatch):
    pipeline.decode_all(noise(2, 0), SMALL)
    (first,) = files()
    monkeypatch.setattr(pipeline, "MOST_ON_DISK", 1.5 * first.stat().st_size)
    pipeline.decode_all(noise(2, 1), SMALL)
    for file in files():
        os.utime(file, (1000 if file == first else 2000,) * 2)
    pipeline.decode_all(noise(2, 0), SMALL)  # used now, so that it stays whatever fits
    pipeline.decode_all(noise(2, 2), SMALL)
    assert len(files()) == 2 and first in files() and min(f.stat().st_mtime for f in files()) > 2000


def test_leftovers_of_killed_writers_are_removed():
    folder = cache_dir() / "decoded"
    folder.mkdir(parents=True)
    (old := folder / "x.u8.1.part").write_bytes(b"")
    (new := folder / "x.u8.2.part").write_bytes(b"")
    os.utime(old, (0, 0))
    pipeline.decode_all(noise(2), SMALL)
    assert not old.exists() and new.exists()


def test_where_the_cache_lies(monkeypatch, tmp_path):
    monkeypatch.setenv("JFT_CACHE", str(tmp_path / "a"))
    assert cache_dir() == tmp_path / "a"
    monkeypatch.delenv("JFT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "jft"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "jft"


def test_no_thread_outlives_its_work():
    before = set(threading.enumerate())
    for _ in range(3):
        pipeline.decode_all(noise(4), SMALL, threads=4, cache=False)
    assert set(threading.enumerate()) <= before


@pytest.mark.assets
def test_ants_and_bees(assets):
    val = load(assets / "data" / "hymenoptera_data").val
    assert val is not None
    images, kept, excluded = pipeline.decode_all(val, Preprocess(size=(64, 64)))
    assert images.shape == (153, 64, 64, 3) and excluded == [] and len(kept) == 153
