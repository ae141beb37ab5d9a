"""PyTorch as peer: eager and compiled by inductor, in float32 and with bfloat16 MLPs; tables mapped, not copied."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dlrm_deploy.batch import Batch
from dlrm_deploy.bench.peers.peer import MappedTables, Peer
from dlrm_deploy.bench.peers.plain_model import PlainModel
from dlrm_deploy.bundle import Bundle

_MOST_COMPILED = 64
"""Batch sizes that inductor may compile for; its own limit is 8."""


class TorchLeanPeer(Peer):
    """PyTorch eager in float32 without the checks of engine `torch`, which cost it most of a call at batch 1."""

    name: ClassVar[str] = "torch-lean"
    mlp: ClassVar[str] = "fp32"

    def __init__(self, bundle: Bundle, threads: int) -> None:
        super().__init__(bundle, threads)
        torch.set_num_threads(threads)
        self._tables = MappedTables(bundle)
        dtype = torch.bfloat16 if self.mlp == "bf16" else torch.float32
        self._model = PlainModel(bundle, self._tables, dtype).eval()
        self._call: Callable[..., Tensor] = self._model

    def _run(self, batch: Batch) -> npt.NDArray[np.float32]:
        dense, ids, offsets = (torch.from_numpy(array) for array in (batch.dense, batch.indices, batch.offsets))
        weights = None if batch.weights is None else torch.from_numpy(batch.weights)
        with torch.inference_mode():
            probabilities: npt.NDArray[np.float32] = self._call(
                self._tables.matrices, dense, ids, offsets, weights
            ).numpy()
        return probabilities

    def touch_tables(self) -> None:
        self._tables.touch()

    @property
    def version(self) -> str:
        return f"torch {torch.__version__}"

    def _release(self) -> None:
        del self._call, self._model, self._tables


class TorchBf16Peer(TorchLeanPeer):
    """PyTorch eager, MLPs and interaction in bfloat16 (oneDNN's AMX kernels where the CPU has them)."""

    name: ClassVar[str] = "torch-bf16"
    mlp: ClassVar[str] = "bf16"


class TorchCompilePeer(TorchLeanPeer):
    """`torch.compile` with inductor, once for each batch size: seconds to a minute, not timed."""

    name: ClassVar[str] = "torch-compile"

    def __init__(self, bundle: Bundle, threads: int) -> None:
        super().__init__(bundle, threads)
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MOST_COMPILED)
        self._fixed = bundle.config.pooling_factors is not None
        # Where bags vary, so does the number of ids, and only that: everything else has the shapes of the batch size.
        self._call = torch.compile(self._model, dynamic=False if self._fixed else None)

    def _run(self, batch: Batch) -> npt.NDArray[np.float32]:
        if self._fixed:
            return super()._run(batch)
        with torch.inference_mode():
            dense, ids, offsets = (torch.from_numpy(array) for array in (batch.dense, batch.indices, batch.offsets))
            weights = None if batch.weights is None else torch.from_numpy(batch.weights)
            for changing in (ids, weights):
                if changing is not None and changing.shape[0] > 1:
                    torch._dynamo.mark_dynamic(changing, 0)
            for fixed in (dense, offsets):
                torch._dynamo.mark_static(fixed)
            probabilities: npt.NDArray[np.float32] = self._call(
                self._tables.matrices, dense, ids, offsets, weights
            ).numpy()
        return probabilities


class TorchCompileBf16Peer(TorchCompilePeer):
    """The same with MLPs and interaction in bfloat16."""

    name: ClassVar[str] = "torch-compile-bf16"
    mlp: ClassVar[str] = "bf16"
