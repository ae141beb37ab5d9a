"""The whole road, on made-up ratings: small, but every step is the real one."""

import json
from importlib.util import find_spec

import pytest
from click.testing import CliRunner
from made_up_movielens import made_up, write_recbole

import dlrm_deploy
from dlrm_deploy.bundle import Bundle
from dlrm_deploy.cli.main import cli
from dlrm_deploy.demo import MARKER, Report, run_demo, summary
from dlrm_deploy.errors import OutputError
from dlrm_deploy.train.run import Silent


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_recbole(tmp_path_factory.mktemp("ml"), made_up(users=40, items=60, ratings=1500))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data):
    out = tmp_path_factory.mktemp("demo") / "out"
    result = CliRunner().invoke(cli, ["demo", "--out", str(out), "--data", str(data)])
    assert result.exit_code == 0, result.output
    return out, result.stdout


def test_the_report_holds_every_step(finished):
    report = json.loads((finished[0] / "report.json").read_text())
    assert 0 < report["dlrm"]["test_auc"] < 1
    assert 0 < report["logistic_regression"]["test_auc"] < 1
    assert {engine: record["passed"] for engine, record in report["parity"].items()} == {
        "onnxruntime": True,
        "onnxruntime-stock": True,
    }
    assert all(record["max_abs"] <= 1e-6 for record in report["parity"].values())
    assert {(row["engine"], row["batch"]) for row in report["bench"]} == {
        (engine, batch) for engine in ("torch", "onnxruntime-stock", "onnxruntime") for batch in (1, 128, 2048)
    }
    assert set(report["seconds"]) == {"train", "logistic_regression", "export", "build", "check", "bench"}


def test_the_bundle_is_usable_and_holds_verdicts_and_plan(finished):
    bundle = Bundle.open(finished[0] / "bundle", verify="full")
    assert bundle.manifest.provenance["source"] == "checkpoint"
    assert set(bundle.manifest.parity) == {"onnxruntime", "onnxruntime-stock"}
    golden = bundle.golden()
    assert abs(dlrm_deploy.load(bundle.path).predict(golden.batch) - golden.probabilities).max() <= 1e-6
    if find_spec("tensorrt_rtx"):
        (plan,) = bundle.manifest.plans
        assert (bundle.path / plan.plan).stat().st_size > 0
        assert json.loads((finished[0] / "report.json").read_text())["plans"][0]["executed"] is False


def test_the_summary_says_what_was_found_and_where_it_is(finished):
    out, text = finished
    for words in ("test AUC", "onnxruntime passed", "onnxruntime-stock passed", "samples/s", str(out / "bundle")):
        assert words in text
    assert (out / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_an_earlier_demo_is_replaced_and_anything_else_is_refused(tmp_path, data):
    out = tmp_path / "mine"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="was not made by the demo"):
        run_demo(out, print, Silent(), data)
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]
    (out / MARKER).touch()
    (out / "run").mkdir()
    (out / "run" / "from_an_earlier_demo").touch()
    with pytest.raises(InterruptedError):
        run_demo(out, stop, Silent(), data)
    assert not (out / "run").exists()
    assert (out / "thesis.txt").exists()


def stop(what):
    raise InterruptedError(what)


def test_a_summary_tells_a_failure_and_a_plan_that_was_not_built(tmp_path):
    report = Report(
        dlrm={"test_auc": 0.8},
        logistic_regression={"test_auc": 0.7},
        parity={"onnxruntime": {"passed": False, "max_abs": 0.5}},
        plans=[{"engine": "tensorrt-rtx", "built": False, "reason": "no package"}],
    )
    text = summary(tmp_path, report)
    assert "onnxruntime FAILED: max abs error 5.00e-01" in text
    assert "tensorrt-rtx not built: no package" in text
    assert "(+0.1000)" in text
    assert not report.passed
