"""Reads the first bytes of a TensorRT-RTX plan: library version and the GPUs it was built for, without the library.

The layout is not documented by NVIDIA; it was read off plans of version 1.7 built for one GPU generation at a time. A
plan of another layout gives None, and then only its sidecar speaks.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_MAGIC = b"vtrt"
_SIZE = 64
_CAPABILITIES = {0x01: "7.5", 0x02: "8.0", 0x04: "8.6", 0x08: "8.9", 0x10: "12.0", 0x20: "12.1", 0x40: "later"}


@dataclass(frozen=True, slots=True)
class PlanHeader:
    """Library version, such as "1.7.1.116", and compute capabilities, such as "8.6"; "later" is any after 12.1."""

    version: str
    compute_capabilities: tuple[str, ...]


def read_header(plan: Path) -> PlanHeader | None:
    """The header of a TensorRT-RTX plan; None where the file does not begin with one."""
    with plan.open("rb") as file:
        data = file.read(_SIZE)
    if len(data) < _SIZE or data[:4] != _MAGIC or data[28:32] != _MAGIC:
        return None
    mask = data[32]
    return PlanHeader(
        version=".".join(str(part) for part in data[24:28]),
        compute_capabilities=tuple(name for bit, name in _CAPABILITIES.items() if mask & bit),
    )
