"""Refuse tables with NaN or infinite values, and say where the first one is."""

from __future__ import annotations

import numpy as np

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
    row, *columns = (int(place) for place in bad[0])
    value = np.atleast_1d(block)[row, *columns]
    column = f", column {', '.join(map(str, columns))}" if columns else ""
    raise CheckpointError(
        f"{name} holds NaN or infinite values: {value} at row {first_row + row}{column} is the first; {len(bad)} of "
        f"the {block.size} values read with it are. Training diverged; use an earlier checkpoint."
    )
