"""Print a benchmark for people: what ran where, the timings, and what the machine could do meanwhile."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dlrm_deploy.bench.rows import QUIET_LOAD, BenchReport, readable_bytes

SHOWN_DIFFERENCE = 1e-6
"""Outputs of float32 engines differ by rounding; differences above this are pointed out."""

_LEAST_WIDTH = 140


def print_report(report: BenchReport, console: Console | None = None) -> None:
    """Print a report; wide tables are never cut, whatever the width of the terminal."""
    console = console or Console(highlight=False)
    console.width = max(console.width, _LEAST_WIDTH)
    shared = report.circumstances
    threads = f"{shared.threads} thread{'s' if shared.threads > 1 else ''}"
    commit = f" at {shared.commit}" if shared.commit else ""
    texts = [
        f"{report.rows[0].model}: {readable_bytes(shared.table_bytes)} of tables, {threads} per engine, "
        f"{shared.distribution} ids, {shared.rounds} rounds of {shared.slice_ms:g} ms",
        f"{shared.cpu}; dlrm-deploy {shared.dlrm_deploy_version}{commit}",
    ]
    for text in texts:
        console.print(text, markup=False, soft_wrap=True)
    console.print()
    console.print(_timings(report))
    console.print()
    if shared.calibration_missing is None:
        console.print(_calibrations(report))
    for text in _remarks(report):
        console.print(text, markup=False, soft_wrap=True)


def _timings(report: BenchReport) -> Table:
    table = _table()
    table.add_column("batch", justify="right")
    table.add_column("engine")
    for heading in (
        "median ms",
        "p50 ms",
        "p99 ms",
        "samples/s",
        f"x {report.rows[0].baseline}",
        "min-max",
        "x floor",
        "calls",
    ):
        table.add_column(heading, justify="right")
    previous = None
    for row in report.rows:
        timing = row.timing
        table.add_row(
            str(row.batch) if row.batch != previous else "",
            escape(row.engine),  # number formats stand in brackets
            f"{timing.median_ms:.3f}",
            f"{timing.p50_ms:.3f}",
            f"{timing.p99_ms:.3f}",
            f"{timing.samples_per_s:,.0f}",
            f"{timing.ratio:.2f}",
            f"{timing.ratio_min:.2f}-{timing.ratio_max:.2f}",
            "" if row.floor is None else _times(row.floor.times_floor),
            str(timing.calls),
        )
        previous = row.batch
    return table


def _calibrations(report: BenchReport) -> Table:
    limits = {row.batch: row.calibration for row in report.rows if row.calibration is not None}
    sizes = sorted({size for c in limits.values() for size in c.gather})
    has_amx = any(c.amx_bf16_gflops is not None for c in limits.values())
    table = _table()
    headings = ["batch", "fp32 FMA GFLOP/s", *(["AMX bf16 GFLOP/s", "AMX int8 GOP/s"] if has_amx else [])]
    for heading in [*headings, "streaming read GB/s", *(f"{size}-byte rows GB/s" for size in sizes)]:
        table.add_column(heading, justify="right")
    for batch, c in limits.items():
        amx = [c.amx_bf16_gflops, c.amx_int8_gops] if has_amx else []
        rates = [c.fma_gflops, *(rate or 0.0 for rate in amx)]
        gathered = [f"{c.gather[size]:.1f}" if size in c.gather else "" for size in sizes]
        table.add_row(str(batch), *(f"{rate:.0f}" for rate in rates), f"{c.stream_gb_per_s:.1f}", *gathered)
    return table


def _times(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"


def _table() -> Table:
    return Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")


def _remarks(report: BenchReport) -> Iterator[str]:
    shared = report.circumstances
    if shared.calibration_missing is not None:
        yield f"Machine not calibrated: {shared.calibration_missing}"
    else:
        yield "The machine's limits, measured before each round on the same threads. Absolute times move with them."
    loads = {row.batch: row.other_load or 0.0 for row in report.rows}
    if max(loads.values()) > QUIET_LOAD:
        shares = ", ".join(f"{load:.0%} at batch {batch}" for batch, load in loads.items())
        yield f"Other processes used {shares} of the machine: measure again when it is idle."
    for row in report.rows:
        agreed = row.agreement
        if agreed.max_abs_difference > SHOWN_DIFFERENCE:
            text = f"{row.engine} differs from {shared.reference} by up to {agreed.max_abs_difference:.2g}"
            if agreed.spread_error is not None:
                text += f" ({agreed.spread_error:.1%} of the spread of the logits)"
            yield f"{text} at batch {row.batch}."
    if (shared.omp_wait_policy or "").lower() == "active":
        yield "OMP_WAIT_POLICY is active: torch's idle threads spin and slow down the other engines. Unset it."
    for n in report.not_run:
        at = f" at batch {n.batch}" if n.batch is not None else ""
        yield f"{n.engine} was not run{at}: {n.reason}"
    yield f"Again: {shared.command}"
