"""What each kind of table stores and reads."""

from itertools import product

import numpy as np
import pytest

from dlrm_deploy.config import FeatureConfig, ModelConfig
from dlrm_deploy.errors import ConfigError
from dlrm_deploy.tables import TableConfig


def table(**changes):
    return TableConfig(**{"name": "t", "rows": 60, "width": 4, **changes})


def rows_read(config, ids):
    """[ids, parts]: the row of each part that an id reads."""
    return np.stack([ids // part.divisor % part.rows for part in config.parts], axis=1)


def test_a_plain_table_stores_a_row_per_id():
    (part,) = table().parts
    assert (part.name, part.rows, part.width, part.ids, part.divisor) == ("t", 60, 4, 60, 1)
    assert table().parameters == 240


def test_a_hashed_table_stores_fewer_rows_than_ids():
    config = table(partition="hash", part_rows=(7,))
    assert config.parameters == 28
    np.testing.assert_array_equal(rows_read(config, np.array([0, 6, 7, 59]))[:, 0], [0, 6, 0, 3])


@pytest.mark.parametrize("part_rows", [(15, 4), (60, 1), (4, 4, 4), (2, 3, 2, 5)])
def test_quotient_remainder_parts_are_the_digits_of_the_id(part_rows):
    ids = np.arange(60)
    rows = rows_read(table(partition="quotient-remainder", part_rows=part_rows), ids)
    expected = np.stack(np.unravel_index(ids, part_rows), axis=1)
    np.testing.assert_array_equal(rows, expected)


@pytest.mark.parametrize(
    ("partition", "part_rows"),
    [("quotient-remainder", (15, 4)), ("quotient-remainder", (3, 4, 5)), ("chinese-remainder", (3, 4, 5))],
)
def test_complementary_partitions_give_each_id_rows_of_its_own(partition, part_rows):
    rows = rows_read(table(partition=partition, part_rows=part_rows), np.arange(60))
    assert sorted(map(tuple, rows)) == sorted(product(*map(range, part_rows)))


def test_parts_are_as_wide_as_their_combination_needs():
    def widths(**changes):
        return [part.width for part in table(partition="quotient-remainder", part_rows=(15, 4), **changes).parts]

    assert widths(combine="multiply") == [4, 4]
    assert widths(combine="concat") == [2, 2]
    assert widths(combine="path", path_hidden=3) == [4, 3 * 4 + 3 + 4 * 3 + 4]
    assert table(projection=9).output_width == 9
    assert table(projection=9).parameters == 240 + 36


def test_slots_come_part_by_part_and_wide_weights_last():
    parts = table(partition="quotient-remainder", part_rows=(15, 4), width=1)
    config = ModelConfig(
        name="m",
        tables=(parts, TableConfig(name="u", rows=5, width=1)),
        features=(FeatureConfig(name="a", table="t"), FeatureConfig(name="b", table="u")),
        interaction="fm",
        wide=True,
    )
    (group,) = config.groups
    assert [part.name for part in group.parts] == ["t.0", "t.1", "u", "t.wide", "u.wide"]
    slots = [(slot.feature, slot.part.name, slot.row_start) for slot in group.slots]
    assert slots == [(0, "t.0", 0), (1, "u", 19), (0, "t.1", 15), (0, "t.wide", 24), (1, "u.wide", 84)]
    assert group.rows_of("u") == slice(19, 24)


def test_more_ids_than_any_disk_has_rows_for_are_fine_where_they_are_hashed():
    assert table(rows=1 << 62, partition="hash", part_rows=(10,)).parts[0].ids == 1 << 62


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": 0}, "rows must be a whole number of at least 1, got 0"),
        ({"rows": True}, "rows must be a whole number"),
        ({"rows": 1 << 50}, "more than any disk holds"),
        ({"rows": (1 << 62) + 1, "partition": "hash", "part_rows": (3,)}, "rows must be at most 2\\^62"),
        ({"part_rows": (3,)}, "partition full takes 0 part_rows, got \\[3\\]"),
        ({"partition": "hash"}, "partition hash takes 1 part_rows, got \\[\\]"),
        ({"partition": "quotient-remainder", "part_rows": (60,)}, "needs two or more part_rows"),
        ({"partition": "quotient-remainder", "part_rows": (7, 8)}, "60 ids need 60 combinations .* give 56"),
        ({"partition": "chinese-remainder", "part_rows": (6, 10)}, "6 and 10 have the divisor 2 in common"),
        ({"partition": "modulo"}, "partition must be one of full, hash, quotient-remainder, chinese-remainder"),
        ({"combine": "add"}, "combine belongs to partitions of several parts"),
        ({"partition": "quotient-remainder", "part_rows": (4, 4, 4), "combine": "concat"}, "not a multiple of its 3"),
        ({"partition": "quotient-remainder", "part_rows": (8, 8), "combine": "path"}, "path_hidden must be a whole"),
        ({"path_hidden": 3}, "path_hidden belongs to combine path"),
        ({"division": "float32"}, "division float32 belongs to quotient-remainder with two parts"),
        ({"projection": 0}, "projection must be a whole number of at least 1, got 0"),
        ({"part_rows": 3}, "part_rows must be a list, got 3"),
    ],
)
def test_a_table_that_cannot_be_right_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        table(**changes)
