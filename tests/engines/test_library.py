import ctypes

import pytest

from dlrm_deploy import get_library_path
from dlrm_deploy.engines import library
from dlrm_deploy.errors import EngineError


def test_the_library_loads_and_registers_operators():
    assert ctypes.CDLL(get_library_path()).RegisterCustomOps


def test_the_kernel_in_use_is_among_those_the_cpu_can_run():
    assert library.kernel_path() in library.kernel_paths()
    assert library.kernel_paths()[-1] == "scalar"


def test_calibration_measures_something_of_each_kind():
    assert library.calibrate_fma(1, 5) > 0.1  # GFLOP/s: even one scalar unit does more
    assert library.calibrate_read(1 << 24, 1, 5) > 0.1
    assert library.calibrate_gather(64, 1 << 24, 1, 5) > 0.01


@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_the_matrix_unit_is_measured_where_there_is_one_and_else_an_error(kind):
    if "amx" in library.kernel_paths():
        assert library.calibrate_amx(kind, 1, 5) > 10.0  # GFLOP/s or GOP/s
    else:
        with pytest.raises(EngineError, match="this CPU has no AMX"):
            library.calibrate_amx(kind, 1, 5)
    with pytest.raises(EngineError, match="calibration failed: threads is 0"):
        library.calibrate_amx(kind, 0, 5)


def test_a_calibration_that_cannot_run_is_an_error_with_its_reason():
    with pytest.raises(EngineError, match="calibration failed: .+"):
        library.calibrate_gather(3, 1 << 24, 1, 5)


def test_a_library_that_is_not_there_says_how_to_build_it(monkeypatch, tmp_path):
    monkeypatch.setenv(library.LIBRARY_VARIABLE, str(tmp_path / "missing.so"))
    library.library_path.cache_clear()
    with pytest.raises(EngineError, match=r"missing.so is not there. DLRM_DEPLOY_LIBRARY points there"):
        library.library_path()
    library.library_path.cache_clear()


def test_a_library_may_be_named_relative_to_the_working_folder(monkeypatch, tmp_path):
    path = library.library_path()
    library.library_path.cache_clear()
    (tmp_path / "copy.so").symlink_to(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(library.LIBRARY_VARIABLE, "copy.so")
    assert library.library_path() == tmp_path / "copy.so"  # a bare name would be looked for in the system's folders
    library.library_path.cache_clear()


def test_a_library_that_is_no_library_is_an_error(monkeypatch, tmp_path):
    (tmp_path / "broken.so").write_bytes(b"not ELF")
    monkeypatch.setenv(library.LIBRARY_VARIABLE, str(tmp_path / "broken.so"))
    for cached in (library.library_path, library._library):
        cached.cache_clear()
    with pytest.raises(EngineError, match="cannot load the native library"):
        library.kernel_path()
    for cached in (library.library_path, library._library):
        cached.cache_clear()
