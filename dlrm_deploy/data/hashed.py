"""Numbers that are a hash of what they are for, so that each is the same whatever was drawn before it."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

LongArray = npt.NDArray[np.int64]
WordArray = npt.NDArray[np.uint64]
DoubleArray = npt.NDArray[np.float64]


def uniform(seed: int, *words: int | npt.NDArray[np.signedinteger]) -> DoubleArray:
    """Numbers in [0, 1) with 53 random bits, one for each combination of the words, which broadcast."""
    state: WordArray = np.asarray(seed, np.uint64)
    for word in words:
        state = _mix(state ^ _mix(np.asarray(word).astype(np.uint64)))
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def scatter(ranks: LongArray, rows: int) -> LongArray:
    """A place in a table of `rows` rows for each of the first `rows` ranks, neighbours far apart, no two alike."""
    # Below 2^20, so that products stay in 64 bits.
    multiplier = max(1, int(min(rows, 2**20) * 0.618))
    while math.gcd(multiplier, rows) != 1:
        multiplier -= 1
    return ranks * multiplier % rows


def _mix(x: WordArray) -> WordArray:
    """The output function of SplitMix64 (Steele, Lea, Flood 2014): a bijection on 64-bit words."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
