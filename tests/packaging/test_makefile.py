"""What `make setup`, on which every other target depends, does after a change. make only says what it would run."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

MAKEFILE = Path(__file__).parents[2] / "Makefile"
NATIVE = ["CMakeLists.txt", "cmake/warnings.cmake"] + [
    f"dlrm_deploy/engines/native/{path}" for path in ("exports.map", "kernels/dispatch.cc", "include/dlrm_deploy/ops.h")
]
PACKAGES = ["pyproject.toml", "constraints.txt", "packaging/install_optional.py"]


@pytest.fixture
def tree(tmp_path):
    """The files that set-up depends on, all older than the finished set-up."""
    shutil.copy(MAKEFILE, tmp_path)
    for seconds, name in enumerate([*NATIVE, *PACKAGES, ".venv/ready"]):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.utime(path, (1e9 + seconds, 1e9 + seconds))
    for folder in tmp_path.rglob("*/"):
        os.utime(folder, (1e9, 1e9))
    return tmp_path


def set_up(tree: Path) -> str:
    """The commands that `make setup` would run in `tree`."""
    command = ["make", "--dry-run", "--no-print-directory", "setup"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=True).stdout


def test_nothing_is_done_where_nothing_has_changed(tree):
    assert "pip install" not in set_up(tree)


@pytest.mark.parametrize("changed", NATIVE)
def test_a_change_of_native_sources_rebuilds_the_library_and_asks_for_no_package(tree, changed):
    (tree / changed).touch()
    commands = set_up(tree)
    assert "--no-deps -e ." in commands
    assert "train,export" not in commands


@pytest.mark.parametrize("changed", PACKAGES)
def test_a_change_of_the_packages_installs_them(tree, changed):
    (tree / changed).touch()
    commands = set_up(tree)
    assert "-e '.[train,export,bench,dev]'" in commands
    assert "packaging/install_optional.py TensorRT-RTX" in commands


def test_an_interrupted_set_up_is_done_whole(tree):
    (tree / ".venv/ready").unlink()
    assert "-e '.[train,export,bench,dev]'" in set_up(tree)
