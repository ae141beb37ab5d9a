"""The one list of engines: names, how to open each, and why one cannot be opened here."""

from __future__ import annotations

import os
from importlib.util import find_spec

from dlrm_deploy.bundle import Bundle
from dlrm_deploy.engines.engine import Engine
from dlrm_deploy.errors import EngineError, MissingDependencyError

ENGINE_NAMES: tuple[str, ...] = ("onnxruntime", "onnxruntime-stock", "torch", "tensorrt-rtx", "tensorrt")
PLAN_ENGINES: tuple[str, ...] = ("tensorrt-rtx", "tensorrt")
MAPPING_ENGINES: tuple[str, ...] = ("onnxruntime", "onnxruntime-stock")
"""Those that share mapped tables, and take `prefault` and `huge_pages`."""

MOST_THREADS = 1024
"""More are a mistake, and the limit of the native library too."""

_MODULES = {"torch": "torch", "tensorrt-rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}
_EXTRAS = {"torch": "train", "tensorrt-rtx": "tensorrt-rtx", "tensorrt": "tensorrt"}


def missing_package(name: str) -> str | None:
    """What to install before engine `name` can be used, or None."""
    module = _MODULES.get(name)
    if module is None or find_spec(module) is not None:
        return None
    return f"engine {name} needs the package {module}. Install it with `pip install 'dlrm-deploy[{_EXTRAS[name]}]'`."


def open_engine(
    bundle: Bundle,
    name: str,
    *,
    threads: int | None = None,
    spin: bool = True,
    prefault: bool = False,
    huge_pages: bool = False,
    require_parity: bool = False,
) -> Engine:
    """Open a bundle with the engine of that name.

    An engine that has not passed `dlrm-deploy check` on these files says so with a `ParityWarning` at its first
    `predict`.

    Args:
        bundle: an opened bundle.
        name: one of `ENGINE_NAMES`.
        threads: CPU threads, 1 to `MOST_THREADS`; None for one per core that this process may use.
        spin: let idle ONNX Runtime threads spin between calls: faster when the engine has the machine to itself,
            and harmful where several engines share it.
        prefault: bring the tables into memory now, whole, instead of page by page when they are first read. Of
            `MAPPING_ENGINES` only.
        huge_pages: copy the tables into memory that may have huge pages: fewer address translations for random rows,
            for as much memory as the tables have bytes. Of `MAPPING_ENGINES` only.
        require_parity: refuse such an engine instead.

    Raises:
        EngineError: no engine has that name, `threads` is out of range, an option is not for it, it cannot be opened
            here, or it has not passed and `require_parity` is set.
    """
    check_name(name)
    warning = parity_warning(bundle, name)
    if require_parity and warning is not None:
        raise EngineError(warning)
    engine = open_unchecked(bundle, name, threads=threads, spin=spin, prefault=prefault, huge_pages=huge_pages)
    engine.warning = warning
    return engine


def check_name(name: str) -> None:
    """Raise `EngineError` unless `name` is one of `ENGINE_NAMES`."""
    if name not in ENGINE_NAMES:
        raise EngineError(f"no engine is named {name!r}. Engines: {', '.join(ENGINE_NAMES)}.")


def parity_warning(bundle: Bundle, name: str) -> str | None:
    """That engine `name` has not passed a parity check on this bundle, and what to run; None where it has."""
    gap = bundle.parity_gap(name)
    if gap is None:
        return None
    return (
        f"engine {name} has not passed a parity check on {bundle.path}: {gap}. Run `dlrm-deploy check {bundle.path} "
        f"--engine {name}`, which records its verdict in the bundle."
    )


def open_unchecked(
    bundle: Bundle,
    name: str,
    *,
    threads: int | None = None,
    spin: bool = True,
    prefault: bool = False,
    huge_pages: bool = False,
) -> Engine:
    """`open_engine` without a word about parity: for the code that checks it, or compares outputs itself."""
    check_name(name)
    if threads is not None and not 1 <= threads <= MOST_THREADS:
        raise EngineError(f"threads is {threads}, expected 1 to {MOST_THREADS}. Leave it out for one per core.")
    if name not in MAPPING_ENGINES:
        for option, given in (("prefault", prefault), ("huge_pages", huge_pages)):
            if given:
                raise EngineError(
                    f"{option} is an option of {' and '.join(MAPPING_ENGINES)}, not of engine {name}. Leave it out."
                )
    missing = missing_package(name)
    if missing:
        raise MissingDependencyError(missing)
    threads = threads or min(len(os.sched_getaffinity(0)), MOST_THREADS)
    if name == "torch":
        from dlrm_deploy.engines.torch_eager import TorchEngine

        return TorchEngine(bundle, threads)
    if name in PLAN_ENGINES:
        from dlrm_deploy.engines.tensorrt.engine import open_tensorrt_engine

        return open_tensorrt_engine(bundle, name, threads)
    from dlrm_deploy.engines.ort import OnnxRuntimeEngine, StockOnnxRuntimeEngine

    kind = OnnxRuntimeEngine if name == "onnxruntime" else StockOnnxRuntimeEngine
    return kind(bundle, threads, spin, prefault=prefault, huge_pages=huge_pages)
