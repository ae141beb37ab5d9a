"""Which tensor of a facebookresearch/dlrm checkpoint is what, told from its name alone."""

from __future__ import annotations

import re
from dataclasses import dataclass

from dlrm_deploy.errors import CheckpointError
from dlrm_deploy.export.importers.common import ImportOptions, check_dtype, listed, refuse_sparse, refuse_unknown
from dlrm_deploy.tensors.store import TensorStore

PROJECT = "facebookresearch/dlrm"

_ROOT = re.compile(r"((?:.*\.)?)(?:emb_l|bot_l|top_l)\.")
_TABLE = re.compile(r"emb_l\.(0|[1-9][0-9]*)\.(weight|weight_q|weight_r|embs\.weight|proj\.weight)")
_LAYER = re.compile(r"(bot_l|top_l)\.(0|[1-9][0-9]*)\.(weight|bias)")
_POOL = re.compile(r"v_W_l\.(0|[1-9][0-9]*)")
_TABLE_KINDS = ({"weight"}, {"weight_q", "weight_r"}, {"embs.weight"}, {"embs.weight", "proj.weight"})


@dataclass(frozen=True, slots=True)
class Table:
    """The tensors of one table: their keys by what follows `emb_l.N.`."""

    name: str
    keys: dict[str, str]

    pool: str | None
    """Key of the learned pooling weights, one for each row."""

    @property
    def is_qr(self) -> bool:
        return "weight_q" in self.keys


@dataclass(frozen=True, slots=True)
class Names:
    """Which tensors a file holds, by their role. Shapes were not compared yet."""

    tables: tuple[Table, ...]
    bottom: tuple[tuple[str, str], ...]
    """Key of weight and bias of each layer."""

    top: tuple[tuple[str, str], ...]

    distributed: bool
    """The MLPs are wrapped as in a run of several processes, which save only their own tables."""

    unknown: tuple[str, ...]
    """Keys of tensors of the model that the project does not have, and that may be ignored."""


def read_names(store: TensorStore, options: ImportOptions) -> Names:
    """Find the model in the file and give every tensor its role."""
    keys = store.keys()
    roots = sorted({match[1] for key in keys if (match := _ROOT.match(key))})
    if len(roots) != 1:
        shown = [f"{root}emb_l" for root in roots]
        raise CheckpointError(
            f"{store.path} holds {len(roots)} models ({listed(shown)}), expected one. Save the state_dict of one alone."
        )
    container = roots[0].removesuffix("module.")
    found: dict[str, str] = {}
    distributed = False
    for key in keys:
        if not key.startswith(container):
            continue  # the optimizer's state and the like
        name = key.removeprefix(container).removeprefix("module.")
        plain = re.sub(r"^(bot_l|top_l)\.module\.", r"\1.", name)
        distributed |= plain != name
        if plain in found:
            raise CheckpointError(f"{store.path} holds {plain} twice: as {found[plain]} and as {key}.")
        found[plain] = key
    known = [name for name in found if _is_known(name)]
    unknown = [found[name] for name in found if name not in set(known)]
    refuse_sparse(store.path, found, _is_known)
    refuse_unknown(store, unknown, PROJECT, options)
    names = Names(
        tables=_tables(store, found),
        bottom=_layers(store, found, "bot_l"),
        top=_layers(store, found, "top_l"),
        distributed=distributed,
        unknown=tuple(unknown),
    )
    for name in known:
        check_dtype(store, found[name])
    return names


def _is_known(name: str) -> bool:
    return any(pattern.fullmatch(name) for pattern in (_TABLE, _LAYER, _POOL))


def _tables(store: TensorStore, found: dict[str, str]) -> tuple[Table, ...]:
    keys: dict[int, dict[str, str]] = {}
    for name, key in found.items():
        if match := _TABLE.fullmatch(name):
            keys.setdefault(int(match[1]), {})[match[2]] = key
    pools = {int(match[1]): key for name, key in found.items() if (match := _POOL.fullmatch(name))}
    missing = [f"emb_l.{i}" for i in range(max(1, len(keys))) if i not in keys]
    if missing:
        some = f"{len(keys)} table{'s' if len(keys) > 1 else ''}, {listed(f'emb_l.{i}' for i in sorted(keys))}"
        seen = f"{some}, but not {listed(missing)}" if keys else "no tables"
        raise CheckpointError(
            f"{store.path} holds {seen}. Put all tables into one state_dict, numbered from 0 in the order of the "
            "features."
        )
    for i in sorted(keys):
        if set(keys[i]) not in _TABLE_KINDS:
            raise CheckpointError(
                f"{store.path}: table emb_l.{i} holds {' and '.join(sorted(keys[i]))}, expected weight, weight_q and "
                "weight_r, or embs.weight with or without proj.weight."
            )
    if pools and set(pools) != set(keys):
        raise CheckpointError(
            f"{store.path} holds learned pooling weights v_W_l for {len(pools)} of {len(keys)} tables, expected all or "
            "none."
        )
    return tuple(Table(f"emb_l.{i}", keys[i], pools.get(i)) for i in sorted(keys))


def _layers(store: TensorStore, found: dict[str, str], mlp: str) -> tuple[tuple[str, str], ...]:
    """Weight and bias key of each layer; activations, which hold nothing, are at the odd places."""
    places = sorted({int(match[2]) for name in found if (match := _LAYER.fullmatch(name)) and match[1] == mlp})
    expected = list(range(0, 2 * max(1, len(places)), 2))
    missing = [f"{mlp}.{i}.{kind}" for i in expected for kind in ("weight", "bias") if f"{mlp}.{i}.{kind}" not in found]
    if missing or places != expected:
        raise CheckpointError(
            f"{store.path}: {mlp} has layers at {listed(map(str, places)) or 'no place'}, expected a weight and a bias "
            f"at 0, 2, 4, ...; missing: {listed(missing) or 'none'}."
        )
    return tuple((found[f"{mlp}.{i}.weight"], found[f"{mlp}.{i}.bias"]) for i in places)
