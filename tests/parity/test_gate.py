"""Engines that have not passed a parity check: who is warned, and who is refused."""

import warnings
from dataclasses import replace

import pytest
from click.testing import CliRunner

import dlrm_deploy
from dlrm_deploy.bundle import Bundle, PlanRecord
from dlrm_deploy.cli.main import cli
from dlrm_deploy.engines.registry import open_engine, open_unchecked
from dlrm_deploy.errors import BundleError, EngineError, ParityWarning
from dlrm_deploy.parity.check import check_parity

ENGINE = "onnxruntime-stock"


@pytest.fixture
def checked(bundle):
    bundle.record_parity(ENGINE, check_parity(bundle, ENGINE, sizes=(2,), threads=1).record())
    return bundle


def edit_record(bundle, **changes):
    bundle.record_parity(ENGINE, {**bundle.manifest.parity[ENGINE], **changes})


def scores_without_warning(engine):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return engine.predict(engine.bundle.golden().batch).shape == (64,)


def test_an_engine_that_was_never_checked_warns_once_and_says_what_to_run(bundle):
    for _ in range(2):  # once for each engine object
        with dlrm_deploy.load(bundle.path, ENGINE) as engine:
            expected = f"never checked. Run `dlrm-deploy check {bundle.path} --engine {ENGINE}`"
            with pytest.warns(ParityWarning, match=expected) as caught:
                engine.predict(bundle.golden().batch)
            assert [warning.filename for warning in caught] == [__file__]
            assert scores_without_warning(engine)


def test_an_engine_that_passed_scores_without_a_word(checked):
    with dlrm_deploy.load(checked.path, ENGINE, require_parity=True) as engine:
        assert scores_without_warning(engine)


def test_the_reference_needs_no_record(bundle):
    with open_engine(bundle, "torch", require_parity=True) as engine:
        assert scores_without_warning(engine)


def test_the_check_itself_is_not_warned(bundle):
    with open_unchecked(bundle, ENGINE) as engine:
        assert scores_without_warning(engine)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check_parity(bundle, ENGINE, sizes=(2,), threads=1).passed


def test_parity_can_be_required(bundle):
    with pytest.raises(EngineError, match=f"{ENGINE} has not passed a parity check on .*: it was never checked. Run"):
        dlrm_deploy.load(bundle.path, ENGINE, require_parity=True)


def test_a_failed_check_does_not_count(checked):
    edit_record(checked, passed=False, time="2026-01-02")
    with pytest.raises(EngineError, match="the check of 2026-01-02 failed"):
        open_engine(checked, ENGINE, require_parity=True)


@pytest.mark.parametrize(
    ("options", "gap"),
    [
        ({"atol": 1.0}, "accepted differences up to 1, and this model's limit is 1e-06"),
        ({"sizes": (0,)}, "compared no random samples"),
    ],
)
def test_a_check_that_was_made_easier_does_not_count(options, gap, bundle):
    report = check_parity(bundle, ENGINE, **{"sizes": (2,), "threads": 1, **options})
    assert report.passed
    bundle.record_parity(ENGINE, report.record())
    with pytest.raises(EngineError, match=gap):
        open_engine(bundle, ENGINE, require_parity=True)


def test_a_tighter_limit_counts(bundle):
    bundle.record_parity(ENGINE, check_parity(bundle, ENGINE, sizes=(2,), threads=1, atol=9e-7).record())
    assert bundle.parity_gap(ENGINE) is None


def test_a_check_without_the_reference_does_not_count(bundle, monkeypatch):
    monkeypatch.setattr("dlrm_deploy.parity.check.missing_package", lambda name: f"no {name}")
    bundle.record_parity(ENGINE, check_parity(bundle, ENGINE, threads=1).record())
    with pytest.raises(EngineError, match="compared only the golden batch, because torch was not installed"):
        open_engine(bundle, ENGINE, require_parity=True)


def test_a_record_that_does_not_say_what_was_accepted_does_not_count(checked):
    edit_record(checked, default_limit=None)
    assert "does not say what was accepted" in checked.parity_gap(ENGINE)


def test_a_record_of_other_files_does_not_count(checked):
    files = checked.manifest.files
    for name in ("model.onnx", "dense.npz", checked.manifest.table_groups[0].file):
        changed = {**files, name: replace(files[name], sha256="0" * 64)}
        other = Bundle(checked.path, replace(checked.manifest, files=changed))
        with pytest.raises(EngineError, match="is of other files"):
            open_engine(other, ENGINE, require_parity=True)
    edit_record(checked, files=None)
    with pytest.raises(EngineError, match="is of other files"):
        open_engine(checked, ENGINE, require_parity=True)


def add_plan(bundle, engine, text):
    (bundle.path / "engines").mkdir(exist_ok=True)
    for name in ("plan", "json"):
        (bundle.path / f"engines/{engine}-{text}.{name}").write_text(text)
    base = f"engines/{engine}-{text}"
    bundle.add_plan(PlanRecord(engine=engine, plan=f"{base}.plan", sidecar=f"{base}.json"))


def test_a_record_belongs_to_its_engines_own_plan_and_to_no_other(bundle):
    stock = bundle.manifest.files_digest(ENGINE)
    add_plan(bundle, "tensorrt", "a")
    first = bundle.manifest.files_digest("tensorrt")
    add_plan(bundle, "tensorrt-rtx", "a")
    assert bundle.manifest.files_digest("tensorrt") == first
    assert bundle.manifest.files_digest(ENGINE) == stock
    add_plan(bundle, "tensorrt", "b")
    assert bundle.manifest.files_digest("tensorrt") not in (first, stock)


def test_a_record_that_is_no_object_is_damage(checked):
    path = checked.path / "manifest.json"
    text = replace(checked.manifest, parity={}).to_json()
    path.write_text(text.replace('"parity": {}', '"parity": {"onnxruntime": 5}'))
    with pytest.raises(BundleError, match="a parity record is no object"):
        Bundle.open(checked.path)


BENCH = ("--batch", "1", "--rounds", "1", "--slice-ms", "0.1", "--threads", "1", "--json")


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr("dlrm_deploy.bench.inputs.GATHERED_BYTES", 1 << 12)
    monkeypatch.setattr("dlrm_deploy.bench.measure.SETTLE_SECONDS", 0.0)
    monkeypatch.setattr("dlrm_deploy.bench.calibration.MILLISECONDS", 0.1)
    monkeypatch.setattr("dlrm_deploy.bench.calibration.BUFFER_BYTES", 1 << 16)


def test_bench_refuses_engines_that_have_not_passed_where_parity_is_required(checked, quick):
    def bench(*arguments):
        return CliRunner().invoke(cli, ["bench", *map(str, arguments), "--require-parity", *BENCH])

    refused = bench(checked.path, "--engine", f"{ENGINE},onnxruntime")
    assert refused.exit_code == 3
    assert "engine onnxruntime has not passed a parity check" in refused.stderr
    assert f"engine {ENGINE} has" not in refused.stderr
    assert refused.stdout == ""
    assert bench(checked.path, "--engine", f"torch,{ENGINE}").exit_code == 0
    preset = bench("--preset", "kaggle", "--scale-rows", "1e-5")
    assert preset.exit_code == 2
    assert "--require-parity goes with a BUNDLE" in preset.stderr


def test_bench_compares_outputs_itself_and_does_not_warn(bundle, quick):
    with warnings.catch_warnings():
        warnings.simplefilter("error", ParityWarning)
        result = CliRunner().invoke(cli, ["bench", str(bundle.path), "--engine", ENGINE, *BENCH])
    assert result.exit_code == 0, result.output
