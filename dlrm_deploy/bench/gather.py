"""How fast given rows of a mapped table can be read right now: `native/include/dlrm_deploy/gather_rows.h` for NumPy."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dlrm_deploy.batch import Batch
from dlrm_deploy.config import ModelConfig
from dlrm_deploy.engines.library import library_path
from dlrm_deploy.errors import EngineError
from dlrm_deploy.formats import GroupLayout, RowFormat

MOST_ROWS = 1 << 22
"""Rows that are read, at most: 4 bytes each to name them."""

_PAGE_BYTES = 4096


class GatherRows(NamedTuple):
    """Rows for the gather calibration: which ones, of how many bytes, in a table that begins where `memory` does."""

    memory: npt.NDArray[np.uint8]
    """Bytes of the whole table, mapped."""

    row_bytes: int
    rows: npt.NDArray[np.uint32]
    """In the order in which they are read."""


def at_random(what: GatherRows) -> GatherRows:
    """As many rows as `MOST_ROWS`, anywhere in the same table, each row alike."""
    rows = np.random.default_rng(0).integers(0, what.memory.size // what.row_bytes, MOST_ROWS, dtype=np.uint32)
    return GatherRows(what.memory, what.row_bytes, rows)


def touch_pages(array: npt.NDArray[np.generic]) -> None:
    """Read something of every page of an array, so that later reads of a mapping cost no page faults."""
    array.reshape(-1).view(np.uint8)[::_PAGE_BYTES].sum(dtype=np.int64)


@cache
def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(library_path()))
        library.dlrm_deploy_last_error.restype = ctypes.c_char_p
        library.dlrm_deploy_calibrate_gather_rows.argtypes = (
            ctypes.c_void_p,
            ctypes.c_int64,
            ctypes.c_int64,
            np.ctypeslib.ndpointer(np.uint32, ndim=1, flags="C_CONTIGUOUS"),
            ctypes.c_int64,
            ctypes.c_int32,
            ctypes.c_double,
            ctypes.POINTER(ctypes.c_double),
        )
    except (OSError, AttributeError) as err:  # AttributeError: a library of an earlier release
        raise EngineError(f"cannot load the native library: {err}. Run `make build`.") from err
    return library


def calibrate_gather_rows(what: GatherRows, threads: int, milliseconds: float) -> float:
    """GB/s of row bytes, each thread reading its share of the rows with prefetch: the floor of an embedding bag.

    Raises:
        EngineError: a row outside the table, no row, or the native library is not there.
    """
    result = ctypes.c_double()
    status = _library().dlrm_deploy_calibrate_gather_rows(
        what.memory.ctypes.data,
        what.memory.size,
        what.row_bytes,
        what.rows,
        what.rows.size,
        threads,
        milliseconds,
        ctypes.byref(result),
    )
    if status:
        message: bytes = _library().dlrm_deploy_last_error()
        raise EngineError(f"calibration failed: {message.decode()}.")
    return result.value


def gather_rows(
    config: ModelConfig,
    formats: Mapping[str, RowFormat],
    matrices: Sequence[Mapping[RowFormat, npt.NDArray[Any]]],
    batches: Sequence[Batch],
) -> list[GatherRows]:
    """The very rows that these batches read, for each table group and row format.

    Rows of a format that is not stored here are read from the beginning of the group's fp32 matrix: a table of as many
    rows, as far apart as theirs, whatever the bytes in them.

    Args:
        config: the model.
        formats: row format of each table part that is not fp32.
        matrices: what is stored of each of `config.groups`, mapped (`Bundle.map_groups`).
        batches: read until they name `MOST_ROWS` rows.
    """
    found = []
    for group, mapped in zip(config.groups, matrices, strict=True):
        layout = GroupLayout.of(group, formats)
        places = [(slot, *layout.place(slot.part.name)) for slot in group.slots]
        for stored in layout.matrices:
            slots = [(slot, start) for slot, kind, start in places if kind == stored.format]
            pieces: list[npt.NDArray[np.uint32]] = []
            count = 0
            for batch in batches:
                ends = batch.offsets[:: batch.batch_size].astype(np.int64)
                for slot, start in slots:
                    ids = batch.indices[ends[slot.feature] : ends[slot.feature + 1]].astype(np.int64)
                    modulo = config.features[slot.feature].modulo
                    if modulo:
                        ids %= modulo
                    pieces.append((start + ids // slot.part.divisor % slot.part.rows).astype(np.uint32))
                    count += ids.size
                if count >= MOST_ROWS:
                    break
            if count and stored.rows < 2**32:
                matrix = mapped[stored.format if stored.format in mapped else "fp32"]
                memory = matrix.reshape(-1).view(np.uint8)[: stored.rows * stored.row_bytes]
                within = np.uint32(memory.size // stored.row_bytes)  # rows of tiny widths may be larger than in fp32
                found.append(GatherRows(memory, stored.row_bytes, np.concatenate(pieces) % within))
    return found
