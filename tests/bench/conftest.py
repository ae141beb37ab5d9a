"""Bundles that are made once and read by all tests of the benchmark, and a report without a measurement."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from bundles import make_bundle

from dlrm_deploy.bench.calibration import Calibration
from dlrm_deploy.bench.rows import (
    Agreement,
    BenchReport,
    BenchRow,
    Circumstances,
    Footprint,
    NotRun,
    over_floor,
    summarise,
)
from dlrm_deploy.bench.work import Work, floor_of
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
    *,
    ours: str = "onnxruntime",
    max_abs_difference: float = 0.0,
    spread_error: float | None = None,
    other_load: float | None = 0.0,
    calibrated: bool = True,
    **circumstances: object,
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
        "isolate": False,
        "prefault": False,
        "huge_pages": False,
        "table_bytes": 2_160_000_000,
        "reference": "torch",
        "omp_wait_policy": None,
        "calibration_missing": None if calibrated else "no library",
    }
    calibration = Calibration(
        fma_gflops=200.0,
        amx_bf16_gflops=None,
        amx_int8_gops=None,
        stream_gb_per_s=10.0,
        gather={64: 5.0},
        gather_replayed={64: 8.0},
    )
    work = Work(gathered={64: 640.0}, flops=20_000.0, mlp="fp32")
    rows = []
    for batch in (4, 64):
        baseline = [np.array([batch * 1_000_000])]
        for engine, calls in (("torch", baseline), (ours, [baseline[0] // 2])):
            rows.append(
                BenchRow(
                    model="kaggle",
                    engine=engine,
                    tables="fp32",
                    mlp="fp32",
                    engine_version=f"{engine} 2",
                    implementations={"DotInteraction": "PyTorch eager"},
                    batch=batch,
                    timing=summarise(calls, baseline, batch),
                    baseline="torch",
                    agreement=Agreement(
                        max_abs_difference=max_abs_difference, correlation=0.999, spread_error=spread_error
                    ),
                    distinct_batches=3,
                    other_load=other_load,
                    calibration=calibration if calibrated else None,
                    work=work,
                    floor=over_floor(calls, [floor_of(work, calibration, batch)]) if calibrated else None,
                    footprint=Footprint(load_seconds=0.5, resident_bytes=1000, stored_table_bytes=2_160_000_000),
                    breakdown={"Gemm": 0.75, "DotInteraction": 0.25} if engine == ours else None,
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
