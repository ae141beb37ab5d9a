"""Sidecar: the JSON beside a plan that says what it is, for which model, library and GPUs.

The format is specified in docs/build.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

from dlrm_deploy.config import from_mapping
from dlrm_deploy.engines.tensorrt.layers import PlanLayer
from dlrm_deploy.errors import BundleError, ConfigError

FORMAT = "dlrm-deploy plan"
SCHEMA_VERSION = 1
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class FileRef:
    """A file of the bundle."""

    file: str
    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """Least, best and largest value of the two sizes that vary: samples, and ids of all features together."""

    batch: tuple[int, int, int]
    ids: tuple[int, int, int]

    def __post_init__(self) -> None:
        for name in ("batch", "ids"):
            sizes = tuple(getattr(self, name))
            rising = (
                len(sizes) == 3
                and all(isinstance(size, int) for size in sizes)
                and 1 <= sizes[0] <= sizes[1] <= sizes[2]
            )
            if not rising:
                raise ConfigError(f"profile {name} must be three rising whole numbers, got {sizes}.")
            object.__setattr__(self, name, sizes)


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanTensor:
    """An input or output of the plan. `role`: dense, indices, offsets, weights, table or output."""

    name: str
    dtype: str
    shape: tuple[str | int, ...]
    role: str


@dataclass(frozen=True, kw_only=True, slots=True)
class TableInput:
    """A stored matrix of a table group that the plan takes as an input: which tensor, and the file with its rows."""

    tensor: str
    file: str
    rows: int
    width: int
    """Values of a row, whatever bytes they take."""

    dtype: str
    """As the plan names it: rows of int8 and int4 formats are bytes, and int8."""

    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class GraphCheck:
    """How the graph that the plan was built from did on the golden batch, executed by ONNX Runtime on a CPU."""

    sha256: str
    """Of the ONNX file that was built."""

    checked_with: str
    rows: int
    max_abs: float | None
    """Largest absolute difference from the golden probabilities; None where no golden sample fits the plan."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sidecar:
    """Everything that a sidecar says."""

    schema_version: int
    engine: str
    library_version: str
    plan: FileRef
    model: FileRef
    precision: str
    compute_capabilities: tuple[str, ...]
    """GPUs that the plan was built for; empty where the plan does not say."""

    max_bag: int | None
    """Ids that a bag can hold; None where every bag has its fixed pooling factor."""

    profile: Profile
    tensors: tuple[PlanTensor, ...]
    table_inputs: tuple[TableInput, ...]
    builder: dict[str, Any]
    layers: tuple[PlanLayer, ...]
    memory: dict[str, int]
    graph: GraphCheck
    executed: bool
    """Always false: a sidecar is written when the plan is built, and building executes nothing. What an execution
    gave is in the manifest's parity record."""

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> Sidecar:
        """Parse a sidecar.

        Raises:
            BundleError: not a sidecar, damaged, or of another schema version.
        """
        rebuild = "Build the plan again with `dlrm-deploy build`."
        try:
            values = json.loads(text)
        except json.JSONDecodeError as err:
            raise BundleError(f"{where} is not valid JSON: {err}. {rebuild}") from err
        if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
            raise BundleError(f"{where} is not the sidecar of a plan. {rebuild}")
        version = values.get("schema_version")
        if version != SCHEMA_VERSION:
            raise BundleError(
                f"{where} is of schema version {version}, and this dlrm-deploy reads version {SCHEMA_VERSION}. "
                f"{rebuild}"
            )
        try:
            one, many = _readers(where)
            values["plan"], values["model"] = one(FileRef, values.get("plan")), one(FileRef, values.get("model"))
            values["profile"] = one(Profile, values.get("profile"))
            values["graph"] = one(GraphCheck, values.get("graph"))
            tensors = many(PlanTensor, values.get("tensors", ()))
            values["tensors"] = tuple(replace(tensor, shape=tuple(tensor.shape)) for tensor in tensors)
            values["table_inputs"] = many(TableInput, values.get("table_inputs", ()))
            layers = many(PlanLayer, values.get("layers", ()))
            values["layers"] = tuple(replace(layer, reads=tuple(layer.reads)) for layer in layers)
            values["compute_capabilities"] = tuple(values.get("compute_capabilities", ()))
            return from_mapping(cls, values, where)
        except (ConfigError, TypeError, AttributeError) as err:
            raise BundleError(f"{where} is damaged: {err} {rebuild}") from err


def _readers(where: str) -> tuple[Callable[[type[T], Any], T], Callable[[type[T], Iterable[Any]], tuple[T, ...]]]:
    def one(kind: type[T], values: Any) -> T:
        return from_mapping(kind, values, f"{where}, {kind.__name__}")

    return one, lambda kind, items: tuple(one(kind, item) for item in items)
