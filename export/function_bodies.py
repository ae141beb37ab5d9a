"""The operators of docs/operators.md as ONNX functions of standard operators.

A body is specialised to its node: it holds only what the node needs, with the node's attributes as constants. Pooling
is written by `pooling_bodies`, what decodes stored rows by `row_decoding`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper

from dlrm_deploy.export.nodes import DOMAIN, OPSET, Nodes
from dlrm_deploy.export.pooling_bodies import pool
from dlrm_deploy.int8_codes import EXACT_IN_FLOAT32, LARGEST_CODE, LEAST_SIZE
from dlrm_deploy.ops.contract import BAG_INPUTS, BagAttributes


def embedding_bag_function(attributes: BagAttributes, overload: str) -> onnx.FunctionProto:
    """`TableBatchedEmbeddingBag` for a node with these attributes."""
    n = Nodes()
    pool(n, attributes)
    return _function(
        "TableBatchedEmbeddingBag", _bag_inputs(attributes), ["pooled"], n, list(attributes.node_attributes()), overload
    )


def embedding_bag_dot_interaction_function(
    attributes: BagAttributes, self_interaction: bool, overload: str, *, with_pooled: bool = False
) -> onnx.FunctionProto:
    """`EmbeddingBagDotInteraction` for a node with these attributes.

    ONNX Runtime refuses a node with fewer outputs than its body has, so the second one is there where the node has it.
    Inside the body it is always called `pooled`.
    """
    n = Nodes()
    pool(n, attributes)
    dot_interaction(n, "dense", "pooled", len(attributes.features), self_interaction, output="interactions")
    outputs = ["interactions", "pooled"] if with_pooled else ["interactions"]
    return _function(
        "EmbeddingBagDotInteraction", ["dense", *_bag_inputs(attributes)], outputs, n,
        [*attributes.node_attributes(), "self_interaction"], overload,
    )  # fmt: skip


def mlp_function(layers: int, relu_last: bool, overload: str) -> onnx.FunctionProto:
    """`Mlp` of a number of layers."""
    n = Nodes()
    inputs, x = ["x"], "x"
    for layer in range(layers):
        weight, bias = f"weight{layer}", f"bias{layer}"
        inputs += [weight, bias]
        rounded = n.op("Cast", n.op("Cast", x, to=TensorProto.BFLOAT16), to=TensorProto.FLOAT)
        last = layer == layers - 1
        relu = relu_last or not last
        name = "y" if last else None
        widened = n.op("Cast", weight, to=TensorProto.FLOAT)
        x = n.op("Gemm", rounded, widened, bias, transB=1, output=None if relu else name)
        if relu:
            x = n.op("Relu", x, output=name)
    return _function("Mlp", inputs, ["y"], n, ["relu_last"], overload)


def mlp_int8_function(inputs: Sequence[int], relu_last: bool, overload: str) -> onnx.FunctionProto:
    """`MlpInt8` for a node whose layers have these numbers of inputs.

    Sums are those of floating-point matrix products, exact for whole numbers of their size on every CPU. ONNX Runtime's
    integer products can saturate where there is no VNNI.
    """
    n = Nodes()
    names, x = ["x"], "x"
    for layer, width in enumerate(inputs):
        weight, scale, bias = f"weight{layer}", f"scale{layer}", f"bias{layer}"
        names += [weight, scale, bias]
        last = layer == len(inputs) - 1
        exact = TensorProto.FLOAT if width <= EXACT_IN_FLOAT32 else TensorProto.DOUBLE
        codes = n.op("Cast", weight, to=exact)
        x = int8_layer(n, x, codes, scale, bias, exact, relu=relu_last or not last, output="y" if last else None)
    return _function("MlpInt8", names, ["y"], n, ["relu_last"], overload)


def int8_layer(
    n: Nodes, x: str, codes: str, scale: str, bias: str, kind: int, *, relu: bool, output: str | None = None
) -> str:
    """Standard operators for a layer of `MlpInt8`, whose weight's codes are of an ONNX floating-point type `kind`.

    A value that is NaN or infinite has a code that is NaN, and so all sums of its sample are.
    """
    largest = n.op("ReduceMax", n.op("Abs", x), n.constant([1]), keepdims=1)
    counts = n.op("GreaterOrEqual", largest, n.constant(LEAST_SIZE, np.float32))
    most = n.constant(LARGEST_CODE, np.float32)
    inverse = n.op("Where", counts, n.op("Div", most, largest), n.constant(0.0, np.float32))
    rounded = n.op("Round", n.op("Mul", x, inverse))
    if kind == TensorProto.FLOAT:
        sums = n.op("Gemm", rounded, codes, transB=1)
    else:
        sums = n.op("Cast", n.op("Gemm", n.op("Cast", rounded, to=kind), codes, transB=1), to=TensorProto.FLOAT)
    scaled = n.op("Mul", n.op("Mul", sums, n.op("Div", largest, most)), scale)
    y = n.op("Add", scaled, bias, output=None if relu else output)
    return n.op("Relu", y, output=output) if relu else y


def _bag_inputs(attributes: BagAttributes) -> list[str]:
    """Formal parameters: they have names also where the node leaves an input out."""
    return list(BAG_INPUTS[: len(attributes.inputs())])


def _function(
    operator: str, inputs: list[str], outputs: list[str], n: Nodes, attributes: list[str], overload: str
) -> onnx.FunctionProto:
    return helper.make_function(
        DOMAIN, operator, inputs, outputs, n.nodes, [helper.make_opsetid("", OPSET)],
        attributes=attributes, overload=overload,
    )  # fmt: skip


def dot_interaction_function(slots: int, self_interaction: bool) -> onnx.FunctionProto:
    """`DotInteraction` for `slots` pooled vectors."""
    n = Nodes()
    dot_interaction(n, "dense", "embeddings", slots, self_interaction, output="interactions")
    return helper.make_function(
        DOMAIN, "DotInteraction", ["dense", "embeddings"], ["interactions"], n.nodes,
        [helper.make_opsetid("", OPSET)], attributes=["self_interaction"],
    )  # fmt: skip


def dot_interaction(
    n: Nodes, dense: str, embeddings: str, slots: int, self_interaction: bool, output: str | None = None
) -> str:
    """Standard operators for the dot interaction: all V x V products, then the lower triangle by rows."""
    vectors = slots + 1
    row, column = np.tril_indices(vectors, 0 if self_interaction else -1)  # i ascending, then j: the contract's order
    x_BVD = n.op("Concat", n.op("Unsqueeze", dense, n.constant([1])), embeddings, axis=1)
    dots_BVV = n.op("MatMul", x_BVD, n.op("Transpose", x_BVD, perm=[0, 2, 1]))
    flat = n.op("Reshape", dots_BVV, n.constant([0, vectors * vectors]))
    triangle = n.op("Gather", flat, n.constant(row * vectors + column), axis=1)
    return n.op("Concat", dense, triangle, axis=1, output=output)
