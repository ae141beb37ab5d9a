"""Every error of docs/operators.md, in every form that can be called with it: reference, PyTorch op and kernel."""

import dataclasses
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from awkward import csr_case

from dlrm_deploy.errors import BatchError
from dlrm_deploy.ops import reference, torch_ops

sys.path.insert(0, str(Path(__file__).parents[1] / "engines" / "native"))
from native_calls import Native, NativeError


def ids(*values, dtype=np.int64):
    return np.array(values, dtype)


def torch_bags(weights, indices, offsets, *, per_sample_weights=None, pooling_factors=None, **attributes):
    arrays = (weights, indices, offsets, per_sample_weights)
    tensors = [torch.from_numpy(a) if isinstance(a, np.ndarray) else a for a in arrays]
    names = ("num_features", "features", "row_starts", "rows", "mean")
    values = [attributes[name] for name in names]
    torch_ops.table_batched_embedding_bag(*tensors, *values, pooling_factors, attributes["index_policy"])


def torch_interaction(dense, embeddings):
    torch_ops.dot_interaction(torch.from_numpy(dense), torch.from_numpy(embeddings), False)


BAGS = {"reference": reference.table_batched_embedding_bag, "torch": torch_bags}
INTERACTIONS = {"reference": reference.dot_interaction, "torch": torch_interaction}
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
        ({"mean": [0]}, "need one value per slot, and at least one slot, got 2, 2, 2 and 1"),
        ({name: [] for name in ("features", "row_starts", "rows", "mean")}, "at least one slot, got 0, 0, 0 and 0"),
        ({"mean": [0, 2]}, "slot 1: mean must be 0 or 1, got 2"),
        ({"mean": [-1, 0]}, "slot 0: mean must be 0 or 1, got -1"),
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
