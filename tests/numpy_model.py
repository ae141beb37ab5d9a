"""A DLRM in NumPy, float64, one sample, one feature and one id at a time: what every model is tested against.

It follows docs/models.md and shares no code with `dlrm_deploy.model` but the names of tensors.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from dlrm_deploy.batch import Batch
from dlrm_deploy.config import FeatureConfig, ModelConfig
from dlrm_deploy.model.keys import projection_key, table_key
from dlrm_deploy.tables import TableConfig

Tensors = Mapping[str, np.ndarray]


def rows_of_id(table: TableConfig, i: int) -> list[int]:
    """The row of each part that a valid id reads."""
    sizes = table.part_rows
    if table.partition == "full":
        return [i]
    if table.partition in ("hash", "chinese-remainder"):
        return [i % size for size in sizes]
    if table.division == "exact":
        return [int(digit) for digit in np.unravel_index(i, sizes)]
    quotients, c = sizes
    x, y = np.float32(i), np.float32(c)
    quotient = x / y if table.division == "float32" else x * (np.float32(1) / y)
    return [min(int(quotient), quotients - 1), i % c]


def vector_of_bag(
    feature: FeatureConfig, table: TableConfig, tensors: Tensors, ids: list[int], weights: list[float]
) -> np.ndarray:
    """[W], before the interaction."""
    if feature.modulo:
        ids = [i % feature.modulo for i in ids]
    divisor = max(1, len(ids)) if feature.pooling == "mean" else 1
    parts = [tensors[table_key(part.name)] for part in table.parts]
    rows = [rows_of_id(table, i) for i in ids]
    if table.combine == "path":
        x = np.zeros(table.width)
        for read, weight in zip(rows, weights, strict=True):
            x += weight * along_path(table, parts, read)
        x /= divisor
    else:
        pooled = [
            sum((w * part[read[j]] for read, w in zip(rows, weights, strict=True)), np.zeros(part.shape[1])) / divisor
            for j, part in enumerate(parts)
        ]
        if table.combine == "concat":
            x = np.concatenate(pooled)
        else:
            x = np.prod(pooled, axis=0) if table.combine == "multiply" else np.sum(pooled, axis=0)
    return x if table.projection is None else tensors[projection_key(table.name)] @ x


def along_path(table: TableConfig, parts: list[np.ndarray], rows: list[int]) -> np.ndarray:
    """[W]: the first part's vector through the MLP of each further part."""
    h, W = table.path_hidden, table.width
    x = parts[0][rows[0]]
    for part, row in zip(parts[1:], rows[1:], strict=True):
        mlp = part[row]
        w1, b1 = mlp[: h * W].reshape(h, W), mlp[h * W : h * W + h]
        w2, b2 = mlp[h * W + h : -W].reshape(W, h), mlp[-W:]
        x = w2 @ np.maximum(w1 @ x + b1, 0) + b2
    return x


def logit(config: ModelConfig, tensors: Tensors, dense: np.ndarray, bags: list[list[int]], weights: list) -> float:
    """The logit of one sample: dense [D], and a bag of ids and their weights for each feature."""

    def mlp(x: np.ndarray, prefix: str, layers: int) -> np.ndarray:
        for i in range(layers):
            key = f"{prefix}._mlp.{i}._linear"
            x = np.maximum(tensors[key + ".weight"] @ x + tensors[key + ".bias"], 0)
        return x

    if config.dense_transform != "none":
        dense = np.log(np.maximum(dense + {"log1p": 1, "log3": 3}[config.dense_transform], 1))
    bottom = mlp(dense, "dense_arch.model", len(config.bottom_mlp))
    vectors = [
        vector_of_bag(feature, config.table(feature.table), tensors, ids, scale)
        for feature, ids, scale in zip(config.features, bags, weights, strict=True)
    ]
    x = interact(config, tensors, bottom, vectors, mlp)
    if config.top_mlp:
        x = mlp(x, "over_arch.model.0", len(config.top_mlp) - 1)
        x = tensors["over_arch.model.1.weight"] @ x + tensors["over_arch.model.1.bias"]
    (total,) = x
    if config.wide:
        for feature, ids, scale in zip(config.features, bags, weights, strict=True):
            wide = tensors[table_key(feature.table + ".wide")]
            ids = [i % feature.modulo for i in ids] if feature.modulo else ids
            first_order = sum(w * wide[i, 0] for i, w in zip(ids, scale, strict=True))
            total += first_order / (max(1, len(ids)) if feature.pooling == "mean" else 1)
        if config.dense_features:
            total += tensors["wide_arch.dense.weight"][0] @ dense
        total += tensors["wide_arch.bias"][0]
    return float(total)


def interact(config, tensors, bottom, vectors, mlp):
    """What goes into the top MLP."""
    kind = config.interaction
    if kind in ("dot", "fm"):
        if config.bottom_mlp:
            vectors = [bottom, *vectors]
        elif config.dense_features:
            vectors = [
                value * vector for value, vector in zip(bottom, tensors["dense_arch.vectors"], strict=True)
            ] + vectors
        last = 1 if config.self_interaction else 0
        products = [vectors[i] @ vectors[j] for i in range(len(vectors)) for j in range(i + last)]
        if kind == "fm":
            return np.array([sum(products)])
        return np.concatenate([bottom, products])
    x = first = np.concatenate([bottom, *vectors])
    if kind == "projection":
        one, two = (
            mlp(x, f"inter_arch.interaction_branch{i}.model", len(config.branch1 if i == 1 else config.branch2))
            for i in (1, 2)
        )
        W = len(bottom)
        return np.concatenate([bottom, (one.reshape(-1, W) @ two.reshape(W, -1)).reshape(-1)])
    for i in range(config.cross_layers):
        key = "inter_arch.crossnet.{}." + str(i)
        if kind == "dcn":
            w, v = tensors[key.format("W_kernels")], tensors[key.format("V_kernels")]
            x = first * (w @ (v @ x) + tensors[key.format("bias")]) + x
        else:
            x = first * (tensors[key.format("kernels")][0] @ x) + tensors[key.format("bias")] + x
    return x


def logits(config: ModelConfig, tensors: Tensors, batch: Batch) -> np.ndarray:
    """[B] float64 from the tensors under their checkpoint keys."""
    tensors = {key: np.asarray(value, np.float64) for key, value in tensors.items()}
    B = batch.batch_size
    scales = np.ones(batch.indices.size) if batch.weights is None else batch.weights.astype(np.float64)
    spans = [slice(*batch.offsets[s : s + 2]) for s in range(len(config.features) * B)]
    return np.array(
        [
            logit(
                config,
                tensors,
                batch.dense[b].astype(np.float64),
                [[int(i) for i in batch.indices[spans[f * B + b]]] for f in range(len(config.features))],
                [list(scales[spans[f * B + b]]) for f in range(len(config.features))],
            )
            for b in range(B)
        ]
    )


def probabilities(config: ModelConfig, tensors: Tensors, batch: Batch) -> np.ndarray:
    """[B] float64."""
    return 1 / (1 + np.exp(-logits(config, tensors, batch)))
