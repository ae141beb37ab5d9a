"""Values that are not finite or beyond float32 are refused, and the first one is named."""

import numpy as np
import pytest

from dlrm_deploy.errors import CheckpointError
from dlrm_deploy.tensors.finite import as_float32, check_finite


def test_the_first_value_is_named_by_row_and_column():
    block = np.ones((4, 3), np.float32)
    block[2, 1], block[3, 0] = -np.inf, np.nan
    message = r"table 0 holds NaN or infinite values: -inf at row 102, column 1 is the first; 2 of the 12 values"
    with pytest.raises(CheckpointError, match=message):
        check_finite(block, 100, "table 0")


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_vectors_and_scalars_have_rows_only(dtype):
    with pytest.raises(CheckpointError, match="b holds NaN or infinite values: nan at row 1 is the first; 1 of the 3"):
        check_finite(np.array([0, np.nan, 0], dtype), 0, "b")
    with pytest.raises(CheckpointError, match="inf at row 0 is the first; 1 of the 1"):
        check_finite(np.array(np.inf, dtype), 0, "b")


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int64, np.bool_])
def test_finite_values_pass_however_large(dtype):
    if dtype == np.bool_:
        largest = True
    else:
        largest = np.finfo(dtype).max if np.issubdtype(dtype, np.floating) else np.iinfo(dtype).max
    check_finite(np.full((50, 2), largest, dtype), 0, "t")  # their sum is infinite in float64
    check_finite(np.zeros((0, 4), dtype), 0, "t")


def test_a_float64_value_beyond_float32_is_not_called_a_diverged_training():
    block = np.array([[1.0, 2.0], [-1e300, 1e39]])
    with pytest.raises(CheckpointError, match=r"t holds float64 .* fit float32.*: -1e\+300 at row 8, column 0 .* 2 of"):
        as_float32(block, 7, "t")
    with pytest.raises(CheckpointError, match="t holds NaN or infinite values: inf at row 0"):
        as_float32(np.array([np.inf, 1e300]), 0, "t")


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_values_that_fit_become_float32(dtype):
    block = np.array([[1.5, -65504], [0.1, 0]], dtype)
    np.testing.assert_array_equal(as_float32(block, 0, "t"), block.astype(np.float32), strict=True)
