"""Golden files of the user's: inputs with the outputs that the source project computed for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dlrm_deploy.batch_file import read_batch
from dlrm_deploy.bundle import Golden
from dlrm_deploy.config import ModelConfig
from dlrm_deploy.errors import BatchError, ConfigError, DataError


def read_golden(path: Path, config: ModelConfig) -> Golden:
    """Inputs with the outputs that the source project computed for them.

    Args:
        path: a .npz file with dense [B, D] float, indices [N] and offsets [F * B + 1] of whole numbers, feature-major,
            weights [N] float for a model that takes them, and probabilities or logits [B] float.
        config: the model.

    Raises:
        ConfigError: it cannot be read, lacks an array, or does not fit the model.
    """
    try:
        batch, arrays = read_batch(path, convert=True)
    except DataError as err:
        raise ConfigError(f"--golden: {err}") from err
    try:
        batch.check_fits(config)
    except BatchError as err:
        raise ConfigError(f"--golden {path} does not fit the model: {err}") from err
    outputs = [name for name in ("probabilities", "logits") if name in arrays]
    if len(outputs) != 1:
        raise ConfigError(
            f"--golden {path} holds {' and '.join(outputs) or 'no output'} beside the batch, expected either "
            "probabilities or logits."
        )
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
