"""MlpInt8: the reference is what docs/operators.md says, and the PyTorch form has its bits."""

import re

import numpy as np
import pytest
import torch
from int8_layers import CASES, random_layers, same_bits, spelled_out

from dlrm_deploy.errors import BatchError
from dlrm_deploy.ops import reference
from dlrm_deploy.ops.torch_int8 import code_type, mlp_int8

LONG = ("many_inputs", "largest_sums_of_many")


def torch_form(x, layers, *, relu_last=True):
    tensors = [tuple(torch.from_numpy(part) for part in layer) for layer in layers]
    return mlp_int8(torch.from_numpy(x), tensors, relu_last).numpy()


@pytest.mark.parametrize("relu_last", [False, True])
@pytest.mark.parametrize("case", [name for name in CASES if name not in LONG])
def test_the_reference_is_the_contract_number_by_number(case, relu_last):
    x, layers = CASES[case]
    assert same_bits(reference.mlp_int8(x, layers, relu_last=relu_last), spelled_out(x, layers, relu_last))


@pytest.mark.parametrize("relu_last", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_the_torch_form_has_the_reference_s_bits(case, relu_last):
    x, layers = CASES[case]
    expected = reference.mlp_int8(x, layers, relu_last=relu_last)
    assert same_bits(torch_form(x, layers, relu_last=relu_last), expected)


def test_sums_of_as_many_inputs_as_float32_takes_are_still_exact():
    """2^24 is passed behind 1040 products of the largest codes: there the type changes."""
    assert (code_type(1040), code_type(1041)) == (torch.float32, torch.float64)
    rng = np.random.default_rng(0)
    for inputs in (1040, 1041, 4000):
        weight = rng.choice(np.array([-127, -126, 126, 127], np.int8), (3, inputs), p=[0.05, 0.05, 0.45, 0.45])
        x = rng.choice(np.array([125, 126, 127], np.float32), (2, inputs))
        x[:, 0] = 127
        total = x.astype(np.int64) @ weight.astype(np.int64).T
        assert (total % 2 == 1).any()
        layer = weight, np.ones(3, np.float32), np.zeros(3, np.float32)
        for form in (torch_form, reference.mlp_int8):
            np.testing.assert_array_equal(form(x, [layer]), total.astype(np.float32))


@pytest.mark.parametrize("form", [reference.mlp_int8, torch_form])
def test_a_sample_that_is_not_finite_gives_nan_and_leaves_the_others_alone(form):
    layers = random_layers(6, 5, 4)
    layers[0] = np.zeros_like(layers[0][0]), *layers[0][1:]  # nothing of the sample is in any sum
    x = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)
    before = form(x, layers, relu_last=False)
    x[1, 2], x[3, 5] = np.nan, -np.inf
    after = form(x, layers, relu_last=False)
    assert np.isnan(after[[1, 3]]).all()
    np.testing.assert_array_equal(after[[0, 2]], before[[0, 2]])


@pytest.mark.parametrize("form", [reference.mlp_int8, torch_form])
def test_samples_do_not_depend_on_one_another(form):
    x, layers = CASES["chain"]
    rows = [form(x[i : i + 1], layers) for i in range(len(x))]
    np.testing.assert_array_equal(np.concatenate(rows), form(x, layers))


def arguments(x=(2, 3), weights=((4, 3), (1, 4)), scales=(4, 1), biases=(4, 1), types=(np.int8, np.float32)):
    code, real = types
    shapes = zip(weights, scales, biases, strict=True)
    return np.ones(x, np.float32), [(np.ones(w, code), np.ones(s, real), np.ones(b, real)) for w, s, b in shapes]


@pytest.mark.parametrize("form", [reference.mlp_int8, torch_form])
def test_layers_that_do_not_follow_one_another_are_refused(form):
    assert form(*arguments()).shape == (2, 1)
    most = 131_073
    for given, message in (
        (arguments(x=(2, 4)), "weight 0 has 3 columns for 4 inputs, expected as many"),
        (arguments(x=(2, 0), weights=((4, 0), (1, 4))), "weight 0 has 0 columns for 0 inputs"),
        (arguments(x=(1, most), weights=((4, most), (1, 4))), f"weight 0 has {most} columns for {most} inputs"),
        (arguments(weights=((4, 3), (1, 5))), "weight 1 has 5 columns for 4 inputs"),
        (arguments(scales=(4, 2)), "scale 1 has 2 values for the 1 rows of its weight"),
        (arguments(biases=(3, 1)), "bias 0 has 3 values for the 4 rows of its weight"),
        (arguments(x=(2,)), "x must be float32 of rank 2, got float32 (2,)"),
        (arguments(types=(np.uint8, np.float32)), "weight 0 must be int8 of rank 2, got uint8 (4, 3)"),
        (arguments(types=(np.int8, np.float64)), "scale 0 must be float32 of rank 1, got float64 (4,)"),
        ((np.ones((2, 3), np.float32), []), "an MlpInt8 needs at least one layer"),
    ):
        with pytest.raises(BatchError, match=re.escape(message)):
            form(*given)
