from __future__ import annotations

import pytest

from dlrm_deploy.bench.goals import BEGIN, BF16, END, FP32, GOALS, INT8, Goal, markdown, outcomes
from dlrm_deploy.errors import ConfigError
from dlrm_deploy.files import write_between

GOAL = Goal(model="m", batch=8, engine=BF16, must=2.0, stretch=3.0, most_floor=1.5)


def row(engine: str, ratio: float, **other: object) -> dict[str, object]:
    facts = {"kind": "throughput", "model": "m", "batch": 8, "command": "c", "time": "t", "floor_ms": 10.0}
    return {**facts, "engine": engine, "ratio": ratio, "times_floor": 1.2, **other}


def test_there_is_a_goal_for_every_cell_of_the_issue():
    cells = {(goal.model, goal.batch, goal.engine): (goal.must, goal.stretch, goal.most_floor) for goal in GOALS}
    assert len(cells) == len(GOALS) == 6 + 6 + 5 + 4
    assert cells["kaggle", 128, BF16] == (4.5, 7, 2.0)
    assert cells["paper-32", 1, BF16] == (1.5, 2.5, None)
    assert cells["rm2-like", 2048, BF16] == (1.0, 1.2, 1.15)
    assert cells["rm2-like", 512, INT8] == (1.8, 2.5, 0.45)


def test_the_lead_is_over_the_fastest_engine_that_is_not_ours():
    rows = [row("torch", 1.0), row("openvino-bf16", 2.0), row(FP32, 3.0), row(BF16, 5.0), row(INT8, 8.0)]
    (found,) = outcomes([*rows, row("onnxruntime[int8,int8]", 9.0)], [GOAL])
    assert (found.peer, found.lead) == ("openvino-bf16", 2.5)
    assert found.beside == {FP32: 1.5, INT8: 4.0, "onnxruntime[int8,int8]": 4.5}
    assert found.verdict == "reached"


@pytest.mark.parametrize(
    ("ratio", "floor", "verdict"),
    [
        (1.9, 1.0, "**missed** (lead)"),
        (2.0, 1.6, "**missed** (floor)"),
        (1.0, 1.6, "**missed** (lead and floor)"),
        (2.0, 1.5, "reached"),
        (3.0, 1.0, "stretch"),
        (2.5, None, "reached"),
    ],
)
def test_a_goal_asks_for_lead_and_floor(ratio, floor, verdict):
    (found,) = outcomes([row("torch", 1.0), row(BF16, ratio, times_floor=floor)], [GOAL])
    assert found.verdict == verdict


def test_small_tables_are_held_to_the_floor_of_the_large_ones():
    goal = Goal(model="m", batch=8, engine=INT8, must=1, stretch=2, peers=("torch",), most_floor=0.45, floor_of=BF16)
    rows = [row("torch", 1.0), row("openvino-bf16", 9.0), row(BF16, 1.5), row(INT8, 2.0, floor_ms=3.0, times_floor=1.4)]
    (found,) = outcomes(rows, [goal])
    assert (found.peer, found.lead, found.over_floor) == ("torch", 2.0, pytest.approx(0.42))
    (unknown,) = outcomes([row("torch", 1.0), row(INT8, 2.0)], [goal])
    assert unknown.over_floor is None


def test_rows_of_different_runs_are_never_compared():
    rows = [row("torch", 1.0, time="a"), row(BF16, 9.0, time="b"), row("torch", 4.0, time="b")]
    (found,) = outcomes(rows, [GOAL])
    assert found.lead == 2.25
    assert outcomes(rows[:2], [GOAL]) == []
    assert outcomes([row("torch", 1.0, batch=1), row(BF16, 2.0, model="other")], [GOAL]) == []


def test_engines_that_did_not_run_and_scenarios_tell_nothing():
    rows = [row("torch", 1.0), row(BF16, 2.0), {"engine": "openvino-bf16", "batch": 8, "not_run": "why", "model": "m"}]
    (found,) = outcomes([*rows, row("torch-bf16", 9.0, kind="scenario")], [GOAL])
    assert found.peer == "torch"


def test_the_table_names_engines_by_their_number_formats():
    text = markdown(outcomes([row("torch", 1.0), row(FP32, 1.5), row(BF16, 2.5)], [GOAL]))
    assert text.splitlines()[2:] == [
        "| m, 8 | `fp32+bf16` | `torch` | 2.50 | 2 | 3 | 1.20 | 1.5 | reached | `fp32` 1.50 |"
    ]


def test_text_is_put_between_its_marks_and_can_be_replaced(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"above\n{BEGIN}\nold\n{END}\nbelow\n")
    write_between(page, BEGIN, END, "new")
    write_between(page, BEGIN, END, "newer")
    assert page.read_text() == f"above\n{BEGIN}\n\nnewer\n{END}\nbelow\n"
    page.write_text(END + BEGIN)
    with pytest.raises(ConfigError, match="has no place for the text"):
        write_between(page, BEGIN, END, "new")


def test_the_page_of_the_project_has_a_place_for_the_goals(pytestconfig):
    text = (pytestconfig.rootpath / "docs" / "performance.md").read_text()
    assert 0 < text.index(BEGIN) < text.index(END)
