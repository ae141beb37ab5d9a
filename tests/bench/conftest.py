"""Bundles that are made once and read by all tests of the benchmark, and a report without a measurement."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from bundles import make_bundle

from dlrm_deploy.bench.calibration import Calibration
from dlrm_deploy.bench.rows import BenchReport, BenchRow, Circumstances, NotRun, summarise
from dlrm_deploy.bundle import Bundle


@pytest.fixture(scope="session")
def _folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="session")
def dot_bundle(_folder: Path) -> Bundle:
    return make_bundle("dot", _folder / "dot")


@pytest.fixture(scope="session", params=["one_hot", "concat", "weighted", "fixed"])
def measured_bundle(request: pytest.FixtureRequest, _folder: Path) -> Bundle:
    """The fixed form, ragged bags of several widths, per-sample weights, and fixed bags of several lengths."""
    return make_bundle(request.param, _folder / f"measured-{request.param}")


@pytest.fixture
def make_report() -> Callable[..., BenchReport]:
    """Makes a report of two engines at batch 4 and 64; keywords change its circumstances and rows."""
    return _report


def _report(
    *, max_abs_difference: float = 0.0, other_load: float | None = 0.0, calibrated: bool = True, **circumstances: object
) -> BenchReport:
    shared = {
        "command": "dlrm-deploy bench b",
        "time": "2026-01-01T00:00:00+00:00",
        "dlrm_deploy_version": "1.2",
        "commit": "abc1234",
        "cpu": "Quick 9000, 8 cores",
        "threads": 2,
        "seed": 0,
        "distribution": "uniform",
        "rounds": 1,
        "slice_ms": 1.0,
        "table_bytes": 2_160_000_000,
        "reference": "torch",
        "omp_wait_policy": None,
        "calibration_missing": None if calibrated else "no library",
    }
    calibration = Calibration(
        fma_gflops=200.0, stream_gb_per_s=10.0, gather_gb_per_s=5.0, row_bytes=64, gather_bytes=1024
    )
    rows = []
    for batch in (4, 64):
        baseline = [np.array([batch * 1_000_000])]
        for engine, calls in (("torch", baseline), ("onnxruntime", [baseline[0] // 2])):
            rows.append(
                BenchRow(
                    model="kaggle",
                    engine=engine,
                    engine_version=f"{engine} 2",
                    implementations={"DotInteraction": "PyTorch eager"},
                    batch=batch,
                    timing=summarise(calls, baseline, batch),
                    baseline="torch",
                    max_abs_difference=max_abs_difference,
                    distinct_batches=3,
                    other_load=other_load,
                    calibration=calibration if calibrated else None,
                )
            )
    return BenchReport(
        circumstances=Circumstances(**{**shared, **circumstances}),
        rows=tuple(rows),
        not_run=(
            NotRun(engine="tensorrt", batch=None, reason="no GPU"),
            NotRun(engine="tensorrt-rtx", batch=64, reason="too long"),
        ),
    )
