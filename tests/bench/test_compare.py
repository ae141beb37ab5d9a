from __future__ import annotations

import pytest

from dlrm_deploy.bench.compare import compare_rows, print_changes
from dlrm_deploy.errors import ConfigError


def row(engine: str, ratio: float, **other: object) -> dict[str, object]:
    facts = {"kind": "throughput", "model": "m", "batch": 8, "baseline": "torch", "threads": 2, "distribution": "zipf"}
    return {**facts, "engine": engine, "ratio": ratio, **other}


def test_a_ratio_that_fell_by_more_than_the_tolerance_is_a_regression():
    before = [row("torch", 1.0), row("a", 4.0), row("b", 4.0)]
    after = [row("torch", 1.0), row("a", 3.41), row("b", 3.39)]
    changes, alone = compare_rows(before, after)
    assert [(change.engine, change.regressed) for change in changes] == [("torch", False), ("a", False), ("b", True)]
    assert changes[2].change == pytest.approx(-0.1525)
    assert alone == []
    assert not any(change.regressed for change in compare_rows(before, after, tolerance=0.2)[0])


def test_faster_machines_change_nothing():
    # Only ratios count: samples_per_s doubled, and so did the baseline's.
    changes, _ = compare_rows([row("a", 2.0, samples_per_s=10)], [row("a", 2.0, samples_per_s=20)])
    assert not changes[0].regressed


@pytest.mark.parametrize("differs", ["model", "batch", "baseline", "threads", "distribution"])
def test_only_rows_of_like_runs_are_compared(differs):
    other = row("a", 1.0, **{differs: "other"})
    changes, alone = compare_rows([row("b", 2.0), row("a", 2.0)], [row("b", 2.0), other])
    assert [change.engine for change in changes] == ["b"]
    assert len(alone) == 2
    with pytest.raises(ConfigError, match="nothing to compare"):
        compare_rows([row("a", 2.0)], [other])


def test_engines_that_did_not_run_and_scenarios_are_left_out():
    others = [
        {"kind": "throughput", "engine": "c", "batch": None, "not_run": "why"},
        {"kind": "scenario", "engine": "d", "ratio": 9.0},
    ]
    changes, alone = compare_rows([row("a", 2.0), *others], [row("a", 2.0), *others])
    assert [change.engine for change in changes] == ["a"]
    assert alone == []


def test_the_lines_say_what_changed_with_regressions_last():
    changes, alone = compare_rows([row("a", 4.0), row("b", 1.0), row("c", 1.0)], [row("a", 2.0), row("b", 1.1)])
    assert list(print_changes(changes, alone)) == [
        "ok         m  b  batch 8: 1.00 -> 1.10 x torch (+10%)",
        "REGRESSED  m  a  batch 8: 4.00 -> 2.00 x torch (-50%)",
        "gone: there was such a row: m, c at batch 8, against torch.",
        "1 of 2 rows lost more than 15% of their ratio.",
    ]


@pytest.mark.parametrize("tolerance", [-0.1, 1.0, float("nan")])
def test_a_tolerance_that_makes_no_sense_is_refused(tolerance):
    with pytest.raises(ConfigError, match="tolerance must be at least 0 and below 1"):
        compare_rows([row("a", 1.0)], [row("a", 1.0)], tolerance)
