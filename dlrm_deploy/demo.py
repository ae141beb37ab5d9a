"""The whole road on MovieLens-100K: train, compare with logistic regression, export, build, check, bench.

Main path: `run_demo`, one step a function call, into a `Report` that becomes `report.json`. The bundle stays usable.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlrm_deploy.errors import ConfigError, MissingDependencyError, OutputError
from dlrm_deploy.files import atomic_file, output_errors

if TYPE_CHECKING:
    from dlrm_deploy.bundle import Bundle
    from dlrm_deploy.train.recipe import Recipe
    from dlrm_deploy.train.run import Reporter

MARKER = ".dlrm-deploy-demo"
REPORT = "report.json"
PARITY_ENGINES = ("onnxruntime", "onnxruntime-stock")
PLAN_ENGINE = "tensorrt-rtx"
BATCH_SIZES = (1, 128, 2048)

Say = Callable[[str], None]


@dataclass(slots=True)
class Report:
    """Everything the demo found out, as it stands in `report.json`."""

    dlrm: dict[str, Any] = field(default_factory=dict)
    """Validation and test scores of the best checkpoint."""

    logistic_regression: dict[str, Any] = field(default_factory=dict)
    """The same of the baseline, on the same splits."""

    parity: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Per engine: what `dlrm-deploy check` records, `max_abs` and `passed` among it."""

    plans: list[dict[str, Any]] = field(default_factory=list)
    """Plans built, or the reason why one was not."""

    bench: list[dict[str, Any]] = field(default_factory=list)
    """Rows of `dlrm-deploy bench --json`."""

    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time of each step."""

    @property
    def passed(self) -> bool:
        return all(record["passed"] for record in self.parity.values())


def run_demo(out: Path, say: Say, reporter: Reporter, data: Path | None = None, recipe: Recipe | None = None) -> Report:
    """Run every step into `out`: `run/`, `bundle/`, `bench.png` and `report.json`.

    Args:
        out: absent, empty, or an earlier demo, which is replaced.
        say: told about each step.
        reporter: told how training goes.
        data: MovieLens-100K as a folder or zip file; None fetches it.
        recipe: None for the MovieLens recipe that comes with the package.

    Raises:
        OutputError: `out` holds something else, or cannot be written.
        DataError: the data cannot be had; the message says how to bring it.
    """
    from dlrm_deploy.train.recipe import MovieLensData, Recipe
    from dlrm_deploy.train.run import train

    _claim(out)
    if recipe is None:
        recipe = Recipe.read(Path(str(files("dlrm_deploy.train") / "recipes" / "movielens.toml")))
    if data is not None:
        if not isinstance(recipe.data, MovieLensData):
            raise ConfigError("--data goes with a recipe for MovieLens.")
        recipe = replace(recipe, data=replace(recipe.data, path=str(data.resolve())))
    report = Report()

    @contextmanager
    def step(name: str, what: str) -> Iterator[None]:
        say(what)
        start = time.monotonic()
        yield
        report.seconds[name] = round(time.monotonic() - start, 1)

    with step("train", "Training a DLRM on MovieLens-100K"):
        report.dlrm = asdict(train(recipe, out / "run", reporter))
    with step("logistic_regression", "Fitting logistic regression on the same split"):
        report.logistic_regression = _logistic_regression(recipe)
    with step("export", "Exporting the best checkpoint"):
        bundle = _export(out / "run" / "best", out / "bundle")
    with step("build", f"Building a {PLAN_ENGINE} plan"):
        report.plans = [_build(bundle)]
    with step("check", "Comparing every engine with PyTorch"):
        report.parity = {engine: _check(bundle, engine) for engine in PARITY_ENGINES}
    with step("bench", "Measuring engines side by side"):
        report.bench = _bench(bundle, out / "bench.png")
    with atomic_file(out / REPORT) as temporary:
        temporary.write_text(json.dumps(asdict(report), indent=2) + "\n", encoding="utf-8")
    return report


def _claim(out: Path) -> None:
    """Make `out` an empty demo folder; refuse to touch a folder that is not a demo's."""
    if out.exists() and not (out / MARKER).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"{out} exists and was not made by the demo. Choose another --out.")
    with output_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        (out / MARKER).touch()
        for name in ("run", "bundle"):
            if (out / name).exists():
                shutil.rmtree(out / name)
        (out / REPORT).unlink(missing_ok=True)


def _logistic_regression(recipe: Recipe) -> dict[str, Any]:
    from dlrm_deploy.train.logistic_regression import fit_logistic_regression

    return asdict(fit_logistic_regression(*recipe.load()))


def _export(checkpoint: Path, out: Path) -> Bundle:
    from dlrm_deploy.checkpoint import Checkpoint
    from dlrm_deploy.export.bundle import export_bundle
    from dlrm_deploy.export.sources import CheckpointSource

    return export_bundle(CheckpointSource(Checkpoint.open(checkpoint)), out)


def _build(bundle: Bundle) -> dict[str, Any]:
    """The plan, or why there is none: TensorRT-RTX has no package for some machines, and the demo goes on there."""
    from dlrm_deploy.engines.tensorrt.build import build_plan

    try:
        built = build_plan(bundle, PLAN_ENGINE)
    except MissingDependencyError as err:
        return {"engine": PLAN_ENGINE, "built": False, "executed": False, "reason": str(err)}
    sidecar = built.sidecar
    return {
        **asdict(built.record),
        "built": True,
        "executed": sidecar.executed,
        "precision": sidecar.precision,
        "library_version": sidecar.library_version,
        "bytes": sidecar.plan.size,
    }


def _check(bundle: Bundle, engine: str) -> dict[str, Any]:
    from dlrm_deploy.parity.check import check_parity

    report = check_parity(bundle, engine)
    bundle.record_parity(engine, report.record())
    return report.record()


def _bench(bundle: Bundle, picture: Path) -> list[dict[str, Any]]:
    from dlrm_deploy.bench.plot import plot
    from dlrm_deploy.bench.run import run_bench
    from dlrm_deploy.bench.settings import BenchSettings

    report = run_bench(bundle, BenchSettings(batch_sizes=BATCH_SIZES))
    plot(report, picture)
    return [json.loads(line) for line in report.to_json_lines().splitlines()]


def summary(out: Path, report: Report) -> str:
    """A page for people."""
    dlrm, baseline = report.dlrm["test_auc"], report.logistic_regression["test_auc"]
    lines = [
        f"test AUC     DLRM {dlrm:.4f}, logistic regression with ids {baseline:.4f} ({dlrm - baseline:+.4f})",
    ]
    for engine, record in report.parity.items():
        verdict = "passed" if record["passed"] else "FAILED"
        lines.append(f"parity       {engine} {verdict}: max abs error {record['max_abs']:.2e} against PyTorch")
    for plan in report.plans:
        if plan["built"]:
            size = f"{plan['bytes'] / 1e6:.1f} MB, {plan['precision']}"
            lines.append(f"plan         {plan['engine']} built ({size}), not run: that needs an NVIDIA GPU")
        else:
            lines.append(f"plan         {plan['engine']} not built: {plan['reason']}")
    for row in report.bench:
        if "samples_per_s" in row:
            lines.append(
                f"bench        {row['engine']:<18} batch {row['batch']:>5}  {row['p50_ms']:8.3f} ms  "
                f"{row['samples_per_s']:>9,.0f} samples/s  {row['ratio']:5.2f} x {row['baseline']}"
            )
    lines += [
        f"bundle       {out / 'bundle'}",
        f"report       {out / REPORT}, picture {out / 'bench.png'}",
        f"time         {sum(report.seconds.values()):.0f} s",
    ]
    return "\n".join(lines)
