"""How features' vectors come from what the operators pool. Free of torch: the model and both graphs follow it.

Pooled outputs are [B, T, D], one per table group, then [B, 1, D] for each feature of a path table. Consecutive features
that are made in the same way form a run, so that a model of plain tables is one run and needs no work at all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from dlrm_deploy.config import ModelConfig
from dlrm_deploy.model.keys import projection_key
from dlrm_deploy.tables import Combine, TableConfig


@dataclass(frozen=True, slots=True)
class Run:
    """Vectors [B, count, W] of consecutive features."""

    first: int
    """Position of the first feature."""

    count: int
    parts: tuple[tuple[int, int], ...]
    """Pooled output and first slot in it, of each part."""

    combine: Combine
    """How the parts' slots become one vector, where there are several."""

    projection: str | None
    """Key of the linear map behind them; such a run has one feature."""

    width: int
    """W, after the projection."""


def path_features(config: ModelConfig) -> tuple[tuple[int, TableConfig], ...]:
    """Position and table of the features whose table combines by path, in feature order."""
    tables = ((f, config.table(feature.table)) for f, feature in enumerate(config.features))
    return tuple((f, table) for f, table in tables if table.combine == "path")


def runs(config: ModelConfig) -> tuple[Run, ...]:
    """All runs, in feature order."""
    groups = config.groups
    places = {
        (slot.feature, slot.part.name): (g, t) for g, group in enumerate(groups) for t, slot in enumerate(group.slots)
    }
    paths = {f: (len(groups) + i, 0) for i, (f, _) in enumerate(path_features(config))}
    found: list[Run] = []
    for f, feature in enumerate(config.features):
        table = config.table(feature.table)
        parts = (paths[f],) if f in paths else tuple(places[f, part.name] for part in table.parts)
        key = None if table.projection is None else projection_key(table.name)
        run = Run(f, 1, parts, "multiply" if f in paths else table.combine, key, table.output_width)
        if found and _follows(found[-1], run):
            found[-1] = replace(found[-1], count=found[-1].count + 1)
        else:
            found.append(run)
    return tuple(found)


def wide_places(config: ModelConfig) -> tuple[int, int]:
    """Table group and first slot of the first-order weights; they are F slots in feature order."""
    for g, group in enumerate(config.groups):
        for t, slot in enumerate(group.slots):
            if slot.part.name.endswith(".wide"):
                return g, t
    raise KeyError("wide")


def _follows(run: Run, other: Run) -> bool:
    """Whether `other`, of one feature, can be the run's next one."""
    next_parts = tuple((output, slot + run.count) for output, slot in run.parts)
    return (
        run.projection is None
        and (other.parts, other.combine, other.projection, other.width)
        == (next_parts, run.combine, None, run.width)
    )  # fmt: skip
