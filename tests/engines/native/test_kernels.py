"""Every kernel path, by name, against the NumPy reference."""

import ctypes
import dataclasses

import numpy as np
import pytest
from awkward import (
    MIXES,
    BagCase,
    awkward_bags,
    computed_bags,
    csr_case,
    fixed_case,
    out_of_range_bags,
    stored_bags,
    stored_case,
)
from native_calls import NativeError

from dlrm_deploy.errors import BatchError
from dlrm_deploy.ops.reference import dot_interaction


def same_bits(a, b):
    """Equal bit for bit; any NaN equals any NaN."""
    return (
        a.shape == b.shape
        and np.array_equal(
            np.where(np.isnan(a), np.float32(0), a).view(np.int32),
            np.where(np.isnan(b), np.float32(0), b).view(np.int32),
        )
        and np.array_equal(np.isnan(a), np.isnan(b))
    )


@pytest.mark.parametrize("case", awkward_bags(), ids=lambda case: case.name)
def test_every_path_pools_awkward_bags_bit_for_bit_like_the_reference(native, path, case):
    assert same_bits(native.embedding_bag(case, path), case.expected())


@pytest.mark.parametrize("case", stored_bags(), ids=lambda case: case.name)
def test_every_path_pools_stored_rows_bit_for_bit_like_the_reference(native, path, case):
    assert same_bits(native.embedding_bag(case, path, threads=2), case.expected())


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
@pytest.mark.parametrize("width", [1, 7, 16, 64])
def test_the_fused_operator_is_the_bags_and_the_interaction_bit_for_bit(native, path, mix, width):
    lengths = np.random.default_rng(width).integers(0, 9, (6, 100)).tolist()
    rows = (50, 1, 60, 2, 70, 30)
    case = stored_case(csr_case("fused", lengths, rows=rows, width=width), [mix[t % len(mix)] for t in range(6)])
    dense = np.random.default_rng(1).standard_normal((100, width)).astype(np.float32)
    for self_interaction in (False, True):
        expected = native.dot_interaction(dense, case.expected(), path, self_interaction=self_interaction)
        for threads, wanted in ((1, True), (2, False)):
            seen, pooled = native.bag_interaction(
                case, dense, path, self_interaction=self_interaction, pooled=wanted, threads=threads
            )
            assert same_bits(seen, expected)
            assert not wanted or same_bits(pooled, case.expected())


def test_the_fused_operator_refuses_dense_vectors_of_another_batch(native):
    case = csr_case("case", [[1, 2]], rows=(5,))
    with pytest.raises(NativeError, match="dense has 3 samples, expected that of the bags, 2"):
        native.bag_interaction(case, np.ones((3, 4), np.float32), "scalar")


@pytest.mark.parametrize("policy", ["clamp", "modulo", "zero"])
@pytest.mark.parametrize("kind", range(4))
def test_ids_out_of_range_follow_the_policy(native, path, policy, kind):
    case = out_of_range_bags(policy)[kind]
    assert same_bits(native.embedding_bag(case, path), case.expected())


@pytest.mark.parametrize("policy", ["error", "clamp", "modulo", "zero"])
def test_rows_are_computed_from_ids_like_the_reference_s(native, policy):
    for case in computed_bags(policy):
        expected = case.expected()
        for path in native.kernel_paths():
            assert same_bits(native.embedding_bag(case, path), expected), f"{case.name} on {path}"


def quotient_case(divisor, division):
    """One id a bag, next to multiples of the divisor; the row of 2^18 that it reads is what is pooled."""
    rows = 2**18
    k = np.random.default_rng(divisor).integers(1, rows, 20_000)
    attributes = {
        "num_features": 1, "features": (0,), "row_starts": (0,), "rows": (rows,), "ids": (rows * divisor,),
        "divisors": (divisor,), "divisions": (division,), "mean": (0,), "pooling_factors": (1,),
    }  # fmt: skip
    indices = np.concatenate([k * divisor - 1, k * divisor, k * divisor + 1])
    return BagCase("quotient", np.arange(rows, dtype=np.float32)[:, None], indices, None, attributes)


@pytest.mark.parametrize("divisor", [41, 60, 1000, 2**40 + 1])
def test_float32_quotients_are_the_reference_s(native, divisor):
    for division in (0, 1, 2):
        case = quotient_case(divisor, division)
        assert same_bits(native.embedding_bag(case, "scalar"), case.expected())
    assert not same_bits(quotient_case(divisor, 2).expected(), quotient_case(divisor, 0).expected())


@pytest.mark.parametrize("width", [1, 3, 8, 15, 16, 17, 31, 32, 33, 64, 100, 128, 200])
@pytest.mark.parametrize("weighted", [False, True])
def test_any_width_is_exact_for_one_hot_and_for_bags(native, path, width, weighted):
    options = {"rows": (40, 9), "width": width, "weighted": weighted, "seed": width}
    for case in (
        fixed_case("one_hot", [1, 1], 300, **options),
        csr_case("bags", [[3, 0, 1, 30], [2, 600, 0, 1]], **options),
    ):
        assert same_bits(native.embedding_bag(case, path), case.expected())


def test_more_empty_bags_than_a_chunk_holds_and_a_bag_longer_than_a_chunk(native, path):
    lengths = [[0] * 700 + [1000] + [0] * 300, [1] * 1001]
    case = csr_case("chunks", lengths, rows=(50, 60), mean=(1, 0), width=19)
    assert same_bits(native.embedding_bag(case, path), case.expected())


def test_threads_do_not_change_a_bit(native, path):
    rng = np.random.default_rng(5)
    lengths = rng.integers(0, 40, (6, 300)).tolist()
    case = csr_case("many", lengths, rows=(50, 60, 70, 80, 90, 100), mean=(0, 1) * 3, width=24)
    one = native.embedding_bag(case, path, threads=1)
    assert same_bits(one, case.expected())
    for _ in range(5):
        assert same_bits(native.embedding_bag(case, path, threads=2), one)


def test_a_bag_of_negative_zeros_gives_positive_zero(native, path):
    case = fixed_case("negative_zero", [1], 3, rows=(4,))
    case.weights[:] = -0.0
    assert not np.signbit(native.embedding_bag(case, path)).any()


@pytest.mark.parametrize("threads", [1, 2])
def test_the_first_bad_id_is_named_with_feature_sample_position_id_and_range(native, path, threads):
    lengths = [[2] * 5000, [1] * 5000]
    case = csr_case("bad", lengths, rows=(5, 3))
    case.indices[[14999, 7001, 9000]] = 99, -8, 5
    message = r"feature 'item', sample 3500, position 1 of its bag: id -8 is outside \[0, 5\)"
    for _ in range(3):
        with pytest.raises(NativeError, match=message):
            native.embedding_bag(case, path, threads=threads, feature_names="item\ngenre")


def test_the_message_about_a_bad_id_is_the_reference_s(native):
    for case in out_of_range_bags("error"):
        with pytest.raises(BatchError) as expected:
            case.expected()
        with pytest.raises(NativeError) as seen:
            native.embedding_bag(case, "scalar")
        assert str(seen.value) == str(expected.value)


def test_the_message_names_the_id_as_given_and_the_slot_with_the_fewest_ids(native):
    case = fixed_case("parts", [1], 4, rows=(2, 2, 2), features=(0, 0, 0))
    case.indices[:] = 1, 1, 25, 26
    for moduli in ((0, 0, 3), (0, 0, 20)):
        parts = dataclasses.replace(case, attributes=case.attributes | {"ids": (8, 6, 4), "moduli": moduli})
        with pytest.raises(BatchError) as expected:
            parts.expected()
        with pytest.raises(NativeError) as seen:
            native.embedding_bag(parts, "scalar")
        assert str(seen.value) == str(expected.value)


def test_ids_of_features_that_no_slot_pools_are_not_looked_at(native, path):
    case = csr_case("unused", [[1, 1], [2, 0]], rows=(5,), features=(0,))
    case.indices[2:] = 10**12
    assert same_bits(native.embedding_bag(case, path), case.expected())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"offsets": [1, 2, 3]}, "must begin with 0, got 1"),
        ({"offsets": [0, 4, 3]}, r"offsets\[2\] is 3 after 4 \(feature 0, sample 1\)"),
        ({"offsets": [0, 1, 2]}, "must end with the number of ids, 3, got 2"),
        ({"offsets": [0, 1, 2**40]}, "must end with the number of ids, 3"),
        ({"per_sample_weights": np.ones(2, np.float32)}, "per_sample_weights has 2 values, expected one per id: 3"),
        ({"attributes": {"rows": (6,)}}, r"reads rows \[0, 6\), but weights has 5 rows"),
        ({"attributes": {"row_starts": (2**62,)}}, r"but weights has 5 rows"),
        ({"attributes": {"row_starts": (-1,)}}, "begins at -1"),
        ({"attributes": {"rows": (0,)}}, "has 0 rows"),
        ({"attributes": {"features": (1,)}}, r"feature 1 of slot 0 is outside \[0, 1\)"),
        ({"attributes": {"mean": (2,)}}, "attribute mean of slot 0 is 2, expected 0 or 1"),
        ({"attributes": {"ids": (0,)}}, "attribute ids of slot 0 is 0, expected 1 to 4611686018427387904"),
        ({"attributes": {"ids": (2**62 + 1,)}}, "expected 1 to 4611686018427387904"),
        ({"attributes": {"moduli": (-1,)}}, "attribute moduli of slot 0 is -1, expected at least 0"),
        ({"attributes": {"divisors": (0,)}}, "attribute divisors of slot 0 is 0, expected at least 1"),
        ({"attributes": {"divisions": (3,)}}, "attribute divisions of slot 0 is 3, expected 0, 1 or 2"),
        ({"attributes": {"formats": (5,), "width": 4}}, "attribute formats of slot 0 is 5, expected 0 to 4"),
        ({"attributes": {"formats": (4,), "width": 4}}, r"reads rows \[0, 5\), but weights_int4 is missing"),
        ({"attributes": {"index_policy": "wrap"}}, 'index_policy is "wrap", expected error, clamp, modulo or zero'),
        ({"attributes": {"pooling_factors": (1,)}}, "both pooling_factors and offsets"),
        ({"attributes": {"pooling_factors": (2**62,)}, "offsets": None}, "expected a multiple of the sum"),
        ({"attributes": {"pooling_factors": (0,)}, "offsets": None}, "all pooling_factors are 0"),
        ({"attributes": {"pooling_factors": (-2,)}, "offsets": None}, "pooling factor -2 is out of range"),
    ],
)  # fmt: skip
def test_a_call_that_breaks_the_contract_is_refused(native, change, message):
    case = csr_case("case", [[1, 2]], rows=(5,))
    if change.get("offsets") is not None:
        change = {**change, "offsets": np.array(change["offsets"], np.int64)}
    change = {**change, "attributes": {**case.attributes, **change.get("attributes", {})}}
    broken = dataclasses.replace(case, **change)
    with pytest.raises(NativeError, match=message):
        native.embedding_bag(broken, "scalar")


@pytest.mark.parametrize("slots", [0, 1, 2, 7, 8, 15, 16, 26, 33, 70])
@pytest.mark.parametrize("width", [1, 3, 4, 16, 17, 64])
@pytest.mark.parametrize("self_interaction", [False, True])
def test_every_path_interacts_within_the_error_bound_and_in_order(native, path, slots, width, self_interaction):
    rng = np.random.default_rng(slots * 100 + width)
    dense = rng.standard_normal((5, width)).astype(np.float32)
    embeddings = rng.standard_normal((5, slots, width)).astype(np.float32)
    seen = native.dot_interaction(dense, embeddings, path, self_interaction=self_interaction)
    expected = dot_interaction(dense, embeddings, self_interaction=self_interaction)
    magnitude = dot_interaction(np.abs(dense), np.abs(embeddings), self_interaction=self_interaction)
    assert seen.shape == expected.shape
    assert np.array_equal(seen[:, :width], dense)
    assert np.all(np.abs(seen - expected) <= width * 2.0**-23 * magnitude)


def test_interactions_do_not_depend_on_threads_or_neighbours(native, path):
    rng = np.random.default_rng(3)
    dense = rng.standard_normal((500, 16)).astype(np.float32)
    embeddings = rng.standard_normal((500, 26, 16)).astype(np.float32)
    embeddings[7, 3, 2], embeddings[9, 0, 0] = np.nan, np.inf
    one = native.dot_interaction(dense, embeddings, path)
    assert np.array_equal(one, native.dot_interaction(dense, embeddings, path, threads=2), equal_nan=True)
    assert set(np.flatnonzero(~np.isfinite(one).all(axis=1))) == {7, 9}
    alone = native.dot_interaction(dense[123:124], embeddings[123:124], path)
    assert np.array_equal(alone[0], one[123])


def test_no_samples_give_no_rows(native, path):
    assert native.dot_interaction(np.zeros((0, 4), np.float32), np.zeros((0, 3, 4), np.float32), path).shape == (0, 10)


def test_an_unknown_path_is_refused_and_the_known_ones_listed(native):
    with pytest.raises(NativeError, match='kernel path "neon" is not one that this library has; choose from: .*scalar'):
        native.embedding_bag(csr_case("case", [[1]], rows=(5,)), "neon")


def test_calibration_gives_plausible_rates_and_refuses_nonsense(native):
    ms = ctypes.c_double(5)
    assert 0.1 < native.measure("fma", 1, ms) < 10_000
    assert 0.1 < native.measure("read", ctypes.c_int64(1 << 24), 1, ms) < 10_000
    assert 0.01 < native.measure("gather", ctypes.c_int64(64), ctypes.c_int64(1 << 24), 1, ms) < 10_000
    with pytest.raises(NativeError, match="threads is 0"):
        native.measure("fma", 0, ms)
    with pytest.raises(NativeError, match="row_bytes is 6, expected a multiple of 4"):
        native.measure("gather", ctypes.c_int64(6), ctypes.c_int64(1 << 24), 1, ms)
