import numpy as np
import pytest

from dlrm_deploy.errors import EngineError
from dlrm_deploy.parity.compare import ULP_FLOOR, compare, ulp_distance


def f32(*values):
    return np.array(values, np.float32)


def test_equal_outputs_differ_by_nothing_and_have_no_worst_row():
    found = compare(f32(0.25, 0.5), f32(0.25, 0.5), limit=0.0)
    assert (found.max_abs, found.max_rel, found.worst_row, found.nonfinite, found.rows) == (0, 0, None, 0, 2)
    assert found.passed


def test_the_worst_row_is_the_one_with_the_largest_absolute_difference():
    found = compare(f32(0.25, 0.5, 0.0625), f32(0.25, 0.75, 0.125), limit=1.0)
    assert (found.max_abs, found.worst_row) == (0.25, 1)
    assert found.max_rel == 0.5  # of row 2
    assert found.passed


def test_a_difference_passes_at_the_limit_and_fails_above_it():
    assert compare(f32(0.5), f32(0.75), limit=0.25).passed
    assert not compare(f32(0.5), f32(0.75), limit=0.2499).passed


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["output", "reference", "both"])
def test_a_value_that_is_not_finite_fails_and_is_the_worst_row(value, where):
    actual = f32(0.5, 0.25, value if where != "reference" else 0.5)
    expected = f32(0.5, 0.5, value if where != "output" else 0.5)
    found = compare(actual, expected, limit=1.0)
    assert not found.passed
    assert (found.nonfinite, found.worst_row, found.max_abs) == (1, 2, 0.25)


def test_no_rows_are_no_difference():
    found = compare(f32(), f32(), limit=0.0)
    assert (found.rows, found.max_abs, found.worst_row, found.passed) == (0, 0, None, True)


@pytest.mark.parametrize("actual", [np.zeros((2, 1), np.float32), np.zeros(3, np.float32), np.zeros(2, np.float64)])
def test_an_output_of_another_shape_or_type_is_refused(actual):
    with pytest.raises(EngineError, match=r"expected float32 \(2,\)"):
        compare(actual, f32(0, 0), limit=1.0)


def test_ulp_distance_counts_the_floats_between_two_values():
    for value in (0.5, 1.0, -1.0, 1e-30, 0.0, 65504.0):
        further = np.float32(value)
        for steps in range(4):
            assert ulp_distance(f32(further), f32(value)).tolist() == [steps]
            assert ulp_distance(f32(value), f32(further)).tolist() == [steps]
            further = np.nextafter(further, np.float32(np.inf))


def test_ulp_distance_crosses_zero_and_takes_both_zeros_for_one():
    tiny = np.nextafter(np.float32(0), np.float32(1))
    assert ulp_distance(f32(0.0, -tiny, -1.0), f32(-0.0, tiny, 1.0)).tolist() == [0, 2, 2 * 0x3F800000]


def test_ulps_are_counted_where_the_reference_is_not_negligible():
    above = np.nextafter(np.float32(0.5), np.float32(1))
    found = compare(f32(above, 1e-20, 0.25, np.nan), f32(0.5, 1e-12, 0.25, 0.5), limit=1.0)
    assert (found.max_ulp, found.mean_ulp, found.ulp_rows) == (1, 0.5, 2)
    nothing = compare(f32(0.0), f32(ULP_FLOOR / 2), limit=1.0)
    assert (nothing.max_ulp, nothing.mean_ulp, nothing.ulp_rows) == (0, 0.0, 0)
