"""Inputs and layers on which forms of MlpInt8 could differ, and its arithmetic spelled out number by number."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from dlrm_deploy.int8_codes import quantize_weight

Layers = list[tuple[np.ndarray, np.ndarray, np.ndarray]]


def random_layers(*sizes: int, seed: int = 0) -> Layers:
    """Layers from `sizes[0]` inputs over each following size, of weights that keep the size of values."""
    rng = np.random.default_rng(seed)
    layers = []
    for inputs, outputs in pairwise(sizes):
        weight = (rng.standard_normal((outputs, inputs)) / np.sqrt(inputs)).astype(np.float32)
        layers.append((*quantize_weight(weight), (0.1 * rng.standard_normal(outputs)).astype(np.float32)))
    return layers


def _changed(layers: Layers, scale: float = 1.0, bias: float = 1.0) -> Layers:
    """Layers whose scales and biases are multiplied; the last row's are not."""
    factors = [np.append(np.full(len(layers[0][2]) - 1, factor, np.float32), np.float32(1)) for factor in (scale, bias)]
    return [(codes, scales * factors[0], biases * factors[1]) for codes, scales, biases in layers]


def _extreme(inputs: int) -> Layers:
    """The largest sums that there are, up and down, and a row of zeros."""
    codes = np.array([[127] * inputs, [-127] * inputs, [0] * inputs, [127, -127] * inputs], object)
    weight = np.array([list(row)[:inputs] for row in codes], np.int8)
    return [(weight, np.array([1, 1e-3, 1, 3.3], np.float32), np.array([0, 1, -1, 2.5], np.float32))]


def _special_samples(inputs: int) -> np.ndarray:
    """Samples of zeros, tiny and huge values, NaN and infinities, between ordinary ones."""
    x = np.random.default_rng(1).standard_normal((14, inputs)).astype(np.float32)
    x[1], x[2], x[3] = 0, 1e-31, x[3] * np.float32(1e-30)
    x[4], x[5], x[6] = np.float32(1e-30), np.nextafter(np.float32(1e-30), np.float32(0)), 1e-45
    x[7, -1], x[8, 0], x[9, inputs // 2] = np.nan, np.inf, -np.inf
    x[10], x[11, 0] = x[10] * np.float32(1e37), 3.4e38
    x[12] = -0.0
    return x


def _ties(inputs: int) -> np.ndarray:
    """Values half way between two codes: largest value 127, others n + 1/2."""
    rng = np.random.default_rng(2)
    x = rng.integers(-127, 127, (9, inputs)).astype(np.float32) + np.float32(0.5)
    x[:, 0] = 127
    return x


def _normal(batch: int, inputs: int) -> np.ndarray:
    return np.random.default_rng(3).standard_normal((batch, inputs)).astype(np.float32)


CASES: dict[str, tuple[np.ndarray, Layers]] = {
    "chain": (_normal(33, 13), random_layers(13, 64, 37, 5)),
    "one_sample": (_normal(1, 70), random_layers(70, 40, 1)),
    "no_samples": (_normal(0, 7), random_layers(7, 4, 3)),
    "one_input": (_normal(20, 1), random_layers(1, 1, 1)),
    "special": (_special_samples(67), random_layers(67, 33, 3)),
    "ties": (_ties(31), random_layers(31, 9)),
    "many_inputs": (_normal(5, 2000), random_layers(2000, 9, 4)),
    "largest_sums": (np.ones((2, 1041), np.float32), _extreme(1041)),
    "largest_sums_of_many": (np.full((2, 100_001), -7, np.float32), _extreme(100_001)),
    "overflow": (
        _normal(3, 4),
        [(c, s * np.float32(3e38), b) for c, s, b in random_layers(4, 6)] + random_layers(6, 2),
    ),
    "nan_bias": (_normal(3, 4), [(c, s, b * np.float32(np.nan)) for c, s, b in random_layers(4, 6)]),
}


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Apart from the payload of NaN and the sign of zero, which the contract leaves open."""
    return a.dtype == b.dtype and a.shape == b.shape and bool(np.all((a == b) | (np.isnan(a) & np.isnan(b))))


def spelled_out(x: np.ndarray, layers: Layers, relu_last: bool) -> np.ndarray:
    """docs/operators.md, one float32 and one Python integer at a time. Slow."""
    f = np.float32
    with np.errstate(all="ignore"):
        for number, (weight, scale, bias) in enumerate(layers):
            y = np.zeros((len(x), len(weight)), f)
            for b, sample in enumerate(x):
                largest = max(abs(value) for value in sample)
                inverse = f(127) / largest if largest >= f(1e-30) else f(0)
                step = largest / f(127)
                if all(np.isfinite(value) for value in sample):
                    codes = [int(np.rint(value * inverse)) for value in sample]
                else:
                    codes, step = [0] * len(sample), f(np.nan)
                assert all(-127 <= code <= 127 for code in codes)
                for n in range(len(weight)):
                    total = sum(code * int(w) for code, w in zip(codes, weight[n], strict=True))
                    assert -(2**31) <= total < 2**31
                    value = f(total) * step * scale[n] + bias[n]
                    clipped = (relu_last or number < len(layers) - 1) and value <= 0
                    y[b, n] = 0 if clipped else value
            x = y
    return x
