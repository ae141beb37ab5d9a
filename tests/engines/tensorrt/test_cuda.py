import ctypes

import numpy as np
import pytest

from dlrm_deploy.engines.tensorrt import cuda
from dlrm_deploy.errors import EngineError


def test_no_driver_and_a_driver_without_a_gpu_both_count_as_no_device(monkeypatch):
    class NoGpu:
        cuInit = staticmethod(lambda flags: 100)  # noqa: N815 - the driver's name; CUDA_ERROR_NO_DEVICE

    def no_library(name):
        raise OSError(name)

    for load in (no_library, lambda name: NoGpu()):
        monkeypatch.setattr(ctypes, "CDLL", load)
        cuda.driver.cache_clear()
        assert cuda.driver() is None
        assert cuda.device_count() == 0
    cuda.driver.cache_clear()


def test_memory_copied_in_pieces_comes_back_and_is_freed(fake_driver, monkeypatch):
    monkeypatch.setattr(cuda, "_PIECE", 1000)
    data = np.arange(1234, dtype=np.float32).reshape(2, 617)
    device = cuda.Device()
    address = device.allocate(data.nbytes)
    device.upload(address, data)
    back = np.empty_like(data)
    device.download(back, address)
    np.testing.assert_array_equal(back, data)
    assert len(fake_driver.memory) == 1
    device.close()
    assert (fake_driver.memory, fake_driver.contexts, fake_driver.streams) == ({}, 0, 0)


def test_the_gpu_is_known_by_its_compute_capability(fake_driver):
    fake_driver.capability = (12, 1)
    assert cuda.Device().compute_capability == "12.1"


def test_a_failing_call_is_named_with_code_and_reason(fake_driver):
    device = cuda.Device()
    fake_driver.fail["cuStreamSynchronize"] = 700
    with pytest.raises(EngineError, match="CUDA: cuStreamSynchronize failed with error 700: unknown error"):
        device.synchronize()
