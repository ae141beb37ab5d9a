"""`make bench-report`: the models of the goals with every peer, LoadGen on the demo bundle, one report of it all.

    python -m dlrm_deploy.bench.suite --out bench-report --write docs/performance.md

Models come one after the other with random weights, in a temporary folder (`TMPDIR`, 12 GB at most at a time). What is
in the folder already is measured again unless `--keep` says otherwise.

Main path: `measure_all` -> `run_bench` for each model -> `load_test` -> `report`.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from dlrm_deploy.bench.goals import BEGIN, END, markdown, outcomes
from dlrm_deploy.bench.run import run_bench
from dlrm_deploy.bench.settings import BenchSettings, all_engines
from dlrm_deploy.bench.stored import read_rows, write_rows
from dlrm_deploy.bench.variant import Variant
from dlrm_deploy.errors import ConfigError, DlrmDeployError
from dlrm_deploy.files import write_between
from dlrm_deploy.presets import preset

BEGIN_PICTURES = "<!-- begin of the pictures: made by `make bench-report` -->"
END_PICTURES = "<!-- end of the pictures -->"

COMPILED_BATCHES = (128, 2048)
"""torch.compile is measured at these only: compiling takes up to a minute for each batch size."""

ROUNDS = 5
SLICE_MS = 60.0
VARIANTS = (
    Variant(mlp="bf16"),
    Variant(tables="int8", mlp="bf16"),
    Variant(mlp="int8"),
    Variant(tables="int8", mlp="int8"),
)

LOAD_SECONDS = 10.0

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class SuiteModel:
    """A model of the goals."""

    preset: str
    batches: tuple[int, ...]


MODELS: tuple[SuiteModel, ...] = (
    SuiteModel(preset="kaggle", batches=(1, 32, 128, 512, 2048, 8192)),
    SuiteModel(preset="paper-32", batches=(1, 32, 128, 512, 2048, 8192)),
    SuiteModel(preset="rm2-like", batches=(1, 32, 128, 512, 2048)),
)


def settings_of(model: SuiteModel, *, rounds: int, threads: int, engines: Sequence[str]) -> BenchSettings:
    """What is measured of a model: all engines, and our variants; compiled peers at some batch sizes."""
    return BenchSettings(
        engines=tuple(engines),
        variants=VARIANTS,
        batch_sizes=model.batches,
        threads=threads,
        rounds=rounds,
        slice_ms=SLICE_MS,
        only={name: COMPILED_BATCHES for name in engines if name.startswith("torch-compile")},
        isolate=True,
        breakdown=True,
    )


def measure(model: SuiteModel, settings: BenchSettings, out: Path, scale_rows: float, say: Say) -> None:
    """Measure a model and write its rows.

    Raises:
        EngineError: as `run_bench`.
        OutputError: a file cannot be written.
    """
    from dlrm_deploy.export.bundle import export_bundle
    from dlrm_deploy.export.sources import RandomSource

    config = preset(model.preset, scale_rows)
    with tempfile.TemporaryDirectory(prefix="dlrm-deploy-suite-") as folder:
        say(f"{model.preset}: writing {config.table_bytes / 1e9:.2f} GB of random tables")
        bundle = export_bundle(RandomSource(config, settings.seed), Path(folder) / "bundle")
        report = run_bench(
            bundle,
            settings,
            target=["--preset", model.preset, "--scale-rows", f"{scale_rows:g}"],
            progress=lambda step: say(f"{model.preset}: {step}"),
        )
    write_rows(out, report.to_json_lines())


def load_test(bundle: Path, out: Path, seconds: float, say: Say) -> None:
    """MLPerf's scenarios on a bundle, in a process of their own; without LoadGen, or where they fail, a remark."""
    say(f"LoadGen on {bundle}")
    command = [sys.executable, "-m", "dlrm_deploy.cli.main", "loadtest", str(bundle), "--out", str(out)]
    done = subprocess.run([*command, "--duration-s", f"{seconds:g}"], capture_output=True, text=True, check=False)
    if done.returncode > 1:  # 1: measured, and a scenario is not valid
        say(f"LoadGen was not run: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else done.returncode}")


def report(folder: Path, page: Path | None, say: Say) -> None:
    """The HTML report of all rows in a folder, and goals and pictures of `page`.

    Raises:
        ConfigError: no rows, or no place for them in `page`.
        OutputError: a file cannot be written.
    """
    from dlrm_deploy.bench.report_html import write_pictures, write_report

    paths = sorted(folder.glob("*.jsonl"))
    if not paths:
        raise ConfigError(f"{folder} holds no rows (*.jsonl). Measure first.")
    write_report(paths, folder / "report.html")
    say(f"report: {folder / 'report.html'}")
    table = markdown(outcomes([row for path in paths for row in read_rows(path)]))
    if page is None:
        click.echo(table)
        return
    write_between(page, BEGIN, END, table)
    images = page.parent / "images"
    images.mkdir(exist_ok=True)
    pictures = write_pictures(paths, images)
    links = "\n".join(f"![{path.stem}](images/{path.name})\n" for path in pictures)
    write_between(page, BEGIN_PICTURES, END_PICTURES, links)
    say(f"goals and pictures: {page}")


def measure_all(
    folder: Path,
    models: Sequence[SuiteModel],
    *,
    rounds: int = ROUNDS,
    threads: int = 2,
    scale_rows: float = 1.0,
    keep: bool = False,
    engines: Sequence[str] | None = None,
    say: Say = print,
) -> None:
    """Measure models one after the other, rows of each in a file of its own.

    Args:
        folder: for the rows; made where it is not there.
        models: in this order.
        rounds: slices of each engine at each batch size.
        threads: of each engine.
        scale_rows: multiplies the rows of all tables.
        keep: leave alone models whose rows are there.
        engines: None for all that are installed.
        say: told about each step.

    Raises:
        EngineError, OutputError: as `measure`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for model in models:
        out = folder / f"{model.preset}.jsonl"
        if keep and out.exists():
            say(f"{model.preset}: kept {out}")
            continue
        began = time.monotonic()
        settings = settings_of(model, rounds=rounds, threads=threads, engines=engines or all_engines())
        measure(model, settings, out, scale_rows, say)
        say(f"{model.preset}: {out} in {time.monotonic() - began:.0f} s")


@click.command()
@click.option("--out", "folder", required=True, type=click.Path(file_okay=False, path_type=Path), help="For the rows.")
@click.option(
    "--model", "names", multiple=True, type=click.Choice([model.preset for model in MODELS]), help="Only these."
)
@click.option("--rounds", default=ROUNDS, show_default=True, type=click.IntRange(1), help="Slices of each engine.")
@click.option("--threads", default=2, show_default=True, type=click.IntRange(1), help="Of each engine.")
@click.option("--scale-rows", default=1.0, show_default=True, type=float, help="Multiply the rows of all tables.")
@click.option("--keep", is_flag=True, help="Leave alone models whose rows are there.")
@click.option(
    "--demo",
    type=click.Path(file_okay=False, path_type=Path),
    help="Bundle for LoadGen's scenarios; left out where it is not there.",
)
@click.option("--load-seconds", default=LOAD_SECONDS, show_default=True, type=float, help="Of each LoadGen test.")
@click.option(
    "--write",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Page whose goals and pictures to replace.  [default: print the goals]",
)
def main(
    folder: Path,
    names: tuple[str, ...],
    rounds: int,
    threads: int,
    scale_rows: float,
    keep: bool,
    demo: Path | None,
    load_seconds: float,
    write: Path | None,
) -> None:
    """Measure the models of the goals with every peer that is installed, and write the report."""
    began = time.monotonic()

    def say(step: str) -> None:
        click.echo(f"{time.monotonic() - began:5.0f} s  {step}", err=True)

    try:
        models = [model for model in MODELS if not names or model.preset in names]
        measure_all(folder, models, rounds=rounds, threads=threads, scale_rows=scale_rows, keep=keep, say=say)
        if demo is not None and demo.is_dir():
            load_test(demo, folder / "scenarios.jsonl", load_seconds, say)
        elif demo is not None:
            say(f"LoadGen was not run: there is no bundle {demo}. `make demo` makes one.")
        report(folder, write, say)
    except DlrmDeployError as err:
        raise click.ClickException(str(err)) from err


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # being terminated removes the temporary folders too
    main()
