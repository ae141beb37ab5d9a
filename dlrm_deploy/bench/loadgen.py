"""One test of MLPerf LoadGen: it issues queries as a scenario says, times the answers, and gives a verdict.

LoadGen decides when queries come, what counts as valid and why. That is read from its detailed log, whose lines are
JSON; nothing is computed anew.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

from dlrm_deploy.batch import Batch
from dlrm_deploy.bench.workers import Query, Scorer, Workers
from dlrm_deploy.errors import EngineError, MissingDependencyError

Scenario = Literal["Offline", "Server", "SingleStream"]
SCENARIOS: tuple[Scenario, ...] = get_args(Scenario)

LEAST_QUERIES: dict[Scenario, int] = {"Offline": 1, "Server": 1000, "SingleStream": 100}
"""A test goes on until as many were issued. To say something of the slowest hundredth, LoadGen wants 459 queries if
none of them is late, and more if some are. Of a single stream it judges the slowest tenth, for which 64 are enough."""

PERCENTILE = 0.99
"""Of a server's latencies."""

_MARK = ":::MLLOG "
_NS_PER_MS = 1e6


def check_installed() -> None:
    """Raise `MissingDependencyError` unless LoadGen is installed."""
    if find_spec("mlperf_loadgen") is None:
        raise MissingDependencyError(
            "load tests need MLPerf LoadGen, which is not installed. Install it with "
            "`pip install 'dlrm-deploy[bench]'` (package mlcommons-loadgen; where it has no wheel for "
            "this machine, it is built with a C++ compiler)."
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadgenResult:
    """What LoadGen says of one test, in its own words and numbers but for the units."""

    verdict: Literal["VALID", "INVALID"]
    why: tuple[str, ...]
    """What was not met, for an invalid test."""

    queries: int
    """Queries (of one user each) answered."""

    pairs: int
    samples_per_s: float
    """Users served a second, which MLPerf calls samples: the offline rate, the rate at which queries of a server were
    completed, the reciprocal of the mean latency in a single stream."""

    pairs_per_s: float
    scheduled_qps: float | None
    """Server: queries a second as LoadGen's random arrivals came out."""

    late_queries: int | None
    """Server: queries over the latency bound."""

    mean_ms: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    max_ms: float
    """Latencies of queries. Server: from when a query was due. Offline: from the beginning, so they say little."""

    loadgen_version: str


def run_loadgen(
    scenario: Scenario,
    engines: Sequence[Scorer],
    library: Sequence[Batch],
    logs: Path,
    *,
    qps: float,
    duration_s: float,
    p99_ms: float,
    coalesce_pairs: int = 0,
    least_queries: int | None = None,
    failed: Callable[[Exception], None] = lambda error: None,
) -> LoadgenResult:
    """Run one test.

    Args:
        scenario: Offline: all queries at once. Server: random (Poisson) arrivals. SingleStream: one after the other.
        engines: one a worker.
        library: what queries are drawn from.
        logs: a folder, made here, for LoadGen's own files.
        qps: Server: arrivals a second. The others: what LoadGen is to expect. In Offline it issues so many for the
            duration, and 10 % more.
        duration_s: least duration.
        p99_ms: Server: bound of the 99th percentile of latencies.
        coalesce_pairs: see `Workers`.
        least_queries: `LEAST_QUERIES` where left out.
        failed: called from a worker's thread when an engine fails, while the test goes on.

    Raises:
        EngineError: an engine failed on a query, or LoadGen gave no result.
        MissingDependencyError: LoadGen is not installed.
    """
    check_installed()
    import mlperf_loadgen as lg

    settings = lg.TestSettings()
    settings.scenario = getattr(lg.TestScenario, scenario)
    settings.mode = lg.TestMode.PerformanceOnly
    settings.min_duration_ms = max(round(duration_s * 1000), 1)
    settings.min_query_count = LEAST_QUERIES[scenario] if least_queries is None else least_queries
    if scenario == "Server":
        settings.server_target_qps = qps
        settings.server_target_latency_ns = round(p99_ms * _NS_PER_MS)
        settings.server_target_latency_percentile = PERCENTILE
    elif scenario == "Offline":
        settings.offline_expected_qps = qps
    else:
        settings.single_stream_expected_latency_ns = max(round(1e9 / qps), 1)
    logs.mkdir(parents=True, exist_ok=True)
    log_settings = lg.LogSettings()
    log_settings.log_output.outdir = str(logs)
    log_settings.log_output.copy_summary_to_stdout = False
    log_settings.enable_trace = False

    def answer(tickets: Sequence[int]) -> None:
        lg.QuerySamplesComplete([lg.QuerySampleResponse(ticket, 0, 0) for ticket in tickets])

    def nothing(indices: object = None) -> None:
        """The library is in memory all the time; nothing is held back that could be flushed."""

    with (
        Workers(engines, library, answer, coalesce_pairs=coalesce_pairs, failed=failed) as workers,
        ExitStack() as stack,
    ):
        system = lg.ConstructSUT(lambda samples: workers.put([Query(s.id, s.index) for s in samples]), nothing)
        stack.callback(lg.DestroySUT, system)
        queries = lg.ConstructQSL(len(library), len(library), nothing, nothing)
        stack.callback(lg.DestroyQSL, queries)
        lg.StartTestWithLogSettings(system, queries, settings, log_settings, "")
    if workers.error is not None:
        raise EngineError(f"an engine failed on a query: {workers.error}") from workers.error
    return read_result(logs, scenario, workers.queries, workers.pairs, p99_ms)


def read_result(logs: Path, scenario: Scenario, queries: int, pairs: int, p99_ms: float) -> LoadgenResult:
    """What the detailed log in the folder `logs` says.

    Args:
        logs: where LoadGen wrote.
        scenario: what was run.
        queries: queries that were answered.
        pairs: pairs in them.
        p99_ms: the bound of a server's latencies, to be named in the reasons.

    Raises:
        EngineError: there is no such log, or it lacks results.
    """
    path = logs / "mlperf_log_detail.txt"
    said: dict[str, Any] = {}
    errors: list[str] = []
    try:
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith(_MARK):
                entry = json.loads(line.removeprefix(_MARK))
                said[entry["key"]] = entry["value"]
                if entry.get("metadata", {}).get("is_error"):
                    errors.append(f"LoadGen reports an error: {entry['value']}")
        rate = {
            "Offline": "result_samples_per_second",
            "Server": "result_completed_samples_per_sec",
            "SingleStream": "result_qps_without_loadgen_overhead",
        }[scenario]
        samples_per_s = float(said[rate])
        p99 = said["result_99.00_percentile_latency_ns"] / _NS_PER_MS
        return LoadgenResult(
            verdict="VALID" if said["result_validity"] == "VALID" else "INVALID",
            why=(*_reasons(said, p99, p99_ms), *errors),
            queries=queries,
            pairs=pairs,
            samples_per_s=samples_per_s,
            pairs_per_s=samples_per_s * pairs / max(queries, 1),
            scheduled_qps=said.get("result_scheduled_samples_per_sec"),
            late_queries=said.get("result_overlatency_query_count") if scenario == "Server" else None,
            mean_ms=said["result_mean_latency_ns"] / _NS_PER_MS,
            p50_ms=said["result_50.00_percentile_latency_ns"] / _NS_PER_MS,
            p90_ms=said["result_90.00_percentile_latency_ns"] / _NS_PER_MS,
            p99_ms=p99,
            max_ms=said["result_max_latency_ns"] / _NS_PER_MS,
            loadgen_version=str(said["loadgen_version"]).partition(" ")[0],
        )
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise EngineError(f"LoadGen left no result in {path}: {type(err).__name__}: {err}.") from err


def _reasons(said: dict[str, Any], p99: float, bound: float) -> list[str]:
    if said["result_validity"] == "VALID":
        return []
    reasons = []
    if not said.get("result_perf_constraints_met", True):
        reasons.append(f"the 99th percentile of the latencies is {p99:.3g} ms, over the bound of {bound:g} ms")
    if not said.get("result_min_duration_met", True):
        reasons.append("the test ended before its least duration")
    if not said.get("result_min_queries_met", True):
        reasons.append("fewer queries than the least number were issued")
    for key in ("early_stopping_result", "result_invalid_reason"):
        text = " ".join(str(said.get(key, "")).replace("*", "").split())
        if text and not (key == "early_stopping_result" and said.get("early_stopping_met", True)):
            reasons.append(text)
    return reasons or ["LoadGen gives no reason"]
