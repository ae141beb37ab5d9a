import numpy as np
import pytest
from bundles import CONFIGS

from dlrm_deploy.bench import inputs
from dlrm_deploy.bench.queries import LEAST_QUERIES, merge, query_library, query_sizes
from dlrm_deploy.data.random import random_batch
from dlrm_deploy.data.trace import StackProfile, Trace


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(inputs, "GATHERED_BYTES", 1 << 12)


def library(name: str = "dot", seed: int = 1, **options):
    values = {"least": 2, "most": 9, "distribution": "uniform", "trace": None, "index_dtype": np.dtype(np.int64)}
    return query_library(CONFIGS[name], seed, **{**values, **options})


def test_sizes_have_the_range_and_the_mean_of_mlperf():
    sizes = query_sizes(20_000, 100, 700, np.random.default_rng(0))
    assert 100 <= sizes.min() < 105
    assert 650 < sizes.max() <= 700
    assert sizes.mean() == pytest.approx(270, abs=4)
    assert set(query_sizes(100, 5, 5, np.random.default_rng(0))) == {5}


def test_a_library_is_the_same_for_a_seed_and_differs_within():
    first, again, other = library(), library(), library(seed=2)
    assert len(first) >= LEAST_QUERIES
    assert all(2 <= query.batch_size <= 9 for query in first)
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a.indices, b.indices)
    assert not np.array_equal(first[0].dense, other[0].dense)
    assert len({query.dense.tobytes() for query in first}) == len(first)


def test_a_library_reads_more_rows_than_the_caches_hold(monkeypatch):
    monkeypatch.setattr(inputs, "GATHERED_BYTES", 1 << 17)
    queries = library()
    assert len(queries) > LEAST_QUERIES
    assert sum(inputs.gathered_bytes(CONFIGS["dot"], query) for query in queries) >= 1 << 17


def test_queries_of_a_trace_are_one_stream(tmp_path):
    profile = StackProfile(feature="*", lines=9, distances=np.array([1]), cumulative=np.array([1.0]))
    Trace((profile,)).write(tmp_path / "t.npz")
    queries = library(distribution="trace", trace=tmp_path / "t.npz")
    bounds = [query.offsets[query.batch_size] for query in queries]
    firsts = np.concatenate([query.indices[:bound] for query, bound in zip(queries, bounds, strict=True)])
    assert np.unique(firsts).size == 1  # always the id just seen


@pytest.mark.parametrize("name", ["dot", "weighted", "one_hot", "ids_only"])
def test_merging_is_the_inverse_of_cutting(name):
    whole = random_batch(CONFIGS[name], 12, np.random.default_rng(0))
    merged = merge([whole.rows(0, 5), whole.rows(5, 6), whole.rows(6, 12)])
    np.testing.assert_array_equal(merged.dense, whole.dense)
    np.testing.assert_array_equal(merged.indices, whole.indices)
    np.testing.assert_array_equal(merged.offsets, whole.offsets)
    assert (merged.weights is None) == (whole.weights is None)
    if whole.weights is not None:
        np.testing.assert_array_equal(merged.weights, whole.weights)
    assert merge([whole]) is whole
