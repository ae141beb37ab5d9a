"""Bundles for the tests of plans, and stand-ins for NVIDIA's library and driver."""

# ruff: noqa: N802 - the driver's functions have the driver's names

import ctypes
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from plan_models import small_model

from dlrm_deploy.bundle import Bundle
from dlrm_deploy.engines.tensorrt import cuda, library
from dlrm_deploy.export.bundle import export_bundle
from dlrm_deploy.export.convert import convert_bundle
from dlrm_deploy.export.sources import RandomSource


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """Bundles by the options of `small_model`, exported once."""
    bundles = {}

    def export(**options):
        key = repr(sorted(options.items()))
        if key not in bundles:
            path = tmp_path_factory.mktemp("bundles") / f"bundle{len(bundles)}"
            bundles[key] = export_bundle(RandomSource(small_model(**options)), path).path
        return bundles[key]

    return export


@pytest.fixture
def make_bundle(exported, tmp_path):
    """A bundle of the test's own, of `small_model(**options)`."""

    def make(name="bundle", **options) -> Bundle:
        shutil.copytree(exported(**options), tmp_path / name)
        return Bundle.open(tmp_path / name)

    return make


@pytest.fixture
def make_converted(make_bundle, tmp_path):
    """A converted bundle of the test's own, of `small_model(**options)`."""

    def make(tables: str, mlp: str, **options) -> Bundle:
        return convert_bundle(make_bundle("fp32", **options), tmp_path / "converted", tables=tables, mlp=mlp)

    return make


class FakeDriver:
    """libcuda on host memory: one GPU of compute capability 9.0. Counts what is held."""

    def __init__(self):
        self.memory, self.capability, self.contexts, self.streams, self.fail = {}, (9, 0), 0, 0, {}

    def __getattr__(self, name):
        return lambda *arguments: self.fail.get(name) or getattr(self, f"do_{name}")(*arguments) or 0

    def do_cuDeviceGetCount(self, count):
        count._obj.value = 1

    def do_cuDeviceGet(self, device, ordinal):
        device._obj.value = ordinal

    def do_cuDevicePrimaryCtxRetain(self, context, device):
        context._obj.value, self.contexts = 0xC0, self.contexts + 1

    def do_cuDevicePrimaryCtxRelease_v2(self, device):
        self.contexts -= 1

    def do_cuCtxSetCurrent(self, context):
        assert context.value == 0xC0

    def do_cuStreamCreate(self, stream, flags):
        stream._obj.value, self.streams = 0x57, self.streams + 1

    def do_cuStreamDestroy_v2(self, stream):
        self.streams -= 1

    def do_cuStreamSynchronize(self, stream):
        assert stream.value == 0x57

    def do_cuDeviceGetAttribute(self, value, attribute, device):
        value._obj.value = self.capability[attribute - 75]

    def do_cuMemAlloc_v2(self, address, size):
        buffer = np.full(size.value, 0xFF, np.uint8)
        address._obj.value = buffer.ctypes.data
        self.memory[buffer.ctypes.data] = buffer

    def do_cuMemFree_v2(self, address):
        del self.memory[address.value]

    def _holds(self, address, size):
        return any(start <= address and address + size <= start + b.size for start, b in self.memory.items())

    def do_cuMemcpyHtoDAsync_v2(self, target, source, size, stream):
        assert self._holds(target.value, size.value)
        ctypes.memmove(target.value, source.value, size.value)

    def do_cuMemcpyDtoHAsync_v2(self, target, source, size, stream):
        assert self._holds(source.value, size.value)
        ctypes.memmove(target.value, source.value, size.value)

    def do_cuGetErrorString(self, code, text):
        text._obj.value = b"out of memory" if code == 2 else None


@pytest.fixture
def fake_driver(monkeypatch):
    driver = FakeDriver()
    monkeypatch.setattr(cuda, "driver", lambda: driver)
    return driver


@pytest.fixture
def fake_tensorrt(monkeypatch):
    """Make `import tensorrt` give the stand-in, here and in child processes; returns how to make it misbehave."""
    folder = str(Path(__file__).parent / "fakes")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", ":".join([folder, *filter(None, sys.path)]))
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    library.log_of.cache_clear()
    yield lambda mode: monkeypatch.setenv("FAKE_TENSORRT", mode)
    sys.modules.pop("tensorrt", None)
