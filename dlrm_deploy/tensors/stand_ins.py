"""What torch and NumPy name in the files that `torch.save` writes, and the plain values that take their place.

A tensor becomes a `StoredTensor`, which says where its values are and holds none of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dlrm_deploy.tensors.restricted_pickle import Record, StandIn, StandIns
from dlrm_deploy.tensors.store import ITEM_BYTES, Array

_MAX_DIMS = 64  # of NumPy
MAX_COUNT = 1 << 62
"""Largest count of values or bytes that is believed."""


@dataclass(frozen=True, slots=True)
class Storage:
    """A run of values in the file, of which tensors are views."""

    key: str
    dtype: str
    count: int
    first: int = 0
    """Where this starts in the run named `key`, in values: files before torch 1.6 have views of storages."""

    @property
    def size(self) -> int:
        """Bytes."""
        return self.count * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A strided view of a storage. `offset` and `strides` count values of `dtype`; all lie inside the storage."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class StoredArray(Record):
    """A NumPy array, whose bytes are in the pickle itself."""

    __slots__ = ()

    def array(self) -> Array:
        """The values.

        Raises:
            ValueError: it is no array of numbers, or its bytes do not fit its shape.
        """
        state = self.state
        if type(state) is not tuple or len(state) != 5:
            raise ValueError("a NumPy array has no values")
        _, shape, dtype, by_column, content = state
        sizes = counts(shape, "shape of a NumPy array")
        name = _array_dtype(dtype)
        raw = _raw(content)
        if name is None or len(raw) != math.prod(sizes) * ITEM_BYTES[name]:
            raise ValueError(f"a NumPy array of shape {list(sizes)} has {len(raw)} bytes")
        return np.frombuffer(raw, name).reshape(sizes, order="F" if by_column else "C")

    def shape_and_dtype(self) -> tuple[tuple[int, ...], str] | None:
        """Its shape and dtype; None where it holds something other than numbers."""
        state = self.state
        if type(state) is not tuple or len(state) != 5 or (name := _array_dtype(state[2])) is None:
            return None
        return counts(state[1], "shape of a NumPy array"), name


class Namespace(Record):
    """An `argparse.Namespace`: many checkpoints hold the arguments of their run."""

    __slots__ = ()


class Unread:
    """A harmless value that is of no use here."""

    __slots__ = ()


class _ArrayDtype(Record):
    __slots__ = ("code",)

    def __init__(self, code: str) -> None:
        super().__init__()
        self.code = code


@dataclass(frozen=True, slots=True)
class _Latin:
    """Bytes written as text by protocols before 3. Encoded where they are used: a pickle can ask for it often."""

    text: str


def _count(value: object, what: str) -> int:
    if type(value) is not int or not 0 <= value <= MAX_COUNT:
        raise ValueError(f"the {what} is {str(value)[:40] if type(value) is int else type(value).__name__}")
    return value


def counts(values: object, what: str) -> tuple[int, ...]:
    """A shape or a place: at most 64 numbers that are not negative, whose product is one that a file can have.

    Raises:
        ValueError: it is anything else; `what` names it in the message.
    """
    numbers = tuple(_count(value, what) for value in _short_list(values, what))
    if math.prod(numbers) > MAX_COUNT:
        raise ValueError(f"the {what} is {list(numbers)}, more than any file holds")
    return numbers


def _short_list(values: object, what: str) -> list[object] | tuple[object, ...]:
    if not isinstance(values, list | tuple) or len(values) > _MAX_DIMS:
        raise ValueError(f"the {what} is no short list of numbers")
    return values


def storage(kind: object, key: object, count: object) -> Storage:
    """A storage from the fields of its persistent id.

    Raises:
        ValueError: they describe none.
    """
    dtype = kind.value if isinstance(kind, StandIn) else None
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES or type(key) is not str:
        raise ValueError("a storage has no type or key")
    return Storage(key, dtype, _count(count, "number of values of a storage"))


def _tensor(storage: object, offset: object, shape: object, strides: object, dtype: str | None = None) -> StoredTensor:
    if not isinstance(storage, Storage):
        raise ValueError("a tensor has no storage")
    dtype = dtype or storage.dtype
    start = _count(offset, "offset of a tensor")
    sizes = counts(shape, "shape of a tensor")
    steps = tuple(_count(step, "stride of a tensor") for step in _short_list(strides, "strides of a tensor"))
    if len(steps) != len(sizes):
        raise ValueError(f"a tensor has {len(sizes)} dimensions and {len(steps)} strides")
    if math.prod(sizes):
        end = start + sum((size - 1) * step for size, step in zip(sizes, steps, strict=True)) + 1
        if end * ITEM_BYTES[dtype] > storage.size:
            raise ValueError(f"a tensor of shape {list(sizes)} ends behind its storage of {storage.size} bytes")
    return StoredTensor(storage, dtype, start, sizes, steps)


def _rebuild_tensor(storage: object, offset: object, shape: object, strides: object, *_: object) -> StoredTensor:
    return _tensor(storage, offset, shape, strides)


def _rebuild_tensor_v3(
    storage: object,
    offset: object,
    shape: object,
    strides: object,
    _grad: object,
    _hooks: object,
    dtype: object,
    *_: object,
) -> StoredTensor:
    if not isinstance(dtype, StandIn) or not isinstance(dtype.value, str):
        raise ValueError("a tensor has no dtype")
    return _tensor(storage, offset, shape, strides, dtype.value)


def _rebuild_from_type(rebuild: object, _type: object, arguments: object, *_: object) -> object:
    """A tensor with attributes or of a subclass: the tensor alone matters."""
    if not isinstance(rebuild, StandIn) or rebuild not in _REBUILDS.values() or type(arguments) is not tuple:
        raise ValueError("a tensor is made in an unknown way")
    assert rebuild.make is not None
    return rebuild.make(*arguments)


def _rebuild_sparse(_layout: object, parts: object) -> dict[str, object]:
    if type(parts) is not tuple or len(parts) < 3:
        raise ValueError("a sparse tensor has no indices, values and size")
    return {"indices": parts[0], "values": parts[1], "size": list(counts(parts[2], "size of a sparse tensor"))}


def first(value: object = None, *_: object) -> object:
    """For things that one argument makes: that argument."""
    return value


def _device(kind: object = "cpu", index: object = None) -> str:
    if type(kind) is not str or (index is not None and type(index) is not int):
        raise ValueError("a device has no name")
    return kind if index is None else f"{kind}:{index}"


def _size(values: object = ()) -> tuple[int, ...]:
    return counts(values, "size")


def _empty(make: Callable[[], object]) -> Callable[..., object]:
    def made(*arguments: object) -> object:
        if any(not isinstance(argument, StandIn) and argument is not None for argument in arguments):
            raise ValueError("a container is made from values, as Python 2 did: save it again with Python 3")
        return make()

    return made


def _encode(text: object = "", encoding: object = "") -> _Latin:
    if type(text) is not str or encoding not in ("latin1", "latin-1"):
        raise ValueError("bytes are written in an unknown way")
    return _Latin(text)


def _raw(content: object) -> bytes:
    if isinstance(content, _Latin):
        return content.text.encode("latin-1")
    if type(content) is str:
        return content.encode()  # Python 2: read as UTF-8
    if type(content) is not bytes:
        raise ValueError(f"a NumPy value is stored as a {type(content).__name__}")
    return content


_ARRAY_DTYPES = {
    f"{np.dtype(name).kind}{size}": name
    for name, size in ITEM_BYTES.items()
    if not name.startswith(("bfloat", "float8"))
}


def _make_array_dtype(code: object, *_: object) -> _ArrayDtype:
    if type(code) is not str:
        raise ValueError("a NumPy dtype has no name")
    return _ArrayDtype(code)


def _array_dtype(dtype: object) -> str | None:
    """torch's name of a NumPy dtype; None where its values are no numbers, or big-endian."""
    if not isinstance(dtype, _ArrayDtype):
        raise ValueError("a NumPy value has no dtype")
    order = dtype.state[1] if type(dtype.state) is tuple and len(dtype.state) > 1 else "|"
    if order == ">" or dtype.code.startswith(">"):
        return None
    return _ARRAY_DTYPES.get(dtype.code.lstrip("<|="))


def _scalar(dtype: object, content: object = None) -> object:
    name = _array_dtype(dtype)
    if name is None:
        return Unread()
    raw = _raw(content)
    if len(raw) != ITEM_BYTES[name]:
        raise ValueError(f"a NumPy {name} has {len(raw)} bytes")
    number: object = np.frombuffer(raw, name)[0].item()
    return number


_CONTAINERS: dict[str, StandIn] = {
    "dict": StandIn(_empty(dict)),
    "list": StandIn(_empty(list)),
    "int": StandIn(),
    "float": StandIn(),
    "bool": StandIn(),
    "str": StandIn(),
    "set": StandIn(first),
    "frozenset": StandIn(first),
    "slice": StandIn(lambda *_: Unread()),
    "complex": StandIn(lambda *_: Unread()),
}
_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
}
_REBUILDS: StandIns = {
    ("torch._utils", "_rebuild_tensor"): StandIn(_rebuild_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): StandIn(_rebuild_tensor),
    ("torch._utils", "_rebuild_tensor_v3"): StandIn(_rebuild_tensor_v3),
    ("torch._utils", "_rebuild_parameter"): StandIn(first),
    ("torch._utils", "_rebuild_parameter_with_state"): StandIn(first),
    ("torch._utils", "_rebuild_sparse_tensor"): StandIn(_rebuild_sparse),
}

TORCH_FILE: StandIns = {
    **_REBUILDS,
    ("torch._tensor", "_rebuild_from_type_v2"): StandIn(_rebuild_from_type),
    ("torch", "Tensor"): StandIn(),
    ("torch._tensor", "Tensor"): StandIn(),
    ("torch.nn.parameter", "Parameter"): StandIn(),
    ("torch.nn.parameter", "Buffer"): StandIn(),
    ("torch", "Size"): StandIn(_size),
    ("torch", "device"): StandIn(_device),
    ("torch.serialization", "_get_layout"): StandIn(first),
    ("torch.storage", "UntypedStorage"): StandIn(value="uint8"),
    ("torch", "UntypedStorage"): StandIn(value="uint8"),
    **{(module, name): StandIn(value=dtype) for module in ("torch", "torch.cuda") for name, dtype in _STORAGES.items()},
    **{("torch", dtype): StandIn(value=dtype) for dtype in ITEM_BYTES},
    ("collections", "OrderedDict"): StandIn(_empty(dict)),
    ("collections", "defaultdict"): StandIn(_empty(dict)),
    ("collections", "Counter"): StandIn(lambda items=None: {} if items is None else items),
    ("argparse", "Namespace"): StandIn(Namespace),
    **{(module, name): made for module in ("builtins", "__builtin__") for name, made in _CONTAINERS.items()},
    ("_codecs", "encode"): StandIn(_encode),
    ("numpy", "dtype"): StandIn(_make_array_dtype),
    ("numpy", "ndarray"): StandIn(),
    **{
        (f"numpy.{core}.multiarray", name): made
        for core in ("core", "_core")
        for name, made in (("scalar", StandIn(_scalar)), ("_reconstruct", StandIn(lambda *_: StoredArray())))
    },
}
"""Everything that the files of `torch.save` may name."""
