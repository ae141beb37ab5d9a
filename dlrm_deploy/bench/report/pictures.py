"""Charts as SVG files of their own, for documents: throughput and speed-up of a panel side by side, with a legend."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from dlrm_deploy.bench.report import axes
from dlrm_deploy.bench.report.axes import HEIGHT, WIDTH, Figure
from dlrm_deploy.bench.report.batch_charts import speed_up, throughput
from dlrm_deploy.bench.report.compare import Panel, panels_of, speed_ups
from dlrm_deploy.bench.report.looks import Look, looks_of
from dlrm_deploy.bench.report.markup import Markup, tag
from dlrm_deploy.bench.report.page import styles
from dlrm_deploy.bench.report.rows import Row
from dlrm_deploy.bench.report.summary import strongest, verdicts_of

_HEAD, _ENTRY, _COLUMN = 30.0, 22.0, 230.0


def pictures_of(rows: Sequence[Row]) -> dict[str, str]:
    """An SVG document for each panel that has throughput to show, by a name that can be part of a file's."""
    panels = panels_of(row for row in rows if row.kind == "throughput")
    looks = looks_of((row.engine for panel in panels for row in panel.rows), strongest(verdicts_of(panels)))
    found: dict[str, str] = {}
    for panel in panels:
        picture = _picture(panel, looks)
        if picture is not None:
            name = _file_name(panel.model)
            found[name if name not in found else _file_name(panel.title)] = picture
    return found


def _picture(panel: Panel, looks: Mapping[str, Look]) -> str | None:
    figures = [f for f in (throughput(panel, looks), speed_up(panel, looks, speed_ups(panel))) if f is not None]
    if not figures:
        return None
    width = WIDTH * len(figures)
    engines = [engine for engine in looks if any(row.engine == engine for row in panel.rows)]
    columns = int(width // _COLUMN)
    lines = -(-len(engines) // columns)
    top = _HEAD + HEIGHT + 12
    height = top + lines * _ENTRY + 8
    entries = [
        _entry(looks[engine], i % columns * _COLUMN, top + i // columns * _ENTRY) for i, engine in enumerate(engines)
    ]
    return tag(
        "svg",
        tag("title", f"{panel.title}: {' and '.join(figure.title.lower() for figure in figures)}"),
        tag("style", Markup(styles("chart.css"))),
        tag("rect", width="100%", height="100%", class_="ground"),
        *(_placed(figure, i * WIDTH) for i, figure in enumerate(figures)),
        *entries,
        xmlns="http://www.w3.org/2000/svg",
        viewbox=f"0 0 {width:g} {height:g}",
        font_family="system-ui, sans-serif",
        class_="chart",
    )


def _placed(figure: Figure, left: float) -> Markup:
    """A chart below its heading. A group, not an inner <svg>, which viewers of documents do not always scale."""
    inside = Markup(re.sub(r"^<svg[^>]*>|</svg>$", "", figure.picture))
    heading = axes.text(6, 22, figure.title, class_="heading")
    return tag("g", heading, tag("g", inside, transform=f"translate(0 {_HEAD:g})"), transform=f"translate({left:g} 0)")


def _entry(look: Look, left: float, top: float) -> Markup:
    return tag("g", axes.swatch(look, left + 24, top), axes.text(left + 48, top + 4.5, look.engine))


def _file_name(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "model"
