"""Builds a plan for a bundle and lists it there.

Main path: `build_plan` -> `export.tensorrt_graph` writes the graph -> ONNX Runtime checks it on the golden batch ->
`worker` builds it in a child process -> plan and sidecar go into the bundle, under names that carry their hashes, and
the manifest names them last.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from dlrm_deploy.bundle import MODEL, Bundle, PlanRecord
from dlrm_deploy.config import PRECISIONS, ModelConfig, Precision
from dlrm_deploy.engines.tensorrt import cuda, worker
from dlrm_deploy.engines.tensorrt.header import read_header
from dlrm_deploy.engines.tensorrt.host import plan_feeds
from dlrm_deploy.engines.tensorrt.layers import PlanLayer
from dlrm_deploy.engines.tensorrt.library import MODULES, builds_without_gpu, import_library
from dlrm_deploy.engines.tensorrt.options import DEFAULT_MAX_BATCH, Tables
from dlrm_deploy.engines.tensorrt.sidecar import (
    SCHEMA_VERSION,
    FileRef,
    GraphCheck,
    PlanTensor,
    Profile,
    Sidecar,
    TableInput,
)
from dlrm_deploy.errors import BatchError, EngineError, MissingDependencyError
from dlrm_deploy.files import atomic_file, locked, output_errors, sha256_file
from dlrm_deploy.formats import tensor_name

if TYPE_CHECKING:
    import onnx

# Constants are laid out and folded by the builder, but copied into each plan and each context; above this size an input
# builds faster, loads faster and can be updated.
CONSTANT_TABLE_BYTES = 64 << 20
_BEST_BATCH = 256
_INT32_MAX = 2**31 - 1
_ELEMENT_TYPES = {1: "float32", 3: "int8", 6: "int32", 10: "float16", 16: "bfloat16"}  # of onnx.TensorProto
_BATCH_INPUTS = frozenset({"dense", "indices", "offsets", "weights"})


@dataclass(frozen=True, slots=True)
class BuiltPlan:
    """What a build left in the bundle."""

    record: PlanRecord
    sidecar: Sidecar


def build_plan(
    bundle: Bundle,
    engine: str,
    *,
    precision: Precision | None = None,
    max_batch: int = DEFAULT_MAX_BATCH,
    max_bag: int | None = None,
    tables: Tables = "auto",
) -> BuiltPlan:
    """Build a plan, write it and its sidecar to `BUNDLE/engines/` and list them in the manifest.

    Args:
        bundle: an opened bundle. An earlier plan of the same engine is replaced once the new one is complete.
        engine: "tensorrt-rtx" or "tensorrt".
        precision: number format of MLPs and interaction: "fp32", "fp16" or "bf16"; None for that of the bundle's MLPs.
        max_batch: samples that the plan takes at once; the engine cuts larger batches.
        max_bag: ids that a bag can hold; None for the longest that the model's features expect. Without meaning
            where all pooling factors are fixed.
        tables: "constant" puts the tables into the plan, "input" makes them inputs of it, "auto" decides by size.

    Raises:
        MissingDependencyError: the library, or onnx, is not installed.
        EngineError: the library refuses the graph, crashes, or cannot build here; or an argument is out of range.
        OutputError: the bundle cannot be written; it is as it was.
    """
    if precision is None:
        precision = bundle.manifest.mlp_precision
    if precision not in PRECISIONS:
        raise EngineError(f"no plan has precision {precision!r}. Choose one of {', '.join(PRECISIONS)}.")
    module = import_library(engine)
    if not builds_without_gpu(module) and cuda.device_count() == 0:
        raise EngineError(
            f"engine {engine} builds plans only on a machine with an NVIDIA GPU, for that GPU, and this one has none. "
            "Build there, or build for engine tensorrt-rtx here."
        )
    config = bundle.config
    table_bytes = sum(layout.bytes for layout in bundle.manifest.layouts)
    table_inputs = tables == "input" or (tables == "auto" and table_bytes > CONSTANT_TABLE_BYTES)
    bag = None if config.pooling_factors else max_bag or _longest_bag(bundle)
    profile = make_profile(config, max_batch, bag)
    model = _write_graph(bundle, engine, precision, bag, table_inputs)
    with tempfile.TemporaryDirectory(prefix="dlrm-deploy-build-") as name:
        folder = Path(name)
        with output_errors(folder):
            (folder / worker.MODEL).write_bytes(model.SerializeToString())
        graph = check_graph(model, bundle, profile, bag, table_inputs, sha256_file(folder / worker.MODEL))
        _check_finite(graph, precision)
        result = _build_in_child(folder, engine, config, profile)
        plan = folder / worker.PLAN
        sha256 = sha256_file(plan)
        stem = f"engines/{engine}-{precision}"
        model_file = bundle.manifest.files[MODEL]
        tensors = _tensors(model, result["tensors"])
        sidecar = Sidecar(
            schema_version=SCHEMA_VERSION,
            engine=engine,
            library_version=result["library_version"],
            plan=FileRef(file=f"{stem}-{sha256[:12]}.plan", size=plan.stat().st_size, sha256=sha256),
            model=FileRef(file=MODEL, size=model_file.size, sha256=model_file.sha256),
            precision=precision,
            compute_capabilities=_compute_capabilities(module, plan),
            max_bag=bag,
            profile=profile,
            tensors=tensors,
            table_inputs=_table_inputs(bundle, tensors) if table_inputs else (),
            builder=result["builder"],
            layers=tuple(PlanLayer(**{**layer, "reads": tuple(layer["reads"])}) for layer in result["layers"]),
            memory=result["memory"],
            graph=graph,
            executed=False,
        )
        return BuiltPlan(_store(bundle, plan, stem, sidecar), sidecar)


def _longest_bag(bundle: Bundle) -> int:
    """Ids in the longest bag to expect: what the model says, or more where the golden batch holds more."""
    expected = max(feature.longest_bag for feature in bundle.config.features)
    return max(expected, int(np.diff(bundle.golden().batch.offsets).max(initial=0)))


def make_profile(config: ModelConfig, max_batch: int, max_bag: int | None) -> Profile:
    """The sizes that a plan takes.

    Raises:
        EngineError: a size is not positive, or there could be more ids than 32 bits number.
    """
    for option, value in (("--max-batch", max_batch), ("--max-bag", max_bag)):
        if value is not None and value < 1:
            raise EngineError(f"{option} must be at least 1, got {value}.")
    best = min(max_batch, _BEST_BATCH)
    if max_bag is None:
        per_sample = sum(config.pooling_factors or ())
        ids = (per_sample, best * per_sample, max_batch * per_sample)
    else:
        usual = sum(min(feature.longest_bag, max_bag) for feature in config.features)
        ids = (1, best * usual, max_batch * max_bag * len(config.features))
    if ids[2] > _INT32_MAX:
        raise EngineError(
            f"{max_batch} samples of {len(config.features)} bags hold up to {ids[2]} ids, and a plan numbers them in "
            "32 bits. Lower --max-batch or --max-bag."
        )
    return Profile(batch=(1, best, max_batch), ids=ids)


def _write_graph(
    bundle: Bundle, engine: str, precision: Precision, max_bag: int | None, table_inputs: bool
) -> onnx.ModelProto:
    try:
        from dlrm_deploy.export.tensorrt_graph import write_tensorrt_model
    except ImportError as err:
        raise MissingDependencyError(
            f"building a plan needs the package onnx. Install it with `pip install 'dlrm-deploy[{engine}]'`."
        ) from err
    return write_tensorrt_model(
        bundle.config,
        bundle.dense_weights(),
        None if table_inputs else bundle.map_groups(),
        table_formats=bundle.manifest.table_formats,
        max_bag=max_bag or 1,
        precision=precision,
    )


def check_graph(
    model: onnx.ModelProto, bundle: Bundle, profile: Profile, max_bag: int | None, table_inputs: bool, sha256: str
) -> GraphCheck:
    """Execute the graph with ONNX Runtime on the golden batch, as far as its samples fit the plan."""
    import onnxruntime as ort

    from dlrm_deploy.engines.ort_tables import ort_value
    from dlrm_deploy.export.tensorrt_graph import runnable_on_cpu

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(
        runnable_on_cpu(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    tables: dict[str, ort.OrtValue] = {}
    if table_inputs:
        for record, stored in zip(bundle.manifest.table_groups, bundle.map_tables(), strict=True):
            matrix = stored.view(np.int8) if stored.dtype == np.uint8 else stored  # as `plan_inputs` calls bytes
            tables[tensor_name(record.name, record.format)] = ort_value(matrix, record.format)
    golden = bundle.golden()
    differences = []
    for row in range(golden.batch.batch_size):
        try:
            (feed,) = plan_feeds(golden.batch.rows(row, row + 1), bundle.config, max_bag, profile.batch[2])
        except BatchError:
            continue
        (actual,) = session.run(None, {**feed, **tables})
        differences.append(abs(float(actual[0]) - float(golden.probabilities[row])))
    return GraphCheck(
        sha256=sha256,
        checked_with=f"onnxruntime {ort.__version__} on CPU",
        rows=len(differences),
        max_abs=float(np.max(differences)) if differences else None,
    )


def _check_finite(graph: GraphCheck, precision: str) -> None:
    if graph.max_abs is not None and not np.isfinite(graph.max_abs):
        raise EngineError(
            f"the model overflows in {precision}: a golden sample scores NaN. Build with --precision bf16 or fp32."
        )


def _build_in_child(folder: Path, engine: str, config: ModelConfig, profile: Profile) -> dict[str, Any]:
    """Run `worker` on the folder and return its result."""
    features = len(config.features)
    shapes = {"indices": [[size] for size in profile.ids]}
    if config.dense_features:
        shapes["dense"] = [[size, len(config.dense_features)] for size in profile.batch]
    if config.pooling_factors is None:
        shapes["offsets"] = [[features * size + 1] for size in profile.batch]
    if config.weighted:
        shapes["weights"] = shapes["indices"]
    request = {"engine": engine, "profile": shapes}
    (folder / worker.REQUEST).write_text(json.dumps(request), encoding="utf-8")
    # -P keeps the current folder off the path: a stray enum.py there would break the library's import.
    command = [sys.executable, "-P", "-m", "dlrm_deploy.engines.tensorrt.worker", str(folder)]
    child = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if child.returncode != 0 or not (folder / worker.RESULT).is_file():
        lines = [line for line in child.stderr.splitlines() if line.strip()]
        raise EngineError(
            f"building the plan with {MODULES[engine]} {_ended(child.returncode)}. Its last words: "
            f"{' | '.join(lines[-3:]) or 'none'}. The bundle is as it was."
        )
    result: dict[str, Any] = json.loads((folder / worker.RESULT).read_text(encoding="utf-8"))
    if "error" in result:
        raise EngineError(f"{MODULES[engine]} {result['error']}")
    return result


def _ended(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"crashed ({signal.Signals(-code).name})"
    except ValueError:
        return f"crashed (signal {-code})"


def _compute_capabilities(module: ModuleType, plan: Path) -> tuple[str, ...]:
    """GPUs that the plan is for: those its header names, or the one that data-center TensorRT built it on."""
    if builds_without_gpu(module):
        header = read_header(plan)
        return header.compute_capabilities if header else ()
    device = cuda.Device()
    try:
        return (device.compute_capability,)
    finally:
        device.close()


def _tensors(model: onnx.ModelProto, built: list[dict[str, Any]]) -> tuple[PlanTensor, ...]:
    """The tensors of the plan as the library reports them, with the names of dimensions that only the graph knows.

    Raises:
        EngineError: the library changed a name, a type or a rank, so the plan is not what the host code feeds.
    """
    graph_tensors = [*model.graph.input, *model.graph.output]
    outputs = {value.name for value in model.graph.output}
    tensors = []
    for value, seen in zip(graph_tensors, built, strict=True):
        shape = tuple(size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim)
        static = [-1 if isinstance(size, str) else size for size in shape]
        expected = _ELEMENT_TYPES[value.type.tensor_type.elem_type]
        if (value.name, expected, static) != (seen["name"], seen["dtype"], seen["shape"]):
            raise EngineError(
                f"the plan's tensor {seen['name']} is {seen['dtype']} {seen['shape']}, and {value.name} {expected} "
                f"{static} was asked for. This version of the library is not supported."
            )
        role = "output" if value.name in outputs else value.name if value.name in _BATCH_INPUTS else "table"
        tensors.append(PlanTensor(name=value.name, dtype=expected, shape=shape, role=role))
    return tuple(tensors)


def _table_inputs(bundle: Bundle, tensors: tuple[PlanTensor, ...]) -> tuple[TableInput, ...]:
    types = {tensor.name: tensor.dtype for tensor in tensors}
    return tuple(
        TableInput(
            tensor=tensor_name(record.name, record.format),
            file=record.file,
            rows=record.rows,
            width=record.width,
            dtype=types[tensor_name(record.name, record.format)],
            sha256=bundle.manifest.files[record.file].sha256,
        )
        for record in bundle.manifest.table_groups
    )


def _store(bundle: Bundle, plan: Path, stem: str, sidecar: Sidecar) -> PlanRecord:
    """Put plan and sidecar into the bundle; the manifest names them once both are complete."""
    text = sidecar.to_json()
    sidecar_name = f"{stem}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"
    record = PlanRecord(engine=sidecar.engine, plan=sidecar.plan.file, sidecar=sidecar_name)
    folder = bundle.path / "engines"
    with output_errors(folder):
        folder.mkdir(exist_ok=True)
        with locked(folder):  # files that are not listed yet belong to whoever holds it
            written = [name for name in (record.plan, record.sidecar) if name not in bundle.manifest.files]
            try:
                with atomic_file(bundle.path / record.plan) as partial:
                    shutil.copyfile(plan, partial)
                with atomic_file(bundle.path / record.sidecar) as partial:
                    partial.write_text(text, encoding="utf-8")
                bundle.add_plan(record)
            except BaseException:
                for name in written:
                    with suppress(OSError):
                        (bundle.path / name).unlink()
                raise
            _remove_unlisted(bundle, folder, sidecar.engine)
    return record


def _remove_unlisted(bundle: Bundle, folder: Path, engine: str) -> None:
    """Remove plans and sidecars of an engine that the manifest does not name: left by builds that were killed."""
    name_of = re.compile(rf"\.?{engine}-({'|'.join(PRECISIONS)})-[0-9a-f]{{12}}\.(plan|json)(\.partial-\d+)?")
    for path in folder.iterdir():
        if name_of.fullmatch(path.name) and f"engines/{path.name}" not in bundle.manifest.files:
            with suppress(OSError):  # the new plan is complete and listed, whatever becomes of old files
                path.unlink()
