import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import numpy_helper

from dlrm_deploy.bundle import Bundle
from dlrm_deploy.cli.main import cli
from dlrm_deploy.data.random import RandomDataset
from dlrm_deploy.engines.registry import ENGINE_NAMES
from dlrm_deploy.model.keys import top_keys
from dlrm_deploy.parity import check


@pytest.fixture
def run():
    return lambda *args: CliRunner().invoke(cli, ["check", *map(str, args)])


@pytest.fixture
def skewed(bundle, monkeypatch):
    """A bundle whose engines, but for torch, are off by 1e-3 in every row."""
    real = check.open_unchecked

    def open_unchecked(opened, name, **options):
        engine = real(opened, name, **options)
        if name != "torch":
            predict = engine.predict
            engine.predict = lambda batch: predict(batch) + np.float32(1e-3)
        return engine

    monkeypatch.setattr(check, "open_unchecked", open_unchecked)
    return bundle


def test_check_exits_0_prints_every_case_and_records_the_result(run, bundle):
    result = run(bundle.path, "--engine", "onnxruntime-stock")
    assert result.exit_code == 0, result.output
    for text in ("golden batch", "2048 random samples", "all bags empty", "PASSED  probability: max abs error"):
        assert text in result.stdout
    record = Bundle.open(bundle.path).manifest.parity["onnxruntime-stock"]
    assert record["passed"] is True
    assert record["max_abs"] <= record["limit"] == 1e-6
    assert record["reference"].startswith("torch")
    assert record["files"] == bundle.manifest.files_digest("onnxruntime-stock")
    assert 0 < record["max_ulp"] < 100


def test_check_exits_1_and_names_the_worst_row(run, skewed):
    result = run(skewed.path, "--engine", "onnxruntime-stock")
    assert result.exit_code == 1
    assert "FAILED  probability: max abs error 1.00e-03" in result.stdout
    assert Bundle.open(skewed.path).manifest.parity["onnxruntime-stock"]["passed"] is False


def test_a_wider_limit_lets_the_same_difference_pass_and_says_that_it_does_not_count(run, skewed):
    result = run(skewed.path, "--engine", "onnxruntime-stock", "--atol", "0.01")
    assert result.exit_code == 0
    assert "it does not count where parity is required" in result.stderr
    assert "accepted differences up to 0.01" in result.stderr


def test_json_is_one_object_with_all_cases(run, bundle):
    result = run(bundle.path, "--engine", "onnxruntime-stock", "--json")
    facts = json.loads(result.stdout)
    assert (facts["engine"], facts["passed"]) == ("onnxruntime-stock", True)
    assert {"max_abs", "max_rel", "worst_case", "worst_row", "rows", "seed", "limit"} <= set(facts)
    assert all(case["passed"] for case in facts["cases"])


def test_no_record_leaves_the_manifest_alone(run, bundle):
    before = (bundle.path / "manifest.json").read_bytes()
    assert run(bundle.path, "--engine", "onnxruntime-stock", "--no-record").exit_code == 0
    assert (bundle.path / "manifest.json").read_bytes() == before


def test_a_bundle_that_cannot_be_written_is_a_warning(run, bundle, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("dlrm_deploy.files._remove_leftovers", refuse)
    result = run(bundle.path, "--engine", "onnxruntime-stock", "--json")
    assert result.exit_code == 0
    assert "Warning: the result is not recorded in the bundle" in result.stderr
    assert "Permission denied" in result.stderr
    assert json.loads(result.stdout)["passed"] is True


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--engine", "caffe"), "'caffe' is not one of"),
        (("--atol", "-1"), "-1"),
        (("--atol", "inf"), "inf is no limit"),
        (("--atol", "nan"), "nan is no limit"),
        (("--seed", "x"), "'x'"),
        (("--batch", "1,many"), "'1,many' is not a list of whole numbers"),
        (("--batch", "-1"), "at least 0 samples, got -1"),
        (("--data", "missing.npz"), "missing.npz"),
        (("--max-auc-drop", "0.1"), "--max-auc-drop goes with --data or --recipe"),
        (("--resamples", "10"), "--resamples goes with --data or --recipe"),
        (("--data", "FILE", "--recipe", "FILE"), "either --data or --recipe"),
        (("--batch-file", "FILE", "--recipe", "FILE"), "leave --recipe out"),
        (("--batch-file", "FILE", "--batch", "3"), "leave --batch out"),
        (("--batch-file", "FILE", "--source", "FILE"), "leave --source out"),
        (("--data", "FILE", "--max-auc-drop", "nan"), "nan is no limit"),
    ],
)
def test_wrong_usage_exits_2(run, bundle, arguments, message):
    before = (bundle.path / "manifest.json").read_bytes()
    result = run(bundle.path, *(bundle.path / "golden.npz" if word == "FILE" else word for word in arguments))
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert (bundle.path / "manifest.json").read_bytes() == before


def test_a_path_that_does_not_exist_exits_2(run, tmp_path):
    assert run(tmp_path / "nowhere").exit_code == 2


def test_an_altered_table_exits_3_and_is_named(run, bundle):
    path = bundle.path / bundle.manifest.table_groups[0].file
    raw = bytearray(path.read_bytes())
    raw[5] ^= 1
    path.write_bytes(raw)
    result = run(bundle.path, "--engine", "onnxruntime-stock")
    assert result.exit_code == 3
    assert f"{path} was altered" in result.stderr


def test_a_plan_engine_without_a_plan_exits_3_and_says_how_to_build_one(run, bundle):
    pytest.importorskip("tensorrt_rtx")
    result = run(bundle.path, "--engine", "tensorrt-rtx")
    assert result.exit_code == 3
    assert f"dlrm-deploy build {bundle.path}" in result.stderr


def test_a_problem_other_than_numbers_is_printed_below_the_table(run, bundle, monkeypatch):
    real = check.open_unchecked

    def open_unchecked(opened, name, **options):
        engine = real(opened, name, **options)
        if name != "torch":
            predict = engine.predict
            engine.predict = lambda batch: predict(batch) if batch.batch_size != 2 else 1 / 0
        return engine

    monkeypatch.setattr(check, "open_unchecked", open_unchecked)
    result = run(bundle.path, "--engine", "onnxruntime-stock")
    assert result.exit_code == 1
    assert "2 random samples: division by zero" in result.stdout


def test_nan_is_counted_below_the_table(run, bundle, monkeypatch):
    real = check.open_unchecked

    def open_unchecked(opened, name, **options):
        engine = real(opened, name, **options)
        if name != "torch":
            predict = engine.predict
            engine.predict = lambda batch: predict(batch) * np.float32(np.nan)
        return engine

    monkeypatch.setattr(check, "open_unchecked", open_unchecked)
    result = run(bundle.path, "--engine", "onnxruntime-stock")
    assert result.exit_code == 1
    assert "37 random samples: 37 of 37 values are NaN or infinite." in result.stdout


def test_without_torch_the_output_says_that_only_the_golden_batch_was_compared(run, bundle, monkeypatch):
    monkeypatch.setattr(check, "missing_package", lambda name: "not here")
    result = run(bundle.path, "--engine", "onnxruntime-stock")
    assert result.exit_code == 0
    assert "Only the golden batch was compared" in result.stdout


def test_batch_sizes_can_be_chosen(run, bundle):
    result = run(bundle.path, "--engine", "onnxruntime-stock", "--batch", "3,5,3", "--json")
    names = [case["case"] for case in json.loads(result.stdout)["cases"]]
    assert [name for name in names if name.endswith("random samples")] == ["3 random samples", "5 random samples"]


def test_all_engines_are_checked_and_those_that_cannot_run_are_listed_with_the_reason(run, bundle):
    result = run(bundle.path, "--engine", "all", "--batch", "2", "--json")
    assert result.exit_code == 0, result.output
    facts = {line["engine"]: line for line in map(json.loads, result.stdout.splitlines())}
    assert list(facts) == [name for name in ENGINE_NAMES if name != "torch"]
    assert facts["onnxruntime"]["passed"] is facts["onnxruntime-stock"]["passed"] is True
    absent = {name: line for name, line in facts.items() if not line["compared"]}
    assert set(absent) == {"tensorrt-rtx", "tensorrt"}
    assert all(line["reason"] for line in absent.values())
    assert set(Bundle.open(bundle.path).manifest.parity) == {"onnxruntime", "onnxruntime-stock"}


def test_engines_that_cannot_run_do_not_hide_a_failure(run, skewed):
    result = run(skewed.path, "--engine", "tensorrt", "--engine", "onnxruntime-stock", "--batch", "2")
    assert result.exit_code == 1
    assert "FAILED  probability" in result.stdout
    assert "tensorrt was not compared: " in result.stdout


def test_nothing_that_could_be_compared_exits_3_with_every_reason(run, bundle):
    result = run(bundle.path, "--engine", "tensorrt", "--engine", "tensorrt-rtx")
    assert result.exit_code == 3
    for name in ("tensorrt", "tensorrt-rtx"):
        assert f"{name} was not compared: " in result.stderr
    assert Bundle.open(bundle.path).manifest.parity == {}


def test_the_reference_is_checked_where_it_is_named(run, bundle):
    result = run(bundle.path, "--engine", "torch", "--engine", "torch", "--batch", "2", "--json")
    assert [json.loads(line)["max_abs"] for line in result.stdout.splitlines()] == [0.0]


@pytest.fixture
def data(bundle, tmp_path):
    batch, labels = RandomDataset(bundle.config, 200, 3).batch(np.arange(200))
    np.savez(tmp_path / "data.npz", dense=batch.dense, indices=batch.indices, offsets=batch.offsets, labels=labels)
    return tmp_path / "data.npz"


LABELLED = ("--engine", "onnxruntime-stock", "--batch", "2", "--resamples", "20")


def test_labelled_data_is_compared_shown_and_recorded(run, bundle, data):
    result = run(bundle.path, "--data", data, *LABELLED)
    assert result.exit_code == 0, result.output
    for text in ("data.npz: 200 samples", "AUC", "log loss", "calibration", "PASSED  AUC: drop "):
        assert text in result.stdout
    record = Bundle.open(bundle.path).manifest.parity["onnxruntime-stock"]["labelled"]
    assert set(record["engine"]) == set(record["reference"]) == {"auc", "log_loss", "calibration"}
    assert record["auc_drop"]["low"] <= record["auc_drop"]["value"] <= record["auc_drop"]["high"]
    assert (record["samples"], record["resamples"], record["max_auc_drop"]) == (200, 20, 1e-4)


def test_a_drop_in_auc_above_the_limit_exits_1(run, bundle, data, monkeypatch):
    real = check.open_unchecked

    def open_unchecked(opened, name, **options):
        engine = real(opened, name, **options)
        predict = engine.predict
        if name != "torch":
            engine.predict = lambda batch: np.roll(predict(batch), 1) if batch.batch_size == 200 else predict(batch)
        return engine

    monkeypatch.setattr(check, "open_unchecked", open_unchecked)
    found = json.loads(run(bundle.path, "--data", data, *LABELLED, "--atol", "1", "--json", "--no-record").stdout)
    drop = found["labelled"]["auc_drop"]["value"]
    for limit, passed in ((abs(drop) + 1e-3, True), (0.0, drop <= 0)):
        result = run(bundle.path, "--data", data, *LABELLED, "--atol", "1", "--max-auc-drop", limit)
        assert result.exit_code == (0 if passed else 1)
        assert Bundle.open(bundle.path).manifest.parity["onnxruntime-stock"]["passed"] is passed


def test_the_test_split_of_a_recipe_is_labelled_data(run, bundle, tmp_path):
    (tmp_path / "model.json").write_text(json.dumps(bundle.config.to_dict()))
    recipe = tmp_path / "recipe.toml"
    text = '[model]\nfile = "model.json"\n[data]\nkind = "random"\nsize = 900\n[train]\nbatch_size = 9\nsteps = 1\n'
    recipe.write_text(text)
    result = run(bundle.path, "--recipe", recipe, *LABELLED, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["labelled"]
    assert (found["samples"], found["source"]) == (90, f"test split of {recipe}")
    other = tmp_path / "kaggle.toml"
    other.write_text(text.replace('file = "model.json"', 'preset = "kaggle"\nscale_rows = 1e-5'))
    result = run(bundle.path, "--recipe", other, *LABELLED)
    assert result.exit_code == 3
    assert "Give the recipe that this bundle's model was trained with" in result.stderr


def test_a_saved_batch_is_compared_alone_and_not_recorded(run, skewed, tmp_path):
    batch = skewed.golden().batch.rows(0, 3)
    np.savez(tmp_path / "one.npz", dense=batch.dense, indices=batch.indices, offsets=batch.offsets)
    result = run(skewed.path, "--engine", "onnxruntime-stock", "--batch-file", tmp_path / "one.npz", "--json")
    assert result.exit_code == 1
    case, *stored = json.loads(result.stdout)["cases"]
    assert [(one["case"], one["passed"]) for one in stored] == [(check.STORED, True), (check.GRAPH, True)]
    assert (case["case"], case["rows"], case["passed"]) == ("the batch given", 3, False)
    assert Bundle.open(skewed.path).manifest.parity == {}


def test_data_that_cannot_be_read_exits_3_before_anything_is_scored(run, bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(check, "open_unchecked", lambda *args, **options: pytest.fail("opened an engine"))
    (tmp_path / "d.npz").write_text("nothing")
    for option in ("--data", "--batch-file"):
        result = run(bundle.path, option, tmp_path / "d.npz")
        assert result.exit_code == 3
        assert "cannot read" in result.stderr


GOLDEN = Path(__file__).parents[1] / "golden"


def test_bisect_names_the_stage_and_saves_a_sample_that_shows_it_again(run, bundle, tmp_path):
    model = onnx.load(bundle.model_path, load_external_data=False)
    (bias,) = [t for t in model.graph.initializer if t.name == top_keys(bundle.config)[0][1]]
    bias.CopyFrom(numpy_helper.from_array(np.zeros(16, np.float32), bias.name))
    onnx.save(model, bundle.model_path)
    result = run(
        bundle.path, "--engine", "onnxruntime-stock", "--batch", "37", "--bisect", "--save", tmp_path / "w.npz"
    )
    assert result.exit_code == 1
    assert "ALTERED" in result.stderr
    assert "model.onnx" in result.stderr
    assert f"stored: weight {bias.name}: the graph holds zeros" in result.stdout
    assert "BISECT  first departure: top MLP, layer 0: sample" in result.stdout
    assert "onnxruntime-stock" not in json.loads((bundle.path / "manifest.json").read_text())["parity"]
    saved = ("--batch-file", tmp_path / "w.npz", "--bisect", "--save", tmp_path / "again.npz")
    again = run(bundle.path, "--engine", "onnxruntime-stock", *saved, "--json")
    shown = json.loads(again.stdout)
    assert (shown["passed"], shown["rows"]) == (False, 1)
    assert [one["stage"] for one in shown["bisect"]["departures"]] == [f"weight {bias.name}", "top MLP, layer 0"]


def test_without_onnx_a_bisection_still_prints_the_verdict_and_says_what_to_install(run, skewed, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    arguments = (skewed.path, "--engine", "onnxruntime-stock", "--batch", "2", "--bisect", "--save", tmp_path / "w.npz")
    result = run(*arguments)
    assert result.exit_code == 1
    assert "FAILED  probability" in result.stdout
    assert "pip install 'dlrm-deploy[export]'" in result.stdout
    facts = json.loads(run(*arguments, "--json").stdout)
    assert facts["passed"] is False
    assert "dlrm-deploy[export]" in facts["bisect"]["problem"]


def test_a_bundle_without_checksums_says_so(run, bundle):
    path = bundle.path / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["files"]["checksums.npz"]
    path.write_text(json.dumps(manifest))
    result = run(bundle.path, "--engine", "onnxruntime-stock", "--batch", "1")
    assert result.exit_code == 0
    assert "No checksums" in result.stderr
    assert check.STORED not in result.stdout


def test_tables_are_read_once_for_all_engines(run, bundle, monkeypatch):
    read = []
    monkeypatch.setattr(check, "altered_rows", lambda opened: read.append(opened) or iter(()))
    engines = ("--engine", "onnxruntime-stock", "--engine", "torch")
    assert run(bundle.path, *engines, "--batch", "1").exit_code == 0
    assert len(read) == 1


def test_bisect_of_a_bundle_that_passes_does_nothing(run, bundle):
    result = run(bundle.path, "--engine", "onnxruntime-stock", "--batch", "1", "--bisect")
    assert result.exit_code == 0
    assert "BISECT" not in result.stdout
    assert bundle.manifest.files.keys() == Bundle.open(bundle.path).manifest.files.keys()


def test_an_engine_that_shows_nothing_inside_says_so(run, bundle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    golden = bundle.golden()
    np.savez(bundle.path / "golden.npz", **replace(golden, probabilities=golden.probabilities / 2).arrays())
    result = run(bundle.path, "--engine", "torch", "--batch", "2", "--bisect")
    assert result.exit_code == 1
    assert "BISECT  not possible: engine torch does not show what happens inside" in result.stdout
    assert (tmp_path / f"{bundle.path.name}-torch-worst.npz").is_file()


@pytest.mark.parametrize(
    ("name", "options"),
    [("facebook/md.pt", ()), ("torchrec/mixed-2.dcp", ()), ("nvidia/dot", ()), ("facebook/qr-mult.pt", ("mult",))],
)
def test_every_row_and_weight_is_compared_with_the_source(name, options, run, tmp_path):
    source = GOLDEN / name
    extra = ["--qr-operation", *options] if options else []
    out = tmp_path / "bundle"
    exported = CliRunner().invoke(cli, ["export", str(source), "--out", str(out), *extra])
    assert exported.exit_code == 0, exported.output
    arguments = (out, "--source", source, "--batch", "1", "--engine", "onnxruntime-stock", "--bisect")
    assert run(*arguments).exit_code == 0
    (group, *_) = Bundle.open(out).config.groups
    matrix = np.memmap(out / "tables" / f"{group.name}.bin", np.float32, "r+", shape=(group.rows, group.width))
    matrix[group.row_starts[1] + 1, 0] += 1
    matrix.flush()
    result = run(*arguments)
    assert result.exit_code == 1
    part = group.parts[1].name
    assert f"the bundle differs from its source: table {part}: 1 of" in result.stdout
    assert "the first one is row 1." in result.stdout
    assert f"BISECT  first departure: table {part}: rows 0 to" in result.stdout


def test_the_checkpoint_of_another_model_is_no_source(run, bundle):
    result = run(bundle.path, "--source", GOLDEN / "facebook/md.pt", "--engine", "onnxruntime-stock")
    assert result.exit_code == 3
    assert "the checkpoint holds" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("--save", "x.npz"), "--save goes with --bisect"), (("--from", "facebook"), "--from goes with --source")],
)
def test_options_that_need_another_one_say_so(arguments, message, run, bundle):
    result = run(bundle.path, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
