"""The roofline: operations a second over operations a byte, under what memory and matrix units can do.

Bytes are those of the table rows that a sample reads: embeddings are what a DLRM moves. The ceilings are medians of
what the same runs measured on this machine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from dlrm_deploy.bench.report import axes
from dlrm_deploy.bench.report.axes import BOTTOM, LEFT, RIGHT, TOP, WIDTH, Figure, Scale, log_scale, short
from dlrm_deploy.bench.report.compare import Panel
from dlrm_deploy.bench.report.looks import Look
from dlrm_deploy.bench.report.markup import Markup, folded, table, tag
from dlrm_deploy.bench.report.rows import Row, finite

_HEIGHT = 360.0
_MATRIX = (("fma_gflops", "fp32 FMA"), ("amx_bf16_gflops", "AMX bf16"), ("amx_int8_gops", "AMX int8"))


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Rates of one machine: 1e9 operations, and 1e9 bytes, a second."""

    matrix: dict[str, float]
    stream: float | None
    gather: dict[int, float]
    """By bytes of a row."""


def ceilings_of(rows: Sequence[Row]) -> Ceilings:
    """The median of every rate that the rows carry."""
    known = [calibration for row in rows if (calibration := row.mapping("calibration"))]
    gather: dict[int, list[float]] = {}
    for calibration in known:
        for row_bytes, rate in _gather_of(calibration):
            gather.setdefault(row_bytes, []).append(rate)
    return Ceilings(
        matrix={title: value for key, title in _MATRIX if (value := _median(known, key)) is not None},
        stream=_median(known, "stream_gb_per_s"),
        gather={row_bytes: median(rates) for row_bytes, rates in sorted(gather.items())},
    )


def _gather_of(calibration: Mapping[str, object]) -> list[tuple[int, float]]:
    by_size = calibration.get("gather")
    pairs = list(by_size.items()) if isinstance(by_size, Mapping) else []
    pairs.append((calibration.get("row_bytes"), calibration.get("gather_gb_per_s")))
    found = []
    for size, rate in pairs:
        value = finite(rate)
        if str(size).isdecimal() and value is not None and value > 0:
            found.append((int(str(size)), value))
    return list(dict.fromkeys(found))


def _median(known: Sequence[Mapping[str, object]], key: str) -> float | None:
    values = [value for calibration in known if (value := finite(calibration.get(key))) is not None and value > 0]
    return median(values) if values else None


@dataclass(frozen=True, slots=True)
class _Point:
    engine: str
    batch: int
    intensity: float
    gflops: float


def _points(panel: Panel) -> list[_Point]:
    found = []
    for row in panel.rows:
        flops, moved = row.positive("flops_per_sample"), row.positive("bytes_per_sample")
        rate = row.positive("samples_per_s")
        if flops is not None and moved is not None and rate is not None and row.batch:
            found.append(_Point(row.engine, row.batch, flops / moved, flops * rate / 1e9))
    return found


def roofline(panel: Panel, looks: Mapping[str, Look]) -> Figure | None:
    """One mark a row; None where rows do not say their operations and bytes, or no limit was measured."""
    points = _points(panel)
    limits = ceilings_of(panel.rows)
    slopes = [*limits.gather.values(), *([limits.stream] if limits.stream else [])]
    if not points or not slopes or not limits.matrix:
        return None
    knees = [rate / slope for rate in limits.matrix.values() for slope in slopes]
    intensities = [point.intensity for point in points]
    x = log_scale([min([*intensities, *knees]) / 5, max([*intensities, *knees]) * 4], LEFT, WIDTH - RIGHT, 1.0)
    rates = [point.gflops for point in points]
    y = log_scale([min(rates), max([*rates, *limits.matrix.values()]) * 1.3], _HEIGHT - BOTTOM, TOP, 1.4)
    marks = [
        axes.mark(
            looks[p.engine],
            x(p.intensity),
            y(p.gflops),
            f"{p.engine} · batch {p.batch} · {short(p.gflops)} GFLOP/s at {short(p.intensity)} operations a byte"
            f"{_share(p, limits)}",
        )
        for p in sorted(points, key=lambda p: looks[p.engine].ours)
    ]
    best = max(points, key=lambda p: p.gflops)
    title = "Roofline"
    picture = axes.chart(
        f"{title} of {panel.title}",
        f"{len(points)} measurements under {_in_words(limits)}. The fastest, {best.engine} at batch {best.batch}, does "
        f"{short(best.gflops)} GFLOP/s.",
        axes.frame(
            x, y, [(value, short(value)) for value in x.ticks], "operations per byte of table rows", "GFLOP per second"
        ),
        _ceilings(x, y, limits),
        *marks,
        height=_HEIGHT,
        name="roofline",
    )
    lines = [
        [p.engine, str(p.batch), short(p.intensity), short(p.gflops), f"{p.gflops / _roof(p, limits):.0%}"]
        for p in sorted(points, key=lambda p: (list(looks).index(p.engine), p.batch))
    ]
    headings = ["engine", "batch", "operations a byte", "GFLOP/s", "of the highest roof"]
    note = (
        "Rate reached over operations per byte gathered, under what memory (slanted) and matrix units (level) allow. "
        "Table rows that stay in the caches can rise above the slanted lines."
    )
    return Figure(title, note, picture, folded("Table", table(headings, lines, f"{title} of {panel.title}")))


def _roof(point: _Point, limits: Ceilings) -> float:
    """The highest rate that any ceiling allows at this intensity."""
    memory = max([*limits.gather.values()] or [limits.stream or math.inf])
    return min(memory * point.intensity, max(limits.matrix.values()))


def _share(point: _Point, limits: Ceilings) -> str:
    return f" · {point.gflops / _roof(point, limits):.0%} of the highest roof there"


def _in_words(limits: Ceilings) -> str:
    parts = []
    if limits.gather:
        sizes, rates = list(limits.gather), list(limits.gather.values())
        parts.append(f"random rows of {_span(sizes)} bytes at {_span(rates)} GB/s")
    if limits.stream:
        parts.append(f"streaming reads at {short(limits.stream)} GB/s")
    parts += [
        f"{title} at {short(rate)} {'GOP' if 'int' in title else 'GFLOP'}/s" for title, rate in limits.matrix.items()
    ]
    return ", ".join(parts)


def _span(values: Sequence[float]) -> str:
    low, high = short(min(values)), short(max(values))
    return low if low == high else f"{low} to {high}"


def _ceilings(x: Scale, y: Scale, limits: Ceilings) -> Markup:
    top = max(limits.matrix.values())
    parts = []
    if limits.gather:
        slow, fast = min(limits.gather.values()), max(limits.gather.values())
        parts.append(tag("polygon", points=_band(x, y, slow, fast, top), class_="band"))
        parts += [tag("path", d=_slanted(x, y, rate, top), class_="ceiling memory") for rate in {slow, fast}]
        parts.append(_slanted_label(x, y, slow, f"random rows {_span([slow, fast])} GB/s", below=True))
    if limits.stream:
        parts.append(tag("path", d=_slanted(x, y, limits.stream, top), class_="ceiling memory stream"))
        parts.append(_slanted_label(x, y, limits.stream, f"streaming {short(limits.stream)} GB/s", below=False))
    fastest = max([*limits.gather.values(), *([limits.stream] if limits.stream else [])])
    for title, rate in limits.matrix.items():
        start = max(rate / fastest, x.low)
        parts.append(tag("line", x1=x(start), x2=x.end, y1=y(rate), y2=y(rate), class_="ceiling matrix"))
        parts.append(axes.text(x.end - 2, y(rate) - 4, f"{title} {rate:.0f}", "end", "ceiling-label"))
    return tag("g", *parts, aria_hidden="true")


def _ends(x: Scale, y: Scale, slope: float, top: float) -> tuple[float, float]:
    """Intensities at which a memory line enters the picture and meets the highest ceiling."""
    return max(x.low, y.low / slope), min(x.high, top / slope)


def _slanted(x: Scale, y: Scale, slope: float, top: float) -> str:
    first, last = _ends(x, y, slope, top)
    return f"M{x(first):.1f} {y(slope * first):.1f}L{x(last):.1f} {y(slope * last):.1f}"


def _band(x: Scale, y: Scale, slow: float, fast: float, top: float) -> str:
    corners = []
    for slope, reverse in ((slow, False), (fast, True)):
        ends = [(x(v), y(slope * v)) for v in _ends(x, y, slope, top)]
        corners += ends[::-1] if reverse else ends
    return " ".join(f"{px:.1f},{py:.1f}" for px, py in corners)


def _slanted_label(x: Scale, y: Scale, slope: float, label: str, *, below: bool) -> Markup:
    """A label along a memory line, near its lower end."""
    first = max(x.low, y.low / slope)
    px, py = x(first), y(slope * first)
    ten = min(first * 10, x.high)
    angle = math.degrees(math.atan2(y(slope * ten) - py, x(ten) - px))
    offset = 14 if below else -6
    place = f"translate({px:.1f} {py:.1f}) rotate({angle:.1f}) translate(26 {offset})"
    return axes.text(0, 0, label, class_="ceiling-label", transform=place)
