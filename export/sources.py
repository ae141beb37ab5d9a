"""Sources: where an export takes a model from. A checkpoint of ours, or random weights for a preset.

Checkpoints of other projects are in `dlrm_deploy.export.importers`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from zlib import crc32

import numpy as np
import numpy.typing as npt

from dlrm_deploy.bundle import Golden
from dlrm_deploy.config import ModelConfig
from dlrm_deploy.model.keys import dense_shapes, table_key
from dlrm_deploy.tables import TablePart

if TYPE_CHECKING:
    from dlrm_deploy.checkpoint import Checkpoint  # brings torch, which random weights do without

FloatArray = npt.NDArray[np.float32]
_CHUNK_VALUES = 1 << 22  # 16 MiB


class Source(ABC):
    """A model to export. Tables come in pieces, so that none has to fit into memory."""

    config: ModelConfig

    golden_name: str = "the checkpoint's golden batch"
    """What `golden` gives, for messages."""

    golden_remedy: str = "The checkpoint's weights and its golden.npz do not belong together: train again."
    """What to do where the exported model gives other outputs than `golden`."""

    @abstractmethod
    def dense(self) -> dict[str, FloatArray]:
        """Every parameter but the tables, by checkpoint key."""

    @abstractmethod
    def part_chunks(self, part: TablePart) -> Iterator[tuple[int, FloatArray]]:
        """Pieces (first row, [n, width] float32) that together are the matrix of a table part."""

    @abstractmethod
    def golden(self) -> Golden | None:
        """Real inputs with the outputs that the model gave in its trainer; None where there are none."""

    @abstractmethod
    def provenance(self) -> dict[str, Any]:
        """Where this came from, for the manifest."""

    def summary(self) -> tuple[str, ...]:
        """What was recognised, in a few lines for a person; nothing where a config says it all."""
        return ()


class CheckpointSource(Source):
    """A checkpoint written by `dlrm-deploy train`; verified here in full."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        checkpoint.verify()
        self._checkpoint = checkpoint
        self.config = checkpoint.config

    def dense(self) -> dict[str, FloatArray]:
        return {key: self._checkpoint.read(f"model.{key}") for key in dense_shapes(self.config)}

    def part_chunks(self, part: TablePart) -> Iterator[tuple[int, FloatArray]]:
        return self._checkpoint.chunks(f"model.{table_key(part.name)}")

    def golden(self) -> Golden | None:
        return self._checkpoint.golden()

    def provenance(self) -> dict[str, Any]:
        return {"source": "checkpoint", "checkpoint_sha256": self._checkpoint.sha256}


class RandomSource(Source):
    """Seeded random weights for a config: real sizes without a training run, for measuring."""

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        self.config = config
        self._seed = seed

    def dense(self) -> dict[str, FloatArray]:
        """Normal with variance 2 / (fan in + fan out), biases with variance 1 / fan out, as in the paper's code."""
        weights = {}
        for key, shape in dense_shapes(self.config).items():
            deviation = math.sqrt(2 / sum(shape) if len(shape) > 1 else 1 / shape[0])
            weights[key] = self._rng(key).standard_normal(shape, np.float32) * np.float32(deviation)
        return weights

    def part_chunks(self, part: TablePart) -> Iterator[tuple[int, FloatArray]]:
        """Uniform in +-1 / sqrt(rows), as in the paper's code."""
        rng = self._rng(part.name)
        bound = np.float32(1 / math.sqrt(part.rows))
        step = max(1, _CHUNK_VALUES // part.width)
        for start in range(0, part.rows, step):
            chunk = rng.random((min(step, part.rows - start), part.width), np.float32)
            chunk -= np.float32(0.5)
            chunk *= 2 * bound
            yield start, chunk

    def golden(self) -> None:
        return None

    def provenance(self) -> dict[str, Any]:
        return {"source": "random weights", "seed": self._seed}

    def _rng(self, name: str) -> np.random.Generator:
        return np.random.default_rng([self._seed, crc32(name.encode())])
