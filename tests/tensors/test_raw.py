"""Raw matrices: rows come from their place; a file of another size is refused."""

import numpy as np
import pytest

from dlrm_deploy.errors import CheckpointError
from dlrm_deploy.tensors.raw import RawMatrix


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(("first", "count"), [(0, 10), (0, 1), (3, 4), (9, 1), (10, 0)])
def test_rows_come_from_their_place(tmp_path, first, count, dtype):
    table = np.arange(50).reshape(10, 5).astype(dtype)
    (tmp_path / "0.bin").write_bytes(table.tobytes())
    rows = np.full((count, 5), -1, dtype)
    RawMatrix(tmp_path / "0.bin", (10, 5), dtype).read_into(first, rows)
    np.testing.assert_array_equal(rows, table[first : first + count])


def test_a_part_of_a_larger_array_is_filled_too(tmp_path):
    table = np.arange(50, dtype="<f4").reshape(10, 5)
    (tmp_path / "0.bin").write_bytes(table.tobytes())
    wide = np.zeros((2, 7), np.float32)
    RawMatrix(tmp_path / "0.bin", (10, 5)).read_into(4, wide[:, 1:6])
    np.testing.assert_array_equal(wide, np.pad(table[4:6], ((0, 0), (1, 1))))


def test_a_file_of_another_size_is_refused(tmp_path):
    (tmp_path / "0.bin").write_bytes(bytes(196))
    with pytest.raises(CheckpointError, match="0.bin has 196 bytes, expected 200: 10 rows of 5 float32 values"):
        RawMatrix(tmp_path / "0.bin", (10, 5))
    with pytest.raises(CheckpointError, match="cannot read .*No such file"):
        RawMatrix(tmp_path / "1.bin", (10, 5))


def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path):
    (tmp_path / "0.bin").write_bytes(bytes(200))
    matrix = RawMatrix(tmp_path / "0.bin", (10, 5))
    (tmp_path / "0.bin").write_bytes(bytes(100))
    with pytest.raises(CheckpointError, match="became shorter"):
        matrix.read_into(4, np.empty((3, 5), np.float32))
    (tmp_path / "0.bin").unlink()
    with pytest.raises(CheckpointError, match="cannot read .*No such file"):
        matrix.read_into(0, np.empty((1, 5), np.float32))
