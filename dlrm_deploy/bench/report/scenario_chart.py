"""Traffic as MLPerf LoadGen makes it: latency over load with the bound it must keep, and every scenario's figures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from dlrm_deploy.bench.report import axes
from dlrm_deploy.bench.report.axes import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Figure, Scale, log_scale, short
from dlrm_deploy.bench.report.looks import Look
from dlrm_deploy.bench.report.markup import Markup, folded, join, table, tag
from dlrm_deploy.bench.report.rows import Row


@dataclass(frozen=True, slots=True)
class _Load:
    engine: str
    target_qps: float
    p99_ms: float
    valid: bool
    why: str
    """LoadGen's reasons where it is not."""

    @property
    def verdict(self) -> str:
        return "valid" if self.valid else "not valid"


def latency_over_load(rows: Sequence[Row], looks: Mapping[str, Look], model: str) -> Figure | None:
    """99th percentile over the queries asked for a second; None where no row has a curve."""
    loads = [load for row in rows for load in _curve(row)]
    if not loads:
        return None
    bounds = sorted({bound for row in rows if row.rows("load_curve") and (bound := row.positive("p99_bound_ms"))})
    x = Scale(0.0, max(load.target_qps for load in loads) * 1.06, LEFT, WIDTH - RIGHT)
    y = log_scale([*(load.p99_ms for load in loads), *bounds], HEIGHT - BOTTOM, TOP)
    marks: list[Markup] = []
    for engine in reversed([engine for engine in looks if any(load.engine == engine for load in loads)]):
        own = sorted((load for load in loads if load.engine == engine), key=lambda load: load.target_qps)
        marks += axes.series(
            looks[engine],
            [
                (
                    x(load.target_qps),
                    y(load.p99_ms),
                    f"{engine} · {short(load.target_qps)} queries/s asked for · "
                    f"99th percentile {short(load.p99_ms)} ms · {load.verdict}{load.why and ': '}{load.why}",
                )
                for load in own
            ],
            hollow=[not load.valid for load in own],
        )
    title = "Latency over load"
    picture = axes.chart(
        f"{title}, {model}",
        f"{len(loads)} loads, {sum(load.valid for load in loads)} of them valid. The table below has every value.",
        axes.frame(
            x, y, [(value, short(value)) for value in x.ticks], "queries per second asked for", "p99 latency, ms"
        ),
        *(_bound(y, bound) for bound in bounds),
        *marks,
        name="load",
    )
    lines = [
        [load.engine, short(load.target_qps), short(load.p99_ms), load.verdict]
        for load in sorted(loads, key=lambda load: (load.engine, load.target_qps))
    ]
    behind = table(["engine", "queries/s asked for", "p99 ms", "verdict"], lines, f"{title}, {model}")
    note = (
        "Queries arrive at random (Poisson), many pairs each, and 99 of 100 must be answered within the bound. Filled "
        "marks are loads that LoadGen calls valid, hollow ones are not."
    )
    return Figure(title, note, picture, folded("Table", behind))


def _curve(row: Row) -> list[_Load]:
    return [
        _Load(row.engine, qps, p99, point.facts.get("valid") is True, "; ".join(point.texts("why")))
        for point in row.rows("load_curve")
        if (qps := point.positive("target_qps")) is not None and (p99 := point.positive("p99_ms")) is not None
    ]


def _bound(y: Scale, bound: float) -> Markup:
    at = y(bound)
    return join(
        [
            tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=at, y2=at, class_="reference"),
            axes.text(LEFT + 4, at - 5, f"bound {short(bound)} ms", "start", "reference-label"),
        ]
    )


_FIGURES = (
    ("valid_qps", "valid queries/s"),
    ("samples_per_s", "samples/s"),
    ("pairs_per_s", "pairs/s"),
    ("p50_ms", "p50 ms"),
    ("p90_ms", "p90 ms"),
    ("p99_ms", "p99 ms"),
    ("p99_bound_ms", "p99 bound, ms"),
    ("workers", "workers"),
    ("threads", "threads a worker"),
)


def scenario_table(rows: Sequence[Row], looks: Mapping[str, Look], model: str) -> Markup:
    """Every scenario's figures, a column for each engine; what was measured twice stands there twice."""
    engines = [engine for engine in looks if any(row.engine == engine for row in rows)]
    lines = []
    for scenario in dict.fromkeys(row.text("scenario") or "?" for row in rows):
        own = [row for row in rows if (row.text("scenario") or "?") == scenario]
        for key, heading in _FIGURES:
            cells = [_cell(row.number(key) for row in own if row.engine == engine) for engine in engines]
            if any(cells):
                lines.append([f"{scenario}, {heading}", *cells])
        verdicts = [", ".join(row.text("verdict").lower() for row in own if row.engine == engine) for engine in engines]
        if any(verdicts):
            lines.append([f"{scenario}, verdict", *verdicts])
    return table(["scenario", *engines], lines, f"Scenarios, {model}")


def _cell(values: Iterable[float | None]) -> str:
    return ", ".join(short(value) for value in values if value is not None)
