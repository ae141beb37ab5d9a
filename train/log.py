"""The log of a run: metrics.jsonl, one JSON object a line, and the same values for TensorBoard."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dlrm_deploy.errors import MissingDependencyError
from dlrm_deploy.files import atomic_file, output_errors

METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"


class RunLog:
    """Appends to the log of RUN. Lines after `step`, of a run that was killed, are removed first."""

    def __init__(self, run: Path, step: int, tensorboard: bool) -> None:
        """Open the log.

        Raises:
            OutputError: it cannot be written.
            MissingDependencyError: TensorBoard is wanted and not installed.
        """
        path = run / METRICS
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        with atomic_file(path) as partial:
            partial.write_text("".join(line + "\n" for line in lines if _step(line) <= step), encoding="utf-8")
        self._path = path
        with output_errors(path):
            self._file = path.open("a", encoding="utf-8")
        self._board = _summary_writer(run / TENSORBOARD, step) if tensorboard else None

    def write(self, record: dict[str, Any]) -> None:
        """Add one record; numbers but `step` become TensorBoard scalars too.

        Raises:
            OutputError: it cannot be written.
        """
        with output_errors(self._path):
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        if self._board is not None:
            for name, value in record.items():
                if isinstance(value, float):
                    self._board.add_scalar(f"{record['event']}/{name}", value, record["step"])

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def _step(line: str) -> float:
    """The step of a line; a line cut off by a kill belongs to no step."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _summary_writer(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as err:
        raise MissingDependencyError(
            "TensorBoard is not installed. Install `dlrm-deploy[train]`, or set tensorboard = false under [train]."
        ) from err
    return SummaryWriter(str(folder), purge_step=step + 1)
