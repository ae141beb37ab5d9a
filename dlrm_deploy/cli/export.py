"""`dlrm-deploy export`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dlrm_deploy.cli.progress import byte_progress
from dlrm_deploy.config import DENSE_TRANSFORMS, INDEX_POLICIES, IndexPolicy, ModelConfig
from dlrm_deploy.export.importers.kinds import AUTO, KINDS, PROJECTS
from dlrm_deploy.presets import PRESET_NAMES
from dlrm_deploy.tables import DIVISIONS

if TYPE_CHECKING:
    from dlrm_deploy.export.sources import Source

_SECTIONS = {
    "Checkpoints of other projects (docs/import.md)": (
        "name",
        "config",
        "features",
        "interaction",
        "qr_operation",
        "quotient",
        "dense_transform",
        "modulo",
        "allow_unknown",
        "no_crc",
        "golden",
    ),
    "Published models with random weights": ("preset", "scale_rows", "seed"),
}


class _Sections(click.Command):
    """Shows options in sections, in the order of `_SECTIONS`, the others first."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        options = [param for param in self.get_params(ctx) if isinstance(param, click.Option)]
        records = {o.name: record for o in options if (record := o.get_help_record(ctx)) is not None}
        sectioned = {name for names in _SECTIONS.values() for name in names}
        with formatter.section("Options"):
            formatter.write_dl([record for name, record in records.items() if name not in sectioned])
        for title, names in _SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([records[name] for name in names])


@click.command(cls=_Sections)
@click.argument("source", required=False, type=click.Path(path_type=Path))
@click.option(
    "--from",
    "kind",
    type=click.Choice([AUTO, *KINDS]),
    help=f"Project that wrote SOURCE: {', '.join(PROJECTS.values())}.  [default: told from what it holds]",
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Bundle folder to make.")
@click.option("--ids", type=click.Choice(["int64", "int32"]), default="int64", help="Type of ids and offsets.")
@click.option(
    "--index-policy",
    type=click.Choice(INDEX_POLICIES),
    help="What to do with ids out of range.  [default: the model's]",
)
@click.option("--overwrite", is_flag=True, help="Replace a bundle that is there.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--name", help="Name of the model.  [default: imported]")
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The whole architecture as a model config, .toml or .json: nothing is read off shapes, all must agree.",
)
@click.option("--features", metavar="A,B,...", help="Names of the sparse features and their tables, in model order.")
@click.option(
    "--interaction",
    type=click.Choice(["dot", "dot-self", "cat"]),
    help="The interaction, where the shapes fit several; dot-self is dot with --arch-interaction-itself.",
)
@click.option(
    "--qr-operation",
    type=click.Choice(["mult", "add", "concat"]),
    help="facebook: how quotient-remainder tables combine their vectors.",
)
@click.option(
    "--quotient",
    type=click.Choice(DIVISIONS),
    help="facebook: arithmetic of the quotient in such tables.  [default: float32 as on a CPU, where it matters]",
)
@click.option(
    "--dense-transform",
    type=click.Choice(DENSE_TRANSFORMS),
    help="What was done to dense values before the model; the bundle then takes raw values.  [default: none]",
)
@click.option(
    "--modulo",
    type=click.IntRange(min=1),
    help="Ids were taken modulo this before the model (--max-ind-range); the bundle then takes raw ids.",
)
@click.option("--allow-unknown", is_flag=True, help="Ignore tensors of the model that nobody here knows.")
@click.option(
    "--no-crc", is_flag=True, help="Do not compare the checksums of torch.save, which it can be told to omit."
)
@click.option(
    "--golden",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Inputs and what the project computed for them (.npz): an export that differs by more than 1e-6 is refused.",
)
@click.option("--preset", type=click.Choice(PRESET_NAMES), help="Export this model with random weights instead.")
@click.option("--scale-rows", type=click.FloatRange(min=0, min_open=True), help="Multiply the preset's table rows.")
@click.option("--seed", type=click.IntRange(min=0), help="Seed of the preset's random weights.  [default: 0]")
def export(
    source: Path | None,
    kind: str | None,
    out: Path,
    preset: str | None,
    scale_rows: float | None,
    seed: int | None,
    ids: str,
    index_policy: IndexPolicy | None,
    overwrite: bool,
    as_json: bool,
    **said: Any,
) -> None:
    """Turn SOURCE, a checkpoint of `dlrm-deploy train` or of another project, into a bundle.

    The bundle holds model.onnx with our operators and their function bodies, the tables as external data, a golden
    batch, and a manifest with the hash of each file. It is there whole or not at all. Nothing in SOURCE is run.
    """
    if (source is None) == (preset is None):
        raise click.UsageError("give either SOURCE or --preset NAME.")
    if preset is None and (scale_rows is not None or seed is not None):
        raise click.UsageError("--scale-rows and --seed go with --preset.")
    given = {name: value for name, value in said.items() if value not in (None, False)}
    if source is None and (kind or given):
        names = [*(["from"] if kind else []), *given]
        raise click.UsageError(
            f"{', '.join('--' + n.replace('_', '-') for n in names)} goes with SOURCE, not --preset."
        )

    from dlrm_deploy.export.bundle import export_bundle, size_text

    opened = _open(source, kind or AUTO, given) if source else _random(str(preset), scale_rows, seed)
    with byte_progress("Writing tables", opened.config.table_bytes, quiet=as_json) as progress:
        bundle = export_bundle(
            opened, out, index_dtype=ids, index_policy=index_policy, overwrite=overwrite, progress=progress
        )
    total = sum(record.size for record in bundle.manifest.files.values())
    if as_json:
        facts = {
            "bundle": str(out),
            "model": bundle.config.name,
            "bytes": total,
            "recognised": opened.summary(),
            "ignored": bundle.manifest.provenance.get("ignored_tensors", {"count": 0, "names": []}),
        }
        click.echo(json.dumps(facts))
        return
    for line in opened.summary():
        click.echo(f"  {line}")
    tables = len(bundle.config.tables)
    click.echo(f"Wrote {out}: {bundle.config.name}, {tables} table{'' if tables == 1 else 's'}, {size_text(total)}.")
    click.echo(f"Next: dlrm-deploy check {out} --engine onnxruntime")


def _random(preset: str, scale_rows: float | None, seed: int | None) -> Source:
    from dlrm_deploy.export.sources import RandomSource
    from dlrm_deploy.presets import preset as preset_config

    return RandomSource(preset_config(preset, 1.0 if scale_rows is None else scale_rows), seed or 0)


def _open(path: Path, kind: str, given: dict[str, Any]) -> Source:
    from dlrm_deploy.export.importers.common import ImportOptions
    from dlrm_deploy.export.importers.detect import open_source

    if "config" in given:
        given["config"] = ModelConfig.read(given["config"])
    if "features" in given:
        given["features"] = tuple(name.strip() for name in given["features"].split(","))
    return open_source(path, kind, ImportOptions(**given))
