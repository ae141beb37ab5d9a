"""Table schemes: every size they choose holds all ids, and wrong schemes are refused."""

import math
import re
from itertools import combinations

import pytest

from dlrm_deploy.errors import ConfigError
from dlrm_deploy.schemes import TableScheme, balanced_sizes, coprime_sizes, mixed_width
from dlrm_deploy.tables import MAX_IDS

COUNTS = [1, 2, 3, 4, 5, 7, 8, 9, 96, 97, 99, 100, 101, 943, 1682, 10_007, 2**31 - 1, 2**40, MAX_IDS]
"""Small numbers, primes, squares and their neighbours, and the most ids of a table."""


def table(scheme, ids, width=8, others=()):
    names = {"t": ids, **{f"other{i}": count for i, count in enumerate(others)}}
    return scheme.tables(names, width)[0]


@pytest.mark.parametrize("parts", [2, 3, 5, 62])
@pytest.mark.parametrize("ids", COUNTS)
def test_balanced_sizes_are_the_least_that_hold_all_ids(ids, parts):
    sizes = balanced_sizes(ids, parts)
    assert len(sizes) == parts
    assert math.prod(sizes) >= ids
    assert sizes == tuple(sorted(sizes, reverse=True))
    assert sizes[0] - sizes[-1] <= 1
    largest = max(i for i, size in enumerate(sizes) if size == sizes[0])
    assert ids == 1 or math.prod(sizes) // sizes[0] * (sizes[largest] - 1) < ids


@pytest.mark.parametrize("parts", [2, 3, 5])
@pytest.mark.parametrize("ids", COUNTS)
def test_coprime_sizes_have_no_common_divisor_and_hold_all_ids(ids, parts):
    sizes = coprime_sizes(ids, parts)
    assert len(sizes) == parts
    assert math.prod(sizes) >= ids
    assert all(math.gcd(a, b) == 1 for a, b in combinations(sizes, 2))
    assert sum(sizes) <= sum(balanced_sizes(ids, parts)) + 2 * parts * parts


def test_sizes_of_small_tables_by_hand():
    assert [balanced_sizes(ids, 2) for ids in (1, 2, 4, 5, 6, 7)] == [(1, 1), (2, 1), (2, 2), (3, 2), (3, 2), (3, 3)]
    assert [coprime_sizes(ids, 2) for ids in (1, 2, 3, 6, 7, 12, 13)] == [
        (1, 2), (1, 2), (2, 3), (2, 3), (3, 4), (3, 4), (4, 5),
    ]  # fmt: skip
    assert coprime_sizes(944, 2) == (31, 32)
    assert coprime_sizes(1000, 3) == (10, 11, 13)  # 9 * 10 * 11 is too few, and 12 divides by 2 as 10 does


@pytest.mark.parametrize(("ids", "rows"), [(1, 1), (2, 1), (4, 1), (5, 2), (8, 2), (9, 3), (943, 236)])
def test_hash_puts_as_many_ids_on_a_row_as_asked(ids, rows):
    hashed = table(TableScheme(partition="hash", collisions=4), ids)
    assert (hashed.rows, hashed.part_rows) == (ids, (rows,))


@pytest.mark.parametrize(("ids", "quotients"), [(1, 1), (2, 1), (4, 1), (5, 2), (8, 2), (9, 3), (943, 236)])
def test_quotient_remainder_has_one_remainder_for_each_collision(ids, quotients):
    for combine in ("multiply", "add", "concat"):
        config = table(TableScheme(partition="quotient-remainder", collisions=4, combine=combine), ids)
        assert (config.part_rows, config.combine) == ((quotients, 4), combine)
    path = table(TableScheme(partition="quotient-remainder", collisions=4, combine="path", path_hidden=3), ids)
    assert [(part.rows, part.width) for part in path.parts] == [(quotients, 8), (4, 2 * 3 * 8 + 3 + 8)]


def test_parts_choose_sizes_by_partition():
    assert table(TableScheme(partition="quotient-remainder", parts=3), 1682).part_rows == (12, 12, 12)
    assert table(TableScheme(partition="chinese-remainder", parts=3), 1682).part_rows == (11, 12, 13)


@pytest.mark.parametrize(
    "scheme",
    [
        TableScheme(partition="hash", collisions=2, threshold=10),
        TableScheme(partition="quotient-remainder", parts=2, threshold=10),
        TableScheme(alpha=0.5, threshold=10),
    ],
)
def test_tables_up_to_the_threshold_stay_full(scheme):
    below, above = (table(scheme, ids, others=(1,)) for ids in (10, 11))
    assert (below.partition, below.width, below.projection) == ("full", 8, None)
    assert (above.partition, above.width) != ("full", 8)


def test_mixed_dimensions_follow_the_power_rule():
    # 32 * (4 / n)^0.5 = 32, 16, 8, 2, 0.5: the last one is held at 1.
    assert [mixed_width(ids, 4, 32, 0.5) for ids in (4, 16, 64, 1024, 16384)] == [32, 16, 8, 2, 1]
    # 32 * (4 / n)^0.5 = 23.8 and 22.2 lie on each side of 2^4.5 = 22.6.
    assert [mixed_width(ids, 4, 32, 0.5) for ids in (7.24, 8.3)] == [32, 16]
    assert mixed_width(5, 4, 24, 0.1) == 24  # rounded up to 32, and held at the full width
    assert mixed_width(3, 4, 24, 0.1) == 24
    tables = TableScheme(alpha=0.5).tables({"small": 4, "large": 1024}, 32)
    assert [(t.rows, t.width, t.projection, t.output_width) for t in tables] == [(4, 32, None, 32), (1024, 2, 32, 32)]


def test_without_keys_each_id_has_a_row():
    assert TableScheme().tables({"a": 3, "b": 1}, 4) == tuple(TableScheme(threshold=99).tables({"a": 3, "b": 1}, 4))
    assert [(t.name, t.rows, t.partition) for t in TableScheme().tables({"a": 3}, 4)] == [("a", 3, "full")]
    assert TableScheme().tables({}, 4) == ()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"partition": "modulo"}, "partition must be one of full, hash, quotient-remainder, chinese-remainder"),
        ({"partition": "hash"}, "partition hash takes collisions, got none"),
        ({"partition": "hash", "parts": 2}, "partition hash takes collisions, got parts"),
        ({"collisions": 4}, "partition full takes no sizes, got collisions"),
        ({"partition": "quotient-remainder"}, "partition quotient-remainder takes collisions or parts, got none"),
        ({"partition": "quotient-remainder", "collisions": 4, "parts": 2}, "got collisions and parts"),
        ({"partition": "chinese-remainder", "collisions": 4}, "chinese-remainder takes parts, got collisions"),
        ({"partition": "hash", "collisions": 0}, "collisions must be a whole number of at least 1, got 0"),
        ({"partition": "hash", "collisions": 2.5}, "collisions must be a whole number of at least 1, got 2.5"),
        ({"partition": "chinese-remainder", "parts": 1}, "parts must be a whole number of at least 2, got 1"),
        ({"partition": "chinese-remainder", "parts": 63}, "parts must be at most 62, got 63"),
        ({"partition": "hash", "collisions": 2, "combine": "add"}, "combine belongs to partitions of several parts"),
        ({"partition": "chinese-remainder", "parts": 2, "combine": "sum"}, "combine must be one of multiply, add"),
        ({"partition": "quotient-remainder", "parts": 2, "combine": "path"}, "path_hidden and combine path belong"),
        ({"path_hidden": 4}, "path_hidden and combine path belong"),
        ({"threshold": -1}, "threshold must be a whole number of at least 0, got -1"),
        ({"alpha": 0}, "alpha must be a number above 0 and at most 10, got 0"),
        ({"alpha": float("nan")}, "alpha must be a number above 0 and at most 10, got nan"),
        ({"alpha": "x"}, "alpha must be a number above 0 and at most 10, got 'x'"),
        ({"alpha": 0.3, "partition": "hash", "collisions": 4}, "alpha belongs to partition full, not hash"),
    ],
)  # fmt: skip
def test_wrong_schemes_are_refused(values, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        TableScheme(**values)


def test_a_width_that_the_kind_of_table_cannot_have_is_refused():
    scheme = TableScheme(partition="quotient-remainder", collisions=4, combine="concat", threshold=10)
    assert table(scheme, 10, width=7).width == 7
    with pytest.raises(ConfigError, match="width 7 is not a multiple of its 2 parts"):
        table(scheme, 11, width=7)
