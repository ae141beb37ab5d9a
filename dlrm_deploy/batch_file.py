"""One batch in an .npz file: what fails can be kept, handed on and checked again."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dlrm_deploy.batch import Batch
from dlrm_deploy.bundle import read_npz
from dlrm_deploy.errors import BatchError, BundleError, DataError

Array = npt.NDArray[Any]

_NEEDED = ("dense", "indices", "offsets")
_FLOATS = ("dense", "weights")


def read_batch(path: Path, *, convert: bool = False) -> tuple[Batch, dict[str, Array]]:
    """Read arrays `dense` [B, D], `indices` [N], `offsets` [F * B + 1] and, if there, `weights` [N].

    Args:
        path: the file.
        convert: also take other float types for dense and weights, as float32, and other types of whole numbers for
            indices and offsets, which become int64. False: they have to be what a `Batch` holds.

    Returns:
        The batch, and all other arrays of the file by name.

    Raises:
        DataError: the file cannot be read, lacks an array, or its arrays are no batch. Nothing in it is unpickled.
    """
    if not zipfile.is_zipfile(path):
        raise DataError(f"cannot read {path}: it is no .npz file, or was cut. Write it with numpy.savez.")
    try:
        arrays = read_npz(path)
    except BundleError as err:
        raise DataError(f"{err} Write it with numpy.savez.") from err
    missing = [name for name in _NEEDED if name not in arrays]
    if missing:
        raise DataError(
            f"{path} lacks {' and '.join(missing)}: it holds {', '.join(arrays) or 'nothing'}. A batch needs "
            f"{', '.join(_NEEDED)}, and weights for a weighted model."
        )
    try:
        if convert:
            arrays |= {name: _converted(name, arrays[name]) for name in (*_NEEDED, "weights") if name in arrays}
        batch = Batch(arrays.pop("dense"), arrays.pop("indices"), arrays.pop("offsets"), arrays.pop("weights", None))
    except BatchError as err:
        raise DataError(f"{path}: {err}") from err
    return batch, arrays


def _converted(name: str, values: Array) -> Array:
    """The values in the type that a `Batch` has; those of another kind of type as they are, which it refuses."""
    if name in _FLOATS:
        with np.errstate(over="ignore"):  # what is beyond float32 becomes infinite, and is refused
            return values.astype(np.float32) if values.dtype.kind == "f" else values
    if values.dtype.kind == "u" and values.size and values.max() > np.iinfo(np.int64).max:
        raise BatchError(f"{name} holds {values.max()}, and int64 ends at {np.iinfo(np.int64).max}: hash such ids.")
    return values.astype(np.int64) if values.dtype.kind in "iu" else values
