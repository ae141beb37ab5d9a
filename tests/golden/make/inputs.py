"""Inputs that reach the corners of a model, and how they are stored with what a source project computed from them.

Used by the three scripts beside this file. Suffixes: B samples, F features, N indices, D dense values.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

SAMPLES = 24
LONG_BAG = 50


def multi_hot(rows: Sequence[int], dense_width: int, seed: int) -> dict[str, np.ndarray]:
    """Bags of every kind: empty, one id, repeated ids, the first and the last id, several, and one of 50 per feature.

    Sample 0 has no id at all, sample 1 the first id of each table, sample 2 the last; from sample 9 + F on there are
    one to six ids per bag. Feature-major: bag f * B + b.
    """
    rng = np.random.default_rng(seed)
    bags: list[np.ndarray] = []
    for f, n in enumerate(rows):
        for b in range(SAMPLES):
            any_id = rng.integers(0, n)
            one = np.array([any_id])
            fixed = {
                0: one[:0],
                1: np.array([0]),
                2: np.array([n - 1]),
                3: np.array([n - 1, 0]),
                4: np.repeat(one, 3),
                5: np.array([0, any_id, n - 1, any_id]),
                6: one[:0] if f % 2 else one,
                7: one if f % 2 else one[:0],
                8 + f: rng.integers(0, n, LONG_BAG),
            }
            bags.append(
                fixed[b] if b in fixed else one if b <= 8 + len(rows) else rng.integers(0, n, rng.integers(1, 7))
            )
    return _batch(bags, dense_width, rng)


def one_hot(rows: Sequence[int], dense_width: int, seed: int) -> dict[str, np.ndarray]:
    """One id per bag: the first ids in sample 0, the last in sample 1, any elsewhere."""
    rng = np.random.default_rng(seed)
    ids_FB = [np.concatenate([[0, n - 1], rng.integers(0, n, SAMPLES - 2)]) for n in rows]
    return _batch([np.array([i]) for ids_B in ids_FB for i in ids_B], dense_width, rng)


def _batch(bags: list[np.ndarray], dense_width: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {
        "dense": rng.random((SAMPLES, dense_width), np.float32),
        "indices": np.concatenate(bags).astype(np.int64),
        "offsets": np.concatenate([[0], np.cumsum([len(bag) for bag in bags])]).astype(np.int64),
    }


def feature_bags(batch: dict[str, np.ndarray], f: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices [n] and offsets [B + 1] from 0 of feature f, both int64."""
    offsets = batch["offsets"][f * SAMPLES : (f + 1) * SAMPLES + 1]
    return batch["indices"][offsets[0] : offsets[-1]], offsets - offsets[0]


def save(
    path: Path,
    batch: dict[str, np.ndarray],
    expected: np.ndarray,
    kind: str,
    rows: Sequence[int],
    arguments: Sequence[str] = (),
) -> None:
    """Write `path` (.npz): the batch, `expected` [B] float32, its kind, `rows` [F] int64 and the maker's arguments."""
    assert expected.dtype == np.float32
    assert expected.shape == (SAMPLES,)
    assert np.isfinite(expected).all()
    assert kind in ("probability", "logit")
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        path,
        dense=batch["dense"],
        indices=batch["indices"],
        offsets=batch["offsets"],
        expected=expected,
        expected_kind=np.array(kind),
        rows=np.array(rows, np.int64),
        arguments=np.array(list(arguments), dtype=np.str_),
    )
    probability = expected if kind == "probability" else 1 / (1 + np.exp(-expected))
    middle = int(((probability > 0.01) & (probability < 0.99)).sum())
    print(
        f"{path.name}: from {expected.min():.4f} to {expected.max():.4f}, {middle} of {SAMPLES} between 0.01 and 0.99"
    )
