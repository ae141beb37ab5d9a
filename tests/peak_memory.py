"""Peak memory of a process, for tests: as a function, and as source to put before a child's program.

Not `ru_maxrss`: a child begins with the peak of the process that started it, so that nothing it does may show.
"""

import inspect
from pathlib import Path


def peak() -> int:
    """The most memory that this program was resident with so far, or since `forget_peak`, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def forget_peak() -> None:
    """Let `peak` begin again from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


PEAK = "from pathlib import Path\n\n" + inspect.getsource(peak)
