"""Calls what `libdlrm_deploy_ops.so` exports besides its operators: which kernel path is in use, and calibration.

The functions are those of `native/include/dlrm_deploy/ops.h`, which says what they promise.
"""

from __future__ import annotations

import ctypes
from functools import cache

from dlrm_deploy.engines.library import library_path
from dlrm_deploy.errors import EngineError


@cache
def _library() -> ctypes.CDLL:
    path = library_path()
    try:
        library = ctypes.CDLL(str(path))
    except OSError as err:
        raise EngineError(
            f"the native library {path} cannot be loaded: {err}. Build it again with `make build`."
        ) from err
    for name in ("dlrm_deploy_last_error", "dlrm_deploy_kernel_path", "dlrm_deploy_kernel_paths"):
        getattr(library, name).restype = ctypes.c_char_p
    return library


def kernel_path() -> str:
    """The kernel path that the operators use: avx512, avx2 or scalar.

    Raises:
        EngineError: the library is not there, or `DLRM_DEPLOY_KERNEL` names a path that this CPU cannot run.
    """
    path: bytes | None = _library().dlrm_deploy_kernel_path()
    if path is None:
        raise EngineError(_last_error())
    return path.decode()


def calibrate_fma(threads: int, milliseconds: float) -> float:
    """Fused multiply-adds in float32 from registers, in GFLOP/s."""
    return _calibrate("fma", ctypes.c_int32(threads), ctypes.c_double(milliseconds))


def calibrate_read(size: int, threads: int, milliseconds: float) -> float:
    """Reading a buffer of `size` bytes from end to end, in GB/s."""
    return _calibrate("read", ctypes.c_int64(size), ctypes.c_int32(threads), ctypes.c_double(milliseconds))


def calibrate_gather(row_bytes: int, table_bytes: int, threads: int, milliseconds: float) -> float:
    """Reading rows of `row_bytes` at random places of a table of `table_bytes`, in GB/s."""
    sizes = (ctypes.c_int64(row_bytes), ctypes.c_int64(table_bytes))
    return _calibrate("gather", *sizes, ctypes.c_int32(threads), ctypes.c_double(milliseconds))


def _calibrate(name: str, *arguments: ctypes.c_int32 | ctypes.c_int64 | ctypes.c_double) -> float:
    result = ctypes.c_double()
    status: int = getattr(_library(), f"dlrm_deploy_calibrate_{name}")(*arguments, ctypes.byref(result))
    if status:
        raise EngineError(f"the machine could not be calibrated ({name}): {_last_error()}")
    return result.value


def _last_error() -> str:
    message: bytes = _library().dlrm_deploy_last_error()
    return message.decode()
