"""How far two correct engines with bfloat16 MLPs can be apart, and how far they are on average.

Both multiply the same bfloat16 weights with inputs rounded to bfloat16, and sum up in float32 in an order of their own.
Sums that differ in their last bits round to neighbouring bfloat16 numbers where they lie next to a tie, and each such
flip moves the next layer's sums by enough to flip some of theirs. So behind many layers the roundings of two engines
may be as good as independent. Two independent roundings of a value whose neighbours are s apart differ by s / sqrt(6)
in the root mean square; to first order they move the probability of a sample by

    sigma = sqrt(sum over layers and inputs of (g s)^2 / 6),   g = d probability / d input

No sample may be off by more than `DEVIATIONS` sigma: that is more than the worst single flip, the largest |g s|, of
which few models see several in one sample. Inputs that are the same bits in both engines, such as the dense values of a
batch, do not count.

Most samples have no flip, so over many samples engines differ by far less, and an engine that does not round, rounds in
another way, or holds other weights differs by about half of the largest sigma in the root mean square. How often sums
flip is found by scoring the same samples with sums in float64: the root mean square of a batch may be `SELF` times that
of this difference and, so that a few flips more are no failure where flips are rare, three times what one flip in the
whole batch makes of it.

What engines really differ by is in docs/check.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from dlrm_deploy.batch import Batch
from dlrm_deploy.engines.torch_eager import TorchEngine
from dlrm_deploy.model.dlrm import DLRM, Layer, to_bf16

DEVIATIONS = 4.0
SELF = 4.0

_MANTISSA = 8
"""Bits of a bfloat16 number's significand."""

SAMPLES = 1024
"""Of a batch that stand for all of it; the gradients of every layer are held for them."""


@dataclass(frozen=True, slots=True)
class RoundingLimit:
    """What rounding may make of the probabilities of a batch, beside the order of float32 sums."""

    most: float
    """Of any sample."""

    rms: float
    """Root mean square over the batch."""


def rounding_limit(engine: TorchEngine, batch: Batch) -> RoundingLimit:
    """The limit for a batch whose ids are valid.

    Args:
        engine: the reference, of a bundle with bfloat16 MLPs.
        batch: fits its model.
    """
    B = batch.batch_size
    if B == 0:
        return RoundingLimit(0.0, 0.0)
    if B > SAMPLES:
        batch = batch.rows(0, SAMPLES)
    sigma, own = rounding_deviations(engine.model, batch), _own_differences(engine.model, batch)
    most = DEVIATIONS * float(sigma.max())
    rms = SELF * float(np.sqrt(np.mean(own**2))) + 3 * np.sqrt(6) * float(sigma.max()) / np.sqrt(B)
    return RoundingLimit(most, min(float(rms), most))


def rounding_deviations(model: DLRM, batch: Batch) -> npt.NDArray[np.float64]:
    """sigma of each sample of a batch [B]; NaN and infinities count as 0, because no limit lets such values pass."""
    inputs: list[Tensor] = []

    def recorded(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """`bf16_layer` with the gradient of one that does not round."""
        if not x.requires_grad:
            x = x.detach().requires_grad_()
        inputs.append(x)
        return F.linear(x + (to_bf16(x) - x).detach(), weight, bias)

    pooled = _pooled(model, batch)
    with torch.enable_grad():
        probabilities = _score(model, batch, pooled, recorded)
        gradients = torch.autograd.grad(probabilities.sum(), inputs) if inputs else ()
    same = 1 if model.config.bottom_mlp and model.config.dense_transform == "none" else 0
    variance = torch.zeros(batch.batch_size, dtype=torch.float64)
    for x, gradient in list(zip(inputs, gradients, strict=True))[same:]:
        variance += (gradient * _spacing(x.detach())).double().square().sum(1) / 6
    sigma: npt.NDArray[np.float64] = torch.nan_to_num(variance.sqrt(), 0, 0, 0).numpy()
    return sigma


def _own_differences(model: DLRM, batch: Batch) -> npt.NDArray[np.float64]:
    """By how much each probability [B] changes where the layers' sums are exact, up to their last rounding."""

    def exact(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.linear(to_bf16(x).double(), weight.double(), bias.double()).float()

    pooled = _pooled(model, batch)
    with torch.inference_mode():
        difference = _score(model, batch, pooled, model.layer).double() - _score(model, batch, pooled, exact).double()
    found: npt.NDArray[np.float64] = torch.nan_to_num(difference, 0, 0, 0).numpy()
    return found


def _pooled(model: DLRM, batch: Batch) -> list[Tensor]:
    weights = None if batch.weights is None else torch.from_numpy(batch.weights)
    with torch.no_grad():
        return model.pool(torch.from_numpy(batch.indices), torch.from_numpy(batch.offsets), weights)


def _score(model: DLRM, batch: Batch, pooled: list[Tensor], layer: Layer) -> Tensor:
    """Probabilities [B] with layers that compute in another way."""
    was, model.layer = model.layer, layer
    try:
        return model.score(torch.from_numpy(batch.dense), pooled).sigmoid()
    finally:
        model.layer = was


def _spacing(x: Tensor) -> Tensor:
    """Distance of the bfloat16 numbers around each value; 0 at 0, where a ReLU puts both engines' values."""
    spacing = torch.ldexp(torch.ones_like(x), torch.frexp(x).exponent - _MANTISSA)
    return torch.where(x == 0, 0, spacing)
