"""Which operator took what share of the time: stacked bars, one a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dlrm_deploy.bench.report import axes
from dlrm_deploy.bench.report.axes import Figure
from dlrm_deploy.bench.report.compare import Panel
from dlrm_deploy.bench.report.looks import Look
from dlrm_deploy.bench.report.markup import Markup, folded, table, tag
from dlrm_deploy.bench.report.rows import Row, finite

_COLOURS = 7
"""Operators with a colour of their own; the rest are drawn as one."""

_REST = "other operators"
_WIDTH, _LEFT, _TOP = 340.0, 46.0, 26.0
_BAR, _STEP = 14.0, 19.0


def shares_of(row: Row) -> dict[str, float]:
    """Positive shares of a row's time by operator, scaled to a sum of 1; empty where it has none."""
    shares = {name: value for name, raw in row.mapping("breakdown").items() if (value := finite(raw)) and value > 0}
    total = sum(shares.values())
    return {name: value / total for name, value in shares.items()}


def breakdown(panel: Panel, looks: Mapping[str, Look]) -> Figure | None:
    """Bars by engine and batch size; None where no row has a breakdown."""
    bars = [
        (engine, [(row.batch or 0, shares) for row in panel.of_engine(engine) if (shares := shares_of(row))])
        for engine in looks
    ]
    bars = [(engine, rows) for engine, rows in bars if rows]
    if not bars:
        return None
    operators = _by_weight([shares for _, rows in bars for _, shares in rows])
    named = operators if len(operators) <= _COLOURS else operators[: _COLOURS - 1]
    legend = [*named, *([_REST] if len(named) < len(operators) else [])]
    title = "Where the time goes"
    pictures = [
        _picture(f"{title}, {panel.title}", engine, rows, named, legend, looks[engine]) for engine, rows in bars
    ]
    keys = tag("ul", *(tag("li", tag("i", class_=f"o{_colour(n, legend)}"), n) for n in legend), class_="operators")
    lines = [
        [engine, str(batch), *(f"{shares[name]:.1%}" if name in shares else "" for name in operators)]
        for engine, rows in bars
        for batch, shares in rows
    ]
    note = "Share of each operator in the time of all operators, by batch size, as the engine's own profiler counts it."
    behind = folded("Table", table(["engine", "batch", *operators], lines, f"{title}, {panel.title}"))
    return Figure(title, note, tag("div", *pictures, class_="multiples"), behind, above=keys, wide=True)


def _picture(
    title: str,
    engine: str,
    rows: Sequence[tuple[int, Mapping[str, float]]],
    named: Sequence[str],
    legend: Sequence[str],
    look: Look,
) -> Markup:
    """The bars of one engine."""
    parts: list[Markup] = []
    for position, (batch, shares) in enumerate(rows):
        top = _TOP + position * _STEP
        parts.append(axes.text(_LEFT - 7, top + 11, str(batch), "end", "tick"))
        parts += _bar(f"{engine} · batch {batch}", _drawn(shares, named), legend, top)
    heaviest = _by_weight([shares for _, shares in rows])[0]
    return axes.chart(
        title,
        f"{engine}: {len(rows)} stacked bars, by batch size; {heaviest} takes most. The table below has every share.",
        tag("g", axes.text(2, 15, engine, class_="axis-title"), *parts, data_e=look.key),
        name="breakdown",
        width=_WIDTH,
        height=_TOP + len(rows) * _STEP,
    )


def _by_weight(all_shares: Sequence[Mapping[str, float]]) -> list[str]:
    weights: dict[str, float] = {}
    for shares in all_shares:
        for name, share in shares.items():
            weights[name] = weights.get(name, 0.0) + share
    return sorted(weights, key=lambda name: -weights[name])


def _drawn(shares: Mapping[str, float], named: Sequence[str]) -> dict[str, float]:
    """Shares in the order of the legend, those without a colour as one."""
    drawn = {name: shares[name] for name in named if name in shares}
    rest = sum(share for name, share in shares.items() if name not in named)
    return {**drawn, _REST: rest} if rest > 0 else drawn


def _bar(of: str, shares: Mapping[str, float], legend: Sequence[str], top: float) -> list[Markup]:
    parts = []
    left, room = _LEFT, _WIDTH - _LEFT
    for name, share in shares.items():
        width = share * room
        piece = tag("rect", x=left, y=top, width=max(width - 1, 0.5), height=_BAR)
        parts.append(
            tag("g", tag("title", f"{of} · {name} {share:.1%}"), piece, class_=f"mark piece o{_colour(name, legend)}")
        )
        left += width
    return parts


def _colour(name: str, legend: Sequence[str]) -> str:
    return "x" if name == _REST else str(legend.index(name))
