"""Writes the ONNX graph of a DLRM from its ModelConfig.

Not traced: tables stay outside as external data, embedding bags stay one node a table group, and the graph depends on
nothing but the config and the number formats. Bags and dot interaction are one node where they can be, and so is a
whole MLP in bfloat16 or int8. Blocks are shared with `tensorrt_graph`, which writes the same model in a form TensorRT
builds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

import dlrm_deploy
from dlrm_deploy.bundle import MlpPrecision, TableGroupRecord, TensorSpec
from dlrm_deploy.config import ModelConfig
from dlrm_deploy.export.blocks import (
    Chain,
    interact,
    mlp,
    other_vectors,
    path_mlps,
    score,
    transformed_dense,
    vectors,
)
from dlrm_deploy.export.function_bodies import (
    dot_interaction_function,
    embedding_bag_dot_interaction_function,
    embedding_bag_function,
    mlp_function,
    mlp_int8_function,
)
from dlrm_deploy.export.nodes import DOMAIN, DOMAIN_VERSION, OPSET, Nodes
from dlrm_deploy.export.pooling_bodies import bag_of_each_id
from dlrm_deploy.formats import (
    ROW_FORMATS,
    GroupLayout,
    RowFormat,
    row_bytes,
    stored_columns,
    tensor_name,
    to_bf16,
)
from dlrm_deploy.int8_codes import quantize_weight
from dlrm_deploy.model.keys import bottom_keys, mlp_weight_keys
from dlrm_deploy.model.stage_names import INTERACTIONS, path_name, pooled_name
from dlrm_deploy.model.vectors import path_features, runs
from dlrm_deploy.ops.contract import BagAttributes, matrix_input
from dlrm_deploy.tables import TableConfig

IR_VERSION = 10
_ONNX_TYPES = {"float32": TensorProto.FLOAT, "int32": TensorProto.INT32, "int64": TensorProto.INT64}
_TABLE_TYPES: dict[RowFormat, int] = {
    "fp32": TensorProto.FLOAT,
    "fp16": TensorProto.FLOAT16,
    "bf16": TensorProto.BFLOAT16,
    "int8": TensorProto.UINT8,
    "int4": TensorProto.UINT8,
}


def signature(config: ModelConfig, index_dtype: str) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Inputs and outputs of the exported graph."""
    inputs = [TensorSpec(name="indices", dtype=index_dtype, shape=("ids",))]
    if config.dense_features:
        inputs.insert(0, TensorSpec(name="dense", dtype="float32", shape=("batch", len(config.dense_features))))
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
    *,
    table_formats: Mapping[str, RowFormat] | None = None,
    mlp_precision: MlpPrecision = "fp32",
) -> onnx.ModelProto:
    """The model with function bodies; tables refer to their files, all other weights are inside.

    Args:
        config: the architecture.
        dense: parameters by checkpoint key (`dlrm_deploy.model.keys.dense_shapes`), in fp32.
        tables: the stored matrices, as `Manifest.table_groups` lists them; files are relative to the model.
        index_dtype: "int32" or "int64", type of `indices` and `offsets`.
        table_formats: row format of each table part that is not fp32.
        mlp_precision: bf16 and int8 write each MLP as one node with weights in that format.

    Raises:
        FormatError: a weight that `mlp_precision` cannot store.
    """
    inputs, outputs = signature(config, index_dtype)
    n = Nodes()
    functions: list[onnx.FunctionProto] = []
    dense_values = transformed_dense(n, config)
    chain = _chain_writer(n, functions, mlp_precision, dense)
    x = mlp(n, dense_values, bottom_keys(config), "bottom", chain) if config.dense_features else ""
    if fuses(config):
        pooled: list[str] = []
        x = _fused_bags(n, config, x, table_formats, functions)
    else:
        pooled, slots = _pooled(n, config, table_formats, functions)

        def dot(first: str, others: str, output: str | None) -> str:
            functions.append(dot_interaction_function(other_vectors(config), config.self_interaction))
            flag = int(config.self_interaction)
            return n.op("DotInteraction", first, others, output=output, domain=DOMAIN, self_interaction=flag)

        x = interact(n, config, x, vectors(n, config, pooled, slots), dot, chain)
    logits = score(n, config, x, dense_values, pooled, chain=chain)
    n.op("Squeeze", n.op("Sigmoid", logits), n.constant([1]), output="probabilities")

    graph = helper.make_graph(
        n.nodes,
        config.name,
        [value_info(spec) for spec in inputs],
        [value_info(spec) for spec in outputs],
        [
            *(external_table(record) for record in tables),
            *dense_tensors(config, dense, mlp_precision),
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


def fuses(config: ModelConfig) -> bool:
    """Whether bags and interaction are one node: one table group, whose slots are the features' vectors."""
    (first, *others), groups = runs(config), config.groups
    return (
        config.interaction == "dot"
        and config.has_dense_vector
        and not (others or config.wide or path_features(config))
        and len(groups) == 1
        and first.parts == ((0, 0),)
        and first.count == len(groups[0].slots)
        and first.projection is None
    )


def _fused_bags(
    n: Nodes,
    config: ModelConfig,
    dense: str,
    table_formats: Mapping[str, RowFormat] | None,
    functions: list[onnx.FunctionProto],
) -> str:
    """The EmbeddingBagDotInteraction node of a model that `fuses`."""
    (group,) = config.groups
    attributes = BagAttributes.of(config, group, table_formats)
    body = embedding_bag_dot_interaction_function(attributes, config.self_interaction, "")
    del body.output[1:]  # the checker wants as many as the node has
    functions.append(body)
    return n.op(
        "EmbeddingBagDotInteraction", dense, *_inputs(attributes, group.name),
        output=INTERACTIONS, domain=DOMAIN, self_interaction=int(config.self_interaction),
        **attributes.node_attributes(),
    )  # fmt: skip


def _pooled(
    n: Nodes,
    config: ModelConfig,
    table_formats: Mapping[str, RowFormat] | None,
    functions: list[onnx.FunctionProto],
) -> tuple[list[str], list[int]]:
    """The pooled outputs [B, T, D] of each table group and [B, 1, D] of each path feature; and their T."""
    groups = [group for group in config.groups if group.slots]
    for group in groups:
        attributes = BagAttributes.of(config, group, table_formats)
        overload = "" if len(groups) == 1 and not path_features(config) else group.name
        _bags(n, attributes, group.name, overload, pooled_name(group.name))
        functions.append(embedding_bag_function(attributes, overload))
    pooled = [pooled_name(group.name) for group in config.groups]
    slots = [len(group.slots) for group in config.groups]
    for feature, table in path_features(config):
        output, bodies = _path(n, config, feature, table, table_formats)
        pooled.append(output)
        slots.append(1)
        functions += bodies
    return pooled, slots


def _chain_writer(
    n: Nodes,
    functions: list[onnx.FunctionProto],
    precision: MlpPrecision,
    dense: Mapping[str, npt.NDArray[np.float32]],
) -> Chain | None:
    """Writes an MLP as one node, with a body of its own; None where each layer is nodes of its own."""
    if precision == "fp32":
        return None

    def chain(x: str, layers: Sequence[tuple[str, str]], relu_last: bool, output: str | None) -> str:
        operator = "Mlp" if precision == "bf16" else "MlpInt8"
        overload = f"mlp{sum(function.name == operator for function in functions)}"
        if precision == "bf16":
            functions.append(mlp_function(len(layers), relu_last, overload))
            weights = [key for keys in layers for key in keys]
        else:
            functions.append(mlp_int8_function([dense[key].shape[1] for key, _ in layers], relu_last, overload))
            weights = [name for key, bias in layers for name in (key, scale_name(key), bias)]
        return n.op(operator, x, *weights, output=output, domain=DOMAIN, overload=overload, relu_last=int(relu_last))

    return chain


def _bags(n: Nodes, attributes: BagAttributes, group: str, overload: str, output: str, ids: str = "indices") -> str:
    """One TableBatchedEmbeddingBag node."""
    return n.op(
        "TableBatchedEmbeddingBag", *_inputs(attributes, group, ids),
        output=output, domain=DOMAIN, overload=overload, **attributes.node_attributes(),
    )  # fmt: skip


def _inputs(attributes: BagAttributes, group: str, ids: str = "indices") -> list[str]:
    """The graph's tensors behind the inputs of a node's bags."""
    actual = {matrix_input(kind): tensor_name(group, kind) for kind in ROW_FORMATS}
    actual |= {"per_sample_weights": "weights", "indices": ids}
    return [actual.get(name, name) for name in attributes.inputs()]


def _path(
    n: Nodes, config: ModelConfig, feature: int, table: TableConfig, table_formats: Mapping[str, RowFormat] | None
) -> tuple[str, list[onnx.FunctionProto]]:
    """The pooled vector [B, 1, W] of a feature of a path table, and the bodies of its nodes.

    Its M ids are cut out of the batch and looked up one by one in each part; their vectors are added up by bag with
    ScatterElements, in index order.
    """
    name, factors = config.features[feature].name, config.pooling_factors
    if factors is None:
        offsets = n.op("Cast", "offsets", to=TensorProto.INT64)
        batch = n.op("Div", n.op("Sub", n.op("Shape", offsets), n.constant([1])), n.constant([len(config.features)]))
        first = n.op("Mul", batch, n.constant([feature]))
        stop = n.op("Add", n.op("Add", first, batch), n.constant([1]))
        bounds = n.op("Slice", offsets, first, stop)
        start, end = n.op("Gather", bounds, n.constant([0])), n.op("Gather", bounds, n.constant([-1]))
    else:
        batch = n.op("Div", n.op("Shape", "indices"), n.constant([sum(factors)]))
        start = n.op("Mul", batch, n.constant([sum(factors[:feature])]))
        end = n.op("Mul", batch, n.constant([sum(factors[: feature + 1])]))
    ids = n.op("Slice", "indices", start, end)
    rows, bodies = [], []
    for group in config.groups:
        for part in group.parts:
            if part not in table.parts:
                continue
            kind, row_start = GroupLayout.of(group, table_formats).place(part.name)
            attributes = BagAttributes.of_ids(config, feature, part, row_start, kind)
            overload = f"{name}.{part.name}"  # names hold no dots, so no two pairs give one
            looked_up = _bags(n, attributes, group.name, overload, f"rows_{overload}", ids)
            rows.append((table.parts.index(part), n.op("Squeeze", looked_up, n.constant([1]))))
            bodies.append(embedding_bag_function(attributes, overload))
    x = path_mlps(n, table, [row for _, row in sorted(rows)])
    if config.weighted:
        x = n.op("Mul", x, n.op("Unsqueeze", n.op("Slice", "weights", start, end), n.constant([1])))
    mean = config.features[feature].pooling == "mean"
    if factors is not None:
        x = n.op("Reshape", x, n.op("Concat", batch, n.constant([factors[feature], table.width]), axis=0), allowzero=1)
        x = n.op("ReduceMean" if mean else "ReduceSum", x, n.constant([1]), keepdims=1, output=path_name(name))
        return x, bodies
    starts = n.op("Sub", n.op("Slice", bounds, n.constant([0]), batch), start)
    bag = bag_of_each_id(n, starts, n.op("Shape", ids))
    target = n.op("Expand", n.op("Unsqueeze", bag, n.constant([1])), n.op("Shape", x))
    zeros = n.op("Expand", n.constant(0.0, np.float32), n.op("Concat", batch, n.constant([table.width]), axis=0))
    x = n.op("ScatterElements", zeros, target, x, axis=0, reduction="add")
    if mean:
        lengths = n.op("Sub", n.op("Slice", bounds, n.constant([1]), n.constant([np.iinfo(np.int64).max])),
                       n.op("Slice", bounds, n.constant([0]), batch))  # fmt: skip
        divisor = n.op("Cast", n.op("Max", lengths, n.constant([1])), to=TensorProto.FLOAT)
        x = n.op("Div", x, n.op("Unsqueeze", divisor, n.constant([1])))
    return n.op("Unsqueeze", x, n.constant([1]), output=path_name(name)), bodies


def scale_name(weight: str) -> str:
    """Name in the graph of the scales of an int8 weight, by the weight's key."""
    return f"{weight}_scale"


def dense_tensors(
    config: ModelConfig, dense: Mapping[str, npt.NDArray[np.float32]], mlp_precision: MlpPrecision
) -> Iterator[onnx.TensorProto]:
    """The initializers of all weights but the tables, under their keys; scales of an int8 weight follow it.

    Raises:
        FormatError: a weight of an MLP that int8 cannot store.
    """
    rounded = frozenset() if mlp_precision == "fp32" else mlp_weight_keys(config)
    for key, values in dense.items():
        if key not in rounded:
            yield numpy_helper.from_array(np.ascontiguousarray(values), key)
        elif mlp_precision == "bf16":
            raw = to_bf16(values).astype("<u2").tobytes()
            yield TensorProto(name=key, data_type=TensorProto.BFLOAT16, dims=values.shape, raw_data=raw)
        else:
            codes, scales = quantize_weight(values, key)
            yield numpy_helper.from_array(codes, key)
            yield numpy_helper.from_array(scales, scale_name(key))


def value_info(spec: TensorSpec) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(spec.name, _ONNX_TYPES[spec.dtype], spec.shape)


def external_table(record: TableGroupRecord) -> onnx.TensorProto:
    """An initializer whose rows lie in the matrix's file; int8 and int4 rows are bytes."""
    tensor = TensorProto(
        name=tensor_name(record.name, record.format),
        data_type=_TABLE_TYPES[record.format],
        dims=(record.rows, stored_columns(record.format, record.width)),
    )
    tensor.data_location = TensorProto.EXTERNAL
    length = record.rows * row_bytes(record.format, record.width)
    entries: dict[str, Any] = {"location": record.file, "offset": 0, "length": length}
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor
