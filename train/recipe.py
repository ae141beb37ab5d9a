"""Recipes: what to train, on what and how, as frozen dataclasses read from TOML. docs/training.md lists every key.

A recipe that exists is valid in itself. Whether its model and its data go together shows when both are made, in
`Recipe.load`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from dlrm_deploy.config import (
    DenseTransform,
    Interaction,
    ModelConfig,
    check_bool,
    from_mapping,
    parse_toml,
    read_text,
)
from dlrm_deploy.data import movielens, planted, random
from dlrm_deploy.data.dataset import Schema, SparseFeature, Splits
from dlrm_deploy.errors import ConfigError
from dlrm_deploy.presets import preset
from dlrm_deploy.schemes import TableScheme

MlpOptimizer = Literal["adagrad", "sgd"]


_MOST = 1 << 40  # more samples, steps and seeds than anybody has, and no sum of them overflows 64 bits
_MOST_THREADS = 1024


def _check_number(field: str, value: object, *, positive: bool) -> None:
    """A finite number above zero, or from zero on."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value < 0 or (positive and value == 0):  # type: ignore[operator]  # it is a number
        raise ConfigError(f"{field} must be a number {'above' if positive else 'of at least'} 0, got {value!r}.")


def _check_count(field: str, value: object, least: int = 1, most: int = _MOST) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{field} must be a whole number of at least {least}, got {value!r}.")
    if value > most:
        raise ConfigError(f"{field} must be at most {most}, got {value}.")


def _check_text(field: str, value: object) -> None:
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{field} must be a text, got {value!r}.")


_ROW_FOR_EACH_ID = TableScheme()
_MODEL_LISTS = ("bottom_mlp", "top_mlp", "branch1", "branch2", "features")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelRecipe:
    """[model]: `preset`, or `file`, or the layers of a model over the dataset's own features (all other keys)."""

    preset: str | None = None
    """A published model by name, with its features and tables."""

    scale_rows: float = 1.0
    """preset only: multiply the rows of its tables."""

    file: str | None = None
    """A ModelConfig in TOML or JSON; relative to the recipe."""

    name: str | None = None
    width: int | None = None
    """Width of every feature's vector."""

    bottom_mlp: tuple[int, ...] = ()
    top_mlp: tuple[int, ...] = ()
    interaction: Interaction = "dot"
    self_interaction: bool = False
    cross_layers: int = 0
    cross_rank: int = 0
    branch1: tuple[int, ...] = ()
    branch2: tuple[int, ...] = ()
    wide: bool = False
    dense_transform: DenseTransform = "none"

    dense: bool = True
    """Whether the model sees the dataset's dense values."""

    features: tuple[str, ...] = ()
    """Which of the dataset's sparse features it sees, in that order; empty for all."""

    tables: TableScheme = _ROW_FOR_EACH_ID
    """[model.tables]: how tables are stored."""

    def __post_init__(self) -> None:
        if isinstance(self.tables, Mapping):
            object.__setattr__(self, "tables", from_mapping(TableScheme, self.tables, "[model.tables]"))
        if not isinstance(self.tables, TableScheme):
            raise ConfigError(f"[model] tables must be a table of keys, got {self.tables!r}.")
        for field in _MODEL_LISTS:
            values = getattr(self, field)
            if not isinstance(values, (list, tuple)):
                raise ConfigError(f"[model] {field} must be a list, got {values!r}.")
            object.__setattr__(self, field, tuple(values))
        for field in ("self_interaction", "wide", "dense"):
            check_bool("[model]", field, getattr(self, field))
        layers = [f for f in fields(self) if f.name not in ("preset", "scale_rows", "file")]
        given = [f.name for f in layers if getattr(self, f.name) != f.default]
        if sum([self.preset is not None, self.file is not None, bool(given)]) != 1:
            names = ", ".join(f.name for f in layers)
            raise ConfigError(f"[model] needs one of: preset, file, or layers ({names}).")
        if given and (missing := [n for n in ("name", "width") if n not in given]):
            raise ConfigError(f"[model] missing key {', '.join(missing)}.")
        for field in ("preset", "file"):
            if getattr(self, field) is not None:
                _check_text(f"[model] {field}", getattr(self, field))
        if given:
            self._any_data().model_config(**self.layers())
        _check_number("[model] scale_rows", self.scale_rows, positive=True)
        if self.scale_rows != 1 and self.preset is None:
            raise ConfigError("[model] scale_rows goes with preset.")

    def _any_data(self) -> Schema:
        """The least that a dataset can be: layers that make no model for it make none for any other."""
        names = self.features or ("sparse", "more")
        rows = self.tables.threshold + 1  # the least that the scheme does something with
        schema = Schema(("dense",), tuple(SparseFeature(name=name, rows=rows) for name in names))
        return schema.select(dense=self.dense)

    def layers(self) -> dict[str, Any]:
        """Arguments of `Schema.model_config`, for a schema of these features; empty for a preset or a file."""
        if self.name is None:
            return {}
        others = ("preset", "scale_rows", "file", "dense", "features")
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in others}

    def select(self, schema: Schema, splits: Splits) -> tuple[Schema, Splits]:
        """What the model sees of a dataset.

        Raises:
            ConfigError: the data has no feature of such a name.
        """
        if self.dense and not self.features:
            return schema, splits
        names = self.features or tuple(feature.name for feature in schema.features)
        return schema.select(names, dense=self.dense), splits.select(schema.positions(names), dense=self.dense)


@dataclass(frozen=True, kw_only=True, slots=True)
class MovieLensData:
    """[data] kind = "movielens": MovieLens-100K."""

    kind: Literal["movielens"] = "movielens"
    path: str | None = None
    """Folder or zip file, relative to the recipe; left out, the recbole wheel is fetched."""

    split: movielens.Split = "random"
    seed: int = 0
    """Of the split."""

    share_item_table: bool = False

    def __post_init__(self) -> None:
        if self.path is not None:
            _check_text("[data] path", self.path)
        _check_count("[data] seed", self.seed, least=0)
        check_bool("[data]", "share_item_table", self.share_item_table)
        if self.split not in ("random", "time"):
            raise ConfigError(f"[data] split must be random or time, got {self.split!r}.")

    def load(self, model: ModelRecipe) -> tuple[ModelConfig, Splits]:
        if not model.layers():
            raise ConfigError(
                "[model] a preset or file brings features of its own, MovieLens has others: give name, width and "
                'layers instead, or [data] kind = "random".'
            )
        schema, splits = movielens.load(
            Path(self.path) if self.path else None,
            split=self.split,
            seed=self.seed,
            share_item_table=self.share_item_table,
        )
        schema, splits = model.select(schema, splits)
        return schema.model_config(**model.layers()), splits


@dataclass(frozen=True, kw_only=True, slots=True)
class RandomData:
    """[data] kind = "random": random values of the model's features."""

    size: int
    """Samples to train on; a tenth as many more are for validation and test."""

    kind: Literal["random"] = "random"
    seed: int = 0
    distribution: random.Distribution = "uniform"

    def __post_init__(self) -> None:
        _check_count("[data] size", self.size)
        _check_count("[data] seed", self.seed, least=0)
        if self.distribution not in random.DISTRIBUTIONS:
            raise ConfigError(
                f"[data] distribution must be one of {', '.join(random.DISTRIBUTIONS)}, got {self.distribution!r}."
            )

    def load(self, model: ModelRecipe) -> tuple[ModelConfig, Splits]:
        if model.preset is not None:
            config = preset(model.preset, model.scale_rows)
        elif model.file is not None:
            config = ModelConfig.read(Path(model.file))
        else:
            raise ConfigError("[model] random data has no features of its own: give preset or file.")
        return config, random.load(config, self.size, self.seed, distribution=self.distribution)


@dataclass(frozen=True, kw_only=True, slots=True)
class PlantedData:
    """[data] kind = "planted": a made-up task of the shape of Criteo's, whose best possible AUC is known."""

    size: int
    """Samples to train on; a tenth as many more are for validation and test."""

    kind: Literal["planted"] = "planted"
    seed: int = 0
    """Of teacher and samples."""

    scale_rows: float = 0.0003
    """Multiply the numbers of ids of Criteo's Kaggle data."""

    def __post_init__(self) -> None:
        _check_count("[data] size", self.size)
        _check_count("[data] seed", self.seed, least=0)
        _check_number("[data] scale_rows", self.scale_rows, positive=True)
        if self.scale_rows > planted.MOST_SCALE:
            raise ConfigError(f"[data] scale_rows must be at most {planted.MOST_SCALE:g}, got {self.scale_rows}.")

    def load(self, model: ModelRecipe) -> tuple[ModelConfig, Splits]:
        if not model.layers():
            raise ConfigError("[model] the planted task has features of its own: give name, width and layers.")
        schema, splits = model.select(*planted.load(self.size, self.seed, scale_rows=self.scale_rows))
        return schema.model_config(**model.layers()), splits


_DATA: dict[str, type[MovieLensData] | type[RandomData] | type[PlantedData]] = {
    "movielens": MovieLensData,
    "random": RandomData,
    "planted": PlantedData,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerRecipe:
    """[optimizer]: row-wise Adagrad for tables, Adagrad or plain SGD for the MLPs and cross layers."""

    mlp: MlpOptimizer = "adagrad"
    mlp_lr: float = 0.01
    mlp_weight_decay: float = 0.0
    table_lr: float = 0.01
    table_weight_decay: float = 0.0
    """L2 penalty on the rows that a step touches."""

    eps: float = 1e-8

    def __post_init__(self) -> None:
        if self.mlp not in get_args(MlpOptimizer):
            raise ConfigError(f"[optimizer] mlp must be {' or '.join(get_args(MlpOptimizer))}, got {self.mlp!r}.")
        for field in fields(self):
            if field.name != "mlp":
                positive = not field.name.endswith("weight_decay")
                _check_number(f"[optimizer] {field.name}", getattr(self, field.name), positive=positive)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainRecipe:
    """[train]: how long, in what pieces, and when to look up."""

    batch_size: int
    epochs: int | None = None
    steps: int | None = None
    """Train for so many passes over the data, or so many batches: one of the two."""

    seed: int = 0
    """Of the weights and of the order of samples."""

    threads: int | None = None
    """CPU threads; all cores that the process may use where left out. Other numbers change the last bits of weights."""

    evaluate_steps: int | None = None
    """Score the validation split after so many steps; at the end of each epoch where left out."""

    patience: int | None = None
    """Stop after so many evaluations without a better validation AUC; never where left out."""

    checkpoint_steps: int | None = None
    """Write a checkpoint after so many steps, besides the one at each evaluation."""

    log_steps: int = 50
    tensorboard: bool = True

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.steps is None):
            raise ConfigError("[train] needs one of: epochs, steps.")
        _check_count("[train] seed", self.seed, least=0)
        for field in ("batch_size", "log_steps"):
            _check_count(f"[train] {field}", getattr(self, field))
        check_bool("[train]", "tensorboard", self.tensorboard)
        for field in ("epochs", "steps", "threads", "evaluate_steps", "patience", "checkpoint_steps"):
            if getattr(self, field) is not None:
                _check_count(f"[train] {field}", getattr(self, field))
        if self.threads is not None:
            _check_count("[train] threads", self.threads, most=_MOST_THREADS)


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """The four sections. Two recipes are equal when they give the same run."""

    model: ModelRecipe
    data: MovieLensData | RandomData | PlantedData
    train: TrainRecipe
    optimizer: OptimizerRecipe = OptimizerRecipe()

    def load(self) -> tuple[ModelConfig, Splits]:
        """The model's config and the data.

        Raises:
            ConfigError: model and data do not go together.
            DataError: the data is missing or damaged.
        """
        return self.data.load(self.model)

    def to_toml(self) -> str:
        """All keys that are set, as TOML."""
        sections = asdict(self)
        sections["model.tables"] = sections["model"].pop("tables")
        lines = []
        for section, values in sections.items():
            lines += [f"[{section}]", *(f"{k} = {json.dumps(v)}" for k, v in values.items() if v is not None), ""]
        return "\n".join(lines)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "recipe") -> Recipe:
        """Build from plain values.

        Raises:
            ConfigError: an unknown or missing key, or a value that cannot be right.
        """
        sections = dict(values)
        data = sections.get("data", {})
        kind = data.get("kind") if isinstance(data, Mapping) else data
        if not isinstance(data, Mapping) or not isinstance(kind, str) or kind not in _DATA:
            raise ConfigError(f"{where}, [data]: kind must be one of {', '.join(_DATA)}, got {kind!r}.")
        kinds = {"model": ModelRecipe, "data": _DATA[kind], "optimizer": OptimizerRecipe, "train": TrainRecipe}
        for name, section in kinds.items():
            if name in sections:
                sections[name] = from_mapping(section, sections[name], f"{where}, [{name}]")
        return from_mapping(cls, sections, where)

    @classmethod
    def read(cls, path: Path) -> Recipe:
        """Read a TOML file; paths in it are relative to it.

        Raises:
            ConfigError: as `from_dict`, or the file cannot be read.
        """
        recipe = cls.from_dict(parse_toml(read_text(path), str(path)), str(path))
        folder = path.resolve().parent
        if recipe.model.file is not None:
            recipe = replace(recipe, model=replace(recipe.model, file=str(folder / recipe.model.file)))
        if isinstance(recipe.data, MovieLensData) and recipe.data.path is not None:
            recipe = replace(recipe, data=replace(recipe.data, path=str(folder / recipe.data.path)))
        return recipe
