"""The operator MlpInt8: through the C function on every kernel path, and inside ONNX Runtime."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import onnx
import pytest
from native_calls import I32, I64, Native, NativeError, P
from onnx import TensorProto, helper, numpy_helper
from test_mlp import open_session, random_inputs

from dlrm_deploy.ops.reference import mlp_int8 as reference

Layers = list[tuple[np.ndarray, np.ndarray, np.ndarray]]
WIDTHS = [[13, 37, 24, 16], [67, 50, 1], [1, 1], [33, 64, 5], [129, 200, 130, 1]]


class Int8MlpStruct(ctypes.Structure):
    """`dlrm_deploy_mlp_int8` of dlrm_deploy/mlp.h."""

    _fields_ = [
        ("struct_size", ctypes.c_uint32), ("relu_last", I32), ("num_layers", I64), ("widths", P), ("weights", P),
        ("scales", P), ("biases", P), ("x", P), ("batch", I64), ("y", P), ("y_floats", I64),
    ]  # fmt: skip


def random_layers(widths: Sequence[int], seed: int = 0) -> Layers:
    """Codes of all values, -128 too, scales and biases."""
    rng = np.random.default_rng(seed)
    return [
        (
            rng.integers(-128, 128, (outputs, inputs), dtype=np.int8),
            (rng.uniform(0.5, 1.5, outputs) / (70 * np.sqrt(inputs))).astype(np.float32),
            (rng.standard_normal(outputs) * 0.1).astype(np.float32),
        )
        for inputs, outputs in pairwise(widths)
    ]


def run_native(
    native: Native, x: np.ndarray, layers: Layers, path: str, *, relu_last: bool = True, **changed: Any
) -> np.ndarray:
    y = np.full((len(x), len(layers[-1][2])), 7, np.float32)
    widths = np.array([x.shape[1]] + [len(bias) for *_, bias in layers], np.int64)
    weights, scales, biases = (
        np.array([each.ctypes.data for each in kind], np.uintp) for kind in zip(*layers, strict=True)
    )
    fields = {
        "struct_size": ctypes.sizeof(Int8MlpStruct), "relu_last": int(relu_last), "num_layers": len(layers),
        "widths": widths.ctypes.data, "weights": weights.ctypes.data, "scales": scales.ctypes.data,
        "biases": biases.ctypes.data, "x": x.ctypes.data, "batch": len(x), "y": y.ctypes.data, "y_floats": y.size,
    }  # fmt: skip
    threads = changed.pop("threads", 1)
    native.call("run_mlp_int8", ctypes.byref(Int8MlpStruct(**(fields | changed))), path.encode(), threads)
    return y


@pytest.mark.parametrize("relu_last", [True, False])
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_every_path_equals_the_reference(native, widths, relu_last):
    layers = random_layers(widths)
    for batch in (0, 1, 5, 40):
        x = random_inputs(batch, widths[0])
        if batch > 4:
            x[1, 0], x[2, -1], x[3], x[4] = np.nan, -np.inf, 0, 1e-32
        expected = reference(x, layers, relu_last=relu_last)
        for path in native.kernel_paths():
            seen = run_native(native, x, layers, path, relu_last=relu_last, threads=2)
            np.testing.assert_array_equal(seen, expected, err_msg=path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"struct_size": 8}, "struct_size is smaller than this library's dlrm_deploy_mlp_int8"),
        ({"num_layers": 1025}, "num_layers is 1025, expected 1 to 1024"),
        ({"biases": None}, "widths, weights or biases is NULL"),
        ({"scales": None}, "scales is NULL"),
        ({"y": None}, "x or y is NULL"),
        ({"y_floats": 9}, "y holds 9 floats, expected at least 2 x 5"),
        ({"batch": -1}, "batch is -1, expected at least 0"),
        ({"threads": 0}, "threads is 0, expected 1 to 1024"),
    ],
)
def test_bad_arguments_of_the_c_function_are_errors(native, changed, message):
    with pytest.raises(NativeError, match=message):
        run_native(native, random_inputs(2, 33), random_layers([33, 64, 5]), "scalar", **changed)


def one_node_model(layers: Layers, *, computed: bool = False, **attributes: Any) -> onnx.ModelProto:
    """Weights are initializers, or the model's inputs where `computed`."""
    names, initializers = ["x"], []
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", "K"])]
    for number, layer in enumerate(layers):
        for kind, array in zip("wsb", layer, strict=True):
            names.append(f"{kind}{number}")
            if computed and kind == "w":
                inputs.append(helper.make_tensor_value_info(names[-1], TensorProto.INT8, array.shape))
            else:
                initializers.append(numpy_helper.from_array(array, names[-1]))
    node = helper.make_node("MlpInt8", names, ["y"], domain="dlrm_deploy", **attributes)
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    graph = helper.make_graph([node], "one_node", inputs, outputs, initializers)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("dlrm_deploy", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("widths", [[13, 64, 16], [600, 900, 800, 1]], ids=str)  # the second is split by columns
def test_the_operator_equals_the_reference(widths, threads):
    layers = random_layers(widths)
    session = open_session(one_node_model(layers, relu_last=0), threads)
    for batch in (0, 1, 37, 300):
        x = random_inputs(batch, widths[0])
        np.testing.assert_array_equal(session.run(None, {"x": x})[0], reference(x, layers, relu_last=False))


def test_weights_that_are_no_initializers_are_used_too():
    layers = random_layers([20, 33, 4])
    session = open_session(one_node_model(layers, computed=True))
    x = random_inputs(9, 20)
    feed = {"x": x} | {f"w{number}": weight for number, (weight, *_) in enumerate(layers)}
    np.testing.assert_array_equal(session.run(None, feed)[0], reference(x, layers))


def test_models_whose_parameters_are_no_chain_do_not_load():
    layers = random_layers([20, 8, 3])
    (weight, scale, bias), last = layers
    for wrong, message in [
        (
            [(weight, scale, bias), (last[0][:, :7].copy(), *last[1:])],
            r"weight 1 has shape \[3, 7\], expected \[N, 8\]",
        ),
        ([(weight, scale[:5], bias), last], r"scale 0 has shape \[5\], expected \[8\] to go with its weight"),
        ([(weight, scale, bias[:5]), last], r"bias 0 has shape \[5\], expected \[8\] to go with its weight"),
        ([(weight.view(np.uint8), scale, bias), last], "weight 0 has element type 2, expected int8"),
        ([(weight, scale, bias), (last[0], last[1].astype(np.float64), last[2])], "scale 1 has element type 11"),
        ([(weight[:0], scale[:0], bias[:0])], "layer 0 has 20 inputs and 0 outputs"),
    ]:
        with pytest.raises(Exception, match=message):
            open_session(one_node_model(wrong))
    model = one_node_model(layers)
    model.graph.node[0].input.pop()
    with pytest.raises(Exception, match="an MlpInt8 has 6 inputs, expected x and then a weight, a scale and a bias"):
        open_session(model)
    session = open_session(one_node_model(layers))
    with pytest.raises(Exception, match=r"x has shape \[2, 21\], expected \[B, 20\] to go with weight 0"):
        session.run(None, {"x": random_inputs(2, 21)})
