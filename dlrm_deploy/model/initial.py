"""Random weights before the first step: those of the paper's code, and for parts of tables ones that train well."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dlrm_deploy.config import ModelConfig
from dlrm_deploy.model.keys import WIDE_BIAS, WIDE_DENSE
from dlrm_deploy.tables import TablePart

_BLOCK_ROWS = 1 << 16


def initial_part(config: ModelConfig, part: TablePart, weights: Tensor, generator: torch.Generator) -> None:
    """Fill the matrix [rows, width] of a table part in place, a block of rows at a time.

    Rows are uniform in +-1 / sqrt(rows). Factors of a product but the first are around 1 instead, so that a product
    starts as its first factor; MLPs of a path are as other MLPs; first-order weights are zero.
    """
    name, _, kind = part.name.partition(".")
    table = config.table(name)
    if kind == "wide":
        weights.zero_()
        return
    later = kind not in ("", "0")
    bound = 1 / math.sqrt(part.rows)
    for start in range(0, len(weights), _BLOCK_ROWS):
        block = weights[start : start + _BLOCK_ROWS]
        if later and table.combine == "path":
            _initial_bank(block, table.path_hidden, table.width, generator)
        else:
            block.uniform_(-bound, bound, generator=generator)
            if later and table.combine == "multiply":
                block.add_(1)


def initial_dense(key: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """A weight of `dense_shapes`: normal of variance 2 / (in + out), the bias of a linear layer of variance 1 / out.

    Biases of cross layers and first-order weights are zero.
    """
    if key in (WIDE_BIAS, WIDE_DENSE) or "crossnet.bias" in key:
        return torch.zeros(shape)
    deviation = math.sqrt(2 / sum(shape) if len(shape) > 1 else 1 / shape[0])
    return torch.empty(shape).normal_(std=deviation, generator=generator)


def _initial_bank(rows: Tensor, hidden: int, width: int, generator: torch.Generator) -> None:
    rows.normal_(std=math.sqrt(2 / (hidden + width)), generator=generator)
    first = hidden * width
    rows[:, first : first + hidden] = 0
    rows[:, -width:] = 0
