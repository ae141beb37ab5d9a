import numpy as np
import pytest
from bundles import CONFIGS

from dlrm_deploy.batch_file import read_batch
from dlrm_deploy.data.random import random_batch
from dlrm_deploy.errors import DataError

FIELDS = ("dense", "indices", "offsets", "weights")


def save(path, batch):
    np.savez(path, **{field: getattr(batch, field) for field in FIELDS if getattr(batch, field) is not None})


@pytest.mark.parametrize("name", ["dot", "weighted"])
@pytest.mark.parametrize("index_dtype", [np.int32, np.int64])
@pytest.mark.parametrize("size", [0, 5])
def test_a_batch_comes_back_as_it_was_written(tmp_path, name, index_dtype, size):
    batch = random_batch(CONFIGS[name], size, np.random.default_rng(0), index_dtype=index_dtype)
    save(tmp_path / "batch.npz", batch)
    again, others = read_batch(tmp_path / "batch.npz")
    assert others == {}
    assert again.indices.dtype == index_dtype
    for field in FIELDS:
        np.testing.assert_array_equal(getattr(again, field), getattr(batch, field))


def test_other_arrays_are_handed_back(tmp_path):
    arrays = {"dense": np.zeros((1, 2), np.float32), "indices": np.array([3]), "offsets": np.array([0, 1])}
    np.savez(tmp_path / "b.npz", **arrays, labels=np.array([1]))
    batch, others = read_batch(tmp_path / "b.npz")
    assert batch.batch_size == 1
    assert list(others) == ["labels"]


def test_a_missing_array_is_named_with_what_is_there(tmp_path):
    np.savez(tmp_path / "b.npz", dense=np.zeros((1, 2), np.float32), ids=np.array([3]))
    with pytest.raises(DataError, match=r"b.npz lacks indices and offsets: it holds dense, ids. A batch needs"):
        read_batch(tmp_path / "b.npz")


def test_arrays_that_are_no_batch_are_refused(tmp_path):
    np.savez(tmp_path / "b.npz", dense=np.zeros((1, 2)), indices=np.array([3]), offsets=np.array([0, 1]))
    with pytest.raises(DataError, match="dense must be float32, got float64"):
        read_batch(tmp_path / "b.npz")


def test_pickles_and_damaged_files_are_refused(tmp_path):
    np.savez(tmp_path / "pickle.npz", dense=np.array([{}], dtype=object))
    np.save(tmp_path / "array.npz.npy", np.zeros(3))
    (tmp_path / "array.npz.npy").rename(tmp_path / "array.npz")
    (tmp_path / "text.npz").write_text("no zip")
    (tmp_path / "empty.npz").write_bytes(b"")
    good = tmp_path / "good.npz"
    save(good, random_batch(CONFIGS["dot"], 3, np.random.default_rng(0)))
    (tmp_path / "cut.npz").write_bytes(good.read_bytes()[:-30])
    for name in ("pickle", "array", "text", "empty", "cut", "absent"):
        with pytest.raises(DataError, match=f"cannot read .*{name}.npz"):
            read_batch(tmp_path / f"{name}.npz")
