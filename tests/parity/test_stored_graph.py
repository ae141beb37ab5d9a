import numpy as np
import onnx
import pytest
from bundles import make_bundle
from onnx import helper, numpy_helper

from dlrm_deploy.export.convert import convert_bundle
from dlrm_deploy.model.keys import top_keys
from dlrm_deploy.parity.stored_graph import differences


def change(bundle, edit):
    model = onnx.load(bundle.model_path, load_external_data=False)
    edit(model)
    onnx.save(model, bundle.model_path)


def test_an_exported_graph_is_the_one_that_would_be_written_again(any_bundle):
    assert list(differences(any_bundle)) == []


@pytest.fixture
def bundle(tmp_path):
    return make_bundle("dot", tmp_path / "bundle")


def test_one_bit_of_a_weight_is_seen(bundle):
    key = top_keys(bundle.config)[0][0]

    def edit(model):
        (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name == key]
        values = numpy_helper.to_array(tensor).copy()
        values[1, 2] = np.nextafter(values[1, 2], np.float32(9))
        tensor.CopyFrom(numpy_helper.from_array(values, key))

    change(bundle, edit)
    assert list(differences(bundle)) == [(f"weight {key}", "1 of 224 values in the graph are not those of dense.npz")]


@pytest.mark.parametrize("suffix", ["", "_scale"])
def test_a_code_or_a_scale_of_an_int8_weight_that_was_changed_is_seen(bundle, tmp_path, suffix):
    key = top_keys(bundle.config)[0][0]
    converted = convert_bundle(bundle, tmp_path / "int8", mlp="int8")
    assert list(differences(converted)) == []

    def edit(model):
        (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name == key + suffix]
        values = numpy_helper.to_array(tensor).copy()
        values[1] += 1
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))

    change(converted, edit)
    seen = "14 of 224" if not suffix else "1 of 16"
    assert list(differences(converted)) == [
        (f"weight {key}{suffix}", f"{seen} values in the graph are not those of dense.npz")
    ]


def test_a_weight_of_another_type_and_one_that_is_not_there_are_named(bundle, tmp_path):
    key = top_keys(bundle.config)[0][0]
    converted = convert_bundle(bundle, tmp_path / "int8", mlp="int8")

    def edit(model):
        (at,) = [i for i, tensor in enumerate(model.graph.initializer) if tensor.name == key]
        values = numpy_helper.to_array(model.graph.initializer[at]).astype(np.float32)
        model.graph.initializer[at].CopyFrom(numpy_helper.from_array(values, key))
        assert model.graph.initializer[at + 1].name == f"{key}_scale"
        del model.graph.initializer[at + 1]

    change(converted, edit)
    assert list(differences(converted)) == [
        (f"weight {key}", "the graph holds it as FLOAT, expected INT8"),
        (f"weight {key}_scale", "the graph does not hold it"),
    ]


def test_a_changed_attribute_is_named_with_both_values(bundle):
    def edit(model):
        (node,) = [node for node in model.graph.node if node.op_type == "EmbeddingBagDotInteraction"]
        (mean,) = [attribute for attribute in node.attribute if attribute.name == "mean"]
        mean.CopyFrom(helper.make_attribute("mean", [1, 1, 0]))

    change(bundle, edit)
    expected = "EmbeddingBagDotInteraction: mean is [1, 1, 0], exported as [0, 1, 0]"
    assert list(differences(bundle)) == [("graph, interactions", expected)]


def test_added_and_lost_nodes_are_named(bundle):
    def edit(model):
        (at,) = [i for i, node in enumerate(model.graph.node) if "bottom_0" in node.output]
        model.graph.node[at].output[0] = "elsewhere"
        model.graph.node.insert(at + 1, helper.make_node("Neg", ["elsewhere"], ["bottom_0"]))

    change(bundle, edit)
    assert list(differences(bundle)) == [
        ("graph, bottom_0", "it is a Neg, exported as Relu"),
        ("graph, elsewhere", "the exporter writes no Relu there"),
    ]


def test_a_changed_function_body_is_found(bundle):
    def edit(model):
        (body,) = [body for body in model.functions if body.name == "EmbeddingBagDotInteraction"]
        *_, gather = [node for node in body.node if node.op_type == "Gather"]
        (order,) = [node for node in body.node if gather.input[1] in node.output]
        values = numpy_helper.to_array(order.attribute[0].t)[::-1]
        order.attribute[0].t.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values)))

    change(bundle, edit)
    ((place, detail),) = differences(bundle)
    assert place.startswith("body of EmbeddingBagDotInteraction, ")
    assert detail.startswith("Constant: value is [")


def test_a_table_that_reads_another_file_is_found(bundle):
    def edit(model):
        (tensor,) = [tensor for tensor in model.graph.initializer if tensor.external_data]
        next(entry for entry in tensor.external_data if entry.key == "offset").value = "32"

    change(bundle, edit)
    assert list(differences(bundle)) == [("tensor tables_width8", "it does not refer to its table file as exported")]


def test_of_another_release_only_weights_are_compared(bundle):
    def edit(model):
        model.producer_version = "0.0.9"
        model.graph.node[0].name = "renamed"

    change(bundle, edit)
    assert list(differences(bundle)) == []
