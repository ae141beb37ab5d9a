"""Tensors of a `torch.distributed.checkpoint` folder, whoever and however many processes wrote it.

`.metadata`, a pickle, says which boxes of a tensor are stored where; each box is a `torch.save` file inside a larger
file. Boxes may be rows, columns or any grid: rows of a tensor are put together from those that they cross, and only the
rows asked for are read, even where a box is a whole table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path, PurePosixPath

from dlrm_deploy.errors import CheckpointError
from dlrm_deploy.tensors.restricted_pickle import MAX_PICKLE_BYTES, Record, StandIn, StandIns, unpickle
from dlrm_deploy.tensors.stand_ins import MAX_COUNT, TORCH_FILE, counts, first
from dlrm_deploy.tensors.store import ITEM_BYTES, Array, TensorStore
from dlrm_deploy.tensors.torch_file import TorchFile

METADATA = ".metadata"


@dataclass(frozen=True, slots=True)
class _Place:
    """A part of a file."""

    file: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class _Box:
    """A stored part of a tensor."""

    starts: tuple[int, ...]
    sizes: tuple[int, ...]
    place: _Place

    @property
    def ends(self) -> tuple[int, ...]:
        return tuple(start + size for start, size in zip(self.starts, self.sizes, strict=True))


@dataclass(frozen=True, slots=True)
class _Entry:
    shape: tuple[int, ...]
    dtype: str
    boxes: tuple[_Box, ...]


class DcpFolder(TensorStore):
    """An opened folder. Its metadata has been read; tensors are read when asked for, other objects never."""

    kind = "a torch.distributed.checkpoint folder"

    def __init__(self, path: Path | str) -> None:
        """Read the metadata of a folder.

        Raises:
            CheckpointError: it is missing, damaged, names something that is not needed to hold tensors, or parts of a
                tensor are missing.
        """
        self.path = Path(path)
        self._entries = _read_metadata(self.path / METADATA)

    def keys(self) -> tuple[str, ...]:
        return tuple(self._entries)

    def shape(self, key: str) -> tuple[int, ...]:
        return self._entry(key).shape

    def dtype(self, key: str) -> str:
        return self._entry(key).dtype

    def files(self) -> frozenset[str]:
        """The names of the files that hold the tensors."""
        return frozenset(box.place.file for entry in self._entries.values() for box in entry.boxes)

    def read_into(self, key: str, first_row: int, out: Array) -> None:
        entry = self._entry(key)
        last_row = first_row + len(out)
        for box in entry.boxes:
            start, end = (box.starts[0], box.ends[0]) if entry.shape else (0, 1)
            low, high = max(first_row, start), min(last_row, end)
            if low >= high or math.prod(box.sizes) == 0:
                continue
            stored = self._open(key, box.place)
            if stored.keys() != ("",) or stored.shape("") != box.sizes or stored.dtype("") != entry.dtype:
                seen = f"{list(stored.shape(''))} {stored.dtype('')}" if stored.keys() == ("",) else stored.describe()
                raise CheckpointError(
                    f"{self.path / box.place.file} is damaged: {key} should be {list(box.sizes)} {entry.dtype}, found "
                    f"{seen}."
                )
            columns = tuple(slice(a, b) for a, b in zip(box.starts[1:], box.ends[1:], strict=True))
            stored.read_into("", low - start, out[(slice(low - first_row, high - first_row), *columns)])

    def verify(self) -> None:
        """Compare the CRC-32 of every stored box, each a torch.save file of its own."""
        for key, entry in self._entries.items():
            for box in entry.boxes:
                if math.prod(box.sizes):
                    self._open(key, box.place).verify()

    def _row_starts(self, key: str) -> Sequence[int]:
        """Blocks start where boxes do, so that most come from one read."""
        entry = self._entry(key)
        if not entry.shape:
            return (0,)
        return sorted({0, *(box.starts[0] for box in entry.boxes if math.prod(box.sizes))})

    def _entry(self, key: str) -> _Entry:
        if key not in self._entries:
            raise self._no_tensor(key)
        return self._entries[key]

    def _open(self, key: str, place: _Place) -> TorchFile:
        file = self.path / place.file
        try:
            size = file.stat().st_size
        except FileNotFoundError as err:
            raise CheckpointError(
                f"{self.path} lacks {place.file}, which holds {key}. Each process of a run writes files of its own: "
                "copy the files of all processes into this folder."
            ) from err
        except OSError as err:
            raise CheckpointError(f"cannot read {key} from {file}: {err}.") from err
        end = place.offset + place.length
        if size < end:
            raise CheckpointError(f"{file} is truncated: {key} ends at byte {end}, the file at {size}.")
        label = f"{file} is damaged where {key} is stored"
        return TorchFile(file, window=(place.offset, place.length), label=label)


class _Index(Record):
    """Key of `storage_data`; torch compares the name and the place, not the number."""

    __slots__ = ()

    def __hash__(self) -> int:
        return hash(self._key())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Index) and self._key() == other._key()

    def _key(self) -> tuple[str, tuple[int, ...] | None]:
        offset = self.state.get("offset") if isinstance(self.state, dict) else None
        return self.get("fqn", str), None if offset is None else counts(offset, "place of a chunk")


def _path(*parts: object) -> str:
    return str(PurePosixPath(*(part for part in parts if isinstance(part, str))))


_TORCH = "torch.distributed.checkpoint"
_STAND_INS: StandIns = {
    **{
        (f"{_TORCH}.metadata", name): StandIn(Record)
        for name in (
            "Metadata",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "TensorProperties",
            "StorageMeta",
        )
    },
    (f"{_TORCH}.metadata", "MetadataIndex"): StandIn(_Index),
    (f"{_TORCH}.metadata", "_MEM_FORMAT_ENCODING"): StandIn(first),
    (f"{_TORCH}.filesystem", "_StorageInfo"): StandIn(Record),
    # before torch 2.3
    ("torch.distributed._shard.sharded_tensor.metadata", "TensorProperties"): StandIn(Record),
    ("torch.distributed._shard.sharded_tensor.metadata", "MEM_FORMAT_ENCODING"): StandIn(first),
    **{
        (module, name): StandIn(_path)
        for module in ("pathlib", "pathlib._local")
        for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
    },
    **{
        name: TORCH_FILE[name]
        for name in (
            ("torch", "Size"),
            ("torch", "device"),
            ("torch.serialization", "_get_layout"),
            ("collections", "OrderedDict"),
            *(("torch", dtype) for dtype in ITEM_BYTES),
        )
    },
}


def _read_metadata(path: Path) -> dict[str, _Entry]:
    """The tensors of a folder."""
    label = f"{path} is damaged or was not written by torch.distributed.checkpoint"
    try:
        with path.open("rb") as file:
            data = file.read(MAX_PICKLE_BYTES + 1)
    except OSError as err:
        raise CheckpointError(f"cannot read {path}: {err}.") from err
    if len(data) > MAX_PICKLE_BYTES:
        raise CheckpointError(f"{label}: it has more than {MAX_PICKLE_BYTES} bytes.")
    metadata, _ = unpickle(data, _STAND_INS, label)
    try:
        if not isinstance(metadata, Record):
            raise ValueError(f"it holds a {type(metadata).__name__}")
        storage = metadata.get("storage_data", dict)
        entries: dict[str, _Entry] = {}
        for key, record in metadata.get("state_dict_metadata", dict).items():
            if not isinstance(key, str) or not isinstance(record, Record) or not isinstance(record.state, dict):
                raise ValueError("its list of tensors makes no sense")
            if "size" in record.state:
                entries[key] = _tensor(key, record, storage)
        return entries
    except (ValueError, TypeError, LookupError, AttributeError) as err:
        raise CheckpointError(f"{label}: {str(err) or type(err).__name__}.") from err


def _tensor(key: str, record: Record, storage: Mapping[object, object]) -> _Entry:
    shape = counts(record.get("size", tuple), f"shape of {key}")
    dtype = _dtype(key, record)
    boxes = []
    for part in record.get("chunks", list):
        starts = counts(part.get("offsets", tuple), f"place of a chunk of {key}")
        sizes = counts(part.get("sizes", tuple), f"shape of a chunk of {key}")
        info = storage.get(_index(key, starts))
        if info is None:
            raise ValueError(f"the place of {key} is missing")
        place = _place(key, info)
        inside = all(a + n <= whole for a, n, whole in zip(starts, sizes, shape, strict=True))
        if not inside or math.prod(sizes) * ITEM_BYTES[dtype] > place.length:
            raise ValueError(f"the place of {key} makes no sense")
        boxes.append(_Box(starts, sizes, place))
    missing = _uncovered(shape, [(box.starts, box.ends) for box in boxes])
    if missing is not None:
        names = ("rows", "columns", *(f"axis {axis}" for axis in range(2, len(shape))))
        ranges = [
            f"{name} {low} to {high - 1}"
            for name, (low, high), whole in zip(names, missing, shape, strict=False)
            if (low, high) != (0, whole)
        ]
        raise ValueError(f"chunks of {key} are missing: {', '.join(ranges) or 'all of it'} is stored nowhere")
    return _Entry(shape, dtype, tuple(boxes))


def _dtype(key: str, record: Record) -> str:
    state = record.get("properties", Record).state
    dtype = state.get("dtype") if isinstance(state, dict) else state[0] if isinstance(state, tuple) and state else None
    if not isinstance(dtype, StandIn) or not isinstance(dtype.value, str):
        raise ValueError(f"{key} has no dtype")
    return dtype.value


def _index(key: str, offset: tuple[int, ...]) -> _Index:
    index = _Index()
    index.state = {"fqn": key, "offset": offset}
    return index


def _place(key: str, info: object) -> _Place:
    if not isinstance(info, Record) or not isinstance(info.state, dict):
        raise ValueError(f"the place of {key} makes no sense")
    if info.state.get("transform_descriptors"):
        raise ValueError(f"{key} is stored compressed")
    place = _Place(info.get("relative_path", str), info.get("offset", int), info.get("length", int))
    if not 0 <= place.offset <= MAX_COUNT or not 0 <= place.length <= MAX_COUNT:
        raise ValueError(f"the place of {key} makes no sense")
    if Path(place.file).name != place.file or "\0" in place.file:
        raise ValueError(f"the place of {key} makes no sense")
    return place


_Bounds = tuple[tuple[int, ...], tuple[int, ...]]


def _uncovered(shape: tuple[int, ...], boxes: Sequence[_Bounds]) -> tuple[tuple[int, int], ...] | None:
    """A part of the tensor, [low, high) per axis, that no box covers; None where there is none.

    Goes from one edge of a box to the next along the first axis, and between two edges looks at the other axes of the
    boxes that are there.
    """
    if not shape:
        return None if boxes else ()
    if 0 in shape:
        return None
    waiting = sorted((box for box in boxes if box[0][0] < box[1][0]), key=lambda box: box[0][0], reverse=True)
    edges = sorted({0, shape[0], *(box[0][0] for box in waiting), *(box[1][0] for box in waiting)})
    crossed: list[_Bounds] = []
    for low, high in pairwise(edges):
        crossed = [box for box in crossed if box[1][0] > low]
        while waiting and waiting[-1][0][0] <= low:
            crossed.append(waiting.pop())
        if not crossed:
            return (low, high), *((0, size) for size in shape[1:])
        rest = _uncovered(shape[1:], [(starts[1:], ends[1:]) for starts, ends in crossed])
        if rest is not None:
            return (low, high), *rest
    return None
