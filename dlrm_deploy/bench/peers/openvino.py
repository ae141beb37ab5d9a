"""OpenVINO as peer: the PyTorch form converted once, compiled for each batch size with the hint LATENCY.

Each table stays a matrix of its own (OpenVINO 2026.4 ends the process on a Gather from one of 2 GB and more), and the
converted model reads the mapped file without a copy. Bags become EmbeddingBagOffsets, one-hot features Gather. Where
bags vary, each feature gets a last bag of its own with one id, whose result is dropped: the operator refuses empty bags
at the end of its ids.
"""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dlrm_deploy.batch import Batch
from dlrm_deploy.bench.peers.peer import MappedTables, Peer
from dlrm_deploy.bench.peers.plain_model import DenseModel
from dlrm_deploy.bundle import Bundle


class OpenVinoPeer(Peer):
    """OpenVINO in float32."""

    name: ClassVar[str] = "openvino-fp32"
    mlp: ClassVar[str] = "fp32"

    def __init__(self, bundle: Bundle, threads: int) -> None:
        super().__init__(bundle, threads)
        import openvino

        self._openvino = openvino
        self._tables = MappedTables(bundle)
        self._fixed = bundle.config.pooling_factors is not None
        self._one_hot = set(bundle.config.pooling_factors or ()) == {1} and not bundle.config.weighted
        self._model = self._convert()
        self._core = openvino.Core()
        self._requests: dict[int, Any] = {}

    def _convert(self) -> Any:
        """The model for any batch size, with its inputs in the order of `_arguments`."""
        golden = self.bundle.golden().batch.rows(0, 2)
        module = _Module(self.bundle, self._tables, self._one_hot).eval()
        arguments = tuple(torch.from_numpy(array) for array in self._arguments(golden))
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # its own way of tracing is deprecated by torch
            return self._openvino.convert_model(module, example_input=arguments)

    def _arguments(self, batch: Batch) -> list[npt.NDArray[Any]]:
        """Dense values, then the ids of each feature, and the start of each of its bags, and weights, where needed."""
        B = batch.batch_size
        arguments: list[npt.NDArray[Any]] = [batch.dense]
        ends = batch.offsets[::B].tolist()
        more = 0 if self._fixed else 1
        for f in range(len(self.bundle.config.features)):
            ids = batch.indices[ends[f] : ends[f + 1]]
            arguments.append(ids if self._fixed else np.append(ids, ids.dtype.type(0)))
            if not self._one_hot:
                arguments.append(batch.offsets[f * B : (f + 1) * B + more] - ends[f])
            if batch.weights is not None:
                weights = batch.weights[ends[f] : ends[f + 1]]
                arguments.append(weights if self._fixed else np.append(weights, np.float32(0)))
        return arguments

    def prepare(self, batch_size: int) -> None:
        if batch_size in self._requests:
            return
        factors = self.bundle.config.pooling_factors
        weighted = self.bundle.config.weighted
        shapes: list[list[int]] = [[batch_size, len(self.bundle.config.dense_features)]]
        for f in range(len(self.bundle.config.features)):
            count = batch_size * factors[f] if factors else -1
            shapes.append([count])
            if not self._one_hot:
                shapes.append([batch_size if self._fixed else batch_size + 1])
            if weighted:
                shapes.append([count])
        self._model.reshape({i: self._openvino.PartialShape(shape) for i, shape in enumerate(shapes)})
        compiled = self._core.compile_model(
            self._model,
            "CPU",
            {
                "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_PRECISION_HINT": "bf16" if self.mlp == "bf16" else "f32",
                "INFERENCE_NUM_THREADS": self.threads,
                "NUM_STREAMS": 1,
            },
        )
        self._requests = {batch_size: compiled.create_infer_request()}  # one at a time: a compiled model takes memory

    def _run(self, batch: Batch) -> npt.NDArray[np.float32]:
        self.prepare(batch.batch_size)
        request = self._requests[batch.batch_size]
        probabilities: npt.NDArray[np.float32] = request.infer(self._arguments(batch), share_inputs=True)[0]
        return probabilities

    def touch_tables(self) -> None:
        self._tables.touch()

    @property
    def version(self) -> str:
        return f"openvino {self._openvino.__version__.partition('-')[0]}"

    def _release(self) -> None:
        self._requests = {}
        del self._model, self._core, self._tables


class OpenVinoBf16Peer(OpenVinoPeer):
    """OpenVINO with bfloat16 inside, its own default where the CPU has AMX."""

    name: ClassVar[str] = "openvino-bf16"
    mlp: ClassVar[str] = "bf16"


class _Module(nn.Module):
    """What is converted: takes the arguments of `OpenVinoPeer._arguments`."""

    def __init__(self, bundle: Bundle, tables: MappedTables, one_hot: bool) -> None:
        super().__init__()
        self._dense = DenseModel(bundle, torch.float32)
        self._slots = tables.slots
        self._one_hot = one_hot
        self._weighted = bundle.config.weighted
        self._fixed = bundle.config.pooling_factors is not None

    def forward(self, dense: Tensor, *features: Tensor) -> Tensor:
        each = 1 if self._one_hot else 3 if self._weighted else 2
        vectors = []
        for slot in self._slots:
            ids, *rest = features[slot.feature * each : (slot.feature + 1) * each]
            if self._one_hot:
                vectors.append(F.embedding(ids, slot.table))
            else:
                bags = F.embedding_bag(
                    ids,
                    slot.table,
                    rest[0],
                    mode="mean" if slot.mean else "sum",
                    per_sample_weights=rest[1] if self._weighted else None,
                )
                vectors.append(bags if self._fixed else bags[:-1])
        probabilities: Tensor = self._dense(dense, vectors)
        return probabilities
