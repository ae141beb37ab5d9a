"""Which tensor of a TorchRec checkpoint is what, told from its name alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dlrm_deploy.errors import CheckpointError
from dlrm_deploy.export.importers.common import listed, refuse_sparse
from dlrm_deploy.tensors.store import TensorStore

PROJECT = "pytorch/torchrec"

_TABLE = re.compile(
    r"(?P<prefix>(?:.+\.)?)sparse_arch\.(?:module\.)?embedding_bag_collection\.(?:module\.)?embedding_bags\."
    r"(?P<table>[^.]+)\.weight"
)
_DENSE = re.compile(
    r"(?:dense_arch|inter_arch\.interaction_branch[12]|over_arch)\.model\.(?:0\.)?_mlp\.\d+\._linear\.(?:weight|bias)"
    r"|over_arch\.model\.1\.(?:weight|bias)"
    r"|inter_arch\.crossnet\.(?:W_kernels|V_kernels|kernels|bias)\.\d+"
)
_QUANTIZED = re.compile(r"\.weight_q(?:scaleshift|scale|bias)$")
_OPTIMIZER = re.compile(r"(?:.*\.)?(?:fused|lr_scheduler|(?:\w+_)?optim(?:s|izer|izers)?(?:_states?)?)\..*")
_BUFFER = re.compile(r"inter_arch\.tri[ul]_indices")


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundModel:
    """Where the tensors of the one model in a checkpoint are. Keys are ours, values are the checkpoint's."""

    prefix: str
    """What stands before `sparse_arch` in every key."""

    tables: Mapping[str, str]
    """By table name, in the order of the checkpoint."""

    dense: Mapping[str, str]
    """The rest, by the names that TorchRec and we share."""

    unknown: tuple[str, ...]
    """Tensors below the prefix that are none of TorchRec's."""

    ordered: bool
    """Whether the tables stand as a model lists them: one after the other, in front of everything else."""


def find_model(store: TensorStore) -> FoundModel:
    """The one model in a checkpoint.

    Raises:
        CheckpointError: none, several, a part of one, or a quantized one.
    """
    keys = tuple(key for key in store.keys() if not _OPTIMIZER.fullmatch(key))  # noqa: SIM118  # of a store
    if quantized := [key for key in keys if _QUANTIZED.search(key)]:
        raise CheckpointError(
            f"{store.path} holds a quantized model ({listed(quantized)}): its tables are rounded to a few bits, and an "
            "export would carry that on. Save the state_dict from before torchrec.inference quantized it."
        )
    refuse_sparse(store.path, keys, _TABLE.fullmatch)
    prefixes = dict.fromkeys(match["prefix"] for key in keys if (match := _TABLE.fullmatch(key)))
    whole = [p for p in prefixes if all(_holds(keys, p + part) for part in ("dense_arch.", "over_arch."))]
    if not whole:
        seen = f"tables below {listed([p + 'sparse_arch' for p in prefixes])}" if prefixes else store.describe()
        raise CheckpointError(
            f"{store.path} holds no whole TorchRec DLRM: expected sparse_arch.embedding_bag_collection.embedding_bags, "
            f"dense_arch and over_arch beside each other, found {seen}."
        )
    if len(whole) > 1:
        raise CheckpointError(
            f"{store.path} holds {len(whole)} models: {listed([p + 'sparse_arch' for p in whole])}. Save the "
            "state_dict of the one to export by itself."
        )
    return _sort_keys(store.path, keys, whole[0])


def _holds(keys: tuple[str, ...], begin: str) -> bool:
    return any(key.startswith(begin) for key in keys)


def _sort_keys(path: Path, keys: tuple[str, ...], prefix: str) -> FoundModel:
    tables: dict[str, str] = {}
    dense: dict[str, str] = {}
    unknown = []
    kinds = []
    for key in keys:
        if not key.startswith(prefix) or _BUFFER.fullmatch(key.removeprefix(prefix)):
            continue
        match = _TABLE.fullmatch(key)
        is_table = match is not None and match["prefix"] == prefix
        name = _table_name(match["table"]) if match and is_table else _without_wrapper(key.removeprefix(prefix))
        place = tables if is_table else dense
        kinds.append("table" if is_table else "dense")
        if name in place and is_table:
            raise CheckpointError(
                f"{path}: two tables become {name} here: {place[name]} and {key}. Characters of table names other than "
                "letters, digits, _ and - become _: give one of them another name in the state_dict, and save it again."
            )
        if name in place or not (is_table or _DENSE.fullmatch(name)):
            unknown.append(key)
        else:
            place[name] = key
    for key in unknown:
        if re.search(r"\.(U_kernels|C_kernels|gates)\.", key):
            raise CheckpointError(
                f"{path}: {key} is of a LowRankMixtureCrossNet, whose experts and gates no interaction of ours "
                "computes. DLRM_DCN's own LowRankCrossNet, CrossNet and VectorCrossNet are read."
            )
    ordered = kinds == sorted(kinds, reverse=True)
    return FoundModel(prefix=prefix, tables=tables, dense=dense, unknown=tuple(unknown), ordered=ordered)


def _without_wrapper(name: str) -> str:
    """`dense_arch.module.model...` is `dense_arch` in DistributedDataParallel."""
    arch, _, rest = name.partition(".")
    return f"{arch}.{rest.removeprefix('module.')}"


def _table_name(name: str) -> str:
    """TorchRec's names may have any character but a dot."""
    return re.sub(r"[^A-Za-z0-9_-]|^-", "_", name)
