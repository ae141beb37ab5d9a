"""The TensorRT engines: open a plan, anywhere; execute it, where there is an NVIDIA GPU.

Opening verifies that plan, sidecar, model and installed library belong together, and needs no GPU. The plan is
deserialized by the first `predict`.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from dlrm_deploy.batch import Batch
from dlrm_deploy.bundle import MODEL, Bundle, PlanRecord
from dlrm_deploy.config import ModelConfig
from dlrm_deploy.engines.engine import Engine
from dlrm_deploy.engines.tensorrt import cuda
from dlrm_deploy.engines.tensorrt.header import read_header
from dlrm_deploy.engines.tensorrt.host import plan_feeds
from dlrm_deploy.engines.tensorrt.library import MODULES, import_library, log_of
from dlrm_deploy.engines.tensorrt.sidecar import Sidecar
from dlrm_deploy.errors import BundleError, EngineError

_ITEM_BYTES = {"float32": 4, "int32": 4, "float16": 2, "bfloat16": 2, "int8": 1}


def open_tensorrt_engine(bundle: Bundle, name: str, threads: int) -> Engine:
    """Open the plan that a bundle holds for engine `name`, "tensorrt-rtx" or "tensorrt".

    Raises:
        MissingDependencyError: the library is not installed.
        BundleError: plan or sidecar are missing, truncated, altered, or of another schema version.
        EngineError: the bundle has no such plan, or one for another model or library version.
    """
    kind = TensorRTRTXEngine if name == TensorRTRTXEngine.name else TensorRTEngine
    return kind(bundle, threads)


class TensorRTEngine(Engine):
    """A plan of data-center TensorRT."""

    name: ClassVar[str] = "tensorrt"

    def __init__(self, bundle: Bundle, threads: int) -> None:
        super().__init__(bundle, threads)
        self._module = import_library(self.name)
        self._rebuild = f"Build it again with `dlrm-deploy build {bundle.path} --engine {self.name}`."
        record = next((plan for plan in bundle.manifest.plans if plan.engine == self.name), None)
        if record is None:
            raise EngineError(
                f"{bundle.path} holds no plan for engine {self.name}. "
                f"Build one with `dlrm-deploy build {bundle.path} --engine {self.name}`."
            )
        self.sidecar = read_sidecar(bundle, record)
        self._plan = bundle.path / record.plan
        self._check_origin(record)
        self._check_library(self._plan)
        self._execution: _Execution | None = None

    def _check_origin(self, record: PlanRecord) -> None:
        """The sidecar must speak of this plan, this engine and this model."""
        if (self.sidecar.engine, self.sidecar.plan.file) != (self.name, record.plan):
            raise EngineError(
                f"{record.sidecar} describes {self.sidecar.plan.file} for engine {self.sidecar.engine}, not "
                f"{record.plan} for {self.name}. {self._rebuild}"
            )
        files = self.bundle.manifest.files
        for what, ref in (("plan", self.sidecar.plan), ("model", self.sidecar.model)):
            if files[ref.file if what == "plan" else MODEL].sha256 != ref.sha256:
                raise EngineError(
                    f"{record.plan} is stale: its sidecar was written for another {what} than the one that the bundle "
                    f"holds. {self._rebuild}"
                )
        for table in self.sidecar.table_inputs:
            if table.file not in files or files[table.file].sha256 != table.sha256:
                raise EngineError(f"{record.plan} is stale: {table.file} is not what it was built for. {self._rebuild}")

    def _check_library(self, plan: Path) -> None:
        """A plan runs on the version of the library that built it and on no other."""
        built, here = self.sidecar.library_version, self._module.__version__
        if built != here:
            raise EngineError(
                f"{plan.name} was built by {MODULES[self.name]} {built}, and {here} is installed. Install {built}, or "
                f"replace the plan. {self._rebuild}"
            )

    @property
    def most_ids(self) -> int | None:
        return self.sidecar.max_bag

    def _run(self, batch: Batch) -> npt.NDArray[np.float32]:
        if batch.batch_size == 0:
            return np.zeros(0, np.float32)
        sidecar = self.sidecar
        feeds = plan_feeds(batch, self.bundle.config, sidecar.max_bag, sidecar.profile.batch[2])
        if self._execution is None:
            if cuda.device_count() == 0:
                raise EngineError(
                    f"the plan {self._plan.name} is built, but executing it needs an NVIDIA GPU and its driver, and "
                    "this machine has none. On this machine score with engine onnxruntime, and check the model with "
                    f"`dlrm-deploy check {self.bundle.path} --engine onnxruntime`."
                )
            self._execution = _Execution(self._module, self._plan, sidecar, self.bundle)
        return np.concatenate([self._execution.run(feed) for feed in feeds])

    def implementations(self) -> dict[str, str]:
        """From the layers that the build reported: our operators are lowered to standard ones, never plugins."""
        kinds = [layer.type for layer in self.sidecar.layers]
        counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds)))
        where = f"a plan of {len(kinds)} layers ({counts})" if kinds else "the plan"
        return dict.fromkeys(self.bundle.manifest.operators, f"lowered into {where}, {self.sidecar.precision}")

    @property
    def precision(self) -> str:
        return self.sidecar.precision

    @property
    def version(self) -> str:
        return f"{MODULES[self.name]} {self._module.__version__}"

    def _release(self) -> None:
        if self._execution is not None:
            self._execution.close()
            self._execution = None


class TensorRTRTXEngine(TensorRTEngine):
    """A plan of TensorRT-RTX, whose header says version and GPUs."""

    name: ClassVar[str] = "tensorrt-rtx"

    def _check_library(self, plan: Path) -> None:
        super()._check_library(plan)
        header = read_header(plan)
        if header is None or header.version != self.sidecar.library_version:
            seen = "no TensorRT-RTX plan" if header is None else f"a plan of version {header.version}"
            raise EngineError(f"{plan} is {seen}, and {self.sidecar.library_version} was expected. {self._rebuild}")


def read_sidecar(bundle: Bundle, record: PlanRecord) -> Sidecar:
    """Verify plan and sidecar in full and parse the latter.

    Raises:
        BundleError: one of them is missing, truncated, altered, or of another schema version.
    """
    for name in (record.plan, record.sidecar):
        bundle.verify_file(name)
    path = bundle.path / record.sidecar
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as err:
        raise BundleError(f"cannot read {path}: {err}.") from err
    return Sidecar.from_json(text, str(path))


class _Execution:
    """A deserialized plan, its buffers on the GPU, and its tables there if they are inputs."""

    def __init__(self, module: ModuleType, plan: Path, sidecar: Sidecar, bundle: Bundle) -> None:
        self._log = log_of(module)
        self._sidecar = sidecar
        self._config = bundle.config
        self._device = cuda.Device()
        try:
            _check_device(self._device.compute_capability, sidecar.compute_capabilities)
            self._runtime: Any = module.Runtime(self._log.logger)
            self._engine: Any = self._runtime.deserialize_cuda_engine(plan.read_bytes())
            if self._engine is None:
                raise EngineError(f"{plan.name} cannot be loaded on this GPU: {self._log.errors()}")
            self._context: Any = self._engine.create_execution_context()
            if self._context is None:
                raise EngineError(f"{plan.name} cannot be executed on this GPU: {self._log.errors()}")
            self._addresses = self._allocate(bundle)
        except BaseException:
            self._device.close()
            raise

    def _allocate(self, bundle: Bundle) -> dict[str, int]:
        """A buffer of the largest size of each tensor; tables are copied into theirs."""
        addresses = {}
        features = len(bundle.config.features)
        _, _, most = self._sidecar.profile.batch
        sizes = {"batch": most, "ids": self._sidecar.profile.ids[2], "bags_plus_1": features * most + 1}
        matrices = dict(zip((record.file for record in bundle.manifest.table_groups), bundle.map_tables(), strict=True))
        tables = {table.tensor: matrices[table.file] for table in self._sidecar.table_inputs}
        for tensor in self._sidecar.tensors:
            shape = [sizes[size] if isinstance(size, str) else size for size in tensor.shape]
            addresses[tensor.name] = self._device.allocate(
                int(np.prod(shape, dtype=np.int64)) * _ITEM_BYTES[tensor.dtype]
            )
            if tensor.name in tables:
                self._device.upload(addresses[tensor.name], tables[tensor.name])
                self._context.set_input_shape(tensor.name, tables[tensor.name].shape)
            self._context.set_tensor_address(tensor.name, addresses[tensor.name])
        self._device.synchronize()
        return addresses

    def run(self, feed: dict[str, npt.NDArray[Any]]) -> npt.NDArray[np.float32]:
        """Copy in, execute, copy out."""
        self._device.make_current()
        for name, array in feed.items():
            self._device.upload(self._addresses[name], array)
            if not self._context.set_input_shape(name, array.shape):
                raise EngineError(f"the plan refuses {name} of shape {array.shape}: {self._log.errors()}")
        if not self._context.execute_async_v3(self._device.stream):
            raise EngineError(f"executing the plan failed: {self._log.errors()}")
        output = next(tensor.name for tensor in self._sidecar.tensors if tensor.role == "output")
        probabilities = np.empty(_samples(feed, self._config), np.float32)
        self._device.download(probabilities, self._addresses[output])
        return probabilities

    def close(self) -> None:
        del self._context, self._engine, self._runtime
        self._device.close()


def _samples(feed: dict[str, npt.NDArray[Any]], config: ModelConfig) -> int:
    """Number of samples in the inputs of a plan."""
    if "dense" in feed:
        return len(feed["dense"])
    if "offsets" in feed:
        return (len(feed["offsets"]) - 1) // len(config.features)
    return len(feed["indices"]) // sum(config.pooling_factors or (1,))


def _check_device(capability: str, built: tuple[str, ...]) -> None:
    """Raise if the plan names its GPUs, `built`, and this one is not among them."""
    if not built or capability in built:
        return
    newer = "later" in built and float(capability) > max(float(name) for name in built if name != "later")
    if not newer:
        raise EngineError(
            f"this GPU has compute capability {capability}, and the plan is for {', '.join(built)}. "
            "TensorRT-RTX makes no plans for other GPUs, data-center Hopper (9.0) among them: use engine onnxruntime "
            "or tensorrt."
        )
