"""The operator Mlp: through the C function on every kernel path, and inside ONNX Runtime."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from native_calls import I32, I64, Native, NativeError, P
from onnx import TensorProto, helper, numpy_helper

import dlrm_deploy
from dlrm_deploy.ops.reference import mlp as reference

Layers = list[tuple[np.ndarray, np.ndarray]]
WIDTHS = [[13, 37, 24, 16], [67, 50, 1], [1, 1], [33, 64, 5]]
BF16, FLOAT = TensorProto.BFLOAT16, TensorProto.FLOAT


class MlpStruct(ctypes.Structure):
    """`dlrm_deploy_mlp` of dlrm_deploy/mlp.h."""

    _fields_ = [
        ("struct_size", ctypes.c_uint32), ("relu_last", I32), ("num_layers", I64), ("widths", P), ("weights", P),
        ("biases", P), ("x", P), ("batch", I64), ("y", P), ("y_floats", I64),
    ]  # fmt: skip


def random_layers(widths: Sequence[int], seed: int = 0) -> Layers:
    """Weights as bfloat16 bit patterns, biases float32."""
    rng = np.random.default_rng(seed)
    layers = []
    for inputs, outputs in pairwise(widths):
        values = (rng.standard_normal((outputs, inputs)) / np.sqrt(inputs)).astype(np.float32)
        weight = (values.view(np.uint32) >> 16).astype(np.uint16)
        layers.append((weight, (rng.standard_normal(outputs) * 0.1).astype(np.float32)))
    return layers


def random_inputs(batch: int, width: int) -> np.ndarray:
    return np.random.default_rng(batch).standard_normal((batch, width)).astype(np.float32)


def run_native(
    native: Native, x: np.ndarray, layers: Layers, path: str, *, relu_last: bool = True, **changed: Any
) -> np.ndarray:
    y = np.full((len(x), len(layers[-1][1])), 7, np.float32)
    widths = np.array([x.shape[1]] + [len(bias) for _, bias in layers], np.int64)
    weights = np.array([weight.ctypes.data for weight, _ in layers], np.uintp)
    biases = np.array([bias.ctypes.data for _, bias in layers], np.uintp)
    fields = {
        "struct_size": ctypes.sizeof(MlpStruct), "relu_last": int(relu_last), "num_layers": len(layers),
        "widths": widths.ctypes.data, "weights": weights.ctypes.data, "biases": biases.ctypes.data,
        "x": x.ctypes.data, "batch": len(x), "y": y.ctypes.data, "y_floats": y.size,
    }  # fmt: skip
    threads = changed.pop("threads", 1)
    native.call("run_mlp", ctypes.byref(MlpStruct(**(fields | changed))), path.encode(), threads)
    return y


def assert_within_amx_bound(seen: np.ndarray, expected: np.ndarray, layers: Layers) -> None:
    """One step of bfloat16 a layer, since AMX adds in another order: mlp_test.cc derives the bound of every output."""
    scale = np.abs(expected).max(initial=1.0)
    np.testing.assert_allclose(seen, expected, rtol=0, atol=len(layers) * 2.0**-8 * scale)


@pytest.mark.parametrize("relu_last", [True, False])
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_every_path_equals_the_reference(native, widths, relu_last):
    layers = random_layers(widths)
    for batch in (0, 1, 5, 40):
        x = random_inputs(batch, widths[0])
        expected = reference(x, layers, relu_last=relu_last)
        for path in native.kernel_paths():
            seen = run_native(native, x, layers, path, relu_last=relu_last, threads=2)
            if path == "amx":
                assert_within_amx_bound(seen, expected, layers)
            else:
                np.testing.assert_array_equal(seen, expected, err_msg=path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"struct_size": 8}, "struct_size is smaller"),
        ({"num_layers": 0}, "num_layers is 0, expected 1 to 1024"),
        ({"widths": None}, "widths, weights or biases is NULL"),
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
    """Weights are initializers, or what a Cast makes of the model's inputs where `computed`."""
    names, initializers, nodes = ["x"], [], []
    inputs = [helper.make_tensor_value_info("x", FLOAT, ["B", "K"])]
    for number, (weight, bias) in enumerate(layers):
        name = f"w{number}"
        if computed:
            inputs.append(helper.make_tensor_value_info(f"{name}_fp32", FLOAT, weight.shape))
            nodes.append(helper.make_node("Cast", [f"{name}_fp32"], [name], to=BF16))
        else:
            initializers.append(helper.make_tensor(name, BF16, weight.shape, weight.tobytes(), raw=True))
        initializers.append(numpy_helper.from_array(bias, f"b{number}"))
        names += [name, f"b{number}"]
    nodes.append(helper.make_node("Mlp", names, ["y"], domain="dlrm_deploy", **attributes))
    outputs = [helper.make_tensor_value_info("y", FLOAT, None)]
    graph = helper.make_graph(nodes, "one_node", inputs, outputs, initializers)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("dlrm_deploy", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def open_session(model: onnx.ModelProto, threads: int = 2) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.register_custom_ops_library(dlrm_deploy.get_library_path())
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def from_bits(weight: np.ndarray) -> np.ndarray:
    return (weight.astype(np.uint32) << 16).view(np.float32)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("widths", [[13, 64, 16], [600, 700, 600, 1]], ids=str)  # the second is split by columns
def test_the_operator_equals_the_c_function(native, widths, threads):
    layers = random_layers(widths)
    path = native.library.dlrm_deploy_kernel_path().decode()
    session = open_session(one_node_model(layers, relu_last=0), threads)
    for batch in (0, 1, 37, 300):
        x = random_inputs(batch, widths[0])
        expected = run_native(native, x, layers, path, relu_last=False)
        np.testing.assert_array_equal(session.run(None, {"x": x})[0], expected)


def test_weights_that_a_node_computes_are_used_too(native):
    layers = random_layers([20, 33, 4])
    session = open_session(one_node_model(layers, computed=True))
    x = random_inputs(9, 20)
    feed = {"x": x} | {f"w{number}_fp32": from_bits(weight) for number, (weight, _) in enumerate(layers)}
    path = native.library.dlrm_deploy_kernel_path().decode()
    np.testing.assert_array_equal(session.run(None, feed)[0], run_native(native, x, layers, path))


def test_the_environment_pins_the_path_that_the_operator_runs_on(monkeypatch):
    layers = random_layers([67, 50, 3])
    x = random_inputs(20, 67)
    monkeypatch.setenv("DLRM_DEPLOY_KERNEL", "scalar")
    np.testing.assert_array_equal(open_session(one_node_model(layers)).run(None, {"x": x})[0], reference(x, layers))


def test_inputs_of_another_width_are_an_error_of_the_call():
    session = open_session(one_node_model(random_layers([20, 3])))
    with pytest.raises(Exception, match=r"x has shape \[2, 21\], expected \[B, 20\] to go with weight 0"):
        session.run(None, {"x": random_inputs(2, 21)})


def test_models_whose_weights_are_no_chain_do_not_load():
    layers = random_layers([20, 8, 3])
    (weight, bias), last = layers
    for wrong, message in [
        ([(weight, bias), (last[0][:, :7].copy(), last[1])], r"weight 1 has shape \[3, 7\], expected \[N, 8\]"),
        ([(weight, bias[:5]), last], r"bias 0 has shape \[5\], expected \[8\] to go with its weight"),
        ([(weight.reshape(8, 20, 1), bias), last], r"weight 0 has shape \[8, 20, 1\], expected rank 2"),
        ([(weight[:0], bias[:0])], "layer 0 has 20 inputs and 0 outputs"),
    ]:
        with pytest.raises(Exception, match=message):
            open_session(one_node_model(wrong))
    for relu_last, message in [(2, "is 2, expected 0 or 1"), (0.0, "is of another type than int")]:
        with pytest.raises(Exception, match=f"attribute relu_last {message}"):
            open_session(one_node_model(layers, relu_last=relu_last))


def test_weights_and_biases_of_another_type_or_number_do_not_load():
    model = one_node_model(random_layers([20, 8]))
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.zeros((8, 20), np.float32), "w0"))
    with pytest.raises(Exception, match="weight 0 has element type 1, expected bfloat16"):
        open_session(model)
    model = one_node_model(random_layers([20, 8, 3]))
    model.graph.node[0].input.pop()
    with pytest.raises(Exception, match="an Mlp has 4 inputs, expected x and then a weight and a bias"):
        open_session(model)
