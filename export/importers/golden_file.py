"""Golden files of the user's: inputs with the outputs that the source project computed for them."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np

from dlrm_deploy.batch import Batch
from dlrm_deploy.bundle import Golden
from dlrm_deploy.config import ModelConfig
from dlrm_deploy.errors import BatchError, ConfigError
from dlrm_deploy.tensors.store import Array


def read_golden(path: Path, config: ModelConfig) -> Golden:
    """Inputs with the outputs that the source project computed for them.

    Args:
        path: a .npz file with dense [B, D] float, indices [N] and offsets [F * B + 1] of whole numbers, feature-major,
            weights [N] float for a model that takes them, and probabilities or logits [B] float.
        config: the model.

    Raises:
        ConfigError: it cannot be read, lacks an array, or does not fit the model.
    """
    arrays = _read_arrays(path)
    outputs = [name for name in ("probabilities", "logits") if name in arrays]
    missing = [name for name in ("dense", "indices", "offsets") if name not in arrays]
    if missing or len(outputs) != 1:
        raise ConfigError(
            f"--golden {path} holds {', '.join(arrays) or 'no array'}; expected dense, indices, offsets, and either "
            "probabilities or logits."
        )
    try:
        batch = Batch(
            _cast(arrays["dense"], "f", np.float32),
            _cast(arrays["indices"], "iu", np.int64),
            _cast(arrays["offsets"], "iu", np.int64),
            _cast(arrays["weights"], "f", np.float32) if "weights" in arrays else None,
        )
        batch.check_fits(config)
    except BatchError as err:
        raise ConfigError(f"--golden {path} does not fit the model: {err}") from err
    values = arrays[outputs[0]]
    if values.shape != (batch.batch_size,) or values.dtype.kind != "f" or not np.isfinite(values).all():
        raise ConfigError(
            f"--golden {path}: {outputs[0]} are {values.dtype} {list(values.shape)}, expected "
            f"[{batch.batch_size}] finite float values, one for each sample."
        )
    if outputs[0] == "logits":
        with np.errstate(over="ignore"):
            values = 1 / (1 + np.exp(-values.astype(np.float64)))
    if batch.batch_size == 0 or values.min() < 0 or values.max() > 1:
        raise ConfigError(f"--golden {path}: {outputs[0]} must be at least one, and probabilities between 0 and 1.")
    return Golden(batch, values.astype(np.float32))


def _read_arrays(path: Path) -> dict[str, Array]:
    try:
        loaded = np.load(path, allow_pickle=False)
        if not isinstance(loaded, np.ndarray):
            with loaded as file:
                return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as err:
        raise ConfigError(f"cannot read --golden {path}: {err}. Expected a file written by numpy.savez.") from err
    raise ConfigError(f"--golden {path} holds a single array, expected a .npz file of several.")


def _cast(values: Array, kinds: str, dtype: type[np.generic]) -> Array:
    """The values as `dtype` where they are of one of these kinds; else as they are, which `Batch` refuses."""
    return values.astype(dtype) if values.dtype.kind in kinds else values
