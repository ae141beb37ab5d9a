"""The native library `libdlrm_deploy_ops.so`: where it is, which kernels it uses, what it measures of the machine.

Its operators are called by ONNX Runtime. The functions here wrap the rest of `native/include/dlrm_deploy/ops.h`.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Literal

from dlrm_deploy.errors import EngineError

FILE_NAME = "libdlrm_deploy_ops.so"
LIBRARY_VARIABLE = "DLRM_DEPLOY_LIBRARY"


@cache
def library_path() -> Path:
    """Path of the library: from `DLRM_DEPLOY_LIBRARY`, else beside the installed package.

    Raises:
        EngineError: it is not there; the message says how to build it.
    """
    given = os.environ.get(LIBRARY_VARIABLE)
    # importlib.resources finds it in wheels and in editable installs alike, where `__file__` is in the source tree.
    path = Path(given).absolute() if given else Path(str(files("dlrm_deploy.engines") / FILE_NAME))
    if not path.is_file():
        hint = f"{LIBRARY_VARIABLE} points there." if given else "Run `make build`, or `pip install .`."
        raise EngineError(f"the native library {path} is not there. {hint}")
    return path


@cache
def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(library_path()))
    except OSError as err:
        raise EngineError(f"cannot load the native library: {err}. Run `make build`.") from err
    for name in ("dlrm_deploy_last_error", "dlrm_deploy_kernel_path", "dlrm_deploy_kernel_paths"):
        getattr(library, name).restype = ctypes.c_char_p
    return library


def _last_error() -> str:
    message: bytes = _library().dlrm_deploy_last_error()
    return message.decode()


def kernel_path() -> str:
    """The kernel path in use, "amx", "avx512", "avx2" or "scalar": the fastest, or the one `DLRM_DEPLOY_KERNEL` names.

    Raises:
        EngineError: the variable names a path that this CPU cannot run.
    """
    path: bytes | None = _library().dlrm_deploy_kernel_path()
    if path is None:
        raise EngineError(_last_error())
    return path.decode()


def kernel_paths() -> tuple[str, ...]:
    """The kernel paths that this CPU can run, fastest first."""
    paths: bytes = _library().dlrm_deploy_kernel_paths()
    return tuple(paths.decode().split(","))


def calibrate_fma(threads: int, milliseconds: float) -> float:
    """fp32 fused multiply-adds from registers, in GFLOP/s (two a multiply-add)."""
    return _measure("dlrm_deploy_calibrate_fma", ctypes.c_int32(threads), ctypes.c_double(milliseconds))


def calibrate_read(table_bytes: int, threads: int, milliseconds: float) -> float:
    """Streaming read of a buffer of `table_bytes`, in GB/s."""
    return _measure(
        "dlrm_deploy_calibrate_read",
        ctypes.c_int64(table_bytes),
        ctypes.c_int32(threads),
        ctypes.c_double(milliseconds),
    )


def calibrate_gather(row_bytes: int, table_bytes: int, threads: int, milliseconds: float) -> float:
    """Reading rows of `row_bytes` at random places of a table of `table_bytes`, in GB/s: an embedding bag's floor."""
    return _measure(
        "dlrm_deploy_calibrate_gather",
        ctypes.c_int64(row_bytes),
        ctypes.c_int64(table_bytes),
        ctypes.c_int32(threads),
        ctypes.c_double(milliseconds),
    )


def calibrate_amx(kind: Literal["bf16", "int8"], threads: int, milliseconds: float) -> float:
    """Products of AMX tiles from registers, in GFLOP/s (bf16) or GOP/s (int8), two a multiply-add.

    Raises:
        EngineError: this CPU has no AMX, or the system does not let this process use it.
    """
    return _measure(f"dlrm_deploy_calibrate_amx_{kind}", ctypes.c_int32(threads), ctypes.c_double(milliseconds))


def _measure(function: str, *arguments: object) -> float:
    result = ctypes.c_double()
    if getattr(_library(), function)(*arguments, ctypes.byref(result)):
        raise EngineError(f"calibration failed: {_last_error()}")
    return result.value
