from __future__ import annotations

import json

import numpy as np
import pytest

from dlrm_deploy.bench.rows import over_floor, readable_bytes, summarise
from dlrm_deploy.bench.work import Floor

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


def test_throughput_is_the_median_over_rounds_of_the_median_call():
    calls = rounds([1, 3], [4, 4, 900], [100])  # medians 2, 4 and 100 ms
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


def test_without_calibration_the_floor_is_null_not_missing(make_report):
    line = json.loads(make_report(calibrated=False).to_json_lines().splitlines()[0])
    assert (line["calibration"], line["floor_ms"], line["times_floor"], line["floor_overlap_ms"]) == (None,) * 4


def test_the_floor_is_compared_round_by_round():
    floors = [
        Floor(gather_ms=1.0, compute_ms=1.0, replay_ms=0.5),
        Floor(gather_ms=9.0, compute_ms=1.0, replay_ms=3.0),
    ]
    found = over_floor(rounds([4], [30]), floors)  # 2 and 3 times the sum, 4 and 3.33 times the longer part
    assert (found.floor_ms, found.times_floor) == pytest.approx((6.0, 2.5))
    assert (found.floor_overlap_ms, found.times_floor_overlap) == pytest.approx((5.0, (4 + 30 / 9) / 2))
    assert (found.floor_strict_ms, found.times_floor_strict) == pytest.approx((2.0, (4 + 10) / 2))


def test_each_json_line_is_complete_in_itself(make_report):
    lines = [json.loads(line) for line in make_report().to_json_lines().splitlines()]
    assert [(line["engine"], line["batch"]) for line in lines] == [
        ("torch", 4),
        ("onnxruntime", 4),
        ("torch", 64),
        ("onnxruntime", 64),
        ("tensorrt", None),
        ("tensorrt-rtx", 64),
    ]
    for line in lines:
        assert (line["command"], line["cpu"], line["threads"]) == ("dlrm-deploy bench b", "Quick 9000, 8 cores", 2)
    assert lines[1]["samples_per_s"] == pytest.approx(2000)
    assert lines[1]["ratio"] == pytest.approx(2)
    assert lines[1]["calibration"]["gather"] == {"64": 5.0}
    assert lines[1]["kind"] == lines[4]["kind"] == "throughput"
    assert lines[1]["floor_ms"] == pytest.approx(4 * (640 / 5 + 20_000 / 200) * 1e-6)
    assert lines[1]["floor_overlap_ms"] == pytest.approx(4 * 640 / 5 * 1e-6)
    assert lines[1]["times_floor"] == pytest.approx(2 / lines[1]["floor_ms"])
    assert lines[1]["floor_strict_ms"] == pytest.approx(4 * 20_000 / 200 * 1e-6)
    assert lines[1]["calibration"]["gather_replayed"] == {"64": 8.0}
    assert (lines[1]["bytes_per_sample"], lines[1]["flops_per_sample"]) == (640, 20_000)
    assert lines[1]["breakdown"] == {"Gemm": 0.75, "DotInteraction": 0.25}
    assert (lines[1]["load_seconds"], lines[1]["resident_bytes"]) == (0.5, 1000)
    assert lines[4]["not_run"] == "no GPU"
    assert "samples_per_s" not in lines[4]
