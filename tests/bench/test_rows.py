from __future__ import annotations

import json

import numpy as np
import pytest

from dlrm_deploy.bench.calibration import Calibration
from dlrm_deploy.bench.rows import BenchReport, BenchRow, Circumstances, NotRun, readable_bytes, summarise

MS = 1_000_000


def rounds(*milliseconds: list[float]) -> list[np.ndarray]:
    return [np.array(values) * MS for values in milliseconds]


def test_percentiles_of_known_calls():
    calls = rounds(list(range(1, 51)), list(range(51, 101)))  # 1 to 100 ms
    timing = summarise(calls, calls, batch_size=10)
    assert timing.p50_ms == pytest.approx(50.5)
    assert timing.p99_ms == pytest.approx(100)  # of so few calls, no call may be left out
    assert timing.calls == 100


def test_p99_leaves_out_one_call_in_two_hundred():
    calls = rounds([1.0] * 199 + [1000.0])
    assert summarise(calls, calls, 1).p99_ms == pytest.approx(1)


def test_throughput_is_the_median_over_rounds_of_the_mean_call():
    calls = rounds([1, 3], [4, 4, 4], [100])  # means 2, 4 and 100 ms
    timing = summarise(calls, calls, batch_size=8)
    assert timing.median_ms == pytest.approx(4)
    assert timing.samples_per_s == pytest.approx(2000)


def test_ratio_of_the_baseline_is_exactly_one():
    calls = rounds([0.1, 0.7], [0.3], [1.1, 0.9, 0.2])
    timing = summarise(calls, calls, 1)
    assert (timing.ratio, timing.ratio_min, timing.ratio_max) == (1, 1, 1)


def test_ratio_is_taken_within_each_round():
    # The machine is ten times slower in the second round; the engine is 2, 3 and 4 times as fast.
    engine, baseline = rounds([1], [10], [1]), rounds([2], [30], [4])
    timing = summarise(engine, baseline, 1)
    assert (timing.ratio, timing.ratio_min, timing.ratio_max) == pytest.approx((3, 2, 4))


@pytest.mark.parametrize(
    ("count", "text"), [(2_160_000_000, "2.16 GB"), (21_600_000, "21.6 MB"), (1500, "1.5 kB"), (12, "12 B")]
)
def test_readable_bytes(count, text):
    assert readable_bytes(count) == text


def report(**circumstances: object) -> BenchReport:
    calls = rounds([1.0])
    shared = {
        "command": "dlrm-deploy bench b",
        "time": "2026-01-01T00:00:00+00:00",
        "dlrm_deploy_version": "1",
        "commit": None,
        "cpu": "cpu",
        "threads": 2,
        "seed": 0,
        "distribution": "uniform",
        "rounds": 1,
        "slice_ms": 1.0,
        "table_bytes": 64,
        "reference": "torch",
        "omp_wait_policy": None,
        "calibration_missing": None,
    }
    row = BenchRow(
        model="m",
        engine="torch",
        engine_version="torch 2",
        implementations={"DotInteraction": "PyTorch eager"},
        batch=4,
        timing=summarise(calls, calls, 4),
        baseline="torch",
        max_abs_difference=0.0,
        distinct_batches=3,
        other_load=0.0,
        calibration=Calibration(
            fma_gflops=200.0, stream_gb_per_s=10.0, gather_gb_per_s=5.0, row_bytes=64, gather_bytes=1024
        ),
    )
    return BenchReport(
        circumstances=Circumstances(**{**shared, **circumstances}),
        rows=(row,),
        not_run=(NotRun(engine="tensorrt", batch=None, reason="no GPU"),),
    )


def test_each_json_line_is_complete_in_itself():
    measured, not_run = (json.loads(line) for line in report().to_json_lines().splitlines())
    assert measured["engine"] == "torch"
    assert measured["samples_per_s"] == pytest.approx(4000)
    assert measured["calibration"]["gather_gb_per_s"] == 5.0
    assert (not_run["engine"], not_run["batch"], not_run["not_run"]) == ("tensorrt", None, "no GPU")
    for line in (measured, not_run):
        assert (line["command"], line["cpu"], line["threads"]) == ("dlrm-deploy bench b", "cpu", 2)
