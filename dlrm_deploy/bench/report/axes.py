"""Scales, ticks and frames of charts, and the marks in them.

A chart is drawn in its own units, `WIDTH` wide, and scaled to its place on the page; the style sheet enlarges its text
on narrow screens. Margins leave room for that.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from dlrm_deploy.bench.report.looks import Look, marker_path
from dlrm_deploy.bench.report.markup import Markup, tag

WIDTH = 520.0
HEIGHT = 320.0
LEFT, RIGHT, TOP, BOTTOM = 54.0, 18.0, 34.0, 46.0
_LABEL_ROOM = 44.0
"""Least distance of two labels on the axis below."""


@dataclass(frozen=True, slots=True)
class Scale:
    """Values from `low` to `high` onto positions from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    @property
    def ticks(self) -> list[float]:
        """Round values within the scale, about four to eight of them."""
        return _log_ticks(self.low, self.high) if self.log else _linear_ticks(self.low, self.high)


def log_scale(values: Iterable[float], start: float, end: float, room: float = 1.25) -> Scale:
    """A logarithmic scale around positive values, at least a factor of three wide."""
    known = list(values)
    low, high = min(known) / room, max(known) * room
    if high / low < 3:
        middle = math.sqrt(low * high)
        low, high = middle / math.sqrt(3), middle * math.sqrt(3)
    return Scale(low, high, start, end, log=True)


def batch_scale(batches: Sequence[int]) -> Scale:
    """The axis of batch sizes below a chart."""
    return log_scale(batches, LEFT, WIDTH - RIGHT)


def _log_ticks(low: float, high: float) -> list[float]:
    decades = math.log10(high / low)
    steps: tuple[int, ...] = (1, 2, 5) if decades < 2.5 else (1,)
    if decades < 0.8:
        steps = (1, 2, 3, 4, 5, 6, 8)
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    if decades > 7:
        exponents = range(exponents.start, exponents.stop, math.ceil(decades / 7))
    return [v for e in exponents for s in steps if low <= (v := s * 10.0**e) <= high]


def _linear_ticks(low: float, high: float) -> list[float]:
    raw = (high - low) / 5
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(s * unit for s in (1, 2, 2.5, 5, 10) if s * unit >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def short(value: float) -> str:
    """Three digits and a suffix: 1.08M, 977k, 0.13."""
    if value == 0:
        return "0"
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit * 0.9995:
            return f"{_three_digits(value / limit)}{suffix}"
    return _three_digits(value)


def _three_digits(value: float) -> str:
    if abs(value) >= 99.95:
        return f"{value:.0f}"
    if abs(value) < 0.001:
        return f"{value:.2g}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{digits}f}".rstrip("0").rstrip(".")


def text(x: float, y: float, content: str, anchor: str = "start", class_: str | None = None, **more: object) -> Markup:
    return tag("text", content, x=x, y=y, text_anchor=None if anchor == "start" else anchor, class_=class_, **more)


def frame(x: Scale, y: Scale, x_ticks: Sequence[tuple[float, str]], x_title: str, y_title: str) -> Markup:
    """Grid lines, tick labels and the titles of both axes. Labels below that would touch are left out."""
    parts = [text(6, 18, y_title, class_="axis-title")]
    for value in y.ticks:
        at = y(value)
        parts.append(tag("line", x1=x.start, x2=x.end, y1=at, y2=at, class_="grid"))
        parts.append(text(LEFT - 7, at + 4, short(value), "end", "tick"))
    last = -math.inf
    for value, label in x_ticks:
        at = x(value)
        parts.append(tag("line", x1=at, x2=at, y1=y.start, y2=y.start + 4, class_="grid"))
        if at - last >= _LABEL_ROOM:
            parts.append(text(at, y.start + 19, label, "middle", "tick"))
            last = at
    parts.append(text(x.end, y.start + 38, x_title, "end", "axis-title"))
    return tag("g", *parts, aria_hidden="true")


def batch_ticks(batches: Sequence[int]) -> list[tuple[float, str]]:
    return [(float(batch), str(batch)) for batch in batches]


def series(
    look: Look, points: Sequence[tuple[float, float, str]], hollow: Sequence[bool] | None = None
) -> Iterator[Markup]:
    """The line of an engine and its marks: position and what the mark says when it is pointed at."""
    if len(points) > 1:
        outline = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y, _ in points)
        yield tag("path", d=outline, class_=_classes("line", look), data_e=look.key, stroke_dasharray=look.dash or None)
    for (x, y, says), empty in zip(points, hollow or [look.hollow] * len(points), strict=True):
        yield mark(look, x, y, says, empty)


def mark(look: Look, x: float, y: float, says: str, hollow: bool | None = None) -> Markup:
    """One measurement."""
    empty = look.hollow if hollow is None else hollow
    outline = tag("path", d=marker_path(look.marker, x, y, 4.6 if look.ours else 3.6))
    return tag(
        "g",
        tag("title", says),
        outline,
        class_=_classes("mark hollow" if empty else "mark", look),
        data_e=look.key,
    )


def swatch(look: Look, x: float, y: float) -> Markup:
    """A piece of an engine's line with its marker, for legends; `x` and `y` are its middle."""
    line = f"M{x - 16:.1f} {y:.1f}H{x + 16:.1f}"
    outline = tag("path", d=marker_path(look.marker, x, y, 4.6))
    return tag(
        "g",
        tag("path", d=line, class_=_classes("line", look), stroke_dasharray=look.dash or None),
        tag("g", outline, class_=_classes("mark hollow" if look.hollow else "mark", look)),
    )


def _classes(name: str, look: Look) -> str:
    return f"{name} {look.classes}"


def chart(
    title: str, describes: str, *parts: str | None, name: str, width: float = WIDTH, height: float = HEIGHT
) -> Markup:
    """The picture. `describes` says in words what it shows, for those who do not see it; `name` is its class."""
    return tag(
        "svg",
        *parts,
        viewbox=f"0 0 {width:g} {height:g}",
        role="img",
        aria_label=f"{title}. {describes}",
        class_=f"chart {name}",
    )


@dataclass(frozen=True, slots=True)
class Figure:
    """A picture with its heading, a line that says how to read it, and the table behind it."""

    title: str
    note: str
    picture: Markup
    behind: Markup | None = None
    above: Markup | None = None
    wide: bool = False

    @property
    def markup(self) -> Markup:
        return tag(
            "figure",
            tag("figcaption", tag("h3", self.title), tag("p", self.note)),
            self.above,
            self.picture,
            self.behind,
            class_="wide" if self.wide else None,
        )
