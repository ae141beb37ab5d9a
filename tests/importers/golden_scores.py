"""Scores of an imported checkpoint in every CPU engine, and what the golden files of `tests/golden` expect."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dlrm_deploy.batch import Batch
from dlrm_deploy.engines.registry import open_engine
from dlrm_deploy.export.bundle import export_bundle
from dlrm_deploy.export.sources import Source

GOLDEN = Path(__file__).parents[1] / "golden"
CPU_ENGINES = ("torch", "onnxruntime-stock", "onnxruntime")


def read_golden(path: Path) -> tuple[Batch, np.ndarray]:
    """Inputs of a golden file, and the probabilities [B] float64 that its project computed."""
    with np.load(path) as arrays:
        batch = Batch(arrays["dense"], arrays["indices"], arrays["offsets"])
        expected = arrays["expected"].astype(np.float64)
        return batch, sigmoid(expected) if str(arrays["expected_kind"]) == "logit" else expected


def sigmoid(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.asarray(logits, np.float64)))


def assert_scores(source: Source, folder: Path, batch: Batch, expected: np.ndarray) -> None:
    """Export to `folder` and compare the probabilities of every engine."""
    bundle = export_bundle(source, folder / "bundle")
    for name in CPU_ENGINES:
        with open_engine(bundle, name, threads=1) as engine:
            np.testing.assert_allclose(engine.predict(batch), expected, rtol=0, atol=1e-6, err_msg=name)


def ragged_batch(rows: list[int], dense_width: int, samples: int = 17, seed: int = 0) -> Batch:
    """Empty bags, single ids, long bags; the first and the last id of each table are among them."""
    rng = np.random.default_rng(seed)
    bags = []
    for count in rows:
        lengths = rng.choice([0, 1, 1, 2, 7, 40], samples)
        own = [rng.integers(0, count, length) for length in lengths]
        own[3] = np.array([0, count - 1, count - 1])
        bags += own
    offsets = np.cumsum([0, *map(len, bags)])
    return Batch(rng.normal(size=(samples, dense_width)).astype(np.float32), np.concatenate(bags), offsets)
