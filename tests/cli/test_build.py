import json
from importlib.util import find_spec

import pytest
from click.testing import CliRunner
from plan_models import small_model

from dlrm_deploy.bundle import Bundle
from dlrm_deploy.cli.main import cli
from dlrm_deploy.export.bundle import export_bundle
from dlrm_deploy.export.sources import RandomSource

needs_rtx = pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="the package tensorrt-rtx is not installed")


@pytest.fixture
def path(tmp_path):
    return export_bundle(RandomSource(small_model()), tmp_path / "bundle").path


def run(*arguments):
    return CliRunner().invoke(cli, ["build", *map(str, arguments)])


@needs_rtx
def test_build_writes_a_plan_and_says_that_it_was_not_executed(path):
    result = run(path)
    assert result.exit_code == 0, result.output
    record = Bundle.open(path).manifest.plans[0]
    assert (path / record.plan).is_file()
    for text in (
        record.plan,
        "fp32, up to 2048 samples, bags of up to 5 ids",
        "on 64 golden rows",
        "Built, not executed",
    ):
        assert text in result.stdout


@needs_rtx
def test_build_json_is_one_object_that_names_the_files(path):
    result = run(path, "--precision", "bf16", "--max-batch", 16, "--max-bag", 9, "--tables", "input", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    record = Bundle.open(path).manifest.plans[0]
    assert (report["plan"], report["sidecar"]) == (record.plan, record.sidecar)
    assert report["bytes"] == (path / record.plan).stat().st_size
    asked = {"engine": "tensorrt-rtx", "precision": "bf16", "max_batch": 16, "max_bag": 9, "tables": "input"}
    assert {key: report[key] for key in asked} == asked
    assert report["executed"] is False


def test_build_exits_3_with_cause_and_remedy_where_it_cannot_run(path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", None)
    result = run(path, "--engine", "tensorrt")
    assert result.exit_code == 3
    assert result.stderr.startswith("Error: engine tensorrt needs the package tensorrt.")


def test_build_exits_3_where_there_is_no_bundle(tmp_path):
    result = run(tmp_path)
    assert result.exit_code == 3
    assert "is not a bundle" in result.stderr


@pytest.mark.parametrize("wrong", [["--engine", "onnxruntime"], ["--precision", "int4"], ["--max-batch", "0"]])
def test_build_exits_2_on_wrong_usage(path, wrong):
    assert run(path, *wrong).exit_code == 2
