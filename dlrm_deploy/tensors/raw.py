"""A matrix stored as nothing but its numbers, as NVIDIA's DLRM stores its tables."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dlrm_deploy.errors import CheckpointError
from dlrm_deploy.tensors.store import Array


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

    def read_into(self, first_row: int, out: Array) -> None:
        """Fill `out` [n, width] with the rows from `first_row` on, which the matrix has.

        Raises:
            CheckpointError: the file cannot be read, or became shorter.
        """
        try:
            with self.path.open("rb") as file:
                file.seek(first_row * self.shape[1] * self.dtype.itemsize)
                values = np.fromfile(file, self.dtype.newbyteorder("<"), out.size)
        except OSError as err:
            raise CheckpointError(f"cannot read {self.path}: {err}.") from err
        if values.size != out.size:
            raise CheckpointError(f"{self.path} became shorter while it was read.")
        out[...] = values.reshape(out.shape)
