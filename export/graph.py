"""Writes the ONNX graph of a DLRM from its ModelConfig.

Not traced: tables stay outside as external data, embedding bags stay one node a table group, and the graph depends on
nothing but the config. Blocks are shared with `tensorrt_graph`, which writes the same model in a form TensorRT builds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

import dlrm_deploy
from dlrm_deploy.bundle import TableGroupRecord, TensorSpec
from dlrm_deploy.config import ModelConfig
from dlrm_deploy.export.function_bodies import BagAttributes, dot_interaction_function, embedding_bag_function
from dlrm_deploy.export.nodes import DOMAIN, DOMAIN_VERSION, OPSET, Nodes
from dlrm_deploy.model.keys import bottom_keys, cross_keys, top_keys

IR_VERSION = 10
_ONNX_TYPES = {"float32": TensorProto.FLOAT, "int32": TensorProto.INT32, "int64": TensorProto.INT64}


def signature(config: ModelConfig, index_dtype: str) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Inputs and outputs of the exported graph."""
    inputs = [
        TensorSpec(name="dense", dtype="float32", shape=("batch", len(config.dense_features))),
        TensorSpec(name="indices", dtype=index_dtype, shape=("ids",)),
    ]
    if config.pooling_factors is None:
        inputs.append(TensorSpec(name="offsets", dtype=index_dtype, shape=("bags_plus_1",)))
    if config.weighted:
        inputs.append(TensorSpec(name="weights", dtype="float32", shape=("ids",)))
    return tuple(inputs), (TensorSpec(name="probabilities", dtype="float32", shape=("batch",)),)


def write_model(
    config: ModelConfig,
    dense: Mapping[str, npt.NDArray[np.float32]],
    tables: Sequence[TableGroupRecord],
    index_dtype: str,
) -> onnx.ModelProto:
    """The model with function bodies; tables refer to their files, all other weights are inside.

    Args:
        config: the architecture.
        dense: parameters by checkpoint key (`dlrm_deploy.model.keys.dense_shapes`).
        tables: file of each of `config.groups`, relative to the model.
        index_dtype: "int32" or "int64", type of `indices` and `offsets`.
    """
    inputs, outputs = signature(config, index_dtype)
    n = Nodes()
    functions = []
    pooled = []
    for group in config.groups:
        attributes = BagAttributes.of(config, group)
        overload = "" if len(config.groups) == 1 else group.name  # each node has the body of its own attributes
        actual = {"weights": f"tables_{group.name}", "per_sample_weights": "weights"}
        pooled.append(
            n.op(
                "TableBatchedEmbeddingBag", *(actual.get(name, name) for name in attributes.inputs()),
                output=f"pooled_{group.name}", domain=DOMAIN, overload=overload, **attributes.node_attributes(),
            )
        )  # fmt: skip
        functions.append(embedding_bag_function(attributes, overload))
    bottom = mlp(n, "dense", bottom_keys(config))
    if config.interaction == "dot":
        x = n.op(
            "DotInteraction", bottom, pooled[0],
            output="interactions", domain=DOMAIN, self_interaction=int(config.self_interaction),
        )  # fmt: skip
        functions.append(dot_interaction_function(len(config.features), config.self_interaction))
    else:
        x = concat_or_cross(n, config, bottom, pooled)
    logits = mlp(n, x, top_keys(config), last_relu=False)
    n.op("Squeeze", n.op("Sigmoid", logits), n.constant([1]), output="probabilities")

    graph = helper.make_graph(
        n.nodes,
        config.name,
        [value_info(spec) for spec in inputs],
        [value_info(spec) for spec in outputs],
        [
            *(external_table(record) for record in tables),
            *(numpy_helper.from_array(np.ascontiguousarray(array), key) for key, array in dense.items()),
        ],
    )
    return helper.make_model(
        graph,
        functions=functions,
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, DOMAIN_VERSION)],
        ir_version=IR_VERSION,
        producer_name="dlrm-deploy",
        producer_version=dlrm_deploy.__version__,
    )


def mlp(n: Nodes, x: str, layers: Sequence[tuple[str, str]], last_relu: bool = True) -> str:
    """Linear layers with ReLU between them (and after the last, for the bottom MLP); weights by their keys."""
    for i, (weight, bias) in enumerate(layers):
        x = n.op("Gemm", x, weight, bias, transB=1)
        if last_relu or i + 1 < len(layers):
            x = n.op("Relu", x)
    return x


def concat_or_cross(n: Nodes, config: ModelConfig, dense: str, pooled: Sequence[str]) -> str:
    """Dense and pooled vectors side by side in feature order; for dcn, then the low-rank cross layers."""
    x0 = n.op("Concat", dense, *_in_feature_order(n, config, pooled), axis=1)
    if config.interaction == "concat":
        return x0
    x = x0
    for w, v, bias in cross_keys(config):
        low_rank = n.op("Gemm", x, v, transB=1)
        x = n.op("Add", n.op("Mul", x0, n.op("Gemm", low_rank, w, bias, transB=1)), x)
    return x


def _in_feature_order(n: Nodes, config: ModelConfig, pooled: Sequence[str]) -> list[str]:
    """Pooled outputs [B, T, D] of the groups as matrices, cut where another group's slots come between."""
    pieces: list[tuple[int, str]] = []
    for group, output in zip(config.groups, pooled, strict=True):
        cuts = [0, *(i + 1 for i, (a, b) in enumerate(pairwise(group.slots)) if b != a + 1), len(group.slots)]
        lengths = [stop - start for start, stop in pairwise(cuts)]
        parts = [output]
        if len(lengths) > 1:
            names = [f"{output}_{i}" for i in range(len(lengths))]
            parts = n.ops("Split", output, n.constant(lengths), outputs=names, axis=1)
        for start, length, part in zip(cuts, lengths, parts, strict=False):
            matrix = n.op("Reshape", part, n.constant([0, length * group.width]))
            pieces.append((group.slots[start], matrix))
    return [matrix for _, matrix in sorted(pieces)]


def value_info(spec: TensorSpec) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(spec.name, _ONNX_TYPES[spec.dtype], spec.shape)


def external_table(record: TableGroupRecord) -> onnx.TensorProto:
    """An initializer whose values lie in the group's file."""
    tensor = TensorProto(name=f"tables_{record.name}", data_type=TensorProto.FLOAT, dims=(record.rows, record.width))
    tensor.data_location = TensorProto.EXTERNAL
    entries: dict[str, Any] = {"location": record.file, "offset": 0, "length": record.rows * record.width * 4}
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor
