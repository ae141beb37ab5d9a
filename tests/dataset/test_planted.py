"""The planted task: samples are what their numbers say, and the teacher is what its docstring says."""

import numpy as np
import pytest

from dlrm_deploy.data import planted
from dlrm_deploy.data.planted import CLICKS, LEAST_ROWS, PlantedTask
from dlrm_deploy.errors import DataError
from dlrm_deploy.metrics import auc
from dlrm_deploy.presets import preset

SIZE = 20_000  # a standard error of an AUC is then some 0.004


@pytest.fixture(scope="module")
def task():
    return PlantedTask(seed=0, scale_rows=0.001)


@pytest.fixture(scope="module")
def test_split(task):
    return task.samples(SIZE, SIZE)


def test_features_have_the_names_and_the_scaled_numbers_of_ids_of_criteo(task):
    kaggle = preset("kaggle")
    assert task.schema.dense_features == kaggle.dense_features
    assert [feature.name for feature in task.schema.features] == [feature.name for feature in kaggle.features]
    for feature, rows in zip(task.schema.features, kaggle.feature_rows, strict=True):
        assert feature.rows == (rows if rows <= LEAST_ROWS else max(LEAST_ROWS, -(-rows // 1000)))


def test_samples_fit_a_model_of_the_schema_and_dense_values_are_logarithms_of_counts(task, test_split):
    batch, labels = test_split.batch(np.arange(SIZE))
    config = task.schema.model_config("m", 4, (4,), (1,))
    batch.check_fits(config)
    assert batch.explain_bad_ids(config) is None
    np.testing.assert_allclose(np.expm1(batch.dense), np.rint(np.expm1(batch.dense)), rtol=1e-5)
    assert set(np.unique(labels)) == {0, 1}
    assert labels.mean() == pytest.approx(CLICKS, abs=0.015)


def test_a_sample_is_the_same_in_whatever_batch_and_split_it_comes(task):
    whole, labels = task.samples(0, 50).batch(np.arange(50))
    part, part_labels = PlantedTask(seed=0, scale_rows=0.001).samples(40, 10).batch([7, 1])
    for row, at in ((47, 0), (41, 1)):
        one, same = whole.rows(row, row + 1), part.rows(at, at + 1)
        np.testing.assert_array_equal(one.dense, same.dense)
        np.testing.assert_array_equal(one.indices, same.indices)
        assert labels[row] == part_labels[at]


def test_splits_follow_each_other_in_time():
    _, splits = planted.load(30, seed=5)
    task = PlantedTask(seed=5)
    for split, first, size in ((splits.train, 0, 30), (splits.validation, 30, 3), (splits.test, 33, 3)):
        assert len(split) == size
        expected, _ = task.samples(first, size).batch(np.arange(size))
        np.testing.assert_array_equal(split.batch(np.arange(size))[0].dense, expected.dense)


def test_labels_are_as_likely_as_the_teacher_says(task):
    samples = np.arange(4 * SIZE)
    dense, ids = task.draw(samples)
    probabilities = task.probabilities(dense, ids)
    labels = task.labels(samples, probabilities)
    for tenth in np.array_split(np.argsort(probabilities), 10):  # 8000 samples: four deviations are 0.02
        assert labels[tenth].mean() == pytest.approx(probabilities[tenth].mean(), abs=0.022)


def test_the_best_auc_is_that_of_the_teachers_probabilities_and_about_0_81(test_split, task):
    samples = np.arange(SIZE, 2 * SIZE)
    ceiling = test_split.ceiling()
    assert ceiling.auc == auc(test_split.batch(np.arange(SIZE))[1], task.probabilities(*task.draw(samples)))
    assert 0.78 < ceiling.auc < 0.83


def test_products_of_pairs_are_worth_much_and_no_single_value_tells_anything_about_them(task, test_split):
    assert test_split.ceiling(pairs=False).auc < test_split.ceiling().auc - 0.05
    dense, ids = task.draw(np.arange(SIZE))
    logits, without = (np.log(p / (1 - p)) for p in (task.probabilities(dense, ids, pairs=on) for on in (True, False)))
    products = logits - without
    assert products.std() > 0.6
    for feature_ids in ids:
        counts = np.bincount(feature_ids)
        means = np.bincount(feature_ids, products) / np.maximum(counts, 1)
        spread = np.sqrt(np.bincount(feature_ids, products**2) / np.maximum(counts, 1))
        often = counts > 200
        assert (np.abs(means) < 4.5 * spread / np.sqrt(np.maximum(counts, 1)) + 0.02)[often].all()
    assert np.abs([np.corrcoef(products, column)[0, 1] for column in dense.T]).max() < 0.03


def test_another_seed_gives_another_task(task, test_split):
    other = PlantedTask(seed=1, scale_rows=0.001)
    dense, ids = task.draw(np.arange(1000))
    correlation = np.corrcoef(task.probabilities(dense, ids), other.probabilities(dense, ids))[0, 1]
    assert abs(correlation) < 0.3
    assert not np.array_equal(other.draw(np.arange(1000))[1], ids)


def test_popular_ids_come_often_and_are_apart(task):
    _, ids = task.draw(np.arange(SIZE))
    counts = np.bincount(ids[2], minlength=task.schema.features[2].rows)
    popular = np.argsort(-counts)[:4]
    expected = np.arange(1, 6) ** -0.5
    np.testing.assert_allclose(
        counts[popular] / SIZE, (expected[:-1] - expected[1:]) / (1 - counts.size**-0.5), rtol=0.1
    )
    assert np.abs(np.diff(popular)).min() > 100


@pytest.mark.parametrize(("seed", "scale"), [(-1, 0.1), (0, 0), (0, 101), (0, float("inf")), (0, float("nan"))])
def test_impossible_tasks_are_refused(seed, scale):
    with pytest.raises(DataError, match=f"got seed {seed} and scale_rows {scale}"):
        PlantedTask(seed, scale)


def test_impossible_samples_are_refused(task):
    with pytest.raises(DataError, match="got -1 samples from 0 on"):
        task.samples(0, -1)
    with pytest.raises(DataError, match=r"\[0, 10\), got row 10"):
        task.samples(5, 10).batch([10])
