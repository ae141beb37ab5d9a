"""MLPerf's scenarios on one bundle: how many users a second are served, and how long each waits.

`run_scenarios` runs them in a child process, because a LoadGen test cannot be stopped: an interrupt ends the child. An
engine that crashes or fails ends it too, and is reported. `measure` is what the child does.

What MLPerf calls a sample is a query here: one user with 100 to 700 items to be ranked. `samples_per_s` counts those,
`pairs_per_s` the pairs of user and item, which are what `dlrm-deploy bench` calls samples.
"""

from __future__ import annotations

import json
import math
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

import dlrm_deploy
from dlrm_deploy import errors
from dlrm_deploy.batch import Batch
from dlrm_deploy.bench.calibration import Calibration, measure_calibration
from dlrm_deploy.bench.gather import GatherRows
from dlrm_deploy.bench.inputs import touching_batches
from dlrm_deploy.bench.loadgen import SCENARIOS, LoadgenResult, Scenario, check_installed, run_loadgen
from dlrm_deploy.bench.machine import LoadMeter, available_cores, cpu_name, source_commit
from dlrm_deploy.bench.peers.registry import PEER_NAMES, open_peer
from dlrm_deploy.bench.qps_search import highest_valid
from dlrm_deploy.bench.queries import query_library
from dlrm_deploy.bench.variant import label_of
from dlrm_deploy.bench.workers import Query, Workers
from dlrm_deploy.bundle import Bundle
from dlrm_deploy.data.random import BATCH_DISTRIBUTIONS, BatchDistribution
from dlrm_deploy.engines.engine import Engine
from dlrm_deploy.engines.registry import ENGINE_NAMES, MOST_THREADS, PLAN_ENGINES, open_unchecked
from dlrm_deploy.errors import ConfigError, DlrmDeployError, EngineError

Progress = Callable[[str], None]

OFFLINE_TRIES = 3
"""LoadGen issues a number of queries that is fixed beforehand; where they were too few for the duration, it asks for a
further test with more."""

SEARCH_START = 0.3
"""First load to try, as a share of what the engines answered without pause."""

_MOST_PAIRS = 1 << 20
_WARM_QUERIES = 32
_GATHERED_ROWS = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class ScenarioSettings:
    """What to run.

    Raises:
        ConfigError: an unknown scenario, engine or distribution, a number out of its range, or a trace without the
            distribution of that name.
    """

    scenarios: tuple[Scenario, ...] = SCENARIOS
    engine: str = "onnxruntime"
    target_qps: float | None = None
    """Of the server; None searches the highest valid one."""

    p99_ms: float = 60.0
    """The server's bound of the 99th percentile of latencies."""

    min_pairs: int = 100
    max_pairs: int = 700
    duration_s: float = 10.0
    """Least duration of each LoadGen test; the server's search takes about seven."""

    workers: int | None = None
    """Engines that take queries from the queue; None for 1 in a single stream, and otherwise for one per core."""

    threads: int | None = None
    """CPU threads of each engine; None for the cores divided by the workers."""

    coalesce_pairs: int = 0
    """See `Workers`."""

    seed: int = 0
    distribution: BatchDistribution = "uniform"
    trace: str | None = None
    """Path of the trace that belongs to distribution "trace"."""

    prefault: bool = False
    huge_pages: bool = False
    """As in `dlrm_deploy.engines.registry.open_unchecked`."""

    def __post_init__(self) -> None:
        for scenario in self.scenarios:
            if scenario not in SCENARIOS:
                raise ConfigError(f"no scenario is named {scenario!r}. Scenarios: {', '.join(SCENARIOS)}.")
        if not self.scenarios or len(set(self.scenarios)) < len(self.scenarios):
            raise ConfigError(f"each scenario is run once, and at least one is, got {', '.join(self.scenarios)}.")
        if self.engine not in (*ENGINE_NAMES, *PEER_NAMES):
            raise ConfigError(
                f"no engine is named {self.engine!r}. Engines: {', '.join((*ENGINE_NAMES, *PEER_NAMES))}."
            )
        for name, number, most in (
            ("target QPS", self.target_qps, 1e9),
            ("the bound of the 99th percentile", self.p99_ms, 600_000),
            ("the duration", self.duration_s, 86_400),
        ):
            if number is not None and not 0 < number <= most:
                raise ConfigError(f"{name} must be greater than 0 and at most {most:g}, got {number}.")
        if not 1 <= self.min_pairs <= self.max_pairs <= _MOST_PAIRS:
            raise ConfigError(
                f"a query has 1 to {_MOST_PAIRS} pairs, the least not above the most, got {self.min_pairs} to "
                f"{self.max_pairs}."
            )
        for kind, threads in (("workers", self.workers), ("threads", self.threads)):
            if threads is not None and not 1 <= threads <= MOST_THREADS:
                raise ConfigError(f"{kind} must be 1 to {MOST_THREADS}, got {threads}.")
        if self.coalesce_pairs < 0 or self.seed < 0:
            raise ConfigError(f"pairs to coalesce and seed must be at least 0: {self.coalesce_pairs}, {self.seed}.")
        if self.distribution not in BATCH_DISTRIBUTIONS:
            raise ConfigError(
                f"distribution must be one of {', '.join(BATCH_DISTRIBUTIONS)}, got {self.distribution!r}."
            )
        if (self.distribution == "trace") != (self.trace is not None):
            raise ConfigError("distribution trace and a trace file go together: give both or neither.")

    def crew(self, scenario: Scenario) -> tuple[int, int]:
        """Workers, and threads of each."""
        cores = available_cores()
        workers = self.workers or (1 if scenario == "SingleStream" else max(cores // (self.threads or 1), 1))
        return workers, self.threads or min(max(cores // workers, 1), MOST_THREADS)

    def command(self, bundle: str, scenario: Scenario) -> str:
        """The command line that repeats one scenario."""
        workers, threads = self.crew(scenario)
        options: dict[str, object] = {
            "--scenario": OPTION_NAMES[scenario],
            "--engine": self.engine,
            "--min-pairs": self.min_pairs,
            "--max-pairs": self.max_pairs,
            "--duration-s": f"{self.duration_s:g}",
            "--workers": workers,
            "--threads": threads,
            "--coalesce-pairs": self.coalesce_pairs,
            "--distribution": self.distribution,
            "--seed": self.seed,
        }
        if scenario == "Server":
            options["--p99-ms"] = f"{self.p99_ms:g}"
            options["--target-qps"] = "auto" if self.target_qps is None else f"{self.target_qps:g}"
        if self.trace is not None:
            options["--trace"] = self.trace
        words = [str(word) for pair in options.items() for word in pair]
        words += ["--prefault"] * self.prefault + ["--huge-pages"] * self.huge_pages
        return shlex.join(["dlrm-deploy", "loadtest", bundle, *words])


OPTION_NAMES: dict[Scenario, str] = {"Offline": "offline", "Server": "server", "SingleStream": "single-stream"}
"""Scenarios on the command line."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadPoint:
    """One LoadGen test of a server."""

    target_qps: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    samples_per_s: float
    queries: int
    valid: bool
    why: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ScenarioRow:
    """The result of one scenario, complete in itself. Numbers of LoadGen: see `LoadgenResult`."""

    result: LoadgenResult
    """Server: of the highest valid load; of the last test where none was valid."""

    model: str
    scenario: Scenario
    engine: str
    """With the number formats of a converted bundle: onnxruntime[int8,bf16]."""

    engine_version: str
    implementations: dict[str, str]
    target_qps: float | None
    """Server: of the test that the numbers are from."""

    valid_qps: float | None
    """Server: the highest load that LoadGen found valid."""

    p99_bound_ms: float | None
    load_curve: tuple[LoadPoint, ...]
    """Server: every test of the search, by rising load."""

    distinct_queries: int
    workers: int
    threads: int
    """Of each worker's engine."""

    settings: ScenarioSettings
    calibration: Calibration | None
    calibration_missing: str | None
    other_load: float | None
    """Share of the machine's cores, 0 to 1, that other processes used meanwhile."""

    cpu: str
    commit: str | None
    dlrm_deploy_version: str
    time: str
    """UTC, ISO 8601."""

    table_bytes: int
    command: str

    def facts(self) -> dict[str, object]:
        """Plain values for JSON: those of LoadGen and the settings on the same level as the rest."""
        plain = asdict(self)
        result, settings = plain.pop("result"), plain.pop("settings")
        for name in ("scenarios", "engine", "target_qps", "p99_ms", "workers", "threads"):
            del settings[name]
        return {"kind": "scenario", **plain, **result, **settings}


def measure(
    bundle: Bundle,
    settings: ScenarioSettings,
    logs: Path,
    *,
    target: str | None = None,
    progress: Progress = lambda step: None,
    failed: Callable[[Exception], None] = lambda error: None,
) -> Iterator[ScenarioRow]:
    """Run the scenarios in this process, which has to let LoadGen tests run to their end.

    Args:
        bundle: an opened bundle.
        settings: what to run.
        logs: a folder for LoadGen's files, one folder a test.
        target: how the command line names the bundle, for the command in the row.
        progress: called with a word on each step.
        failed: called when an engine fails on a query, before the LoadGen test that this spoils has come to its end.

    Yields:
        A row for each scenario, as soon as it is there.

    Raises:
        EngineError: the engine cannot run here, fails on a query, or LoadGen gives no result.
        DataError: the trace is none of this model.
        MissingDependencyError: a package is not installed.
    """
    check_installed()
    progress("drawing queries")
    library = query_library(
        bundle.config,
        settings.seed,
        least=settings.min_pairs,
        most=settings.max_pairs,
        distribution=settings.distribution,
        trace=None if settings.trace is None else Path(settings.trace),
        index_dtype=bundle.manifest.index_dtype,
    )
    for scenario in settings.scenarios:
        workers, threads = settings.crew(scenario)
        with _opened(bundle, settings, workers, threads, progress) as engines:
            calibration, missing = _calibrate(bundle, workers * threads)
            load = LoadMeter()
            test = _Tester(scenario, engines, library, settings, logs, progress, failed)
            test.warm_up()
            result, target_qps, curve = test.run()
            version, implementations = engines[0].version, engines[0].implementations()
            other_load = load.others()
        valid = [point.target_qps for point in curve if point.valid]
        yield ScenarioRow(
            result=result,
            model=bundle.config.name,
            scenario=scenario,
            engine=engine_label(bundle, settings.engine),
            engine_version=version,
            implementations=implementations,
            target_qps=target_qps,
            valid_qps=max(valid, default=None),
            p99_bound_ms=settings.p99_ms if scenario == "Server" else None,
            load_curve=tuple(curve),
            distinct_queries=len(library),
            workers=workers,
            threads=threads,
            settings=settings,
            calibration=calibration,
            calibration_missing=missing,
            other_load=other_load,
            cpu=cpu_name(),
            commit=source_commit(),
            dlrm_deploy_version=dlrm_deploy.__version__,
            time=datetime.now(UTC).isoformat(timespec="seconds"),
            table_bytes=bundle.config.table_bytes,
            command=settings.command(target or str(bundle.path), scenario),
        )


def engine_label(bundle: Bundle, engine: str) -> str:
    """The engine's name, with the number formats of a converted bundle."""
    if engine in PEER_NAMES:
        return engine
    precision = bundle.manifest.precision
    return label_of(engine, precision.get("tables", "fp32"), precision.get("mlp", "fp32"))


class _Tester:
    """LoadGen tests of one scenario on open engines."""

    def __init__(
        self,
        scenario: Scenario,
        engines: Sequence[Engine],
        library: Sequence[Batch],
        settings: ScenarioSettings,
        logs: Path,
        progress: Progress,
        failed: Callable[[Exception], None],
    ) -> None:
        self._failed = failed
        self._scenario = scenario
        self._engines = engines
        self._library = library
        self._settings = settings
        self._logs = logs
        self._progress = progress
        self._numbers = count(1)
        self._rate = math.nan

    def warm_up(self) -> None:
        """Answer queries without pause for a while: tables are read once, and the rate is what LoadGen is told."""
        seconds = min(self._settings.duration_s / 4, 1.0)
        self._progress(f"{self._scenario}: warming up")
        for _ in range(2):  # the first pass brings pages and buffers; only the second one counts
            self._rate = self._closed_loop(seconds)

    def _closed_loop(self, seconds: float) -> float:
        """Queries a second that the engines answer when there is always one waiting."""
        answered = threading.Semaphore(0)

        def answer(tickets: Sequence[int]) -> None:
            answered.release(len(tickets))

        done, issued = 0, 0
        most = _WARM_QUERIES * len(self._engines)
        began = perf_counter()
        with Workers(self._engines, self._library, answer, coalesce_pairs=self._settings.coalesce_pairs) as workers:
            while done < issued or not issued:
                now = perf_counter()
                if not issued or (now - began < seconds and workers.error is None):
                    fresh = range(issued, done + most)
                    workers.put([Query(ticket, ticket % len(self._library)) for ticket in fresh])
                    issued = done + most
                answered.acquire()
                done += 1
            elapsed = perf_counter() - began
        if workers.error is not None:
            raise EngineError(f"the engine failed on a query: {workers.error}") from workers.error
        return done / elapsed

    def run(self) -> tuple[LoadgenResult, float | None, list[LoadPoint]]:
        """The result of the scenario; a server's load, and the tests of its search by rising load."""
        if self._scenario == "Server":
            return self._server()
        rate = self._rate
        for _ in range(OFFLINE_TRIES if self._scenario == "Offline" else 1):
            result = self._test(rate)
            if result.verdict == "VALID":
                break
            rate = max(rate, result.samples_per_s) * 1.2
        return result, None, []

    def _server(self) -> tuple[LoadgenResult, float, list[LoadPoint]]:
        results: dict[float, LoadgenResult] = {}

        def is_valid(qps: float) -> bool:
            results[qps] = self._test(qps)
            return results[qps].verdict == "VALID"

        best = self._settings.target_qps
        if best is None:
            best = highest_valid(is_valid, _rounded(self._rate * SEARCH_START))
        else:
            is_valid(best)
        chosen = list(results)[-1] if best is None else best
        curve = [
            LoadPoint(
                target_qps=qps,
                p50_ms=result.p50_ms,
                p90_ms=result.p90_ms,
                p99_ms=result.p99_ms,
                samples_per_s=result.samples_per_s,
                queries=result.queries,
                valid=result.verdict == "VALID",
                why=result.why,
            )
            for qps, result in sorted(results.items())
        ]
        return results[chosen], chosen, curve

    def _test(self, qps: float) -> LoadgenResult:
        number = next(self._numbers)
        at = f" at {qps:.4g} queries/s" if self._scenario == "Server" else ""
        self._progress(f"{self._scenario}{at}: LoadGen test {number}, {self._settings.duration_s:g} s")
        return run_loadgen(
            self._scenario,
            self._engines,
            self._library,
            self._logs / f"{OPTION_NAMES[self._scenario]}-{number}",
            qps=qps,
            duration_s=self._settings.duration_s,
            p99_ms=self._settings.p99_ms,
            coalesce_pairs=self._settings.coalesce_pairs,
            failed=self._failed,
        )


def _rounded(qps: float) -> float:
    """Three digits: a load that can be named."""
    return float(f"{qps:.3g}")


@contextmanager
def _opened(
    bundle: Bundle, settings: ScenarioSettings, workers: int, threads: int, progress: Progress
) -> Iterator[list[Engine]]:
    """An engine for each worker."""
    with ExitStack() as stack:
        engines: list[Engine] = []
        for number in range(workers):
            progress(f"opening {settings.engine}, worker {number + 1} of {workers}")
            if settings.engine in PEER_NAMES:
                peer = stack.enter_context(open_peer(bundle, settings.engine, threads=threads))
                peer.touch_tables()
                engines.append(peer)
                continue
            engine = open_unchecked(
                bundle,
                settings.engine,
                threads=threads,
                spin=workers == 1,  # threads of one worker that spin would take the cores of another
                prefault=settings.prefault,
                huge_pages=settings.huge_pages,
            )
            engines.append(stack.enter_context(engine))
            _touch(bundle, engine)
        yield engines


def _touch(bundle: Bundle, engine: Engine) -> None:
    """Read every page of the tables through the engine's own mapping: the first access to a page costs a fault."""
    if engine.name not in PLAN_ENGINES:
        for batch in touching_batches(bundle.config, bundle.manifest.index_dtype):
            engine.predict(batch)


def _calibrate(bundle: Bundle, threads: int) -> tuple[Calibration | None, str | None]:
    """What the machine can do at the moment, or why that is not known."""
    try:
        return measure_calibration(min(threads, available_cores()), _gathered(bundle)), None
    except EngineError as err:
        return None, str(err)


def _gathered(bundle: Bundle) -> list[GatherRows]:
    """Random rows of every stored matrix, for the gather calibration."""
    rng = np.random.default_rng(0)
    found = []
    for matrix in bundle.map_tables():
        memory = matrix.reshape(-1).view(np.uint8)
        if 0 < len(matrix) < 2**32:
            rows = rng.integers(0, len(matrix), min(len(matrix), _GATHERED_ROWS), dtype=np.uint32)
            found.append(GatherRows(memory, memory.size // len(matrix), rows))
    return found


def run_scenarios(
    bundle: Path,
    settings: ScenarioSettings,
    *,
    logs: Path | None = None,
    progress: Progress = lambda step: None,
    on_row: Callable[[dict[str, Any]], None] = lambda row: None,
) -> list[dict[str, Any]]:
    """Run the scenarios in a child process, which is ended with this call whatever happens.

    Args:
        bundle: path of a bundle.
        settings: what to run.
        logs: keep LoadGen's files in this folder; None: they vanish.
        progress: called with a word on each step.
        on_row: called with each row as soon as it is there.

    Returns:
        `ScenarioRow.facts()` of each scenario.

    Raises:
        DlrmDeployError: as `measure` says, or the child ended before its time.
    """
    check_installed()
    with ExitStack() as stack:
        folder = logs or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dlrm-deploy-loadgen-")))
        request = {"bundle": str(bundle), "logs": str(folder), "settings": asdict(settings)}
        # -P keeps the current folder off the path. A session of its own: Ctrl-C reaches us only, and we end it.
        child = stack.enter_context(
            subprocess.Popen(
                [sys.executable, "-P", "-m", "dlrm_deploy.bench.scenario_process", json.dumps(request)],
                stdin=subprocess.PIPE,  # stays open: the child ends when it closes, as it does when we are killed
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                start_new_session=True,
            )
        )
        stack.callback(child.kill)
        assert child.stdout is not None
        last_words = _LastWords(child)
        rows: list[dict[str, Any]] = []
        for line in child.stdout:
            said = json.loads(line)
            if "progress" in said:
                progress(said["progress"])
            elif "row" in said:
                rows.append(said["row"])
                on_row(said["row"])
            elif "done" in said:
                return rows
            else:
                raise _error(said["error"], said["message"])
        code = child.wait()
        raise EngineError(
            f"the load test of {settings.engine} {_ended(code)}. Its last words: {last_words.text() or 'none'}. "
            f"Finished scenarios: {len(rows)} of {len(settings.scenarios)}."
        )


def _error(kind: str, message: str) -> DlrmDeployError:
    named = getattr(errors, kind, EngineError)
    return named(message) if issubclass(named, DlrmDeployError) else EngineError(message)


def _ended(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"crashed ({signal.Signals(-code).name})"
    except ValueError:
        return f"crashed (signal {-code})"


@dataclass(slots=True)
class _LastWords:
    """Reads a child's standard error, so that it never waits for a reader, and keeps the end."""

    child: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)
    thread: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self) -> None:
        assert self.child.stderr is not None
        for line in self.child.stderr:
            if line.strip():
                self.lines = [*self.lines[-2:], line.strip()]

    def text(self) -> str:
        """The last three lines, after the child's end."""
        self.thread.join(timeout=5)
        return " | ".join(self.lines)
