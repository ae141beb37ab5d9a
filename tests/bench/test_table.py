from __future__ import annotations

import io

import pytest
from rich.console import Console

from dlrm_deploy.bench.rows import BenchReport
from dlrm_deploy.bench.table import print_report


def printed(report: BenchReport) -> str:
    out = io.StringIO()
    print_report(report, Console(file=out, width=40, highlight=False))  # narrower than the table
    return out.getvalue()


def test_the_table_has_every_engine_and_batch_and_is_not_cut(make_report):
    lines = printed(make_report()).splitlines()
    heading = next(i for i, line in enumerate(lines) if line.startswith("batch  engine"))
    assert lines[heading].split("  ")[-1].strip() == "calls"
    words = [line.split() for line in lines[heading + 1 : heading + 5]]
    assert words == [
        ["4", "torch", "4.000", "4.000", "4.000", "1,000", "1.00", "1.00-1.00", "4386", "1"],
        ["onnxruntime", "2.000", "2.000", "2.000", "2,000", "2.00", "2.00-2.00", "2193", "1"],
        ["64", "torch", "64.000", "64.000", "64.000", "1,000", "1.00", "1.00-1.00", "4386", "1"],
        ["onnxruntime", "32.000", "32.000", "32.000", "2,000", "2.00", "2.00-2.00", "2193", "1"],
    ]


def test_threads_cpu_commit_and_calibration_stand_beside_the_numbers(make_report):
    text = printed(make_report())
    assert "kaggle: 2.16 GB of tables, 2 threads per engine, uniform ids, 1 rounds of 1 ms" in text
    assert "Quick 9000, 8 cores; dlrm-deploy 1.2 at abc1234" in text
    assert "64-byte rows GB/s" in text
    assert "AMX" not in text  # this machine has none
    assert ["4", "200", "10.0", "5.0"] in [line.split() for line in text.splitlines()]
    assert text.endswith("Again: dlrm-deploy bench b\n")
    assert "1 thread per" in printed(make_report(threads=1))


def test_what_did_not_run_is_listed_with_its_reason(make_report):
    text = printed(make_report())
    assert "tensorrt was not run: no GPU" in text
    assert "tensorrt-rtx was not run at batch 64: too long" in text


def test_number_formats_in_brackets_are_no_markup(make_report):
    assert "onnxruntime[int8,bf16]  " in printed(make_report(ours="onnxruntime[int8,bf16]"))


def test_without_calibration_there_is_no_floor(make_report):
    words = [line.split() for line in printed(make_report(calibrated=False)).splitlines()]
    assert ["4", "torch", "4.000", "4.000", "4.000", "1,000", "1.00", "1.00-1.00", "1"] in words


@pytest.mark.parametrize(
    ("facts", "remark"),
    [
        ({"max_abs_difference": 2e-6}, "onnxruntime differs from torch by up to 2e-06 at batch 64"),
        (
            {"max_abs_difference": 2e-3, "spread_error": 0.025},
            "onnxruntime differs from torch by up to 0.002 (2.5% of the spread of the logits) at batch 64",
        ),
        ({"other_load": 0.4}, "Other processes used 40% at batch 4, 40% at batch 64 of the machine"),
        ({"omp_wait_policy": "ACTIVE"}, "OMP_WAIT_POLICY is active"),
        ({"calibrated": False}, "Machine not calibrated: no library"),
    ],
)
def test_what_makes_numbers_doubtful_is_pointed_out_and_nothing_else(make_report, facts, remark):
    assert remark in printed(make_report(**facts))
    assert remark not in printed(make_report())
    assert remark not in printed(make_report(max_abs_difference=1e-6, other_load=None, omp_wait_policy="PASSIVE"))
