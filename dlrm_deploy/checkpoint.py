"""Checkpoints: a `torch.distributed.checkpoint` folder under TorchRec's key names, with the model's config beside it.

    step-400/
        .metadata *.distcp    tensors: model.*, fused.state.* (row-wise Adagrad) and dense_optimizer.*
        model.toml            ModelConfig
        trainer.json          where training stood
        golden.npz            a few real inputs and the probabilities of the model that was in memory
        files.json            size and SHA-256 of each of these files

Any number of processes may have written it: a tensor is put together from its stored chunks. Reading trusts nothing:
files are verified against `files.json`, because torch does not notice an altered byte; the metadata, which torch
pickles, is read by an unpickler that knows a dozen stand-in types and calls nothing else, and tensors are loaded with
`weights_only=True`. Writing is atomic.
"""

from __future__ import annotations

import io
import json
import math
import pathlib
import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from dlrm_deploy.bundle import AUTO_HASH_BYTES, FileRecord, Golden
from dlrm_deploy.config import ModelConfig, from_mapping
from dlrm_deploy.errors import CheckpointError, ConfigError, DlrmDeployError
from dlrm_deploy.files import atomic_folder, file_damage, sha256_file, sha256_folder
from dlrm_deploy.model.keys import dense_shapes, table_shapes

if TYPE_CHECKING:
    from torch import Tensor

METADATA = ".metadata"
MODEL = "model.toml"
TRAINER = "trainer.json"
GOLDEN = "golden.npz"
FILES = "files.json"

FORMAT = "dlrm-deploy checkpoint"
FORMAT_VERSION = 1

MODEL_PREFIX = "model."
"""Before the names of `dlrm_deploy.model.keys`, in a checkpoint's keys."""


def save_checkpoint(
    path: Path,
    *,
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    trainer_state: Mapping[str, Any],
    golden: Golden | None = None,
) -> None:
    """Write a checkpoint to `path`, which must not exist; it is there whole or not at all.

    Args:
        path: the folder to make.
        config: the model's architecture.
        tensors: the model's weights under the names of `dlrm_deploy.model.keys`, without the prefix.
        optimizer: optimizer state under its full keys.
        trainer_state: plain values, for `trainer.json`.
        golden: inputs and the model's probabilities for them.

    Raises:
        OutputError: `path` exists, or cannot be written.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    state: dict[str, Any] = {MODEL_PREFIX + key: tensor for key, tensor in tensors.items()}
    state.update(optimizer)
    with atomic_folder(path) as folder:
        writer = FileSystemWriter(folder, thread_count=1, sync_files=False)  # the folder is synced as a whole
        with warnings.catch_warnings(), _system_errors():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process, and meant so
            save(state, storage_writer=writer, no_dist=True)
        (folder / MODEL).write_text(config.to_toml(), encoding="utf-8")
        (folder / TRAINER).write_text(json.dumps(dict(trainer_state), indent=2) + "\n", encoding="utf-8")
        if golden is not None:
            np.savez(folder / GOLDEN, allow_pickle=False, **golden.arrays())
        paths = sorted(folder.iterdir())
        files = {path.name: {"size": path.stat().st_size, "sha256": sha256_file(path)} for path in paths}
        table = {"format": FORMAT, "format_version": FORMAT_VERSION, "files": files}
        (folder / FILES).write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _system_errors() -> Iterator[None]:
    """Raise what the operating system said, such as that the disk is full, in place of what torch makes of it."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as err:
        for seen, _ in err.failures.values():
            cause: BaseException | None = seen
            while cause is not None:
                if isinstance(cause, OSError):
                    raise cause from err
                cause = cause.__cause__ or cause.__context__
        raise


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A stored box of a tensor, and where its bytes are."""

    starts: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class _Entry:
    shape: tuple[int, ...]
    dtype: str
    chunks: tuple[_Chunk, ...]


class Checkpoint:
    """An opened checkpoint. Tensors are read when asked for, one at a time.

    Opening compares the sizes of all files and hashes those up to 64 MiB; `verify`, which `load_into` and an export
    call, hashes the larger ones too. A checkpoint that torch alone wrote has no `files.json`, and is taken as it is.

    Keys are those stored: `MODEL_PREFIX` + a name of `dlrm_deploy.model.keys` for the model's weights.
    """

    def __init__(
        self, path: Path, config: ModelConfig, entries: Mapping[str, _Entry], unverified: Mapping[str, FileRecord]
    ) -> None:
        self.path = path
        self.config = config
        self._entries = entries
        self._unverified = dict(unverified)
        """Files that are still to be hashed."""

    @classmethod
    def open(cls, path: Path | str) -> Checkpoint:
        """Open the checkpoint at `path` and see that it holds every tensor of its model, in the right shape.

        Raises:
            CheckpointError: no checkpoint, a damaged or altered one, or one whose tensors are not those of its model.
        """
        path = Path(path)
        if not (path / METADATA).is_file() or not (path / MODEL).is_file():
            missing = ", ".join(name for name in (METADATA, MODEL) if not (path / name).is_file())
            raise CheckpointError(
                f"{path} is not a checkpoint of dlrm-deploy: it holds no {missing}. Give a folder that `dlrm-deploy "
                "train` wrote, such as RUN/best."
            )
        records = _read_files(path)
        for name, record in records.items():
            _verify_file(path / name, record, hashed=record.size <= AUTO_HASH_BYTES)
        try:
            config = ModelConfig.read(path / MODEL)
        except ConfigError as err:
            raise CheckpointError(f"{path} is damaged: {err}") from err
        large = {name: record for name, record in records.items() if record.size > AUTO_HASH_BYTES}
        checkpoint = cls(path, config, _read_metadata(path / METADATA), large)
        if records:
            used = {chunk.file for entry in checkpoint._entries.values() for chunk in entry.chunks}
            used |= {name for name in (METADATA, MODEL, TRAINER, GOLDEN) if (path / name).exists()}
            if unlisted := sorted(used - set(records)):
                raise CheckpointError(f"{path / FILES} is damaged: it does not list {', '.join(unlisted)}. {_REMEDY}")
        for name, shape in {**dense_shapes(config), **table_shapes(config)}.items():
            key = MODEL_PREFIX + name
            checkpoint._check_entry(key, shape)
            if checkpoint._entries[key].dtype != "float32":
                raise CheckpointError(f"{path}: {key} is {checkpoint._entries[key].dtype}, expected float32.")
        return checkpoint

    @property
    def sha256(self) -> str:
        """Hex SHA-256 over the whole checkpoint: of `files.json`, which holds the hashes of all files."""
        return sha256_file(self.path / FILES) if (self.path / FILES).is_file() else sha256_folder(self.path)

    def verify(self) -> None:
        """Hash the files that opening left out, once.

        Raises:
            CheckpointError: a file is missing or altered; the message names it.
        """
        for name in list(self._unverified):
            _verify_file(self.path / name, self._unverified[name], hashed=True)
            del self._unverified[name]

    def keys(self) -> tuple[str, ...]:
        """The keys of all stored tensors."""
        return tuple(self._entries)

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of a stored tensor."""
        return self._entry(key).shape

    def read(self, key: str) -> npt.NDArray[Any]:
        """A whole tensor. Memory: the tensor, and its largest chunk where it was stored in several.

        Raises:
            CheckpointError: there is no such key, a file is missing or truncated, or a value is NaN or infinite.
        """
        entry = self._entry(key)
        if len(entry.chunks) == 1:
            return self._load(key, entry.chunks[0])
        whole: npt.NDArray[Any] | None = None
        for chunk in entry.chunks:
            values = self._load(key, chunk)
            if whole is None:
                whole = np.empty(entry.shape, values.dtype)
            whole[_box(chunk)] = values
        assert whole is not None  # an entry has at least one chunk
        return whole

    def chunks(self, key: str) -> Iterator[tuple[int, npt.NDArray[Any]]]:
        """The tensor in blocks of whole rows, from the first row to the last: (first row, block [rows, ...]).

        Memory: the largest block, and where processes stored columns of it, the largest of those.

        Raises:
            CheckpointError: as `read`, or the chunks do not line up in blocks of rows.
        """
        entry = self._entry(key)
        blocks: dict[int, list[_Chunk]] = {}
        for chunk in sorted(entry.chunks, key=lambda chunk: chunk.starts):
            blocks.setdefault(chunk.starts[0] if chunk.starts else 0, []).append(chunk)
        if any(len({chunk.sizes[:1] for chunk in parts}) > 1 for parts in blocks.values()):
            raise CheckpointError(f"{self.path}: the chunks of {key} do not form blocks of rows. Re-shard it first.")
        for start, parts in blocks.items():
            if len(parts) == 1:
                yield start, self._load(key, parts[0])
                continue
            block: npt.NDArray[Any] | None = None
            for chunk in parts:
                values = self._load(key, chunk)
                if block is None:
                    block = np.empty((chunk.sizes[0], *entry.shape[1:]), values.dtype)
                block[(slice(None), *_box(chunk)[1:])] = values
            assert block is not None  # `parts` is not empty
            yield start, block

    def load_into(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill the given tensors, named by their stored keys, in place, after `verify`.

        Raises:
            CheckpointError: as `verify` and `read`, or a tensor has another shape.
        """
        import torch

        self.verify()
        with torch.no_grad():
            for key, tensor in tensors.items():
                self._check_entry(key, tuple(tensor.shape))
                for chunk in self._entries[key].chunks:
                    tensor[_box(chunk)] = torch.from_numpy(self._load(key, chunk))

    def trainer_state(self) -> dict[str, Any]:
        """What `trainer.json` holds.

        Raises:
            CheckpointError: missing or damaged.
        """
        return _read_object(self.path / TRAINER)

    def golden(self) -> Golden | None:
        """Real inputs and the model's probabilities for them; None where the checkpoint holds none.

        Raises:
            CheckpointError: damaged.
        """
        if not (self.path / GOLDEN).is_file():
            return None
        try:
            golden = Golden.read(self.path / GOLDEN)
            golden.batch.check_fits(self.config)
        except DlrmDeployError as err:
            raise CheckpointError(f"{self.path} is damaged: {err}") from err
        return golden

    def _entry(self, key: str) -> _Entry:
        if key not in self._entries:
            near = [known for known in self._entries if known.rpartition(".")[2] == key.rpartition(".")[2]]
            raise CheckpointError(
                f"{self.path} holds no tensor {key}. It holds {len(self._entries)}, such as "
                f"{', '.join((near or list(self._entries))[:3]) or 'none'}."
            )
        return self._entries[key]

    def _check_entry(self, key: str, shape: tuple[int, ...]) -> None:
        entry = self._entry(key)
        if entry.shape != shape:
            raise CheckpointError(f"{self.path}: {key} is {list(entry.shape)}, but the model needs {list(shape)}.")

    def _load(self, key: str, chunk: _Chunk) -> npt.NDArray[Any]:
        import torch

        file = self.path / chunk.file
        try:
            size = file.stat().st_size
            if size < chunk.offset + chunk.length:
                raise CheckpointError(
                    f"{file} is truncated: {key} ends at byte {chunk.offset + chunk.length}, the file at {size}."
                )
            with file.open("rb") as stream:
                window = cast(IO[bytes], _Window(stream, chunk.offset, chunk.length))
                tensor = torch.load(window, map_location="cpu", weights_only=True)
        except OSError as err:
            raise CheckpointError(f"cannot read {key} from {file}: {err}.") from err
        except (RuntimeError, EOFError, pickle.UnpicklingError, KeyError, ValueError) as err:
            raise CheckpointError(f"{file} is damaged where {key} is stored: {str(err).splitlines()[0]}") from err
        if not isinstance(tensor, torch.Tensor) or tuple(tensor.shape) != chunk.sizes:
            seen = list(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise CheckpointError(f"{file} is damaged: {key} should be {list(chunk.sizes)}, found {seen}.")
        values: npt.NDArray[Any] = tensor.detach().numpy()
        # One pass without a temporary: a sum of finite float32 values in float64 is finite.
        if values.dtype.kind == "f" and not np.isfinite(np.sum(values, dtype=np.float64)):
            raise CheckpointError(
                f"{self.path}: {key} holds NaN or infinite values. Training diverged; use an earlier one."
            )
        return values


_REMEDY = "Copy the checkpoint again, or go back to an earlier one."


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise CheckpointError(f"{path.parent} is damaged: cannot read {path.name}: {err}. {_REMEDY}") from err
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} is damaged: it holds no JSON object, but {json.dumps(values)[:40]}. {_REMEDY}")
    return values


def _read_files(folder: Path) -> dict[str, FileRecord]:
    """What `files.json` says; nothing for a checkpoint that torch alone wrote, without our other files."""
    path = folder / FILES
    if not path.exists() and not (folder / TRAINER).exists():
        return {}
    values = _read_object(path)
    if values.get("format") != FORMAT or values.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} is of format {values.get('format')!r}, version {values.get('format_version')!r}, and this "
            f"dlrm-deploy reads {FORMAT!r}, version {FORMAT_VERSION}. Install a release that reads it, or train again."
        )
    files = values.get("files")
    try:
        if not isinstance(files, dict):
            raise ConfigError("it holds no table of files.")
        records = {name: from_mapping(FileRecord, values, name) for name, values in files.items()}
    except ConfigError as err:
        raise CheckpointError(f"{path} is damaged: {err} {_REMEDY}") from err
    for name, record in records.items():
        if Path(name).name != name or not isinstance(record.size, int) or not isinstance(record.sha256, str):
            raise CheckpointError(f"{path} is damaged: its record of {name!r} makes no sense. {_REMEDY}")
    return records


def _verify_file(path: Path, record: FileRecord, hashed: bool) -> None:
    if damage := file_damage(path, record.size, record.sha256 if hashed else None, FILES):
        raise CheckpointError(f"{damage} {_REMEDY}")


def _box(chunk: _Chunk) -> tuple[slice, ...]:
    return tuple(slice(start, start + size) for start, size in zip(chunk.starts, chunk.sizes, strict=True))


class _Window(io.RawIOBase):
    """Part of a file as a file, so that a tensor is read straight into its memory."""

    def __init__(self, stream: io.BufferedReader, start: int, length: int) -> None:
        self._stream = stream
        self._start = start
        self._length = length
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        self._position = max(0, base + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")[: max(0, self._length - self._position)]
        self._stream.seek(self._start + self._position)
        count = self._stream.readinto(view)
        self._position += count
        return count


# The metadata: torch pickles dataclasses of its own. Stand-ins take their place, so nothing of torch is run or changed.


@dataclass
class _Record:
    """Stand-in for any of torch's metadata classes: it only holds what was pickled."""

    state: Any = field(default_factory=dict)

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def get(self, name: str, kind: type) -> Any:
        value = self.state.get(name) if isinstance(self.state, dict) else None
        if not isinstance(value, kind):
            raise _DamagedError(f"{name} is {type(value).__name__}, expected {kind.__name__}")
        return value


class _Index(_Record):
    """Key of `storage_data`; torch compares the name and the place, not the number."""

    def __hash__(self) -> int:
        return hash((self.get("fqn", str), self.state.get("offset")))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Index) and self._key() == other._key()

    def _key(self) -> tuple[Any, Any]:
        return self.get("fqn", str), self.state.get("offset")


class _DamagedError(Exception):
    pass


def _value(*values: Any) -> Any:
    return values[0] if values else None


def _path(*parts: str) -> str:
    return str(pathlib.PurePosixPath(*parts))


def _size(values: Any = ()) -> tuple[int, ...]:
    return tuple(values)


_METADATA = "torch.distributed.checkpoint.metadata"
_STAND_INS: dict[tuple[str, str], Callable[..., Any]] = {
    **{
        (_METADATA, name): _Record
        for name in (
            "Metadata",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "TensorProperties",
            "StorageMeta",
        )
    },
    (_METADATA, "MetadataIndex"): _Index,
    (_METADATA, "_MEM_FORMAT_ENCODING"): _value,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _Record,
    ("torch", "Size"): _size,
    ("torch.serialization", "_get_layout"): _value,
    ("pathlib", "PosixPath"): _path,
}
_DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")


class _MetadataUnpickler(pickle.Unpickler):
    """Reads the metadata of a checkpoint: a name outside the list is refused before anything is imported or called."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if module_name == "torch" and global_name in _DTYPES:
            return global_name
        if (module_name, global_name) not in _STAND_INS:
            raise _DamagedError(f"it names {module_name}.{global_name}, which no checkpoint needs")
        return _STAND_INS[module_name, global_name]


def _read_metadata(path: Path) -> dict[str, _Entry]:
    try:
        with path.open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
        if not isinstance(metadata, _Record):
            raise _DamagedError(f"it holds a {type(metadata).__name__}")
        storage = metadata.get("storage_data", dict)
        return {
            key: _entry(key, tensor, storage)
            for key, tensor in metadata.get("state_dict_metadata", dict).items()
            if "size" in tensor.state  # other objects are of no use here, and would need a pickle
        }
    except OSError as err:
        raise CheckpointError(f"cannot read {path}: {err}.") from err
    except Exception as err:  # a damaged pickle can fail in any way
        raise CheckpointError(
            f"{path} is damaged or was not written by torch.distributed.checkpoint: {err or type(err).__name__}."
        ) from err


def _entry(key: str, tensor: _Record, storage: Mapping[_Index, _Record]) -> _Entry:
    shape = tensor.get("size", tuple)
    chunks = []
    for record in tensor.get("chunks", list):
        starts, sizes = record.get("offsets", tuple), record.get("sizes", tuple)
        info = storage[_Index({"fqn": key, "offset": starts})]
        if info.state.get("transform_descriptors"):
            raise _DamagedError(f"{key} is stored compressed")
        chunk = _Chunk(starts, sizes, info.get("relative_path", str), info.get("offset", int), info.get("length", int))
        inside = all(a >= 0 and a + n <= whole for a, n, whole in zip(starts, sizes, shape, strict=True))
        if not inside or chunk.offset < 0 or chunk.length < 0 or Path(chunk.file).name != chunk.file:
            raise _DamagedError(f"the place of {key} makes no sense")
        chunks.append(chunk)
    distinct = {chunk.starts: math.prod(chunk.sizes) for chunk in chunks}
    if not chunks or sum(distinct.values()) != math.prod(shape):
        raise _DamagedError(f"chunks of {key} are missing")
    dtype, *_ = tensor.get("properties", _Record).state
    return _Entry(shape, dtype, tuple(chunks))
