"""Rows of a benchmark as the report reads them: flat JSON objects of which any field may be missing."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dlrm_deploy.errors import DataError

_LARGEST = 1e30
"""No measurement is larger, and products of a few such numbers are still finite."""


@dataclass(frozen=True, slots=True)
class Row:
    """One JSON object. Values of an unexpected type, NaN and numbers beyond all measure count as missing."""

    facts: Mapping[str, object]

    def number(self, name: str) -> float | None:
        """A number, or None."""
        return finite(self.facts.get(name))

    def positive(self, name: str) -> float | None:
        """A number that a logarithmic axis can show, or None."""
        value = self.number(name)
        return value if value is not None and value > 1 / _LARGEST else None

    def text(self, name: str) -> str:
        """A text, or "" where there is none."""
        value = self.facts.get(name)
        return value if isinstance(value, str) else ""

    def mapping(self, name: str) -> Mapping[str, object]:
        """An object, or an empty one."""
        value = self.facts.get(name)
        return value if isinstance(value, Mapping) else {}

    def texts(self, name: str) -> list[str]:
        """The texts of a list, or none."""
        value = self.facts.get(name)
        return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []

    def rows(self, name: str) -> tuple[Row, ...]:
        """A list of objects, or an empty one."""
        value = self.facts.get(name)
        return tuple(Row(item) for item in value if isinstance(item, Mapping)) if isinstance(value, list) else ()

    @property
    def kind(self) -> str:
        """`throughput` where the row does not say."""
        return self.text("kind") or "throughput"

    @property
    def engine(self) -> str:
        return self.text("engine") or "?"

    @property
    def model(self) -> str:
        return self.text("model") or "unnamed model"

    @property
    def batch(self) -> int | None:
        """Samples a call."""
        value = self.positive("batch")
        return int(value) if value is not None and value == int(value) else None

    @property
    def run(self) -> tuple[str, str]:
        """What the rows of one run of the benchmark share: their times are comparable."""
        return self.text("command"), self.text("time")


def finite(value: object) -> float | None:
    """`value` if it is a number (a bool is none) that can have been measured, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if abs(number) < _LARGEST else None


def read_rows(paths: Sequence[Path]) -> list[Row]:
    """Read files of JSON lines, or of one JSON array, in the order given.

    Raises:
        DataError: a file cannot be read or a line of it is not a JSON object.
    """
    return [row for path in paths for row in _read(path)]


def _read(path: Path) -> Iterator[Row]:
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as err:
        raise DataError(
            f"cannot read {path}: {err}. A report is made from the rows that `dlrm-deploy bench` writes."
        ) from err
    if content.lstrip().startswith("["):
        pieces = [("", content)]
    else:
        pieces = [(f" in line {number}", line) for number, line in enumerate(content.splitlines(), 1) if line.strip()]
    for where, piece in pieces:
        try:
            value = json.loads(piece)
        except (ValueError, RecursionError) as err:
            raise DataError(f"{path} is not JSON{where}: {err}. Expected one JSON object a line.") from err
        for item in value if isinstance(value, list) else [value]:
            if not isinstance(item, dict):
                raise DataError(f"{path} holds {type(item).__name__}{where}, expected JSON objects, one a line.")
            yield Row(item)
