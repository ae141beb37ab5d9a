import json
from dataclasses import replace

import numpy as np
import pytest
from bundles import CONFIGS, make_bundle

from dlrm_deploy.batch import Batch
from dlrm_deploy.bundle import Bundle
from dlrm_deploy.checksums import CHECKSUMS
from dlrm_deploy.config import INDEX_POLICIES, PRECISIONS
from dlrm_deploy.data.random import RandomDataset
from dlrm_deploy.engines.torch_eager import TorchEngine
from dlrm_deploy.errors import BatchError, EngineError, MissingDependencyError
from dlrm_deploy.model.rounding import LEAST_LIMIT
from dlrm_deploy.parity import check
from dlrm_deploy.parity.check import check_parity
from dlrm_deploy.parity.labelled import LabelledSamples
from dlrm_deploy.parity.limits import precision_limit


class Faulty(TorchEngine):
    """The reference with one fault, under the name of another engine."""

    name = "onnxruntime"

    def __init__(self, bundle, threads, fault):
        super().__init__(bundle, threads)
        self._fault = fault

    def predict(self, batch):
        return self._fault(super().predict, batch)


@pytest.fixture
def faulty(monkeypatch):
    """A function that puts a fault into engine `onnxruntime`."""
    real = check.open_unchecked

    def install(fault):
        def open_unchecked(bundle, name, **options):
            return Faulty(bundle, 1, fault) if name == "onnxruntime" else real(bundle, name, **options)

        monkeypatch.setattr(check, "open_unchecked", open_unchecked)

    return install


def failed(report):
    return [case.name for case in report.cases if not case.passed]


def test_stock_onnxruntime_passes_every_case_of_every_model(any_bundle):
    report = check_parity(any_bundle, "onnxruntime-stock", threads=1)
    assert failed(report) == []
    assert report.passed
    assert report.max_abs <= report.limit == LEAST_LIMIT
    names = [case.name for case in report.cases]
    assert [name for name in names if name.endswith("random samples")] == [
        f"{size} random samples" for size in (0, 1, 2, 37, 2048, 8192)
    ]
    policy = any_bundle.config.index_policy
    bad_ids = f"ids out of range: {'refused' if policy == 'error' else policy}"
    assert {"golden batch", bad_ids, "64-bit ids", "32-bit ids", "longest bags"} <= set(names)
    assert ("all bags empty" in names) == (any_bundle.config.pooling_factors is None)
    assert report.rows == sum(case.output.rows for case in report.cases if case.output)
    assert report.reference.startswith("torch ")
    assert 0 < report.mean_ulp <= report.max_ulp < 1000


@pytest.mark.parametrize("policy", INDEX_POLICIES)
def test_ids_out_of_range_are_checked_under_every_policy(tmp_path, policy):
    bundle = make_bundle("dot", tmp_path / "bundle", index_policy=policy)
    report = check_parity(bundle, "onnxruntime-stock", sizes=(2,), threads=1)
    case = report.cases[1]
    assert case.name == f"ids out of range: {'refused' if policy == 'error' else policy}"
    assert case.passed
    assert (case.output is None) == (policy == "error")


def test_a_32_bit_graph_passes_with_ids_of_both_types(tmp_path):
    report = check_parity(make_bundle("dot", tmp_path / "b", index_dtype="int32"), "onnxruntime-stock", threads=1)
    assert failed(report) == []


def test_a_fault_in_long_bags_is_found_where_it_is(bundle, faulty):
    def fault(predict, batch):
        result = predict(batch)
        if batch.batch_size and (np.diff(batch.offsets) == 5).all():
            result[2] += np.float32(1e-4)
        return result

    faulty(fault)
    report = check_parity(bundle, "onnxruntime", sizes=(3,))
    assert set(failed(report)) == {"longest bags", "one id repeated", "first and last rows"}
    assert not report.passed
    assert report.worst.output.worst_row == 2
    assert report.max_ulp > 1000
    assert {case.name for case in report.cases if case.batch is not None} == set(failed(report))
    kept = report.worst.batch
    assert fault(TorchEngine(bundle, 1).predict, kept)[2] != TorchEngine(bundle, 1).predict(kept)[2]
    assert report.max_abs == pytest.approx(1e-4, rel=1e-2)
    assert report.summary().startswith("FAILED  probability: max abs error 1.0")
    assert "at row 2 (limit 1.0e-06" in report.summary()


def test_nan_fails_and_the_record_stays_valid_json(bundle, faulty):
    def fault(predict, batch):
        result = predict(batch)
        result[1:2] = np.nan
        return result

    faulty(fault)
    report = check_parity(bundle, "onnxruntime", sizes=(0, 1, 2))
    names = [case.name for case in report.cases]
    assert "2 random samples" in failed(report)
    assert set(names) - set(failed(report)) == {
        "ids out of range: refused",
        "0 random samples",
        "1 random samples",
        check.STORED,
        check.GRAPH,
    }
    record = json.loads(json.dumps(report.record(), allow_nan=False))
    assert record["passed"] is False
    assert (record["worst_case"], record["worst_row"]) == ("golden batch", 1)


def test_an_error_in_one_case_hides_no_other(bundle, faulty):
    def fault(predict, batch):
        if batch.batch_size == 37:
            raise RuntimeError("a crash inside the library")
        return predict(batch)

    faulty(fault)
    report = check_parity(bundle, "onnxruntime")
    assert failed(report) == ["37 random samples", "64-bit ids", "32-bit ids"]
    assert report.cases[5].problem == "a crash inside the library"
    assert report.worst.name == "37 random samples"
    assert report.worst.batch.batch_size == 37
    assert report.record()["failed_cases"] == failed(report)


def test_an_engine_that_scores_bad_ids_fails(bundle, faulty):
    def fault(predict, batch):
        try:
            return predict(batch)
        except BatchError:
            return np.full(batch.batch_size, 0.5, np.float32)

    faulty(fault)
    report = check_parity(bundle, "onnxruntime", sizes=(1,))
    assert failed(report) == ["ids out of range: refused"]
    assert "onnxruntime scored ids that are out of range" in report.cases[1].problem


def test_a_refusal_in_other_words_fails(bundle, faulty):
    def fault(predict, batch):
        try:
            return predict(batch)
        except BatchError as err:
            raise BatchError("bad id") from err

    faulty(fault)
    report = check_parity(bundle, "onnxruntime", sizes=(1,))
    assert failed(report) == ["ids out of range: refused"]
    assert "refused with another message: bad id" in report.cases[1].problem


def test_a_graph_that_the_engine_cannot_compute_fails(bundle, faulty):
    def fault(predict, batch):
        raise EngineError("GEMM: Dimension mismatch")

    faulty(fault)
    report = check_parity(bundle, "onnxruntime", sizes=(2,))
    assert not report.passed
    assert {case.problem for case in report.cases if case.name in ("golden batch", "2 random samples")} == {
        "GEMM: Dimension mismatch"
    }
    assert not check_parity(bundle, "onnxruntime", batch=bundle.golden().batch).passed


def test_a_plan_that_cannot_be_executed_here_is_an_error_not_a_failure(bundle, faulty, monkeypatch):
    monkeypatch.setattr(check, "PLAN_ENGINES", ("onnxruntime",))

    def fault(predict, batch):
        if batch.batch_size and batch.explain_bad_ids(bundle.config) is None:
            raise EngineError("needs a GPU")
        return predict(batch)

    faulty(fault)
    with pytest.raises(EngineError, match="needs a GPU"):
        check_parity(bundle, "onnxruntime")
    with pytest.raises(EngineError, match="needs a GPU"):
        check_parity(bundle, "onnxruntime", batch=bundle.golden().batch)


def test_without_torch_the_golden_batch_is_compared_and_the_report_says_so(bundle, monkeypatch):
    monkeypatch.setattr(check, "missing_package", lambda name: f"no {name}")
    report = check_parity(bundle, "onnxruntime-stock", threads=1)
    assert [case.name for case in report.cases] == [
        "golden batch",
        "ids out of range: refused",
        check.STORED,
        check.GRAPH,
    ]
    assert report.passed
    assert report.limited
    assert "golden batch only, torch is not installed" in report.summary()


def test_another_seed_gives_other_batches_and_the_same_seed_the_same_figures(bundle):
    first, again, other = (
        check_parity(bundle, "onnxruntime-stock", sizes=(37,), seed=seed, threads=1) for seed in (1, 1, 2)
    )
    facts = [[case.to_dict() for case in report.cases] for report in (first, again, other)]
    assert facts[0] == facts[1]
    assert facts[0] != facts[2]


def test_the_limit_can_be_given(bundle):
    report = check_parity(bundle, "onnxruntime-stock", sizes=(1,), atol=0.5, threads=1)
    assert (report.limit, report.default_limit) == (0.5, LEAST_LIMIT)
    assert {case.output.limit for case in report.cases if case.output} == {0.5}


def test_bags_longer_than_the_models_have_a_limit_of_their_own(tmp_path):
    bundle = make_bundle("weighted", tmp_path / "bundle")
    rng = np.random.default_rng(0)
    lengths = np.array([[30_000, 1], [0, 2], [1, 1]])
    ids = np.concatenate([rng.integers(0, rows, n) for rows, n in zip((11, 18, 25), lengths.sum(1), strict=True)])
    dense, weights = rng.standard_normal((2, 3), np.float32), rng.standard_normal(ids.size, np.float32)
    batch = Batch(dense, ids, np.concatenate([[0], np.cumsum(lengths)]), weights)
    report = check_parity(bundle, "onnxruntime-stock", batch=batch, threads=1)
    assert report.passed
    assert report.limit == LEAST_LIMIT
    assert report.cases[0].output.limit == pytest.approx(30_000**0.5 * 2.0**-26, rel=0.02)
    assert f"limit {report.cases[0].output.limit:.1e}" in report.summary()


def test_a_bundle_without_checksums_has_no_such_case_and_one_that_lost_them_is_damaged(bundle):
    (bundle.path / CHECKSUMS).unlink()
    case, _ = check.stored_cases(bundle)
    assert not case.passed
    assert f"cannot read {bundle.path / CHECKSUMS}" in case.problem
    files = {name: record for name, record in bundle.manifest.files.items() if name != CHECKSUMS}
    (other,) = check.stored_cases(Bundle(bundle.path, replace(bundle.manifest, files=files)))
    assert (other.name, other.passed) == (check.GRAPH, True)


def test_every_precision_has_a_limit_that_grows_with_its_rounding_unit(bundle):
    limits = [precision_limit(bundle.config, precision) for precision in PRECISIONS]
    assert limits == [LEAST_LIMIT, LEAST_LIMIT * 2**13, LEAST_LIMIT * 2**16, pytest.approx(LEAST_LIMIT * 2**24 / 254)]


def test_a_batch_given_is_the_only_one_compared(bundle, faulty):
    faulty(lambda predict, batch: predict(batch) + np.float32(1e-3))
    batch = bundle.golden().batch.rows(0, 3)
    report = check_parity(bundle, "onnxruntime", batch=batch)
    assert [(case.name, case.output.rows, case.passed) for case in report.cases] == [("the batch given", 3, False)]
    assert report.worst.batch is batch


def test_a_batch_given_that_breaks_the_engine_fails_and_one_with_bad_ids_is_to_be_refused(bundle, faulty):
    def fault(predict, batch):
        if batch.batch_size == 3:
            raise EngineError("a crash inside the library")
        return predict(batch)

    faulty(fault)
    report = check_parity(bundle, "onnxruntime", batch=bundle.golden().batch.rows(0, 3))
    assert (report.passed, report.cases[0].problem) == (False, "a crash inside the library")
    bad = bundle.golden().batch.rows(0, 4)
    bad.indices[0] = -1
    assert check_parity(bundle, "onnxruntime", batch=bad).passed


def test_a_batch_for_another_model_and_one_without_a_reference_are_errors(bundle, monkeypatch):
    other = RandomDataset(CONFIGS["weighted"], 2, 0).batch([0, 1])[0]
    with pytest.raises(BatchError, match="takes no per-sample weights"):
        check_parity(bundle, "onnxruntime-stock", batch=other)
    monkeypatch.setattr(check, "missing_package", lambda name: f"no {name}")
    with pytest.raises(MissingDependencyError, match="no torch"):
        check_parity(bundle, "onnxruntime-stock", batch=bundle.golden().batch)


def test_labelled_samples_are_a_case_and_their_verdict_is_part_of_the_reports(bundle, faulty):
    config = bundle.config
    samples = LabelledSamples.of(RandomDataset(config, 400, 1), "random data", config, config)

    def reversed_where_real(predict, batch):
        result = predict(batch)
        return np.float32(1) - result if batch.batch_size == 400 else result

    faulty(reversed_where_real)
    report = check_parity(bundle, "onnxruntime", sizes=(2,), labelled=samples, atol=1.0, resamples=20)
    labelled = report.labelled
    assert failed(report) == []
    assert labelled.engine.auc == pytest.approx(1 - labelled.reference.auc)
    assert report.passed is labelled.passed is (labelled.auc_drop.value <= labelled.max_auc_drop)
    strict = check_parity(bundle, "onnxruntime", sizes=(2,), labelled=samples, resamples=20)
    assert failed(strict) == ["labelled samples"]
    assert strict.worst.batch.batch_size == 400
    assert json.loads(json.dumps(strict.record(), allow_nan=False))["labelled"]["samples"] == 400
