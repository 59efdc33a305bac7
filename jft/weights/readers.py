"""Weight files opened as names, shapes and dtypes, and read tensor by tensor; no code in them is ever executed."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from functools import cache, cached_property, partial
from pathlib import Path
from typing import BinaryIO

import numpy as np

from jft.errors import UserError, brief
from jft.weights.archives import CONVERT, DAMAGE, Member, npz_tensors, torch_tensors, zip_kind, zip_members
from jft.weights.layout import Bad, Tensor, read_at
from jft.weights.safetensors import MAX_HEADER, safetensors_tensors

MAX_SHARDS = 1000

ENDINGS = {
    ".safetensors": "safetensors",
    ".pth": "torch",
    ".pt": "torch",
    ".bin": "torch",
    ".ckpt": "torch",
    ".tar": "torch",
    ".npz": "npz",
}

KINDS = {"safetensors": "a safetensors file", "torch": "a PyTorch zip file", "npz": "an .npz archive"}

# What wrapping a module in another (data parallel, Lightning, torch.compile, DINO) puts before every name, and what
# Flax's checkpoints do.
PREFIXES = ("module.", "model.", "_orig_mod.", "backbone.", "params/", "opt/target/", "target/")
MAX_STACKED = 1000
STACKED = "Transformer/encoderblock/"  # big_vision's blocks where a scan runs over them: an axis of blocks comes first


class WeightFile:
    """An open file of weights: names, shapes and dtypes are known, values are read one tensor at a time.

    >>> with open_weights("resnet50.safetensors") as file:
    ...     file.shape("fc.weight"), file.dtype("fc.weight"), file.read("fc.weight").sum()
    """

    def __init__(
        self,
        path: Path,
        format: str,
        tensors: Mapping[str, Tensor],
        files: Iterable[BinaryIO] = (),
        prefix: str = "",
        notes: Iterable[str] = (),
        metadata: Mapping[str, str] | None = None,
        paths: Iterable[Path] = (),
    ):
        self.path = path
        self.format = format
        self.names = tuple(tensors)
        self.prefix = prefix  # stood before every name in the file and is left out of `names`
        self.notes = tuple(notes)  # what else was in the file, or was decided about it
        self.metadata = dict(metadata or {})
        self.paths = tuple(paths) or (path,)
        self._tensors = dict(tensors)
        self._files = tuple(files)

    def __enter__(self) -> "WeightFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; nothing can be read any more."""
        for file in self._files:
            file.close()

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""
        return self._tensors[name].shape

    def dtype(self, name: str) -> np.dtype:
        """A tensor's dtype, without reading it."""
        return self._tensors[name].dtype

    def read(self, name: str) -> np.ndarray:
        """A tensor's values, in an array of its own. Raises UserError where the file ends too early."""
        try:
            return self._tensors[name].read()
        except (OSError, *DAMAGE) as error:
            raise UserError(f"{self.path}: cannot read {brief(repr(name), 200)}: {brief(str(error))}.") from None

    @cached_property
    def sha256(self) -> str:
        """The file's SHA-256; of a sharded one, that of the lines `sha256sum` prints for its shards."""
        lines = []
        for path in self.paths:
            with open(path, "rb") as file:
                lines.append(hashlib.file_digest(file, "sha256").hexdigest())
        if len(lines) == 1:
            return lines[0]
        listing = "".join(f"{digest}  {path.name}\n" for digest, path in zip(lines, self.paths, strict=True))
        return hashlib.sha256(listing.encode()).hexdigest()


def open_weights(path: str | Path) -> WeightFile:
    """Open a `.safetensors`, zip `.pth` or `.npz` file, or the `.index.json` of a sharded safetensors file.

    The format is decided by the content. Raises UserError, naming the file and the reason, where the file is missing,
    truncated, of another format than its ending says, or lies about its sizes, and where reading it would mean
    executing a pickle.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"There is no weight file {path}.")
    try:
        if path.name.endswith(".index.json"):
            return _open_shards(path)
        return _open_file(path)
    except (Bad, OSError) as error:
        raise UserError(f"{path}: {brief(str(error))}") from None


def _open_file(path: Path) -> WeightFile:
    file = open(path, "rb", buffering=0)  # noqa: SIM115  (closed by WeightFile.close)
    try:
        size = path.stat().st_size
        kind = _kind(file, size)
        archive: dict[str, Member] = {}
        if kind == "zip":
            archive = zip_members(file, size)
            kind = zip_kind(archive)
        expected = ENDINGS.get(path.suffix.lower())
        if expected not in (None, kind):
            other = next(ending for ending, k in ENDINGS.items() if k == kind)
            raise Bad(
                f"the ending says {KINDS[expected]}, but the content is {KINDS[kind]}. Rename it to end in {other}."
            )
        notes: list[str] = []
        metadata: dict[str, str] = {}
        if kind == "safetensors":
            tensors, metadata = safetensors_tensors(file, size)
        else:
            tensors = npz_tensors(file, archive, size) if kind == "npz" else torch_tensors(file, archive, size, notes)
        if not tensors:
            raise Bad("there are no tensors in it.")
        tensors, prefix = _strip_prefix(tensors)
        if kind == "npz":
            tensors = _unstacked(tensors, notes)
        return WeightFile(path, kind, tensors, [file], prefix, notes, metadata)
    except BaseException:
        file.close()
        raise


def _kind(file: BinaryIO, size: int) -> str:
    head = bytes(read_at(file, 0, min(size, 512)))
    if not head:
        raise Bad("the file is empty.")
    if head.startswith(b"PK\x03\x04"):
        return "zip"
    # Before the others: a header's length can have the bytes with which a pickle or a web page begins.
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= MAX_HEADER:
        return "safetensors"
    if head.startswith(b"version https://git-lfs"):
        raise Bad("it is a Git LFS pointer, not the weights themselves. Run `git lfs pull` where it was cloned.")
    if head[:1] == b"<" or head.lstrip()[:9].lower() in (b"<!doctype", b"<html"):
        raise Bad("it is a web page, not weights: the download went wrong.")
    if head.startswith(b"\x89HDF"):
        raise Bad(
            "it is an HDF5 file; jft reads .safetensors, zip .pth and .npz. Convert it with the library it is from."
        )
    if head.startswith(b"\x93NUMPY"):
        raise Bad("it is a single .npy array; weights are an .npz archive of named arrays.")
    if head[257:262] == b"ustar":
        raise Bad(f"it is a PyTorch file in the tar format of before 2017, which jft does not read. {CONVERT}")
    if head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05":
        raise Bad(
            "it is a pickle, such as PyTorch wrote before version 1.6. Reading one executes what it says, so jft "
            f"reads only the zip format and .safetensors. {CONVERT}"
        )
    if head[8:9] == b"{":  # the length of its header is a lie, which is told where the header is read
        return "safetensors"
    raise Bad("its content is none of .safetensors, zip .pth and .npz (or its beginning is damaged).")


def _strip_prefix(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    prefix = ""
    while True:
        for p in PREFIXES:
            if all(name.startswith(prefix + p) and len(name) > len(prefix + p) for name in tensors):
                prefix += p
                break
        else:
            return {name[len(prefix) :]: tensor for name, tensor in tensors.items()}, prefix


def _unstacked(tensors: Mapping[str, Tensor], notes: list[str]) -> dict[str, Tensor]:
    """Blocks that a scan keeps in one array, each under a name of its own."""
    stacked = {name: tensor for name, tensor in tensors.items() if STACKED in name}
    if not stacked:
        return dict(tensors)
    depths = {tensor.shape[:1] for tensor in stacked.values()}
    if len(depths) > 1 or () in depths or max(depths) > (MAX_STACKED,):
        raise Bad(f"its arrays under {STACKED} are not all of as many blocks, or of too many.")
    (depth,) = depths.pop()
    made = {name: tensor for name, tensor in tensors.items() if name not in stacked}
    for name, tensor in stacked.items():
        # Whole arrays are kept while the file is open: its blocks are asked for one after the other.
        whole = cache(tensor.read)
        for i in range(depth):
            place = name.replace(STACKED, f"{STACKED[:-1]}_{i}/")
            if place in made:
                raise Bad(f"it holds {place!r} by itself and in {name!r}.")
            made[place] = Tensor(tensor.shape[1:], tensor.dtype, partial(_part, whole, i))
    notes.append(f"{depth} blocks kept in one array each were taken apart")
    return made


def _part(whole: Callable[[], np.ndarray], i: int) -> np.ndarray:
    return whole()[i]


def _open_shards(path: Path) -> WeightFile:
    try:
        index = json.loads(path.read_bytes())
        names = index["weight_map"]
        shards = sorted(set(names.values()))
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        raise Bad("it is no index of a sharded safetensors file.") from None
    if not shards or len(shards) > MAX_SHARDS or not all(type(s) is str for s in shards):
        raise Bad(f"it lists {len(shards)} shards.")
    for shard in shards:
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise Bad(f"it lists the shard {shard!r}; a shard is a .safetensors file in the same folder.")
    opened: list[WeightFile] = []
    tensors: dict[str, Tensor] = {}
    files: list[BinaryIO] = []
    try:
        for shard in shards:
            part = _open_raw_shard(path.parent / shard)
            opened.append(part)
            files.extend(part._files)
            expected = {name for name, place in names.items() if place == shard}
            if odd := expected ^ set(part.names):
                raise Bad(f"the index and {shard} disagree about {sorted(odd)[0]!r}.")
            tensors |= part._tensors
    except BaseException:
        for part in opened:
            part.close()
        raise
    tensors, prefix = _strip_prefix(tensors)
    notes = [f"{len(shards)} shards"]
    return WeightFile(path, "safetensors", tensors, files, prefix, notes, paths=[path.parent / s for s in shards])


def _open_raw_shard(path: Path) -> WeightFile:
    if not path.is_file():
        raise Bad(f"its shard {path.name} is missing.")
    file = open(path, "rb", buffering=0)  # noqa: SIM115
    try:
        size = path.stat().st_size
        if _kind(file, size) != "safetensors":
            raise Bad("it is no safetensors file.")
        tensors, metadata = safetensors_tensors(file, size)
    except Bad as error:
        file.close()
        raise Bad(f"its shard {path.name}: {error}") from None
    return WeightFile(path, "safetensors", tensors, [file], metadata=metadata)
