import json

import pytest
from bundles import make_bundle
from click.testing import CliRunner

from dlrm_deploy.bundle import Bundle
from dlrm_deploy.cli.main import cli
from dlrm_deploy.presets import preset


def run(*arguments):
    return CliRunner().invoke(cli, ["export", *map(str, arguments)])


def test_a_preset_becomes_a_bundle(tmp_path):
    result = run("--preset", "kaggle", "--scale-rows", "1e-5", "--out", tmp_path / "bundle")
    assert result.exit_code == 0
    assert "Next: dlrm-deploy check" in result.stdout
    assert Bundle.open(tmp_path / "bundle", verify="full").config == preset("kaggle", 1e-5)


def test_json_is_one_object(tmp_path):
    result = run("--preset", "kaggle", "--scale-rows", "1e-5", "--out", tmp_path / "bundle", "--json")
    assert json.loads(result.stdout)["model"] == "kaggle"


def test_seed_ids_and_index_policy_are_taken(tmp_path):
    options = ["--preset", "kaggle", "--scale-rows", "1e-5"]
    assert (
        run(*options, "--seed", 1, "--ids", "int32", "--index-policy", "zero", "--out", tmp_path / "a").exit_code == 0
    )
    assert run(*options, "--out", tmp_path / "b").exit_code == 0
    a, b = Bundle.open(tmp_path / "a"), Bundle.open(tmp_path / "b")
    assert a.manifest.index_dtype == "int32"
    assert a.config.index_policy == "zero"
    assert a.manifest.files["tables/width16.bin"] != b.manifest.files["tables/width16.bin"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either CHECKPOINT or --preset"),
        (["checkpoint", "--preset", "kaggle"], "give either CHECKPOINT or --preset"),
        (["checkpoint", "--seed", "1"], "--scale-rows and --seed go with --preset"),
        (["--preset", "kaggle", "--seed", "-1"], "Invalid value for '--seed'"),
        (["--preset", "criteo"], "Invalid value for '--preset'"),
        (["--preset", "kaggle", "--scale-rows", "0"], "Invalid value for '--scale-rows'"),
    ],
)
def test_wrong_usage_exits_2(arguments, message, tmp_path):
    result = run(*arguments, "--out", tmp_path / "bundle")
    assert result.exit_code == 2
    assert message in result.output


def test_rows_beyond_any_disk_are_an_error(tmp_path):
    result = run("--preset", "kaggle", "--scale-rows", "1e30", "--out", tmp_path / "bundle")
    assert result.exit_code == 3
    assert "more than any disk holds" in result.output


def test_a_checkpoint_that_is_not_there_exits_3_without_a_traceback(tmp_path):
    result = run(tmp_path / "nowhere", "--out", tmp_path / "bundle")
    assert result.exit_code == 3
    assert result.output.startswith("Error: ")
    assert "nowhere" in result.output


def test_an_existing_bundle_is_kept(tmp_path):
    bundle = make_bundle("dot", tmp_path / "bundle")
    result = run("--preset", "kaggle", "--scale-rows", "1e-5", "--out", bundle.path)
    assert result.exit_code == 3
    assert "exists already" in result.output
    assert Bundle.open(bundle.path, verify="full").config.name == "dot"


def test_a_place_that_cannot_be_written_exits_3(tmp_path):
    (tmp_path / "file").write_text("in the way")
    result = run("--preset", "kaggle", "--scale-rows", "1e-5", "--out", tmp_path / "file" / "bundle")
    assert result.exit_code == 3
    assert "cannot write" in result.output
