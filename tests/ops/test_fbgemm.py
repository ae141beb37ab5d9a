"""Pooling of quantized rows against FBGEMM's own tables, where it is installed."""

import numpy as np
import pytest
import torch
from awkward import csr_case, stored_case

from dlrm_deploy.formats import decode

pytest.importorskip("fbgemm_gpu", reason="fbgemm-gpu-cpu is not installed")
from fbgemm_gpu.split_embedding_configs import SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_inference import IntNBitTableBatchedEmbeddingBagsCodegen

TYPES = {"int8": SparseType.INT8, "int4": SparseType.INT4, "fp16": SparseType.FP16}
LENGTHS = [[3, 0, 40, 1, 1], [1, 1, 1, 1, 1], [0, 100, 7, 0, 9]]


def fbgemm_tables(case, format: str) -> IntNBitTableBatchedEmbeddingBagsCodegen:
    """The parts of a case as FBGEMM's tables, from the very bytes."""
    stored = case.matrices[format]
    starts, counts = case.attributes["row_starts"], case.attributes["rows"]
    tables = IntNBitTableBatchedEmbeddingBagsCodegen(
        [(str(t), rows, case.width, TYPES[format], EmbeddingLocation.HOST) for t, rows in enumerate(counts)],
        device="cpu", pooling_mode=PoolingMode.SUM, output_dtype=SparseType.FP32,
    )  # fmt: skip
    tables.initialize_weights()
    for t, (weights, scale_bias) in enumerate(tables.split_embedding_weights()):
        part = np.ascontiguousarray(stored[starts[t] : starts[t] + counts[t]]).view(np.uint8)
        codes = part.shape[1] - (4 if scale_bias is not None else 0)
        weights[:, :codes] = torch.from_numpy(part[:, :codes])
        if scale_bias is not None:
            scale_bias.copy_(torch.from_numpy(part[:, codes:]))
    return tables


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("width", [16, 64])
@pytest.mark.parametrize("format", TYPES)
def test_pooled_rows_are_fbgemm_s_within_the_rounding_of_its_sums(format, width, weighted):
    rows = (30, 20, 50)
    case = stored_case(csr_case("bags", LENGTHS, rows=rows, width=width, weighted=weighted), (format,) * 3)
    weights = torch.from_numpy(case.per_sample_weights) if weighted else None
    indices, offsets = (torch.from_numpy(array).int() for array in (case.indices, case.offsets))
    pooled = fbgemm_tables(case, format)(indices, offsets, weights).view(5, 3, width).numpy()

    # A row takes two fused operations of FBGEMM's and up to four roundings of ours, so L rows take at most 4 L + 1
    # roundings of sums no larger than those of |code * scale| + |bias|, which is at most |value| + 2 * |bias|.
    values = decode(format, case.matrices[format], width).astype(np.float64)
    largest_bias = np.abs(values).max()
    expected = case.expected()
    bags = 0
    for t, start in enumerate(case.attributes["row_starts"]):
        for b in range(5):
            begin, end = case.offsets[t * 5 + b], case.offsets[t * 5 + b + 1]
            sizes = np.abs(values[start + case.indices[begin:end]]) + 2 * largest_bias
            if weighted:
                sizes *= np.abs(case.per_sample_weights[begin:end, None])
            bound = (4 * (end - begin) + 1) * 2**-24 * sizes.sum(axis=0)
            assert (np.abs(pooled[b, t].astype(np.float64) - expected[b, t]) <= bound).all()
            bags += end > begin
    assert bags == 12
    assert np.abs(expected).max() > 1
