"""`dlrm-deploy trace`: profiles of stack distances from traffic, and traffic from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from dlrm_deploy.presets import PRESET_NAMES, preset

if TYPE_CHECKING:
    from dlrm_deploy.batch import Batch
    from dlrm_deploy.config import ModelConfig

F = TypeVar("F", bound=Callable[..., None])

PROFILED_SAMPLES = 65536
"""Samples of a dataset that are read at a time."""

SHARES = (0.001, 0.01, 0.05, 0.1, 0.2, 0.5)

_FILE = click.Path(dir_okay=False, path_type=Path)
_THERE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.group()
def trace() -> None:
    """How soon ids come again in traffic: profile it, show it, and generate traffic like it. See docs/traffic.md."""


def _model_options(command: F) -> F:
    """--bundle or --preset, which name the model."""
    folder = click.Path(exists=True, file_okay=False, path_type=Path)
    for option in (
        click.option("--scale-rows", type=float, default=1.0, help="Multiply the rows of the preset's tables."),
        click.option("--preset", "preset_name", type=click.Choice(PRESET_NAMES), help="A published model."),
        click.option("--bundle", type=folder, help="The model of a bundle."),
    ):
        command = option(command)
    return command


def _model(bundle: Path | None, preset_name: str | None, scale_rows: float) -> ModelConfig | None:
    if bundle is not None and preset_name is not None:
        raise click.UsageError("Give either --bundle or --preset: both name the model.")
    if preset_name is not None:
        return preset(preset_name, scale_rows)
    if scale_rows != 1.0:
        raise click.UsageError("--scale-rows goes with --preset.")
    if bundle is None:
        return None
    from dlrm_deploy.bundle import Bundle

    return Bundle.open(bundle).config


def _needed(config: ModelConfig | None) -> ModelConfig:
    if config is None:
        raise click.UsageError("Give --bundle or --preset: the traffic is for a model.")
    return config


@trace.command()
@click.argument("batch_files", type=_THERE, nargs=-1)
@click.option("--recipe", type=_THERE, help="Profile the training split of this recipe, in its order, instead.")
@_model_options
@click.option("--out", type=_FILE, required=True, help="The profile, a file .npz.")
def profile(
    batch_files: Sequence[Path],
    recipe: Path | None,
    bundle: Path | None,
    preset_name: str | None,
    scale_rows: float,
    out: Path,
) -> None:
    """Profile recorded traffic: BATCH_FILES (.npz, as docs/check.md says) in the order given, or a recipe's data.

    The model gives features their names, and ids the modulo of their feature; without one, features are numbers.
    """
    from dlrm_deploy.batch_file import read_batch
    from dlrm_deploy.data.trace import profile_batches

    if bool(batch_files) == (recipe is not None):
        raise click.UsageError("Give either BATCH_FILES or --recipe.")
    if out.suffix != ".npz":
        raise click.UsageError(f"--out writes .npz files: {out} should end in .npz.")
    config = _model(bundle, preset_name, scale_rows)
    if recipe is not None:
        if config is not None:
            raise click.UsageError("--recipe brings its own model: leave out --bundle and --preset.")
        config, batches = _recipe_batches(recipe)
    else:
        batches = (read_batch(path, convert=True)[0] for path in batch_files)
    profile_batches(batches, config).write(out)
    click.echo(f"{out}: see `dlrm-deploy trace show {out}`")


def _recipe_batches(path: Path) -> tuple[ModelConfig, Iterator[Batch]]:
    from dlrm_deploy.train.recipe import Recipe

    config, splits = Recipe.read(path).load()
    samples = len(splits.train)
    starts = range(0, samples, PROFILED_SAMPLES)
    pieces = (range(start, min(start + PROFILED_SAMPLES, samples)) for start in starts)
    return config, (splits.train.batch(piece)[0] for piece in pieces)


@trace.command()
@click.argument("file", type=_FILE)
@_model_options
@click.option("--samples", type=click.IntRange(min=1), required=True, help="Samples to generate.")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="The same seed gives the same traffic.")
@click.option("--cold", is_flag=True, help="Begin as if no id had ever come, instead of in the middle of traffic.")
@click.option(
    "--squeeze", is_flag=True, help="Cut the profile to the tables where it has more ids than they have rows."
)
@click.option("--out", type=_FILE, required=True, help="The batch, a file .npz.")
def generate(
    file: Path,
    bundle: Path | None,
    preset_name: str | None,
    scale_rows: float,
    samples: int,
    seed: int,
    cold: bool,
    squeeze: bool,
    out: Path,
) -> None:
    """Generate a batch for a model whose ids come again as soon as in the profile FILE.

    FILE is a profile of `trace profile`, or in the text form of facebookresearch/dlrm: its last `j` stands for the
    number of the table.
    """
    import numpy as np

    from dlrm_deploy.data.random import random_batch
    from dlrm_deploy.data.trace import Trace, TraceStream
    from dlrm_deploy.files import atomic_file

    if out.suffix != ".npz":
        raise click.UsageError(f"--out writes .npz files: {out} should end in .npz.")
    config = _needed(_model(bundle, preset_name, scale_rows))
    read = Trace.read(file)
    stream = TraceStream(read.squeezed(config) if squeeze else read, config, seed, warm=not cold)
    batch = random_batch(config, samples, np.random.default_rng(seed), distribution="trace", trace=stream)
    arrays: dict[str, Any] = {"dense": batch.dense, "indices": batch.indices, "offsets": batch.offsets}
    if batch.weights is not None:
        arrays["weights"] = batch.weights
    with atomic_file(out) as partial, partial.open("wb") as handle:
        np.savez(handle, allow_pickle=False, **arrays)
    click.echo(f"{out}: {samples} samples, {batch.indices.size} ids")


@trace.command()
@click.argument("file", type=_FILE)
@_model_options
@click.option("--out", type=_FILE, required=True, help="The profile, a file .npz.")
def squeeze(file: Path, bundle: Path | None, preset_name: str | None, scale_rows: float, out: Path) -> None:
    """Cut the profile FILE to a model whose tables have fewer rows than it has ids.

    Longer distances become the number of rows, so that hit rates of smaller caches stay as they are.
    """
    from dlrm_deploy.data.trace import Trace

    if out.suffix != ".npz":
        raise click.UsageError(f"--out writes .npz files: {out} should end in .npz.")
    config = _needed(_model(bundle, preset_name, scale_rows))
    Trace.read(file).squeezed(config).write(out)
    click.echo(f"{out}: for model {config.name}")


@trace.command()
@click.argument("file", type=_FILE)
def show(file: Path) -> None:
    """Show what a cache would do for the traffic of the profile FILE.

    For each feature: ids profiled, different ones, the share that came for the first time, and the share that an LRU
    cache of so many percent of the different ids would answer, empty at first.
    """
    from rich.console import Console
    from rich.table import Table

    from dlrm_deploy.data.trace import Trace

    table = Table(title=f"LRU hit rates, {file}", title_justify="left")
    for heading in ("feature", "ids", "different", "first", *(f"{share:.1%} cached" for share in SHARES)):
        table.add_column(heading, justify="left" if heading == "feature" else "right", no_wrap=True)
    for profile in Trace.read(file).profiles:
        rates = (profile.hit_rate(max(round(profile.lines * share), 1)) for share in SHARES)
        table.add_row(
            profile.feature,
            f"{profile.accesses:,}" if profile.accesses else "?",
            f"{profile.lines:,}",
            f"{profile.first_share:.1%}",
            *(f"{rate:.1%}" for rate in rates),
        )
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)  # a file or pipe has no edge at which columns would be cut
    console.print(table)
