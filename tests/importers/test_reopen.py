"""`check --source` opens whatever `export` opened, without the options that the export needed."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parent))
from facebook_models import FacebookModel, plain
from golden_scores import GOLDEN

from dlrm_deploy.bundle import Bundle
from dlrm_deploy.cli.main import cli
from dlrm_deploy.errors import CheckpointError
from dlrm_deploy.export.importers.common import ImportOptions
from dlrm_deploy.export.importers.detect import open_source, reopen_source

MODEL = FacebookModel(plain(10, 6, 8))


def with_unknown_tensors(folder):
    torch.save({"state_dict": {**MODEL.state, "gate.weight": torch.ones(2)}}, folder / "gated.pt")
    return folder / "gated.pt", ["--allow-unknown"]


def without_checksums(folder):
    whole = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        return MODEL.save(folder / "model.pt"), ["--no-crc"]
    finally:
        torch.serialization.set_crc32_options(whole)


def without_metadata(folder):
    path = folder / "nvidia"
    path.mkdir()
    for file in (GOLDEN / "nvidia" / "dot").iterdir():
        if file.name != "metadata.pt":
            (path / file.name).write_bytes(file.read_bytes())
    tables = len(list(path.glob("*.bin")))
    return path, ["--features", ",".join(f"cat_{i}" for i in reversed(range(tables)))]


def without_an_order(folder):
    return GOLDEN / "torchrec" / "dcp-plain.dcp", ["--features", "t_cat_2,t_cat_0,t_cat_1"]


def quotient_remainder(folder):
    prepared = ["--modulo", "300", "--dense-transform", "log1p", "--features", "a,b,c,d", "--name", "mine"]
    return GOLDEN / "facebook" / "qr-mult-mixed.pt", ["--qr-operation", "mult", *prepared, "--index-policy", "zero"]


def two_readings(folder):
    return GOLDEN / "facebook" / "one-layer.pt", ["--interaction", "cat"]


def two_projects(folder):
    bags = "sparse_arch.embedding_bag_collection.embedding_bags."
    torch.save({"a": MODEL.state, "b": {f"{bags}t_a.weight": torch.zeros(3, 2)}}, folder / "two.pt")
    return folder / "two.pt", ["--from", "facebook"]


def given_config(folder):
    path, _ = with_unknown_tensors(folder)
    source = open_source(path, "facebook", ImportOptions(allow_unknown=True))
    (folder / "model.json").write_text(source.config.to_json())
    return path, ["--config", str(folder / "model.json"), "--allow-unknown"]


def golden_file(folder):
    path = MODEL.save(folder / "model.pt")
    ids = np.arange(3)
    batch = {"dense": np.ones((1, 3)), "indices": ids, "offsets": np.arange(4)}
    bundle = folder / "first"
    assert CliRunner().invoke(cli, ["export", str(path), "--out", str(bundle)]).exit_code == 0
    from dlrm_deploy.batch import Batch

    scores = MODEL.forward(Batch(batch["dense"].astype(np.float32), ids, batch["offsets"]))
    np.savez(folder / "golden.npz", **batch, probabilities=scores)
    return path, ["--golden", str(folder / "golden.npz")]


CASES = [
    with_unknown_tensors,
    without_checksums,
    without_metadata,
    without_an_order,
    quotient_remainder,
    two_readings,
    two_projects,
    given_config,
    golden_file,
]


def export(path, out, options):
    result = CliRunner().invoke(cli, ["export", str(path), "--out", str(out), *options])
    assert result.exit_code == 0, result.output
    return Bundle.open(out)


def check(bundle, source):
    arguments = ["--source", source, "--batch", "1", "--engine", "onnxruntime-stock", "--no-record", "--json"]
    return CliRunner().invoke(cli, ["check", str(bundle), *map(str, arguments)])


@pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)
def test_check_needs_none_of_the_options_of_the_export(make, tmp_path):
    path, options = make(tmp_path)
    bundle = export(path, tmp_path / "bundle", options)
    (tmp_path / "golden.npz").unlink(missing_ok=True)
    result = check(bundle.path, path)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["passed"]


def test_a_file_without_checksums_needs_its_option(tmp_path):
    path, _ = without_checksums(tmp_path)
    result = CliRunner().invoke(cli, ["export", str(path), "--out", str(tmp_path / "bundle")])
    assert result.exit_code == 3
    assert "export it with --no-crc" in result.output


def test_an_order_that_the_export_was_told_is_compared_with(tmp_path):
    path, options = without_metadata(tmp_path)
    bundle = export(path, tmp_path / "bundle", options)
    manifest = json.loads((bundle.path / "manifest.json").read_text())
    told = manifest["provenance"]["options"]["features"]
    manifest["provenance"]["options"]["features"] = [told[1], told[0], *told[2:]]
    (bundle.path / "manifest.json").write_text(json.dumps(manifest))
    result = check(bundle.path, path)
    assert result.exit_code == 1
    assert "the bundle differs from its source: weight over_arch.model.0._mlp.0._linear.weight" in result.output


def test_another_checkpoint_is_not_answered_with_an_option_that_check_lacks(tmp_path):
    bundle = export(MODEL.save(tmp_path / "model.pt"), tmp_path / "bundle", ["--features", "a,b,c"])
    for other in ("facebook/qr-mult.pt", "torchrec/dot.pt", "nvidia/dot"):
        result = check(bundle.path, GOLDEN / other)
        assert result.exit_code == 3, result.output
        assert "is it the checkpoint that the bundle was made from?" in result.output


@pytest.mark.parametrize("options", [None, {"since": "a later release"}])
def test_where_the_options_are_not_known_the_config_stands_for_them(options, tmp_path):
    path, _ = quotient_remainder(tmp_path)
    config = open_source(path, "auto", ImportOptions(qr_operation="add")).config
    assert reopen_source(path, "auto", config, {"options": options}).config == config


@pytest.mark.parametrize("options", [{"features": 3}, {"name": []}, {"modulo": "x"}, {"dense_transform": "sqrt"}])
def test_options_that_were_damaged_are_refused(options, tmp_path):
    path = MODEL.save(tmp_path / "model.pt")
    config = open_source(path, "auto", ImportOptions()).config
    with pytest.raises(CheckpointError, match="what the export of the bundle was told"):
        reopen_source(path, "auto", config, {"options": options, "from": []})
