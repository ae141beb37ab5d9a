import sys
from types import SimpleNamespace

import pytest

from dlrm_deploy.engines.tensorrt.library import Log, builds_without_gpu, import_library
from dlrm_deploy.errors import EngineError, MissingDependencyError


def test_a_package_that_is_not_there_is_a_missing_dependency(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingDependencyError, match=r"engine tensorrt needs the package tensorrt\. Install it with"):
        import_library("tensorrt")


def test_a_package_that_does_not_load_is_named_with_its_reason(monkeypatch, tmp_path):
    (tmp_path / "tensorrt.py").write_text("raise OSError('libnvinfer.so.11: cannot open shared object file')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    with pytest.raises(EngineError, match=r"tensorrt is installed but does not load: libnvinfer\.so\.11"):
        import_library("tensorrt")


def test_only_a_module_that_names_its_targets_builds_without_a_gpu():
    assert builds_without_gpu(SimpleNamespace(ComputeCapability=object))
    assert not builds_without_gpu(SimpleNamespace())


def test_errors_leave_out_the_line_that_follows_each_of_them_without_a_driver():
    log = Log(SimpleNamespace(ILogger=object))

    def say(severity, text):
        log.logger.log(SimpleNamespace(name=severity), text)

    say("ERROR", "catchCudaError: cudaError 35")
    assert log.errors() == "catchCudaError: cudaError 35"  # better than nothing
    say("INTERNAL_ERROR", "no kernel")
    say("VERBOSE", "trying on")
    say("ERROR", "giving up")
    assert log.errors() == "no kernel | giving up"
