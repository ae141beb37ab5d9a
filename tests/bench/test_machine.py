from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dlrm_deploy.bench.machine import LoadMeter, _process_seconds, available_cores, cpu_name, source_commit


def test_cpu_is_named_with_its_cores(tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor : 0\nmodel name\t: Quick: 9000\nmodel name\t: Other\n")
    cores = available_cores()
    assert cpu_name(cpuinfo) == f"Quick: 9000, {cores} core{'s' if cores > 1 else ''}"


def test_cpu_has_some_name_without_proc(tmp_path):
    assert "core" in cpu_name(tmp_path / "missing")


def git(folder: Path, *arguments: str) -> None:
    identity = {
        "GIT_AUTHOR_NAME": "a",
        "GIT_AUTHOR_EMAIL": "a@b",
        "GIT_COMMITTER_NAME": "a",
        "GIT_COMMITTER_EMAIL": "a@b",
    }
    subprocess.run(
        ["git", "-C", str(folder), *arguments], check=True, capture_output=True, env={**os.environ, **identity}
    )


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    git(tmp_path, "init")
    (tmp_path / "tracked.py").write_text("1\n")
    git(tmp_path, "add", "tracked.py")
    git(tmp_path, "commit", "-m", "one")
    return tmp_path


def test_commit_is_that_of_the_checkout_and_says_when_it_was_changed(checkout):
    source = checkout / "tracked.py"
    commit = source_commit(source)
    assert commit is not None
    assert len(commit) >= 7
    source.write_text("2\n")
    assert source_commit(source) == f"{commit}-dirty"


def test_a_package_installed_inside_a_foreign_checkout_has_no_commit(checkout):
    installed = checkout / "installed.py"
    installed.write_text("1\n")
    assert source_commit(installed) is None


def test_no_commit_outside_a_checkout(tmp_path):
    (tmp_path / "a.py").write_text("")
    assert source_commit(tmp_path / "a.py") is None


def stat_line(*, busy: int, idle: int, steal: int) -> str:
    return f"cpu  {busy} 0 0 {idle} 0 0 0 {steal} 0 0\ncpu0 1 1 1 1\n"


def test_other_load_is_busy_and_stolen_time_less_our_own(tmp_path, monkeypatch):
    monkeypatch.setattr("os.sysconf", lambda name: 100)
    own = iter([1.0, 3.0])
    monkeypatch.setattr("time.process_time", lambda: next(own))
    stat = tmp_path / "stat"
    stat.write_text(stat_line(busy=1000, idle=1000, steal=0))
    meter = LoadMeter(stat)
    stat.write_text(stat_line(busy=1400, idle=1500, steal=100))  # 10 s of cores: 5 s busy or stolen, 2 s ours
    assert meter.others() == pytest.approx(0.3)


def test_other_load_is_unknown_without_proc(tmp_path):
    assert LoadMeter(tmp_path / "missing").others() is None


def test_processes_of_ours_are_no_other_load():
    work = "import time\nwhile time.process_time() < 0.3: pass\nprint(flush=True)\ninput()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", work], **pipes) as child:
        child.stdout.readline()
        known, unknown = LoadMeter(processes=[child.pid])._now(), LoadMeter()._now()
        assert known[2] - unknown[2] > 0.2  # seconds that count as ours
        child.communicate(b"\n")


def test_a_process_that_has_gone_used_nothing():
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        child.wait()
    assert _process_seconds(child.pid) == 0.0
