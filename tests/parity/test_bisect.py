"""Errors planted in a bundle, one stage at a time: each is found where it was planted."""

import json
import sys
from dataclasses import replace

import numpy as np
import onnx
import pytest
from bundles import CONFIGS, make_bundle
from onnx import helper, numpy_helper

from dlrm_deploy.batch import Batch
from dlrm_deploy.batch_file import read_batch
from dlrm_deploy.bundle import Bundle
from dlrm_deploy.data.random import random_batch, with_longer_bags
from dlrm_deploy.engines.ort import StockOnnxRuntimeEngine
from dlrm_deploy.engines.registry import open_engine
from dlrm_deploy.export.bundle import export_bundle
from dlrm_deploy.export.convert import convert_bundle
from dlrm_deploy.export.sources import RandomSource
from dlrm_deploy.files import sha256_file
from dlrm_deploy.model.keys import bottom_keys, top_keys
from dlrm_deploy.parity import bisect as bisect_module
from dlrm_deploy.parity import stages
from dlrm_deploy.parity.bisect import bisect, save_reproducer
from dlrm_deploy.parity.check import check_parity

ENGINES = ("onnxruntime", "onnxruntime-stock")


def rehash(bundle):
    """List the files as they are now: an error that was made before the hashes were taken."""
    manifest = json.loads((bundle.path / "manifest.json").read_text())
    for name, record in manifest["files"].items():
        path = bundle.path / name
        record["size"], record["sha256"] = path.stat().st_size, sha256_file(path)
    (bundle.path / "manifest.json").write_text(json.dumps(manifest))
    return Bundle.open(bundle.path, verify="full")


def change_weight(bundle, key, change):
    """Replace a weight of the graph."""
    model = onnx.load(bundle.model_path, load_external_data=False)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == key)
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(change(numpy_helper.to_array(tensor))), key))
    onnx.save(model, bundle.model_path)


def put_behind(bundle, tensor, make_nodes):
    """Put nodes between a tensor and everything that reads it; they read `<tensor>_true` and give `tensor`."""
    model = onnx.load(bundle.model_path, load_external_data=False)
    (at,) = [i for i, node in enumerate(model.graph.node) if tensor in node.output]
    model.graph.node[at].output[0] = f"{tensor}_true"
    for offset, node in enumerate(make_nodes(f"{tensor}_true", tensor), start=1):
        model.graph.node.insert(at + offset, node)
    onnx.save(model, bundle.model_path)


def constant(name, value):
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(np.asarray(value)))


def wrong_row(bundle):
    matrix = np.memmap(bundle.path / "tables/width8.bin", np.float32, "r+", shape=bundle.map_tables()[0].shape)
    matrix[bundle.config.groups[0].rows_of("t_b").start + 3] *= -1
    matrix.flush()


def swapped_pairs(bundle):
    def nodes(true, given):
        order = np.arange(bundle.config.interaction_width)
        order[[8, 9]] = order[[9, 8]]
        return [constant("order", order), helper.make_node("Gather", [true, "order"], [given], axis=1)]

    put_behind(bundle, "interactions", nodes)


def transposed_layer(bundle):
    change_weight(bundle, top_keys(bundle.config)[1][0], lambda weight: weight.T)


def lost_bias(bundle):
    change_weight(bundle, bottom_keys(bundle.config)[0][1], np.zeros_like)


def zeroed_bag(bundle):
    def nodes(true, given):
        mask = np.ones((1, 3, 1), np.float32)
        mask[0, 1] = 0
        return [constant("mask", mask), helper.make_node("Mul", [true, "mask"], [given])]

    put_behind(bundle, "pooled_width8", nodes)


# A square layer, so that its transpose has the right shape.
SQUARE = replace(CONFIGS["dot"], name="square", top_mlp=(12, 12, 1))
# First-order terms, so that bags and interaction are two nodes, between which an error can be planted.
SPLIT = replace(SQUARE, name="split", wide=True)
PLANTED = {
    "wrong_row": (wrong_row, "table t_b"),
    "swapped_pairs": (swapped_pairs, "interaction"),
    "transposed_layer": (transposed_layer, "top MLP, layer 1"),
    "lost_bias": (lost_bias, "bottom MLP, layer 0"),
    "zeroed_bag": (zeroed_bag, "feature b, table t_b"),
}


@pytest.fixture
def square_bundle(tmp_path, monkeypatch):
    monkeypatch.setitem(CONFIGS, "square", SQUARE)
    return make_bundle("square", tmp_path / "bundle")


@pytest.fixture
def split_bundle(tmp_path, monkeypatch):
    monkeypatch.setitem(CONFIGS, "split", SPLIT)
    return make_bundle("split", tmp_path / "split")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_error_fails_the_check_and_is_found_at_its_stage(planted, engine, request):
    plant, stage = PLANTED[planted]
    bundle = request.getfixturevalue("split_bundle" if planted == "zeroed_bag" else "square_bundle")
    plant(bundle)
    bundle = rehash(bundle)
    report = check_parity(bundle, engine, threads=1, sizes=(37,))
    assert not report.passed
    batch = random_batch(bundle.config, 64, np.random.default_rng(0))
    found = bisect(bundle, engine, batch, threads=1)
    moving = [departure for departure in found.departures if departure.batch is not None]
    assert found.first.stage == stage
    assert len(moving) == (planted != "wrong_row")  # stages behind it give what they should for what they got


@pytest.mark.parametrize("engine", ENGINES)
def test_no_stage_of_a_right_bundle_departs(engine, any_bundle):
    batch = random_batch(any_bundle.config, 64, np.random.default_rng(1))
    found = bisect(any_bundle, engine, batch, threads=1)
    assert found.departures == ()
    assert found.stages > len(any_bundle.config.features)
    assert "no stage departs" in found.summary()


def test_the_worst_sample_is_saved_and_shows_the_error_again(split_bundle, tmp_path):
    zeroed_bag(split_bundle)
    bundle = rehash(split_bundle)
    batch = random_batch(bundle.config, 64, np.random.default_rng(0))
    departure = bisect(bundle, "onnxruntime-stock", batch, threads=1).first
    save_reproducer(tmp_path / "worst.npz", departure.batch, departure)
    saved, arrays = read_batch(tmp_path / "worst.npz")
    assert saved.batch_size == 1
    assert str(arrays["stage"]) == "feature b, table t_b"
    np.testing.assert_array_equal(saved.indices, batch.rows(departure.row, departure.row + 1).indices)
    assert bisect(bundle, "onnxruntime-stock", saved, threads=1).first.stage == departure.stage
    with open_engine(bundle, "torch") as torch, open_engine(bundle, "onnxruntime-stock") as stock:
        assert abs(torch.predict(saved)[0] - stock.predict(saved)[0]) > 1e-6


@pytest.mark.parametrize(
    ("change", "detail"),
    [
        (lambda weight: weight[:, ::-1], "columns in another order"),
        (np.zeros_like, "holds zeros"),
        (lambda weight: weight + (np.arange(weight.size).reshape(weight.shape) == 3), "1 of 144 values"),
    ],
)
def test_a_changed_weight_is_described(change, detail, square_bundle):
    key = top_keys(square_bundle.config)[1][0]
    change_weight(square_bundle, key, lambda weight: change(weight).astype(np.float32))
    found = bisect(rehash(square_bundle), "onnxruntime-stock", random_batch(SQUARE, 8, np.random.default_rng(0)))
    assert [one.stage for one in found.departures] == [f"weight {key}", "top MLP, layer 1"]
    assert detail in found.departures[0].detail


def test_a_value_that_is_not_a_number_departs(square_bundle):
    put_behind(square_bundle, "top_0", lambda true, given: [
        constant("nan", np.float32(np.nan)), helper.make_node("Mul", [true, "nan"], [given])])  # fmt: skip
    batch = random_batch(SQUARE, 8, np.random.default_rng(0))
    assert bisect(rehash(square_bundle), "onnxruntime-stock", batch).first.stage == "top MLP, layer 0"


def test_an_engine_without_inner_tensors_says_so_and_is_looked_at_at_rest(square_bundle):
    batch = random_batch(SQUARE, 8, np.random.default_rng(0))
    report = bisect(square_bundle, "torch", batch)
    assert report.summary().startswith("BISECT  not possible: engine torch does not show what happens inside")
    wrong_row(square_bundle)
    report = bisect(square_bundle, "torch", batch)
    assert [departure.stage for departure in report.departures] == ["table t_b"]
    assert "engine torch does not show" in report.problem


def test_without_onnx_the_stored_tables_are_still_looked_at(square_bundle, monkeypatch):
    wrong_row(square_bundle)
    monkeypatch.setitem(sys.modules, "onnx", None)
    report = bisect(square_bundle, "onnxruntime-stock", random_batch(SQUARE, 8, np.random.default_rng(0)))
    assert report.first.stage == "table t_b"
    assert "pip install 'dlrm-deploy[export]'" in report.problem


class Scaled(RandomSource):
    """Random weights, times a number."""

    def __init__(self, config, tables, dense):
        super().__init__(config, seed=3)
        self._tables, self._dense = np.float32(tables), np.float32(dense)

    def part_chunks(self, part):
        return ((first, chunk * self._tables) for first, chunk in super().part_chunks(part))

    def dense(self):
        return {key: weight * self._dense for key, weight in super().dense().items()}


SCALES = {
    "tiny": (1e-20, 1),
    "denormal": (1e-38, 1),
    "large": (1e15, 1),
    "saturated": (1, 1e3),
    "too large": (1e19, 1e19),
}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", ["weighted", "parts_weighted", "dcn", "factorization"])
def test_no_stage_of_a_right_model_departs_whatever_the_size_of_its_values(name, scale, tmp_path):
    bundle = export_bundle(Scaled(CONFIGS[name], *SCALES[scale]), tmp_path / "bundle")
    report = bisect(bundle, "onnxruntime-stock", random_batch(bundle.config, 16, np.random.default_rng(0)), threads=1)
    assert (report.departures, report.problem) == ((), None)


@pytest.mark.parametrize("name", ["dot", "weighted"])  # sums and means; weights of both signs
@pytest.mark.parametrize("engine", ENGINES)
def test_no_stage_of_a_right_model_departs_for_long_bags(name, engine, tmp_path):
    bundle = make_bundle(name, tmp_path / "bundle")
    rng = np.random.default_rng(0)
    lengths_FB = np.array([[0, 100_000, 0], [3, 0, 100_000], [0, 0, 1]])
    ids = np.concatenate([rng.integers(0, rows, n) for rows, n in zip((11, 18, 25), lengths_FB.sum(1), strict=True)])
    weights = rng.standard_normal(ids.size, np.float32) if name == "weighted" else None
    offsets = np.concatenate([[0], np.cumsum(lengths_FB)])
    batch = Batch(rng.standard_normal((3, 3), np.float32), ids, offsets, weights)
    assert bisect(bundle, engine, batch, threads=1).departures == ()


def test_a_planted_error_is_found_among_tiny_values_and_in_long_bags(tmp_path, monkeypatch):
    bundle = export_bundle(Scaled(SPLIT, 1e-20, 1), tmp_path / "bundle")
    zeroed_bag(bundle)
    monkeypatch.setattr(bisect_module, "SLICE_VALUES", 1000)
    monkeypatch.setattr(stages, "BLOCK_VALUES", 64)
    undeclared = replace(SPLIT, features=tuple(replace(feature, max_ids=None) for feature in SPLIT.features))
    batch = random_batch(with_longer_bags(undeclared, 400), 8, np.random.default_rng(0))
    assert batch.rows(0, 1).indices.size * 8 > 1000
    report = bisect(rehash(bundle), "onnxruntime-stock", batch)
    moving = [departure.stage for departure in report.departures if departure.batch is not None]
    assert moving == ["feature b, table t_b"]


def test_a_stage_that_the_engine_cannot_compute_is_named(square_bundle):
    places = np.array([*range(11), 99])  # one beyond the layer's 12 values

    def nodes(true, given):
        return [constant("places", places), helper.make_node("Gather", [true, "places"], [given], axis=1)]

    put_behind(square_bundle, "top_0", nodes)
    batch = random_batch(SQUARE, 8, np.random.default_rng(0))
    first = bisect(rehash(square_bundle), "onnxruntime-stock", batch).first
    assert first.stage == "top MLP, layer 0"
    assert "ONNX Runtime cannot show" in first.detail


def test_a_sum_that_no_float32_bound_holds_for_has_an_infinite_one():
    one = np.ones(1)
    assert stages._bound([2**24], one, one) == np.inf
    assert stages._bound([2], one * 1e39, one) == np.inf
    assert 0 < stages._bound([2], one * 0, one)[0] < 1e-36


def test_slices_hold_a_bounded_number_of_ids_and_every_sample_once(monkeypatch):
    config = SQUARE
    lengths_FB = np.random.default_rng(0).integers(0, 40, (3, 50))
    lengths_FB[1, 7] = 5000  # a sample that is larger than a slice
    ids = np.zeros(lengths_FB.sum(), np.int64)
    batch = Batch(np.zeros((50, 3), np.float32), ids, np.concatenate([[0], np.cumsum(lengths_FB)]))
    monkeypatch.setattr(bisect_module, "SLICE_VALUES", 4000)
    found = list(bisect_module.slices(config, batch))
    assert [first for first, _ in found[1:]] == [last for _, last in found[:-1]]
    assert (found[0][0], found[-1][1]) == (0, 50)
    assert (7, 8) in found
    assert all(last == first + 1 or batch.rows(first, last).indices.size * 8 <= 4000 for first, last in found)
    assert max(last - first for first, last in found) > 3


def test_one_session_serves_all_slices(square_bundle, monkeypatch):
    opened = []
    real = StockOnnxRuntimeEngine._open_stages
    monkeypatch.setattr(
        StockOnnxRuntimeEngine, "_open_stages", lambda self, names: opened.append(names) or real(self, names)
    )
    monkeypatch.setattr(bisect_module, "SLICE_ROWS", 4)
    assert bisect(square_bundle, "onnxruntime-stock", random_batch(SQUARE, 13, np.random.default_rng(0))).first is None
    assert len(opened) == 1


def test_a_batch_without_samples_has_no_departures(any_bundle):
    empty = random_batch(any_bundle.config, 0, np.random.default_rng(0))
    report = bisect(any_bundle, "onnxruntime-stock", empty, threads=1)
    assert (report.departures, report.problem) == ((), None)
    assert report.stages > 3


@pytest.mark.parametrize("tables", ["fp16", "bf16", "int8", "int4"])
@pytest.mark.parametrize("name", ["dot", "parts_weighted"])
def test_stages_of_stored_rows_are_what_they_decode_to(name, tables, tmp_path):
    fp32 = make_bundle(name, tmp_path / "fp32")
    bundle = convert_bundle(fp32, tmp_path / "converted", tables=tables, mlp="fp32")
    batch = random_batch(bundle.config, 64, np.random.default_rng(1))
    for engine in ENGINES:
        report = bisect(bundle, engine, batch, threads=1)
        assert (report.departures, report.problem) == ((), None)
        assert report.stages > len(bundle.config.features)


def test_a_stored_row_that_was_changed_is_found_at_rest(tmp_path):
    bundle = convert_bundle(make_bundle("dot", tmp_path / "fp32"), tmp_path / "int8", tables="int8", mlp="fp32")
    path = bundle.path / "tables/width8.int8.bin"
    stored = bytearray(path.read_bytes())
    stored[12 * (11 + 3)] ^= 1  # a code of row 3 of t_b, behind the 11 rows of t_a
    path.write_bytes(stored)
    report = bisect(rehash(bundle), "onnxruntime-stock", random_batch(bundle.config, 8, np.random.default_rng(0)))
    assert [departure.stage for departure in report.departures] == ["table t_b"]


@pytest.mark.parametrize("mlp", ["bf16", "int8"])
def test_stages_of_rounded_mlps_are_not_compared_and_the_report_says_what_to_do(tmp_path, mlp):
    bundle = convert_bundle(make_bundle("dot", tmp_path / "fp32"), tmp_path / mlp, tables="int8", mlp=mlp)
    report = bisect(bundle, "onnxruntime-stock", random_batch(bundle.config, 8, np.random.default_rng(0)))
    assert report.departures == ()
    assert "Bisect the fp32 bundle that it was converted from" in report.summary()
