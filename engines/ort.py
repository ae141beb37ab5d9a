"""ONNX Runtime engines: with our kernels, and stock, where the function bodies in the model run.

Both read the same `model.onnx`, and tables where `table_memory` has them: mapped, or in huge pages.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from dlrm_deploy.batch import Batch
from dlrm_deploy.bundle import Bundle
from dlrm_deploy.engines.engine import Engine, with_index_dtype
from dlrm_deploy.engines.library import kernel_path, library_path
from dlrm_deploy.engines.ort_stages import stage_graph
from dlrm_deploy.engines.ort_tables import SessionTables
from dlrm_deploy.errors import BatchError, DlrmDeployError, EngineError

_KERNEL_VARIABLE = "DLRM_DEPLOY_KERNEL"

_X86 = ("x86_64", "AMD64")
_FATAL = 4  # errors come back as exceptions; ONNX Runtime need not print them as well


class StockOnnxRuntimeEngine(Engine):
    """ONNX Runtime as installed from PyPI: our operators run as function bodies of standard operators."""

    name: ClassVar[str] = "onnxruntime-stock"
    uses_library: ClassVar[bool] = False

    def __init__(
        self, bundle: Bundle, threads: int, spin: bool = True, *, prefault: bool = False, huge_pages: bool = False
    ) -> None:
        super().__init__(bundle, threads)
        self._spin = spin
        self._kernel_path = kernel_path() if self.uses_library else ""  # the environment may change later on
        if self._kernel_path == "scalar" and not os.environ.get(_KERNEL_VARIABLE):
            _warn_of_scalar_path(platform.machine())
        self._tables = SessionTables(bundle, prefault=prefault, huge_pages=huge_pages)
        self._session = self._open()
        self._stages: tuple[tuple[str, ...], list[str], ort.InferenceSession | None] | None = None
        self._index_dtype = bundle.manifest.index_dtype
        self._takes_offsets = any(spec.name == "offsets" for spec in bundle.manifest.inputs)

    def _options(self) -> ort.SessionOptions:
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.log_severity_level = _FATAL
        self._tables.add_to(options)
        if not self._spin:
            options.add_session_config_entry("session.force_spinning_stop", "1")
        if self.uses_library:
            options.register_custom_ops_library(str(library_path()))
        return options

    def _open(self, profile: str | None = None) -> ort.InferenceSession:
        try:
            options = self._options()
            if profile is not None:
                options.enable_profiling = True
                options.profile_file_prefix = profile
            return ort.InferenceSession(self.bundle.model_path, options, providers=["CPUExecutionProvider"])
        except Exception as err:  # ONNX Runtime's exceptions have no common base but Exception
            raise EngineError(f"ONNX Runtime {ort.__version__} cannot open {self.bundle.model_path}: {err}") from err

    def _feed(self, batch: Batch) -> dict[str, npt.NDArray[np.generic]]:
        indices, offsets = with_index_dtype(batch, self._index_dtype)
        feed: dict[str, npt.NDArray[np.generic]] = {"indices": indices}
        if self.bundle.config.dense_features:
            feed["dense"] = batch.dense
        if self._takes_offsets:
            feed["offsets"] = offsets
        if batch.weights is not None:
            feed["weights"] = batch.weights
        return feed

    def _run(self, batch: Batch) -> npt.NDArray[np.float32]:
        feed = self._feed(batch)
        try:
            (probabilities,) = self._session.run(None, feed)
        except Exception as err:  # as above
            bad_ids = batch.explain_bad_ids(self.bundle.config) if self.bundle.config.index_policy == "error" else None
            if bad_ids:
                raise BatchError(bad_ids) from err
            raise EngineError(f"ONNX Runtime failed on a batch of {batch.batch_size} samples: {err}") from err
        result: npt.NDArray[np.float32] = probabilities
        return result

    def stage_outputs(self, batch: Batch, tensors: Sequence[str]) -> dict[str, npt.NDArray[np.float32]]:
        """The session that shows them is kept until other tensors are asked for."""
        asked = tuple(dict.fromkeys(tensors))
        if not asked:
            return {}
        if self._stages is None or self._stages[0] != asked:
            self._stages = None  # the earlier session goes before the next one comes
            self._stages = asked, *self._open_stages(asked)
        _, names, session = self._stages
        if session is None:
            return {}
        try:
            values = session.run(names, self._feed(batch))
        except Exception as err:  # ONNX Runtime's exceptions have no common base but Exception
            raise EngineError(f"ONNX Runtime cannot show the model's inner tensors: {err}") from err
        return dict(zip(names, values, strict=True))

    def _open_stages(self, tensors: Sequence[str]) -> tuple[list[str], ort.InferenceSession | None]:
        """Those of the tensors that the graph has, and a session whose outputs they are; None where it has none."""
        try:
            names, model = stage_graph(self.bundle, tensors)
            if not names:
                return names, None
            options = self._options()
            options.add_session_config_entry(
                "session.model_external_initializers_file_folder_path", str(self.bundle.model_path.parent)
            )
            session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except DlrmDeployError:
            raise
        except Exception as err:  # as above
            raise EngineError(f"ONNX Runtime cannot show the model's inner tensors: {err}") from err
        return names, session

    def implementations(self) -> dict[str, str]:
        """Found by profiling one golden sample: an operator that runs as itself ran our kernel."""
        events = self.profile([self.bundle.golden().batch.rows(0, 1)])
        ran = {
            event["args"]["op_name"] for event in events if event.get("cat") == "Node" and "op_name" in event["args"]
        }
        return {
            operator: f"C++ kernel ({self._kernel_path})" if operator in ran else "function body of standard operators"
            for operator in self.bundle.manifest.operators
        }

    def profile(self, batches: Sequence[Batch]) -> list[dict[str, Any]]:
        """What ONNX Runtime's profiler tells of scoring these batches one after the other, in a session of its own."""
        with tempfile.TemporaryDirectory() as folder:
            session = self._open(profile=str(Path(folder) / "profile"))
            for batch in batches:
                session.run(None, self._feed(batch))
            events: list[dict[str, Any]] = json.loads(Path(session.end_profiling()).read_text())
        return events

    @property
    def version(self) -> str:
        return f"onnxruntime {ort.__version__}"

    def _release(self) -> None:
        del self._session
        self._stages = None
        del self._tables  # last: sessions read them


class OnnxRuntimeEngine(StockOnnxRuntimeEngine):
    """ONNX Runtime with our custom-op library: its kernels take precedence over the function bodies."""

    name: ClassVar[str] = "onnxruntime"
    uses_library: ClassVar[bool] = True


@cache
def _warn_of_scalar_path(machine: str) -> None:
    """Once a process: on this kind of CPU nobody expects the portable loops."""
    if machine in _X86:
        warnings.warn(
            "this CPU has no AVX2, so that the native library runs its scalar kernels, several times slower. Their "
            "results are the same.",
            RuntimeWarning,
            stacklevel=2,
        )
