"""A subject in a process of its own: no library's threads, allocator or caches of memory meet another engine's.

The process is told what to do over a pipe and sleeps in between, so that the engines still take turns, slice by slice.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dlrm_deploy.bench.inputs import Inputs
from dlrm_deploy.bench.measure import Nanoseconds
from dlrm_deploy.bench.subject import Facts, LocalSubject, Options, open_subject
from dlrm_deploy.bundle import Bundle
from dlrm_deploy.errors import DlrmDeployError, EngineError

_END_SECONDS = 10.0

Connect = Callable[[], Inputs]
"""Makes the inputs of the run, in the other process."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What the other process opens."""

    bundle: Path
    engine: str
    options: Options
    inputs: Connect
    slice_ms: float


class IsolatedSubject:
    """A subject in another process, as `dlrm_deploy.bench.subject.Subject`."""

    def __init__(self, job: Job) -> None:
        """Start the process and open the engine there.

        Raises:
            EngineError, BatchError, MissingDependencyError: it does not run here.
        """
        context = get_context("spawn")
        self._name = job.engine
        self._pipe, far_end = context.Pipe()
        self._process = context.Process(target=_serve, args=(job, far_end), daemon=True)
        self._process.start()
        self.process = self._process.pid
        far_end.close()
        try:
            self.facts: Facts = self._answer()
        except BaseException:
            self.close()
            raise

    def prepare(self, batch_size: int, start: float) -> None:
        self._ask("prepare", batch_size, start)

    def outputs(self, batch_size: int) -> npt.NDArray[np.float32]:
        outputs: npt.NDArray[np.float32] = self._ask("outputs", batch_size)
        return outputs

    def slice(self) -> Nanoseconds:
        latencies: Nanoseconds = self._ask("slice")
        return latencies

    def breakdown(self, batch_size: int) -> dict[str, float] | None:
        shares: dict[str, float] | None = self._ask("breakdown", batch_size)
        return shares

    def close(self) -> None:
        if not self._pipe.closed:
            self._pipe.close()  # which ends the other side's loop
            self._process.join(_END_SECONDS)
            if self._process.is_alive():
                self._process.kill()
                self._process.join()

    def _ask(self, method: str, *arguments: object) -> Any:
        try:
            self._pipe.send((method, arguments))
        except OSError as err:
            raise self._gone() from err
        return self._answer()

    def _answer(self) -> Any:
        try:
            answer = self._pipe.recv()
        except (EOFError, OSError) as err:
            raise self._gone() from err
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def _gone(self) -> EngineError:
        self._process.join(_END_SECONDS)
        return EngineError(f"the process of {self._name} ended with exit code {self._process.exitcode}.")


def _serve(job: Job, pipe: Connection) -> None:
    """The other process: open, then answer until the pipe closes."""
    # Read by PyTorch at its first allocation: FBGEMM's tables and large activations come in huge pages.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    subject: LocalSubject | None = None
    try:
        subject = open_subject(Bundle.open(job.bundle, "none"), job.engine, job.options, job.inputs(), job.slice_ms)
        pipe.send(subject.facts)
        while True:
            method, arguments = pipe.recv()
            try:
                answer = getattr(subject, method)(*arguments)
            except DlrmDeployError as err:
                answer = err
            pipe.send(answer)
    except DlrmDeployError as err:
        pipe.send(err)
    except (EOFError, OSError, KeyboardInterrupt):
        pass  # the other side has gone
    finally:
        if subject is not None:
            subject.close()
