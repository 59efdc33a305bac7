"""Reads the pickle inside a PyTorch file without executing it: an interpreter of its opcodes that only builds data."""

import pickletools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from jft.errors import brief
from jft.weights.layout import MAX_DIMS, natural

# A file of weights needs some sixty a tensor. Without a limit, a few megabytes could ask for gigabytes of lists.
MAX_OPCODES = 1_000_000


class Refused(ValueError):
    """Why this pickle is not read; `name` is the function or class it asked for, where that is the reason."""

    def __init__(self, reason: str, name: str | None = None):
        super().__init__(reason)
        self.name = name


@dataclass(frozen=True)
class Storage:
    """A run of elements in the archive's member `data/{key}`; without a dtype its size counts bytes."""

    key: str
    dtype: np.dtype | None
    size: int


@dataclass(frozen=True)
class TensorRef:
    """A strided view of a storage; offset and strides count elements."""

    storage: Storage
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class Global:
    """A function or class named by the pickle. Only its name: nothing is imported."""

    name: str


class Inert:
    """Stands for an object that holds no tensors we look for, such as the arguments of a training script."""


DTYPES = {
    f"torch.{name}": np.dtype(dtype)
    for name, dtype in {
        "float64": np.float64,
        "float32": np.float32,
        "float16": np.float16,
        "bfloat16": ml_dtypes.bfloat16,
        "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
        "float8_e5m2": ml_dtypes.float8_e5m2,
        "int64": np.int64,
        "int32": np.int32,
        "int16": np.int16,
        "int8": np.int8,
        "uint8": np.uint8,
        "uint16": np.uint16,
        "uint32": np.uint32,
        "uint64": np.uint64,
        "bool": np.bool_,
    }.items()
}
STORAGES = {
    "torch.DoubleStorage": DTYPES["torch.float64"],
    "torch.FloatStorage": DTYPES["torch.float32"],
    "torch.HalfStorage": DTYPES["torch.float16"],
    "torch.BFloat16Storage": DTYPES["torch.bfloat16"],
    "torch.LongStorage": DTYPES["torch.int64"],
    "torch.IntStorage": DTYPES["torch.int32"],
    "torch.ShortStorage": DTYPES["torch.int16"],
    "torch.CharStorage": DTYPES["torch.int8"],
    "torch.ByteStorage": DTYPES["torch.uint8"],
    "torch.BoolStorage": DTYPES["torch.bool"],
    "torch.storage.UntypedStorage": None,
    "torch.UntypedStorage": None,
}


def _sizes(value: Any) -> bool:
    return type(value) is tuple and len(value) <= MAX_DIMS and all(map(natural, value))


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, dtype: Any = None) -> TensorRef:
    if not isinstance(storage, Storage) or not (_sizes((offset,)) and _sizes(shape) and _sizes(strides)):
        raise Refused("a tensor is described by something other than a storage, an offset, sizes and strides")
    if len(shape) != len(strides):
        raise Refused(f"a tensor has sizes {shape} but strides {strides}")
    if dtype is None:
        dtype = storage.dtype
    if dtype is None:
        raise Refused("a tensor over an untyped storage does not say its dtype")
    # A tensor without elements touches nothing, whatever its strides say.
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if 0 not in shape else -1
    # A typed storage can be read as another type, whose elements are fewer or more.
    size = storage.size * (1 if storage.dtype is None else storage.dtype.itemsize) // dtype.itemsize
    if last >= size:
        raise Refused(f"a tensor of shape {shape} reaches element {last} of a storage of {size}")
    return TensorRef(storage, dtype, offset, shape, strides)


def _tensor_v2(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> TensorRef:
    return _tensor(storage, offset, shape, strides)


def _tensor_v3(storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, dtype: Any, *_: Any) -> Any:
    if not isinstance(dtype, Global) or dtype.name not in DTYPES:
        raise Refused("a tensor's dtype is none that is known")
    return _tensor(storage, offset, shape, strides, DTYPES[dtype.name])


def _parameter(data: Any, *_: Any) -> Any:
    if not isinstance(data, TensorRef):
        raise Refused("a parameter holds something other than a tensor")
    return data


def _dict(*args: Any) -> dict:
    if not args or isinstance(args[0], Global):  # defaultdict(list)
        return {}
    if type(args[0]) is not dict:
        raise Refused("a dictionary is made from something else")
    return args[0]


def _key(key: Any) -> Any:
    # Plain keys only: hashing tuples nested in each other can take for ever.
    if type(key) not in (str, int, float, bool, bytes, type(None)):
        raise Refused(f"a dictionary has a key of type {type(key).__name__}")
    return key


# What each name stands for when the pickle calls it. These are our functions: the ones named are never imported.
CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _dict,
    "collections.defaultdict": _dict,
    "collections.Counter": _dict,
    "torch._utils._rebuild_tensor": _tensor_v2,
    "torch._utils._rebuild_tensor_v2": _tensor_v2,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
}
# Training scripts leave these beside the weights. They become a placeholder, whatever they are called with.
INERT = {
    "argparse.Namespace",
    "torch.Size",
    "torch.device",
    "numpy.dtype",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "_codecs.encode",
    "pathlib.Path",
    "pathlib.PosixPath",
    "pathlib.WindowsPath",
    "pathlib._local.PosixPath",
    "pathlib._local.WindowsPath",
    *(f"{module}.{name}" for module in ("builtins", "__builtin__") for name in ("dict", "list", "set", "int", "float")),
}

PUSH = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("SHORT_BINBYTES", "BINBYTES", "BINBYTES8"),
}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_SET": list}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
IGNORED = {"PROTO", "FRAME", "STOP"}


class _Machine:
    """The stack, the marks in it and the memo of a pickle being read."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def pop(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise Refused("it takes more from the stack than it has put there")
        return self.stack.pop()

    def pop_to_mark(self) -> list[Any]:
        if not self.marks:
            raise Refused("it looks for a mark that it has not set")
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def top(self, kind: type) -> Any:
        value = self.pop()
        if type(value) is not kind:
            raise Refused(f"it adds to a {type(value).__name__} as if it were a {kind.__name__}")
        self.stack.append(value)
        return value

    def fill(self, items: list[Any]) -> None:
        target = self.top(dict)
        if len(items) % 2:
            raise Refused("a dictionary is given a key without a value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_key(key)] = value

    def named(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise Refused("it names a function by something other than text")
        full = brief(f"{module}.{name}", 200)
        if not (full in CALLS or full in INERT or full in STORAGES or full in DTYPES):
            raise Refused(f"it asks for `{full}`", full)
        self.stack.append(Global(full))

    def call(self) -> None:
        args, function = self.pop(), self.pop()
        if not isinstance(function, Global) or type(args) is not tuple:
            raise Refused("it calls something that is no function")
        if function.name in INERT:
            self.stack.append(Inert())
        elif function.name in CALLS:
            try:
                self.stack.append(CALLS[function.name](*args))
            except TypeError:
                raise Refused(f"it calls `{function.name}` with {len(args)} arguments") from None
        else:
            raise Refused(f"it calls `{function.name}`", function.name)

    def storage(self) -> None:
        match self.pop():
            case ("storage", Global(name), str(key), str(), int(size), *_) if name in STORAGES and _sizes((size,)):
                self.stack.append(Storage(key, STORAGES[name], size))
            case _:
                raise Refused("it refers to something outside itself that is no tensor storage")

    def step(self, op: str, arg: Any) -> None:
        stack = self.stack
        if op in PUSH:
            stack.append(arg)
        elif op in ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"):
            value = self.pop()
            stack.append(value)
            self.memo[len(self.memo) if op == "MEMOIZE" else arg] = value
        elif op in ("BINGET", "LONG_BINGET", "GET"):
            if arg not in self.memo:
                raise Refused(f"it recalls entry {arg}, which it has not stored")
            stack.append(self.memo[arg])
        elif op in CONSTANTS:
            stack.append(CONSTANTS[op])
        elif op in EMPTY:
            stack.append(EMPTY[op]())
        elif op == "MARK":
            self.marks.append(len(stack))
        elif op == "TUPLE":
            stack.append(tuple(self.pop_to_mark()))
        elif op in TUPLES:
            items = [self.pop() for _ in range(TUPLES[op])]
            stack.append(tuple(items[::-1]))
        elif op == "REDUCE" or op == "NEWOBJ":
            self.call()
        elif op == "BINPERSID":
            self.storage()
        elif op == "GLOBAL":
            self.named(*arg.split(" ", 1))
        elif op == "STACK_GLOBAL":
            name, module = self.pop(), self.pop()
            self.named(module, name)
        elif op == "SETITEM":
            value, key = self.pop(), self.pop()
            self.fill([key, value])
        elif op == "SETITEMS":
            self.fill(self.pop_to_mark())
        elif op == "APPEND":
            value = self.pop()
            self.top(list).append(value)
        elif op in ("APPENDS", "ADDITEMS"):
            items = self.pop_to_mark()
            self.top(list).extend(items)
        elif op in ("LIST", "FROZENSET"):
            stack.append(self.pop_to_mark())
        elif op == "DICT":
            items = self.pop_to_mark()
            stack.append({})
            self.fill(items)
        elif op == "BUILD":
            self.pop()  # attributes, such as a state dict's `_metadata`
            target = self.pop()
            if not isinstance(target, Inert | dict):
                raise Refused(f"it sets attributes of a {type(target).__name__}")
            stack.append(target)
        elif op == "POP":
            if self.marks and self.marks[-1] == len(stack):
                self.marks.pop()
            else:
                self.pop()
        elif op == "POP_MARK":
            self.pop_to_mark()
        elif op == "DUP":
            value = self.pop()
            stack.extend((value, value))
        elif op not in IGNORED:
            raise Refused(f"it uses the operation {op}", op)


def unpickle(data: bytes) -> Any:
    """What a pickle describes, in dicts, lists, tuples, numbers, text, `TensorRef` and `Inert`.

    Raises Refused for anything else, before anything comes of it.
    """
    machine = _Machine()
    # pickletools warns of odd escapes in texts as if they were somebody's source.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        _interpret(machine, data)
    if machine.marks or len(machine.stack) != 1:
        raise Refused("it ends in the middle")
    return machine.stack[0]


def _interpret(machine: _Machine, data: bytes) -> None:
    try:
        for count, (op, arg, _) in enumerate(pickletools.genops(data)):
            if count == MAX_OPCODES:
                raise Refused(f"it has more than {MAX_OPCODES:,} operations")
            machine.step(op.name, arg)
    except Refused:
        raise
    except (ValueError, IndexError, OverflowError) as error:
        raise Refused(f"it is broken: {str(error)[:200]}") from None
