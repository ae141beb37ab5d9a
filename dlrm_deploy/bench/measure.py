"""Time several callables against one another in one process: interleaved slices, rotating order, rotating inputs.

A machine's speed drifts by up to 2x within minutes, so engines measured one after the other cannot be compared. Here
each round gives every engine a slice of its own within a fraction of a second, and ratios are taken within a round.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    calls: Mapping[str, Call],
    batches: Sequence[Batch],
    *,
    rounds: int,
    slice_ms: float,
    before_round: Callable[[int], None] = lambda round_number: None,
    clock: Callable[[], int] = time.perf_counter_ns,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, list[Nanoseconds]]:
    """Measure every callable for `rounds` slices of at least `slice_ms` and at least one call.

    All callables walk the same cycle of batches. They start at different places in it, so that none finds the rows
    that the one before has just brought into the caches.

    Args:
        calls: what to time, by name.
        batches: inputs, at least one.
        rounds: slices per callable.
        slice_ms: a slice ends with the first call that ends after this time.
        before_round: called before each round with its number; its time is not measured.
        clock: nanoseconds.
        sleep: seconds.

    Returns:
        For each name, one array per round with the nanoseconds of each call.
    """
    names = list(calls)
    inputs = {name: _cycle_from(batches, i * len(batches) // len(names)) for i, name in enumerate(names)}
    latencies: dict[str, list[Nanoseconds]] = {name: [] for name in names}
    for round_number in range(rounds):
        before_round(round_number)
        for name in order_of_round(names, round_number):
            sleep(SETTLE_SECONDS)
            latencies[name].append(_time_slice(calls[name], inputs[name], int(slice_ms * 1e6), clock))
    return latencies


def _cycle_from(batches: Sequence[Batch], start: int) -> Iterator[Batch]:
    return islice(cycle(batches), start, None)


def _time_slice(call: Call, inputs: Iterator[Batch], slice_ns: int, clock: Callable[[], int]) -> Nanoseconds:
    for _ in range(WARM_CALLS):
        call(next(inputs))
    latencies: list[int] = []
    begin = now = clock()
    while now - begin < slice_ns or not latencies:
        batch = next(inputs)
        start = clock()
        call(batch)
        now = clock()
        latencies.append(now - start)
    return np.array(latencies, np.int64)
