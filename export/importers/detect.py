"""Which project wrote a checkpoint, told from what it holds; and the source for it, for an export and for a comparison.

Each importer takes what was opened here: `open_facebook(store, options)` and `open_torchrec(store, options)` take the
tensors of a file or folder, `open_nvidia(folder, options)` a folder of files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlrm_deploy.config import ModelConfig
from dlrm_deploy.errors import CheckpointError, ConfigError
from dlrm_deploy.export.importers.common import ImportOptions, listed, option
from dlrm_deploy.export.importers.kinds import AUTO, KINDS, PROJECTS, Kind
from dlrm_deploy.export.sources import CheckpointSource, Source
from dlrm_deploy.tensors.dcp import METADATA, DcpFolder
from dlrm_deploy.tensors.store import TensorStore
from dlrm_deploy.tensors.torch_file import TorchFile

_KEYS: dict[Kind, re.Pattern[str]] = {
    "facebook": re.compile(r"(^|\.)(emb_l|bot_l|top_l)\."),
    "torchrec": re.compile(r"(^|\.)(sparse_arch|dense_arch|inter_arch|over_arch)\."),
}
_OURS = ("model.toml", "trainer.json", "files.json")


@dataclass(frozen=True, slots=True)
class Found:
    """What a path holds."""

    kinds: dict[Kind, tuple[str, ...]]
    """For each project that it may come from, the files or tensors that say so."""

    store: TensorStore | None
    """Its tensors, opened; None for folders that are read file by file."""


def open_source(path: Path, kind: str, options: ImportOptions) -> Source:
    """Open a checkpoint of any project that is known here.

    Args:
        path: the file or folder.
        kind: one of `KINDS`, or `AUTO` to tell it from what the checkpoint holds.
        options: what the checkpoint does not say itself.

    Raises:
        CheckpointError: missing, damaged, of another project, or its tensors do not make a model; nothing was run.
        ConfigError: an option that means nothing for this checkpoint, or a golden file that does not fit.
    """
    found = look(path)
    return _open(path, _choose(path, kind, found), found, options)


def reopen_source(path: Path, kind: str, config: ModelConfig, provenance: Mapping[str, Any]) -> Source:
    """Open the checkpoint that a bundle was made from as its export opened it.

    Args:
        path: the file or folder.
        kind: one of `KINDS`; with `AUTO` what the export took it for, where it can be that.
        config: the bundle's.
        provenance: the bundle's, which holds the options of the export.

    Raises:
        CheckpointError: it cannot be read, or is another checkpoint, for which those options are not right.
    """
    found = look(path)
    recorded = str(provenance.get("from"))
    chosen = _choose(path, recorded if kind == AUTO and recorded in found.kinds else kind, found)
    if chosen == "dlrm-deploy":  # holds its config itself
        return _open(path, chosen, found, ImportOptions())
    try:
        return _open(path, chosen, found, ImportOptions.recorded(provenance, config))
    except (CheckpointError, ConfigError, TypeError) as err:
        raise CheckpointError(
            f"{err} (Opened with what the export of the bundle was told: is it the checkpoint that the bundle was made "
            "from?)"
        ) from err


def _open(path: Path, kind: Kind, found: Found, options: ImportOptions) -> Source:
    if kind == "dlrm-deploy":
        from dlrm_deploy.checkpoint import Checkpoint

        if given := options.given():
            raise ConfigError(
                f"{', '.join(map(option, given))} goes with checkpoints of other projects; {path} is one of "
                "dlrm-deploy, which holds its config and its golden batch."
            )
        return CheckpointSource(Checkpoint.open(path))
    if kind == "nvidia":
        from dlrm_deploy.export.importers.nvidia import open_nvidia

        return open_nvidia(path, options)
    assert found.store is not None  # these kinds are told from tensors
    if kind == "torchrec":
        from dlrm_deploy.export.importers.torchrec import open_torchrec

        return open_torchrec(found.store, options)
    from dlrm_deploy.export.importers.facebook import open_facebook

    return open_facebook(found.store, options)


def look(path: Path) -> Found:
    """Look at what a path holds, without reading values.

    Raises:
        CheckpointError: nothing is there, or it cannot be read.
    """
    if path.is_dir():
        return _look_into(path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist. Give a checkpoint: a file of torch.save, or a folder.")
    return _look_at(TorchFile(path))


def _look_into(folder: Path) -> Found:
    names = sorted(entry.name for entry in folder.iterdir())
    ours = tuple(name for name in names if name in _OURS)
    if ours:
        return Found({"dlrm-deploy": ours}, None)
    nvidia = tuple(name for name in names if re.match(r"(bottom|top)_model\.", name))
    if nvidia:
        return Found({"nvidia": nvidia}, None)
    if METADATA in names:
        return _look_at(DcpFolder(folder))
    raise CheckpointError(f"{folder} is no checkpoint: {_advice(names)}")


def _advice(names: list[str]) -> str:
    """Why a folder with these entries is no checkpoint, and what to do."""
    if "best" in names or "checkpoints" in names:
        return "it is the folder of a run. Give RUN/best, or a folder in RUN/checkpoints."
    if "manifest.json" in names:
        return "it is a bundle already."
    if ".snapshot_metadata" in names:
        return (
            "it was written by torchsnapshot. Restore it with torchsnapshot and save the model with "
            "torch.distributed.checkpoint."
        )
    if any(name.endswith(".distcp") for name in names):
        return "it holds .distcp files and no .metadata, which is written last: the save did not finish."
    seen = f"it holds {listed(names)}" if names else "it is empty"
    return (
        f"{seen}. Expected .metadata (torch.distributed.checkpoint, dlrm-deploy) or bottom_model.mlp.pt "
        "(NVIDIA DeepLearningExamples), or give a file of torch.save."
    )


def _look_at(store: TensorStore) -> Found:
    kinds = {kind: tuple(filter(pattern.search, store.keys())) for kind, pattern in _KEYS.items()}
    return Found({kind: keys for kind, keys in kinds.items() if keys}, store)


def _choose(path: Path, kind: str, found: Found) -> Kind:
    """The kind to open: what was asked for, if that is what is there."""
    if kind not in (AUTO, *KINDS):
        raise ConfigError(f"--from must be one of {AUTO}, {', '.join(KINDS)}, got {kind!r}.")
    if not found.kinds:
        assert found.store is not None  # every folder without one is of some kind
        raise CheckpointError(
            f"{path} is {found.store.describe()}. No tensor of a model that is known here is among them: "
            "emb_l.0.weight (facebookresearch/dlrm), sparse_arch.* (TorchRec). Is it the state_dict of a DLRM?"
        )
    for known in KINDS:
        if known in found.kinds and kind in (known, AUTO) and (kind == known or len(found.kinds) == 1):
            return known
    seen = " and ".join(f"a {PROJECTS[known]} checkpoint: it holds {listed(why)}" for known, why in found.kinds.items())
    if kind == AUTO:
        raise CheckpointError(f"{path} looks like {seen}. Say which one with --from {' or '.join(found.kinds)}.")
    raise CheckpointError(
        f"--from {kind}, but {path} is {seen}. Use --from {' or '.join(found.kinds)}, or leave --from out."
    )
