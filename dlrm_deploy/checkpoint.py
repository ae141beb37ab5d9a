"""Checkpoints: a `torch.distributed.checkpoint` folder under TorchRec's key names, with the model's config beside it.

    step-400/
        .metadata *.distcp    tensors: model.*, fused.state.* (row-wise Adagrad) and dense_optimizer.*
        model.toml            ModelConfig
        trainer.json          where training stood
        golden.npz            a few real inputs and the probabilities of the model that was in memory
        files.json            size and SHA-256 of each of these files

Any number of processes may have written it: `dlrm_deploy.tensors.dcp` puts a tensor together from its stored pieces,
and runs nothing that a file holds. Files are verified against `files.json`, because neither it nor torch notices an
altered byte. Writing is atomic.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dlrm_deploy.bundle import AUTO_HASH_BYTES, FileRecord, Golden
from dlrm_deploy.config import ModelConfig, from_mapping
from dlrm_deploy.errors import CheckpointError, ConfigError, DlrmDeployError
from dlrm_deploy.files import atomic_folder, file_damage, sha256_file, sha256_folder
from dlrm_deploy.model.keys import dense_shapes, table_shapes
from dlrm_deploy.tensors.dcp import METADATA, DcpFolder
from dlrm_deploy.tensors.finite import check_finite
from dlrm_deploy.tensors.store import Array

if TYPE_CHECKING:
    from torch import Tensor

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


class Checkpoint:
    """An opened checkpoint. Tensors are read when asked for, one at a time.

    Opening compares the sizes of all files and hashes those up to 64 MiB; `verify`, which `load_into` and an export
    call, hashes the larger ones too. A checkpoint that torch alone wrote has no `files.json`, and is taken as it is.

    Keys are those stored: `MODEL_PREFIX` + a name of `dlrm_deploy.model.keys` for the model's weights.
    """

    def __init__(self, store: DcpFolder, config: ModelConfig, unverified: Mapping[str, FileRecord]) -> None:
        self.path = store.path
        self.config = config
        self._store = store
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
        checkpoint = cls(DcpFolder(path), config, large)
        if records:
            used = checkpoint._store.files() | {
                name for name in (METADATA, MODEL, TRAINER, GOLDEN) if (path / name).exists()
            }
            if unlisted := sorted(used - set(records)):
                raise CheckpointError(f"{path / FILES} is damaged: it does not list {', '.join(unlisted)}. {_REMEDY}")
        for name, shape in {**dense_shapes(config), **table_shapes(config)}.items():
            key = MODEL_PREFIX + name
            checkpoint._check_entry(key, shape)
            if (dtype := checkpoint._store.dtype(key)) != "float32":
                raise CheckpointError(f"{path}: {key} is {dtype}, expected float32.")
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
        return self._store.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of a stored tensor."""
        return self._store.shape(key)

    def read(self, key: str) -> Array:
        """A whole tensor. Memory: the tensor and one block.

        Raises:
            CheckpointError: there is no such key, a file is missing or truncated, or a value is NaN or infinite.
        """
        values = self._store.read(key)
        check_finite(values, 0, f"{self.path}: {key}")
        return values

    def chunks(self, key: str) -> Iterator[tuple[int, Array]]:
        """The tensor in blocks of whole rows, from the first row to the last: (first row, block [rows, ...]).

        Memory: a block, at most 16 MiB where a row is not larger.

        Raises:
            CheckpointError: as `read`.
        """
        for first, block in self._store.chunks(key):
            check_finite(block, first, f"{self.path}: {key}")
            yield first, block

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
                for first, block in self.chunks(key):
                    part = tensor[first : first + len(block)] if block.ndim else tensor
                    part.copy_(torch.from_numpy(block))

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

    def _check_entry(self, key: str, shape: tuple[int, ...]) -> None:
        seen = self._store.shape(key)
        if seen != shape:
            raise CheckpointError(f"{self.path}: {key} is {list(seen)}, but the model needs {list(shape)}.")


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
