"""The blocks of a DLRM as standard ONNX nodes: everything between the embedding bags and the probabilities.

`graph` and `tensorrt_graph` write different bags around the same blocks. Outputs of stages have fixed names
(`dlrm_deploy.model.stage_names`), by which `dlrm_deploy.parity.bisect` finds them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from dlrm_deploy.config import LOG_SHIFTS, ModelConfig
from dlrm_deploy.export.nodes import Nodes
from dlrm_deploy.model.keys import (
    DENSE_VECTORS,
    WIDE_BIAS,
    WIDE_DENSE,
    branch_keys,
    cross_keys,
    top_keys,
)
from dlrm_deploy.model.stage_names import DENSE_LOG, INTERACTIONS, LOGITS, cross_name, mlp_name, run_name
from dlrm_deploy.model.vectors import Run, runs, wide_places
from dlrm_deploy.tables import TableConfig

Dot = Callable[[str, str, str | None], str]
"""Writes a dot interaction: first vector [B, W], the others [B, T, W], name of the output or None; gives that name."""

Chain = Callable[[str, Sequence[tuple[str, str]], bool, str | None], str]
"""Writes linear layers as one node: input, weights by their keys, whether a ReLU is behind the last one, name of the
output or None; gives that name."""

_END = np.iinfo(np.int64).max


def transformed_dense(n: Nodes, config: ModelConfig) -> str:
    """Dense values [B, D] after the model's transform."""
    if config.dense_transform == "none":
        return "dense"
    shift = n.constant(LOG_SHIFTS[config.dense_transform], np.float32)
    return n.op("Log", n.op("Max", n.op("Add", "dense", shift), n.constant(1.0, np.float32)), output=DENSE_LOG)


def mlp(n: Nodes, x: str, layers: Sequence[tuple[str, str]], name: str, chain: Chain | None = None) -> str:
    """Linear layers, each with ReLU behind it; weights by their keys."""
    if chain is not None and layers:
        return chain(x, layers, True, mlp_name(name, len(layers) - 1))
    for i, (weight, bias) in enumerate(layers):
        x = n.op("Relu", n.op("Gemm", x, weight, bias, transB=1), output=mlp_name(name, i))
    return x


def vectors(n: Nodes, config: ModelConfig, pooled: Sequence[str], slots: Sequence[int]) -> list[tuple[Run, str]]:
    """The vectors [B, count, W] of each run, from pooled outputs [B, T, W] that have `slots` T each."""
    found = []
    for run in runs(config):
        parts = [_slots(n, pooled[output], slot, run.count, slots[output]) for output, slot in run.parts]
        x = parts[0]
        output = run_name(run)
        last = None if run.projection else output
        if len(parts) > 1 and run.combine == "concat":
            x = n.op("Concat", *parts, axis=2, output=last)
        elif len(parts) > 1:
            for i, part in enumerate(parts[1:], start=2):
                name = last if i == len(parts) else None
                x = n.op("Mul" if run.combine == "multiply" else "Add", x, part, output=name)
        if run.projection:
            x = n.op("Gemm", n.op("Squeeze", x, n.constant([1])), run.projection, transB=1)
            x = n.op("Unsqueeze", x, n.constant([1]), output=output)
        found.append((run, x))
    return found


def interact(
    n: Nodes, config: ModelConfig, dense: str, pieces: Sequence[tuple[Run, str]], dot: Dot, chain: Chain | None = None
) -> str:
    """What the top MLP reads, from the dense vector and the features' vectors."""
    if config.interaction in ("dot", "fm"):
        return _dot(n, config, dense, [name for _, name in pieces], dot)
    flat = [n.op("Reshape", name, n.constant([0, run.count * run.width])) for run, name in pieces]
    if config.dense_features:
        flat.insert(0, dense)
    only = None if config.interaction != "concat" else INTERACTIONS
    x0 = n.op("Concat", *flat, axis=1, output=only) if len(flat) > 1 or only else flat[0]
    if config.interaction == "concat":
        return x0
    if config.interaction == "projection":
        width = config.vector_widths[0]
        branches = [mlp(n, x0, keys, f"branch{i}", chain) for i, keys in enumerate(branch_keys(config), start=1)]
        one = n.op("Reshape", branches[0], n.constant([0, config.branch1[-1] // width, width]))
        two = n.op("Reshape", branches[1], n.constant([0, width, config.branch2[-1] // width]))
        products = n.op("MatMul", one, two)
        flat_products = n.op("Reshape", products, n.constant([0, config.interaction_width - config.dense_width]))
        return n.op("Concat", dense, flat_products, axis=1, output=INTERACTIONS)
    x = x0
    for i, (*kernels, bias) in enumerate(cross_keys(config)):
        output = INTERACTIONS if i + 1 == config.cross_layers else cross_name(i)
        if config.interaction == "dcn":
            w, v = kernels
            product = n.op("Gemm", n.op("Gemm", x, v, transB=1), w, bias, transB=1)
            x = n.op("Add", n.op("Mul", x0, product), x, output=output)
        else:
            product = n.op("Gemm", x, kernels[0], transB=1)
            x = n.op("Add", n.op("Mul", x0, product), n.op("Add", x, bias), output=output)
    return x


def other_vectors(config: ModelConfig) -> int:
    """Vectors that meet in interactions dot and fm, beside the first one."""
    return len(config.features) + (0 if config.has_dense_vector else len(config.dense_features) - 1)


def _dot(n: Nodes, config: ModelConfig, dense: str, pieces: list[str], dot: Dot) -> str:
    if config.has_dense_vector:
        first = dense
    elif config.dense_features:  # each scales a vector of its own
        pieces.insert(0, n.op("Mul", n.op("Unsqueeze", dense, n.constant([2])), DENSE_VECTORS))
    x = n.op("Concat", *pieces, axis=1) if len(pieces) > 1 else pieces[0]
    if not config.has_dense_vector:
        first = n.op("Squeeze", n.op("Slice", x, *_range(n, 0, 1, 1)), n.constant([1]))
        x = n.op("Slice", x, *_range(n, 1, _END, 1))
    elif config.interaction == "dot":
        return dot(first, x, INTERACTIONS)
    products = n.op("Slice", dot(first, x, None), *_range(n, config.vector_widths[0], _END, 1), output=None)
    if config.interaction == "dot":
        return n.op("Identity", products, output=INTERACTIONS)
    return n.op("ReduceSum", products, n.constant([1]), keepdims=1, output=INTERACTIONS)


def score(
    n: Nodes,
    config: ModelConfig,
    x: str,
    dense: str,
    pooled: Sequence[str],
    to_fp32: Callable[[str], str] = str,
    chain: Chain | None = None,
) -> str:
    """Logits [B, 1] from what the interaction gives; the last layer and first-order terms are in fp32.

    Args:
        n: where the nodes go.
        config: the model.
        x: what the interaction gives.
        dense: transformed dense values, in fp32.
        pooled: the pooled outputs, in fp32.
        to_fp32: casts a tensor of the MLPs' number format to fp32.
        chain: writes the top MLP as one node; None for a node a layer.
    """
    terms = []
    layers = top_keys(config)
    output = None if config.wide else LOGITS
    if not layers:
        terms.append(to_fp32(x))
    elif chain is not None:
        terms.append(chain(x, layers, False, output))
    else:
        *hidden, last = layers
        terms.append(n.op("Gemm", to_fp32(mlp(n, x, hidden, "top")), *last, transB=1, output=output))
    if config.wide:
        group, first = wide_places(config)
        features = len(config.features)
        slots = _slots(n, pooled[group], first, features, len(config.groups[group].slots))
        terms.append(n.op("ReduceSum", slots, n.constant([1]), keepdims=0))
        if config.dense_features:
            terms.append(n.op("Gemm", dense, WIDE_DENSE, transB=1))
        terms.append(WIDE_BIAS)
    total = terms[0]
    for i, term in enumerate(terms[1:], start=2):
        total = n.op("Add", total, term, output=LOGITS if i == len(terms) else None)
    return total


def path_mlps(n: Nodes, table: TableConfig, rows: Sequence[str]) -> str:
    """Vectors [M, W] of M ids of a path table, from the rows [M, width] that they read in each part."""
    h, W = table.path_hidden, table.width
    x, *banks = rows
    for bank in banks:
        names = [f"{bank}_{name}" for name in ("W1", "b1", "W2", "b2")]
        w1, b1, w2, b2 = n.ops("Split", bank, n.constant([h * W, h, W * h, W]), outputs=names, axis=1)
        hidden = _matrix_times(n, w1, (h, W), x)
        hidden = n.op("Relu", n.op("Add", hidden, b1))
        x = n.op("Add", _matrix_times(n, w2, (W, h), hidden), b2)
    return x


def _matrix_times(n: Nodes, matrices: str, shape: tuple[int, int], x: str) -> str:
    """[M, out] from matrices [M, out * in] and x [M, in]."""
    matrix = n.op("Reshape", matrices, n.constant([0, *shape]))
    return n.op("Squeeze", n.op("MatMul", matrix, n.op("Unsqueeze", x, n.constant([2]))), n.constant([2]))


def _slots(n: Nodes, pooled: str, first: int, count: int, total: int) -> str:
    return pooled if count == total else n.op("Slice", pooled, *_range(n, first, first + count, 1))


def _range(n: Nodes, start: int, stop: int, axis: int) -> tuple[str, str, str]:
    """Inputs of a Slice."""
    return n.constant([start]), n.constant([stop]), n.constant([axis])
