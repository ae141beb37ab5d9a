"""The TensorRT Python module behind an engine name, and the one logger that a process may give it."""

from __future__ import annotations

from collections import deque
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

from dlrm_deploy.errors import EngineError, MissingDependencyError

MODULES = {"tensorrt-rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}

_NOISE = "cudaError 35"  # follows every error where there is no driver, and says nothing about it
_MESSAGES = 100_000  # a DETAILED log of a large model is some thousand lines


def import_library(engine: str) -> ModuleType:
    """The module of an engine of `MODULES`.

    Raises:
        MissingDependencyError: it is not installed.
        EngineError: it is installed, but cannot be loaded.
    """
    name = MODULES[engine]
    try:
        return import_module(name)
    except ModuleNotFoundError as err:
        raise MissingDependencyError(
            f"engine {engine} needs the package {name}. Install it with `pip install 'dlrm-deploy[{engine}]'`, or use "
            "engine onnxruntime."
        ) from err
    except Exception as err:  # a shared library that does not load surfaces as OSError, RuntimeError or ImportError
        raise EngineError(
            f"the package {name} is installed but does not load: {err}. Install it again with "
            f"`pip install --force-reinstall 'dlrm-deploy[{engine}]'`."
        ) from err


def builds_without_gpu(module: ModuleType) -> bool:
    """Whether plans can be built for GPUs that are not here: only TensorRT-RTX names its targets."""
    return hasattr(module, "ComputeCapability")


class Log:
    """Messages of the library, newest last. `logger` is what the library takes."""

    def __init__(self, module: ModuleType) -> None:
        self.messages: deque[tuple[str, str]] = deque(maxlen=_MESSAGES)
        messages = self.messages
        base: Any = module.ILogger

        class Logger(base):  # type: ignore[misc]  # the base is known at run time only
            def __init__(self) -> None:
                base.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                messages.append((severity.name, message))

        self.logger = Logger()

    def errors(self) -> str:
        """Error messages so far, joined, without what only repeats that there is no driver."""
        errors = [text for severity, text in self.messages if severity in ("ERROR", "INTERNAL_ERROR")]
        return " | ".join([text for text in errors if _NOISE not in text] or errors)


@cache
def log_of(module: ModuleType) -> Log:
    """The process's log of a module: the library keeps the first logger it is given and ignores later ones."""
    return Log(module)
