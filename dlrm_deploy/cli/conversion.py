"""The conversion of an fp32 bundle that `dlrm-deploy export --tables --mlp` makes, with its gate."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dlrm_deploy.bundle import Bundle, MlpPrecision
from dlrm_deploy.cli.check import labelled_samples
from dlrm_deploy.cli.progress import byte_progress
from dlrm_deploy.config import ModelConfig
from dlrm_deploy.errors import DlrmDeployError

if TYPE_CHECKING:
    from dlrm_deploy.export.formats_choice import Tables
    from dlrm_deploy.parity.labelled import LabelledSamples

_RECIPE = "recipe.toml"


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversion:
    """What was asked for on the command line."""

    tables: Tables
    mlp: MlpPrecision
    data: Path | None
    recipe: Path | None
    max_auc_drop: float | None
    max_logloss_rise: float | None
    quiet: bool

    def run(self, fp32: Bundle, out: Path, overwrite: bool, source: Path | None) -> Bundle:
        """Convert a bundle to `out`, if its engines and its accuracy pass.

        Args:
            fp32: the bundle.
            out: the folder to make.
            overwrite: replace a bundle that is there.
            source: what the model is from; a checkpoint of `dlrm-deploy train` brings labelled samples.

        Raises:
            AccuracyError: they do not; nothing is left at `out`.
        """
        from dlrm_deploy.export.convert import convert_bundle
        from dlrm_deploy.parity.conversion import check_conversion

        labelled = self._samples(fp32.config, source)

        def accept(converted: Bundle) -> None:
            check_conversion(
                fp32,
                converted,
                labelled=labelled,
                max_auc_drop=self.max_auc_drop,
                max_log_loss_rise=self.max_logloss_rise,
                say=self._say,
            )

        with byte_progress("Converting tables", fp32.config.table_bytes, quiet=self.quiet) as progress:
            return convert_bundle(
                fp32, out, tables=self.tables, mlp=self.mlp, overwrite=overwrite, progress=progress, accept=accept
            )

    def _samples(self, config: ModelConfig, source: Path | None) -> LabelledSamples | None:
        """Those asked for; else the test split of the run that the checkpoint is from, where that can be had."""
        if self.data or self.recipe:
            return labelled_samples(self.data, self.recipe, config)
        own = _own_recipe(source) if source else None
        if own is None:
            return None
        try:
            return labelled_samples(None, own, config)
        except (DlrmDeployError, OSError) as err:
            self._say(f"The test split of {own} cannot be had, and is not compared on: {err}")
            return None

    def _say(self, line: str) -> None:
        if not self.quiet:
            click.echo(line)


def _own_recipe(source: Path) -> Path | None:
    """The recipe of the run that a checkpoint is from: RUN/recipe.toml of RUN/best or RUN/checkpoints/step-N."""
    here = source.resolve()
    return next(
        (folder / _RECIPE for folder in (here.parent, here.parent.parent) if (folder / _RECIPE).is_file()), None
    )
