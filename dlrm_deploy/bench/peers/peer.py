"""Peer: an engine of the benchmark, and what it needs to know of a bundle."""

from __future__ import annotations

import warnings
from typing import ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dlrm_deploy.batch import Batch
from dlrm_deploy.bench.gather import touch_pages
from dlrm_deploy.bundle import Bundle
from dlrm_deploy.config import ModelConfig
from dlrm_deploy.engines.engine import Engine
from dlrm_deploy.errors import EngineError
from dlrm_deploy.formats import RowFormat

_LONGEST_REASON = 400


class Peer(Engine):
    """An engine that is only measured. Its ids have to be valid: nothing checks them."""

    table_format: ClassVar[RowFormat] = "fp32"
    """How it stores the tables."""

    mlp: ClassVar[str] = "fp32"
    """What it computes MLPs and interaction in, fp32 or bf16."""

    def __init__(self, bundle: Bundle, threads: int) -> None:
        """Raises `EngineError` for a bundle whose model or number formats no peer can be built from."""
        super().__init__(bundle, threads)
        check_model(bundle)

    @property
    def precision(self) -> str:
        return self.mlp

    def predict(self, batch: Batch) -> npt.NDArray[np.float32]:
        try:
            return super().predict(batch)
        except RuntimeError as err:  # what torch, FBGEMM and OpenVINO raise
            reason = " ".join(str(err).split())[:_LONGEST_REASON] or type(err).__name__
            raise EngineError(f"{self.name} failed on a batch of {batch.batch_size}: {reason}") from err

    def touch_tables(self) -> None:
        """Read every page of the tables through this engine's own mapping, where it maps them."""

    def prepare(self, batch_size: int) -> None:
        """Compile what is compiled for each batch size, if anything is."""

    @property
    def copied_table_bytes(self) -> int:
        """Bytes of tables that it holds itself, beyond the mapped file."""
        return 0

    def implementations(self) -> dict[str, str]:
        return dict.fromkeys(self.bundle.manifest.operators, self.version)


def check_model(bundle: Bundle) -> None:
    """Raise `EngineError` unless the bundle is fp32 and its model one that peers are written for."""
    config, precision = bundle.config, bundle.manifest.precision
    if precision != {"tables": "fp32", "mlp": "fp32"}:
        raise EngineError(
            f"peers are built from fp32 bundles, and {bundle.path} has tables in {precision['tables']} and MLPs in "
            f"{precision['mlp']}. Measure the fp32 bundle with --variant "
            f"tables={precision['tables']},mlp={precision['mlp']}."
        )
    unusual = [
        what
        for what, is_so in (
            ("compositional tables", any(table.partition != "full" for table in config.tables)),
            ("projected tables", any(table.projection is not None for table in config.tables)),
            ("first-order terms", config.wide),
            ("a modulo of ids", any(feature.modulo for feature in config.features)),
            ("a dense transform", config.dense_transform != "none"),
            (f"interaction {config.interaction}", config.interaction not in ("dot", "concat", "dcn")),
            ("no bottom MLP", not config.bottom_mlp),
        )
        if is_so
    ]
    if unusual:
        raise EngineError(f"peers are written for plain tables and interactions dot, concat and dcn: {unusual[0]}.")


class TableSlot(NamedTuple):
    """One bag of a sample: the feature it pools and the table it reads."""

    feature: int
    table: Tensor
    """[R, D] float32, a view of the mapped matrix."""

    mean: bool


class MappedTables:
    """The fp32 matrices of a bundle as tensors over one mapping, and their slots in feature order."""

    def __init__(self, bundle: Bundle) -> None:
        self._arrays: list[npt.NDArray[np.float32]] = [formats["fp32"] for formats in bundle.map_groups()]
        with warnings.catch_warnings():
            # The mapping is read-only and torch cannot express that; nothing here writes to it.
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            self.matrices = [torch.from_numpy(array) for array in self._arrays]
        slots = {}
        for group, matrix in zip(bundle.config.groups, self.matrices, strict=True):
            for slot in group.slots:
                rows = matrix[slot.row_start : slot.row_start + slot.part.rows]
                slots[slot.feature] = TableSlot(
                    slot.feature, rows, bundle.config.features[slot.feature].pooling == "mean"
                )
        self.slots = tuple(slots[feature] for feature in sorted(slots))

    @property
    def bytes(self) -> int:
        return sum(array.nbytes for array in self._arrays)

    def touch(self) -> None:
        """Bring every page of the mapping in."""
        for array in self._arrays:
            touch_pages(array)


def starts_of(config: ModelConfig) -> list[int] | None:
    """First row of each feature's table in the one matrix of the model; None where there are several matrices."""
    if len(config.groups) != 1:
        return None
    starts = {slot.feature: slot.row_start for slot in config.groups[0].slots}
    return [starts[feature] for feature in sorted(starts)]
