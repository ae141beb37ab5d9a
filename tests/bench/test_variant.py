from __future__ import annotations

import pytest

from dlrm_deploy.bench.variant import Variant, label_of
from dlrm_deploy.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "label", "again"),
    [
        ("tables=int8,mlp=bf16", "onnxruntime[int8,bf16]", "tables=int8,mlp=bf16"),
        ("mlp=bf16", "onnxruntime[fp32,bf16]", "tables=fp32,mlp=bf16"),
        ("tables=int8,mlp=int8", "onnxruntime[int8,int8]", "tables=int8,mlp=int8"),
        (" tables=auto", "onnxruntime[auto,fp32]", "tables=auto,mlp=fp32"),
    ],
)
def test_a_variant_is_read_named_and_written(text, label, again):
    variant = Variant.parse(text)
    assert (variant.label, str(variant)) == (label, again)
    assert Variant.parse(str(variant)) == variant


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int8", "'int8' is not of the form tables=int8,mlp=bf16"),
        ("tables=int8,tables=int4", "not of the form"),
        ("tables=int2", "tables must be one of fp32, fp16, bf16, int8, int4, auto, got 'int2'"),
        ("mlp=fp16", "mlp must be one of fp32, bf16, int8, got 'fp16'"),
        ("tables=fp32", "both fp32, which is the bundle itself"),
        ("", "not of the form"),
    ],
)
def test_anything_else_is_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        Variant.parse(text)


def test_an_engine_in_fp32_has_no_brackets():
    assert label_of("torch", "fp32", "fp32") == "torch"
    assert label_of("torch", "int8", "fp32") == "torch[int8,fp32]"
