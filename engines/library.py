"""Finds the native library `libdlrm_deploy_ops.so`, and calls what it exports besides its operators."""

from __future__ import annotations

import os
from functools import cache
from importlib.resources import files
from pathlib import Path

from dlrm_deploy.errors import EngineError

FILE_NAME = "libdlrm_deploy_ops.so"
LIBRARY_VARIABLE = "DLRM_DEPLOY_LIBRARY"


@cache
def library_path() -> Path:
    """Path of the library: from `DLRM_DEPLOY_LIBRARY`, else beside the installed package.

    Raises:
        EngineError: it is not there; the message says how to build it.
    """
    given = os.environ.get(LIBRARY_VARIABLE)
    # importlib.resources finds it in wheels and in editable installs alike, where `__file__` is in the source tree.
    path = Path(given) if given else Path(str(files("dlrm_deploy.engines") / FILE_NAME))
    if not path.is_file():
        hint = (
            f"{LIBRARY_VARIABLE} points there."
            if given
            else "Run `make build`, or install the package with `pip install .`."
        )
        raise EngineError(f"the native library {path} is not there. {hint}")
    return path
