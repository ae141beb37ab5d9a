"""Export a model to a bundle: stream the tables, write the graph, score the golden batch, hash everything.

Main path: `export_bundle` -> `_write_tables` -> `write_rest`, which writes the graph, the golden batch and the
manifest. All of it happens in a folder beside the place, renamed at the end. `dlrm_deploy.export.convert` makes bundles
in other number formats from what this writes.
"""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

import dlrm_deploy
from dlrm_deploy.bundle import (
    DENSE,
    FORMAT_VERSION,
    GOLDEN,
    MANIFEST,
    MODEL,
    Bundle,
    FileRecord,
    Golden,
    Manifest,
    TableGroupRecord,
)
from dlrm_deploy.checksums import CHECKSUMS, RowChecksums, weight_checksum
from dlrm_deploy.config import IndexPolicy, ModelConfig
from dlrm_deploy.data.random import random_batch, with_longer_bags
from dlrm_deploy.errors import CheckpointError, OutputError
from dlrm_deploy.export.graph import signature, write_model
from dlrm_deploy.export.nodes import DOMAIN, OPSET
from dlrm_deploy.export.sources import Source
from dlrm_deploy.files import atomic_folder, sha256_file, written_in_blocks
from dlrm_deploy.formats import RowFormat, file_name
from dlrm_deploy.model.rounding import derived_limit
from dlrm_deploy.tables import TableGroup

GOLDEN_ROWS = 64

Progress = Callable[[int], None]
"""Called with the number of table bytes just done."""

Checksums = dict[str, npt.NDArray[np.uint32]]
"""By table part or weight, as they are stored."""


def export_bundle(
    source: Source,
    out: Path,
    *,
    index_dtype: str = "int64",
    index_policy: IndexPolicy | None = None,
    overwrite: bool = False,
    progress: Progress = lambda count: None,
) -> Bundle:
    """Write the fp32 bundle of a model.

    Args:
        source: the model.
        out: the folder to make.
        index_dtype: type of the graph's ids and offsets, "int64" or "int32".
        index_policy: what happens to ids out of range; None keeps the model's own.
        overwrite: replace a bundle that is there.
        progress: told how many bytes of tables were written.

    Returns:
        The bundle, opened.

    Raises:
        OutputError: `out` exists or cannot be written; nothing is left there.
        CheckpointError: a tensor is missing or misshaped, or the exported model does not give the trainer's outputs.
    """
    config = source.config
    if index_policy is not None:
        config = replace(config, index_policy=index_policy)
    with atomic_folder(out, overwrite, MANIFEST) as folder:
        check_room(folder, config.table_bytes)
        checksums: Checksums = {}
        tables = tuple(_write_tables(folder, group, source, checksums, progress) for group in config.groups)
        write_rest(
            folder,
            config=config,
            dense=source.dense(),
            tables=tables,
            checksums=checksums,
            index_dtype=index_dtype,
            provenance=source.provenance(),
            golden=lambda bundle: _golden(bundle, source),
            precision={"tables": "fp32", "mlp": "fp32"},
            table_formats={},
            accuracy={},
        )
    return Bundle.open(out, verify="none")


def write_rest(
    folder: Path,
    *,
    config: ModelConfig,
    dense: Mapping[str, npt.NDArray[np.float32]],
    tables: tuple[TableGroupRecord, ...],
    checksums: Checksums,
    index_dtype: str,
    provenance: Mapping[str, Any],
    golden: Callable[[Bundle], Golden],
    precision: Mapping[str, str],
    table_formats: Mapping[str, RowFormat],
    accuracy: Mapping[str, Any],
) -> None:
    """Write all of a bundle but its tables, which are in `folder` already, and the manifest last.

    Args:
        folder: where.
        config: the model.
        dense: every parameter but the tables, in fp32.
        tables: the matrices that are there.
        checksums: of their parts.
        index_dtype: type of the graph's ids and offsets.
        provenance: where the model is from; versions are added.
        golden: gives the golden batch, from the bundle in `folder`, which has no hashes yet.
        precision: as in the manifest.
        table_formats: as in the manifest.
        accuracy: as in the manifest.
    """
    checksums = {**checksums, **{key: weight_checksum(weight) for key, weight in dense.items()}}
    np.savez(folder / CHECKSUMS, allow_pickle=False, **checksums)
    np.savez(folder / DENSE, allow_pickle=False, **dense)
    inputs, outputs = signature(config, index_dtype)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        model=config,
        inputs=inputs,
        outputs=outputs,
        operators={},
        opset=OPSET,
        precision=dict(precision),
        table_groups=tables,
        files={},
        provenance={**provenance, **_provenance()},
        table_formats=dict(table_formats),
        accuracy=dict(accuracy),
    )
    model = write_model(
        config, dense, tables, index_dtype, table_formats=manifest.table_formats, mlp_precision=manifest.mlp_precision
    )
    onnx.save(model, folder / MODEL)
    onnx.checker.check_model(folder / MODEL, full_check=True)
    operators = {node.op_type: 1 for node in model.graph.node if node.domain == DOMAIN}
    manifest = replace(manifest, operators=dict(sorted(operators.items(), reverse=True)))
    np.savez(folder / GOLDEN, allow_pickle=False, **golden(Bundle(folder, manifest)).arrays())
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    files = {name: _record(folder / name) for name in names}
    (folder / MANIFEST).write_text(replace(manifest, files=files).to_json(), encoding="utf-8")


def check_room(folder: Path, table_bytes: int) -> None:
    """Say so before, not after, filling the disk.

    Raises:
        OutputError: the tables need more than is free.
    """
    free = shutil.disk_usage(folder).free
    if table_bytes > free:
        raise OutputError(
            f"the tables need {size_text(table_bytes)}, and {folder.parent} has {size_text(free)} free. Choose "
            "another place, or fewer rows (--scale-rows, for a preset)."
        )


def size_text(count: int) -> str:
    """A number of bytes in the unit that fits, as 1.5 MB."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"


def _write_tables(
    folder: Path,
    group: TableGroup,
    source: Source,
    checksums: dict[str, npt.NDArray[np.uint32]],
    progress: Progress,
) -> TableGroupRecord:
    """Write the matrix of a table group piece by piece, and note its checksums; memory holds one piece at a time."""
    name = file_name(group.name, "fp32")
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    with written_in_blocks(path) as write:
        for part in group.parts:
            seen, checksum = 0, RowChecksums()
            for first, chunk in source.part_chunks(part):
                if chunk.ndim != 2 or chunk.shape[1] != part.width or first != seen or first + len(chunk) > part.rows:
                    raise CheckpointError(
                        f"table {part.name!r}: rows {first} to {first + len(chunk)} of width {chunk.shape[1:]} do not "
                        f"fit the model's {part.rows} x {part.width} after {seen} rows."
                    )
                rows = np.ascontiguousarray(chunk, "<f4")
                write(rows.data)
                checksum.add(rows)
                seen += len(chunk)
                progress(chunk.nbytes)
            if seen != part.rows:
                raise CheckpointError(f"table {part.name!r}: the source holds {seen} of {part.rows} rows.")
            checksums[part.name] = checksum.finish()
    return TableGroupRecord(name=group.name, file=name, rows=group.rows, width=group.width)


def _golden(bundle: Bundle, source: Source) -> Golden:
    """The source's golden batch, after the bundle gave the same outputs; a random one where the source has none."""
    from dlrm_deploy.engines.torch_eager import TorchEngine

    reference = TorchEngine(bundle, threads=1)
    golden = source.golden()
    if golden is None:
        batch = random_batch(with_longer_bags(bundle.config), GOLDEN_ROWS, np.random.default_rng(0))
        return Golden(batch, reference.predict(batch))
    difference = np.abs(reference.predict(golden.batch) - golden.probabilities)
    # The same arithmetic on the same weights: only the order of additions differs, by batch size and threads.
    limit = derived_limit(bundle.config, golden.batch)
    if not np.max(difference, initial=0) <= limit:
        row = int(np.argmax(np.nan_to_num(difference, nan=np.inf)))
        raise CheckpointError(
            f"the exported model does not give the trainer's outputs: sample {row} of {source.golden_name} differs by "
            f"{difference[row]:.3g} (limit {limit:g}). {source.golden_remedy}"
        )
    return golden


def _record(path: Path) -> FileRecord:
    return FileRecord(size=path.stat().st_size, sha256=sha256_file(path))


def _provenance() -> dict[str, Any]:
    import torch

    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {
            "dlrm-deploy": dlrm_deploy.__version__,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "onnx": onnx.__version__,
            "domain": f"{DOMAIN} 1",
        },
    }
