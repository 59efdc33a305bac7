"""Weight files made byte by byte: what must be read exactly, and what must be refused without executing anything."""

import json
import os
import pickle
import struct
import subprocess
import sys
import time
import zipfile
from io import BytesIO
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jft.errors import UserError
from jft.weights.readers import open_weights
from jft.weights.safetensors import SAFETENSORS_DTYPES
from jft.weights.unpickle import Refused, unpickle
from jft.weights.writers import write_npz, write_safetensors

# --- a PyTorch file, written by hand: opcodes of protocol 2, as torch.save writes them


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def integer(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def group(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def table(*pairs: tuple[bytes, bytes]) -> bytes:
    return b"}(" + b"".join(k + v for k, v in pairs) + b"u"


def stored(kind: str, key: str, count: int) -> bytes:
    return group(text("storage"), name("torch", kind), text(key), text("cpu"), integer(count)) + b"Q"


def tensor(storage: bytes, shape: tuple[int, ...], strides: tuple[int, ...], offset: int = 0) -> bytes:
    sizes, steps = group(*map(integer, shape)), group(*map(integer, strides))
    hooks = name("collections", "OrderedDict") + b")R"
    return (
        name("torch._utils", "_rebuild_tensor_v2")
        + group(storage, integer(offset), sizes, steps, b"\x89", hooks)
        + b"R"
    )


def program(body: bytes) -> bytes:
    return b"\x80\x02" + body + b"."


def torch_file(path: Path, body: bytes, storages: dict[str, bytes] = {}, **extra: bytes) -> Path:  # noqa: B006
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", program(body))
        for member, content in extra.items():
            archive.writestr(f"archive/{member}", content)
        for key, content in storages.items():
            archive.writestr(f"archive/data/{key}", content)
        archive.writestr("archive/version", "3\n")
    return path


F32 = np.arange(24, dtype=np.float32)


def simple(path: Path) -> Path:
    body = table((text("w"), tensor(stored("FloatStorage", "0", 24), (2, 3, 4), (12, 4, 1))))
    return torch_file(path, body, {"0": F32.tobytes()})


def refusal(path: Path) -> str:
    """The message with which a file is refused, at opening or at reading."""
    with pytest.raises(UserError) as caught, open_weights(path) as file:
        for n in file.names:
            file.read(n)
    assert str(path) in str(caught.value)
    return str(caught.value)


# --- what must be read


TORCH_KINDS = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}


@pytest.mark.parametrize("order", ["little", "big"])
def test_torch_dtypes(tmp_path, order):
    values = {kind: (np.arange(6) % 5).astype(dtype).reshape(2, 3) for kind, dtype in TORCH_KINDS.items()}
    body = table(*((text(kind), tensor(stored(kind, kind, 6), (2, 3), (3, 1))) for kind in values))
    written = {
        kind: np.frombuffer(v.tobytes(), f"V{v.itemsize}") if order == "little" else v for kind, v in values.items()
    }
    if order == "big":
        written = {k: v.view(np.uint8).reshape(-1, v.itemsize)[:, ::-1].copy() for k, v in written.items()}
    path = torch_file(tmp_path / "w.pth", body, {k: v.tobytes() for k, v in written.items()}, byteorder=order.encode())
    with open_weights(path) as file:
        assert file.format == "torch" and set(file.names) == set(values)
        for kind, expected in values.items():
            got = file.read(kind)
            assert got.dtype == file.dtype(kind) == expected.dtype and file.shape(kind) == (2, 3)
            assert got.tobytes() == expected.tobytes()


def test_torch_views_of_one_storage(tmp_path):
    storage = stored("FloatStorage", "0", 24)
    base = F32.reshape(4, 6)
    views = {
        "base": ((4, 6), (6, 1), 0, base),
        "transposed": ((6, 4), (1, 6), 0, base.T),
        "slice": ((2, 2), (12, 3), 7, base[1::2, 1::3]),
        "expanded": ((5, 6), (0, 1), 6, np.broadcast_to(base[1], (5, 6))),
        "scalar": ((), (), 23, base[3, 5]),
        "empty": ((0, 6), (6, 1), 24, base[4:]),
        "last row": ((6,), (1,), 18, base[3]),
    }
    body = table(*((text(n), tensor(storage, shape, strides, at)) for n, (shape, strides, at, _) in views.items()))
    with open_weights(torch_file(tmp_path / "w.pth", body, {"0": F32.tobytes()})) as file:
        for n, (shape, _, _, expected) in views.items():
            got = file.read(n)
            assert got.shape == shape and got.flags.c_contiguous and got.flags.writeable
            np.testing.assert_array_equal(got, expected)


def test_torch_parameter_and_untyped_storage(tmp_path):
    plain = tensor(stored("FloatStorage", "0", 24), (24,), (1,))
    hooks = name("collections", "OrderedDict") + b")R"
    parameter = name("torch._utils", "_rebuild_parameter") + group(plain, b"\x88", hooks) + b"R"
    untyped = group(
        *(text("storage"), name("torch.storage", "UntypedStorage"), text("0"), text("cpu"), integer(96)),
    )
    arguments = (untyped + b"Q", integer(2), group(integer(3)), group(integer(4)), b"\x89", hooks)
    version_3 = name("torch._utils", "_rebuild_tensor_v3") + group(*arguments, name("torch", "uint32")) + b"R"
    body = table((text("p"), parameter), (text("u"), version_3))
    with open_weights(torch_file(tmp_path / "w.pth", body, {"0": F32.tobytes()})) as file:
        np.testing.assert_array_equal(file.read("p"), F32)
        np.testing.assert_array_equal(file.read("u"), F32.view(np.uint32)[2:14:4])


def test_torch_storages_read_as_another_type_are_bounded_in_bytes(tmp_path):
    def viewed(dtype: str, count: int) -> bytes:
        storage, hooks = stored("FloatStorage", "0", 4), name("collections", "OrderedDict") + b")R"
        arguments = (storage, integer(0), group(integer(count)), group(integer(1)), b"\x89", hooks)
        call = name("torch._utils", "_rebuild_tensor_v3") + group(*arguments, name("torch", dtype)) + b"R"
        return table((text("w"), call))

    four = {"0": F32[:4].tobytes(), "1": b"S" * 64}
    for dtype, count in (("float64", 2), ("float16", 8)):
        with open_weights(torch_file(tmp_path / f"{dtype}.pth", viewed(dtype, count), four)) as file:
            assert file.read("w").tobytes() == four["0"]
        lie = torch_file(tmp_path / f"{dtype}_lie.pth", viewed(dtype, count + 1), four)
        assert f"reaches element {count} of a storage of {count}" in refusal(lie)


def checkpoint(**entries: bytes) -> bytes:
    return table(*((text(k), v) for k, v in entries.items()))


ONE = tensor(stored("FloatStorage", "0", 24), (24,), (1,))
TWO = tensor(stored("FloatStorage", "0", 24), (12,), (2,))
NAMESPACE = name("argparse", "Namespace") + b")\x81" + table((text("lr"), integer(1))) + b"b"


@pytest.mark.parametrize(
    ("body", "names", "prefix", "note"),
    [
        (checkpoint(w=ONE), ("w",), "", None),
        (checkpoint(**{"module.w": ONE, "module.b": TWO}), ("w", "b"), "module.", None),
        (checkpoint(**{"module.w": ONE, "b": TWO}), ("module.w", "b"), "", None),
        (
            checkpoint(state_dict=checkpoint(**{"module.model.w": ONE}), epoch=integer(3)),
            ("w",),
            "module.model.",
            "epoch",
        ),
        (checkpoint(model=checkpoint(a=ONE), model_ema=checkpoint(b=TWO)), ("b",), "", "'model_ema', not model"),
        (checkpoint(model=checkpoint(a=ONE), args=NAMESPACE, lr=b"G" + bytes(8)), ("a",), "", "args"),
        (checkpoint(odd=checkpoint(a=ONE), epoch=integer(1)), ("a",), "", "'odd'"),
        (checkpoint(state_dict=checkpoint(a=ONE), best_acc1=TWO), ("a",), "", "not best_acc1"),
        (checkpoint(model_ema=checkpoint(**{"n_averaged": ONE, "module.w": TWO})), ("w",), "module.", "n_averaged"),
        (checkpoint(state_dict=checkpoint(model=checkpoint(a=ONE))), ("a",), "", "state_dict.model"),
    ],
)
def test_wrappers_are_taken_off_and_told(tmp_path, body, names, prefix, note):
    with open_weights(torch_file(tmp_path / "w.pth", body, {"0": F32.tobytes()})) as file:
        assert file.names == names and file.prefix == prefix
        assert note is None if not file.notes else note is not None and any(note in n for n in file.notes)


def test_attributes_of_a_state_dict_are_passed_over(tmp_path):
    ordered = name("collections", "OrderedDict") + b")R(" + text("w") + ONE + b"u"
    metadata = table((text("_metadata"), table((text(""), table((text("version"), integer(1)))))))
    with open_weights(torch_file(tmp_path / "w.pth", ordered + metadata + b"b", {"0": F32.tobytes()})) as file:
        assert file.names == ("w",)


def every_dtype() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    tensors = {f"t.{d}": (rng.normal(size=(3, 5)) * 3).astype(d) for d in SAFETENSORS_DTYPES.values()}
    return tensors | {"scalar": np.array(2.5, np.float32), "empty": np.zeros((0, 3), np.float16)}


def test_safetensors_as_the_package_writes_and_reads_them(tmp_path):
    tensors = every_dtype()
    known = {n: t for n, t in tensors.items() if "float8" not in n}
    safetensors.numpy.save_file(known, tmp_path / "theirs.safetensors", {"format": "pt"})
    write_safetensors(tmp_path / "ours.safetensors", tensors, {"format": "pt"})
    write_safetensors(tmp_path / "known.safetensors", known)
    with open_weights(tmp_path / "theirs.safetensors") as theirs, open_weights(tmp_path / "ours.safetensors") as ours:
        assert theirs.metadata == ours.metadata == {"format": "pt"} and theirs.format == "safetensors"
        for n in tensors:
            for file in (theirs, ours):
                if n in file.names:
                    assert file.read(n).dtype == tensors[n].dtype and file.read(n).tobytes() == tensors[n].tobytes()
                    assert file.shape(n) == tensors[n].shape
        assert set(ours.names) == set(tensors)
    for n, t in safetensors.numpy.load_file(tmp_path / "known.safetensors").items():
        assert t.tobytes() == known[n].tobytes() and t.shape == known[n].shape


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(tmp_path, save):
    rng = np.random.default_rng(0)
    tensors = {
        "a/kernel": rng.normal(size=(3, 4)).astype(np.float32),
        "fortran": np.asfortranarray(rng.normal(size=(3, 4, 2))),
        "big": rng.normal(size=(2, 2)).astype(">f4"),
        "half": rng.normal(size=7).astype(np.float16),
        "scalar": np.array(3),
        "empty": np.zeros((2, 0), np.float32),
        "brain": rng.normal(size=(2, 3)).astype(ml_dtypes.bfloat16),
    }
    save(tmp_path / "w.npz", **tensors)
    with open_weights(tmp_path / "w.npz") as file:
        assert file.format == "npz" and set(file.names) == set(tensors)
        for n, expected in tensors.items():
            got = file.read(n)
            assert got.dtype == file.dtype(n) == expected.dtype.newbyteorder("=") and got.flags.c_contiguous
            np.testing.assert_array_equal(got.astype(np.float64), expected.astype(np.float64))


def test_shards(tmp_path):
    first, second = {"model.a": F32}, {"model.b": F32[:3]}
    write_safetensors(tmp_path / "1.safetensors", first)
    write_safetensors(tmp_path / "2.safetensors", second)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.a": "1.safetensors", "model.b": "2.safetensors"}}))
    with open_weights(index) as file:
        assert file.names == ("a", "b") and file.prefix == "model."
        np.testing.assert_array_equal(file.read("b"), F32[:3])
        whole = file.sha256
    (tmp_path / "2.safetensors").write_bytes((tmp_path / "2.safetensors").read_bytes()[:-1] + b"\xff")
    with open_weights(index) as file:
        assert file.sha256 != whole
    for shard, reason in (
        ("../2.safetensors", "same folder"),
        ("3.safetensors", "missing"),
        ("1.safetensors", "disagree"),
    ):
        index.write_text(json.dumps({"weight_map": {"model.a": "1.safetensors", "model.b": shard}}))
        assert reason in refusal(index)


def test_sha256(tmp_path):
    import hashlib

    path = simple(tmp_path / "w.pth")
    with open_weights(path) as file:
        assert file.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


# --- what must be refused


class Bomb:
    """Pickled, it makes a file when loaded by anything that executes pickles."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def malicious(marker: Path) -> dict[str, bytes]:
    command = text(f"touch {marker}")
    call = name("os", "system") + group(command) + b"R"
    code = text(f"open({str(marker)!r}, 'w')")
    return {
        "reduce": program(call),
        "reduce in a value": program(table((text("w"), ONE), (text("x"), call))),
        "reduce, popped, then weights": program(call + b"0" + table((text("w"), ONE))),
        "eval": program(name("builtins", "eval") + group(code) + b"R"),
        "python 2's eval": program(name("__builtin__", "eval") + group(code) + b"R"),
        "stack_global": b"\x80\x04" + text("os") + text("system") + b"\x93" + group(command) + b"R.",
        "stack_global by memo": b"\x80\x04"
        + text("system")
        + b"\x940"
        + text("os")
        + b"h\x00\x93"
        + group(command)
        + b"R.",
        "dotted attribute": b"\x80\x04" + text("torch") + text("FloatStorage.__init__.__globals__") + b"\x93.",
        "inst": b"(S'touch'\nios\nsystem\n.",
        "obj": b"(" + name("os", "system") + command + b"o.",
        "newobj": program(name("subprocess", "Popen") + group(command) + b"\x81"),
        "newobj_ex": b"\x80\x04" + name("subprocess", "Popen") + group(command) + b"}\x92.",
        "extension": program(b"\x82\x01"),
        "persistent id in text": program(b"Pstorage\n"),
        "persistent id is a call": program(call + b"Q"),
        "persistent id of a list": program(b"]Q"),
        "storage of another class": program(
            group(text("storage"), name("os", "system"), text("0"), text("cpu"), integer(1)) + b"Q"
        ),
        "a storage called": program(name("torch", "FloatStorage") + group(text("x")) + b"R"),
        "a known name as a method": program(name("collections", "OrderedDict.update") + b")R"),
        "build on a class": program(name("collections", "OrderedDict") + table((text("__init__"), integer(1))) + b"b"),
        "build on a tensor": program(ONE + table((text("__class__"), integer(1))) + b"b"),
        "call of a string": program(text("os.system") + group(command) + b"R"),
        "getattr": program(name("builtins", "getattr") + group(name("torch", "Size"), text("__class__")) + b"R"),
        "numpy's reconstruct": program(name("numpy.core.multiarray", "_reconstruct") + b")R"),
        "torch's load": program(name("torch", "load") + group(text("x")) + b"R"),
        "out of band buffer": b"\x80\x05\x97.",
        "written by pickle": pickle.dumps(Bomb(marker)),
        "written by pickle, 2": pickle.dumps({"w": Bomb(marker)}, 2),
        "rebuild with a callable": program(
            name("torch._utils", "_rebuild_from_type_v2") + group(name("os", "system")) + b"R"
        ),
    }


@pytest.mark.parametrize("trick", sorted(malicious(Path("x"))))
def test_nothing_is_executed(tmp_path, trick):
    marker = tmp_path / "executed"
    content = malicious(marker)[trick]
    path = tmp_path / "w.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/data/0", F32.tobytes())
    before = set(sys.modules)
    message = refusal(path)
    assert "pickle" in message
    assert not marker.exists() and set(sys.modules) - before <= {"pickletools", "encodings.cp437"}
    if trick in ("reduce", "stack_global", "storage of another class"):
        assert "os.system" in message


def test_the_bomb_would_go_off(tmp_path):
    """The malicious pickle does what the test above says must not happen, so that test can fail."""
    pickle.loads(malicious(tmp_path / "executed")["reduce"])
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"0",
        b"t",
        b"(",
        b"}u",
        b"](K\x01",
        b"h\x05",
        b"}(K\x01u",
        b"})K\x01s",  # a tuple as key
        b"]K\x01K\x02s",
        b"K\x01K\x02a",
        b"K\x01K\x02",
        b"(K\x010t1",
        b"X\xff\xff\xff\x7fabc",
        b"\x8b\xff\xff\xff\xff",
        b"I" + b"9" * 10_000 + b"\n",
        b"\xff",
        tensor(stored("FloatStorage", "0", 24), (25,), (1,)),
        tensor(stored("FloatStorage", "0", 24), (24,), (1,), 1),
        tensor(stored("FloatStorage", "0", 24), (2,), (-1,), 1),
        tensor(stored("FloatStorage", "0", -1), (2,), (1,)),
        tensor(stored("FloatStorage", "0", 24), (2, 2), (1,)),
        tensor(b"K\x01", (2,), (1,)),
        name("torch._utils", "_rebuild_tensor_v2") + b")R",
    ],
)
def test_broken_pickles(body):
    with pytest.raises(Refused):
        unpickle(program(body))


def test_pickles_that_grow(monkeypatch):
    """Small pickles that describe enormous or endless structures neither take memory nor time."""
    start = time.process_time()
    monkeypatch.setattr("jft.weights.unpickle.MAX_OPCODES", 30_000)
    with pytest.raises(Refused, match="operations"):
        unpickle(program(b"]" * 40_000))
    laughs = b")" + b"2\x86" * 5000  # a pair of itself, five thousand deep: 2**5000 leaves if one walked it
    unpickle(program(laughs))
    with pytest.raises(Refused, match="key"):
        unpickle(program(b"}" + laughs + b"K\x01s"))
    loop = b"}q\x00(" + text("model") + b"h\x00u"
    assert unpickle(program(loop))["model"]["model"]["model"]
    assert time.process_time() - start < 60


def test_a_checkpoint_that_contains_itself(tmp_path):
    loop = b"}q\x00(" + text("model") + b"h\x00u"
    assert "nested" in refusal(torch_file(tmp_path / "w.pth", loop))


def test_torch_archives_that_lie(tmp_path):
    body = checkpoint(w=ONE)
    assert "storage '0'" in refusal(torch_file(tmp_path / "a.pth", body))
    assert "should have 96 bytes" in refusal(torch_file(tmp_path / "b.pth", body, {"0": F32[1:].tobytes()}))
    huge = checkpoint(w=tensor(stored("FloatStorage", "0", 24), (1 << 30, 24), (0, 1)))
    assert "larger than the whole file" in refusal(torch_file(tmp_path / "c.pth", huge, {"0": F32.tobytes()}))
    up = checkpoint(w=tensor(stored("FloatStorage", "../version", 24), (24,), (1,)))
    assert "'../version'" in refusal(torch_file(tmp_path / "d.pth", up, {"0": F32.tobytes()}))
    assert "byte order" in refusal(torch_file(tmp_path / "e.pth", body, {"0": F32.tobytes()}, byteorder=b"middle"))
    script = torch_file(tmp_path / "f.pt", body, {"0": F32.tobytes()}, **{"constants.pkl": b"\x80\x02)."})
    assert "TorchScript" in refusal(script)
    with zipfile.ZipFile(tmp_path / "g.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", program(body) + bytes(1000))
        archive.writestr("archive/data/0", F32.tobytes())
    assert "compressed" in refusal(tmp_path / "g.pth")
    with zipfile.ZipFile(tmp_path / "h.pth", "w") as archive:
        archive.writestr("a/data.pkl", program(body))
        archive.writestr("b/data.pkl", program(body))
    assert "2 data.pkl" in refusal(tmp_path / "h.pth")
    assert "no dictionary of tensors" in refusal(torch_file(tmp_path / "i.pth", ONE, {"0": F32.tobytes()}))
    several = checkpoint(student=checkpoint(a=ONE), other=checkpoint(a=ONE))
    assert "student, other" in refusal(torch_file(tmp_path / "j.pth", several, {"0": F32.tobytes()}))
    assert "no tensors" not in refusal(torch_file(tmp_path / "k.pth", b"}"))


def test_zip_directories_that_lie(tmp_path):
    good = simple(tmp_path / "w.pth").read_bytes()
    directory = good.index(b"PK\x01\x02")
    lies = {
        "compressed size": (20, struct.pack("<I", 1 << 20)),
        "size": (24, struct.pack("<I", 1 << 20)),
        "encrypted": (8, struct.pack("<H", 1)),
        "place": (42, struct.pack("<I", 13)),
        "place beyond": (42, struct.pack("<I", len(good) + 5)),
    }
    for what, (offset, lie) in lies.items():
        path = tmp_path / f"{what}.pth"
        path.write_bytes(good[: directory + offset] + lie + good[directory + offset + len(lie) :])
        refusal(path)
    # Two entries over the same bytes: how a small archive claims a thousand times its size.
    archive = zipfile.ZipFile(BytesIO(good))
    first = good[directory : good.index(b"PK\x01\x02", directory + 4)]
    second = first.replace(b"data.pkl", b"data.pkx")
    end = good.rindex(b"PK\x05\x06")
    count = len(archive.infolist()) + 1
    tail = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, count, count, end - directory + len(second), directory, 0)
    (tmp_path / "overlap.pth").write_bytes(good[:end] + second + tail)
    assert "lies about where" in refusal(tmp_path / "overlap.pth")


def safetensors_bytes(header: object, body: bytes = b"", length: int | None = None) -> bytes:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(encoded) if length is None else length) + encoded + body


def entry(begin: int, end: int, shape=(2,), dtype="F32") -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (safetensors_bytes({"a": entry(0, 8)}, bytes(7)), "truncated"),
        (safetensors_bytes({"a": entry(0, 8)}, bytes(9)), "1 bytes after"),
        (safetensors_bytes({"a": entry(0, 8)}, bytes(8), 1000), "truncated"),
        (safetensors_bytes({"a": entry(0, 8)}, bytes(8), 1 << 60), "claims"),
        (safetensors_bytes({"a": entry(0, 8)}, bytes(8), 20), "cannot be read"),
        (safetensors_bytes({"a": entry(0, 8), "b": entry(0, 8)}, bytes(8)), "overlaps"),
        (safetensors_bytes({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)), "overlaps"),
        (safetensors_bytes({"a": entry(0, 8), "b": entry(12, 20)}, bytes(20)), "gap"),
        (safetensors_bytes({"a": entry(4, 12)}, bytes(12)), "gap"),
        (safetensors_bytes({"a": entry(0, 8, (3,))}, bytes(8)), "takes 12 bytes"),
        (safetensors_bytes({"a": entry(0, 8, (2, -1))}, bytes(8)), "impossible"),
        (safetensors_bytes({"a": entry(8, 0, (2,))}, bytes(8)), "lies"),
        (safetensors_bytes({"a": entry(0, 8, (2.0,))}, bytes(8)), "impossible"),
        (safetensors_bytes({"a": entry(0, 8, (True, 2))}, bytes(8)), "impossible"),
        (safetensors_bytes({"a": entry(0, 8, [2] + [1] * 40)}, bytes(8)), "impossible"),
        (safetensors_bytes({"a": entry(0, 1 << 50, (1 << 48,))}, bytes(8)), "truncated"),
        (safetensors_bytes({"a": entry(0, 0, (0, 1 << 63))}, b""), "impossible"),
        (safetensors_bytes({"a": entry(0, 8, dtype="F7")}, bytes(8)), "'F7'"),
        (safetensors_bytes({"a": {"dtype": "F32"}}, bytes(8)), "something other"),
        (safetensors_bytes({"a": 3}, bytes(8)), "something other"),
        (safetensors_bytes({}), "no tensors"),
        (safetensors_bytes({"__metadata__": {"a": 1}}), "metadata"),
        (safetensors_bytes(b'{"a":1,"a":2}'), "twice"),
        (safetensors_bytes(b'{"a":' + b"[" * 100_000), "cannot be read"),
        (safetensors_bytes(b'{"a":"\xff"}'), "cannot be read"),
        (
            safetensors_bytes(b'{"__metadata__":{},"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b"]}}"),
            "cannot be read",
        ),
    ],
)
def test_safetensors_that_lie(tmp_path, content, reason):
    (tmp_path / "w.safetensors").write_bytes(content)
    assert reason in refusal(tmp_path / "w.safetensors")


def npy(header: str, data: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    return b"\x93NUMPY" + version + struct.pack("<H", len(header)) + header.encode() + data


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (3,), }", bytes(8)), "lies"),
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1,), }", bytes(8)), "lies"),
        (npy(f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({1 << 60}, 8), }}", bytes(8)), "lies"),
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-2, -1), }", bytes(8)), "impossible"),
        (npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }", pickle.dumps([1])), "Python objects"),
        (npy("__import__('os').system('touch executed')", bytes(8)), "cannot be read"),
        (npy("(" * 9000, bytes(8)), "cannot be read"),
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }", bytes(8), b"\x07\x00"), "cannot be read"),
        (b"not an array", "cannot be read"),
        (b"", "cannot be read"),
    ],
)
def test_npz_that_lie(tmp_path, content, reason, method):
    with zipfile.ZipFile(tmp_path / "w.npz", "w", method) as archive:
        archive.writestr("a.npy", content)
    assert reason in refusal(tmp_path / "w.npz")


def test_zip_bomb(tmp_path):
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({1 << 27},), }}"
    with zipfile.ZipFile(tmp_path / "w.npz", "w", zipfile.ZIP_DEFLATED) as archive, archive.open("a.npy", "w") as file:
        file.write(npy(header))
        for _ in range(1 << 9):
            file.write(bytes(1 << 20))
    assert (tmp_path / "w.npz").stat().st_size < 1 << 20
    assert "zip bomb" in refusal(tmp_path / "w.npz")


def files(folder: Path) -> dict[str, Path]:
    """A small file of each kind."""
    tensors = {"a.weight": F32.reshape(4, 6), "b": F32[:5].astype(ml_dtypes.bfloat16)}
    write_safetensors(folder / "w.safetensors", tensors)
    write_npz(folder / "w.npz", tensors)
    np.savez_compressed(folder / "packed.npz", **tensors)
    simple(folder / "w.pth")
    return {p.name: p for p in folder.iterdir()}


@pytest.mark.parametrize("kind", ["w.safetensors", "w.npz", "packed.npz", "w.pth"])
def test_truncated_anywhere(tmp_path, kind):
    content = files(tmp_path)[kind].read_bytes()
    path = tmp_path / f"cut-{kind}"
    for length in range(len(content)):
        path.write_bytes(content[:length])
        refusal(path)


@pytest.mark.parametrize("kind", ["w.safetensors", "w.npz", "packed.npz", "w.pth"])
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(data=st.data())
def test_damaged_anywhere(tmp_path, kind, data):
    """Whatever bytes change, the file is read or refused with a UserError; nothing else comes of it."""
    content = bytearray(
        (tmp_path / kind).read_bytes() if (tmp_path / kind).exists() else files(tmp_path)[kind].read_bytes()
    )
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / f"damaged-{kind}"
    path.write_bytes(content)
    try:
        with open_weights(path) as file:
            for n in file.names:
                assert file.read(n).shape == file.shape(n)
    except UserError as error:
        assert str(path) in str(error)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"\x89HDF\r\n\x1a\n", "HDF5"),
        (npy("{}"), "single .npy"),
        (pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2), "safetensors.torch"),
        (bytes(257) + b"ustar" + bytes(300), "safetensors.torch"),
        (b"random bytes of no format", "none of"),
        (b"PK\x03\x04 and then nothing", "damaged zip"),
    ],
)
def test_other_formats_are_named(tmp_path, content, reason):
    (tmp_path / "w.bin").write_bytes(content)
    assert reason in refusal(tmp_path / "w.bin")


def test_headers_whose_length_looks_like_another_format(tmp_path):
    """A header of 60 bytes begins as `<` does, one of 640 as a pickle does."""
    for length in (60, 0x280, 0x380, 0x480):
        header = json.dumps({"a": entry(0, 8)}).encode()
        (tmp_path / "w.safetensors").write_bytes(safetensors_bytes(header + b" " * (length - len(header)), bytes(8)))
        with open_weights(tmp_path / "w.safetensors") as file:
            assert file.names == ("a",)


def test_an_ending_that_disagrees(tmp_path):
    for kind, path in files(tmp_path).items():
        for ending in (".safetensors", ".npz", ".pth"):
            if not kind.endswith(ending):
                other = tmp_path / f"renamed-{kind}{ending}"
                other.write_bytes(path.read_bytes())
                assert "Rename it" in refusal(other) and "ending says" in refusal(other)
        free = tmp_path / f"{kind}.weights"
        free.write_bytes(path.read_bytes())
        with open_weights(free) as file:
            assert file.names


def test_missing_and_not_weights(tmp_path):
    with pytest.raises(UserError, match="no weight file"):
        open_weights(tmp_path / "none.pth")
    with zipfile.ZipFile(tmp_path / "w.pth", "w") as archive:
        archive.writestr("readme.txt", "no weights")
    assert "neither" in refusal(tmp_path / "w.pth")


def test_needs_no_jax():
    code = "import sys, jft.weights.readers, jft.weights; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
