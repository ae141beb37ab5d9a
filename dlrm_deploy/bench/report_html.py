"""One self-contained HTML report from the rows of benchmarks: charts, the tables behind them, and the commands.

The page asks nothing of a network, works from a file, in light and dark, on paper and on a phone, and without its
script. The pieces are in `dlrm_deploy.bench.report`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dlrm_deploy.bench.report.page import page
from dlrm_deploy.bench.report.pictures import pictures_of
from dlrm_deploy.bench.report.rows import read_rows
from dlrm_deploy.errors import DataError
from dlrm_deploy.files import atomic_file

TITLE = "DLRM on a CPU, measured"


def write_report(json_paths: Sequence[Path], out: Path, title: str = TITLE) -> None:
    """Write the report of all rows of `json_paths` to `out`, replacing what is there.

    Rows are JSON objects, one a line, as `dlrm-deploy bench` and `dlrm-deploy loadtest` write them. A field that is
    missing, or of another type than expected, hides the chart or the cell that needs it.

    Raises:
        DataError: a file cannot be read, is not JSON, or there is no row in any.
        OutputError: `out` cannot be written.
    """
    rows = read_rows(json_paths)
    if not rows:
        named = ", ".join(map(str, json_paths)) or "no file"
        raise DataError(f"no rows in {named}. Measure first: `dlrm-deploy bench ... --json > rows.jsonl`.")
    with atomic_file(out) as temporary:
        temporary.write_text(page(rows, title), encoding="utf-8")


def write_pictures(json_paths: Sequence[Path], folder: Path, prefix: str = "performance-") -> list[Path]:
    """Write throughput and speed-up of each model as one SVG file, for documents, replacing what is there.

    Returns:
        The files, in the order in which the models appear in the rows.

    Raises:
        DataError: a file cannot be read or is not JSON.
        OutputError: a picture cannot be written.
    """
    written = []
    for name, picture in pictures_of(read_rows(json_paths)).items():
        written.append(folder / f"{prefix}{name}.svg")
        with atomic_file(written[-1]) as temporary:
            temporary.write_text(picture + "\n", encoding="utf-8")
    return written
