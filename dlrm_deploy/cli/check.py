"""`dlrm-deploy check`."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dlrm_deploy.batch_file import read_batch
from dlrm_deploy.bundle import REFERENCE, Bundle
from dlrm_deploy.checksums import has_checksums
from dlrm_deploy.cli.bench import whole_numbers
from dlrm_deploy.engines.registry import ENGINE_NAMES
from dlrm_deploy.errors import EngineError, MissingDependencyError, OutputError
from dlrm_deploy.export.importers.kinds import AUTO, KINDS
from dlrm_deploy.metrics import CONFIDENCE, Difference
from dlrm_deploy.parity.check import SEED, SIZES, check_parity, stored_cases
from dlrm_deploy.parity.labelled import MAX_AUC_DROP, RESAMPLES, LabelledSamples
from dlrm_deploy.parity.report import LabelledParity, ParityReport

if TYPE_CHECKING:
    from rich.table import Column, Table

    from dlrm_deploy.config import ModelConfig
    from dlrm_deploy.export.sources import Source
    from dlrm_deploy.parity.bisect import BisectReport

ALL = "all"


def finite(ctx: click.Context, param: click.Parameter, value: float | None) -> float | None:
    """Refuse NaN and infinity as a limit."""
    if value is not None and not math.isfinite(value):
        raise click.BadParameter(f"{value} is no limit: give a number such as 1e-3.")
    return value


def _sizes(ctx: click.Context, param: click.Parameter, value: str) -> tuple[int, ...]:
    sizes = tuple(dict.fromkeys(whole_numbers(ctx, param, value)))
    if min(sizes) < 0:
        raise click.BadParameter(f"a batch has at least 0 samples, got {min(sizes)}.")
    return sizes


_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command()
@click.argument("bundle", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--engine",
    "engines",
    type=click.Choice((*ENGINE_NAMES, ALL)),
    multiple=True,
    default=("onnxruntime",),
    help=f"Engine to check; may be given several times. {ALL}: every engine but {REFERENCE}, the reference.",
)
@click.option(
    "--batch",
    "sizes",
    callback=_sizes,
    metavar="N,...",
    default=",".join(map(str, SIZES)),
    help="Sizes of the random batches.",
)
@click.option("--batch-file", type=_FILE, help="Compare one saved batch (.npz) only; nothing is recorded.")
@click.option("--data", type=_FILE, help="Labelled samples (.npz) to compare AUC, log loss and calibration on.")
@click.option("--recipe", type=_FILE, help="Take the test split of this recipe for --data.")
@click.option(
    "--source",
    type=click.Path(exists=True, path_type=Path),
    help="The checkpoint that the bundle was made from: compare every row and weight with it.",
)
@click.option(
    "--from",
    "kind",
    type=click.Choice([AUTO, *KINDS]),
    help="Project that wrote --source.  [default: told from what it holds]",
)
@click.option(
    "--max-auc-drop",
    type=click.FloatRange(min=0),
    callback=finite,
    default=MAX_AUC_DROP,
    help="Drop in AUC to accept on labelled samples.",
)
@click.option("--resamples", type=click.IntRange(min=1), default=RESAMPLES, help="Of the bootstrap intervals.")
@click.option(
    "--atol",
    type=click.FloatRange(min=0),
    callback=finite,
    help="Absolute error of probabilities to accept.  [default: 1e-6, more for wide models and low precision]",
)
@click.option("--seed", type=click.IntRange(min=0), default=SEED, help="Of the random batches and the resamples.")
@click.option(
    "--bisect",
    is_flag=True,
    help="Where an engine fails, name the first stage that departs (each table, each layer, the interaction), and "
    "save the worst sample. Altered files are reported, and do not stop it.",
)
@click.option(
    "--save",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Where --bisect saves that sample.  [default: BUNDLE-ENGINE-worst.npz in the current folder]",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object for each engine.")
@click.option("--no-record", is_flag=True, help="Do not write the result into the bundle's manifest.")
@click.pass_context
def check(
    ctx: click.Context,
    /,
    bundle: Path,
    engines: tuple[str, ...],
    batch_file: Path | None,
    data: Path | None,
    recipe: Path | None,
    source: Path | None,
    kind: str | None,
    bisect: bool,
    save: Path | None,
    as_json: bool,
    no_record: bool,
    **options: Any,
) -> None:
    """Compare the probabilities of an engine with PyTorch on the same batches.

    All files of BUNDLE are hashed first. Exits 0 when every engine that could run here is within the limits, 1 when
    one is not, 2 on wrong usage and 3 when nothing could be compared.
    """
    _check_usage(ctx, batch_file, data, recipe)
    if kind and not source:
        raise click.UsageError("--from goes with --source.")
    if save and not bisect:
        raise click.UsageError("--save goes with --bisect.")
    altered: list[str] = []
    if bisect:
        opened = Bundle.unverified(bundle)
        altered = opened.altered_files()
        for problem in altered:
            click.echo(f"ALTERED: {problem}", err=True)
    else:
        opened = Bundle.open(bundle, verify="full")
    batch = read_batch(batch_file)[0] if batch_file else None
    labelled = labelled_samples(data, recipe, opened.config)
    origin = _source(source, kind or AUTO, opened)
    if batch is None and not has_checksums(opened):
        click.echo(
            "No checksums: an earlier release exported this bundle, so its tables and weights are not compared with "
            "what was exported. Export it again for that.",
            err=True,
        )
    at_rest = stored_cases(opened, origin)
    reports: list[ParityReport] = []
    absent: list[_Absent] = []
    for name in _names(engines):
        try:
            report = check_parity(opened, name, batch=batch, labelled=labelled, at_rest=at_rest, **options)
        except (EngineError, MissingDependencyError) as err:
            absent.append(_Absent(name, str(err)))
            if as_json:
                click.echo(json.dumps(absent[-1].to_dict()))
            continue
        reports.append(report)
        if not as_json:
            _print(report)
        if not no_record and batch is None and not altered:
            _record(opened, report)
        found = _bisect(opened, report, save) if bisect and not report.passed else None
        if as_json:
            more = {"bisect": found.to_dict()} if found else {}
            click.echo(json.dumps({**report.to_dict(), **more}, allow_nan=False))
        elif found:
            _print_bisect(found)
    if not reports and not altered:
        raise EngineError(" ".join(f"{one.engine} was not compared: {one.reason}" for one in absent))
    if not as_json:
        for one in absent:
            click.echo(f"{one.engine} was not compared: {one.reason}")
    ctx.exit(0 if all(report.passed for report in reports) and not altered else 1)


@dataclass(frozen=True, slots=True)
class _Found:
    """What a bisection of one engine gave."""

    report: BisectReport
    saved: Path | None
    unsaved: str | None = None
    """Why the worst sample could not be saved."""

    def to_dict(self) -> dict[str, Any]:
        more = {"unsaved": self.unsaved} if self.unsaved else {}
        return {**self.report.to_dict(), "saved": str(self.saved) if self.saved else None, **more}


def _bisect(bundle: Bundle, report: ParityReport, save: Path | None) -> _Found:
    """Bisect on the first failed batch whose ids are valid, else on the golden one."""
    from dlrm_deploy.parity.bisect import bisect as bisect_stages
    from dlrm_deploy.parity.bisect import save_reproducer

    batch, row = bundle.golden().batch, None
    for case in report.cases:
        valid = case.batch is not None and (
            bundle.config.index_policy != "error" or case.batch.explain_bad_ids(bundle.config) is None
        )
        if not case.passed and case.batch is not None and valid and case.batch.batch_size:
            batch, row = case.batch, (case.output.worst_row or 0) if case.output else 0
            break
    found = bisect_stages(bundle, report.engine, batch)
    moving = next((one for one in found.departures if one.batch is not None), None)
    sample = moving.batch if moving else None
    if sample is None:
        if row is None:  # what differs is stored, and no sample shows it
            return _Found(found, None)
        sample = batch.rows(row, row + 1)
    path = save or Path(f"{bundle.path.resolve().name}-{report.engine}-worst.npz")
    try:
        save_reproducer(path, sample, moving)
    except OutputError as err:
        return _Found(found, None, str(err))
    return _Found(found, path)


def _print_bisect(found: _Found) -> None:
    report = found.report
    others = [departure for departure in report.departures if departure is not report.first]
    for departure in others[:8]:
        kind = "also departs" if departure.batch is not None else "stored"
        click.echo(f"{kind}: {departure.stage}: {departure.detail}")
    if report.departures and report.problem:
        click.echo(f"not looked at: {report.problem}")
    click.echo(report.summary())
    if found.saved:
        click.echo(f"Saved the worst sample: {found.saved}. Run it again with --batch-file {found.saved}.")
    if found.unsaved:
        click.echo(f"The worst sample is not saved. {found.unsaved}")


@dataclass(frozen=True, slots=True)
class _Absent:
    """An engine that cannot run here."""

    engine: str
    reason: str

    def to_dict(self) -> dict[str, Any]:
        return {"engine": self.engine, "compared": False, "reason": self.reason}


def _check_usage(ctx: click.Context, batch_file: Path | None, data: Path | None, recipe: Path | None) -> None:
    given = {
        param.name: param.opts[0]
        for param in ctx.command.params
        if param.name and ctx.get_parameter_source(param.name) is not click.core.ParameterSource.DEFAULT
    }
    if data and recipe:
        raise click.UsageError("Give either --data or --recipe: both name the labelled samples.")
    if batch_file:
        for name in ("data", "recipe", "sizes", "source"):
            if name in given:
                raise click.UsageError(f"--batch-file compares one batch only: leave {given[name]} out.")
    if not (data or recipe):
        for name in ("max_auc_drop", "resamples"):
            if name in given:
                raise click.UsageError(f"{given[name]} goes with --data or --recipe.")


def _names(engines: tuple[str, ...]) -> tuple[str, ...]:
    """Each engine once, in the order given; `all` in the order of the list."""
    spread = [ENGINE_NAMES if name == ALL else (name,) for name in engines]
    named = {name for name in engines if name != ALL}
    return tuple(dict.fromkeys(name for names in spread for name in names if name != REFERENCE or name in named))


def labelled_samples(data: Path | None, recipe: Path | None, config: ModelConfig) -> LabelledSamples | None:
    """What --data or --recipe name, for a model; None where neither is given."""
    if data:
        return LabelledSamples.read(data, config)
    if recipe:
        from dlrm_deploy.train.recipe import Recipe

        made_for, splits = Recipe.read(recipe).load()
        return LabelledSamples.of(splits.test, f"test split of {recipe}", made_for, config)
    return None


def _source(path: Path | None, kind: str, bundle: Bundle) -> Source | None:
    """The source, opened with what the export of the bundle was told."""
    if path is None:
        return None
    from dlrm_deploy.export.importers.detect import reopen_source

    return reopen_source(path, kind, bundle.config, bundle.manifest.provenance)


def _record(bundle: Bundle, report: ParityReport) -> None:
    try:
        bundle.record_parity(report.engine, report.record())
    except OutputError as err:
        click.echo(f"Warning: the result is not recorded in the bundle. {err}", err=True)
        return
    if report.passed and (gap := bundle.parity_gap(report.engine)):
        click.echo(f"Recorded, but it does not count where parity is required: {gap}.", err=True)


def _print(report: ParityReport) -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    console = Console()
    names = ("samples", "max abs", "max\nULP", "mean\nULP", "worst\nrow")
    table = Table("case", *map(_right, names), "", title=f"{report.engine}, {report.version}", box=SIMPLE)
    for case in report.cases:
        output = case.output
        numbers = [""] * len(names)
        if output is not None:
            numbers = [
                str(output.rows),
                f"{output.max_abs:.2e}",
                str(output.max_ulp),
                f"{output.mean_ulp:.2f}",
                "" if output.worst_row is None else str(output.worst_row),
            ]
        table.add_row(case.name, *numbers, "ok" if case.passed else "FAILED")
    console.print(table)
    for operator, implementation in report.implementations.items():
        click.echo(f"{operator}: {implementation}")
    for case in report.cases:
        if case.problem:
            click.echo(f"{case.name}: {case.problem}")
        elif case.output and case.output.limit != report.limit:
            click.echo(
                f"{case.name}: limit {case.output.limit:.1e}, as its bags or values are larger than the model's."
            )
        if case.output and case.output.nonfinite:
            click.echo(f"{case.name}: {case.output.nonfinite} of {case.output.rows} values are NaN or infinite.")
    if report.limited:
        click.echo("Only the golden batch was compared: install `dlrm-deploy[train]` for the PyTorch reference.")
    if report.labelled:
        labelled = report.labelled
        click.echo(f"{labelled.source}: {labelled.samples} samples, {labelled.positives} positive")
        console.print(_labelled_table(labelled))
    click.echo(report.summary())
    if report.labelled:
        click.echo(report.labelled.summary())


def _right(name: str) -> Column:
    from rich.table import Column

    return Column(name, justify="right", no_wrap=True)


def _labelled_table(labelled: LabelledParity) -> Table:
    from rich.box import SIMPLE
    from rich.table import Table

    names = ("reference", "engine", "worse by", f"{CONFIDENCE:.0%} interval")
    table = Table("", *map(_right, names), box=SIMPLE)

    def row(name: str, reference: float, engine: float, worse: Difference | None) -> None:
        numbers = (f"{worse.value:.2e}", f"{worse.low:.2e} to {worse.high:.2e}") if worse else ()
        table.add_row(name, f"{reference:.6f}", f"{engine:.6f}", *numbers)

    ours, theirs = labelled.engine, labelled.reference
    row("AUC", theirs.auc, ours.auc, labelled.auc_drop)
    row("log loss", theirs.log_loss, ours.log_loss, labelled.log_loss_rise)
    row("calibration", theirs.calibration, ours.calibration, None)
    return table
