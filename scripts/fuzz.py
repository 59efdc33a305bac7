"""Feeds damaged and made-up files to everything in jft that reads files from strangers.

    python scripts/fuzz.py                                   all readers, 10,000 executions each
    python scripts/fuzz.py pth pickle --executions 200000 --seed 7
    python scripts/fuzz.py npz --replay faults/npz-1f2e3d.bin

A reader may take a file or refuse it with one UserError. Anything else is a fault: another exception, more memory than
the cap, more than ten seconds, a message without end, an import, a process, a socket or a file written while it reads.
Files are mutations of valid ones, one of the other, and files made by a grammar. The same seed gives the same files.
"""

import argparse
import encodings
import hashlib
import importlib
import io
import json
import os
import pickle
import pickletools
import pkgutil
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from PIL import Image

from jft.data import sources
from jft.errors import UserError
from jft.weights.readers import open_weights
from jft.weights.unpickle import CALLS, DTYPES, INERT, STORAGES, Refused, unpickle
from jft.weights.writers import write_npz, write_safetensors

MEMORY = 1 << 30  # bytes that a reader may take, over what the process has when it begins
SECONDS = 10  # of the processor, as many on a busy machine
MESSAGE = 3000  # characters
FORBIDDEN = (
    *(
        "exec",
        "import",
        "marshal.loads",
        "code.__new__",
        "pickle.find_class",
        "ctypes",
        "socket",
        "subprocess",
        "shutil",
    ),
    *("os.system", "os.exec", "os.fork", "os.forkpty", "os.spawn", "os.posix_spawn", "os.startfile", "os.putenv"),
    *("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.chmod", "os.chown", "os.link", "os.symlink", "os.truncate"),
    *("webbrowser", "urllib", "ftplib", "http", "smtplib", "sqlite3", "syslog", "winreg", "pty"),
)


class Fault(Exception):
    """What a reader must not do."""


# What is watched while a reader works

armed = False


def audit(event: str, args: tuple) -> None:
    """Python's audit hook: events that no reading of data needs."""
    if not armed:
        return
    if event == "open":
        _, mode, flags = args
        if (isinstance(mode, str) and set(mode) & set("wax+")) or (flags or 0) & (os.O_WRONLY | os.O_RDWR):
            raise Fault(f"a file is opened for writing: {args}")
    elif event.startswith(FORBIDDEN):
        raise Fault(f"{event} {args!r:.200}")


def alarm(signum: int, frame: Any) -> None:
    """What SIGPROF does."""
    raise Fault(f"more than {SECONDS} seconds")


def watched(function: Callable[[Path], Any], path: Path) -> str:
    """Run a reader on a file: `read`, or why it was refused. Raises Fault."""
    global armed
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    armed = True
    try:
        function(path)
        return "read"
    except (UserError, Refused) as error:
        message = str(error)
        if len(message) > MESSAGE:
            raise Fault(f"a message of {len(message):,} characters: {message[:80]!r}…") from None
        if not message:
            raise Fault("an empty message") from None
        return message
    finally:
        armed = False
        signal.setitimer(signal.ITIMER_PROF, 0)


# Files


def mutate(rng: random.Random, content: bytes, others: list[bytes]) -> bytes:
    """A few changes of every size: bits, numbers, stretches moved, doubled, lost, or taken from another file."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6, 12))):
        if not data:
            return bytes(data)
        at = rng.randrange(len(data))
        length = min(rng.choice((1, 2, 4, 8, 16, 64, 256)), len(data) - at)
        match rng.randrange(11):
            case 0:
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                data[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, 0x20, 0x28, 0x2E, 0x63, 0x52))
            case 2:
                data[at : at + length] = rng.randbytes(length)
            case 3:
                size = rng.choice((1, 2, 4, 8))
                value = rng.choice(
                    (0, 1, 2, 2**7, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**64 - 1)
                )
                data[at : at + size] = (value % 256**size).to_bytes(size, rng.choice(("little", "big")))
            case 4:
                del data[at : at + length]
            case 5:
                data[at:at] = data[at : at + length] * rng.choice((1, 2, 50))
            case 6:
                to = rng.randrange(len(data))
                data[to:to] = data[at : at + length]
            case 7:
                del data[rng.choice((at, max(len(data) - 30, 0), len(data) // 2)) :]
            case 8:
                other = rng.choice(others)
                start = rng.randrange(max(len(other), 1))
                data[at : at + length] = other[start : start + rng.choice((4, 16, 64, 512))]
            case 9:  # a number in text
                digits = [i for i in range(at, min(at + 200, len(data))) if 48 <= data[i] <= 57]
                if digits:
                    i = rng.choice(digits)
                    data[i : i + 1] = rng.choice(
                        (b"0", b"9", b"-1", b"99999999999999999999", b"1e9", b"null", b"[]", b"1.5")
                    )
            case 10:
                data += rng.randbytes(length)
    return bytes(data)


def text(value: str) -> bytes:
    """A pickle's BINUNICODE."""
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def glob(name: str) -> bytes:
    """A pickle's GLOBAL."""
    module, _, attribute = name.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def tensor(key: str, count: int, shape: tuple[int, ...], kind: str = "FloatStorage", expanded: bool = False) -> bytes:
    """A pickled tensor in C order, or of one element repeated."""
    strides, step = [], 1
    for n in shape[::-1]:
        strides.insert(0, 0 if expanded else step)
        step *= n
    numbers = lambda values: b"(" + b"".join(b"\x8a\x09" + v.to_bytes(9, "little") for v in values) + b"t"  # noqa: E731
    storage = b"(" + text("storage") + glob(f"torch.{kind}") + text(key) + text("cpu") + b"J" + struct.pack("<i", count)
    return (
        glob("torch._utils._rebuild_tensor_v2") + b"(" + storage + b"tQK\0" + numbers(shape) + numbers(strides)
        + b"\x89" + glob("collections.OrderedDict") + b")RtR"
    )  # fmt: skip


def state_dict(*extra: bytes) -> bytes:
    """A pickled dictionary of two tensors, and of more pairs of key and value."""
    pairs = text("conv1.weight") + tensor("0", 24, (2, 3, 4)) + text("fc.bias") + tensor("1", 5, (5,), "HalfStorage")
    return b"\x80\x02}q\0(" + pairs + b"".join(extra) + b"u."


def packed(members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    """A zip archive."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content, compress_type=method)
    return file.getvalue()


def pth(pickled: bytes, order: bytes = b"little", **more: bytes) -> bytes:
    """A PyTorch archive around a pickle."""
    members = {"data.pkl": pickled, "byteorder": order, "data/0": bytes(96), "data/1": bytes(10), "version": b"3\n"}
    return packed({f"archive/{name}": content for name, content in (members | more).items()})


NAMES = (
    *(*CALLS, *STORAGES, *DTYPES, *INERT, "os.system", "posix.system", "builtins.eval", "builtins.getattr"),
    *("subprocess.Popen", "torch.load", "torch.hub.load", "numpy.core.multiarray._reconstruct", "pickle.loads"),
    *("copyreg._reconstructor", "__main__.X", "os." + 5000 * "x"),
)
OPCODES = [op for op in pickletools.opcodes if op.name != "STOP"]


def grammar_pickle(rng: random.Random) -> bytes:
    """A sequence of operations, most of which find on the stack what they need."""
    out = bytearray(b"\x80" + bytes([rng.choice((2, 3, 4, 5))]) if rng.random() < 0.9 else b"")
    for _ in range(rng.choice((3, 10, 30, 100))):
        match rng.randrange(9):
            case 0:
                out += glob(rng.choice(NAMES))
            case 1:
                out += (
                    b"("
                    + b"".join(
                        rng.choice((b"K\x01", b"}", b"]", text("a"), b"N", b"\x88")) for _ in range(rng.randrange(5))
                    )
                    + b"t"
                )
            case 2:
                out += rng.choice(
                    (
                        b"R",
                        b"b",
                        b"s",
                        b"a",
                        b"\x81",
                        b"\x93",
                        b"Q",
                        b"0",
                        b"2",
                        b"\x94",
                        b"o",
                        b"\x92",
                        b"e",
                        b"u",
                        b".",
                    )
                )
            case 3:
                out += tensor(
                    rng.choice("01x"),
                    rng.choice((0, 5, 24, 2**31 - 1)),
                    tuple(rng.choice((0, 1, 2, 24, 2**20)) for _ in range(rng.randrange(4))),
                )
            case 4:
                out += rng.choice((b"q", b"h")) + bytes([rng.randrange(4)])
            case 5:
                out += text(rng.choice((*NAMES, "state_dict", "model", "a", "0"))) + rng.choice((b"", b"}", b"s"))
            case 6:
                out += rng.choice(
                    (b"}", b"]", b")", b"(", b"N", b"K\x05", b"\x85", b"\x86", b"\x87", b"\x8f", b"\x90", b"\x91")
                )
            case 7:
                op = rng.choice(OPCODES)
                out += op.code.encode("latin-1") + (
                    rng.randbytes(rng.randrange(12)) + rng.choice((b"", b"\n")) if op.arg else b""
                )
            case 8:
                out += b"}(" + text(rng.choice(("a", "b"))) + tensor("0", 24, (24,)) + b"u"
    return bytes(out + (b"." if rng.random() < 0.9 else b""))


def grammar_safetensors(rng: random.Random) -> bytes:
    """A header that mostly keeps to the rules, and data that mostly fit it."""
    table: dict[str, Any] = {}
    position = 0
    for i in range(rng.randrange(5)):
        shape = [
            rng.choice((0, 1, 2, 3, 7, 2**31, 2**62, -1)) if rng.random() < 0.2 else rng.randrange(4)
            for _ in range(rng.randrange(4))
        ]
        size = 4 * int(np.prod([min(abs(n), 8) for n in shape], initial=1))
        begin = position if rng.random() < 0.95 else rng.choice((0, -1, 2**63, None, "0"))
        end = position + size if rng.random() < 0.95 else rng.choice((0, 2**62, 1.5))
        entry: Any = {
            "dtype": rng.choice(("F32", "I32", "F32", "F16", "BOOL", "F99")),
            "shape": shape,
            "data_offsets": [begin, end],
        }
        if rng.random() < 0.05:
            entry = rng.choice(
                (None, [], {}, 3, {"dtype": "F32"}, {**entry, "shape": {}}, {**entry, "data_offsets": []})
            )
        table[rng.choice((f"t{i}", "t0", "module.t", "", "\0", "\x1b[2J", "__metadata__", 5000 * "n"))] = entry
        position += size
    if rng.random() < 0.3:
        table["__metadata__"] = rng.choice(({}, {"a": "b"}, {"a": 1}, [], None))
    header = json.dumps(table).encode()
    if rng.random() < 0.1:
        header = rng.choice(
            (b"[" * 5000, b'{"a":' * 3000, b"[]", b"null", b'"', header[:-1], header * 2, b"{" + b" " * 999)
        )
    length = len(header) if rng.random() < 0.9 else rng.choice((0, 1, 2**20, 2**40, 2**64 - 1))
    return struct.pack("<Q", length) + header + bytes(position if rng.random() < 0.9 else rng.randrange(200))


def npy(header: str, data: bytes = b"", version: int = 1) -> bytes:
    """An array file with this header."""
    encoded = header.encode("latin-1", "replace")
    size = struct.pack("<H" if version == 1 else "<I", len(encoded) % 65536)
    return b"\x93NUMPY" + bytes([version, 0]) + size + encoded + data


def grammar_npz(rng: random.Random) -> bytes:
    """Archives of arrays with headers true, false and foolish."""
    members = {}
    for i in range(rng.randrange(1, 4)):
        kind = rng.choice(
            ("<f4", "<f4", "|u1", "<f8", "|O", "V2", ">f4", "<U4", "[('a','<f4')]", "f", "<f4,<f4", "|S0")
        )
        shape = rng.choice(
            (
                "(2, 3)",
                "(6,)",
                "()",
                "(0,)",
                "(2**40,)",
                "(-1,)",
                "(True,)",
                "(4611686018427387904,)",
                "6",
                "[6]",
                "(1,)*40",
            )
        )
        header = (
            f"{{'descr': '{kind}', 'fortran_order': {rng.choice(('False', 'True', '0', 'None'))}, 'shape': {shape}, }}"
        )
        if rng.random() < 0.15:
            header = rng.choice(
                (
                    "",
                    "{}",
                    "(" * 300,
                    "[" * 90,
                    "__import__('os').system('true')",
                    "{1:2}",
                    "None",
                    "{'descr':" * 50,
                    "9" * 5000,
                )
            )
        data = bytes(rng.choice((0, 1, 6, 24, 48, 24, 24)))
        members[rng.choice((f"a{i}.npy", "a.npy", "../../x.npy", "/etc/x.npy", "a", "\x1b.npy"))] = npy(
            header + "\n", data, rng.choice((1, 1, 2, 3))
        )
    return packed(members, rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)))


CELLS = (
    *(
        "p/0.png",
        "p/1.png",
        "p/2.png",
        "./p/3.png",
        "p//4.png",
        "p/5.png",
        "../x.png",
        "/etc/passwd",
        "p/../p/0.png",
        "~/x",
        "C:\\x",
    ),
    *(
        "a",
        "b",
        "c",
        "a|b",
        "|",
        "",
        " ",
        "train",
        "val",
        "test",
        "dev",
        "=cmd()",
        "\x1b[2J",
        "\0",
        '"',
        '""',
        "é",
        "\u202e",
        "x" * 300,
    ),
)


def grammar_csv(rng: random.Random) -> bytes:
    """Tables that are nearly right."""
    columns = rng.choice(
        (
            ["path", "label"],
            ["path", "label", "split"],
            ["label", "path"],
            ["Path ", " LABEL"],
            ["path"],
            ["path", "path", "label"],
        )
    )
    rows = [columns]
    for i in range(rng.randrange(8)):
        right = {"path": f"p/{i % 6}.png", "label": rng.choice("abc"), "split": rng.choice(("train", "val", "train"))}
        row = [right.get(c.strip().lower(), "") if rng.random() < 0.85 else rng.choice(CELLS) for c in columns]
        rows.append(row if rng.random() < 0.95 else row[:1])
    quote = lambda c: '"' + c.replace('"', '""') + '"' if any(x in c for x in ',"\n') and rng.random() < 0.9 else c  # noqa: E731
    lines = rng.choice(("\n", "\r\n", "\n\n", "\r")).join(
        rng.choice((",", ",", ",", ";")).join(map(quote, row)) for row in rows
    )
    return lines.encode(rng.choice(("utf-8", "utf-8", "utf-8-sig", "utf-16")), "replace")


# Readers


def read_weights(path: Path) -> None:
    """Open a file and read every tensor in it."""
    with open_weights(path) as file:
        for name in file.names:
            array = file.read(name)
            if array.shape != file.shape(name) or array.dtype != file.dtype(name):
                raise Fault(f"{name!r} is {array.dtype} {array.shape}, not {file.dtype(name)} {file.shape(name)}")


def read_pickle(path: Path) -> None:
    """A pickle by itself."""
    unpickle(path.read_bytes())


def read_csv(path: Path) -> None:
    """A table of labelled pictures, and that nothing in it is of another folder."""
    splits = sources.load(path, val_fraction=0.25)
    for dataset in splits.sets().values():
        for name, file in zip(dataset.names, dataset.files or (), strict=True):
            if not os.path.normpath(file).startswith(f"{path.parent}{os.sep}"):
                raise Fault(f"{file} is outside of {path.parent}")
            if not name.isprintable():
                raise Fault(f"a name that is not printable: {name!r}")


def read_quarantine(path: Path) -> None:
    """A list of what to leave out."""
    sources.read_quarantine(path)


@dataclass(frozen=True)
class Target:
    """A reader, the name its file is given, files it takes, and a maker of others."""

    read: Callable[[Path], None]
    name: str
    seeds: Callable[[Path], list[bytes]]
    make: Callable[[random.Random], bytes]


def weights_by(write: Callable[[Path, dict], Any], name: str) -> Callable[[Path], list[bytes]]:
    """Small files as jft, or NumPy, writes them."""

    def seeds(folder: Path) -> list[bytes]:
        arrays = {"a.weight": np.arange(24, dtype=np.float32).reshape(4, 6), "b": np.ones(5, ml_dtypes.bfloat16)}
        scanned = {f"params/Transformer/encoderblock/{n}": np.zeros((2, 3), np.float32, "F") for n in ("k", "b")}
        made = []
        for some in (
            arrays,
            {"s": np.float64(3.0) + np.zeros(())},
            {f"module.{k}": v for k, v in arrays.items()},
            scanned,
        ):
            write(folder / name, some)
            made.append((folder / name).read_bytes())
        return made

    return seeds


def index(rng: random.Random) -> bytes:
    """The table of a sharded file."""
    shard = rng.choice(
        ("w.safetensors", "../w.safetensors", "/etc/passwd", "w.pth", "", None, 3, "x/w.safetensors", "w2.safetensors")
    )
    table = {
        rng.choice(("a.weight", "b", "c", "")): shard if rng.random() < 0.5 else "w.safetensors"
        for _ in range(rng.randrange(4))
    }
    return json.dumps(
        rng.choice(({"weight_map": table}, {"weight_map": table, "metadata": {}}, {"weight_map": []}, [], {}))
    ).encode()


SHARDS = [b'{"metadata": {"total_size": 106}, "weight_map": {"a.weight": "w.safetensors", "b": "w.safetensors"}}']
ORDERED = glob("collections.OrderedDict") + b")R"
FLOATS = text("w") + tensor("0", 24, (24,))
RAW = b"(" + text("storage") + glob("torch.storage.UntypedStorage") + text("0") + text("cpu") + b"J\x60\0\0\0tQ"
STATES = [
    state_dict(),
    b"\x80\x02}" + text("state_dict") + state_dict()[2:-1] + b"s.",
    state_dict(text("epoch"), b"K\x05", text("args"), glob("argparse.Namespace") + b")\x81}b"),
    state_dict(
        text("p"), glob("torch._utils._rebuild_parameter") + b"(" + tensor("0", 24, (24,)) + b"\x88" + ORDERED + b"tR"
    ),
    state_dict(
        text("v3"),
        glob("torch._utils._rebuild_tensor_v3") + b"(" + RAW + b"K\0K\x18\x85K\x01\x85\x89" + ORDERED
        + glob("torch.float32") + b"tR",
    ),
    b"\x80\x02" + ORDERED + b"(" + FLOATS + b"u}" + text("_metadata") + ORDERED + b"sb.",  # as torch.save writes one
    b"\x80\x04\x95\0\0\0\0\0\0\0\0}\x94(" + FLOATS + text("l") + b"](K\x01K\x02e" + text("d") + b"(dd."[:2] + b"u.",
    b"\x80\x02}(" + text("one") + b"}(" + FLOATS + b"u" + text("two") + b"}(" + FLOATS + b"uu.",
    b"\x80\x02}(" + text("only") + b"}(" + FLOATS + b"u" + text("n") + b"K\x01u.",
    b"\x80\x02" + (b"}" + text("model")) * 6 + b"}(" + FLOATS + b"u" + b"s" * 6 + b".",
    b"\x80\x02}(" + FLOATS + text("n_averaged") + tensor("0", 24, ()) + b"u.",
    b"\x80\x02}(" + text("x") + glob("collections.defaultdict") + glob("builtins.list") + b"\x85Ru.",
    b"\x80\x02}q\0(" + text("model") + b"h\0u.",
    state_dict(text("e"), tensor("0", 24, (1000, 1000), expanded=True)),
    state_dict(text("e"), tensor("0", 10**6, (10**6,))),
    state_dict(text("e"), tensor("7", 24, (24,))),
]  # fmt: skip
PTHS = [
    *map(pth, STATES), pth(state_dict(), b"big"), pth(state_dict(), b"middle"),
    pth(state_dict(), **{"constants.pkl": b"."}), packed({"archive/data.pkl": state_dict()}, zipfile.ZIP_DEFLATED),
]  # fmt: skip
# What else lies about under the names of weights.
OTHERS = [
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", b"<!DOCTYPE html><html>", b"\x89HDF\r\n\x1a\n",
    b"\x93NUMPY\x01\0", bytes(257) + b"ustar" + bytes(300), b"\x80\x02" + state_dict(), b"PK\x05\x06" + bytes(18),
]  # fmt: skip
PICKLES = [*STATES, *(b"\x80\x02" + glob(name) + b")R." for name in NAMES)]
LISTS = [b"# a list\np/0.png\twhy\n./p/1.png\n"]
CSVS = [
    b"path,label\np/0.png,a\np/1.png,b\np/2.png,a\np/3.png,b\n",
    b"path,label,split\np/0.png,a,train\np/1.png,b,train\np/2.png,a,val\np/3.png,b,test\n",
    'path,label\r\n"p/0.png","a|b"\r\np/1.png,b\r\np/2.png,é\r\n'.encode("utf-8-sig"),
]
TARGETS = {
    "safetensors": Target(
        read_weights, "w.safetensors", weights_by(write_safetensors, "w.safetensors"), grammar_safetensors
    ),
    "npz": Target(
        read_weights,
        "w.npz",
        lambda folder: (
            weights_by(write_npz, "w.npz")(folder)
            + weights_by(lambda path, some: np.savez_compressed(path, **some), "w.npz")(folder)
        ),
        grammar_npz,
    ),
    "pth": Target(read_weights, "w.pth", lambda folder: PTHS, lambda rng: pth(grammar_pickle(rng))),
    "weights": Target(
        read_weights,
        "w.weights",
        lambda folder: [
            *OTHERS,
            *PTHS[:2],
            *TARGETS["safetensors"].seeds(folder)[:1],
            *TARGETS["npz"].seeds(folder)[:1],
        ],
        lambda rng: rng.choice((grammar_npz, grammar_safetensors, lambda r: pth(grammar_pickle(r)), index))(rng),
    ),
    "pickle": Target(read_pickle, "data.pkl", lambda folder: PICKLES, grammar_pickle),
    "shards": Target(read_weights, "w.safetensors.index.json", lambda folder: SHARDS, index),
    "csv": Target(read_csv, "index.csv", lambda folder: CSVS, grammar_csv),
    "quarantine": Target(read_quarantine, "quarantine.txt", lambda folder: LISTS, grammar_csv),
}


def prepared(folder: Path) -> Path:
    """What the readers expect beside their file."""
    (folder / "p").mkdir()
    for i in range(6):
        Image.new("RGB", (4, 4), (i, 0, 0)).save(folder / "p" / f"{i}.png")
    write_safetensors(
        folder / "w2.safetensors", {"a.weight": np.zeros((4, 6), np.float32), "b": np.zeros(5, ml_dtypes.bfloat16)}
    )
    return folder


def fuzz(name: str, executions: int, seconds: float, seed: int, out: Path, folder: Path) -> tuple[int, int]:
    """Run one target; returns executions and faults, each kept in `out`."""
    target = TARGETS[name]
    path = folder / target.name
    seeds = target.seeds(folder)
    others = [content for t in TARGETS.values() for content in t.seeds(folder)]
    if name == "shards":
        (folder / "w2.safetensors").rename(folder / "w.safetensors")
    told: Counter[str] = Counter()
    kinds: set[str] = set()
    faults = 0
    begun = said = time.monotonic()
    done = 0
    resource.setrlimit(resource.RLIMIT_AS, (memory() + MEMORY, resource.RLIM_INFINITY))
    while done < executions and time.monotonic() - begun < seconds:
        rng = random.Random(f"{seed} {name} {done}")
        match rng.randrange(10):
            case 0 | 1 | 2:
                content = target.make(rng)
            case 3 | 4:
                content = mutate(rng, target.make(rng), others)
            case _:
                content = mutate(rng, rng.choice(seeds), others)
        path.write_bytes(content)
        done += 1
        try:
            answer = watched(target.read, path)
            told["read" if answer == "read" else "refused"] += 1
            kinds.add("".join(c for c in answer.replace(str(folder), "") if c.isalpha() or c == " ")[:60])
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            faults += 1
            out.mkdir(parents=True, exist_ok=True)
            kept = out / f"{name}-{hashlib.sha256(content).hexdigest()[:12]}.bin"
            kept.write_bytes(content)
            print(f"\n{name}: {type(error).__name__}: {str(error)[:300]}\n  {kept}", flush=True)
            if faults <= 3:
                traceback.print_exc(limit=-6)
        now = time.monotonic()
        if now - said > 10:
            said = now
            rate = done / (now - begun)
            print(
                f"{name}: {done:,}/{executions:,}, {rate:,.0f}/s, {(executions - done) / rate:,.0f} s left", flush=True
            )
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    rate = done / max(time.monotonic() - begun, 1e-9)
    print(
        f"{name}: {done:,} executions, {rate:,.0f}/s; read {told['read']:,}, refused {told['refused']:,} "
        f"in {len(kinds)} ways, faults {faults}",
        flush=True,
    )
    return done, faults


def memory() -> int:
    """Bytes of address space that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def works() -> None:
    """That the watch would notice: the very things it forbids are done once."""
    global armed
    importlib.import_module("numpy.ma")  # NumPy loads these, and Python an encoding, when they are first needed
    importlib.import_module("numpy.random")
    for module in pkgutil.iter_modules(encodings.__path__):
        if module.name not in ("mbcs", "oem"):
            importlib.import_module(f"encodings.{module.name}")
    for command in (b"cos\nsystem\n(S'true'\ntR.", b"cposix\nsystem\n(S'true'\ntR."):
        armed = True
        try:
            pickle.loads(command)
        except Fault:
            continue
        finally:
            armed = False
        raise SystemExit("The watch does not notice a pickle that executes.")


def main() -> int:
    """Parse, run, and say how it went: 1 where there were faults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"{', '.join(TARGETS)} (default: all)")
    parser.add_argument("--executions", type=int, default=10_000, metavar="N", help="of each (default: 10,000)")
    parser.add_argument("--seconds", type=float, default=float("inf"), metavar="S", help="at most, of each")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--out", type=Path, default=Path("fuzz-faults"), metavar="FOLDER", help="where faults are kept")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="give this file to the target and show what comes")
    options = parser.parse_args()
    if unknown := set(options.targets) - TARGETS.keys():
        parser.error(f"no target {', '.join(unknown)}; there are {', '.join(TARGETS)}")
    sys.addaudithook(audit)
    signal.signal(signal.SIGPROF, alarm)
    works()
    total = faults = 0
    begun = time.monotonic()
    for name in options.targets or TARGETS:
        shared = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        with tempfile.TemporaryDirectory(dir=shared) as folder:
            prepared(Path(folder))
            if options.replay:
                path = Path(folder) / TARGETS[name].name
                path.write_bytes(options.replay.read_bytes())
                print(watched(TARGETS[name].read, path))
                continue
            done, bad = fuzz(name, options.executions, options.seconds, options.seed, options.out, Path(folder))
        total, faults = total + done, faults + bad
    print(f"{total:,} executions in {time.monotonic() - begun:,.0f} s, {faults} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
