from __future__ import annotations

import numpy as np
import pytest

from dlrm_deploy.batch import Batch
from dlrm_deploy.bench.measure import SETTLE_SECONDS, WARM_CALLS, Slicer, interleave, order_of_round

MS = 1_000_000


class Machine:
    """A clock that moves only when an engine works, and a log of what happened."""

    def __init__(self) -> None:
        self.now = 0
        self.log: list[tuple[str, object]] = []

    def engine(self, name: str, milliseconds: float):
        def call(batch: Batch) -> None:
            self.now += int(milliseconds * MS)
            self.log.append((name, batch))

        return call

    def clock(self) -> int:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.log.append(("sleep", seconds))

    def engines_in_order(self) -> list[str]:
        """Names in the order of the slices."""
        return [self.log[i + 1][0] for i, (what, _) in enumerate(self.log) if what == "sleep"]


def batches(count: int) -> list[Batch]:
    return [Batch.from_bags([[float(i)]], [[[i]]]) for i in range(count)]


def run(machine: Machine, calls: dict[str, object], count: int = 6, rounds: int = 3, slice_ms: float = 10.0, **more):
    slices = {
        name: Slicer(call, batches(count), slice_ms, start=i / len(calls), clock=machine.clock)
        for i, (name, call) in enumerate(calls.items())
    }
    return interleave(slices, rounds=rounds, sleep=machine.sleep, **more)


def test_order_moves_on_by_one_each_round():
    assert [order_of_round(["a", "b", "c"], r) for r in range(4)] == [
        ["a", "b", "c"],
        ["b", "c", "a"],
        ["c", "a", "b"],
        ["a", "b", "c"],
    ]


def test_every_engine_has_one_slice_in_each_round_after_a_pause():
    machine = Machine()
    run(machine, {name: machine.engine(name, 4) for name in "abc"})
    assert machine.engines_in_order() == list("abcbcacab")
    assert {seconds for what, seconds in machine.log if what == "sleep"} == {SETTLE_SECONDS}


def test_a_slice_ends_with_the_first_call_past_its_length_and_leaves_out_the_warm_calls():
    machine = Machine()
    latencies = run(machine, {"a": machine.engine("a", 4)}, rounds=2, slice_ms=10)
    for calls in latencies["a"]:
        np.testing.assert_array_equal(calls, [4 * MS] * 3)
    assert sum(what == "a" for what, _ in machine.log) == 2 * (3 + WARM_CALLS)


def test_a_call_longer_than_the_slice_is_measured_once():
    machine = Machine()
    latencies = run(machine, {"slow": machine.engine("slow", 500)}, rounds=1)
    np.testing.assert_array_equal(latencies["slow"], [[500 * MS]])


def test_a_clock_too_coarse_to_move_cannot_make_an_empty_slice():
    machine = Machine()
    ticks = iter([0, 0, 0, 20 * MS])
    slicer = Slicer(machine.engine("a", 0), batches(1), 10, clock=lambda: next(ticks, 20 * MS))
    latencies = interleave({"a": slicer}, rounds=1, sleep=machine.sleep)
    assert all(calls.size for calls in latencies["a"])


def test_inputs_rotate_from_call_to_call_and_go_on_in_the_next_round():
    machine = Machine()
    run(machine, {"a": machine.engine("a", 5)}, count=3, rounds=2, slice_ms=10)  # two warm and two timed calls a round
    seen = [batch.dense[0, 0] for what, batch in machine.log if what == "a"]
    assert seen == [0, 1, 2, 0, 1, 2, 0, 1]


def test_engines_start_at_different_inputs():
    machine = Machine()
    run(machine, {name: machine.engine(name, 20) for name in "abc"}, count=6, rounds=1)
    first = {}
    for what, batch in machine.log:
        if what != "sleep":
            first.setdefault(what, batch.dense[0, 0])
    assert first == {"a": 0, "b": 2, "c": 4}


def test_more_engines_than_inputs_still_have_inputs():
    machine = Machine()
    latencies = run(machine, {name: machine.engine(name, 20) for name in "abcd"}, count=1, rounds=1)
    assert {name: len(rounds) for name, rounds in latencies.items()} == dict.fromkeys("abcd", 1)


def test_what_comes_before_a_round_is_not_timed():
    machine = Machine()
    rounds = []

    def calibrate(round_number: int) -> None:
        machine.now += 1000 * MS
        rounds.append(round_number)

    latencies = run(machine, {"a": machine.engine("a", 4)}, before_round=calibrate)
    assert rounds == [0, 1, 2]
    assert max(calls.max() for calls in latencies["a"]) == 4 * MS


def test_an_error_of_an_engine_is_not_swallowed():
    def fail(batch: Batch) -> None:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        interleave({"a": Slicer(fail, batches(1), 1)}, rounds=1, sleep=lambda seconds: None)
