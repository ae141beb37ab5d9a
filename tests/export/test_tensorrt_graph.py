import subprocess
import sys
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from bundles import CONFIGS
from plan_models import (
    ARCHITECTURES,
    MAX_BAG,
    awkward_batches,
    batch_of,
    expected_scores,
    part_formats,
    small_model,
    stored_tables,
    weights_of,
)

from dlrm_deploy.config import PRECISIONS
from dlrm_deploy.data.random import random_batch
from dlrm_deploy.engines.ort_tables import ort_value
from dlrm_deploy.engines.tensorrt.host import plan_feeds
from dlrm_deploy.errors import EngineError, FormatError
from dlrm_deploy.export.tensorrt_graph import plan_inputs, runnable_on_cpu, write_tensorrt_model
from dlrm_deploy.formats import tensor_name
from dlrm_deploy.model.dlrm import DLRM
from dlrm_deploy.model.keys import mlp_weight_keys
from dlrm_deploy.model.layers import Int8Layer
from dlrm_deploy.ops.contract import by_format
from dlrm_deploy.parity.batches import awkward_batches as parity_batches
from dlrm_deploy.tables import TableConfig

UNITS = {"fp16": 2.0**-11, "bf16": 2.0**-8}


class Graph:
    """A graph for a plan, executed by stock ONNX Runtime. Tables are fp32 matrices, or stored ones with `formats`."""

    def __init__(self, config, dense, tables, *, precision="fp32", table_inputs=False, max_bag=MAX_BAG, formats=None):
        self.config, self.max_bag = config, None if config.pooling_factors else max_bag
        constants = None if table_inputs else tables
        self.model = write_tensorrt_model(
            config, dense, constants, table_formats=formats, max_bag=max_bag, precision=precision
        )
        self.tables = {}
        if table_inputs:
            for group, stored in zip(config.groups, tables, strict=True):
                for kind, matrix in by_format(stored).items():
                    # A plan takes bytes as int8, whatever they mean.
                    signed = matrix.view(np.int8) if matrix.dtype == np.uint8 else matrix
                    self.tables[tensor_name(group.name, kind)] = ort_value(signed, kind)
        options = ort.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 4, 1
        self.session = ort.InferenceSession(runnable_on_cpu(self.model).SerializeToString(), options)

    def score(self, batch):
        return self.run(next(plan_feeds(batch, self.config, self.max_bag, 2048)))

    def run(self, feed):
        return self.session.run(None, {**feed, **self.tables})[0]


@pytest.mark.parametrize("table_inputs", [False, True], ids=["constants", "inputs"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fp32_graph_scores_awkward_bags_as_the_reference_does(architecture, table_inputs):
    config = small_model(**ARCHITECTURES[architecture])
    dense, tables = weights_of(config)
    graph = Graph(config, dense, tables, table_inputs=table_inputs)
    for name, batch in awkward_batches(config).items():
        expected, _ = expected_scores(config, dense, tables, batch)
        np.testing.assert_allclose(graph.score(batch), expected, rtol=0, atol=1e-6, err_msg=name)


STORED = [
    ("dot", "fp16"),
    ("dot_weighted", "bf16"),
    ("dot_mean", "int8"),
    ("dot_fixed_weighted", "int8"),
    ("dot_fixed_mixed_mean", "int4"),
    ("dot_self_interaction", "mixed"),
    ("dot_fixed", "mixed"),
    ("concat_two_widths", "int4"),
    ("dcn_fixed", "bf16"),
]


@pytest.mark.parametrize("table_inputs", [False, True], ids=["constants", "inputs"])
@pytest.mark.parametrize(("architecture", "kind"), STORED)
def test_stored_rows_of_every_format_score_as_their_values_do(architecture, kind, table_inputs):
    config = small_model(**ARCHITECTURES[architecture])
    dense, tables = weights_of(config)
    formats = part_formats(config, kind)
    stored, values = stored_tables(config, tables, formats)
    graph = Graph(config, dense, stored, table_inputs=table_inputs, formats=formats)
    for name, batch in awkward_batches(config).items():
        expected, _ = expected_scores(config, dense, values, batch)
        np.testing.assert_allclose(graph.score(batch), expected, rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("table_inputs", [False, True], ids=["constants", "inputs"])
@pytest.mark.parametrize("width", [1, 5, 8, 20, 33])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_rows_of_any_number_of_bytes_are_read(kind, width, table_inputs):
    config = small_model(interaction="concat", widths=(width,) * 3)
    dense, tables = weights_of(config)
    formats = part_formats(config, kind)
    stored, values = stored_tables(config, tables, formats)
    batch = awkward_batches(config)["uneven"]
    scores = Graph(config, dense, stored, table_inputs=table_inputs, formats=formats).score(batch)
    same = Graph(config, dense, values, table_inputs=table_inputs).score(batch)
    np.testing.assert_array_equal(scores, same)  # the very values, added in the same order


KINDS = ("parts", "parts_weighted", "parts_fixed", "cross", "branches", "factorization", "ids_only")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_table_and_interaction_scores_as_pytorch_does(kind):
    config = CONFIGS[kind]
    dense, tables = weights_of(config)
    model = DLRM(config, [torch.from_numpy(table) for table in tables])
    with torch.no_grad():
        for key, weight in dense.items():
            model.weight(key).copy_(torch.from_numpy(weight))
    graph = Graph(config, dense, tables)
    rng = np.random.default_rng(0)
    for name, batch in {**parity_batches(config, rng, MAX_BAG), "random": random_batch(config, 37, rng)}.items():
        # Rows of size 1 make products of size 10 to 100 in the interaction, so logits are exact to some 1e-5.
        np.testing.assert_allclose(graph.score(batch), model.predict(batch), rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "part" in kind])
def test_every_kind_of_table_scores_as_pytorch_does_in_formats_of_its_own(kind):
    config = CONFIGS[kind]
    dense, tables = weights_of(config)
    formats = part_formats(config, "mixed")
    stored, values = stored_tables(config, tables, formats)
    model = DLRM(config, [torch.from_numpy(table) for table in values])
    with torch.no_grad():
        for key, weight in dense.items():
            model.weight(key).copy_(torch.from_numpy(weight))
    for table_inputs in (False, True):
        graph = Graph(config, dense, stored, formats=formats, table_inputs=table_inputs)
        batch = random_batch(config, 37, np.random.default_rng(0))
        np.testing.assert_allclose(graph.score(batch), model.predict(batch), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_runs_in_bf16_too(kind):
    dense, tables = weights_of(CONFIGS[kind])
    batch = random_batch(CONFIGS[kind], 37, np.random.default_rng(0))
    exact, rounded = (Graph(CONFIGS[kind], dense, tables, precision=p).score(batch) for p in ("fp32", "bf16"))
    # No bound for every architecture: only that rounding to 8 bits shows, and does not carry a model away.
    assert 0 < np.abs(exact - rounded).max() < 0.2


def int8_model(config, dense, tables):
    """The PyTorch model with the int8 MLPs of an engine."""
    layer = Int8Layer()
    model = DLRM(config, [torch.from_numpy(table) for table in tables], layer=layer)
    with torch.no_grad():
        for key, weight in dense.items():
            if key in mlp_weight_keys(config):
                layer.store(model.weight(key), weight, key)
            else:
                model.weight(key).copy_(torch.from_numpy(weight))
    return model


@pytest.mark.parametrize("kind", ["dot", *KINDS])
def test_int8_mlps_score_as_pytorchs_do(kind):
    config = CONFIGS[kind]
    dense, tables = weights_of(config)
    batch = random_batch(config, 37, np.random.default_rng(0))
    expected = int8_model(config, dense, tables).predict(batch)
    off = np.abs(Graph(config, dense, tables, precision="int8").score(batch) - expected)
    # Rows of size 1 make products of size 10 to 100 in the interaction. Where one of them is next to a tie the sample
    # is off by a rounding of one part in 127; most have no such product.
    assert np.median(off) <= 1e-6
    assert off.max() <= 0.02
    if mlp_weight_keys(config):
        assert np.median(np.abs(Graph(config, dense, tables).score(batch) - expected)) > 1e-5  # fp32 MLPs


def test_a_value_that_is_not_finite_spoils_its_own_sample_of_int8_mlps_only():
    config = CONFIGS["dot"]
    dense, tables = weights_of(config)
    graph = Graph(config, dense, tables, precision="int8")
    batch = random_batch(config, 5, np.random.default_rng(0))
    before = graph.score(batch)
    batch.dense[1, 0], batch.dense[3, 2] = np.nan, -np.inf
    after = graph.score(batch)
    np.testing.assert_array_equal(np.isnan(after), [False, True, False, True, False])
    np.testing.assert_array_equal(after[[0, 2, 4]], before[[0, 2, 4]])


def test_a_weight_that_int8_cannot_store_is_named():
    config = CONFIGS["dot"]
    dense, tables = weights_of(config)
    dense["over_arch.model.1.weight"][0, 3] = np.nan
    with pytest.raises(FormatError, match=r"over_arch.model.1.weight, row 0: .* nan of input 3"):
        write_tensorrt_model(config, dense, tables, max_bag=MAX_BAG, precision="int8")


def test_ids_beyond_32_bits_are_refused_with_the_features_name():
    table = TableConfig(name="t", rows=1 << 40, width=8, partition="hash", part_rows=(5,))
    features = tuple(replace(f, table="t") if f.table == "t_a" else f for f in CONFIGS["dot"].features)
    config = replace(CONFIGS["dot"], tables=(table, *CONFIGS["dot"].tables[1:]), features=features)
    with pytest.raises(EngineError, match=r"feature 'a': ids of its slot 0 is 1099511627776"):
        write_tensorrt_model(config, *weights_of(config), max_bag=MAX_BAG)


@pytest.mark.parametrize("precision", UNITS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_lower_precision_is_off_by_its_own_roundings_and_no_more(architecture, precision):
    config = small_model(**ARCHITECTURES[architecture])
    dense, tables = weights_of(config)
    graph = Graph(config, dense, tables, precision=precision)
    for name, batch in awkward_batches(config).items():
        expected, deviation = expected_scores(config, dense, tables, batch, UNITS[precision])
        off = np.abs(graph.score(batch) - expected)
        # Four standard deviations, and what fp32 itself may be off by.
        assert (off <= 4 * deviation + 1e-6).all(), (name, (off / deviation).max())
        if batch.batch_size == 37:
            assert off.max() > 2e-5, name  # it does round: fp32 is off by 1e-6 at most


@pytest.mark.parametrize("form", ["csr", "fixed"])
@pytest.mark.parametrize("policy", ["clamp", "modulo", "zero"])
def test_ids_out_of_range_follow_the_policy_also_beyond_32_bits(policy, form):
    config = small_model(policy=policy, factors=(2, 2, 2, 2) if form == "fixed" else None, pooling="mean")
    dense, tables = weights_of(config)
    batch = batch_of(config, [[2, 2, 2]] * 4)
    batch.indices[[0, 3, 7, 9, 12, 23]] = [-1, 50, 2**31 - 1, -(2**31), 2**40 + 1, -(2**50)]
    expected, _ = expected_scores(config, dense, tables, batch)
    np.testing.assert_allclose(Graph(config, dense, tables).score(batch), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("form", ["csr", "fixed"])
def test_under_policy_error_the_graph_itself_reads_no_row_outside_a_table(form):
    factors = (2, 2, 2, 2) if form == "fixed" else None
    config = small_model(policy="error", factors=factors)
    dense, tables = weights_of(config)
    batch = batch_of(config, [[2, 2]] * 4)
    graph = Graph(config, dense, tables)
    feed = next(plan_feeds(batch, config, graph.max_bag, 2))
    batch.indices[[0, 5]] = [10**6, -7]
    feed["indices"] = batch.indices.astype(np.int32)  # past the host's check
    clamped, _ = expected_scores(replace(config, index_policy="clamp"), dense, tables, batch)
    np.testing.assert_allclose(graph.run(feed), clamped, rtol=0, atol=1e-6)


def test_a_nan_row_that_padding_reads_stays_out_of_other_bags():
    config = small_model()
    dense, tables = weights_of(config)
    batch = batch_of(config, [[1, 0, 2], [0, 0, 1], [0, 2, 0], [0, 0, 0]])
    tables[0][batch.indices[0]] = np.nan  # padding reads the first id of the batch
    scores = Graph(config, dense, tables).score(batch)
    np.testing.assert_array_equal(np.isnan(scores), [True, False, False])


def test_ids_beyond_the_longest_bag_are_not_read():
    config = small_model(interaction="concat")
    dense, tables = weights_of(config)
    long, short = batch_of(config, [[4], [1], [1], [1]]), batch_of(config, [[3], [1], [1], [1]])
    graph = Graph(config, dense, tables, max_bag=3)
    short.indices[:3], short.indices[3:] = long.indices[:3], long.indices[4:]
    object.__setattr__(short, "dense", long.dense)
    feed = next(plan_feeds(long, config, MAX_BAG, 1))  # a host that does not check
    np.testing.assert_array_equal(graph.run(feed), graph.score(short))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_graph_is_valid_onnx_of_standard_operators_only(architecture, precision):
    config = small_model(**ARCHITECTURES[architecture])
    dense, tables = weights_of(config)
    model = write_tensorrt_model(config, dense, tables, max_bag=MAX_BAG, precision=precision)
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in model.graph.node} == {""}
    assert not model.functions
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert types["tables_width8"] == onnx.TensorProto.FLOAT
    assert types["over_arch.model.1.weight"] == onnx.TensorProto.FLOAT
    island = {"fp32": "FLOAT", "fp16": "FLOAT16", "bf16": "BFLOAT16", "int8": "FLOAT"}[precision]
    assert types["dense_arch.model._mlp.0._linear.weight"] == onnx.TensorProto.DataType.Value(island)


def test_tables_of_a_group_are_one_tensor_a_format_in_a_type_that_tensorrt_gathers_from():
    config = small_model(widths=(8, 8, 8))
    dense, tables = weights_of(config)
    formats = dict(zip(("t0", "t1", "t2"), ("int8", "bf16", "int4"), strict=True))
    stored, _ = stored_tables(config, tables, formats)
    model = write_tensorrt_model(config, dense, None, table_formats=formats, max_bag=MAX_BAG, precision="bf16")
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in model.graph.node} == {""}
    specs = {spec.name: (spec.dtype, spec.shape) for spec in plan_inputs(config, True, formats)}
    assert specs["tables_width8_int8"] == ("int8", (50, 12))
    assert specs["tables_width8_int4"] == ("int8", (20, 8))
    assert specs["tables_width8_bf16"] == ("bfloat16", (3, 8))
    assert [value.name for value in model.graph.input] == list(specs)
    constants = write_tensorrt_model(config, dense, stored, table_formats=formats, max_bag=MAX_BAG)
    types = {tensor.name: (tensor.data_type, tuple(tensor.dims)) for tensor in constants.graph.initializer}
    assert types["tables_width8_int8"] == (onnx.TensorProto.INT32, (50, 3))
    assert types["tables_width8_int4"] == (onnx.TensorProto.INT32, (20, 2))
    assert types["tables_width8_bf16"] == (onnx.TensorProto.BFLOAT16, (3, 8))


def test_stored_tables_may_be_constants_where_fp32_ones_are_too_large():
    config = small_model(rows=(10**8, 3, 20))
    formats = part_formats(config, "int8")
    empty = [{"int8": np.zeros((0, 12), np.uint8)}]
    write_tensorrt_model(config, weights_of(small_model())[0], empty, table_formats=formats, max_bag=MAX_BAG)


def test_a_weight_that_fp16_cannot_hold_is_named():
    config = small_model()
    dense, tables = weights_of(config)
    dense["dense_arch.model._mlp.0._linear.weight"][0, 0] = -7e4
    with pytest.raises(EngineError, match=r"dense_arch.model._mlp.0._linear.weight holds 70000.*--precision bf16"):
        write_tensorrt_model(config, dense, tables, max_bag=MAX_BAG, precision="fp16")
    write_tensorrt_model(config, dense, tables, max_bag=MAX_BAG, precision="bf16")


def test_tables_that_fit_no_onnx_file_are_refused_as_constants_and_taken_as_inputs():
    config = small_model(rows=(10**8, 3, 20))
    dense, _ = weights_of(small_model())
    with pytest.raises(EngineError, match=r"3\.2 GB cannot be constants.*--tables input"):
        write_tensorrt_model(config, dense, [np.zeros((0, 8), np.float32)], max_bag=MAX_BAG)
    model = write_tensorrt_model(config, dense, None, max_bag=MAX_BAG)
    assert [d.dim_value for d in model.graph.input[3].type.tensor_type.shape.dim] == [100_000_023, 8]


def test_more_rows_than_32_bits_number_are_refused():
    config = small_model(rows=(2**31, 3, 20))
    with pytest.raises(EngineError, match=r"group width8 has 2147483671 rows.*32 bits"):
        write_tensorrt_model(config, {}, None, max_bag=MAX_BAG)


def test_only_bf16_needs_rewriting_for_the_cpu():
    config = small_model()
    dense, tables = weights_of(config)
    for precision, same in (("fp32", True), ("fp16", True), ("bf16", False)):
        model = write_tensorrt_model(config, dense, tables, max_bag=MAX_BAG, precision=precision)
        assert (runnable_on_cpu(model) is model) == same


def test_writing_a_graph_imports_no_engine():
    code = (
        "import sys, dlrm_deploy.export.tensorrt_graph; "
        "print([name for name in sys.modules if name.startswith('dlrm_deploy.engines')])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
