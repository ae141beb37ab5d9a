"""Which operator takes what share of an ONNX Runtime engine's time, by ONNX Runtime's own profiler."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dlrm_deploy.batch import Batch
from dlrm_deploy.engines.engine import Engine

CALLS = 10
"""Calls that are profiled, behind those that warm up."""

_WARM_CALLS = 3


def operator_shares(engine: Engine, batches: Sequence[Batch]) -> dict[str, float] | None:
    """Share of the time of all nodes, 0 to 1, by operator type, largest first; None for engines without nodes.

    Args:
        engine: opened; a second session of it is profiled.
        batches: inputs, used in turn.
    """
    from dlrm_deploy.engines.ort import StockOnnxRuntimeEngine

    if not isinstance(engine, StockOnnxRuntimeEngine):
        return None
    inputs = [batches[i % len(batches)] for i in range(_WARM_CALLS + CALLS)]
    return shares(engine.profile(inputs), CALLS)


def shares(events: Sequence[dict[str, Any]], calls: int) -> dict[str, float]:
    """Condense the events of a profile to shares by operator, of the last `calls` runs of each node."""
    durations: dict[str, list[float]] = {}
    operators = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            durations.setdefault(event["name"], []).append(event["dur"])
            operators[event["name"]] = event["args"]["op_name"]
    totals: dict[str, float] = {}
    for node, times in durations.items():
        operator = operators[node]
        totals[operator] = totals.get(operator, 0.0) + sum(times[-calls:])
    whole = sum(totals.values()) or 1.0
    return {operator: total / whole for operator, total in sorted(totals.items(), key=lambda item: -item[1])}
