"""Search for the highest load that a server bears."""

from __future__ import annotations

import math
from collections.abc import Callable

GROWTH = 1.5


def highest_valid(
    is_valid: Callable[[float], bool], start: float, *, precision: float = 0.06, most_runs: int = 16
) -> float | None:
    """The highest load found valid, close to the lowest one found invalid.

    The load grows (or falls) by `GROWTH` from `start` until one run is valid and one is not, and the interval between
    the two is then halved. Only loads that were tried are returned.

    Args:
        is_valid: makes one run at a load, greater than 0.
        start: the first load to try.
        precision: stop where the lowest invalid load is at most this share above the highest valid one.
        most_runs: stop after so many runs in any case.

    Returns:
        None where no run was valid.
    """
    valid: float | None = None
    invalid: float | None = None
    load = start
    for _ in range(most_runs):
        if is_valid(load):
            valid = load
        else:
            invalid = load
        if valid is None:
            load /= GROWTH
        elif invalid is None:
            load *= GROWTH
        elif invalid / valid <= 1 + precision:
            break
        else:
            load = math.sqrt(valid * invalid)
    return valid
