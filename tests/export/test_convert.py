"""Converted bundles: what is stored, that it is the right bytes, and that every engine scores it."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from bundles import CONFIGS, make_bundle

from dlrm_deploy.bundle import Bundle
from dlrm_deploy.checksums import altered_rows, altered_weights
from dlrm_deploy.data.random import random_batch
from dlrm_deploy.engines.registry import open_engine
from dlrm_deploy.errors import BundleError, ConfigError, FormatError, OutputError
from dlrm_deploy.export.bundle import export_bundle
from dlrm_deploy.export.convert import convert_bundle
from dlrm_deploy.export.sources import RandomSource
from dlrm_deploy.formats import decode, encode, from_bf16, to_bf16
from dlrm_deploy.int8_codes import quantize_weight
from dlrm_deploy.model.keys import mlp_weight_keys
from dlrm_deploy.parity.against_source import differences
from dlrm_deploy.parity.check import stored_cases

KINDS = (("fp16", "fp32"), ("bf16", "bf16"), ("int8", "int8"), ("int4", "fp32"), ("fp32", "bf16"), ("fp32", "int8"))


@pytest.fixture(params=KINDS, ids="-".join)
def kind(request):
    return dict(zip(("tables", "mlp"), request.param, strict=True))


@pytest.fixture
def converted(any_bundle, kind, tmp_path):
    return convert_bundle(any_bundle, tmp_path / "converted", **kind)


def test_a_converted_bundle_is_whole_and_holds_what_was_written(converted, any_bundle, kind):
    again = Bundle.open(converted.path, verify="full")
    assert again.manifest.precision == kind
    assert [*altered_rows(again), *altered_weights(again)] == []
    assert [case for case in stored_cases(again) if not case.passed] == []
    onnx.checker.check_model(again.model_path, full_check=True)
    fp32 = {part.name: rows for part, _, rows in any_bundle.stored_parts()}
    for part, row_format, rows in again.stored_parts():
        assert row_format == again.manifest.table_formats.get(part.name, "fp32")
        np.testing.assert_array_equal(rows, encode(row_format, np.array(fp32[part.name])))


def test_every_engine_scores_the_stored_numbers(converted):
    batch = random_batch(converted.config, 37, np.random.default_rng(0))
    with open_engine(converted, "torch", threads=1) as torch:
        expected = torch.predict(batch)
    for name in ("onnxruntime", "onnxruntime-stock"):
        with open_engine(converted, name, threads=1) as engine:
            # A rounding that falls the other way is possible with bf16, and would be some 1e-5.
            np.testing.assert_allclose(engine.predict(batch), expected, rtol=0, atol=1e-6)


def test_the_reference_is_the_fp32_model_with_the_stored_numbers_in_place_of_its_own(any_bundle, tmp_path):
    """Not more than that is converted, and nothing less: an fp32 bundle of decoded rows scores the same bits."""

    class Decoded(RandomSource):
        def part_chunks(self, part):
            for first, rows in super().part_chunks(part):
                yield first, decode("fp16", encode("fp16", rows), part.width)

    converted = convert_bundle(any_bundle, tmp_path / "converted", tables="fp16", mlp="fp32")
    decoded = export_bundle(Decoded(any_bundle.config, seed=3), tmp_path / "decoded")
    batch = random_batch(any_bundle.config, 37, np.random.default_rng(0))
    with open_engine(converted, "torch", threads=1) as a, open_engine(decoded, "torch", threads=1) as b:
        np.testing.assert_allclose(a.predict(batch), b.predict(batch), rtol=0, atol=2e-7)


def test_mlp_weights_are_the_nearest_bfloat16_and_dense_npz_stays_fp32(any_bundle, tmp_path):
    converted = convert_bundle(any_bundle, tmp_path / "converted", tables="fp32", mlp="bf16")
    model = onnx.load(converted.model_path, load_external_data=False)
    held = {tensor.name: tensor for tensor in model.graph.initializer}
    weights, rounded = any_bundle.dense_weights(), mlp_weight_keys(any_bundle.config)
    for key, weight in converted.dense_weights().items():
        np.testing.assert_array_equal(weight, weights[key])
        values = onnx.numpy_helper.to_array(held[key]).astype(np.float32)
        np.testing.assert_array_equal(values, from_bf16(to_bf16(weight)) if key in rounded else weight)
    chains = [node for node in model.graph.node if node.op_type == "Mlp"]
    assert sum(len(node.input) // 2 for node in chains) == len(rounded)
    assert ("Mlp" in converted.manifest.operators) == bool(rounded)


def test_int8_mlp_weights_have_a_scale_a_row_and_dense_npz_stays_fp32(any_bundle, tmp_path):
    converted = convert_bundle(any_bundle, tmp_path / "converted", tables="fp32", mlp="int8")
    model = onnx.load(converted.model_path, load_external_data=False)
    held = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer if tensor.raw_data}
    weights, rounded = any_bundle.dense_weights(), mlp_weight_keys(any_bundle.config)
    for key, weight in converted.dense_weights().items():
        np.testing.assert_array_equal(weight, weights[key])
        if key in rounded:
            codes, scales = quantize_weight(weight)
            np.testing.assert_array_equal(held.pop(f"{key}_scale"), scales)
            assert held[key].dtype == np.int8
            weight = codes
        np.testing.assert_array_equal(held.pop(key), weight)
    assert held == {}
    chains = [node for node in model.graph.node if node.op_type == "MlpInt8"]
    assert sum(len(node.input) // 3 for node in chains) == len(rounded)
    assert ("MlpInt8" in converted.manifest.operators) == bool(rounded)


def test_a_weight_that_int8_cannot_store_is_named_and_nothing_is_left(tmp_path):
    key = "over_arch.model.0._mlp.0._linear.weight"

    class Spoiled(RandomSource):
        def dense(self):
            tensors = super().dense()
            tensors[key][2, 1] = np.inf
            return tensors

    fp32 = export_bundle(Spoiled(CONFIGS["dot"], seed=3), tmp_path / "fp32")
    with pytest.raises(FormatError, match=f"{key}, row 2: int8 cannot store the value inf of input 1"):
        convert_bundle(fp32, tmp_path / "out", tables="int8", mlp="int8")
    assert not (tmp_path / "out").exists()


def test_the_golden_batch_holds_the_scores_of_both_models(tmp_path):
    fp32 = make_bundle("dot", tmp_path / "fp32")
    converted = convert_bundle(fp32, tmp_path / "int4", tables="int4", mlp="fp32")
    golden = converted.golden()
    np.testing.assert_array_equal(golden.fp32_probabilities, fp32.golden().probabilities)
    with open_engine(converted, "torch", threads=1) as torch:
        np.testing.assert_array_equal(golden.probabilities, torch.predict(golden.batch))
    assert not np.array_equal(golden.probabilities, golden.fp32_probabilities)


def test_errors_of_tables_are_measured_over_all_rows(tmp_path):
    fp32 = make_bundle("dot", tmp_path / "fp32")
    converted = convert_bundle(fp32, tmp_path / "int8", tables="int8", mlp="fp32")
    rows = np.array(fp32.map_tables()[0][:11]).astype(np.float64)
    error = decode("int8", encode("int8", rows.astype(np.float32)), 8) - rows
    record = converted.manifest.accuracy["tables"]["t_a"]
    assert record["relative_rms"] == pytest.approx(np.sqrt((error**2).sum() / (rows**2).sum()))
    assert record["max_abs"] == pytest.approx(np.abs(error).max())


def test_rows_that_would_not_become_smaller_stay_fp32(tmp_path):
    fp32 = make_bundle("factorization", tmp_path / "fp32")  # first-order weights are rows of one value
    converted = convert_bundle(fp32, tmp_path / "int8", tables="int8", mlp="fp32")
    assert set(converted.manifest.table_formats) == {"t_a", "t_b", "t_c"}
    reason = converted.manifest.accuracy["tables"]["t_a.wide"]["reason"]
    assert reason == "a row of int8 takes 5 bytes, of fp32 4"


class Spoiled(RandomSource):
    """Random rows with one value of one table replaced."""

    def __init__(self, value):
        super().__init__(CONFIGS["dot"], seed=3)
        self._value = value

    def part_chunks(self, part):
        for first, rows in super().part_chunks(part):
            if part.name == "t_b":
                rows[7, 3] = self._value
            yield first, rows


@pytest.mark.parametrize(("value", "tables"), [(1e30, "int8"), (np.inf, "int4"), (np.nan, "int8"), (7e4, "fp16")])
def test_a_row_that_cannot_be_stored_is_named_and_leaves_nothing(value, tables, tmp_path):
    fp32 = export_bundle(Spoiled(value), tmp_path / "fp32")
    with pytest.raises(FormatError, match=r"table 't_b': row 7: "):
        convert_bundle(fp32, tmp_path / "out", tables=tables)
    assert [path.name for path in tmp_path.iterdir()] == ["fp32"]


def test_blocks_do_not_show_in_what_is_stored(tmp_path, monkeypatch):
    fp32 = make_bundle("self", tmp_path / "fp32")
    whole = convert_bundle(fp32, tmp_path / "whole", tables="int4")
    monkeypatch.setattr("dlrm_deploy.export.formats_choice._BLOCK_VALUES", 40)
    counts = []
    pieces = convert_bundle(fp32, tmp_path / "pieces", tables="int4", progress=counts.append)
    assert whole.manifest.files == pieces.manifest.files
    assert sum(counts) == fp32.config.table_bytes
    assert max(counts) == 160


def test_the_source_is_compared_with_what_its_rows_become(tmp_path):
    fp32 = make_bundle("dot", tmp_path / "fp32")
    converted = convert_bundle(fp32, tmp_path / "int8", tables="int8")
    assert list(differences(converted, RandomSource(CONFIGS["dot"], seed=3))) == []
    assert "table t_a: 11 of 11 rows" in next(differences(converted, RandomSource(CONFIGS["dot"], seed=4)))


def test_int32_ids_and_provenance_are_kept(tmp_path):
    fp32 = make_bundle("dot", tmp_path / "fp32", index_dtype="int32")
    converted = convert_bundle(fp32, tmp_path / "int8")
    assert converted.manifest.index_dtype == np.int32
    assert converted.manifest.provenance["seed"] == 3
    assert converted.manifest.provenance["converted_from"] == fp32.manifest.files_digest("torch")


def test_what_accept_raises_leaves_nothing_and_what_it_records_stays(tmp_path):
    fp32 = make_bundle("dot", tmp_path / "fp32")

    def refuse(bundle):
        raise OutputError("no")

    with pytest.raises(OutputError, match="no"):
        convert_bundle(fp32, tmp_path / "out", accept=refuse)
    assert [path.name for path in tmp_path.iterdir()] == ["fp32"]
    converted = convert_bundle(fp32, tmp_path / "out", accept=lambda bundle: bundle.record_accuracy({"passed": True}))
    assert converted.manifest.accuracy["passed"] is True
    assert set(converted.manifest.accuracy["tables"]) == {"t_a", "t_b", "t_c"}


def test_what_cannot_be_converted_is_said(tmp_path, monkeypatch):
    fp32 = make_bundle("dot", tmp_path / "fp32")
    with pytest.raises(ConfigError, match="nothing is to be converted"):
        convert_bundle(fp32, tmp_path / "out", tables="fp32", mlp="fp32")
    with pytest.raises(ConfigError, match="tables must be one of fp32, fp16, bf16, int8, int4, auto"):
        convert_bundle(fp32, tmp_path / "out", tables="int2")
    converted = convert_bundle(fp32, tmp_path / "int8")
    with pytest.raises(ConfigError, match="is converted already: tables int8, mlp bf16"):
        convert_bundle(converted, tmp_path / "out")
    with pytest.raises(OutputError, match="exists already"):
        convert_bundle(fp32, converted.path)
    (tmp_path / "link").symlink_to(fp32.path)
    for same in (fp32.path, tmp_path / "link"):
        with pytest.raises(OutputError, match="holds the fp32 bundle, which would be lost"):
            convert_bundle(fp32, same, overwrite=True)
    assert Bundle.open(fp32.path, verify="full").manifest == fp32.manifest
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=600))
    with pytest.raises(OutputError, match=r"the tables need 648 bytes, and .* has 600 bytes free"):
        convert_bundle(fp32, tmp_path / "out")


def change_manifest(bundle, change):
    path = bundle.path / "manifest.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["table_formats"].update(t_a="int2"), "table_formats says 'int2' for 't_a'"),
        (lambda m: m["table_formats"].update(t_a=3), "table_formats says 3 for 't_a'"),
        (lambda m: m["table_formats"].update(t_a="int4"), "in a bundle whose tables are int8"),
        (lambda m: m["table_formats"].update(t_z="int8"), "table_formats says 'int8' for 't_z'"),
        (lambda m: m["table_formats"].pop("t_a"), "1 table groups for 2"),
        (lambda m: m.update(table_formats=[]), "is damaged"),
        (lambda m: m["table_groups"][0].update(format="int4"), "54 x 8 of width8 in int4"),
        (lambda m: m["table_groups"][0].update(rows=53), "is listed as 53 x 8"),
        (lambda m: m["files"]["tables/width8.int8.bin"].update(size=1), "in int8 and 1 bytes"),
        (lambda m: m.update(precision={"tables": "int8"}), "precision is"),
        (lambda m: m.update(precision={"tables": "int8", "mlp": "fp8"}), "precision is"),
        (lambda m: m.update(precision="int8"), "is damaged"),
        (lambda m: m.update(accuracy=[]), "the accuracy record is no object"),
        (lambda m: m["table_groups"][0].update(dtype="uint8"), "unknown key dtype"),
    ],
)
def test_a_manifest_whose_formats_do_not_go_together_is_refused(change, message, tmp_path):
    converted = convert_bundle(make_bundle("dot", tmp_path / "fp32"), tmp_path / "int8")
    change_manifest(converted, change)
    with pytest.raises(BundleError, match=message):
        Bundle.open(converted.path)


def test_a_bundle_of_the_first_version_opens_as_fp32(tmp_path):
    bundle = make_bundle("concat", tmp_path / "bundle")

    def as_version_1(values):
        values["format_version"] = 1
        for name in ("table_formats", "accuracy"):
            del values[name]
        for record in values["table_groups"]:
            del record["format"]
            record["dtype"] = "float32"

    change_manifest(bundle, as_version_1)
    again = Bundle.open(bundle.path, verify="full")
    assert again.manifest == replace(bundle.manifest, format_version=1)
    with open_engine(again, "torch") as torch:
        np.testing.assert_array_equal(torch.predict(bundle.golden().batch), bundle.golden().probabilities)
