"""A part of a file, read as if it were a file."""

from __future__ import annotations

import io
from typing import Any

from dlrm_deploy.tensors.store import BLOCK_BYTES


class Window(io.RawIOBase):
    """Part of a file as a file."""

    def __init__(self, file: io.FileIO, start: int, size: int) -> None:
        self.size = size
        self._file = file
        self._start = start
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        if base + offset < 0:
            raise OSError("a place before the begin of the file")
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")[: max(0, self.size - self._position)]
        if not view:
            return 0
        self._file.seek(self._start + self._position)
        count = self._file.readinto(view)
        self._position += count
        return count

    def read_at(self, start: int, count: int) -> bytes:
        """Exactly these bytes, which are in the window."""
        self.seek(start)
        parts = []
        while count:
            piece = self.read(min(count, BLOCK_BYTES))
            if not piece:
                raise OSError("the file became shorter while it was read")
            parts.append(piece)
            count -= len(piece)
        return b"".join(parts)
