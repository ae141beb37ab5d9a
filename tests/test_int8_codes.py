"""Codes of int8 MLPs: what is stored, what is lost, and what cannot be stored."""

import re

import numpy as np
import pytest

from dlrm_deploy.errors import FormatError
from dlrm_deploy.int8_codes import LEAST_SIZE, MOST_INPUTS, dequantize_weight, quantize_samples, quantize_weight


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_the_largest_value_of_each_row_has_code_127_and_no_value_is_off_by_more_than_half_a_scale():
    weight = normal(50, 33) * np.exp2(np.arange(50, dtype=np.float32) - 25)[:, None]
    codes, scales = quantize_weight(weight)
    assert (codes.dtype, scales.dtype) == (np.int8, np.float32)
    np.testing.assert_array_equal(np.abs(codes.astype(int)).max(axis=1), 127)
    np.testing.assert_array_equal(scales, np.abs(weight).max(axis=1) / np.float32(127))
    off = np.abs(dequantize_weight(codes, scales).astype(np.float64) - weight)
    assert np.all(off <= scales[:, None] * (0.5 + 1e-4))


def test_codes_are_rounded_to_even_and_symmetric():
    weight = np.array([[127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, -127]], np.float32)
    codes, scales = quantize_weight(weight)
    assert (codes.tolist(), scales.tolist()) == ([[127, 0, 2, 2, 0, -2, -2, -127]], [1.0])
    opposite, _ = quantize_weight(-weight)
    np.testing.assert_array_equal(opposite, -codes)


@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-31, 127 * 0.9e-30])
def test_rows_of_nothing_have_codes_0_and_scale_1(size):
    codes, scales = quantize_weight(np.full((2, 3), size, np.float32))
    assert (codes.any(), scales.tolist()) == (False, [1.0, 1.0])


def test_the_largest_float32_and_the_least_that_counts_are_stored():
    most = float(np.finfo(np.float32).max)
    weight = np.array([[most, -most, 0], [1.3e-28, -1.3e-28, 0]], np.float32)
    codes, scales = quantize_weight(weight)
    assert codes.tolist() == [[127, -127, 0]] * 2
    np.testing.assert_allclose(127 * scales.astype(np.float64), weight[:, 0], rtol=2**-22)


@pytest.mark.parametrize(("bad", "shown"), [(np.nan, "nan"), (np.inf, "inf"), (-np.inf, "-inf")])
def test_what_is_not_finite_is_refused_with_layer_row_and_value(bad, shown):
    weight = normal(5, 4)
    weight[3, 2] = weight[4, 0] = bad
    with pytest.raises(
        FormatError, match=f"^over_arch.weight, row 3: int8 cannot store the value {shown} of input 2; "
    ):
        quantize_weight(weight, "over_arch.weight")


@pytest.mark.parametrize(
    "weight",
    [np.ones((2, 2)), np.ones(3, np.float32), np.ones((2, 0), np.float32), np.ones((1, MOST_INPUTS + 1), np.float32)],
)
def test_what_is_no_weight_of_an_int8_layer_is_refused(weight):
    message = f"w: an int8 layer has a float32 weight [N, K] of 1 to 131072 inputs K, got {weight.dtype} {weight.shape}"
    with pytest.raises(FormatError, match=re.escape(message)):
        quantize_weight(weight, "w")


def test_the_most_inputs_keep_sums_within_int32():
    assert MOST_INPUTS * 127 * 127 <= 2**31 - 1
    assert quantize_weight(np.ones((1, MOST_INPUTS), np.float32))[0].all()


def test_each_sample_has_a_step_of_its_own():
    x = normal(40, 21) * np.exp2(np.arange(40, dtype=np.float32) - 20)[:, None]
    codes, steps = quantize_samples(x)
    assert (codes.dtype, steps.dtype, steps.shape) == (np.int8, np.float32, (40,))
    np.testing.assert_array_equal(np.abs(codes.astype(int)).max(axis=1), 127)
    np.testing.assert_allclose(codes * steps[:, None], x, rtol=0, atol=0.5001 * steps.max())
    assert np.all(np.abs(codes * steps[:, None] - x) <= 0.5001 * steps[:, None])


def test_samples_that_are_not_finite_have_codes_0_and_step_nan_and_leave_others_alone():
    x = normal(5, 8)
    codes, steps = quantize_samples(x)
    x[1, 7], x[2, 0], x[4, 3] = np.nan, np.inf, -np.inf
    now_codes, now_steps = quantize_samples(x)
    assert np.isnan(now_steps[[1, 2, 4]]).all()
    assert not now_codes[[1, 2, 4]].any()
    np.testing.assert_array_equal(now_codes[[0, 3]], codes[[0, 3]])
    np.testing.assert_array_equal(now_steps[[0, 3]], steps[[0, 3]])


def test_samples_below_the_least_size_have_codes_0():
    least = np.float32(LEAST_SIZE)
    below = np.nextafter(least, np.float32(0))
    codes, steps = quantize_samples(np.array([[least, -least / 2], [below, -below], [0, -0.0], [1e-45, 0]], np.float32))
    assert codes.tolist() == [[127, -64], [0, 0], [0, 0], [0, 0]]
    assert steps[1] == below / np.float32(127)
    assert (steps[0] > 0, steps[2]) == (True, 0)


def test_no_samples_have_no_steps():
    codes, steps = quantize_samples(np.ones((0, 3), np.float32))
    assert (codes.shape, steps.shape) == ((0, 3), (0,))
