"""Small models and batches for the tests of TensorRT plans, and what they should score, in plain NumPy."""

from __future__ import annotations

import numpy as np

from dlrm_deploy.batch import Batch
from dlrm_deploy.config import FeatureConfig, ModelConfig
from dlrm_deploy.formats import decode, encode
from dlrm_deploy.model.keys import bottom_keys, cross_keys, dense_shapes, top_keys
from dlrm_deploy.ops.contract import BagAttributes
from dlrm_deploy.ops.reference import table_batched_embedding_bag
from dlrm_deploy.tables import TableConfig

MAX_BAG = 5

ARCHITECTURES: dict[str, dict] = {
    "dot": {},
    "dot_self_interaction": {"self_interaction": True},
    "dot_weighted": {"weighted": True},
    "dot_mean": {"pooling": "mean"},
    "dot_fixed": {"factors": (1, 1, 1, 1)},
    "dot_fixed_mixed_mean": {"factors": (3, 1, 2, 3), "pooling": "mean"},
    "dot_fixed_weighted": {"factors": (3, 1, 2, 3), "weighted": True},
    "concat_two_widths": {"interaction": "concat", "widths": (8, 4, 8)},
    "concat_two_widths_fixed": {"interaction": "concat", "widths": (8, 4, 8), "factors": (2, 1, 2, 1)},
    "dcn": {"interaction": "dcn", "widths": (8, 4, 8)},
    "dcn_fixed": {"interaction": "dcn", "factors": (2, 2, 2, 2)},
}


def small_model(
    *,
    interaction: str = "dot",
    widths: tuple[int, ...] = (8, 8, 8),
    factors: tuple[int, ...] | None = None,
    pooling: str = "sum",
    policy: str = "error",
    rows: tuple[int, ...] = (50, 3, 20),
    **options,
) -> ModelConfig:
    """Four features over three tables; the last two features share a table."""
    cross = {"cross_layers": 2, "cross_rank": 4} if interaction == "dcn" else {}
    return ModelConfig(
        name="small",
        dense_features=("a", "b", "c"),
        tables=tuple(
            TableConfig(name=f"t{i}", rows=r, width=w) for i, (r, w) in enumerate(zip(rows, widths, strict=True))
        ),
        features=tuple(
            FeatureConfig(
                name=f"f{i}",
                table=f"t{min(i, 2)}",
                pooling=pooling if i % 2 else "sum",
                pooling_factor=factors[i] if factors else None,
                max_ids=None if factors else MAX_BAG,
            )
            for i in range(4)
        ),
        bottom_mlp=(16, 8),
        top_mlp=(16, 8, 1),
        interaction=interaction,
        index_policy=policy,
        **cross,
        **options,
    )


def weights_of(config: ModelConfig, seed: int = 0) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
    """Dense parameters by key, and the matrix of each table group."""
    rng = np.random.default_rng(seed)
    dense = {
        key: rng.standard_normal(shape, np.float32) * np.float32(0.3) for key, shape in dense_shapes(config).items()
    }
    return dense, [rng.standard_normal((group.rows, group.width), np.float32) for group in config.groups]


def part_formats(config: ModelConfig, kind: str) -> dict[str, str]:
    """Row format of each table part: one for all, or with "mixed" all formats in turn."""
    parts = [part.name for group in config.groups for part in group.parts]
    return {name: ("int8", "fp32", "int4", "bf16", "fp16")[i % 5] if kind == "mixed" else kind
            for i, name in enumerate(parts)}  # fmt: skip


def stored_tables(
    config: ModelConfig, tables: list[np.ndarray], formats: dict[str, str]
) -> tuple[list[dict[str, np.ndarray]], list[np.ndarray]]:
    """Of the fp32 matrix of each table group: the stored matrices by format, and the fp32 matrix of what they hold."""
    stored, values = [], []
    for group, table in zip(config.groups, tables, strict=True):
        encoded: dict[str, list[np.ndarray]] = {}
        decoded = np.empty_like(table)
        for part in group.parts:
            rows = group.rows_of(part.name)
            matrix = encode(formats[part.name], table[rows])
            encoded.setdefault(formats[part.name], []).append(matrix)
            decoded[rows] = decode(formats[part.name], matrix, part.width)
        stored.append({kind: np.concatenate(matrices) for kind, matrices in encoded.items()})
        values.append(decoded)
    return stored, values


def batch_of(config: ModelConfig, lengths: list[list[int]], seed: int = 0) -> Batch:
    """A batch whose bags have `lengths[f][b]` ids."""
    rng = np.random.default_rng(seed)
    ids = [rng.integers(0, n, sum(bags)) for n, bags in zip(config.feature_rows, lengths, strict=True)]
    indices = np.concatenate(ids).astype(np.int64)
    return Batch(
        dense=rng.standard_normal((len(lengths[0]), len(config.dense_features)), np.float32),
        indices=indices,
        offsets=np.concatenate([[0], np.cumsum([n for bags in lengths for n in bags], dtype=np.int64)]).astype(
            np.int64
        ),
        weights=rng.standard_normal(len(indices)).astype(np.float32) if config.weighted else None,
    )


def awkward_batches(config: ModelConfig) -> dict[str, Batch]:
    """Batches that are easy to get wrong; for a model of fixed bags, batches of several sizes."""
    if config.pooling_factors:
        return {f"batch_{b}": batch_of(config, [[factor] * b for factor in config.pooling_factors]) for b in (1, 2, 37)}
    rng = np.random.default_rng(1)
    lengths = {
        "all_empty": [[0, 0]] * 4,
        "single_sample": [[1]] * 4,
        "single_id": [[0, 0], [0, 0], [0, 0], [0, 1]],
        "longest": [[MAX_BAG] * 3] * 4,
        "uneven": rng.integers(0, MAX_BAG + 1, (4, 37)).tolist(),
    }
    batches = {name: batch_of(config, bags) for name, bags in lengths.items()}
    repeated = batch_of(config, [[2, 3]] * 4)
    repeated.indices[:] = 1
    return {**batches, "repeated_id": repeated}


def expected_scores(
    config: ModelConfig, dense: dict[str, np.ndarray], tables: list[np.ndarray], batch: Batch, unit: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities [B], and the standard deviation of a plan's from them, [B].

    `unit` is the unit roundoff of MLPs and interaction: 0 for fp32, 2**-11 for fp16, 2**-8 for bf16. Each quantity x
    comes with the variance of its error: casting and every operation round once, weights too, and a rounding is off by
    up to unit * |x|, all values alike, so its variance is (unit * x)**2 / 3. Errors are taken as independent: what adds
    up are variances. The worst case would add up sizes, and be beyond 1 after four layers of bf16.
    """
    noise = unit**2 / 3

    def rounded(x, v):
        return x, v + noise * (x**2 + v)

    def product(xv, w, b=None):
        (x, v), w64 = xv, w.astype(np.float64)
        bias = np.zeros(len(w)) if b is None else b.astype(np.float64)
        return rounded(x @ w64.T + bias, (v + noise * x**2) @ w64.T**2 + noise * bias**2)

    def relu(xv):
        return np.maximum(xv[0], 0), xv[1]

    fixed = config.pooling_factors
    pooled: list = [None] * len(config.features)
    for group, table in zip(config.groups, tables, strict=True):
        a = BagAttributes.of(config, group)
        bags = table_batched_embedding_bag(
            table, batch.indices, None if fixed else batch.offsets, num_features=a.num_features, features=a.features,
            row_starts=a.row_starts, rows=a.rows, mean=a.mean, index_policy=a.index_policy,
            per_sample_weights=batch.weights, pooling_factors=fixed,
        )  # fmt: skip
        for t, slot in enumerate(group.slots):
            pooled[slot.feature] = rounded(bags[:, t].astype(np.float64), 0.0)
    x = rounded(batch.dense.astype(np.float64), 0.0)
    for w, b in bottom_keys(config):
        x = relu(product(x, dense[w], dense[b]))
    pieces = [x, *pooled]
    if config.interaction == "dot":
        vectors, pieces = pieces, [x]
        for i, (xi, vi) in enumerate(vectors):
            for xj, vj in vectors[: i + 1 if config.self_interaction else i]:
                variance = xi**2 * vj + xj**2 * vi + vi * vj
                pieces.append(rounded((xi * xj).sum(axis=1, keepdims=True), variance.sum(axis=1, keepdims=True)))
    x = x0 = tuple(np.concatenate(parts, axis=1) for parts in zip(*pieces, strict=True))
    for w, v, b in cross_keys(config):
        y = product(product(x, dense[v]), dense[w], dense[b])
        scaled = rounded(x0[0] * y[0], x0[0] ** 2 * y[1] + y[0] ** 2 * x0[1] + x0[1] * y[1])
        x = rounded(scaled[0] + x[0], scaled[1] + x[1])
    *hidden, (w, b) = top_keys(config)
    for key, bias in hidden:
        x = relu(product(x, dense[key], dense[bias]))
    logit = (x[0] @ dense[w].T.astype(np.float64) + dense[b])[:, 0]
    deviation = np.sqrt(x[1] @ dense[w].T.astype(np.float64) ** 2)[:, 0]
    return 1 / (1 + np.exp(-logit)), deviation / 4  # the sigmoid's slope is at most 1/4
