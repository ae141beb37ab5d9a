"""Read a pickle without importing or calling anything that it names.

Pickle is a small machine with a stack, whose programs may call any function of Python: a checkpoint from elsewhere can
hold such a program. This is the machine without that ability, and without the ways in which a short program fills the
memory. A name in the file is looked up in a table of stand-ins, functions of ours that build plain values; a name
outside the table is refused.

Only the opcodes that protocols 2 to 5 write are known, so INST, OBJ, the extension registry and out-of-band buffers are
refused too. Lists, dicts and scalars are Python's own; sets become lists.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NoReturn, TypeVar

from dlrm_deploy.errors import CheckpointError

T = TypeVar("T")

MAX_PICKLE_BYTES = 1 << 28
"""Largest pickle that is read. A tensor or a stored piece of one takes some 250 bytes in it, so this holds a million of
them, while unpickling what is as large takes a few GB of memory."""

_MAX_INT_BYTES = 64  # torch's magic number has 10
_MAX_KEY_ITEMS = 64


class RefusedGlobalError(CheckpointError):
    """A pickle names something outside the table of stand-ins; it was neither imported nor called."""


class TruncatedPickleError(CheckpointError):
    """The bytes end before the pickle does."""


@dataclass(frozen=True, slots=True, eq=False)
class StandIn:
    """What takes the place of something that a pickle names."""

    make: Callable[..., object] | None = None
    """Called with the arguments in the pickle, which can be anything. Raises ValueError with what is wrong with them.
    None: it is named, never called. It may not copy an argument of any length: a pickle can ask for that often."""

    value: object = None
    """What a reader needs to know of it, such as a dtype's name."""


class Record:
    """Stand-in for an object of which only the state matters."""

    __slots__ = ("state",)

    def __init__(self) -> None:
        self.state: object = {}

    def get(self, name: str, kind: type[T]) -> T:
        """A value of the state.

        Raises:
            ValueError: it is missing, or of another type.
        """
        value = self.state.get(name) if isinstance(self.state, dict) else None
        if not isinstance(value, kind):
            raise ValueError(f"{name} is {type(value).__name__}, expected {kind.__name__}")
        return value


StandIns = Mapping[tuple[str, str], StandIn]


def unpickle(
    data: bytes,
    stand_ins: StandIns,
    label: str,
    *,
    start: int = 0,
    persistent: Callable[[object], object] | None = None,
) -> tuple[object, int]:
    """Read one pickle.

    Args:
        data: the bytes that hold it.
        stand_ins: (module, name) of everything that it may name.
        label: the begin of every message, such as "cannot read model.pt".
        start: where in `data` the pickle starts.
        persistent: gives the object for a persistent id, which can be anything; raises ValueError with what is wrong
            with it. None: the pickle may have none.

    Returns:
        The value, and the position after the pickle.

    Raises:
        RefusedGlobalError: it names something that is not in the table.
        TruncatedPickleError: it ends too early.
        CheckpointError: it is damaged.
    """
    machine = _Machine(data, stand_ins, start, persistent)
    try:
        return machine.run(), machine.at
    except _RefusedError as err:
        raise RefusedGlobalError(f"{label}: {err}") from err
    except _EndError as err:
        raise TruncatedPickleError(f"{label}: its pickle is cut off at byte {len(data)}.") from err
    except (ValueError, TypeError, LookupError, OverflowError, MemoryError) as err:
        raise CheckpointError(f"{label}: {str(err) or type(err).__name__} (byte {machine.at} of its pickle).") from err


class _RefusedError(Exception):
    pass


class _EndError(Exception):
    pass


class _Mark:
    pass


_MARK = _Mark()
_SCALARS = (str, int, float, bool, type(None), bytes)


class _Machine:
    """The stack, the memo and the opcodes."""

    def __init__(
        self, data: bytes, stand_ins: StandIns, start: int, persistent: Callable[[object], object] | None
    ) -> None:
        self.at = start
        self._data = data
        self._stand_ins = stand_ins
        self._persistent = persistent
        self._stack: list[object] = []
        self._push = self._stack.append
        self._memo: dict[int, object] = {}  # not an array: a number in the file must not decide its size

    def run(self) -> object:
        data, operations = self._data, _OPERATIONS  # millions of opcodes where many processes wrote
        while self.at < len(data):
            opcode = data[self.at]
            self.at += 1
            if opcode in operations:
                operations[opcode](self)
            elif opcode == 0x2E:  # STOP
                return self._pop()
            else:
                raise ValueError(f"opcode 0x{opcode:02x} is none that a checkpoint needs")
        raise _EndError

    # Reading

    def _byte(self) -> int:
        if self.at >= len(self._data):
            raise _EndError
        self.at += 1
        return self._data[self.at - 1]

    def _bytes(self, count: int) -> bytes:
        if count > len(self._data) - self.at:
            raise _EndError
        self.at += count
        return self._data[self.at - count : self.at]

    def _number(self, size: int) -> int:
        return int.from_bytes(self._bytes(size), "little")

    def _line(self) -> str:
        end = self._data.find(b"\n", self.at, self.at + 1000)
        if end < 0:
            if len(self._data) - self.at < 1000:
                raise _EndError
            raise ValueError("a name is longer than 1000 bytes")
        line = self._bytes(end - self.at)
        self.at += 1
        return line.decode()

    # The stack

    def _pop(self) -> object:
        if not self._stack or self._stack[-1] is _MARK:
            raise ValueError("it takes a value from an empty stack")
        return self._stack.pop()

    def _top(self) -> object:
        if not self._stack or self._stack[-1] is _MARK:
            raise ValueError("it uses a value of an empty stack")
        return self._stack[-1]

    def _pop_to_mark(self) -> list[object]:
        stack = self._stack
        for place in range(len(stack) - 1, -1, -1):
            if stack[place] is _MARK:
                items = stack[place + 1 :]
                del stack[place:]
                return items
        raise ValueError("it has no mark to go back to")

    def _tuple(self, count: int) -> None:
        items = self._stack[-count:]
        if len(items) < count or _MARK in items:
            raise ValueError("it takes a value from an empty stack")
        self._stack[-count:] = [tuple(items)]

    # Containers

    def _append(self, items: list[object]) -> None:
        target = self._top()
        if type(target) is not list:
            raise ValueError(f"it appends to a {type(target).__name__}")
        target.extend(items)

    def _set_items(self, items: list[object]) -> None:
        target = self._top()
        if type(target) is not dict or len(items) % 2:
            raise ValueError(f"it sets {len(items)} halves of items of a {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Python hashes nested tuples by recursion without a limit, so keys are flat.
            flat = type(key) is tuple and len(key) <= _MAX_KEY_ITEMS and all(type(item) in _SCALARS for item in key)
            if not flat and type(key) not in _SCALARS and not isinstance(key, Record):
                raise ValueError(f"a {type(key).__name__} cannot be a key")
            target[key] = value

    # Names

    def _global(self, module: object, name: object) -> None:
        if type(module) is not str or type(name) is not str:
            raise ValueError("a name is no string")
        stand_in = self._stand_ins.get((module, name))
        if stand_in is None:
            _refuse(module, name)
        self._push(stand_in)

    def _call(self, arguments: object, called: object) -> None:
        if not isinstance(called, StandIn) or called.make is None or type(arguments) is not tuple:
            raise ValueError(f"it calls a {type(called).__name__} that is not to be called")
        self._push(called.make(*arguments))

    def _build(self) -> None:
        state, target = self._pop(), self._top()
        if isinstance(target, Record):
            target.state = state
        elif type(target) is not dict:  # an OrderedDict may have attributes, which do not matter
            raise ValueError(f"it sets the state of a {type(target).__name__}")

    def _load_persistent(self) -> None:
        if self._persistent is None:
            raise ValueError("it refers to an object outside the pickle")
        self._push(self._persistent(self._pop()))

    # The memo

    def _get(self, number: int) -> None:
        if number not in self._memo:
            raise ValueError(f"it takes object {number}, which was not stored")
        self._push(self._memo[number])

    def _put(self, number: int) -> None:
        self._memo[number] = self._top()

    # Scalars

    def _text(self, size: int) -> None:
        self._push(self._bytes(self._number(size)).decode())

    def _old_text(self, size: int) -> None:
        """A string of Python 2: text where it can be."""
        raw = self._bytes(self._number(size))
        try:
            self._push(raw.decode())
        except UnicodeDecodeError:
            self._push(raw)

    def _long(self, size: int) -> None:
        count = self._number(size)
        if count > _MAX_INT_BYTES:
            raise ValueError(f"it holds an integer of {count} bytes")
        self._push(int.from_bytes(self._bytes(count), "little", signed=True))


def _new_object(machine: _Machine) -> None:
    arguments = machine._pop()
    machine._call(arguments, machine._pop())


def _new_object_with_keywords(machine: _Machine) -> None:
    if machine._pop() != {}:
        raise ValueError("it makes an object with keyword arguments")
    _new_object(machine)


def _stack_global(machine: _Machine) -> None:
    name = machine._pop()
    machine._global(machine._pop(), name)


def _instance(machine: _Machine) -> None:
    machine._global(machine._line(), machine._line())  # refused with its name
    raise ValueError("opcode INST is none that a checkpoint needs")


def _set_item(machine: _Machine) -> None:
    value = machine._pop()
    machine._set_items([machine._pop(), value])


def _pop_or_unmark(machine: _Machine) -> None:
    if not machine._stack:
        raise ValueError("it takes a value from an empty stack")
    machine._stack.pop()


_OPERATIONS: dict[int, Callable[[_Machine], object]] = {
    0x80: lambda m: m._byte(),  # PROTO
    0x95: lambda m: m._number(8),  # FRAME: only a hint for reading ahead
    ord("("): lambda m: m._push(_MARK),
    ord("0"): _pop_or_unmark,
    ord("1"): lambda m: m._pop_to_mark(),
    ord("2"): lambda m: m._push(m._top()),
    ord("N"): lambda m: m._push(None),
    0x88: lambda m: m._push(True),
    0x89: lambda m: m._push(False),
    ord("J"): lambda m: m._push(int.from_bytes(m._bytes(4), "little", signed=True)),
    ord("K"): lambda m: m._push(m._byte()),
    ord("M"): lambda m: m._push(m._number(2)),
    0x8A: lambda m: m._long(1),
    0x8B: lambda m: m._long(4),
    ord("G"): lambda m: m._push(struct.unpack(">d", m._bytes(8))[0]),
    ord("X"): lambda m: m._text(4),
    0x8C: lambda m: m._text(1),
    0x8D: lambda m: m._text(8),
    ord("T"): lambda m: m._old_text(4),
    ord("U"): lambda m: m._old_text(1),
    ord("B"): lambda m: m._push(m._bytes(m._number(4))),
    ord("C"): lambda m: m._push(m._bytes(m._number(1))),
    0x8E: lambda m: m._push(m._bytes(m._number(8))),
    ord(")"): lambda m: m._push(()),
    ord("t"): lambda m: m._push(tuple(m._pop_to_mark())),
    0x85: lambda m: m._tuple(1),
    0x86: lambda m: m._tuple(2),
    0x87: lambda m: m._tuple(3),
    ord("]"): lambda m: m._push([]),
    ord("a"): lambda m: m._append([m._pop()]),
    ord("e"): lambda m: m._append(m._pop_to_mark()),
    ord("}"): lambda m: m._push({}),
    ord("s"): _set_item,
    ord("u"): lambda m: m._set_items(m._pop_to_mark()),
    0x8F: lambda m: m._push([]),  # EMPTY_SET
    0x90: lambda m: m._append(m._pop_to_mark()),  # ADDITEMS
    0x91: lambda m: m._push(m._pop_to_mark()),  # FROZENSET
    ord("h"): lambda m: m._get(m._byte()),
    ord("j"): lambda m: m._get(m._number(4)),
    ord("q"): lambda m: m._put(m._byte()),
    ord("r"): lambda m: m._put(m._number(4)),
    0x94: lambda m: m._put(len(m._memo)),  # MEMOIZE
    ord("c"): lambda m: m._global(m._line(), m._line()),
    0x93: _stack_global,
    ord("i"): _instance,
    ord("R"): _new_object,  # REDUCE: as NEWOBJ, since a stand-in is only ever called
    0x81: _new_object,
    0x92: _new_object_with_keywords,
    ord("b"): lambda m: m._build(),
    ord("Q"): lambda m: m._load_persistent(),
}

_ADVICE = (
    (
        ("torch.distributed.", "torchrec."),
        "Such objects hold one process's part of a table: save with torch.distributed.checkpoint, not torch.save.",
    ),
    (
        ("torch._utils._rebuild_wrapper_subclass",),
        "ShardedTensor and DTensor are written so, of which each process holds a part: save with "
        "torch.distributed.checkpoint, not torch.save.",
    ),
    (("__torch__", "torch.jit"), "It holds TorchScript code: save the state_dict of the model with torch.save."),
    (("torch.storage",), "It was written by pickle, not by torch.save: write the state_dict with torch.save."),
    (
        ("torch.nn.", "torch.optim.", "__main__"),
        "It holds a whole object, not only tensors: save its state_dict with torch.save where its code is.",
    ),
    (("torch.",), "Save a state_dict of plain tensors, neither quantized nor of a class of its own, with torch.save."),
    (("",), "If you know where it comes from, load it in the program that wrote it and save the state_dict alone."),
)


def _refuse(module: str, name: str) -> NoReturn:
    shown = f"{module}.{name}".encode("ascii", "backslashreplace").decode()[:100]
    advice = next(text for starts, text in _ADVICE if f"{module}.{name}".startswith(starts))
    raise _RefusedError(f"it names {shown}, which no checkpoint needs; it was not called. {advice}")
