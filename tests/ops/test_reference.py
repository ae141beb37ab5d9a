"""The NumPy reference against loops over single ids."""

from fractions import Fraction

import numpy as np
import pytest

from dlrm_deploy.errors import BatchError
from dlrm_deploy.formats import ROW_FORMATS, decode, encode, from_bf16, to_bf16
from dlrm_deploy.ops.reference import (
    dot_interaction,
    embedding_bag_dot_interaction,
    mlp,
    table_batched_embedding_bag,
)

WEIGHTS = np.arange(12, dtype=np.float32).reshape(6, 2)  # table a: rows 0 to 3, table b: rows 4 and 5
TWO_TABLES = {"num_features": 2, "features": [0, 1], "row_starts": [0, 4], "rows": [4, 2], "mean": [0, 0]}


def ids(*values, dtype=np.int64):
    return np.array(values, dtype)


def pool(indices, offsets, weights=WEIGHTS, **changes):
    return table_batched_embedding_bag(weights, indices, offsets, **{**TWO_TABLES, **changes})


def one_by_one(weights, indices, offsets, *, num_features, features, row_starts, rows, mean):
    batch_size = (len(offsets) - 1) // num_features
    pooled = np.zeros((batch_size, len(features), weights.shape[1]), np.float32)
    for b in range(batch_size):
        for t, feature in enumerate(features):
            bag = feature * batch_size + b
            for i in range(offsets[bag], offsets[bag + 1]):
                for d in range(weights.shape[1]):
                    pooled[b, t, d] = np.float32(pooled[b, t, d] + weights[row_starts[t] + indices[i], d])
            if mean[t] and offsets[bag + 1] > offsets[bag]:
                pooled[b, t] /= np.float32(offsets[bag + 1] - offsets[bag])
    return pooled


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_pools_like_a_loop_over_single_ids_bit_for_bit(dtype):
    rng = np.random.default_rng(1)
    weights = rng.normal(size=(6, 3)).astype(np.float32)
    lengths = rng.integers(0, 9, 2 * 5)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(dtype)
    counts = lengths.reshape(2, 5).sum(axis=1)
    indices = np.concatenate([rng.integers(0, 4, counts[0]), rng.integers(0, 2, counts[1])]).astype(dtype)
    # Slots out of order, one feature twice, one table read by two slots.
    slots = {
        "num_features": 2,
        "features": [1, 0, 1],
        "row_starts": [4, 0, 0],
        "rows": [2, 4, 4],
        "mean": [1, 0, 0],
    }
    actual = table_batched_embedding_bag(weights, indices, offsets, **slots)
    np.testing.assert_array_equal(actual, one_by_one(weights, indices, offsets, **slots))


def test_empty_bags_and_empty_batches_give_zeros():
    pooled = pool(ids(1), ids(0, 0, 1, 1, 1), mean=[1, 1])
    np.testing.assert_array_equal(pooled, [[[0, 0], [0, 0]], [[2, 3], [0, 0]]])
    assert pool(ids(), ids(0)).shape == (0, 2, 2)


def test_fixed_form_is_the_csr_form_without_offsets():
    indices = ids(0, 1, 2, 3, 1, 0)
    fixed = pool(indices, None, pooling_factors=[2, 1])
    np.testing.assert_array_equal(fixed, pool(indices, ids(0, 2, 4, 5, 6)))
    assert pool(ids(), None, pooling_factors=[2, 1]).shape == (0, 2, 2)


def test_each_row_is_multiplied_by_its_weight_before_it_is_added():
    weighted = pool(ids(1, 1, 0), ids(0, 2, 3), per_sample_weights=np.array([2, 0.5, -1], np.float32))
    np.testing.assert_array_equal(weighted, [[[5, 7.5], [-8, -9]]])


def test_rows_are_rounded_after_each_step():
    # 1e8 + 1 rounds to 1e8 in float32, so the order of additions shows.
    weights = np.array([[1e8], [1], [-1e8]], np.float32)
    slot = {"num_features": 1, "features": [0], "row_starts": [0], "rows": [3], "mean": [0]}
    assert table_batched_embedding_bag(weights, ids(0, 1, 2), ids(0, 3), **slot).item() == 0
    assert table_batched_embedding_bag(weights, ids(0, 2, 1), ids(0, 3), **slot).item() == 1


def test_policies_map_ids_that_are_out_of_range():
    indices, offsets = ids(-1, 5, 4, 1, 2), ids(0, 3, 5)
    a, b = WEIGHTS[:4], WEIGHTS[4:]
    np.testing.assert_array_equal(pool(indices, offsets, index_policy="clamp"), [[a[0] + 2 * a[3], 2 * b[1]]])
    np.testing.assert_array_equal(pool(indices, offsets, index_policy="modulo"), [[a[3] + a[1] + a[0], b[1] + b[0]]])
    np.testing.assert_array_equal(
        pool(indices, offsets, index_policy="zero", mean=[0, 1]), [[[0, 0], b[1] / 2]]
    )  # the dropped id still counts in the divisor


def test_zero_policy_drops_nan_weights_of_ids_outside_and_keeps_those_inside():
    weights = np.array([np.nan, 1, np.inf], np.float32)
    pooled = pool(ids(9, 0, 1), ids(0, 2, 3), index_policy="zero", per_sample_weights=weights)
    np.testing.assert_array_equal(pooled, [[[0, 1], [np.inf, np.inf]]])


def test_nan_rows_stay_in_their_own_bag():
    weights = WEIGHTS.copy()
    weights[0] = np.nan
    pooled = pool(ids(0, 1, 0, 0), ids(0, 1, 2, 3, 4), weights=weights)
    assert np.isnan(pooled[0, 0]).all()
    assert np.isfinite(pooled[1]).all()
    assert np.isfinite(pooled[0, 1]).all()


def test_error_policy_names_the_first_bad_id_by_position():
    with pytest.raises(BatchError, match=r"feature 'genre', sample 1, position 1 of its bag: id 4 is outside \[0, 4\)"):
        pool(ids(0, 1, 4, 7, -1), ids(0, 1, 3, 4, 5), feature_names=["genre", "item"])
    with pytest.raises(BatchError, match=r"feature 1, sample 0, position 0 of its bag: id -2 is outside \[0, 2\)"):
        pool(ids(0, -2), ids(0, 1, 2), features=[1, 1], row_starts=[4, 0], rows=[2, 4])


def test_ids_of_features_that_no_slot_pools_are_not_looked_at():
    pooled = pool(ids(99, 1), ids(0, 1, 2), features=[1], row_starts=[4], rows=[2], mean=[0])
    np.testing.assert_array_equal(pooled, [[WEIGHTS[5]]])


def rows_read(values, *, rows, policy="error", dtype=np.int64, **slot):
    """The row that each id reads, of one slot; -1 where a row of zeros is read."""
    table = np.arange(1, rows + 1, dtype=np.float32)[:, None]
    attributes = {name: [value] for name, value in slot.items()}
    pooled = table_batched_embedding_bag(
        table, ids(*values, dtype=dtype), None,
        num_features=1, features=[0], row_starts=[0], rows=[rows], mean=[0], pooling_factors=[1],
        index_policy=policy, **attributes,
    )  # fmt: skip
    return (pooled[:, 0, 0].astype(int) - 1).tolist()


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_digits_of_an_id_choose_the_rows_of_its_parts(dtype):
    values = range(60)
    digits = [rows_read(values, rows=rows, ids=60, divisors=d, dtype=dtype) for rows, d in ((3, 20), (4, 5), (5, 1))]
    assert [20 * a + 5 * b + c for a, b, c in zip(*digits, strict=True)] == list(values)


def test_chinese_remainders_tell_all_ids_apart():
    a, b = (rows_read(range(12), rows=rows, ids=12) for rows in (3, 4))
    assert a == [i % 3 for i in range(12)]
    assert len(set(zip(a, b, strict=True))) == 12


def test_hashed_ids_share_rows():
    assert rows_read([0, 6, 7, 2**62 - 1], rows=7, ids=2**62) == [0, 6, 0, (2**62 - 1) % 7]


def test_exact_quotients_are_those_of_whole_numbers_of_any_size():
    divisor, rows = 2**57 + 3, 11
    values = [0, 1, 2**53 + 1, divisor - 1, divisor, 3 * divisor - 1, 3 * divisor, 2**62 - 1]
    expected = [value // divisor % rows for value in values]
    assert rows_read(values, rows=rows, ids=2**62, divisors=divisor) == expected


def test_float32_quotients_round_the_id_and_the_division():
    # 2^25 - 1 rounds to 2^25. 41 times the float32 next to 1 / 41 rounds to the number below 1.
    assert rows_read([2**25 - 1], rows=4, ids=2**26, divisors=2**24, divisions=0) == [1]
    assert rows_read([2**25 - 1], rows=4, ids=2**26, divisors=2**24, divisions=1) == [2]
    assert rows_read([40, 41, 42], rows=4, ids=164, divisors=41, divisions=1) == [0, 1, 1]
    assert rows_read([40, 41, 42], rows=4, ids=164, divisors=41, divisions=2) == [0, 0, 1]


def test_a_float32_quotient_beyond_the_rows_reads_the_last_row():
    for division in (1, 2):
        assert rows_read([7, 8, 9, 2**62 - 1], rows=3, ids=2**62, divisors=3, divisions=division) == [2, 2, 2, 2]


def test_a_divisor_is_rounded_to_float32_once():
    divisor = 2**60 + 2**36 + 1  # just above the middle of two float32 numbers, and on it when rounded to float64
    assert rows_read([2**60, divisor], rows=3, ids=2**61, divisors=divisor, divisions=1) == [0, 1]


def test_a_modulus_makes_every_id_valid_and_comes_before_the_quotient():
    values = [-1, -7, 6, 7, 12, 2**63 - 1, -(2**63)]
    assert rows_read(values, rows=7, moduli=7) == [value % 7 for value in values]
    assert rows_read(values, rows=3, ids=7, moduli=7, divisors=3) == [value % 7 // 3 for value in values]


def test_policies_look_at_ids_not_at_rows():
    slot = {"rows": 3, "ids": 9, "divisors": 3}
    assert rows_read([-1, 9, 8, -10], policy="clamp", **slot) == [0, 2, 2, 0]
    assert rows_read([-1, 9, 8, -10], policy="modulo", **slot) == [2, 0, 2, 2]
    assert rows_read([-1, 9, 8, -10], policy="zero", **slot) == [-1, -1, 2, -1]
    with pytest.raises(BatchError, match=r"id 9 is outside \[0, 9\)"):
        rows_read([8, 9], **slot)


def test_the_error_names_the_id_as_it_was_given_and_the_slot_with_the_fewest_ids():
    slots = {"features": [0, 0, 0], "row_starts": [0, 0, 0], "rows": [2, 2, 2], "mean": [0, 0, 0]}
    given, factors = ids(1, 25), [1]
    with pytest.raises(BatchError, match=r"sample 1, position 0 of its bag: id 25 is outside \[0, 6\)"):
        table_batched_embedding_bag(
            WEIGHTS, given, None, num_features=1, **slots, pooling_factors=factors, ids=[8, 6, 4], moduli=[0, 0, 3]
        )
    with pytest.raises(BatchError, match=r"sample 1, position 0 of its bag: id 25 is outside \[0, 4\)"):
        table_batched_embedding_bag(
            WEIGHTS, given, None, num_features=1, **slots, pooling_factors=factors, ids=[8, 6, 4], moduli=[0, 0, 20]
        )


@pytest.mark.parametrize("self_interaction", [False, True])
def test_products_follow_the_lower_triangle_row_by_row(self_interaction):
    dense = np.array([[1, 2]], np.float32)
    embeddings = np.array([[[3, 4], [5, 6]]], np.float32)
    expected = [1, 2, 11, 17, 39] if not self_interaction else [1, 2, 5, 11, 25, 17, 39, 61]
    np.testing.assert_array_equal(dot_interaction(dense, embeddings, self_interaction=self_interaction), [expected])


def test_interaction_takes_no_embeddings_and_no_samples():
    dense = np.ones((2, 3), np.float32)
    np.testing.assert_array_equal(dot_interaction(dense, np.ones((2, 0, 3), np.float32)), dense)
    assert dot_interaction(dense[:0], np.ones((0, 4, 3), np.float32)).shape == (0, 3 + 10)


def test_each_slot_reads_the_matrix_of_its_format():
    rng = np.random.default_rng(2)
    rows = rng.standard_normal((len(ROW_FORMATS), 6, 5)).astype(np.float32)
    slots = {"num_features": 1, "features": [0] * 5, "row_starts": [1] * 5, "rows": [5] * 5, "mean": [0, 1, 0, 1, 0]}
    order = [3, 0, 4, 2, 1]
    stored = {format: encode(format, rows[f]) for f, format in enumerate(ROW_FORMATS)}
    given, offsets = ids(0, 4, 4, 2), ids(0, 1, 1, 4)
    pooled = table_batched_embedding_bag(stored, given, offsets, **slots, formats=order, width=5)
    assert pooled.shape == (3, 5, 5)
    for t, f in enumerate(order):
        values = decode(ROW_FORMATS[f], stored[ROW_FORMATS[f]], 5)
        one = {**slots, "features": [0], "row_starts": [1], "rows": [5], "mean": slots["mean"][t : t + 1]}
        np.testing.assert_array_equal(pooled[:, t], table_batched_embedding_bag(values, given, offsets, **one)[:, 0])
    assert not np.array_equal(pooled[:, 0], pooled[:, 2])


def test_nan_of_a_stored_row_stays_in_its_bag():
    rows = np.ones((3, 4), np.float32)
    rows[1, 2] = np.nan
    slot = {"num_features": 1, "features": [0], "row_starts": [0], "rows": [3], "mean": [0], "width": 4}
    for number, format in ((1, "fp16"), (2, "bf16")):
        pooled = table_batched_embedding_bag(
            {format: encode(format, rows)}, ids(0, 1, 2, 0), ids(0, 2, 4), **slot, formats=[number]
        )
        assert np.isnan(pooled[:, 0]).tolist() == [[False, False, True, False], [False] * 4]


def test_fused_is_pooling_then_interaction():
    rng = np.random.default_rng(3)
    dense = rng.standard_normal((2, 2)).astype(np.float32)
    bags = (WEIGHTS, ids(0, 3, 1, 0), ids(0, 2, 2, 3, 4))
    for self_interaction in (False, True):
        interactions, pooled = embedding_bag_dot_interaction(
            dense, *bags, self_interaction=self_interaction, **TWO_TABLES
        )
        np.testing.assert_array_equal(pooled, table_batched_embedding_bag(*bags, **TWO_TABLES))
        expected = dot_interaction(dense, pooled, self_interaction=self_interaction)
        np.testing.assert_array_equal(interactions, expected)


def nearest_float32(exact: Fraction) -> np.float32:
    """The nearest float32, ties to even."""
    guess = np.float32(float(exact))
    near = [np.nextafter(guess, np.float32(-np.inf)), guess, np.nextafter(guess, np.float32(np.inf))]
    distance = {value: abs(Fraction(float(value)) - exact) for value in near}
    best = min(distance.values())
    closest = [value for value in near if distance[value] == best]
    return next((value for value in closest if value.view(np.uint32) % 2 == 0), closest[0])


def test_mlp_adds_products_one_by_one_with_one_rounding_each():
    rng = np.random.default_rng(4)
    sizes = np.exp2(rng.integers(-45, 45, (6, 40)))  # sums far longer than the 53 bits of a float64
    x = (rng.standard_normal((6, 40)) * sizes).astype(np.float32)
    weight = to_bf16((rng.standard_normal((3, 40)) * np.exp2(rng.integers(-45, 45, (3, 40)))).astype(np.float32))
    bias = rng.standard_normal(3).astype(np.float32)
    x_rounded, weight_values = from_bf16(to_bf16(x)), from_bf16(weight)
    expected = np.zeros((6, 3), np.float32)
    for b in range(6):
        for n in range(3):
            total = np.float32(0)
            for k in range(40):
                product = Fraction(float(x_rounded[b, k])) * Fraction(float(weight_values[n, k]))
                total = nearest_float32(Fraction(float(total)) + product)
            expected[b, n] = total + bias[n]
    np.testing.assert_array_equal(mlp(x, [(weight, bias)], relu_last=False), expected)


def test_mlp_rounds_the_inputs_of_every_layer_to_the_nearest_bfloat16():
    one, zero = to_bf16(np.ones((1, 1), np.float32)), np.zeros(1, np.float32)
    x = np.array([[1 + 2**-8], [1 + 3 * 2**-8], [1 + 2**-8 + 2**-20]], np.float32)
    assert mlp(x, [(one, zero)]).ravel().tolist() == [1, 1 + 2**-6, 1 + 2**-7]
    shifted = [(one, np.array([2**-8], np.float32)), (one, zero)]
    assert mlp(np.ones((1, 1), np.float32), shifted).item() == 1
    assert mlp(np.ones((1, 1), np.float32), shifted[:1]).item() == 1 + 2**-8  # outputs are not rounded


def test_mlp_has_a_relu_behind_each_layer_and_the_last_one_where_asked():
    minus, bias = to_bf16(np.full((1, 1), -1, np.float32)), np.zeros(1, np.float32)
    x = np.array([[2], [-3], [np.nan], [np.inf], [-np.inf]], np.float32)
    np.testing.assert_array_equal(mlp(x, [(minus, bias)]).ravel(), [0, 3, np.nan, 0, np.inf])
    np.testing.assert_array_equal(mlp(x, [(minus, bias)] * 2).ravel(), [0, 0, np.nan, 0, 0])
    unclipped = mlp(x, [(minus, bias)] * 2, relu_last=False).ravel()
    np.testing.assert_array_equal(unclipped, [0, -3, np.nan, 0, -np.inf])


def test_mlp_takes_no_samples():
    layers = [(to_bf16(np.ones((4, 3), np.float32)), np.zeros(4, np.float32))]
    assert mlp(np.ones((0, 3), np.float32), layers).shape == (0, 4)
