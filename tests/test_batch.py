import numpy as np
import pytest
from test_config import small

from dlrm_deploy.batch import Batch
from dlrm_deploy.errors import BatchError
from dlrm_deploy.presets import preset

F32, I64 = np.float32, np.int64


def make(**changes):
    values = {
        "dense": np.zeros((2, 2), F32),
        "indices": np.array([1, 2, 3, 4], I64),
        "offsets": np.array([0, 1, 2, 2, 2, 3, 4], I64),
    }
    return Batch(**{**values, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dense": [[0.0]]}, "dense must be a NumPy array, got list"),
        ({"dense": np.zeros((2, 2))}, r"dense must be float32, got float64. Convert with .astype\(np.float32\)"),
        ({"dense": np.zeros(2, F32)}, "dense must have 2 dimensions"),
        ({"indices": np.zeros(4, np.int16)}, "indices must be int32 or int64, got int16"),
        ({"indices": np.zeros((2, 2), I64)}, "indices must have 1 dimension"),
        ({"offsets": np.array([0, 1, 2, 2, 2, 3, 4], np.int32)}, "use one type for both"),
        ({"offsets": np.array([], I64)}, "offsets must run from 0 to the number of ids, 4, but are empty"),
        ({"offsets": np.array([0, 1, 2, 2, 2, 3, 5], I64)}, "but run from 0 to 5"),
        ({"offsets": np.array([1, 1, 2, 2, 2, 3, 4], I64)}, "but run from 1 to 4"),
        ({"offsets": np.array([0, 3, 2, 2, 2, 3, 4], I64)}, r"offsets\[1\] = 3 and offsets\[2\] = 2"),
        ({"offsets": np.array([0, 1, 2, 4], I64)}, "offsets has 4 values for 2 samples"),
        ({"dense": np.array([[0, 1], [np.nan, 1]], F32)}, "dense is nan at sample 1, column 0"),
        ({"dense": np.array([[0, np.inf], [0, 1]], F32)}, "dense is inf at sample 0, column 1"),
        ({"weights": np.ones(3, F32)}, "weights has 3 values for 4 ids"),
        ({"weights": np.ones(4)}, "weights must be float32"),
        ({"weights": np.array([1, 1, -np.inf, 1], F32)}, "weights is -inf at position 2"),
    ],
)
def test_arrays_that_describe_no_batch_are_refused(changes, message):
    with pytest.raises(BatchError, match=message):
        make(**changes)


def test_non_contiguous_arrays_are_copied_and_contiguous_ones_kept():
    dense = np.asfortranarray(np.arange(4, dtype=F32).reshape(2, 2))
    indices = np.arange(4, dtype=I64)
    batch = make(dense=dense, indices=indices)
    assert batch.dense.flags.c_contiguous
    np.testing.assert_array_equal(batch.dense, dense)
    assert batch.indices is indices


def test_a_batch_of_zero_samples_is_valid():
    batch = make(dense=np.zeros((0, 2), F32), indices=np.zeros(0, I64), offsets=np.zeros(1, I64))
    batch.check_fits(small())
    assert batch.batch_size == 0


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (
            lambda: make(dense=np.zeros((2, 3), F32)),
            "dense has 3 columns, but model 'small' has 2 dense features: age, hour",
        ),
        (lambda: make(offsets=np.array([0, 1, 2, 3, 4], I64)), r"3 sparse features x 2 samples \+ 1 = 7 are needed"),
        (lambda: make(weights=np.ones(4, F32)), "takes no per-sample weights"),
    ],
)
def test_a_batch_for_another_model_is_refused(batch, message):
    with pytest.raises(BatchError, match=message):
        batch().check_fits(small())


def test_a_bag_that_breaks_the_fixed_pooling_factor_is_named():
    config = preset("kaggle", 0.001)
    offsets = np.arange(26 * 2 + 1, dtype=I64)
    offsets[4:] += 1  # feature 1, sample 1 now holds two ids
    batch = Batch(np.zeros((2, 13), F32), np.zeros(offsets[-1], I64), offsets)
    with pytest.raises(BatchError, match="feature 'cat_1', sample 1: the bag holds 2 ids"):
        batch.check_fits(config)


def test_from_bags_is_feature_major():
    batch = Batch.from_bags([[0.0], [1.0]], [[[1, 2], []], [[3], [4]]], [[[0.5, 1.5], []], [[2.5], [3.5]]])
    np.testing.assert_array_equal(batch.indices, [1, 2, 3, 4])
    np.testing.assert_array_equal(batch.offsets, [0, 2, 2, 3, 4])
    np.testing.assert_array_equal(batch.weights, [0.5, 1.5, 2.5, 3.5])


@pytest.mark.parametrize("weighted", [False, True])
def test_rows_cuts_every_feature(weighted):
    bags = [[[1, 2], [], [3]], [[4], [5, 6], []]]
    weights = [[[float(i) for i in bag] for bag in feature] for feature in bags] if weighted else None
    batch = Batch.from_bags([[0.0], [1.0], [2.0]], bags, weights)
    part = batch.rows(1, 3)
    np.testing.assert_array_equal(part.dense, [[1], [2]])
    np.testing.assert_array_equal(part.indices, [3, 5, 6])
    np.testing.assert_array_equal(part.offsets, [0, 0, 1, 3, 3])
    if weighted:
        np.testing.assert_array_equal(part.weights, [3, 5, 6])
    assert batch.rows(2, 2).batch_size == 0
    with pytest.raises(BatchError, match="rows 2 to 4 are not within"):
        batch.rows(2, 4)


def test_rows_of_an_empty_batch_is_an_empty_batch():
    empty = Batch(np.zeros((0, 2), F32), np.zeros(0, I64), np.zeros(1, I64))
    np.testing.assert_array_equal(empty.rows(0, 0).offsets, [0])


def test_the_first_bad_id_is_named_with_its_place():
    config = small()
    batch = Batch.from_bags(np.zeros((2, 2)), [[[1], [2]], [[3, 7], []], [[6], [-1]]])
    assert batch.explain_bad_ids(config).startswith(
        "feature 'liked', sample 0, position 1 of its bag: id 7 is outside [0, 7); 2 of 6 ids are."
    )
    good = Batch.from_bags(np.zeros((2, 2)), [[[1], [2]], [[3, 6], []], [[6], [0]]])
    assert good.explain_bad_ids(config) is None
    assert Batch(np.zeros((0, 2), F32), np.zeros(0, I64), np.zeros(1, I64)).explain_bad_ids(config) is None
