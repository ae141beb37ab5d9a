"""`dlrm-deploy train`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


@click.command()
@click.argument("recipe", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--out", required=True, type=click.Path(file_okay=False, path_type=Path), help="RUN folder to make, or go on with."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_context
def train(ctx: click.Context, recipe: Path, out: Path, as_json: bool) -> None:
    """Train the model of RECIPE, a TOML file (docs/training.md), into a RUN folder.

    RUN/best is the checkpoint to export. Interrupted or killed at any moment, the same command goes on from the last
    checkpoint and ends with the same weights. A finished run is not trained again.
    """
    from dlrm_deploy.train.recipe import Recipe
    from dlrm_deploy.train.run import BEST, CHECKPOINTS, finished_result
    from dlrm_deploy.train.run import train as run_training

    finished_before = finished_result(out) is not None
    reporter = Console(quiet=as_json)
    try:
        result = run_training(Recipe.read(recipe), out, reporter)
    except KeyboardInterrupt:
        reporter.close()
        steps = [int(path.name.removeprefix("step-")) for path in (out / CHECKPOINTS).glob("step-*")]
        where = f"from step {max(steps)}" if steps else "from the start, as there is no checkpoint yet"
        click.echo(f"Interrupted. To go on {where}: dlrm-deploy train {recipe} --out {out}", err=True)
        ctx.exit(130)
    finally:
        reporter.close()
    if as_json:
        click.echo(json.dumps({"best": str(out / BEST), "finished_before": finished_before, **asdict(result)}))
        return
    if finished_before:
        click.echo(f"{out} was finished before; nothing was trained. Remove it to train again.")
    click.echo(
        f"test        AUC {result.test_auc:.4f}   log loss {result.test_log_loss:.4f}   best step {result.best_step}"
    )
    click.echo(f"checkpoint  {out / BEST}")


class Console:
    """Tells a person how training goes: a progress bar on a terminal, one line an evaluation everywhere."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._bar: Progress | None = None
        self._task: TaskID

    def started(self, step: int, steps: int) -> None:
        if self._quiet:
            return
        if step:
            click.echo(f"resuming at step {step} of {steps}", err=True)
        if sys.stderr.isatty():
            from rich import console, progress

            columns = (
                progress.TextColumn("training"),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TextColumn("loss {task.fields[loss]:.4f}"),
                progress.TimeRemainingColumn(),
            )
            self._bar = progress.Progress(*columns, console=console.Console(stderr=True), transient=True)
            self._bar.start()
            self._task = self._bar.add_task("training", total=steps, completed=step, loss=float("nan"))

    def stepped(self, step: int, loss: float) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=step, loss=loss)

    def evaluated(self, step: int, auc: float, log_loss: float, improved: bool) -> None:
        if not self._quiet:
            mark = "  best so far" if improved else ""
            line = f"step {step:>8}  validation AUC {auc:.4f}  log loss {log_loss:.4f}{mark}"
            if self._bar is not None:
                self._bar.console.print(line, highlight=False)
            else:
                click.echo(line, err=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
