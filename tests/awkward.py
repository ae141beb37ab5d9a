"""Inputs that break embedding-bag code: shared by the tests of every form of the operators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dlrm_deploy.formats import ROW_FORMATS, RowFormat, encode
from dlrm_deploy.ops.contract import by_format
from dlrm_deploy.ops.reference import table_batched_embedding_bag


@dataclass(frozen=True)
class BagCase:
    """One call of TableBatchedEmbeddingBag: arrays, and attributes under their names in docs/operators.md.

    `weights` is the fp32 matrix, or the stored matrices by format.
    """

    name: str
    weights: np.ndarray | Mapping[RowFormat, np.ndarray]
    indices: np.ndarray
    offsets: np.ndarray | None
    attributes: dict[str, Any]
    per_sample_weights: np.ndarray | None = None

    @property
    def matrices(self) -> Mapping[RowFormat, np.ndarray]:
        return by_format(self.weights)

    @property
    def width(self) -> int:
        return self.attributes.get("width") or self.weights.shape[1]

    def expected(self) -> np.ndarray:
        return table_batched_embedding_bag(
            self.weights, self.indices, self.offsets, per_sample_weights=self.per_sample_weights, **self.attributes
        )


def csr_case(
    name: str,
    lengths: list[list[int]],
    *,
    rows: tuple[int, ...] = (5, 3, 7),
    features: tuple[int, ...] | None = None,
    mean: tuple[int, ...] | None = None,
    width: int = 4,
    weighted: bool = False,
    policy: str = "error",
    dtype: type = np.int64,
    seed: int = 0,
) -> BagCase:
    """Bags of the given lengths[f][b] with random ids. `rows` has one entry a slot; slot t pools features[t]."""
    rng = np.random.default_rng(seed)
    num_features = len(lengths)
    features = features or tuple(range(num_features))
    limits = np.ones(num_features, int)
    limits[list(features)] = rows
    counts = [sum(bags) for bags in lengths]
    indices = np.concatenate([rng.integers(0, n, c) for n, c in zip(limits, counts, strict=True)]).astype(dtype)
    flat = np.array([length for bags in lengths for length in bags], np.int64)
    offsets = np.concatenate([[0], np.cumsum(flat)]).astype(dtype)
    return BagCase(
        name=name,
        weights=rng.standard_normal((sum(rows), width)).astype(np.float32),
        indices=indices,
        offsets=offsets,
        attributes={
            "num_features": num_features,
            "features": features,
            "row_starts": tuple(int(start) for start in np.cumsum((0, *rows[:-1]))),
            "rows": rows,
            "mean": mean or (0,) * len(features),
            "index_policy": policy,
        },
        per_sample_weights=rng.standard_normal(len(indices)).astype(np.float32) if weighted else None,
    )


def fixed_case(name: str, factors: list[int], batch: int, **options: Any) -> BagCase:
    """The fixed form: every bag of feature f holds factors[f] ids."""
    case = csr_case(name, [[factor] * batch for factor in factors], **options)
    attributes = {**case.attributes, "pooling_factors": tuple(factors)}
    return BagCase(name, case.weights, case.indices, None, attributes, case.per_sample_weights)


def awkward_bags() -> list[BagCase]:
    """Valid calls that are easy to get wrong."""
    ragged = [[2, 0, 3], [1, 1, 0], [0, 4, 2]]
    non_finite = csr_case("nan_and_infinity_stay_in_their_bag", ragged)
    non_finite.weights[0, 0], non_finite.weights[6, 1], non_finite.weights[9, 2] = np.nan, np.inf, -np.inf
    repeated = csr_case("repeated_ids", [[4, 4], [3, 3], [2, 2]])
    repeated.indices[:] = 1
    return [
        csr_case("zero_samples", [[], [], []]),
        csr_case("all_empty", [[0, 0], [0, 0], [0, 0]]),
        csr_case("single_id", [[1], [1], [1]]),
        csr_case("only_the_last_bag_holds_ids", [[0, 0], [0, 0], [0, 5]]),
        csr_case("uneven", ragged),
        csr_case("uneven_int32", ragged, dtype=np.int32),
        repeated,
        csr_case("long_bag", [[0, 10_000], [1, 0], [3, 2]]),
        csr_case("mean", ragged, mean=(1, 0, 1)),
        csr_case("weighted", ragged, weighted=True),
        csr_case("some_features_in_another_order", ragged, rows=(7, 5), features=(2, 0), mean=(0, 1)),
        csr_case("some_features_weighted", ragged, rows=(5,), features=(1,), weighted=True),
        csr_case("width_1", ragged, width=1),
        csr_case("width_17", ragged, width=17),
        non_finite,
        fixed_case("fixed_zero_samples", [1, 1, 1], 0),
        fixed_case("fixed_one_id", [1, 1, 1], 3),
        fixed_case("fixed_one_id_int32", [1, 1, 1], 3, dtype=np.int32),
        fixed_case("fixed_several_ids", [3, 3, 3], 2, mean=(0, 1, 0)),
        fixed_case("fixed_mixed", [2, 1, 3], 4, mean=(1, 1, 0)),
        fixed_case("fixed_mixed_weighted", [2, 1, 2], 4, weighted=True),
        fixed_case("fixed_one_id_weighted", [1, 1, 1], 4, weighted=True),
        fixed_case("fixed_no_ids", [2, 0, 1], 3, mean=(0, 1, 0)),
        fixed_case("fixed_no_ids_weighted", [0, 2, 1], 3, weighted=True),
        fixed_case("fixed_no_ids_zero_samples", [2, 0, 1], 0),
        fixed_case("fixed_some_features", [2, 1, 2], 3, rows=(7, 3), features=(2, 1)),
    ]


def stored_case(case: BagCase, formats: Sequence[RowFormat], name: str | None = None) -> BagCase:
    """The same bags over rows in other formats; formats[t] is that of slot t, whose part no other slot reads."""
    slots = zip(formats, case.attributes["row_starts"], case.attributes["rows"], strict=True)
    pieces: dict[RowFormat, list[np.ndarray]] = {}
    row_starts = []
    for format, start, rows in slots:
        stored = pieces.setdefault(format, [])
        row_starts.append(sum(len(piece) for piece in stored))
        stored.append(encode(format, case.weights[start : start + rows]))
    attributes = {
        **case.attributes,
        "row_starts": tuple(row_starts),
        "formats": tuple(ROW_FORMATS.index(format) for format in formats),
        "width": case.width,
    }
    matrices = {format: np.concatenate(pieces[format]) for format in ROW_FORMATS if format in pieces}
    return replace(case, name=name or f"{case.name}_{'_'.join(formats)}", weights=matrices, attributes=attributes)


MIXES: dict[str, tuple[RowFormat, ...]] = {
    "fp16": ("fp16",),
    "bf16": ("bf16",),
    "int8": ("int8",),
    "int4": ("int4",),
    "mixed_without_fp32": ("int4", "bf16", "int8"),
    "mixed": ("int8", "fp32", "fp16"),
}
"""Row formats of slots in turn."""


def stored_bags() -> list[BagCase]:
    """The awkward bags over rows of each format and over two mixtures, and rows that are hard to store."""
    cases = []
    for name, mix in MIXES.items():
        for case in [*awkward_bags(), *hard_rows()]:
            slots = len(case.attributes["features"])
            formats = tuple(mix[t % len(mix)] for t in range(slots))
            if np.isfinite(case.weights).all() or not {"int8", "int4"} & set(formats):
                cases.append(stored_case(case, formats, f"{case.name}_{name}"))
    return cases


def hard_rows() -> list[BagCase]:
    """Rows of one value, of tiny and huge ranges, and those whose stored bias is above all values."""
    lengths = [[6, 0, 1], [6, 6, 0], [1, 1, 6]]
    cases = []
    for width in (1, 5, 32):
        case = csr_case(f"hard_rows_{width}", lengths, rows=(8, 8, 8), width=width, weighted=width == 5)
        shifted = case.weights[:8]
        shifted[0] = 0.1
        shifted[1] = -0.1  # rounded up in float16: the scale is negative
        shifted[2] = shifted[2] * np.float32(1e-6) - np.float32(100)
        shifted[3] *= np.float32(1e-8)
        shifted[4] *= np.float32(1e-42)
        shifted[5] = np.linspace(-65000, 65000, width)
        shifted[6] = 0
        shifted[7] = np.where(np.arange(width) % 2, np.float32(3e-5), np.float32(-6.1e-5))
        case.weights[8:16], case.weights[16:24] = shifted, -shifted
        cases.append(case)
    return cases


def out_of_range_bags(policy: str) -> list[BagCase]:
    """The same policy on CSR, weighted CSR and fixed bags, with ids far outside on both sides."""
    cases = [
        csr_case("csr", [[2, 0, 3], [1, 1, 0], [0, 4, 2]], policy=policy, mean=(0, 1, 0)),
        csr_case("csr_weighted", [[2, 0, 3], [1, 1, 0], [0, 4, 2]], policy=policy, weighted=True),
        fixed_case("fixed", [2, 1, 3], 3, policy=policy, mean=(0, 1, 1)),
        fixed_case("fixed_one_id", [1, 1, 1], 4, policy=policy),
    ]
    for case in cases:
        case.indices[0], case.indices[-1], case.indices[-2] = -1, 2**31 - 1, 7
        case.indices[3] = -(2**31)
    beyond = csr_case("ids_beyond_32_bits", [[9], [9]], rows=(5, 3), policy=policy)
    far = [2**31 - 1, 2**31, 2**31 + 1, 3 * 2**30, 2**32 - 1, 2**32, 2**63 - 1, -(2**31) - 1, -(2**63)]
    beyond.indices[:] = [*far, *far]
    return [*cases, beyond]


@dataclass(frozen=True)
class ComputedSlot:
    """A slot whose rows are computed from ids. Attributes under their names in docs/operators.md, for one slot."""

    feature: int
    rows: int
    ids: int
    modulus: int = 0
    divisor: int = 1
    division: int = 0

    def accepts(self, value: int) -> bool:
        return 0 <= (value % self.modulus if self.modulus else value) < self.ids

    def edges(self) -> set[int]:
        """Ids, valid and others, where rounding and wrapping change the row."""
        near = {0, self.ids, self.modulus, self.rows * self.divisor, 2**24 // self.divisor * self.divisor}
        near |= {self.divisor * k for k in (1, 2, 3, self.rows - 1, self.ids // self.divisor)}
        near |= {2**k for k in (23, 24, 25, 31, 32, 53, 60, 62)}
        far = {-(2**63), -(2**31) - 1, -(2**31), -self.ids - 1, -self.ids, 2**31 - 1, 2**63 - 1}
        return {value + step for value in near for step in (-1, 0, 1)} | far


# Of the last one float32(d) is another number where it is rounded to float64 first.
_FLOAT_DIVISORS = (1, 2, 3, 41, 60, 2**31 - 1, 2**60 + 2**36 + 1)
COMPUTED_SLOTS: dict[str, list[ComputedSlot]] = {
    "quotient_and_remainder": [ComputedSlot(0, 4, 11, divisor=3), ComputedSlot(0, 3, 11)],
    "three_digits": [
        ComputedSlot(0, 3, 60, divisor=20), ComputedSlot(0, 4, 60, divisor=5), ComputedSlot(0, 5, 60),
    ],
    "digits_of_large_ids": [ComputedSlot(0, 50, 2**62, divisor=2**57 + 3), ComputedSlot(0, 60, 2**62, divisor=2**31)],
    "chinese_remainders": [ComputedSlot(0, 3, 12), ComputedSlot(0, 4, 12)],
    "hashed_beside_plain": [
        ComputedSlot(0, 5, 10**12), ComputedSlot(1, 7, 7), ComputedSlot(2, 1, 2**62), ComputedSlot(3, 3, 3),
    ],
    "modulus": [
        ComputedSlot(0, 6, 6, modulus=6), ComputedSlot(1, 6, 6, modulus=4), ComputedSlot(2, 5, 5),
        ComputedSlot(3, 5, 40, modulus=31, divisor=7), ComputedSlot(0, 5, 2**62, modulus=2**62 - 1),
    ],
    "modulus_beyond_the_ids": [ComputedSlot(0, 6, 6, modulus=9), ComputedSlot(1, 4, 3, modulus=2**63 - 1)],
    "fewer_ids_than_rows": [ComputedSlot(0, 6, 4), ComputedSlot(1, 6, 2, divisor=2**63 - 1)],
    "parts_and_plain_slots_in_another_order": [
        ComputedSlot(2, 9, 9), ComputedSlot(0, 5, 23, divisor=5), ComputedSlot(3, 4, 4),
        ComputedSlot(2, 2, 9, divisor=7), ComputedSlot(0, 5, 23),
    ],
    "every_division_in_one_group": [
        ComputedSlot(0, 9, 100, divisor=7, division=2), ComputedSlot(0, 9, 100, divisor=7, division=1),
        ComputedSlot(0, 9, 100, divisor=7), ComputedSlot(1, 8, 8), ComputedSlot(2, 4, 1000, modulus=700, division=1),
    ],
    "division_by_one": [ComputedSlot(0, 40, 40, division=1), ComputedSlot(1, 40, 40, division=2)],
    **{
        f"division_{division}": [
            slot
            for feature, divisor in enumerate(_FLOAT_DIVISORS)
            for slot in (
                ComputedSlot(feature, 300, min(300 * divisor, 2**62), divisor=divisor, division=division),
                ComputedSlot(feature, 7, 2**62, divisor=divisor, division=division),
            )
        ]
        for division in (1, 2)
    },
}  # fmt: skip


def computed_bags(policy: str = "error") -> list[BagCase]:
    """Rows computed from ids: quotients, remainders, moduli and both roundings.

    Ids are at the edges of what they are valid for, and beyond that unless the policy is error.
    """
    cases = []
    for number, (name, slots) in enumerate(COMPUTED_SLOTS.items()):
        narrow = [np.int32 if number % 4 == remainder else np.int64 for remainder in (3, 0)]
        cases.append(_computed_case(f"{name}_csr", slots, policy, narrow[0], weighted=number % 4 == 1))
        cases.append(_computed_case(f"{name}_fixed", slots, policy, narrow[1], factors=(1, 2, 3, 1, 2, 2, 1)))
    slots = COMPUTED_SLOTS["hashed_beside_plain"]
    cases.append(_computed_case("fixed_one_id", slots, policy, np.int64, factors=(1, 1, 1, 1)))
    cases.append(_computed_case("zero_samples_csr", slots, policy, np.int64, samples=0))
    cases.append(_computed_case("zero_samples_fixed", slots, policy, np.int64, factors=(2, 2, 2, 2), samples=0))
    return cases


def _computed_case(
    name: str,
    slots: list[ComputedSlot],
    policy: str,
    dtype: type,
    *,
    weighted: bool = False,
    factors: tuple[int, ...] | None = None,
    samples: int = 60,
) -> BagCase:
    rng = np.random.default_rng(7)
    features = 1 + max(slot.feature for slot in slots)
    lengths = rng.integers(0, 4, (features, samples))
    if factors is not None:
        factors = factors[:features]
        lengths = np.repeat(np.array(factors)[:, None], samples, axis=1)
    indices = []
    for feature in range(features):
        readers = [slot for slot in slots if slot.feature == feature]
        values = {0}.union(*(slot.edges() for slot in readers))
        if policy == "error":
            values = {value for value in values if all(slot.accepts(value) for slot in readers)}
        limits = np.iinfo(dtype)
        fitting = [value for value in sorted(values) if limits.min <= value <= limits.max]
        indices.append(np.resize(rng.permutation(np.array(fitting, dtype)), lengths[feature].sum()))
    ids = np.concatenate(indices)
    rows = tuple(slot.rows for slot in slots)
    attributes = {
        "num_features": features,
        "features": tuple(slot.feature for slot in slots),
        "row_starts": tuple(int(start) for start in np.cumsum((0, *rows[:-1]))),
        "rows": rows,
        "ids": tuple(slot.ids for slot in slots),
        "moduli": tuple(slot.modulus for slot in slots),
        "divisors": tuple(slot.divisor for slot in slots),
        "divisions": tuple(slot.division for slot in slots),
        "mean": tuple(0 if weighted else t % 2 for t in range(len(slots))),
        "index_policy": policy,
    }
    if factors is not None:
        attributes["pooling_factors"] = factors
    return BagCase(
        name=name,
        weights=rng.standard_normal((sum(rows), 3)).astype(np.float32),
        indices=ids,
        offsets=None if factors is not None else np.concatenate([[0], np.cumsum(lengths.reshape(-1))]).astype(dtype),
        attributes=attributes,
        per_sample_weights=rng.standard_normal(len(ids)).astype(np.float32) if weighted else None,
    )
