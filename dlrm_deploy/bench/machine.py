"""What a benchmark row says about where it was measured: processor, source commit, and what else ran there."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import dlrm_deploy


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Model and number of cores that this process may use."""
    cores = available_cores()
    model = platform.processor() or platform.machine()
    try:
        for line in cpuinfo.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
                break
    except OSError:
        pass  # no Linux, or no /proc: the name that Python knows has to do
    return f"{model}, {cores} core{'s' if cores > 1 else ''}"


def source_commit(source: Path = Path(dlrm_deploy.__file__)) -> str | None:
    """Commit of the git checkout that tracks `source`, with `-dirty` if it differs; None for an installed package."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(source.parent), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", source.name)  # a package installed inside a foreign checkout is not tracked
        return git("describe", "--always", "--dirty", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return None


class LoadMeter:
    """Measures how much of the machine other processes use, from its making on. Linux only."""

    def __init__(self, stat: Path = Path("/proc/stat"), processes: Sequence[int] = ()) -> None:
        """Begin to measure; `processes` are ids of processes that count as this one, and live until the end."""
        self._stat = stat
        self._processes = processes
        self._began = self._now()

    def others(self) -> float | None:
        """Share of all cores, 0 to 1, that other processes or virtual machines used; None where it is unknown."""
        began, now = self._began, self._now()
        if began is None or now is None or now[0] <= began[0]:
            return None
        total, busy, own = (after - before for before, after in zip(began, now, strict=True))
        return min(max((busy - own) / total, 0.0), 1.0)

    def _now(self) -> tuple[float, float, float] | None:
        """Seconds of all cores, seconds in which they worked or were taken away, and seconds that this process used."""
        try:
            first = self._stat.read_text().splitlines()[0].split()
        except (OSError, IndexError):
            return None
        ticks = [int(word) for word in first[1:9]]  # user nice system idle iowait irq softirq steal
        per_second = os.sysconf("SC_CLK_TCK")
        idle = ticks[3] + ticks[4]
        own = time.process_time() + sum(_process_seconds(process) for process in self._processes)
        return sum(ticks) / per_second, (sum(ticks) - idle) / per_second, own


def _process_seconds(process: int) -> float:
    """Seconds of all cores that a process has used; 0 for one that has gone."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    user, system = int(fields[11]), int(fields[12])  # proc(5): fields 14 and 15, the second of which is the name
    return (user + system) / os.sysconf("SC_CLK_TCK")
