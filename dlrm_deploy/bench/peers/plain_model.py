"""A DLRM in a few lines of PyTorch, without the checks of our engines: what a careful user of PyTorch would write.

`PlainModel` scores; its MLPs may be bfloat16 (weights are cast once, which is faster than `torch.autocast`'s casts at
each call), the last layer is always float32, because a logit in bfloat16 has three digits. Tables stay float32.
Suffixes: B batch, F features, N ids, D and W widths, V = F + 1 vectors that interact.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dlrm_deploy.bench.peers.peer import MappedTables, starts_of
from dlrm_deploy.bundle import Bundle
from dlrm_deploy.model.keys import bottom_keys, cross_keys, top_keys


class DenseModel(nn.Module):
    """Everything behind the tables: bottom MLP, interaction, top MLP, sigmoid."""

    def __init__(self, bundle: Bundle, dtype: torch.dtype) -> None:
        super().__init__()
        config, stored = bundle.config, bundle.dense_weights()
        self._dtype = dtype
        self._interaction = config.interaction
        weights = {key: torch.from_numpy(value) for key, value in stored.items()}

        def layers(keys: Sequence[tuple[str, ...]], to: torch.dtype) -> list[list[Tensor]]:
            return [[weights[key].to(to) for key in layer] for layer in keys]

        *hidden, last = top_keys(config)
        self._bottom, self._hidden = layers(bottom_keys(config), dtype), layers(hidden, dtype)
        self._last = layers([last], torch.float32)[0]
        self._cross = layers(cross_keys(config), dtype)
        vectors = len(config.features) + 1
        i, j = torch.tril_indices(vectors, vectors, 0 if config.self_interaction else -1)
        self._pairs: Tensor = i * vectors + j

    def forward(self, dense_BX: Tensor, vectors_BFD: Sequence[Tensor]) -> Tensor:
        """Probabilities [B] float32 from dense values and the pooled vectors, [B, D] or [B, F, D] each."""
        x_BW = _mlp(dense_BX.to(self._dtype), self._bottom)
        pooled = [vector.to(self._dtype) for vector in vectors_BFD]
        if self._interaction == "dot":
            first = [x_BW.unsqueeze(1)] + [v if v.dim() == 3 else v.unsqueeze(1) for v in pooled]
            x_BVD = torch.cat(first, dim=1)
            products_BVV = torch.bmm(x_BVD, x_BVD.transpose(1, 2))
            x_BW = torch.cat([x_BW, products_BVV.flatten(1).index_select(1, self._pairs)], dim=1)
        else:
            x_BW = torch.cat([x_BW, *(vector.flatten(1) for vector in pooled)], dim=1)
        first_BW = x_BW
        for w, v, bias in self._cross:
            x_BW = torch.addcmul(x_BW, first_BW, F.linear(F.linear(x_BW, v), w, bias))
        x_BW = _mlp(x_BW, self._hidden)
        weight, bias = self._last
        return F.linear(x_BW.float(), weight, bias).squeeze(1).sigmoid()


def _mlp(x_BW: Tensor, layers: list[list[Tensor]]) -> Tensor:
    for weight, bias in layers:
        x_BW = F.linear(x_BW, weight, bias).relu_()
    return x_BW


class PlainModel(nn.Module):
    """The whole model. All bags go through one call where the tables lie in one matrix, which is faster than 26."""

    def __init__(self, bundle: Bundle, tables: MappedTables, dtype: torch.dtype) -> None:
        super().__init__()
        config = bundle.config
        self.dense = DenseModel(bundle, dtype)
        self._tables = tables
        self._factors = config.pooling_factors
        self._features = len(config.features)
        self._one_hot = self._factors is not None and set(self._factors) == {1} and not config.weighted
        starts = starts_of(config)
        self._one_matrix = starts is not None
        self._starts_F = torch.tensor(starts or [], dtype=torch.int64)
        self._mean = [slot.mean for slot in tables.slots]
        self._mean_F = torch.tensor(self._mean)

    def forward(
        self, matrices: list[Tensor], dense: Tensor, ids: Tensor, offsets: Tensor, weights: Tensor | None
    ) -> Tensor:
        """Probabilities [B]. `matrices` of the tables are inputs, so that no compiler takes them for constants."""
        if self._one_matrix:
            pooled = [self._pool_at_once(matrices[0], ids, offsets, weights)]
        else:
            pooled = self._pool_one_by_one(ids, offsets, weights)
        probabilities: Tensor = self.dense(dense, pooled)
        return probabilities

    def _pool_at_once(self, matrix: Tensor, ids: Tensor, offsets: Tensor, weights: Tensor | None) -> Tensor:
        """[B, F, D]."""
        count, starts_F = self._features, self._starts_F
        if self._factors is not None and len(set(self._factors)) == 1:
            rows_N = (ids.view(count, -1) + starts_F[:, None]).view(-1)
        else:
            ends_F = offsets[:: (offsets.shape[0] - 1) // count]
            rows_N = ids + starts_F.repeat_interleave(ends_F.diff(), output_size=ids.shape[0])
        if self._one_hot:
            pooled = matrix.index_select(0, rows_N)
        else:
            pooled = F.embedding_bag(
                rows_N, matrix, offsets, mode="sum", include_last_offset=True, per_sample_weights=weights
            )
            if any(self._mean):
                lengths_FB = offsets.diff().view(count, -1).clamp(min=1)
                divisors_FB = torch.where(self._mean_F[:, None], lengths_FB, 1)
                pooled = pooled / divisors_FB.view(-1, 1)
        return pooled.view(count, -1, matrix.shape[1]).transpose(0, 1)

    def _pool_one_by_one(self, ids: Tensor, offsets: Tensor, weights: Tensor | None) -> list[Tensor]:
        """[B, D] of each feature."""
        B = (offsets.shape[0] - 1) // self._features
        ends = offsets[::B].tolist() if B else [0] * (self._features + 1)
        pooled = []
        for slot, start, end in zip(self._tables.slots, ends, ends[1:], strict=False):
            bags_B = offsets[slot.feature * B : (slot.feature + 1) * B + 1] - start
            pooled.append(
                F.embedding_bag(
                    ids[start:end],
                    slot.table,
                    bags_B,
                    mode="mean" if slot.mean else "sum",
                    include_last_offset=True,
                    per_sample_weights=None if weights is None else weights[start:end],
                )
            )
        return pooled
