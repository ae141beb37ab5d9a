"""Raw matrices: rows come back in blocks; a file of another size is refused."""

import numpy as np
import pytest

from dlrm_deploy.errors import CheckpointError
from dlrm_deploy.tensors.raw import RawMatrix


@pytest.mark.parametrize(("block_bytes", "firsts"), [(1 << 24, [0]), (80, [0, 4, 8]), (1, list(range(10)))])
def test_rows_come_back_in_blocks(tmp_path, monkeypatch, block_bytes, firsts):
    monkeypatch.setattr("dlrm_deploy.tensors.raw.BLOCK_BYTES", block_bytes)
    table = np.arange(50, dtype="<f4").reshape(10, 5)
    (tmp_path / "0.bin").write_bytes(table.tobytes())
    blocks = list(RawMatrix(tmp_path / "0.bin", (10, 5)).chunks())
    assert [first for first, _ in blocks] == firsts
    np.testing.assert_array_equal(np.concatenate([block for _, block in blocks]), table, strict=True)


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
        list(matrix.chunks())
