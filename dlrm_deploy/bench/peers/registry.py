"""The one list of peers: names, packages, and how to open each."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, NamedTuple

from dlrm_deploy.bundle import Bundle
from dlrm_deploy.errors import EngineError, MissingDependencyError

if TYPE_CHECKING:
    from dlrm_deploy.bench.peers.peer import Peer


class _Place(NamedTuple):
    module: str
    kind: str
    package: str
    """What has to be importable."""

    distribution: str


_PEERS = {
    "torch-lean": _Place("torch_peers", "TorchLeanPeer", "torch", "torch"),
    "torch-bf16": _Place("torch_peers", "TorchBf16Peer", "torch", "torch"),
    "torch-compile": _Place("torch_peers", "TorchCompilePeer", "torch", "torch"),
    "torch-compile-bf16": _Place("torch_peers", "TorchCompileBf16Peer", "torch", "torch"),
    "fbgemm-int8": _Place("fbgemm", "FbgemmInt8Peer", "fbgemm_gpu", "fbgemm-gpu-cpu"),
    "fbgemm-int8-bf16": _Place("fbgemm", "FbgemmInt8Bf16Peer", "fbgemm_gpu", "fbgemm-gpu-cpu"),
    "openvino-fp32": _Place("openvino", "OpenVinoPeer", "openvino", "openvino"),
    "openvino-bf16": _Place("openvino", "OpenVinoBf16Peer", "openvino", "openvino"),
}

PEER_NAMES: tuple[str, ...] = tuple(_PEERS)


def missing_peer_package(name: str) -> str | None:
    """What to install before peer `name` can be measured, or None."""
    place = _PEERS[name]
    if find_spec(place.package) is not None:
        return None
    return f"{name} needs the package {place.distribution}. Install it with `pip install 'dlrm-deploy[bench]'`."


def open_peer(bundle: Bundle, name: str, *, threads: int) -> Peer:
    """Open the peer of that name, one of `PEER_NAMES`.

    Raises:
        EngineError: it cannot run this model here.
        MissingDependencyError: its package is not installed.
    """
    if missing := missing_peer_package(name):
        raise MissingDependencyError(missing)
    place = _PEERS[name]
    kind: type[Peer] = getattr(import_module(f"dlrm_deploy.bench.peers.{place.module}"), place.kind)
    try:
        return kind(bundle, threads)
    except (ImportError, RuntimeError, OSError) as err:  # a package of another version, or one that does not load here
        raise EngineError(f"{name} cannot be opened here: {err}") from err
