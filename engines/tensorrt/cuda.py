"""The dozen CUDA driver calls that executing a plan needs, through ctypes.

The driver library is on every machine that can execute a plan, whatever else is installed, and these entry points have
kept their form since CUDA 4; PyTorch or another wrapper would add gigabytes to a serving host.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from dlrm_deploy.errors import EngineError

_COMPUTE_CAPABILITY_MAJOR, _COMPUTE_CAPABILITY_MINOR = 75, 76  # of CUdevice_attribute
_PIECE = 64 << 20


@cache
def driver() -> Any:
    """The driver library, initialised; None where there is none or it finds no GPU."""
    try:
        library: Any = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    return library if library.cuInit(0) == 0 else None


def device_count() -> int:
    """Number of GPUs that this process may use. TensorRT must not be touched before this is positive."""
    library = driver()
    if library is None:
        return 0
    count = ctypes.c_int()
    return count.value if library.cuDeviceGetCount(ctypes.byref(count)) == 0 else 0


class Device:
    """The first GPU: memory, copies and one stream. Shares the primary context, as TensorRT does."""

    def __init__(self) -> None:
        self._library = driver()
        self._device, self._context, self._stream = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
        self._buffers: list[int] = []
        self._call("cuDeviceGet", ctypes.byref(self._device), 0)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), self._device)
        self.make_current()
        self._call("cuStreamCreate", ctypes.byref(self._stream), 0)

    @property
    def stream(self) -> int:
        """Handle of the stream."""
        return self._stream.value or 0

    @property
    def compute_capability(self) -> str:
        """Such as "9.0"."""
        parts = []
        for attribute in (_COMPUTE_CAPABILITY_MAJOR, _COMPUTE_CAPABILITY_MINOR):
            part = ctypes.c_int()
            self._call("cuDeviceGetAttribute", ctypes.byref(part), attribute, self._device)
            parts.append(part.value)
        return f"{parts[0]}.{parts[1]}"

    def make_current(self) -> None:
        """Make the context that of the calling thread."""
        self._call("cuCtxSetCurrent", self._context)

    def allocate(self, size: int) -> int:
        """The address of `size` bytes of device memory, freed by `close`."""
        address = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(max(size, 1)))
        self._buffers.append(address.value)
        return address.value

    def upload(self, address: int, array: npt.NDArray[Any]) -> None:
        """Copy a contiguous array to the device, a piece at a time: a mapped table is never all in memory."""
        data = array.reshape(-1).view(np.uint8)
        for start in range(0, data.size, _PIECE):
            piece = data[start : start + _PIECE]
            target, source = ctypes.c_uint64(address + start), ctypes.c_void_p(piece.ctypes.data)
            self._call("cuMemcpyHtoDAsync_v2", target, source, ctypes.c_size_t(piece.size), self._stream)

    def download(self, array: npt.NDArray[Any], address: int) -> None:
        """Fill a contiguous array from the device, after all work on the stream is done."""
        target, size = ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes)
        self._call("cuMemcpyDtoHAsync_v2", target, ctypes.c_uint64(address), size, self._stream)
        self.synchronize()

    def synchronize(self) -> None:
        """Wait for the stream."""
        self._call("cuStreamSynchronize", self._stream)

    def close(self) -> None:
        """Free the memory, the stream and the context."""
        self.make_current()
        for address in self._buffers:
            self._call("cuMemFree_v2", ctypes.c_uint64(address))
        self._buffers.clear()
        self._call("cuStreamDestroy_v2", self._stream)
        self._call("cuDevicePrimaryCtxRelease_v2", self._device)

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            text = ctypes.c_char_p()
            self._library.cuGetErrorString(code, ctypes.byref(text))
            reason = text.value.decode() if text.value else "unknown error"
            remedy = " The plan's tables and buffers need more memory than is free." if name == "cuMemAlloc_v2" else ""
            raise EngineError(f"CUDA: {name} failed with error {code}: {reason}.{remedy}")
