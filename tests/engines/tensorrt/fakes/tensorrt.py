"""A stand-in for NVIDIA's module `tensorrt`: the calls that dlrm-deploy makes, executed by ONNX Runtime on host memory.

Strict where the real one is: a misnamed tensor, a shape outside its profile or a tensor without an address is refused.
FAKE_TENSORRT picks a misbehaviour: abort, no_parse, no_build, wrong_type.
"""

import ctypes
import enum
import os
from collections import namedtuple

import numpy as np
import onnx
import onnxruntime as ort

__version__ = "11.4.0.106"
_MODE = os.environ.get("FAKE_TENSORRT", "")
_MAGIC = b"fake plan\n"
_NAMES = {1: "FLOAT", 3: "INT8", 6: "INT32", 10: "HALF", 16: "BF16"}
_DTYPES = {
    "tensor(float)": np.float32,
    "tensor(int32)": np.int32,
    "tensor(int8)": np.int8,
    "tensor(float16)": np.float16,
    "tensor(bfloat16)": np.uint16,  # NumPy has none
}
_Type = namedtuple("_Type", "name")
_Severity = namedtuple("_Severity", "name")
_Tensor = namedtuple("_Tensor", "name dtype shape")


class ILogger:
    pass


class NetworkDefinitionCreationFlag(enum.IntEnum):
    STRONGLY_TYPED = 1


class BuilderFlag(enum.Enum):
    TF32 = 6
    DEBUG = 2


class ProfilingVerbosity(enum.Enum):
    DETAILED = 2


class _Network:
    model = None

    @staticmethod
    def _tensor(value):
        kind = value.type.tensor_type
        name = _NAMES[kind.elem_type]
        if _MODE == "wrong_type" and name == "INT32":
            name = "INT64"
        return _Tensor(value.name, _Type(name), tuple(-1 if d.dim_param else d.dim_value for d in kind.shape.dim))

    num_inputs = property(lambda self: len(self.model.graph.input))
    num_outputs = property(lambda self: len(self.model.graph.output))

    def get_input(self, i):
        return self._tensor(self.model.graph.input[i])

    def get_output(self, i):
        return self._tensor(self.model.graph.output[i])


class OnnxParser:
    num_errors = 1

    def __init__(self, network, logger):
        self.network = network

    def parse_from_file(self, path):
        if _MODE == "no_parse":
            return False
        self.network.model = onnx.load(path)
        return True

    def get_error(self, i):
        return f"In node {i}: operator not known"


class _Profile(dict):
    def set_shape(self, name, least, best, most):
        assert all(a <= b <= c for a, b, c in zip(least, best, most, strict=True))
        self[name] = (tuple(least), tuple(most))


class _Config:
    builder_optimization_level = 3

    def __init__(self):
        self.flags, self.profiles = {BuilderFlag.TF32}, []

    def clear_flag(self, flag):
        self.flags.discard(flag)

    def get_flag(self, flag):
        return flag in self.flags

    def add_optimization_profile(self, profile):
        self.profiles.append(profile)


class Builder:
    def __init__(self, logger):
        self.logger = logger

    def create_network(self, flags):
        assert flags == 1 << int(NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        return _Network()

    def create_builder_config(self):
        return _Config()

    def create_optimization_profile(self):
        return _Profile()

    def build_serialized_network(self, network, config):
        dynamic = {v.name for v in network.model.graph.input if any(d.dim_param for d in v.type.tensor_type.shape.dim)}
        assert set(config.profiles[0]) == dynamic
        if _MODE == "abort":
            os.abort()
        if _MODE == "no_build":
            self.logger.log(_Severity("ERROR"), "no kernel for Gemm")
            self.logger.log(_Severity("ERROR"), "catchCudaError: cudaError 35")
            return None
        self.logger.log(
            _Severity("VERBOSE"),
            "Layers:\nName: all, LayerType: kgen, Inputs: [], Constants: [], Outputs: [], Metadata: \n",
        )
        return _MAGIC + repr(dict(config.profiles[0])).encode() + b"\n" + network.model.SerializeToString()


class Runtime:
    def __init__(self, logger):
        self.logger = logger

    def deserialize_cuda_engine(self, plan):
        if not plan.startswith(_MAGIC):
            self.logger.log(_Severity("ERROR"), "magic number does not match")
            return None
        profile, model = plan[len(_MAGIC) :].split(b"\n", 1)
        return _Engine(eval(profile), model)


class _Engine:
    def __init__(self, profile, model):
        self.profile, self.model = profile, model

    def create_execution_context(self):
        return _Context(self)


class _Context:
    def __init__(self, engine):
        self.engine = engine
        self.session = ort.InferenceSession(engine.model, providers=["CPUExecutionProvider"])
        self.inputs = {i.name: (i.shape, _DTYPES[i.type]) for i in self.session.get_inputs()}
        self.shapes, self.addresses = {}, {}

    def set_input_shape(self, name, shape):
        least, most = self.engine.profile.get(name, (None, None))
        static, _ = self.inputs[name]
        if least is None:
            allowed = tuple(shape) == tuple(static)
        else:
            allowed = all(a <= s <= b for a, s, b in zip(least, shape, most, strict=True))
        if allowed:
            self.shapes[name] = tuple(shape)
        return allowed

    def set_tensor_address(self, name, address):
        assert name in self.inputs or name == "probabilities"
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream):
        assert stream
        feed = {}
        for name, (_, dtype) in self.inputs.items():
            size = int(np.prod(self.shapes[name])) * np.dtype(dtype).itemsize
            data = ctypes.string_at(self.addresses[name], size)
            feed[name] = np.frombuffer(data, dtype).reshape(self.shapes[name])
            if dtype == np.uint16:
                feed[name] = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(feed[name], onnx.TensorProto.BFLOAT16)
        (result,) = self.session.run(None, feed)
        ctypes.memmove(self.addresses["probabilities"], result.ctypes.data, result.nbytes)
        return True
