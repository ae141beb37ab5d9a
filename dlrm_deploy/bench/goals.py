"""The goals for speed, and the table in docs/performance.md that says which are reached, from rows of a benchmark.

A lead is the ratio of two engines in one interleaved run; "best peer" is the fastest engine there that is not ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from dlrm_deploy.bench.peers.registry import PEER_NAMES
from dlrm_deploy.bench.stored import Facts

PEERS = ("torch", "onnxruntime-stock", *PEER_NAMES)

FP32 = "onnxruntime"
BF16 = "onnxruntime[fp32,bf16]"
INT8 = "onnxruntime[int8,bf16]"

BEGIN = "<!-- begin of the goals: made by `make bench-report` -->"
END = "<!-- end of the goals -->"


@dataclass(frozen=True, kw_only=True, slots=True)
class Goal:
    """What is wanted of one of our engines at a batch size."""

    model: str
    batch: int
    engine: str
    must: float
    stretch: float
    peers: tuple[str, ...] = PEERS
    most_floor: float | None = None
    """Time over the floor, at most; None where it was not asked for."""

    floor_of: str | None = None
    """Engine whose floor is meant; None for its own."""


def _goals() -> Iterator[Goal]:
    kaggle = {1: (2.0, 3, None), 32: (3.5, 5, 2.5), 128: (4.5, 7, 2.0), 512: (3.5, 5, 1.6), 2048: (2.5, 5, 1.7),
              8192: (2.5, 5, 1.7)}  # fmt: skip
    paper = {1: (1.5, 2.5, None), 32: (2.0, 3, 1.8), 128: (2.0, 2.7, 1.4), 512: (1.4, 2, 1.4), 2048: (1.4, 2, 1.3),
             8192: (1.4, 2, 1.3)}  # fmt: skip
    rm2 = {1: (3, 5, 1.5), 32: (1.2, 1.4, 1.15), 128: (1.2, 1.4, 1.15), 512: (1.2, 1.4, 1.15), 2048: (1.0, 1.2, 1.15)}
    for model, goals in (("kaggle", kaggle), ("paper-32", paper), ("rm2-like", rm2)):
        for batch, (must, stretch, most_floor) in goals.items():
            yield Goal(model=model, batch=batch, engine=BF16, must=must, stretch=stretch, most_floor=most_floor)
    for batch in (32, 128, 512, 2048):
        yield Goal(
            model="rm2-like",
            batch=batch,
            engine=INT8,
            must=1.8,
            stretch=2.5,
            peers=("fbgemm-int8-bf16",),
            most_floor=0.45,
            floor_of=BF16,
        )


GOALS: tuple[Goal, ...] = tuple(_goals())


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What was measured for a goal."""

    goal: Goal
    peer: str
    """The fastest of the goal's peers."""

    lead: float
    over_floor: float | None
    beside: Mapping[str, float]
    """Leads of our other engines over the same peer."""

    @property
    def verdict(self) -> str:
        reached = self.lead >= self.goal.must
        near = self.goal.most_floor is None or self.over_floor is None or self.over_floor <= self.goal.most_floor
        if not (reached and near):
            missed = [word for word, is_so in (("lead", not reached), ("floor", not near)) if is_so]
            return f"**missed** ({' and '.join(missed)})"
        return "stretch" if self.lead >= self.goal.stretch else "reached"


def outcome(goal: Goal, rows: Sequence[Facts]) -> Outcome | None:
    """What rows of one run say of a goal; None where they lack its engine or peers."""
    at = {row["engine"]: row for row in rows if row.get("batch") == goal.batch and "ratio" in row}
    peers = [name for name in goal.peers if name in at]
    if goal.engine not in at or not peers:
        return None
    peer = max(peers, key=lambda name: float(at[name]["ratio"]))

    def lead(engine: str) -> float:
        return float(at[engine]["ratio"]) / float(at[peer]["ratio"])

    ours = at[goal.engine]
    over_floor = ours.get("times_floor")
    if goal.floor_of is not None and over_floor is not None:
        other = at.get(goal.floor_of, {}).get("floor_ms")
        over_floor = None if other is None else over_floor * ours["floor_ms"] / other
    return Outcome(
        goal=goal,
        peer=peer,
        lead=lead(goal.engine),
        over_floor=over_floor,
        beside={name: lead(name) for name in at if name not in (*PEERS, goal.engine)},
    )


def outcomes(rows: Sequence[Facts], goals: Sequence[Goal] = GOALS) -> list[Outcome]:
    """Of every goal that the rows tell something of; each run's rows are compared with one another only."""
    found = []
    for goal in goals:
        runs: dict[object, list[Facts]] = {}
        for row in rows:
            if row.get("model") == goal.model and row.get("kind", "throughput") == "throughput":
                runs.setdefault((row.get("command"), row.get("time")), []).append(row)
        for run in runs.values():
            result = outcome(goal, run)
            if result is not None:
                found.append(result)
                break
    return found


def markdown(found: Sequence[Outcome]) -> str:
    """The table."""
    lines = [
        "| model, batch | engine | best peer | lead | must | stretch | x floor | at most | outcome | our others |",
        "|---|---|---|---:|---:|---:|---:|---:|---|---|",
    ]
    for one in found:
        goal = one.goal
        beside = ", ".join(f"`{_short(name)}` {lead:.2f}" for name, lead in one.beside.items())
        cells = [
            f"{goal.model}, {goal.batch}",
            f"`{_short(goal.engine)}`",
            f"`{one.peer}`",
            f"{one.lead:.2f}",
            f"{goal.must:g}",
            f"{goal.stretch:g}",
            "-" if one.over_floor is None else f"{one.over_floor:.2f}",
            "-" if goal.most_floor is None else f"{goal.most_floor:g}",
            one.verdict,
            beside,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _short(engine: str) -> str:
    """Ours by number formats alone: fp32, fp32+bf16, int8+bf16 (tables, MLPs)."""
    _, _, formats = engine.partition("[")
    return formats.rstrip("]").replace(",", "+") or "fp32"
