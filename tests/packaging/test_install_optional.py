"""Set-up goes on without a package that the index does not offer, and stops for every other failure of pip."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "packaging" / "install_optional.py"


def install(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the script, without this machine's pip settings and with one quick retry."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    environment |= {"PIP_CONFIG_FILE": os.devnull, "PIP_RETRIES": "1"}
    command = [sys.executable, str(SCRIPT), "Thing", "--dry-run", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_a_package_that_is_not_offered_is_left_out(tmp_path):
    done = install("--no-index", "--find-links", str(tmp_path), "thing")
    assert done.returncode == 0
    assert "Thing has no package for this machine" in done.stdout


def test_an_index_that_cannot_be_reached_stops_the_set_up():
    done = install("--index-url", "http://127.0.0.1:9/simple", "thing")
    assert done.returncode != 0
    assert "No matching distribution found" in done.stdout  # the same last words as above
    assert "Thing has no package" not in done.stdout


def test_any_other_failure_of_pip_stops_the_set_up(tmp_path):
    done = install("-r", str(tmp_path / "missing.txt"))
    assert done.returncode != 0
    assert "missing.txt" in done.stdout
