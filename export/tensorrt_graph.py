"""Writes the graph of a DLRM in the form that TensorRT builds.

The same model as `graph.write_model`, with three differences: ids and offsets are int32; bags of varying length are
padded to a length fixed at build time, because TensorRT has no scatter-add; and MLPs and interaction may run in fp16 or
bf16, between fp32 tables and an fp32 last layer. Everything is standard operators: TensorRT sees none of ours.

Index policy error becomes clamp here: the host refuses bad ids before it executes a plan, and a plan that is run by
anything else still never reads outside a table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

import dlrm_deploy
from dlrm_deploy.bundle import TensorSpec
from dlrm_deploy.config import ModelConfig, Precision
from dlrm_deploy.errors import EngineError
from dlrm_deploy.export.blocks import (
    interact,
    mlp,
    other_vectors,
    path_mlps,
    score,
    transformed_dense,
    vectors,
)
from dlrm_deploy.export.function_bodies import dot_interaction, policy_rows, pool_fixed
from dlrm_deploy.export.graph import IR_VERSION, signature, value_info
from dlrm_deploy.export.nodes import OPSET, Nodes
from dlrm_deploy.model.keys import WIDE_BIAS, WIDE_DENSE, bottom_keys, top_keys
from dlrm_deploy.model.stage_names import path_name, pooled_name
from dlrm_deploy.model.vectors import path_features
from dlrm_deploy.ops.contract import BagAttributes
from dlrm_deploy.tables import TableConfig

FloatArray = npt.NDArray[np.float32]
_TYPES = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
_MAX_PROTOBUF_BYTES = (2 << 30) - (16 << 20)
_ARITHMETIC = frozenset({"Add", "Gemm", "MatMul", "Mul", "ReduceSum", "Relu"})


def table_tensor(group: str) -> str:
    """Name of the tensor that holds a table group's matrix."""
    return f"tables_{group}"


def plan_inputs(config: ModelConfig, table_inputs: bool) -> tuple[TensorSpec, ...]:
    """Inputs of the graph: those of the bundle's model with int32 ids, then the tables if they are inputs."""
    inputs, _ = signature(config, "int32")
    tables = [
        TensorSpec(name=table_tensor(group.name), dtype="float32", shape=(group.rows, group.width))
        for group in config.groups
    ]
    return (*inputs, *(tables if table_inputs else ()))


def write_tensorrt_model(
    config: ModelConfig,
    dense: Mapping[str, FloatArray],
    tables: Sequence[FloatArray] | None,
    *,
    max_bag: int,
    precision: Precision = "fp32",
) -> onnx.ModelProto:
    """The graph for a plan.

    Args:
        config: the architecture.
        dense: parameters by checkpoint key (`dlrm_deploy.model.keys.dense_shapes`).
        tables: the matrix of each of `config.groups`, to be constants; None to make them inputs.
        max_bag: ids that a bag can hold at most; what a longer bag holds beyond it is not read. Fixed pooling factors
            need no padding and ignore it.
        precision: number format of MLPs and interaction.

    Raises:
        EngineError: weights do not fit `precision`, tables are too large for constants or for int32 row numbers.
    """
    _check_sizes(config, tables)
    n = Nodes()
    groups = config.groups
    pooled = [pooled_name(group.name) for group in groups]
    for group in groups:
        if group.slots:
            attributes = BagAttributes.of(config, group)
            _pool(n, config, attributes, table_tensor(group.name), max_bag, pooled_name(group.name))
    for feature, table in path_features(config):
        pooled.append(_pool_path(n, config, feature, table, max_bag))
    slots = [len(group.slots) for group in groups] + [1] * len(path_features(config))
    dense_values = transformed_dense(n, config)
    x = mlp(n, _cast(n, dense_values, precision), bottom_keys(config), "bottom") if config.dense_features else ""
    cast = [_cast(n, output, precision) if count else output for output, count in zip(pooled, slots, strict=True)]

    def dot(first: str, others: str, output: str | None) -> str:
        return dot_interaction(n, first, others, other_vectors(config), config.self_interaction, output)

    def to_fp32(name: str) -> str:
        return name if precision == "fp32" else n.op("Cast", name, to=TensorProto.FLOAT)

    x = interact(n, config, x, vectors(n, config, cast, slots), dot)
    logits = score(n, config, x, dense_values, pooled, to_fp32)
    n.op("Squeeze", n.op("Sigmoid", logits), n.constant([1]), output="probabilities")

    single = {WIDE_DENSE, WIDE_BIAS, *(top_keys(config)[-1:] or ((),))[0]}
    initializers = [_weight(key, array, "fp32" if key in single else precision) for key, array in dense.items()]
    for group, matrix in zip(config.groups, tables or (), strict=tables is not None):
        initializers.append(numpy_helper.from_array(np.ascontiguousarray(matrix), table_tensor(group.name)))
    _, outputs = signature(config, "int32")
    graph = helper.make_graph(
        n.nodes,
        config.name,
        [value_info(spec) for spec in plan_inputs(config, tables is None)],
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


def _check_sizes(config: ModelConfig, tables: Sequence[FloatArray] | None) -> None:
    for group in config.groups:
        if group.rows > np.iinfo(np.int32).max:
            raise EngineError(
                f"table group {group.name} has {group.rows} rows, and a plan numbers rows in 32 bits. "
                "Use engine onnxruntime, or hash ids to fewer rows."
            )
    if tables is not None and config.table_bytes > _MAX_PROTOBUF_BYTES:
        raise EngineError(
            f"tables of {config.table_bytes / 1e9:.1f} GB cannot be constants of a plan: an ONNX file holds 2 GB. "
            "Build with --tables input."
        )


def _never_fails(attributes: BagAttributes) -> BagAttributes:
    """Without what the host does before: it refuses bad ids, and takes the modulo, in 64 bits."""
    policy = "clamp" if attributes.index_policy == "error" else attributes.index_policy
    return replace(attributes, index_policy=policy, moduli=())


def _pool_path(n: Nodes, config: ModelConfig, feature: int, table: TableConfig, max_bag: int) -> str:
    """The pooled vector [B, 1, W] of a feature of a path table: its ids, padded where bags vary, one by one."""
    factors, name = config.pooling_factors, config.features[feature].name
    filled = lengths = None
    if factors is None:
        bag = max_bag
        starts, ends = (_bag_bounds(n, config, (feature,), side) for side in ("first", "last"))  # [1, B, 1]
        places = n.op("Add", starts, n.constant(np.arange(max_bag)[None, None], np.int32))
        filled = n.op("Less", places, ends)
        lengths = n.op("Sub", ends, starts)
        places = n.op("Reshape", n.op("Where", filled, places, n.constant(0, np.int32)), n.constant([-1]))
    else:
        bag = factors[feature]
        batch = n.op("Div", n.op("Shape", "indices"), n.constant([sum(factors)]))
        first = n.op("Mul", batch, n.constant([sum(factors[:feature])]))
        last = n.op("Mul", batch, n.constant([sum(factors[: feature + 1])]))

    def of_feature(values: str) -> str:
        return n.op("Gather", values, places) if factors is None else n.op("Slice", values, first, last)

    ids = of_feature("indices")
    rows = []
    for part in table.parts:
        group = next(group for group in config.groups if part in group.parts)
        a = _never_fails(BagAttributes.of_ids(config, feature, part, group.rows_of(part.name).start))
        looked_up = f"rows_{name}.{part.name}"
        pool_fixed(n, a, (1,), ids=ids, table=table_tensor(group.name), weights="", output=looked_up, dtype=np.int32)
        rows.append(n.op("Squeeze", looked_up, n.constant([1])))
    x = path_mlps(n, table, rows)
    if config.weighted:
        x = n.op("Mul", x, n.op("Unsqueeze", of_feature("weights"), n.constant([1])))
    x = n.op("Reshape", x, n.constant([-1, bag, table.width]))
    if filled is not None:
        kept = n.op("Unsqueeze", n.op("Squeeze", filled, n.constant([0])), n.constant([2]))
        x = n.op("Where", kept, x, n.constant(0.0, np.float32))
    mean = config.features[feature].pooling == "mean"
    x = n.op("ReduceSum", x, n.constant([1]), keepdims=1, output=None if mean else path_name(name))
    if mean:
        divisor = n.constant(float(bag), np.float32)
        if lengths is not None:
            counted = n.op("Max", n.op("Reshape", lengths, n.constant([-1, 1, 1])), n.constant(1, np.int32))
            divisor = n.op("Cast", counted, to=TensorProto.FLOAT)
        x = n.op("Div", x, divisor, output=path_name(name))
    return x


def _bag_bounds(n: Nodes, config: ModelConfig, features: Sequence[int], side: str) -> str:
    """First or last bounds of the bags of some features, [T, B, 1] int32."""
    if config.dense_features:
        # The batch size comes from `dense`: TensorRT then knows that pooled vectors and dense vectors go together.
        shape = n.op("Concat", n.constant([len(config.features)]), n.op("Shape", "dense", end=1), axis=0)
    else:
        shape = n.constant([len(config.features), -1])
    first, last = (0, -1) if side == "first" else (1, np.iinfo(np.int32).max)
    cut = n.op("Slice", "offsets", n.constant([first]), n.constant([last]), n.constant([0]))
    by_feature = n.op("Reshape", cut, shape)
    if tuple(features) != tuple(range(len(config.features))):
        by_feature = n.op("Gather", by_feature, n.constant(features))
    return n.op("Unsqueeze", by_feature, n.constant([2]))


def _pool(n: Nodes, config: ModelConfig, attributes: BagAttributes, table: str, max_bag: int, output: str) -> str:
    a = _never_fails(attributes)
    if a.pooling_factors is None:
        _pool_padded(n, config, a, table, max_bag, output)
    else:
        pool_fixed(
            n, a, a.pooling_factors,
            ids="indices", table=table, weights="weights", output=output, dtype=np.int32,
        )  # fmt: skip
    return output


def _pool_padded(n: Nodes, config: ModelConfig, a: BagAttributes, table: str, max_bag: int, output: str) -> None:
    """Pad bags to `max_bag` ids, gather [T, B, L, D], drop the padding with Where and sum over L.

    Where rather than a product with a mask: a NaN or an infinity in a row that only pads must not reach the sum.
    """
    i32 = np.int32
    starts, ends = (_bag_bounds(n, config, a.features, side) for side in ("first", "last"))
    places = n.op("Add", starts, n.constant(np.arange(max_bag)[None, None], i32))
    filled = n.op("Less", places, ends)
    places = n.op("Where", filled, places, n.constant(0, i32))
    ids = n.op("Gather", "indices", places)
    # Padding reads whichever id stands first; the policy keeps it inside the table like any other id.
    total = n.op("Gather", n.op("Shape", table), n.constant(0))
    slots = range(len(a.features))
    row_TBL, bad = policy_rows(
        n, ids, a, slots, lambda values: n.constant(values[:, None, None], values.dtype), total, i32
    )
    kept = n.op("And", filled, n.op("Not", bad)) if bad else filled
    gathered = n.op("Gather", table, row_TBL)
    last = n.constant([3])
    if a.weighted:
        weights = n.op("Unsqueeze", n.op("Gather", "weights", places), last)
        gathered = n.op("Mul", gathered, weights)
    gathered = n.op("Where", n.op("Unsqueeze", kept, last), gathered, n.constant(0.0, np.float32))
    pooled = n.op("ReduceSum", gathered, n.constant([2]), keepdims=0)
    if any(a.mean):
        mean = n.constant(np.array(a.mean)[:, None, None], i32)
        lengths = n.op("Mul", n.op("Sub", ends, starts), mean)
        divisor = n.op("Max", lengths, n.constant(1, i32))
        pooled = n.op("Div", pooled, n.op("Cast", divisor, to=TensorProto.FLOAT))
    n.op("Transpose", pooled, perm=[1, 0, 2], output=output)


def _cast(n: Nodes, x: str, precision: Precision) -> str:
    return x if precision == "fp32" else n.op("Cast", x, to=_TYPES[precision])


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
