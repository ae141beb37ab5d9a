from __future__ import annotations

import numpy as np
import pytest

from dlrm_deploy.batch import Batch
from dlrm_deploy.bench import limits, subject
from dlrm_deploy.bench import run as bench_run
from dlrm_deploy.bench.calibration import Calibration
from dlrm_deploy.bench.run import run_bench, share_files, steps
from dlrm_deploy.bench.settings import BenchSettings
from dlrm_deploy.bench.variant import Variant
from dlrm_deploy.engines.engine import Engine
from dlrm_deploy.errors import BatchError, BundleError, EngineError, MissingDependencyError

CPU_ENGINES = ("torch", "onnxruntime-stock", "onnxruntime")


def rates(fma: float, rows) -> Calibration:
    return Calibration(
        fma_gflops=fma,
        amx_bf16_gflops=None,
        amx_int8_gops=None,
        stream_gb_per_s=10.0,
        gather={part.row_bytes: 5.0 for part in rows},
        gather_replayed={part.row_bytes: 6.0 for part in rows},
    )


@pytest.fixture(autouse=True)
def small_and_quick(monkeypatch):
    monkeypatch.setattr("dlrm_deploy.bench.inputs.GATHERED_BYTES", 1 << 12)
    monkeypatch.setattr("dlrm_deploy.bench.measure.SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(limits, "measure_calibration", lambda threads, rows, random_rows: rates(200.0, rows))


def quick(**options: object) -> BenchSettings:
    return BenchSettings(**{"batch_sizes": (1, 3), "threads": 1, "rounds": 2, "slice_ms": 0.1, **options})


class Constant(Engine):
    """Scores every sample alike, and fails on batches of `fail_from` samples and more."""

    name = "onnxruntime"
    version = "constant 1"
    precision = "fp32"

    def __init__(
        self,
        bundle,
        value: float,
        fail_from: int | None = None,
        reason: str = "no GPU here",
        error: type[Exception] = EngineError,
        precision: str = "fp32",
    ) -> None:
        super().__init__(bundle, threads=1)
        self.error, self.precision = error, precision
        self.value, self.fail_from, self.reason, self.closed = value, fail_from, reason, False

    def _run(self, batch):
        if self.fail_from is not None and batch.batch_size >= self.fail_from:
            raise self.error(self.reason)
        return np.full(batch.batch_size, self.value, np.float32)

    def implementations(self):
        return {"DotInteraction": "constant"}

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def engines(monkeypatch):
    """Replace the list of engines: name -> engine, or the error that opening it raises."""

    def use(made: dict[str, Engine | Exception]) -> None:
        def open_one(bundle, name, *, threads, spin, prefault=False, huge_pages=False):
            assert not spin, "spinning threads disturb the other engines"
            if isinstance(made[name], Exception):
                raise made[name]
            return made[name]

        monkeypatch.setattr(subject, "open_unchecked", open_one)

    return use


def test_every_engine_is_measured_at_every_batch_size_and_agrees(measured_bundle):
    report = run_bench(measured_bundle, quick(engines=CPU_ENGINES))
    assert [(row.batch, row.engine) for row in report.rows] == [(size, e) for size in (1, 3) for e in CPU_ENGINES]
    assert report.not_run == ()
    for row in report.rows:
        assert row.timing.calls >= 2
        assert row.timing.p50_ms > 0
        assert row.agreement.max_abs_difference <= 1e-6
        assert row.calibration.fma_gflops == 200.0
        assert row.floor.times_floor > 0
        assert row.work.bytes == sum(row.work.gathered.values())
        assert set(row.work.gathered) == set(row.calibration.gather)
        assert row.footprint.stored_table_bytes == measured_bundle.config.table_bytes
        assert (row.tables, row.mlp, row.breakdown) == ("fp32", "fp32", None)
        assert row.implementations
        assert row.model == measured_bundle.config.name
    assert {row.timing.ratio for row in report.rows if row.engine == "torch"} == {1.0}
    assert report.circumstances.reference == "torch"


def test_rows_say_which_kernels_ran(dot_bundle):
    report = run_bench(dot_bundle, quick(engines=("onnxruntime-stock", "onnxruntime"), batch_sizes=(1,)))
    stock, ours = (set(row.implementations.values()) for row in report.rows)
    assert "function body" in stock.pop()
    assert "C++ kernel" in ours.pop()


def test_the_first_engine_is_the_baseline_unless_another_is_named(dot_bundle):
    first = run_bench(dot_bundle, quick(engines=("onnxruntime-stock", "torch"), batch_sizes=(2,)))
    assert [row.timing.ratio for row in first.rows if row.engine == "onnxruntime-stock"] == [1.0]
    assert {row.baseline for row in first.rows} == {"onnxruntime-stock"}
    named = run_bench(dot_bundle, quick(engines=("onnxruntime-stock", "torch"), batch_sizes=(2,), baseline="torch"))
    assert [row.timing.ratio for row in named.rows if row.engine == "torch"] == [1.0]
    assert {row.baseline for row in named.rows} == {"torch"}


def test_differences_are_reported_from_the_reference(dot_bundle, engines):
    near = float(np.float32(0.25) + np.float32(2**-23))
    engines({"onnxruntime": Constant(dot_bundle, near), "torch": Constant(dot_bundle, 0.25)})
    report = run_bench(dot_bundle, quick(engines=("onnxruntime", "torch"), batch_sizes=(3,)))
    assert report.circumstances.reference == "torch"
    assert [row.agreement.max_abs_difference for row in report.rows] == [2**-23, 0.0]


def test_engines_that_do_not_agree_are_refused_before_anything_is_timed(dot_bundle, engines, monkeypatch):
    monkeypatch.setattr(bench_run, "interleave", lambda *a, **k: pytest.fail("timed"))
    engines({"torch": Constant(dot_bundle, 0.5), "onnxruntime": Constant(dot_bundle, 0.5 + 2e-6)})
    message = r"onnxruntime differs from torch by 2e-06 on a batch of 3, and at most 1e-06 is rounding"
    with pytest.raises(EngineError, match=message):
        run_bench(dot_bundle, quick(engines=("torch", "onnxruntime"), batch_sizes=(3,)))


def test_a_plan_of_lower_precision_is_measured_and_its_difference_shown(dot_bundle, engines):
    engines(
        {"tensorrt": Constant(dot_bundle, 0.25 + 2**-7, precision="fp16"), "onnxruntime": Constant(dot_bundle, 0.25)}
    )
    report = run_bench(dot_bundle, quick(engines=("tensorrt", "onnxruntime"), batch_sizes=(3,)))
    assert report.circumstances.reference == "onnxruntime"  # not the first: it is no float32 engine
    assert [row.agreement.max_abs_difference for row in report.rows] == [2**-7, 0.0]


def test_a_plan_of_lower_precision_that_computes_something_else_is_refused(dot_bundle, engines):
    engines({"tensorrt": Constant(dot_bundle, 0.5, precision="fp16"), "onnxruntime": Constant(dot_bundle, 0.25)})
    with pytest.raises(EngineError, match="tensorrt differs from onnxruntime by 0.25 .* MLPs in fp16 at most 0.02"):
        run_bench(dot_bundle, quick(engines=("tensorrt", "onnxruntime"), batch_sizes=(3,)))


def test_without_a_float32_engine_the_first_one_is_the_reference(dot_bundle, engines):
    made = {
        "tensorrt-rtx": Constant(dot_bundle, 0.25, precision="bf16"),
        "tensorrt": Constant(dot_bundle, 0.25 - 2**-7, precision="fp16"),
    }
    engines(made)
    report = run_bench(dot_bundle, quick(engines=tuple(made), batch_sizes=(3,)))
    assert report.circumstances.reference == "tensorrt-rtx"
    assert [row.agreement.max_abs_difference for row in report.rows] == [0.0, 2**-7]


def test_nan_is_refused_before_anything_is_timed(dot_bundle, engines, monkeypatch):
    monkeypatch.setattr(bench_run, "interleave", lambda *a, **k: pytest.fail("timed"))
    engines({"onnxruntime": Constant(dot_bundle, float("nan"))})
    with pytest.raises(EngineError, match="onnxruntime gives NaN for sample 0 of a batch of 3"):
        run_bench(dot_bundle, quick(engines=("onnxruntime",), batch_sizes=(3,)))


@pytest.mark.parametrize("error", [EngineError("no plan"), MissingDependencyError("no package")])
def test_an_engine_that_cannot_be_opened_is_listed_and_the_rest_is_measured(dot_bundle, engines, error):
    engines({"tensorrt": error, "torch": Constant(dot_bundle, 0.5)})
    report = run_bench(dot_bundle, quick(engines=("tensorrt", "torch")))
    assert [(n.engine, n.batch, n.reason) for n in report.not_run] == [("tensorrt", None, str(error))]
    assert {row.engine for row in report.rows} == {"torch"}
    assert {row.baseline for row in report.rows} == {"torch"}


def test_an_engine_that_cannot_take_the_longest_bag_is_not_timed(dot_bundle, engines, monkeypatch):
    class ShortBags(Constant):
        def _run(self, batch):
            if batch.offsets[-1] == 9:
                raise BatchError("the bag is too long")
            return super()._run(batch)

    batches = [Batch.from_bags([[0, 0, 0]], [[[0] * n], [[0]], [[0]]]) for n in (1, 7, 2)]
    monkeypatch.setattr("dlrm_deploy.bench.inputs.rotating_batches", lambda *a, **k: batches)
    engines({"torch": Constant(dot_bundle, 0.5), "tensorrt": ShortBags(dot_bundle, 0.5)})
    report = run_bench(dot_bundle, quick(engines=("torch", "tensorrt"), batch_sizes=(1,)))
    assert [(n.engine, n.reason) for n in report.not_run] == [("tensorrt", "the bag is too long")]
    assert [row.engine for row in report.rows] == ["torch"]


@pytest.mark.parametrize("error", [EngineError, BatchError])
def test_an_engine_that_opens_but_cannot_execute_is_listed(dot_bundle, engines, error):
    plan = Constant(dot_bundle, 0.5, fail_from=1, error=error)
    engines({"tensorrt-rtx": plan, "torch": Constant(dot_bundle, 0.5)})
    report = run_bench(dot_bundle, quick(engines=("tensorrt-rtx", "torch")))
    assert [(n.engine, n.batch, n.reason) for n in report.not_run] == [("tensorrt-rtx", None, "no GPU here")]
    assert plan.closed


@pytest.mark.parametrize("error", [EngineError, BatchError])
def test_an_engine_that_cannot_run_one_batch_size_runs_the_others(dot_bundle, engines, error):
    limited = Constant(dot_bundle, 0.5, fail_from=3, reason="the plan takes 2", error=error)
    engines({"tensorrt": limited, "torch": Constant(dot_bundle, 0.5)})
    report = run_bench(dot_bundle, quick(engines=("torch", "tensorrt"), batch_sizes=(1, 3)))
    assert [(n.engine, n.batch, n.reason) for n in report.not_run] == [("tensorrt", 3, "the plan takes 2")]
    assert [(row.engine, row.batch) for row in report.rows] == [("torch", 1), ("tensorrt", 1), ("torch", 3)]


def test_no_engine_at_all_is_an_error_with_every_reason(dot_bundle, engines):
    engines({"tensorrt": EngineError("no plan"), "tensorrt-rtx": EngineError("no GPU")})
    with pytest.raises(EngineError, match="no engine runs here. tensorrt: no plan tensorrt-rtx: no GPU"):
        run_bench(dot_bundle, quick(engines=("tensorrt", "tensorrt-rtx")))


def test_a_named_baseline_that_cannot_run_is_an_error(dot_bundle, engines):
    engines({"tensorrt": EngineError("no plan"), "torch": Constant(dot_bundle, 0.5)})
    with pytest.raises(EngineError, match="baseline does not run here.*no plan"):
        run_bench(dot_bundle, quick(engines=("tensorrt", "torch"), baseline="tensorrt"))


def test_a_baseline_that_cannot_run_one_batch_size_is_an_error(dot_bundle, engines):
    engines({"tensorrt": Constant(dot_bundle, 0.5, fail_from=3), "torch": Constant(dot_bundle, 0.5)})
    with pytest.raises(EngineError, match="baseline tensorrt cannot run batches of 3: no GPU here"):
        run_bench(dot_bundle, quick(engines=("tensorrt", "torch")))


def test_the_reason_given_for_the_baseline_is_its_own(dot_bundle, engines):
    made = {
        "tensorrt-rtx": Constant(dot_bundle, 0.5, fail_from=3, reason="another's reason"),
        "tensorrt": Constant(dot_bundle, 0.5, fail_from=3, reason="its own reason"),
        "torch": Constant(dot_bundle, 0.5),
    }
    engines(made)
    with pytest.raises(EngineError, match="baseline tensorrt cannot run batches of 3: its own reason"):
        run_bench(dot_bundle, quick(engines=tuple(made), baseline="tensorrt"))


def test_no_engine_for_a_batch_size_is_an_error(dot_bundle, engines):
    engines({"tensorrt": Constant(dot_bundle, 0.5, fail_from=3)})
    with pytest.raises(EngineError, match="no engine can run batches of 3. tensorrt: no GPU here"):
        run_bench(dot_bundle, quick(engines=("tensorrt",)))


def test_a_damaged_bundle_is_an_error_not_a_remark(dot_bundle, engines):
    engines({"torch": BundleError("altered")})
    with pytest.raises(BundleError, match="altered"):
        run_bench(dot_bundle, quick(engines=("torch",)))


def test_engines_are_closed_after_a_failure(dot_bundle, engines):
    good = Constant(dot_bundle, 0.5)
    engines({"torch": good, "onnxruntime": Constant(dot_bundle, float("nan"))})
    with pytest.raises(EngineError, match="NaN"):
        run_bench(dot_bundle, quick(engines=("torch", "onnxruntime")))
    assert good.closed


def test_without_the_native_library_the_report_says_why_there_is_no_calibration(dot_bundle, engines, monkeypatch):
    def missing(threads, rows, random_rows):
        raise EngineError("the native library is not there")

    monkeypatch.setattr(limits, "measure_calibration", missing)
    engines({"torch": Constant(dot_bundle, 0.5)})
    report = run_bench(dot_bundle, quick(engines=("torch",)))
    assert report.circumstances.calibration_missing == "the native library is not there"
    assert [(row.calibration, row.floor) for row in report.rows] == [(None, None)] * 2


def test_calibration_is_taken_before_each_round(dot_bundle, engines, monkeypatch):
    moments = iter([1.0, 9.0, 2.0])
    monkeypatch.setattr(limits, "measure_calibration", lambda threads, rows, random_rows: rates(next(moments), rows))
    engines({"torch": Constant(dot_bundle, 0.5)})
    report = run_bench(dot_bundle, quick(engines=("torch",), batch_sizes=(1,), rounds=3))
    assert report.rows[0].calibration is not None
    assert report.rows[0].calibration.fma_gflops == 2.0  # the median


def test_the_tables_are_read_through_each_cpu_engine_before_timing(dot_bundle, engines, monkeypatch):
    touched = []
    monkeypatch.setattr(subject, "touching_batches", lambda config, dtype: touched.append(dtype) or iter(()))
    made = {name: Constant(dot_bundle, 0.5) for name in ("torch", "onnxruntime", "tensorrt")}
    engines(made)
    run_bench(dot_bundle, quick(engines=tuple(made), batch_sizes=(1,)))
    assert len(touched) == 2  # a plan's tables are on the GPU


def test_progress_is_told_as_many_steps_as_announced(dot_bundle, engines):
    engines({"torch": Constant(dot_bundle, 0.5)})
    settings = quick(engines=("torch",))
    told: list[str] = []
    run_bench(dot_bundle, settings, progress=told.append)
    assert len(told) == steps(settings)
    assert told[0] == "opening torch"
    assert told[-1] == "batch 3, round 2 of 2"


def test_the_command_repeats_the_run(dot_bundle, engines):
    engines({"torch": Constant(dot_bundle, 0.5), "onnxruntime": Constant(dot_bundle, 0.5)})
    settings = quick(engines=("torch", "onnxruntime"), distribution="zipf", seed=4)
    report = run_bench(dot_bundle, settings, target=["my bundle"])
    assert report.circumstances.command == (
        "dlrm-deploy bench 'my bundle' --engine torch,onnxruntime --batch 1,3 --threads 1 --distribution zipf "
        "--rounds 2 --slice-ms 0.1 --seed 4 --baseline torch"
    )
    assert str(dot_bundle.path) in run_bench(dot_bundle, settings).circumstances.command


@pytest.mark.parametrize("mlp", ["bf16", "int8"])
def test_a_variant_is_measured_on_a_converted_copy_beside_the_bundle(dot_bundle, monkeypatch, tmp_path, mlp):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    settings = quick(engines=("torch", "onnxruntime"), variants=(Variant(tables="int8", mlp=mlp),), batch_sizes=(32,))
    report = run_bench(dot_bundle, settings)
    assert [row.engine for row in report.rows] == ["torch", "onnxruntime", f"onnxruntime[int8,{mlp}]"]
    exact, small = report.rows[1:]
    assert (small.tables, small.mlp) == ("int8", mlp)
    assert set(exact.work.gathered) == {8 * 4}
    assert set(small.work.gathered) == {8 + 4}
    assert small.footprint.stored_table_bytes == exact.footprint.stored_table_bytes * 12 // 32
    assert 0 < small.agreement.max_abs_difference < 0.01
    assert small.agreement.correlation > 0.99
    assert set(small.calibration.gather) == {12, 32}
    assert list(tmp_path.iterdir()) == []  # the copy has gone


def test_on_a_converted_bundle_engines_carry_its_number_formats_and_peers_say_what_to_do(dot_bundle, tmp_path):
    from dlrm_deploy.export.convert import convert_bundle

    converted = convert_bundle(dot_bundle, tmp_path / "int8", tables="int8", mlp="fp32")
    settings = quick(
        engines=("onnxruntime", "torch-lean"), variants=(Variant(mlp="bf16"),), batch_sizes=(4,), baseline="onnxruntime"
    )
    report = run_bench(converted, settings)
    assert [row.engine for row in report.rows] == ["onnxruntime[int8,fp32]"]
    assert {row.baseline for row in report.rows} == {"onnxruntime[int8,fp32]"}
    assert [n.engine for n in report.not_run] == ["torch-lean[int8,fp32]", "onnxruntime[fp32,bf16]"]
    assert "Measure the fp32 bundle with --variant tables=int8,mlp=fp32" in report.not_run[0].reason
    assert "converted already" in report.not_run[1].reason


def test_an_engine_can_be_left_out_at_some_batch_sizes(dot_bundle, engines):
    engines({"torch": Constant(dot_bundle, 0.5), "onnxruntime": Constant(dot_bundle, 0.5)})
    settings = quick(engines=("torch", "onnxruntime"), only={"onnxruntime": (3,)})
    report = run_bench(dot_bundle, settings)
    assert [(row.batch, row.engine) for row in report.rows] == [(1, "torch"), (3, "torch"), (3, "onnxruntime")]
    with pytest.raises(EngineError, match="the baseline torch cannot run batches of 3: it is left out there"):
        run_bench(dot_bundle, quick(engines=("torch", "onnxruntime"), only={"torch": (1,)}))


def test_operators_are_broken_down_where_asked(dot_bundle):
    settings = quick(engines=("torch", "onnxruntime"), breakdown=True, batch_sizes=(3,))
    torch_row, ours = run_bench(dot_bundle, settings).rows
    assert torch_row.breakdown is None
    assert sum(ours.breakdown.values()) == pytest.approx(1.0)


def test_isolated_engines_are_measured_in_processes_of_their_own(dot_bundle):
    settings = quick(engines=("onnxruntime-stock", "onnxruntime"), isolate=True, breakdown=True, batch_sizes=(3,))
    report = run_bench(dot_bundle, settings)
    assert report.circumstances.isolate
    assert [row.engine for row in report.rows] == ["onnxruntime-stock", "onnxruntime"]
    for row in report.rows:
        assert row.timing.calls >= 2
        assert row.agreement.max_abs_difference <= 1e-6
        assert row.footprint.resident_bytes > 0
        assert row.breakdown


def test_options_reach_the_engines_that_have_them(dot_bundle, monkeypatch):
    seen = {}

    def open_one(bundle, name, *, threads, spin, **options):
        seen[name] = options
        return Constant(bundle, 0.5)

    monkeypatch.setattr(subject, "open_unchecked", open_one)
    report = run_bench(dot_bundle, quick(engines=("torch", "onnxruntime"), prefault=True, huge_pages=True))
    assert seen == {"torch": {}, "onnxruntime": {"prefault": True, "huge_pages": True}}
    assert (report.circumstances.prefault, report.circumstances.huge_pages) == (True, True)


def test_tables_that_a_variant_does_not_convert_are_the_same_file(dot_bundle, tmp_path):
    from dlrm_deploy.export.convert import convert_bundle

    same, smaller = (
        convert_bundle(dot_bundle, tmp_path / tables, tables=tables, mlp="bf16") for tables in ("fp32", "int8")
    )
    for converted, is_same in ((same, True), (smaller, False)):
        share_files(converted, dot_bundle)
        for record in converted.manifest.table_groups:
            path, original = converted.path / record.file, dot_bundle.path / record.file
            assert (original.exists() and path.samefile(original)) == is_same
        assert converted.altered_files() == []
