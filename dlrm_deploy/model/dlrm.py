"""The DLRM (arXiv 1906.00091) in plain PyTorch: the model that is trained, and the float32 reference of every engine.

Main path: `forward` -> `pool` (embedding bags) -> `score` (bottom MLP, interaction, top MLP). The two steps are
separate so that tables and MLPs may live in different places.

In inference `pool` and `score` call the operators' implementation directly; with gradients, and under `torch.export`
and `torch.compile`, they go through the custom ops. Both are the same functions, see `dlrm_deploy.ops.torch_ops`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dlrm_deploy.batch import Batch
from dlrm_deploy.config import LOG_SHIFTS, ModelConfig
from dlrm_deploy.errors import BatchError, ConfigError
from dlrm_deploy.formats import GroupLayout, RowFormat, stored_columns
from dlrm_deploy.model.initial import initial_dense, initial_part
from dlrm_deploy.model.keys import (
    DENSE_VECTORS,
    WIDE_BIAS,
    WIDE_DENSE,
    bottom_keys,
    branch_keys,
    cross_keys,
    dense_shapes,
    table_key,
    top_keys,
)
from dlrm_deploy.model.layers import Layer
from dlrm_deploy.model.vectors import Run, path_features, runs, wide_places
from dlrm_deploy.ops import torch_ops
from dlrm_deploy.ops.contract import BagAttributes

StoredGroup = Mapping[RowFormat, Tensor]
"""The stored matrices of a table group by their format, those of bf16 as bfloat16."""


class DLRM(nn.Module):
    """A DLRM with one parameter [R, D] per table group, and every other weight under its checkpoint key.

    Suffixes: B batch, D dense features, T slots of a group, N ids, V vectors, W width of a vector.
    """

    def __init__(
        self,
        config: ModelConfig,
        group_weights: Sequence[Tensor] | None = None,
        *,
        seed: int = 0,
        stored: Sequence[StoredGroup] | None = None,
        table_formats: Mapping[str, RowFormat] | None = None,
        layer: Layer = F.linear,
    ) -> None:
        """Build the model, with random weights drawn from `seed` (`dlrm_deploy.model.initial`).

        Args:
            config: the architecture.
            group_weights: the matrix [rows, width] float32 of each of `config.groups`; used as it is, without a copy.
                Left out, tables are drawn.
            seed: of all random weights.
            stored: instead of `group_weights`, the stored matrices of each of `config.groups`; for inference only.
            table_formats: row format of each table part in `stored` that is not fp32.
            layer: what every layer of the MLPs computes, before its ReLU.

        Raises:
            ConfigError: `group_weights` or `stored` do not match the config.
        """
        super().__init__()
        self.config = config
        self.layer = layer
        self._groups = config.groups
        generator = torch.Generator().manual_seed(seed)
        self._stored = None if stored is None else list(stored)
        if self._stored is not None:
            self._check_stored(self._stored, table_formats)
            group_weights = []
        elif group_weights is None:
            group_weights = [torch.empty(group.rows, group.width) for group in self._groups]
            for group, weights in zip(self._groups, group_weights, strict=True):
                for part in group.parts:
                    initial_part(config, part, weights[group.rows_of(part.name)], generator)
        seen = [(tuple(weights.shape), weights.dtype) for weights in group_weights]
        expected = [((group.rows, group.width), torch.float32) for group in self._groups]
        if stored is None and seen != expected:
            raise ConfigError(f"group_weights must be {expected}, got {seen}.")
        self.group_weights = nn.ParameterList(nn.Parameter(weights) for weights in group_weights)
        self._keys = tuple(dense_shapes(config))
        for key, shape in dense_shapes(config).items():
            self.register_parameter(_attribute(key), nn.Parameter(initial_dense(key, shape, generator)))
        self._runs = runs(config)
        # A group may have no bags to pool: those of path tables are looked up one id at a time.
        self._fixed = [
            BagAttributes.of(config, group, table_formats) if group.slots else None for group in self._groups
        ]
        self._csr = [attributes and replace(attributes, pooling_factors=None) for attributes in self._fixed]
        self._bottom, self._branches = bottom_keys(config), branch_keys(config)
        self._cross, self._top = cross_keys(config), top_keys(config)
        self._wide = wide_places(config) if config.wide else None
        self._paths = [_Path(config, feature, table_formats) for feature, _ in path_features(config)]

    def _check_stored(self, stored: Sequence[StoredGroup], table_formats: Mapping[str, RowFormat] | None) -> None:
        seen = [{kind: tuple(matrix.shape) for kind, matrix in matrices.items()} for matrices in stored]
        expected = [
            {
                m.format: (m.rows, stored_columns(m.format, group.width))
                for m in GroupLayout.of(group, table_formats).matrices
            }
            for group in self._groups
        ]
        if seen != expected:
            raise ConfigError(f"stored must be matrices of shapes {expected}, got {seen}.")

    @property
    def _matrices(self) -> Sequence[Tensor | StoredGroup]:
        """What each group's bags are pooled from."""
        return list(self.group_weights) if self._stored is None else self._stored

    def weight(self, key: str) -> Tensor:
        """A weight of `dlrm_deploy.model.keys.dense_shapes`."""
        weight = self._parameters[_attribute(key)]
        assert weight is not None  # all were registered with a value
        return weight

    def named_tensors(self) -> dict[str, Tensor]:
        """Every weight under its checkpoint key; table parts are row views of their group's matrix.

        Without the tables where those are `stored`.
        """
        tensors = {}
        for group, weights in zip(self._groups if self._stored is None else (), self.group_weights, strict=True):
            for part in group.parts:
                tensors[table_key(part.name)] = weights.detach()[group.rows_of(part.name)]
        tensors.update((key, self.weight(key).detach()) for key in self._keys)
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
        """The pooled embeddings: [B, T, W] of each table group, then [B, 1, W] of each feature of a path table."""
        pooled = []
        every, matrices = self._fixed if offsets is None else self._csr, self._matrices
        for group, matrix, attributes in zip(self._groups, matrices, every, strict=True):
            if attributes is None:
                pooled.append(torch.zeros(_batch_size(self.config, indices, offsets), 0, group.width))
            else:
                pooled.append(_pool(matrix, indices, offsets, weights, attributes))
        pooled += [path.pool(matrices, indices, offsets, weights) for path in self._paths]
        return pooled

    def score(self, dense: Tensor, pooled: Sequence[Tensor]) -> Tensor:
        """Logits [B] from dense values [B, D] and what `pool` gives."""
        config = self.config
        if config.dense_transform != "none":
            dense = torch.log(torch.clamp(dense + LOG_SHIFTS[config.dense_transform], min=1))
        x_BW = self._mlp(dense, self._bottom)
        x_BW = self._interact(x_BW, [self._combine(run, pooled) for run in self._runs])
        if self._top:
            *hidden, last = self._top
            x_BW = self._linear(self._mlp(x_BW, hidden), *last)
        if self._wide:
            group, first = self._wide
            x_BW = x_BW + pooled[group][:, first : first + len(config.features)].sum(1)
            if config.dense_features:
                x_BW = x_BW + F.linear(dense, self.weight(WIDE_DENSE))
            x_BW = x_BW + self.weight(WIDE_BIAS)
        return x_BW.squeeze(1)

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

    def _mlp(self, x_BW: Tensor, layers: Sequence[tuple[str, str]]) -> Tensor:
        """Linear layers, each with ReLU behind it."""
        for weight, bias in layers:
            x_BW = self._linear(x_BW, weight, bias).relu_()
        return x_BW

    def _linear(self, x_BW: Tensor, weight: str, bias: str) -> Tensor:
        """A layer of an MLP, weights by their keys."""
        return self.layer(x_BW, self.weight(weight), self.weight(bias))

    def _combine(self, run: Run, pooled: Sequence[Tensor]) -> Tensor:
        """The vectors [B, count, W] of a run."""
        parts = [pooled[output][:, slot : slot + run.count] for output, slot in run.parts]
        if run.combine == "concat":
            x_BVW = torch.cat(parts, dim=2)
        else:
            x_BVW = parts[0]
            for part in parts[1:]:
                x_BVW = x_BVW * part if run.combine == "multiply" else x_BVW + part
        return x_BVW if run.projection is None else F.linear(x_BVW, self.weight(run.projection))

    def _interact(self, dense_BW: Tensor, vectors: Sequence[Tensor]) -> Tensor:
        config = self.config
        if config.interaction in ("dot", "fm"):
            return self._dot(dense_BW, vectors)
        flat_BW = torch.cat([dense_BW, *(run.flatten(1) for run in vectors)], dim=1)
        if config.interaction == "concat":
            return flat_BW
        if config.interaction == "projection":
            B, W = dense_BW.shape
            one, two = (self._mlp(flat_BW, keys) for keys in self._branches)
            products = torch.bmm(one.view(B, -1, W), two.view(B, W, -1)) if B else one.new_zeros(0, 0)
            return torch.cat([dense_BW, products.reshape(B, config.interaction_width - W)], dim=1)
        x_BW = flat_BW
        for *kernels, bias in self._cross:
            if config.interaction == "dcn":
                w, v = kernels
                product = F.linear(F.linear(x_BW, self.weight(v)), self.weight(w), self.weight(bias))
                x_BW = torch.addcmul(x_BW, flat_BW, product)
            else:
                product = F.linear(x_BW, self.weight(kernels[0]))
                x_BW = torch.addcmul(x_BW + self.weight(bias), flat_BW, product)
        return x_BW

    def _dot(self, dense_BW: Tensor, vectors: Sequence[Tensor]) -> Tensor:
        """Interaction dot, and fm, which is the sum of its products."""
        config = self.config
        x_BVW = vectors[0] if len(vectors) == 1 else torch.cat(list(vectors), dim=1)
        first_BW = dense_BW
        if not config.has_dense_vector:
            if config.dense_features:  # each scales a vector of its own
                x_BVW = torch.cat([dense_BW[:, :, None] * self.weight(DENSE_VECTORS), x_BVW], dim=1)
            first_BW, x_BVW = x_BVW[:, 0], x_BVW[:, 1:]
        interact = torch_ops.dot_interaction if _as_nodes() else torch_ops.interact
        interactions: Tensor = interact(first_BW, x_BVW, config.self_interaction)
        if config.interaction == "fm":
            return interactions[:, first_BW.shape[1] :].sum(1, keepdim=True)
        return interactions if config.has_dense_vector else interactions[:, first_BW.shape[1] :]


class _Path:
    """One feature of a path table: each id is looked up by itself, and goes through the MLPs that it chooses."""

    def __init__(self, config: ModelConfig, feature: int, table_formats: Mapping[str, RowFormat] | None) -> None:
        table = config.table(config.features[feature].table)
        self._config = config
        self._feature = feature
        self._hidden, self._width = table.path_hidden, table.width
        self._parts = []
        for part in table.parts:
            g, group = next((g, group) for g, group in enumerate(config.groups) if part in group.parts)
            kind, start = GroupLayout.of(group, table_formats).place(part.name)
            self._parts.append((g, BagAttributes.of_ids(config, feature, part, start, kind)))

    def pool(
        self, matrices: Sequence[Tensor | StoredGroup], indices: Tensor, offsets: Tensor | None, weights: Tensor | None
    ) -> Tensor:
        """[B, 1, W]."""
        B, f = _batch_size(self._config, indices, offsets), self._feature
        if offsets is None:
            factors = self._config.pooling_factors or ()
            bounds_B = B * sum(factors[:f]) + torch.arange(B + 1) * factors[f]
        else:
            bounds_B = offsets[f * B : (f + 1) * B + 1].long()
        ids = slice(int(bounds_B[0]), int(bounds_B[-1]))
        rows = [_pool(matrices[g], indices[ids], None, None, attributes)[:, 0] for g, attributes in self._parts]
        x_NW = rows[0]
        h, W = self._hidden, self._width
        for bank in rows[1:]:
            w1, b1, w2, b2 = torch.split(bank, [h * W, h, W * h, W], dim=1)
            hidden_N1h = torch.baddbmm(b1[:, None], x_NW[:, None], w1.view(-1, h, W).transpose(1, 2)).relu()
            x_NW = torch.baddbmm(b2[:, None], hidden_N1h, w2.view(-1, W, h).transpose(1, 2))[:, 0]
        if weights is not None:
            x_NW = x_NW * weights[ids, None]
        lengths_B = bounds_B.diff()
        bag_N = torch.arange(B).repeat_interleave(lengths_B)
        pooled_BW = x_NW.new_zeros(B, W).index_add(0, bag_N, x_NW)
        if self._config.features[f].pooling == "mean":
            pooled_BW = pooled_BW / lengths_B.clamp(min=1)[:, None]
        return pooled_BW[:, None]


def _pool(
    matrix: Tensor | StoredGroup,
    indices: Tensor,
    offsets: Tensor | None,
    weights: Tensor | None,
    attributes: BagAttributes,
) -> Tensor:
    if isinstance(matrix, Tensor) and _as_nodes():
        pooled: Tensor = torch_ops.table_batched_embedding_bag(
            matrix, indices, offsets, weights, *attributes.schema_values()
        )
        return pooled
    return torch_ops.pool_bags(matrix, indices, offsets, weights, attributes)


def _batch_size(config: ModelConfig, indices: Tensor, offsets: Tensor | None) -> int:
    if offsets is None:
        return len(indices) // sum(config.pooling_factors or (1,))
    return (len(offsets) - 1) // len(config.features)


def _as_nodes() -> bool:
    return torch.compiler.is_compiling() or torch.is_grad_enabled()


def _attribute(key: str) -> str:
    """A parameter's name in the module: names of modules cannot hold dots."""
    return key.replace(".", "/")
