"""Memory of this process that no file is behind: what engines hold beyond the mapped tables."""

from __future__ import annotations

from pathlib import Path

_STATUS = Path("/proc/self/status")


def own_memory(status: Path = _STATUS) -> int | None:
    """Bytes of anonymous and shared memory that are resident; None where the system does not tell (no Linux)."""
    try:
        lines = status.read_text().splitlines()
    except OSError:
        return None
    sizes = [int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "RssShmem:"))]
    return sum(sizes) * 1024 if sizes else None
