"""Engine: something that scores a Batch.

An engine opens a bundle once and then answers `predict` for batches of any size. It checks that a batch fits the model;
what one batch does wrong never harms the next.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from types import TracebackType
from typing import ClassVar, Self

import numpy as np
import numpy.typing as npt

from dlrm_deploy.batch import Batch
from dlrm_deploy.bundle import Bundle
from dlrm_deploy.errors import BatchError, EngineError, ParityWarning


class Engine(ABC):
    """Scores batches with the model of one bundle. Not for use by several threads at once."""

    name: ClassVar[str]
    """As given to `--engine` and `dlrm_deploy.load`."""

    def __init__(self, bundle: Bundle, threads: int) -> None:
        self.bundle = bundle
        self.threads = threads
        self.warning: str | None = None
        """What the next `predict` warns of, once: that this engine has not passed a parity check on this bundle."""
        self._closed = False

    def predict(self, batch: Batch) -> npt.NDArray[np.float32]:
        """Score a batch.

        Returns:
            Probabilities, [B] float32.

        Raises:
            BatchError: the batch does not fit the model, or an id is out of range under index policy "error".
            EngineError: the engine failed, is closed, or cannot execute here.

        Warns:
            ParityWarning: at the first call, if `dlrm-deploy check` has not passed with this engine and bundle.
        """
        if self.warning is not None:
            warning, self.warning = self.warning, None
            warnings.warn(warning, ParityWarning, stacklevel=2)
        if self._closed:
            raise EngineError(f"engine {self.name} is closed. Open the bundle again to score more batches.")
        if not isinstance(batch, Batch):
            raise BatchError(f"predict takes a dlrm_deploy.Batch, got {type(batch).__name__}.")
        batch.check_fits(self.bundle.config)
        if self.bundle.manifest.index_dtype == np.int32:
            _check_32_bits(batch)
        return self._run(batch)

    @abstractmethod
    def _run(self, batch: Batch) -> npt.NDArray[np.float32]:
        """Score a batch that fits the model."""

    @abstractmethod
    def implementations(self) -> dict[str, str]:
        """Which implementation each operator of ours really uses in this engine, found by looking, not by assuming."""

    @property
    def most_ids(self) -> int | None:
        """Ids that a bag may hold at most; None for any number."""
        return None

    def stage_outputs(self, batch: Batch, tensors: Sequence[str]) -> dict[str, npt.NDArray[np.float32]]:
        """What inner tensors of the graph hold for a batch that fits the model; unknown names are left out.

        Raises:
            EngineError: this engine cannot show them.
        """
        raise EngineError(
            f"engine {self.name} does not show what happens inside. Use onnxruntime or onnxruntime-stock instead."
        )

    @property
    def precision(self) -> str:
        """Number format of MLPs and interaction, one of `dlrm_deploy.config.PRECISIONS`."""
        return "fp32"

    @property
    @abstractmethod
    def version(self) -> str:
        """Name and version of the library that executes, for reports."""

    def close(self) -> None:
        """Release memory and threads. The engine cannot be used afterwards; closing it again does nothing."""
        if not self._closed:
            self._closed = True
            self._release()

    def _release(self) -> None:  # noqa: B027  # an engine may have nothing to release
        """Release what this kind of engine holds. Called once."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def with_index_dtype(
    batch: Batch, dtype: np.dtype[np.generic]
) -> tuple[npt.NDArray[np.generic], npt.NDArray[np.generic]]:
    """`indices` and `offsets` of a batch that `predict` has checked, in the type that the graph takes."""
    if batch.indices.dtype == dtype:
        return batch.indices, batch.offsets
    return batch.indices.astype(dtype), batch.offsets.astype(dtype)


def _check_32_bits(batch: Batch) -> None:
    """Every engine refuses what the graph of an int32 model cannot take, whatever its own arithmetic could."""
    if batch.indices.dtype == np.int32 or batch.indices.size == 0:
        return
    limits = np.iinfo(np.int32)
    for value in (batch.indices.min(), batch.indices.max(), batch.offsets[-1]):
        if not limits.min <= value <= limits.max:
            raise BatchError(f"{value} does not fit the 32-bit ids of this model. Export it with --ids int64.")
