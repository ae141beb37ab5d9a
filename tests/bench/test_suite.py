from __future__ import annotations

import json
from dataclasses import replace

import pytest
from click.testing import CliRunner

from dlrm_deploy.bench import suite
from dlrm_deploy.bench.goals import BEGIN, BF16, END, GOALS, INT8
from dlrm_deploy.bench.peers.registry import PEER_NAMES
from dlrm_deploy.bench.suite import BEGIN_PICTURES, END_PICTURES, MODELS, SuiteModel, load_test, settings_of
from dlrm_deploy.presets import preset


@pytest.fixture(autouse=True)
def small_and_quick(monkeypatch):
    monkeypatch.setattr("dlrm_deploy.bench.inputs.GATHERED_BYTES", 1 << 12)
    monkeypatch.setattr("dlrm_deploy.bench.measure.SETTLE_SECONDS", 0.0)
    monkeypatch.setattr("dlrm_deploy.bench.calibration.MILLISECONDS", 0.1)
    monkeypatch.setattr("dlrm_deploy.bench.calibration.BUFFER_BYTES", 1 << 16)
    monkeypatch.setattr(suite, "SLICE_MS", 0.1)


INT8_MLPS = ("onnxruntime[fp32,int8]", "onnxruntime[int8,int8]")


def test_every_goal_is_measured():
    measured = {
        (model.preset, batch, label)
        for model in MODELS
        for batch in model.batches
        for label in settings_of(model, rounds=1, threads=1, engines=("torch",)).labels
    }
    assert {(goal.model, goal.batch, goal.engine) for goal in GOALS} <= measured
    assert {engine for _, _, engine in measured} == {"torch", BF16, INT8, *INT8_MLPS}
    assert {preset(model.preset).name for model in MODELS} == {goal.model for goal in GOALS}


def test_compiled_peers_are_measured_at_some_batch_sizes_the_others_at_all():
    settings = settings_of(MODELS[0], rounds=1, threads=1, engines=("torch", *PEER_NAMES))
    assert settings.isolate
    assert [batch for batch in MODELS[0].batches if settings.measures("torch-compile", batch)] == [128, 2048]
    assert all(settings.measures("torch-bf16", batch) for batch in MODELS[0].batches)


def test_the_whole_suite_writes_rows_report_goals_and_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "MODELS", (SuiteModel(preset="kaggle", batches=(1,)),))
    monkeypatch.setattr(suite, "all_engines", lambda: ("torch", "onnxruntime"))
    monkeypatch.setattr(
        suite, "settings_of", lambda *args, **options: replace(settings_of(*args, **options), isolate=False)
    )
    page = tmp_path / "performance.md"
    page.write_text(f"# P\n{BEGIN}\n{END}\n{BEGIN_PICTURES}\n{END_PICTURES}\n")
    options = ["--out", tmp_path / "rows", "--scale-rows", "1e-5", "--rounds", 1, "--threads", 1, "--write", page]
    result = CliRunner().invoke(suite.main, [str(option) for option in (*options, "--demo", tmp_path / "none")])
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in (tmp_path / "rows" / "kaggle.jsonl").read_text().splitlines()]
    assert [row["engine"] for row in rows] == ["torch", "onnxruntime", BF16, INT8, *INT8_MLPS]
    assert all(row["command"].startswith("dlrm-deploy bench --preset kaggle --scale-rows 1e-05 ") for row in rows)
    assert "kaggle" in (tmp_path / "rows" / "report.html").read_text()
    text = page.read_text()
    assert "| kaggle, 1 | `fp32+bf16` | `torch` |" in text
    assert "![performance-kaggle](images/performance-kaggle.svg)" in text
    assert (tmp_path / "images" / "performance-kaggle.svg").exists()
    assert "there is no bundle" in result.stderr
    again = CliRunner().invoke(suite.main, [*map(str, options), "--keep"])
    assert again.exit_code == 0, again.output
    assert "kaggle: kept" in again.stderr


def test_nothing_measured_is_an_error_not_an_empty_report(tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "MODELS", ())
    result = CliRunner().invoke(suite.main, ["--out", str(tmp_path / "rows")])
    assert result.exit_code == 1
    assert "holds no rows" in result.output


def test_a_load_test_that_fails_is_a_remark(tmp_path):
    said: list[str] = []
    load_test(tmp_path, tmp_path / "scenarios.jsonl", 0.1, said.append)
    assert len(said) == 2
    assert said[1].startswith("LoadGen was not run: ")
    assert "manifest.json" in said[1]
    assert not (tmp_path / "scenarios.jsonl").exists()
