"""Models that see only a part of a dataset: some of its features, or no dense values."""

import numpy as np
import pytest

from dlrm_deploy.data.dataset import ArrayDataset, Bags, Schema, Selection, SparseFeature, Splits
from dlrm_deploy.errors import ConfigError, DataError
from dlrm_deploy.schemes import TableScheme

SCHEMA = Schema(
    ("age",),
    (SparseFeature(name="user", rows=10), SparseFeature(name="liked", rows=4), SparseFeature(name="x", rows=6)),
)


def tiny() -> ArrayDataset:
    bags = [Bags.single([7, 8, 9]), Bags(np.array([1, 2, 3]), np.array([0, 2, 2, 3])), Bags.single([5, 4, 3])]
    return ArrayDataset(np.array([[0.0], [1.0], [2.0]], np.float32), bags, np.array([0, 1, 0], np.float32))


def test_features_come_in_the_order_asked_for():
    selection = Selection(tiny(), [1, 0], dense=True)
    batch, labels = selection.batch([2, 1, 0])
    assert len(selection) == 3
    np.testing.assert_array_equal(batch.dense, [[2], [1], [0]])
    np.testing.assert_array_equal(batch.indices, [3, 1, 2, 9, 8, 7])
    np.testing.assert_array_equal(batch.offsets, [0, 1, 1, 3, 4, 5, 6])
    np.testing.assert_array_equal(labels, [0, 1, 0])


def test_dense_values_may_be_left_out():
    batch, _ = Selection(tiny(), [2], dense=False).batch([0, 2])
    assert batch.dense.shape == (2, 0)
    np.testing.assert_array_equal(batch.indices, [5, 3])


def test_a_batch_of_no_rows_and_a_row_that_is_not_there():
    selection = Selection(tiny(), [1, 0], dense=False)
    batch, labels = selection.batch([])
    assert (batch.batch_size, batch.offsets.tolist(), labels.size) == (0, [0], 0)
    with pytest.raises(DataError, match=r"\[0, 3\), got row 3"):
        selection.batch([3])


def test_schema_and_splits_are_selected_alike():
    schema = SCHEMA.select(["x", "user"], dense=False)
    config = schema.model_config("m", 4, (), (), interaction="fm", wide=True)
    assert ([f.name for f in config.features], config.dense_features) == (["x", "user"], ())
    splits = Splits(tiny(), tiny(), tiny()).select(SCHEMA.positions(["x", "user"]), dense=False)
    for split in (splits.train, splits.validation, splits.test):
        batch, _ = split.batch([0, 1])
        batch.check_fits(config)
        np.testing.assert_array_equal(batch.indices, [5, 4, 7, 8])
    assert SCHEMA.select() == SCHEMA


def test_a_feature_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match=r"no feature film in the data\. Features: user, liked, x"):
        SCHEMA.select(["user", "film"])
    with pytest.raises(ConfigError, match="features must differ, got user, user"):
        SCHEMA.positions(["user", "user"])


def test_a_scheme_makes_the_tables_of_the_model():
    scheme = TableScheme(partition="hash", collisions=3, threshold=4)
    config = SCHEMA.model_config("m", 4, (4,), (1,), tables=scheme)
    assert [(table.rows, table.part_rows) for table in config.tables] == [(10, (4,)), (4, ()), (6, (2,))]
