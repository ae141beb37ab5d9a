"""Fixtures: `native` calls the library's C functions, `path` is each kernel path this CPU supports."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from native_calls import Native


@pytest.fixture(scope="session")
def native() -> Native:
    return Native()


@pytest.fixture(scope="session", params=["amx", "avx512", "avx2", "scalar"])
def path(request: pytest.FixtureRequest, native: Native) -> str:
    """Each kernel path that this CPU supports, by name."""
    if request.param not in native.kernel_paths():
        pytest.skip(f"this CPU does not support {request.param}")
    return request.param
