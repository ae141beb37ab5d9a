"""`dlrm-deploy demo`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click


@click.command()
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="Folder to make; an earlier demo is replaced."
)
@click.option(
    "--data",
    type=click.Path(exists=True, path_type=Path),
    help="MovieLens-100K as a folder or zip file.  [default: from the recbole wheel, fetched with pip]",
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON object.")
@click.pass_context
def demo(ctx: click.Context, out: Path, data: Path | None, as_json: bool) -> None:
    """Run the whole road on real data: train, export, build, check, bench.

    A DLRM is trained on MovieLens-100K and compared with logistic regression on the same split; its bundle, plan,
    parity verdicts and benchmark land in --out, with everything measured in report.json.

    Exits 0 when every engine agrees with PyTorch, 1 when one does not, 3 when a step could not run.
    """
    from dlrm_deploy.cli.train import Console
    from dlrm_deploy.demo import run_demo, summary

    console = Console(quiet=as_json)
    try:
        report = run_demo(out, lambda text: click.echo(f"{text} ...", err=True), console, data)
    finally:
        console.close()
    click.echo(json.dumps(asdict(report)) if as_json else summary(out, report))
    ctx.exit(0 if report.passed else 1)
