import json

import pytest
from click.testing import CliRunner

from dlrm_deploy.bundle import PlanRecord
from dlrm_deploy.cli import inspect as command
from dlrm_deploy.cli.main import cli


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    return lambda *args: CliRunner().invoke(cli, ["inspect", *map(str, args)])


def spoil(bundle, name):
    path = bundle.path / name
    raw = bytearray(path.read_bytes())
    raw[7] ^= 1
    path.write_bytes(raw)


def test_inspect_shows_features_tables_bytes_precision_and_verified_hashes(run, bundle):
    result = run(bundle.path)
    assert result.exit_code == 0, result.output
    for text in ("bottom 16-8, interaction dot, top 16-8-1", "t_b", "0 to 5", "mean", "tables fp32", "576 B"):
        assert text in result.stdout  # 18 rows x 8 values x 4 bytes = 576 bytes
    assert f"all {len(bundle.manifest.files)} files are as they were written" in result.stdout
    assert f"not checked yet: dlrm-deploy check {bundle.path}" in result.stdout


def test_inspect_says_which_implementation_each_engine_uses(run, bundle):
    engines = json.loads(run(bundle.path, "--json").stdout)["engines"]
    assert engines["torch"]["implementations"]["EmbeddingBagDotInteraction"] == "PyTorch eager"
    stock = engines["onnxruntime-stock"]["implementations"]
    assert stock == dict.fromkeys(bundle.manifest.operators, "function body of standard operators")
    assert set(engines) == set(command.ENGINE_NAMES)


def test_an_engine_that_cannot_be_opened_says_why(run, bundle, monkeypatch):
    monkeypatch.setattr("dlrm_deploy.engines.registry.find_spec", lambda module: None)
    result = run(bundle.path)
    assert result.exit_code == 0
    assert "not here: engine tensorrt needs the package tensorrt" in result.stdout


def test_json_tells_tables_and_their_features(run, bundle):
    facts = json.loads(run(bundle.path, "--json").stdout)
    assert facts["altered"] == []
    assert facts["tables"][1] == {
        "name": "t_b", "ids": 18, "rows": 18, "width": 8, "partition": "full", "formats": ["fp32"], "bytes": 576,
        "features": ["b"],
    }  # fmt: skip
    assert facts["bytes"]["tables"] == sum(table["bytes"] for table in facts["tables"])
    assert facts["model"] == bundle.config.to_dict()


def test_parity_records_are_shown(run, bundle):
    bundle.record_parity("onnxruntime", {"passed": False, "max_abs": 0.25, "rows": 7, "time": "2026-01-02"})
    assert "onnxruntime FAILED, max abs 0.25, 7 rows, 2026-01-02" in run(bundle.path).stdout


def add_plan(bundle, sidecar):
    (bundle.path / "engines").mkdir()
    (bundle.path / "engines/p.plan").write_bytes(b"0123456789")
    (bundle.path / "engines/p.json").write_text(sidecar)
    bundle.add_plan(PlanRecord(engine="tensorrt", plan="engines/p.plan", sidecar="engines/p.json"))


def test_plans_are_shown_with_their_sidecar(run, bundle):
    add_plan(bundle, '{"precision": "fp16"}')
    plan = json.loads(run(bundle.path, "--json").stdout)["plans"][0]
    assert plan == {
        "engine": "tensorrt", "plan": "engines/p.plan", "bytes": 10, "sidecar": {"precision": "fp16"},
    }  # fmt: skip
    assert "engines/p.plan, tensorrt, 10 B" in run(bundle.path).stdout


def test_every_altered_or_missing_file_is_named_and_no_engine_opens_them(run, bundle, monkeypatch):
    add_plan(bundle, "{}")
    monkeypatch.setattr(command, "open_engine", lambda *args, **options: pytest.fail("opened a damaged bundle"))
    table = bundle.manifest.table_groups[0].file
    spoil(bundle, table)
    spoil(bundle, "engines/p.plan")
    (bundle.path / "engines/p.json").unlink()
    with (bundle.path / "golden.npz").open("ab") as file:
        file.write(b"more")
    result = run(bundle.path)
    assert result.exit_code == 1
    for text in (f"{table} was altered", "p.plan was altered", "p.json is missing", "golden.npz has"):
        assert text in result.stdout
    assert "model.onnx was altered" not in result.stdout
    facts = json.loads(run(bundle.path, "--json").stdout)
    assert len(facts["altered"]) == 4
    assert facts["plans"][0]["sidecar"] is None


def test_a_folder_that_is_no_bundle_exits_3(run, tmp_path):
    result = run(tmp_path)
    assert result.exit_code == 3
    assert "is not a bundle" in result.stderr


def test_a_path_that_does_not_exist_exits_2(run, tmp_path):
    assert run(tmp_path / "nowhere").exit_code == 2


@pytest.mark.parametrize(
    ("size", "text"),
    [(999, "999 B"), (1000, "1.0 kB"), (2_500_000, "2.5 MB"), (2_160_000_000, "2.16 GB"), (12e12, "12000.00 GB")],
)
def test_bytes_are_readable(size, text):
    assert command._bytes(size) == text


def test_a_pipe_cuts_no_name(bundle, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setenv("TERM", "dumb")
    result = CliRunner().invoke(cli, ["inspect", str(bundle.path)])
    assert result.exit_code == 0, result.output
    assert "…" not in result.stdout
    assert max(map(len, result.stdout.splitlines())) > 80


@pytest.mark.parametrize("accuracy", [{"tables": {"t_a": 3}}, {"tables": []}, {"golden": 5}, {"labelled": {"x": 1}}])
def test_a_damaged_record_of_the_conversion_is_said(accuracy, run, bundle):
    path = bundle.path / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"accuracy": accuracy}))
    result = run(bundle.path)
    assert result.exit_code == 0, result.output
    assert "the record of the conversion is damaged" in result.stdout
