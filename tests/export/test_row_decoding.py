"""Standard operators that decode stored rows, run by stock ONNX Runtime, against `dlrm_deploy.formats.decode`."""

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from dlrm_deploy.export.nodes import Nodes
from dlrm_deploy.export.row_decoding import decode_rows
from dlrm_deploy.formats import ROW_FORMATS, decode, encode, stored_columns


def decoded(format, stored, width, stored_as="uint8"):
    """By the operators; the rows are an initializer, gathered as [..., columns] of several ranks."""
    n = Nodes()
    decode_rows(n, format, n.op("Gather", "stored", "rows"), width, stored_as)
    n.nodes.append(helper.make_node("Identity", [n.nodes[-1].output[0]], ["values"]))
    rows = helper.make_tensor_value_info("rows", TensorProto.INT64, ["a", "b", "c"])
    values = helper.make_tensor_value_info("values", TensorProto.FLOAT, ["a", "b", "c", width])
    matrix = numpy_helper.from_array(stored.view(ml_dtypes.bfloat16) if format == "bf16" else stored, "stored")
    graph = helper.make_graph(n.nodes, "test", [rows], [values], [matrix])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    assert session.run(None, {"rows": np.zeros((2, 0, 3), np.int64)})[0].shape == (2, 0, 3, width)
    return session.run(None, {"rows": np.arange(len(stored)).reshape(2, -1, 3)})[0].reshape(-1, width)


def stored_rows(format, width):
    """Any codes; every finite float16 as scale and, in another order, as bias."""
    if format not in ("int8", "int4"):
        return encode(format, np.random.default_rng(0).standard_normal((60, width)).astype(np.float32))
    rng = np.random.default_rng(0)
    halves = np.arange(0x7C00, dtype="<u2")
    finite = np.concatenate([halves, halves | 0x8000])[:63_486]  # all but two, to be a multiple of 6
    stored = rng.integers(0, 256, (len(finite), stored_columns(format, width)), np.uint8)
    stored[:, -4:] = np.stack([finite, rng.permutation(finite)], axis=1).view(np.uint8)
    return stored


@pytest.mark.parametrize("format", ROW_FORMATS)
@pytest.mark.parametrize("width", [1, 2, 5, 8])
def test_rows_are_decoded_bit_for_bit(format, width):
    stored = stored_rows(format, width)
    np.testing.assert_array_equal(decoded(format, stored, width), decode(format, stored, width))


@pytest.mark.parametrize(("format", "width"), [("int8", 8), ("int8", 12), ("int4", 8), ("int4", 7), ("int4", 24)])
@pytest.mark.parametrize("stored_as", ["int8", "int32"])
def test_rows_are_decoded_from_signed_bytes_and_from_words(format, width, stored_as):
    stored = stored_rows(format, width)
    lanes = stored.view(np.int8 if stored_as == "int8" else "<i4")
    assert (lanes < 0).any()
    np.testing.assert_array_equal(decoded(format, lanes, width, stored_as), decode(format, stored, width))


def test_rows_that_fill_no_words_cannot_be_read_as_words():
    with pytest.raises(ValueError, match="rows of 9 bytes cannot be read as int32"):
        decode_rows(Nodes(), "int8", "rows", 5, "int32")
