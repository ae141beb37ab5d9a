"""The comparison of a converted bundle with the fp32 one, and the gate that it makes with the parity check."""

import json
from dataclasses import replace

import numpy as np
import pytest
from bundles import make_bundle

from dlrm_deploy.bundle import Bundle
from dlrm_deploy.data.random import random_batch
from dlrm_deploy.engines.registry import open_engine
from dlrm_deploy.errors import AccuracyError, EngineError
from dlrm_deploy.export.convert import convert_bundle
from dlrm_deploy.metrics import auc, log_loss
from dlrm_deploy.parity.accuracy import compare_accuracy, default_limit
from dlrm_deploy.parity.conversion import check_conversion
from dlrm_deploy.parity.labelled import LabelledSamples
from dlrm_deploy.parity.report import ParityCase

SAMPLES = 3000


@pytest.fixture
def fp32(tmp_path):
    return make_bundle("one_hot", tmp_path / "fp32")


@pytest.fixture
def int4(fp32, tmp_path):
    return convert_bundle(fp32, tmp_path / "int4", tables="int4", mlp="fp32")


@pytest.fixture
def labelled(fp32):
    """Labels by the order in which the fp32 model ranks the samples: whoever ranks otherwise loses."""
    batch = random_batch(fp32.config, SAMPLES, np.random.default_rng(0))
    with open_engine(fp32, "torch") as torch:
        scores = torch.predict(batch)
    labels = (scores > np.median(scores)).astype(np.float32)
    return LabelledSamples("here", lambda: iter([(batch, labels)])), batch, labels


def test_figures_are_those_of_the_two_models(fp32, int4, labelled):
    samples, batch, labels = labelled
    report = compare_accuracy(fp32, int4, labelled=samples, resamples=20, threads=1)
    with open_engine(fp32, "torch", threads=1) as a, open_engine(int4, "torch", threads=1) as b:
        was, now = a.predict(batch), b.predict(batch)
    assert report.labelled.auc_drop.value == pytest.approx(auc(labels, was) - auc(labels, now), abs=1e-12)
    assert report.labelled.log_loss_rise.value == pytest.approx(log_loss(labels, now) - log_loss(labels, was), abs=1e-9)
    golden = int4.golden()
    difference = np.abs(golden.probabilities.astype(np.float64) - golden.fp32_probabilities)
    assert report.golden.max_abs == pytest.approx(difference.max(), abs=2e-7)
    assert report.golden.mean_abs == pytest.approx(difference.mean(), abs=2e-7)
    assert report.random.samples == 8192
    assert 0.9 < report.random.logit_correlation < 0.999


def test_labels_that_the_rounding_reorders_fail_the_default_limit(fp32, int4, labelled):
    report = compare_accuracy(fp32, int4, labelled=labelled[0], resamples=20)
    assert report.labelled.auc_drop.value > 0.002
    assert not report.passed
    assert "AUC drops by" in report.problems[0]
    accepted = {"max_auc_drop": 0.5, "max_log_loss_rise": 0.5}
    assert compare_accuracy(fp32, int4, labelled=labelled[0], resamples=20, **accepted).passed


def test_a_rise_of_log_loss_alone_fails(fp32, int4, labelled):
    report = compare_accuracy(fp32, int4, labelled=labelled[0], max_auc_drop=1, max_log_loss_rise=0, resamples=20)
    assert [problem.split(" by ")[0] for problem in report.problems] == ["log loss rises"]


def test_without_labels_there_is_no_limit_and_the_summary_says_so(fp32, int4):
    report = compare_accuracy(fp32, int4)
    assert report.passed
    assert "not compared, there are no labelled samples" in report.summary()[-1]
    assert json.loads(json.dumps(report.record(), allow_nan=False))["labelled"] is None


def test_labelled_samples_that_cannot_be_scored_are_refused_with_the_reason(fp32, int4, labelled, monkeypatch):
    _, batch, labels = labelled
    spoiled = replace(batch, dense=batch.dense.copy())
    spoiled.dense[3] = np.nan
    report = compare_accuracy(fp32, int4, labelled=LabelledSamples("here", lambda: iter([(spoiled, labels)])))
    assert report.problems == (f"one of the two models gives NaN for 1 of {SAMPLES} labelled samples",)
    assert "no labelled samples" not in report.summary()[-1]

    def fail(*args, **options):
        return ParityCase("labelled samples", problem="out of memory"), None

    monkeypatch.setattr("dlrm_deploy.parity.accuracy.compare_labelled", fail)
    report = compare_accuracy(fp32, int4, labelled=labelled[0])
    assert report.problems == ("labelled samples cannot be scored: out of memory",)


@pytest.mark.parametrize(
    ("tables", "mlp", "limit"),
    [("int8", "fp32", 5e-4), ("int4", "bf16", 2e-3), ("fp32", "bf16", 5e-4), ("fp32", "int8", 5e-4)],
)
def test_the_coarsest_format_sets_the_default_limit(tables, mlp, limit, tmp_path):
    fp32 = make_bundle("dot", tmp_path / "fp32")
    assert default_limit(convert_bundle(fp32, tmp_path / "converted", tables=tables, mlp=mlp)) == limit


def test_the_gate_records_parity_and_accuracy(fp32, tmp_path):
    said = []
    converted = convert_bundle(
        fp32, tmp_path / "int8", accept=lambda bundle: check_conversion(fp32, bundle, say=said.append, threads=1)
    )
    again = Bundle.open(converted.path)
    assert again.parity_gap("onnxruntime") is None
    assert again.parity_gap("onnxruntime-stock") is None
    assert again.manifest.accuracy["passed"] is True
    assert again.manifest.accuracy["random"]["samples"] == 8192
    assert [line.split(":")[0] for line in said[:3]] == ["onnxruntime", "onnxruntime-stock", "golden batch"]
    errors = {name: table["relative_rms"] for name, table in again.manifest.accuracy["tables"].items()}
    worst = max(errors, key=errors.__getitem__)
    text = f"tables: {len(errors)} int8; largest error: {worst}, relative RMS {errors[worst]:.2g}, "
    assert said[-1].startswith(text)


def test_the_gate_leaves_nothing_of_a_model_that_lost_too_much(fp32, labelled, tmp_path):
    with pytest.raises(AccuracyError, match=r"AUC drops by .* the limit is 2\.0e-03"):
        convert_bundle(
            fp32,
            tmp_path / "out",
            tables="int4",
            mlp="fp32",
            accept=lambda bundle: check_conversion(fp32, bundle, labelled=labelled[0], engines=["onnxruntime-stock"]),
        )
    assert not (tmp_path / "out").exists()


def test_the_gate_refuses_a_bundle_that_an_engine_scores_in_another_way(fp32, tmp_path, monkeypatch):
    from dlrm_deploy.engines.ort import StockOnnxRuntimeEngine

    real = StockOnnxRuntimeEngine._run
    monkeypatch.setattr(StockOnnxRuntimeEngine, "_run", lambda self, batch: real(self, batch) + np.float32(0.01))
    with pytest.raises(AccuracyError, match="onnxruntime-stock does not score what is stored"):
        convert_bundle(
            fp32,
            tmp_path / "out",
            accept=lambda bundle: check_conversion(fp32, bundle, engines=["onnxruntime-stock"], threads=1),
        )
    assert not (tmp_path / "out").exists()


def test_the_gate_needs_one_engine_that_runs(fp32, int4, monkeypatch):
    def refuse(*args, **options):
        raise EngineError("it is not built")

    monkeypatch.setattr("dlrm_deploy.parity.conversion.check_parity", refuse)
    with pytest.raises(EngineError, match="onnxruntime was not compared: it is not built"):
        check_conversion(fp32, int4)
