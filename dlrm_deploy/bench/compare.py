"""Compare a run with an earlier one by ratios to the same baseline: absolute times of two days say nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from dlrm_deploy.bench.stored import Facts
from dlrm_deploy.errors import ConfigError

TOLERANCE = 0.15
"""Loss of the ratio that is noise: rounds on a shared machine differ by as much."""

_SETTINGS = ("model", "engine", "batch", "baseline", "threads", "distribution")
"""What two rows have in common to be comparable."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """One engine at one batch size, then and now."""

    model: str
    engine: str
    batch: int
    baseline: str
    before: float
    """Times as fast as the baseline."""

    after: float
    tolerance: float

    @property
    def change(self) -> float:
        """0.1 for a tenth faster than before, against the same baseline."""
        return self.after / self.before - 1

    @property
    def regressed(self) -> bool:
        return self.change < -self.tolerance


def compare_rows(
    before: Sequence[Facts], after: Sequence[Facts], tolerance: float = TOLERANCE
) -> tuple[list[Change], list[str]]:
    """Compare the rows that two runs have in common: same model, engine, batch, baseline, threads and distribution.

    Args:
        before: rows of the earlier run.
        after: rows of the new one.
        tolerance: share of the ratio that may be lost.

    Returns:
        The changes in the order of `after`, and a sentence on each of its rows that the earlier run does not have or
        the reverse.

    Raises:
        ConfigError: nothing in common, or a tolerance outside [0, 1).
    """
    if not 0 <= tolerance < 1:
        raise ConfigError(f"tolerance must be at least 0 and below 1, got {tolerance:g}.")
    old, new = _by_settings(before), _by_settings(after)
    common = [key for key in new if key in old]
    if not common:
        raise ConfigError(
            "the two runs have nothing to compare: no engine and batch size of the same model, baseline, number of "
            "threads and distribution. Run again with --rerun on the old file."
        )
    changes = [
        Change(
            model=key[0],
            engine=key[1],
            batch=key[2],
            baseline=key[3],
            before=old[key]["ratio"],
            after=new[key]["ratio"],
            tolerance=tolerance,
        )
        for key in common
    ]
    return changes, [*_alone(new, old, "new: there is no such row"), *_alone(old, new, "gone: there was such a row")]


def print_changes(changes: Sequence[Change], alone: Sequence[str]) -> Iterator[str]:
    """Lines for people, regressions last."""
    for change in sorted(changes, key=lambda change: change.regressed):
        word = "REGRESSED" if change.regressed else "ok"
        yield (
            f"{word:9}  {change.model}  {change.engine}  batch {change.batch}: {change.before:.2f} -> "
            f"{change.after:.2f} x {change.baseline} ({change.change:+.0%})"
        )
    yield from alone
    regressed = sum(change.regressed for change in changes)
    yield f"{regressed} of {len(changes)} rows lost more than {changes[0].tolerance:.0%} of their ratio."


def _by_settings(rows: Sequence[Facts]) -> dict[tuple[Any, ...], Facts]:
    timed = [row for row in rows if row.get("kind", "throughput") == "throughput" and "ratio" in row]
    return {tuple(row.get(name) for name in _SETTINGS): row for row in timed}


def _alone(rows: dict[tuple[Any, ...], Facts], others: dict[tuple[Any, ...], Facts], word: str) -> list[str]:
    return [f"{word}: {key[0]}, {key[1]} at batch {key[2]}, against {key[3]}." for key in rows if key not in others]
