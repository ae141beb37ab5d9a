import json

import numpy as np
import pytest
from click.testing import CliRunner

from dlrm_deploy.bundle import Bundle
from dlrm_deploy.cli.main import cli
from dlrm_deploy.parity import check


@pytest.fixture
def run():
    return lambda *args: CliRunner().invoke(cli, ["check", *map(str, args)])


@pytest.fixture
def skewed(bundle, monkeypatch):
    """A bundle whose engines, but for torch, are off by 1e-3 in every row."""
    real = check.open_engine

    def open_engine(opened, name, **options):
        engine = real(opened, name, **options)
        if name != "torch":
            predict = engine.predict
            engine.predict = lambda batch: predict(batch) + np.float32(1e-3)
        return engine

    monkeypatch.setattr(check, "open_engine", open_engine)
    return bundle


def test_check_exits_0_prints_every_case_and_records_the_result(run, bundle):
    result = run(bundle.path, "--engine", "onnxruntime-stock")
    assert result.exit_code == 0, result.output
    for text in ("golden batch", "2048 random samples", "all bags empty", "PASSED  probability: max abs error"):
        assert text in result.stdout
    record = Bundle.open(bundle.path).manifest.parity["onnxruntime-stock"]
    assert record["passed"] is True
    assert record["max_abs"] <= record["limit"] == 1e-6
    assert record["reference"].startswith("torch")


def test_check_exits_1_and_names_the_worst_row(run, skewed):
    result = run(skewed.path, "--engine", "onnxruntime-stock")
    assert result.exit_code == 1
    assert "FAILED  probability: max abs error 1.00e-03" in result.stdout
    assert Bundle.open(skewed.path).manifest.parity["onnxruntime-stock"]["passed"] is False


def test_a_wider_limit_lets_the_same_difference_pass(run, skewed):
    assert run(skewed.path, "--engine", "onnxruntime-stock", "--atol", "0.01").exit_code == 0


def test_json_is_one_object_with_all_cases(run, bundle):
    result = run(bundle.path, "--engine", "onnxruntime-stock", "--json")
    facts = json.loads(result.stdout)
    assert (facts["engine"], facts["passed"]) == ("onnxruntime-stock", True)
    assert {"max_abs", "max_rel", "worst_case", "worst_row", "rows", "seed", "limit"} <= set(facts)
    assert all(case["passed"] for case in facts["cases"])


def test_no_record_leaves_the_manifest_alone(run, bundle):
    before = (bundle.path / "manifest.json").read_bytes()
    assert run(bundle.path, "--engine", "onnxruntime-stock", "--no-record").exit_code == 0
    assert (bundle.path / "manifest.json").read_bytes() == before


def test_a_bundle_that_cannot_be_written_is_a_warning(run, bundle, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("dlrm_deploy.files._remove_leftovers", refuse)
    result = run(bundle.path, "--engine", "onnxruntime-stock", "--json")
    assert result.exit_code == 0
    assert "Warning: the result is not recorded in the bundle" in result.stderr
    assert "Permission denied" in result.stderr
    assert json.loads(result.stdout)["passed"] is True


@pytest.mark.parametrize(
    "arguments", [("--engine", "caffe"), ("--atol", "-1"), ("--atol", "inf"), ("--atol", "nan"), ("--seed", "x")]
)
def test_wrong_usage_exits_2(run, bundle, arguments):
    before = (bundle.path / "manifest.json").read_bytes()
    assert run(bundle.path, *arguments).exit_code == 2
    assert (bundle.path / "manifest.json").read_bytes() == before


def test_a_path_that_does_not_exist_exits_2(run, tmp_path):
    assert run(tmp_path / "nowhere").exit_code == 2


def test_an_altered_table_exits_3_and_is_named(run, bundle):
    path = bundle.path / bundle.manifest.table_groups[0].file
    raw = bytearray(path.read_bytes())
    raw[5] ^= 1
    path.write_bytes(raw)
    result = run(bundle.path, "--engine", "onnxruntime-stock")
    assert result.exit_code == 3
    assert f"{path} was altered" in result.stderr


def test_a_plan_engine_without_a_plan_exits_3_and_says_how_to_build_one(run, bundle):
    pytest.importorskip("tensorrt_rtx")
    result = run(bundle.path, "--engine", "tensorrt-rtx")
    assert result.exit_code == 3
    assert f"dlrm-deploy build {bundle.path}" in result.stderr


def test_a_problem_other_than_numbers_is_printed_below_the_table(run, bundle, monkeypatch):
    real = check.open_engine

    def open_engine(opened, name, **options):
        engine = real(opened, name, **options)
        if name != "torch":
            predict = engine.predict
            engine.predict = lambda batch: predict(batch) if batch.batch_size != 2 else 1 / 0
        return engine

    monkeypatch.setattr(check, "open_engine", open_engine)
    result = run(bundle.path, "--engine", "onnxruntime-stock")
    assert result.exit_code == 1
    assert "2 random samples: division by zero" in result.stdout


def test_nan_is_counted_below_the_table(run, bundle, monkeypatch):
    real = check.open_engine

    def open_engine(opened, name, **options):
        engine = real(opened, name, **options)
        if name != "torch":
            predict = engine.predict
            engine.predict = lambda batch: predict(batch) * np.float32(np.nan)
        return engine

    monkeypatch.setattr(check, "open_engine", open_engine)
    result = run(bundle.path, "--engine", "onnxruntime-stock")
    assert result.exit_code == 1
    assert "37 random samples: 37 of 37 values are NaN or infinite." in result.stdout


def test_without_torch_the_output_says_that_only_the_golden_batch_was_compared(run, bundle, monkeypatch):
    monkeypatch.setattr(check, "missing_package", lambda name: "not here")
    result = run(bundle.path, "--engine", "onnxruntime-stock")
    assert result.exit_code == 0
    assert "Only the golden batch was compared" in result.stdout
