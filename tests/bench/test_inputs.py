from __future__ import annotations

import numpy as np
import pytest
from bundles import CONFIGS

from dlrm_deploy.batch import Batch
from dlrm_deploy.bench import inputs
from dlrm_deploy.bench.inputs import Inputs, gathered_bytes, rotating_batches, split, touching_batches
from dlrm_deploy.config import FeatureConfig, ModelConfig
from dlrm_deploy.data.random import random_batch
from dlrm_deploy.data.trace import profile_batches
from dlrm_deploy.tables import TableConfig

INT64 = np.dtype(np.int64)


def one_table(rows: int, width: int, **bag: int) -> ModelConfig:
    return ModelConfig(
        name="one",
        dense_features=("d",),
        tables=(TableConfig(name="t", rows=rows, width=width),),
        features=(FeatureConfig(name="f", table="t", **bag),),
        bottom_mlp=(width,),
        top_mlp=(1,),
    )


def assert_same(actual: Batch, expected: Batch) -> None:
    for name in ("dense", "indices", "offsets"):
        np.testing.assert_array_equal(getattr(actual, name), getattr(expected, name))
        assert getattr(actual, name).dtype == getattr(expected, name).dtype
    assert (actual.weights is None) == (expected.weights is None)
    if actual.weights is not None and expected.weights is not None:
        np.testing.assert_array_equal(actual.weights, expected.weights)


def test_gathered_bytes_counts_ids_times_width_of_their_own_table():
    config = ModelConfig(
        name="two",
        dense_features=("d",),
        tables=(TableConfig(name="a", rows=9, width=2), TableConfig(name="b", rows=9, width=5)),
        features=(FeatureConfig(name="a", table="a"), FeatureConfig(name="b", table="b")),
        bottom_mlp=(2,),
        top_mlp=(1,),
        interaction="concat",
    )
    batch = Batch.from_bags([[0.0], [0.0]], [[[1, 2], []], [[3], [4, 5]]])
    assert gathered_bytes(config, batch) == (2 * 2 + 3 * 5) * 4


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("name", CONFIGS)
def test_split_gives_the_same_pieces_as_rows(name, dtype):
    many = random_batch(CONFIGS[name], 12, np.random.default_rng(3), index_dtype=dtype)
    pieces = split(many, 4)
    assert len(pieces) == 3
    for i, piece in enumerate(pieces):
        assert_same(piece, many.rows(4 * i, 4 * i + 4))


def test_batches_differ_from_one_another_and_repeat_with_the_seed(monkeypatch):
    monkeypatch.setattr(inputs, "GATHERED_BYTES", 64 * 16 * 4 * 20)
    monkeypatch.setattr(inputs, "_DRAWN_BYTES", 4000)  # several draws
    config = one_table(rows=10_000, width=16, pooling_factor=1)
    batches = rotating_batches(config, 64, 5, distribution="uniform", index_dtype=INT64)
    assert len(batches) == 20
    assert len({batch.indices.tobytes() for batch in batches}) == 20
    assert {batch.batch_size for batch in batches} == {64}
    again = rotating_batches(config, 64, 5, distribution="uniform", index_dtype=INT64)
    for batch, same in zip(batches, again, strict=True):
        assert_same(batch, same)
    other = rotating_batches(config, 64, 6, distribution="uniform", index_dtype=INT64)
    assert not np.array_equal(other[0].indices, batches[0].indices)


def test_there_are_never_fewer_batches_than_three_nor_more_than_the_limit(monkeypatch):
    config = one_table(rows=100, width=16, pooling_factor=4)
    monkeypatch.setattr(inputs, "GATHERED_BYTES", 1)
    assert len(rotating_batches(config, 8, 0, distribution="zipf", index_dtype=INT64)) == 3
    monkeypatch.setattr(inputs, "GATHERED_BYTES", 1 << 30)
    monkeypatch.setattr(inputs, "MAX_BATCHES", 17)
    assert len(rotating_batches(config, 8, 0, distribution="zipf", index_dtype=INT64)) == 17


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 1_000_003])
def test_touching_reads_a_row_in_every_page_of_a_table(rows):
    config = one_table(rows, width=16, pooling_factor=3)  # 64 rows a page
    batches = list(touching_batches(config, INT64))
    pages = np.unique(np.concatenate([batch.indices for batch in batches]) // 64)
    np.testing.assert_array_equal(pages, np.arange(-(-rows // 64)))
    assert max(batch.batch_size for batch in batches) <= 2048
    for batch in batches:
        batch.check_fits(config)
        assert batch.explain_bad_ids(config) is None


@pytest.mark.parametrize("name", CONFIGS)
def test_touching_batches_fit_every_form_of_model(name):
    for batch in touching_batches(CONFIGS[name], np.dtype(np.int32)):
        batch.check_fits(CONFIGS[name])
        assert batch.explain_bad_ids(CONFIGS[name]) is None
        assert batch.indices.dtype == np.int32


def test_batches_of_a_trace_are_one_stream_with_its_reuse(monkeypatch):
    monkeypatch.setattr(inputs, "GATHERED_BYTES", 64 * 16 * 4 * 20)
    monkeypatch.setattr(inputs, "_DRAWN_BYTES", 4000)  # several draws
    config = one_table(rows=10_000, width=16, pooling_factor=1)
    ids = np.repeat(np.arange(500), 4)  # each id four times in a row
    trace = profile_batches([Batch.from_bags([[0.0]] * ids.size, [[[i] for i in ids]])], config)
    batches = rotating_batches(config, 64, 5, distribution="trace", index_dtype=INT64, trace=trace)
    drawn = np.concatenate([batch.indices for batch in batches])
    repeats = np.mean(drawn[1:] == drawn[:-1])
    assert repeats == pytest.approx(0.75, abs=0.05)  # also across batches and draws
    again = rotating_batches(config, 64, 5, distribution="trace", index_dtype=INT64, trace=trace)
    np.testing.assert_array_equal(drawn, np.concatenate([batch.indices for batch in again]))


def test_batches_of_the_size_in_use_are_drawn_once(monkeypatch):
    monkeypatch.setattr(inputs, "GATHERED_BYTES", 1)
    made = Inputs(one_table(rows=99, width=16, max_ids=9), 3, distribution="uniform", index_dtype=INT64)
    batches = made.of_size(8)
    assert made.of_size(8) is batches
    assert made.of_size(4)[0].batch_size == 4
    assert_same(made.of_size(8)[0], batches[0])


def test_outputs_are_compared_on_the_longest_bag_and_on_many_samples(monkeypatch):
    monkeypatch.setattr(inputs, "GATHERED_BYTES", 1 << 16)
    made = Inputs(one_table(rows=99, width=16, max_ids=9), 3, distribution="uniform", index_dtype=INT64)
    longest, *others = made.to_compare(8)
    assert np.diff(longest.offsets).max() == max(np.diff(batch.offsets).max() for batch in made.of_size(8))
    assert sum(batch.batch_size for batch in others) == 256
    assert [batch.batch_size for batch in made.to_compare(1000)] == [1000, 1000]
