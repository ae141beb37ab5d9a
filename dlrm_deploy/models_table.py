"""The comparison in docs/models.md: every MovieLens recipe, trained with several seeds, exported and checked.

    python -m dlrm_deploy.models_table --runs models --write docs/models.md

Recipes differ in `[model]` and learning rate only; their own seed and number of threads are replaced, so that all are
trained alike. Runs and bundles stay in the folder: what is finished there is not done again, so a comparison that was
interrupted goes on where it was.

Main path: `compare` -> `train_one` and `check_one` for each recipe -> `markdown`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import partial
from importlib.resources import files
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, TypeVar, TypeVarTuple

import click

from dlrm_deploy.errors import ConfigError
from dlrm_deploy.files import write_between

if TYPE_CHECKING:
    from dlrm_deploy.train.recipe import Recipe
    from dlrm_deploy.train.run import TrainingResult

RECIPES = (
    "movielens",
    "movielens-dot-self",
    "movielens-concat",
    "movielens-dcn-v1",
    "movielens-dcn-v2",
    "movielens-projection",
    "movielens-hash",
    "movielens-qr-multiply",
    "movielens-qr-add",
    "movielens-qr-concat",
    "movielens-qr-3-parts",
    "movielens-crt",
    "movielens-path",
    "movielens-mixed-dimension",
    "movielens-mlp",
    "movielens-fm",
    "movielens-mf",
)
"""The recipes compared, in the order of the table: interactions, tables, models without a DLRM's bottom."""

ENGINES = ("onnxruntime", "onnxruntime-stock")
BEGIN = "<!-- begin of the table: made by `make models-table` -->"
END = "<!-- end of the table -->"

Say = Callable[[str], None]
A = TypeVarTuple("A")
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Deployed:
    """What became of a checkpoint as a bundle."""

    table_parameters: int
    """float32 values of all stored tables."""

    other_parameters: int
    table_bytes: int
    """Size of the table files in the bundle."""

    parity: dict[str, tuple[bool, float]]
    """Per engine: whether `dlrm-deploy check` passed, and the largest difference of two probabilities."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One model of the table."""

    name: str
    results: tuple[TrainingResult, ...]
    """One for each seed."""

    deployed: Deployed
    """Of the first seed."""


def compare(
    names: Sequence[str], runs: Path, seeds: int, *, jobs: int = 1, data: Path | None = None, say: Say = print
) -> tuple[Row, ...]:
    """Train, export and check the recipes of these names that come with the package.

    Args:
        names: of the recipes.
        runs: folder for runs and bundles; made, or of an earlier call.
        seeds: models a recipe, with seeds 0, 1, ...
        jobs: processes to share the work, of one thread each.
        data: MovieLens-100K as a folder or zip file; None fetches it.
        say: told about each finished step.

    Raises:
        ConfigError: an unknown recipe.
        OutputError, DataError, TrainingError: as `dlrm_deploy.train.run.train`.
    """
    if unknown := [name for name in names if name not in RECIPES]:
        raise ConfigError(f"no recipe {', '.join(unknown)}. Recipes: {', '.join(RECIPES)}.")
    results, deployed = {}, {}
    for (name, seed, *_), result in each(
        jobs, train_one, [(n, seed, runs, data) for seed in range(seeds) for n in names]
    ):
        results[name, seed] = result
        say(f"{name}  seed {seed}  validation AUC {result.validation_auc:.4f}  test AUC {result.test_auc:.4f}")
    for (name, *_), bundle in each(jobs, check_one, [(n, runs) for n in names]):
        deployed[name] = bundle
        say(f"{name}  " + "  ".join(f"{engine}: {_verdict(*found)}" for engine, found in bundle.parity.items()))
    return tuple(
        Row(name=name, results=tuple(results[name, seed] for seed in range(seeds)), deployed=deployed[name])
        for name in names
    )


def each(jobs: int, function: Callable[[*A], T], arguments: Sequence[tuple[*A]]) -> Iterator[tuple[tuple[*A], T]]:
    """Call a function with each of the arguments; give arguments and result of each call as it ends.

    Args:
        jobs: 1 calls in this process, one after the other; more in as many processes.
        function: known to a module by its name, and so are its arguments' types.
        arguments: of all calls.
    """
    if jobs == 1:
        yield from ((values, function(*values)) for values in arguments)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        calls = {pool.submit(function, *values): values for values in arguments}
        yield from ((calls[call], call.result()) for call in as_completed(calls))


def train_one(name: str, seed: int, runs: Path, data: Path | None) -> TrainingResult:
    """Train a recipe with a seed, on one thread; or read the result of an earlier call."""
    from dlrm_deploy.train.run import train

    return train(_recipe(name, seed, data), runs / name / f"seed-{seed}")


def check_one(name: str, runs: Path) -> Deployed:
    """Export the best checkpoint of seed 0 and compare engines with PyTorch, where that was not done before."""
    from dlrm_deploy.bundle import MANIFEST, Bundle
    from dlrm_deploy.checkpoint import Checkpoint
    from dlrm_deploy.export.bundle import export_bundle
    from dlrm_deploy.export.sources import CheckpointSource
    from dlrm_deploy.model.keys import dense_shapes
    from dlrm_deploy.parity.check import check_parity
    from dlrm_deploy.train.run import BEST

    source = CheckpointSource(Checkpoint.open(runs / name / "seed-0" / BEST))
    path = runs / name / "bundle"
    bundle = Bundle.open(path) if (path / MANIFEST).exists() else None
    if (
        bundle is None
        or bundle.manifest.provenance.get("checkpoint_sha256") != source.provenance()["checkpoint_sha256"]
    ):
        bundle = export_bundle(source, path, overwrite=True)
    parity = {}
    for engine in ENGINES:
        if bundle.parity_gap(engine) is not None:
            bundle.record_parity(engine, check_parity(bundle, engine, threads=1).record())
            bundle = Bundle.open(path)
        record = bundle.manifest.parity[engine]
        parity[engine] = (bool(record["passed"]), float(record["max_abs"]))
    config = bundle.config
    return Deployed(
        table_parameters=config.table_bytes // 4,
        other_parameters=sum(math.prod(shape) for shape in dense_shapes(config).values()),
        table_bytes=sum((path / group.file).stat().st_size for group in bundle.manifest.table_groups),
        parity=parity,
    )


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a table: means over the seeds, with the least and the largest value."""
    lines = [
        "| recipe | test AUC | test log loss | parameters: tables | others | tables in the bundle | "
        + " | ".join(f"`{engine}`" for engine in ENGINES)
        + " |",
        "|---|---|---|---:|---:|---:|" + "---|" * len(ENGINES),
    ]
    for row in rows:
        deployed = row.deployed
        cells = [
            f"`{row.name}`",
            _spread([result.test_auc for result in row.results]),
            _spread([result.test_log_loss for result in row.results]),
            f"{deployed.table_parameters:,}",
            f"{deployed.other_parameters:,}",
            f"{deployed.table_bytes / 1024:,.0f} KiB",
            *(_verdict(*deployed.parity[engine]) for engine in ENGINES),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


_OPTIONS = (
    click.option("--runs", required=True, type=click.Path(file_okay=False, path_type=Path), help="Folder of the runs."),
    click.option("--seeds", default=3, show_default=True, type=click.IntRange(1, 100), help="Models a recipe."),
    click.option("--jobs", default=1, show_default=True, type=click.IntRange(1, 64), help="Processes, a thread each."),
    click.option(
        "--data",
        type=click.Path(exists=True, path_type=Path),
        help="MovieLens-100K as a folder or zip file.  [default: from the recbole wheel, fetched with pip]",
    ),
    click.option(
        "--write",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help="File whose table to replace, between two markers.  [default: print it]",
    ),
)


def table_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options of a command that trains recipes with several seeds and prints a table of them."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def give_table(table: str, page: Path | None, begin: str, end: str) -> None:
    """Print a table, or put it between two lines of a page."""
    if page is None:
        click.echo(table, nl=False)
    else:
        write_between(page, begin, end, table, "table")


@click.command()
@click.argument("recipes", nargs=-1)
@table_options
def main(recipes: tuple[str, ...], runs: Path, seeds: int, jobs: int, data: Path | None, write: Path | None) -> None:
    """Compare the MovieLens RECIPES that come with the package (all by default), and print a table of them.

    Interrupted, the same command goes on where it was.
    """
    rows = compare(recipes or RECIPES, runs, seeds, jobs=jobs, data=data, say=partial(click.echo, err=True))
    give_table(markdown(rows), write, BEGIN, END)


def _recipe(name: str, seed: int, data: Path | None) -> Recipe:
    from dlrm_deploy.train.recipe import MovieLensData, Recipe

    recipe = Recipe.read(Path(str(files("dlrm_deploy.train") / "recipes" / f"{name}.toml")))
    recipe = replace(recipe, train=replace(recipe.train, seed=seed, threads=1, tensorboard=False))
    if data is not None and isinstance(recipe.data, MovieLensData):
        recipe = replace(recipe, data=replace(recipe.data, path=str(data.resolve())))
    return recipe


def _spread(values: Sequence[float]) -> str:
    return f"{mean(values):.4f} ({min(values):.4f} to {max(values):.4f})"


def _verdict(passed: bool, max_abs: float) -> str:
    return f"{'passed' if passed else 'FAILED'}, {max_abs:.1e}"


if __name__ == "__main__":
    main()
