"""Scenarios on small bundles, in this process and through the child that `run_scenarios` starts."""

from __future__ import annotations

import json
import os
import shlex
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dlrm_deploy.bench import inputs, scenarios
from dlrm_deploy.bench.loadgen import SCENARIOS
from dlrm_deploy.bench.scenarios import ScenarioSettings, engine_label, measure, run_scenarios
from dlrm_deploy.data.trace import StackProfile, Trace
from dlrm_deploy.errors import ConfigError, DataError, EngineError, MissingDependencyError

SMALL = {"duration_s": 0.1, "min_pairs": 2, "max_pairs": 9, "workers": 1, "threads": 1}


@pytest.fixture
def quick(monkeypatch):
    pytest.importorskip("mlperf_loadgen")
    monkeypatch.setattr(inputs, "GATHERED_BYTES", 1 << 12)
    monkeypatch.setattr("dlrm_deploy.bench.calibration.MILLISECONDS", 0.1)
    monkeypatch.setattr("dlrm_deploy.bench.calibration.BUFFER_BYTES", 1 << 16)


def test_every_scenario_gives_a_row_complete_in_itself(dot_bundle, tmp_path, quick):
    steps: list[str] = []
    settings = ScenarioSettings(**SMALL, target_qps=5000.0)
    rows = list(measure(dot_bundle, settings, tmp_path, target="B", progress=steps.append))
    assert [row.scenario for row in rows] == list(SCENARIOS)
    for row in rows:
        facts = json.loads(json.dumps(row.facts()))
        assert facts["kind"] == "scenario"
        assert facts["engine"] == "onnxruntime"
        assert facts["pairs"] > facts["queries"] > 0
        assert facts["verdict"] in ("VALID", "INVALID")
        assert bool(facts["why"]) == (facts["verdict"] == "INVALID")
        assert (facts["workers"], facts["threads"], facts["min_pairs"], facts["duration_s"]) == (1, 1, 2, 0.1)
        assert (facts["calibration"] is None) == (facts["calibration_missing"] is not None)
        assert shlex.split(facts["command"])[:3] == ["dlrm-deploy", "loadtest", "B"]
    offline, server, single = (row.facts() for row in rows)
    assert offline["load_curve"] == single["load_curve"] == ()
    assert server["target_qps"] == 5000
    assert server["p99_bound_ms"] == 60
    assert server["valid_qps"] in (None, 5000)
    assert {path.name for path in tmp_path.iterdir()} >= {"offline-1", "server-1", "single-stream-1"}
    assert any("warming up" in step for step in steps)


def test_auto_searches_between_a_valid_and_an_invalid_load(dot_bundle, tmp_path, quick, monkeypatch):
    """With a server whose capacity is known: LoadGen's place is taken by a formula."""
    real, tried = scenarios.run_loadgen, []

    def formula(scenario, engines, library, logs, *, qps, **options):
        tried.append(qps)
        result = real(scenario, engines, library, logs, qps=5000.0, **{**options, "least_queries": 1})
        return replace(result, verdict="VALID" if qps <= tried[0] * 2 else "INVALID", p99_ms=qps)

    monkeypatch.setattr(scenarios, "run_loadgen", formula)
    (row,) = measure(dot_bundle, ScenarioSettings(**SMALL, scenarios=("Server",)), tmp_path)
    assert row.valid_qps == row.target_qps == max(qps for qps in tried if qps <= tried[0] * 2)
    assert row.result.p99_ms == row.valid_qps
    assert [point.target_qps for point in row.load_curve] == sorted(tried)
    assert [point.valid for point in row.load_curve] == [qps <= tried[0] * 2 for qps in sorted(tried)]
    assert "--target-qps auto" in row.command


def test_a_server_that_is_never_valid_has_its_last_test_in_the_row(dot_bundle, tmp_path, quick):
    settings = ScenarioSettings(**SMALL, scenarios=("Server",), target_qps=5000.0, p99_ms=1e-4)
    (row,) = measure(dot_bundle, settings, tmp_path)
    assert (row.valid_qps, row.target_qps, row.result.verdict) == (None, 5000, "INVALID")
    assert "over the bound" in row.result.why[0]


def test_several_workers_and_queries_taken_together(dot_bundle, tmp_path, quick):
    settings = ScenarioSettings(**{**SMALL, "workers": 2}, scenarios=("Offline",), coalesce_pairs=30)
    (row,) = measure(dot_bundle, settings, tmp_path)
    assert (row.workers, row.threads) == (2, 1)
    assert row.result.queries > 0
    assert "--workers 2 --threads 1 --coalesce-pairs 30" in row.command


def test_queries_may_come_from_a_trace(dot_bundle, tmp_path, quick):
    profile = StackProfile(feature="*", lines=9, distances=np.array([1]), cumulative=np.array([1.0]))
    Trace((profile,)).write(tmp_path / "t.npz")
    settings = ScenarioSettings(**SMALL, scenarios=("Offline",), distribution="trace", trace=str(tmp_path / "t.npz"))
    (row,) = measure(dot_bundle, settings, tmp_path)
    assert (row.facts()["distribution"], row.facts()["trace"]) == ("trace", str(tmp_path / "t.npz"))
    missing = ScenarioSettings(**SMALL, distribution="trace", trace=str(tmp_path / "no.npz"))
    with pytest.raises(DataError, match=r"no.npz"):
        list(measure(dot_bundle, missing, tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scenarios": ("MultiStream",)}, "no scenario is named 'MultiStream'"),
        ({"scenarios": ()}, "at least one"),
        ({"engine": "tflite"}, "no engine is named 'tflite'"),
        ({"target_qps": 0.0}, "target QPS must be greater than 0"),
        ({"p99_ms": float("nan")}, "99th percentile"),
        ({"duration_s": -1.0}, "the duration"),
        ({"min_pairs": 9, "max_pairs": 8}, "got 9 to 8"),
        ({"min_pairs": 0}, "1 to 1048576 pairs"),
        ({"workers": 0}, "workers must be 1 to 1024"),
        ({"threads": 2000}, "threads must be 1 to 1024"),
        ({"coalesce_pairs": -1}, "at least 0"),
        ({"distribution": "pareto"}, "uniform, gaussian, zipf, trace"),
        ({"distribution": "trace"}, "go together"),
        ({"trace": "t.npz"}, "go together"),
    ],
)
def test_settings_that_cannot_be_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        ScenarioSettings(**change)


def test_by_default_a_single_stream_has_all_cores_and_the_others_a_worker_per_core(monkeypatch):
    monkeypatch.setattr(scenarios, "available_cores", lambda: 6)
    assert ScenarioSettings().crew("SingleStream") == (1, 6)
    assert ScenarioSettings().crew("Server") == (6, 1)
    assert ScenarioSettings(threads=4).crew("Offline") == (1, 4)
    assert ScenarioSettings(workers=2).crew("Offline") == (2, 3)
    assert ScenarioSettings(workers=8, threads=2).crew("SingleStream") == (8, 2)


def test_a_converted_bundle_is_named_with_its_formats(dot_bundle, monkeypatch):
    assert engine_label(dot_bundle, "onnxruntime") == "onnxruntime"
    monkeypatch.setitem(dot_bundle.manifest.precision, "tables", "int8")
    assert engine_label(dot_bundle, "onnxruntime") == "onnxruntime[int8,fp32]"
    assert engine_label(dot_bundle, "openvino-bf16") == "openvino-bf16"


def broken_engine(folder: Path, monkeypatch, body: str) -> None:
    """Makes the child's ONNX Runtime engine run `body` in every query but those of warming up."""
    (folder / "sitecustomize.py").write_text(
        "import os, signal, time\n"
        "import dlrm_deploy.bench.loadgen as loadgen\n"
        "from dlrm_deploy.engines.ort import OnnxRuntimeEngine as Engine\n"
        "from dlrm_deploy.errors import EngineError\n"
        "def broken(self, batch):\n"
        f"    {body}\n"
        "real = loadgen.run_loadgen\n"
        "def run(*arguments, **options):\n"
        "    Engine.predict = broken\n"
        "    return real(*arguments, **options)\n"
        "import dlrm_deploy.bench.scenarios as scenarios\n"
        "scenarios.run_loadgen = run\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(folder))


LONG = {**SMALL, "duration_s": 300.0, "target_qps": 100.0, "scenarios": ("Server",)}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise EngineError('row 7 is gone')", "the engine failed on a query: row 7 is gone"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", r"crashed \(SIGSEGV\).*Finished scenarios: 0 of 1"),
        ("os._exit(5)", "ended with exit code 5"),
    ],
)
def test_an_engine_that_fails_ends_a_long_test_at_once(dot_bundle, tmp_path, monkeypatch, body, message):
    pytest.importorskip("mlperf_loadgen")
    broken_engine(tmp_path, monkeypatch, body)
    began = time.monotonic()
    with pytest.raises(EngineError, match=message):
        run_scenarios(dot_bundle.path, ScenarioSettings(**LONG))
    assert time.monotonic() - began < 120


def test_the_child_hands_on_steps_and_rows_and_the_logs_vanish(dot_bundle, tmp_path, monkeypatch):
    pytest.importorskip("mlperf_loadgen")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    steps: list[str] = []
    seen: list[dict] = []
    settings = ScenarioSettings(**SMALL, scenarios=("Offline", "SingleStream"))
    rows = run_scenarios(dot_bundle.path, settings, progress=steps.append, on_row=seen.append)
    assert rows == seen
    assert [row["scenario"] for row in rows] == ["Offline", "SingleStream"]
    assert any(step.startswith("Offline: LoadGen test 1") for step in steps)
    assert list(tmp_path.iterdir()) == []


def test_what_the_child_cannot_do_comes_back_as_its_error(dot_bundle, tmp_path, monkeypatch):
    pytest.importorskip("mlperf_loadgen")
    monkeypatch.setenv("DLRM_DEPLOY_KERNEL", "mmx")
    with pytest.raises(EngineError, match="mmx"):
        run_scenarios(dot_bundle.path, ScenarioSettings(**SMALL))
    monkeypatch.delenv("DLRM_DEPLOY_KERNEL")
    missing = ScenarioSettings(**SMALL, distribution="trace", trace=str(tmp_path / "no.npz"))
    with pytest.raises(DataError, match=r"no.npz"):
        run_scenarios(dot_bundle.path, missing)


def test_without_loadgen_nothing_is_started(dot_bundle, monkeypatch):
    monkeypatch.setattr("dlrm_deploy.bench.loadgen.find_spec", lambda name: None)
    monkeypatch.setattr(scenarios.subprocess, "Popen", lambda *a, **k: pytest.fail("started"))
    with pytest.raises(MissingDependencyError, match="mlcommons-loadgen"):
        run_scenarios(dot_bundle.path, ScenarioSettings())


def test_an_interrupt_ends_the_child(dot_bundle, tmp_path):
    pytest.importorskip("mlperf_loadgen")
    children: set[int] = set()

    def children_now() -> set[int]:
        threads = Path(f"/proc/{os.getpid()}/task").iterdir()
        return {int(pid) for thread in threads for pid in (thread / "children").read_text().split()}

    before = children_now()  # such as multiprocessing's own, where a test has started any

    def interrupt(step: str) -> None:
        if "LoadGen test" in step:
            children.update(children_now() - before)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_scenarios(dot_bundle.path, ScenarioSettings(**LONG), logs=tmp_path, progress=interrupt)
    assert children
    assert not any(Path(f"/proc/{pid}").exists() for pid in children)
