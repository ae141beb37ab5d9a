"""The child process of a build: `python -m dlrm_deploy.engines.tensorrt.worker FOLDER`.

A library that aborts or crashes ends this process and not the caller's. FOLDER holds `model.onnx` and `request.json`
({"engine", "profile"}); the child leaves `plan` and `result.json`, or a `result.json` with an "error".
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

from dlrm_deploy.engines.tensorrt.builder import build
from dlrm_deploy.engines.tensorrt.library import import_library
from dlrm_deploy.errors import DlrmDeployError

MODEL, PLAN, REQUEST, RESULT = "model.onnx", "plan", "request.json", "result.json"


def main(folder: Path) -> None:
    """Build what `folder` asks for."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the caller reports a crash; a core file helps nobody
    request = json.loads((folder / REQUEST).read_text(encoding="utf-8"))
    try:
        module = import_library(request["engine"])
        result = build(module, folder / MODEL, request["profile"], folder / PLAN)
    except DlrmDeployError as err:
        result = {"error": str(err)}
    (folder / RESULT).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
