"""Subject: one engine that takes part in a benchmark, opened on its bundle, ready to be measured slice by slice.

`Subject` is the interface that `run` works with; `open_subject` makes one in this process, `isolate` one in another.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from dlrm_deploy.batch import Batch
from dlrm_deploy.bench.breakdown import operator_shares
from dlrm_deploy.bench.footprint import own_memory
from dlrm_deploy.bench.inputs import Inputs, touching_batches
from dlrm_deploy.bench.measure import Nanoseconds, Slicer
from dlrm_deploy.bench.peers.registry import PEER_NAMES, open_peer
from dlrm_deploy.bench.rows import Footprint
from dlrm_deploy.bundle import Bundle
from dlrm_deploy.engines.engine import Engine
from dlrm_deploy.engines.registry import MAPPING_ENGINES, PLAN_ENGINES, open_unchecked
from dlrm_deploy.errors import ParityWarning
from dlrm_deploy.formats import RowFormat


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """How engines are opened."""

    threads: int
    prefault: bool = False
    huge_pages: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What a subject says of itself."""

    engine: str
    """Its name as an engine, without number formats."""

    tables: str
    mlp: str
    formats: Mapping[str, RowFormat]
    """Row format of each table part that is not fp32."""

    version: str
    implementations: dict[str, str]
    footprint: Footprint


class Subject(Protocol):
    """What `run` asks of an engine that is measured, in this process or another."""

    @property
    def facts(self) -> Facts: ...

    @property
    def process(self) -> int | None:
        """Id of its process, where that is not this one."""

    def prepare(self, batch_size: int, start: float) -> None:
        """Compile for a batch size, where that is done, and get ready for its slices (`Slicer`'s `start`)."""

    def outputs(self, batch_size: int) -> npt.NDArray[np.float32]:
        """Probabilities of `Inputs.to_compare`, one batch after the other."""

    def slice(self) -> Nanoseconds:
        """Measure one slice at the batch size prepared last."""

    def breakdown(self, batch_size: int) -> dict[str, float] | None:
        """Share of each operator, where the engine has operators."""

    def close(self) -> None:
        """Release it."""


class LocalSubject:
    """A subject in this process."""

    process = None

    def __init__(self, engine: Engine, facts: Facts, inputs: Inputs, slice_ms: float) -> None:
        self._engine = engine
        self._inputs = inputs
        self._slice_ms = slice_ms
        self._slicer: Slicer | None = None
        self.facts = facts

    def prepare(self, batch_size: int, start: float) -> None:
        prepare = getattr(self._engine, "prepare", None)  # of peers
        if prepare is not None:
            prepare(batch_size)
        batches = self._batches(self._inputs.of_size(batch_size))
        self._slicer = Slicer(self._engine.predict, batches, self._slice_ms, start=start)

    def outputs(self, batch_size: int) -> npt.NDArray[np.float32]:
        batches = self._batches(self._inputs.to_compare(batch_size))
        return np.concatenate([self._engine.predict(batch) for batch in batches])

    def slice(self) -> Nanoseconds:
        assert self._slicer is not None  # prepared
        return self._slicer()

    def breakdown(self, batch_size: int) -> dict[str, float] | None:
        return operator_shares(self._engine, self._inputs.of_size(batch_size))

    def close(self) -> None:
        self._engine.close()

    def _batches(self, batches: Sequence[Batch]) -> Sequence[Batch]:
        """The batches with ids in the type that the engine wants: converting them is no part of scoring."""
        dtype: np.dtype[Any] | None = getattr(self._engine, "index_dtype", None)
        if dtype is None or batches[0].indices.dtype == dtype:
            return batches
        return [
            Batch(batch.dense, batch.indices.astype(dtype), batch.offsets.astype(dtype), batch.weights)
            for batch in batches
        ]


def open_subject(bundle: Bundle, engine: str, options: Options, inputs: Inputs, slice_ms: float) -> LocalSubject:
    """Open an engine or peer, read every page of the tables through its own mapping, and score one sample.

    Args:
        bundle: what it runs.
        engine: one of `ENGINE_NAMES` or `PEER_NAMES`.
        options: of opening it.
        inputs: batches of the run.
        slice_ms: as in `Slicer`.

    Raises:
        EngineError, BatchError, MissingDependencyError: it does not run here.
    """
    before, began = own_memory(), time.perf_counter()
    opened: Engine
    if engine in PEER_NAMES:
        opened = open_peer(bundle, engine, threads=options.threads)
    else:
        mapped = {"prefault": options.prefault, "huge_pages": options.huge_pages} if engine in MAPPING_ENGINES else {}
        opened = open_unchecked(bundle, engine, threads=options.threads, spin=False, **mapped)
    load_seconds = time.perf_counter() - began
    try:
        facts = _facts(bundle, engine, opened, load_seconds, before)
    except BaseException:
        opened.close()
        raise
    return LocalSubject(opened, facts, inputs, slice_ms)


def _facts(bundle: Bundle, name: str, engine: Engine, load_seconds: float, before: int | None) -> Facts:
    if name in PEER_NAMES:
        engine.touch_tables()  # type: ignore[attr-defined]  # of peers
        kind: RowFormat = engine.table_format  # type: ignore[attr-defined]
        tables, mlp = str(kind), engine.precision
        formats: dict[str, RowFormat] = {}
        if kind != "fp32":
            formats = {part.name: kind for group in bundle.config.groups for part in group.parts}
        stored = engine.copied_table_bytes or bundle.config.table_bytes  # type: ignore[attr-defined]
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ParityWarning)
            engine.predict(bundle.golden().batch.rows(0, 1))  # a plan opens without a GPU, and says so only here
            if name not in PLAN_ENGINES:
                for batch in touching_batches(bundle.config, bundle.manifest.index_dtype):
                    engine.predict(batch)
        tables = bundle.manifest.precision["tables"]
        mlp = engine.precision if name in PLAN_ENGINES else bundle.manifest.precision["mlp"]
        formats = dict(bundle.manifest.table_formats)
        stored = sum(matrix.nbytes for matrix in bundle.map_tables())
    after = own_memory()
    return Facts(
        engine=name,
        tables=tables,
        mlp=mlp,
        formats=formats,
        version=engine.version,
        implementations=engine.implementations(),
        footprint=Footprint(
            load_seconds=load_seconds,
            resident_bytes=None if before is None or after is None else max(after - before, 0),
            stored_table_bytes=stored,
        ),
    )
