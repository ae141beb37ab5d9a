"""Checksums of weights, and of tables by blocks of rows: taken from what the exporter read, to find and place an error.

A file's hash says that something changed; these say which table and which rows, or which weight.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from dlrm_deploy.bundle import Bundle, read_npz

CHECKSUMS = "checksums.npz"
"""In a bundle: for each table part a uint32 array, the CRC-32 of each block of rows as they are stored, and for each
weight of `dense.npz` one of a single value."""

BLOCK_ROWS = 1024


class RowChecksums:
    """Takes the rows of one table part from first to last, in pieces of any length."""

    def __init__(self) -> None:
        self._blocks: list[int] = []
        self._crc = 0
        self._rows = 0

    def add(self, rows: npt.NDArray[Any]) -> None:
        """The next stored rows [n, ...], little-endian."""
        rows = np.ascontiguousarray(rows)
        start = 0
        while start < len(rows):
            stop = min(len(rows), start + BLOCK_ROWS - self._rows)
            self._crc = zlib.crc32(rows[start:stop].data, self._crc)
            self._rows += stop - start
            start = stop
            if self._rows == BLOCK_ROWS:
                self._end_block()

    def finish(self) -> npt.NDArray[np.uint32]:
        """[blocks]."""
        if self._rows:
            self._end_block()
        return np.array(self._blocks, np.uint32)

    def _end_block(self) -> None:
        self._blocks.append(self._crc)
        self._crc = self._rows = 0


def weight_checksum(weight: npt.NDArray[np.float32]) -> npt.NDArray[np.uint32]:
    """[1], of a whole weight and its shape."""
    crc = zlib.crc32(repr(weight.shape).encode(), zlib.crc32(np.ascontiguousarray(weight, "<f4").data))
    return np.array([crc], np.uint32)


def has_checksums(bundle: Bundle) -> bool:
    """Whether the manifest lists them. Bundles of early releases have none, and nothing is found altered in those."""
    return CHECKSUMS in bundle.manifest.files


def altered_weights(bundle: Bundle) -> Iterator[str]:
    """Keys of the weights in `dense.npz` that are not those that were exported.

    Raises:
        BundleError: the checksums or weights cannot be read.
    """
    if not has_checksums(bundle):
        return
    stored = read_npz(bundle.path / CHECKSUMS)
    for key, weight in bundle.dense_weights().items():
        if not np.array_equal(stored.get(key, np.zeros(0)), weight_checksum(weight)):
            yield key


def altered_rows(bundle: Bundle) -> Iterator[tuple[str, int, int]]:
    """Table part, first and last row of each run of blocks whose rows are not those that were exported.

    Raises:
        BundleError: the checksums cannot be read.
    """
    if not has_checksums(bundle):
        return
    stored = read_npz(bundle.path / CHECKSUMS)
    for part, _, rows in bundle.stored_parts():
        expected = stored.get(part.name, np.zeros(0, np.uint32))
        actual = [
            zlib.crc32(np.ascontiguousarray(rows[i : i + BLOCK_ROWS]).data) for i in range(0, len(rows), BLOCK_ROWS)
        ]
        if len(expected) != len(actual):
            yield part.name, 0, part.rows - 1
            continue
        different = np.flatnonzero(np.array(actual, np.uint32) != expected)
        for run in np.split(different, np.flatnonzero(np.diff(different) > 1) + 1):
            if run.size:
                yield part.name, int(run[0]) * BLOCK_ROWS, min((int(run[-1]) + 1) * BLOCK_ROWS, part.rows) - 1
