"""`dlrm-deploy loadtest`: MLPerf's scenarios with LoadGen, and print or hand on the rows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from dlrm_deploy.errors import ConfigError

# As on the command line: dlrm_deploy.bench.scenarios.OPTION_NAMES turned round, without importing it for --help.
_SCENARIOS = {"offline": "Offline", "server": "Server", "single-stream": "SingleStream"}
_AUTO = "auto"


def _target_qps(ctx: click.Context, param: click.Parameter, value: str) -> float | None:
    if value == _AUTO:
        return None
    try:
        return float(value)
    except ValueError as err:
        raise click.BadParameter(f"{value!r} is neither a number nor {_AUTO}.") from err


@click.command()
@click.argument("bundle", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--scenario",
    "scenarios",
    type=click.Choice(list(_SCENARIOS)),
    multiple=True,
    default=list(_SCENARIOS),
    help="May be given several times.",
)
@click.option("--engine", default="onnxruntime", help="Engine, or peer of `dlrm-deploy bench`, that answers.")
@click.option(
    "--target-qps",
    callback=_target_qps,
    default=_AUTO,
    metavar="N|auto",
    help="Queries a second sent to the server; auto searches the highest valid number.",
)
@click.option("--p99-ms", type=float, default=60.0, help="Bound of the server's 99th percentile of latencies.")
@click.option("--min-pairs", type=int, default=100, help="Least pairs of user and item of a query.")
@click.option("--max-pairs", type=int, default=700, help="Most pairs of a query.")
@click.option("--duration-s", type=float, default=10.0, help="Least duration of each LoadGen test.")
@click.option("--workers", type=int, help="Engines at work at once.  [default: single-stream 1, others one per core]")
@click.option("--threads", type=int, help="CPU threads of each engine.  [default: the cores divided by the workers]")
@click.option(
    "--coalesce-pairs",
    type=int,
    default=0,
    help="A worker takes waiting queries together into one batch of at most so many pairs; 0: each alone.",
)
@click.option("--distribution", default="uniform", help="Of the ids: uniform, gaussian, zipf or trace.")
@click.option(
    "--trace",
    type=click.Path(dir_okay=False, path_type=str),
    help="Profile of recorded traffic (`dlrm-deploy trace profile`) for --distribution trace.",
)
@click.option("--seed", type=int, default=0, help="Of the queries.")
@click.option("--prefault", is_flag=True, help="Bring the tables into memory before the first query.")
@click.option("--huge-pages", is_flag=True, help="Copy the tables into memory that may have huge pages.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object for each scenario.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write those JSON lines to a file too.")
@click.option("--logs", type=click.Path(file_okay=False, path_type=Path), help="Keep LoadGen's own files there.")
def loadtest(
    bundle: Path,
    scenarios: Sequence[str],
    as_json: bool,
    out: Path | None,
    logs: Path | None,
    **options: Any,
) -> None:
    """Serve BUNDLE to MLPerf LoadGen: users a second, and how long each waits.

    A query is one user with 100 to 700 items to rank. Offline: all at once. Server: random arrivals, valid where 99 %
    are answered within a bound. Single stream: one after the other. What is valid, LoadGen says. Exits 0 when every
    scenario is valid, 1 when one is not, 2 on wrong usage, 3 when one could not be run.
    """
    from dlrm_deploy.bench.scenarios import ScenarioSettings, run_scenarios
    from dlrm_deploy.files import atomic_file

    try:
        settings = ScenarioSettings(
            scenarios=tuple(_SCENARIOS[name] for name in dict.fromkeys(scenarios)),  # type: ignore[misc]  # its keys
            **options,
        )
    except ConfigError as err:
        raise click.UsageError(str(err)) from err

    def show(row: Mapping[str, Any]) -> None:
        click.echo(json.dumps(row) if as_json else _sentence(row))

    rows = run_scenarios(bundle, settings, logs=logs, progress=lambda step: click.echo(step, err=True), on_row=show)
    if out is not None:
        with atomic_file(out) as partial:
            partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    if any(row["verdict"] != "VALID" for row in rows):
        click.get_current_context().exit(1)


def _sentence(row: Mapping[str, Any]) -> str:
    """The result of a scenario in a few lines."""
    latency = f"latency p50 {row['p50_ms']:.3g} ms, p90 {row['p90_ms']:.3g} ms, p99 {row['p99_ms']:.3g} ms"
    rates = f"{row['samples_per_s']:.4g} queries/s, {row['pairs_per_s']:.4g} pairs/s"
    what = {
        "Offline": rates,
        "Server": f"{row['target_qps']:.4g} queries/s sent, {rates}, {latency} (bound {row['p99_bound_ms'] or 0:g} ms)"
        if row["scenario"] == "Server"
        else "",
        "SingleStream": latency,
    }[row["scenario"]]
    crew = f"{row['workers']} x {row['threads']} thread{'s' if row['threads'] > 1 else ''}"
    lines = [f"{row['verdict']:8}{row['scenario']}, {row['engine']} ({crew}): {what}"]
    lines += [f"        {reason}" for reason in row["why"]]
    lines += [
        f"        at {point['target_qps']:.4g} queries/s: p99 {point['p99_ms']:.3g} ms, "
        f"{'valid' if point['valid'] else 'not valid'}"
        for point in row["load_curve"]
        if len(row["load_curve"]) > 1
    ]
    return "\n".join(lines)
