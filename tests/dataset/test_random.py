import dataclasses

import numpy as np
import pytest

from dlrm_deploy.config import FeatureConfig, ModelConfig
from dlrm_deploy.data.random import DISTRIBUTIONS, RandomDataset, load, random_batch
from dlrm_deploy.errors import DataError
from dlrm_deploy.tables import TableConfig


def model(rows: int = 1000, **options) -> ModelConfig:
    return ModelConfig(
        name="m",
        dense_features=("x", "y"),
        tables=(TableConfig(name="a", rows=rows, width=4), TableConfig(name="b", rows=3, width=4)),
        features=options.pop(
            "features",
            (FeatureConfig(name="a", table="a", max_ids=5), FeatureConfig(name="b", table="b", pooling_factor=2)),
        ),
        bottom_mlp=(4,),
        top_mlp=(1,),
        **options,
    )


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("index_dtype", [np.int32, np.int64])
def test_a_batch_fits_its_model_and_ids_are_in_range(distribution, index_dtype):
    config = model(rows=7)
    batch = random_batch(config, 500, np.random.default_rng(1), distribution=distribution, index_dtype=index_dtype)
    batch.check_fits(config)
    assert batch.explain_bad_ids(config) is None
    assert batch.indices.dtype == batch.offsets.dtype == index_dtype
    assert set(batch.indices[: batch.offsets[500]].tolist()) >= {1, 2, 3, 4, 5}
    assert 0 <= batch.dense.min() < batch.dense.max() < 1
    assert batch.weights is None


def test_lengths_run_from_empty_to_the_longest_bag_and_fixed_bags_are_full():
    lengths_FB = np.diff(random_batch(model(), 600, np.random.default_rng(0)).offsets).reshape(2, 600)
    np.testing.assert_array_equal(np.unique(lengths_FB[0]), np.arange(6))
    assert np.bincount(lengths_FB[0]).min() > 60  # 100 of each are expected
    np.testing.assert_array_equal(lengths_FB[1], 2)


def test_a_weighted_model_gets_a_weight_per_id():
    batch = random_batch(model(weighted=True), 100, np.random.default_rng(0))
    assert batch.weights is not None
    assert batch.weights.size == batch.indices.size
    assert 0 <= batch.weights.min() < 0.1
    assert 0.9 < batch.weights.max() < 1


def test_a_batch_may_hold_no_samples():
    assert random_batch(model(), 0, np.random.default_rng(0)).batch_size == 0


def one_feature(rows: int, count: int, distribution) -> np.ndarray:
    config = ModelConfig(
        name="m",
        dense_features=("x",),
        tables=(TableConfig(name="a", rows=rows, width=4),),
        features=(FeatureConfig(name="a", table="a", pooling_factor=count),),
        bottom_mlp=(4,),
        top_mlp=(1,),
    )
    return random_batch(config, 1, np.random.default_rng(3), distribution=distribution).indices


def test_uniform_ids_hit_every_row_alike():
    counts = np.bincount(one_feature(100, 200_000, "uniform"), minlength=100)
    chi_square = ((counts - 2000) ** 2 / 2000).sum()
    assert 60 < chi_square < 150  # 99 degrees of freedom: 99 +- 14


def test_gaussian_ids_lie_around_the_middle_row_with_a_tenth_of_the_rows_deviation():
    ids = one_feature(1000, 100_000, "gaussian")
    assert ids.mean() == pytest.approx(499.5, abs=1.5)
    assert ids.std() == pytest.approx(100, abs=1)


def test_zipf_ids_follow_the_power_law_and_popular_rows_are_apart():
    counts = np.bincount(one_feature(10_000, 400_000, "zipf"), minlength=10_000)
    popular = np.argsort(-counts, kind="stable")
    edges = np.arange(1, 10_002, dtype=np.float64) ** -0.05
    expected = (edges[:-1] - edges[1:]) / (edges[0] - edges[-1])
    np.testing.assert_allclose(counts[popular[:5]] / 400_000, expected[:5], rtol=0.05)
    assert np.abs(np.diff(popular[:5])).min() > 100
    assert (counts > 0).sum() > 9000  # scattering is a permutation: the tail still reaches nearly every row


def test_rows_beyond_32_bits_are_reached():
    ids = one_feature(5_000_000_000, 1000, "zipf")
    assert ids.min() >= 0
    assert 2**32 < ids.max() < 5_000_000_000


def test_the_same_generator_state_gives_the_same_batch_and_another_one_another():
    first, again, other = (random_batch(model(), 50, np.random.default_rng(seed)) for seed in (5, 5, 6))
    np.testing.assert_array_equal(first.dense, again.dense)
    np.testing.assert_array_equal(first.indices, again.indices)
    assert not np.array_equal(first.dense, other.dense)


def test_an_unknown_distribution_is_refused_with_the_known_ones():
    with pytest.raises(DataError, match="uniform, gaussian, zipf, trace, got 'pareto'"):
        random_batch(model(), 1, np.random.default_rng(0), distribution="pareto")


def test_a_dataset_of_numbered_samples_cannot_be_a_trace():
    with pytest.raises(DataError, match="uniform, gaussian, zipf, got 'trace'"):
        RandomDataset(model(), 10, seed=0, distribution="trace")


def test_a_row_is_the_same_in_whatever_batch_it_comes():
    data = RandomDataset(model(weighted=True), 100, seed=9)
    whole, labels = data.batch(np.arange(100))
    part, part_labels = RandomDataset(model(weighted=True), 60, seed=9, first=40).batch([30, 2])
    for row, at in ((70, 0), (42, 1)):
        one, same = whole.rows(row, row + 1), part.rows(at, at + 1)
        for field in dataclasses.fields(one):
            np.testing.assert_array_equal(getattr(one, field.name), getattr(same, field.name))
        assert labels[row] == part_labels[at]


def test_rows_outside_the_dataset_and_impossible_sizes_are_refused():
    with pytest.raises(DataError, match=r"\[0, 10\), got row 10"):
        RandomDataset(model(), 10, seed=0).batch([10])
    with pytest.raises(DataError, match="size -1"):
        RandomDataset(model(), -1, seed=0)


def test_splits_share_no_sample_and_one_signal():
    splits = load(model(), 2000, seed=4)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (2000, 200, 200)
    dense = np.concatenate([part.batch(np.arange(len(part)))[0].dense for part in dataclasses_values(splits)])
    assert len(np.unique(dense, axis=0)) == 2400


def dataclasses_values(splits):
    return [getattr(splits, field.name) for field in dataclasses.fields(splits)]


def test_labels_carry_a_signal_that_a_linear_model_finds_on_unseen_samples():
    splits = load(model(rows=20), 8000, seed=4)

    def columns(data):
        batch, labels = data.batch(np.arange(len(data)))
        return np.column_stack([np.ones(len(data)), batch.dense]), labels

    x, y = columns(splits.train)
    weights = np.linalg.lstsq(x, y, rcond=None)[0]
    x, y = columns(splits.test)
    scores = x @ weights
    auc = (scores[y == 1][:, None] > scores[y == 0]).mean()
    assert 0.65 < auc < 0.9
    assert 0.3 < y.mean() < 0.7
