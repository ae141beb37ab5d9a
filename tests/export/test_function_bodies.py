import itertools
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from awkward import (
    BagCase,
    awkward_bags,
    computed_bags,
    csr_case,
    fixed_case,
    out_of_range_bags,
    stored_bags,
    stored_case,
)
from int8_layers import CASES as INT8_CASES
from int8_layers import random_layers as random_int8_layers
from int8_layers import same_bits
from onnx import TensorProto, helper, numpy_helper

from dlrm_deploy.errors import EngineError
from dlrm_deploy.export.function_bodies import (
    dot_interaction_function,
    embedding_bag_dot_interaction_function,
    embedding_bag_function,
    mlp_function,
    mlp_int8_function,
)
from dlrm_deploy.export.nodes import DOMAIN, Nodes
from dlrm_deploy.export.pooling_bodies import pool_fixed
from dlrm_deploy.formats import to_bf16
from dlrm_deploy.ops.contract import BagAttributes, matrix_input
from dlrm_deploy.ops.reference import dot_interaction, embedding_bag_dot_interaction, mlp, mlp_int8

BF16 = np.dtype(ml_dtypes.bfloat16)


def run_node(
    node: onnx.NodeProto, function: onnx.FunctionProto, feed: dict[str, np.ndarray], ranks: tuple[int, ...]
) -> list[np.ndarray]:
    """The outputs, of these ranks, of one node of our domain, run by its function body in stock ONNX Runtime.

    bfloat16 arrays are initializers: NumPy's cannot be fed.
    """
    initializers = [numpy_helper.from_array(array, name) for name, array in feed.items() if array.dtype == BF16]
    feed = {name: array for name, array in feed.items() if array.dtype != BF16}
    inputs = [
        helper.make_tensor_value_info(
            name, helper.np_dtype_to_tensor_dtype(array.dtype), [f"{name}_{axis}" for axis in range(array.ndim)]
        )
        for name, array in feed.items()
    ]
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [f"{name}_{axis}" for axis in range(rank)])
        for name, rank in zip(node.output, ranks, strict=True)
    ]
    graph = helper.make_graph([node], "test", inputs, outputs, initializers)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=10)
    onnx.checker.check_model(model)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return ort.InferenceSession(model.SerializeToString(), options).run(None, feed)


def bag_attributes(case: BagCase) -> BagAttributes:
    return BagAttributes(
        **{"pooling_factors": None, **case.attributes},
        feature_names=tuple(f"f{i}" for i in range(case.attributes["num_features"])),
        weighted=case.per_sample_weights is not None,
    )


def run_body(case: BagCase) -> np.ndarray:
    attributes = bag_attributes(case)
    node = helper.make_node(
        "TableBatchedEmbeddingBag", attributes.inputs(), ["out"], domain=DOMAIN, **attributes.node_attributes()
    )
    return run_node(node, embedding_bag_function(attributes, ""), bag_feed(case), (3,))[0]


def bag_feed(case: BagCase) -> dict[str, np.ndarray]:
    arrays = {
        "indices": case.indices,
        "offsets": case.offsets,
        "per_sample_weights": case.per_sample_weights,
        **{matrix_input(format): matrix for format, matrix in case.matrices.items()},
    }
    return {name: as_bfloat16(name, array) for name, array in arrays.items() if array is not None}


def as_bfloat16(name: str, array: np.ndarray) -> np.ndarray:
    return array.view(BF16) if name == "weights_bf16" else array


@pytest.mark.parametrize("case", awkward_bags(), ids=lambda case: case.name)
def test_embedding_bag_body_equals_the_reference_on_awkward_bags(case):
    # Where bags are scattered the order of additions is the reference's; ReduceSum may add in another order:
    # the bound for the three unit normals of a fixed bag.
    tolerance = 0 if case.offsets is not None else 3 * 2**-24 * 12
    np.testing.assert_allclose(run_body(case), case.expected(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("case", stored_bags(), ids=lambda case: case.name)
def test_embedding_bag_body_decodes_stored_rows_like_the_reference(case):
    # As above; the largest rows of a fixed bag are the unit normals.
    tolerance = 0 if case.offsets is not None else 3 * 2**-24 * 12
    np.testing.assert_allclose(run_body(case), case.expected(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("policy", ["clamp", "modulo", "zero"])
def test_embedding_bag_body_follows_the_index_policy(policy):
    for case in out_of_range_bags(policy):
        np.testing.assert_allclose(run_body(case), case.expected(), rtol=0, atol=3e-6, err_msg=case.name)


@pytest.mark.parametrize("policy", ["error", "clamp", "modulo", "zero"])
def test_embedding_bag_body_computes_rows_from_ids(policy):
    for case in computed_bags(policy):
        tolerance = 0 if case.offsets is not None else 3 * 2**-24 * 15
        np.testing.assert_allclose(run_body(case), case.expected(), rtol=0, atol=tolerance, err_msg=case.name)


def run_int32(case: BagCase) -> np.ndarray:
    """A fixed case by `pool_fixed` with ids and rows in int32, as in plans."""
    attributes = BagAttributes(**case.attributes, weighted=case.per_sample_weights is not None)
    n = Nodes()
    pool_fixed(
        n, attributes, attributes.pooling_factors, ids="indices", tables={"fp32": "weights"},
        weights="per_sample_weights", output="pooled", dtype=np.int32,
    )  # fmt: skip
    inputs = [
        helper.make_tensor_value_info("weights", TensorProto.FLOAT, ["R", "D"]),
        helper.make_tensor_value_info("indices", TensorProto.INT32, ["N"]),
    ]
    output = helper.make_tensor_value_info("pooled", TensorProto.FLOAT, ["B", "T", "D"])
    graph = helper.make_graph(n.nodes, "test", inputs, [output])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    feed = {"weights": case.weights, "indices": case.indices.astype(np.int32)}
    (result,) = ort.InferenceSession(model.SerializeToString()).run(None, feed)
    return result


@pytest.mark.parametrize("policy", ["clamp", "modulo", "zero"])
def test_rows_are_computed_in_int32_too(policy):
    compared = 0
    for case in computed_bags(policy):
        numbers = [*case.attributes["ids"], *case.attributes["moduli"], *case.attributes["divisors"]]
        if case.offsets is not None or case.per_sample_weights is not None:
            continue
        narrow = replace(case, indices=np.clip(case.indices, -(2**31), 2**31 - 1).astype(np.int32))
        if max(numbers) < 2**31:
            np.testing.assert_allclose(run_int32(narrow), narrow.expected(), rtol=0, atol=3e-6, err_msg=case.name)
            compared += 1
        else:
            with pytest.raises(EngineError, match="feature .: (ids|moduli|divisors) of its slot . is .* in int32"):
                run_int32(narrow)
    assert compared >= 5


def test_a_float32_quotient_next_to_2_to_the_31_stays_in_int32():
    case = fixed_case("most", [1], 3, rows=(5,), policy="clamp")
    case.indices[:] = 2**31 - 1, 2**31 - 2, 3
    most = {"ids": (2**31 - 1,), "divisors": (1,), "divisions": (1,)}
    case = replace(case, attributes=case.attributes | most)
    np.testing.assert_array_equal(run_int32(case), case.expected())


def test_a_plain_group_s_body_computes_nothing_from_ids():
    for case in (csr_case("csr", [[1], [2], [0]]), fixed_case("fixed", [1, 1, 2], 1)):
        attributes = BagAttributes(**{"pooling_factors": None, **case.attributes})
        operators = [node.op_type for node in embedding_bag_function(attributes, "").node]
        row = operators.index("GreaterOrEqual")
        assert operators[row + 1 : row + 4] == ["Or", "Add", "Where"]  # in range, first row of the table, refused


def test_embedding_bag_body_fails_on_ids_of_a_fixed_form_that_are_no_whole_samples_in_any_order_of_features():
    case = fixed_case("two", [2, 2], 3, rows=(5, 3), features=(1, 0))
    with pytest.raises(Exception, match="out of data bounds"):
        run_body(replace(case, indices=case.indices[:-1]))


@pytest.mark.parametrize("bad_id", [-1, 5, 2**40])
@pytest.mark.parametrize("form", ["csr", "fixed"])
def test_embedding_bag_body_fails_on_a_bad_id_under_policy_error(form, bad_id):
    if form == "csr":
        case = csr_case("csr", [[1, 1], [2, 0]], rows=(5, 3))
    else:
        case = fixed_case("fixed", [1, 1], 2, rows=(5, 3))
    case.indices[0] = bad_id  # row 5 exists, but belongs to the next table
    with pytest.raises(Exception, match="out of data bounds"):
        run_body(case)


def with_offsets(change):
    case = csr_case("csr", [[2, 1], [1, 2]], rows=(5, 3))
    case.offsets[:] = change(case.offsets)
    return case


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda o: o + (np.arange(len(o)) == 0), id="begin at 1"),
        pytest.param(lambda o: np.minimum(o, o[-1] - 1), id="end before N"),
        pytest.param(lambda o: o + (np.arange(len(o)) == len(o) - 1), id="end after N"),
        pytest.param(lambda o: o[[0, 2, 1, 3, 4]], id="fall"),
        pytest.param(lambda o: o - 3 * (np.arange(len(o)) == 1), id="negative"),
    ],
)
def test_embedding_bag_body_fails_on_offsets_that_describe_no_bags(change):
    with pytest.raises(Exception, match="out of (data )?bounds|out of range"):
        run_body(with_offsets(change))


def test_embedding_bag_body_fails_on_lengths_that_do_not_belong_together():
    cases = [
        csr_case("offsets", [[1, 1], [2, 0]], rows=(5, 3)),
        csr_case("no ids", [[0, 0], [0, 0]], rows=(5, 3)),
        csr_case("weights", [[1, 1], [2, 0]], rows=(5, 3), weighted=True),
        fixed_case("one factor", [2, 2], 3, rows=(5, 3)),
        fixed_case("several factors", [1, 2], 3, rows=(5, 3)),
        fixed_case("several factors, weights", [1, 2], 3, rows=(5, 3), weighted=True),
    ]
    shorter = [
        replace(cases[0], offsets=np.append(cases[0].offsets, cases[0].offsets[-1])),
        replace(cases[1], offsets=cases[1].offsets + 1),
        replace(cases[2], per_sample_weights=cases[2].per_sample_weights[:1]),
        replace(cases[3], indices=cases[3].indices[:-1]),
        replace(cases[4], indices=cases[4].indices[:-1]),
        replace(cases[5], per_sample_weights=cases[5].per_sample_weights[:1]),
    ]
    for case in shorter:
        with pytest.raises(Exception, match="ONNXRuntimeError"):
            run_body(case)


def test_zero_policy_ignores_the_nan_weight_of_a_dropped_id():
    case = csr_case("csr", [[2], [1]], rows=(5, 3), policy="zero", weighted=True)
    case.indices[0], case.per_sample_weights[0] = 99, np.nan
    assert np.isfinite(run_body(case)).all()
    np.testing.assert_array_equal(run_body(case), case.expected())


def test_one_bag_of_a_hundred_thousand_ids_among_many_needs_no_memory_for_the_others():
    # A padded body would need 2000 x 100,000 x 4 floats, 3.2 GB.
    lengths = [[1] * 1000, [0] * 999 + [100_000]]
    case = csr_case("long", lengths, rows=(5, 3))
    np.testing.assert_array_equal(run_body(case), case.expected())


@pytest.mark.parametrize("self_interaction", [False, True])
@pytest.mark.parametrize("batch", [0, 1, 5])
def test_dot_interaction_body_equals_the_reference(self_interaction, batch):
    rng = np.random.default_rng(1)
    dense = rng.standard_normal((batch, 6), np.float32)
    embeddings = rng.standard_normal((batch, 4, 6), np.float32)
    node = helper.make_node(
        "DotInteraction", ["dense", "embeddings"], ["out"], domain=DOMAIN, self_interaction=int(self_interaction)
    )
    function = dot_interaction_function(4, self_interaction)
    (actual,) = run_node(node, function, {"dense": dense, "embeddings": embeddings}, (2,))
    expected = dot_interaction(dense, embeddings, self_interaction=self_interaction)
    assert actual.shape == expected.shape == (batch, 6 + (15 if self_interaction else 10))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=6 * 2**-23 * 16)


def fused_cases() -> list[BagCase]:
    ragged = [[2, 0, 3], [1, 1, 0], [0, 4, 2]]
    weighted = csr_case("weighted", ragged, weighted=True)
    return [
        csr_case("csr", ragged, mean=(0, 1, 0)),
        csr_case("one_slot", ragged, rows=(5,), features=(1,)),
        csr_case("no_samples", [[], [], []]),
        stored_case(weighted, ("int8", "fp32", "int4")),
        stored_case(weighted, ("bf16", "bf16", "bf16")),
        fixed_case("fixed", [2, 1, 3], 5, weighted=True),
        stored_case(fixed_case("fixed", [1, 1, 1], 4), ("int4", "int4", "int4")),
    ]


@pytest.mark.parametrize("with_pooled", [False, True])
@pytest.mark.parametrize("self_interaction", [False, True])
@pytest.mark.parametrize("case", fused_cases(), ids=lambda case: case.name)
def test_fused_body_equals_the_reference_with_one_output_and_with_two(case, self_interaction, with_pooled):
    attributes = bag_attributes(case)
    dense = np.random.default_rng(1).standard_normal((attributes.samples(case.indices, case.offsets), case.width))
    feed = {"dense": dense.astype(np.float32), **bag_feed(case)}
    node = helper.make_node(
        "EmbeddingBagDotInteraction", ["dense", *attributes.inputs()], ["out", "pooled_out"][: 1 + with_pooled],
        domain=DOMAIN, self_interaction=int(self_interaction), **attributes.node_attributes(),
    )  # fmt: skip
    function = embedding_bag_dot_interaction_function(attributes, self_interaction, "", with_pooled=with_pooled)
    actual = run_node(node, function, feed, (2, 3)[: 1 + with_pooled])
    expected = embedding_bag_dot_interaction(
        feed["dense"], case.weights, case.indices, case.offsets, per_sample_weights=case.per_sample_weights,
        self_interaction=self_interaction, **case.attributes,
    )  # fmt: skip
    # Products of four values, of vectors below 10: 4 * 2^-23 * 4 * 100.
    np.testing.assert_allclose(actual[0], expected[0], rtol=0, atol=2e-4)
    np.testing.assert_array_equal(actual[0][:, : case.width], feed["dense"])
    if with_pooled:
        np.testing.assert_allclose(actual[1], expected[1], rtol=0, atol=3 * 2**-24 * 12)


def run_mlp(x: np.ndarray, layers: list[tuple[np.ndarray, np.ndarray]], relu_last: bool) -> np.ndarray:
    feed = {"x": x}
    for number, (weight, bias) in enumerate(layers):
        feed |= {f"w{number}": weight.view(BF16), f"b{number}": bias}
    node = helper.make_node("Mlp", list(feed), ["y"], domain=DOMAIN, relu_last=int(relu_last), overload="top")
    return run_node(node, mlp_function(len(layers), relu_last, "top"), feed, (2,))[0]


def random_layers(*sizes: int) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(2)
    shapes = [(n, k) for k, n in itertools.pairwise(sizes)]
    weights = [(rng.standard_normal(shape) / np.sqrt(shape[1])).astype(np.float32) for shape in shapes]
    return [(to_bf16(w), rng.standard_normal(len(w)).astype(np.float32)) for w in weights]


@pytest.mark.parametrize("relu_last", [False, True])
@pytest.mark.parametrize("batch", [0, 1, 33])
def test_mlp_body_equals_the_reference(batch, relu_last):
    x = np.random.default_rng(3).standard_normal((batch, 70)).astype(np.float32)
    layers = random_layers(70, 40)
    # 71 roundings of sums of at most 71 terms, each below 2^-24 of their sizes' sum, about 70 * 0.64 / sqrt(70) + 1.
    expected = mlp(x, layers, relu_last=relu_last)
    np.testing.assert_allclose(run_mlp(x, layers, relu_last), expected, rtol=0, atol=4e-5)


def test_mlp_body_rounds_the_inputs_of_every_layer_to_the_nearest_bfloat16():
    one, minus = to_bf16(np.ones((1, 1), np.float32)), to_bf16(-np.ones((1, 1), np.float32))
    zero, step = np.zeros(1, np.float32), np.full(1, 2**-8, np.float32)
    x = np.array([[1 + 2**-8], [1 + 3 * 2**-8], [1 + 2**-8 + 2**-20], [-3], [np.nan], [np.inf], [1e-40]], np.float32)
    layers = [(one, zero), (minus, step), (minus, zero)]
    for count in (1, 2, 3):
        for relu_last in (False, True):
            expected = mlp(x, layers[:count], relu_last=relu_last)
            np.testing.assert_array_equal(run_mlp(x, layers[:count], relu_last), expected)


def ran_with_constant_weights(
    operator: str, function: onnx.FunctionProto, feed: dict[str, np.ndarray], ends: tuple[int, int]
) -> list[str]:
    """The operators that run for a node whose weights are initializers, from `ends[0]` to `ends[1]` columns."""
    initializers = [numpy_helper.from_array(array, name) for name, array in feed.items()]
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["B", k]) for n, k in zip("xy", ends, strict=True))
    node = helper.make_node(operator, ["x", *feed], ["y"], domain=DOMAIN, relu_last=1)
    graph = helper.make_graph([node], "test", [x], [y], initializers)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.enable_profiling = True
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = f"{folder}/profile"
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        session.run(None, {"x": np.ones((3, ends[0]), np.float32)})
        events = json.loads(Path(session.end_profiling()).read_text())
    return [event["args"]["op_name"] for event in events if event.get("name", "").endswith("kernel_time")]


def test_mlp_body_s_weights_are_widened_once_at_load():
    layers = [(weight.view(BF16), bias) for weight, bias in random_layers(8, 6, 4)]
    feed = {f"{kind}{i}": part for i, layer in enumerate(layers) for kind, part in zip("wb", layer, strict=True)}
    ran = ran_with_constant_weights("Mlp", mlp_function(2, True, ""), feed, (8, 4))
    assert ran.count("Cast") == 4  # of the inputs of both layers, there and back


def test_mlp_int8_body_s_weights_are_widened_once_at_load():
    layers = random_int8_layers(8, 6, 4)
    feed = {f"{kind}{i}": part for i, layer in enumerate(layers) for kind, part in zip("wsb", layer, strict=True)}
    ran = ran_with_constant_weights("MlpInt8", mlp_int8_function([8, 6], True, ""), feed, (8, 4))
    assert ran.count("Cast") == 0
    assert sum("Gemm" in name or "MatMul" in name for name in ran) == 2


@pytest.mark.parametrize("relu_last", [False, True])
@pytest.mark.parametrize("case", INT8_CASES)
def test_mlp_int8_body_has_the_reference_s_bits(case, relu_last):
    x, layers = INT8_CASES[case]
    feed = {"x": x}
    for number, layer in enumerate(layers):
        feed |= {f"{kind}{number}": part for kind, part in zip("wsb", layer, strict=True)}
    node = helper.make_node("MlpInt8", list(feed), ["y"], domain=DOMAIN, relu_last=int(relu_last), overload="top")
    function = mlp_int8_function([weight.shape[1] for weight, _, _ in layers], relu_last, "top")
    (actual,) = run_node(node, function, feed, (2,))
    assert same_bits(actual, mlp_int8(x, layers, relu_last=relu_last))
