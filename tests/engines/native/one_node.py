"""Models of one node, and sessions that run them on our kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from awkward import BagCase
from onnx import TensorProto, helper

import dlrm_deploy
from dlrm_deploy.formats import ROW_FORMATS
from dlrm_deploy.ops.contract import matrix_input

DOMAIN = "dlrm_deploy"
TYPES = {"int32": TensorProto.INT32, "int64": TensorProto.INT64, "float32": TensorProto.FLOAT}
STORED_TYPES = {
    "weights_fp16": TensorProto.FLOAT16, "weights_bf16": TensorProto.BFLOAT16, "weights_int8": TensorProto.UINT8,
    "weights_int4": TensorProto.UINT8,
}  # fmt: skip


def one_node_model(
    operator: str,
    inputs: dict[str, np.ndarray | None],
    attributes: dict[str, Any],
    functions: list[Any] | None = None,
    outputs: tuple[str, ...] = ("output",),
) -> onnx.ModelProto:
    """A model of one node, all dimensions dynamic. An input that is None is left out; stored rows are constants."""
    names = [name if value is not None else "" for name, value in inputs.items()]
    while names and not names[-1]:
        names.pop()
    given = {name: value for name, value in inputs.items() if value is not None}
    graph = helper.make_graph(
        [helper.make_node(operator, names, outputs, domain=DOMAIN, **attributes)],
        "one_node",
        [
            helper.make_tensor_value_info(
                name, TYPES[value.dtype.name], [f"{name}_{axis}" for axis in range(value.ndim)]
            )
            for name, value in given.items()
            if name not in STORED_TYPES
        ],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, None) for output in outputs if output],
        [
            helper.make_tensor(name, STORED_TYPES[name], value.shape, value.tobytes(), raw=True)
            for name, value in given.items()
            if name in STORED_TYPES
        ],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=functions or [])


def session(model: onnx.ModelProto, threads: int = 2) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4  # errors come as exceptions; none needs printing twice
    options.intra_op_num_threads = threads
    options.register_custom_ops_library(dlrm_deploy.get_library_path())
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def bag_inputs(case: BagCase) -> dict[str, np.ndarray | None]:
    others = {"indices": case.indices, "offsets": case.offsets, "per_sample_weights": case.per_sample_weights}
    stored = {matrix_input(format): case.matrices.get(format) for format in ROW_FORMATS}
    return {"weights": stored.pop("weights"), **others, **stored}


def bag_attributes(case: BagCase, **more: Any) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in case.attributes.items()} | more


def feed(inputs: dict[str, np.ndarray | None]) -> dict[str, np.ndarray]:
    return {name: value for name, value in inputs.items() if value is not None and name not in STORED_TYPES}
