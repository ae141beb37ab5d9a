"""Where the tables of a bundle lie in memory: once a file and process, whatever number of engines reads them.

A file is mapped read-only; pages come in when they are first read, or all at once by `prefault`. Newer kernels map in
huge pages what the page cache holds in such: files written in large blocks, or read by `prefault`. With huge pages a
file is copied once into anonymous memory instead, which the kernel may back with pages of 2 MB on any file system.
What an engine holds stays; the last one to let go of a file frees it.
"""

from __future__ import annotations

import mmap
import os
import threading
from contextlib import suppress
from pathlib import Path
from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt

from dlrm_deploy.errors import EngineError

_HUGE_PAGE_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_MEMORY_STATE = Path("/proc/meminfo")
_POPULATE_READ = 22  # MADV_POPULATE_READ, Linux 5.14; Python's mmap does not name it
_HUGE_PAGE = 2 << 20
_BLOCK = 64 << 20


class TableMemory:
    """The bytes of one file in memory. Made by `open_table_memory`; freed when nothing refers to it or its views."""

    def __init__(self, data: npt.NDArray[np.uint8], mapping: mmap.mmap, huge_pages: bool) -> None:
        self.data = data
        """[bytes of the file] uint8, read-only. Views of it keep the memory, too."""
        self.huge_pages = huge_pages
        self._mapping = mapping

    def prefault(self) -> None:
        """Bring every page into memory now, so that no lookup waits for one."""
        if self.huge_pages:  # copied, so it is there
            return
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # a kernel without transparent huge pages
                self._mapping.madvise(mmap.MADV_HUGEPAGE)  # what is not in memory is then read in such pages
        try:
            self._mapping.madvise(_POPULATE_READ)
        except OSError:  # an older kernel, or a file system that cannot
            self.data[:: mmap.PAGESIZE].max(initial=0)


_Key = tuple[int, int, int, int, bool]
_in_use: WeakValueDictionary[_Key, TableMemory] = WeakValueDictionary()
_lock = threading.Lock()


def _renew_lock() -> None:
    """In the child of a fork, the thread that held the lock is not there to let go of it."""
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)


def open_table_memory(path: Path, *, huge_pages: bool = False) -> TableMemory:
    """The bytes of a file, shared with everybody in this process who holds them already.

    A file that was replaced or changed since is another file.

    Args:
        path: a file of at least one byte.
        huge_pages: copy it into memory that may have huge pages, instead of mapping it.

    Raises:
        EngineError: the file cannot be read, huge pages are switched off, or memory is too small for the copy.
    """
    try:
        with path.open("rb", buffering=0) as file, _lock:
            state = os.fstat(file.fileno())
            key = (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, huge_pages)
            memory = _in_use.get(key)
            if memory is None:
                size = state.st_size
                memory = _copied(file.fileno(), size, path) if huge_pages else _mapped(file.fileno(), size)
                _in_use[key] = memory
            return memory
    except (OSError, ValueError) as err:  # ValueError: an empty file
        raise EngineError(f"cannot map {path}: {err}. Copy the bundle again, or export it again.") from err


def _mapped(file: int, size: int) -> TableMemory:
    mapping = mmap.mmap(file, size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
    return TableMemory(np.frombuffer(mapping, np.uint8), mapping, huge_pages=False)


def _copied(file: int, size: int, path: Path) -> TableMemory:
    _check_huge_pages()
    _check_free(size, path)
    mapping = mmap.mmap(-1, size + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        mapping.madvise(mmap.MADV_HUGEPAGE)
    except OSError as err:
        raise EngineError(f"this kernel has no transparent huge pages: {err}. Leave huge pages out.") from err
    whole = np.frombuffer(mapping, np.uint8)
    start = -whole.ctypes.data % _HUGE_PAGE  # newer kernels align such memory themselves
    data = whole[start : start + size]
    read = 0
    while read < size:
        count = os.preadv(file, [memoryview(mapping)[start + read : start + min(read + _BLOCK, size)]], read)
        if count == 0:
            raise EngineError(f"{path} ends after {read} of {size} bytes. Copy the bundle again, or export it again.")
        read += count
    data.flags.writeable = False
    return TableMemory(data, mapping, huge_pages=True)


def huge_pages_missing() -> str | None:
    """Why huge pages cannot be had here, or None."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return "this system has no transparent huge pages"
    try:
        setting = _HUGE_PAGE_SETTING.read_text(encoding="ascii")
    except OSError:
        return None  # hidden in some containers: madvise will tell
    if "[never]" in setting:
        return f"transparent huge pages are switched off: {_HUGE_PAGE_SETTING} says {setting.strip()!r}"
    return None


def _check_huge_pages() -> None:
    if missing := huge_pages_missing():
        raise EngineError(f"{missing}. Leave huge pages out, or set it to madvise.")


def _check_free(size: int, path: Path) -> None:
    """Say so before the kernel ends the process for want of memory."""
    try:
        lines = _MEMORY_STATE.read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return
    if size > free:
        raise EngineError(
            f"a copy of {path} for huge pages needs {size / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free. "
            "Leave huge pages out: then the file is mapped."
        )
