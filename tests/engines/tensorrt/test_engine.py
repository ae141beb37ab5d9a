"""Opening and executing plans.

The stand-in library executes on host memory: it shows that our side is right, not NVIDIA's.
"""

import json
from dataclasses import replace

import numpy as np
import pytest
from plan_models import ARCHITECTURES, awkward_batches, batch_of

from dlrm_deploy.bundle import Bundle, FileRecord
from dlrm_deploy.engines.registry import open_engine
from dlrm_deploy.engines.tensorrt import cuda
from dlrm_deploy.engines.tensorrt.build import build_plan
from dlrm_deploy.engines.tensorrt.engine import _check_device, open_tensorrt_engine
from dlrm_deploy.engines.torch_eager import TorchEngine
from dlrm_deploy.errors import BatchError, BundleError, EngineError
from dlrm_deploy.files import sha256_file
from dlrm_deploy.parity.check import check_parity

no_gpu = pytest.mark.skipif(cuda.device_count() > 0, reason="this machine has a GPU")


@pytest.fixture(scope="session")
def rtx_bundle(exported):
    """A bundle with a TensorRT-RTX plan; tests that change it copy it."""
    pytest.importorskip("tensorrt_rtx")
    bundle = Bundle.open(exported(self_interaction=True))
    build_plan(bundle, "tensorrt-rtx", max_batch=64)
    return bundle.path


@pytest.fixture
def own_rtx_bundle(rtx_bundle, make_bundle):
    return make_bundle(self_interaction=True)


def rehash(bundle, name):
    """Make the manifest agree with a file that was changed, as somebody who replaces files would."""
    path = bundle.path / name
    bundle.manifest.files[name] = FileRecord(size=path.stat().st_size, sha256=sha256_file(path))


def edit_sidecar(bundle, **changes):
    record = bundle.manifest.plans[0]
    path = bundle.path / record.sidecar
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    rehash(bundle, record.sidecar)


# Without a GPU


@no_gpu
def test_a_plan_opens_without_a_gpu_and_predict_says_what_it_needs(own_rtx_bundle):
    with open_engine(own_rtx_bundle, "tensorrt-rtx") as engine:
        assert engine.version.startswith("tensorrt_rtx 1.")
        assert set(engine.implementations()) == set(own_rtx_bundle.manifest.operators)
        assert all("lowered into a plan of" in text for text in engine.implementations().values())
        with pytest.raises(EngineError, match=r"is built, but executing it needs an NVIDIA GPU.*--engine onnxruntime"):
            engine.predict(batch_of(own_rtx_bundle.config, [[1]] * 4))


def test_the_batch_is_checked_before_the_gpu(own_rtx_bundle):
    engine = open_tensorrt_engine(own_rtx_bundle, "tensorrt-rtx", 1)
    config = own_rtx_bundle.config
    long = batch_of(config, [[1, 1], [1, 1], [0, 9], [1, 7]])
    with pytest.raises(BatchError, match=r"feature 'f2', sample 1: the bag holds 9 ids.*at most 5.*--max-bag 9"):
        engine.predict(long)
    bad = batch_of(config, [[1, 1]] * 4)
    bad.indices[3] = 3
    with pytest.raises(BatchError, match=r"feature 'f1', sample 1, position 0 of its bag: id 3 is outside \[0, 3\)"):
        engine.predict(bad)


def test_zero_samples_score_to_nothing_anywhere(own_rtx_bundle):
    scores = open_tensorrt_engine(own_rtx_bundle, "tensorrt-rtx", 1).predict(batch_of(own_rtx_bundle.config, [[]] * 4))
    assert scores.shape == (0,)
    assert scores.dtype == np.float32


def test_a_bundle_without_a_plan_says_how_to_build_one(make_bundle):
    with pytest.raises(EngineError, match=r"holds no plan for engine tensorrt-rtx. Build one with `dlrm-deploy build"):
        open_tensorrt_engine(make_bundle(), "tensorrt-rtx", 1)


@pytest.mark.parametrize("which", ["plan", "sidecar"])
@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_a_damaged_plan_or_sidecar_is_named(own_rtx_bundle, which, damage):
    path = own_rtx_bundle.path / getattr(own_rtx_bundle.manifest.plans[0], which)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(data[:-1] if damage == "truncate" else data)
    with pytest.raises(BundleError, match=path.name):
        open_tensorrt_engine(own_rtx_bundle, "tensorrt-rtx", 1)


def test_a_plan_of_another_model_is_stale(own_rtx_bundle):
    with own_rtx_bundle.model_path.open("ab") as file:
        file.write(b"\0")
    rehash(own_rtx_bundle, "model.onnx")
    with pytest.raises(EngineError, match=r"stale: its sidecar was written for another model"):
        open_tensorrt_engine(own_rtx_bundle, "tensorrt-rtx", 1)


def test_a_foreign_plan_is_refused_by_its_header(own_rtx_bundle):
    record = own_rtx_bundle.manifest.plans[0]
    (own_rtx_bundle.path / record.plan).write_bytes(b"ftrt" + bytes(1000))
    rehash(own_rtx_bundle, record.plan)
    with pytest.raises(EngineError, match="another plan than the one"):
        open_tensorrt_engine(own_rtx_bundle, "tensorrt-rtx", 1)
    file = {"file": record.plan, "size": 1004, "sha256": own_rtx_bundle.manifest.files[record.plan].sha256}
    edit_sidecar(own_rtx_bundle, plan=file)
    with pytest.raises(EngineError, match=r"is no TensorRT-RTX plan"):
        open_tensorrt_engine(own_rtx_bundle, "tensorrt-rtx", 1)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"library_version": "1.6.0.1"}, EngineError, r"was built by tensorrt_rtx 1\.6\.0\.1, and 1\..* is installed"),
        ({"engine": "tensorrt"}, EngineError, "for engine tensorrt, not .* for tensorrt-rtx"),
        ({"schema_version": 2}, BundleError, "schema version 2, and this dlrm-deploy reads version 1"),
        ({"format": "else"}, BundleError, "is not the sidecar of a plan"),
        ({"surprise": 1}, BundleError, "unknown key surprise"),
        ({"profile": None}, BundleError, "is damaged: .*Profile"),
    ],
)
def test_a_sidecar_that_does_not_belong_is_refused(own_rtx_bundle, changes, error, message):
    edit_sidecar(own_rtx_bundle, **changes)
    with pytest.raises(error, match=message):
        open_tensorrt_engine(own_rtx_bundle, "tensorrt-rtx", 1)


@pytest.mark.parametrize(
    ("capability", "runs"),
    [("8.6", True), ("12.1", True), ("13.0", True), ("9.0", False), ("10.0", False), ("7.5", False)],
)
def test_a_plan_runs_only_on_the_gpus_it_names(capability, runs):
    built = ("8.0", "8.6", "8.9", "12.0", "12.1", "later")
    if runs:
        _check_device(capability, built)
    else:
        with pytest.raises(EngineError, match=f"compute capability {capability}, and the plan is for 8.0, 8.6"):
            _check_device(capability, built)


# With the stand-ins


@pytest.mark.parametrize("tables", ["constant", "input"])
@pytest.mark.parametrize("architecture", ["dot", "dot_weighted", "dot_fixed_mixed_mean", "concat_two_widths"])
def test_our_side_gives_the_reference_scores(make_bundle, fake_tensorrt, fake_driver, architecture, tables):
    bundle = make_bundle(**ARCHITECTURES[architecture])
    build_plan(bundle, "tensorrt", max_batch=40, tables=tables)
    reference = TorchEngine(bundle, 1)
    with open_engine(bundle, "tensorrt") as engine:
        for name, batch in awkward_batches(bundle.config).items():
            np.testing.assert_allclose(engine.predict(batch), reference.predict(batch), rtol=0, atol=1e-6, err_msg=name)
    assert (fake_driver.memory, fake_driver.contexts, fake_driver.streams) == ({}, 0, 0)


@pytest.mark.parametrize("tables", ["constant", "input"])
@pytest.mark.parametrize(
    ("kind", "architecture"),
    [("fp16", "dot"), ("bf16", "dot_fixed_weighted"), ("int8", "dot_weighted"), ("int4", "concat_two_widths")],
)
def test_our_side_gives_the_reference_scores_of_stored_rows(
    make_converted, fake_tensorrt, fake_driver, kind, architecture, tables
):
    bundle = make_converted(kind, "fp32", **ARCHITECTURES[architecture])
    build_plan(bundle, "tensorrt", max_batch=40, tables=tables)
    reference = TorchEngine(bundle, 1)
    with open_engine(bundle, "tensorrt") as engine:
        for name, batch in awkward_batches(bundle.config).items():
            np.testing.assert_allclose(engine.predict(batch), reference.predict(batch), rtol=0, atol=1e-6, err_msg=name)
    assert fake_driver.memory == {}


@pytest.mark.parametrize("options", [{}, {"factors": (3, 1, 2, 3), "weighted": True}], ids=["ragged", "fixed"])
@pytest.mark.parametrize("samples", [4, 5, 13])
def test_a_batch_larger_than_the_plan_is_scored_in_pieces(make_bundle, fake_tensorrt, fake_driver, options, samples):
    bundle = make_bundle(**options)
    build_plan(bundle, "tensorrt", max_batch=4)
    batch = batch_of(bundle.config, [[factor] * samples for factor in options.get("factors", (2, 0, 5, 1))])
    with open_engine(bundle, "tensorrt") as engine:
        scores = engine.predict(batch)
        assert scores.dtype == np.float32
        np.testing.assert_allclose(scores, TorchEngine(bundle, 1).predict(batch), rtol=0, atol=1e-6)


def test_a_plan_of_a_small_batch_passes_the_parity_check(make_bundle, fake_tensorrt, fake_driver):
    bundle = make_bundle()
    build_plan(bundle, "tensorrt", max_batch=64)
    report = check_parity(bundle, "tensorrt", threads=1)
    assert [case.name for case in report.cases if not case.passed] == []
    assert "2048 random samples" in [case.name for case in report.cases]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_an_engine_says_the_precision_of_its_plan(make_bundle, fake_tensorrt, fake_driver, precision):
    bundle = make_bundle()
    build_plan(bundle, "tensorrt", precision=precision)
    with open_engine(bundle, "tensorrt") as engine:
        assert engine.precision == precision


def test_a_bad_batch_does_not_harm_the_next(make_bundle, fake_tensorrt, fake_driver):
    bundle = make_bundle()
    build_plan(bundle, "tensorrt")
    good, bad = batch_of(bundle.config, [[2, 1]] * 4), batch_of(bundle.config, [[2, 1]] * 4)
    bad.indices[0] = -1
    with open_engine(bundle, "tensorrt") as engine:
        before = engine.predict(good)
        with pytest.raises(BatchError, match="id -1"):
            engine.predict(bad)
        np.testing.assert_array_equal(engine.predict(good), before)


def test_a_table_that_changed_since_the_build_makes_the_plan_stale(make_bundle, fake_tensorrt, fake_driver):
    bundle = make_bundle()
    build_plan(bundle, "tensorrt", tables="input")
    table = bundle.manifest.table_groups[0].file
    bundle.manifest.files[table] = replace(bundle.manifest.files[table], sha256="0" * 64)
    with pytest.raises(EngineError, match=f"stale: {table} is not what it was built for"):
        open_tensorrt_engine(bundle, "tensorrt", 1)


def test_device_memory_that_runs_out_is_an_error_and_is_given_back(make_bundle, fake_tensorrt, fake_driver):
    bundle = make_bundle()
    build_plan(bundle, "tensorrt")
    fake_driver.fail["cuMemAlloc_v2"] = 2
    batch = batch_of(bundle.config, [[1]] * 4)
    with open_engine(bundle, "tensorrt") as engine:
        with pytest.raises(EngineError, match="cuMemAlloc_v2 failed with error 2: out of memory. The plan's tables"):
            engine.predict(batch)
        assert (fake_driver.memory, fake_driver.contexts) == ({}, 0)
        fake_driver.fail.clear()
        assert engine.predict(batch).shape == (1,)


def test_a_plan_for_another_gpu_is_refused_before_it_is_loaded(make_bundle, fake_tensorrt, fake_driver):
    bundle = make_bundle()
    build_plan(bundle, "tensorrt")
    fake_driver.capability = (8, 6)
    with pytest.raises(EngineError, match=r"compute capability 8\.6, and the plan is for 9\.0"):
        open_tensorrt_engine(bundle, "tensorrt", 1).predict(batch_of(bundle.config, [[1]] * 4))
    assert (fake_driver.memory, fake_driver.contexts) == ({}, 0)


def test_a_plan_that_the_library_does_not_load_is_an_error_with_its_reason(make_bundle, fake_tensorrt, fake_driver):
    bundle = make_bundle()
    record = build_plan(bundle, "tensorrt").record
    (bundle.path / record.plan).write_bytes(b"not a plan")
    rehash(bundle, record.plan)
    edit_sidecar(bundle, plan={"file": record.plan, "size": 10, "sha256": sha256_file(bundle.path / record.plan)})
    with (
        open_engine(bundle, "tensorrt") as engine,
        pytest.raises(EngineError, match="cannot be loaded on this GPU: magic number does not match"),
    ):
        engine.predict(batch_of(bundle.config, [[1]] * 4))
    assert (fake_driver.memory, fake_driver.contexts) == ({}, 0)


# With a GPU


@pytest.mark.gpu
@pytest.mark.skipif(cuda.device_count() == 0, reason="executing a plan needs an NVIDIA GPU")
@pytest.mark.parametrize("engine", ["tensorrt-rtx", "tensorrt"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_plan_scores_awkward_bags_as_pytorch_does(make_bundle, engine, architecture):
    pytest.importorskip(engine.replace("-", "_"))
    bundle = make_bundle(**ARCHITECTURES[architecture])
    build_plan(bundle, engine, max_batch=64)
    reference = TorchEngine(bundle, 1)
    with open_engine(bundle, engine) as opened:
        for name, batch in awkward_batches(bundle.config).items():
            # fp32 with TF32 off; a sum of 50 products in another order moves a logit by about 50 * 2**-24.
            np.testing.assert_allclose(opened.predict(batch), reference.predict(batch), rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.gpu
@pytest.mark.skipif(cuda.device_count() == 0, reason="executing a plan needs an NVIDIA GPU")
@pytest.mark.parametrize("engine", ["tensorrt-rtx", "tensorrt"])
@pytest.mark.parametrize("tables", ["constant", "input"])
@pytest.mark.parametrize("kind", ["fp16", "bf16", "int8", "int4"])
def test_a_plan_reads_stored_rows_as_pytorch_does(make_converted, engine, kind, tables):
    pytest.importorskip(engine.replace("-", "_"))
    bundle = make_converted(kind, "fp32")
    build_plan(bundle, engine, max_batch=64, tables=tables)
    reference = TorchEngine(bundle, 1)
    with open_engine(bundle, engine) as opened:
        for name, batch in awkward_batches(bundle.config).items():
            np.testing.assert_allclose(opened.predict(batch), reference.predict(batch), rtol=0, atol=1e-5, err_msg=name)
