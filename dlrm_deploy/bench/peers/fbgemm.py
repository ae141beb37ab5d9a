"""FBGEMM's int8 tables, with FBGEMM's batched CPU kernel, and PyTorch for the rest.

Rows are D codes with scale and bias in half precision, D + 4 bytes as ours, but with scale and bias in front. FBGEMM
wants memory of its own: this peer holds a quantised copy of all tables.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch

from dlrm_deploy.batch import Batch
from dlrm_deploy.bench.peers.peer import MappedTables, Peer
from dlrm_deploy.bench.peers.plain_model import DenseModel
from dlrm_deploy.bundle import Bundle
from dlrm_deploy.config import ModelConfig
from dlrm_deploy.errors import EngineError
from dlrm_deploy.formats import RowFormat

_BLOCK_ROWS = 1 << 18
_SCALE_BIAS_BYTES = 4


class FbgemmInt8Peer(Peer):
    """`IntNBitTableBatchedEmbeddingBagsCodegen` on the CPU, MLPs in float32."""

    name: ClassVar[str] = "fbgemm-int8"
    table_format: ClassVar[RowFormat] = "int8"
    mlp: ClassVar[str] = "fp32"
    index_dtype: ClassVar[np.dtype[Any]] = np.dtype(np.int32)
    """What its kernel is fastest with; batches come in it."""

    def __init__(self, bundle: Bundle, threads: int) -> None:
        super().__init__(bundle, threads)
        torch.set_num_threads(threads)
        self._tables = _quantised(bundle.config, MappedTables(bundle))
        self._widths = list(bundle.config.vector_widths)
        self._dense = DenseModel(bundle, torch.bfloat16 if self.mlp == "bf16" else torch.float32).eval()

    def _run(self, batch: Batch) -> npt.NDArray[np.float32]:
        ids, offsets = (
            torch.from_numpy(array.astype(np.int32, copy=False)) for array in (batch.indices, batch.offsets)
        )
        weights = None if batch.weights is None else torch.from_numpy(batch.weights)
        widths = self._widths
        with torch.inference_mode():
            pooled = self._tables(ids, offsets, weights)
            same = len(set(widths)) == 1
            vectors = [pooled.view(-1, len(widths), widths[0])] if same else list(pooled.split(widths, dim=1))
            probabilities: npt.NDArray[np.float32] = self._dense(torch.from_numpy(batch.dense), vectors).numpy()
        return probabilities

    @property
    def copied_table_bytes(self) -> int:
        return int(self._tables.weights_host.numel())

    @property
    def version(self) -> str:
        import fbgemm_gpu

        return f"fbgemm-gpu-cpu {fbgemm_gpu.__version__}, torch {torch.__version__}"

    def _release(self) -> None:
        del self._tables, self._dense


class FbgemmInt8Bf16Peer(FbgemmInt8Peer):
    """The same tables, MLPs and interaction in bfloat16."""

    name: ClassVar[str] = "fbgemm-int8-bf16"
    mlp: ClassVar[str] = "bf16"


def _quantised(config: ModelConfig, tables: MappedTables) -> Any:
    """FBGEMM's module with every table quantised into it, a block of rows at a time."""
    from fbgemm_gpu.split_embedding_configs import SparseType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
    from fbgemm_gpu.split_table_batched_embeddings_ops_inference import IntNBitTableBatchedEmbeddingBagsCodegen

    poolings = {feature.pooling for feature in config.features}
    if len(poolings) > 1:
        raise EngineError("FBGEMM's batched tables pool all features alike, and this model has both sums and means.")
    module = IntNBitTableBatchedEmbeddingBagsCodegen(
        embedding_specs=[
            (feature.name, slot.table.shape[0], slot.table.shape[1], SparseType.INT8, EmbeddingLocation.HOST)
            for feature, slot in zip(config.features, tables.slots, strict=True)
        ],
        pooling_mode=PoolingMode.MEAN if poolings == {"mean"} else PoolingMode.SUM,
        output_dtype=SparseType.FP32,
        device="cpu",
        row_alignment=1,
        indices_dtype=torch.int32,
    )
    module.initialize_weights()
    for slot, (rows, _) in zip(tables.slots, module.split_embedding_weights(split_scale_shifts=False), strict=True):
        width = slot.table.shape[1]
        for start in range(0, slot.table.shape[0], _BLOCK_ROWS):
            block = slot.table[start : start + _BLOCK_ROWS]
            fused = torch.ops.fbgemm.FloatOrHalfToFusedNBitRowwiseQuantizedSBHalf(block, 8)
            target = rows[start : start + _BLOCK_ROWS]
            target[:, :_SCALE_BIAS_BYTES] = fused[:, width : width + _SCALE_BIAS_BYTES]
            target[:, _SCALE_BIAS_BYTES : _SCALE_BIAS_BYTES + width] = fused[:, :width]
    return module
