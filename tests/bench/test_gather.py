from __future__ import annotations

import numpy as np
import pytest
from bundles import CONFIGS

from dlrm_deploy.batch import Batch
from dlrm_deploy.bench.gather import GatherRows, at_random, calibrate_gather_rows, gather_rows, touch_pages
from dlrm_deploy.config import FeatureConfig, ModelConfig
from dlrm_deploy.data.random import random_batch
from dlrm_deploy.errors import EngineError
from dlrm_deploy.formats import GroupLayout
from dlrm_deploy.tables import TableConfig

TWO_TABLES = ModelConfig(
    name="two",
    dense_features=("d",),
    tables=(TableConfig(name="a", rows=10, width=16), TableConfig(name="b", rows=5, width=16)),
    features=(FeatureConfig(name="a", table="a"), FeatureConfig(name="b", table="b", modulo=3)),
    bottom_mlp=(16,),
    top_mlp=(1,),
)


def memory(config: ModelConfig) -> list[dict[str, np.ndarray]]:
    return [{"fp32": np.zeros((group.rows, group.width), np.float32)} for group in config.groups]


@pytest.mark.parametrize("row_bytes", [1, 4, 7, 8, 12, 20, 64, 68, 130, 256])
@pytest.mark.parametrize("threads", [1, 3])
def test_any_size_of_row_and_fewer_rows_than_threads_have_a_rate(row_bytes, threads):
    table = np.ones(row_bytes * 7, np.uint8)  # the last row ends where the memory does
    for rows in ([6], [0, 6], list(range(7)) * 300):
        what = GatherRows(table, row_bytes, np.array(rows, np.uint32))
        assert calibrate_gather_rows(what, threads, 0.2) > 0


@pytest.mark.parametrize(
    ("rows", "row_bytes", "threads", "message"),
    [
        ([0, 7], 4, 1, r"row 7 at position 1 is outside \[0, 7\)"),
        ([], 4, 1, "count is 0, expected at least 1"),
        ([0], 29, 1, "row_bytes is 29, expected 1 to table_bytes, 28"),
        ([0], 4, 0, "threads is 0, expected 1 to 1024"),
    ],
)
def test_rows_outside_the_table_are_refused_not_read(rows, row_bytes, threads, message):
    what = GatherRows(np.ones(28, np.uint8), row_bytes, np.array(rows, np.uint32))
    with pytest.raises(EngineError, match=message):
        calibrate_gather_rows(what, threads, 0.1)


def test_the_rows_are_those_that_the_batches_read_in_their_order():
    batch = Batch.from_bags([[0.0], [0.0]], [[[1, 2], []], [[4], [0, 5]]])
    (found,) = gather_rows(TWO_TABLES, {}, memory(TWO_TABLES), [batch, batch])
    one_batch = [1, 2, 10 + 4 % 3, 10, 10 + 5 % 3]
    np.testing.assert_array_equal(found.rows, one_batch * 2)
    assert (found.row_bytes, found.memory.size) == (64, 15 * 64)


def test_random_rows_lie_anywhere_in_the_table():
    what = GatherRows(np.ones(20 * 50 + 19, np.uint8), 20, np.array([3], np.uint32))
    found = at_random(what)
    assert set(found.rows.tolist()) == set(range(50))
    assert (found.row_bytes, found.memory is what.memory, found.rows.dtype) == (20, True, np.uint32)


def test_each_format_has_rows_of_its_own_size_and_matrix():
    batch = Batch.from_bags([[0.0]], [[[1, 2]], [[1]]])
    exact, small = gather_rows(TWO_TABLES, {"b": "int8"}, memory(TWO_TABLES), [batch])
    assert (exact.row_bytes, exact.rows.tolist(), exact.memory.size) == (64, [1, 2], 10 * 64)
    assert (small.row_bytes, small.rows.tolist(), small.memory.size) == (20, [1], 5 * 20)


def test_a_stored_format_is_read_where_it_is():
    stored = np.zeros((15, 20), np.uint8)
    batch = Batch.from_bags([[0.0]], [[[1, 2]], [[1]]])
    (found,) = gather_rows(TWO_TABLES, {"a": "int8", "b": "int8"}, [{"int8": stored}], [batch])
    assert np.shares_memory(found.memory, stored)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", ["fp32", "int8", "int4"])
def test_rows_of_every_kind_of_table_lie_inside_it(name, kind):
    config = CONFIGS[name]
    formats = {} if kind == "fp32" else {part.name: kind for group in config.groups for part in group.parts}
    batch = random_batch(config, 20, np.random.default_rng(0))
    found = gather_rows(config, formats, memory(config), [batch])
    assert len(found) == sum(bool(group.slots) for group in config.groups)
    for group, part in zip((group for group in config.groups if group.slots), found, strict=True):
        (stored,) = GroupLayout.of(group, formats).matrices
        assert part.row_bytes == stored.row_bytes
        assert (int(part.rows.max()) + 1) * part.row_bytes <= part.memory.size


def test_touching_reads_arrays_of_any_type():
    for array in (np.ones((3000, 3), np.float32), np.ones((9, 68), np.uint8), np.zeros((0, 4), np.float16)):
        touch_pages(array)
