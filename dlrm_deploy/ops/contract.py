"""What a call of `TableBatchedEmbeddingBag` must keep to, for NumPy arrays and PyTorch tensors alike.

Both references and, in C++, the kernel make these checks before anything is read: docs/operators.md, Errors.
Ids are checked where rows are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from dlrm_deploy.config import INDEX_POLICIES
from dlrm_deploy.errors import BatchError


class BagAttributes(NamedTuple):
    """The attributes of one node, in the order of the PyTorch op's schema. F features, T slots."""

    num_features: int
    features: Sequence[int]
    """[T] feature that each slot pools."""

    row_starts: Sequence[int]
    """[T] first row of each slot's table in the group's matrix."""

    rows: Sequence[int]
    """[T] rows of each slot's table."""

    mean: Sequence[int]
    """[T] 0: sum, 1: mean."""

    pooling_factors: Sequence[int] | None
    """[F] ids per bag, in the fixed form."""

    index_policy: str

    def check(self, weights: Any, indices: Any, offsets: Any, per_sample_weights: Any) -> None:
        """See that attributes and inputs, arrays or tensors, make up a valid call.

        Raises:
            BatchError: they do not.
        """
        check_array("weights", weights, 2, "float32")
        check_array("indices", indices, 1, "int32", "int64")
        self._check_slots(len(weights))
        if (offsets is None) == (self.pooling_factors is None):
            raise BatchError("give either offsets or pooling_factors.")
        ids = len(indices)
        if self.pooling_factors is not None:
            self._check_factors(self.pooling_factors, ids)
        else:
            check_array("offsets", offsets, 1, _dtype(indices))
            if len(offsets) == 0 or (len(offsets) - 1) % self.num_features:
                raise BatchError(f"offsets must have {self.num_features} * B + 1 values, got {len(offsets)}.")
            if offsets[0] != 0 or offsets[-1] != ids or (offsets[1:] < offsets[:-1]).any():
                raise BatchError(f"offsets must rise from 0 to {ids}.")
        if per_sample_weights is not None:
            check_array("per_sample_weights", per_sample_weights, 1, "float32")
            if len(per_sample_weights) != ids:
                raise BatchError(f"per_sample_weights has {len(per_sample_weights)} values for {ids} ids.")
            if any(self.mean):
                raise BatchError("per_sample_weights go with sum pooling, but a slot has mean = 1.")

    def _check_slots(self, group_rows: int) -> None:
        if self.num_features < 1:
            raise BatchError(f"num_features must be at least 1, got {self.num_features}.")
        lengths = [len(values) for values in (self.features, self.row_starts, self.rows, self.mean)]
        if lengths[0] == 0 or len(set(lengths)) > 1:
            raise BatchError(
                "features, row_starts, rows and mean need one value per slot, and at least one slot, got "
                f"{', '.join(map(str, lengths[:3]))} and {lengths[3]}."
            )
        for t, (feature, start, count, flag) in enumerate(
            zip(self.features, self.row_starts, self.rows, self.mean, strict=True)
        ):
            if not 0 <= feature < self.num_features:
                raise BatchError(f"slot {t}: feature {feature} is outside [0, {self.num_features}).")
            if start < 0 or count < 1 or start + count > group_rows:
                raise BatchError(
                    f"slot {t}: rows {start} to {start + count} are not within the {group_rows} rows of weights."
                )
            if flag not in (0, 1):
                raise BatchError(f"slot {t}: mean must be 0 or 1, got {flag}.")
        if self.index_policy not in INDEX_POLICIES:
            raise BatchError(f"index_policy must be one of {', '.join(INDEX_POLICIES)}, got {self.index_policy!r}.")

    def _check_factors(self, factors: Sequence[int], ids: int) -> None:
        if len(factors) != self.num_features or min(factors) < 0 or sum(factors) < 1:
            raise BatchError(
                f"pooling_factors must be {self.num_features} numbers of ids, not all zero, got {list(factors)}."
            )
        if ids % sum(factors):
            raise BatchError(f"{ids} ids are not a multiple of {sum(factors)}, the sum of the pooling factors.")


def check_interaction(dense: Any, embeddings: Any) -> None:
    """See that dense [B, D] and embeddings [B, T, D], arrays or tensors, go together.

    Raises:
        BatchError: a wrong type or rank, or widths or batch sizes that differ.
    """
    check_array("dense", dense, 2, "float32")
    check_array("embeddings", embeddings, 3, "float32")
    if (len(dense), dense.shape[1]) != (len(embeddings), embeddings.shape[2]):
        raise BatchError(
            f"dense [B, D] and embeddings [B, T, D] do not match: {tuple(dense.shape)} and {tuple(embeddings.shape)}."
        )


def check_array(name: str, value: Any, rank: int, *dtypes: str) -> None:
    """See that `value` is an array or tensor of that rank, and of one of those types."""
    dtype = _dtype(value)
    if dtype not in dtypes or value.ndim != rank:
        seen = f"{dtype} {tuple(value.shape)}" if hasattr(value, "shape") else dtype
        raise BatchError(f"{name} must be {' or '.join(dtypes)} of rank {rank}, got {seen}.")


def _dtype(value: Any) -> str:
    return str(getattr(value, "dtype", type(value).__name__)).removeprefix("torch.")
