"""The operators inside ONNX Runtime: what they accept, what they compute, and what they say when something is wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from awkward import BagCase, awkward_bags, computed_bags, csr_case, fixed_case
from one_node import DOMAIN, bag_attributes, bag_inputs, feed, one_node_model, session
from onnx import helper

from dlrm_deploy.ops.reference import dot_interaction


def run_bag(case: BagCase, **attributes: Any) -> np.ndarray:
    inputs = bag_inputs(case)
    model = one_node_model("TableBatchedEmbeddingBag", inputs, bag_attributes(case, **attributes))
    return session(model).run(None, feed(inputs))[0]


def run_interaction(dense: np.ndarray, embeddings: np.ndarray, **attributes: Any) -> np.ndarray:
    inputs = {"dense": dense, "embeddings": embeddings}
    return session(one_node_model("DotInteraction", inputs, attributes)).run(None, inputs)[0]


@pytest.mark.parametrize("case", awkward_bags(), ids=lambda case: case.name)
def test_awkward_bags_equal_the_reference(case):
    np.testing.assert_array_equal(run_bag(case), case.expected())


@pytest.mark.parametrize("policy", ["error", "modulo"])
def test_rows_are_computed_from_ids_like_the_reference_s(policy):
    for case in computed_bags(policy):
        np.testing.assert_array_equal(run_bag(case), case.expected(), err_msg=case.name)


def test_one_session_takes_any_batch_size():
    inputs = bag_inputs(csr_case("any", [[1], [1], [1]]))
    bags = session(one_node_model("TableBatchedEmbeddingBag", inputs, bag_attributes(csr_case("any", [[1], [1], [1]]))))
    for batch in (0, 1, 2, 37, 2048):
        case = csr_case("batch", [[1, 2] * batch, [0, 1] * batch, [3, 0] * batch], seed=batch)
        seen = bags.run(None, feed(bag_inputs(case) | {"weights": case.weights}))[0]
        np.testing.assert_array_equal(seen, case.expected())


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("self_interaction", [0, 1])
def test_interaction_equals_the_reference(self_interaction, threads):
    rng = np.random.default_rng(1)
    model = None
    for batch in (0, 1, 37, 300):
        dense = rng.standard_normal((batch, 16)).astype(np.float32)
        embeddings = rng.standard_normal((batch, 26, 16)).astype(np.float32)
        inputs = {"dense": dense, "embeddings": embeddings}
        model = model or session(
            one_node_model("DotInteraction", inputs, {"self_interaction": self_interaction}), threads
        )
        expected = dot_interaction(dense, embeddings, self_interaction=bool(self_interaction))
        np.testing.assert_allclose(model.run(None, inputs)[0], expected, rtol=0, atol=1e-5)


def test_the_kernel_is_preferred_to_a_function_body_of_the_same_name():
    """The precedence that one portable model file relies on: observed, not documented, so it is held here."""
    case = fixed_case("one", [1], 3, rows=(4,))
    inputs = bag_inputs(case)
    marker = helper.make_node("Constant", [], ["pooled"], value_floats=[42.0])
    body = helper.make_function(
        DOMAIN, "TableBatchedEmbeddingBag", ["weights", "indices", "offsets", "per_sample_weights"], ["pooled"],
        [marker], [helper.make_opsetid("", 18)], list(bag_attributes(case)),
    )  # fmt: skip
    model = one_node_model("TableBatchedEmbeddingBag", inputs, bag_attributes(case), [body])
    np.testing.assert_array_equal(session(model).run(None, feed(inputs))[0], case.expected())
    stock = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    assert stock.run(None, feed(inputs))[0].tolist() == [42.0]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"indices": np.ones(3, np.float32)}, "indices has element type 1, expected int32 or int64"),
        ({"offsets": np.array([0, 1, 3], np.int32)}, "offsets has element type 6, expected that of indices, 7"),
        ({"indices": np.ones((3, 1), np.int64)}, r"indices has shape \[3, 1\], expected rank 1"),
        ({"weights": np.ones(5, np.float32)}, r"weights has shape \[5\], expected rank 2"),
        ({"offsets": np.array([[0, 1, 3]], np.int64)}, r"offsets has shape \[1, 3\], expected rank 1"),
        ({"offsets": np.array([0, 3, 1], np.int64)}, r"offsets\[2\] is 1 after 3"),
        ({"offsets": np.array([1, 2, 3], np.int64)}, "must begin with 0, got 1"),
        ({"offsets": np.array([0, 2, 2], np.int64)}, "must end with the number of ids, 3, got 2"),
        ({"offsets": np.zeros(0, np.int64)}, "offsets has 0 values"),
        ({"offsets": None}, "neither offsets nor pooling_factors are given"),
        ({"per_sample_weights": np.ones(2, np.float32)}, "per_sample_weights has 2 values, expected one per id: 3"),
        ({"per_sample_weights": np.ones((3, 1), np.float32)}, r"per_sample_weights has shape \[3, 1\]"),
        ({"weights": np.ones((4, 2), np.float32)}, r"reads rows \[0, 5\), but weights has 4 rows"),
        ({"indices": np.array([0, 1, 5])}, r"'item', sample 1, position 1 of its bag: id 5 is outside \[0, 5\)"),
        ({"indices": np.array([0, -1, 5])}, r"'item', sample 1, position 0 of its bag: id -1 is outside \[0, 5\)"),
    ],
)  # fmt: skip
def test_bad_inputs_are_errors_that_say_what_is_wrong(changed, message):
    case = csr_case("case", [[1, 2]], rows=(5,))
    inputs = bag_inputs(case) | changed
    model = one_node_model("TableBatchedEmbeddingBag", inputs, bag_attributes(case, feature_names="item"))
    with pytest.raises(Exception, match=message):
        session(model).run(None, feed(inputs))


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"rows": [5, 5]}, "attribute rows has 2 values, expected one per slot: 1"),
        ({"features": [3]}, r"feature 3 of slot 0 is outside \[0, 1\)"),
        ({"num_features": 0}, "num_features is 0, expected at least 1"),
        ({"index_policy": "wrap"}, "expected error, clamp, modulo or zero"),
        ({"index_policy": 1}, "attribute index_policy is of another type than string"),
        ({"feature_names": [1, 2]}, "attribute feature_names is of another type than string"),
        ({"feature_names": "a\nb"}, "attribute feature_names has 2 values, expected one per feature: 1"),
        ({"pooling_factors": [1, 2]}, "attribute pooling_factors has 2 values, expected one per feature: 1"),
        ({"divisors": [1, 1]}, "attribute divisors has 2 values, expected one per slot: 1"),
        ({"ids": [0]}, "attribute ids of slot 0 is 0, expected 1 to 4611686018427387904"),
        ({"ids": 9}, "attribute ids is empty or of another type than ints"),
        ({"divisions": "exact"}, "attribute divisions is empty or of another type than ints"),
        ({"moduli": [2.0]}, "attribute moduli is empty or of another type than ints"),
        ({"rows": None}, "attribute rows is missing"),
        ({"mean": None}, "attribute mean is missing"),
    ],
)
def test_a_node_with_inconsistent_attributes_does_not_load(attributes, message):
    case = csr_case("case", [[1, 2]], rows=(5,))
    merged = {name: value for name, value in (bag_attributes(case) | attributes).items() if value is not None}
    with pytest.raises(Exception, match=message):
        session(one_node_model("TableBatchedEmbeddingBag", bag_inputs(case), merged))


@pytest.mark.parametrize(
    ("dense", "embeddings", "message"),
    [
        ((2, 4), (3, 5, 4), r"embeddings has shape \[3, 5, 4\], expected \[2, T, 4\]"),
        ((2, 4), (2, 5, 3), r"expected \[2, T, 4\] to go with dense \[2, 4\]"),
        ((2, 4), (2, 4), r"embeddings has shape \[2, 4\], expected rank 3"),
        ((8,), (2, 5, 4), r"dense has shape \[8\], expected rank 2"),
    ],
)
def test_interaction_of_shapes_that_do_not_match_is_an_error(dense, embeddings, message):
    with pytest.raises(Exception, match=message):
        run_interaction(np.ones(dense, np.float32), np.ones(embeddings, np.float32))


def test_interaction_with_an_unknown_self_interaction_does_not_load():
    with pytest.raises(Exception, match="self_interaction is 2, expected 0 or 1"):
        run_interaction(np.ones((1, 2), np.float32), np.ones((1, 1, 2), np.float32), self_interaction=2)


def test_each_session_runs_on_the_path_that_was_named_when_it_was_opened(native, monkeypatch):
    rng = np.random.default_rng(2)
    dense = rng.standard_normal((37, 64)).astype(np.float32)
    embeddings = rng.standard_normal((37, 26, 64)).astype(np.float32)
    expected = {path: native.dot_interaction(dense, embeddings, path) for path in native.kernel_paths()}
    if len({scores.tobytes() for scores in expected.values()}) == 1:
        pytest.skip("the paths of this CPU cannot be told apart by their rounding")
    for path in expected:
        monkeypatch.setenv("DLRM_DEPLOY_KERNEL", path)
        np.testing.assert_array_equal(run_interaction(dense, embeddings), expected[path], err_msg=path)


def in_process(script: str, kernel: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"DLRM_DEPLOY_KERNEL": kernel}
    return subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)


REGISTER = """
import ctypes, dlrm_deploy, onnxruntime
path = dlrm_deploy.get_library_path()
onnxruntime.SessionOptions().register_custom_ops_library(path)
name = ctypes.CDLL(path).dlrm_deploy_kernel_path
name.restype = ctypes.c_char_p
print(name().decode())
"""


def test_the_environment_pins_a_kernel_path(path):
    done = in_process(REGISTER, path)
    assert done.stdout.strip() == path, done.stderr


def test_an_unknown_kernel_path_in_the_environment_is_refused_when_the_library_is_registered():
    done = in_process(REGISTER, "mmx")
    assert done.returncode != 0
    assert 'DLRM_DEPLOY_KERNEL: kernel path "mmx" is not one that this library has; choose from:' in done.stderr


TILE_PERMISSION = """
import ctypes, dlrm_deploy
ctypes.CDLL(dlrm_deploy.get_library_path()).dlrm_deploy_kernel_path()
ARCH_PRCTL, ARCH_GET_XCOMP_PERM, TILE_DATA = 158, 0x1022, 18
features = ctypes.c_uint64()
assert ctypes.CDLL(None).syscall(ARCH_PRCTL, ARCH_GET_XCOMP_PERM, ctypes.byref(features)) == 0
print(features.value >> TILE_DATA & 1)
"""


def test_only_the_amx_path_asks_the_system_for_tile_registers(native):
    if "amx" not in native.kernel_paths():
        pytest.skip("this CPU does not support amx")
    assert [in_process(TILE_PERMISSION, path).stdout.strip() for path in ("amx", "avx512", "scalar")] == ["1", "0", "0"]
