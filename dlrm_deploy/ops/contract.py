"""What a call of `TableBatchedEmbeddingBag` must keep to, for NumPy arrays and PyTorch tensors alike.

Both references and, in C++, the kernel make these checks before anything is read: docs/operators.md, Errors.
Ids are checked where rows are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dlrm_deploy.config import INDEX_POLICIES, ModelConfig
from dlrm_deploy.errors import BatchError
from dlrm_deploy.tables import DIVISIONS, MAX_IDS, TableGroup, TablePart

_MOST = (1 << 63) - 1  # of an ONNX attribute
_LIMITS = (("mean", 0, 1), ("ids", 1, MAX_IDS), ("moduli", 0, _MOST), ("divisors", 1, _MOST), ("divisions", 0, 2))

SCHEMA_FIELDS = (
    "num_features", "features", "row_starts", "rows", "ids", "moduli", "divisors", "divisions", "mean",
    "pooling_factors", "index_policy",
)  # fmt: skip
"""Fields that the PyTorch op takes, in the order of its schema."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BagAttributes:
    """The attributes of one node, as docs/operators.md names them. F features, T slots.

    `ids`, `moduli`, `divisors` and `divisions` may be left out, or empty: then an id is the number of its row.
    """

    num_features: int
    features: tuple[int, ...]
    """[T] feature that each slot pools."""

    row_starts: tuple[int, ...]
    """[T] first row of each slot's table part in the group's matrix."""

    rows: tuple[int, ...]
    """[T] rows of each slot's table part."""

    ids: tuple[int, ...] = ()
    """[T] ids in [0, ids) are valid. Left out: `rows`."""

    moduli: tuple[int, ...] = ()
    """[T] ids are taken modulo this first, unless it is 0. Left out: 0."""

    divisors: tuple[int, ...] = ()
    """[T] what a valid id is divided by. Left out: 1."""

    divisions: tuple[int, ...] = ()
    """[T] arithmetic of the quotient, a position in `dlrm_deploy.tables.DIVISIONS`. Left out: 0, exact."""

    mean: tuple[int, ...]
    """[T] 0: sum, 1: mean."""

    pooling_factors: tuple[int, ...] | None
    """[F] ids per bag, in the fixed form; None for the CSR form."""

    index_policy: str
    feature_names: tuple[str, ...] = ()
    """[F] for error messages, or empty."""

    weighted: bool = False
    """Whether the node has per-sample weights."""

    def __post_init__(self) -> None:
        slots = len(self.features)
        defaults = {"ids": self.rows, "moduli": (0,) * slots, "divisors": (1,) * slots, "divisions": (0,) * slots}
        for name in ("features", "row_starts", "rows", "ids", "moduli", "divisors", "divisions", "mean"):
            object.__setattr__(self, name, tuple(getattr(self, name) or defaults.get(name, ())))
        if self.pooling_factors is not None:
            object.__setattr__(self, "pooling_factors", tuple(self.pooling_factors))

    @classmethod
    def of(cls, config: ModelConfig, group: TableGroup) -> BagAttributes:
        """The attributes of the node that pools a table group of a model."""
        features = [config.features[slot.feature] for slot in group.slots]
        parts = [slot.part for slot in group.slots]
        return cls(
            num_features=len(config.features),
            features=tuple(slot.feature for slot in group.slots),
            row_starts=tuple(slot.row_start for slot in group.slots),
            rows=tuple(part.rows for part in parts),
            ids=tuple(part.ids for part in parts),
            moduli=tuple(feature.modulo or 0 for feature in features),
            divisors=tuple(part.divisor for part in parts),
            divisions=tuple(DIVISIONS.index(part.division) for part in parts),
            mean=tuple(int(feature.pooling == "mean") for feature in features),
            pooling_factors=config.pooling_factors,
            index_policy=config.index_policy,
            feature_names=tuple(feature.name for feature in config.features),
            weighted=config.weighted,
        )

    @classmethod
    def of_ids(cls, config: ModelConfig, feature: int, part: TablePart, row_start: int) -> BagAttributes:
        """The attributes of a node that looks up the ids of one feature one by one, each as a bag of its own.

        Its batch holds that feature alone, and a sample of it is an id: so errors number ids, not samples.
        """
        return cls(
            num_features=1,
            features=(0,),
            row_starts=(row_start,),
            rows=(part.rows,),
            ids=(part.ids,),
            moduli=(config.features[feature].modulo or 0,),
            divisors=(part.divisor,),
            divisions=(DIVISIONS.index(part.division),),
            mean=(0,),
            pooling_factors=(1,),
            index_policy=config.index_policy,
            feature_names=(config.features[feature].name,),
        )

    @property
    def plain(self) -> bool:
        """Whether an id is the number of its row, in every slot."""
        others = any(self.moduli) or any(self.divisions) or any(divisor != 1 for divisor in self.divisors)
        return self.ids == self.rows and not others

    def node_attributes(self) -> dict[str, object]:
        """As they stand on the ONNX node; what is left to its default is not among them."""
        attributes: dict[str, object] = {
            "num_features": self.num_features,
            "features": self.features,
            "row_starts": self.row_starts,
            "rows": self.rows,
            "mean": self.mean,
            "index_policy": self.index_policy,
        }
        if self.feature_names:
            attributes["feature_names"] = "\n".join(self.feature_names)
        if self.pooling_factors is not None:
            attributes["pooling_factors"] = self.pooling_factors
        if self.ids != self.rows:
            attributes["ids"] = self.ids
        if any(self.moduli):
            attributes["moduli"] = self.moduli
        if any(divisor != 1 for divisor in self.divisors):
            attributes["divisors"] = self.divisors
        if any(self.divisions):
            attributes["divisions"] = self.divisions
        return attributes

    def inputs(self) -> list[str]:
        """Input names of the ONNX node; an absent optional input is ""."""
        names = ["weights", "indices", "offsets" if self.pooling_factors is None else ""]
        if self.weighted:
            names.append("per_sample_weights")
        return names if names[-1] else names[:-1]

    def schema_values(self) -> tuple[Any, ...]:
        """In the order of the PyTorch op's schema, where they follow the four tensors."""
        return tuple(getattr(self, name) for name in SCHEMA_FIELDS)

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
        slots = len(self.features)
        if slots == 0:
            raise BatchError("features is empty, at least one slot is needed.")
        for name in ("row_starts", "rows", "mean", "ids", "moduli", "divisors", "divisions"):
            values = len(getattr(self, name))
            if values != slots:
                raise BatchError(f"{name} has {values} values, expected one per slot: {slots}.")
        for t, (feature, start, count) in enumerate(zip(self.features, self.row_starts, self.rows, strict=True)):
            if not 0 <= feature < self.num_features:
                raise BatchError(f"slot {t}: feature {feature} is outside [0, {self.num_features}).")
            if start < 0 or count < 1 or start + count > group_rows:
                raise BatchError(
                    f"slot {t}: rows {start} to {start + count} are not within the {group_rows} rows of weights."
                )
        for name, least, most in _LIMITS:
            numbers = getattr(self, name)
            if min(numbers) < least or max(numbers) > most:
                t = next(t for t, number in enumerate(numbers) if not least <= number <= most)
                raise BatchError(f"slot {t}: {name} must be in [{least}, {most}], got {numbers[t]}.")
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
