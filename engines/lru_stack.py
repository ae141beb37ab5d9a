"""Stack distances of traffic by the native library: `native/include/dlrm_deploy/trace.h` for NumPy arrays."""

from __future__ import annotations

import ctypes
import weakref
from functools import cache

import numpy as np
import numpy.typing as npt

from dlrm_deploy.engines.library import library_path
from dlrm_deploy.errors import EngineError

LongArray = npt.NDArray[np.int64]

MOST_LINES = 1 << 31

_ARRAY = np.ctypeslib.ndpointer(np.int64, ndim=1, flags="C_CONTIGUOUS")


@cache
def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(library_path()))
        library.dlrm_deploy_last_error.restype = ctypes.c_char_p
        library.dlrm_deploy_stack_distances.argtypes = (_ARRAY, ctypes.c_int64, ctypes.c_int64, _ARRAY)
        library.dlrm_deploy_stack_create.argtypes = (ctypes.c_int64, ctypes.c_int32, ctypes.POINTER(ctypes.c_void_p))
        library.dlrm_deploy_stack_replay.argtypes = (ctypes.c_void_p, _ARRAY, ctypes.c_int64, _ARRAY, _ARRAY)
        library.dlrm_deploy_stack_free.argtypes = (ctypes.c_void_p,)
        library.dlrm_deploy_stack_free.restype = None
    except (OSError, AttributeError) as err:  # AttributeError: a library of an earlier release
        raise EngineError(f"cannot load the native library: {err}. Run `make build`.") from err
    return library


def _check(status: int) -> None:
    if status:
        message: bytes = _library().dlrm_deploy_last_error()
        raise EngineError(f"stack distances: {message.decode()}.")


def stack_distances(lines: LongArray, num_lines: int) -> LongArray:
    """How many different lines were accessed since the last access to the same one, itself included.

    Args:
        lines: [N] int64, each in [0, num_lines).
        num_lines: number of lines, 8 bytes of memory each.

    Returns:
        [N] int64. 0: the first access to a line. 1: an immediate repeat.

    Raises:
        EngineError: a line out of range, no memory, or the native library is not there.
    """
    lines = np.ascontiguousarray(lines)
    distances = np.empty_like(lines)
    _check(_library().dlrm_deploy_stack_distances(lines, lines.size, num_lines, distances))
    return distances


class LruStack:
    """The inverse: lines that are accessed with given stack distances, in one endless trace."""

    def __init__(self, lines: int, *, warm: bool = True) -> None:
        """A stack for the lines 0 to `lines` - 1; 9 bytes of memory a line.

        Args:
            lines: 1 to `MOST_LINES`.
            warm: all lines are on the stack from the beginning, line 0 at the bottom. False: none is.

        Raises:
            EngineError: `lines` is out of range, no memory, or the native library is not there.
        """
        handle = ctypes.c_void_p()
        _check(_library().dlrm_deploy_stack_create(lines, warm, ctypes.byref(handle)))
        self._handle = handle
        weakref.finalize(self, _library().dlrm_deploy_stack_free, handle)

    def replay(self, distances: LongArray) -> tuple[LongArray, LongArray]:
        """Go on with the trace.

        Args:
            distances: [N] int64, not negative. 0, or more than there are lines on the stack, accesses the next new
                line; where all have been accessed, the one that was not used for longest.

        Returns:
            The lines accessed, [N], and the distances as they came out, [N].

        Raises:
            EngineError: a distance is negative; the trace is as it was.
        """
        distances = np.ascontiguousarray(distances)
        lines, effective = np.empty_like(distances), np.empty_like(distances)
        _check(_library().dlrm_deploy_stack_replay(self._handle, distances, distances.size, lines, effective))
        return lines, effective
