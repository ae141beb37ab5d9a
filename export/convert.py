"""Convert an fp32 bundle: tables to smaller row formats, MLPs to bfloat16 or int8.

Tables go block by block, from their files. The new bundle is whole in itself. Its golden batch holds the scores of its
own PyTorch model, which is the reference for the stored numbers, and those of the fp32 model beside them. How much
worse it is than the fp32 model is measured by `dlrm_deploy.parity.accuracy`; an export passes that in as `accept`.

Main path: `convert_bundle` -> `formats_choice.choose` -> `_write_matrix` -> `bundle.write_rest`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dlrm_deploy.bundle import (
    MANIFEST,
    MIXED,
    MLP_PRECISIONS,
    REFERENCE,
    Bundle,
    Golden,
    MlpPrecision,
    TableGroupRecord,
)
from dlrm_deploy.checksums import RowChecksums
from dlrm_deploy.errors import ConfigError, OutputError
from dlrm_deploy.export.bundle import Checksums, Progress, check_room, write_rest
from dlrm_deploy.export.formats_choice import TABLES, ErrorSum, PartRows, TableChoice, TableError, Tables, choose
from dlrm_deploy.files import atomic_folder, written_in_blocks
from dlrm_deploy.formats import GroupLayout, Matrix, decode, encode, file_name

Accept = Callable[[Bundle], None]
"""Looks at the finished bundle, may add records to it, and raises where it must not be."""


def convert_bundle(
    fp32: Bundle,
    out: Path,
    *,
    tables: Tables = "int8",
    mlp: MlpPrecision = "bf16",
    overwrite: bool = False,
    progress: Progress = lambda count: None,
    accept: Accept = lambda bundle: None,
) -> Bundle:
    """Write the bundle of the same model in other number formats.

    Args:
        fp32: a bundle whose tables and MLPs are fp32; its files are taken to be verified.
        out: the folder to make.
        tables: row format of all tables, where it makes their rows smaller; auto chooses for each table.
        mlp: number format of the MLPs.
        overwrite: replace a bundle that is there.
        progress: told how many bytes of fp32 tables were converted.
        accept: called with the new bundle before it is at `out`; what it raises leaves nothing there.

    Returns:
        The bundle, opened.

    Raises:
        ConfigError: `fp32` is a converted bundle, or nothing is to be converted.
        FormatError: a row of a table or of an MLP's weight cannot be stored in the format asked for; the message names
            table or weight, row and value.
        OutputError: `out` exists, is `fp32` itself, or cannot be written; nothing is left there.
    """
    _check_asked(fp32, tables, mlp)
    if fp32.path.resolve().is_relative_to(out.resolve()):
        raise OutputError(
            f"{out} holds the fp32 bundle, which would be lost: no conversion leads back. Choose another --out."
        )
    config = fp32.config
    rows = {
        part.name: PartRows(part, fp32.path / record.file, start)
        for record, group in zip(fp32.manifest.table_groups, config.groups, strict=True)
        for part, start in zip(group.parts, group.row_starts, strict=True)
    }
    choices = {name: choose(tables, part_rows) for name, part_rows in rows.items()}
    table_formats = {name: choice.format for name, choice in choices.items() if choice.format != "fp32"}
    layouts = [GroupLayout.of(group, table_formats) for group in config.groups]
    with atomic_folder(out, overwrite, MANIFEST) as folder:
        check_room(folder, sum(layout.bytes for layout in layouts))
        records: list[TableGroupRecord] = []
        checksums: Checksums = {}
        for group, layout in zip(config.groups, layouts, strict=True):
            for matrix in layout.matrices:
                name = file_name(group.name, matrix.format)
                records.append(
                    TableGroupRecord(
                        name=group.name, file=name, rows=matrix.rows, width=group.width, format=matrix.format
                    )
                )
                for part, error, checksum in _write_matrix(folder / name, matrix, rows, progress):
                    checksums[part] = checksum
                    choices[part] = replace(choices[part], error=error)
        write_rest(
            folder,
            config=config,
            dense=fp32.dense_weights(),
            tables=tuple(records),
            checksums=checksums,
            index_dtype=fp32.manifest.index_dtype.name,
            provenance={
                **{key: value for key, value in fp32.manifest.provenance.items() if key not in ("created", "versions")},
                "converted_from": fp32.manifest.files_digest(REFERENCE),
            },
            golden=lambda bundle: _golden(bundle, fp32),
            precision={"tables": _precision(tables, choices), "mlp": mlp},
            table_formats=table_formats,
            accuracy={"tables": {name: choice.to_dict() for name, choice in choices.items()}},
        )
        accept(Bundle.open(folder, verify="none"))
    return Bundle.open(out, verify="none")


def _check_asked(fp32: Bundle, tables: str, mlp: str) -> None:
    manifest = fp32.manifest
    if manifest.table_formats or manifest.precision != {"tables": "fp32", "mlp": "fp32"}:
        raise ConfigError(
            f"{fp32.path} is converted already: tables {manifest.precision['tables']}, mlp "
            f"{manifest.precision['mlp']}. Give the fp32 bundle or the checkpoint that it was made from."
        )
    if tables not in TABLES or mlp not in MLP_PRECISIONS:
        raise ConfigError(
            f"tables must be one of {', '.join(TABLES)} and mlp one of {', '.join(MLP_PRECISIONS)}, got {tables!r} and "
            f"{mlp!r}."
        )
    if (tables, mlp) == ("fp32", "fp32"):
        raise ConfigError(f"nothing is to be converted: {fp32.path} is the fp32 bundle.")


def _precision(tables: Tables, choices: Mapping[str, TableChoice]) -> str:
    """What the manifest calls it."""
    if tables != "auto":
        return tables
    formats = {choice.format for choice in choices.values()}
    return MIXED if len(formats) > 1 else formats.pop()


def _write_matrix(
    path: Path, matrix: Matrix, rows: Mapping[str, PartRows], progress: Progress
) -> Iterator[tuple[str, TableError | None, npt.NDArray[np.uint32]]]:
    """Write the parts of a group that share a format; name, error and checksums of each. Memory holds one block."""
    path.parent.mkdir(exist_ok=True)
    with written_in_blocks(path) as write:
        for part in matrix.parts:
            checksum, error = RowChecksums(), ErrorSum()
            for first, block in rows[part.name].blocks():
                stored = encode(matrix.format, block, f"table {part.name!r}", first)
                write(np.ascontiguousarray(stored).data)
                checksum.add(stored)
                if matrix.format != "fp32":
                    error.add(block, decode(matrix.format, stored, part.width))
                progress(block.nbytes)
            yield part.name, None if matrix.format == "fp32" else error.finish(), checksum.finish()


def _golden(bundle: Bundle, fp32: Bundle) -> Golden:
    """The fp32 bundle's golden batch, with the scores of both."""
    from dlrm_deploy.engines.torch_eager import TorchEngine

    golden = fp32.golden()
    with TorchEngine(bundle, threads=1) as reference:
        return Golden(golden.batch, reference.predict(golden.batch), golden.probabilities)
