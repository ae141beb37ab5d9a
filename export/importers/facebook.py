"""Checkpoints of facebookresearch/dlrm: files of torch.save that `dlrm_s_pytorch.py --save-model` writes.

Such a file holds a state_dict and nothing of the architecture, which is read off the shapes. Three things can stay
open and are then asked for: the interaction where two fit, whether quotient-remainder vectors are multiplied or added,
and whether a file with names of a distributed run is whole.

Main path: `open_facebook` -> `read_names` -> `_config` -> `_mapping`.
"""

from __future__ import annotations

import re
from collections import Counter

import numpy as np

from dlrm_deploy.config import FeatureConfig, ModelConfig
from dlrm_deploy.errors import CheckpointError, ConfigError
from dlrm_deploy.export.importers.common import (
    FloatArray,
    ForeignSource,
    ImportOptions,
    Stored,
    contradictions,
    dense_names,
    feature_names,
    listed,
    matrix_shape,
    read_rows,
)
from dlrm_deploy.export.importers.facebook_names import PROJECT, Names, Table, read_names
from dlrm_deploy.export.importers.layers import dot_width, features_of_dot
from dlrm_deploy.model.keys import bottom_keys, projection_key, top_keys
from dlrm_deploy.tables import Combine, Division, TableConfig
from dlrm_deploy.tensors.finite import check_finite
from dlrm_deploy.tensors.store import TensorStore
from dlrm_deploy.tensors.torch_file import TorchFile

_PARAMETER = re.compile(r"(^|\.)param_groups\.(?P<group>\d+)\.params\.\d+$")

INTERACTIONS = ("dot", "dot-self", "cat")
"""What `--interaction` takes: `--arch-interaction-op` of the project, dot-self for `--arch-interaction-itself`."""

OPERATIONS: dict[str, Combine] = {"mult": "multiply", "add": "add", "concat": "concat"}
"""What `--qr-operation` takes, as in the project."""

EXACT_IDS = 1 << 24
"""With ids below this, quotients in float32 are exact. Both numbers are float32 numbers then, and id / c is at least
1 / c below the next integer, while rounding moves it by at most id / c * 2^-24, which is less than 1 / c."""


def open_facebook(store: TensorStore, options: ImportOptions) -> ForeignSource:
    """The model in a file of `--save-model`, or in a bare state_dict of `DLRM_Net`.

    Args:
        store: the opened file.
        options: what shapes do not tell.

    Raises:
        CheckpointError: tensors are missing, unknown or contradict each other, or an option is needed; the message says
            which.
        ConfigError: an option that means nothing for this checkpoint.
    """
    options.only(
        "features",
        "interaction",
        "qr_operation",
        "quotient",
        "dense_transform",
        "modulo",
        source="a facebookresearch/dlrm checkpoint",
    )
    names = read_names(store, options)
    if options.config is not None:
        config = options.config
        _check_given(store, names, config)
    else:
        config = _config(store, names, options)
    dense, parts = _mapping(store, names, config)
    pooled = any(table.pool for table in names.tables)
    facts = {"learned_pooling_weights": "multiplied into the tables"} if pooled else {}
    return ForeignSource(
        kind="facebook",
        project=PROJECT,
        path=store.path,
        config=config,
        dense=dense,
        parts=parts,
        options=options,
        facts=facts,
        ignored=names.unknown,
    )


# Architecture


def _config(store: TensorStore, names: Names, options: ImportOptions) -> ModelConfig:
    """Read the architecture off the shapes."""
    width = matrix_shape(store, names.bottom[-1][0])[0]
    features = feature_names(tuple(f"cat_{i}" for i in range(len(names.tables))), options)
    combine = _combine(store, names, width, options)
    with contradictions(store.path):
        tables = tuple(
            _table_config(store, table, name, combine, options)
            for table, name in zip(names.tables, features, strict=True)
        )
    for stored, table in zip(names.tables, tables, strict=True):
        if table.output_width != width:
            raise CheckpointError(
                f"{store.path}: the vectors of {stored.name} are {table.output_width} wide, but the bottom MLP ends in "
                f"{width} ({names.bottom[-1][0]}), and they should be equal."
            )
    interaction = _interaction(store, names, width, options)
    with contradictions(store.path):
        return ModelConfig(
            name=options.name,
            dense_features=dense_names(matrix_shape(store, names.bottom[0][0])[1]),
            tables=tables,
            features=tuple(FeatureConfig(name=name, table=name, modulo=options.modulo) for name in features),
            bottom_mlp=tuple(matrix_shape(store, weight)[0] for weight, _ in names.bottom),
            top_mlp=tuple(matrix_shape(store, weight)[0] for weight, _ in names.top),
            interaction="concat" if interaction == "cat" else "dot",
            self_interaction=interaction == "dot-self",
            dense_transform=options.dense_transform,
        )


def _table_config(
    store: TensorStore, table: Table, name: str, combine: Combine | None, options: ImportOptions
) -> TableConfig:
    if combine is not None and table.is_qr:
        (quotients, width), (remainders, _) = (matrix_shape(store, table.keys[k]) for k in ("weight_q", "weight_r"))
        ids = quotients * remainders
        # The project's own arithmetic matters, and costs nothing to leave out, where float32 holds every id.
        division: Division = options.quotient or ("float32" if ids > EXACT_IDS else "exact")
        _check_modulo(store, table, (quotients - 1) * remainders + 1, options)
        return TableConfig(
            name=name,
            rows=ids,
            width=2 * width if combine == "concat" else width,
            partition="quotient-remainder",
            part_rows=(quotients, remainders),
            combine=combine,
            division=division,
        )
    rows, width = matrix_shape(store, table.keys.get("weight") or table.keys["embs.weight"])
    _check_modulo(store, table, rows, options)
    projection = table.keys.get("proj.weight")
    return TableConfig(
        name=name, rows=rows, width=width, projection=matrix_shape(store, projection)[0] if projection else None
    )


def _check_modulo(store: TensorStore, table: Table, fewest_ids: int, options: ImportOptions) -> None:
    if options.modulo is not None and fewest_ids > options.modulo:
        raise CheckpointError(
            f"{store.path}: {table.name} has rows for {fewest_ids} ids, but with --modulo {options.modulo} no id above "
            f"{options.modulo - 1} reaches it. The project cuts tables to --max-ind-range rows: give that number."
        )


def _combine(store: TensorStore, names: Names, width: int, options: ImportOptions) -> Combine | None:
    """How the quotient-remainder tables combine their vectors; None where there are none."""
    tables = [table for table in names.tables if table.is_qr]
    asked = options.qr_operation
    if asked is not None and asked not in OPERATIONS:
        raise ConfigError(f"--qr-operation must be one of {', '.join(OPERATIONS)}, got {asked!r}.")
    if not tables:
        for name, value in (("--qr-operation", asked), ("--quotient", options.quotient)):
            if value is not None:
                raise ConfigError(f"{name} {value}: {store.path} holds no quotient-remainder tables. Leave it out.")
        return None
    for table in tables:
        (_, q), (_, r) = (matrix_shape(store, table.keys[k]) for k in ("weight_q", "weight_r"))
        if q != r or width not in (q, 2 * q):
            raise CheckpointError(
                f"{store.path}: {table.name} has vectors of {q} (weight_q) and {r} (weight_r), and the bottom MLP ends "
                f"in {width}. Multiplied or added they must both be {width} wide, side by side {width / 2:g}."
            )
    halves = {2 * matrix_shape(store, table.keys["weight_q"])[1] == width for table in tables}
    if len(halves) > 1:
        raise CheckpointError(f"{store.path}: some quotient-remainder tables are {width} wide and some half of that.")
    if halves == {True}:
        if asked not in (None, "concat"):
            raise CheckpointError(
                f"{store.path}: --qr-operation {asked} gives vectors of {width // 2}, but the bottom MLP ends in "
                f"{width}: this model was trained with concat."
            )
        return "concat"
    if asked in (None, "concat"):
        seen = "both fit" if asked is None else f"with concat, vectors would be {2 * width} wide, not {width}"
        raise CheckpointError(
            f"{store.path} has {len(tables)} quotient-remainder tables ({listed(t.name for t in tables)}), and does "
            f"not say whether their vectors are multiplied or added: {seen}. Add --qr-operation mult or --qr-operation "
            "add, as in the training command (mult was its default)."
        )
    return OPERATIONS[asked]


def readings(top_inputs: int, width: int) -> dict[str, int]:
    """With how many tables each interaction gives the top MLP's number of inputs.

    Args:
        top_inputs: columns of the first layer of the top MLP.
        width: width of every vector.

    Returns:
        The number of tables for each of `INTERACTIONS` that can give that number.
    """
    tables = {}
    if features := features_of_dot(top_inputs, width):
        tables["dot"] = features
        tables["dot-self"] = features - 1  # as many pairs: one vector less, each with itself too
    if top_inputs % width == 0:
        tables["cat"] = top_inputs // width - 1
    return {interaction: count for interaction, count in tables.items() if count > 0}


def _trained_parameters(store: TensorStore) -> int | None:
    """Number of tensors that the optimizer saved beside the model trained, if it was the only one; else None.

    A distributed run's optimizer has groups for tables and MLPs, and knows the tables of its own process only.
    """
    values = store.values() if isinstance(store, TorchFile) else {}
    found = [match for match in map(_PARAMETER.search, values) if match]
    return len(found) if len({match["group"] for match in found}) == 1 else None


def _stored_parameters(store: TensorStore, key: str) -> int:
    """Number of the model's tensors; `key` is one of them."""
    prefix = key[: key.index("top_l.")]
    return sum(name.startswith(prefix) and not name.startswith("opt_state_dict.") for name in store.keys())  # noqa: SIM118  # no mapping


def _interaction(store: TensorStore, names: Names, width: int, options: ImportOptions) -> str:
    """The one interaction that gives the top MLP its inputs; the one asked for where several do."""
    asked = options.interaction
    if asked is not None and asked not in INTERACTIONS:
        raise ConfigError(f"--interaction must be one of {', '.join(INTERACTIONS)}, got {asked!r}.")
    key = names.top[0][0]
    inputs = matrix_shape(store, key)[1]
    possible = readings(inputs, width)
    count = len(names.tables)
    fitting = [interaction for interaction, tables in possible.items() if tables == count]
    partial = {interaction: tables for interaction, tables in possible.items() if tables > count}
    held = f"{count} tables (emb_l.0 to emb_l.{count - 1})" if count > 1 else "1 table (emb_l.0)"
    if asked in fitting:
        return asked
    if asked in partial or (asked is None and partial and not fitting):
        made = " or ".join(f"{tables} ({name})" for name, tables in partial.items() if asked in (None, name))
        raise CheckpointError(
            f"{store.path} holds {held}, but the top MLP was made for {made}: {key} takes {inputs} values. Each "
            "process of a distributed run saves only its own tables: put the tables of all of them into one "
            "state_dict, as emb_l.0, emb_l.1, ... in the order of the features."
        )
    if asked is not None or not fitting:
        gives = {
            "dot": dot_width(count, width),
            "dot-self": dot_width(count + 1, width),
            "cat": (count + 1) * width,
        }
        shown = ", ".join(f"{interaction} {gives[interaction]}" for interaction in ([asked] if asked else gives))
        hint = f" --interaction {fitting[0]} fits." if fitting else ""
        raise CheckpointError(
            f"{store.path}: {key} takes {inputs} values, but {held} of width {width} and the bottom MLP give: {shown}."
            f"{hint}"
        )
    made = " or ".join(f"{interaction} with {tables} tables" for interaction, tables in partial.items())
    trained, stored = _trained_parameters(store), _stored_parameters(store, key)
    if partial and trained is not None and trained > stored:
        raise CheckpointError(
            f"{store.path} holds {held}, but tables are missing: its optimizer trained {trained} tensors, and the "
            f"file has {stored}. The top MLP was made for {made}. Put all tables into one state_dict, as emb_l.0, "
            "emb_l.1, ... in the order of the features."
        )
    if partial and (names.distributed or trained is None):
        why = (
            "comes from a distributed run, of which each process saves only its own tables"
            if names.distributed
            else "holds no optimizer state of a run on one process, which would tell whether all tables are there"
        )
        raise CheckpointError(
            f"{store.path} {why}. It holds {held}, which fits {' or '.join(fitting)}, but it may also be a part of a "
            f"model: {made}. If it is whole, add --interaction {' or '.join(fitting)}; else put all tables into one "
            "state_dict."
        )
    if len(fitting) > 1:
        raise CheckpointError(
            f"{store.path}: with {held} of width {width}, {' and '.join(fitting)} both give the {inputs} inputs of "
            f"{key}. Add --interaction {' or '.join(fitting)}, as in the training command (--arch-interaction-op; "
            "dot-self with --arch-interaction-itself)."
        )
    return fitting[0]


def _check_given(store: TensorStore, names: Names, config: ModelConfig) -> None:
    """Compare what `ForeignSource`, which compares shapes, does not see: order and kinds of tables."""
    said = f"{store.path}: --config"
    if len(config.features) != len(names.tables):
        raise CheckpointError(
            f"{said} says {len(config.features)} features, and the checkpoint holds {len(names.tables)} tables, one "
            "for each feature."
        )
    shared = [name for name, count in Counter(feature.table for feature in config.features).items() if count > 1]
    if shared:
        raise CheckpointError(f"{said} has several features read {listed(shared)}; in this project each has a table.")
    for feature, stored in zip(config.features, names.tables, strict=True):
        table = config.table(feature.table)
        expected = ("quotient-remainder",) if stored.is_qr else ("full", "hash")
        if table.partition not in expected:
            raise CheckpointError(
                f"{said} says partition {table.partition} for table {table.name}, but {stored.name} holds "
                f"{' and '.join(stored.keys)}, which is {expected[0]}."
            )
    if config.interaction not in ("dot", "concat"):
        raise CheckpointError(f"{said} says interaction {config.interaction}; this project has dot and concat.")


# Tensors


def _mapping(store: TensorStore, names: Names, config: ModelConfig) -> tuple[dict[str, Stored], dict[str, Stored]]:
    """Where each tensor of ours is: those that are not tables by key, and table parts by name."""
    dense: dict[str, Stored] = {}
    parts: dict[str, Stored] = {}
    for ours, theirs in ((bottom_keys(config), names.bottom), (top_keys(config), names.top)):
        for place, layer in enumerate(theirs):
            # A layer that the config does not have keeps its name, and is reported as left over.
            for our_key, key in zip(ours[place] if place < len(ours) else layer, layer, strict=True):
                dense[our_key] = Stored(store=store, key=key)
    for feature, table in zip(config.features, names.tables, strict=True):
        name = feature.table
        if table.is_qr:
            parts[f"{name}.0"] = Stored(store=store, key=table.keys["weight_q"])
            parts[f"{name}.1"] = Stored(store=store, key=table.keys["weight_r"])
            continue
        key = table.keys.get("weight") or table.keys["embs.weight"]
        parts[name] = Stored(store=store, key=key) if table.pool is None else _pooled(store, table, key, table.pool)
        if "proj.weight" in table.keys:
            dense[projection_key(name)] = Stored(store=store, key=table.keys["proj.weight"])
    return dense, parts


def _pooled(store: TensorStore, table: Table, key: str, pool: str) -> Stored:
    """A table with learned pooling weights: each row times its weight is what a weighted sum adds."""
    if set(table.keys) != {"weight"}:
        raise CheckpointError(
            f"{store.path}: {table.name} holds {' and '.join(table.keys)} and learned pooling weights ({pool}); the "
            "project trains no such model."
        )
    if store.shape(pool) != store.shape(key)[:1]:
        raise CheckpointError(
            f"{store.path}: {pool} is {list(store.shape(pool))}, expected {list(store.shape(key)[:1])}: a weight for "
            f"each row of {key}."
        )

    def times_weight(rows: FloatArray, first: int) -> FloatArray:
        with np.errstate(over="ignore"):
            rows *= read_rows(store, pool, first, len(rows))[:, None]
        check_finite(rows, first, f"{store.path}: {key} times {pool}")
        return rows

    return Stored(store=store, key=key, adapt=times_weight)
