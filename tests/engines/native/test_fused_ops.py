"""Stored rows and the fused operator inside ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from awkward import MIXES, csr_case, fixed_case, stored_bags, stored_case
from one_node import bag_attributes, bag_inputs, feed, one_node_model, session

BAG, FUSED = "TableBatchedEmbeddingBag", "EmbeddingBagDotInteraction"


def int8_case(**options: Any):
    return stored_case(csr_case("case", [[1, 2]], rows=(5,), **options), ["int8"])


def run(operator: str, inputs: dict[str, np.ndarray | None], attributes: dict[str, Any], outputs=("output",)):
    return session(one_node_model(operator, inputs, attributes, outputs=outputs)).run(None, feed(inputs))


def fused_inputs(case, seed: int = 1) -> dict[str, np.ndarray | None]:
    batch = case.expected().shape[0]
    dense = np.random.default_rng(seed).standard_normal((batch, case.width)).astype(np.float32)
    return {"dense": dense, **bag_inputs(case)}


@pytest.mark.parametrize("case", stored_bags()[::3], ids=lambda case: case.name)
def test_stored_rows_are_pooled_like_the_reference(case):
    np.testing.assert_array_equal(run(BAG, bag_inputs(case), bag_attributes(case))[0], case.expected())


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
@pytest.mark.parametrize("form", ["csr", "fixed"])
def test_the_fused_node_equals_the_two_nodes_bit_for_bit(mix, form):
    rows, lengths = (50, 1, 60), np.random.default_rng(2).integers(0, 5, (3, 200)).tolist()
    options = {"rows": rows, "width": 16}
    case = csr_case("csr", lengths, **options) if form == "csr" else fixed_case("fixed", [1, 3, 2], 200, **options)
    case = stored_case(case, [mix[t % len(mix)] for t in range(3)])
    inputs = fused_inputs(case)
    for self_interaction in (0, 1):
        two = {"dense": inputs["dense"], "embeddings": case.expected()}
        (expected,) = run("DotInteraction", two, {"self_interaction": self_interaction})
        attributes = bag_attributes(case, self_interaction=self_interaction)
        (alone,) = run(FUSED, inputs, attributes)
        np.testing.assert_array_equal(alone, expected)
        fused, pooled = run(FUSED, inputs, attributes, ("output", "pooled"))
        np.testing.assert_array_equal(fused, expected)
        np.testing.assert_array_equal(pooled, case.expected())


def test_one_fused_session_takes_any_batch_size():
    case = csr_case("any", [[1], [1]], rows=(5, 7))
    fused = session(one_node_model(FUSED, fused_inputs(case), bag_attributes(case)))
    for batch in (0, 1, 2, 37, 2048):
        case = csr_case("batch", [[1, 2] * batch, [0, 1] * batch], rows=(5, 7), seed=batch)
        inputs = fused_inputs(case)
        (expected,) = run("DotInteraction", {"dense": inputs["dense"], "embeddings": case.expected()}, {})
        np.testing.assert_array_equal(fused.run(None, feed(inputs))[0], expected)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"weights_int8": np.zeros((5, 4), np.uint8)}, r"weights_int8 has shape \[5, 4\], expected rows of 8 values"),
        ({"weights_int8": np.zeros(40, np.uint8)}, r"weights_int8 has shape \[40\], expected rank 2"),
        ({"weights_int8": np.zeros((4, 8), np.uint8)}, r"reads rows \[0, 5\), but weights_int8 has 4 rows"),
        ({"weights_int8": None}, "reads rows .* but weights_int8 is missing"),
        ({"weights": np.zeros((5, 3), np.float32)}, r"weights has shape \[5, 3\], expected rows of 4 values"),
        ({"dense": np.ones((3, 4), np.float32)}, r"dense has shape \[3, 4\], expected \[2, 4\]"),
        ({"dense": np.ones((2, 5), np.float32)}, r"dense has shape \[2, 5\], expected \[2, 4\]"),
        ({"dense": np.ones(8, np.float32)}, r"dense has shape \[8\], expected rank 2"),
        ({"offsets": np.array([0, 3, 1], np.int64)}, r"offsets\[2\] is 1 after 3"),
        ({"indices": np.array([0, 1, 5])}, r"sample 1, position 1 of its bag: id 5 is outside \[0, 5\)"),
    ],
)
def test_bad_inputs_are_errors_that_say_what_is_wrong(changed, message):
    case = int8_case()
    inputs = fused_inputs(case) | changed
    with pytest.raises(Exception, match=message):
        run(FUSED, inputs, bag_attributes(case))


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"formats": [3, 3]}, "attribute formats has 2 values, expected one per slot: 1"),
        ({"formats": [9]}, "attribute formats of slot 0 is 9, expected 0 to 4"),
        ({"formats": 3}, "attribute formats is empty or of another type than ints"),
        ({"formats": None}, "attribute width is 4, expected the embedding width where formats is given"),
        ({"width": None}, "attribute width is 0, expected the embedding width where formats is given"),
        ({"width": -4}, "attribute width is -4, expected 1 to"),
        ({"width": 4.0}, "attribute width is of another type than int"),
        ({"self_interaction": "no"}, "attribute self_interaction is of another type than int"),
        ({"self_interaction": 2}, "attribute self_interaction is 2, expected 0 or 1"),
    ],
)
def test_a_node_with_inconsistent_attributes_does_not_load(attributes, message):
    case = int8_case()
    merged = {name: value for name, value in (bag_attributes(case) | attributes).items() if value is not None}
    with pytest.raises(Exception, match=message):
        session(one_node_model(FUSED, fused_inputs(case), merged))


def test_rows_of_another_element_type_are_refused():
    case = stored_case(csr_case("case", [[1, 2]], rows=(5,)), ["fp16"])
    inputs = bag_inputs(case)
    model = one_node_model(BAG, inputs, bag_attributes(case))
    model.graph.initializer[0].data_type = 4  # uint16
    with pytest.raises(Exception, match="weights_fp16"):
        session(model).run(None, feed(inputs))
