"""The plain C functions of the native library, called on NumPy arrays."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from awkward import BagCase

import dlrm_deploy

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
    ]  # fmt: skip


class DotInteractionStruct(ctypes.Structure):
    """`dlrm_deploy_dot_interaction` of dlrm_deploy/ops.h."""

    _fields_ = [
        ("struct_size", ctypes.c_uint32), ("self_interaction", I32), ("dense", P), ("embeddings", P), ("batch", I64),
        ("num_slots", I64), ("width", I64), ("interactions", P), ("interactions_floats", I64),
    ]  # fmt: skip


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
        attributes = dict(case.attributes)
        factors = attributes.get("pooling_factors")
        num_features = attributes["num_features"]
        if case.offsets is not None:
            batch = (len(case.offsets) - 1) // num_features
        else:
            batch = len(case.indices) // max(1, sum(factors))
        pooled = np.full((batch, len(attributes["features"]), case.weights.shape[1]), 7, np.float32)
        lists = {
            name: np.array(attributes[name], np.int64)
            for name in (
                "features", "row_starts", "rows", "ids", "moduli", "divisors", "divisions", "mean", "pooling_factors"
            )
            if attributes.get(name) is not None
        }  # fmt: skip
        weights = np.ascontiguousarray(case.weights)
        struct = EmbeddingBagStruct(
            struct_size=ctypes.sizeof(EmbeddingBagStruct), id_bytes=case.indices.itemsize, weights=weights.ctypes.data,
            total_rows=weights.shape[0], width=weights.shape[1], indices=case.indices.ctypes.data,
            num_indices=len(case.indices), num_features=num_features, num_slots=len(attributes["features"]),
            index_policy=attributes.get("index_policy", "error").encode(), pooled=pooled.ctypes.data,
            pooled_floats=pooled.size, feature_names=feature_names.encode() if feature_names else None,
            **{name: values.ctypes.data for name, values in lists.items()},
        )  # fmt: skip
        if case.offsets is not None:
            struct.offsets, struct.num_offsets = case.offsets.ctypes.data, len(case.offsets)
        if case.per_sample_weights is not None:
            struct.per_sample_weights = case.per_sample_weights.ctypes.data
            struct.num_per_sample_weights = len(case.per_sample_weights)
        self.call("run_embedding_bag", ctypes.byref(struct), path.encode(), threads)
        return pooled

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
