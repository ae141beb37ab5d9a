"""`dlrm-deploy bench`: measure engines side by side; print, plot, store or compare the rows."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dlrm_deploy.errors import ConfigError, EngineError, MissingDependencyError, ParityWarning
from dlrm_deploy.presets import PRESET_NAMES, preset

if TYPE_CHECKING:
    from dlrm_deploy.bench.rows import BenchReport
    from dlrm_deploy.bundle import Bundle


def _words(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    return None if value is None else tuple(word.strip() for word in value.split(","))


def whole_numbers(ctx: click.Context, param: click.Parameter, value: str) -> tuple[int, ...]:
    """Callback of an option that takes a list such as 1,128,2048."""
    try:
        return tuple(int(word) for word in value.split(","))
    except ValueError as err:
        raise click.BadParameter(f"{value!r} is not a list of whole numbers such as 1,128,2048.") from err


def _variants(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> tuple[object, ...]:
    from dlrm_deploy.bench.variant import Variant

    try:
        return tuple(Variant.parse(value) for value in values)
    except ConfigError as err:
        raise click.BadParameter(str(err)) from err


def _only(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    limited = {}
    for value in values:
        name, equals, sizes = value.rpartition("=")
        if not equals:
            raise click.BadParameter(f"{value!r} is not of the form ENGINE=N,N.")
        limited[name] = whole_numbers(ctx, param, sizes)
    return limited


@click.command()
@click.argument("bundle", type=click.Path(exists=True, file_okay=False, path_type=Path), required=False)
@click.option(
    "--preset",
    "preset_name",
    type=click.Choice(PRESET_NAMES),
    help="Measure a published model with random weights instead.",
)
@click.option("--scale-rows", type=float, default=1.0, help="Multiply the rows of the preset's tables.")
@click.option(
    "--engine",
    "engines",
    callback=_words,
    metavar="NAME,...",
    help="Engines and peers to measure, or `all`; all CPU engines installed if left out.",
)
@click.option(
    "--variant",
    "variants",
    multiple=True,
    callback=_variants,
    metavar="tables=F,mlp=F",
    help="Also measure onnxruntime on the bundle converted to these number formats. Repeatable.",
)
@click.option(
    "--batch", "batch_sizes", callback=whole_numbers, metavar="N,...", default="1,128,2048", help="Batch sizes."
)
@click.option(
    "--only", multiple=True, callback=_only, metavar="ENGINE=N,...", help="Batch sizes of one engine. Repeatable."
)
@click.option("--threads", type=int, help="CPU threads of each engine; one per core if left out.")
@click.option("--distribution", default="uniform", help="Of the ids: uniform, gaussian, zipf or trace.")
@click.option(
    "--trace",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Profile of `dlrm-deploy trace profile`, for --distribution trace.",
)
@click.option("--rounds", type=int, default=7, help="Slices of each engine at each batch size.")
@click.option("--slice-ms", type=float, default=60.0, help="Least length of a slice.")
@click.option("--seed", type=int, default=0, help="Of the inputs, and of a preset's weights.")
@click.option("--baseline", help="Engine that ratios are taken to; the first that runs if left out.")
@click.option("--prefault", is_flag=True, help="Bring tables into memory when ONNX Runtime's engines open.")
@click.option("--huge-pages", is_flag=True, help="Copy tables of ONNX Runtime's engines into huge pages.")
@click.option("--isolate", is_flag=True, help="Give each engine a process of its own.")
@click.option("--breakdown", is_flag=True, help="Profile ONNX Runtime's engines by operator.")
@click.option("--require-parity", is_flag=True, help="Refuse engines that have not passed `dlrm-deploy check`.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per engine and batch size.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write the rows: JSON lines, or .json.")
@click.option("--plot", "plot_path", type=click.Path(dir_okay=False, path_type=Path), help="Write a picture (PNG).")
@click.option(
    "--compare",
    "compare_path",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Compare with the rows of an earlier run, by ratio to the baseline.",
)
@click.option("--tolerance", type=float, default=0.15, help="Share of a ratio that --compare allows to be lost.")
@click.option(
    "--rerun",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Run again what the rows of this file came from.",
)
@click.pass_context
def bench(
    ctx: click.Context,
    /,
    as_json: bool,
    out: Path | None,
    plot_path: Path | None,
    compare_path: Path | None,
    tolerance: float,
    rerun: Path | None,
    **options: Any,
) -> None:
    """Measure engines side by side on BUNDLE, or on a --preset with random weights.

    All engines take turns, so that they meet the same machine, and what the machine can do at that moment is measured
    along with them. Exits 0 when measured, 1 when --compare finds a regression, 2 on wrong usage, 3 when nothing could
    be measured.
    """
    from dlrm_deploy.bench.compare import compare_rows, print_changes
    from dlrm_deploy.bench.plot import check_can_plot, plot
    from dlrm_deploy.bench.stored import read_rows, write_rows
    from dlrm_deploy.bench.table import print_report

    if plot_path is not None:
        if plot_path.suffix != ".png":
            raise click.UsageError(f"--plot writes PNG pictures: {plot_path} should end in .png.")
        check_can_plot()
    try:
        before = None if compare_path is None else read_rows(compare_path)
        runs = [options] if rerun is None else _runs_of(ctx, rerun)
        compare_rows([_A_ROW], [_A_ROW], tolerance)  # refuse a tolerance before measuring, not after
    except ConfigError as err:
        raise click.UsageError(str(err)) from err
    if plot_path is not None and len(runs) > 1:
        raise click.UsageError(f"--plot draws one run, and {rerun} holds {len(runs)}.")
    reports = [_measure(**run) for run in runs]
    lines = "".join(report.to_json_lines() for report in reports)
    if as_json:
        click.echo(lines, nl=False)
    else:
        for report in reports:
            print_report(report)
    if out is not None:
        write_rows(out, lines)
        click.echo(f"Rows: {out}", err=True)
    if plot_path is not None:
        plot(reports[0], plot_path)  # late: a picture that cannot be written costs no results
        click.echo(f"Picture: {plot_path}", err=True)
    if before is not None:
        try:
            changes, alone = compare_rows(before, [json.loads(line) for line in lines.splitlines()], tolerance)
        except ConfigError as err:
            raise EngineError(str(err)) from err
        for line in print_changes(changes, alone):
            click.echo(line, err=as_json)
        if any(change.regressed for change in changes):
            ctx.exit(1)


_A_ROW = {"engine": "torch", "batch": 1, "ratio": 1.0}


def _runs_of(ctx: click.Context, rerun: Path) -> list[dict[str, Any]]:
    """The options of each run that the rows of a file came from.

    Raises:
        ConfigError: they came from something else.
        click.UsageError: options beside --rerun, or those of the rows are none of this release.
    """
    from dlrm_deploy.bench.stored import commands, read_rows

    beside = {"rerun", "as_json", "out", "plot_path", "compare_path", "tolerance"}
    given = [
        name
        for name in ctx.params
        if name not in beside and ctx.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT
    ]
    if given:
        raise click.UsageError("--rerun takes everything from the rows: only output options go with it.")
    runs = []
    for words in commands(read_rows(rerun)):
        with bench.make_context("bench", list(words), parent=ctx.parent) as inner:
            runs.append({name: value for name, value in inner.params.items() if name not in beside})
    return runs


def _measure(
    bundle: Path | None, preset_name: str | None, scale_rows: float, require_parity: bool, **options: Any
) -> BenchReport:
    from dlrm_deploy.bench.run import run_bench, steps
    from dlrm_deploy.bench.settings import BenchSettings, all_engines

    if (bundle is None) == (preset_name is None):
        raise click.UsageError("Give either a BUNDLE or --preset NAME.")
    if preset_name is None and scale_rows != 1.0:
        raise click.UsageError("--scale-rows goes with --preset: the tables of a bundle are as they are.")
    if require_parity and bundle is None:
        raise click.UsageError("--require-parity goes with a BUNDLE: nothing is known of a preset with random weights.")
    if options["engines"] == ("all",):
        options["engines"] = all_engines()
    try:
        settings = BenchSettings(**{key: value for key, value in options.items() if value is not None})
        if preset_name is not None:
            preset(preset_name, scale_rows)  # a scale that makes no model is wrong usage too
    except ConfigError as err:
        raise click.UsageError(str(err)) from err
    with (
        _opened(bundle, preset_name, scale_rows, settings.seed) as (opened, target),
        _progress(steps(settings)) as progress,
        warnings.catch_warnings(),
    ):
        if require_parity:
            _check_parity(opened, settings.engines)
        warnings.simplefilter("ignore", ParityWarning)  # outputs are compared before anything is timed
        return run_bench(opened, settings, target=target, progress=progress)


def _check_parity(bundle: Bundle, engines: Sequence[str]) -> None:
    """Raise `EngineError` with one sentence for each engine that has not passed."""
    from dlrm_deploy.engines.registry import ENGINE_NAMES, parity_warning

    own = [engine for engine in engines if engine in ENGINE_NAMES]  # peers are compared, never checked
    reasons = [reason for engine in own if (reason := parity_warning(bundle, engine))]
    if reasons:
        raise EngineError(" ".join(reasons))


@contextmanager
def _opened(
    bundle: Path | None, preset_name: str | None, scale_rows: float, seed: int
) -> Iterator[tuple[Bundle, list[str]]]:
    """The bundle to measure and what the command line calls it; a preset's vanishes at the end."""
    from dlrm_deploy.bench.rows import readable_bytes
    from dlrm_deploy.bundle import Bundle

    if bundle is not None:
        yield Bundle.open(bundle), [str(bundle)]
        return
    try:
        from dlrm_deploy.export.bundle import export_bundle
        from dlrm_deploy.export.sources import RandomSource
    except ImportError as err:
        raise MissingDependencyError(
            f"--preset makes a bundle first, and {err.name} is not installed. Install it with "
            "`pip install 'dlrm-deploy[bench]'`, or measure a BUNDLE."
        ) from err
    assert preset_name is not None
    config = preset(preset_name, scale_rows)
    with tempfile.TemporaryDirectory(prefix="dlrm-deploy-bench-") as folder:
        click.echo(f"writing {readable_bytes(config.table_bytes)} of random tables to {folder}", err=True)
        made = export_bundle(RandomSource(config, seed), Path(folder) / "bundle")
        yield made, ["--preset", preset_name, "--scale-rows", f"{scale_rows:g}"]


@contextmanager
def _progress(total: int) -> Iterator[Callable[[str], None]]:
    """A progress bar on standard error, which leaves standard output to the results; none where that is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)

        def step(text: str) -> None:
            bar.update(task, description=text, advance=1)

        yield step
