"""`dlrm-deploy check`."""

from __future__ import annotations

import json
import math
from pathlib import Path

import click

from dlrm_deploy.bundle import Bundle
from dlrm_deploy.engines.registry import ENGINE_NAMES
from dlrm_deploy.errors import OutputError
from dlrm_deploy.parity.check import SEED, ParityReport, check_parity


def _finite(ctx: click.Context, param: click.Parameter, value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):
        raise click.BadParameter(f"{value} is no limit: give a number such as 1e-3.")
    return value


@click.command()
@click.argument("bundle", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--engine", type=click.Choice(ENGINE_NAMES), default="onnxruntime", help="Engine to check.")
@click.option(
    "--atol",
    type=click.FloatRange(min=0),
    callback=_finite,
    help="Absolute error of probabilities to accept.  [default: 1e-6, more for wide models]",
)
@click.option("--seed", type=click.IntRange(min=0), default=SEED, help="Of the random batches.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--no-record", is_flag=True, help="Do not write the result into the bundle's manifest.")
@click.pass_context
def check(
    ctx: click.Context, bundle: Path, engine: str, atol: float | None, seed: int, as_json: bool, no_record: bool
) -> None:
    """Compare the probabilities of an engine with PyTorch on the same batches.

    All files of BUNDLE are hashed first. Exits 0 when every case is within the limit, 1 when one is not, 2 on wrong
    usage and 3 when nothing could be compared.
    """
    opened = Bundle.open(bundle, verify="full")
    report = check_parity(opened, engine, seed=seed, atol=atol)
    if not no_record:
        _record(opened, report)
    if as_json:
        click.echo(json.dumps(report.to_dict(), allow_nan=False))
    else:
        _print(report)
    ctx.exit(0 if report.passed else 1)


def _record(bundle: Bundle, report: ParityReport) -> None:
    try:
        bundle.record_parity(report.engine, report.record())
    except OutputError as err:
        click.echo(f"Warning: the result is not recorded in the bundle. {err}", err=True)


def _print(report: ParityReport) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    columns = (Column("case", no_wrap=True), "samples", "max abs", "max rel", "worst row", "")
    table = Table(*columns, title=f"{report.engine}, {report.version}")
    for case in report.cases:
        output = case.output
        numbers = ("", "", "", "")
        if output is not None:
            worst = "" if output.worst_row is None else str(output.worst_row)
            numbers = (str(output.rows), f"{output.max_abs:.2e}", f"{output.max_rel:.2e}", worst)
        table.add_row(case.name, *numbers, "ok" if case.passed else "FAILED")
    Console().print(table)
    for operator, implementation in report.implementations.items():
        click.echo(f"{operator}: {implementation}")
    for case in report.cases:
        if case.problem:
            click.echo(f"{case.name}: {case.problem}")
        elif case.output and case.output.nonfinite:
            click.echo(f"{case.name}: {case.output.nonfinite} of {case.output.rows} values are NaN or infinite.")
    if report.limited:
        click.echo("Only the golden batch was compared: install `dlrm-deploy[train]` for the PyTorch reference.")
    click.echo(report.summary())
