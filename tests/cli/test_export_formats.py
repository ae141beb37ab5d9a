"""`dlrm-deploy export --tables --mlp`: conversion on the command line, with its gate."""

import json

import numpy as np
import pytest
from bundles import CONFIGS, make_bundle
from click.testing import CliRunner

from dlrm_deploy.bundle import Bundle
from dlrm_deploy.checkpoint import save_checkpoint
from dlrm_deploy.cli.main import cli
from dlrm_deploy.data.random import random_batch
from dlrm_deploy.engines.registry import open_engine
from dlrm_deploy.model.dlrm import DLRM

KAGGLE = ("--preset", "kaggle", "--scale-rows", "1e-5")


def run(*arguments):
    return CliRunner().invoke(cli, ["export", *map(str, arguments)])


def save_labelled(path, config, samples=400):
    batch = random_batch(config, samples, np.random.default_rng(0))
    labels = np.arange(samples) % 2
    np.savez(path, dense=batch.dense, indices=batch.indices, offsets=batch.offsets, labels=labels)
    return path


@pytest.mark.parametrize("mlp", ["bf16", "int8"])
def test_a_preset_is_converted_checked_and_leaves_no_fp32_bundle(tmp_path, mlp):
    result = run(*KAGGLE, "--tables", "int8", "--mlp", mlp, "--out", tmp_path / "bundle")
    assert result.exit_code == 0, result.output
    bundle = Bundle.open(tmp_path / "bundle", verify="full")
    assert bundle.manifest.precision == {"tables": "int8", "mlp": mlp}
    assert bundle.parity_gap("onnxruntime-stock") is None
    assert bundle.manifest.accuracy["passed"]
    for text in (
        "onnxruntime-stock: PASSED",
        "random inputs: probabilities differ by",
        "not compared, there are no lab",
    ):
        assert text in result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_an_fp32_bundle_is_converted_and_kept(tmp_path):
    fp32 = make_bundle("dot", tmp_path / "fp32")
    labelled = save_labelled(tmp_path / "labelled.npz", fp32.config)
    result = run(fp32.path, "--tables", "fp16", "--data", labelled, "--json", "--out", tmp_path / "fp16")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["precision"] == {"tables": "fp16", "mlp": "fp32"}
    assert facts["accuracy"]["labelled"]["samples"] == 400
    assert facts["table_formats"] == {"t_a": "fp16", "t_b": "fp16", "t_c": "fp16"}
    assert Bundle.open(fp32.path, verify="full").manifest == fp32.manifest


def test_a_model_that_loses_too_much_exits_1_and_leaves_nothing(tmp_path):
    fp32 = make_bundle("one_hot", tmp_path / "fp32")
    batch = random_batch(fp32.config, 1000, np.random.default_rng(0))
    with open_engine(fp32, "torch") as torch:
        scores = torch.predict(batch)
    labels = scores > np.median(scores)  # whoever ranks otherwise loses
    np.savez(tmp_path / "l.npz", dense=batch.dense, indices=batch.indices, offsets=batch.offsets, labels=labels)
    options = [fp32.path, "--tables", "int4", "--data", tmp_path / "l.npz", "--out", tmp_path / "int4"]
    result = run(*options)
    assert result.exit_code == 1
    assert "AUC drops by" in result.stderr
    assert "accept more (--max-auc-drop, --max-logloss-rise)" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fp32", "l.npz"]
    assert run(*options, "--max-auc-drop", "1", "--max-logloss-rise", "1").exit_code == 0


@pytest.fixture
def run_folder(tmp_path):
    """A RUN folder whose recipe's data has the model's features."""
    config = CONFIGS["dot"]
    save_checkpoint(
        tmp_path / "run/best", config=config, tensors=DLRM(config).named_tensors(), optimizer={}, trainer_state={}
    )
    (tmp_path / "model.toml").write_text(config.to_toml())
    (tmp_path / "run/recipe.toml").write_text(
        '[model]\nfile = "../model.toml"\n[data]\nkind = "random"\nsize = 3000\n'
        "[optimizer]\n[train]\nbatch_size = 64\nsteps = 1\n"
    )
    return tmp_path / "run"


def test_a_checkpoint_brings_the_test_split_of_its_run(run_folder, tmp_path):
    limits = ["--max-auc-drop", "1", "--max-logloss-rise", "1"]
    result = run(run_folder / "best", "--mlp", "bf16", *limits, "--out", tmp_path / "bundle")
    assert result.exit_code == 0, result.output
    assert f"samples of test split of {run_folder / 'recipe.toml'}" in result.stdout


def test_a_recipe_whose_data_cannot_be_had_is_said_and_not_compared_on(run_folder, tmp_path):
    (run_folder / "recipe.toml").write_text("[data]\n")
    result = run(run_folder / "best", "--mlp", "bf16", "--out", tmp_path / "bundle")
    assert result.exit_code == 0, result.output
    assert "cannot be had, and is not compared on" in result.stdout
    assert Bundle.open(tmp_path / "bundle").manifest.accuracy["labelled"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*KAGGLE, "--tables", "int2"], "Invalid value for '--tables'"),
        ([*KAGGLE, "--max-auc-drop", "0.1"], "--max-auc-drop goes with --tables or --mlp"),
        ([*KAGGLE, "--tables", "int8", "--max-logloss-rise", "inf"], "inf is no limit"),
        (["{bundle}"], "is a bundle already: give --tables or --mlp"),
        (["{bundle}", "--tables", "int8", "--ids", "int32"], "no option about checkpoints"),
        (["{bundle}", "--tables", "int8", "--name", "x"], "no option about checkpoints"),
        (["{bundle}", "--tables", "int8", "--data", "{data}", "--recipe", "{data}"], "either --data or --recipe"),
    ],
)
def test_wrong_usage_exits_2(arguments, message, tmp_path):
    fp32 = make_bundle("dot", tmp_path / "fp32")
    data = save_labelled(tmp_path / "l.npz", fp32.config)
    result = run(*(one.format(bundle=fp32.path, data=data) for one in arguments), "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()


def test_a_place_that_is_taken_is_refused_before_anything_is_exported(tmp_path, monkeypatch):
    fp32 = make_bundle("dot", tmp_path / "bundle")
    monkeypatch.setattr("dlrm_deploy.export.bundle.export_bundle", lambda *args, **options: pytest.fail("exported"))
    result = run(*KAGGLE, "--tables", "int8", "--out", fp32.path)
    assert result.exit_code == 3
    assert "exists already" in result.stderr


def test_inspect_shows_what_was_saved_and_what_it_cost(tmp_path):
    fp32 = make_bundle("dot", tmp_path / "fp32")
    labelled = save_labelled(tmp_path / "l.npz", fp32.config)
    limits = ["--max-auc-drop", "1", "--max-logloss-rise", "1"]
    options = ["--tables", "int8", "--mlp", "bf16", "--data", labelled, *limits]
    assert run(fp32.path, *options, "--out", tmp_path / "int8").exit_code == 0
    shown = CliRunner().invoke(cli, ["inspect", str(tmp_path / "int8")], env={"COLUMNS": "160"})
    assert shown.exit_code == 0, shown.output
    for text in (
        "tables int8, mlp bf16",
        "1.1 kB: tables take 648 B instead of 1.7 kB in fp32",
        "in int8: relative RMS error 0.00",
        "random samples: max abs",
        "400 samples of ",
        " in fp32, ",
    ):
        assert text in shown.stdout
    facts = json.loads(CliRunner().invoke(cli, ["inspect", str(tmp_path / "int8"), "--json"]).stdout)
    assert facts["table_bytes"] == {"stored": 648, "fp32": 1728}
    assert facts["tables"][1]["formats"] == ["int8"]
    assert facts["tables"][1]["bytes"] == 18 * 12
