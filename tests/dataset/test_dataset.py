import numpy as np
import pytest

from dlrm_deploy.data.dataset import ArrayDataset, Bags, Schema, SparseFeature
from dlrm_deploy.errors import BatchError, ConfigError, DataError


def tiny() -> ArrayDataset:
    return ArrayDataset(
        dense=np.array([[0.0], [1.0], [2.0]], np.float32),
        features=[Bags.single([7, 8, 9]), Bags(np.array([1, 2, 3]), np.array([0, 2, 2, 3]))],
        labels=np.array([0, 1, 0], np.float32),
    )


def test_batch_holds_the_rows_asked_for_feature_major_in_that_order():
    batch, labels = tiny().batch([2, 0])
    np.testing.assert_array_equal(batch.dense, [[2], [0]])
    np.testing.assert_array_equal(batch.indices, [9, 7, 3, 1, 2])
    np.testing.assert_array_equal(batch.offsets, [0, 1, 2, 3, 5])
    np.testing.assert_array_equal(labels, [0, 0])


def test_a_row_may_be_taken_twice_and_empty_bags_stay_empty():
    batch, labels = tiny().batch(np.array([1, 1]))
    np.testing.assert_array_equal(batch.indices, [8, 8])
    np.testing.assert_array_equal(batch.offsets, [0, 1, 2, 2, 2])
    np.testing.assert_array_equal(labels, [1, 1])


def test_a_batch_of_no_rows_has_no_samples():
    batch, labels = tiny().batch([])
    assert (batch.batch_size, batch.indices.size, labels.size) == (0, 0, 0)


@pytest.mark.parametrize("rows", [[0, 3], [-1]])
def test_a_row_that_is_not_there_is_named(rows):
    with pytest.raises(DataError, match=rf"\[0, 3\), got row {rows[-1]}"):
        tiny().batch(rows)


def test_rows_must_be_a_flat_list():
    with pytest.raises(DataError, match=r"got shape \(1, 2\)"):
        tiny().batch([[0, 1]])


def test_all_parts_must_have_the_same_number_of_samples():
    with pytest.raises(DataError, match=r"got \[2, 3\]"):
        ArrayDataset(np.zeros((3, 1), np.float32), [Bags.single([1, 2])], np.zeros(3, np.float32))


def test_labels_other_than_0_and_1_are_refused():
    with pytest.raises(DataError, match="labels must be 0 or 1"):
        ArrayDataset(np.zeros((2, 1), np.float32), [Bags.single([1, 2])], np.array([0, 3], np.float32))


def test_a_missing_dense_value_is_refused():
    with pytest.raises(BatchError, match="sample 1, column 0"):
        ArrayDataset(np.array([[0], [np.nan]], np.float32), [Bags.single([1, 2])], np.zeros(2, np.float32))


@pytest.mark.parametrize("offsets", [[0, 2, 1, 3], [1, 3], [0, 2], []])
def test_bags_whose_offsets_do_not_rise_from_0_to_n_are_refused(offsets):
    with pytest.raises(DataError, match="rise from 0 to 3"):
        Bags(np.arange(3), np.array(offsets, np.int64))


def test_schema_makes_a_model_whose_features_share_a_table():
    schema = Schema(
        ("age",),
        (
            SparseFeature(name="item", rows=5, pooling_factor=1),
            SparseFeature(name="liked", rows=5, table="item", pooling="mean", max_ids=10),
        ),
    )
    config = schema.model_config("m", 4, (8, 4), (8, 1), index_policy="zero")
    assert [(table.name, table.rows, table.width) for table in config.tables] == [("item", 5, 4)]
    assert config.features[1].pooling == "mean"
    assert config.features[1].longest_bag == 10
    assert config.index_policy == "zero"


def test_widths_that_do_not_fit_the_interaction_are_refused():
    schema = Schema(("age",), (SparseFeature(name="item", rows=5),))
    with pytest.raises(ConfigError, match="bottom MLP ends in 8"):
        schema.model_config("m", 4, (8,), (1,))
