"""The page: head, switches, a section for each panel, and traffic. One file, nothing from a network."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from dlrm_deploy.bench.report import axes, summary
from dlrm_deploy.bench.report.axes import Figure, short
from dlrm_deploy.bench.report.batch_charts import speed_up, throughput, time_over_floor
from dlrm_deploy.bench.report.breakdown_chart import breakdown
from dlrm_deploy.bench.report.compare import Panel, panels_of, speed_ups
from dlrm_deploy.bench.report.looks import Look, looks_of
from dlrm_deploy.bench.report.markup import Markup, folded, table, tag
from dlrm_deploy.bench.report.roofline_chart import roofline
from dlrm_deploy.bench.report.rows import Row
from dlrm_deploy.bench.report.scenario_chart import latency_over_load, scenario_table
from dlrm_deploy.bench.rows import readable_bytes

_HERE = Path(__file__).parent


def page(rows: Sequence[Row], title: str) -> str:
    """The whole document."""
    timed = [row for row in rows if row.kind == "throughput"]
    scenarios = [row for row in rows if row.kind == "scenario"]
    panels = panels_of(timed)
    verdicts = summary.verdicts_of(panels)
    drawn = [*(row for panel in panels for row in panel.rows), *scenarios]
    looks = looks_of((row.engine for row in drawn), summary.strongest(verdicts))
    script = (_HERE / "script.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", Markup(styles("chart.css", "page.css") + _switch_rules(looks))),
    )
    warnings = summary.warnings(rows)
    body = tag(
        "body",
        tag(
            "header",
            tag("p", "dlrm-deploy bench", class_="kicker"),
            tag("h1", title),
            tag("p", summary.sentence(rows, panels, verdicts), class_="lead"),
            summary.cards(verdicts, looks),
            tag("ul", *(tag("li", warning) for warning in warnings), class_="warnings") if warnings else None,
            _facts(rows),
        ),
        _switches(looks, verdicts),
        tag("main", *(_section(panel, looks) for panel in panels), *_scenario_sections(scenarios, looks)),
        tag(
            "footer",
            tag("p", "Drawn from the rows of the benchmark alone; each section shows the command that repeats it."),
        ),
        tag("div", id="tip", role="status", hidden=True),
        tag("script", Markup(script)),
    )
    return f"<!DOCTYPE html>\n{tag('html', head, body, lang='en')}\n"


def styles(*names: str) -> str:
    """Style sheets, one after the other."""
    return "".join((_HERE / name).read_text(encoding="utf-8") for name in names)


def _facts(rows: Sequence[Row]) -> Markup:
    pairs = (tag("div", tag("dt", name), tag("dd", value)) for name, value in summary.circumstances(rows))
    return folded("How and where this was measured", tag("dl", *pairs), class_="facts")


def _switch_rules(looks: Mapping[str, Look]) -> str:
    """Engines are switched by the style sheet, so that this works without the script too."""
    return "".join(
        f'body:has(#show-{look.key}:not(:checked)) .chart [data-e="{look.key}"]{{display:none}}\n'
        for look in looks.values()
    )


def _switches(looks: Mapping[str, Look], verdicts: Sequence[summary.Verdict]) -> Markup | None:
    if not looks:
        return None
    fastest = {s.peer for verdict in verdicts for s in verdict.best}
    return tag(
        "fieldset",
        tag("legend", "Engines shown"),
        *(_switch(look, look.ours or look.engine in fastest) for look in looks.values()),
        class_="switches",
    )


def _switch(look: Look, essential: bool) -> Markup:
    swatch = tag("svg", axes.swatch(look, 17, 8), viewbox="0 0 34 16", aria_hidden="true")
    box = tag(
        "input",
        type="checkbox",
        checked=True,
        id=f"show-{look.key}",
        data_essential=essential,
        autocomplete="off",
    )
    return tag("label", box, swatch, look.engine, class_="ours" if look.ours else None)


def _section(panel: Panel, looks: Mapping[str, Look]) -> Markup:
    found = speed_ups(panel)
    charts = (
        throughput(panel, looks),
        speed_up(panel, looks, found),
        time_over_floor(panel, looks),
        roofline(panel, looks),
        breakdown(panel, looks),
    )
    order = {engine: position for position, engine in enumerate(looks)}
    rows = sorted(panel.rows, key=lambda row: (row.batch or 0, order[row.engine]))
    return tag(
        "section",
        tag("h2", panel.title),
        _model_facts(panel),
        tag("div", *(chart.markup for chart in charts if chart), class_="grid") if any(charts) else None,
        _more(
            folded("All measurements", _measurements(panel, rows)) if rows else None,
            folded("Memory and loading", memory) if (memory := _memory(panel, looks)) else None,
            _not_run(panel),
        ),
        _commands(panel.commands),
    )


def _more(*parts: Markup | None) -> Markup | None:
    return tag("div", *parts, class_="more") if any(parts) else None


def _model_facts(panel: Panel) -> Markup | None:
    parts = [
        words
        for name, unit, written in (
            ("table_bytes", " of tables", lambda n: readable_bytes(int(n))),
            ("flops_per_sample", " operations a sample", short),
            ("bytes_per_sample", " bytes of table rows a sample", short),
        )
        if (words := _range_of(panel, name, written, unit))
    ]
    return tag("p", " · ".join(parts), class_="quiet") if parts else None


def _range_of(panel: Panel, name: str, written: Callable[[float], str], unit: str) -> str:
    """The values of a field, or from the least to the largest where there are many."""
    values = sorted({value for row in panel.rows if (value := row.positive(name)) is not None})
    texts = list(dict.fromkeys(map(written, values)))
    if not texts:
        return ""
    return (" or ".join(texts) if len(texts) < 4 else f"{texts[0]} to {texts[-1]}") + unit


_TIMINGS = (
    ("median_ms", "median ms"),
    ("p50_ms", "p50 ms"),
    ("p99_ms", "p99 ms"),
    ("samples_per_s", "samples/s"),
    ("times_floor", "times floor"),
    ("max_abs_difference", "largest difference"),
    ("spread_error", "difference / spread of logits"),
)


def _measurements(panel: Panel, rows: Sequence[Row]) -> Markup:
    columns = [(key, heading) for key, heading in _TIMINGS if any(row.number(key) is not None for row in rows)]
    baselines = summary.unique(row.text("baseline") for row in rows)
    ratio = f"× {baselines[0]}" if len(baselines) == 1 else "× baseline"
    lines = [
        [
            row.engine,
            "" if row.batch is None else str(row.batch),
            *("" if (value := row.number(key)) is None else short(value) for key, _ in columns),
            _ratio(row),
        ]
        for row in rows
    ]
    return table(
        ["engine", "batch", *(heading for _, heading in columns), f"{ratio} (least to most)"],
        lines,
        f"All measurements of {panel.title}",
    )


def _ratio(row: Row) -> str:
    ratio, low, high = (row.positive(name) for name in ("ratio", "ratio_min", "ratio_max"))
    if ratio is None:
        return ""
    return f"{ratio:.2f}" if low is None or high is None else f"{ratio:.2f} ({low:.2f} to {high:.2f})"


_FOOTPRINT = (
    ("load_seconds", "seconds to load", short),
    ("resident_bytes", "memory of its own", lambda value: readable_bytes(int(value))),
    ("stored_table_bytes", "tables as it stores them", lambda value: readable_bytes(int(value))),
)


def _memory(panel: Panel, looks: Mapping[str, Look]) -> Markup | None:
    """What each engine takes to be ready: the largest of its values at any batch size."""
    found: dict[str, dict[str, str]] = {}
    for engine in looks:
        own = [row for row in panel.rows if row.engine == engine]
        for name, heading, written in _FOOTPRINT:
            values = [value for row in own if (value := row.number(name)) is not None and value >= 0]
            if values:
                found.setdefault(engine, {})[heading] = written(max(values))
    headings = [heading for _, heading, _ in _FOOTPRINT if any(heading in cells for cells in found.values())]
    lines = [[engine, *(cells.get(heading, "") for heading in headings)] for engine, cells in found.items()]
    return table(["engine", *headings], lines, f"Memory and loading, {panel.title}") if lines else None


def _not_run(panel: Panel) -> Markup | None:
    if not panel.not_run:
        return None
    items = []
    for row in panel.not_run:
        at = "" if row.batch is None else f" at batch {row.batch}"
        items.append(tag("li", tag("b", f"{row.engine}{at}"), f": {row.text('not_run') or 'no reason given'}"))
    return folded(f"Not run ({len(items)})", tag("ul", *items, class_="plain"))


def _commands(commands: Sequence[str]) -> Markup | None:
    if not commands:
        return None
    code = tag("pre", tag("code", "\n".join(commands)), tabindex="0")
    return tag("div", tag("p", "Repeat it"), code, class_="repeat")


def _scenario_sections(rows: Sequence[Row], looks: Mapping[str, Look]) -> list[Markup]:
    models = dict.fromkeys(row.model for row in rows)
    sections = []
    for model in models:
        own = [row for row in rows if row.model == model]
        curve = latency_over_load(own, looks, model)
        note = (
            "Scenarios of MLPerf LoadGen. Its sample is a query: one user with many user-item pairs, scored together."
        )
        figures = Figure("Scenarios", "All figures, by engine.", scenario_table(own, looks, model))
        sections.append(
            tag(
                "section",
                tag("h2", f"{model} under traffic"),
                tag("p", note, class_="quiet"),
                tag("div", *(part.markup for part in (curve, figures) if part), class_="grid loose"),
                _commands(summary.unique(row.text("command") for row in own)),
            )
        )
    return sections
