import json
import pickle
import re
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from bundles import make_bundle
from click.testing import CliRunner

from dlrm_deploy.bundle import Bundle
from dlrm_deploy.cli.main import cli
from dlrm_deploy.presets import preset

GOLDEN = Path(__file__).parents[1] / "golden" / "facebook"


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
        ([], "give either SOURCE or --preset"),
        (["checkpoint", "--preset", "kaggle"], "give either SOURCE or --preset"),
        (["--preset", "kaggle", "--modulo", "3", "--from", "auto"], "--from, --modulo goes with SOURCE, not --preset"),
        (["checkpoint", "--from", "hugectr"], "Invalid value for '--from'"),
        (["checkpoint", "--modulo", "0"], "Invalid value for '--modulo'"),
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
    result = run("--preset", "kaggle", "--scale-rows", "1e10", "--out", tmp_path / "bundle")
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


def golden_file(variant, path):
    """The project's own inputs and outputs, in the form of --golden."""
    with np.load(GOLDEN / f"{variant}.npz") as file:
        arrays = {name: file[name] for name in ("dense", "indices", "offsets")}
        np.savez(path, probabilities=file["expected"], **arrays)
    return path


def test_a_foreign_checkpoint_becomes_a_bundle_and_says_what_was_recognised(tmp_path):
    golden = golden_file("md", tmp_path / "golden.npz")
    result = run(
        GOLDEN / "md.pt", "--golden", golden, "--features", "a,b, c,d,e", "--name", "md", "--out", tmp_path / "b"
    )
    assert result.exit_code == 0, result.output
    for text in (
        "facebookresearch/dlrm checkpoint md.pt",
        "bottom 5-8, interaction dot, top 23-8-1",
        "tables: 2 plain, 3 plain with projection",
        "dense values: as given",
        "Wrote ",
        "Next: dlrm-deploy check",
    ):
        assert text in result.stdout
    bundle = Bundle.open(tmp_path / "b", verify="full")
    assert bundle.config.name == "md"
    assert [feature.name for feature in bundle.config.features] == list("abcde")
    assert len(bundle.golden().probabilities) == 24


def test_json_says_what_was_recognised(tmp_path):
    result = run(GOLDEN / "cat.pt", "--from", "facebook", "--json", "--out", tmp_path / "bundle")
    facts = json.loads(result.stdout)
    assert facts["model"] == "imported"
    assert any("interaction concat" in line for line in facts["recognised"])


def test_every_option_for_foreign_checkpoints_is_taken(tmp_path):
    options = ["--qr-operation", "add", "--quotient", "exact", "--dense-transform", "log1p", "--modulo", "110"]
    result = run(
        GOLDEN / "qr-add.pt", *options, "--interaction", "dot", "--allow-unknown", "--out", tmp_path / "bundle"
    )
    assert result.exit_code == 0, result.output
    config = Bundle.open(tmp_path / "bundle").config
    assert {table.combine for table in config.tables} == {"add"}
    assert (config.dense_transform, config.features[0].modulo) == ("log1p", 110)


def test_a_config_file_is_taken_instead_of_shapes(tmp_path):
    assert run(GOLDEN / "one-layer.pt", "--interaction", "cat", "--out", tmp_path / "a").exit_code == 0
    config = Bundle.open(tmp_path / "a").config
    (tmp_path / "model.toml").write_text(config.to_toml())
    assert run(GOLDEN / "one-layer.pt", "--config", tmp_path / "model.toml", "--out", tmp_path / "b").exit_code == 0
    assert Bundle.open(tmp_path / "b").config == config
    result = run(GOLDEN / "one-layer.pt", "--config", tmp_path / "nowhere.toml", "--out", tmp_path / "c")
    assert result.exit_code == 3
    assert "cannot read" in result.output


def test_outputs_that_differ_from_the_golden_file_leave_no_bundle(tmp_path):
    golden = golden_file("loss-threshold", tmp_path / "golden.npz")
    result = run(GOLDEN / "loss-threshold.pt", "--golden", golden, "--out", tmp_path / "bundle")
    assert result.exit_code == 3
    assert "golden.npz differs by" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["golden.npz"]


class _Runs:
    """What a malicious file holds: a call that leaves a mark."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


def test_a_malicious_checkpoint_runs_nothing_and_leaves_nothing(tmp_path):
    mark, path = tmp_path / "mark", tmp_path / "model.pt"
    state = torch.load(GOLDEN / "plain-dot.pt", weights_only=False)["state_dict"]
    torch.save({"state_dict": state, "epoch": _Runs(mark)}, path)
    result = run(path, "--out", tmp_path / "bundle")
    assert result.exit_code == 3
    assert "it was not called" in result.output
    path.write_bytes(pickle.dumps(_Runs(mark)))
    assert run(path, "--out", tmp_path / "bundle").exit_code == 3
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.pt"]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_checkpoint_leaves_nothing(share, tmp_path):
    whole = (GOLDEN / "plain-dot.pt").read_bytes()
    (tmp_path / "model.pt").write_bytes(whole[: int(share * len(whole))])
    result = run(tmp_path / "model.pt", "--out", tmp_path / "bundle")
    assert result.exit_code == 3
    assert result.output.startswith("Error: ")
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.pt"]


def test_a_flipped_bit_in_a_table_leaves_nothing_unless_checksums_are_not_compared(tmp_path):
    path = tmp_path / "model.pt"
    content = bytearray((GOLDEN / "plain-dot.pt").read_bytes())
    table = torch.load(GOLDEN / "plain-dot.pt", weights_only=False)["state_dict"]["emb_l.1.weight"]
    content[content.index(table.numpy().tobytes()) + 1] ^= 1
    path.write_bytes(content)
    result = run(path, "--out", tmp_path / "bundle")
    assert result.exit_code == 3
    assert "which holds state_dict.emb_l.1.weight, was altered" in result.output
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.pt"]
    assert run(path, "--no-crc", "--out", tmp_path / "bundle").exit_code == 0


def test_ignored_tensors_are_listed_in_every_output(tmp_path):
    content = torch.load(GOLDEN / "plain-dot.pt", weights_only=False)
    content["state_dict"]["gate.weight"] = torch.ones(1)
    torch.save(content, tmp_path / "model.pt")
    result = run(tmp_path / "model.pt", "--allow-unknown", "--out", tmp_path / "a")
    assert "  ignored tensors: state_dict.gate.weight\n" in result.stdout
    result = run(tmp_path / "model.pt", "--allow-unknown", "--json", "--out", tmp_path / "b")
    ignored = {"count": 1, "names": ["state_dict.gate.weight"]}
    assert json.loads(result.stdout)["ignored"] == ignored
    assert Bundle.open(tmp_path / "b").manifest.provenance["ignored_tensors"] == ignored


def test_a_full_disk_is_told_in_units_that_fit(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1200))
    result = run(GOLDEN / "plain-dot.pt", "--out", tmp_path / "bundle")
    assert result.exit_code == 3
    assert re.search(r"the tables need \d+\.\d kB, and .* has 1\.2 kB free", result.output)


def test_a_small_bundle_of_one_table_is_told_so(tmp_path):
    path = Path(__file__).parents[1] / "golden" / "torchrec" / "single-table.pt"
    result = run(path, "--out", tmp_path / "bundle")
    assert re.search(r": imported, 1 table, \d+\.\d kB\.", result.stdout), result.output


def test_a_checkpoint_with_a_record_missing_leaves_nothing(tmp_path):
    with zipfile.ZipFile(GOLDEN / "plain-dot.pt") as whole, zipfile.ZipFile(tmp_path / "model.pt", "w") as part:
        for name in whole.namelist():
            if not name.endswith("data/2"):
                part.writestr(name, whole.read(name))
    result = run(tmp_path / "model.pt", "--out", tmp_path / "bundle")
    assert result.exit_code == 3
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.pt"]


def test_help_shows_the_options_of_foreign_checkpoints_in_a_section_of_their_own():
    text = run("--help").stdout
    own, foreign = text.split("Checkpoints of other projects")
    assert "--out" in own
    assert "--qr-operation" not in own
    assert "--qr-operation" in foreign
