"""Tensors of a file that `torch.save` wrote, read from their place in the file when asked for.

Two formats: since torch 1.6 a zip archive that stores a pickle and one record of raw bytes per storage; before, a few
pickles and then the storages, one after the other. The pickle is read by `restricted_pickle`. Values are read with
plain reads, not mapped, so that resident memory stays at one block.

A name inside the file is the path to a tensor through dicts and lists, joined with dots: `state_dict.emb_l.0.weight`.
A file that holds a bare tensor has the name "".
"""

from __future__ import annotations

import io
import math
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dlrm_deploy.errors import CheckpointError
from dlrm_deploy.tensors.restricted_pickle import (
    MAX_PICKLE_BYTES,
    Record,
    RefusedGlobalError,
    StandIn,
    TruncatedPickleError,
    unpickle,
)
from dlrm_deploy.tensors.stand_ins import TORCH_FILE, Namespace, Storage, StoredArray, StoredTensor, storage
from dlrm_deploy.tensors.store import BLOCK_BYTES, ITEM_BYTES, Array, TensorStore
from dlrm_deploy.tensors.strided import StridedReader
from dlrm_deploy.tensors.window import Window

_MAX_DEPTH = 100
_MAX_NAME = 1000
_CRC_BYTES = 1 << 20
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_VERSION = 1001


@dataclass(frozen=True, slots=True)
class _Record:
    """A record of a zip archive, with the checksum that its directory says."""

    name: str
    start: int
    size: int
    crc: int


class TorchFile(TensorStore):
    """An opened `torch.save` file. Its pickle has been read; tensors are read when asked for."""

    kind = "a torch.save file"

    def __init__(self, path: Path | str, *, window: tuple[int, int] | None = None, label: str | None = None) -> None:
        """Open a file.

        Args:
            path: the file.
            window: first byte and number of bytes of the part of the file that counts. None: the whole file.
            label: the begin of messages about what the file holds. None: "cannot read PATH".

        Raises:
            CheckpointError: it cannot be read, is none of torch's, is damaged, or names something that is not needed to
                hold tensors.
        """
        self.path = Path(path)
        self._label = label or f"cannot read {path}"
        with self._stream() as file:
            size = file.seek(0, io.SEEK_END)
            self._start, self._size = window or (0, size)
            if self._start < 0 or self._size < 0 or self._start + self._size > size:
                raise CheckpointError(f"{self._label}: it has {size} bytes.")
            part = Window(file, self._start, self._size)
            head = part.read(262)
            if head.startswith(b"PK"):
                value, nodes, self._places, self._records = _open_zip(part, self._label)
            elif head.startswith(b"\x80"):
                value, nodes, self._places, self._records = _open_legacy(part, self._label)
            elif head[257:262] == b"ustar":
                raise CheckpointError(
                    f"{self._label}: it is a tar archive, the format before torch 0.1.10. Load it with torch and save "
                    "it again."
                )
            else:
                seen = "it is empty" if not head else f"it begins with {head[:8]!r}"
                raise CheckpointError(
                    f"{self._label}: {seen}, while a file of torch.save begins with PK or a pickle. Was it damaged?"
                )
        self._tensors: dict[str, StoredTensor | StoredArray] = {}
        self._shapes: dict[str, tuple[tuple[int, ...], str]] = {}
        self._values: dict[str, object] = {}
        try:
            self._walk(value, nodes)
        except ValueError as err:
            raise CheckpointError(f"{self._label}: {err}.") from err

    def keys(self) -> tuple[str, ...]:
        return tuple(self._tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        return self._entry(key)[0]

    def dtype(self, key: str) -> str:
        return self._entry(key)[1]

    def values(self) -> Mapping[str, object]:
        """The plain values beside the tensors, named like them: numbers, texts, None, and dtypes by their name."""
        return dict(self._values)

    def read_into(self, key: str, first_row: int, out: Array) -> None:
        shape, dtype = self._entry(key)
        tensor = self._tensors[key]
        if isinstance(tensor, StoredArray):
            try:
                out[...] = tensor.array().reshape(shape or (1,))[first_row : first_row + len(out)]
            except ValueError as err:
                raise CheckpointError(f"{self._label}: {key}: {err}.") from err
            return
        size = math.prod(shape) * ITEM_BYTES[dtype]
        if size > max(tensor.storage.size, BLOCK_BYTES):
            raise CheckpointError(
                f"{self._label}: {key} has {size} bytes but is a view of a storage of {tensor.storage.size} bytes. "
                "Save a contiguous copy of it."
            )
        strides = tensor.strides or (1,)
        place = self._places[tensor.storage.key]
        with self._stream() as file:
            start = place + (tensor.storage.first * ITEM_BYTES[tensor.storage.dtype])
            reader = StridedReader(file, self._start + start, dtype, f"{self._label}: {key}")
            reader.gather(tensor.offset + first_row * strides[0], strides, out)

    def verify(self) -> None:
        """Compare the CRC-32 of the pickle and of each storage; a file from before torch 1.6 carries none."""
        if sum(record.size for record in self._records) > self._size:
            raise CheckpointError(f"{self._label}: its records overlap.")
        with self._stream() as file:
            part = Window(file, self._start, self._size)
            for record in self._records:
                crc = 0
                for first in range(0, record.size, _CRC_BYTES):
                    piece = part.read_at(record.start + first, min(_CRC_BYTES, record.size - first))
                    crc = zlib.crc32(piece, crc)
                if crc != record.crc:
                    raise CheckpointError(
                        f"{self._label}: its record {record.name}{self._holding(record)} was altered after it was "
                        f"written: its CRC-32 is {crc:08x}, its zip directory says {record.crc:08x}. Copy the file "
                        "again. If torch wrote it after torch.serialization.set_crc32_options(False), which stores no "
                        "true checksums, export it with --no-crc."
                    )

    def _holding(self, record: _Record) -> str:
        """Which tensors lie in a record, for a message."""
        names = [
            name or "the tensor"
            for name, tensor in self._tensors.items()
            if isinstance(tensor, StoredTensor) and self._places[tensor.storage.key] == record.start
        ]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        return f", which holds {', '.join(names[:3])}{more}," if names else ""

    def _entry(self, key: str) -> tuple[tuple[int, ...], str]:
        if key not in self._shapes:
            raise self._no_tensor(key)
        return self._shapes[key]

    @contextmanager
    def _stream(self) -> Iterator[io.FileIO]:
        try:
            with io.FileIO(self.path) as file:
                yield file
        except (OSError, ValueError) as err:  # ValueError: a path with a zero byte
            raise CheckpointError(f"cannot read {self.path}: {err}.") from err

    def _walk(self, value: object, nodes: int) -> None:
        """Give every leaf its name. `nodes` bounds how many there are: a pickle can hold one list a billion times."""
        left = nodes
        stack: list[tuple[str, int, object]] = [("", 0, value)]
        while stack:
            name, depth, node = stack.pop()
            left -= 1
            if left < 0 or depth > _MAX_DEPTH or len(name) > _MAX_NAME:
                raise ValueError("its dicts and lists are nested without an end")
            if isinstance(node, Namespace):
                node = node.state
            items: list[tuple[str, object]] = []
            if isinstance(node, dict):
                items = [(_key_name(key), child) for key, child in node.items()]
            elif isinstance(node, list | tuple):
                items = [(str(place), child) for place, child in enumerate(node)]
            elif isinstance(node, StoredTensor):
                self._add_tensor(name, node, node.shape, node.dtype)
            elif isinstance(node, StoredArray):
                if known := node.shape_and_dtype():
                    self._add_tensor(name, node, *known)
            elif node is None or isinstance(node, str | bool | int | float):
                self._values[name] = node
            elif isinstance(node, StandIn) and isinstance(node.value, str):
                self._values[name] = node.value  # a dtype
            prefix = f"{name}." if name else ""
            left -= len(items)
            stack.extend((prefix + key, depth + 1, child) for key, child in reversed(items))

    def _add_tensor(self, name: str, tensor: StoredTensor | StoredArray, shape: tuple[int, ...], dtype: str) -> None:
        if name in self._tensors:
            raise ValueError(f"two tensors have the name {name}")
        self._tensors[name] = tensor
        self._shapes[name] = (shape, dtype)


def _key_name(key: object) -> str:
    if isinstance(key, tuple):
        return ".".join(map(str, key))
    if isinstance(key, Record):
        raise ValueError("an object is the key of a dict")
    return str(key)


# Opening: both give the object, how many nodes it may have, where in the window each storage starts, and the records
# that have a checksum.

_Opened = tuple[object, int, Mapping[str, int], tuple[_Record, ...]]


def _open_zip(part: Window, label: str) -> _Opened:
    try:
        with zipfile.ZipFile(part) as archive:
            entries = archive.infolist()
    except Exception as err:  # of many types: the module trusts what it parses
        raise CheckpointError(f"{label}: its zip directory is missing or damaged ({err}). Was it cut?") from err
    records = {entry.filename: entry for entry in entries}
    if len(records) != len(entries):
        raise CheckpointError(f"{label}: its zip directory lists a name twice.")
    names = [name for name in records if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(names) != 1:
        raise CheckpointError(
            f"{label}: it is a zip archive with {len(names)} records named data.pkl, while torch.save writes one."
        )
    prefix = names[0].removesuffix("data.pkl")
    if prefix + "constants.pkl" in records:
        raise CheckpointError(
            f"{label}: it is a TorchScript archive of torch.jit.save. Save the model's state_dict with torch.save."
        )

    def find(name: str, limit: int | None = None) -> tuple[int, int]:
        record = records[name]
        if record.compress_type != zipfile.ZIP_STORED or record.compress_size != record.file_size:
            raise CheckpointError(
                f"{label}: its record {name} is compressed, which torch.save does not do. Save it again with torch."
            )
        if limit is not None and record.file_size > limit:
            raise CheckpointError(f"{label}: its record {name} has {record.file_size} bytes, more than {limit}.")
        part.seek(record.header_offset)
        header = part.read(30)
        encoded = 0
        if len(header) == 30:
            encoded, extra = struct.unpack("<HH", header[26:])
            stored = part.read(encoded)
            start = record.header_offset + 30 + encoded + extra
            known = stored in (record.orig_filename.encode(), record.orig_filename.encode("cp437", "replace"))
            if header[:4] == b"PK\x03\x04" and known and start + record.file_size <= part.size:
                return start, record.file_size
        raise CheckpointError(f"{label}: its record {name} is damaged or cut off.")

    def content(name: str, limit: int) -> bytes:
        start, size = find(name, limit)
        return part.read_at(start, size)

    if prefix + "byteorder" in records and (order := content(prefix + "byteorder", 100)) != b"little":
        raise CheckpointError(
            f"{label}: its byte order is {order.decode('ascii', 'replace')}, expected little. Load it with torch and "
            "save it again on a little-endian machine."
        )
    places: dict[str, int] = {}
    read = [_Record(names[0], *find(names[0], MAX_PICKLE_BYTES), records[names[0]].CRC)]

    def persistent(identity: object) -> Storage:
        if type(identity) is not tuple or len(identity) != 5 or identity[0] != "storage":
            raise ValueError("a reference is none to a storage")
        found = storage(identity[1], identity[2], identity[4])
        name = f"{prefix}data/{found.key}"
        if name not in records:
            raise ValueError(f"its record {name} is missing")
        if records[name].file_size != found.size:
            raise ValueError(f"its record {name} has {records[name].file_size} bytes, while {found.size} are expected")
        if found.key not in places:
            start, size = find(name)
            places[found.key] = start
            read.append(_Record(name, start, size, records[name].CRC))
        return found

    data = content(names[0], MAX_PICKLE_BYTES)
    value, _ = unpickle(data, TORCH_FILE, label, persistent=persistent)
    return value, max(10_000, 2 * len(data)), places, tuple(read)


def _open_legacy(part: Window, label: str) -> _Opened:
    size = 1 << 20
    while True:
        data = part.read_at(0, min(size, part.size))
        try:
            return _parse_legacy(data, part, label)
        except TruncatedPickleError:
            if size >= min(part.size, MAX_PICKLE_BYTES):
                raise
        size *= 16


def _parse_legacy(data: bytes, part: Window, label: str) -> _Opened:
    storages: dict[str, Storage] = {}

    def persistent(identity: object) -> Storage:
        if type(identity) is tuple and identity[:1] == ("module",):
            raise ValueError("it holds a whole module: save its state_dict with torch.save where its code is")
        if type(identity) is not tuple or len(identity) not in (5, 6) or identity[0] != "storage":
            raise ValueError("a reference is none to a storage")
        found = storage(identity[1], identity[2], identity[4])
        if storages.setdefault(found.key, found) != found:
            raise ValueError(f"storage {found.key} has two types or sizes")
        view = identity[5] if len(identity) == 6 else None
        if view is None:
            return found
        if type(view) is not tuple or len(view) != 3:
            raise ValueError("a view of a storage makes no sense")
        part_of = storage(identity[1], found.key, view[2])
        first = view[1]
        if type(first) is not int or not 0 <= first <= found.count - part_of.count:
            raise ValueError(f"a view of storage {found.key} ends behind it")
        return Storage(found.key, found.dtype, part_of.count, first)

    not_torch = f"{label}: it is a pickle, but not one of torch.save. Save the model's state_dict with torch.save."
    try:
        magic, at = unpickle(data, {}, label)
    except RefusedGlobalError as err:
        raise CheckpointError(not_torch) from err
    if magic != _LEGACY_MAGIC:
        raise CheckpointError(not_torch)
    version, at = unpickle(data, {}, label, start=at)
    if version != _LEGACY_VERSION:
        raise CheckpointError(f"{label}: its format is not version {_LEGACY_VERSION}, the only one before torch 1.6.")
    system, at = unpickle(data, {}, label, start=at)
    if isinstance(system, dict) and system.get("little_endian") is False:
        raise CheckpointError(f"{label}: its byte order is big, expected little. Load it with torch and save it again.")
    begin = at
    value, at = unpickle(data, TORCH_FILE, label, start=at, persistent=persistent)
    nodes = at - begin
    keys, at = unpickle(data, {}, label, start=at)
    places: dict[str, int] = {}
    if type(keys) is not list or len(keys) > len(storages):
        raise CheckpointError(f"{label}: its list of storages is damaged.")
    for key in keys:
        found = storages.get(key) if type(key) is str else None
        if found is None or key in places:
            raise CheckpointError(f"{label}: its list of storages is damaged.")
        header = part.read_at(at, 8) if at + 8 <= part.size else b""
        if len(header) < 8 or at + 8 + found.size > part.size:
            raise CheckpointError(f"{label}: it is cut off in storage {key}, at byte {part.size}.")
        if int.from_bytes(header, "little", signed=True) != found.count:
            raise CheckpointError(f"{label}: storage {key} has another size than {found.count} values.")
        places[key] = at + 8
        at += 8 + found.size
    if missing := next((key for key in storages if key not in places), None):
        raise CheckpointError(f"{label}: storage {missing} is missing.")
    return value, max(10_000, 2 * nodes), places, ()
