"""What all importers share: the options a person can give, and a Source over the tensors of another project's file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dlrm_deploy.bundle import Golden
from dlrm_deploy.config import DENSE_TRANSFORMS, DenseTransform, ModelConfig
from dlrm_deploy.errors import CheckpointError, ConfigError
from dlrm_deploy.export.importers.golden_file import read_golden
from dlrm_deploy.export.importers.kinds import Kind
from dlrm_deploy.export.sources import Source
from dlrm_deploy.files import sha256_file, sha256_folder
from dlrm_deploy.model.keys import dense_shapes
from dlrm_deploy.tables import DIVISIONS, Division, TableConfig, TablePart, check_choice, check_int, check_name
from dlrm_deploy.tensors.finite import as_float32
from dlrm_deploy.tensors.store import Array, TensorStore

FloatArray = npt.NDArray[np.float32]

FLOAT_DTYPES = ("float32", "float16", "bfloat16", "float64")
"""Dtypes of weights that are read; all become float32."""

IGNORED_LISTED = 20
"""Most names of tensors that `--allow-unknown` left out which an export lists."""

_LISTED = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportOptions:
    """What a person says about a checkpoint beyond what it holds. Each is an option of `dlrm-deploy export`."""

    name: str = "imported"
    """Name of the model."""

    config: ModelConfig | None = None
    """The whole architecture: nothing is read off shapes then, every shape has to agree with it."""

    features: tuple[str, ...] = ()
    """Names of the sparse features, which are those of their tables too, in the model's order."""

    interaction: str | None = None
    """dot, dot-self or cat, where the shapes fit more than one."""

    qr_operation: str | None = None
    """mult, add or concat: how quotient-remainder tables combine their two vectors."""

    quotient: Division | None = None
    """Arithmetic of the quotient in quotient-remainder tables; None: what the source project computes on a CPU."""

    dense_transform: DenseTransform = "none"
    """What was done to dense values before the model saw them."""

    modulo: int | None = None
    """Ids were taken modulo this before the model saw them."""

    allow_unknown: bool = False
    """Ignore tensors of the model that the importer does not know."""

    no_crc: bool = False
    """Do not compare the checksums in the checkpoint: torch can be told to store none that are true."""

    golden: Path | None = None
    """A .npz file with inputs and what the source project computed for them."""

    def __post_init__(self) -> None:
        check_name("model", self.name)
        check_choice("options", "--dense-transform", self.dense_transform, DENSE_TRANSFORMS)
        if self.quotient is not None:
            check_choice("options", "--quotient", self.quotient, DIVISIONS)
        if self.modulo is not None:
            check_int("options", "--modulo", self.modulo, 1)

    def given(self) -> tuple[str, ...]:
        """Names of the fields that are not at their default."""
        return tuple(field.name for field in fields(self) if getattr(self, field.name) != field.default)

    @classmethod
    def recorded(cls, provenance: Mapping[str, Any], config: ModelConfig) -> ImportOptions:
        """What an export was told, from its bundle's provenance; `--golden` is left out.

        Args:
            provenance: of the bundle.
            config: the bundle's, which stands for `--config`, and for all options where they are not recorded.

        Raises:
            ConfigError: an option has a value that it cannot have.
        """
        said = provenance.get("options")
        if not isinstance(said, Mapping) or not said.keys() <= {field.name for field in fields(cls)}:
            return cls(config=config)
        values: dict[str, Any] = {name: value for name, value in said.items() if name != "golden"}
        if "config" in values:
            values["config"] = config
        if "features" in values:
            values["features"] = tuple(values["features"])
        return cls(**values)

    def only(self, *names: str, source: str) -> None:
        """Raise `ConfigError` for an architecture option that means nothing here.

        Args:
            names: the architecture options that do; `name`, `config`, `allow_unknown`, `no_crc` and `golden` always do.
            source: what is imported, for the message.
        """
        always = {"name", "config", "allow_unknown", "no_crc", "golden"}
        wrong = [option(name) for name in self.given() if name not in always.union(names)]
        if wrong:
            raise ConfigError(f"{', '.join(wrong)} means nothing for {source}. Leave it out.")
        if self.config is not None:
            clash = [option(name) for name in self.given() if name in names or name == "name"]
            if clash:
                raise ConfigError(
                    f"{', '.join(clash)} was given beside --config, which says the whole architecture. Write it into "
                    "the config instead."
                )


def option(name: str) -> str:
    """The command-line option of a field of `ImportOptions`."""
    return "--" + name.replace("_", "-")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Stored:
    """Where a tensor of ours is in the checkpoint, and what becomes of its values on the way."""

    store: TensorStore
    key: str

    shape: tuple[int, ...] | None = None
    """Its shape after `adapt`; None: as it is stored."""

    adapt: Callable[[FloatArray, int], FloatArray] | None = None
    """Given values and their first row, the values as our model needs them. A table comes in blocks of rows, any other
    tensor whole, with first row 0. The array given may be changed in place."""

    @property
    def adapted_shape(self) -> tuple[int, ...]:
        return self.store.shape(self.key) if self.shape is None else self.shape

    def read(self, label: str) -> FloatArray:
        """The whole tensor as float32; `label` names it in the error for NaN and infinite values."""
        return self._convert(self.store.read(self.key), 0, label)

    def chunks(self, label: str) -> Iterator[tuple[int, FloatArray]]:
        """Blocks of rows (first row, [n, ...] float32), from the first row to the last."""
        for first, block in self.store.chunks(self.key):
            yield first, self._convert(block, first, label)

    def _convert(self, values: Array, first: int, label: str) -> FloatArray:
        converted = as_float32(values, first, label)
        return converted if self.adapt is None else self.adapt(converted, first)


class ForeignSource(Source):
    """A model in another project's checkpoint. Shapes, dtypes and checksums are compared here, values when read."""

    golden_remedy = (
        "Either these outputs are of other weights, or the model is not the one that the options describe. Inputs must "
        "be what the model's own forward was given (with --dense-transform and --modulo: what came before them), and "
        "outputs what it gave in float32. Then look at the options that the export asked for."
    )

    def __init__(
        self,
        *,
        kind: Kind,
        project: str,
        path: Path,
        config: ModelConfig,
        dense: Mapping[str, Stored],
        parts: Mapping[str, Stored],
        options: ImportOptions,
        facts: Mapping[str, Any] | None = None,
        ignored: Sequence[str] = (),
    ) -> None:
        """Compare what is stored with what the model needs.

        Args:
            kind: what `--from` calls the project.
            project: the project that wrote the checkpoint, such as "facebookresearch/dlrm".
            path: the checkpoint.
            config: the model.
            dense: where each tensor of `dense_shapes(config)` is; no more and no fewer.
            parts: where each table part is, by its name; no more and no fewer.
            options: as given; `golden` is read here.
            facts: further plain values for the provenance, such as an order that was chosen.
            ignored: unknown tensors of the model that `--allow-unknown` leaves out.

        Raises:
            CheckpointError: a tensor is missing, left over, of another shape than the model needs, or no float, or the
                checkpoint was altered after it was written.
            ConfigError: the golden file does not fit.
        """
        self.kind = kind
        self.project = project
        self.path = path
        self.config = config
        self._dense = dense
        self._parts = parts
        self._options = options
        self._facts = dict(facts or {})
        self._ignored = tuple(ignored)
        said = "--config" if options.config is not None else "the model"
        for table in config.tables:
            for part in table.parts:
                self._check_part(part, table, said)
        for key, shape in dense_shapes(config).items():
            self._check_dense(key, shape, said)
        self._check_left_over(said)
        for stored in (*dense.values(), *parts.values()):
            check_dtype(stored.store, stored.key)
        self._golden = None if options.golden is None else read_golden(options.golden, config)
        self.golden_name = str(options.golden)
        if not options.no_crc:
            for store in {id(stored.store): stored.store for stored in (*dense.values(), *parts.values())}.values():
                store.verify()

    def _check_part(self, part: TablePart, table: TableConfig, said: str) -> None:
        stored = self._parts.get(part.name)
        if stored is None:
            raise CheckpointError(
                f"{self.path}: {said} has table {table.name}, partition {table.partition}, and the checkpoint holds no "
                f"matrix for its part {part.name}."
            )
        seen = stored.adapted_shape
        if len(seen) == 2 and seen[0] != part.rows:
            raise CheckpointError(
                f"{self.path}: table {part.name}: the checkpoint holds {seen[0]} rows ({stored.key}), {said} says "
                f"{part.rows}."
            )
        if seen != (part.rows, part.width):
            raise CheckpointError(
                f"{self.path}: table {part.name}: the checkpoint holds {list(seen)} ({stored.key}), {said} says "
                f"{[part.rows, part.width]}."
            )

    def _check_dense(self, key: str, shape: tuple[int, ...], said: str) -> None:
        stored = self._dense.get(key)
        if stored is None:
            raise CheckpointError(f"{self.path}: {said} needs {key} {list(shape)}, and the checkpoint holds none.")
        if stored.adapted_shape != shape:
            raise CheckpointError(
                f"{self.path}: {stored.key} is {list(stored.adapted_shape)}, and {said} needs {list(shape)} there "
                f"({key})."
            )

    def _check_left_over(self, said: str) -> None:
        known = {*dense_shapes(self.config), *(part.name for table in self.config.tables for part in table.parts)}
        left = [stored.key for key, stored in {**self._dense, **self._parts}.items() if key not in known]
        if left:
            raise CheckpointError(
                f"{self.path}: {said} has no place for {listed(left)}, which the checkpoint holds. Layers and tables "
                "must be the same in both."
            )

    def dense(self) -> dict[str, FloatArray]:
        return {key: self._dense[key].read(f"{self.path}: {self._dense[key].key}") for key in dense_shapes(self.config)}

    def part_chunks(self, part: TablePart) -> Iterator[tuple[int, FloatArray]]:
        stored = self._parts[part.name]
        return stored.chunks(f"{self.path}: table {part.name} ({stored.key})")

    def golden(self) -> Golden | None:
        return self._golden

    def provenance(self) -> dict[str, Any]:
        digest = sha256_folder(self.path) if self.path.is_dir() else sha256_file(self.path)
        given = {name: _plain(getattr(self._options, name)) for name in self._options.given()}
        return {
            "source": f"{self.project} checkpoint",
            "from": self.kind,
            "checkpoint": self.path.name,
            "checkpoint_sha256": digest,
            **self._facts,
            **({"ignored_tensors": self._ignored_tensors()} if self._ignored else {}),
            "options": given,
        }

    def _ignored_tensors(self) -> dict[str, Any]:
        return {"count": len(self._ignored), "names": list(self._ignored[:IGNORED_LISTED])}

    def summary(self) -> tuple[str, ...]:
        """What was recognised, in a few lines for a person."""
        facts = tuple(f"{name.replace('_', ' ')}: {value}" for name, value in self._facts.items())
        ignored = (f"ignored tensors: {listed(self._ignored, IGNORED_LISTED)}",) if self._ignored else ()
        return (f"{self.project} checkpoint {self.path.name}", *describe(self.config), *facts, *ignored)


def _plain(value: object) -> object:
    """An option as JSON can hold it."""
    if isinstance(value, ModelConfig):
        return value.name
    return value.name if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value


def check_dtype(store: TensorStore, key: str) -> None:
    """Raise `CheckpointError` for a tensor of a dtype that is not in `FLOAT_DTYPES`."""
    dtype = store.dtype(key)
    if dtype not in FLOAT_DTYPES:
        raise CheckpointError(
            f"{store.path}: {key} is {dtype}, expected one of {', '.join(FLOAT_DTYPES)}. Of a quantized model, take "
            "the checkpoint from before quantization."
        )


def describe(config: ModelConfig) -> tuple[str, ...]:
    """A model in a few lines: layers, interaction, tables by kind, what is done to inputs."""
    kinds: dict[str, int] = {}
    for table in config.tables:
        kind = "plain" if table.partition == "full" else str(table.partition)
        kind += f" ({table.combine}, {table.division} quotient)" if table.partition == "quotient-remainder" else ""
        kind += " with projection" if table.projection is not None else ""
        kinds[kind] = kinds.get(kind, 0) + 1
    interaction = config.interaction + (" with itself" if config.self_interaction else "")
    moduli = {feature.name: feature.modulo for feature in config.features if feature.modulo is not None}
    inputs = [f"dense values: {_TRANSFORMS[config.dense_transform]}"]
    if len(moduli) == len(config.features) and len(set(moduli.values())) == 1:
        inputs.append(f"ids modulo {next(iter(moduli.values()))}")
    elif moduli:
        inputs.append(f"ids modulo {listed(f'{modulo} ({name})' for name, modulo in moduli.items())}")
    return (
        f"layers: bottom {_widths(len(config.dense_features), *config.bottom_mlp)}, interaction {interaction}, "
        f"top {_widths(config.interaction_width, *config.top_mlp)}",
        f"tables: {', '.join(f'{count} {kind}' for kind, count in kinds.items())}; "
        f"{sum(table.parameters for table in config.tables):,} values",
        "; ".join(inputs),
    )


_TRANSFORMS = {"none": "as given", "log1p": "log(max(x + 1, 1))", "log3": "log(max(x + 3, 1))"}


def _widths(*widths: int) -> str:
    return "-".join(map(str, widths))


def listed(names: Iterable[str], most: int = _LISTED) -> str:
    """The first few names, for a message."""
    names = list(names)
    return ", ".join(names[:most]) + (f", ... ({len(names)} in all)" if len(names) > most else "")


def read_rows(store: TensorStore, key: str, first: int, count: int) -> FloatArray:
    """Rows `first` to `first + count` of a tensor of a dtype in `FLOAT_DTYPES`, as float32."""
    dtype = store.dtype(key)
    rows = np.empty((count, *store.shape(key)[1:]), "float32" if dtype == "bfloat16" else dtype)
    store.read_into(key, first, rows)
    return as_float32(rows, first, f"{store.path}: {key}")


def matrix_shape(store: TensorStore, key: str) -> tuple[int, int]:
    """Rows and columns of a stored matrix.

    Raises:
        CheckpointError: no such tensor, or no matrix with a row and a column.
    """
    shape = store.shape(key)
    if len(shape) != 2 or 0 in shape:
        raise CheckpointError(f"{store.path}: {key} is {list(shape)}, expected a matrix [rows, width] with values.")
    return shape[0], shape[1]


def refuse_sparse(path: Path, names: Iterable[str], wanted: Callable[[str], object]) -> None:
    """Raise `CheckpointError` for a sparse tensor: two tensors, `NAME.indices` and `NAME.values`, in what was opened.

    Args:
        path: the checkpoint, for the message.
        names: of tensors.
        wanted: whether a name is that of a tensor of the model.
    """
    names = set(names)
    bases = (name.removesuffix(".indices") for name in sorted(names) if name.endswith(".indices"))
    if sparse := [base for base in bases if f"{base}.values" in names and wanted(base)]:
        raise CheckpointError(
            f"{path}: {listed(sparse)} {'is' if len(sparse) == 1 else 'are'} sparse, and sparse tensors are not read "
            "here. Make them dense, with tensor.to_dense(), and save the state_dict again."
        )


def refuse_unknown(store: TensorStore, keys: list[str], project: str, options: ImportOptions) -> None:
    """Raise `CheckpointError` for tensors of the model that an importer does not know, unless they may be ignored."""
    if keys and not options.allow_unknown:
        raise CheckpointError(
            f"{store.path}: no model of {project} has {listed(keys)}, so what this checkpoint computes is not known. "
            "If you know that it does not change the output, add --allow-unknown."
        )


def feature_names(defaults: tuple[str, ...], options: ImportOptions) -> tuple[str, ...]:
    """The names of the features in order: those given, else the defaults.

    Raises:
        ConfigError: another number of names than there are features, or a name twice.
    """
    names = options.features or defaults
    for name in names:
        check_name("feature", name)
    if len(names) != len(defaults) or len(set(names)) != len(names):
        raise ConfigError(
            f"--features has {len(names)} names, {len(set(names))} of them different, but the checkpoint has "
            f"{len(defaults)} features: give each of them a name of its own, in the model's order."
        )
    return names


@contextmanager
def contradictions(path: Path) -> Iterator[None]:
    """A ModelConfig that cannot be made from what a checkpoint holds: say that the checkpoint contradicts itself."""
    try:
        yield
    except ConfigError as err:
        raise CheckpointError(f"{path}: the tensors do not make a model: {err}") from err


def dense_names(count: int) -> tuple[str, ...]:
    """Default names of the dense features."""
    return tuple(f"dense_{i}" for i in range(count))
