"""Values that are not finite are refused, and the first one is named."""

import numpy as np
import pytest

from dlrm_deploy.errors import CheckpointError
from dlrm_deploy.tensors.finite import check_finite


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
