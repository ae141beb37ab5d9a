"""The DLRM (arXiv 1906.00091) in plain PyTorch: the model that is trained, and the float32 reference of every engine.

Main path: `forward` -> `pool` (embedding bags) and bottom MLP -> `score` (interaction, top MLP). The two steps are
separate so that tables and MLPs may live in different places.

In inference `pool` and `score` call the operators' implementation directly; with gradients, and under `torch.export`
and `torch.compile`, they go through the custom ops. Both are the same functions, see `dlrm_deploy.ops.torch_ops`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dlrm_deploy.batch import Batch
from dlrm_deploy.config import ModelConfig, TableGroup
from dlrm_deploy.errors import BatchError, ConfigError
from dlrm_deploy.model.keys import bottom_keys, cross_keys, dense_shapes, table_key, top_keys
from dlrm_deploy.ops import torch_ops
from dlrm_deploy.ops.contract import BagAttributes

_INIT_ROWS = 1 << 16


class DLRM(nn.Module):
    """A DLRM with one parameter [R, D] per table group.

    Suffixes: B batch, D dense features, T slots of a group, W width of a vector.
    """

    def __init__(self, config: ModelConfig, group_weights: Sequence[Tensor] | None = None, *, seed: int = 0) -> None:
        """Build the model, with random weights drawn from `seed`.

        Args:
            config: the architecture.
            group_weights: the matrix [rows, width] float32 of each of `config.groups`; used as it is, without a copy.
                Left out, tables are drawn from uniform(-1/sqrt(rows), 1/sqrt(rows)).
            seed: of all random weights.

        Raises:
            ConfigError: `group_weights` do not match the config.
        """
        super().__init__()
        self.config = config
        self._groups = config.groups
        generator = torch.Generator().manual_seed(seed)
        if group_weights is None:
            group_weights = [torch.empty(group.rows, group.width) for group in self._groups]
            for group, weights in zip(self._groups, group_weights, strict=True):
                for table in group.tables:
                    _init_table(weights[group.rows_of(table.name)], generator)
        seen = [(tuple(weights.shape), weights.dtype) for weights in group_weights]
        expected = [((group.rows, group.width), torch.float32) for group in self._groups]
        if seen != expected:
            raise ConfigError(f"group_weights must be {expected}, got {seen}.")
        self.group_weights = nn.ParameterList(nn.Parameter(weights) for weights in group_weights)
        shapes = dense_shapes(config)
        self.bottom = nn.ModuleList(_linear(shapes[weight], generator) for weight, _ in bottom_keys(config))
        self.cross = nn.ModuleList(_CrossLayer(shapes[w], generator) for w, _, _ in cross_keys(config))
        self.top = nn.ModuleList(_linear(shapes[weight], generator) for weight, _ in top_keys(config))
        self._csr = [_attributes(config, group, None) for group in self._groups]
        self._fixed = [_attributes(config, group, config.pooling_factors) for group in self._groups]

    def named_tensors(self) -> dict[str, Tensor]:
        """Every weight under its checkpoint key; tables are row views of their group's matrix."""
        tensors = {}
        for group, weights in zip(self._groups, self.group_weights, strict=True):
            for table in group.tables:
                tensors[table_key(table.name)] = weights.detach()[group.rows_of(table.name)]
        layers: Iterable[tuple[nn.Module, tuple[str, ...]]] = [
            *zip(self.bottom, bottom_keys(self.config), strict=True),
            *zip(self.cross, cross_keys(self.config), strict=True),
            *zip(self.top, top_keys(self.config), strict=True),
        ]
        for layer, keys in layers:
            tensors.update((key, weight.detach()) for key, weight in zip(keys, layer.parameters(), strict=True))
        return tensors

    def forward(
        self, dense: Tensor, indices: Tensor, offsets: Tensor | None = None, weights: Tensor | None = None
    ) -> Tensor:
        """Logits [B].

        Args:
            dense: [B, D] float32.
            indices: [N] int32 or int64, feature-major.
            offsets: [F * B + 1]; may be left out where every feature has a pooling factor.
            weights: [N] float32, for a weighted model.
        """
        return self.score(dense, self.pool(indices, offsets, weights))

    def pool(self, indices: Tensor, offsets: Tensor | None = None, weights: Tensor | None = None) -> list[Tensor]:
        """The pooled embeddings [B, T, W] of each group."""
        groups = list(zip(self.group_weights, self._fixed if offsets is None else self._csr, strict=True))
        if _as_nodes():
            node = torch_ops.table_batched_embedding_bag
            return [node(matrix, indices, offsets, weights, *attributes) for matrix, attributes in groups]
        return [torch_ops.pool_bags(matrix, indices, offsets, weights, attributes) for matrix, attributes in groups]

    def score(self, dense: Tensor, pooled: Sequence[Tensor]) -> Tensor:
        """Logits [B] from dense values [B, D] and the pooled embeddings of each group."""
        x_BW = dense
        for layer in self.bottom:
            x_BW = layer(x_BW).relu_()
        x_BW = self._interact(x_BW, pooled)
        *hidden, last = self.top
        for layer in hidden:
            x_BW = layer(x_BW).relu_()
        logits: Tensor = last(x_BW).squeeze(1)
        return logits

    def predict(self, batch: Batch) -> npt.NDArray[np.float32]:
        """Probabilities [B] float32.

        Raises:
            BatchError: the batch does not fit the model, or holds ids outside a table under policy `error`.
        """
        batch.check_fits(self.config)
        arrays = (batch.dense, batch.indices, batch.offsets, batch.weights)
        tensors = [None if array is None else torch.from_numpy(array) for array in arrays]
        with torch.inference_mode():
            try:
                logits: Tensor = self(*tensors)
            except BatchError as err:  # the operator knows no names
                raise BatchError(batch.explain_bad_ids(self.config) or str(err)) from err
            probabilities: npt.NDArray[np.float32] = logits.sigmoid().numpy()
        return probabilities

    def _interact(self, dense_BW: Tensor, pooled: Sequence[Tensor]) -> Tensor:
        if self.config.interaction == "dot":
            (embeddings_BTW,) = pooled  # the dot interaction needs one width, so there is one group
            interact = torch_ops.dot_interaction if _as_nodes() else torch_ops.interact
            interactions: Tensor = interact(dense_BW, embeddings_BTW, self.config.self_interaction)
            return interactions
        x_BW = torch.cat([dense_BW, *self._in_feature_order(pooled)], dim=1)
        if self.config.interaction == "dcn":
            first_BW = x_BW
            for layer in self.cross:
                x_BW = layer(first_BW, x_BW)
        return x_BW

    def _in_feature_order(self, pooled: Sequence[Tensor]) -> list[Tensor]:
        """Flat vectors side by side: [B, T * W] of the only group, or [B, W] of each feature."""
        if len(pooled) == 1:
            return [pooled[0].flatten(1)]
        vectors: dict[int, Tensor] = {}
        for group, embeddings_BTW in zip(self._groups, pooled, strict=True):
            vectors.update(zip(group.slots, embeddings_BTW.unbind(1), strict=True))
        return [vectors[slot] for slot in sorted(vectors)]


def _attributes(config: ModelConfig, group: TableGroup, pooling_factors: tuple[int, ...] | None) -> BagAttributes:
    """The operator's attributes for one table group."""
    features = [config.features[slot] for slot in group.slots]
    return BagAttributes(
        num_features=len(config.features),
        features=group.slots,
        row_starts=tuple(group.rows_of(feature.table).start for feature in features),
        rows=tuple(config.table(feature.table).rows for feature in features),
        mean=tuple(int(feature.pooling == "mean") for feature in features),
        pooling_factors=pooling_factors,
        index_policy=config.index_policy,
    )


def _as_nodes() -> bool:
    return torch.compiler.is_compiling() or torch.is_grad_enabled()


def _init_table(weights: Tensor, generator: torch.Generator) -> None:
    """uniform(-1/sqrt(rows), 1/sqrt(rows)), a block of rows at a time so that no second table is made."""
    bound = 1 / math.sqrt(len(weights))
    for start in range(0, len(weights), _INIT_ROWS):
        weights[start : start + _INIT_ROWS].uniform_(-bound, bound, generator=generator)


def _linear(shape: tuple[int, ...], generator: torch.Generator) -> nn.Linear:
    """[out, in] from a normal distribution of variance 2 / (in + out), biases 1 / out: as in the paper's code."""
    out, width = shape
    layer = nn.Linear(width, out, device="meta").to_empty(device="cpu")  # without a first initialisation
    layer.weight.data.normal_(std=math.sqrt(2 / (width + out)), generator=generator)
    layer.bias.data.normal_(std=math.sqrt(1 / out), generator=generator)
    return layer


class _CrossLayer(nn.Module):
    """One layer of TorchRec's LowRankCrossNet: x_0 * (W V x + b) + x."""

    def __init__(self, shape: tuple[int, ...], generator: torch.Generator) -> None:
        super().__init__()
        width, rank = shape
        std = math.sqrt(2 / (width + rank))
        self.W = nn.Parameter(torch.randn(width, rank, generator=generator) * std)
        self.V = nn.Parameter(torch.randn(rank, width, generator=generator) * std)
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, first_BW: Tensor, x_BW: Tensor) -> Tensor:
        return torch.addcmul(x_BW, first_BW, F.linear(F.linear(x_BW, self.V), self.W, self.bias))
