"""Bundle: a folder with everything a server needs to score one model, each file hashed in `manifest.json`.

Reading needs NumPy only. Nothing in a bundle is a pickle. The format is specified in docs/bundle-format.md; bundles are
written by `dlrm_deploy.export`, plans are added by `dlrm_deploy.engines.tensorrt`.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from dlrm_deploy.batch import Batch
from dlrm_deploy.config import ModelConfig, from_mapping
from dlrm_deploy.errors import BundleError, ConfigError, DlrmDeployError
from dlrm_deploy.files import atomic_file, file_damage, locked, output_errors, sha256_file
from dlrm_deploy.formats import ROW_FORMATS, GroupLayout, RowFormat, stored_columns, stored_dtype
from dlrm_deploy.tables import TablePart

FORMAT = "dlrm-deploy bundle"
FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)
"""Version 1 knows float32 only: its table groups say `dtype`, and all of its tables are fp32."""

MANIFEST = "manifest.json"
MODEL = "model.onnx"
DENSE = "dense.npz"
GOLDEN = "golden.npz"
REFERENCE = "torch"
"""The engine that parity is measured against."""

Verify = Literal["auto", "full", "none"]

MlpPrecision = Literal["fp32", "bf16", "int8"]
MLP_PRECISIONS: tuple[MlpPrecision, ...] = get_args(MlpPrecision)

MIXED = "auto-mixed"
"""`precision["tables"]` where the format was chosen table by table, and they are not all in one."""

# A full hash of 2 GB takes longer than the rest of loading: `verify="auto"` hashes files up to this size and
# compares the sizes of larger ones. `inspect`, `check` and `verify="full"` hash everything.
AUTO_HASH_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class FileRecord:
    """Size in bytes and SHA-256 of one file of the bundle."""

    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """One input or output of the graph; named dimensions are strings."""

    name: str
    dtype: str
    shape: tuple[str | int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class TableGroupRecord:
    """One external-data file: the rows of a table group that are stored in one format (`dlrm_deploy.formats`)."""

    name: str
    """Of the group."""

    file: str
    rows: int
    width: int
    """Values of a row, whatever bytes they take."""

    format: RowFormat = "fp32"


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanRecord:
    """One built engine plan and the sidecar that describes it."""

    engine: str
    plan: str
    sidecar: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What `manifest.json` says. Paths are relative to the bundle, with forward slashes."""

    format_version: int
    model: ModelConfig
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    operators: dict[str, int]
    """Our operators and their versions."""

    opset: int
    precision: dict[str, str]
    """Number formats: `tables` is a row format or `MIXED`, `mlp` one of `MLP_PRECISIONS`."""

    table_groups: tuple[TableGroupRecord, ...]
    """Each matrix: groups in the order of the model, the formats of a group in the order of `ROW_FORMATS`."""

    files: dict[str, FileRecord]
    provenance: dict[str, Any]
    plans: tuple[PlanRecord, ...] = ()
    parity: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Latest parity record of each engine."""

    table_formats: dict[str, RowFormat] = field(default_factory=dict)
    """Row format of each table part that is not fp32."""

    accuracy: dict[str, Any] = field(default_factory=dict)
    """Of a converted bundle: errors of its tables, and the comparison with the fp32 model."""

    @property
    def layouts(self) -> tuple[GroupLayout, ...]:
        """How each table group of the model is stored."""
        return tuple(GroupLayout.of(group, self.table_formats) for group in self.model.groups)

    @property
    def mlp_precision(self) -> MlpPrecision:
        """Number format of the MLPs' weights and activations."""
        return next(name for name in MLP_PRECISIONS if name == self.precision["mlp"])

    def files_digest(self, engine: str) -> str:
        """SHA-256 over the hashes of the files that the scores of an engine follow from: model, weights, its own plan.

        A parity record holds it, and counts for no other files.
        """
        plans = {name: plan.engine for plan in self.plans for name in (plan.plan, plan.sidecar)}
        names = sorted(name for name in self.files if name != GOLDEN and plans.get(name, engine) == engine)
        return hashlib.sha256("".join(f"{self.files[name].sha256}  {name}\n" for name in names).encode()).hexdigest()

    @property
    def index_dtype(self) -> np.dtype[Any]:
        """Type of the graph's `indices` input: int32 or int64."""
        return np.dtype(next(spec.dtype for spec in self.inputs if spec.name == "indices"))

    def to_json(self) -> str:
        plain = asdict(self)
        plain["model"] = self.model.to_dict()
        return json.dumps({"format": FORMAT, **plain}, indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> Manifest:
        """Parse a manifest.

        Raises:
            BundleError: not a manifest, or one of a newer version.
        """
        try:
            values = json.loads(text)
        except json.JSONDecodeError as err:
            raise BundleError(f"{where} is not valid JSON: {err}. Export the bundle again.") from err
        if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
            raise BundleError(f"{where} is not the manifest of a dlrm-deploy bundle.")
        version = values.get("format_version")
        if version not in READABLE_VERSIONS:
            raise BundleError(
                f"{where} is of format version {version}, and this dlrm-deploy reads versions up to {FORMAT_VERSION}. "
                "Install a release that reads it, or export the bundle again."
            )
        try:
            values["model"] = ModelConfig.from_dict(values.get("model", {}), f"{where}, model")
            for key, kind in (("inputs", TensorSpec), ("outputs", TensorSpec), ("plans", PlanRecord)):
                values[key] = tuple(from_mapping(kind, v, f"{where}, {key}") for v in values.get(key, ()))
            values["inputs"] = tuple(replace(s, shape=tuple(s.shape)) for s in values["inputs"])
            values["outputs"] = tuple(replace(s, shape=tuple(s.shape)) for s in values["outputs"])
            values["table_groups"] = tuple(
                from_mapping(TableGroupRecord, _without_dtype(v, version), f"{where}, table_groups")
                for v in values.get("table_groups", ())
            )
            values["files"] = {
                name: from_mapping(FileRecord, v, f"{where}, files") for name, v in values.get("files", {}).items()
            }
            manifest = from_mapping(cls, values, where)
            manifest._check(where)
        # What a value of another type than expected leads to; every field is looked at in there.
        except (ConfigError, TypeError, ValueError, AttributeError, KeyError, StopIteration) as err:
            raise BundleError(f"{where} is damaged: {err} Export the bundle again.") from err
        return manifest

    def _check(self, where: str) -> None:
        if self.index_dtype not in (np.int32, np.int64):
            raise BundleError(f"{where} is damaged: indices are {self.index_dtype}. Export the bundle again.")
        for record in (*self.files.values(), *self.plans, *self.table_groups, *self.inputs, *self.outputs):
            _check_types(record, where)
        for name, records in (("a parity", self.parity.values()), ("the accuracy", [self.accuracy])):
            if not all(isinstance(record, dict) for record in records):
                raise BundleError(f"{where} is damaged: {name} record is no object. Export the bundle again.")
        self._check_precision(where)
        for name in self.files:
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts:
                raise BundleError(
                    f"{where} names {name!r}, which is outside the bundle. It was not made by dlrm-deploy."
                )
        listed = [record.file for record in self.table_groups]
        listed += [name for record in self.plans for name in (record.plan, record.sidecar)]
        missing = sorted({MODEL, DENSE, GOLDEN, *listed} - set(self.files))
        if missing:
            raise BundleError(
                f"{where} is damaged: it lists no hash for {', '.join(missing)}. Export the bundle again."
            )
        matrices = [
            (group, matrix)
            for group, layout in zip(self.model.groups, self.layouts, strict=True)
            for matrix in layout.matrices
        ]
        if len(self.table_groups) != len(matrices):
            raise BundleError(
                f"{where} is damaged: {len(self.table_groups)} table groups for {len(matrices)}. Export the bundle "
                "again."
            )
        for record, (group, matrix) in zip(self.table_groups, matrices, strict=True):
            size = self.files[record.file].size
            expected = (group.name, matrix.format, matrix.rows, group.width, matrix.rows * matrix.row_bytes)
            if (record.name, record.format, record.rows, record.width, size) != expected:
                raise BundleError(
                    f"{where} is damaged: {record.file} is listed as {record.rows} x {record.width} of {record.name} "
                    f"in {record.format} and {size} bytes, but the model needs {matrix.rows} x {group.width} of "
                    f"{group.name} in {matrix.format} and {expected[-1]} bytes. Export the bundle again."
                )

    def _check_precision(self, where: str) -> None:
        """See that the number formats are known ones, and go together."""
        tables, mlp = self.precision.get("tables"), self.precision.get("mlp")
        if tables not in (*ROW_FORMATS, MIXED) or mlp not in MLP_PRECISIONS:
            raise BundleError(
                f"{where} is damaged: precision is {self.precision}, expected tables of {', '.join(ROW_FORMATS)} or "
                f"{MIXED}, and mlp of {', '.join(MLP_PRECISIONS)}. Export the bundle again."
            )
        parts = {part.name for group in self.model.groups for part in group.parts}
        for part, kind in self.table_formats.items():
            if part not in parts or kind not in ROW_FORMATS or (tables != MIXED and kind not in (tables, "fp32")):
                raise BundleError(
                    f"{where} is damaged: table_formats says {kind!r} for {part!r}, in a bundle whose tables are "
                    f"{tables}. Export the bundle again."
                )


def _without_dtype(record: Any, version: int) -> Any:
    """A table group as this version writes it."""
    if version != 1 or not isinstance(record, dict) or "dtype" not in record:
        return record
    if record["dtype"] != "float32":
        raise ValueError(f"a table group is {record['dtype']!r}, and version 1 knows float32 only.")
    return {key: value for key, value in record.items() if key != "dtype"}


def _check_types(record: object, where: str) -> None:
    """Texts and whole numbers are what their field says; other fields are built from checked values."""
    for field_ in fields(record):  # type: ignore[arg-type]  # a dataclass
        value = getattr(record, field_.name)
        expected = {"str": str, "int": int}.get(str(field_.type))
        if expected is not None and not isinstance(value, expected):
            raise BundleError(f"{where} is damaged: {field_.name} is {value!r}. Export the bundle again.")


@dataclass(frozen=True, slots=True)
class Golden:
    """A few real inputs and the probabilities [B] float32 that the PyTorch model gave for them at export."""

    batch: Batch
    probabilities: npt.NDArray[np.float32]
    fp32_probabilities: npt.NDArray[np.float32] | None = None
    """What the fp32 model gave, in a converted bundle, whose own model gave `probabilities`."""

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """What `golden.npz` holds."""
        arrays: dict[str, npt.NDArray[Any]] = {
            "dense": self.batch.dense,
            "indices": self.batch.indices,
            "offsets": self.batch.offsets,
            "probabilities": self.probabilities,
        }
        if self.batch.weights is not None:
            arrays["weights"] = self.batch.weights
        if self.fp32_probabilities is not None:
            arrays["fp32_probabilities"] = self.fp32_probabilities
        return arrays

    @classmethod
    def read(cls, path: Path) -> Golden:
        """Read a `golden.npz`, from a bundle or a checkpoint.

        Raises:
            BundleError: missing or damaged.
        """
        arrays = read_npz(path)
        try:
            batch = Batch(arrays["dense"], arrays["indices"], arrays["offsets"], arrays.get("weights"))
            probabilities = arrays["probabilities"]
        except KeyError as err:
            raise BundleError(f"{path} is damaged: it holds no {err}.") from err
        except DlrmDeployError as err:
            raise BundleError(f"{path} is damaged: {err}") from err
        unconverted = arrays.get("fp32_probabilities")
        for values in (probabilities, unconverted):
            if values is not None and (values.shape != (batch.batch_size,) or values.dtype != np.float32):
                raise BundleError(f"{path} is damaged: probabilities are {values.dtype} {values.shape}.")
        return cls(batch, probabilities, unconverted)


class Bundle:
    """An opened bundle. Its files were verified as `verify` says; tables are mapped, not read."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def open(cls, path: Path | str, verify: Verify = "auto") -> Bundle:
        """Open the bundle at `path`.

        Args:
            path: the folder.
            verify: "auto" hashes every file up to 64 MiB and compares the sizes of larger ones; "full" hashes all,
                plans too;
                "none" compares sizes only. Plans are verified when their engine opens them.

        Raises:
            BundleError: no bundle, a newer version, or a file that is missing, truncated or altered; the message
                names it.
        """
        bundle = cls.unverified(path)
        plans = {name for record in bundle.manifest.plans for name in (record.plan, record.sidecar)}
        for name in bundle.manifest.files:
            if verify == "full" or name not in plans:
                bundle.verify_file(name, verify)
        return bundle

    @classmethod
    def unverified(cls, path: Path | str) -> Bundle:
        """Read the manifest only, to look at a bundle whose other files may be damaged.

        Raises:
            BundleError: no bundle, or a newer version.
        """
        path = Path(path)
        manifest_path = path / MANIFEST
        try:
            text = manifest_path.read_text(encoding="utf-8")
        except FileNotFoundError as err:
            raise BundleError(
                f"{path} is not a bundle: it holds no {MANIFEST}. Make one with `dlrm-deploy export`."
            ) from err
        except (OSError, UnicodeDecodeError) as err:
            raise BundleError(f"cannot read {manifest_path}: {err}.") from err
        return cls(path, Manifest.from_json(text, str(manifest_path)))

    @property
    def config(self) -> ModelConfig:
        return self.manifest.model

    def verify_file(self, name: str, verify: Verify = "full") -> None:
        """Raise `BundleError` if the file is missing, or its size or hash is not the manifest's."""
        record, path = self.manifest.files[name], self.path / name
        hashed = verify == "full" or (verify == "auto" and record.size <= AUTO_HASH_BYTES)
        if damage := file_damage(path, record.size, record.sha256 if hashed else None, "the manifest"):
            raise BundleError(f"{damage} Copy the bundle again, or export it again.")

    def altered_files(self) -> list[str]:
        """Hash every file in full; one message for each that is missing or altered."""
        problems = []
        for name in self.manifest.files:
            try:
                self.verify_file(name)
            except BundleError as err:
                problems.append(str(err))
        return problems

    @property
    def model_path(self) -> Path:
        return self.path / MODEL

    def map_tables(self) -> list[npt.NDArray[Any]]:
        """The stored matrix of each of `Manifest.table_groups`, in order, mapped read-only from its file.

        [rows, width] float32, float16 or, for bf16, uint16; int8 and int4 rows are [rows, row_bytes] uint8.
        """
        matrices: list[npt.NDArray[Any]] = []
        for record in self.manifest.table_groups:
            shape = (record.rows, stored_columns(record.format, record.width))
            matrices.append(np.memmap(self.path / record.file, stored_dtype(record.format), "r", shape=shape))
        return matrices

    def map_groups(self) -> list[dict[RowFormat, npt.NDArray[Any]]]:
        """The matrices of `map_tables` by format, for each table group of the model."""
        groups: dict[str, dict[RowFormat, npt.NDArray[Any]]] = {group.name: {} for group in self.config.groups}
        for record, matrix in zip(self.manifest.table_groups, self.map_tables(), strict=True):
            groups[record.name][record.format] = matrix
        return list(groups.values())

    def stored_parts(self) -> Iterator[tuple[TablePart, RowFormat, npt.NDArray[Any]]]:
        """Each table part, its format and its stored rows, mapped."""
        layouts = self.manifest.layouts
        for group, layout, matrices in zip(self.config.groups, layouts, self.map_groups(), strict=True):
            for part in group.parts:
                kind, start = layout.place(part.name)
                yield part, kind, matrices[kind][start : start + part.rows]

    def dense_weights(self) -> dict[str, npt.NDArray[np.float32]]:
        """All parameters but the tables, by checkpoint key (`dlrm_deploy.model.keys`)."""
        return read_npz(self.path / DENSE)

    def golden(self) -> Golden:
        return Golden.read(self.path / GOLDEN)

    def record_accuracy(self, record: Mapping[str, Any]) -> None:
        """Add to the accuracy record of a converted bundle in the manifest."""
        self._update(lambda manifest: replace(manifest, accuracy={**manifest.accuracy, **record}))

    def record_parity(self, engine: str, record: dict[str, Any]) -> None:
        """Store the latest parity record of an engine in the manifest."""
        self._update(lambda manifest: replace(manifest, parity={**manifest.parity, engine: record}))

    def parity_gap(self, engine: str) -> str | None:
        """Why it is not known that an engine agrees with the reference on these files; None where it is.

        A check counts that passed within the model's own limit, on the golden batch and on random samples. The
        reference, engine `torch`, needs no record.
        """
        if engine == REFERENCE:
            return None
        record = self.manifest.parity.get(engine)
        if record is None:
            return "it was never checked"
        if record.get("files") != self.manifest.files_digest(engine):
            return f"its record of {record.get('time')} is of other files"
        check = f"the check of {record.get('time')}"
        if record.get("passed") is not True:
            return f"{check} failed"
        limit, default = record.get("limit"), record.get("default_limit")
        if not isinstance(limit, int | float) or not isinstance(default, int | float):
            return f"the record of {check} does not say what was accepted: an earlier release wrote it"
        if limit > default:
            return f"{check} accepted differences up to {limit:.2g}, and this model's limit is {default:.2g}"
        if record.get("limited") is not False:
            return f"{check} compared only the golden batch, because torch was not installed"
        return None if record.get("random_samples") else f"{check} compared no random samples"

    def add_plan(self, record: PlanRecord) -> None:
        """List a plan and its sidecar, already written under `engines/`, in place of the same engine's earlier one."""
        added = {
            name: FileRecord(size=(self.path / name).stat().st_size, sha256=sha256_file(self.path / name))
            for name in (record.plan, record.sidecar)
        }
        dropped: set[str] = set()

        def change(manifest: Manifest) -> Manifest:
            replaced = [old for old in manifest.plans if old.engine == record.engine]
            dropped.update({name for old in replaced for name in (old.plan, old.sidecar)} - set(added))
            files = {name: file for name, file in manifest.files.items() if name not in dropped}
            plans = tuple(old for old in manifest.plans if old.engine != record.engine)
            return replace(manifest, files={**files, **added}, plans=(*plans, record))

        self._update(change)
        for name in dropped:
            (self.path / name).unlink(missing_ok=True)

    def _update(self, change: Callable[[Manifest], Manifest]) -> None:
        """Change the manifest as it is on disk now: another process may have changed it since it was opened."""
        with output_errors(self.path), locked(self.path):
            manifest = change(Bundle.unverified(self.path).manifest)
            with atomic_file(self.path / MANIFEST) as temporary:
                temporary.write_text(manifest.to_json(), encoding="utf-8")
        self.manifest = manifest


def read_npz(path: Path) -> dict[str, npt.NDArray[Any]]:
    """All arrays of an .npz; pickled objects are refused."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    # zipfile says RuntimeError and NotImplementedError of what it takes for encrypted or of another compression.
    except (OSError, ValueError, EOFError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error) as err:
        raise BundleError(f"cannot read {path}: {err}.") from err
