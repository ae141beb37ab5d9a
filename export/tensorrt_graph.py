"""Writes the graph of a DLRM in the form that TensorRT builds.

The same model as `graph.write_model`, with two differences: embedding bags are those of `tensorrt_pooling`; and MLPs
and interaction may run in fp16 or bf16, between pooled vectors in fp32 and an fp32 last layer. MLPs in int8 are float32
operations on whole numbers, because TensorRT knows no integer products with a step for each sample; the rest of such a
graph is fp32. Everything is standard operators: TensorRT sees none of ours.

Index policy error becomes clamp here: the host refuses bad ids before it executes a plan, and a plan that is run by
anything else still never reads outside a table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

import dlrm_deploy
from dlrm_deploy.bundle import TensorSpec
from dlrm_deploy.config import ModelConfig, Precision
from dlrm_deploy.errors import EngineError
from dlrm_deploy.export.blocks import (
    Chain,
    interact,
    mlp,
    other_vectors,
    score,
    transformed_dense,
    vectors,
)
from dlrm_deploy.export.function_bodies import dot_interaction, int8_layer
from dlrm_deploy.export.graph import IR_VERSION, scale_name, signature, value_info
from dlrm_deploy.export.nodes import OPSET, Nodes
from dlrm_deploy.export.tensorrt_pooling import PlanBags, table_constant, table_inputs
from dlrm_deploy.formats import GroupLayout, RowFormat, tensor_name
from dlrm_deploy.int8_codes import quantize_weight
from dlrm_deploy.model.keys import WIDE_BIAS, WIDE_DENSE, bottom_keys, mlp_weight_keys, top_keys
from dlrm_deploy.model.stage_names import pooled_name
from dlrm_deploy.model.vectors import path_features
from dlrm_deploy.ops.contract import by_format

FloatArray = npt.NDArray[np.float32]
StoredTables = FloatArray | Mapping[RowFormat, npt.NDArray[Any]]
_ELEMENT_TYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "int32": TensorProto.INT32,
    "int8": TensorProto.INT8,
}
_TYPES = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
_MAX_PROTOBUF_BYTES = (2 << 30) - (16 << 20)
_ARITHMETIC = frozenset({"Add", "Gemm", "MatMul", "Mul", "ReduceSum", "Relu"})


def plan_inputs(
    config: ModelConfig, tables_as_inputs: bool, table_formats: Mapping[str, RowFormat] | None = None
) -> tuple[TensorSpec, ...]:
    """Inputs of the graph: those of the bundle's model with int32 ids, then the tables if they are inputs."""
    inputs, _ = signature(config, "int32")
    return (*inputs, *(table_inputs(config, table_formats or {}) if tables_as_inputs else ()))


def write_tensorrt_model(
    config: ModelConfig,
    dense: Mapping[str, FloatArray],
    tables: Sequence[StoredTables] | None,
    *,
    table_formats: Mapping[str, RowFormat] | None = None,
    max_bag: int,
    precision: Precision = "fp32",
) -> onnx.ModelProto:
    """The graph for a plan.

    Args:
        config: the architecture.
        dense: parameters by checkpoint key (`dlrm_deploy.model.keys.dense_shapes`).
        tables: the stored matrices of each of `config.groups` by their format, or its fp32 matrix, to be constants;
            None to make them inputs.
        table_formats: row format of each table part that is not fp32.
        max_bag: ids that a bag can hold at most; what a longer bag holds beyond it is not read. Fixed pooling factors
            need no padding and ignore it.
        precision: number format of MLPs and interaction; int8 is that of the MLPs alone. Sums of int8 MLPs are exact up
            to 1040 inputs, and beyond that rounded where they pass 2^24.

    Raises:
        EngineError: weights do not fit `precision`, tables are too large for constants or for int32 row numbers.
        FormatError: a weight of an MLP that int8 cannot store.
    """
    _check_sizes(config, table_formats or {}, constants=tables is not None)
    n = Nodes()
    groups = config.groups
    bags = PlanBags(n, config, table_formats or {}, max_bag=max_bag, as_inputs=tables is None)
    for group in groups:
        if group.slots:
            bags.group(group)
    pooled = [pooled_name(group.name) for group in groups]
    pooled += [bags.path(feature, table) for feature, table in path_features(config)]
    slots = [len(group.slots) for group in groups] + [1] * len(path_features(config))
    dense_values = transformed_dense(n, config)
    chain = _int8_chain(n) if precision == "int8" else None
    island = "fp32" if precision == "int8" else precision
    x = mlp(n, _cast(n, dense_values, island), bottom_keys(config), "bottom", chain) if config.dense_features else ""
    cast = [_cast(n, output, island) if count else output for output, count in zip(pooled, slots, strict=True)]

    def dot(first: str, others: str, output: str | None) -> str:
        return dot_interaction(n, first, others, other_vectors(config), config.self_interaction, output)

    def to_fp32(name: str) -> str:
        return name if island == "fp32" else n.op("Cast", name, to=TensorProto.FLOAT)

    x = interact(n, config, x, vectors(n, config, cast, slots), dot, chain)
    logits = score(n, config, x, dense_values, pooled, to_fp32, chain)
    n.op("Squeeze", n.op("Sigmoid", logits), n.constant([1]), output="probabilities")

    initializers = _weights(config, dense, precision)
    for group, stored in zip(config.groups, tables or (), strict=tables is not None):
        for kind, matrix in by_format(stored).items():
            initializers.append(table_constant(tensor_name(group.name, kind), kind, matrix, group.width))
    _, outputs = signature(config, "int32")
    graph = helper.make_graph(
        n.nodes,
        config.name,
        [
            helper.make_tensor_value_info(spec.name, _ELEMENT_TYPES[spec.dtype], spec.shape)
            for spec in plan_inputs(config, tables is None, table_formats)
        ],
        [value_info(spec) for spec in outputs],
        initializers,
    )
    return helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="dlrm-deploy",
        producer_version=dlrm_deploy.__version__,
    )


def runnable_on_cpu(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same model for ONNX Runtime on a CPU, which has no bf16 arithmetic.

    Each bf16 operation is computed in float32 and rounded to bf16: what a GPU does, apart from the order of additions.
    A model without bf16 is returned as it is.
    """
    half = {tensor.name for tensor in model.graph.initializer if tensor.data_type == TensorProto.BFLOAT16}
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    half |= {
        value.name for value in inferred.graph.value_info if value.type.tensor_type.elem_type == TensorProto.BFLOAT16
    }
    if not half:
        return model
    nodes: list[onnx.NodeProto] = []
    for original in model.graph.node:
        node = onnx.NodeProto()
        node.CopyFrom(original)
        if node.op_type not in _ARITHMETIC or node.output[0] not in half:
            nodes.append(node)
            continue
        for i, name in enumerate(original.input):
            if name not in half:  # axes of a ReduceSum
                continue
            node.input[i] = f"{name}_for_{node.name}_{i}"
            nodes.append(helper.make_node("Cast", [name], [node.input[i]], to=TensorProto.FLOAT))
        node.output[0] = f"{original.output[0]}_unrounded"
        nodes.append(node)
        nodes.append(helper.make_node("Cast", list(node.output), list(original.output), to=TensorProto.BFLOAT16))
    result = onnx.ModelProto()
    result.CopyFrom(model)
    del result.graph.node[:]
    result.graph.node.extend(nodes)
    return result


def _check_sizes(config: ModelConfig, table_formats: Mapping[str, RowFormat], *, constants: bool) -> None:
    layouts = [GroupLayout.of(group, table_formats) for group in config.groups]
    for group, layout in zip(config.groups, layouts, strict=True):
        rows = max(matrix.rows for matrix in layout.matrices)
        if rows > np.iinfo(np.int32).max:
            raise EngineError(
                f"table group {group.name} has {rows} rows, and a plan numbers rows in 32 bits. "
                "Use engine onnxruntime, or hash ids to fewer rows."
            )
    total = sum(layout.bytes for layout in layouts)
    if constants and total > _MAX_PROTOBUF_BYTES:
        raise EngineError(
            f"tables of {total / 1e9:.1f} GB cannot be constants of a plan: an ONNX file holds 2 GB. "
            "Build with --tables input."
        )


def _cast(n: Nodes, x: str, precision: Precision) -> str:
    return x if precision == "fp32" else n.op("Cast", x, to=_TYPES[precision])


def _int8_chain(n: Nodes) -> Chain:
    """Writes an MLP in the arithmetic of MlpInt8, with the codes of its weights as float32."""

    def chain(x: str, layers: Sequence[tuple[str, str]], relu_last: bool, output: str | None) -> str:
        for number, (weight, bias) in enumerate(layers, start=1):
            last = number == len(layers)
            x = int8_layer(
                n, x, weight, scale_name(weight), bias, TensorProto.FLOAT,
                relu=relu_last or not last, output=output if last else None,
            )  # fmt: skip
        return x

    return chain


def _weights(config: ModelConfig, dense: Mapping[str, FloatArray], precision: Precision) -> list[onnx.TensorProto]:
    """The initializers of all weights but the tables."""
    if precision != "int8":
        single = {WIDE_DENSE, WIDE_BIAS, *(top_keys(config)[-1:] or ((),))[0]}
        return [_weight(key, array, "fp32" if key in single else precision) for key, array in dense.items()]
    tensors = []
    for key, array in dense.items():
        if key in mlp_weight_keys(config):
            codes, scales = quantize_weight(array, key)
            tensors.append(numpy_helper.from_array(scales, scale_name(key)))
            array = codes.astype(np.float32)
        tensors.append(_weight(key, array, "fp32"))
    return tensors


def _weight(key: str, array: FloatArray, precision: str) -> onnx.TensorProto:
    """An initializer in the precision's number format; a value that becomes infinite is an error."""
    dtype = helper.tensor_dtype_to_np_dtype(_TYPES[precision])
    with np.errstate(over="ignore"):
        converted = np.ascontiguousarray(array).astype(dtype)
    if not np.isfinite(converted.astype(np.float32)).all():
        raise EngineError(
            f"{key} holds {np.abs(array).max():g}, which {precision} cannot hold. Build with --precision bf16 or fp32."
        )
    return numpy_helper.from_array(converted, key)
