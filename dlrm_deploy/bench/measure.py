"""Time several engines against one another: interleaved slices, rotating order, rotating inputs.

A machine's speed drifts by up to 2x within minutes, so engines measured one after the other cannot be compared. Here
each round gives every engine a slice of its own within a fraction of a second, and ratios are taken within a round.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle, islice
from typing import Any

import numpy as np
import numpy.typing as npt

from dlrm_deploy.batch import Batch

Call = Callable[[Batch], Any]
Nanoseconds = npt.NDArray[np.int64]

SETTLE_SECONDS = 0.05
"""Pause before a slice, in which the threads of the engine before fall asleep: those of PyTorch's OpenMP spin for up to
20 ms after a call. They are not told to sleep at once, which would slow PyTorch itself down by a quarter."""

WARM_CALLS = 2
"""Calls before a slice's clock starts."""


def order_of_round(names: Sequence[str], round_number: int) -> list[str]:
    """The order in which the engines run: it moves on by one each round, so that none always follows the same other."""
    first = round_number % len(names)
    return [*names[first:], *names[:first]]


def interleave(
    slices: Mapping[str, Callable[[], Nanoseconds]],
    *,
    rounds: int,
    before_round: Callable[[int], None] = lambda round_number: None,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, list[Nanoseconds]]:
    """Give every engine `rounds` slices.

    Args:
        slices: measure one slice of each engine, by name: give the nanoseconds of each call.
        rounds: slices an engine.
        before_round: called before each round with its number; its time is not measured.
        sleep: seconds.

    Returns:
        For each name, one array per round.
    """
    latencies: dict[str, list[Nanoseconds]] = {name: [] for name in slices}
    for round_number in range(rounds):
        before_round(round_number)
        for name in order_of_round(list(slices), round_number):
            sleep(SETTLE_SECONDS)
            latencies[name].append(slices[name]())
    return latencies


class Slicer:
    """Times calls over a cycle of batches, slice after slice."""

    def __init__(
        self,
        call: Call,
        batches: Sequence[Batch],
        slice_ms: float,
        *,
        start: float = 0.0,
        clock: Callable[[], int] = time.perf_counter_ns,
    ) -> None:
        """Prepare to measure.

        Args:
            call: what to time.
            batches: inputs, at least one.
            slice_ms: a slice ends with the first call that ends after this time; it has at least one.
            start: where in the cycle to begin, 0 to 1. Engines begin at different places, so that none finds the rows
                that the one before has just brought into the caches.
            clock: nanoseconds.
        """
        self._call = call
        self._inputs = islice(cycle(batches), int(start * len(batches)), None)
        self._slice_ns = int(slice_ms * 1e6)
        self._clock = clock

    def __call__(self) -> Nanoseconds:
        """Nanoseconds of each call of one slice."""
        call, inputs, clock = self._call, self._inputs, self._clock
        for _ in range(WARM_CALLS):
            call(next(inputs))
        latencies: list[int] = []
        begin = now = clock()
        while now - begin < self._slice_ns or not latencies:
            batch = next(inputs)
            start = clock()
            call(batch)
            now = clock()
            latencies.append(now - start)
        return np.array(latencies, np.int64)
