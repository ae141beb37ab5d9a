from __future__ import annotations

import numpy as np
import pytest

from dlrm_deploy.batch import Batch
from dlrm_deploy.bench.calibration import Calibration
from dlrm_deploy.bench.work import Work, floor_of, flops_per_sample, work_of
from dlrm_deploy.data.random import random_batch
from dlrm_deploy.presets import preset


@pytest.mark.parametrize(
    ("name", "flops", "ids", "width"),
    [
        ("kaggle", 2 * (13 * 512 + 512 * 256 + 256 * 64 + 64 * 16 + 367 * 512 + 512 * 256 + 256 + 351 * 16), 26, 16),
        ("paper-32", 2 * (512 * 512 + 512 * 64 + 100 * 1024 + 2 * 1024 * 1024 + 1024 + 36 * 64), 8 * 32, 64),
        ("rm2-like", 2 * (256 * 128 + 128 * 64 + 592 * 512 + 512 * 128 + 128 + 528 * 64), 32 * 80, 64),
    ],
)
def test_the_models_of_the_goals_cost_what_their_layers_say(name, flops, ids, width):
    config = preset(name, 1e-5)
    assert flops_per_sample(config) == flops
    batch = random_batch(config, 3, np.random.default_rng(0))
    assert work_of(config, {}, "fp32", [batch]).gathered == {4 * width: 4 * width * ids}
    formats = {part.name: "int8" for group in config.groups for part in group.parts}
    assert work_of(config, formats, "bf16", [batch]).gathered == {width + 4: (width + 4) * ids}


def test_bytes_are_those_of_the_bags_measured():
    config = preset("paper", 1e-4)
    batches = [
        Batch.from_bags([[0.0] * 512] * 2, [[[1] * n, []] for _ in range(8)]) for n in (2, 6)
    ]  # two ids a bag on average
    assert work_of(config, {}, "fp32", batches).bytes == 8 * 2 * 256


def calibration(amx: float | None, int8: float | None = None) -> Calibration:
    return Calibration(
        fma_gflops=100.0,
        amx_bf16_gflops=amx,
        amx_int8_gops=int8,
        stream_gb_per_s=1.0,
        gather={64: 4.0, 20: 2.0},
        gather_replayed={64: 8.0, 20: 4.0},
    )


def test_the_floor_adds_each_row_size_at_its_rate_and_operations_at_the_rate_of_their_format():
    work = Work(gathered={64: 4000.0, 20: 1000.0}, flops=1e6, mlp="fp32")
    floor = floor_of(work, calibration(1000.0), 10)
    assert floor == pytest.approx((10 * (1000 + 500) * 1e-6, 10 * 1e4 * 1e-6, 10 * (500 + 250) * 1e-6))
    assert (floor.sum_ms, floor.overlap_ms, floor.strict_ms) == pytest.approx((0.115, 0.1, 0.1))
    in_bf16 = floor_of(Work(gathered=work.gathered, flops=1e6, mlp="bf16"), calibration(1000.0), 10)
    assert in_bf16.compute_ms == pytest.approx(floor.compute_ms / 10)
    assert (in_bf16.overlap_ms, in_bf16.strict_ms) == pytest.approx((0.015, 0.01))


def test_int8_runs_at_its_own_rate():
    in_int8 = floor_of(Work(gathered={}, flops=1e6, mlp="int8"), calibration(1000.0, 2000.0), 1)
    assert in_int8.compute_ms == pytest.approx(0.0005)


@pytest.mark.parametrize("mlp", ["bf16", "int8"])
def test_without_amx_everything_runs_at_the_rate_of_float32(mlp):
    assert floor_of(Work(gathered={}, flops=1e6, mlp=mlp), calibration(None), 1).compute_ms == pytest.approx(0.01)
