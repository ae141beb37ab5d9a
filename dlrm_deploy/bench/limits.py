"""The machine's limits during a run: calibrated before each round on the rows that the batches read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dlrm_deploy.batch import Batch
from dlrm_deploy.bench.calibration import Calibration, measure_calibration, median_calibration
from dlrm_deploy.bench.gather import GatherRows, at_random, gather_rows, touch_pages
from dlrm_deploy.bundle import Bundle
from dlrm_deploy.errors import EngineError
from dlrm_deploy.formats import RowFormat


class Limits:
    """Calibrates, and remembers why it cannot."""

    def __init__(self, bundle: Bundle, threads: int) -> None:
        self._config = bundle.config
        self._threads = threads
        self._matrices = bundle.map_groups()
        self.missing: str | None = None
        """Why nothing is measured, or None."""

        self._rows: list[GatherRows] = []
        self._random_rows: dict[int, GatherRows] = {}
        self._measured: list[Calibration] = []
        self._touched = False

    def aim(self, formats: Sequence[Mapping[str, RowFormat]], batches: Sequence[Batch]) -> None:
        """Choose the rows to gather: those that these batches read, in each of these choices of row formats."""
        if self.missing is not None:
            return
        if not self._touched:
            for mapped in self._matrices:
                for matrix in mapped.values():
                    touch_pages(matrix)
            self._touched = True
        different = {tuple(sorted(choice.items())): choice for choice in formats}
        self._rows = [
            rows for choice in different.values() for rows in gather_rows(self._config, choice, self._matrices, batches)
        ]
        for rows in self._rows:
            if rows.row_bytes not in self._random_rows:
                self._random_rows[rows.row_bytes] = at_random(rows)

    def measure(self) -> None:
        """Run the loops once."""
        if self.missing is None:
            try:
                self._measured.append(measure_calibration(self._threads, self._rows, [*self._random_rows.values()]))
            except EngineError as err:
                self.missing = str(err)

    def take(self) -> tuple[list[Calibration], Calibration | None]:
        """The calibrations since the last call, and their medians; none where one failed."""
        measured, self._measured = self._measured, []
        if self.missing is not None or not measured:
            return [], None
        return measured, median_calibration(measured)
