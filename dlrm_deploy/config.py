"""ModelConfig: the whole architecture of a DLRM as frozen dataclasses, read from and written to TOML and JSON.

A config that exists is valid: every constructor checks, so no other module checks shapes again. Presets of published
models are in `dlrm_deploy.presets`.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections import Counter
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from dlrm_deploy.errors import ConfigError
from dlrm_deploy.tables import MAX_IDS, Slot, TableConfig, TableGroup, TablePart, check_choice, check_int, check_name

Pooling = Literal["sum", "mean"]
Interaction = Literal["dot", "concat", "dcn", "dcn-v1", "projection", "fm"]
DenseTransform = Literal["none", "log1p", "log3"]
IndexPolicy = Literal["error", "clamp", "modulo", "zero"]
Precision = Literal["fp32", "fp16", "bf16", "int8"]
"""Number format of a plan's MLPs and interaction. Tables, the last layer and the sigmoid stay fp32. int8 is that of the
MLPs, last layers too, beside an interaction in fp32."""

POOLINGS: tuple[str, ...] = get_args(Pooling)
INTERACTIONS: tuple[str, ...] = get_args(Interaction)
DENSE_TRANSFORMS: tuple[str, ...] = get_args(DenseTransform)
LOG_SHIFTS = {"log1p": 1.0, "log3": 3.0}
"""What a dense transform adds to a value before the logarithm."""

INDEX_POLICIES: tuple[str, ...] = get_args(IndexPolicy)
PRECISIONS: tuple[str, ...] = get_args(Precision)

T = TypeVar("T")


def check_bool(owner: str, field: str, value: object) -> None:
    """Raise `ConfigError` for anything but true and false: a text such as "no" would count as true."""
    if not isinstance(value, bool):
        raise ConfigError(f"{owner}: {field} must be true or false, got {value!r}.")


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

    modulo: int | None = None
    """Take ids modulo this first, as data loaders with a largest id do (facebookresearch/dlrm's `--max-ind-range`,
    NVIDIA's `hash_indices`). The index policy looks at what remains."""

    def __post_init__(self) -> None:
        check_name("feature", self.name)
        owner = f"feature {self.name!r}"
        check_choice(owner, "pooling", self.pooling, POOLINGS)
        if self.pooling_factor is not None:
            check_int(owner, "pooling_factor", self.pooling_factor, 1)
            if self.max_ids is not None:
                raise ConfigError(f"{owner}: give pooling_factor (fixed bags) or max_ids (variable bags), not both.")
        if self.max_ids is not None:
            check_int(owner, "max_ids", self.max_ids, 1)
        if self.modulo is not None:
            check_int(owner, "modulo", self.modulo, 1)
            if self.modulo > MAX_IDS:
                raise ConfigError(f"{owner}: modulo must be at most 2^62, got {self.modulo}.")

    @property
    def longest_bag(self) -> int:
        """The longest bag to expect: `pooling_factor`, else `max_ids`, else 1."""
        return self.pooling_factor or self.max_ids or 1


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """A DLRM: bottom MLP (dense arch), embedding bags, interaction, top MLP (over arch), sigmoid.

    `features` is in batch order. MLP widths leave out the input, which follows from the rest; every hidden layer
    ends in ReLU, the bottom MLP's last one too, and the top MLP ends in one logit. docs/models.md shows which models
    of the literature are which configs.
    """

    name: str
    dense_features: tuple[str, ...] = ()
    """Names of the columns of `dense`; empty for models of ids alone."""

    tables: tuple[TableConfig, ...]
    features: tuple[FeatureConfig, ...]
    bottom_mlp: tuple[int, ...] = ()
    """Empty: dense values go into the interaction as they are. For fm, each then has a vector that it scales."""

    top_mlp: tuple[int, ...] = ()
    """May be empty for interaction fm only, whose output is then the logit."""

    interaction: Interaction = "dot"
    """What meets what, with x_0 the bottom MLP's output and x_1 ... x_F the features' vectors:
    dot: x_0, and the dot products of all pairs.
    concat: all vectors side by side.
    dcn: the cross network of DCN v2 with low-rank matrices over them, x <- x_first * (W V x + b) + x.
    dcn-v1: the cross network of DCN, x <- x_first * (w . x) + b + x.
    projection: TorchRec's DLRM_Projection: two MLPs turn them into matrices whose product stands beside x_0.
    fm: the sum of the dot products of all pairs, one number."""

    self_interaction: bool = False
    """dot only: add each vector's product with itself."""

    cross_layers: int = 0
    """dcn, dcn-v1: number of cross layers."""

    cross_rank: int = 0
    """dcn only: rank of each cross layer."""

    branch1: tuple[int, ...] = ()
    """projection only: widths of the first MLP, the last one a multiple of the vectors' width."""

    branch2: tuple[int, ...] = ()
    """projection only: of the second MLP."""

    wide: bool = False
    """Add first-order terms to the logit: a weight for each id and each dense feature, and a bias."""

    weighted: bool = False
    """Each id comes with a per-sample weight. Sum pooling only."""

    index_policy: IndexPolicy = "error"
    """What happens to an id outside its table; see docs/operators.md."""

    dense_transform: DenseTransform = "none"
    """What the model does to raw dense values first: log1p is log(max(x + 1, 1)), log3 is log(max(x + 3, 1))."""

    def __post_init__(self) -> None:
        check_name("model", self.name)
        owner = f"model {self.name!r}"
        if not self.features:
            raise ConfigError(f"{owner}: features is empty, at least one is needed.")
        for name in self.dense_features:
            check_name("dense feature", name)
        for kind, names in (
            ("dense feature", self.dense_features),
            ("table", tuple(table.name for table in self.tables)),
            ("feature", tuple(feature.name for feature in self.features)),
        ):
            repeated = sorted(name for name, count in Counter(names).items() if count > 1)
            if repeated:
                raise ConfigError(f"{owner}: {kind} names must differ, repeated: {', '.join(repeated)}.")
        self._check_tables()
        for field in ("bottom_mlp", "top_mlp", "branch1", "branch2"):
            widths = getattr(self, field)
            if not isinstance(widths, (list, tuple)):
                raise ConfigError(f"{owner}: {field} must be a list, got {widths!r}.")
            object.__setattr__(self, field, tuple(widths))
            for width in widths:
                check_int(owner, field, width, 1)
        check_choice(owner, "interaction", self.interaction, INTERACTIONS)
        if self.bottom_mlp and not self.dense_features:
            raise ConfigError(f"{owner}: a bottom MLP needs dense_features, and there are none.")
        if self.top_mlp and self.top_mlp[-1] != 1:
            raise ConfigError(f"{owner}: top_mlp must end in 1 (one logit), got {self.top_mlp[-1]}.")
        if not self.top_mlp and self.interaction != "fm":
            raise ConfigError(f"{owner}: top_mlp is empty, at least one layer is needed.")
        check_choice(owner, "index_policy", self.index_policy, INDEX_POLICIES)
        check_choice(owner, "dense_transform", self.dense_transform, DENSE_TRANSFORMS)
        if self.dense_transform != "none" and not self.dense_features:
            raise ConfigError(f"{owner}: dense_transform needs dense_features, and there are none.")
        for field in ("self_interaction", "wide", "weighted"):
            check_bool(owner, field, getattr(self, field))
        if self.weighted and any(feature.pooling == "mean" for feature in self.features):
            raise ConfigError(f"{owner}: per-sample weights go with sum pooling, not mean.")
        self._check_interaction(owner)

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

    def _check_interaction(self, owner: str) -> None:
        kind = self.interaction
        if kind in ("dot", "projection", "fm"):
            self._check_one_width(owner)
        if self.self_interaction and kind != "dot":
            raise ConfigError(f"{owner}: self_interaction belongs to interaction dot, not {kind}.")
        if kind in ("dcn", "dcn-v1"):
            check_int(owner, "cross_layers", self.cross_layers, 1)
        elif self.cross_layers:
            raise ConfigError(f"{owner}: cross_layers belongs to interactions dcn and dcn-v1, not {kind}.")
        if kind == "dcn":
            check_int(owner, "cross_rank", self.cross_rank, 1)
        elif self.cross_rank:
            raise ConfigError(f"{owner}: cross_rank belongs to interaction dcn, not {kind}.")
        for field in ("branch1", "branch2"):
            widths = getattr(self, field)
            if kind != "projection" and widths:
                raise ConfigError(f"{owner}: {field} belongs to interaction projection, not {kind}.")
            if kind == "projection" and (not widths or widths[-1] % self.vector_widths[0]):
                raise ConfigError(
                    f"{owner}: {field} must end in a multiple of the embedding width {self.vector_widths[0]}, got "
                    f"{list(widths)}."
                )
        if kind in ("dot", "fm") and not self.has_dense_vector and len(self.features) < 2 and not self.dense_features:
            raise ConfigError(f"{owner}: interaction {kind} needs two vectors, and there is one feature.")

    def _check_one_width(self, owner: str) -> None:
        kind = self.interaction
        if not self.bottom_mlp and (kind == "projection" or (kind == "dot" and self.dense_features)):
            raise ConfigError(f"{owner}: interaction {kind} needs a bottom MLP that ends in the embedding width.")
        expected = self.bottom_mlp[-1] if self.bottom_mlp else self.vector_widths[0]
        for table in self.tables:
            if table.output_width != expected:
                other = "the bottom MLP ends in" if self.bottom_mlp else "the first feature's vector is"
                raise ConfigError(
                    f"{owner}: the {kind} interaction needs one width, but {other} {expected} and table "
                    f"{table.name!r} is {table.output_width} wide."
                )

    # What follows from the above

    @property
    def groups(self) -> tuple[TableGroup, ...]:
        """Table parts grouped by width, in order of first appearance: one matrix and one operator node each."""
        parts = [(part, table) for table in self.tables for part in table.parts]
        if self.wide:
            parts += [(table.wide_part, table) for table in self.tables]
        pooled = self._pooled()
        groups = []
        for width in dict.fromkeys(part.width for part, _ in parts):
            members = tuple(part for part, _ in parts if part.width == width)
            starts = {}
            rows = 0
            for part in members:
                starts[part.name] = rows
                rows += part.rows
            slots = tuple(Slot(feature, part, starts[part.name]) for feature, part in pooled if part.name in starts)
            groups.append(TableGroup(f"width{width}", width, rows, members, tuple(starts.values()), slots))
        return tuple(groups)

    def _pooled(self) -> list[tuple[int, TablePart]]:
        """Feature and part of every bag that is pooled by an operator: part by part, in feature order."""
        by_name = {table.name: table for table in self.tables}
        tables = [by_name[feature.table] for feature in self.features]
        pooled = [(f, table) for f, table in enumerate(tables) if table.combine != "path"]
        most = max((len(table.parts) for _, table in pooled), default=0)
        slots = [(f, table.parts[j]) for j in range(most) for f, table in pooled if j < len(table.parts)]
        return slots + [(f, table.wide_part) for f, table in enumerate(tables) if self.wide]

    def table(self, name: str) -> TableConfig:
        """The table of that name."""
        return next(table for table in self.tables if table.name == name)

    @property
    def feature_rows(self) -> tuple[int, ...]:
        """Rows of the table behind each feature, in feature order."""
        rows = {table.name: table.rows for table in self.tables}
        return tuple(rows[feature.table] for feature in self.features)

    @property
    def pooling_factors(self) -> tuple[int, ...] | None:
        """Ids per bag of each feature where all are fixed, else None (the CSR form with offsets)."""
        factors = tuple(f.pooling_factor for f in self.features if f.pooling_factor is not None)
        return factors if len(factors) == len(self.features) else None

    @property
    def has_dense_vector(self) -> bool:
        """Whether the bottom MLP's output takes part in the interaction, as x_0."""
        return bool(self.bottom_mlp)

    @property
    def dense_width(self) -> int:
        """Width of what the dense values bring into the interaction."""
        return self.bottom_mlp[-1] if self.bottom_mlp else len(self.dense_features)

    @property
    def vector_widths(self) -> tuple[int, ...]:
        """Width of each feature's vector, in feature order."""
        widths = {table.name: table.output_width for table in self.tables}
        return tuple(widths[feature.table] for feature in self.features)

    @property
    def flat_width(self) -> int:
        """Width of the dense values and all vectors side by side."""
        return self.dense_width + sum(self.vector_widths)

    @property
    def interaction_width(self) -> int:
        """Width of the vector between interaction and top MLP."""
        if self.interaction == "dot":
            vectors = len(self.features) + self.has_dense_vector
            return self.dense_width + vectors * (vectors + (1 if self.self_interaction else -1)) // 2
        if self.interaction == "projection":
            width = self.vector_widths[0]
            return self.dense_width + (self.branch1[-1] // width) * (self.branch2[-1] // width)
        return 1 if self.interaction == "fm" else self.flat_width

    @property
    def table_bytes(self) -> int:
        """Bytes of all tables in float32."""
        return sum(group.bytes for group in self.groups)

    def scaled(self, factor: float) -> ModelConfig:
        """The same model with every table's rows multiplied by `factor` and rounded up (`--scale-rows`)."""
        if not (math.isfinite(factor) and factor > 0):
            raise ConfigError(f"--scale-rows must be a positive number, got {factor}.")
        if any(table.partition != "full" for table in self.tables):
            raise ConfigError("--scale-rows goes with tables of one row per id.")
        return replace(self, tables=tuple(replace(t, rows=math.ceil(t.rows * factor)) for t in self.tables))

    # TOML and JSON

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; options at their default are left out."""
        return {
            **_plain(self),
            "tables": [_plain(table) for table in self.tables],
            "features": [_plain(feature) for feature in self.features],
        }

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
        for key in ("dense_features", "bottom_mlp", "top_mlp", "branch1", "branch2"):
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


def _plain(config: Any) -> dict[str, Any]:
    """The fields of a config that are not at their default, with lists for tuples."""
    values = {f.name: getattr(config, f.name) for f in fields(config)}
    kept = {f.name: values[f.name] for f in fields(config) if f.default is MISSING or values[f.name] != f.default}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in kept.items()}


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
