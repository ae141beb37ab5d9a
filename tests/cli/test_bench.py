from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from dlrm_deploy.cli.main import cli

QUICK = ["--rounds", "1", "--slice-ms", "0.1", "--threads", "1"]


@pytest.fixture(autouse=True)
def small_and_quick(monkeypatch):
    monkeypatch.setattr("dlrm_deploy.bench.inputs.GATHERED_BYTES", 1 << 12)
    monkeypatch.setattr("dlrm_deploy.bench.measure.SETTLE_SECONDS", 0.0)
    monkeypatch.setattr("dlrm_deploy.bench.calibration.MILLISECONDS", 0.1)
    monkeypatch.setattr("dlrm_deploy.bench.calibration.BUFFER_BYTES", 1 << 16)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["bench", *map(str, arguments)])


def test_a_bundle_is_measured_with_all_cpu_engines_and_shown_as_a_table(bundle):
    result = run(bundle.path, "--batch", "1,3", *QUICK)
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.stdout.splitlines()]
    for engine in ("torch", "onnxruntime-stock", "onnxruntime"):
        assert sum(engine in words[:2] for words in lines) == 2
    assert "1 thread per engine" in result.stdout
    assert "fp32 FMA GFLOP/s" in result.stdout


def test_json_lines_repeat_the_run_from_themselves(bundle):
    result = run(bundle.path, "--batch", "2", "--engine", "onnxruntime-stock, torch", "--seed", 3, "--json", *QUICK)
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(row["engine"], row["batch"], row["seed"], row["threads"]) for row in rows] == [
        ("onnxruntime-stock", 2, 3, 1),
        ("torch", 2, 3, 1),
    ]
    assert rows[0]["ratio"] == 1.0
    name, *again = shlex.split(rows[0]["command"])
    assert name == "dlrm-deploy"
    repeated = CliRunner().invoke(cli, [*again, "--json"])
    assert repeated.exit_code == 0, repeated.output
    assert [json.loads(line)["command"] for line in repeated.stdout.splitlines()] == [rows[0]["command"]] * 2


def test_a_preset_is_measured_with_random_weights_and_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    result = run(
        "--preset", "kaggle", "--scale-rows", 1e-5, "--batch", "2", "--engine", "torch,onnxruntime", "--json", *QUICK
    )
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert {row["model"] for row in rows} == {"kaggle"}
    assert "--preset kaggle --scale-rows 1e-05 " in rows[0]["command"]
    assert list(tmp_path.iterdir()) == []


def test_plot_writes_a_picture(bundle, tmp_path):
    picture = tmp_path / "out.png"
    result = run(bundle.path, "--batch", "1,2", "--engine", "onnxruntime", "--plot", picture, *QUICK)
    assert result.exit_code == 0, result.output
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert str(picture) in result.stderr


def test_a_picture_that_cannot_be_written_costs_no_results(bundle):
    picture = bundle.model_path / "out.png"
    result = run(bundle.path, "--batch", "1", "--engine", "onnxruntime", "--json", "--plot", picture, *QUICK)
    assert result.exit_code == 3
    assert json.loads(result.stdout)["engine"] == "onnxruntime"
    assert f"cannot write {picture}" in result.stderr


def test_an_engine_that_cannot_run_here_is_listed_and_does_not_fail_the_rest(bundle):
    result = run(bundle.path, "--batch", "1", "--engine", "tensorrt-rtx,onnxruntime", *QUICK)
    assert result.exit_code == 0, result.output
    assert "tensorrt-rtx was not run: " in result.stdout


def test_a_variant_and_a_peer_are_measured_beside_the_engines(bundle):
    options = ["--batch", "32", "--engine", "torch,torch-lean,onnxruntime", "--variant", "tables=int8,mlp=bf16"]
    result = run(bundle.path, *options, "--json", *QUICK)
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["engine"] for row in rows] == ["torch", "torch-lean", "onnxruntime", "onnxruntime[int8,bf16]"]
    assert [row["tables"] for row in rows] == ["fp32", "fp32", "fp32", "int8"]
    assert "--variant tables=int8,mlp=bf16 " in rows[0]["command"]
    for row in rows:
        assert row["times_floor"] == pytest.approx(row["median_ms"] / row["floor_ms"], rel=1e-6)


def test_rows_are_stored_compared_and_run_again_from_themselves(bundle, tmp_path):
    out = tmp_path / "rows.jsonl"
    options = ["--batch", "2", "--engine", "torch,onnxruntime", "--only", "onnxruntime=2", "--breakdown"]
    first = run(bundle.path, *options, "--out", out, *QUICK)
    assert first.exit_code == 0, first.output
    again = run("--rerun", out, "--json", "--out", tmp_path / "again.json", "--compare", out, "--tolerance", "0.99")
    assert again.exit_code == 0, again.output
    before = [json.loads(line) for line in out.read_text().splitlines()]
    after = [json.loads(line) for line in again.stdout.splitlines()]
    assert [row["command"] for row in after] == [row["command"] for row in before]
    assert json.loads((tmp_path / "again.json").read_text()) == after
    assert "0 of 2 rows lost more than 99% of their ratio" in again.stderr


def test_a_regression_exits_1_and_is_named(bundle, tmp_path):
    options = [bundle.path, "--batch", "2", "--engine", "torch,onnxruntime", *QUICK]
    assert run(*options, "--out", tmp_path / "rows.jsonl").exit_code == 0
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    rows[1]["ratio"] *= 1000  # it once was far faster
    (tmp_path / "old.json").write_text(json.dumps(rows))
    result = run(*options, "--compare", tmp_path / "old.json")
    assert result.exit_code == 1
    assert "REGRESSED" in result.stdout
    assert "onnxruntime  batch 2" in result.stdout


def test_runs_that_cannot_be_compared_exit_3(bundle, tmp_path):
    (tmp_path / "old.jsonl").write_text('{"command": "dlrm-deploy bench b", "engine": "torch", "ratio": 1.0}\n')
    result = run(bundle.path, "--batch", "2", "--engine", "torch", "--compare", tmp_path / "old.jsonl", *QUICK)
    assert result.exit_code == 3
    assert "nothing to compare" in result.stderr


def test_all_means_every_engine_and_peer_installed(bundle, monkeypatch):
    monkeypatch.setattr(
        "dlrm_deploy.bench.settings.missing_peer_package", lambda name: None if name == "torch-lean" else "x"
    )
    result = run(bundle.path, "--batch", "1", "--engine", "all", "--json", *QUICK)
    assert result.exit_code == 0, result.output
    engines = [json.loads(line)["engine"] for line in result.stdout.splitlines()]
    assert engines == ["torch", "onnxruntime-stock", "onnxruntime", "torch-lean"]


def test_nothing_that_runs_exits_3(bundle):
    result = run(bundle.path, "--batch", "1", "--engine", "tensorrt-rtx", *QUICK)
    assert result.exit_code == 3
    assert "no engine runs here" in result.stderr
    assert "Traceback" not in result.output


def test_a_damaged_bundle_exits_3_and_names_the_file(bundle):
    (bundle.path / "dense.npz").write_bytes(b"cut")
    result = run(bundle.path, *QUICK)
    assert result.exit_code == 3
    assert "dense.npz" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "either a BUNDLE or --preset"),
        (["BUNDLE", "--preset", "kaggle"], "either a BUNDLE or --preset"),
        (["BUNDLE", "--scale-rows", "0.5"], "--scale-rows goes with --preset"),
        (["--preset", "kaggle", "--scale-rows", "0"], "--scale-rows must be a positive number"),
        (["--preset", "kagle"], "kagle"),
        (["BUNDLE", "--batch", "0"], "batch size must be at least 1, got 0"),
        (["BUNDLE", "--threads", "5000"], "threads must be at most 1024, got 5000"),
        (["BUNDLE", "--batch", "1,many"], "'1,many' is not a list of whole numbers"),
        (["BUNDLE", "--engine", "openvino"], "no engine is named 'openvino'"),
        (["BUNDLE", "--engine", "torch", "--baseline", "onnxruntime"], "is not among the engines measured"),
        (["BUNDLE", "--distribution", "normal"], "uniform, gaussian, zipf"),
        (["BUNDLE", "--plot", "out.pdf"], "should end in .png"),
        (["BUNDLE", "--variant", "int8"], "'int8' is not of the form tables=int8,mlp=bf16"),
        (["BUNDLE", "--only", "torch"], "'torch' is not of the form ENGINE=N,N"),
        (["BUNDLE", "--only", "openvino-bf16=1"], "only 'openvino-bf16' is not among the engines measured"),
        (["BUNDLE", "--distribution", "trace"], "distribution trace and a trace file go together"),
        (["BUNDLE", "--tolerance", "2"], "tolerance must be at least 0 and below 1"),
        (["BUNDLE", "--rerun", __file__], "only output options go with it"),
        (["--rerun", __file__], "cannot read the rows of"),
        (["BUNDLE", "--compare", __file__], "cannot read the rows of"),
        (["missing-folder"], "missing-folder"),
    ],
)
def test_wrong_usage_exits_2(bundle, arguments, message):
    result = run(*(bundle.path if word == "BUNDLE" else word for word in arguments))
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


def test_a_plot_without_matplotlib_is_refused_before_measuring(bundle, monkeypatch, tmp_path):
    monkeypatch.setattr("dlrm_deploy.bench.plot.find_spec", lambda name: None)
    monkeypatch.setattr("dlrm_deploy.bench.run.run_bench", lambda *a, **k: pytest.fail("measured"))
    result = run(bundle.path, "--plot", tmp_path / "out.png")
    assert result.exit_code == 3
    assert "dlrm-deploy[bench]" in result.stderr


def test_a_preset_without_the_exporter_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "dlrm_deploy.export.bundle", None)  # as if onnx were missing
    result = run("--preset", "kaggle", "--scale-rows", "0.001")
    assert result.exit_code == 3
    assert "dlrm-deploy[bench]" in result.stderr


def test_help_does_not_import_torch():
    code = (
        "import sys, dlrm_deploy.cli.bench; print([name in sys.modules for name in ('torch', 'onnxruntime', 'rich')])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=Path.cwd())
    assert done.stdout.strip() == "[False, False, False]"
