"""Print a benchmark for people: what ran where, the timings, and what the machine could do meanwhile."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from dlrm_deploy.bench.rows import QUIET_LOAD, BenchReport, readable_bytes

SHOWN_DIFFERENCE = 1e-6
"""Outputs of float32 engines differ by rounding; differences above this are pointed out."""

_LEAST_WIDTH = 100


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
    for heading in ("median ms", "p50 ms", "p99 ms", "samples/s", f"x {report.rows[0].baseline}", "min-max", "calls"):
        table.add_column(heading, justify="right")
    previous = None
    for row in report.rows:
        timing = row.timing
        table.add_row(
            str(row.batch) if row.batch != previous else "",
            row.engine,
            f"{timing.median_ms:.3f}",
            f"{timing.p50_ms:.3f}",
            f"{timing.p99_ms:.3f}",
            f"{timing.samples_per_s:,.0f}",
            f"{timing.ratio:.2f}",
            f"{timing.ratio_min:.2f}-{timing.ratio_max:.2f}",
            str(timing.calls),
        )
        previous = row.batch
    return table


def _calibrations(report: BenchReport) -> Table:
    limits = {row.batch: row.calibration for row in report.rows if row.calibration is not None}
    row_bytes = next(iter(limits.values())).row_bytes
    table = _table()
    headings = ("batch", "fp32 FMA GFLOP/s", "streaming read GB/s", f"random {row_bytes}-byte rows GB/s")
    for heading in headings:
        table.add_column(heading, justify="right")
    for batch, c in limits.items():
        table.add_row(str(batch), f"{c.fma_gflops:.0f}", f"{c.stream_gb_per_s:.1f}", f"{c.gather_gb_per_s:.1f}")
    return table


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
        if row.max_abs_difference > SHOWN_DIFFERENCE:
            difference = f"{row.max_abs_difference:.2g}"
            yield f"{row.engine} differs from {shared.reference} by up to {difference} at batch {row.batch}."
    if (shared.omp_wait_policy or "").lower() == "active":
        yield "OMP_WAIT_POLICY is active: torch's idle threads spin and slow down the other engines. Unset it."
    for n in report.not_run:
        at = f" at batch {n.batch}" if n.batch is not None else ""
        yield f"{n.engine} was not run{at}: {n.reason}"
    yield f"Again: {shared.command}"
