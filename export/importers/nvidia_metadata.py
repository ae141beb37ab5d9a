"""What `metadata.pt` of NVIDIA's DLRM says, and in which order the top model takes the tables."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dlrm_deploy.errors import CheckpointError
from dlrm_deploy.tensors.torch_file import TorchFile

NvidiaInteraction = Literal["dot", "concat"]

METADATA = "metadata.pt"
OPERATIONS: Mapping[object, NvidiaInteraction] = {"dot": "dot", "cuda_dot": "dot", "cat": "concat"}
"""Our names of what the project calls `interaction_op`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Metadata:
    """What `metadata.pt` says about the model. None: it does not say."""

    devices: tuple[tuple[int, ...], ...] = ()
    """Tables of each device of the training run, in the order in which it held them."""

    interaction: NvidiaInteraction | None = None
    hash_indices: bool | None = None
    bottom_features_ordered: bool | None = None


def read_metadata(path: Path) -> Metadata:
    """What a `metadata.pt` says; nothing where there is no such file.

    Raises:
        CheckpointError: it is damaged, or contradicts itself.
    """
    if not path.exists():
        return Metadata()
    return metadata(path, TorchFile(path).values())


def metadata(path: Path, values: Mapping[str, object]) -> Metadata:
    """What the values of a `metadata.pt` say; `path` is for messages.

    Raises:
        CheckpointError: they contradict each other.
    """
    flags = {}
    for name in ("hash_indices", "bottom_features_ordered"):
        flag = values.get(f"config.{name}")
        if flag is not None and not isinstance(flag, bool):
            raise CheckpointError(f"{path}: {name} is {flag!r}, expected true or false.")
        flags[name] = flag
    operation = values.get("config.interaction_op")
    if operation is not None and operation not in OPERATIONS:
        raise CheckpointError(f"{path}: interaction_op is {operation!r}, expected one of dot, cuda_dot, cat.")
    return Metadata(
        devices=_devices(path, values), interaction=None if operation is None else OPERATIONS[operation], **flags
    )


def _devices(path: Path, values: Mapping[str, object]) -> tuple[tuple[int, ...], ...]:
    """Tables of each device. A device without any leaves no trace but in the numbers of vectors."""
    places: dict[tuple[int, int], int] = {}
    vectors: dict[int, int] = {}
    for name, value in values.items():
        if not name.startswith("data.device_mapping."):
            continue
        if type(value) is not int:
            raise CheckpointError(f"{path}: {name} is {value!r}, expected a number.")
        if found := re.fullmatch(r"embedding\.(\d+)\.(\d+)", name.removeprefix("data.device_mapping.")):
            places[int(found[1]), int(found[2])] = value
        elif found := re.fullmatch(r"vectors_per_gpu\.(\d+)", name.removeprefix("data.device_mapping.")):
            vectors[int(found[1])] = value
    if values.get("data.device_mapping.bottom_mlp", 0) != 0:
        raise CheckpointError(
            f"{path}: the bottom MLP was on device {values['data.device_mapping.bottom_mlp']}. The project itself "
            "takes the first vector for the bottom MLP's, so that it has to be on device 0."
        )
    count = 1 + max([*vectors, *(device for device, _ in places)], default=-1)
    devices = tuple(tuple(places[place] for place in sorted(places) if place[0] == device) for device in range(count))
    numbers = sorted(number for tables in devices for number in tables)
    expected = [len(tables) + (device == 0) for device, tables in enumerate(devices)]
    if numbers != list(range(len(numbers))) or (vectors and [vectors.get(d) for d in range(count)] != expected):
        raise CheckpointError(
            f"{path}: its device_mapping contradicts itself: tables {[list(tables) for tables in devices]}, vectors "
            f"per device {[vectors[d] for d in sorted(vectors)]}. Expected each table once, and a vector for each of "
            "them and one for the bottom MLP, on device 0."
        )
    return devices


def device_order(metadata: Metadata) -> tuple[tuple[int, ...], str] | None:
    """The order in which the top model takes the tables, and how it is known; None where nothing tells.

    A run of one process takes them as its device mapping lists them, which is the largest first, whatever
    `--bottom_features_ordered` says: only the exchange between processes looks at that flag.
    """
    order = tuple(number for tables in metadata.devices for number in tables)
    if not order:
        return None
    if order == tuple(range(len(order))):
        return order, "by number"
    if len(metadata.devices) == 1:
        return order, f"{list(order)}, as the one device of the run held them"
    if metadata.bottom_features_ordered is None:
        return None
    if metadata.bottom_features_ordered:
        return tuple(range(len(order))), "by number, bottom_features_ordered"
    return order, f"{list(order)}, as the {len(metadata.devices)} devices of the run held them"
