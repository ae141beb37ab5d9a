"""What a call of an operator must keep to, for NumPy arrays and PyTorch tensors alike.

Both references and, in C++, the kernels make these checks before anything is read: docs/operators.md, Errors.
Ids are checked where rows are read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dlrm_deploy.config import INDEX_POLICIES, ModelConfig
from dlrm_deploy.errors import BatchError
from dlrm_deploy.formats import ROW_FORMATS, GroupLayout, RowFormat, stored_columns
from dlrm_deploy.int8_codes import MOST_INPUTS
from dlrm_deploy.tables import DIVISIONS, MAX_IDS, TableGroup, TablePart

_MOST = (1 << 63) - 1  # of an ONNX attribute
_LIMITS = (("mean", 0, 1), ("ids", 1, MAX_IDS), ("moduli", 0, _MOST), ("divisors", 1, _MOST), ("divisions", 0, 2))
_MATRIX_TYPES: dict[RowFormat, tuple[str, ...]] = {
    "fp32": ("float32",),
    "fp16": ("float16",),
    "bf16": ("bfloat16", "uint16"),  # NumPy has bit patterns only
    "int8": ("uint8",),
    "int4": ("uint8",),
}

SCHEMA_FIELDS = (
    "num_features", "features", "row_starts", "rows", "ids", "moduli", "divisors", "divisions", "mean",
    "pooling_factors", "index_policy",
)  # fmt: skip
"""Fields that the PyTorch op takes, in the order of its schema. It is for training: all rows are fp32."""


def matrix_input(format: RowFormat) -> str:
    """Name of the operators' input that holds the rows of a format."""
    return "weights" if format == "fp32" else f"weights_{format}"


BAG_INPUTS = (
    "weights", "indices", "offsets", "per_sample_weights", *(matrix_input(format) for format in ROW_FORMATS[1:]),
)  # fmt: skip
"""Inputs of TableBatchedEmbeddingBag, in order."""


def by_format(weights: Any) -> Mapping[RowFormat, Any]:
    """Matrices by their format, without those that are None; `weights` may be the fp32 one alone."""
    if not isinstance(weights, Mapping):
        return {"fp32": weights}
    return {format: matrix for format, matrix in weights.items() if matrix is not None}


@dataclass(frozen=True, kw_only=True, slots=True)
class BagAttributes:
    """The attributes of one node, as docs/operators.md names them. F features, T slots.

    `ids`, `moduli`, `divisors` and `divisions` may be left out, or empty: then an id is the number of its row. Without
    `formats` all rows are fp32.
    """

    num_features: int
    features: tuple[int, ...]
    """[T] feature that each slot pools."""

    row_starts: tuple[int, ...]
    """[T] first row of each slot's table part, in the group's matrix of its format."""

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

    formats: tuple[int, ...] = ()
    """[T] row format of each slot's table part, a position in `dlrm_deploy.formats.ROW_FORMATS`. Left out: 0, fp32."""

    width: int | None = None
    """D. Needed where a slot is not fp32: stored rows do not always tell it."""

    pooling_factors: tuple[int, ...] | None
    """[F] ids per bag, in the fixed form; None for the CSR form."""

    index_policy: str
    feature_names: tuple[str, ...] = ()
    """[F] for error messages, or empty."""

    weighted: bool = False
    """Whether the node has per-sample weights."""

    def __post_init__(self) -> None:
        slots = len(self.features)
        zeros = (0,) * slots
        defaults = {"ids": self.rows, "moduli": zeros, "divisors": (1,) * slots, "divisions": zeros, "formats": zeros}
        for name in ("features", "row_starts", "rows", "ids", "moduli", "divisors", "divisions", "mean", "formats"):
            object.__setattr__(self, name, tuple(getattr(self, name) or defaults.get(name, ())))
        if self.pooling_factors is not None:
            object.__setattr__(self, "pooling_factors", tuple(self.pooling_factors))

    @classmethod
    def of(
        cls, config: ModelConfig, group: TableGroup, formats: Mapping[str, RowFormat] | None = None
    ) -> BagAttributes:
        """The attributes of the node that pools a table group of a model.

        Args:
            config: the model.
            group: one of its table groups.
            formats: row format of each table part that is not fp32, by its name.
        """
        features = [config.features[slot.feature] for slot in group.slots]
        parts = [slot.part for slot in group.slots]
        layout = GroupLayout.of(group, formats)
        places = [layout.place(part.name) for part in parts]
        return cls(
            num_features=len(config.features),
            features=tuple(slot.feature for slot in group.slots),
            row_starts=tuple(row_start for _, row_start in places),
            rows=tuple(part.rows for part in parts),
            ids=tuple(part.ids for part in parts),
            moduli=tuple(feature.modulo or 0 for feature in features),
            divisors=tuple(part.divisor for part in parts),
            divisions=tuple(DIVISIONS.index(part.division) for part in parts),
            mean=tuple(int(feature.pooling == "mean") for feature in features),
            formats=tuple(ROW_FORMATS.index(format) for format, _ in places),
            width=group.width,
            pooling_factors=config.pooling_factors,
            index_policy=config.index_policy,
            feature_names=tuple(feature.name for feature in config.features),
            weighted=config.weighted,
        )

    @classmethod
    def of_ids(
        cls, config: ModelConfig, feature: int, part: TablePart, row_start: int, format: RowFormat = "fp32"
    ) -> BagAttributes:
        """The attributes of a node that looks up the ids of one feature one by one, each as a bag of its own.

        Its batch holds that feature alone, and a sample of it is an id: so errors number ids, not samples.

        Args:
            config: the model.
            feature: position of the feature in `config.features`.
            part: the part of its table that is read.
            row_start: the part's first row, in the group's matrix of `format`.
            format: the part's row format.
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
            formats=(ROW_FORMATS.index(format),),
            width=part.width,
            pooling_factors=(1,),
            index_policy=config.index_policy,
            feature_names=(config.features[feature].name,),
        )

    @property
    def plain(self) -> bool:
        """Whether an id is the number of its row, in every slot."""
        others = any(self.moduli) or any(self.divisions) or any(divisor != 1 for divisor in self.divisors)
        return self.ids == self.rows and not others

    @property
    def slot_formats(self) -> tuple[RowFormat, ...]:
        """[T] names of `formats`."""
        return tuple(ROW_FORMATS[format] for format in self.formats)

    @property
    def used_formats(self) -> tuple[RowFormat, ...]:
        """Formats that a slot reads, in the order of `ROW_FORMATS`: the node has a matrix of each."""
        return tuple(format for number, format in enumerate(ROW_FORMATS) if number in self.formats)

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
        if any(self.formats):
            assert self.width is not None  # `of` and `check` see to it
            attributes |= {"formats": self.formats, "width": self.width}
        return attributes

    def inputs(self) -> list[str]:
        """Input names of the ONNX node; an absent optional input is ""."""
        absent = {matrix_input(format) for format in ROW_FORMATS if format not in self.used_formats}
        if self.pooling_factors is not None:
            absent.add("offsets")
        if not self.weighted:
            absent.add("per_sample_weights")
        names = ["" if name in absent else name for name in BAG_INPUTS]
        while not names[-1]:
            names.pop()
        return names

    def samples(self, indices: Any, offsets: Any) -> int:
        """B of a valid call."""
        if self.pooling_factors is None:
            return (len(offsets) - 1) // self.num_features
        return len(indices) // sum(self.pooling_factors)

    def width_of(self, weights: Any) -> int:
        """D of a valid call."""
        return int(by_format(weights)["fp32"].shape[1]) if self.width is None else self.width

    def schema_values(self) -> tuple[Any, ...]:
        """In the order of the PyTorch op's schema, where they follow the four tensors.

        Raises:
            BatchError: a slot is not fp32; `torch_ops.pool_bags` takes it.
        """
        if any(self.formats):
            raise BatchError(f"the PyTorch op reads fp32 rows only, got {', '.join(self.used_formats)}. Use pool_bags.")
        return tuple(getattr(self, name) for name in SCHEMA_FIELDS)

    def check(self, weights: Any, indices: Any, offsets: Any, per_sample_weights: Any) -> None:
        """See that attributes and inputs, arrays or tensors, make up a valid call.

        `weights` is the fp32 matrix or a mapping from formats to stored matrices, those of bf16 as bit patterns or
        bfloat16.

        Raises:
            BatchError: they do not.
        """
        self._check_lists()
        matrices = by_format(weights)
        self._check_matrices(matrices)
        check_array("indices", indices, 1, "int32", "int64")
        self._check_slots({format: len(matrix) for format, matrix in matrices.items()})
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

    def _check_lists(self) -> None:
        if self.num_features < 1:
            raise BatchError(f"num_features must be at least 1, got {self.num_features}.")
        slots = len(self.features)
        if slots == 0:
            raise BatchError("features is empty, at least one slot is needed.")
        for name in ("row_starts", "rows", "mean", "ids", "moduli", "divisors", "divisions", "formats"):
            values = len(getattr(self, name))
            if values != slots:
                raise BatchError(f"{name} has {values} values, expected one per slot: {slots}.")
        self._check_limits("formats", 0, len(ROW_FORMATS) - 1)
        if any(self.formats) and self.width is None:
            raise BatchError("width is missing; rows that are not fp32 need it.")
        if self.width is not None and self.width < 1:
            raise BatchError(f"width must be at least 1, got {self.width}.")

    def _check_matrices(self, matrices: Mapping[RowFormat, Any]) -> None:
        for format in self.used_formats:
            if format not in matrices:
                t = self.slot_formats.index(format)
                raise BatchError(f"slot {t}: its rows are {format}, but {matrix_input(format)} is not given.")
        for format, matrix in matrices.items():
            check_array(matrix_input(format), matrix, 2, *_MATRIX_TYPES[format])
        width = self.width_of(matrices)
        for format, matrix in matrices.items():
            columns = stored_columns(format, width)
            if matrix.shape[1] != columns:
                raise BatchError(
                    f"{matrix_input(format)} has {matrix.shape[1]} columns, expected {columns}: {format} rows of "
                    f"{width} values."
                )

    def _check_slots(self, rows: Mapping[RowFormat, int]) -> None:
        slots = zip(self.features, self.row_starts, self.rows, self.slot_formats, strict=True)
        for t, (feature, start, count, format) in enumerate(slots):
            if not 0 <= feature < self.num_features:
                raise BatchError(f"slot {t}: feature {feature} is outside [0, {self.num_features}).")
            if start < 0 or count < 1 or start + count > rows[format]:
                raise BatchError(
                    f"slot {t}: rows {start} to {start + count} are not within the {rows[format]} rows of "
                    f"{matrix_input(format)}."
                )
        for name, least, most in _LIMITS:
            self._check_limits(name, least, most)
        if self.index_policy not in INDEX_POLICIES:
            raise BatchError(f"index_policy must be one of {', '.join(INDEX_POLICIES)}, got {self.index_policy!r}.")

    def _check_limits(self, name: str, least: int, most: int) -> None:
        numbers = getattr(self, name)
        if min(numbers) < least or max(numbers) > most:
            t = next(t for t, number in enumerate(numbers) if not least <= number <= most)
            raise BatchError(f"slot {t}: {name} must be in [{least}, {most}], got {numbers[t]}.")

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


def check_bag_interaction(dense: Any, samples: int, width: int) -> None:
    """See that dense [B, D], an array or tensor, goes with bags of that many samples and that width.

    Raises:
        BatchError: a wrong type or rank, or sizes that differ.
    """
    check_array("dense", dense, 2, "float32")
    if tuple(dense.shape) != (samples, width):
        raise BatchError(f"dense has shape {tuple(dense.shape)}, expected [B, D] of the bags: {(samples, width)}.")


def check_mlp(x: Any, layers: Sequence[tuple[Any, Any]]) -> None:
    """See that x [B, K] and the layers' weights [N, K] and biases [N], arrays or tensors, follow one another.

    Raises:
        BatchError: no layer, a wrong type or rank, or sizes that do not go together.
    """
    check_array("x", x, 2, "float32")
    if not layers:
        raise BatchError("an Mlp needs at least one layer.")
    inputs = int(x.shape[1])
    for number, (weight, bias) in enumerate(layers):
        check_array(f"weight {number}", weight, 2, "bfloat16", "uint16")
        check_array(f"bias {number}", bias, 1, "float32")
        if weight.shape[1] != inputs or inputs < 1:
            raise BatchError(f"weight {number} has {weight.shape[1]} columns for {inputs} inputs.")
        if len(bias) != len(weight) or len(weight) < 1:
            raise BatchError(f"bias {number} has {len(bias)} values for the {len(weight)} rows of its weight.")
        inputs = len(weight)


def check_mlp_int8(x: Any, layers: Sequence[tuple[Any, Any, Any]]) -> None:
    """See that x [B, K] and the layers' weights [N, K], scales [N] and biases [N], arrays or tensors, go together.

    Raises:
        BatchError: no layer, a wrong type or rank, sizes that do not go together, or more than `MOST_INPUTS` inputs.
    """
    check_array("x", x, 2, "float32")
    if not layers:
        raise BatchError("an MlpInt8 needs at least one layer.")
    inputs = int(x.shape[1])
    for number, (weight, scale, bias) in enumerate(layers):
        check_array(f"weight {number}", weight, 2, "int8")
        check_array(f"scale {number}", scale, 1, "float32")
        check_array(f"bias {number}", bias, 1, "float32")
        if weight.shape[1] != inputs or not 1 <= inputs <= MOST_INPUTS:
            raise BatchError(
                f"weight {number} has {weight.shape[1]} columns for {inputs} inputs, expected as many, from 1 to "
                f"{MOST_INPUTS}."
            )
        for name, values in (("scale", scale), ("bias", bias)):
            if len(values) != len(weight) or len(weight) < 1:
                raise BatchError(f"{name} {number} has {len(values)} values for the {len(weight)} rows of its weight.")
        inputs = len(weight)


def check_array(name: str, value: Any, rank: int, *dtypes: str) -> None:
    """See that `value` is an array or tensor of that rank, and of one of those types."""
    dtype = _dtype(value)
    if dtype not in dtypes or value.ndim != rank:
        seen = f"{dtype} {tuple(value.shape)}" if hasattr(value, "shape") else dtype
        raise BatchError(f"{name} must be {' or '.join(dtypes)} of rank {rank}, got {seen}.")


def _dtype(value: Any) -> str:
    return str(getattr(value, "dtype", type(value).__name__)).removeprefix("torch.")
