from dataclasses import replace

import numpy as np
import pytest
from bundles import CONFIGS

from dlrm_deploy.batch import Batch
from dlrm_deploy.data.random import RandomDataset
from dlrm_deploy.errors import DataError, EngineError
from dlrm_deploy.metrics import Difference, auc, calibration, log_loss
from dlrm_deploy.parity import labelled
from dlrm_deploy.parity.compare import Limit
from dlrm_deploy.parity.labelled import LabelledSamples, compare_labelled
from dlrm_deploy.parity.report import LabelledParity, Quality

CONFIG = CONFIGS["dot"]


class Scorer:
    """Stands in for an engine: the scores of a sample follow from its first dense value."""

    def __init__(self, change=lambda scores: scores):
        self.change = change
        self.sizes = []

    def predict(self, batch):
        self.sizes.append(batch.batch_size)
        return self.change(batch.dense[:, 0] * np.float32(0.8) + np.float32(0.1))


def save(path, samples=50, **changes):
    batch, labels = RandomDataset(CONFIG, samples, 3).batch(np.arange(samples))
    arrays = {"dense": batch.dense, "indices": batch.indices, "offsets": batch.offsets, "labels": labels, **changes}
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


def test_a_file_is_given_out_in_slices_that_make_up_the_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(labelled, "SLICE", 16)
    path = save(tmp_path / "d.npz")
    dataset = RandomDataset(CONFIG, 50, 3)
    for samples in (LabelledSamples.read(path, CONFIG), LabelledSamples.of(dataset, "random", CONFIG, CONFIG)):
        for _ in range(2):  # as often as wanted
            slices = list(samples.slices())
            assert [batch.batch_size for batch, _ in slices] == [16, 16, 16, 2]
            whole, labels = dataset.batch(np.arange(50))
            np.testing.assert_array_equal(np.concatenate([batch.dense for batch, _ in slices]), whole.dense)
            np.testing.assert_array_equal(np.concatenate([part for _, part in slices]), labels)


@pytest.mark.parametrize("dtype", [bool, np.int64, np.uint8, np.float64])
def test_labels_may_be_of_any_number_type(tmp_path, dtype):
    labels = np.arange(50) % 2
    samples = LabelledSamples.read(save(tmp_path / "d.npz", labels=labels.astype(dtype)), CONFIG)
    ((_, read),) = samples.slices()
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, labels)


HALF = np.arange(50) % 2


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, "holds no labels: add an array `labels`"),
        (HALF[:49], r"labels are int64 \(49,\), expected one number for each of 50"),
        (HALF[:, None], r"labels are int64 \(50, 1\)"),
        (HALF.astype(str), "labels are <U21"),
        (np.where(HALF, 1, np.nan), "label 0 is nan, and 25 of 50 are not 0 or 1"),
        (HALF * 2, "label 1 is 2, and 25 of 50 are not 0 or 1"),
        (np.zeros(50), "0 positive and 50 negative samples. AUC needs both classes"),
        (np.ones(50), "50 positive and 0 negative samples"),
    ],
)
def test_labels_that_cannot_be_right_are_refused(tmp_path, labels, message):
    with pytest.raises(DataError, match=message):
        LabelledSamples.read(save(tmp_path / "d.npz", labels=labels), CONFIG)


def test_samples_of_another_model_and_ids_out_of_range_are_refused_with_the_file(tmp_path):
    with pytest.raises(DataError, match=r"d.npz: model 'weighted' needs one weight per id"):
        LabelledSamples.read(save(tmp_path / "d.npz"), CONFIGS["weighted"])
    ids = RandomDataset(CONFIG, 50, 3).batch(np.arange(50))[0].indices.copy()
    ids[0] = 10**6
    path = save(tmp_path / "d.npz", indices=ids)
    with pytest.raises(DataError, match=r"d.npz: feature 'a', sample .* id 1000000 is outside"):
        LabelledSamples.read(path, CONFIG)
    assert next(LabelledSamples.read(path, replace(CONFIG, index_policy="clamp")).slices())[0].indices[0] == 10**6


def test_a_dataset_for_another_model_is_refused():
    data = RandomDataset(CONFIG, 5, 0)
    with pytest.raises(DataError, match=r"'a' with ids below 11 instead of 'x' with ids below 18.*Give the recipe"):
        LabelledSamples.of(data, "the test split", CONFIG, CONFIGS["shared"])
    fewer = replace(CONFIG, features=CONFIG.features[:2], tables=CONFIG.tables[:2])
    with pytest.raises(DataError, match=r"sparse features are not those of 'dot' \(2 instead of 3\)"):
        LabelledSamples.of(data, "the test split", fewer, CONFIG)


def samples_of(size, slice_size=None, monkeypatch=None):
    if slice_size:
        monkeypatch.setattr(labelled, "SLICE", slice_size)
    return LabelledSamples.of(RandomDataset(CONFIG, size, 3), "random data", CONFIG, CONFIG)


def test_figures_are_those_of_the_plain_metrics_over_all_slices(monkeypatch):
    reference = Scorer()
    noise = np.random.default_rng(0).uniform(-0.05, 0.05, 300).astype(np.float32)
    engine = Scorer(lambda scores: scores + noise[: scores.size])
    case, found = compare_labelled(
        samples_of(300, 128, monkeypatch), reference, engine, limit=lambda _: Limit(0.1), resamples=50
    )
    assert reference.sizes == engine.sizes == [128, 128, 44]
    batch, labels = RandomDataset(CONFIG, 300, 3).batch(np.arange(300))
    expected = Scorer().predict(batch)
    actual = expected + np.concatenate([noise[:128], noise[:128], noise[:44]])
    for quality, scores in ((found.reference, expected), (found.engine, actual)):
        assert quality == Quality(auc(labels, scores), log_loss(labels, scores), calibration(labels, scores))
    assert found.auc_drop.value == found.reference.auc - found.engine.auc
    assert found.auc_drop.low <= found.auc_drop.value <= found.auc_drop.high
    assert found.log_loss_rise.value == pytest.approx(found.engine.log_loss - found.reference.log_loss, abs=1e-12)
    assert (found.samples, found.positives) == (300, labels.sum())
    assert case.passed
    assert case.output.rows == 300
    assert case.batch is None


def test_the_slice_with_the_worst_sample_is_kept(monkeypatch):
    engine = Scorer(lambda scores: scores + np.float32(0.2) * (scores.size == 44))
    case, _ = compare_labelled(
        samples_of(300, 128, monkeypatch), Scorer(), engine, limit=lambda _: Limit(0.1), resamples=5
    )
    assert not case.passed
    assert case.batch.batch_size == 44
    assert case.output.worst_row >= 256


def test_an_engine_that_fails_or_gives_nan_has_no_figures():
    def crash(scores):
        raise EngineError("out of memory")

    case, found = compare_labelled(samples_of(20), Scorer(), Scorer(crash), limit=lambda _: Limit(0.1))
    assert (case.problem, case.batch.batch_size, found) == ("out of memory", 20, None)
    case, found = compare_labelled(samples_of(20), Scorer(), Scorer(lambda s: s * np.nan), limit=lambda _: Limit(0.1))
    assert (case.passed, found) == (False, None)
    nan = Scorer(lambda s: np.where(np.arange(s.size) == 3, np.float32(np.nan), s))
    case, found = compare_labelled(samples_of(20), Scorer(), nan, limit=lambda _: Limit(0.1))
    assert (case.output.nonfinite, case.output.worst_row, found) == (1, 3, None)


def test_samples_of_one_class_no_samples_and_ones_that_the_reference_refuses_are_errors():
    batch = Batch.from_bags(np.zeros((2, 3)), [[[1], []]] * 3)
    one_class = LabelledSamples("here", lambda: iter([(batch, np.ones(2, np.float32))]))
    with pytest.raises(DataError, match="2 positive and 0 negative"):
        compare_labelled(one_class, Scorer(), Scorer(), limit=lambda _: Limit(0.1))
    with pytest.raises(DataError, match="here holds no samples"):
        compare_labelled(LabelledSamples("here", lambda: iter(())), Scorer(), Scorer(), limit=lambda _: Limit(0.1))

    def refuse(scores):
        raise labelled.BatchError("id 7 is outside [0, 5)")

    with pytest.raises(DataError, match=r"random data, from sample 0 on: id 7 is outside"):
        compare_labelled(samples_of(20), Scorer(refuse), Scorer(), limit=lambda _: Limit(0.1))


def parity(value, low, high, limit=1e-3):
    quality = Quality(0.7, 0.5, 1.0)
    return LabelledParity(
        source="here", samples=10, positives=4, reference=quality, engine=quality,
        auc_drop=Difference(value, low, high), log_loss_rise=Difference(0, 0, 0),
        max_auc_drop=limit, resamples=5, seed=0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("drop", "passed", "certain"),
    [
        ((1e-4, -1e-4, 3e-4), True, True),
        ((1e-3, 0.0, 1e-3), True, True),
        ((1e-4, -4e-3, 4e-3), True, False),
        ((2e-3, -4e-3, 4e-3), False, False),
        ((2e-3, 1.5e-3, 4e-3), False, True),
    ],
)
def test_the_drop_decides_and_an_interval_across_the_limit_is_said(drop, passed, certain):
    found = parity(*drop)
    assert (found.passed, found.certain) == (passed, certain)
    assert found.summary().startswith("PASSED  AUC: drop" if passed else "FAILED  AUC: drop")
    assert ("too few samples to tell" in found.summary()) == (not certain)
    assert (found.to_dict()["passed"], found.to_dict()["certain"]) == (passed, certain)
