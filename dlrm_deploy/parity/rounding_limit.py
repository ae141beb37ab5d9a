"""How far two correct engines with bfloat16 or int8 MLPs can be apart, and how far they are on average.

Both multiply the same stored weights with inputs rounded to the number format, and compute the rest in float32, adding
up in an order of their own. Values that differ in their last bits round to neighbouring numbers where they lie next to
a tie, and each such flip moves the next layer's sums by enough to flip some of theirs. So behind many layers the
roundings of two engines may be as good as independent. Two independent roundings of a value whose neighbours are s
apart differ by s / sqrt(6) in the root mean square; to first order they move the probability of a sample by

    sigma = sqrt(sum over layers and inputs of (g s)^2 / 6),   g = d probability / d input

where s is the distance of the bfloat16 numbers around an input, and in int8 the step of its sample, 1/127 of the
largest input. No sample may be off by more than `DEVIATIONS` sigma: that is more than the worst single flip, the
largest |g s|, of which few models see several in one sample. Inputs that are the same bits in both engines, such as the
dense values of a batch, do not count.

Most samples have no flip, so over many samples engines differ by far less, and an engine that does not round, rounds in
another way, or holds other weights differs by about half of the largest sigma in the root mean square. How often values
flip is found by scoring the same samples in another way: with sums in float64 where MLPs are bfloat16; in int8, whose
sums are exact in every engine, with the input of each MLP moved by as much as `NOISE`, which is what lies between two
orders of the float32 sums before it. The root mean square of a batch may be `SELF` times that of this difference and,
so that a few flips more are no failure where flips are rare, three times what one flip in the whole batch makes of it.

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
from dlrm_deploy.config import ModelConfig
from dlrm_deploy.engines.torch_eager import TorchEngine
from dlrm_deploy.model.dlrm import DLRM
from dlrm_deploy.model.keys import bottom_keys, branch_keys, top_keys
from dlrm_deploy.model.layers import ROUNDINGS, Layer, Rounding

DEVIATIONS = 4.0
SELF = 4.0

NOISE = 2.0**-23
"""Of the largest input of a sample: a rounding of each of two sums of its size, or the random walk of some more."""

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
        engine: the reference, of a bundle with bfloat16 or int8 MLPs.
        batch: fits its model.
    """
    precision = engine.bundle.manifest.mlp_precision
    B = batch.batch_size
    if B == 0:
        return RoundingLimit(0.0, 0.0)
    if B > SAMPLES:
        batch = batch.rows(0, SAMPLES)
    sigma = rounding_deviations(engine.model, batch, ROUNDINGS[precision])
    own = _own_differences(engine.model, batch, precision)
    most = DEVIATIONS * float(sigma.max())
    rms = SELF * float(np.sqrt(np.mean(own**2))) + 3 * np.sqrt(6) * float(sigma.max()) / np.sqrt(B)
    return RoundingLimit(most, min(float(rms), most))


def rounding_deviations(model: DLRM, batch: Batch, rounding: Rounding) -> npt.NDArray[np.float64]:
    """sigma of each sample of a batch [B]; NaN and infinities count as 0, because no limit lets such values pass."""
    inputs: list[Tensor] = []

    def recorded(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """The layer of the model with the gradient of one that does not round."""
        if not x.requires_grad:
            x = x.detach().requires_grad_()
        inputs.append(x)
        return F.linear(x + (rounding.rounded(x.detach()) - x.detach()), weight, bias)

    pooled = _pooled(model, batch)
    with torch.enable_grad():
        probabilities = _score(model, batch, pooled, recorded)
        gradients = torch.autograd.grad(probabilities.sum(), inputs) if inputs else ()
    variance = torch.zeros(batch.batch_size, dtype=torch.float64)
    for x, gradient in list(zip(inputs, gradients, strict=True))[_same_inputs(model.config) :]:
        variance += (gradient * rounding.spacing(x.detach())).double().square().sum(1) / 6
    sigma: npt.NDArray[np.float64] = torch.nan_to_num(variance.sqrt(), 0, 0, 0).numpy()
    return sigma


def _same_inputs(config: ModelConfig) -> int:
    """How many layers, from the first one on, have inputs of the same bits in every engine: values of the batch."""
    return 1 if config.bottom_mlp and config.dense_transform == "none" else 0


def _own_differences(model: DLRM, batch: Batch, precision: str) -> npt.NDArray[np.float64]:
    """By how much each probability [B] changes where the layers' sums or inputs are those of another right engine."""
    generator = torch.Generator().manual_seed(0)
    usual = model.layer

    def exact(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Sums in float64, up to their last rounding."""
        return F.linear(ROUNDINGS[precision].rounded(x).double(), weight.double(), bias.double()).float()

    config = model.config
    chains = (() if _same_inputs(config) else bottom_keys(config), *branch_keys(config), top_keys(config))
    first = {id(model.weight(keys[0][0])) for keys in chains if keys}

    def moved(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """The first layer of each MLP, which reads float32 sums, with an input that another engine may have."""
        if id(weight) not in first:
            return usual(x, weight, bias)
        noise = (2 * torch.rand(x.shape, generator=generator) - 1) * (NOISE * x.abs().amax(1, keepdim=True))
        return usual(torch.where(x == 0, 0, x + noise), weight, bias)

    pooled = _pooled(model, batch)
    with torch.inference_mode():
        other = _score(model, batch, pooled, moved if precision == "int8" else exact)
        difference = _score(model, batch, pooled, usual).double() - other.double()
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
