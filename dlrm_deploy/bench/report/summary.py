"""The head of the page: what was measured, on what machine, and how much faster than the fastest peer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from dlrm_deploy.bench.report.axes import short
from dlrm_deploy.bench.report.compare import Panel, SpeedUp, best_of_ours, speed_ups
from dlrm_deploy.bench.report.looks import Look
from dlrm_deploy.bench.report.markup import Markup, tag
from dlrm_deploy.bench.report.rows import Row
from dlrm_deploy.bench.rows import QUIET_LOAD


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one panel says: the best of our engines against the fastest peer of each batch size."""

    name: str
    panel: Panel
    engine: str
    best: tuple[SpeedUp, ...]

    @property
    def span(self) -> str:
        """The least and the largest factor: "1.4 to 2.7"."""
        low, high = (f"{pick(s.factor for s in self.best):.1f}" for pick in (min, max))
        return low if low == high else f"{low} to {high}"

    @property
    def peers(self) -> int:
        return max(s.peers for s in self.best)


def verdicts_of(panels: Sequence[Panel]) -> list[Verdict]:
    """One for each panel with an engine of ours and a peer in the same run."""
    models = [panel.model for panel in panels]
    verdicts = []
    for panel in panels:
        found = speed_ups(panel)
        engine = best_of_ours(found)
        if engine is not None:
            name = panel.model if models.count(panel.model) == 1 else panel.title
            verdicts.append(Verdict(name, panel, engine, tuple(s for s in found if s.engine == engine)))
    return verdicts


def strongest(verdicts: Sequence[Verdict]) -> str | None:
    """The engine of ours that is the best in most panels; the first of them in a tie."""
    engines = [verdict.engine for verdict in verdicts]
    return max(engines, key=engines.count) if engines else None


def sentence(rows: Sequence[Row], panels: Sequence[Panel], verdicts: Sequence[Verdict]) -> str:
    """The answer in one sentence."""
    machine = joined(unique(row.text("cpu") for row in rows)) or "an unnamed machine"
    threads = sorted({panel.threads for panel in panels if panel.threads is not None and panel.rows})
    where = f"On {machine}"
    if threads:
        where += f", with {joined(map(str, threads))} thread{'' if threads == [1] else 's'} for every engine"
    if verdicts:
        counts = sorted({v.peers for v in verdicts})
        peers = _peers(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]} peers"
        claims = joined(f"{v.name} {v.span} times" for v in verdicts)
        return f"{where}, dlrm-deploy scores {claims} as fast as the fastest of {peers} at the same batch size."
    engines = joined(unique(row.engine for panel in panels for row in panel.rows))
    models = joined(unique(panel.model for panel in panels if panel.rows))
    if not engines:
        return f"{where}, no engine was timed side by side."
    return f"{where}, {engines} scored {models}. No run holds both an engine of ours and a peer: nothing is compared."


def _peers(count: int) -> str:
    return "1 peer" if count == 1 else f"{count} peers"


def cards(verdicts: Sequence[Verdict], looks: Mapping[str, Look]) -> Markup | None:
    """A card for each panel: the factors by batch size."""
    if not verdicts:
        return None
    return tag("div", *(_card(verdict, looks) for verdict in verdicts), class_="cards")


def _card(verdict: Verdict, looks: Mapping[str, Look]) -> Markup:
    cells = [
        tag(
            "li",
            tag("span", str(s.batch), class_="batch"),
            tag("strong", f"{s.factor:.1f}×"),
            class_=f"step{_step(s.factor)}",
            title=f"batch {s.batch}: {s.factor:.2f} times as fast as {s.peer}",
        )
        for s in verdict.best
    ]
    return tag(
        "article",
        tag("h2", verdict.name),
        tag("p", tag("b", f"{verdict.span.replace(' to ', '–')}×"), " the fastest peer", class_="span"),
        tag("ul", *cells, class_="strip", aria_label="times as fast, by batch size"),
        tag("p", f"{verdict.engine} against the fastest of {_peers(verdict.peers)} at each batch size", class_="quiet"),
    )


def _step(factor: float) -> int:
    """How deep a cell is coloured: 0 for slower than the peer."""
    return sum(factor >= limit for limit in (1.0, 1.5, 2.0, 3.0, 5.0))


def warnings(rows: Sequence[Row]) -> list[str]:
    """What a reader must know before trusting the numbers."""
    found = []
    loads = [load for row in rows if (load := row.number("other_load")) is not None]
    if loads and max(loads) > QUIET_LOAD:
        count = sum(load > QUIET_LOAD for load in loads)
        found.append(
            f"Other processes used up to {max(loads):.0%} of the machine during {count} of {len(loads)} measurements: "
            "rely on ratios, or measure again when it is idle."
        )
    found += unique(f"Machine not calibrated: {reason}" for row in rows if (reason := row.text("calibration_missing")))
    if any(row.text("omp_wait_policy").lower() == "active" for row in rows):
        found.append("OMP_WAIT_POLICY was active: idle threads of PyTorch spun and slowed the other engines down.")
    commits = unique(row.text("commit") for row in rows if row.text("commit"))
    if len(commits) > 1:
        found.append(f"Rows come from several states of the source: {joined(commits)}.")
    if len(unique(row.text("cpu") for row in rows if row.text("cpu"))) > 1:
        found.append("Rows come from several machines: compare within a section only.")
    return found


def circumstances(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Name and value of what the rows share."""
    times = sorted(row.text("time") for row in rows if row.text("time"))
    span = "" if not times else times[0] if times[0][:16] == times[-1][:16] else f"{times[0]} to {times[-1]}"
    facts = [
        ("measured", span.replace("T", " ").replace("+00:00", " UTC")),
        ("processor", joined(unique(row.text("cpu") for row in rows))),
        ("ids", joined(unique(row.text("distribution") for row in rows))),
        ("dlrm-deploy", joined(unique(row.text("dlrm_deploy_version") for row in rows))),
        ("source", joined(unique(row.text("commit") for row in rows))),
        ("engines", joined(unique(row.text("engine_version") for row in rows))),
        ("rounds", joined(unique(short(n) for row in rows if (n := row.positive("rounds")) is not None))),
    ]
    return [(name, value) for name, value in facts if value]


def unique(values: Iterable[str]) -> list[str]:
    """Without repetitions and empty texts, in order."""
    return [value for value in dict.fromkeys(values) if value]


def joined(values: Iterable[str]) -> str:
    """a, b and c."""
    *first, last = list(values) or [""]
    return f"{', '.join(first)} and {last}" if first else last
