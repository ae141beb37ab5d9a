"""NVIDIA DeepLearningExamples' DLRM (PyTorch/Recommendation/DLRM): the folder that its `--save_checkpoint_path` writes.

Two things differ from our order of the top MLP's input. The vectors stand as the devices of the training run held them,
which `metadata.pt` says, and the products are filled up with zeros to a multiple of 8.

Main path: `open_nvidia` -> `NvidiaFolder`, `read_metadata` -> `device_order` -> `infer_config` -> `_dense`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dlrm_deploy.config import FeatureConfig, ModelConfig
from dlrm_deploy.errors import CheckpointError, ConfigError
from dlrm_deploy.export.importers.common import (
    ForeignSource,
    ImportOptions,
    Stored,
    contradictions,
    dense_names,
    feature_names,
    listed,
)
from dlrm_deploy.export.importers.layers import (
    IntArray,
    Shapes,
    dot_width,
    lower_triangle,
    mlp_widths,
    pair_columns,
    reordered,
)
from dlrm_deploy.export.importers.nvidia_metadata import (
    METADATA,
    OPERATIONS,
    Metadata,
    NvidiaInteraction,
    device_order,
    read_metadata,
)
from dlrm_deploy.model.keys import bottom_keys, top_keys
from dlrm_deploy.tables import TableConfig
from dlrm_deploy.tensors.raw import RawMatrix
from dlrm_deploy.tensors.store import Array, TensorStore
from dlrm_deploy.tensors.torch_file import TorchFile

PROJECT = "NVIDIA/DeepLearningExamples DLRM"

_TABLE = "bottom_model.embeddings.{}"
_TABLE_FILE = re.compile(r"bottom_model\.embeddings\.(0|[1-9]\d*)\.bin")
_BOTTOM = "bottom_model.mlp.{}.{{}}"
_TOP = "top_model.mlp.{}.{{}}"
_LOGIT = "top_model.out.{}"
_PARTS = "The processes of a run write parts of one folder: copy the parts of all of them into one."
_DENSE_FILES = ("bottom_model.mlp", "top_model.mlp", "top_model.out")


class NvidiaFolder(TensorStore):
    """The tensors of a folder: `bottom_model.embeddings.0`, `bottom_model.mlp.weights.0`, `top_model.out.weight`..."""

    kind = "a folder of NVIDIA's DLRM"

    def __init__(self, path: Path | str) -> None:
        """Open the files of a folder, all but `metadata.pt`.

        Raises:
            CheckpointError: one is missing, damaged, or not as long as its shape says.
        """
        self.path = Path(path)
        self._files: dict[str, tuple[TorchFile, str]] = {}
        for name in _DENSE_FILES:
            file = TorchFile(self._existing(f"{name}.pt"))
            for key in file.keys():  # noqa: SIM118  # of a store
                self._files[f"{name}.{key.removeprefix('module.')}"] = file, key
        self._tables = {_TABLE.format(i): self._open_table(i) for i in table_numbers(self.path)}

    def _existing(self, name: str) -> Path:
        file = self.path / name
        if not file.is_file():
            raise CheckpointError(f"{self.path} lacks {name}. {_PARTS}")
        return file

    def _open_table(self, number: int) -> RawMatrix:
        file = TorchFile(self._existing(f"embeddings.{number}.meta.pt"))
        values = file.values()
        shape = tuple(values.get(f"shape.{axis}") for axis in range(len(values)))
        match shape:
            case (int(rows), int(width)) if rows > 0 and width > 0:
                return RawMatrix(self.path / f"{_TABLE.format(number)}.bin", (rows, width))
        raise CheckpointError(f"{file.path} says {dict(values)}, expected a shape of two numbers, rows and width.")

    def keys(self) -> tuple[str, ...]:
        return (*self._tables, *self._files)

    def shape(self, key: str) -> tuple[int, ...]:
        if key in self._tables:
            return self._tables[key].shape
        file, name = self._file(key)
        return file.shape(name)

    def dtype(self, key: str) -> str:
        if key in self._tables:
            return self._tables[key].dtype.name
        file, name = self._file(key)
        return file.dtype(name)

    def read_into(self, key: str, first_row: int, out: Array) -> None:
        if key in self._tables:
            self._tables[key].read_into(first_row, out)
        else:
            file, name = self._file(key)
            file.read_into(name, first_row, out)

    def verify(self) -> None:
        """Compare the CRC-32 of the `.pt` files; tables are bare numbers and carry none."""
        beside = [TorchFile(file) for file in sorted(self.path.glob("*.meta.pt"))]
        if (self.path / METADATA).exists():
            beside.append(TorchFile(self.path / METADATA))
        for file in (*dict.fromkeys(file for file, _ in self._files.values()), *beside):
            file.verify()

    def _file(self, key: str) -> tuple[TorchFile, str]:
        if key not in self._files:
            raise self._no_tensor(key)
        return self._files[key]


def table_numbers(path: Path) -> tuple[int, ...]:
    """The numbers of the tables whose values a folder holds, rising."""
    try:
        return tuple(sorted(int(found[1]) for file in path.iterdir() if (found := _TABLE_FILE.fullmatch(file.name))))
    except OSError as err:
        raise CheckpointError(f"cannot read {path}: {err}.") from err


def open_nvidia(path: Path, options: ImportOptions) -> ForeignSource:
    """A folder of NVIDIA's DLRM as a source. Features are in the order of the tables' numbers.

    Args:
        path: the folder.
        options: `features` are the features' names in the order of the tables' numbers. Where the folder does not tell
            in which order the top model takes them, they are cat_0, cat_1, ... (for tables 0, 1, ...) in that order.

    Raises:
        CheckpointError: a file is missing or damaged, or shapes contradict each other or the options.
        ConfigError: an option means nothing here, or a needed one is missing.
    """
    options.only("features", "interaction", "dense_transform", "modulo", source="a checkpoint of NVIDIA's DLRM")
    path = Path(path)
    said = read_metadata(path / METADATA)
    store = NvidiaFolder(path)
    numbers = table_numbers(path)
    expected = sum(map(len, said.devices)) or max(numbers, default=-1) + 1
    missing = sorted(set(range(expected)).difference(numbers))
    if not numbers or missing:
        raise CheckpointError(
            f"{path} holds {len(numbers)} of {expected or 'an unknown number of'} tables: {_TABLE.format('N')}.bin is "
            f"missing for N = {listed(tuple(map(str, missing))) or '0, 1, ...'}. {_PARTS}"
        )
    if len(numbers) > expected:
        raise CheckpointError(
            f"{path} holds tables 0 to {numbers[-1]}, but {METADATA} knows {expected}. Two checkpoints were mixed."
        )
    shapes = {key: store.shape(key) for key in store.keys()}  # noqa: SIM118  # of a store
    defaults = tuple(f"cat_{number}" for number in numbers)
    order, how = _order(path, said, defaults, options)
    if options.config is None:
        names = defaults if device_order(said) is None else feature_names(defaults, options)
        config = infer_config(path, shapes, names, said, options)
    else:
        config = options.config
        _check_config(path, config, said, len(numbers))
    tables = [feature.table for feature in config.features]
    return ForeignSource(
        kind="nvidia",
        project=PROJECT,
        path=path,
        config=config,
        dense=_dense(store, shapes, config, order),
        parts={table: Stored(store=store, key=_TABLE.format(f)) for f, table in enumerate(tables)},
        options=options,
        facts={"order_of_tables_in_top_model": how, "hash_indices": bool(said.hash_indices)},
    )


def _order(
    path: Path, said: Metadata, defaults: tuple[str, ...], options: ImportOptions
) -> tuple[tuple[int, ...], str]:
    """The order in which the top model takes the tables: from the metadata, else from --features."""
    known = device_order(said)
    permuted = sorted(options.features) == sorted(defaults)
    if known is not None:
        if permuted and options.features != defaults:
            raise ConfigError(
                f"--features names the tables {listed(options.features)}, which would give them each other's default "
                f"names. {path / METADATA} tells their order in the top model; leave the option out, or give other "
                "names."
            )
        return known
    if not permuted or options.config is not None:
        flag = "bottom_features_ordered" if said.devices else "the device mapping"
        exists = (path / METADATA).exists()
        seen = f"{path / METADATA} does not say {flag}" if exists else f"{path} lacks {METADATA}, which says {flag}"
        remedy = "Give" if exists else f"Copy {METADATA} too, or give"
        raise ConfigError(
            f"{seen}, on which the order of the tables in the top model depends: "
            f"training on one device takes the largest table first, on several devices as they hold them. {remedy} the "
            f"order of all {len(defaults)} tables: --features with {listed(defaults)} for tables 0, 1, ..., without "
            "--config."
        )
    order = tuple(defaults.index(name) for name in options.features)
    return order, f"{list(order)}, as --features says"


def _check_config(path: Path, config: ModelConfig, said: Metadata, tables: int) -> None:
    """Raise `CheckpointError` for a --config that cannot be the checkpoint's model whatever its shapes."""
    names = [feature.table for feature in config.features]
    if len(set(names)) != len(names) or len(names) != tables:
        raise CheckpointError(
            f"{path} holds {tables} tables, one for each feature; --config has {len(names)} features that read "
            f"{len(set(names))} tables."
        )
    interaction = said.interaction or ("concat" if config.interaction == "concat" else "dot")
    if config.interaction != interaction or config.self_interaction:
        raise CheckpointError(
            f"{path}: --config says interaction {config.interaction}"
            f"{' with itself' if config.self_interaction else ''}, and the checkpoint is of a model with {interaction}."
        )


def infer_config(
    path: Path, shapes: Shapes, names: Sequence[str], said: Metadata, options: ImportOptions
) -> ModelConfig:
    """The architecture, read off shapes and metadata: one id per bag, since the model looks up one.

    Args:
        path: the checkpoint, for messages.
        shapes: shape of each tensor of an `NvidiaFolder`.
        names: of the features and their tables, in the order of the tables' numbers.
        said: what `metadata.pt` says.
        options: name, interaction, dense transform and modulo.

    Raises:
        CheckpointError: the shapes contradict each other or the metadata.
        ConfigError: two interactions fit and nothing tells which it is, or options contradict the metadata.
    """
    bottom = mlp_widths(path, shapes, _BOTTOM.format("weights"))
    top = mlp_widths(path, shapes, _TOP.format("weights"))
    logit = shapes.get(_LOGIT.format("weight"), ())
    if not bottom or not top or len(logit) != 2:
        raise CheckpointError(f"{path} lacks layers: expected weights in {', '.join(f'{f}.pt' for f in _DENSE_FILES)}.")
    if logit != (1, top[-1]):
        raise CheckpointError(
            f"{path}: top_model.out is {list(logit)}, expected {[1, top[-1]]}: one logit from the layer before it."
        )
    tables = [shapes[_TABLE.format(number)] for number in range(len(names))]
    for number, (_, width) in enumerate(tables):
        if width != bottom[-1]:
            raise CheckpointError(
                f"{path}: table {number} is {width} wide and the bottom MLP ends in {bottom[-1]}; the model needs one "
                "width. Two checkpoints were mixed."
            )
    interaction = _interaction(path, top[0], len(names), bottom[-1], said, options)
    if said.hash_indices and options.modulo is not None:
        raise ConfigError(
            f"--modulo {options.modulo}: the checkpoint was trained with hash_indices, which takes ids modulo the rows "
            "of their table. Leave the option out."
        )
    with contradictions(path):
        return ModelConfig(
            name=options.name,
            dense_features=dense_names(bottom[0]),
            tables=tuple(TableConfig(name=n, rows=r, width=w) for n, (r, w) in zip(names, tables, strict=True)),
            features=tuple(
                FeatureConfig(
                    name=name, table=name, pooling_factor=1, modulo=rows if said.hash_indices else options.modulo
                )
                for name, (rows, _) in zip(names, tables, strict=True)
            ),
            bottom_mlp=bottom[1:],
            top_mlp=(*top[1:], 1),
            interaction=interaction,
            dense_transform=options.dense_transform,
        )


def _interaction(
    path: Path, top: int, features: int, width: int, said: Metadata, options: ImportOptions
) -> NvidiaInteraction:
    """The interaction whose output is `top` wide."""
    dot = dot_width(features, width)
    cat = (features + 1) * width
    widths: dict[NvidiaInteraction, tuple[int, ...]] = {"dot": (dot, _padded(dot)), "concat": (cat,)}
    asked = None
    if options.interaction is not None:
        asked = OPERATIONS.get(options.interaction)
        if asked is None or said.interaction not in (None, asked):
            raise ConfigError(
                f"--interaction {options.interaction}, but the model computes {said.interaction or 'dot or cat'} "
                f"({METADATA}). Leave the option out."
            )
    chosen = said.interaction or asked
    fits = [name for name, fitting in widths.items() if top in fitting and chosen in (None, name)]
    if not fits:
        meant = f", and {chosen} is meant" if chosen else ""
        raise CheckpointError(
            f"{path}: the top MLP takes {top} values{meant}. With {features} tables of width {width}, dot gives {dot} "
            f"(filled up to {_padded(dot)}) and cat {cat}. Two checkpoints were mixed, or tables are missing."
        )
    if len(fits) > 1:
        raise ConfigError(
            f"{path}: dot and cat both give the {top} values that the top MLP takes. Say which it is: --interaction "
            "dot or --interaction cat."
        )
    return fits[0]


def _padded(width: int) -> int:
    return -(-width // 8) * 8


def _dense(store: TensorStore, shapes: Shapes, config: ModelConfig, order: tuple[int, ...]) -> dict[str, Stored]:
    """Each tensor of ours, by our names; tensors that the config has no layer for keep their own."""
    names: dict[str, str] = {}
    for ours, theirs in ((bottom_keys(config), _BOTTOM), (top_keys(config)[:-1], _TOP)):
        for layer, (weight, bias) in enumerate(ours):
            names[theirs.format("weights").format(layer)] = weight
            names[theirs.format("biases").format(layer)] = bias
    for ours_, theirs in zip(top_keys(config)[-1], ("weight", "bias"), strict=True):
        names[_LOGIT.format(theirs)] = ours_
    first = _TOP.format("weights").format(0)
    columns = _top_columns(config, order)
    whole = _padded(len(columns)) if config.interaction == "dot" else len(columns)
    dense = {}
    for key, shape in shapes.items():
        if re.fullmatch(_TABLE.format(r"\d+"), key):
            continue
        stored = Stored(store=store, key=key)
        if key == first and shape[1:] in ((len(columns),), (whole,)):
            stored = Stored(store=store, key=key, shape=(shape[0], len(columns)), adapt=reordered(columns))
        dense[names.get(key, key)] = stored
    return dense


def _top_columns(config: ModelConfig, order: tuple[int, ...]) -> IntArray:
    """Where our top MLP's input columns are among the checkpoint's, whose vectors stand in this order of tables."""
    width = config.dense_width
    vectors = (0, *(number + 1 for number in order))
    if config.interaction == "dot":
        return pair_columns(width, lower_triangle(vectors))
    places = np.argsort(vectors)
    return (places[:, None] * width + np.arange(width)).reshape(-1)
