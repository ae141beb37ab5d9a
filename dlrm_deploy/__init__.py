"""dlrm-deploy: take a trained Deep Learning Recommendation Model to production.

The public API is the four names below; everything else may change between minor versions.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from dlrm_deploy.batch import Batch
from dlrm_deploy.errors import DlrmDeployError

if TYPE_CHECKING:
    from dlrm_deploy.engines.engine import Engine

try:
    __version__ = version("dlrm-deploy")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0.0.0"

__all__ = ["Batch", "DlrmDeployError", "get_library_path", "load"]


def load(
    bundle: str | Path,
    engine: str = "onnxruntime",
    threads: int | None = None,
    *,
    prefault: bool = False,
    huge_pages: bool = False,
    require_parity: bool = False,
) -> Engine:
    """Open a bundle with an engine.

    An engine that has not passed `dlrm-deploy check` on this bundle says so with a `ParityWarning`
    (`dlrm_deploy.errors`) when it first scores.

    Args:
        bundle: folder written by `dlrm-deploy export`.
        engine: "onnxruntime" (our kernels), "onnxruntime-stock", "torch", "tensorrt-rtx" or "tensorrt".
        threads: CPU threads; None for one per core.
        prefault: bring the tables into memory now, whole, so that the first batches wait for no page (docs/serving.md).
            For the two ONNX Runtime engines.
        huge_pages: copy the tables into memory that may have huge pages. For the two ONNX Runtime engines.
        require_parity: refuse an engine that has not passed `dlrm-deploy check` on these files.

    Returns:
        An engine; `engine.predict(Batch(...))` gives [B] float32 probabilities.

    Raises:
        BundleError: the bundle is missing, damaged or altered.
        EngineError: the engine is unknown, cannot run here, or has not passed; the message says why.
    """
    from dlrm_deploy.bundle import Bundle
    from dlrm_deploy.engines.registry import open_engine

    return open_engine(
        Bundle.open(bundle),
        engine,
        threads=threads,
        prefault=prefault,
        huge_pages=huge_pages,
        require_parity=require_parity,
    )


def get_library_path() -> str:
    """Path of the ONNX Runtime custom-op library, for `SessionOptions.register_custom_ops_library`."""
    from dlrm_deploy.engines.library import library_path

    return str(library_path())
