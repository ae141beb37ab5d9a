"""What every engine promises, on every form of model. TensorRT has tests of its own."""

import os
import subprocess
import sys

import numpy as np
import onnxruntime as ort
import pytest
from bundles import make_bundle

import dlrm_deploy
from dlrm_deploy.batch import Batch
from dlrm_deploy.bundle import Bundle
from dlrm_deploy.data.random import random_batch
from dlrm_deploy.engines.ort import _warn_of_scalar_path
from dlrm_deploy.engines.registry import ENGINE_NAMES, missing_package, open_engine
from dlrm_deploy.errors import BatchError, BundleError, DlrmDeployError, EngineError, MissingDependencyError

CPU_ENGINES = ["torch", "onnxruntime-stock", "onnxruntime"]

# Bundles of tests were never checked; tests/parity/test_gate.py is about that.
pytestmark = pytest.mark.filterwarnings("ignore::dlrm_deploy.errors.ParityWarning")


def batch_for(bundle, size, seed=0):
    return random_batch(bundle.config, size, np.random.default_rng(seed))


@pytest.mark.parametrize("engine", CPU_ENGINES)
@pytest.mark.parametrize("threads", [1, 3])
def test_the_golden_batch_scores_as_at_export(any_bundle, engine, threads):
    golden = any_bundle.golden()
    with open_engine(any_bundle, engine, threads=threads) as opened:
        actual = opened.predict(golden.batch)
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, golden.probabilities, rtol=0, atol=1e-6)


@pytest.mark.parametrize("engine", ["onnxruntime-stock", "onnxruntime"])
def test_engines_agree_with_pytorch_on_what_a_converted_bundle_stores(converted_bundle, engine):
    batch = batch_for(converted_bundle, 200)
    with open_engine(converted_bundle, engine) as opened, open_engine(converted_bundle, "torch") as torch:
        actual, expected = opened.predict(batch), torch.predict(batch)
    off = np.abs(actual - expected)
    assert np.median(off) <= 1e-6  # an engine that does not round where the others do is off by more
    # A value next to the middle between two numbers of the MLPs' format may be rounded to either, by the order of the
    # additions that it is from.
    assert off.max() <= {"fp32": 1e-6, "bf16": 3e-4, "int8": 2e-3}[converted_bundle.manifest.mlp_precision]


def test_our_kernels_run_every_operator_of_a_converted_bundle(converted_bundle):
    with (
        open_engine(converted_bundle, "onnxruntime") as ours,
        open_engine(converted_bundle, "onnxruntime-stock") as stock,
    ):
        operators = set(converted_bundle.manifest.operators)
        assert set(ours.implementations()) == set(stock.implementations()) == operators
        assert (
            operators & {"Mlp", "MlpInt8"}
            == {"fp32": set(), "bf16": {"Mlp"}, "int8": {"MlpInt8"}}[converted_bundle.manifest.mlp_precision]
        )
        assert all(text.startswith("C++ kernel (") for text in ours.implementations().values())
        assert set(stock.implementations().values()) == {"function body of standard operators"}


def test_our_kernels_run_in_onnxruntime_and_only_there(any_bundle):
    with open_engine(any_bundle, "onnxruntime") as ours, open_engine(any_bundle, "onnxruntime-stock") as stock:
        assert set(ours.implementations()) == set(any_bundle.manifest.operators)
        assert all(text.startswith("C++ kernel (") for text in ours.implementations().values())
        assert set(stock.implementations().values()) == {"function body of standard operators"}


def test_a_plain_session_with_our_library_agrees_with_a_bare_one(any_bundle):
    batch = batch_for(any_bundle, 37)
    feed = {"dense": batch.dense, "indices": batch.indices, "offsets": batch.offsets, "weights": batch.weights}
    feed = {spec.name: feed[spec.name] for spec in any_bundle.manifest.inputs}
    options = ort.SessionOptions()
    options.register_custom_ops_library(dlrm_deploy.get_library_path())
    (bare,) = ort.InferenceSession(any_bundle.model_path).run(None, feed)
    (ours,) = ort.InferenceSession(any_bundle.model_path, options).run(None, feed)
    np.testing.assert_allclose(ours, bare, rtol=0, atol=1e-6)


@pytest.mark.parametrize("engine", CPU_ENGINES)
@pytest.mark.parametrize("bad_id", [-1, 18, 2**40])
def test_a_bad_id_is_refused_with_feature_sample_and_position(bundle, engine, bad_id):
    bags = [[[1], []], [[2, bad_id], [3]], [[], []]]
    batch = Batch.from_bags(np.zeros((2, 3)), bags)
    good = Batch.from_bags(np.zeros((2, 3)), [[[1], []], [[2, 17], [3]], [[], []]])
    with dlrm_deploy.load(bundle.path, engine) as opened:
        message = rf"feature 'b', sample 0, position 1 of its bag: id {bad_id} is outside \[0, 18\)"
        with pytest.raises(BatchError, match=message):
            opened.predict(batch)
        assert opened.predict(good).shape == (2,)  # what one batch does wrong never harms the next


@pytest.mark.parametrize("policy", ["clamp", "modulo", "zero"])
def test_bad_ids_score_the_same_in_every_engine_under_a_policy(tmp_path, policy):
    bundle = make_bundle("dot", tmp_path / "bundle", index_policy=policy)
    batch = batch_for(bundle, 8)
    batch.indices[::2] += np.where(np.arange(len(batch.indices[::2])) % 2, 1_000_003, -1_000_003)
    scores = []
    for engine in CPU_ENGINES:
        with open_engine(bundle, engine) as opened:
            scores.append(opened.predict(batch))
    np.testing.assert_allclose(scores[1], scores[0], rtol=0, atol=1e-6)
    np.testing.assert_allclose(scores[2], scores[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("engine", CPU_ENGINES)
def test_int32_and_int64_ids_score_alike_on_either_signature(tmp_path, engine):
    for ids in ("int32", "int64"):
        bundle = make_bundle("dot", tmp_path / ids, index_dtype=ids)
        batch = batch_for(bundle, 5)
        narrow = Batch(batch.dense, batch.indices.astype(np.int32), batch.offsets.astype(np.int32))
        with open_engine(bundle, engine) as opened:
            np.testing.assert_array_equal(opened.predict(batch), opened.predict(narrow))


@pytest.mark.parametrize("name", CPU_ENGINES)
def test_an_id_beyond_32_bits_is_refused_by_an_int32_signature(tmp_path, name):
    bundle = make_bundle("dot", tmp_path / "bundle", index_dtype="int32", index_policy="clamp")
    batch = batch_for(bundle, 5)
    batch.indices[0] = 2**31
    with open_engine(bundle, name) as engine:
        with pytest.raises(BatchError, match="2147483648 does not fit"):
            engine.predict(batch)
        with pytest.raises(BatchError, match="takes a dlrm_deploy.Batch, got ndarray"):
            engine.predict(batch.dense)


@pytest.mark.parametrize("engine", CPU_ENGINES)
def test_a_batch_for_another_model_is_refused(bundle, engine):
    with open_engine(bundle, engine) as opened, pytest.raises(BatchError, match="dense has 4 columns"):
        opened.predict(Batch(np.zeros((1, 4), np.float32), np.zeros(0, np.int64), np.zeros(4, np.int64)))


def test_a_graph_that_onnxruntime_cannot_run_is_an_engine_error(bundle):
    (bundle.path / "model.onnx").write_bytes(b"not a model")
    with pytest.raises(EngineError, match="cannot open"):
        open_engine(bundle, "onnxruntime")


def test_dense_weights_that_do_not_fit_are_refused_by_pytorch(bundle):
    weights = bundle.dense_weights()
    weights["over_arch.model.1.bias"] = np.zeros(2, np.float32)
    np.savez(bundle.path / "dense.npz", **weights)
    with pytest.raises(BundleError, match=r"over_arch.model.1.bias should be float32 \(1,\), found float32 \(2,\)"):
        open_engine(bundle, "torch")
    del weights["over_arch.model.1.bias"]
    np.savez(bundle.path / "dense.npz", **weights)
    with pytest.raises(BundleError, match="found nothing"):
        open_engine(bundle, "torch")


@pytest.mark.parametrize("engine", CPU_ENGINES)
def test_a_closed_engine_may_be_closed_again_and_refuses_to_score(bundle, engine):
    with open_engine(bundle, engine) as opened:
        opened.close()
    opened.close()
    with pytest.raises(EngineError, match=f"engine {engine} is closed"):
        opened.predict(batch_for(bundle, 1))


@pytest.mark.parametrize("threads", [0, -1, 1025])
@pytest.mark.parametrize("engine", ENGINE_NAMES)
def test_a_senseless_number_of_threads_is_refused(bundle, engine, threads):
    with pytest.raises(EngineError, match=f"threads is {threads}, expected 1 to 1024"):
        open_engine(bundle, engine, threads=threads)


def test_an_engine_reports_the_kernel_path_that_it_was_opened_with(bundle, monkeypatch):
    monkeypatch.setenv("DLRM_DEPLOY_KERNEL", "scalar")
    with open_engine(bundle, "onnxruntime", threads=1) as opened:
        monkeypatch.delenv("DLRM_DEPLOY_KERNEL")
        assert set(opened.implementations().values()) == {"C++ kernel (scalar)"}


@pytest.mark.parametrize(
    ("machine", "pinned", "expected"), [("x86_64", "", 1), ("x86_64", "scalar", 0), ("aarch64", "", 0)]
)
def test_the_scalar_kernels_are_warned_of_once_where_nobody_chose_them(
    bundle, monkeypatch, recwarn, machine, pinned, expected
):
    monkeypatch.setattr("dlrm_deploy.engines.ort.kernel_path", lambda: "scalar")
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setenv("DLRM_DEPLOY_KERNEL", pinned)
    _warn_of_scalar_path.cache_clear()
    for _ in range(2):
        with open_engine(bundle, "onnxruntime", threads=1) as opened:
            assert set(opened.implementations().values()) == {"C++ kernel (scalar)"}
        open_engine(bundle, "onnxruntime-stock", threads=1).close()
    texts = [str(warning.message) for warning in recwarn if warning.category is RuntimeWarning]
    assert len(texts) == expected
    assert all("no AVX2" in text for text in texts)


def test_an_unknown_engine_lists_the_known_ones(bundle):
    with pytest.raises(EngineError, match=f"no engine is named 'tflite'. Engines: {', '.join(ENGINE_NAMES)}"):
        open_engine(bundle, "tflite")


def test_an_engine_whose_package_is_missing_says_what_to_install(bundle, monkeypatch):
    monkeypatch.setattr("dlrm_deploy.engines.registry.find_spec", lambda module: None)
    assert missing_package("onnxruntime") is None
    with pytest.raises(MissingDependencyError, match=r"pip install 'dlrm-deploy\[train\]'"):
        open_engine(bundle, "torch")


def test_engines_name_the_library_they_run_on(bundle):
    for engine, begins in (("torch", "torch 2."), ("onnxruntime", "onnxruntime 1.")):
        with open_engine(bundle, engine) as opened:
            assert opened.version.startswith(begins)
            assert opened.name == engine


def test_a_pinned_kernel_is_used_and_an_unknown_one_refused(bundle):
    code = (
        "import sys, dlrm_deploy\n"
        "from dlrm_deploy.errors import DlrmDeployError\n"
        "try:\n"
        "    print(*set(dlrm_deploy.load(sys.argv[1]).implementations().values()))\n"
        "except DlrmDeployError as err:\n"
        "    print('refused:', err)\n"
    )
    outputs = {}
    for kernel in ("scalar", "neon"):
        environment = {**os.environ, "DLRM_DEPLOY_KERNEL": kernel}
        result = subprocess.run(
            [sys.executable, "-c", code, bundle.path], env=environment, capture_output=True, text=True, check=True
        )
        outputs[kernel] = result.stdout
    assert outputs["scalar"].strip() == "C++ kernel (scalar)"
    assert outputs["neon"].startswith("refused:")
    assert "neon" in outputs["neon"]


def test_importing_the_package_brings_neither_torch_nor_onnx_nor_onnxruntime():
    code = "import sys, dlrm_deploy.cli.main; print({'torch', 'onnx', 'onnxruntime'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_scoring_with_our_kernels_brings_neither_torch_nor_onnx(bundle):
    code = (
        "import sys, dlrm_deploy\n"
        "from dlrm_deploy.bundle import Bundle\n"
        "golden = Bundle.open(sys.argv[1]).golden()\n"
        "assert abs(dlrm_deploy.load(sys.argv[1]).predict(golden.batch) - golden.probabilities).max() < 1e-6\n"
        "print({'torch', 'onnx'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code, bundle.path], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_errors_share_one_base(bundle):
    assert isinstance(Bundle.open(bundle.path), Bundle)
    assert issubclass(BatchError, DlrmDeployError)
    assert issubclass(BatchError, ValueError)
