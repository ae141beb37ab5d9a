"""Is `model.onnx` what the exporter writes for this bundle's config and weights? Node by node and bit by bit.

The graph follows from the config alone, so it can be written again and compared: an attribute, an order or a weight
that was changed shows here even where no batch would. A graph by another release of the exporter may be built in
another way; then only its weights are compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import onnx
from onnx import helper, numpy_helper

import dlrm_deploy
from dlrm_deploy.bundle import Bundle
from dlrm_deploy.errors import BundleError
from dlrm_deploy.export.graph import dense_tensors, write_model

_SHOWN = 60


def differences(bundle: Bundle) -> Iterator[tuple[str, str]]:
    """Place and description of what differs: weights first, then nodes in the order of the graph, then bodies.

    Raises:
        BundleError: the graph or the weights cannot be read.
    """
    try:
        stored = onnx.load(bundle.model_path, load_external_data=False)
    except Exception as err:  # that of damaged files has no base but Exception
        raise BundleError(
            f"cannot read {bundle.model_path}: {err}. Copy the bundle again, or export it again."
        ) from err
    weights = bundle.dense_weights()
    held = {tensor.name: tensor for tensor in stored.graph.initializer}
    manifest = bundle.manifest
    dense = set()
    for tensor in dense_tensors(manifest.model, weights, manifest.mlp_precision):
        dense.add(tensor.name)
        if tensor.name not in held:
            yield f"weight {tensor.name}", "the graph does not hold it"
        elif detail := _weight_difference(held[tensor.name], tensor):
            yield f"weight {tensor.name}", detail
    if stored.producer_version != dlrm_deploy.__version__:
        return
    expected = write_model(
        manifest.model,
        weights,
        manifest.table_groups,
        manifest.index_dtype.name,
        table_formats=manifest.table_formats,
        mlp_precision=manifest.mlp_precision,
    )
    for tensor in expected.graph.initializer:
        if tensor.name not in dense and held.get(tensor.name) != tensor:
            yield f"tensor {tensor.name}", "it does not refer to its table file as exported"
    yield from _node_differences("graph", stored.graph.node, expected.graph.node)
    bodies = {(body.name, body.overload): body for body in stored.functions}
    for body in expected.functions:
        place = f"body of {body.name}" + (f" {body.overload}" if body.overload else "")
        found = bodies.get((body.name, body.overload))
        if found is None:
            yield place, "it is missing"
        else:
            yield from _node_differences(place, found.node, body.node)


def _weight_difference(stored: onnx.TensorProto, expected: onnx.TensorProto) -> str | None:
    """In what way the graph's copy of a weight is not the one that is exported; None where all bits are equal."""
    if stored.data_type != expected.data_type:
        kinds = [onnx.TensorProto.DataType.Name(tensor.data_type) for tensor in (stored, expected)]
        return f"the graph holds it as {kinds[0]}, expected {kinds[1]}"
    held, weight = numpy_helper.to_array(stored), numpy_helper.to_array(expected)
    if held.shape != weight.shape:
        return f"the graph holds {held.dtype} {list(held.shape)}, dense.npz {weight.dtype} {list(weight.shape)}"
    bits = f"u{weight.itemsize}"
    different = int((held.view(bits) != weight.view(bits)).sum())
    if different == 0:
        return None
    held, weight = held.astype(np.float32), weight.astype(np.float32)  # NumPy cannot sort bfloat16
    if weight.ndim == 2 and weight.shape[0] == weight.shape[1] and np.array_equal(held, weight.T):
        return "the graph holds its transpose"
    if not held.any():
        return "the graph holds zeros"
    if weight.ndim == 2 and np.array_equal(np.sort(held, axis=1), np.sort(weight, axis=1)):
        return "the graph holds its columns in another order"
    return f"{different} of {weight.size} values in the graph are not those of dense.npz"


def _node_differences(
    place: str, stored: Iterable[onnx.NodeProto], expected: Iterable[onnx.NodeProto]
) -> Iterator[tuple[str, str]]:
    """Nodes are told by the tensor that they give."""
    seen = {node.output[0]: node for node in stored}
    for node in expected:
        output = node.output[0]
        found = seen.pop(output, None)
        if found is None:
            yield f"{place}, {output}", f"no {node.op_type} gives it"
        elif found != node:
            yield f"{place}, {output}", _node_difference(found, node)
    for output, node in seen.items():
        yield f"{place}, {output}", f"the exporter writes no {node.op_type} there"


def _node_difference(stored: onnx.NodeProto, expected: onnx.NodeProto) -> str:
    if stored.op_type != expected.op_type:
        return f"it is a {stored.op_type}, exported as {expected.op_type}"
    if list(stored.input) != list(expected.input):
        return f"{stored.op_type} reads {', '.join(stored.input)}, exported with {', '.join(expected.input)}"
    was, now = ({a.name: helper.get_attribute_value(a) for a in node.attribute} for node in (expected, stored))
    for name in {**was, **now}:
        if now.get(name) != was.get(name):
            return f"{stored.op_type}: {name} is {_short(now.get(name))}, exported as {_short(was.get(name))}"
    return f"{stored.op_type} differs"


def _short(value: object) -> str:
    if isinstance(value, onnx.TensorProto):
        value = numpy_helper.to_array(value).reshape(-1).tolist()
    text = str(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
