from __future__ import annotations

import pytest
from bundles import CONFIGS

from dlrm_deploy.bench import calibration
from dlrm_deploy.bench.calibration import Calibration, measure_calibration, median_calibration


def test_all_rates_are_measured_by_the_native_library(monkeypatch):
    monkeypatch.setattr(calibration, "MILLISECONDS", 1.0)
    monkeypatch.setattr(calibration, "BUFFER_BYTES", 1 << 16)
    measured = measure_calibration(CONFIGS["one_hot"], threads=1)
    assert measured.fma_gflops > 0
    assert measured.stream_gb_per_s > 0
    assert measured.gather_gb_per_s > 0


def test_rows_are_those_of_the_table_group_that_most_bytes_are_read_from(monkeypatch):
    asked = {}
    monkeypatch.setattr(calibration.library, "calibrate_fma", lambda threads, ms: 1.0)
    monkeypatch.setattr(calibration.library, "calibrate_read", lambda size, threads, ms: 2.0)

    def gather(row_bytes, table_bytes, threads, milliseconds):
        asked.update(row_bytes=row_bytes, table_bytes=table_bytes, threads=threads)
        return 3.0

    monkeypatch.setattr(calibration.library, "calibrate_gather", gather)
    config = CONFIGS["concat"]  # widths 8 (twice), 4 (twice) and 12, bags of up to 5 ids each
    measured = measure_calibration(config, threads=2)
    group = next(group for group in config.groups if group.width == 8)
    assert asked == {"row_bytes": 32, "table_bytes": group.bytes, "threads": 2}
    assert (measured.fma_gflops, measured.stream_gb_per_s, measured.gather_gb_per_s) == (1.0, 2.0, 3.0)
    assert (measured.row_bytes, measured.gather_bytes) == (32, group.bytes)


def test_median_of_each_rate():
    def at(fma: float, stream: float, gather: float) -> Calibration:
        return Calibration(
            fma_gflops=fma, stream_gb_per_s=stream, gather_gb_per_s=gather, row_bytes=64, gather_bytes=128
        )

    assert median_calibration([at(1, 9, 5), at(2, 7, 9), at(100, 8, 1)]) == at(2, 8, 5)
    with pytest.raises(ValueError, match="median"):
        median_calibration([])
