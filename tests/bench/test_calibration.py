from __future__ import annotations

import numpy as np
import pytest

from dlrm_deploy.bench import calibration
from dlrm_deploy.bench.calibration import Calibration, measure_calibration, median_calibration
from dlrm_deploy.bench.gather import GatherRows
from dlrm_deploy.errors import EngineError


def rows_of(row_bytes: int, count: int) -> GatherRows:
    return GatherRows(np.ones(row_bytes * 10, np.uint8), row_bytes, np.arange(count, dtype=np.uint32) % 10)


def test_all_rates_are_measured_by_the_native_library(monkeypatch):
    monkeypatch.setattr(calibration, "MILLISECONDS", 1.0)
    monkeypatch.setattr(calibration, "BUFFER_BYTES", 1 << 16)
    measured = measure_calibration(1, [rows_of(64, 30), rows_of(20, 30)])
    assert measured.fma_gflops > 0
    assert measured.stream_gb_per_s > 0
    assert list(measured.gather) == [20, 64]
    assert list(measured.gather_replayed) == [20, 64]
    assert min(*measured.gather.values(), *measured.gather_replayed.values()) > 0
    assert measured.amx_bf16_gflops is None or measured.amx_bf16_gflops > measured.fma_gflops / 10


def test_a_cpu_without_amx_has_no_such_rate(monkeypatch):
    def refuse(kind: str, threads: int, milliseconds: float) -> float:
        raise EngineError("no AMX")

    monkeypatch.setattr(calibration, "MILLISECONDS", 0.1)
    monkeypatch.setattr(calibration, "BUFFER_BYTES", 1 << 16)
    monkeypatch.setattr(calibration.library, "calibrate_amx", refuse)
    measured = measure_calibration(1, [])
    assert (measured.amx_bf16_gflops, measured.amx_int8_gops) == (None, None)
    assert (measured.gather, measured.gather_replayed) == ({}, {})


def test_of_rows_of_one_size_the_longest_list_is_gathered(monkeypatch):
    asked = []
    monkeypatch.setattr(calibration, "MILLISECONDS", 0.1)
    monkeypatch.setattr(calibration, "BUFFER_BYTES", 1 << 16)
    monkeypatch.setattr(
        calibration, "calibrate_gather_rows", lambda part, threads, ms: asked.append((part.rows.size, threads)) or 3.0
    )
    measured = measure_calibration(2, [rows_of(64, 30), rows_of(64, 5)], [rows_of(64, 7), rows_of(64, 8)])
    assert measured.gather == measured.gather_replayed == {64: 3.0}
    assert asked == [(8, 2), (30, 2)]


def test_median_of_each_rate():
    def at(fma: float, amx: float | None, stream: float, gather: float) -> Calibration:
        return Calibration(
            fma_gflops=fma,
            amx_bf16_gflops=amx,
            amx_int8_gops=amx,
            stream_gb_per_s=stream,
            gather={64: gather},
            gather_replayed={64: gather + 1},
        )

    assert median_calibration([at(1, 5, 9, 5), at(2, 7, 7, 9), at(100, 6, 8, 1)]) == at(2, 6, 8, 5)
    assert median_calibration([at(1, None, 9, 5)]) == at(1, None, 9, 5)
    with pytest.raises(ValueError, match="median"):
        median_calibration([])
