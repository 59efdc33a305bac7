"""Decoded pictures: all at once, kept on disk for the next time, or as a stream of batches where they are too many."""

import collections
import contextlib
import hashlib
import json
import logging
import os
import zlib
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import PIL
from jaxtyping import Int64, UInt8
from PIL import features

from jft.data import decode
from jft.data.cache import cache_dir, make_room, used
from jft.data.order import Order, Tickets, evaluation_batches
from jft.data.sources import Dataset, Excluded
from jft.errors import UserError, printable
from jft.files import writing
from jft.preprocess import Preprocess

log = logging.getLogger(__name__)
T = TypeVar("T")
Progress = Callable[[int, int], None]

MAGIC = b"jftdec01"  # ends every file of decoded pictures; the number is the layout's
MOST_ON_DISK = 32 * 2**30  # bytes of all such files but those used in the last day


def decode_all(
    dataset: Dataset,
    preprocess: Preprocess,
    work_size: tuple[int, int] | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
    cache: bool = True,
) -> tuple[UInt8[np.ndarray, "n h w 3"], Int64[np.ndarray, "n"], Excluded]:
    """Every picture as its working image (see `decode.render`), in the data set's order.

    Returns the images, the indices of the examples they are of, and name and reason of each picture left out. The
    array is mapped from a file in the cache, found again by the content of the pictures and all that decoding depends
    on; names and dates play no part. `progress(done, total)` is called as pictures are decoded. Raises UserError if
    not one can be used.
    """
    size = work_size or preprocess.size
    images, kept, failed = _decode_all(dataset, preprocess, size, threads or default_threads(), progress, cache)
    excluded = [(dataset.names[i], reason) for i, reason in failed]
    require(kept, excluded)
    return images, kept, excluded


def require(kept: Int64[np.ndarray, "n"], excluded: Excluded) -> None:
    """Raises UserError where no picture is left."""
    if not len(kept):
        few = "; ".join(f"{name} ({reason})" for name, reason in excluded[:5])
        raise UserError(f"None of the {len(excluded)} images can be used: {few}.")


def any_readable(dataset: Dataset, preprocess: Preprocess) -> bool:
    """Whether a picture can be used; hardly more than the first that can is looked at."""
    with _rows(dataset, preprocess, preprocess.size, threads=1) as rows:
        return any(not isinstance(row, str) for row in rows)


def readable(
    dataset: Dataset, preprocess: Preprocess, threads: int | None = None, progress: Progress | None = None
) -> tuple[Int64[np.ndarray, "n"], Excluded]:
    """What `decode_all` would keep and leave out, without holding the pictures: to be asked before a `stream`."""
    kept: list[int] = []
    excluded: Excluded = []
    with _rows(dataset, preprocess, preprocess.size, threads or default_threads(), progress) as rows:
        for i, row in enumerate(rows):
            if isinstance(row, str):
                excluded.append((dataset.names[i], row))
            else:
                kept.append(i)
    return np.array(kept, np.int64), excluded


def content_hashes(dataset: Dataset, threads: int | None = None) -> list[bytes]:
    """A digest of each example's file or pixels, empty where it cannot be read. Equal pictures have equal digests."""

    def digest(i: int) -> bytes:
        try:
            return content_digest(dataset.read(i))
        except MemoryError:
            raise
        except Exception:  # what a source raises is its own affair; decoding will name it
            return b""

    return list(in_order(digest, len(dataset), threads or default_threads()))


def default_threads() -> int:
    """As many as this process may use processors."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# Streams


def stream(
    dataset: Dataset,
    preprocess: Preprocess,
    batch: int,
    seed: int,
    start_step: int = 0,
    threads: int | None = None,
    work_size: tuple[int, int] | None = None,
    images: np.ndarray | None = None,
    rows: np.ndarray | None = None,
    balance: bool = False,
) -> Iterator[dict[str, np.ndarray]]:
    """Training batches from `start_step` on, without end: the examples of `batch_indices`, read ahead by threads.

    Yields {"image": uint8 [b, h, w, 3], "label", "index": int32 [b], "ticket": int32 [b]}, see `order.tickets`.
    Pictures are decoded as they come, or taken from `images` (such as `decode_all` maps). Everything in the data set
    must be readable (see `readable`): a picture that is not raises UserError with its name. With `rows`, only these of
    each batch: those of one process of several. With `balance` every class comes equally often.
    """
    import grain

    load = _example(dataset, preprocess, work_size or preprocess.size, images)
    order = Order(len(dataset), seed, dataset.labels if balance else None)
    rows = np.arange(batch) if rows is None else rows
    mine: Any = Tickets(order, rows, batch)
    taken = grain.MapDataset.source(mine).slice(slice(start_step * len(rows), None))
    examples = taken.map(lambda ticket: load(ticket % order.n) | {"ticket": np.int32(ticket)})
    return _batches(examples, len(rows), threads)


def evaluation_stream(
    dataset: Dataset,
    preprocess: Preprocess,
    batch: int,
    threads: int | None = None,
    work_size: tuple[int, int] | None = None,
    images: np.ndarray | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Batches with every example exactly once, in order; the last is padded, and "mask" (bool [b]) says with what."""
    import grain

    load = _example(dataset, preprocess, work_size or preprocess.size, images)
    indices, mask = evaluation_batches(len(dataset), batch)
    pairs: Any = list(zip(indices.ravel().tolist(), mask.ravel().tolist(), strict=True))
    examples = grain.MapDataset.source(pairs).map(lambda pair: load(pair[0]) | {"mask": np.bool_(pair[1])})
    return _batches(examples, batch, threads)


def _example(
    dataset: Dataset, preprocess: Preprocess, size: tuple[int, int], images: np.ndarray | None
) -> Callable[[int], dict[str, Any]]:
    def load(i: int) -> dict[str, Any]:
        if images is not None:
            image = images[i]
        else:
            row = _render(dataset, i, preprocess, size)
            if isinstance(row, str):
                raise UserError(f"{dataset.names[i]} cannot be used: {row}. Leave it out, or mend it, and start again.")
            image = row
        return {"image": image, "label": dataset.labels[i], "index": np.int32(i)}

    return load


def _batches(examples: Any, batch: int, threads: int | None) -> Iterator[dict[str, np.ndarray]]:
    import grain

    threads = threads or default_threads()
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(2 * batch, 2 * threads))
    return iter(examples.to_iter_dataset(options).batch(batch))


# Decoding in threads


class Changed(OSError):
    """A picture is not what it was when its digest was taken."""


def _render(
    dataset: Dataset, i: int, preprocess: Preprocess, size: tuple[int, int], digest: bytes | None = None
) -> np.ndarray | str:
    """The working image, or the reason why there is none. Raises Changed if a digest is given and does not fit."""
    try:
        content = dataset.read(i)
    except MemoryError:
        raise
    except Exception as error:
        if digest:
            raise Changed(f"{dataset.names[i]} changed while it was read") from None
        return f"cannot be read: {printable(getattr(error, 'strerror', None) or str(error))}"
    if digest is not None and content_digest(content) != digest:
        raise Changed(f"{dataset.names[i]} changed while it was read")
    try:
        return decode.render(content, preprocess, size)
    except decode.DecodeError as error:
        return str(error)


def content_digest(content: bytes | np.ndarray) -> bytes:
    """16 bytes that are equal for equal files, or for equal pixels."""
    kind = b"file"
    if isinstance(content, np.ndarray):
        kind = f"{content.dtype}{content.shape}".encode()
        content = np.ascontiguousarray(content).tobytes()
    return hashlib.blake2b(content, digest_size=16, key=kind[:64]).digest()


@contextlib.contextmanager
def _rows(
    dataset: Dataset,
    preprocess: Preprocess,
    size: tuple[int, int],
    threads: int,
    progress: Progress | None = None,
    digests: Sequence[bytes] | None = None,
) -> Iterator[Iterator[np.ndarray | str]]:
    """Each picture's working image, or the reason why there is none, in order."""
    decode.resampling(preprocess)  # an unknown interpolation is no fault of the first picture
    decode.formats()  # loads Pillow's plugins, once and not in every thread

    def one(i: int) -> np.ndarray | str:
        return _render(dataset, i, preprocess, size, digests[i] if digests else None)

    def told() -> Iterator[np.ndarray | str]:
        for i, row in enumerate(rows):
            yield row
            if progress:
                progress(i + 1, len(dataset))

    with decode.quiet(), contextlib.closing(in_order(one, len(dataset), threads)) as rows:
        yield told()


def in_order(function: Callable[[int], T], n: int, threads: int) -> Generator[T, None, None]:
    """function(0), function(1), … computed by threads that keep only a little ahead of the consumer."""
    pending: collections.deque[Future[T]] = collections.deque()
    with ThreadPoolExecutor(threads, "jft-data") as pool:
        try:
            for i in range(n):
                pending.append(pool.submit(function, i))
                if len(pending) >= 8 * threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


Decoded = tuple[np.ndarray, np.ndarray, list[tuple[int, str]]]


def _decode_all(
    dataset: Dataset,
    preprocess: Preprocess,
    size: tuple[int, int],
    threads: int,
    progress: Progress | None,
    cache: bool,
) -> Decoded:
    if cache:
        digests = content_hashes(dataset, threads)
        path = cache_dir() / "decoded" / f"{_key(digests, preprocess, size)}.u8"
        if (found := _read(path, size, len(dataset), threads)) is not None:
            if progress:
                progress(len(dataset), len(dataset))
            return found
        try:
            _write(path, dataset, digests, preprocess, size, threads, progress)
            if (found := _read(path, size, len(dataset), threads)) is not None:
                return found
            log.warning("The decoded images just written to %s cannot be read back; decoding into memory.", path)
        except OSError as error:
            log.warning("The decoded images cannot be kept in %s: %s. Decoding into memory.", path.parent, error)
    images = np.empty((len(dataset), *size, 3), np.uint8)
    kept: list[int] = []
    failed: list[tuple[int, str]] = []
    with _rows(dataset, preprocess, size, threads, progress) as rows:
        for i, row in enumerate(rows):
            if isinstance(row, str):
                failed.append((i, row))
            else:
                images[len(kept)] = row
                kept.append(i)
    return images[: len(kept)], np.array(kept, np.int64), failed


# The file of decoded pictures: their bytes, then a JSON text with a checksum of each, then the length and the checksum
# of that text, and MAGIC. The bytes begin at 0, so that the array can be mapped.


def _key(digests: Sequence[bytes], preprocess: Preprocess, size: tuple[int, int]) -> str:
    how = asdict(preprocess)
    del how["mean"], how["std"]  # applied on the device
    jpeg = features.version("libjpeg_turbo") or features.version("jpg")
    how |= {"work_size": size, "decoder": decode.VERSION, "pillow": PIL.__version__, "jpeg": jpeg}
    digest = hashlib.blake2b(json.dumps(how, sort_keys=True).encode(), digest_size=20)
    for content in digests:
        digest.update(content.ljust(16, b"\0"))
    return digest.hexdigest()


def _write(
    path: Path,
    dataset: Dataset,
    digests: Sequence[bytes],
    preprocess: Preprocess,
    size: tuple[int, int],
    threads: int,
    progress: Progress | None,
) -> None:
    """Raises OSError where the file cannot be written, or where a picture changed since its digest was taken."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept: list[int] = []
    failed: list[tuple[int, str]] = []
    sums: list[int] = []
    with writing(path) as part, open(part, "wb") as file:
        with _rows(dataset, preprocess, size, threads, progress, digests) as rows:
            for i, row in enumerate(rows):
                if isinstance(row, str):
                    failed.append((i, row))
                else:
                    pixels = row.tobytes()
                    file.write(pixels)
                    sums.append(zlib.crc32(pixels))
                    kept.append(i)
        text = json.dumps({"kept": kept, "failed": failed, "crc32": sums}).encode()
        file.write(text + len(text).to_bytes(8, "little") + zlib.crc32(text).to_bytes(4, "little") + MAGIC)
        file.flush()
        make_room(path, part.stat().st_size, MOST_ON_DISK, age=86400)  # a run's splits do not drive each other out


def _read(path: Path, size: tuple[int, int], n: int, threads: int) -> Decoded | None:
    """The decoded pictures, every checksum compared; None where there are none, or where the file is damaged."""
    try:
        with open(path, "rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(end - 20, 0))
            tail = file.read(20)
            length = int.from_bytes(tail[:8], "little")
            if len(tail) < 20 or tail[12:] != MAGIC or length > end - 20:
                raise ValueError("its end is not that of such a file")
            file.seek(end - 20 - length)
            text = file.read(length)
        if zlib.crc32(text) != int.from_bytes(tail[8:12], "little"):
            raise ValueError("its description does not fit its checksum")
        about = json.loads(text)
        kept, sums = np.array(about["kept"], np.int64), about["crc32"]
        failed = [(int(i), str(reason)) for i, reason in about["failed"]]
        shape = (len(kept), *size, 3)
        if len(kept) + len(failed) != n or end - 20 - length != int(np.prod(shape)):
            raise ValueError("its size does not fit its description")
        images = np.memmap(path, np.uint8, "r", shape=shape) if len(kept) else np.empty(shape, np.uint8)
        for i, same in enumerate(in_order(lambda i: zlib.crc32(images[i].data) == sums[i], len(kept), threads)):
            if not same:
                raise ValueError(f"image {i} does not fit its checksum")
        used(path)
        return images.view(np.ndarray), kept, failed
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("The decoded images in %s are damaged (%s); decoding again.", path, error)
        return None
