"""Table schemes: how one recipe makes a table of each feature of a dataset, whatever the numbers of ids.

What the kinds of tables compute is in `dlrm_deploy.tables`; a scheme chooses sizes and widths.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from dlrm_deploy.errors import ConfigError
from dlrm_deploy.tables import COMBINES, PARTITIONS, Combine, Partition, TableConfig, check_choice, check_int

MAX_PARTS = 62
"""Of two rows each they give more ids than a table may have."""

_OWNER = "[model.tables]"


@dataclass(frozen=True, kw_only=True, slots=True)
class TableScheme:
    """One kind of table for all features. docs/models.md shows what each kind costs and gives."""

    partition: Partition = "full"

    collisions: int | None = None
    """Ids on each row, for hash; ids on each row of the first part, for quotient-remainder with two parts, whose
    second part has that many rows."""

    parts: int | None = None
    """Number of parts of sizes as equal as may be, for chinese-remainder, and for quotient-remainder where
    `collisions` is left out."""

    combine: Combine = "multiply"
    path_hidden: int = 0

    threshold: int = 0
    """Tables of at most so many ids keep a row for each id, of the full width."""

    alpha: float | None = None
    """full only: mixed dimensions. A table is `width` * (n_least / n)^alpha wide, rounded to a power of two, where n is
    its number of ids and n_least the least of all tables; a linear map makes `width` of it."""

    def __post_init__(self) -> None:
        check_choice(_OWNER, "partition", self.partition, PARTITIONS)
        check_choice(_OWNER, "combine", self.combine, COMBINES)
        check_int(_OWNER, "threshold", self.threshold, 0)
        check_int(_OWNER, "path_hidden", self.path_hidden, 0)
        for field, least in (("collisions", 1), ("parts", 2)):
            if getattr(self, field) is not None:
                check_int(_OWNER, field, getattr(self, field), least)
        if self.parts is not None and self.parts > MAX_PARTS:
            raise ConfigError(f"{_OWNER}: parts must be at most {MAX_PARTS}, got {self.parts}.")
        given = tuple(field for field in ("collisions", "parts") if getattr(self, field) is not None)
        if given not in _SIZES[self.partition]:
            expected = " or ".join(", ".join(names) or "no sizes" for names in _SIZES[self.partition])
            raise ConfigError(
                f"{_OWNER}: partition {self.partition} takes {expected}, got {' and '.join(given) or 'none'}."
            )
        several = self.partition in ("quotient-remainder", "chinese-remainder")
        if self.combine != "multiply" and not several:
            raise ConfigError(f"{_OWNER}: combine belongs to partitions of several parts, not {self.partition}.")
        if (self.path_hidden > 0) != (self.combine == "path"):
            raise ConfigError(f"{_OWNER}: path_hidden and combine path belong together.")
        if self.alpha is not None:
            if isinstance(self.alpha, bool) or not isinstance(self.alpha, (int, float)) or not 0 < self.alpha <= 10:
                raise ConfigError(f"{_OWNER}: alpha must be a number above 0 and at most 10, got {self.alpha!r}.")
            if self.partition != "full":
                raise ConfigError(f"{_OWNER}: alpha belongs to partition full, not {self.partition}.")

    def tables(self, ids: Mapping[str, int], width: int) -> tuple[TableConfig, ...]:
        """A table for each name, whose vectors are all `width` wide.

        Args:
            ids: number of ids of each table, by its name.
            width: of the vectors.

        Raises:
            ConfigError: the width goes with no table of this kind, such as an odd one with two parts side by side.
        """
        least = min(ids.values(), default=1)
        return tuple(self._table(name, count, width, least) for name, count in ids.items())

    def _table(self, name: str, ids: int, width: int, least: int) -> TableConfig:
        if ids <= self.threshold or (self.partition == "full" and self.alpha is None):
            return TableConfig(name=name, rows=ids, width=width)
        if self.alpha is not None:
            narrow = mixed_width(ids, least, width, self.alpha)
            return TableConfig(name=name, rows=ids, width=narrow, projection=width if narrow < width else None)
        return TableConfig(
            name=name,
            rows=ids,
            width=width,
            partition=self.partition,
            part_rows=self._part_rows(ids),
            combine=self.combine,
            path_hidden=self.path_hidden,
        )

    def _part_rows(self, ids: int) -> tuple[int, ...]:
        if self.parts is not None:
            sizes = coprime_sizes if self.partition == "chinese-remainder" else balanced_sizes
            return sizes(ids, self.parts)
        assert self.collisions is not None  # one of the two, by the constructor
        rows = -(-ids // self.collisions)
        return (rows,) if self.partition == "hash" else (rows, self.collisions)


_SIZES: dict[str, tuple[tuple[str, ...], ...]] = {
    "full": ((),),
    "hash": (("collisions",),),
    "quotient-remainder": (("collisions",), ("parts",)),
    "chinese-remainder": (("parts",),),
}
"""Which of `collisions` and `parts` each partition takes."""


def balanced_sizes(ids: int, parts: int) -> tuple[int, ...]:
    """The least sizes, none smaller than another by more than one, whose product is at least `ids`; largest first."""
    root = _root(ids, parts)
    larger = next(k for k in range(parts + 1) if root**k * (root - 1) ** (parts - k) >= ids)
    return (root,) * larger + (root - 1,) * (parts - larger)


def coprime_sizes(ids: int, parts: int) -> tuple[int, ...]:
    """Sizes close to each other, no two with a divisor in common, whose product is at least `ids`; least first."""
    first = max(1, _root(ids, parts) - 2 * parts * parts)  # below it, the sizes found would be less equal
    while math.prod(sizes := _coprime_from(first, parts)) < ids:
        first += 1
    return sizes


def mixed_width(ids: int, least: int, width: int, alpha: float) -> int:
    """Width of a table by the power rule of arXiv 1909.11810, rounded to a power of two, from 1 to `width`.

    Args:
        ids: of the table.
        least: ids of the smallest table, which is `width` wide.
        width: the full width.
        alpha: 0 makes all tables equally wide, larger ones make large tables narrower.
    """
    if ids <= least:
        return width
    power = round(math.log2(width) + alpha * math.log2(least / ids))
    return min(width, 1 << max(0, power))


def _root(ids: int, parts: int) -> int:
    """The least whole number whose power `parts` is at least `ids`."""
    root: int = max(1, round(ids ** (1 / parts)))  # a float: off by one at most
    while root**parts < ids:
        root += 1
    while (root - 1) ** parts >= ids:
        root -= 1
    return root


def _coprime_from(first: int, parts: int) -> tuple[int, ...]:
    """The first numbers from `first` on that have no divisor in common with those before them."""
    sizes: list[int] = []
    number = first
    while len(sizes) < parts:
        if all(math.gcd(number, size) == 1 for size in sizes):
            sizes.append(number)
        number += 1
    return tuple(sizes)
