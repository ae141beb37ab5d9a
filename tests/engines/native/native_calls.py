"""The plain C functions of the native library, called on NumPy arrays."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from awkward import BagCase

import dlrm_deploy
from dlrm_deploy.ops.contract import matrix_input

I32, I64, P, S = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p, ctypes.c_char_p


class EmbeddingBagStruct(ctypes.Structure):
    """`dlrm_deploy_embedding_bag` of dlrm_deploy/ops.h."""

    _fields_ = [
        ("struct_size", ctypes.c_uint32), ("id_bytes", I32), ("weights", P), ("total_rows", I64), ("width", I64),
        ("indices", P), ("num_indices", I64), ("offsets", P), ("num_offsets", I64), ("per_sample_weights", P),
        ("num_per_sample_weights", I64), ("num_features", I64), ("num_slots", I64), ("features", P),
        ("row_starts", P), ("rows", P), ("mean", P), ("pooling_factors", P), ("index_policy", S),
        ("feature_names", S), ("pooled", P), ("pooled_floats", I64),
        ("ids", P), ("moduli", P), ("divisors", P), ("divisions", P),
        ("formats", P), ("weights_fp16", P), ("rows_fp16", I64), ("weights_bf16", P), ("rows_bf16", I64),
        ("weights_int8", P), ("rows_int8", I64), ("weights_int4", P), ("rows_int4", I64),
    ]  # fmt: skip


class DotInteractionStruct(ctypes.Structure):
    """`dlrm_deploy_dot_interaction` of dlrm_deploy/ops.h."""

    _fields_ = [
        ("struct_size", ctypes.c_uint32), ("self_interaction", I32), ("dense", P), ("embeddings", P), ("batch", I64),
        ("num_slots", I64), ("width", I64), ("interactions", P), ("interactions_floats", I64),
    ]  # fmt: skip


class BagInteractionStruct(ctypes.Structure):
    """`dlrm_deploy_bag_interaction` of dlrm_deploy/ops.h."""

    _fields_ = [
        ("struct_size", ctypes.c_uint32), ("self_interaction", I32), ("bag", P), ("dense", P), ("batch", I64),
        ("interactions", P), ("interactions_floats", I64),
    ]  # fmt: skip


class BagCall:
    """A case as the C struct, with the arrays that it points to and its output `pooled`."""

    def __init__(self, case: BagCase, feature_names: str | None = None) -> None:
        attributes = dict(case.attributes)
        factors = attributes.get("pooling_factors")
        num_features = attributes["num_features"]
        if case.offsets is not None:
            self.batch = (len(case.offsets) - 1) // num_features
        else:
            self.batch = len(case.indices) // max(1, sum(factors))
        self.slots, self.width = len(attributes["features"]), case.width
        self.pooled = np.full((self.batch, self.slots, self.width), 7, np.float32)
        self._kept = {
            name: np.array(attributes[name], np.int64)
            for name in (
                "features", "row_starts", "rows", "ids", "moduli", "divisors", "divisions", "mean", "pooling_factors",
                "formats",
            )
            if attributes.get(name) is not None
        }  # fmt: skip
        self._kept |= {matrix_input(format): np.ascontiguousarray(rows) for format, rows in case.matrices.items()}
        self.struct = EmbeddingBagStruct(
            struct_size=ctypes.sizeof(EmbeddingBagStruct), id_bytes=case.indices.itemsize, width=self.width,
            indices=case.indices.ctypes.data, num_indices=len(case.indices), num_features=num_features,
            num_slots=self.slots, index_policy=attributes.get("index_policy", "error").encode(),
            pooled=self.pooled.ctypes.data, pooled_floats=self.pooled.size,
            feature_names=feature_names.encode() if feature_names else None,
            **{name: values.ctypes.data for name, values in self._kept.items()},
        )  # fmt: skip
        for format, matrix in case.matrices.items():
            setattr(self.struct, "total_rows" if format == "fp32" else f"rows_{format}", len(matrix))
        if case.offsets is not None:
            self.struct.offsets, self.struct.num_offsets = case.offsets.ctypes.data, len(case.offsets)
        if case.per_sample_weights is not None:
            self.struct.per_sample_weights = case.per_sample_weights.ctypes.data
            self.struct.num_per_sample_weights = len(case.per_sample_weights)


class NativeError(Exception):
    """A C function returned another status than OK; the text is dlrm_deploy_last_error()."""


class Native:
    """Kernels and calibration of the library under test."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL(dlrm_deploy.get_library_path())
        for name in ("last_error", "kernel_path", "kernel_paths"):
            getattr(self.library, f"dlrm_deploy_{name}").restype = S

    def kernel_paths(self) -> list[str]:
        return self.library.dlrm_deploy_kernel_paths().decode().split(",")

    def call(self, name: str, *arguments: Any) -> None:
        if getattr(self.library, f"dlrm_deploy_{name}")(*arguments) != 0:
            raise NativeError(self.library.dlrm_deploy_last_error().decode())

    def measure(self, name: str, *arguments: Any) -> float:
        result = ctypes.c_double()
        self.call(f"calibrate_{name}", *arguments, ctypes.byref(result))
        return result.value

    def embedding_bag(self, case: BagCase, path: str, *, threads: int = 1, feature_names: str | None = None) -> Any:
        call = BagCall(case, feature_names)
        self.call("run_embedding_bag", ctypes.byref(call.struct), path.encode(), threads)
        return call.pooled

    def bag_interaction(
        self,
        case: BagCase,
        dense: np.ndarray,
        path: str,
        *,
        self_interaction: bool = False,
        pooled: bool = True,
        threads: int = 1,
    ) -> tuple[Any, Any]:
        """Interactions, and the pooled bags or None."""
        call = BagCall(case)
        vectors = call.slots + 1
        pairs = vectors * (vectors + (1 if self_interaction else -1)) // 2
        out = np.full((call.batch, call.width + pairs), 7, np.float32)
        if not pooled:
            call.struct.pooled, call.struct.pooled_floats = None, 0
        struct = BagInteractionStruct(
            ctypes.sizeof(BagInteractionStruct), int(self_interaction), ctypes.addressof(call.struct),
            dense.ctypes.data, len(dense), out.ctypes.data, out.size,
        )  # fmt: skip
        self.call("run_bag_interaction", ctypes.byref(struct), path.encode(), threads)
        return out, call.pooled if pooled else None

    def dot_interaction(
        self, dense: np.ndarray, embeddings: np.ndarray, path: str, *, self_interaction: bool = False, threads: int = 1
    ) -> Any:
        batch, slots, width = embeddings.shape
        vectors = slots + 1
        pairs = vectors * (vectors + (1 if self_interaction else -1)) // 2
        out = np.full((batch, width + pairs), 7, np.float32)
        struct = DotInteractionStruct(
            ctypes.sizeof(DotInteractionStruct), int(self_interaction), dense.ctypes.data, embeddings.ctypes.data,
            batch, slots, width, out.ctypes.data, out.size,
        )  # fmt: skip
        self.call("run_dot_interaction", ctypes.byref(struct), path.encode(), threads)
        return out
