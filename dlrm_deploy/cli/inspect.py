"""`dlrm-deploy inspect`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from dlrm_deploy.bundle import Bundle
from dlrm_deploy.engines.registry import ENGINE_NAMES, open_engine
from dlrm_deploy.errors import DlrmDeployError
from dlrm_deploy.formats import row_bytes

_PIPE_WIDTH = 200


@click.command()
@click.argument("bundle", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_context
def inspect(ctx: click.Context, bundle: Path, as_json: bool) -> None:
    """Show what is in BUNDLE, which engines open it here and with which kernels, and verify every file's hash.

    Exits 0 when all files are as they were written, 1 when a file is missing or altered, 2 on wrong usage and 3 when
    the folder is no bundle.
    """
    opened = Bundle.unverified(bundle)
    facts = _facts(opened)
    if as_json:
        click.echo(json.dumps(facts, allow_nan=False))
    else:
        _print(facts)
    ctx.exit(1 if facts["altered"] else 0)


def _facts(bundle: Bundle) -> dict[str, Any]:
    """All that is printed, as plain values."""
    manifest, config = bundle.manifest, bundle.config
    altered = bundle.altered_files()
    formats = {
        part.name: manifest.table_formats.get(part.name, "fp32") for group in config.groups for part in group.parts
    }
    stored = sum(layout.bytes for layout in manifest.layouts)
    bytes_by_folder: dict[str, int] = {}
    for name, file in manifest.files.items():
        part = name.split("/")[0]
        bytes_by_folder[part] = bytes_by_folder.get(part, 0) + file.size
    return {
        "bundle": str(bundle.path),
        "model": config.to_dict(),
        "format_version": manifest.format_version,
        "inputs": {spec.name: [spec.dtype, *spec.shape] for spec in manifest.inputs},
        "outputs": {spec.name: [spec.dtype, *spec.shape] for spec in manifest.outputs},
        "tables": [
            {
                "name": table.name,
                "ids": table.rows,
                "rows": sum(part.rows for part in table.parts),
                "width": table.output_width,
                "partition": table.partition,
                "formats": sorted({formats[part.name] for part in table.parts}),
                "bytes": sum(part.rows * row_bytes(formats[part.name], part.width) for part in table.parts),
                "features": [feature.name for feature in config.features if feature.table == table.name],
            }
            for table in config.tables
        ],
        "precision": manifest.precision,
        "table_bytes": {"stored": stored, "fp32": config.table_bytes},
        "accuracy": manifest.accuracy,
        "operators": manifest.operators,
        "opset": manifest.opset,
        "bytes": bytes_by_folder,
        "files": len(manifest.files),
        "provenance": manifest.provenance,
        "plans": [_plan(bundle, record.engine, record.plan, record.sidecar) for record in manifest.plans],
        # A damaged bundle is not handed to libraries that trust their input.
        "engines": {} if altered else {name: _engine(bundle, name) for name in ENGINE_NAMES},
        "parity": manifest.parity,
        "altered": altered,
    }


def _engine(bundle: Bundle, name: str) -> dict[str, Any]:
    """Version and implementations of an engine that opens here; else why it does not."""
    try:
        with open_engine(bundle, name, threads=1, spin=False) as engine:
            return {"version": engine.version, "implementations": engine.implementations()}
    except DlrmDeployError as err:
        return {"unavailable": str(err)}


def _plan(bundle: Bundle, engine: str, plan: str, sidecar: str) -> dict[str, Any]:
    """A plan, its size and what its sidecar says; the sidecar's own text where it is damaged is of no use."""
    try:
        described = json.loads((bundle.path / sidecar).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        described = None  # `altered` says so
    return {"engine": engine, "plan": plan, "bytes": bundle.manifest.files[plan].size, "sidecar": described}


def _print(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = max(console.width, _PIPE_WIDTH)  # a file or a pipe has no edge to cut names at
    model = facts["model"]

    def line(label: str, value: object) -> None:
        console.print(f"{label:<17} {value}", markup=False, soft_wrap=True)

    line("model", model["name"])
    dense = model.get("dense_features", [])
    transform = f", {model['dense_transform']}" if "dense_transform" in model else ""
    line("dense", f"{len(dense)} features: {', '.join(dense)}{transform}" if dense else "none")
    layers = [f"bottom {_widths(model['bottom_mlp'])}"] if "bottom_mlp" in model else []
    layers.append(f"interaction {model.get('interaction', 'dot')}")
    layers += [f"top {_widths(model['top_mlp'])}"] if "top_mlp" in model else []
    layers += ["first-order terms"] if model.get("wide") else []
    line("layers", ", ".join(layers))
    line("ids", f"{facts['inputs']['indices'][0]}, out of range: {model.get('index_policy', 'error')}")
    line("precision", ", ".join(f"{part} {dtype}" for part, dtype in facts["precision"].items()))
    stored, fp32 = facts["table_bytes"]["stored"], facts["table_bytes"]["fp32"]
    if stored != fp32:
        line("saved", f"{_bytes(fp32 - stored)}: tables take {_bytes(stored)} instead of {_bytes(fp32)} in fp32")
    line("bytes", ", ".join(f"{part} {_bytes(size)}" for part, size in facts["bytes"].items()))
    exporter = ", ".join(f"{key} {value}" for key, value in facts["provenance"].items() if isinstance(value, str))
    line("made from", exporter)

    tables = {table["name"]: table for table in facts["tables"]}
    shown = Table("feature", "bag", "pooling", "table", "ids", "stored as", "rows", "width", "format", "bytes")
    for feature in model["features"]:
        table = tables[feature["table"]]
        factor = feature.get("pooling_factor")
        bag = f"{factor}" if factor else f"0 to {feature['max_ids']}" if "max_ids" in feature else "any"
        shown.add_row(
            feature["name"],
            bag,
            feature.get("pooling", "sum"),
            table["name"],
            f"{table['ids']:,}",
            table["partition"],
            f"{table['rows']:,}",
            str(table["width"]),
            ", ".join(table["formats"]),
            _bytes(table["bytes"]),
        )
    console.print(shown)

    for plan in facts["plans"]:
        line("plan", f"{plan['plan']}, {plan['engine']}, {_bytes(plan['bytes'])}")
    for name, engine in facts["engines"].items():
        if "unavailable" in engine:
            line(name, f"not here: {engine['unavailable']}")
            continue
        line(name, engine["version"])
        for operator, implementation in engine["implementations"].items():
            line("", f"{operator}: {implementation}")
    for name, record in facts["parity"].items():
        verdict = "passed" if record.get("passed") else "FAILED"
        worst, limit = record.get("worst_case"), record.get("limit")
        error = f"max abs {record.get('max_abs')}" + (f" (limit {limit})" if limit is not None else "")
        where = f", worst {worst} at row {record.get('worst_row')}" if worst else ""
        line("parity", f"{name} {verdict}, {error}{where}, {record.get('rows')} rows, {record.get('time')}")
        if failed := record.get("failed_cases"):
            line("", f"not passed: {', '.join(failed)}")
        if "version" in record:
            line("", f"{record['version']} against {record.get('reference')}")
    try:
        _print_accuracy(facts["accuracy"], line)
    except (AttributeError, KeyError, TypeError, ValueError):  # the manifest was altered by hand
        line("against fp32", "the record of the conversion is damaged")
    if not facts["parity"]:
        line("parity", f"not checked yet: dlrm-deploy check {facts['bundle']}")
    for problem in facts["altered"]:
        line("ALTERED", problem)
    if not facts["altered"]:
        line("hashes", f"all {facts['files']} files are as they were written")


def _print_accuracy(accuracy: dict[str, Any], line: Callable[[str, object], None]) -> None:
    """What the conversion of a bundle cost: the worst tables, and the comparison with the fp32 model."""
    errors = {name: table for name, table in accuracy.get("tables", {}).items() if "relative_rms" in table}
    for name, table in sorted(errors.items(), key=lambda item: -item[1]["relative_rms"])[:3]:
        error = f"relative RMS error {table['relative_rms']:.2g}, max abs {table['max_abs']:.2g}"
        line("table error", f"{name} in {table['format']}: {error}")
    for name in ("golden", "random"):
        if seen := accuracy.get(name):
            line("against fp32", f"{name} samples: max abs {seen['max_abs']:.2e}, mean {seen['mean_abs']:.2e}")
    if labelled := accuracy.get("labelled"):
        was, now = labelled["reference"], labelled["engine"]
        for name in ("auc", "log_loss", "calibration"):
            line("", f"{name.replace('_', ' ')} {was[name]:.6f} in fp32, {now[name]:.6f} here")
        line("", f"{labelled['samples']} samples of {labelled['source']}")
    elif accuracy.get("time"):
        line("", "AUC and log loss were not compared: there were no labelled samples")


def _widths(mlp: list[int]) -> str:
    return "-".join(map(str, mlp))


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"
