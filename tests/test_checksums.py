from dataclasses import replace

import numpy as np
import pytest
from bundles import CONFIGS

from dlrm_deploy.checksums import BLOCK_ROWS, RowChecksums, altered_rows, altered_weights, weight_checksum
from dlrm_deploy.export.bundle import export_bundle
from dlrm_deploy.export.sources import RandomSource


@pytest.mark.parametrize("pieces", [[2500], [1, 2499], [1023, 2, 1475], [1024, 1024, 452], [7] * 357 + [1]])
def test_checksums_do_not_depend_on_how_rows_arrive(pieces):
    rows = np.random.default_rng(0).standard_normal((2500, 3), np.float32)
    whole, split = RowChecksums(), RowChecksums()
    whole.add(rows)
    for start, count in zip(np.cumsum([0, *pieces]), pieces, strict=False):
        split.add(rows[start : start + count])
    assert len(whole.finish()) == 3
    np.testing.assert_array_equal(split.finish(), whole.finish())


def test_rows_that_are_not_contiguous_have_the_same_checksum():
    rows = np.random.default_rng(0).standard_normal((10, 6), np.float32)
    one, other = RowChecksums(), RowChecksums()
    one.add(rows[:, ::2])
    other.add(rows[:, ::2].copy())
    np.testing.assert_array_equal(one.finish(), other.finish())


def test_an_exported_bundle_is_as_it_was(any_bundle):
    assert list(altered_rows(any_bundle)) == []
    assert list(altered_weights(any_bundle)) == []


def test_changed_values_are_placed_in_their_table_and_runs_of_blocks(tmp_path):
    config = CONFIGS["dot"]
    tables = tuple(replace(table, rows=5 * BLOCK_ROWS + 7) for table in config.tables)
    bundle = export_bundle(RandomSource(replace(config, tables=tables)), tmp_path / "bundle")
    (group,) = bundle.config.groups
    start = group.rows_of("t_b").start
    matrix = np.memmap(bundle.path / "tables/width8.bin", np.float32, "r+", shape=(group.rows, 8))
    for row in (BLOCK_ROWS, 3 * BLOCK_ROWS - 1, 5 * BLOCK_ROWS + 6):  # blocks 1 and 2, and the last one, which is short
        matrix[start + row, 5] += 1e-3
    matrix.flush()
    assert list(altered_rows(bundle)) == [
        ("t_b", BLOCK_ROWS, 3 * BLOCK_ROWS - 1),
        ("t_b", 5 * BLOCK_ROWS, 5 * BLOCK_ROWS + 6),
    ]


def test_a_weights_shape_counts():
    weight = np.arange(6, dtype=np.float32)
    assert weight_checksum(weight.reshape(2, 3)) != weight_checksum(weight.reshape(3, 2))
