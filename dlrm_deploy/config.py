"""ModelConfig: the whole architecture of a DLRM as frozen dataclasses, read from and written to TOML and JSON.

A config that exists is valid: every constructor checks, so no other module checks shapes again. Presets of published
models are in `dlrm_deploy.presets`.
"""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from dlrm_deploy.errors import ConfigError

Pooling = Literal["sum", "mean"]
Interaction = Literal["dot", "concat", "dcn"]
IndexPolicy = Literal["error", "clamp", "modulo", "zero"]
Precision = Literal["fp32", "fp16", "bf16"]
"""Number format of a plan's MLPs and interaction. Tables, the last layer and the sigmoid stay fp32."""

POOLINGS: tuple[str, ...] = get_args(Pooling)
INTERACTIONS: tuple[str, ...] = get_args(Interaction)
INDEX_POLICIES: tuple[str, ...] = get_args(IndexPolicy)
PRECISIONS: tuple[str, ...] = get_args(Precision)

MAX_VALUES = 1 << 50
"""Most values of a table, 4 PiB in float32: row addresses, in bytes and in 64 bits, are far from overflowing."""

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")
T = TypeVar("T")


def _check_name(kind: str, name: object) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(f"{kind} name {name!r} must be letters, digits, '_' or '-', and not begin with '-'.")


def _check_int(owner: str, field: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{owner}: {field} must be a whole number of at least {least}, got {value!r}.")


def check_bool(owner: str, field: str, value: object) -> None:
    """Raise `ConfigError` for anything but true and false: a text such as "no" would count as true."""
    if not isinstance(value, bool):
        raise ConfigError(f"{owner}: {field} must be true or false, got {value!r}.")


def _check_choice(owner: str, field: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{owner}: {field} must be one of {', '.join(choices)}, got {value!r}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class TableConfig:
    """One embedding table. `rows` and `width` count rows and float32 values, not bytes."""

    name: str
    """Table name, as in checkpoint keys (`embedding_bags.<name>.weight`)."""

    rows: int
    """Number of distinct ids, after hashing."""

    width: int
    """Embedding width D."""

    def __post_init__(self) -> None:
        _check_name("table", self.name)
        _check_int(f"table {self.name!r}", "rows", self.rows, 1)
        _check_int(f"table {self.name!r}", "width", self.width, 1)
        if self.rows * self.width > MAX_VALUES:
            raise ConfigError(f"table {self.name!r}: {self.rows} x {self.width} values are more than any disk holds.")


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureConfig:
    """One sparse feature: a bag of ids per sample, pooled from one table. Several features may share a table."""

    name: str

    table: str
    """Name of the table that its ids index."""

    pooling: Pooling = "sum"

    pooling_factor: int | None = None
    """Ids per bag where every bag holds the same number; None where bags vary (and may be empty)."""

    max_ids: int | None = None
    """Longest bag to expect, where bags vary: random data draws up to it, a TensorRT plan is sized by it.
    It is no limit for other engines."""

    def __post_init__(self) -> None:
        _check_name("feature", self.name)
        owner = f"feature {self.name!r}"
        _check_choice(owner, "pooling", self.pooling, POOLINGS)
        if self.pooling_factor is not None:
            _check_int(owner, "pooling_factor", self.pooling_factor, 1)
            if self.max_ids is not None:
                raise ConfigError(f"{owner}: give pooling_factor (fixed bags) or max_ids (variable bags), not both.")
        if self.max_ids is not None:
            _check_int(owner, "max_ids", self.max_ids, 1)

    @property
    def longest_bag(self) -> int:
        """The longest bag to expect: `pooling_factor`, else `max_ids`, else 1."""
        return self.pooling_factor or self.max_ids or 1


@dataclass(frozen=True, slots=True)
class TableGroup:
    """Tables of one width, stored one after the other in one matrix [rows, width]; derived, never configured."""

    name: str
    width: int
    rows: int
    tables: tuple[TableConfig, ...]
    row_starts: tuple[int, ...]
    """First row of each table in the group's matrix."""

    slots: tuple[int, ...]
    """Positions in `ModelConfig.features` of the features that this group pools, ascending."""

    @property
    def bytes(self) -> int:
        """Size of the float32 matrix."""
        return self.rows * self.width * 4

    def rows_of(self, table: str) -> slice:
        """The rows of one table in the group's matrix."""
        for start, config in zip(self.row_starts, self.tables, strict=True):
            if config.name == table:
                return slice(start, start + config.rows)
        raise KeyError(table)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """A DLRM: bottom MLP (dense arch), embedding bags, interaction, top MLP (over arch), sigmoid.

    `features` is in batch order. MLP widths leave out the input, which follows from the rest; every hidden layer
    ends in ReLU, the bottom MLP's last one too, and the top MLP ends in one logit.
    """

    name: str
    dense_features: tuple[str, ...]
    tables: tuple[TableConfig, ...]
    features: tuple[FeatureConfig, ...]
    bottom_mlp: tuple[int, ...]
    top_mlp: tuple[int, ...]

    interaction: Interaction = "dot"
    """dot: pairwise dot products; concat: dense and pooled vectors side by side; dcn: low-rank cross network."""

    self_interaction: bool = False
    """dot only: add each vector's product with itself."""

    cross_layers: int = 0
    """dcn only: number of cross layers."""

    cross_rank: int = 0
    """dcn only: rank of each cross layer."""

    weighted: bool = False
    """Each id comes with a per-sample weight. Sum pooling only."""

    index_policy: IndexPolicy = "error"
    """What happens to an id outside its table; see docs/operators.md."""

    def __post_init__(self) -> None:
        _check_name("model", self.name)
        if not self.dense_features:
            raise ConfigError(f"model {self.name!r}: dense_features is empty, at least one is needed.")
        if not self.features:
            raise ConfigError(f"model {self.name!r}: features is empty, at least one is needed.")
        for name in self.dense_features:
            _check_name("dense feature", name)
        for kind, names in (
            ("dense feature", self.dense_features),
            ("table", tuple(table.name for table in self.tables)),
            ("feature", tuple(feature.name for feature in self.features)),
        ):
            repeated = sorted({name for name in names if names.count(name) > 1})
            if repeated:
                raise ConfigError(f"model {self.name!r}: {kind} names must differ, repeated: {', '.join(repeated)}.")
        self._check_tables()
        for field in ("bottom_mlp", "top_mlp"):
            widths = getattr(self, field)
            if not widths:
                raise ConfigError(f"model {self.name!r}: {field} is empty, at least one layer is needed.")
            for width in widths:
                _check_int(f"model {self.name!r}", field, width, 1)
        if self.top_mlp[-1] != 1:
            raise ConfigError(f"model {self.name!r}: top_mlp must end in 1 (one logit), got {self.top_mlp[-1]}.")
        self._check_interaction()
        _check_choice(f"model {self.name!r}", "index_policy", self.index_policy, INDEX_POLICIES)
        check_bool(f"model {self.name!r}", "weighted", self.weighted)
        if self.weighted and any(feature.pooling == "mean" for feature in self.features):
            raise ConfigError(f"model {self.name!r}: per-sample weights go with sum pooling, not mean.")

    def _check_tables(self) -> None:
        known = {table.name for table in self.tables}
        used = {feature.table for feature in self.features}
        for feature in self.features:
            if feature.table not in known:
                raise ConfigError(
                    f"feature {feature.name!r} reads table {feature.table!r}, which is not among the tables: "
                    f"{', '.join(sorted(known)) or 'none'}."
                )
        if known - used:
            raise ConfigError(f"model {self.name!r}: no feature reads table {', '.join(sorted(known - used))}.")

    def _check_interaction(self) -> None:
        owner = f"model {self.name!r}"
        _check_choice(owner, "interaction", self.interaction, INTERACTIONS)
        check_bool(owner, "self_interaction", self.self_interaction)
        if self.interaction == "dot":
            for table in self.tables:
                if table.width != self.bottom_mlp[-1]:
                    raise ConfigError(
                        f"{owner}: the dot interaction needs one width, but the bottom MLP ends in "
                        f"{self.bottom_mlp[-1]} and table {table.name!r} is {table.width} wide."
                    )
        elif self.self_interaction:
            raise ConfigError(f"{owner}: self_interaction belongs to interaction dot, not {self.interaction}.")
        if self.interaction == "dcn":
            _check_int(owner, "cross_layers", self.cross_layers, 1)
            _check_int(owner, "cross_rank", self.cross_rank, 1)
        elif self.cross_layers or self.cross_rank:
            raise ConfigError(
                f"{owner}: cross_layers and cross_rank belong to interaction dcn, not {self.interaction}."
            )

    # What follows from the above

    @property
    def groups(self) -> tuple[TableGroup, ...]:
        """Tables grouped by width, in order of first appearance: one matrix and one operator node each."""
        groups = []
        for width in dict.fromkeys(table.width for table in self.tables):
            tables = tuple(table for table in self.tables if table.width == width)
            starts = [0]
            for table in tables:
                starts.append(starts[-1] + table.rows)
            names = {table.name for table in tables}
            slots = tuple(slot for slot, feature in enumerate(self.features) if feature.table in names)
            groups.append(TableGroup(f"width{width}", width, starts[-1], tables, tuple(starts[:-1]), slots))
        return tuple(groups)

    def table(self, name: str) -> TableConfig:
        """The table of that name."""
        return next(table for table in self.tables if table.name == name)

    @property
    def feature_rows(self) -> tuple[int, ...]:
        """Rows of the table behind each feature, in feature order."""
        return tuple(self.table(feature.table).rows for feature in self.features)

    @property
    def pooling_factors(self) -> tuple[int, ...] | None:
        """Ids per bag of each feature where all are fixed, else None (the CSR form with offsets)."""
        factors = tuple(f.pooling_factor for f in self.features if f.pooling_factor is not None)
        return factors if len(factors) == len(self.features) else None

    @property
    def interaction_width(self) -> int:
        """Width of the vector between interaction and top MLP."""
        dense = self.bottom_mlp[-1]
        if self.interaction == "dot":
            vectors = len(self.features) + 1
            return dense + vectors * (vectors + (1 if self.self_interaction else -1)) // 2
        return dense + sum(self.table(feature.table).width for feature in self.features)

    @property
    def table_bytes(self) -> int:
        """Bytes of all tables in float32."""
        return sum(group.bytes for group in self.groups)

    def scaled(self, factor: float) -> ModelConfig:
        """The same model with every table's rows multiplied by `factor` and rounded up (`--scale-rows`)."""
        if not (math.isfinite(factor) and factor > 0):
            raise ConfigError(f"--scale-rows must be a positive number, got {factor}.")
        return replace(self, tables=tuple(replace(t, rows=math.ceil(t.rows * factor)) for t in self.tables))

    # TOML and JSON

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; options at their default are left out."""
        defaults = {f.name: f.default for kind in (ModelConfig, FeatureConfig) for f in fields(kind)}

        def strip(values: dict[str, Any]) -> dict[str, Any]:
            return {k: v for k, v in values.items() if k not in defaults or v != defaults[k]}

        plain = strip(asdict(self))
        plain["tables"] = [asdict(table) for table in self.tables]
        plain["features"] = [strip(asdict(feature)) for feature in self.features]
        return {k: list(v) if isinstance(v, tuple) else v for k, v in plain.items()}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def to_toml(self) -> str:
        """The same, as TOML: scalars first, then one [[tables]] and [[features]] block each."""
        plain = self.to_dict()
        blocks = {key: plain.pop(key) for key in ("tables", "features")}
        # JSON strings, numbers, booleans and flat lists are TOML as they stand: names are ASCII by construction.
        lines = [f"{key} = {json.dumps(value)}" for key, value in plain.items()]
        for key, items in blocks.items():
            for item in items:
                lines += ["", f"[[{key}]]", *(f"{k} = {json.dumps(v)}" for k, v in item.items())]
        return "\n".join(lines) + "\n"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "model config") -> ModelConfig:
        """Build from plain values. Without `features`, each table is read by one feature of its name."""
        values = dict(values)
        for key in ("tables", "features"):
            blocks = values.get(key, ())
            if not isinstance(blocks, (list, tuple)):
                raise ConfigError(f"{where}: {key} must be a list of tables, got {type(blocks).__name__}.")
        tables = tuple(from_mapping(TableConfig, v, f"{where}, tables") for v in values.get("tables", ()))
        if "features" in values:
            features = tuple(from_mapping(FeatureConfig, v, f"{where}, features") for v in values["features"])
        else:
            features = tuple(FeatureConfig(name=table.name, table=table.name) for table in tables)
        for key in ("dense_features", "bottom_mlp", "top_mlp"):
            if key in values:
                if not isinstance(values[key], (list, tuple)):
                    raise ConfigError(f"{where}: {key} must be a list, got {values[key]!r}.")
                values[key] = tuple(values[key])
        return from_mapping(cls, {**values, "tables": tables, "features": features}, where)

    @classmethod
    def from_json(cls, text: str, where: str = "model config") -> ModelConfig:
        try:
            values = json.loads(text)
        except json.JSONDecodeError as err:
            raise ConfigError(f"{where} is not valid JSON: {err}.") from err
        return cls.from_dict(values, where)

    @classmethod
    def from_toml(cls, text: str, where: str = "model config") -> ModelConfig:
        return cls.from_dict(parse_toml(text, where), where)

    @classmethod
    def read(cls, path: Path) -> ModelConfig:
        """Read a .toml or .json file."""
        text = read_text(path)
        return cls.from_json(text, str(path)) if path.suffix == ".json" else cls.from_toml(text, str(path))


def read_text(path: Path) -> str:
    """The text of a file, or a `ConfigError` that names it."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as err:
        raise ConfigError(f"cannot read {path}: {err}.") from err


def parse_toml(text: str, where: str) -> dict[str, Any]:
    """Parse TOML, with the file's name in the error."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as err:
        raise ConfigError(f"{where} is not valid TOML: {err}.") from err


def from_mapping(kind: type[T], values: Any, where: str) -> T:
    """Build the dataclass `kind` from a mapping; unknown and missing keys are errors that list the known ones."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: expected a table of keys, got {type(values).__name__}.")
    known = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]  # kind is a dataclass
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ConfigError(f"{where}: unknown key {', '.join(unknown)}. Known keys: {', '.join(known)}.")
    try:
        return kind(**values)
    except TypeError as err:  # a missing key, or a value of a type that a check above cannot compare
        required = [n for n in known if n not in values and f"'{n}'" in str(err)]
        detail = f"missing key {', '.join(required)}" if required else str(err)
        raise ConfigError(f"{where}: {detail}. Known keys: {', '.join(known)}.") from err
