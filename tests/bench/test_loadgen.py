"""Real LoadGen tests of fractions of a second: that they end and what they say is asserted, not how fast they were."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from bundles import CONFIGS

from dlrm_deploy.batch import Batch
from dlrm_deploy.bench import loadgen
from dlrm_deploy.bench.loadgen import check_installed, read_result, run_loadgen
from dlrm_deploy.data.random import random_batch
from dlrm_deploy.errors import EngineError, MissingDependencyError


class Idle:
    """An engine that takes a while and counts."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.batches = 0

    def predict(self, batch: Batch) -> np.ndarray:
        time.sleep(self.seconds)
        self.batches += 1
        return np.zeros(batch.batch_size, np.float32)


class Broken:
    def predict(self, batch: Batch) -> np.ndarray:
        raise EngineError("no such row")


@pytest.fixture(scope="module")
def library() -> list[Batch]:
    rng = np.random.default_rng(0)
    return [random_batch(CONFIGS["dot"], 3, rng) for _ in range(8)]


def run(scenario, engines, library, folder, **options):
    pytest.importorskip("mlperf_loadgen")
    values = {"qps": 2000.0, "duration_s": 0.1, "p99_ms": 1000.0, "least_queries": 50, **options}
    return run_loadgen(scenario, engines, library, folder / "logs", **values)


@pytest.mark.parametrize("scenario", ["Offline", "Server", "SingleStream"])
def test_a_scenario_counts_queries_and_pairs_and_leaves_the_logs(scenario, library, tmp_path):
    engines = [Idle(), Idle()]
    result = run(scenario, engines, library, tmp_path)
    assert result.queries == sum(engine.batches for engine in engines) >= 50
    assert result.pairs == 3 * result.queries
    assert result.pairs_per_s == pytest.approx(3 * result.samples_per_s)
    assert 0 < result.p50_ms <= result.p90_ms <= result.p99_ms <= result.max_ms
    assert (result.scheduled_qps is None) == (result.late_queries is None) == (scenario != "Server")
    assert (tmp_path / "logs" / "mlperf_log_summary.txt").is_file()
    assert result.loadgen_version


def test_a_server_that_is_too_slow_is_invalid_for_its_latency(library, tmp_path):
    result = run("Server", [Idle(0.02)], library, tmp_path, p99_ms=1.0, qps=500.0)
    assert result.verdict == "INVALID"
    assert "over the bound of 1 ms" in result.why[0]
    assert result.late_queries == result.queries


def test_a_server_with_too_few_queries_for_a_statement_is_invalid_for_that(library, tmp_path):
    result = run("Server", [Idle()], library, tmp_path, qps=200.0)
    assert result.verdict == "INVALID"
    assert any("Would need to run at least" in reason for reason in result.why)


def test_a_single_stream_with_the_least_number_of_queries_is_valid(library, tmp_path):
    result = run("SingleStream", [Idle(0.002)], library, tmp_path, least_queries=None)
    assert result.queries >= 100
    assert (result.verdict, result.why) == ("VALID", ())


def test_an_offline_test_that_ended_too_soon_is_invalid_for_that(library, tmp_path):
    result = run("Offline", [Idle()], library, tmp_path, qps=10.0, duration_s=0.5)
    assert result.verdict == "INVALID"
    assert "the test ended before its least duration" in result.why


@pytest.mark.parametrize("scenario", ["Offline", "Server", "SingleStream"])
def test_an_engine_that_fails_in_a_query_is_an_error_and_no_hang(scenario, library, tmp_path):
    told = threading.Event()
    with pytest.raises(EngineError, match="an engine failed on a query: no such row"):
        run(scenario, [Idle(), Broken()], library, tmp_path, failed=lambda error: told.set())
    assert told.is_set()


def test_without_loadgen_the_message_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(loadgen, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"dlrm-deploy\[bench\]"):
        check_installed()


SAID = {
    "result_validity": "VALID",
    "result_samples_per_second": 10,
    "result_mean_latency_ns": 2e6,
    "result_50.00_percentile_latency_ns": 1e6,
    "result_90.00_percentile_latency_ns": 3e6,
    "result_99.00_percentile_latency_ns": 4e6,
    "result_max_latency_ns": 5e6,
    "loadgen_version": "6.0 @ abc",
}


def write_log(folder: Path, said: dict[str, object], *, is_error: bool = False) -> Path:
    lines = [
        ":::MLLOG " + json.dumps({"key": k, "value": v, "metadata": {"is_error": is_error}}) for k, v in said.items()
    ]
    (folder / "mlperf_log_detail.txt").write_text("something else\n" + "\n".join(lines) + "\n")
    return folder


def test_a_log_is_read_in_milliseconds(tmp_path):
    result = read_result(write_log(tmp_path, SAID), "Offline", queries=4, pairs=20, p99_ms=60)
    assert (result.mean_ms, result.p50_ms, result.p90_ms, result.p99_ms, result.max_ms) == (2, 1, 3, 4, 5)
    assert (result.verdict, result.why, result.pairs_per_s, result.loadgen_version) == ("VALID", (), 50, "6.0")


def test_a_test_that_is_not_called_valid_is_not(tmp_path):
    result = read_result(write_log(tmp_path, {**SAID, "result_validity": "?"}), "Offline", 1, 1, 60)
    assert (result.verdict, result.why) == ("INVALID", ("LoadGen gives no reason",))


def test_errors_that_loadgen_reports_are_reasons(tmp_path):
    result = read_result(write_log(tmp_path, SAID, is_error=True), "Offline", 1, 1, 60)
    assert "LoadGen reports an error: VALID" in result.why


@pytest.mark.parametrize("missing", ["result_validity", "result_samples_per_second", "loadgen_version"])
def test_a_log_without_results_is_an_error(tmp_path, missing):
    with pytest.raises(EngineError, match="LoadGen left no result"):
        read_result(write_log(tmp_path, {k: v for k, v in SAID.items() if k != missing}), "Offline", 1, 1, 60)


def test_no_log_is_an_error(tmp_path):
    with pytest.raises(EngineError, match="mlperf_log_detail"):
        read_result(tmp_path, "Offline", 1, 1, 60)
