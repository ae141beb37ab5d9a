"""Builds a plan from an ONNX file with either TensorRT module. Runs inside the child process of `worker`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

from dlrm_deploy.engines.tensorrt.layers import read_layers, read_memory
from dlrm_deploy.engines.tensorrt.library import log_of
from dlrm_deploy.errors import EngineError

_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT8": "int8",
    "INT32": "int32",
    "INT64": "int64",
}


def build(module: ModuleType, model: Path, profile: dict[str, list[list[int]]], plan: Path) -> dict[str, Any]:
    """Build `model` and write the serialized plan to `plan`.

    Args:
        module: `tensorrt_rtx` or `tensorrt`.
        model: ONNX file of standard operators.
        profile: min, opt and max shape of each input with dynamic dimensions.
        plan: file to write.

    Returns:
        What the sidecar says about the build: library_version, tensors, builder, layers, memory.

    Raises:
        EngineError: the library refuses the model, with its reasons.
    """
    log = log_of(module)
    builder = module.Builder(log.logger)
    network_flags = [flag for flag in ("STRONGLY_TYPED",) if hasattr(module.NetworkDefinitionCreationFlag, flag)]
    bits = sum(1 << int(getattr(module.NetworkDefinitionCreationFlag, flag)) for flag in network_flags)
    network = builder.create_network(bits)
    parser = module.OnnxParser(network, log.logger)
    if not parser.parse_from_file(str(model)):
        reasons = [str(parser.get_error(i)) for i in range(parser.num_errors)]
        raise EngineError(f"cannot parse the graph: {' | '.join(reasons) or log.errors()}")

    config = builder.create_builder_config()
    config.profiling_verbosity = module.ProfilingVerbosity.DETAILED
    if hasattr(module.BuilderFlag, "TF32"):
        config.clear_flag(module.BuilderFlag.TF32)  # on by default; fp32 means 24 bits of mantissa here, not 11
    shapes = builder.create_optimization_profile()
    for name, (least, best, most) in profile.items():
        shapes.set_shape(name, least, best, most)
    config.add_optimization_profile(shapes)

    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        raise EngineError(f"cannot build the graph: {log.errors()}")
    plan.write_bytes(serialized)
    texts = [text for _, text in log.messages]
    inputs = [_tensor(network.get_input(i)) for i in range(network.num_inputs)]
    layers = read_layers(texts, {tensor["name"] for tensor in inputs})
    return {
        "library_version": module.__version__,
        "tensors": [*inputs, *(_tensor(network.get_output(i)) for i in range(network.num_outputs))],
        "builder": {
            "flags": sorted(name for name, flag in module.BuilderFlag.__members__.items() if config.get_flag(flag)),
            "network_flags": network_flags,
            "optimization_level": int(config.builder_optimization_level),
        },
        "layers": [asdict(layer) for layer in layers],
        "memory": read_memory(texts),
    }


def _tensor(tensor: Any) -> dict[str, Any]:
    return {
        "name": tensor.name,
        "dtype": _DTYPES.get(tensor.dtype.name, tensor.dtype.name),
        "shape": [int(size) for size in tensor.shape],
    }
