"""Does a bundle hold what its source checkpoint holds? Every row and weight, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from dlrm_deploy.bundle import Bundle
from dlrm_deploy.errors import CheckpointError
from dlrm_deploy.export.sources import Source
from dlrm_deploy.formats import encode
from dlrm_deploy.model.keys import dense_shapes, table_shapes


def differences(bundle: Bundle, source: Source) -> Iterator[str]:
    """What differs, table part by table part and weight by weight; memory holds one block of rows at a time.

    Rows of a converted bundle are compared with what the source's rows become in their format.

    Args:
        bundle: the bundle.
        source: opened with the bundle's config, so that shapes agree.

    Raises:
        CheckpointError: the source cannot be read, or is another model.
        FormatError: a row of the source cannot be what is stored.
    """
    if (table_shapes(source.config), dense_shapes(source.config)) != (
        table_shapes(bundle.config),
        dense_shapes(bundle.config),
    ):
        raise CheckpointError(
            f"the source is another model than {bundle.path}: their tables or layers differ in name or shape. Give the "
            "checkpoint that the bundle was made from."
        )
    for part, kind, rows in bundle.stored_parts():
        wrong, first_wrong, given = 0, None, 0
        for first, block in source.part_chunks(part):
            given += len(block)
            expected = encode(
                kind, np.ascontiguousarray(block, np.float32), f"table {part.name!r} of the source", first
            )
            differs = (_bits(rows[first : first + len(block)]) != _bits(expected)).any(axis=1)
            if differs.any() and first_wrong is None:
                first_wrong = first + int(np.argmax(differs))
            wrong += int(differs.sum())
        if wrong:
            yield f"table {part.name}: {wrong} of {part.rows} rows, the first one is row {first_wrong}"
        if given != part.rows:
            yield f"table {part.name}: the source gives {given} of {part.rows} rows"
    held = bundle.dense_weights()
    for key, weight in source.dense().items():
        if key not in held or held[key].shape != weight.shape:
            yield f"weight {key}: it has another shape"
        elif wrong := int((_bits(held[key]) != _bits(weight)).reshape(-1, 4).any(axis=1).sum()):
            yield f"weight {key}: {wrong} of {weight.size} values"


def _bits(values: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """As bytes: 0.0 and -0.0 are two, and a NaN is equal to itself."""
    return np.ascontiguousarray(values).view(np.uint8)
