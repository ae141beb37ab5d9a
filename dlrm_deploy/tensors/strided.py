"""Strided values read from their place in a file: a contiguous block in one read, anything else in runs."""

from __future__ import annotations

import io

import numpy as np

from dlrm_deploy.errors import CheckpointError
from dlrm_deploy.tensors.store import Array

_SMALL_READ = 1 << 16


class StridedReader:
    """Reads strided values of one dtype from a place in a file."""

    def __init__(self, file: io.FileIO, start: int, dtype: str, label: str) -> None:
        self._file = file
        self._start = start
        self._is_bfloat16 = dtype == "bfloat16"
        self._stored = np.dtype({"bfloat16": "<u2", "bool": "u1"}.get(dtype, dtype)).newbyteorder("<")
        self._direct = dtype not in ("bfloat16", "bool")
        self._label = label

    def gather(self, offset: int, strides: tuple[int, ...], out: Array) -> None:
        """Fill `out` with the values at `offset` and `strides`, both counted in values."""
        if out.size == 0:
            return
        if self._direct and out.flags.c_contiguous and _is_contiguous(out.shape, strides):
            self._read(offset, out.reshape(-1))
            return
        extents = [(size - 1) * step for size, step in zip(out.shape, strides, strict=True)]
        span = 1 + sum(extents)
        if span * self._stored.itemsize <= max(2 * out.size * self._stored.itemsize, _SMALL_READ):
            raw = np.empty(span, self._stored)
            self._read(offset, raw)
            steps = tuple(step * self._stored.itemsize for step in strides)
            self._convert(np.lib.stride_tricks.as_strided(raw, out.shape, steps, writeable=False), out)
            return
        # Too much between the values: halve the longest way. A transposed matrix comes in runs of its columns.
        axis = extents.index(max(extents))
        half = out.shape[axis] // 2
        before = (slice(None),) * axis
        self.gather(offset, strides, out[(*before, slice(None, half))])
        self.gather(offset + half * strides[axis], strides, out[(*before, slice(half, None))])

    def _convert(self, raw: Array, out: Array) -> None:
        if self._is_bfloat16:
            bits = raw.astype(np.uint32)
            bits <<= np.uint32(16)
            out[...] = bits.view(np.float32)
        elif out.dtype == np.bool_:
            np.not_equal(raw, 0, out=out)
        else:
            out[...] = raw

    def _read(self, offset: int, values: Array) -> None:
        """Values from a place on, in one run."""
        self._file.seek(self._start + offset * self._stored.itemsize)
        left = values.view(np.uint8).data
        while left:
            count = self._file.readinto(left)
            if not count:
                raise CheckpointError(f"{self._label} is cut off: the file became shorter while it was read.")
            left = left[count:]


def _is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    expected = 1
    for size, step in zip(reversed(shape), reversed(strides), strict=True):
        if size > 1 and step != expected:
            return False
        expected *= size
    return True
