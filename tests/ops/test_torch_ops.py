"""The PyTorch form against the NumPy reference; gradients against finite differences; one node under torch.export."""

import re

import numpy as np
import pytest
import torch
from awkward import computed_bags, csr_case, fixed_case, out_of_range_bags, stored_bags, stored_case

from dlrm_deploy.errors import BatchError
from dlrm_deploy.formats import ROW_FORMATS, decode, encode, to_bf16
from dlrm_deploy.ops import reference, torch_ops
from dlrm_deploy.ops.contract import BagAttributes

bag_op = torch.ops.dlrm_deploy.table_batched_embedding_bag
dot_op = torch.ops.dlrm_deploy.dot_interaction

# Slots of three features; table a is rows 0 to 4 of the group, table b rows 5 to 11.
SLOTS = {
    "in_order": {"features": [0, 1, 2], "row_starts": [0, 5, 0], "rows": [5, 7, 5]},
    "subset_and_repeated": {"features": [2, 0, 2], "row_starts": [5, 0, 0], "rows": [7, 5, 5]},
}
BAGS = {
    "uneven": [[3, 0, 1, 2], [0, 0, 5, 1], [2, 2, 2, 2]],
    "all_empty": [[0] * 4] * 3,
    "one_id": [[1] * 4] * 3,
    "fixed": [[2] * 4, [1] * 4, [3] * 4],
    "one_sample": [[1], [0], [4]],
    "no_samples": [[], [], []],
}


def make(bags, policy="error", dtype=np.int64, width=3, weighted=False):
    rng = np.random.default_rng(3)
    lengths = np.array(BAGS[bags], int).reshape(3, -1)
    low, high = (0, 5) if policy == "error" else (-9, 20)
    indices = rng.integers(low, high, lengths.sum()).astype(dtype)
    offsets = np.concatenate([[0], np.cumsum(lengths.reshape(-1))]).astype(dtype)
    weights = rng.normal(size=(12, width)).astype(np.float32)
    return weights, indices, offsets, rng.normal(size=indices.size).astype(np.float32) if weighted else None


def node(slots, mean, policy, factors=None):
    """The attributes of a call, in the order of the schema."""
    attributes = BagAttributes(num_features=3, **slots, mean=mean, pooling_factors=factors, index_policy=policy)
    return attributes.schema_values()


def run(weights, indices, offsets, per_sample, slots, mean, policy, factors=None):
    tensors = [None if a is None else torch.from_numpy(a) for a in (weights, indices, offsets, per_sample)]
    return bag_op(*tensors, *node(slots, mean, policy, factors)).numpy()


@pytest.mark.parametrize("policy", ["error", "clamp", "modulo", "zero"])
@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize("bags", BAGS)
@pytest.mark.parametrize("pooling", ["sum", "weighted", "mixed"])
def test_matches_the_reference(policy, slots, bags, pooling):
    dtype = np.int32 if policy == "modulo" else np.int64
    weights, indices, offsets, per_sample = make(bags, policy, dtype, weighted=pooling == "weighted")
    mean = [1, 0, 1] if pooling == "mixed" else [0, 0, 0]
    expected = reference.table_batched_embedding_bag(
        weights,
        indices,
        offsets,
        num_features=3,
        **SLOTS[slots],
        mean=mean,
        index_policy=policy,
        per_sample_weights=per_sample,
    )
    actual = run(weights, indices, offsets, per_sample, SLOTS[slots], mean, policy)
    assert actual.shape == expected.shape
    # At most 5 terms of size 4, in any order: 5 * 2**-24 * 20 = 6e-6.
    np.testing.assert_allclose(actual, expected, rtol=0, atol=6e-6)


@pytest.mark.parametrize("factors", [[2, 1, 3], [2, 2, 2]])
@pytest.mark.parametrize("batch_size", [0, 1, 4])
def test_fixed_form_matches_the_reference(factors, batch_size):
    rng = np.random.default_rng(4)
    weights = rng.normal(size=(12, 2)).astype(np.float32)
    indices = rng.integers(0, 5, batch_size * sum(factors))
    slots = SLOTS["in_order"]
    expected = reference.table_batched_embedding_bag(
        weights, indices, None, num_features=3, **slots, mean=[0, 1, 0], pooling_factors=factors
    )
    actual = run(weights, indices, None, None, slots, [0, 1, 0], "error", factors)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("policy", ["error", "clamp", "modulo", "zero"])
def test_computed_rows_are_the_reference_s(policy):
    for case in computed_bags(policy):
        arrays = (case.weights, case.indices, case.offsets, case.per_sample_weights)
        attributes = BagAttributes(**{"pooling_factors": None, **case.attributes})
        tensors = [None if a is None else torch.from_numpy(a) for a in arrays]
        actual = bag_op(*tensors, *attributes.schema_values()).numpy()
        # At most 3 terms of size 5, in any order: 3 * 2**-24 * 15 = 2.7e-6.
        np.testing.assert_allclose(actual, case.expected(), rtol=0, atol=3e-6, err_msg=case.name)


def test_weights_receive_their_gradient_at_the_computed_rows():
    weights = torch.zeros(9, 2, requires_grad=True)
    digits = {"features": [0, 0, 1], "row_starts": [0, 4, 7], "rows": [4, 3, 2], "mean": [0, 0, 0]}
    attributes = BagAttributes(
        num_features=2, **digits, ids=[12, 12, 50], divisors=[3, 1, 1], moduli=[0, 0, 40],
        pooling_factors=None, index_policy="zero",
    )  # fmt: skip
    ids = torch.tensor([11, 4, 12, 41]), torch.tensor([0, 1, 3, 4, 4])
    pooled = bag_op(weights, *ids, None, *attributes.schema_values())
    pooled.backward(torch.arange(12.0).view(2, 3, 2))
    assert weights.grad._indices().tolist() == [[3, 1, 4 + 2, 4 + 1, 7 + 1]]  # id 12 was dropped
    assert weights.grad._values().tolist() == [[0, 1], [6, 7], [2, 3], [8, 9], [4, 5]]


@pytest.mark.parametrize("divisor", [2, 3, 4, 7, 49, 60, 1000])
def test_division_1_is_what_pytorch_computes(divisor):
    k = np.random.default_rng(divisor).integers(0, 2**31 // divisor, 20_000)
    near_multiples = [k * divisor, k * divisor + 1, (k + 1) * divisor - 1]
    ids = np.concatenate([*near_multiples, [2**24 + 1, 2**31 - 1]])
    expected = (torch.from_numpy(ids) / divisor).long()
    a = BagAttributes(
        num_features=1, features=[0], row_starts=[0], rows=[2**31], divisors=[divisor], divisions=[1], mean=[0],
        pooling_factors=[1], index_policy="error",
    )  # fmt: skip
    np.testing.assert_array_equal(reference._rows_of(ids, a, 0), expected)
    np.testing.assert_array_equal(torch_ops._resolve_bags(torch.from_numpy(ids), None, a).rows, expected)
    assert divisor in (2, 4) or (expected.numpy() != ids // divisor).any()


def test_error_policy_names_the_first_bad_id_like_the_reference():
    weights = np.zeros((12, 2), np.float32)
    for slots in SLOTS.values():
        indices, offsets = np.array([1, 9, 0, 8, -1, 2]), np.array([0, 0, 2, 3, 3, 5, 6])
        with pytest.raises(BatchError) as expected:
            reference.table_batched_embedding_bag(weights, indices, offsets, num_features=3, **slots, mean=[0] * 3)
        with pytest.raises(BatchError, match=re.escape(str(expected.value))):
            run(weights, indices, offsets, None, slots, [0] * 3, "error")


def test_error_policy_names_the_id_as_given_and_the_slot_with_the_fewest_ids():
    slots = {"features": (0, 0, 0), "row_starts": (0, 0, 0), "rows": (2, 2, 2), "mean": (0, 0, 0)}
    for moduli in ((0, 0, 3), (0, 0, 20)):
        call = {"num_features": 1, **slots, "ids": (8, 6, 4), "moduli": moduli, "pooling_factors": (1,)}
        with pytest.raises(BatchError) as expected:
            reference.table_batched_embedding_bag(np.zeros((2, 1), np.float32), np.array([1, 25]), None, **call)
        attributes = BagAttributes(**call, index_policy="error")
        with pytest.raises(BatchError, match=re.escape(str(expected.value))):
            bag_op(torch.zeros(2, 1), torch.tensor([1, 25]), None, None, *attributes.schema_values())


def test_zero_policy_drops_nan_weights_of_ids_outside():
    weights, offsets = np.ones((12, 1), np.float32), np.array([0, 2, 3, 3])
    per_sample = np.array([np.nan, 2, np.inf], np.float32)
    pooled = run(weights, np.array([7, 0, 1]), offsets, per_sample, SLOTS["in_order"], [0] * 3, "zero")
    np.testing.assert_array_equal(pooled[0, :, 0], [2, np.inf, 0])


# The operators take float32 only. They are polynomials of degree two, of which central differences are exact at any
# step: a large one keeps rounding (2**-24 * 50 per output) out of the quotient.
FLOAT32 = {"eps": 0.5, "atol": 1e-4, "rtol": 1e-4}


class DenseGradient(torch.autograd.Function):
    """Identity with a dense gradient, because gradcheck takes no sparse one."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad.to_dense()


@pytest.mark.filterwarnings("ignore:Input #. requires gradient and is not a double")
@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize("policy", ["error", "clamp", "modulo", "zero"])
@pytest.mark.parametrize("pooling", ["weighted", "mixed"])
def test_gradients_match_finite_differences(slots, policy, pooling):
    weights, indices, offsets, per_sample = make("uneven", policy, width=2, weighted=pooling == "weighted")
    slot = SLOTS[slots]
    attributes = node(slot, [1, 0, 1] if pooling == "mixed" else [0, 0, 0], policy)
    ids = torch.from_numpy(indices), torch.from_numpy(offsets)
    weights = torch.from_numpy(weights).requires_grad_()
    per_sample = None if per_sample is None else torch.from_numpy(per_sample).requires_grad_()

    def pool(weights, per_sample=None):
        return bag_op(DenseGradient.apply(weights), *ids, per_sample, *attributes)

    inputs = (weights,) if per_sample is None else (weights, per_sample)
    assert torch.autograd.gradcheck(pool, inputs, **FLOAT32)


def test_weights_receive_one_sparse_row_per_id_that_was_read():
    weights = torch.zeros(12, 2, requires_grad=True)
    ids = torch.tensor([4, 4, 30, 2]), torch.tensor([0, 2, 3, 4])
    slot = SLOTS["in_order"]
    bag_op(weights, *ids, None, *node(slot, [1, 0, 0], "zero")).sum().backward()
    assert weights.grad.is_sparse
    assert not weights.grad.is_coalesced()
    assert weights.grad._indices().tolist() == [[4, 4, 2]]  # id 30 was dropped; slot 2 reads table a again
    assert weights.grad._values().tolist() == [[0.5, 0.5], [0.5, 0.5], [1, 1]]


@pytest.mark.parametrize("self_interaction", [False, True])
@pytest.mark.parametrize("shape", [(0, 2, 3), (1, 1, 1), (5, 0, 4), (7, 4, 3)])
def test_interaction_matches_the_reference(shape, self_interaction):
    rng = np.random.default_rng(5)
    dense = rng.normal(size=(shape[0], shape[2])).astype(np.float32)
    embeddings = rng.normal(size=shape).astype(np.float32)
    expected = reference.dot_interaction(dense, embeddings, self_interaction=self_interaction)
    actual = dot_op(torch.from_numpy(dense), torch.from_numpy(embeddings), self_interaction).numpy()
    assert actual.shape == expected.shape
    # 4 * 2**-23 * 4 terms of size 9 at most.
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-5)


@pytest.mark.filterwarnings("ignore:Input #. requires gradient and is not a double")
@pytest.mark.parametrize("self_interaction", [False, True])
@pytest.mark.parametrize("slots", [0, 3])
def test_interaction_gradients_match_finite_differences(self_interaction, slots):
    torch.manual_seed(6)
    inputs = torch.randn(2, 3, requires_grad=True), torch.randn(2, slots, 3, requires_grad=True)
    assert torch.autograd.gradcheck(lambda d, e: dot_op(d, e, self_interaction), inputs, **FLOAT32)


def test_ops_pass_the_checks_of_torch_library():
    weights, indices, offsets, per_sample = (torch.from_numpy(a) for a in make("uneven", weighted=True))
    slot = SLOTS["subset_and_repeated"]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        bag_op,
        (weights.requires_grad_(), indices, offsets, per_sample, *node(slot, [0] * 3, "clamp")),
        test_utils=checks,
    )
    dense, embeddings = torch.ones(2, 3, requires_grad=True), torch.ones(2, 4, 3)
    torch.library.opcheck(dot_op, (dense, embeddings, True), test_utils=checks)


def test_plain_functions_and_custom_ops_are_one_implementation():
    weights, indices, offsets, _ = (a if a is None else torch.from_numpy(a) for a in make("uneven"))
    slots = SLOTS["in_order"]
    attributes = BagAttributes(num_features=3, **slots, mean=[0] * 3, pooling_factors=None, index_policy="error")
    pooled = torch_ops.pool_bags(weights, indices, offsets, None, attributes)
    assert torch.equal(pooled, bag_op(weights, indices, offsets, None, *attributes.schema_values()))


def pool_stored(case):
    attributes = BagAttributes(**{"pooling_factors": None, **case.attributes})
    arrays = (case.indices, case.offsets, case.per_sample_weights)
    tensors = [None if a is None else torch.from_numpy(a) for a in arrays]
    matrices = {format: torch.from_numpy(matrix) for format, matrix in case.matrices.items()}
    return torch_ops.pool_bags(matrices, *tensors, attributes).numpy()


@pytest.mark.parametrize("case", stored_bags(), ids=lambda case: case.name)
def test_stored_rows_are_pooled_bit_for_bit_like_the_reference_s(case):
    np.testing.assert_array_equal(pool_stored(case), case.expected())


@pytest.mark.parametrize("policy", ["clamp", "modulo", "zero"])
def test_stored_rows_follow_the_index_policy(policy):
    for case in out_of_range_bags(policy):
        formats = ("int8", "fp32", "int4")[: len(case.attributes["features"])]
        stored = stored_case(case, formats)
        np.testing.assert_array_equal(pool_stored(stored), stored.expected(), err_msg=stored.name)


def test_stored_rows_are_decoded_some_bags_at_a_time(monkeypatch):
    cases = [
        csr_case("ragged", [[3, 0, 50, 1], [0, 0, 0, 0], [2, 9, 9, 9]], width=6, mean=(1, 0, 0)),
        csr_case("weighted", [[3, 0, 50, 1], [0, 4, 0, 4], [2, 9, 9, 9]], width=6, weighted=True),
        fixed_case("some_features", [2, 1, 2], 30, rows=(7, 3), features=(2, 1), width=6, weighted=True),
    ]
    rows_at_once = []
    decode_rows = torch_ops.decode_rows

    def counted(format, stored, width):
        rows_at_once.append(len(stored))
        return decode_rows(format, stored, width)

    monkeypatch.setattr(torch_ops, "_DECODED_VALUES", 6 * 10)
    monkeypatch.setattr(torch_ops, "decode_rows", counted)
    for case in cases:
        stored = stored_case(case, ("int8", "int8", "int4")[: len(case.attributes["features"])])
        rows_at_once.clear()
        np.testing.assert_array_equal(pool_stored(stored), stored.expected(), err_msg=case.name)
        assert len(rows_at_once) > 4
        assert sum(rows > 10 for rows in rows_at_once) == (50 in rows_at_once)  # a bag is never cut


@pytest.mark.parametrize("format", ROW_FORMATS)
@pytest.mark.parametrize("width", [1, 7, 64])
def test_rows_are_decoded_like_the_reference_s(format, width):
    rows = np.random.default_rng(0).standard_normal((50, width)).astype(np.float32)
    stored = encode(format, rows)
    for some in (slice(0, 50), slice(3, 4), slice(3, 3)):  # one row of odd width ends at an odd address
        decoded = torch_ops.decode_rows(format, torch.from_numpy(stored[some]), width)
        np.testing.assert_array_equal(decoded.numpy(), decode(format, stored[some], width))


def test_the_op_for_training_refuses_rows_that_are_not_fp32():
    case = stored_case(csr_case("csr", [[1], [1], [1]]), ("int8", "int8", "fp32"))
    with pytest.raises(BatchError, match="the PyTorch op reads fp32 rows only, got fp32, int8. Use pool_bags."):
        BagAttributes(pooling_factors=None, **case.attributes).schema_values()


@pytest.mark.parametrize("relu_last", [False, True])
@pytest.mark.parametrize("batch", [0, 1, 33])
def test_mlp_is_the_reference_s_within_the_rounding_of_its_sums(batch, relu_last):
    rng = np.random.default_rng(5)
    x = rng.standard_normal((batch, 70)).astype(np.float32)
    weight = to_bf16(rng.standard_normal((40, 70)).astype(np.float32))
    bias = rng.standard_normal(40).astype(np.float32)
    layer = torch.from_numpy(weight).view(torch.bfloat16), torch.from_numpy(bias)
    actual = torch_ops.mlp(torch.from_numpy(x), [layer], relu_last).numpy()
    # 71 roundings of sums of at most 71 terms, each below 2^-24 of their sizes' sum, about 70 * 0.64.
    np.testing.assert_allclose(actual, reference.mlp(x, [(weight, bias)], relu_last=relu_last), rtol=0, atol=2e-4)
    assert batch == 0 or (actual.min() < 0) != relu_last


def test_mlp_rounds_the_inputs_of_every_layer_like_the_reference_s():
    one, minus = torch.ones(1, 1, dtype=torch.bfloat16), -torch.ones(1, 1, dtype=torch.bfloat16)
    zero, step = torch.zeros(1), torch.tensor([2.0**-8])
    x = torch.tensor([[1 + 2**-8], [1 + 3 * 2**-8], [-3.0], [torch.nan], [torch.inf]])
    layers = [(one, zero), (minus, step), (minus, zero)]
    arrays = [(to_bf16(weight.float().numpy()), bias.numpy()) for weight, bias in layers]
    for count in (1, 2, 3):
        for relu_last in (False, True):
            actual = torch_ops.mlp(x, layers[:count], relu_last).numpy()
            expected = reference.mlp(x.numpy(), arrays[:count], relu_last=relu_last)
            np.testing.assert_array_equal(actual, expected)
