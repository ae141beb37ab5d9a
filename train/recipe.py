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

from dlrm_deploy.config import Interaction, ModelConfig, check_bool, from_mapping, parse_toml, read_text
from dlrm_deploy.data import movielens, random
from dlrm_deploy.data.dataset import Schema, SparseFeature, Splits
from dlrm_deploy.errors import ConfigError
from dlrm_deploy.presets import preset

MlpOptimizer = Literal["adagrad", "sgd"]


_MOST = 1 << 40  # more samples, steps and seeds than anybody has, and no sum of them overflows 64 bits
_MOST_THREADS = 1024


def _check_number(field: str, value: object, *, positive: bool) -> None:
    """A finite number above zero, or from zero on."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value < 0 or (positive and value == 0):  # type: ignore[operator]
        raise ConfigError(f"{field} must be a number {'above' if positive else 'of at least'} 0, got {value!r}.")


def _check_count(field: str, value: object, least: int = 1, most: int = _MOST) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{field} must be a whole number of at least {least}, got {value!r}.")
    if value > most:
        raise ConfigError(f"{field} must be at most {most}, got {value}.")


def _check_text(field: str, value: object) -> None:
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{field} must be a text, got {value!r}.")


_ANY_DATA = Schema(dense_features=("dense",), features=(SparseFeature(name="sparse", rows=1),))
"""The least that a dataset can be: layers that make no model for it make none for any other."""


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
    """Embedding width of every table."""

    bottom_mlp: tuple[int, ...] = ()
    top_mlp: tuple[int, ...] = ()
    interaction: Interaction = "dot"
    self_interaction: bool = False
    cross_layers: int = 0
    cross_rank: int = 0

    def __post_init__(self) -> None:
        for field in ("bottom_mlp", "top_mlp"):
            widths = getattr(self, field)
            if not isinstance(widths, (list, tuple)):
                raise ConfigError(f"[model] {field} must be a list, got {widths!r}.")
            object.__setattr__(self, field, tuple(widths))
        check_bool("[model]", "self_interaction", self.self_interaction)
        layers = [f.name for f in fields(self) if f.name not in ("preset", "scale_rows", "file")]
        given = [name for name in layers if getattr(self, name) not in (None, (), False, 0, "dot")]
        if sum([self.preset is not None, self.file is not None, bool(given)]) != 1:
            raise ConfigError(f"[model] needs one of: preset, file, or layers ({', '.join(layers)}).")
        if given and (missing := [n for n in ("name", "width", "bottom_mlp", "top_mlp") if n not in given]):
            raise ConfigError(f"[model] missing key {', '.join(missing)}.")
        for field in ("preset", "file"):
            if getattr(self, field) is not None:
                _check_text(f"[model] {field}", getattr(self, field))
        if given:
            _ANY_DATA.model_config(**self.layers())
        _check_number("[model] scale_rows", self.scale_rows, positive=True)
        if self.scale_rows != 1 and self.preset is None:
            raise ConfigError("[model] scale_rows goes with preset.")

    def layers(self) -> dict[str, Any]:
        """Arguments of `Schema.model_config`; empty for a preset or a file."""
        if self.name is None:
            return {}
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("preset", "scale_rows", "file")}


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
                "[model] a preset or file brings features of its own, MovieLens has others: give name, width, "
                'bottom_mlp and top_mlp instead, or [data] kind = "random".'
            )
        schema, splits = movielens.load(
            Path(self.path) if self.path else None,
            split=self.split,
            seed=self.seed,
            share_item_table=self.share_item_table,
        )
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


_DATA: dict[str, type[MovieLensData] | type[RandomData]] = {"movielens": MovieLensData, "random": RandomData}


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
    data: MovieLensData | RandomData
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
        lines = []
        for section, values in asdict(self).items():
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
