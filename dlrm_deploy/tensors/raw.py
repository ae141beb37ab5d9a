"""A matrix stored as nothing but its numbers, as NVIDIA's DLRM stores its tables."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dlrm_deploy.errors import CheckpointError
from dlrm_deploy.tensors.store import BLOCK_BYTES, Array


class RawMatrix:
    """A file of [rows, width] little-endian values, row after row, without a header."""

    def __init__(self, path: Path | str, shape: tuple[int, int], dtype: str = "float32") -> None:
        """Look at a file.

        Args:
            path: the file.
            shape: its rows and width.
            dtype: NumPy's name of its values' type.

        Raises:
            CheckpointError: it is missing, or its size is not that of the matrix.
        """
        self.path = Path(path)
        self.shape = shape
        self.dtype = np.dtype(dtype)
        rows, width = shape
        expected = rows * width * self.dtype.itemsize
        try:
            seen = self.path.stat().st_size
        except OSError as err:
            raise CheckpointError(f"cannot read {path}: {err}.") from err
        if seen != expected:
            raise CheckpointError(
                f"{path} has {seen} bytes, expected {expected}: {rows} rows of {width} {self.dtype} values. Was it "
                "cut, or is it the table of another model?"
            )

    def chunks(self) -> Iterator[tuple[int, Array]]:
        """The matrix in blocks (first row, [n, width]) of at most 16 MiB, from the first row to the last.

        Raises:
            CheckpointError: the file cannot be read, or became shorter.
        """
        rows, width = self.shape
        step = max(1, BLOCK_BYTES // max(1, width * self.dtype.itemsize))
        try:
            with self.path.open("rb") as file:
                for first in range(0, rows, step):
                    count = min(step, rows - first) * width
                    block = np.fromfile(file, self.dtype.newbyteorder("<"), count)
                    if len(block) != count:
                        raise CheckpointError(f"{self.path} became shorter while it was read.")
                    yield first, block.reshape(-1, width).astype(self.dtype, copy=False)
        except OSError as err:
            raise CheckpointError(f"cannot read {self.path}: {err}.") from err
