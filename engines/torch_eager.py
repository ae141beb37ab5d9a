"""The PyTorch engine: the model as it was trained, in eager float32. The reference that parity is measured against.

It reads tables and `dense.npz`, and never the ONNX graph.
"""

from __future__ import annotations

import warnings
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch

from dlrm_deploy.batch import Batch
from dlrm_deploy.bundle import Bundle
from dlrm_deploy.engines.engine import Engine
from dlrm_deploy.errors import BundleError
from dlrm_deploy.model.dlrm import DLRM
from dlrm_deploy.model.keys import dense_shapes


class TorchEngine(Engine):
    """PyTorch eager, float32, tables mapped from the bundle. `threads` is set for the whole process."""

    name: ClassVar[str] = "torch"

    def __init__(self, bundle: Bundle, threads: int) -> None:
        super().__init__(bundle, threads)
        torch.set_num_threads(threads)
        with warnings.catch_warnings():
            # The mapping is read-only and torch cannot express that; nothing here writes to it.
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            tables = [torch.from_numpy(table) for table in bundle.map_tables()]
        self._model = DLRM(bundle.config, group_weights=tables).eval()
        tensors = self._model.named_tensors()
        weights = bundle.dense_weights()
        with torch.no_grad():
            for key, shape in dense_shapes(bundle.config).items():
                if key not in weights or weights[key].shape != shape or weights[key].dtype != np.float32:
                    found = f"{weights[key].dtype} {weights[key].shape}" if key in weights else "nothing"
                    raise BundleError(
                        f"dense.npz of {bundle.path} is damaged: {key} should be float32 {shape}, found {found}."
                    )
                tensors[key].copy_(torch.from_numpy(weights[key]))

    def _run(self, batch: Batch) -> npt.NDArray[np.float32]:
        return self._model.predict(batch)

    def implementations(self) -> dict[str, str]:
        return dict.fromkeys(self.bundle.manifest.operators, "PyTorch eager")

    @property
    def version(self) -> str:
        return f"torch {torch.__version__}"

    def _release(self) -> None:
        del self._model
