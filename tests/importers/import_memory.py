"""How much memory reading all of a checkpoint takes, in a process of its own."""

import subprocess
import sys
from pathlib import Path

from peak_memory import PEAK

_READ = f"""{PEAK}
import sys
from dlrm_deploy.export.importers.common import ImportOptions
from dlrm_deploy.export.importers.detect import open_source


def read(path):
    source = open_source(path, "auto", ImportOptions())
    source.dense()
    return sum(block.nbytes for table in source.config.tables for part in table.parts
               for _, block in source.part_chunks(part))


small, large = map(Path, sys.argv[1:])
read(small)
before = peak()
print(read(large), peak() - before)
assert "torch" not in sys.modules
"""


def memory_of_reading(small: Path, large: Path) -> tuple[int, int]:
    """Bytes of the tables of `large`, and by how much the peak grew after `small` was read before."""
    arguments = [sys.executable, "-c", _READ, str(small), str(large)]
    result = subprocess.run(arguments, capture_output=True, text=True, check=True)
    read, grown = map(int, result.stdout.split())
    return read, grown
