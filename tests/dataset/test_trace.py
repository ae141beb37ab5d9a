"""Profiles of stack distances and streams drawn from them. The kernels: tests/engines/native/lru_stack_test.cc."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dlrm_deploy.batch import Batch
from dlrm_deploy.config import FeatureConfig, ModelConfig
from dlrm_deploy.data.random import random_batch
from dlrm_deploy.data.trace import EVERY_FEATURE, StackProfile, Trace, TraceStream, profile_batches
from dlrm_deploy.engines.lru_stack import LruStack, stack_distances
from dlrm_deploy.errors import BatchError, DataError, EngineError
from dlrm_deploy.tables import TableConfig


def plain_distances(ids: np.ndarray) -> list[int]:
    """The definition, on a list whose end is the top of the stack."""
    stack: list[int] = []
    distances = []
    for i in ids.tolist():
        distances.append(len(stack) - stack.index(i) if i in stack else 0)
        if i in stack:
            stack.remove(i)
        stack.append(i)
    return distances


def source(count: int, rows: int, seed: int = 0) -> np.ndarray:
    """Skewed ids whose favourites change over time."""
    rng = np.random.default_rng(seed)
    return ((rng.zipf(1.2, count) + np.arange(count) // 2000) % rows).astype(np.int64)


def model(*rows: int, **feature) -> ModelConfig:
    names = [f"f{i}" for i in range(len(rows))]
    return ModelConfig(
        name="m",
        dense_features=("x",),
        tables=tuple(TableConfig(name=f"t_{n}", rows=r, width=4) for n, r in zip(names, rows, strict=True)),
        features=tuple(FeatureConfig(name=n, table=f"t_{n}", **{"max_ids": 4, **feature}) for n in names),
        bottom_mlp=(4,),
        top_mlp=(1,),
    )


def profile(feature: str = EVERY_FEATURE, distances=(0, 1, 2, 7), cumulative=(0.1, 0.5, 0.75, 1.0), lines: int = 9):
    return StackProfile(
        feature=feature, lines=lines, distances=np.array(distances), cumulative=np.array(cumulative, np.float64)
    )


def bags(*features: list[list[int]]) -> Batch:
    return Batch.from_bags(np.zeros((len(features[0]), 1)), features)


def ks_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Largest difference of the two samples' distribution functions (Kolmogorov and Smirnov)."""
    values = np.union1d(a, b)
    ranks = [np.searchsorted(np.sort(x), values, side="right") / x.size for x in (a, b)]
    return float(np.abs(ranks[0] - ranks[1]).max())


def test_distances_are_those_of_the_definition():
    ids = source(4000, 300)
    np.testing.assert_array_equal(stack_distances(ids, 300), plain_distances(ids))


@pytest.mark.parametrize("count", [80_000, 400_000])
def test_replay_gives_exactly_the_distances_that_were_asked_for(count):
    recorded = stack_distances(source(count, count // 10), count // 10)
    lines = int((recorded == 0).sum())
    accessed, effective = LruStack(lines, warm=False).replay(recorded)
    np.testing.assert_array_equal(effective, recorded)
    np.testing.assert_array_equal(stack_distances(accessed, lines), recorded)


def test_distances_that_are_not_possible_come_out_as_what_they_became():
    drawn = np.random.default_rng(1).integers(0, 60, 5000)
    accessed, effective = LruStack(40, warm=False).replay(drawn)
    np.testing.assert_array_equal(stack_distances(accessed, 40), effective)
    np.testing.assert_array_equal(effective[drawn > 40][-100:], 40)
    assert (effective == 0).sum() == 40


def test_a_stack_that_cannot_be_says_so():
    with pytest.raises(EngineError, match="lines is 0, expected 1 to 2147483648"):
        LruStack(0)
    with pytest.raises(EngineError, match="distance -2 at position 1 is negative"):
        LruStack(3).replay(np.array([1, -2]))
    with pytest.raises(EngineError, match=r"line 3 at position 0 is outside \[0, 3\)"):
        stack_distances(np.array([3]), 3)


def test_a_warm_stream_reproduces_the_distances_of_its_source():
    ids = source(80_000, 8_000)
    recorded = profile_batches([bags([ids.tolist()])])
    config = model(8_000, pooling_factor=1, max_ids=None)
    stream = TraceStream(recorded, config, seed=3)
    drawn = stream.ids(0, 160_000)
    again = stack_distances(drawn, 8_000)[80_000:]  # the first half shows the stack's lines for the first time
    expected = stack_distances(ids, 8_000)
    assert np.mean(again == 0) < 0.02
    again, expected = again[again > 0], expected[expected > 0]
    # A first occurrence in the source is the id that has not come for longest in the stream: distance L.
    again = again[again < recorded.profiles[0].lines]
    # The limit at 5 % for two samples. Distances are drawn from the source itself, so both are of one distribution.
    assert ks_distance(again, expected) < 1.36 * np.sqrt(1 / again.size + 1 / expected.size)


def test_a_stream_is_the_same_however_it_is_cut():
    trace, config = Trace((profile(lines=300, distances=(0, 3, 290), cumulative=(0.2, 0.7, 1.0)),)), model(400, 500)
    whole, cut = TraceStream(trace, config, seed=5), TraceStream(trace, config, seed=5)
    pieces = [cut.ids(0, n) for n in (1, 0, 700, 299)]
    np.testing.assert_array_equal(np.concatenate(pieces), whole.ids(0, 1000))
    assert not np.array_equal(whole.ids(1, 1000), whole.ids(0, 1000))
    assert not np.array_equal(TraceStream(trace, config, seed=6).ids(0, 1000), np.concatenate(pieces))


def test_a_cold_stream_begins_with_ids_that_never_came():
    trace, config = Trace((profile(),)), model(50)
    cold = stack_distances(TraceStream(trace, config, seed=1, warm=False).ids(0, 200), 50)
    assert cold[0] == 0
    assert (cold == 0).sum() == 9


def test_ids_lie_in_the_table_and_far_apart():
    stream = TraceStream(Trace((profile(lines=7),)), model(1000), seed=0)
    ids = np.unique(stream.ids(0, 500))
    assert ids.size == 7
    assert 0 <= ids.min() < ids.max() < 1000
    assert np.diff(ids).min() > 1


def test_reuse_crosses_batches_of_one_stream():
    config = model(1000, 1000, pooling_factor=2, max_ids=None)
    trace = Trace((profile(distances=(1,), cumulative=(1.0,), lines=9),))
    stream = TraceStream(trace, config, seed=2)
    rng = np.random.default_rng(0)
    batches = [random_batch(config, 8, rng, distribution="trace", trace=stream) for _ in range(3)]
    assert len({tuple(np.unique(batch.indices[:16])) for batch in batches}) == 1  # the same id for ever
    alone = random_batch(config, 8, rng, distribution="trace", trace=trace, index_dtype=np.int32)
    assert alone.indices.dtype == np.int32
    alone.check_fits(config)


def test_bags_of_any_length_are_cut_from_the_stream():
    config, rng = model(100, 200), np.random.default_rng(4)
    batch = random_batch(config, 50, rng, distribution="trace", trace=Trace((profile(),)))
    batch.check_fits(config)
    assert batch.explain_bad_ids(config) is None
    assert len(np.unique(np.diff(batch.offsets))) == 5
    assert random_batch(config, 0, rng, distribution="trace", trace=Trace((profile(),))).batch_size == 0


def test_a_trace_and_the_distribution_of_that_name_go_together():
    config, rng, trace = model(100), np.random.default_rng(0), Trace((profile(),))
    with pytest.raises(DataError, match="go together"):
        random_batch(config, 1, rng, distribution="trace")
    with pytest.raises(DataError, match="go together"):
        random_batch(config, 1, rng, trace=trace)
    with pytest.raises(DataError, match="other features or table sizes"):
        random_batch(config, 1, rng, distribution="trace", trace=TraceStream(trace, model(101), 0))


def test_a_profile_is_counted_per_feature_over_all_batches():
    first, second = bags([[1, 1], [2]], [[5], []]), bags([[1]], [[]])
    trace = profile_batches([first, bags([], []), second], model(9, 9))
    a, b = trace.profiles
    assert (a.feature, a.lines, a.accesses) == ("f0", 2, 4)
    np.testing.assert_array_equal(a.distances, [0, 1, 2])  # of 1 1 2 1: 0 1 0 2
    np.testing.assert_allclose(a.cumulative, [0.5, 0.75, 1.0])
    assert (b.feature, b.lines, b.first_share) == ("f1", 1, 1.0)
    assert [p.feature for p in profile_batches([first]).profiles] == ["0", "1"]


def test_ids_are_profiled_after_the_modulo_of_their_feature():
    config = model(9)
    config = replace(config, features=(replace(config.features[0], modulo=4),))
    assert profile_batches([bags([[1, 5, 9]])], config).profiles[0].lines == 1


def test_traffic_that_cannot_be_profiled_is_refused():
    with pytest.raises(DataError, match="no ids to profile"):
        profile_batches([bags([[], []])])
    with pytest.raises(DataError, match="a batch has 2 features, and those before it 1"):
        profile_batches([bags([[1]]), bags([[1]], [[1]])])
    with pytest.raises(BatchError, match="2 sparse features"):
        profile_batches([bags([[1]])], model(9, 9))


def test_hit_rates_are_those_of_an_lru_cache():
    ids = source(3000, 200)
    recorded = profile_batches([bags([ids.tolist()])]).profiles[0]
    for rows in (0, 1, 20, 150, 10_000):
        cache: list[int] = []
        hits = 0
        for i in ids.tolist():
            hits += i in cache
            if i in cache:
                cache.remove(i)
            cache = ([i, *cache])[:rows]
        assert recorded.hit_rate(rows) == pytest.approx(hits / ids.size)


def test_a_trace_survives_its_file(tmp_path):
    trace = Trace((profile("a"), profile("b", distances=(1, 3), cumulative=(0.5, 1.0), lines=3)))
    trace.write(tmp_path / "t.npz")
    read = Trace.read(tmp_path / "t.npz")
    for before, after in zip(trace.profiles, read.profiles, strict=True):
        assert (before.feature, before.lines, before.accesses) == (after.feature, after.lines, after.accesses)
        np.testing.assert_array_equal(before.distances, after.distances)
        np.testing.assert_array_equal(before.cumulative, after.cumulative)


def test_the_papers_files_are_read_one_a_table(tmp_path):
    folder = tmp_path / "jumbled"  # a j in a folder's name stays
    folder.mkdir()
    (folder / "dist_0.log").write_text("4, 2, 9\n0, 1, 3\n0.25, 0.5, 1.0\n")
    (folder / "dist_1.log").write_text("np.int64(1)\nnp.int64(0), 1\nnp.float64(0.5), np.float64(0.9999999)\n")
    first, second = Trace.read(folder / "dist_j.log").for_model(model(10, 10))
    assert (first.lines, first.first_share, first.hit_rate(1)) == (3, 0.25, 0.25)
    np.testing.assert_array_equal(second.distances, [0, 1])
    assert second.cumulative[-1] == 1.0
    (alone,) = Trace.read(folder / "dist_0.log").profiles
    assert alone.feature == EVERY_FEATURE


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1, 2\n0, 1\n", "has 2 lines, and a trace has three"),
        ("1, 2\n0, one\n0.5, 1\n", "is no trace"),
        ("1, 2\n0, 1\n0.5\n", "of the same length"),
        ("1, 2\n1, 0\n0.5, 1\n", "distances must rise"),
        ("1, 2\n0, 3\n0.5, 1\n", "a distance of 3 is impossible among 2 different ids"),
        ("1, 2\n0, 1\n0.5, 0.9\n", "must rise from 0 to 1, and end at 0.9"),
        ("1, 2\n0, 1\n0.5, nan\n", "must rise from 0 to 1"),
        ("1, 2\n0, 99999999999999999999\n0.5, 1\n", "is no trace"),
        ("1, 2\n0, 1\n0.5, é\n", "cannot read the trace"),
    ],
)
def test_a_text_that_is_no_trace_is_refused(tmp_path, text, message):
    (tmp_path / "t.log").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message) as refused:
        Trace.read(tmp_path / "t.log")
    assert "t.log" in str(refused.value)


def test_a_file_that_is_no_trace_is_refused(tmp_path):
    path = tmp_path / "t.npz"
    with pytest.raises(DataError, match="cannot read"):
        Trace.read(path)
    np.savez(path, features=np.array(["a"]))
    with pytest.raises(DataError, match="lacks format, lines"):
        Trace.read(path)
    trace = Trace((profile("a"),))
    trace.write(path)
    good = dict(np.load(path))
    for change in (
        {"sizes": np.array([3])},
        {"sizes": np.array([-4, 8])},
        {"distances": good["distances"].astype(np.float32)},
        {"features": np.array(["a", "b"])},
    ):
        np.savez(path, **{**good, **change})
        with pytest.raises(DataError, match="damaged trace"):
            Trace.read(path)
    np.savez(path, **{**good, "cumulative": good["cumulative"] / 2})
    with pytest.raises(DataError, match=r"t.npz: trace of feature 'a': cumulative"):
        Trace.read(path)


def test_a_trace_over_more_ids_than_rows_is_refused_or_squeezed():
    trace, config = Trace((profile(lines=9),)), model(4, 20)
    with pytest.raises(DataError, match=r"feature 'f0': the trace goes over 9 ids, and the table has 4 rows"):
        TraceStream(trace, config, 0)
    squeezed = trace.squeezed(config)
    small, large = squeezed.profiles
    assert (small.feature, small.lines, large.feature, large.lines) == ("f0", 4, "f1", 9)
    np.testing.assert_array_equal(small.distances, [0, 1, 2, 4])
    assert small.hit_rate(2) == trace.profiles[0].hit_rate(2)
    assert TraceStream(squeezed, config, 0).ids(0, 100).max() < 4


def test_a_feature_without_a_profile_is_named():
    with pytest.raises(DataError, match="no profile of feature 'f1': it has f0"):
        Trace((profile("f0"),)).for_model(model(10, 10))
    with pytest.raises(DataError, match="one profile a feature"):
        Trace((profile("a"), profile("a")))
