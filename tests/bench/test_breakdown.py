from __future__ import annotations

import numpy as np
import pytest

from dlrm_deploy.bench.breakdown import operator_shares, shares
from dlrm_deploy.data.random import random_batch
from dlrm_deploy.engines.registry import open_unchecked


def event(name: str, operator: str, microseconds: float, cat: str = "Node") -> dict[str, object]:
    return {"cat": cat, "name": name, "dur": microseconds, "args": {"op_name": operator}}


def test_shares_are_of_the_last_calls_of_each_node():
    events = [
        event("a_kernel_time", "Gemm", 1000),  # a call that warmed up
        event("a_kernel_time", "Gemm", 30),
        event("b_kernel_time", "Gemm", 30),
        event("c_kernel_time", "Relu", 20),
        event("c_fence_before", "Relu", 500),
        event("model_run", "", 900, cat="Session"),
    ]
    assert shares(events, calls=1) == {"Gemm": 0.75, "Relu": 0.25}
    assert shares([], calls=1) == {}


@pytest.mark.parametrize(("engine", "ours"), [("onnxruntime", True), ("onnxruntime-stock", False)])
def test_each_engine_shows_the_operators_that_it_ran(dot_bundle, engine, ours):
    batches = [random_batch(dot_bundle.config, 4, np.random.default_rng(i)) for i in range(2)]
    with open_unchecked(dot_bundle, engine, threads=1, spin=False) as opened:
        found = operator_shares(opened, batches)
    assert found is not None
    assert sum(found.values()) == pytest.approx(1.0)
    assert list(found.values()) == sorted(found.values(), reverse=True)
    assert bool(set(found) & set(dot_bundle.manifest.operators)) == ours


def test_an_engine_without_nodes_has_no_breakdown(dot_bundle):
    with open_unchecked(dot_bundle, "torch", threads=1) as opened:
        assert operator_shares(opened, []) is None
