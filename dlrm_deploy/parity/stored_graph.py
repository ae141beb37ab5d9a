"""Is `model.onnx` what the exporter writes for this bundle's config and weights? Node by node and bit by bit.

The graph follows from the config alone, so it can be written again and compared: an attribute, an order or a weight
that was changed shows here even where no batch would. A graph by another release of the exporter may be built in
another way; then only its weights are compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

import dlrm_deploy
from dlrm_deploy.bundle import Bundle
from dlrm_deploy.errors import BundleError
from dlrm_deploy.export.graph import write_model
from dlrm_deploy.formats import from_bf16, to_bf16
from dlrm_deploy.model.keys import mlp_weight_keys

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
    rounded = mlp_weight_keys(manifest.model) if manifest.mlp_precision == "bf16" else frozenset()
    for key, weight in weights.items():
        if key not in held:
            yield f"weight {key}", "the graph does not hold it"
        elif detail := _held_difference(held[key], weight, key in rounded):
            yield f"weight {key}", detail
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
        if tensor.name not in weights and held.get(tensor.name) != tensor:
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


def _held_difference(held: onnx.TensorProto, weight: npt.NDArray[np.float32], rounded: bool) -> str | None:
    """`_weight_difference` for a weight that the graph holds in float32, or rounded to bfloat16."""
    is_bf16 = held.data_type == onnx.TensorProto.BFLOAT16
    if is_bf16 != rounded:
        kind = onnx.TensorProto.DataType.Name(held.data_type)
        return f"the graph holds it as {kind}, expected {'BFLOAT16' if rounded else 'FLOAT'}"
    values = numpy_helper.to_array(held)
    return _weight_difference(
        values.astype(np.float32) if is_bf16 else values, from_bf16(to_bf16(weight)) if rounded else weight
    )


def _weight_difference(held: npt.NDArray[Any], weight: npt.NDArray[np.float32]) -> str | None:
    """In what way the graph's copy of a weight is another one; None where all bits are equal."""
    if held.shape != weight.shape or held.dtype != weight.dtype:
        return f"the graph holds {held.dtype} {list(held.shape)}, dense.npz {weight.dtype} {list(weight.shape)}"
    different = int((held.view(np.uint32) != weight.view(np.uint32)).sum())
    if different == 0:
        return None
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
