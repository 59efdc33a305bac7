"""Zip archives of weights, PyTorch's and NumPy's: sizes checked against the file before anything is read."""

import math
import struct
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from jft.weights.layout import MAX_DIMS, Bad, Tensor, fill, listed, natural, read_at, strided
from jft.weights.unpickle import Refused, TensorRef, unpickle

# What Python's zip and zlib modules raise over damaged archives (NotImplementedError is a RuntimeError).
DAMAGE = (zipfile.BadZipFile, zlib.error, struct.error, ValueError, RuntimeError, EOFError, IndexError, OverflowError)
MAX_PICKLE = 64_000_000  # bytes; the pickle of ViT-H is under 0.1 MB

# Where training scripts put the weights inside a checkpoint; averaged ones first, being those that are evaluated.
WRAPPERS = (
    *("state_dict_ema", "model_ema", "ema_state_dict", "ema"),
    *("state_dict", "model_state_dict", "model_state", "model", "params", "net", "network", "teacher"),
)

CONVERT = (
    'Where PyTorch is installed, and if you trust the file: python -c "import sys, torch; '
    "from safetensors.torch import save_file; d = torch.load(sys.argv[1], map_location='cpu', weights_only=True); "
    "save_file({k: v.contiguous().clone() for k, v in d.get('state_dict', d.get('model', d)).items()}, sys.argv[2])\" "
    "OLD.pth NEW.safetensors"
)


@dataclass(frozen=True)
class Member:
    """A file in a zip archive."""

    offset: int  # of its data
    size: int  # uncompressed
    info: zipfile.ZipInfo
    archive: zipfile.ZipFile

    @property
    def stored(self) -> bool:
        """Whether its bytes lie in the archive as they are."""
        return self.info.compress_type == zipfile.ZIP_STORED


def zip_members(file: BinaryIO, size: int) -> dict[str, Member]:
    """The files in a zip archive, none of which overlaps another or reaches past the end."""
    try:
        archive = zipfile.ZipFile(file)
    except DAMAGE as e:
        raise Bad(f"it is a truncated or damaged zip archive ({str(e)[:200]}).") from None
    members: dict[str, Member] = {}
    end = 0
    for info in sorted(archive.infolist(), key=lambda info: info.header_offset):
        name = info.filename
        if name.endswith("/"):
            continue
        if name in members:
            raise Bad(f"the zip archive holds {name!r} twice.")
        if info.flag_bits & 1:
            raise Bad(f"{name!r} in it is encrypted.")
        if info.header_offset < end or info.header_offset + 30 > size:
            raise Bad(f"the zip archive lies about where {name!r} is.")
        named = info.orig_filename.encode("utf-8" if info.flag_bits & 0x800 else "cp437", "replace")
        local = bytes(read_at(file, info.header_offset, min(30 + len(named), size - info.header_offset)))
        offset = info.header_offset + 30 + sum(struct.unpack("<HH", local[26:30]))
        end = offset + info.compress_size
        if not local.startswith(b"PK\x03\x04") or end > size:
            raise Bad(f"the zip archive is truncated or damaged at {name!r}.")
        if local[30:] != named:
            raise Bad(f"the zip archive has two names for {name!r}.")
        if info.compress_type == zipfile.ZIP_STORED and info.compress_size != info.file_size:
            raise Bad(f"the zip archive lies about the size of {name!r}.")
        members[name] = Member(offset, info.file_size, info, archive)
    return members


def zip_kind(members: Mapping[str, Member]) -> str:
    """`torch` or `npz`."""
    if any(name == "data.pkl" or name.endswith("/data.pkl") for name in members):
        return "torch"
    if members and all(name.endswith(".npy") for name in members):
        return "npz"
    raise Bad("it is a zip archive of neither PyTorch weights (no data.pkl) nor NumPy arrays (not all are .npy).")


def npz_tensors(file: BinaryIO, members: Mapping[str, Member], size: int) -> dict[str, Tensor]:
    """The arrays of an `.npz` archive."""
    total = sum(member.size for member in members.values())
    # Weights hardly compress; arrays of one value do. This still stops an archive of 42 kB that claims petabytes.
    if total > max(50 * size, 1 << 28):
        raise Bad(f"it claims {total:,} bytes of arrays in a file of {size:,}: a zip bomb.")
    return {name.removesuffix(".npy"): _npy(file, name, member) for name, member in members.items()}


def _npy(file: BinaryIO, name: str, member: Member) -> Tensor:
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
    except (*DAMAGE, TypeError, SyntaxError, tokenize.TokenError, MemoryError) as error:
        raise Bad(f"the header of {name!r} cannot be read: {str(error)[:200]}.") from None
    if dtype.itemsize == 0:
        raise Bad(f"{name!r} holds elements of no bytes.")
    if dtype.hasobject:
        raise Bad(f"{name!r} holds Python objects, which only executing a pickle could read.")
    if len(shape) > MAX_DIMS or not all(map(natural, shape)):
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
        return strided(file, member.offset + begin, tuple(shape), dtype, strides)
    native = dtype.newbyteorder("=")

    def read() -> np.ndarray:
        flat = np.empty(math.prod(shape) * dtype.itemsize, np.uint8)
        with member.archive.open(member.info) as stream:
            stream.read(begin)
            fill(flat, stream.readinto)  # type: ignore[attr-defined]
        array = flat.view(dtype).reshape(shape, order="F" if fortran else "C")
        return array.astype(native, order="C", copy=False)

    return Tensor(tuple(shape), native, read)


def torch_tensors(file: BinaryIO, members: Mapping[str, Member], size: int, notes: list[str]) -> dict[str, Tensor]:
    """The tensors of a PyTorch archive; `notes` receives what was decided about it."""
    pickles = [name for name in members if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise Bad(f"it is a zip archive with {len(pickles)} data.pkl in it, where PyTorch writes one.")
    root = pickles[0][: -len("data.pkl")]
    if root + "constants.pkl" in members:
        raise Bad(
            "it is a TorchScript archive, code and weights together. Where PyTorch is: "
            "torch.save(torch.jit.load('OLD.pt', map_location='cpu').state_dict(), 'NEW.pth')."
        )
    if packed := [name for name, member in members.items() if not member.stored]:
        raise Bad(f"{packed[0]!r} in it is compressed, as PyTorch never writes it. Unzip it, pack it with `zip -0`.")
    if members[pickles[0]].size > MAX_PICKLE:
        raise Bad(f"its pickle has {members[pickles[0]].size:,} bytes; {MAX_PICKLE:,} are the limit.")
    little = True
    if byteorder := members.get(root + "byteorder"):
        text = bytes(read_at(file, byteorder.offset, min(byteorder.size, 16)))
        if text not in (b"little", b"big"):
            raise Bad(f"its byte order {text!r} is unknown.")
        little = text == b"little"
    member = members[pickles[0]]
    try:
        content = unpickle(bytes(read_at(file, member.offset, member.size)))
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
        dtype = ref.dtype.newbyteorder("<" if little else ">")
        tensors[name] = strided(file, member_of.offset + ref.offset * dtype.itemsize, ref.shape, dtype, ref.strides)
    return tensors


def _refusal(error: Refused) -> str:
    if error.name is None:
        return f"its pickle cannot be read: {error}."
    return (
        f"its pickle is refused: {error}. jft reads tensors in plain containers and never executes what a pickle "
        "names. A file that holds a whole model, or a script's objects, has to be saved anew where its own code is: "
        "torch.save(model.state_dict(), 'NEW.pth')."
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
        key = next((key for key in WRAPPERS if key in inner), None)
        if key is None and len(tensors) > len(count):
            left = [str(key) for key in content if key not in tensors or key in count]
            if left:
                notes.append(f"left out what is no weight: {listed(left)}")
            return {name: v for name, v in tensors.items() if name not in count}
        if key is None:
            holding = [k for k, v in inner.items() if any(isinstance(t, TensorRef) for t in v.values())]
            if len(holding) != 1:
                raise Bad(f"none of its entries {listed([str(k) for k in content])} is known to hold the weights.")
            key = holding[0]
        place.append(key)
        others = [str(k) for k in content if k != key]
        notes.append(
            f"weights taken from its entry {'.'.join(place)!r}" + (f", not {listed(others)}" if others else "")
        )
        if len(place) > 4:
            raise Bad("its entries are nested too deeply.")
        content = inner[key]
