"""Nodes: writes ONNX nodes one call at a time, naming their outputs.

n = Nodes()
y = n.op("Relu", n.op("Gemm", x, w, b, transB=1))
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

OPSET = 18
DOMAIN = "dlrm_deploy"
DOMAIN_VERSION = 1


class Nodes:
    """A growing list of nodes."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []

    def op(self, op_type: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        """Add a node with one output and return that output's name. An absent optional input is ""."""
        return self.ops(op_type, *inputs, outputs=[output or self._name(op_type)], **attributes)[0]

    def ops(self, op_type: str, *inputs: str, outputs: Sequence[str], **attributes: Any) -> list[str]:
        """Add a node with several outputs of the names given."""
        name = f"{self._name(op_type)}_node"
        self.nodes.append(helper.make_node(op_type, inputs, list(outputs), name=name, **attributes))
        return list(outputs)

    def constant(self, value: npt.ArrayLike, dtype: npt.DTypeLike = np.int64) -> str:
        """Add a constant; whole numbers by default, as shapes and positions are."""
        return self.op("Constant", value=numpy_helper.from_array(np.asarray(value, dtype)))

    def _name(self, op_type: str) -> str:
        return f"{op_type}_{len(self.nodes)}"
