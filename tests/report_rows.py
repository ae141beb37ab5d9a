"""Made-up rows of a whole benchmark, shaped like measured ones: three models, a dozen engines, and traffic."""

from __future__ import annotations

import json
from pathlib import Path

CIRCUMSTANCES = {
    "time": "2026-01-02T03:04:05+00:00",
    "dlrm_deploy_version": "0.1.0",
    "commit": "abc1234",
    "cpu": "Quick 9000, 2 cores",
    "threads": 2,
    "seed": 0,
    "distribution": "uniform",
    "rounds": 7,
    "slice_ms": 60.0,
    "reference": "torch",
    "omp_wait_policy": None,
    "calibration_missing": None,
}

CALIBRATION = {
    "fma_gflops": 210.0,
    "amx_bf16_gflops": 1750.0,
    "amx_int8_gops": 2900.0,
    "stream_gb_per_s": 18.0,
    "gather": {"20": 2.1, "64": 5.4, "68": 5.6, "256": 8.2},
}

# flops, bytes gathered (fp32, int8), table bytes, batch sizes, and microseconds a sample of torch at large batches
MODELS = {
    "kaggle": (960_000, 1664, 520, 2_160_000_000, (1, 32, 128, 512, 2048, 8192), 11.0),
    "paper-32": (5_520_000, 65_536, 17_408, 2_048_000_000, (1, 32, 128, 512, 2048, 8192), 44.0),
    "rm2-like": (1_019_000, 655_360, 174_080, 4_096_000_000, (1, 32, 128, 512, 2048), 125.0),
}

# cost a call in ms, and cost a sample as a share of torch's, for each of the models
ENGINES = {
    "torch": (0.40, (1.0, 1.0, 1.0)),
    "torch-bf16": (0.90, (0.5, 0.42, 0.97)),
    "torch-compile": (0.25, (0.92, 0.97, 0.99)),
    "torch-compile-bf16": (0.45, (0.44, 0.40, 0.96)),
    "onnxruntime-stock": (0.08, (0.9, 1.02, 1.3)),
    "fbgemm-int8": (0.35, (0.85, 0.90, 0.82)),
    "fbgemm-int8-bf16": (0.80, (0.42, 0.36, 0.78)),
    "openvino-fp32": (0.50, (0.95, 0.96, 1.6)),
    "openvino-bf16": (0.48, (0.62, 0.50, 1.55)),
    "onnxruntime": (0.04, (0.55, 0.95, 0.78)),
    "onnxruntime[fp32,bf16]": (0.03, (0.14, 0.31, 0.76)),
    "onnxruntime[int8,bf16]": (0.03, (0.15, 0.27, 0.40)),
}

BREAKDOWNS = {
    "onnxruntime": {"Gemm": 0.71, "EmbeddingBagDotInteraction": 0.26, "Sigmoid": 0.01, "Reshape": 0.02},
    "onnxruntime[fp32,bf16]": {"Mlp": 0.55, "EmbeddingBagDotInteraction": 0.42, "Sigmoid": 0.02, "Reshape": 0.01},
    "onnxruntime[int8,bf16]": {"Mlp": 0.61, "EmbeddingBagDotInteraction": 0.36, "Sigmoid": 0.02, "Reshape": 0.01},
    "onnxruntime-stock": {
        "Gemm": 0.35, "Gather": 0.22, "ScatterElements": 0.14, "MatMul": 0.1, "Concat": 0.06, "Where": 0.04,
        "Mul": 0.03, "Range": 0.03, "Cast": 0.02, "Sigmoid": 0.01,
    },
}  # fmt: skip


def throughput_rows(model: str) -> list[dict[str, object]]:
    """One row for each engine and batch size of a model."""
    flops, fp32_bytes, int8_bytes, table_bytes, batches, torch_us = MODELS[model]
    position = list(MODELS).index(model)
    command = f"dlrm-deploy bench --preset {model} --engine all --batch {','.join(map(str, batches))} --breakdown"
    rows = []
    for batch in batches:
        times = {e: call + share[position] * torch_us * batch / 1000 for e, (call, share) in ENGINES.items()}
        for engine, ms in times.items():
            moved = int8_bytes if "int8" in engine else fp32_bytes
            matrix = 1750.0 if "bf16" in engine else 210.0
            floor_ms = batch * (moved / 5.4e6 + flops / matrix / 1e6)
            ratio = times["torch"] / ms
            row = {
                "model": model, "engine": engine, "engine_version": f"{engine.split('[')[0]} 1.0", "batch": batch,
                "median_ms": ms, "p50_ms": ms, "p99_ms": ms * 1.3, "samples_per_s": batch / ms * 1000, "calls": 100,
                "ratio": ratio, "ratio_min": ratio * 0.95, "ratio_max": ratio * 1.06, "baseline": "torch",
                "max_abs_difference": 3e-8 if "bf16" not in engine else 4e-4, "other_load": 0.02,
                "floor_ms": floor_ms, "times_floor": ms / floor_ms, "bytes_per_sample": moved,
                "flops_per_sample": flops, "calibration": CALIBRATION, "breakdown": BREAKDOWNS.get(engine),
                "load_seconds": 0.4, "resident_bytes": 180_000_000, "table_bytes": table_bytes, "command": command,
            }  # fmt: skip
            rows.append({**row, **CIRCUMSTANCES})
    rows.append({"engine": "tensorrt", "batch": None, "not_run": "no NVIDIA GPU", "command": command, **CIRCUMSTANCES})
    return rows


def scenario_rows() -> list[dict[str, object]]:
    """Offline, single stream, and Server with its curve, of two engines."""
    rows = []
    for engine, full in (("onnxruntime[int8,bf16]", 900.0), ("onnxruntime-stock", 230.0)):
        shared = {
            "kind": "scenario", "model": "kaggle", "engine": engine, "calibration": CALIBRATION,
            "command": f"dlrm-deploy loadtest demo/bundle --engine {engine} --p99-ms 60", **CIRCUMSTANCES,
        }  # fmt: skip
        curve = [
            {"target_qps": round(full * share), "p99_ms": 4.0 / (1.02 - share), "valid": 4.0 / (1.02 - share) <= 60}
            for share in (0.1, 0.3, 0.5, 0.7, 0.85, 0.94, 0.97, 1.0)
        ]
        rows += [
            {**shared, "scenario": "Offline", "samples_per_s": full, "pairs_per_s": full * 400, "verdict": "VALID"},
            {**shared, "scenario": "Server", "p99_bound_ms": 60.0, "valid_qps": full * 0.94, "p50_ms": 3.0,
             "p90_ms": 12.0, "p99_ms": 50.0, "verdict": "VALID", "load_curve": curve},
            {**shared, "scenario": "SingleStream", "p50_ms": 1.1, "p90_ms": 1.4, "p99_ms": 1.9, "verdict": "VALID"},
        ]  # fmt: skip
    return rows


def write_rows(rows: list[dict[str, object]], path: Path) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
