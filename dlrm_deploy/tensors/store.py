"""What every reader of a checkpoint's tensors offers: names, shapes, dtypes, and the values in blocks of whole rows.

Tables of 100 GB pass through in blocks, so a reader holds about `BLOCK_BYTES` at a time. `read` gives a whole tensor
and is for the small ones.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dlrm_deploy.errors import CheckpointError

Array = npt.NDArray[Any]

BLOCK_BYTES = 1 << 24
"""Most bytes of a block, unless one row has more."""

ITEM_BYTES: Mapping[str, int] = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint64": 8,
    "uint32": 4,
    "uint16": 2,
    "uint8": 1,
    "bool": 1,
    "complex64": 8,
    "complex128": 16,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
}
"""Bytes of a stored value, by torch's name of its dtype."""


class TensorStore(ABC):
    """Named tensors in a file or folder. Nothing is kept open or in memory."""

    path: Path
    kind: str
    """What it is, for messages: "a torch.save file"."""

    @abstractmethod
    def keys(self) -> tuple[str, ...]:
        """The names of all tensors: the keys that lead to one, joined with dots."""

    @abstractmethod
    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of a tensor.

        Raises:
            CheckpointError: there is no such key.
        """

    @abstractmethod
    def dtype(self, key: str) -> str:
        """The dtype in which a tensor is stored, such as "float32" or "bfloat16".

        Raises:
            CheckpointError: there is no such key.
        """

    @abstractmethod
    def read_into(self, key: str, first_row: int, out: Array) -> None:
        """Fill `out` with rows of a tensor.

        Args:
            key: name of the tensor.
            first_row: the row at which to start.
            out: [n, *shape[1:]] in the dtype that `read` gives; a tensor without dimensions counts as one row, [1].

        Raises:
            CheckpointError: as `read`.
        """

    @abstractmethod
    def verify(self) -> None:
        """Read everything once and compare it with the checksums that were stored with it, where there are any.

        Raises:
            CheckpointError: something was altered since it was written, or a file is missing or cut.
        """

    def _row_starts(self, key: str) -> Sequence[int]:
        """Rows at which a block should start, rising; the first is 0."""
        return (0,)

    def read(self, key: str) -> Array:
        """A whole tensor in its own dtype; bfloat16 becomes float32. Memory: the tensor and one block.

        Raises:
            CheckpointError: there is no such key, or the file is missing, cut or damaged there.
        """
        shape = self.shape(key)
        whole = self._empty(key, shape)
        rows = whole.reshape(shape or (1,))
        for first, count in self._blocks(key):
            self.read_into(key, first, rows[first : first + count])
        return whole

    def chunks(self, key: str) -> Iterator[tuple[int, Array]]:
        """The tensor from the first row to the last in blocks (first row, [n, *shape[1:]]), in the dtype of `read`.

        There is at least one block; that of a tensor without dimensions has none either. A block is new each time and
        belongs to the caller.

        Raises:
            CheckpointError: as `read`.
        """
        shape = self.shape(key)
        for first, count in self._blocks(key):
            block = self._empty(key, (count, *shape[1:]))
            self.read_into(key, first, block)
            yield first, block if shape else block.reshape(())

    def describe(self) -> str:
        """What this is and holds, in one line, for messages."""
        keys = self.keys()
        names = ", ".join(key or "(without a name)" for key in keys[:3])
        return f"{self.kind} with {len(keys)} tensors: {names or 'none'}{', ...' if len(keys) > 3 else ''}"

    def _blocks(self, key: str) -> Iterator[tuple[int, int]]:
        """The blocks of a tensor: (first row, number of rows)."""
        rows, *rest = self.shape(key) or (1,)
        row_bytes = math.prod(rest) * self._numpy_dtype(key).itemsize
        step = max(1, BLOCK_BYTES // max(1, row_bytes))
        starts = self._row_starts(key)
        for start, end in zip(starts, (*starts[1:], rows), strict=True):
            for first in range(start, end, step) or (start,):
                yield first, min(step, end - first)

    def _empty(self, key: str, shape: tuple[int, ...]) -> Array:
        try:
            return np.empty(shape, self._numpy_dtype(key))
        except (MemoryError, ValueError, OverflowError) as err:
            raise CheckpointError(f"{self.path}: {key} is {list(shape)}, more than fits into memory.") from err

    def _numpy_dtype(self, key: str) -> np.dtype[Any]:
        name = self.dtype(key)
        if name.startswith("float8"):
            raise CheckpointError(f"{self.path}: {key} is {name}, which is not read here. Save it as float32.")
        return np.dtype("float32" if name == "bfloat16" else name)

    def _no_tensor(self, key: str) -> CheckpointError:
        keys = self.keys()
        near = [known for known in keys if known.rpartition(".")[2] == key.rpartition(".")[2]]
        names = ", ".join((near or list(keys))[:3]) or "none"
        return CheckpointError(f"{self.path} holds no tensor {key}. It holds {len(keys)}, such as {names}.")
