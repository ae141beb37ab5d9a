"""Every error of docs/operators.md, in every form that can be called with it: reference, PyTorch op and kernel."""

import dataclasses
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from awkward import csr_case

from dlrm_deploy.config import FeatureConfig, ModelConfig, TableConfig
from dlrm_deploy.errors import BatchError
from dlrm_deploy.formats import encode, to_bf16
from dlrm_deploy.ops import reference, torch_ops
from dlrm_deploy.ops.contract import BagAttributes

sys.path.insert(0, str(Path(__file__).parents[1] / "engines" / "native"))
from native_calls import Native, NativeError


def ids(*values, dtype=np.int64):
    return np.array(values, dtype)


def torch_bags(weights, indices, offsets, *, per_sample_weights=None, pooling_factors=None, **attributes):
    arrays = (weights, indices, offsets, per_sample_weights)
    tensors = [torch.from_numpy(a) if isinstance(a, np.ndarray) else a for a in arrays]
    node = BagAttributes(pooling_factors=pooling_factors, **attributes)
    torch_ops.table_batched_embedding_bag(*tensors, *node.schema_values())


def torch_interaction(dense, embeddings):
    torch_ops.dot_interaction(torch.from_numpy(dense), torch.from_numpy(embeddings), False)


BAGS = {"reference": reference.table_batched_embedding_bag, "torch": torch_bags}
INTERACTIONS = {"reference": reference.dot_interaction, "torch": torch_interaction}
TENSORS = ("weights", "indices", "offsets")
VALID = {
    "weights": np.ones((6, 2), np.float32),
    "indices": ids(0, 1),
    "offsets": ids(0, 1, 2),
    "num_features": 2,
    "features": [0, 1],
    "row_starts": [0, 4],
    "rows": [4, 2],
    "mean": [0, 0],
    "index_policy": "error",
}


@pytest.mark.parametrize("form", BAGS)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": np.ones((6, 2))}, "weights must be float32 of rank 2, got float64 (6, 2)"),
        ({"weights": np.ones((6, 2), np.int64)}, "weights must be float32 of rank 2, got int64 (6, 2)"),
        ({"weights": np.ones(6, np.float32)}, "weights must be float32 of rank 2, got float32 (6,)"),
        ({"indices": ids(0, 0, dtype=np.int16)}, "indices must be int32 or int64 of rank 1, got int16 (2,)"),
        ({"indices": ids([0, 0])}, "indices must be int32 or int64 of rank 1, got int64 (1, 2)"),
        ({"offsets": ids(0, 1, 2, dtype=np.int32)}, "offsets must be int64 of rank 1, got int32 (3,)"),
        ({"offsets": ids(0, 1, 2, 2)}, "offsets must have 2 * B + 1 values, got 4"),
        ({"offsets": ids()}, "offsets must have 2 * B + 1 values, got 0"),
        ({"offsets": ids(0, 1, 1)}, "offsets must rise from 0 to 2"),
        ({"offsets": ids(1, 1, 2)}, "offsets must rise from 0 to 2"),
        ({"offsets": ids(0, 3, 2)}, "offsets must rise from 0 to 2"),
        ({"offsets": None}, "give either offsets or pooling_factors"),
        ({"pooling_factors": [1, 1]}, "give either offsets or pooling_factors"),
        ({"offsets": None, "pooling_factors": [2, 1]}, "2 ids are not a multiple of 3"),
        ({"offsets": None, "pooling_factors": [1]}, "pooling_factors must be 2 numbers"),
        ({"offsets": None, "pooling_factors": [0, 0]}, "not all zero, got [0, 0]"),
        ({"offsets": None, "pooling_factors": [3, -1]}, "pooling_factors must be 2 numbers"),
        ({"features": [0, 2]}, "slot 1: feature 2 is outside [0, 2)"),
        ({"features": [-1, 1]}, "slot 0: feature -1 is outside [0, 2)"),
        ({"rows": [4, 3]}, "slot 1: rows 4 to 7 are not within the 6 rows"),
        ({"row_starts": [-1, 4]}, "slot 0: rows -1 to 3 are not within the 6 rows"),
        ({"rows": [0, 2]}, "slot 0: rows 0 to 0"),
        ({"mean": [0]}, "mean has 1 values, expected one per slot: 2"),
        ({"rows": [4]}, "rows has 1 values, expected one per slot: 2"),
        ({"ids": [4]}, "ids has 1 values, expected one per slot: 2"),
        ({"divisions": [0, 0, 0]}, "divisions has 3 values, expected one per slot: 2"),
        ({name: [] for name in ("features", "row_starts", "rows", "mean")}, "features is empty, at least one slot"),
        ({"mean": [0, 2]}, "slot 1: mean must be in [0, 1], got 2"),
        ({"mean": [-1, 0]}, "slot 0: mean must be in [0, 1], got -1"),
        ({"ids": [4, 0]}, "slot 1: ids must be in [1, 4611686018427387904], got 0"),
        ({"ids": [2**62 + 1, 2]}, "slot 0: ids must be in [1, 4611686018427387904], got 4611686018427387905"),
        ({"moduli": [0, -1]}, "slot 1: moduli must be in [0, 9223372036854775807], got -1"),
        ({"divisors": [0, 1]}, "slot 0: divisors must be in [1, 9223372036854775807], got 0"),
        ({"divisions": [0, 3]}, "slot 1: divisions must be in [0, 2], got 3"),
        ({"num_features": 0}, "num_features must be at least 1"),
        ({"index_policy": "wrap"}, "index_policy must be one of error, clamp, modulo, zero, got 'wrap'"),
        ({"per_sample_weights": np.ones(3, np.float32)}, "per_sample_weights has 3 values for 2 ids"),
        ({"per_sample_weights": np.ones(2)}, "per_sample_weights must be float32 of rank 1, got float64 (2,)"),
        ({"per_sample_weights": np.ones(2, np.float32), "mean": [0, 1]}, "go with sum pooling"),
    ],
)
def test_bags_outside_the_contract_are_refused_with_the_same_words(form, changes, message):
    BAGS[form](**VALID)
    with pytest.raises(BatchError, match=re.escape(message)):
        BAGS[form](**{**VALID, **changes})


def stored(**changes):
    """A valid call with an int8 and a bf16 slot, and what is changed of it."""
    rows = np.ones((5, 3), np.float32)
    matrices = {"bf16": encode("bf16", rows), "int8": encode("int8", rows)} | changes.pop("matrices", {})
    slots = {**VALID, "row_starts": [1, 2], "rows": [4, 2], "formats": [3, 2], "width": 3}
    return {**slots, "weights": {name: matrix for name, matrix in matrices.items() if matrix is not None}, **changes}


def as_tensor(array):
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.uint16 else tensor


def check_as_tensors(weights, indices, offsets, *, pooling_factors=None, per_sample_weights=None, **attributes):
    matrices = {name: as_tensor(matrix) for name, matrix in weights.items()}
    node = BagAttributes(pooling_factors=pooling_factors, **attributes)
    node.check(matrices, torch.from_numpy(indices), torch.from_numpy(offsets), per_sample_weights)


@pytest.mark.parametrize("form", [reference.table_batched_embedding_bag, check_as_tensors])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"matrices": {"int8": None}}, "slot 0: its rows are int8, but weights_int8 is not given"),
        ({"matrices": {"bf16": None}}, "slot 1: its rows are bf16, but weights_bf16 is not given"),
        ({"formats": [0, 2]}, "slot 0: its rows are fp32, but weights is not given"),
        ({"matrices": {"int8": np.ones((5, 3), np.uint8)}}, "weights_int8 has 3 columns, expected 7: int8 rows of 3"),
        ({"matrices": {"bf16": np.ones((5, 4), np.uint16)}}, "weights_bf16 has 4 columns, expected 3: bf16 rows of 3"),
        ({"matrices": {"fp32": np.ones((5, 4), np.float32)}}, "weights has 4 columns, expected 3: fp32 rows of 3"),
        ({"matrices": {"int8": np.ones((5, 7), np.int8)}}, "weights_int8 must be uint8 of rank 2, got int8 (5, 7)"),
        ({"matrices": {"bf16": np.ones((5, 3), np.float16)}}, "weights_bf16 must be bfloat16 or uint16 of rank 2"),
        ({"matrices": {"fp16": np.ones((5, 3), np.float32)}}, "weights_fp16 must be float16 of rank 2, got float32"),
        ({"rows": [5, 2]}, "slot 0: rows 1 to 6 are not within the 5 rows of weights_int8"),
        ({"row_starts": [1, 4]}, "slot 1: rows 4 to 6 are not within the 5 rows of weights_bf16"),
        ({"formats": [3]}, "formats has 1 values, expected one per slot: 2"),
        ({"formats": [3, 5]}, "slot 1: formats must be in [0, 4], got 5"),
        ({"formats": [-1, 2]}, "slot 0: formats must be in [0, 4], got -1"),
        ({"width": None}, "width is missing; rows that are not fp32 need it"),
        ({"width": 0}, "width must be at least 1, got 0"),
        ({"width": 4}, "weights_bf16 has 3 columns, expected 4"),
    ],
)
def test_stored_rows_outside_the_contract_are_refused(form, changes, message):
    form(**stored())
    with pytest.raises(BatchError, match=re.escape(message)):
        form(**stored(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"features": (0, 2)},
        {"features": (-1, 1)},
        {"features": (), "row_starts": (), "rows": (), "mean": ()},
        {"rows": (4, 3)},
        {"rows": (0, 2)},
        {"row_starts": (-1, 4)},
        {"mean": (0, 2)},
        {"mean": (-1, 0)},
        {"ids": (4, 0)},
        {"ids": (2**62 + 1, 2)},
        {"moduli": (0, -1)},
        {"divisors": (0, 1)},
        {"divisors": (-2, 1)},
        {"divisions": (0, 3)},
        {"divisions": (-1, 0)},
        {"index_policy": "wrap"},
        {"pooling_factors": (1, 1)},
    ],
    ids=str,
)
def test_what_one_form_refuses_every_form_refuses(changes):
    case = csr_case("case", [[1, 2], [0, 1]], rows=(4, 2))
    changed = dataclasses.replace(case, attributes={**case.attributes, **changes})
    for form in (reference.table_batched_embedding_bag, torch_bags):
        form(case.weights, case.indices, case.offsets, **case.attributes)
        with pytest.raises(BatchError):
            form(case.weights, case.indices, case.offsets, **changed.attributes)
    native = Native()
    native.embedding_bag(case, "scalar")
    with pytest.raises(NativeError):
        native.embedding_bag(changed, "scalar")


def model(**options):
    tables = (
        TableConfig(name="user", rows=60, width=4, partition="quotient-remainder", part_rows=(3, 4, 5)),
        TableConfig(name="item", rows=7, width=4),
    )
    features = (
        FeatureConfig(name="item", table="item", modulo=7),
        FeatureConfig(name="user", table="user", pooling="mean"),
        FeatureConfig(name="friend", table="user"),
    )
    config = {"dense_features": ("age",), "bottom_mlp": (4,), "top_mlp": (1,), "index_policy": "zero"}
    return ModelConfig(name="m", tables=tables, features=features, **(config | options))


def test_attributes_of_a_model_are_those_of_its_parts_in_slot_order():
    (group,) = model().groups
    a = BagAttributes.of(model(), group)
    assert a.num_features == 3
    assert a.features == (0, 1, 2, 1, 2, 1, 2)
    assert a.row_starts == (12, 0, 0, 3, 3, 7, 7)
    assert a.rows == (7, 3, 3, 4, 4, 5, 5)
    assert a.ids == (7, *[60] * 6)
    assert a.moduli == (7, *[0] * 6)
    assert a.divisors == (1, 20, 20, 5, 5, 1, 1)
    assert a.divisions == (0,) * 7
    assert a.mean == (0, 1, 0, 1, 0, 1, 0)
    assert (a.pooling_factors, a.index_policy, a.feature_names) == (None, "zero", ("item", "user", "friend"))
    one = BagAttributes.of_ids(model(), 0, group.parts[3], 12)
    assert (one.num_features, one.features, one.rows, one.moduli, one.pooling_factors) == (1, (0,), (7,), (7,), (1,))


def test_attributes_at_their_default_do_not_stand_on_the_node():
    plain = {name: tuple(v) if isinstance(v, list) else v for name, v in VALID.items() if name not in TENSORS}
    a = BagAttributes(pooling_factors=None, **plain)
    assert a.plain
    assert a.node_attributes() == plain
    assert a.inputs() == ["weights", "indices", "offsets"]
    optional = {"ids": (9, 2), "moduli": (0, 5), "divisors": (1, 3), "divisions": (2, 0), "pooling_factors": (1, 2)}
    for name, value in optional.items():
        changed = dataclasses.replace(a, **{name: value})
        assert changed.node_attributes() == plain | {name: value}
        assert changed.plain == (name == "pooling_factors")


def test_row_starts_of_a_model_are_those_of_the_matrix_of_each_format():
    (group,) = model().groups  # parts user.0 (3 rows), user.1 (4), user.2 (5) and item (7)
    a = BagAttributes.of(model(), group, {"user.1": "int8", "item": "int8", "user.2": "fp16"})
    # Slots: item, then the parts of user for two features each.
    assert a.slot_formats == ("int8", "fp32", "fp32", "int8", "int8", "fp16", "fp16")
    assert a.row_starts == (4, 0, 0, 0, 0, 0, 0)
    assert a.used_formats == ("fp32", "fp16", "int8")
    assert a.inputs() == ["weights", "indices", "offsets", "", "weights_fp16", "", "weights_int8"]
    attributes = a.node_attributes()
    assert (attributes["formats"], attributes["width"]) == ((3, 0, 0, 3, 3, 1, 1), 4)
    without_fp32 = dataclasses.replace(a, formats=(4,) * 7, pooling_factors=(1, 1, 1))
    assert without_fp32.inputs() == ["", "indices", "", "", "", "", "", "weights_int4"]
    one = BagAttributes.of_ids(model(), 1, group.parts[1], 0, "int8")
    assert one.inputs() == ["", "indices", "", "", "", "", "weights_int8"]
    assert one.node_attributes()["width"] == 4


def test_a_model_of_fp32_tables_has_the_node_it_always_had():
    (group,) = model().groups
    assert BagAttributes.of(model(), group) == BagAttributes.of(model(), group, {"item": "fp32"})
    assert not {"formats", "width"} & set(BagAttributes.of(model(), group).node_attributes())
    assert BagAttributes.of(model(), group).inputs() == ["weights", "indices", "offsets"]


def test_matrices_that_no_slot_reads_have_the_group_s_width_too():
    matrices = {"fp32": VALID["weights"], "int8": np.ones((9, 6), np.uint8)}
    reference.table_batched_embedding_bag(**{**VALID, "weights": matrices})
    with pytest.raises(BatchError, match="weights_int8 has 5 columns, expected 6: int8 rows of 2 values"):
        reference.table_batched_embedding_bag(**{**VALID, "weights": matrices | {"int8": np.ones((9, 5), np.uint8)}})


def test_what_is_no_array_is_refused():
    with pytest.raises(BatchError, match="offsets must be int64 of rank 1, got list"):
        reference.table_batched_embedding_bag(**{**VALID, "offsets": [0, 1, 2]})


@pytest.mark.parametrize("form", INTERACTIONS)
def test_interaction_refuses_what_does_not_match(form):
    interact, dense = INTERACTIONS[form], np.ones((2, 3), np.float32)
    interact(dense, np.ones((2, 4, 3), np.float32))
    for shape in ((2, 4, 2), (3, 4, 3)):
        with pytest.raises(BatchError, match=re.escape(f"do not match: (2, 3) and {shape}.")):
            interact(dense, np.ones(shape, np.float32))
    with pytest.raises(BatchError, match=r"embeddings must be float32 of rank 3, got float32 \(2, 3\)"):
        interact(dense, dense)
    with pytest.raises(BatchError, match=r"embeddings must be float32 of rank 3, got float64 \(2, 4, 3\)"):
        interact(dense, np.ones((2, 4, 3)))
    with pytest.raises(BatchError, match=r"dense must be float32 of rank 2, got float64 \(2, 3\)"):
        interact(dense.astype(np.float64), np.ones((2, 4, 3), np.float32))


def test_fused_interaction_refuses_dense_vectors_that_do_not_fit_the_bags():
    reference.embedding_bag_dot_interaction(np.ones((1, 2), np.float32), **VALID)
    for dense, message in (
        (np.ones((2, 2), np.float32), "dense has shape (2, 2), expected [B, D] of the bags: (1, 2)"),
        (np.ones((1, 3), np.float32), "dense has shape (1, 3), expected [B, D] of the bags: (1, 2)"),
        (np.ones((1, 2)), "dense must be float32 of rank 2, got float64 (1, 2)"),
    ):
        with pytest.raises(BatchError, match=re.escape(message)):
            reference.embedding_bag_dot_interaction(dense, **VALID)


def mlp_arguments(x=(2, 3), weights=((4, 3), (1, 4)), biases=(4, 1), dtype=np.float32):
    layers = [(to_bf16(np.ones(w, np.float32)), np.ones(b, dtype)) for w, b in zip(weights, biases, strict=True)]
    return np.ones(x, np.float32), layers


def torch_mlp(x, layers):
    return torch_ops.mlp(torch.from_numpy(x), [(as_tensor(weight), as_tensor(bias)) for weight, bias in layers])


@pytest.mark.parametrize("form", [reference.mlp, torch_mlp])
def test_mlp_refuses_layers_that_do_not_follow_one_another(form):
    assert tuple(form(*mlp_arguments()).shape) == (2, 1)
    x, layers = mlp_arguments()
    for arguments, message in (
        (mlp_arguments(x=(2, 4)), "weight 0 has 3 columns for 4 inputs"),
        (mlp_arguments(x=(2, 0), weights=((4, 0), (1, 4))), "weight 0 has 0 columns for 0 inputs"),
        (mlp_arguments(weights=((4, 3), (1, 5))), "weight 1 has 5 columns for 4 inputs"),
        (mlp_arguments(biases=(4, 2)), "bias 1 has 2 values for the 1 rows of its weight"),
        (mlp_arguments(x=(2,)), "x must be float32 of rank 2, got float32 (2,)"),
        (mlp_arguments(dtype=np.float64), "bias 0 must be float32 of rank 1, got float64 (4,)"),
        ((x, [(np.ones((4, 3), np.float32), layers[0][1])]), "weight 0 must be bfloat16 or uint16 of rank 2"),
        ((x, []), "an Mlp needs at least one layer"),
    ):
        with pytest.raises(BatchError, match=re.escape(message)):
            form(*arguments)
