"""Refuse tables with values that are NaN, infinite or beyond float32, and say where the first one is."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dlrm_deploy.errors import CheckpointError
from dlrm_deploy.tensors.store import Array


def check_finite(block: Array, first_row: int, name: str) -> None:
    """Raise for the first value of a block of a tensor that is NaN or infinite.

    Args:
        block: [n, ...] or [], any dtype; integers pass.
        first_row: row of the tensor at which the block starts, for the message.
        name: the tensor's name, for the message.

    Raises:
        CheckpointError: names the tensor, the first such value with its row and column, and how many there are.
    """
    # One pass without a temporary: a sum of finite float32 values in float64 is finite.
    with np.errstate(over="ignore", invalid="ignore"):
        if block.dtype.kind != "f" or np.isfinite(np.sum(block, dtype=np.float64)):
            return
        bad = np.argwhere(~np.isfinite(np.atleast_1d(block)))
    if len(bad) == 0:  # float64 values whose sum is too large
        return
    raise CheckpointError(
        f"{name} holds NaN or infinite values: {_first(block, bad, first_row)} is the first; {len(bad)} of "
        f"the {block.size} values read with it are. Training diverged; use an earlier checkpoint."
    )


def as_float32(block: Array, first_row: int, name: str) -> npt.NDArray[np.float32]:
    """A block as float32, after `check_finite`; of another dtype a copy.

    Args:
        block: [n, ...] or [], any float dtype.
        first_row: as for `check_finite`.
        name: as for `check_finite`.

    Raises:
        CheckpointError: as `check_finite`, or a float64 value is beyond the range of float32.
    """
    check_finite(block, first_row, name)
    with np.errstate(over="ignore"):
        converted = np.asarray(block, np.float32)
    if block.dtype == np.float64 and len(bad := np.argwhere(np.isinf(np.atleast_1d(converted)))):
        raise CheckpointError(
            f"{name} holds float64 values that do not fit float32, in which a bundle holds them: "
            f"{_first(block, bad, first_row)} is the first; {len(bad)} of the {block.size} values read with it are "
            f"beyond {np.finfo(np.float32).max:.3g}."
        )
    return converted


def _first(block: Array, places: npt.NDArray[np.intp], first_row: int) -> str:
    """The first of some values of a block, and where it is."""
    row, *columns = (int(place) for place in places[0])
    column = f", column {', '.join(map(str, columns))}" if columns else ""
    return f"{np.atleast_1d(block)[row, *columns]} at row {first_row + row}{column}"
