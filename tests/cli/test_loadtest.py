from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from dlrm_deploy.cli.main import cli

QUICK = ["--duration-s", "0.1", "--min-pairs", "2", "--max-pairs", "9", "--workers", "1", "--threads", "1"]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["loadtest", *map(str, arguments)])


def row(scenario: str, verdict: str = "VALID", **change: object) -> dict[str, object]:
    return {
        "scenario": scenario,
        "engine": "onnxruntime[int8,bf16]",
        "verdict": verdict,
        "why": [] if verdict == "VALID" else ["the 99th percentile is too long"],
        "workers": 2,
        "threads": 1,
        "samples_per_s": 1234.5,
        "pairs_per_s": 333_315.0,
        "target_qps": 1250.0,
        "p99_bound_ms": 60.0,
        "p50_ms": 1.5,
        "p90_ms": 2.5,
        "p99_ms": 9.5,
        "load_curve": [],
        **change,
    }


@pytest.fixture
def answered(monkeypatch):
    """Puts rows in the place of a run, and remembers what was asked for."""
    asked = []

    def put(*rows: dict[str, object]):
        def run_scenarios(bundle, settings, *, logs, progress, on_row):
            asked.append((bundle, settings, logs))
            progress("working")
            for each in rows:
                on_row(each)
            return list(rows)

        monkeypatch.setattr("dlrm_deploy.bench.scenarios.run_scenarios", run_scenarios)
        return asked

    return put


def test_a_scenario_is_run_printed_and_written_and_can_be_repeated(bundle, tmp_path):
    pytest.importorskip("mlperf_loadgen")
    out, logs = tmp_path / "rows.jsonl", tmp_path / "logs"
    result = run(bundle.path, "--scenario", "offline", "--json", "--out", out, "--logs", logs, *QUICK)
    assert result.exit_code in (0, 1), result.output
    (line,) = result.stdout.splitlines()
    assert out.read_text() == line + "\n"
    facts = json.loads(line)
    assert result.exit_code == (0 if facts["verdict"] == "VALID" else 1)
    assert (logs / "offline-1" / "mlperf_log_summary.txt").is_file()
    assert "Offline: LoadGen test 1" in result.stderr
    name, *again = shlex.split(facts["command"])
    repeated = CliRunner().invoke(cli, [*again, "--json"])
    assert name == "dlrm-deploy"
    assert json.loads(repeated.stdout)["command"] == facts["command"]


def test_a_result_says_rates_latencies_and_verdict(bundle, answered):
    curve = [{"target_qps": 1250.0, "p99_ms": 9.5, "valid": True}, {"target_qps": 1300.0, "p99_ms": 99, "valid": False}]
    answered(row("Offline"), row("Server", load_curve=curve), row("SingleStream"))
    result = run(bundle.path)
    assert result.exit_code == 0, result.output
    offline, server, valid, invalid, single = result.stdout.splitlines()
    assert offline.startswith(
        "VALID   Offline, onnxruntime[int8,bf16] (2 x 1 thread): 1234 queries/s, 3.333e+05 pairs/s"
    )
    assert "1250 queries/s sent" in server
    assert "p99 9.5 ms (bound 60 ms)" in server
    assert valid.strip() == "at 1250 queries/s: p99 9.5 ms, valid"
    assert invalid.strip() == "at 1300 queries/s: p99 99 ms, not valid"
    assert "latency p50 1.5 ms, p90 2.5 ms, p99 9.5 ms" in single


def test_a_scenario_that_is_not_valid_exits_1_and_says_why(bundle, answered):
    answered(row("Server", "INVALID"))
    result = run(bundle.path)
    assert result.exit_code == 1
    assert "INVALID Server" in result.stdout
    assert "the 99th percentile is too long" in result.stdout


def test_options_reach_the_settings(bundle, answered):
    asked = answered()
    assert (
        run(bundle.path, "--scenario", "server", "--target-qps", "12.5", "--p99-ms", "7", "--prefault").exit_code == 0
    )
    assert run(bundle.path, "--target-qps", "auto", "--coalesce-pairs", "900", "--logs", "kept").exit_code == 0
    first, second = asked
    assert (first[1].scenarios, first[1].target_qps, first[1].p99_ms) == (("Server",), 12.5, 7.0)
    assert first[1].prefault
    assert second[1].scenarios == ("Offline", "Server", "SingleStream")
    assert (second[1].target_qps, second[1].coalesce_pairs, second[2]) == (None, 900, Path("kept"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing"], "missing"),
        (["BUNDLE", "--scenario", "multi-stream"], "multi-stream"),
        (["BUNDLE", "--engine", "tflite"], "no engine is named 'tflite'"),
        (["BUNDLE", "--target-qps", "fast"], "'fast' is neither a number nor auto"),
        (["BUNDLE", "--target-qps", "-3"], "target QPS must be greater than 0"),
        (["BUNDLE", "--min-pairs", "800"], "got 800 to 700"),
        (["BUNDLE", "--distribution", "trace"], "go together"),
        (["BUNDLE", "--workers", "0"], "workers must be 1"),
    ],
)
def test_wrong_usage_exits_2(bundle, arguments, message):
    result = run(*(bundle.path if word == "BUNDLE" else word for word in arguments))
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


def test_without_loadgen_it_exits_3_and_names_the_extra(bundle, monkeypatch):
    monkeypatch.setattr("dlrm_deploy.bench.loadgen.find_spec", lambda name: None)
    result = run(bundle.path, *QUICK)
    assert result.exit_code == 3
    assert "dlrm-deploy[bench]" in result.stderr


@pytest.mark.parametrize(("how", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_whatever_ends_the_command_ends_the_test_in_its_child(bundle, tmp_path, how, code):
    pytest.importorskip("mlperf_loadgen")
    script = Path(sys.executable).with_name("dlrm-deploy")
    options = [*QUICK, "--duration-s", "300", "--scenario", "server", "--target-qps", "50", "--logs", tmp_path / "logs"]
    command = [script, "loadtest", bundle.path, *map(str, options)]

    def hear_interrupts() -> None:  # a shell's background jobs ignore them, and so does what they start
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, preexec_fn=hear_interrupts, **pipes) as process:
        assert process.stderr is not None
        assert any("LoadGen test" in line for line in process.stderr)
        tasks = Path(f"/proc/{process.pid}/task").iterdir()
        children = [Path("/proc", pid) for task in tasks for pid in (task / "children").read_text().split()]
        process.send_signal(how)
        assert process.wait(timeout=60) == code
        assert children
        ends = time.monotonic() + 60
        while any(child.exists() for child in children) and time.monotonic() < ends:
            time.sleep(0.05)
        assert not any(child.exists() for child in children)


def test_help_does_not_import_torch():
    commands = "dlrm_deploy.cli.loadtest, dlrm_deploy.cli.trace"
    code = f"import sys, {commands}; print([name in sys.modules for name in ('torch', 'onnxruntime', 'rich')])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[False, False, False]"
