"""Row formats: what is stored, what is read back, what is refused; bytes against FBGEMM where it is installed."""

import re

import ml_dtypes
import numpy as np
import pytest
import torch

from dlrm_deploy.config import FeatureConfig, ModelConfig, TableConfig
from dlrm_deploy.errors import FormatError
from dlrm_deploy.formats import (
    ROW_FORMATS,
    GroupLayout,
    decode,
    encode,
    file_name,
    from_bf16,
    row_bytes,
    stored_columns,
    stored_dtype,
    tensor_name,
    to_bf16,
)

CODES = {"int8": 255, "int4": 15}


def rows_of(width: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Rows that are easy to store wrongly, all of which can be stored in each format."""
    rng = np.random.default_rng(seed)
    normal = rng.standard_normal((200, width))
    sizes = np.exp(rng.uniform(-40, 9, (200, 1)))
    rows = {
        "random": normal,
        "constant": np.repeat(rng.choice([0, 0.1, -0.1, 1 / 3, -7.3, 1e-7, 1e-42], (200, 1)), width, axis=1),
        "of_any_size": normal * sizes,
        "subnormal": normal * 1e-42,
        "narrow_far_from_zero": normal * 1e-3 + rng.choice([0.1, -0.1, 1.1, -7.3], (200, 1)),
        "negative": -np.abs(normal) - 100,
        "whole_numbers": rng.integers(0, 256, (200, width)),
        "huge_range": rng.uniform(-65000, 65000, (200, width)),
    }
    return {name: values.astype(np.float32) for name, values in rows.items()}


def same_values(a: np.ndarray, b: np.ndarray) -> bool:
    return np.array_equal(a.view(np.uint32), b.view(np.uint32))


@pytest.mark.parametrize("width", [1, 2, 3, 5, 16, 64, 67])
@pytest.mark.parametrize("format", ROW_FORMATS)
def test_stored_rows_have_the_bytes_that_are_promised(format, width):
    stored = encode(format, rows_of(width)["random"])
    assert stored.dtype == stored_dtype(format)
    assert stored.shape == (200, stored_columns(format, width))
    assert stored[0].nbytes == row_bytes(format, width)
    expected = {
        "fp32": 4 * width,
        "fp16": 2 * width,
        "bf16": 2 * width,
        "int8": width + 4,
        "int4": (width + 1) // 2 + 4,
    }
    assert row_bytes(format, width) == expected[format]


def quantized_one_by_one(row: np.ndarray, most: int) -> tuple[list[int], np.float16, np.float16]:
    """Codes, scale and bias of one row, a value at a time."""
    bias = np.float16(min(row))
    scale = np.float16((max(row) - np.float32(bias)) / np.float32(most))
    if scale == 0:
        scale = np.float16(1)
    inverse = np.float32(1) / np.float32(scale)
    codes = [int(np.clip(np.rint((value - np.float32(bias)) * inverse), 0, most)) for value in row]
    return codes, scale, bias


@pytest.mark.parametrize("width", [1, 3, 8, 17])
@pytest.mark.parametrize("format", CODES)
def test_quantized_rows_follow_the_formula_value_by_value(format, width):
    for name, rows in rows_of(width).items():
        stored = encode(format, rows)
        for row, bytes_ in zip(rows[:40], stored[:40], strict=True):
            codes, scale, bias = quantized_one_by_one(row, CODES[format])
            if format == "int4":
                codes += [0] * (width % 2)
                codes = [low | high << 4 for low, high in zip(codes[::2], codes[1::2], strict=True)]
            tail = np.array([scale, bias], "<f2").view(np.uint8).tolist()
            assert bytes_.tolist() == codes + tail, name


@pytest.mark.parametrize("width", [1, 3, 16, 33])
@pytest.mark.parametrize("format", CODES)
def test_a_value_is_its_code_times_scale_plus_bias_fused_or_not(format, width):
    for name, rows in rows_of(width).items():
        stored = encode(format, rows)
        tail = stored[:, -4:].copy().view("<f2").astype(np.float64)
        codes = stored[:, :-4]
        if format == "int4":
            codes = np.stack([codes & 15, codes >> 4], axis=2).reshape(len(stored), -1)[:, :width]
        fused = (codes * tail[:, :1] + tail[:, 1:]).astype(np.float32)  # exact in float64, rounded once
        assert same_values(decode(format, stored, width), fused), name


@pytest.mark.parametrize("format", CODES)
def test_quantized_values_are_within_half_a_step_and_the_rounding_of_scale_and_bias(format):
    rows = rows_of(64)["random"]
    stored = encode(format, rows)
    scale, bias = np.abs(stored[:, -4:].copy().view("<f2").astype(np.float64)).T
    most = CODES[format]
    # The scale is off by 2^-11 of itself, so the largest code by most * 2^-11 steps where it is cut off at the top.
    bound = scale * (0.5 + most * 2**-11) + 2**-23 * (most * scale + bias)
    error = np.abs(decode(format, stored, 64).astype(np.float64) - rows).max(axis=1)
    assert (error <= bound).all()
    assert error.max() > 0.3 * scale.min()  # the bound is not idle


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("width", [4, 16, 64, 68, 132])
def test_quantized_bytes_are_fbgemm_s(bits, width):
    pytest.importorskip("fbgemm_gpu", reason="fbgemm-gpu-cpu is not installed")
    quantize = torch.ops.fbgemm.FloatOrHalfToFusedNBitRowwiseQuantizedSBHalf
    for name, rows in rows_of(width).items():
        expected = quantize(torch.from_numpy(rows), bits).numpy()
        np.testing.assert_array_equal(encode(f"int{bits}", rows), expected, err_msg=name)


@pytest.mark.parametrize("format", CODES)
def test_a_bias_above_all_values_makes_a_negative_scale(format):
    row = np.full((1, 6), -0.1, np.float32)  # float16 has -0.09998
    stored = encode(format, row)
    scale, bias = stored[0, -4:].copy().view("<f2")
    assert bias > row[0, 0]
    assert scale < 0
    np.testing.assert_allclose(decode(format, stored, 6), row, rtol=0, atol=1e-6)  # bias alone is 2.4e-5 off


def test_fp16_is_the_nearest_float16():
    values = np.array([[1 + 2**-11, 1 + 3 * 2**-11, 65519.9, 2**-25, 2**-25 * 1.01, 5e-8, np.inf, -np.inf]], np.float32)
    expected = [1, 1 + 2**-9, 65504, 0, 2**-24, 2**-24, np.inf, -np.inf]
    assert encode("fp16", values).tolist() == [expected]
    assert np.isnan(encode("fp16", np.array([[np.nan]], np.float32))).all()


def test_bf16_is_the_nearest_bfloat16_and_nan_stays_nan():
    rng = np.random.default_rng(0)
    values = rng.integers(0, 2**32, (1000, 8), dtype=np.uint32).view(np.float32)
    values = np.where(np.isfinite(values) & (np.abs(values) > 3.38e38), 1, values)
    values[0] = [1 + 2**-8, 1 + 3 * 2**-8, np.inf, -np.inf, 1e-40, 0, -0.0, 2**-133]
    values[1] = np.array([0x7F800001, 0xFF800001, 0x7FFFFFFF, 0xFFFFFFFF] * 2, np.uint32).view(np.float32)
    patterns = encode("bf16", values)
    with np.errstate(invalid="ignore"):
        expected = values.astype(ml_dtypes.bfloat16).astype(np.float32)
    assert same_values(np.nan_to_num(decode("bf16", patterns, 8)), np.nan_to_num(expected))
    assert np.array_equal(np.isnan(from_bf16(patterns)), np.isnan(values))
    assert np.isnan(values[1]).all()


def test_bf16_is_rounded_in_any_shape_and_memory_order():
    values = np.random.default_rng(0).standard_normal((4, 6, 5)).astype(np.float32)
    assert np.array_equal(to_bf16(values.T), to_bf16(np.ascontiguousarray(values.T)))
    assert to_bf16(values[:, ::2]).shape == (4, 3, 5)


@pytest.mark.parametrize("format", ROW_FORMATS)
@pytest.mark.parametrize("width", [1, 3, 16])
def test_rows_are_stored_one_by_one_whatever_the_block(format, width):
    rows = np.concatenate(list(rows_of(width).values()))
    rows = np.tile(rows, (50 if width == 1 else 10, 1))  # more than is encoded at a time
    whole = encode(format, rows)
    pieces = [encode(format, rows[start : start + 777]) for start in range(0, len(rows), 777)]
    assert np.array_equal(np.concatenate(pieces).view(np.uint8), whole.view(np.uint8))
    assert np.array_equal(encode(format, rows[::-1])[::-1].copy().view(np.uint8), whole.view(np.uint8))
    assert encode(format, rows[:0]).shape == (0, stored_columns(format, width))
    assert decode(format, whole[:0], width).shape == (0, width)


def test_fp32_rows_are_not_copied():
    rows = rows_of(4)["random"]
    assert encode("fp32", rows) is rows
    assert decode("fp32", rows, 4) is rows


def with_value(row: int, column: int, value: float) -> np.ndarray:
    rows = rows_of(8)["random"][:9].copy()
    rows[row, column] = value
    return rows


@pytest.mark.parametrize(
    ("format", "rows", "message"),
    [
        ("int8", with_value(4, 2, np.nan), "row 104: int8 cannot store the value nan; it stores finite values only"),
        ("int4", with_value(4, 2, np.inf), "row 104: int4 cannot store the value inf; it stores finite values only"),
        ("int8", with_value(4, 2, -np.inf), "row 104: int8 cannot store the value -inf; it stores finite values only"),
        ("int8", with_value(7, 0, -65520), "row 107: int8 cannot store the value -65520; the least value of a row"),
        ("int4", with_value(0, 7, 1e6), "row 100: int4 cannot store the range 100000"),
        ("int8", with_value(0, 7, 3e38), "a row's range over 255 becomes its scale, a float16"),
        ("int8", np.full((1, 2), 7e4, np.float32), "cannot store the value 70000"),
        ("fp16", with_value(8, 1, 65520), "row 108: fp16 cannot store the value 65520; its largest value is 65504"),
        ("bf16", with_value(8, 1, -3.4e38), "row 108: bf16 cannot store the value -3.39999995e+38; its largest value"),
    ],
)
def test_what_a_format_cannot_store_is_named(format, rows, message):
    with pytest.raises(FormatError, match=re.escape(message)) as failed:
        encode(format, rows, "table 'user'", first_row=100)
    assert str(failed.value).startswith("table 'user': row 10")
    assert "fp32" in str(failed.value)


def test_the_row_that_is_named_may_be_beyond_the_first_block():
    rows = np.ones((100_000, 2), np.float32)
    rows[99_998, 1] = np.nan
    with pytest.raises(FormatError, match="^row 99998: int8"):
        encode("int8", rows)


def test_arrays_that_are_no_rows_are_refused():
    rows = np.ones((3, 8), np.float32)
    for bad in (rows.astype(np.float64), rows[0], rows[:, :0]):
        with pytest.raises(FormatError, match=re.escape(f"rows must be float32 [R, D], got {bad.dtype} {bad.shape}")):
            encode("int8", bad)
    stored = encode("int8", rows)
    for bad in (stored[:, :-1], stored[0], stored.astype(np.int8)):
        with pytest.raises(FormatError, match=re.escape("int8 rows of 8 values are uint8 [R, 12], got")):
            decode("int8", bad, 8)
    with pytest.raises(FormatError, match="must be one of fp32, fp16, bf16, int8, int4, got 'int2'"):
        encode("int2", rows)
    for function in (row_bytes, tensor_name, file_name):
        with pytest.raises(FormatError, match="got 'int2'"):
            function(*(("int2", 8) if function is row_bytes else ("wide", "int2")))


def test_names_of_fp32_matrices_have_no_format():
    assert (tensor_name("d16", "fp32"), tensor_name("d16", "int8")) == ("tables_d16", "tables_d16_int8")
    assert (file_name("d16", "fp32"), file_name("d16", "int8")) == ("tables/d16.bin", "tables/d16.int8.bin")


def group_of_four():
    tables = [TableConfig(name=name, rows=rows, width=8) for name, rows in (("a", 10), ("b", 20), ("c", 5), ("d", 7))]
    config = ModelConfig(
        name="m", dense_features=("x",), tables=tuple(tables), bottom_mlp=(8,), top_mlp=(1,),
        features=tuple(FeatureConfig(name=table.name, table=table.name) for table in tables),
    )  # fmt: skip
    (group,) = config.groups
    return group


def test_parts_of_one_format_lie_one_after_the_other_in_the_group_s_order():
    layout = GroupLayout.of(group_of_four(), {"b": "int8", "d": "int8", "c": "fp16", "other": "int4"})
    found = [(m.format, m.rows, m.row_bytes, [part.name for part in m.parts]) for m in layout.matrices]
    assert found == [("fp32", 10, 32, ["a"]), ("fp16", 5, 16, ["c"]), ("int8", 27, 12, ["b", "d"])]
    places = [layout.place(name) for name in "abcd"]
    assert places == [("fp32", 0), ("int8", 0), ("fp16", 0), ("int8", 20)]
    assert layout.formats == ("fp32", "fp16", "int8")
    assert layout.bytes == 10 * 32 + 5 * 16 + 27 * 12


def test_a_group_without_formats_is_one_fp32_matrix_with_its_own_row_starts():
    group = group_of_four()
    for formats in (None, {}, {"a": "fp32"}):
        layout = GroupLayout.of(group, formats)
        (matrix,) = layout.matrices
        assert (matrix.rows, matrix.bytes, matrix.parts) == (group.rows, group.bytes, group.parts)
        starts = [layout.place(part.name)[1] for part in group.parts]
        assert starts == list(group.row_starts)


def test_a_layout_knows_its_formats_and_parts_only():
    with pytest.raises(FormatError, match="got 'float16'"):
        GroupLayout.of(group_of_four(), {"b": "float16"})
    with pytest.raises(KeyError):
        GroupLayout.of(group_of_four()).place("e")
