"""TorchRec's DLRM, DLRM_DCN and DLRM_Projection: a state_dict in a torch.save file or a distributed checkpoint.

Our tensors have TorchRec's names (`dlrm_deploy.model.keys`), so most need no more than that. What differs is the order
of pairs in the top MLP's input: TorchRec takes the upper triangle by rows, we take the lower one.

Main path: `open_torchrec` -> `find_model` -> `infer_config` -> `_dense`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dlrm_deploy.config import FeatureConfig, Interaction, ModelConfig
from dlrm_deploy.errors import CheckpointError, ConfigError
from dlrm_deploy.export.importers.common import (
    FloatArray,
    ForeignSource,
    ImportOptions,
    Stored,
    contradictions,
    dense_names,
    listed,
    matrix_shape,
    refuse_unknown,
)
from dlrm_deploy.export.importers.layers import (
    Shapes,
    features_of_dot,
    mlp_widths,
    pair_columns,
    reordered,
    upper_triangle,
)
from dlrm_deploy.export.importers.torchrec_names import PROJECT, find_model
from dlrm_deploy.tables import TableConfig
from dlrm_deploy.tensors.dcp import DcpFolder
from dlrm_deploy.tensors.store import TensorStore

_BOTTOM = "dense_arch.model._mlp.{}._linear.weight"
_BRANCH = "inter_arch.interaction_branch{}.model._mlp.{{}}._linear.weight"
_TOP = "over_arch.model.0._mlp.{}._linear.weight"
_LOGIT = "over_arch.model.1.weight"
_CROSS = "inter_arch.crossnet."

_MODELS: Mapping[Interaction, str] = {
    "dot": "DLRM",
    "dcn": "DLRM_DCN",
    "dcn-v1": "DLRM_DCN with a VectorCrossNet",
    "projection": "DLRM_Projection",
}


def open_torchrec(store: TensorStore, options: ImportOptions) -> ForeignSource:
    """A model of TorchRec as a source.

    Args:
        store: the checkpoint. Names may have any prefix, and other tensors may stand beside the model.
        options: `features` is the model's order of tables, a permutation of their names.

    Raises:
        CheckpointError: there is no such model or more than one, it is incomplete or quantized, or shapes contradict
            each other or the options.
        ConfigError: an option means nothing here, or a needed one is missing.
    """
    options.only("features", "dense_transform", "modulo", source="a TorchRec checkpoint")
    found = find_model(store)
    refuse_unknown(store, list(found.unknown), PROJECT, options)
    shapes = {name: store.shape(key) for name, key in found.dense.items()}
    interaction = infer_interaction(store.path, shapes)
    if options.config is not None:
        config, order = options.config, "as --config says"
        if config.interaction != interaction or config.self_interaction:
            raise CheckpointError(
                f"{store.path}: --config says interaction {config.interaction}"
                f"{' with itself' if config.self_interaction else ''}, but the checkpoint's tensors are those of "
                f"{_MODELS[interaction]}, which is {interaction}."
            )
    else:
        trusted = found.ordered and not isinstance(store, DcpFolder)
        names, order = table_order(store.path, tuple(found.tables), trusted, options)
        tables = {name: matrix_shape(store, found.tables[name]) for name in names}
        config = infer_config(store.path, shapes, tables, options)
    return ForeignSource(
        kind="torchrec",
        project=PROJECT,
        path=store.path,
        config=config,
        dense=_dense(store, found.dense, config),
        parts={name: Stored(store=store, key=key) for name, key in found.tables.items()},
        options=options,
        facts={"model": _MODELS[interaction], "prefix": found.prefix or "none", "order_of_tables": order},
        ignored=found.unknown,
    )


def infer_interaction(path: Path, shapes: Shapes) -> Interaction:
    """The interaction that the tensors belong to; `shapes` is by TorchRec's names without a prefix."""
    if any(name.startswith("inter_arch.interaction_branch") for name in shapes):
        return "projection"
    if any(name.startswith(_CROSS + "kernels.") for name in shapes):
        kernel = shapes.get(_CROSS + "kernels.0", ())
        return "dcn-v1" if kernel[1:] == (1,) else "dcn"
    return "dcn" if any(name.startswith(_CROSS) for name in shapes) else "dot"


def table_order(
    path: Path, names: tuple[str, ...], trusted: bool, options: ImportOptions
) -> tuple[tuple[str, ...], str]:
    """The tables in the order in which the model concatenates them, and how it is known.

    Args:
        path: the checkpoint, for messages.
        names: the tables, as the checkpoint lists them.
        trusted: whether that is how the model lists them.
        options: `features` decides where it is given.

    Raises:
        ConfigError: nothing tells the order, or `features` are other names.
    """
    if options.features:
        if sorted(options.features) != sorted(names):
            wrong = sorted(set(options.features).symmetric_difference(names))
            raise ConfigError(
                f"--features must name each table of {path} once, in the model's order; "
                f"{listed(wrong) or 'a repeated name'} does not fit. Tables: {listed(names)}."
            )
        return options.features, "as --features says"
    if len(names) == 1:
        return names, "there is one"
    numbered = _by_number(names)
    if trusted and numbered in (names, None):
        return names, "as the file lists them"
    if numbered is not None and not trusted:
        return numbered, "by the number in their names"
    seen = (
        f"lists its tables as {listed(names)}, while their numbers say {listed(numbered or ())}"
        if trusted
        else f"does not keep the order of its tables, and their names ({listed(names)}) do not tell it"
    )
    raise ConfigError(
        f"{path} {seen}. The model's order, that of its EmbeddingBagConfigs, decides which column of the top MLP "
        "belongs to which table. Give it: --features NAME,NAME,..."
    )


def _by_number(names: tuple[str, ...]) -> tuple[str, ...] | None:
    """The names by the number at their end, where one stem and different numbers are all that they are made of."""
    matches = [re.fullmatch(r"(.*?)(\d+)", name) for name in names]
    numbers = {int(match[2]): match[0] for match in matches if match}
    stems = {match[1] for match in matches if match}
    if len(numbers) != len(names) or len(stems) != 1:
        return None
    return tuple(numbers[number] for number in sorted(numbers))


def infer_config(
    path: Path, shapes: Shapes, tables: Mapping[str, tuple[int, int]], options: ImportOptions
) -> ModelConfig:
    """The architecture, read off shapes; each table is read by one feature of its name.

    Args:
        path: the checkpoint, for messages.
        shapes: shape of every tensor but the tables, by TorchRec's names without a prefix.
        tables: rows and width of each table, in the model's order.
        options: name, dense transform and modulo.

    Raises:
        CheckpointError: the shapes contradict each other, or several features read one table.
    """
    interaction = infer_interaction(path, shapes)
    bottom = mlp_widths(path, shapes, _BOTTOM)
    top = mlp_widths(path, shapes, _TOP)
    if not bottom or not top or len(shapes.get(_LOGIT, ())) != 2:
        raise CheckpointError(f"{path} lacks layers: expected {_BOTTOM.format(0)}, {_TOP.format(0)} and {_LOGIT}.")
    outputs, before = shapes[_LOGIT]
    if outputs != 1 or before != top[-1]:
        raise CheckpointError(
            f"{path}: {_LOGIT} is {[outputs, before]}, expected {[1, top[-1]]}: one logit from the layer before it. "
            "Models with several outputs cannot be exported."
        )
    width = bottom[-1]
    for name, (_, seen) in tables.items():
        if seen != width:
            raise CheckpointError(
                f"{path}: table {name} is {seen} wide and dense_arch ends in {width}: TorchRec's models need one "
                "width. The tensors are of different models."
            )
    branches = [mlp_widths(path, shapes, _BRANCH.format(i)) for i in (1, 2)]
    rank, layers = _cross(path, shapes)
    _check_features(path, _features(path, interaction, width, top[0], shapes, branches), tables)
    with contradictions(path):
        return ModelConfig(
            name=options.name,
            dense_features=dense_names(bottom[0]),
            tables=tuple(TableConfig(name=name, rows=rows, width=seen) for name, (rows, seen) in tables.items()),
            features=tuple(FeatureConfig(name=name, table=name, modulo=options.modulo) for name in tables),
            bottom_mlp=bottom[1:],
            top_mlp=(*top[1:], 1),
            interaction=interaction,
            cross_layers=layers,
            cross_rank=rank if interaction == "dcn" else 0,
            branch1=branches[0][1:],
            branch2=branches[1][1:],
            dense_transform=options.dense_transform,
        )


def _cross(path: Path, shapes: Shapes) -> tuple[int, int]:
    """Rank and number of cross layers; zeros where there are none."""
    numbers = [name.rpartition(".")[2] for name in shapes if name.startswith(_CROSS + "bias.")]
    first = shapes.get(_CROSS + "V_kernels.0") or shapes.get(_CROSS + "kernels.0")
    if not numbers and not any(name.startswith(_CROSS) for name in shapes):
        return 0, 0
    if not first or len(first) != 2:
        raise CheckpointError(f"{path} lacks cross layers: expected matrices {_CROSS}V_kernels.0 or {_CROSS}kernels.0.")
    return first[0], len(numbers)


def _features(
    path: Path,
    interaction: Interaction,
    width: int,
    top: int,
    shapes: Shapes,
    branches: list[tuple[int, ...]],
) -> int:
    """Number of sparse features that the layers behind the tables were made for."""
    name = _TOP.format(0)
    flat = top
    if interaction == "projection":
        if not all(branches) or branches[0][0] != branches[1][0]:
            raise CheckpointError(
                f"{path}: interaction_branch1 and interaction_branch2 must be MLPs of one input width."
            )
        flat, last = branches[0][0], [branch[-1] for branch in branches]
        fits = not any(end % width for end in last) and top == width + (last[0] // width) * (last[1] // width)
        if not fits:
            raise CheckpointError(
                f"{path}: {name} takes {top} values, but branches that end in {last[0]} and {last[1]} with vectors of "
                f"width {width} do not make that many."
            )
        name = _BRANCH.format(1).format(0)
    features: int | None
    if interaction == "dot":
        features = features_of_dot(flat, width)
    else:
        features = None if flat % width or flat == width else flat // width - 1
    if features is None:
        formula = "D + F (F + 1) / 2" if interaction == "dot" else "(F + 1) D"
        raise CheckpointError(
            f"{path}: {name} takes {flat} values, and with vectors of width D = {width} no number of features F makes "
            f"{formula} that many. Is this {_MODELS[interaction]}?"
        )
    return features


def _check_features(path: Path, features: int, tables: Mapping[str, tuple[int, int]]) -> None:
    if features == len(tables):
        return
    seen = (
        f"{path} holds {len(tables)} tables ({listed(list(tables))}), but its layers were made for {features} features"
    )
    if features < len(tables):
        raise CheckpointError(f"{seen}. The tensors are of different models.")
    raise CheckpointError(
        f"{seen}. Either tables are missing, as in a file that one process of several wrote: then save with "
        "torch.distributed.checkpoint. Or several features read one table: then give --config FILE, which says which."
    )


def _dense(store: TensorStore, keys: Mapping[str, str], config: ModelConfig) -> dict[str, Stored]:
    """Each tensor of ours, by our names."""
    dense: dict[str, Stored] = {}
    for name, key in keys.items():
        shape = store.shape(key)
        if name == _TOP.format(0) and config.interaction == "dot":
            columns = pair_columns(config.dense_width, upper_triangle(len(config.features) + 1))
            dense[name] = Stored(store=store, key=key, adapt=reordered(columns))
        elif name.startswith(_CROSS + "kernels.") and config.interaction == "dcn":
            dense[name.replace("kernels", "W_kernels")] = Stored(store=store, key=key)
            dense[name.replace("kernels", "V_kernels")] = Stored(store=store, key=key, adapt=_identity)
        elif name.startswith(_CROSS + "kernels."):
            dense[name] = Stored(store=store, key=key, shape=shape[::-1], adapt=_transposed)
        elif name.startswith(_CROSS + "bias.") and shape[1:] == (1,):
            dense[name] = Stored(store=store, key=key, shape=shape[:1], adapt=_flat)
        else:
            dense[name] = Stored(store=store, key=key)
    return dense


def _identity(values: FloatArray, first: int) -> FloatArray:
    """CrossNet's W x is the low-rank W (V x) with V = 1, exactly."""
    return np.eye(len(values), dtype=np.float32)


def _transposed(values: FloatArray, first: int) -> FloatArray:
    return np.ascontiguousarray(values.T)


def _flat(values: FloatArray, first: int) -> FloatArray:
    return values.reshape(-1)
