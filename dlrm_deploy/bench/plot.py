"""A picture of a benchmark: throughput and latency over batch size, one line per engine."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zlib import crc32

from dlrm_deploy.bench.rows import QUIET_LOAD, BenchReport, BenchRow, readable_bytes
from dlrm_deploy.errors import MissingDependencyError
from dlrm_deploy.files import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, which colour-blind readers can tell apart. Ours stands out; the markers differ too.
_STYLES = {
    "onnxruntime": ("#D55E00", "o"),
    "onnxruntime-stock": ("#0072B2", "s"),
    "torch": ("#009E73", "^"),
    "tensorrt-rtx": ("#CC79A7", "D"),
    "tensorrt": ("#E69F00", "v"),
}
_LABELS = {
    "onnxruntime": "onnxruntime + dlrm-deploy",
    "onnxruntime-stock": "onnxruntime (stock)",
    "torch": "PyTorch eager",
}
_GREY = "#555555"
_SHADES = ("#56B4E9", "#A6761D", "#7570B3", "#666666", "#1B9E77", "#B8860B")
_MARKERS = ("P", "X", "*", "h", "<", ">", "p", "d")


def check_can_plot() -> None:
    """Raise `MissingDependencyError` if matplotlib is missing: before measuring, not after."""
    if find_spec("matplotlib") is None:
        raise MissingDependencyError("--plot needs matplotlib. Install it with `pip install 'dlrm-deploy[bench]'`.")


def plot(report: BenchReport, out: Path) -> None:
    """Write the picture as PNG.

    Raises:
        OutputError: `out` cannot be written.
        MissingDependencyError: matplotlib is not installed.
    """
    check_can_plot()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.7), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    throughput, latency = figure.subplots(1, 2)
    for engine in dict.fromkeys(row.engine for row in report.rows):
        rows = sorted((row for row in report.rows if row.engine == engine), key=lambda row: row.batch)
        _draw(throughput, latency, engine, rows)
    sizes = sorted({row.batch for row in report.rows})
    _finish(throughput, sizes, "Throughput", "samples per second (higher is better)")
    _finish(latency, sizes, "Latency, median of all calls", "milliseconds per batch (lower is better)")
    latency.plot([], [], color=_GREY, linestyle=":", linewidth=1, label="99th percentile")
    handles, labels = latency.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="lower center", ncols=min(len(labels), 6), frameon=False, bbox_to_anchor=(0.5, 0.085)
    )
    figure.suptitle(_title(report), fontsize=12, fontweight="bold", x=0.01, ha="left")
    figure.text(0.01, 0.02, _footer(report), fontsize=7.5, color=_GREY, linespacing=1.5)
    figure.tight_layout(rect=(0, 0.14, 1, 0.99))
    with atomic_file(out) as temporary:
        figure.savefig(temporary, format="png")


def _draw(throughput: Axes, latency: Axes, engine: str, rows: list[BenchRow]) -> None:
    color, marker = _STYLES.get(engine) or _other_style(engine)
    width = 2.4 if engine.partition("[")[0] == "onnxruntime" else 1.6
    batches = [row.batch for row in rows]
    line: dict[str, Any] = {
        "color": color,
        "marker": marker,
        "markersize": 5,
        "linewidth": width,
        "label": _LABELS.get(engine, engine),
    }
    throughput.plot(batches, [row.timing.samples_per_s for row in rows], **line)
    latency.plot(batches, [row.timing.p50_ms for row in rows], **line)
    latency.plot(batches, [row.timing.p99_ms for row in rows], color=color, linestyle=":", linewidth=1)


def _other_style(engine: str) -> tuple[str, str]:
    """Peers and variants: one of a few shades and markers by name, the same in every picture."""
    return _SHADES[crc32(engine.encode()) % len(_SHADES)], _MARKERS[crc32(engine[::-1].encode()) % len(_MARKERS)]


def _finish(axes: Axes, sizes: list[int], title: str, unit: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=20))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_title(title, fontsize=11)
    axes.set_xlabel("batch size")
    axes.set_ylabel(unit)
    axes.grid(True, which="major", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _short(value: float) -> str:
    """1500000 as 1.5M."""
    for limit, suffix in ((1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:g}{suffix}"
    return f"{value:g}"


def _title(report: BenchReport) -> str:
    shared = report.circumstances
    threads = f"{shared.threads} thread{'s' if shared.threads > 1 else ''}"
    tables = f"{readable_bytes(shared.table_bytes)} of fp32 tables"
    return f"DLRM {report.rows[0].model}, {tables}, {threads}"


def _footer(report: BenchReport) -> str:
    shared = report.circumstances
    calibrated = "not calibrated"
    calibrations = [row.calibration for row in report.rows if row.calibration is not None]
    if calibrations:
        low_high = [
            (min(values), max(values))
            for values in (
                [c.fma_gflops for c in calibrations],
                [c.stream_gb_per_s for c in calibrations],
                [rate for c in calibrations for rate in c.gather.values()],
            )
        ]
        (fma, stream, gather) = (f"{low:.3g}" if low == high else f"{low:.3g}-{high:.3g}" for low, high in low_high)
        calibrated = (
            f"limits measured in the same rounds: {fma} GFLOP/s fp32 FMA, {stream} GB/s streaming read, "
            f"{gather} GB/s rows of the batches"
        )
    load = max(row.other_load or 0.0 for row in report.rows)
    if load > QUIET_LOAD:
        calibrated += f" · doubtful: other processes used up to {load:.0%} of the machine"
    versions = ", ".join(dict.fromkeys(row.engine_version for row in report.rows))
    return f"{shared.cpu} · {versions} · ids {shared.distribution}, seed {shared.seed}\n{calibrated}"
