"""Row-wise Adagrad for embedding tables: one accumulator per row, as in FBGEMM's EXACT_ROWWISE_ADAGRAD.

The gradient of a table group is sparse and comes in once per step, so rows that occur several times are summed first
and each touched row is updated once. Untouched rows cost nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class RowWiseAdagrad:
    """For each touched row w with gradient g (plus `weight_decay` * w):

    state += mean(g ** 2); w -= lr * g / (sqrt(state) + eps).
    """

    def __init__(
        self, parameters: Iterable[Tensor], *, lr: float, eps: float = 1e-8, weight_decay: float = 0.0
    ) -> None:
        """Optimise matrices [R, D] that receive sparse gradients. `state` holds one tensor [R] for each."""
        self._parameters = list(parameters)
        self._lr = lr
        self._eps = eps
        self._weight_decay = weight_decay
        self.state = [torch.zeros(len(parameter)) for parameter in self._parameters]

    def zero_grad(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Update the rows that have a gradient."""
        for parameter, state_R in zip(self._parameters, self.state, strict=True):
            if parameter.grad is None:
                continue
            gradient = parameter.grad.coalesce()
            rows_N, gradient_ND = gradient.indices()[0], gradient.values()
            if self._weight_decay:
                gradient_ND = gradient_ND + self._weight_decay * parameter[rows_N]
            squares_N = state_R[rows_N] + gradient_ND.square().mean(dim=1)
            state_R[rows_N] = squares_N
            parameter.index_add_(0, rows_N, gradient_ND / (squares_N.sqrt() + self._eps)[:, None], alpha=-self._lr)
