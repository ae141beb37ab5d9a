#!/usr/bin/env python3
"""Install packages that not every machine has: where the index offers none for this one, go on without them.

    install_optional.py TensorRT-RTX -c constraints.txt -e '.[tensorrt-rtx]'

The first argument names what is installed, the others are pip's. Any other failure, such as an index that cannot be
reached, ends with pip's own exit status: set-up must not pass for complete then.
"""

from __future__ import annotations

import subprocess
import sys


def is_not_offered(output: str) -> bool:
    """Whether pip failed because the index has no package for this machine.

    An index that cannot be reached ends in the same words, but pip tells of its retries before.
    """
    return "No matching distribution found" in output and "Retrying (" not in output


def main(arguments: list[str]) -> int:
    name, *pip_arguments = arguments
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *pip_arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    print(done.stdout, end="")
    if done.returncode and is_not_offered(done.stdout):
        print(f"{name} has no package for this machine: set-up goes on without it.")
        return 0
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
