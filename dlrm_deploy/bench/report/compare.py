"""Which rows belong together, and how much faster our engines are than the fastest peer of the same run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dlrm_deploy.bench.report.looks import is_ours, is_peer
from dlrm_deploy.bench.report.rows import Row


@dataclass(frozen=True, slots=True)
class Panel:
    """Rows of one model under the same circumstances: one section of the report."""

    model: str
    threads: int | None
    distribution: str
    rows: tuple[Row, ...]
    """Measured ones, in the order of the files."""

    not_run: tuple[Row, ...]

    @property
    def title(self) -> str:
        threads = "" if self.threads is None else f", {self.threads} thread{'s' if self.threads != 1 else ''}"
        return f"{self.model}{threads}{', ' + self.distribution + ' ids' if self.distribution else ''}"

    @property
    def batches(self) -> list[int]:
        return sorted({row.batch for row in self.rows if row.batch is not None})

    @property
    def commands(self) -> list[str]:
        """What repeats the measurement, without repetitions."""
        return list(dict.fromkeys(row.text("command") for row in (*self.rows, *self.not_run) if row.text("command")))

    def of_engine(self, engine: str) -> list[Row]:
        """Rows of one engine, by batch size."""
        rows = [row for row in self.rows if row.engine == engine and row.batch is not None]
        return sorted(rows, key=lambda row: row.batch or 0)


@dataclass(frozen=True, slots=True)
class SpeedUp:
    """One of our engines against the fastest peer at one batch size of one run."""

    engine: str
    batch: int
    factor: float
    peer: str
    peers: int
    """How many peers there were to choose the fastest from."""


def panels_of(rows: Iterable[Row]) -> list[Panel]:
    """Sections in order of appearance. Rows that name no model and were not run go to the section before them."""
    groups: dict[tuple[str, int | None, str], tuple[list[Row], list[Row]]] = {}
    by_run: dict[tuple[str, str], tuple[str, int | None, str]] = {}
    strays = []
    for row in rows:
        threads = row.positive("threads")
        key = (row.model, None if threads is None else int(threads), row.text("distribution"))
        if row.facts.get("not_run"):
            strays.append((row, key))
            continue
        groups.setdefault(key, ([], []))[0].append(row)
        by_run.setdefault(row.run, key)
    for row, key in strays:
        known = key if key in groups else by_run.get(row.run, key)
        groups.setdefault(known, ([], []))[1].append(row)
    return [Panel(*key, tuple(measured), tuple(not_run)) for key, (measured, not_run) in groups.items()]


def speed_ups(panel: Panel) -> list[SpeedUp]:
    """Every row of ours that has a peer in its run, by engine and batch size."""
    found = []
    for row in panel.rows:
        if not is_ours(row.engine) or row.batch is None:
            continue
        rivals = [
            (factor, other.engine)
            for other in panel.rows
            if is_peer(other.engine) and other.batch == row.batch and other.run == row.run
            if (factor := times_as_fast(row, other)) is not None
        ]
        if rivals:
            factor, peer = min(rivals)
            found.append(SpeedUp(row.engine, row.batch, factor, peer, len({engine for _, engine in rivals})))
    return sorted(found, key=lambda s: s.batch)


def times_as_fast(row: Row, other: Row) -> float | None:
    """How many times as fast `row` is as `other`: by their ratios to the same baseline, which were taken round by
    round, or else by their median times."""
    ours, theirs = row.positive("ratio"), other.positive("ratio")
    if ours is not None and theirs is not None and row.text("baseline") == other.text("baseline"):
        return ours / theirs
    ours, theirs = row.positive("median_ms"), other.positive("median_ms")
    return None if ours is None or theirs is None else theirs / ours


def best_of_ours(found: Sequence[SpeedUp]) -> str | None:
    """The engine of ours with the largest speed-up: geometric mean over the batch sizes that most of ours share."""
    engines = list(dict.fromkeys(s.engine for s in found))
    if not engines:
        return None
    most = max(len({s.batch for s in found if s.engine == engine}) for engine in engines)
    complete = [engine for engine in engines if len({s.batch for s in found if s.engine == engine}) == most]
    return max(complete, key=lambda engine: geometric_mean([s.factor for s in found if s.engine == engine]))


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))
