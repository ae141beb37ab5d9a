"""Engine: something that scores a Batch.

An engine opens a bundle once and then answers `predict` for batches of any size. It checks that a batch fits the model;
what one batch does wrong never harms the next.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType
from typing import ClassVar, Self

import numpy as np
import numpy.typing as npt

from dlrm_deploy.batch import Batch
from dlrm_deploy.bundle import Bundle
from dlrm_deploy.errors import BatchError


class Engine(ABC):
    """Scores batches with the model of one bundle. Not for use by several threads at once."""

    name: ClassVar[str]
    """As given to `--engine` and `dlrm_deploy.load`."""

    def __init__(self, bundle: Bundle, threads: int) -> None:
        self.bundle = bundle
        self.threads = threads

    def predict(self, batch: Batch) -> npt.NDArray[np.float32]:
        """Score a batch.

        Returns:
            Probabilities, [B] float32.

        Raises:
            BatchError: the batch does not fit the model, or an id is out of range under index policy "error".
            EngineError: the engine failed, or cannot execute here.
        """
        batch.check_fits(self.bundle.config)
        return self._run(batch)

    @abstractmethod
    def _run(self, batch: Batch) -> npt.NDArray[np.float32]:
        """Score a batch that fits the model."""

    @abstractmethod
    def implementations(self) -> dict[str, str]:
        """Which implementation each operator of ours really uses in this engine, found by looking, not by assuming."""

    @property
    @abstractmethod
    def version(self) -> str:
        """Name and version of the library that executes, for reports."""

    def close(self) -> None:  # noqa: B027  # most engines have nothing to release
        """Release memory and threads. The engine cannot be used afterwards."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def with_index_dtype(
    batch: Batch, dtype: np.dtype[np.generic]
) -> tuple[npt.NDArray[np.generic], npt.NDArray[np.generic]]:
    """`indices` and `offsets` of a batch in the type that the graph takes.

    Raises:
        BatchError: an id does not fit; the message names it.
    """
    if batch.indices.dtype == dtype:
        return batch.indices, batch.offsets
    if dtype == np.int32 and batch.indices.size:
        limits = np.iinfo(np.int32)
        for value in (batch.indices.min(), batch.indices.max(), batch.offsets[-1]):
            if not limits.min <= value <= limits.max:
                raise BatchError(f"{value} does not fit the 32-bit ids of this model. Export it with --ids int64.")
    return batch.indices.astype(dtype), batch.offsets.astype(dtype)
