"""The PyTorch engine: the model in eager float32. The reference that parity is measured against.

It reads tables and `dense.npz`, and never the ONNX graph. Of a converted bundle it computes with the stored numbers:
the rows of a batch are decoded as they are read, and where the MLPs are bfloat16 or int8, weights and the inputs of
every layer are rounded to that, while sums stay in float32, or are whole numbers.
"""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch

from dlrm_deploy.batch import Batch
from dlrm_deploy.bundle import Bundle
from dlrm_deploy.engines.engine import Engine
from dlrm_deploy.errors import BundleError
from dlrm_deploy.formats import RowFormat
from dlrm_deploy.model.dlrm import DLRM
from dlrm_deploy.model.keys import dense_shapes, mlp_weight_keys
from dlrm_deploy.model.layers import Int8Layer, bf16_layer, to_bf16


class TorchEngine(Engine):
    """PyTorch eager, sums in float32, tables mapped from the bundle. `threads` is set for the whole process."""

    name: ClassVar[str] = "torch"

    def __init__(self, bundle: Bundle, threads: int) -> None:
        super().__init__(bundle, threads)
        torch.set_num_threads(threads)
        with warnings.catch_warnings():
            # The mapping is read-only and torch cannot express that; nothing here writes to it.
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            stored = [{kind: _tensor(kind, rows) for kind, rows in group.items()} for group in bundle.map_groups()]
        manifest = bundle.manifest
        if manifest.table_formats:
            self._model = DLRM(bundle.config, stored=stored, table_formats=manifest.table_formats)
        else:
            self._model = DLRM(bundle.config, group_weights=[matrices["fp32"] for matrices in stored])
        self._model.eval()
        precision = manifest.mlp_precision
        rounded = frozenset() if precision == "fp32" else mlp_weight_keys(bundle.config)
        int8 = Int8Layer()
        if precision != "fp32":
            self._model.layer = bf16_layer if precision == "bf16" else int8
        tensors = self._model.named_tensors()
        weights = bundle.dense_weights()
        with torch.no_grad():
            for key, shape in dense_shapes(bundle.config).items():
                if key not in weights or weights[key].shape != shape or weights[key].dtype != np.float32:
                    found = f"{weights[key].dtype} {weights[key].shape}" if key in weights else "nothing"
                    raise BundleError(
                        f"dense.npz of {bundle.path} is damaged: {key} should be float32 {shape}, found {found}."
                    )
                if precision == "int8" and key in rounded:
                    int8.store(tensors[key], weights[key], key)
                    continue
                weight = torch.from_numpy(weights[key])
                tensors[key].copy_(to_bf16(weight) if key in rounded else weight)

    @property
    def model(self) -> DLRM:
        """The model, in the bundle's number formats."""
        return self._model

    def _run(self, batch: Batch) -> npt.NDArray[np.float32]:
        return self._model.predict(batch)

    def implementations(self) -> dict[str, str]:
        return dict.fromkeys(self.bundle.manifest.operators, "PyTorch eager")

    @property
    def version(self) -> str:
        return f"torch {torch.__version__}"

    def _release(self) -> None:
        del self._model


def _tensor(kind: RowFormat, rows: npt.NDArray[Any]) -> torch.Tensor:
    """A stored matrix without a copy."""
    tensor = torch.from_numpy(rows)
    return tensor.view(torch.bfloat16) if kind == "bf16" else tensor
