"""The rule of `auto`, condition by condition."""

import numpy as np
import pytest

from dlrm_deploy.export.formats_choice import LEAST_SAVING, PartRows, choose, lines
from dlrm_deploy.tables import TablePart


def part_of(rows, tmp_path, before=0):
    """A file with other rows before those of the part."""
    path = tmp_path / "rows.bin"
    np.concatenate([np.full((before, rows.shape[1]), np.nan, np.float32), rows]).tofile(path)
    return PartRows(TablePart(name="t", rows=len(rows), width=rows.shape[1], ids=len(rows)), path, before)


def normal(rows, width):
    return np.random.default_rng(0).standard_normal((rows, width), np.float32)


def test_wide_rows_of_a_large_table_become_int8_and_the_error_is_measured(tmp_path):
    choice = choose("auto", part_of(normal(20_000, 32), tmp_path, before=3))
    assert choice.format == "int8"
    assert 0.003 < choice.error.relative_rms < 0.006
    assert choice.reason == "36 bytes a row instead of 128, 1.50 cache lines instead of 2.00"


def test_rows_of_one_cache_line_stay_fp32(tmp_path):
    choice = choose("auto", part_of(normal(100_000, 16), tmp_path))
    assert choice.format == "fp32"
    assert "a row of int8 touches 1.25 cache lines, of fp32 1.00" in choice.reason
    assert choice.error is None


def test_a_table_that_would_save_little_stays_fp32(tmp_path):
    rows = LEAST_SAVING // 92 - 1  # 92 bytes of 128 are saved
    assert choose("auto", part_of(normal(rows, 32), tmp_path)).reason.startswith(f"int8 would save {rows * 92} bytes")
    assert choose("auto", part_of(normal(rows + 2, 32), tmp_path)).format == "int8"


def test_rows_with_one_far_value_become_fp16_because_int8_is_too_coarse(tmp_path):
    rows = normal(8_000, 256) / np.float32(100)
    rows[:, 5] = 1
    choice = choose("auto", part_of(rows, tmp_path))
    assert choice.format == "fp16"
    assert choice.error.relative_rms < 1e-3
    assert choice.reason.startswith("int8 makes a relative RMS error of 0.01")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
def test_rows_that_neither_format_holds_stay_fp32(value, tmp_path):
    rows = normal(40_000, 64)
    rows[33_333, 7] = value
    choice = choose("auto", part_of(rows, tmp_path))
    expected = "fp16" if not np.isfinite(value) else "fp32"  # fp16 keeps what is not finite
    assert choice.format == expected
    assert "table 't': row 33333: int8 cannot store" in choice.reason


def test_a_format_by_name_is_taken_where_it_makes_rows_smaller(tmp_path):
    assert choose("int4", part_of(normal(3, 1), tmp_path)).format == "fp32"
    assert choose("int8", part_of(normal(3, 2), tmp_path)).format == "int8"
    assert choose("fp16", part_of(normal(3, 1), tmp_path)).format == "fp16"
    assert choose("fp32", part_of(normal(3, 9), tmp_path)).format == "fp32"


@pytest.mark.parametrize(("size", "expected"), [(64, 1), (128, 2), (4, 1), (20, 1.25), (36, 1.5), (68, 2), (256, 4)])
def test_lines_are_those_that_rows_touch_on_average(size, expected):
    rows = 64 * 64
    touched = [(i * size + size - 1) // 64 - i * size // 64 + 1 for i in range(rows)]
    assert lines(size) == pytest.approx(np.mean(touched))
    assert lines(size) == pytest.approx(expected, abs=0.07)
