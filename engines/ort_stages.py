"""The graph of a bundle with inner tensors as its outputs, for `stage_outputs` of the ONNX Runtime engines."""

from __future__ import annotations

from collections.abc import Sequence

from dlrm_deploy.bundle import Bundle
from dlrm_deploy.errors import MissingDependencyError
from dlrm_deploy.formats import ROW_FORMATS, tensor_name
from dlrm_deploy.model.stage_names import pooled_name

_FUSED = "EmbeddingBagDotInteraction"


def stage_graph(bundle: Bundle, tensors: Sequence[str]) -> tuple[list[str], bytes]:
    """Those of the tensors that the graph has, and a model whose outputs they are, with nothing that they do not need.

    Tables stay external data, relative to the bundle.

    Raises:
        MissingDependencyError: the package onnx is not installed.
    """
    try:
        import onnx
        from onnx import TensorProto, helper
    except ImportError as err:
        raise MissingDependencyError(
            "showing the model's inner tensors needs the package onnx. Install it with "
            "`pip install 'dlrm-deploy[export]'`."
        ) from err
    model = onnx.load(bundle.model_path, load_external_data=False)
    # Pooled vectors are the optional second output of a fused node. The exported graph leaves it out, and so does the
    # body, because ONNX Runtime refuses a node with fewer outputs than its body has.
    for node in model.graph.node:
        if node.op_type == _FUSED and len(node.output) == 1:
            node.output.append(_pooled_name(bundle, node.input))
    for body in model.functions:
        if body.name == _FUSED and len(body.output) == 1:
            body.output.append("pooled")
    inner = {name for node in model.graph.node for name in node.output}
    names = [name for name in tensors if name in inner]
    # Nodes behind them go: ONNX Runtime would compute those too, and they may fail.
    needed, kept = set(names), []
    for node in reversed(model.graph.node):
        if needed.intersection(node.output):
            needed.update(node.input)
            kept.append(node)
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in reversed(kept)]
    del model.graph.node[:], model.graph.output[:]
    model.graph.node.extend(nodes)
    model.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names)
    return names, model.SerializeToString()


def _pooled_name(bundle: Bundle, inputs: Sequence[str]) -> str:
    """What the pooled vectors of a node with these inputs are called."""
    group = next(
        group for group in bundle.config.groups if any(tensor_name(group.name, kind) in inputs for kind in ROW_FORMATS)
    )
    return pooled_name(group.name)
