"""The tables of a bundle as ONNX Runtime takes them: initializers that lie where `table_memory` has them, uncopied.

Left to itself, ONNX Runtime maps each file once a session.
"""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import onnxruntime as ort

from dlrm_deploy.bundle import Bundle
from dlrm_deploy.engines.table_memory import TableMemory, open_table_memory
from dlrm_deploy.errors import EngineError
from dlrm_deploy.formats import RowFormat, row_bytes, stored_dtype, tensor_name

_BFLOAT16 = 16  # of onnx.TensorProto, which a serving host lacks


class SessionTables:
    """Every matrix of a bundle's tables. A session must not outlive the one that it was opened with."""

    def __init__(self, bundle: Bundle, *, prefault: bool, huge_pages: bool) -> None:
        """Open them, sharing what this process has open already.

        Args:
            bundle: an opened bundle.
            prefault: bring every page into memory now.
            huge_pages: copy them into memory that may have huge pages, instead of mapping the files.

        Raises:
            EngineError: a file cannot be read or is of another size, or its copy cannot be had here.
        """
        self.values: dict[str, ort.OrtValue] = {}
        """By name of the initializer."""
        self._held: list[TableMemory] = []  # what other engines find as long as this one holds it
        for record in bundle.manifest.table_groups:
            memory = open_table_memory(bundle.path / record.file, huge_pages=huge_pages)
            size = record.rows * row_bytes(record.format, record.width)
            if memory.data.size != size:
                raise EngineError(
                    f"{bundle.path / record.file} has {memory.data.size} bytes, expected {size}. Copy the bundle "
                    "again, or export it again."
                )
            self._held.append(memory)
            if prefault:
                memory.prefault()
            matrix = memory.data.view(stored_dtype(record.format)).reshape(record.rows, -1)
            self.values[tensor_name(record.name, record.format)] = ort_value(matrix, record.format)

    def add_to(self, options: ort.SessionOptions) -> None:
        """Make the next session with these options read them."""
        for name, value in self.values.items():
            options.add_initializer(name, value)


def ort_value(matrix: npt.NDArray[Any], format: RowFormat) -> ort.OrtValue:
    """A stored matrix as a value that lies where it lies, and keeps it."""
    if format == "bf16":
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(matrix, _BFLOAT16)
    return ort.OrtValue.ortvalue_from_numpy(matrix)
