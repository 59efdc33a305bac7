"""Weight files opened as names, shapes and dtypes, and read tensor by tensor; no code in them is ever executed."""

import hashlib
import json
import math
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from jft.errors import UserError
from jft.weights.unpickle import MAX_DIMS, Refused, TensorRef, unpickle

SAFETENSORS_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
MAX_HEADER = 100_000_000  # bytes, the limit of the safetensors format itself
MAX_PICKLE = 64_000_000  # bytes; the pickle of ViT-H is under 0.1 MB
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

# Where training scripts put the weights inside a checkpoint; averaged weights first, as those are the ones evaluated.
WRAPPERS = (
    *("state_dict_ema", "model_ema", "ema_state_dict", "ema"),
    *("state_dict", "model_state_dict", "model_state", "model", "params", "net", "network", "teacher"),
)
# What wrapping a module in another (data parallel, Lightning, torch.compile, DINO) puts before every name.
PREFIXES = ("module.", "model.", "_orig_mod.", "backbone.")

CONVERT = (
    'Where PyTorch is installed, and if you trust the file: python -c "import sys, torch; '
    "from safetensors.torch import save_file; d = torch.load(sys.argv[1], map_location='cpu', weights_only=True); "
    "save_file({k: v.contiguous().clone() for k, v in d.get('state_dict', d.get('model', d)).items()}, sys.argv[2])\" "
    "OLD.pth NEW.safetensors"
)


class Bad(ValueError):
    """Why a file cannot be read; the file's name is added where it is known."""


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file: its shape and dtype, and how to read it."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


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
        except (Bad, OSError, zlib.error, zipfile.BadZipFile, EOFError, NotImplementedError) as error:
            raise UserError(f"{self.path}: cannot read {name!r}: {error}.") from None

    @cached_property
    def sha256(self) -> str:
        """The file's SHA-256 in hexadecimal; of a sharded one, that of its shards' digests and names, as `sha256sum` prints them."""
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
        raise UserError(f"{path}: {error}") from None


def _open_file(path: Path) -> WeightFile:
    file = open(path, "rb", buffering=0)  # noqa: SIM115  (closed by WeightFile.close)
    try:
        size = path.stat().st_size
        kind = _kind(file, size)
        archive: dict[str, _Member] = {}
        if kind == "zip":
            archive = _zip_members(file, size)
            kind = _zip_kind(archive)
        expected = ENDINGS.get(path.suffix.lower())
        if expected not in (None, kind):
            other = next(ending for ending, k in ENDINGS.items() if k == kind)
            raise Bad(
                f"the ending says {KINDS[expected]}, but the content is {KINDS[kind]}. Rename it to end in {other}."
            )
        notes: list[str] = []
        metadata: dict[str, str] = {}
        if kind == "safetensors":
            tensors, metadata = _safetensors(file, size)
        else:
            tensors = _npz(file, archive, size) if kind == "npz" else _torch(file, archive, size, notes)
        if not tensors:
            raise Bad("there are no tensors in it.")
        tensors, prefix = _strip_prefix(tensors)
        return WeightFile(path, kind, tensors, [file], prefix, notes, metadata)
    except BaseException:
        file.close()
        raise


def _kind(file: BinaryIO, size: int) -> str:
    head = bytes(_read_at(file, 0, min(size, 512)))
    if not head:
        raise Bad("the file is empty.")
    if head.startswith(b"PK\x03\x04"):
        return "zip"
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
    if size >= 9 and head[8:9] == b"{":
        return "safetensors"
    raise Bad("its content is none of .safetensors, zip .pth and .npz (or its beginning is damaged).")


def _read_at(file: BinaryIO, offset: int, size: int) -> np.ndarray:
    buffer = np.empty(size, np.uint8)
    file.seek(offset)
    view, done = memoryview(buffer), 0
    while done < size:  # one call reads 2 GiB at most
        count = file.readinto(view[done:])  # type: ignore[attr-defined]
        if not count:
            raise Bad(f"the file ends {size - done:,} bytes too early")
        done += count
    return buffer


def _strided(
    file: BinaryIO, offset: int, shape: tuple[int, ...], dtype: np.dtype, strides: tuple[int, ...] | None = None
) -> Tensor:
    """A tensor whose elements lie in the file as they are, `strides` elements apart (None: in C order)."""
    contiguous = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    native = dtype.newbyteorder("=")

    def read() -> np.ndarray:
        if 0 in shape:
            return np.zeros(shape, native)
        if strides is None or all(n == 1 or s == c for n, s, c in zip(shape, strides, contiguous, strict=True)):
            array = _read_at(file, offset, math.prod(shape) * dtype.itemsize).view(dtype).reshape(shape)
        else:
            span = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
            flat = _read_at(file, offset, span * dtype.itemsize).view(dtype)
            steps = tuple(s * dtype.itemsize for s in strides)
            array = np.lib.stride_tricks.as_strided(flat, shape, steps, writeable=False).copy()
        return array if dtype == native else array.astype(native)

    return Tensor(shape, native, read)


def _strip_prefix(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    prefix = ""
    while True:
        for p in PREFIXES:
            if all(name.startswith(prefix + p) and len(name) > len(prefix + p) for name in tensors):
                prefix += p
                break
        else:
            return {name[len(prefix) :]: tensor for name, tensor in tensors.items()}, prefix


# --- safetensors


def _safetensors(file: BinaryIO, size: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    length = int.from_bytes(bytes(_read_at(file, 0, 8)), "little")
    if length > MAX_HEADER:
        raise Bad(f"its header claims {length:,} bytes; the format allows {MAX_HEADER:,}.")
    if 8 + length > size:
        raise Bad(f"it is truncated: the header claims {length:,} bytes, the file has {size:,}.")
    try:
        header = json.loads(bytes(_read_at(file, 8, length)), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise Bad(f"its header cannot be read: {str(error)[:200]}.") from None
    if not isinstance(header, dict):
        raise Bad("its header is no table of tensors.")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise Bad("its header's metadata is something other than text by name.")
    start, tensors, spans = 8 + length, {}, []
    for name, entry in header.items():
        shape, dtype, begin, end = _entry(name, entry)
        if end > size - start:
            raise Bad(f"it is truncated: {name!r} ends at byte {start + end:,}, the file has {size:,}.")
        spans.append((begin, end, name))
        tensors[name] = _strided(file, start + begin, shape, dtype)
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            what = "overlaps another tensor" if begin < position else "leaves a gap before it"
            raise Bad(f"its header lies: {name!r} at bytes {begin:,} to {end:,} {what}.")
        position = end
    if position != size - start:
        raise Bad(f"it has {size - start - position:,} bytes after the last tensor.")
    return tensors, metadata


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name stands in it twice")
    return table


def _natural(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**62


def _entry(name: str, entry: Any) -> tuple[tuple[int, ...], np.dtype, int, int]:
    match entry:
        case {"dtype": str(code), "shape": list(shape), "data_offsets": [begin, end]}:
            pass
        case _:
            raise Bad(f"its header describes {name!r} by something other than dtype, shape and data_offsets.")
    if code not in SAFETENSORS_DTYPES:
        raise Bad(f"{name!r} has the dtype {code!r}; known are {', '.join(SAFETENSORS_DTYPES)}.")
    if len(shape) > MAX_DIMS or not all(map(_natural, (*shape, begin, end))):
        raise Bad(f"its header gives {name!r} an impossible shape or place.")
    expected = math.prod(shape) * SAFETENSORS_DTYPES[code].itemsize
    if end - begin != expected:
        raise Bad(
            f"its header lies: {name!r} of shape {tuple(shape)} and dtype {code} takes {expected:,} bytes, "
            f"its place has {end - begin:,}."
        )
    return tuple(shape), SAFETENSORS_DTYPES[code], begin, end


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
            listed = {name for name, place in names.items() if place == shard}
            if odd := listed ^ set(part.names):
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
        tensors, metadata = _safetensors(file, size)
    except Bad as error:
        file.close()
        raise Bad(f"its shard {path.name}: {error}") from None
    return WeightFile(path, "safetensors", tensors, [file], metadata=metadata)


# --- zip archives


@dataclass(frozen=True)
class _Member:
    offset: int  # of its data
    size: int  # uncompressed
    info: zipfile.ZipInfo
    archive: zipfile.ZipFile

    @property
    def stored(self) -> bool:
        return self.info.compress_type == zipfile.ZIP_STORED


def _zip_members(file: BinaryIO, size: int) -> dict[str, _Member]:
    try:
        archive = zipfile.ZipFile(file)
    except (
        zipfile.BadZipFile,
        ValueError,
        NotImplementedError,
        EOFError,
        struct.error,
        IndexError,
        OverflowError,
    ) as e:
        raise Bad(f"it is a truncated or damaged zip archive ({str(e)[:200]}).") from None
    members: dict[str, _Member] = {}
    end = 0
    for info in sorted(archive.infolist(), key=lambda info: info.header_offset):
        name = info.filename
        if info.is_dir():
            continue
        if name in members:
            raise Bad(f"the zip archive holds {name!r} twice.")
        if info.flag_bits & 1:
            raise Bad(f"{name!r} in it is encrypted.")
        if info.header_offset < end or info.header_offset + 30 > size:
            raise Bad(f"the zip archive lies about where {name!r} is.")
        local = bytes(_read_at(file, info.header_offset, 30))
        offset = info.header_offset + 30 + sum(struct.unpack("<HH", local[26:30]))
        end = offset + info.compress_size
        if not local.startswith(b"PK\x03\x04") or end > size:
            raise Bad(f"the zip archive is truncated or damaged at {name!r}.")
        if info.compress_type == zipfile.ZIP_STORED and info.compress_size != info.file_size:
            raise Bad(f"the zip archive lies about the size of {name!r}.")
        members[name] = _Member(offset, info.file_size, info, archive)
    return members


def _zip_kind(members: Mapping[str, _Member]) -> str:
    if any(name == "data.pkl" or name.endswith("/data.pkl") for name in members):
        return "torch"
    if members and all(name.endswith(".npy") for name in members):
        return "npz"
    raise Bad("it is a zip archive of neither PyTorch weights (no data.pkl) nor NumPy arrays (not all are .npy).")


def _torch(file: BinaryIO, members: Mapping[str, _Member], size: int, notes: list[str]) -> dict[str, Tensor]:
    pickles = [name for name in members if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise Bad(f"it is a zip archive with {len(pickles)} data.pkl in it, where PyTorch writes one.")
    if packed := [name for name, member in members.items() if not member.stored]:
        raise Bad(f"{packed[0]!r} in it is compressed, which PyTorch never does. Unpack it and pack it anew, stored.")
    root = pickles[0][: -len("data.pkl")]
    if members[pickles[0]].size > MAX_PICKLE:
        raise Bad(f"its pickle has {members[pickles[0]].size:,} bytes; {MAX_PICKLE:,} are the limit.")
    order = "="
    if byteorder := members.get(root + "byteorder"):
        text = bytes(_read_at(file, byteorder.offset, min(byteorder.size, 16)))
        if text not in (b"little", b"big"):
            raise Bad(f"its byte order {text!r} is unknown.")
        order = "<" if text == b"little" else ">"
    member = members[pickles[0]]
    try:
        content = unpickle(bytes(_read_at(file, member.offset, member.size)))
    except Refused as error:
        raise Bad(_refusal(error)) from None
    tensors = {}
    for name, ref in _state_dict(content, notes).items():
        key = ref.storage.key
        member_of = members.get(f"{root}data/{key}")
        if member_of is None:
            raise Bad(f"the storage {key!r} of {name!r} is not in it.")
        itemsize = 1 if ref.storage.dtype is None else ref.storage.dtype.itemsize
        if member_of.size < ref.storage.size * itemsize:
            raise Bad(
                f"it is damaged: the storage of {name!r} should have {ref.storage.size * itemsize:,} bytes, "
                f"it has {member_of.size:,}."
            )
        # An expanded tensor (stride 0) can be far larger than its storage; beyond the file's size it is a trap.
        if math.prod(ref.shape) * ref.dtype.itemsize > max(size, 1 << 20):
            raise Bad(f"{name!r} of shape {ref.shape} is larger than the whole file.")
        dtype = ref.dtype.newbyteorder(order)
        tensors[name] = _strided(file, member_of.offset + ref.offset * dtype.itemsize, ref.shape, dtype, ref.strides)
    return tensors


def _refusal(error: Refused) -> str:
    if error.name is None:
        return f"its pickle cannot be read: {error}."
    return (
        f"its pickle is refused: {error}. jft reads tensors in plain containers and never executes what a pickle "
        f"names. A file that holds a whole model, or a script's objects, has to be saved anew as a state dict. {CONVERT}"
    )


def _state_dict(content: Any, notes: list[str]) -> dict[str, TensorRef]:
    """The tensors by name, taken out of whatever a training script wrapped around them; `notes` says from where."""
    place: list[str] = []
    while True:
        if type(content) is not dict:
            where = f"its entry {'.'.join(place)!r}" if place else "it"
            raise Bad(f"{where} is no dictionary of tensors.")
        tensors = {name: v for name, v in content.items() if isinstance(v, TensorRef) and type(name) is str}
        inner = {key: v for key, v in content.items() if type(v) is dict and type(key) is str and v}
        # torch's averaged model keeps a counter beside the weights.
        count = [name for name in tensors if name == "n_averaged"]
        if len(tensors) > len(count):
            left = [str(key) for key in content if key not in tensors or key in count]
            if left:
                notes.append(f"left out what is no weight: {_some(left)}")
            return {name: v for name, v in tensors.items() if name not in count}
        key = next((key for key in WRAPPERS if key in inner), None)
        if key is None:
            holding = [k for k, v in inner.items() if any(isinstance(t, TensorRef) for t in v.values())]
            if len(holding) != 1:
                raise Bad(f"none of its entries {_some([str(k) for k in content])} is known to hold the weights.")
            key = holding[0]
        place.append(key)
        others = [str(k) for k in content if k != key]
        notes.append(f"weights taken from its entry {'.'.join(place)!r}" + (f", not {_some(others)}" if others else ""))
        if len(place) > 4:
            raise Bad("its entries are nested too deeply.")
        content = inner[key]


def _some(names: list[str], limit: int = 8) -> str:
    names = [name[:80] for name in names]
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


# --- npz


def _npz(file: BinaryIO, members: Mapping[str, _Member], size: int) -> dict[str, Tensor]:
    total = sum(member.size for member in members.values())
    # Weights hardly compress; arrays of one value do. This still stops an archive of 42 kB that claims petabytes.
    if total > max(50 * size, 1 << 28):
        raise Bad(f"it claims {total:,} bytes of arrays in a file of {size:,}: a zip bomb.")
    return {name.removesuffix(".npy"): _npy(file, name, member) for name, member in members.items()}


def _npy(file: BinaryIO, name: str, member: _Member) -> Tensor:
    if member.info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise Bad(f"{name!r} is compressed in a way that NumPy never uses.")
    try:
        with member.archive.open(member.info) as stream, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # NumPy's notice that Python 2 wrote the header
            version = np.lib.format.read_magic(stream)
            if version not in ((1, 0), (2, 0)):
                raise ValueError(f"version {version}")
            header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = header(stream)
            begin = stream.tell()
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError, EOFError, zlib.error) as error:
        raise Bad(f"the header of {name!r} cannot be read: {str(error)[:200]}.") from None
    except zipfile.BadZipFile as error:
        raise Bad(f"{name!r} is damaged: {error}.") from None
    if dtype.hasobject:
        raise Bad(f"{name!r} holds Python objects, which only executing a pickle could read.")
    if len(shape) > MAX_DIMS or not all(map(_natural, shape)):
        raise Bad(f"{name!r} has the impossible shape {shape}.")
    if begin + math.prod(shape) * dtype.itemsize != member.size:
        raise Bad(
            f"the header of {name!r} lies: shape {shape} and dtype {dtype} take "
            f"{math.prod(shape) * dtype.itemsize:,} bytes, {member.size - begin:,} are there."
        )
    if dtype == np.dtype("V2"):
        dtype = np.dtype(ml_dtypes.bfloat16)  # NumPy has no name for bfloat16 and writes two raw bytes
    strides = tuple(math.prod(shape[:i]) for i in range(len(shape))) if fortran else None
    if member.stored:
        return _strided(file, member.offset + begin, tuple(shape), dtype, strides)
    native = dtype.newbyteorder("=")

    def read() -> np.ndarray:
        flat = np.empty(math.prod(shape) * dtype.itemsize, np.uint8)
        with member.archive.open(member.info) as stream:
            stream.read(begin)
            view, done = memoryview(flat), 0
            while done < len(flat):
                count = stream.readinto(view[done : done + (1 << 20)])
                if not count:
                    raise Bad(f"it ends {len(flat) - done:,} bytes too early")
                done += count
        array = flat.view(dtype)
        array = array.reshape(shape, order="F" if fortran else "C")
        return np.ascontiguousarray(array).reshape(shape).astype(native, copy=False)

    return Tensor(tuple(shape), native, read)
