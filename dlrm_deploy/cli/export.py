"""`dlrm-deploy export`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from dlrm_deploy.cli.progress import byte_progress
from dlrm_deploy.config import INDEX_POLICIES, IndexPolicy
from dlrm_deploy.presets import PRESET_NAMES


@click.command()
@click.argument("checkpoint", required=False, type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Bundle folder to make.")
@click.option("--preset", type=click.Choice(PRESET_NAMES), help="Export this model with random weights instead.")
@click.option("--scale-rows", type=click.FloatRange(min=0, min_open=True), help="Multiply the preset's table rows.")
@click.option("--seed", type=click.IntRange(min=0), help="Seed of the preset's random weights.  [default: 0]")
@click.option("--ids", type=click.Choice(["int64", "int32"]), default="int64", help="Type of ids and offsets.")
@click.option(
    "--index-policy",
    type=click.Choice(INDEX_POLICIES),
    help="What to do with ids out of range.  [default: the model's]",
)
@click.option("--overwrite", is_flag=True, help="Replace a bundle that is there.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def export(
    checkpoint: Path | None,
    out: Path,
    preset: str | None,
    scale_rows: float | None,
    seed: int | None,
    ids: str,
    index_policy: IndexPolicy | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Turn CHECKPOINT, a folder written by `dlrm-deploy train`, into a bundle.

    The bundle holds model.onnx with our operators and their function bodies, the tables as external data, a golden
    batch, and a manifest with the hash of each file. It is there whole or not at all.
    """
    if (checkpoint is None) == (preset is None):
        raise click.UsageError("give either CHECKPOINT or --preset NAME.")
    if preset is None and (scale_rows is not None or seed is not None):
        raise click.UsageError("--scale-rows and --seed go with --preset.")

    from dlrm_deploy.checkpoint import Checkpoint
    from dlrm_deploy.export.bundle import export_bundle
    from dlrm_deploy.export.sources import CheckpointSource, RandomSource, Source
    from dlrm_deploy.presets import preset as preset_config

    source: Source
    if preset is not None:
        source = RandomSource(preset_config(preset, 1.0 if scale_rows is None else scale_rows), seed or 0)
    else:
        assert checkpoint is not None
        source = CheckpointSource(Checkpoint.open(checkpoint))
    with byte_progress("Writing tables", source.config.table_bytes, quiet=as_json) as progress:
        bundle = export_bundle(
            source, out, index_dtype=ids, index_policy=index_policy, overwrite=overwrite, progress=progress
        )
    total = sum(record.size for record in bundle.manifest.files.values())
    if as_json:
        click.echo(json.dumps({"bundle": str(out), "model": bundle.config.name, "bytes": total}))
    else:
        click.echo(f"Wrote {out}: {bundle.config.name}, {len(bundle.config.tables)} tables, {total / 1e6:.1f} MB.")
        click.echo(f"Next: dlrm-deploy check {out} --engine onnxruntime")
