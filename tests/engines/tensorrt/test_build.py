import json
import shutil
import sys
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
from bundles import CONFIGS

from dlrm_deploy.bundle import Bundle
from dlrm_deploy.engines.tensorrt import build as build_module
from dlrm_deploy.engines.tensorrt.build import build_plan, make_profile
from dlrm_deploy.engines.tensorrt.header import read_header
from dlrm_deploy.engines.tensorrt.sidecar import Sidecar
from dlrm_deploy.errors import EngineError, MissingDependencyError, OutputError
from dlrm_deploy.export.bundle import export_bundle
from dlrm_deploy.export.sources import RandomSource
from dlrm_deploy.files import sha256_file
from dlrm_deploy.presets import preset

needs_rtx = pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="the package tensorrt-rtx is not installed")


def everything_in(bundle):
    return {path.relative_to(bundle.path): path.read_bytes() for path in bundle.path.rglob("*") if path.is_file()}


@needs_rtx
@pytest.mark.parametrize(
    ("precision", "tables", "options"),
    [
        ("fp32", "constant", {}),
        ("fp16", "input", {"weighted": True, "policy": "zero"}),
        ("bf16", "auto", {"interaction": "dcn", "widths": (8, 4, 8), "policy": "modulo", "pooling": "mean"}),
        ("fp16", "constant", {"factors": (3, 1, 2, 3), "self_interaction": True}),
        ("fp32", "input", {"interaction": "concat", "factors": (1, 1, 1, 1)}),
    ],
)
def test_rtx_builds_a_plan_without_a_gpu_and_the_sidecar_says_what_it_is(make_bundle, precision, tables, options):
    bundle = make_bundle(**options)
    built = build_plan(bundle, "tensorrt-rtx", precision=precision, tables=tables, max_batch=64)
    opened = Bundle.open(bundle.path)
    assert opened.manifest.plans == (built.record,)
    plan = bundle.path / built.record.plan
    sidecar = Sidecar.from_json((bundle.path / built.record.sidecar).read_text(), "sidecar")
    assert sidecar == built.sidecar
    assert (sidecar.plan.sha256, sidecar.plan.size) == (sha256_file(plan), plan.stat().st_size)
    assert sidecar.model.sha256 == sha256_file(bundle.model_path)
    assert read_header(plan).version == sidecar.library_version
    assert set(sidecar.compute_capabilities) >= {"8.6", "8.9", "12.0"}
    assert "9.0" not in sidecar.compute_capabilities
    assert "TF32" not in sidecar.builder["flags"]
    assert sidecar.executed is False
    assert sidecar.max_bag == (None if "factors" in options else 5)
    assert sidecar.graph.rows == 64
    assert 0 <= sidecar.graph.max_abs <= {"fp32": 1e-6, "fp16": 0.01, "bf16": 0.1}[precision]
    assert len(sidecar.layers) > 0
    assert sidecar.memory["weights_bytes"] > 0
    roles = [tensor.role for tensor in sidecar.tensors]
    groups = len(bundle.manifest.table_groups)
    assert roles.count("table") == len(sidecar.table_inputs) == (groups if tables == "input" else 0)
    assert {tensor.dtype for tensor in sidecar.tensors if tensor.role in ("indices", "offsets")} == {"int32"}
    assert all(opened.manifest.files[t.file].sha256 == t.sha256 for t in sidecar.table_inputs)


@needs_rtx
@pytest.mark.parametrize("kind", ["parts", "parts_fixed", "branches", "ids_only"])
def test_rtx_builds_every_kind_of_table_and_interaction(kind, tmp_path):
    bundle = export_bundle(RandomSource(CONFIGS[kind]), tmp_path / "bundle")
    sidecar = build_plan(bundle, "tensorrt-rtx", max_batch=64).sidecar
    assert 0 <= sidecar.graph.max_abs <= 1e-6
    names = {tensor.name for tensor in sidecar.tensors if tensor.role not in ("table", "output")}
    assert names == {spec.name for spec in bundle.manifest.inputs}


@needs_rtx
@pytest.mark.parametrize(
    ("kind", "mlp", "tables", "options", "dtype"),
    [
        ("int8", "bf16", "input", {}, "int8"),
        ("int8", "fp32", "constant", {"factors": (3, 1, 2, 3), "weighted": True}, None),
        ("int4", "bf16", "constant", {"widths": (8, 6, 8), "interaction": "concat"}, None),
        ("int4", "fp32", "input", {"factors": (1, 1, 1, 1)}, "int8"),
        ("bf16", "fp32", "input", {"pooling": "mean"}, "bfloat16"),
        ("fp16", "bf16", "auto", {"self_interaction": True}, None),
        ("int8", "int8", "constant", {}, None),
        ("fp16", "int8", "input", {"interaction": "dcn", "pooling": "mean"}, "float16"),
    ],
)
def test_rtx_builds_plans_of_stored_rows_in_the_precision_of_the_bundle(
    make_converted, kind, mlp, tables, options, dtype
):
    bundle = make_converted(kind, mlp, **options)
    sidecar = build_plan(bundle, "tensorrt-rtx", max_batch=64, tables=tables).sidecar
    assert sidecar.precision == mlp
    assert sidecar.graph.rows == 64
    # From the PyTorch model of the very numbers that are stored. Beside bf16 MLPs the interaction is in bf16 too.
    assert 0 <= sidecar.graph.max_abs <= {"fp32": 1e-6, "bf16": 0.1, "int8": 1e-6}[mlp]
    inputs = [(t.dtype, t.rows, t.width, t.sha256) for t in sidecar.table_inputs]
    records = bundle.manifest.table_groups
    assert inputs == [(dtype, r.rows, r.width, bundle.manifest.files[r.file].sha256) for r in records if dtype]
    for record in records if dtype else ():
        name = f"tables_{record.name}_{record.format}"
        assert sum(name in layer.reads for layer in sidecar.layers) == 1  # lookups, decoding and sums are one kernel
        (tensor,) = (tensor for tensor in sidecar.tensors if tensor.name == name)
        assert (tensor.role, tensor.dtype) == ("table", dtype)


@needs_rtx
def test_a_precision_that_is_asked_for_is_taken_whatever_the_bundles(make_converted):
    bundle = make_converted("int8", "bf16")
    assert build_plan(bundle, "tensorrt-rtx", precision="fp32", max_batch=8).sidecar.precision == "fp32"


def test_the_bytes_that_are_stored_decide_whether_tables_become_inputs(
    make_converted, fake_tensorrt, fake_driver, monkeypatch
):
    bundle = make_converted("int8", "fp32")
    stored = sum(layout.bytes for layout in bundle.manifest.layouts)
    assert stored < bundle.config.table_bytes
    for limit, tables in ((stored, 0), (stored - 1, 1)):
        monkeypatch.setattr(build_module, "CONSTANT_TABLE_BYTES", limit)
        assert len(build_plan(bundle, "tensorrt").sidecar.table_inputs) == tables


@needs_rtx
def test_building_twice_gives_the_same_layers_and_the_same_sidecar_but_for_the_hash(make_bundle):
    first = build_plan(make_bundle("one"), "tensorrt-rtx", precision="fp16").sidecar
    second = build_plan(make_bundle("two"), "tensorrt-rtx", precision="fp16").sidecar
    assert first.layers == second.layers
    # TensorRT-RTX 1.7 itself varies: in about one of ten builds some ten bytes of the plan differ.
    assert replace(first, plan=second.plan) == second
    assert first.plan.size == second.plan.size


@needs_rtx
def test_all_lookups_of_a_table_group_are_one_kernel(make_bundle):
    layers = build_plan(make_bundle(), "tensorrt-rtx", tables="input").sidecar.layers
    assert sum("tables_width8" in layer.reads for layer in layers) == 1
    assert len(layers) <= 16


@needs_rtx
def test_a_new_plan_replaces_the_old_one_and_its_files(make_bundle):
    bundle = make_bundle()
    old = build_plan(bundle, "tensorrt-rtx")
    new = build_plan(bundle, "tensorrt-rtx", precision="fp16", max_batch=8, max_bag=7)
    assert sorted(path.name for path in (bundle.path / "engines").iterdir()) == sorted(
        name.removeprefix("engines/") for name in (new.record.plan, new.record.sidecar)
    )
    assert old.record.plan != new.record.plan
    assert (new.sidecar.max_bag, new.sidecar.profile.batch) == (7, (1, 8, 8))
    assert Bundle.open(bundle.path).altered_files() == []


@needs_rtx
def test_an_unwritable_bundle_stays_as_it_was(make_bundle):
    bundle = make_bundle()
    (bundle.path / "engines").write_text("in the way")
    before = everything_in(bundle)
    with pytest.raises(OutputError, match="engines"):
        build_plan(bundle, "tensorrt-rtx")
    assert everything_in(bundle) == before


@needs_rtx
def test_an_interruption_while_listing_the_plan_leaves_no_files(make_bundle, monkeypatch):
    bundle = make_bundle()
    before = everything_in(bundle)

    def interrupt(self, record):
        raise KeyboardInterrupt

    monkeypatch.setattr(Bundle, "add_plan", interrupt)
    with pytest.raises(KeyboardInterrupt):
        build_plan(bundle, "tensorrt-rtx")
    assert everything_in(bundle) == before


def test_what_a_killed_build_left_unlisted_is_removed_by_the_next_and_nothing_else(
    make_bundle, fake_tensorrt, fake_driver
):
    bundle = make_bundle()
    folder = bundle.path / "engines"
    folder.mkdir()
    left = [
        "tensorrt-fp32-0123456789ab.plan",
        "tensorrt-fp16-0123456789ab.json",
        ".tensorrt-fp32-ab0123456789.plan.partial-9",
    ]
    others = ["tensorrt-rtx-fp32-0123456789ab.plan", "tensorrt-notes.json", "notes.txt"]
    for name in (*left, *others):
        (folder / name).write_text("whole")
    record = build_plan(bundle, "tensorrt").record
    own = [name.removeprefix("engines/") for name in (record.plan, record.sidecar)]
    assert sorted(path.name for path in folder.iterdir()) == sorted([*own, *others])
    assert Bundle.open(bundle.path).altered_files() == []


@needs_rtx
def test_a_model_that_overflows_in_fp16_is_refused_before_it_is_built(make_bundle):
    bundle = make_bundle(interaction="concat")
    dense = bundle.dense_weights()
    for key in dense:
        dense[key] *= np.float32(2000)
    np.savez(bundle.path / "dense.npz", **dense)
    with pytest.raises(EngineError, match=r"overflows in fp16.*--precision bf16 or fp32"):
        build_plan(bundle, "tensorrt-rtx", precision="fp16")


def test_golden_samples_that_do_not_fit_the_plan_are_left_out_of_its_check(make_bundle, fake_tensorrt, fake_driver):
    built = build_plan(make_bundle(), "tensorrt", max_bag=3)
    assert 0 < built.sidecar.graph.rows < 64


# The child process


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("abort", r"building the plan with tensorrt crashed \(SIGABRT\)"),
        ("no_parse", "tensorrt cannot parse the graph: In node 0: operator not known"),
        ("no_build", "tensorrt cannot build the graph: no kernel for Gemm$"),
        ("wrong_type", r"tensor indices is INT64 \[-1\]|tensor indices is int64 \[-1\]"),
    ],
)
def test_a_library_that_fails_costs_an_error_and_nothing_else(make_bundle, fake_tensorrt, fake_driver, mode, message):
    bundle = make_bundle()
    before = everything_in(bundle)
    fake_tensorrt(mode)
    with pytest.raises(EngineError, match=message):
        build_plan(bundle, "tensorrt")
    assert everything_in(bundle) == before


@needs_rtx
def test_a_child_that_ends_without_a_result_is_an_error_with_its_last_words(make_bundle, monkeypatch):
    bundle = make_bundle()
    monkeypatch.setenv("PYTHONHOME", "/nonexistent")
    with pytest.raises(EngineError, match=r"ended with exit code 1. Its last words: .+\. The bundle is as it was"):
        build_plan(bundle, "tensorrt-rtx")


# What is asked for


def test_a_library_that_is_not_installed_is_named_with_its_extra(make_bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(MissingDependencyError, match=r"needs the package tensorrt_rtx.*dlrm-deploy\[tensorrt-rtx\]"):
        build_plan(make_bundle(), "tensorrt-rtx")


@needs_rtx
def test_onnx_missing_is_named_with_its_extra(make_bundle, monkeypatch):
    bundle = make_bundle()
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.delitem(sys.modules, "dlrm_deploy.export.tensorrt_graph", raising=False)
    with pytest.raises(MissingDependencyError, match=r"needs the package onnx.*dlrm-deploy\[tensorrt-rtx\]"):
        build_plan(bundle, "tensorrt-rtx")


def test_data_center_tensorrt_is_not_touched_where_there_is_no_gpu(make_bundle, fake_tensorrt, monkeypatch):
    monkeypatch.setattr(build_module.cuda, "device_count", lambda: 0)
    fake_tensorrt("abort")
    with pytest.raises(EngineError, match="builds plans only on a machine with an NVIDIA GPU"):
        build_plan(make_bundle(), "tensorrt")


def test_a_precision_that_no_plan_has_is_refused(make_bundle):
    with pytest.raises(EngineError, match="precision 'int4'. Choose one of fp32, fp16, bf16, int8"):
        build_plan(make_bundle(), "tensorrt-rtx", precision="int4")


def test_profiles_cover_every_size_up_to_the_largest():
    kaggle = make_profile(preset("kaggle"), 2048, None)
    assert kaggle.ids == (26, 26 * 256, 26 * 2048)
    ragged = make_profile(preset("paper"), 100, 30)
    assert (ragged.batch, ragged.ids) == ((1, 100, 100), (1, 8 * 30 * 100, 8 * 30 * 100))


@pytest.mark.parametrize(
    ("max_batch", "max_bag", "message"),
    [
        (0, 5, "--max-batch must be at least 1, got 0"),
        (8, 0, "--max-bag must be at least 1, got 0"),
        (10**7, 100, "8000000000 ids.*Lower --max-batch or --max-bag"),
    ],
)
def test_impossible_sizes_are_refused(max_batch, max_bag, message):
    with pytest.raises(EngineError, match=message):
        make_profile(preset("paper"), max_batch, max_bag)


def test_large_tables_become_inputs_by_themselves(make_bundle, fake_tensorrt, fake_driver, monkeypatch):
    monkeypatch.setattr(build_module, "CONSTANT_TABLE_BYTES", 1000)
    bundle = make_bundle()
    assert bundle.config.table_bytes > 1000
    sidecar = build_plan(bundle, "tensorrt").sidecar
    assert [(t.tensor, t.rows, t.width) for t in sidecar.table_inputs] == [("tables_width8", 73, 8)]
    assert sidecar.compute_capabilities == ("9.0",)
    json.loads(sidecar.to_json())
    shutil.rmtree(bundle.path)
