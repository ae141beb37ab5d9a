"""`dlrm-deploy export`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dlrm_deploy.bundle import MANIFEST, MLP_PRECISIONS, Bundle, MlpPrecision
from dlrm_deploy.cli.check import finite
from dlrm_deploy.cli.progress import byte_progress
from dlrm_deploy.config import DENSE_TRANSFORMS, INDEX_POLICIES, IndexPolicy, ModelConfig
from dlrm_deploy.export.importers.kinds import AUTO, KINDS, PROJECTS
from dlrm_deploy.files import scratch_folder
from dlrm_deploy.formats import ROW_FORMATS
from dlrm_deploy.presets import PRESET_NAMES
from dlrm_deploy.tables import DIVISIONS

if TYPE_CHECKING:
    from dlrm_deploy.export.formats_choice import Tables
    from dlrm_deploy.export.sources import Source

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)

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
    "Other number formats (docs/precision.md)": (
        "tables",
        "mlp",
        "data",
        "recipe",
        "max_auc_drop",
        "max_logloss_rise",
    ),
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
@click.option(
    "--tables",
    type=click.Choice((*ROW_FORMATS, "auto")),
    default="fp32",
    help="Row format of the tables; auto chooses one for each.",
)
@click.option("--mlp", type=click.Choice(MLP_PRECISIONS), default="fp32", help="Number format of the MLPs.")
@click.option(
    "--data",
    type=_FILE,
    help="Labelled samples (.npz) to compare with the fp32 model on.  [default: those of the checkpoint's own recipe]",
)
@click.option("--recipe", type=_FILE, help="Take the test split of this recipe for --data.")
@click.option(
    "--max-auc-drop",
    type=click.FloatRange(min=0),
    callback=finite,
    help="Drop in AUC to accept.  [default: 0.0005, with int4 0.002]",
)
@click.option(
    "--max-logloss-rise",
    type=click.FloatRange(min=0),
    callback=finite,
    help="Rise of log loss to accept.  [default: 0.0005, with int4 0.002]",
)
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
    tables: Tables,
    mlp: MlpPrecision,
    data: Path | None,
    recipe: Path | None,
    max_auc_drop: float | None,
    max_logloss_rise: float | None,
    **said: Any,
) -> None:
    """Turn SOURCE, a checkpoint of `dlrm-deploy train` or of another project, into a bundle.

    The bundle holds model.onnx with our operators and their function bodies, the tables as external data, a golden
    batch, and a manifest with the hash of each file. It is there whole or not at all. Nothing in SOURCE is run.

    With --tables or --mlp the fp32 model is converted, and SOURCE may be an fp32 bundle too. The result has to score
    what it stores and is compared with the fp32 model; exits 1, and leaves nothing, where it loses more than accepted.
    """
    if (source is None) == (preset is None):
        raise click.UsageError("give either SOURCE or --preset NAME.")
    if preset is None and (scale_rows is not None or seed is not None):
        raise click.UsageError("--scale-rows and --seed go with --preset.")
    given = {name: value for name, value in said.items() if value not in (None, False)}
    if source is None and (kind or given):
        names = [*(["from"] if kind else []), *given]
        raise click.UsageError(f"{_options(names)} goes with SOURCE, not --preset.")
    converted = (tables, mlp) != ("fp32", "fp32")
    limits = {"max_auc_drop": max_auc_drop, "max_logloss_rise": max_logloss_rise}
    asked = {"data": data, "recipe": recipe, **limits}
    if not converted and (named := [name for name, value in asked.items() if value is not None]):
        raise click.UsageError(f"{_options(named)} goes with --tables or --mlp: the fp32 export loses nothing.")
    if data and recipe:
        raise click.UsageError("Give either --data or --recipe: both name the labelled samples.")
    is_bundle = source is not None and (source / MANIFEST).is_file()
    if is_bundle and (not converted or kind or given or index_policy or ids != "int64"):
        raise click.UsageError(
            f"{source} is a bundle already: give --tables or --mlp, and no option about checkpoints."
        )

    from dlrm_deploy.export.bundle import export_bundle

    def convert(fp32: Bundle) -> Bundle:
        from dlrm_deploy.cli.conversion import Conversion

        conversion = Conversion(tables=tables, mlp=mlp, data=data, recipe=recipe, quiet=as_json, **limits)
        return conversion.run(fp32, out, overwrite, source)

    def write(opened: Source, folder: Path, overwrite: bool) -> Bundle:
        with byte_progress("Writing tables", opened.config.table_bytes, quiet=as_json) as progress:
            return export_bundle(
                opened, folder, index_dtype=ids, index_policy=index_policy, overwrite=overwrite, progress=progress
            )

    if is_bundle and source:
        _print(convert(Bundle.open(source, verify="full")), out, (), as_json)
        return
    opened = _open(source, kind or AUTO, given) if source else _random(str(preset), scale_rows, seed)
    if not converted:
        bundle = write(opened, out, overwrite)
    else:
        with scratch_folder(out, overwrite, MANIFEST) as scratch:
            bundle = convert(write(opened, scratch / "fp32", False))
    _print(bundle, out, opened.summary(), as_json)


def _print(bundle: Bundle, out: Path, summary: tuple[str, ...], as_json: bool) -> None:
    """What was written."""
    from dlrm_deploy.export.bundle import size_text

    manifest = bundle.manifest
    total = sum(record.size for record in manifest.files.values())
    if as_json:
        facts = {
            "bundle": str(out),
            "model": bundle.config.name,
            "bytes": total,
            "recognised": summary,
            "ignored": manifest.provenance.get("ignored_tensors", {"count": 0, "names": []}),
            "precision": manifest.precision,
            "table_formats": manifest.table_formats,
            "accuracy": manifest.accuracy,
        }
        click.echo(json.dumps(facts, allow_nan=False))
        return
    for line in summary:
        click.echo(f"  {line}")
    tables = len(bundle.config.tables)
    click.echo(f"Wrote {out}: {bundle.config.name}, {tables} table{'' if tables == 1 else 's'}, {size_text(total)}.")
    if not manifest.accuracy:
        click.echo(f"Next: dlrm-deploy check {out} --engine onnxruntime")


def _options(names: list[str]) -> str:
    return ", ".join("--" + name.replace("_", "-") for name in names)


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
