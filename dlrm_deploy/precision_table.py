"""The table in docs/precision.md: what number formats cost in AUC and log loss, over several seeds.

    python -m dlrm_deploy.precision_table --runs runs/models --write docs/precision.md

Trains recipes as `dlrm_deploy.models_table` does, and shares its runs: what is finished there is not trained again.
Each model is converted to every pair of formats, int8 MLPs beside fp32 and int8 tables only, and the PyTorch engine
scores the test split with the stored numbers.

Main path: `compare` -> `train_one` -> `convert_one` for each seed -> `markdown`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import click
import numpy as np

from dlrm_deploy.bundle import REFERENCE, Bundle, MlpPrecision
from dlrm_deploy.data.planted import Ceiling, PlantedDataset
from dlrm_deploy.formats import ROW_FORMATS, RowFormat
from dlrm_deploy.metrics import auc, log_loss
from dlrm_deploy.models_table import Say, each, give_table, table_options, train_one

if TYPE_CHECKING:
    from dlrm_deploy.data.dataset import Dataset

RECIPES = ("movielens", "criteo-planted")
_MLPS: dict[RowFormat, tuple[MlpPrecision, ...]] = {"fp32": ("fp32", "bf16", "int8"), "int8": ("fp32", "bf16", "int8")}
FORMATS: tuple[tuple[RowFormat, MlpPrecision], ...] = tuple(
    (tables, mlp) for tables in ROW_FORMATS for mlp in _MLPS.get(tables, ("fp32", "bf16"))
)
"""Formats of tables and MLPs; fp32 is the first."""

BEGIN = "<!-- begin of the table: made by `make precision-table` -->"
END = "<!-- end of the table -->"


@dataclass(frozen=True, kw_only=True, slots=True)
class Scored:
    """A model in one pair of formats, on the test split."""

    auc: float
    log_loss: float
    table_bytes: int
    """Size of the table files in the bundle."""

    limit: float
    """Drop in AUC, and rise of log loss, that an export in these formats accepts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Converted:
    """What became of a recipe: a model for each seed, in all of `FORMATS`."""

    name: str
    models: tuple[tuple[Scored, ...], ...]
    """Seeds, and within them in the order of `FORMATS`."""

    ceiling: Ceiling | None
    """The best that can be had on the test split, where that is known."""


def compare(
    names: Sequence[str], runs: Path, seeds: int, *, jobs: int = 1, data: Path | None = None, say: Say = print
) -> tuple[Converted, ...]:
    """Train the recipes of these names that come with the package, convert and score them.

    Args:
        names: of the recipes.
        runs: folder for runs; made, or of an earlier call, or of `models_table`.
        seeds: models a recipe, with seeds 0, 1, ...
        jobs: processes to share the work, of one thread each.
        data: MovieLens-100K as a folder or zip file; None fetches it.
        say: told about each finished step.

    Raises:
        OutputError, DataError, TrainingError: as `dlrm_deploy.train.run.train`.
    """
    models, ceilings = {}, {}
    for (name, seed, *_), result in each(
        jobs, train_one, [(name, seed, runs, data) for seed in range(seeds) for name in names]
    ):
        say(f"{name}  seed {seed}  test AUC {result.test_auc:.4f}")
    for (name, seed, _), (scored, ceiling) in each(
        jobs, convert_one, [(name, seed, runs) for seed in range(seeds) for name in names]
    ):
        models[name, seed], ceilings[name] = scored, ceiling
        say(f"{name}  seed {seed}  converted")
    return tuple(
        Converted(name=name, models=tuple(models[name, seed] for seed in range(seeds)), ceiling=ceilings[name])
        for name in names
    )


def convert_one(name: str, seed: int, runs: Path) -> tuple[tuple[Scored, ...], Ceiling | None]:
    """Export the best checkpoint of a finished run in all of `FORMATS`, and score its test split."""
    from dlrm_deploy.checkpoint import Checkpoint
    from dlrm_deploy.export.bundle import export_bundle
    from dlrm_deploy.export.convert import convert_bundle
    from dlrm_deploy.export.sources import CheckpointSource
    from dlrm_deploy.train.recipe import Recipe
    from dlrm_deploy.train.run import BEST, RECIPE

    run = runs / name / f"seed-{seed}"
    test = Recipe.read(run / RECIPE).load()[1].test
    with TemporaryDirectory() as folder:
        fp32 = export_bundle(CheckpointSource(Checkpoint.open(run / BEST)), Path(folder) / "fp32")
        scored = []
        for tables, mlp in FORMATS:
            is_fp32 = (tables, mlp) == ("fp32", "fp32")
            bundle = fp32 if is_fp32 else convert_bundle(fp32, Path(folder) / f"{tables}-{mlp}", tables=tables, mlp=mlp)
            scored.append(_score(bundle, test))
    return tuple(scored), test.ceiling() if isinstance(test, PlantedDataset) else None


def _score(bundle: Bundle, test: Dataset) -> Scored:
    from dlrm_deploy.engines.registry import open_unchecked
    from dlrm_deploy.parity.accuracy import default_limit
    from dlrm_deploy.parity.labelled import SLICE

    with open_unchecked(bundle, REFERENCE, threads=1) as engine:
        parts = []
        for first in range(0, len(test), SLICE):
            batch, labels = test.batch(np.arange(first, min(first + SLICE, len(test))))
            parts.append((labels, engine.predict(batch)))
    labels, probabilities = (np.concatenate(pieces) for pieces in zip(*parts, strict=True))
    return Scored(
        auc=auc(labels, probabilities),
        log_loss=log_loss(labels, probabilities),
        table_bytes=sum((bundle.path / group.file).stat().st_size for group in bundle.manifest.table_groups),
        limit=default_limit(bundle),
    )


def markdown(compared: Sequence[Converted]) -> str:
    """The table: means over the seeds, and the worst of them, which is what a verdict is about."""
    lines = [
        "| recipe | tables | MLP | test AUC | drop in AUC: mean, worst | test log loss | rise of log loss: mean, worst "
        "| limit of both | | tables in the bundle |",
        "|---|---|---|---|---|---|---|---|---|---:|",
    ]
    for recipe in compared:
        for (tables, mlp), *models in zip(FORMATS, *recipe.models, strict=True):
            aucs, losses = [model.auc for model in models], [model.log_loss for model in models]
            drops = [seed[0].auc - model.auc for seed, model in zip(recipe.models, models, strict=True)]
            rises = [model.log_loss - seed[0].log_loss for seed, model in zip(recipe.models, models, strict=True)]
            limit = models[0].limit
            passed = max(*drops, *rises) <= limit
            cells = [
                f"`{recipe.name}`",
                tables,
                mlp,
                f"{mean(aucs):.5f}",
                _change(drops) if limit else "",
                f"{mean(losses):.5f}",
                _change(rises) if limit else "",
                f"{limit:g}" if limit else "",
                ("passed" if passed else "FAILED") if limit else "",
                f"{models[0].table_bytes / 1024:,.0f} KiB",
            ]
            lines.append(f"| {' | '.join(cells)} |")
        if recipe.ceiling:
            known = [f"{recipe.ceiling.auc:.5f}", "", f"{recipe.ceiling.log_loss:.5f}"]
            lines.append(f"| `{recipe.name}` | best possible | | {' | '.join(known)} | | | | |")
    return "\n".join(lines) + "\n"


def _change(values: Sequence[float]) -> str:
    """Mean and worst; what is below 1e-9 is the rounding of this sum itself."""
    return ", ".join(f"{round(value, 9) + 0.0:.1e}" for value in (mean(values), max(values)))


@click.command()
@click.argument("recipes", nargs=-1, type=click.Choice(RECIPES))
@table_options
def main(recipes: tuple[str, ...], runs: Path, seeds: int, jobs: int, data: Path | None, write: Path | None) -> None:
    """Convert the models of RECIPES (all by default) to every number format, and print what that costs.

    Interrupted, the same command goes on where it was.
    """
    compared = compare(recipes or RECIPES, runs, seeds, jobs=jobs, data=data, say=partial(click.echo, err=True))
    give_table(markdown(compared), write, BEGIN, END)


if __name__ == "__main__":
    main()
