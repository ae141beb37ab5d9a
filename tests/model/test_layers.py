"""Layers of MLPs in number formats of their own."""

import numpy as np
import pytest
import torch
from int8_layers import CASES, same_bits

from dlrm_deploy.errors import FormatError
from dlrm_deploy.int8_codes import dequantize_weight, quantize_samples, quantize_weight
from dlrm_deploy.model.layers import ROUNDINGS, Int8Layer
from dlrm_deploy.ops.reference import mlp_int8


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("inputs", [7, 1500])
def test_int8_layers_have_the_operator_s_bits_and_the_weights_what_is_stored(inputs):
    layer, weights, biases = Int8Layer(), [torch.empty(5, inputs), torch.empty(3, 5)], [normal(5), normal(3)]
    values = [normal(*weight.shape, seed=i) for i, weight in enumerate(weights)]
    for weight, of in zip(weights, values, strict=True):
        layer.store(weight, of, "w")
        np.testing.assert_array_equal(weight.numpy(), dequantize_weight(*quantize_weight(of)))
    x = normal(9, inputs, seed=5)
    x[3, 0] = np.nan
    y = torch.from_numpy(x)
    for weight, bias in zip(weights, biases, strict=True):
        y = layer(y, weight, torch.from_numpy(bias)).relu()
    stored = [(*quantize_weight(of), bias) for of, bias in zip(values, biases, strict=True)]
    assert same_bits(y.numpy(), mlp_int8(x, stored))


def test_a_value_that_int8_cannot_store_is_refused_by_the_weight_s_name():
    with pytest.raises(FormatError, match="top_0, row 1: int8 cannot store the value inf"):
        Int8Layer().store(torch.empty(2, 1), np.array([[0], [np.inf]], np.float32), "top_0")


def test_int8_inputs_are_rounded_to_codes_times_step():
    x, _ = CASES["special"]
    codes, steps = quantize_samples(x)
    expected = codes.astype(np.float32) * steps[:, None]
    assert same_bits(ROUNDINGS["int8"].rounded(torch.from_numpy(x)).numpy(), expected)


@pytest.mark.parametrize("format", ROUNDINGS)
def test_no_input_is_off_by_more_than_half_the_spacing_and_zeros_have_none(format):
    x = torch.from_numpy(normal(20, 300)).relu()
    rounding = ROUNDINGS[format]
    spacing = rounding.spacing(x)
    off = (rounding.rounded(x) - x).abs()
    assert bool((off <= spacing * 0.50001).all())
    assert bool((off > spacing * 0.49).any())  # and no less
    assert bool(((spacing == 0) == (x == 0)).all())
