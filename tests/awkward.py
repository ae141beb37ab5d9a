"""Inputs that break embedding-bag code: shared by the tests of every form of the operators."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from dlrm_deploy.ops.reference import table_batched_embedding_bag


@dataclass(frozen=True)
class BagCase:
    """One call of TableBatchedEmbeddingBag: arrays, and attributes under their names in docs/operators.md."""

    name: str
    weights: np.ndarray
    indices: np.ndarray
    offsets: np.ndarray | None
    attributes: dict[str, Any]
    per_sample_weights: np.ndarray | None = None

    def expected(self) -> np.ndarray:
        return table_batched_embedding_bag(
            self.weights, self.indices, self.offsets, per_sample_weights=self.per_sample_weights, **self.attributes
        )


def csr_case(
    name: str,
    lengths: list[list[int]],
    *,
    rows: tuple[int, ...] = (5, 3, 7),
    features: tuple[int, ...] | None = None,
    mean: tuple[int, ...] | None = None,
    width: int = 4,
    weighted: bool = False,
    policy: str = "error",
    dtype: type = np.int64,
    seed: int = 0,
) -> BagCase:
    """Bags of the given lengths[f][b] with random ids. `rows` has one entry a slot; slot t pools features[t]."""
    rng = np.random.default_rng(seed)
    num_features = len(lengths)
    features = features or tuple(range(num_features))
    limits = np.ones(num_features, int)
    limits[list(features)] = rows
    counts = [sum(bags) for bags in lengths]
    indices = np.concatenate([rng.integers(0, n, c) for n, c in zip(limits, counts, strict=True)]).astype(dtype)
    flat = np.array([length for bags in lengths for length in bags], np.int64)
    offsets = np.concatenate([[0], np.cumsum(flat)]).astype(dtype)
    return BagCase(
        name=name,
        weights=rng.standard_normal((sum(rows), width)).astype(np.float32),
        indices=indices,
        offsets=offsets,
        attributes={
            "num_features": num_features,
            "features": features,
            "row_starts": tuple(int(start) for start in np.cumsum((0, *rows[:-1]))),
            "rows": rows,
            "mean": mean or (0,) * len(features),
            "index_policy": policy,
        },
        per_sample_weights=rng.standard_normal(len(indices)).astype(np.float32) if weighted else None,
    )


def fixed_case(name: str, factors: list[int], batch: int, **options: Any) -> BagCase:
    """The fixed form: every bag of feature f holds factors[f] ids."""
    case = csr_case(name, [[factor] * batch for factor in factors], **options)
    attributes = {**case.attributes, "pooling_factors": tuple(factors)}
    return BagCase(name, case.weights, case.indices, None, attributes, case.per_sample_weights)


def awkward_bags() -> list[BagCase]:
    """Valid calls that are easy to get wrong."""
    ragged = [[2, 0, 3], [1, 1, 0], [0, 4, 2]]
    non_finite = csr_case("nan_and_infinity_stay_in_their_bag", ragged)
    non_finite.weights[0, 0], non_finite.weights[6, 1], non_finite.weights[9, 2] = np.nan, np.inf, -np.inf
    repeated = csr_case("repeated_ids", [[4, 4], [3, 3], [2, 2]])
    repeated.indices[:] = 1
    return [
        csr_case("zero_samples", [[], [], []]),
        csr_case("all_empty", [[0, 0], [0, 0], [0, 0]]),
        csr_case("single_id", [[1], [1], [1]]),
        csr_case("only_the_last_bag_holds_ids", [[0, 0], [0, 0], [0, 5]]),
        csr_case("uneven", ragged),
        csr_case("uneven_int32", ragged, dtype=np.int32),
        repeated,
        csr_case("long_bag", [[0, 10_000], [1, 0], [3, 2]]),
        csr_case("mean", ragged, mean=(1, 0, 1)),
        csr_case("weighted", ragged, weighted=True),
        csr_case("some_features_in_another_order", ragged, rows=(7, 5), features=(2, 0), mean=(0, 1)),
        csr_case("some_features_weighted", ragged, rows=(5,), features=(1,), weighted=True),
        csr_case("width_1", ragged, width=1),
        csr_case("width_17", ragged, width=17),
        non_finite,
        fixed_case("fixed_zero_samples", [1, 1, 1], 0),
        fixed_case("fixed_one_id", [1, 1, 1], 3),
        fixed_case("fixed_one_id_int32", [1, 1, 1], 3, dtype=np.int32),
        fixed_case("fixed_several_ids", [3, 3, 3], 2, mean=(0, 1, 0)),
        fixed_case("fixed_mixed", [2, 1, 3], 4, mean=(1, 1, 0)),
        fixed_case("fixed_mixed_weighted", [2, 1, 2], 4, weighted=True),
        fixed_case("fixed_one_id_weighted", [1, 1, 1], 4, weighted=True),
        fixed_case("fixed_some_features", [2, 1, 2], 3, rows=(7, 3), features=(2, 1)),
    ]


def out_of_range_bags(policy: str) -> list[BagCase]:
    """The same policy on CSR, weighted CSR and fixed bags, with ids far outside on both sides."""
    cases = [
        csr_case("csr", [[2, 0, 3], [1, 1, 0], [0, 4, 2]], policy=policy, mean=(0, 1, 0)),
        csr_case("csr_weighted", [[2, 0, 3], [1, 1, 0], [0, 4, 2]], policy=policy, weighted=True),
        fixed_case("fixed", [2, 1, 3], 3, policy=policy, mean=(0, 1, 1)),
        fixed_case("fixed_one_id", [1, 1, 1], 4, policy=policy),
    ]
    for case in cases:
        case.indices[0], case.indices[-1], case.indices[-2] = -1, 2**31 - 1, 7
        case.indices[3] = -(2**31)
    beyond = csr_case("ids_beyond_32_bits", [[9], [9]], rows=(5, 3), policy=policy)
    far = [2**31 - 1, 2**31, 2**31 + 1, 3 * 2**30, 2**32 - 1, 2**32, 2**63 - 1, -(2**31) - 1, -(2**63)]
    beyond.indices[:] = [*far, *far]
    return [*cases, beyond]
