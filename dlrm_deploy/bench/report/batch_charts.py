"""Charts over batch size: throughput, speed-up over the fastest peer, and time over the machine's floor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from dlrm_deploy.bench.report import axes
from dlrm_deploy.bench.report.axes import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Figure, Scale, log_scale, short
from dlrm_deploy.bench.report.compare import Panel, SpeedUp, best_of_ours
from dlrm_deploy.bench.report.looks import Look
from dlrm_deploy.bench.report.markup import Markup, folded, join, table, tag
from dlrm_deploy.bench.report.rows import Row

_Value = Callable[[Row], float | None]


def throughput(panel: Panel, looks: Mapping[str, Look]) -> Figure | None:
    """Samples a second over batch size, both logarithmic."""

    def says(row: Row, value: float) -> str:
        details = [f"{short(value)} samples/s"]
        if (median := row.positive("median_ms")) is not None:
            details.append(f"{short(median)} ms a batch")
        if (p99 := row.positive("p99_ms")) is not None:
            details.append(f"99th percentile {short(p99)} ms")
        return " · ".join(details)

    return _over_batch(
        panel,
        looks,
        lambda row: row.positive("samples_per_s"),
        says,
        name="throughput",
        title="Throughput",
        note="Samples per second over batch size. Higher is better; both axes are logarithmic.",
        axis="samples per second",
    )


def time_over_floor(panel: Panel, looks: Mapping[str, Look]) -> Figure | None:
    """Multiples of the time that memory and matrix units alone would take."""

    def says(row: Row, value: float) -> str:
        floor = row.positive("floor_ms")
        return f"{short(value)} times the floor" + (f" of {short(floor)} ms" if floor is not None else "")

    return _over_batch(
        panel,
        looks,
        lambda row: row.positive("times_floor"),
        says,
        name="floor",
        title="Time over the floor",
        note="Measured time as a multiple of the least possible: bytes gathered over this machine's gather rate plus "
        "operations over its matrix rate, both measured in the same minute. 1 is the machine's limit; lower is better.",
        axis="times the floor",
        line_at=(1.0, "the floor"),
    )


def _over_batch(
    panel: Panel,
    looks: Mapping[str, Look],
    value_of: _Value,
    says: Callable[[Row, float], str],
    *,
    name: str,
    title: str,
    note: str,
    axis: str,
    line_at: tuple[float, str] | None = None,
) -> Figure | None:
    """A line an engine; None where no row has the value."""
    values = {
        engine: [(row.batch, value, row) for row in panel.of_engine(engine) if row.batch and (value := value_of(row))]
        for engine in looks
    }
    values = {engine: points for engine, points in values.items() if points}
    if not values:
        return None
    batches = sorted({batch for points in values.values() for batch, _, _ in points})
    x = axes.batch_scale(batches)
    reach = [value for points in values.values() for _, value, _ in points]
    y = log_scale([*reach, *([line_at[0]] if line_at else [])], HEIGHT - BOTTOM, TOP)
    marks: list[Markup] = []
    for engine in reversed(values):  # ours last, above the others
        points = [
            (x(batch), y(value), f"{engine} · batch {batch} · {says(row, value)}")
            for batch, value, row in values[engine]
        ]
        marks += axes.series(looks[engine], points)
    positions = [(x(batch), y(value)) for points in values.values() for batch, value, _ in points]
    top = max(((value, engine, batch) for engine, points in values.items() for batch, value, _ in points))
    describes = (
        f"{len(values)} engines at batch sizes {_list_of(batches)}; the largest value is {short(top[0])} {axis}, "
        f"of {top[1]} at batch {top[2]}. The table below has every value."
    )
    picture = axes.chart(
        f"{title} of {panel.title}",
        describes,
        axes.frame(x, y, axes.batch_ticks(batches), "batch size", axis),
        _reference(y, *line_at, positions) if line_at else None,
        *marks,
        name=name,
    )
    cells = {engine: {batch: short(value) for batch, value, _ in points} for engine, points in values.items()}
    return Figure(title, note, picture, _pivot(f"{title} of {panel.title}, {axis}", cells, batches))


def speed_up(panel: Panel, looks: Mapping[str, Look], found: Sequence[SpeedUp]) -> Figure | None:
    """How many times as fast as the fastest peer each of our engines is."""
    if not found:
        return None
    batches = sorted({s.batch for s in found})
    x = axes.batch_scale(batches)
    y = Scale(0.0, max(1.2, *(s.factor for s in found)) * 1.12, HEIGHT - BOTTOM, TOP)
    best = best_of_ours(found)
    engines = [engine for engine in looks if any(s.engine == engine for s in found)]
    marks: list[Markup] = []
    for engine in reversed(engines):
        points = [
            (
                x(s.batch),
                y(s.factor),
                f"{engine} · batch {s.batch} · {s.factor:.2f} times as fast as {s.peer}, the fastest of {s.peers}",
            )
            for s in found
            if s.engine == engine
        ]
        marks += axes.series(looks[engine], points)
        if engine == best:
            labelled = _with_room(points, [s.factor for s in found if s.engine == engine])
            labels = (axes.text(px, py - 11, f"{factor:.1f}×", "middle", "value") for px, py, factor in labelled)
            marks.append(tag("g", *labels, data_e=looks[engine].key, aria_hidden="true"))
    own = [s for s in found if s.engine == best]
    describes = "; ".join(f"batch {s.batch}: {s.factor:.2f} times {s.peer}" for s in own)
    title = "Speed-up over the fastest peer"
    picture = axes.chart(
        f"{title}, {panel.title}",
        f"{best}: {describes}. The table below has every value.",
        axes.frame(x, y, axes.batch_ticks(batches), "batch size", "times as fast"),
        _reference(y, 1.0, "the fastest peer", [(x(s.batch), y(s.factor)) for s in found]),
        *marks,
        name="speedup",
    )
    cells: dict[str, dict[int, str]] = {engine: {} for engine in engines}
    for s in found:
        cells[s.engine][s.batch] = f"{s.factor:.2f}"
    cells["fastest peer"] = {s.batch: s.peer for s in found}
    note = (
        "Time of the fastest peer over ours, in the same interleaved run. The peer may be another one at each batch "
        "size, and of any precision: point at a mark to see which."
    )
    return Figure(title, note, picture, _pivot(f"{title}, {panel.title}", cells, batches))


def _with_room(
    points: Sequence[tuple[float, float, str]], factors: Sequence[float]
) -> list[tuple[float, float, float]]:
    """Positions and factors of the points with room for a label beside the one before."""
    chosen: list[tuple[float, float, float]] = []
    for (px, py, _), factor in zip(points, factors, strict=True):
        if not chosen or px - chosen[-1][0] >= 36:
            chosen.append((px, py, factor))
    return chosen


def _reference(y: Scale, value: float, label: str, positions: Sequence[tuple[float, float]]) -> Markup:
    """A level line, labelled at the end where fewer marks are near."""
    at = y(value)
    left = min((abs(py - at + 8) for px, py in positions if px < WIDTH * 0.35), default=HEIGHT)
    right = min((abs(py - at + 8) for px, py in positions if px > WIDTH * 0.65), default=HEIGHT)
    place = (LEFT + 3, "start") if left >= right else (WIDTH - RIGHT - 2, "end")
    return join(
        [
            tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=at, y2=at, class_="reference"),
            axes.text(place[0], at - 5, label, place[1], "reference-label"),
        ]
    )


def _pivot(caption: str, cells: Mapping[str, Mapping[int, str]], batches: Sequence[int]) -> Markup:
    headings = ["engine", *(f"batch {batch}" for batch in batches)]
    lines = [[engine, *(by_batch.get(batch, "") for batch in batches)] for engine, by_batch in cells.items()]
    return folded("Table", table(headings, lines, caption))


def _list_of(batches: Sequence[int]) -> str:
    return ", ".join(map(str, batches))
