"""Embedding tables: what an id reads in each kind of table, and how tables share matrices. See docs/models.md.

A table maps an id to a vector. A plain table stores one row per id. The others store one or several smaller matrices,
its parts, and combine what they give. Every kind computes a part's row from the id in one way:

    row = (id // divisor) mod rows

Parts are pooled like any embedding bag, and the pooled vectors are combined. That is the order of
facebookresearch/dlrm, it is one gather a part, and it differs from combining first only for `multiply` and bags of
several ids.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from itertools import combinations
from typing import Literal, NamedTuple, get_args

from dlrm_deploy.errors import ConfigError

Partition = Literal["full", "hash", "quotient-remainder", "chinese-remainder"]
Combine = Literal["multiply", "add", "concat", "path"]
Division = Literal["exact", "float32", "float32-reciprocal"]

PARTITIONS: tuple[str, ...] = get_args(Partition)
COMBINES: tuple[str, ...] = get_args(Combine)
DIVISIONS: tuple[str, ...] = get_args(Division)

MAX_VALUES = 1 << 50
"""Most values of a table, 4 PiB in float32: row addresses, in bytes and in 64 bits, are far from overflowing."""

MAX_IDS = 1 << 62
"""Most ids of a table: sums of two ids do not overflow 64 bits."""

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")


def check_name(kind: str, name: object) -> None:
    """Raise `ConfigError` for a name that could not be a part of a key or of a file's name."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(f"{kind} name {name!r} must be letters, digits, '_' or '-', and not begin with '-'.")


def check_int(owner: str, field: str, value: object, least: int) -> None:
    """Raise `ConfigError` for anything but a whole number of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{owner}: {field} must be a whole number of at least {least}, got {value!r}.")


def check_choice(owner: str, field: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise `ConfigError` for anything but one of the choices."""
    if value not in choices:
        raise ConfigError(f"{owner}: {field} must be one of {', '.join(choices)}, got {value!r}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class TablePart:
    """A stored matrix [rows, width] of a table; derived, never configured."""

    name: str
    """The table's name for its only part, else the table's name, a dot and the part's number, or `<table>.wide`."""

    rows: int
    width: int
    ids: int
    """Valid ids are in [0, ids)."""

    divisor: int = 1
    """An id reads row (id // divisor) mod rows."""

    division: Division = "exact"


@dataclass(frozen=True, kw_only=True, slots=True)
class TableConfig:
    """One embedding table: `rows` ids, each with a vector of `width` float32 values."""

    name: str
    """Table name, as in checkpoint keys (`embedding_bags.<name>.weight`)."""

    rows: int
    """Number of distinct ids. That many rows are stored where `partition` is full."""

    width: int
    """Embedding width D."""

    partition: Partition = "full"
    """How ids fall on the rows of the parts:
    full: a row for each id.
    hash: one part; id mod rows, and ids that collide share a row.
    quotient-remainder: the digits of the id in a number system with `part_rows` as bases, most significant first.
    chinese-remainder: id mod each of `part_rows`, which have no common divisor.
    The last two give each id a combination of rows of its own."""

    part_rows: tuple[int, ...] = ()
    """Rows of each part, where `partition` is not full."""

    combine: Combine = "multiply"
    """How the pooled vectors of the parts become one: their product or sum, side by side, or path: the first part's
    vector goes through a small MLP that the id chooses from each further part."""

    path_hidden: int = 0
    """path only: hidden width of those MLPs."""

    projection: int | None = None
    """Width after a linear map without bias behind the pooling (mixed dimension embeddings); None for no map."""

    division: Division = "exact"
    """Arithmetic of the quotient in quotient-remainder with two parts. The two float32 ways go wrong for ids above
    2^24; they are for checkpoints that were trained with them."""

    def __post_init__(self) -> None:
        check_name("table", self.name)
        owner = f"table {self.name!r}"
        check_int(owner, "rows", self.rows, 1)
        check_int(owner, "width", self.width, 1)
        if self.rows > MAX_IDS:
            raise ConfigError(f"{owner}: rows must be at most 2^62, got {self.rows}.")
        check_choice(owner, "partition", self.partition, PARTITIONS)
        check_choice(owner, "combine", self.combine, COMBINES)
        check_choice(owner, "division", self.division, DIVISIONS)
        if not isinstance(self.part_rows, (list, tuple)):
            raise ConfigError(f"{owner}: part_rows must be a list, got {self.part_rows!r}.")
        object.__setattr__(self, "part_rows", tuple(self.part_rows))
        for rows in self.part_rows:
            check_int(owner, "part_rows", rows, 1)
        self._check_partition(owner)
        self._check_combine(owner)
        if self.projection is not None:
            check_int(owner, "projection", self.projection, 1)
        for part in self.parts:
            if part.rows * part.width > MAX_VALUES:
                raise ConfigError(f"{owner}: {part.rows} x {part.width} values are more than any disk holds.")

    def _check_partition(self, owner: str) -> None:
        sizes = self.part_rows
        if self.partition in ("full", "hash"):
            expected = 0 if self.partition == "full" else 1
            if len(sizes) != expected:
                raise ConfigError(f"{owner}: partition {self.partition} takes {expected} part_rows, got {list(sizes)}.")
            return
        if len(sizes) < 2:
            raise ConfigError(f"{owner}: partition {self.partition} needs two or more part_rows, got {list(sizes)}.")
        if math.prod(sizes) < self.rows:
            raise ConfigError(
                f"{owner}: {self.rows} ids need {self.rows} combinations of rows, but part_rows {list(sizes)} give "
                f"{math.prod(sizes)}."
            )
        if self.partition == "chinese-remainder":
            for a, b in combinations(sizes, 2):
                if math.gcd(a, b) > 1:
                    raise ConfigError(
                        f"{owner}: part_rows {a} and {b} have the divisor {math.gcd(a, b)} in common, so different "
                        "ids would share all their rows. Choose numbers without a common divisor."
                    )

    def _check_combine(self, owner: str) -> None:
        parts = max(1, len(self.part_rows))
        if parts == 1 and self.combine != "multiply":
            raise ConfigError(f"{owner}: combine belongs to partitions of several parts, not {self.partition}.")
        if self.combine == "concat" and self.width % parts:
            raise ConfigError(f"{owner}: width {self.width} is not a multiple of its {parts} parts side by side.")
        if self.combine == "path":
            check_int(owner, "path_hidden", self.path_hidden, 1)
        elif self.path_hidden != 0:
            raise ConfigError(f"{owner}: path_hidden belongs to combine path, not {self.combine}.")
        if self.division != "exact" and (self.partition != "quotient-remainder" or parts != 2):
            raise ConfigError(f"{owner}: division {self.division} belongs to quotient-remainder with two parts.")

    @property
    def parts(self) -> tuple[TablePart, ...]:
        """The stored matrices, in the order of `part_rows`."""
        if len(self.part_rows) < 2:
            rows = self.part_rows[0] if self.part_rows else self.rows
            return (TablePart(name=self.name, rows=rows, width=self.width, ids=self.rows),)
        parts = []
        for j, rows in enumerate(self.part_rows):
            divisor = math.prod(self.part_rows[j + 1 :]) if self.partition == "quotient-remainder" else 1
            parts.append(
                TablePart(
                    name=f"{self.name}.{j}",
                    rows=rows,
                    width=self._part_width(j),
                    ids=self.rows,
                    divisor=divisor,
                    division=self.division if divisor > 1 else "exact",
                )
            )
        return tuple(parts)

    def _part_width(self, j: int) -> int:
        if self.combine == "concat":
            return self.width // len(self.part_rows)
        if self.combine == "path" and j > 0:  # W1 [h, D], b1 [h], W2 [D, h], b2 [D] of one MLP
            return 2 * self.path_hidden * self.width + self.path_hidden + self.width
        return self.width

    @property
    def wide_part(self) -> TablePart:
        """The first-order weight of each id, in models with `wide`."""
        return TablePart(name=f"{self.name}.wide", rows=self.rows, width=1, ids=self.rows)

    @property
    def output_width(self) -> int:
        """Width of the vector that the table gives to the interaction."""
        return self.projection or self.width

    @property
    def parameters(self) -> int:
        """Number of float32 values of all parts and of the projection."""
        return sum(part.rows * part.width for part in self.parts) + (self.projection or 0) * self.width


class Slot(NamedTuple):
    """One bag that a table group pools: a feature, and the part that it reads."""

    feature: int
    """Position in `ModelConfig.features`."""

    part: TablePart
    row_start: int
    """First row of the part in the group's matrix."""


@dataclass(frozen=True, slots=True)
class TableGroup:
    """Table parts of one width, stored one after the other in one matrix [rows, width]; derived, never configured."""

    name: str
    width: int
    rows: int
    parts: tuple[TablePart, ...]
    row_starts: tuple[int, ...]
    """First row of each part in the group's matrix."""

    slots: tuple[Slot, ...]
    """The bags that one operator node pools: first parts in feature order, then second parts, ..., then wide parts.
    Path tables are not among them, their ids are looked up one by one."""

    @property
    def bytes(self) -> int:
        """Size of the float32 matrix."""
        return self.rows * self.width * 4

    def rows_of(self, part: str) -> slice:
        """The rows of one part in the group's matrix."""
        for start, config in zip(self.row_starts, self.parts, strict=True):
            if config.name == part:
                return slice(start, start + config.rows)
        raise KeyError(part)
