from __future__ import annotations

import numpy as np
import pytest

from dlrm_deploy.batch import Batch
from dlrm_deploy.bench import run as bench_run
from dlrm_deploy.bench.calibration import Calibration
from dlrm_deploy.bench.run import BenchSettings, default_engines, run_bench, steps
from dlrm_deploy.engines.engine import Engine
from dlrm_deploy.engines.registry import ENGINE_NAMES
from dlrm_deploy.errors import BatchError, BundleError, ConfigError, EngineError, MissingDependencyError

CPU_ENGINES = ("torch", "onnxruntime-stock", "onnxruntime")
CALIBRATION = Calibration(fma_gflops=200.0, stream_gb_per_s=10.0, gather_gb_per_s=5.0, row_bytes=64, gather_bytes=4096)


@pytest.fixture(autouse=True)
def small_and_quick(monkeypatch):
    monkeypatch.setattr("dlrm_deploy.bench.inputs.GATHERED_BYTES", 1 << 12)
    monkeypatch.setattr("dlrm_deploy.bench.measure.SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(bench_run, "measure_calibration", lambda config, threads: CALIBRATION)


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
        def open_one(bundle, name, *, threads, spin):
            assert not spin, "spinning threads disturb the other engines"
            if isinstance(made[name], Exception):
                raise made[name]
            return made[name]

        monkeypatch.setattr(bench_run, "open_unchecked", open_one)

    return use


def test_every_engine_is_measured_at_every_batch_size_and_agrees(measured_bundle):
    report = run_bench(measured_bundle, quick(engines=CPU_ENGINES))
    assert [(row.batch, row.engine) for row in report.rows] == [(size, e) for size in (1, 3) for e in CPU_ENGINES]
    assert report.not_run == ()
    for row in report.rows:
        assert row.timing.calls >= 2
        assert row.timing.p50_ms > 0
        assert row.max_abs_difference <= 1e-6
        assert row.calibration == CALIBRATION
        assert row.implementations
        assert row.model == measured_bundle.config.name
    assert {row.timing.ratio for row in report.rows if row.engine == "torch"} == {1.0}
    assert report.circumstances.reference == "torch"


def test_rows_say_which_kernels_ran(dot_bundle):
    report = run_bench(dot_bundle, quick(engines=("onnxruntime-stock", "onnxruntime"), batch_sizes=(1,)))
    stock, ours = (row.implementations["DotInteraction"] for row in report.rows)
    assert "function body" in stock
    assert "C++ kernel" in ours


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
    assert [row.max_abs_difference for row in report.rows] == [2**-23, 0.0]


def test_engines_that_do_not_agree_are_refused_before_anything_is_timed(dot_bundle, engines, monkeypatch):
    monkeypatch.setattr(bench_run, "interleave", lambda *a, **k: pytest.fail("timed"))
    engines({"torch": Constant(dot_bundle, 0.5), "onnxruntime": Constant(dot_bundle, 0.5 + 2e-6)})
    message = r"onnxruntime differs from torch by 2e-06 on a batch of 3, and at most 1e-06 is rounding"
    with pytest.raises(EngineError, match=message):
        run_bench(dot_bundle, quick(engines=("torch", "onnxruntime"), batch_sizes=(3,)))


def test_a_plan_of_lower_precision_is_measured_and_its_difference_shown(dot_bundle, engines):
    engines({"tensorrt": Constant(dot_bundle, 0.5, precision="fp16"), "onnxruntime": Constant(dot_bundle, 0.25)})
    report = run_bench(dot_bundle, quick(engines=("tensorrt", "onnxruntime"), batch_sizes=(3,)))
    assert report.circumstances.reference == "onnxruntime"  # not the first: it is no float32 engine
    assert [row.max_abs_difference for row in report.rows] == [0.25, 0.0]


def test_without_a_float32_engine_the_first_one_is_the_reference(dot_bundle, engines):
    made = {
        "tensorrt-rtx": Constant(dot_bundle, 0.5, precision="bf16"),
        "tensorrt": Constant(dot_bundle, 0.25, precision="fp16"),
    }
    engines(made)
    report = run_bench(dot_bundle, quick(engines=tuple(made), batch_sizes=(3,)))
    assert report.circumstances.reference == "tensorrt-rtx"
    assert [row.max_abs_difference for row in report.rows] == [0.0, 0.25]


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
    monkeypatch.setattr(bench_run, "rotating_batches", lambda *a, **k: batches)
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
    def missing(config, threads):
        raise EngineError("the native library is not there")

    monkeypatch.setattr(bench_run, "measure_calibration", missing)
    engines({"torch": Constant(dot_bundle, 0.5)})
    report = run_bench(dot_bundle, quick(engines=("torch",)))
    assert report.circumstances.calibration_missing == "the native library is not there"
    assert {row.calibration for row in report.rows} == {None}


def test_calibration_is_taken_before_each_round(dot_bundle, engines, monkeypatch):
    rates = iter([1.0, 9.0, 2.0])

    def measure(config, threads):
        return Calibration(
            fma_gflops=next(rates), stream_gb_per_s=1.0, gather_gb_per_s=1.0, row_bytes=64, gather_bytes=64
        )

    monkeypatch.setattr(bench_run, "measure_calibration", measure)
    engines({"torch": Constant(dot_bundle, 0.5)})
    report = run_bench(dot_bundle, quick(engines=("torch",), batch_sizes=(1,), rounds=3))
    assert report.rows[0].calibration is not None
    assert report.rows[0].calibration.fma_gflops == 2.0  # the median


def test_the_tables_are_read_through_each_cpu_engine_before_timing(dot_bundle, engines, monkeypatch):
    touched = []
    monkeypatch.setattr(bench_run, "touching_batches", lambda config, dtype: touched.append(dtype) or iter(()))
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engines": ("openvino",)}, f"no engine is named 'openvino'. Engines: {', '.join(ENGINE_NAMES)}"),
        ({"engines": ()}, "at least one engine"),
        ({"engines": ("torch", "torch")}, "each engine is measured once.*torch, torch"),
        ({"batch_sizes": ()}, "at least one batch size"),
        ({"batch_sizes": (8, 0)}, "batch size must be at least 1, got 0"),
        ({"batch_sizes": (8, 8)}, "each batch size is measured once"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"threads": 1025}, "threads must be at most 1024, got 1025"),
        ({"rounds": 0}, "rounds must be at least 1, got 0"),
        ({"slice_ms": 0.0}, "a slice must last"),
        ({"slice_ms": float("nan")}, "a slice must last"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"distribution": "normal"}, "distribution must be one of uniform, gaussian, zipf, got 'normal'"),
        (
            {"engines": ("torch",), "baseline": "tensorrt"},
            "baseline 'tensorrt' is not among the engines measured: torch",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        BenchSettings(**options)


def test_the_default_engines_are_the_cpu_engines_whose_packages_are_installed(monkeypatch):
    assert default_engines() == CPU_ENGINES
    monkeypatch.setattr(bench_run, "missing_package", lambda name: "install it" if name == "torch" else None)
    assert default_engines() == ("onnxruntime-stock", "onnxruntime")
