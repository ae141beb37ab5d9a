"""Every peer computes the model of the bundle, or says why it cannot."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from bundles import CONFIGS, make_bundle

from dlrm_deploy.batch import Batch
from dlrm_deploy.bench.agreement import check, compare
from dlrm_deploy.bench.peers import registry
from dlrm_deploy.bench.peers.registry import PEER_NAMES, missing_peer_package, open_peer
from dlrm_deploy.bundle import Bundle
from dlrm_deploy.config import ModelConfig
from dlrm_deploy.data.random import random_batch
from dlrm_deploy.engines.torch_eager import TorchEngine
from dlrm_deploy.errors import EngineError, MissingDependencyError
from dlrm_deploy.export.bundle import export_bundle
from dlrm_deploy.export.sources import RandomSource

EAGER = ("torch-lean", "torch-bf16", "fbgemm-int8", "fbgemm-int8-bf16", "openvino-fp32", "openvino-bf16")
COMPILED = ("torch-compile", "torch-compile-bf16")

MODELS = ("one_hot", "self", "concat", "dcn", "weighted", "fixed", "shared", "dot")
"""Fixed and ragged bags, weights, several widths, sums and means, every interaction that peers know."""

CANNOT = {
    ("fbgemm", "concat"): "both sums and means",
    ("fbgemm", "fixed"): "both sums and means",
    ("fbgemm", "dot"): "both sums and means",
    ("openvino", "weighted"): "openvino",
}
"""What a kind of peer says of a model that it cannot run: FBGEMM pools all tables alike, OpenVINO wants the number of
weighted ids beforehand."""


@pytest.fixture(scope="session", params=MODELS)
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(request.param, tmp_path_factory.mktemp("peers") / request.param)


def opened(bundle: Bundle, name: str):
    if reason := missing_peer_package(name):
        pytest.skip(reason)
    return open_peer(bundle, name, threads=1)


@pytest.mark.parametrize("name", EAGER)
def test_a_peer_scores_as_the_reference_does(bundle, name):
    model = next(key for key, config in CONFIGS.items() if config == bundle.config)
    expected = CANNOT.get((name.partition("-")[0], model))
    batches = [random_batch(bundle.config, size, np.random.default_rng(size)) for size in (1, 48)]
    if expected is not None:
        with pytest.raises(EngineError, match=expected):
            opened(bundle, name).predict(batches[1])
        return
    with opened(bundle, name) as peer, TorchEngine(bundle, 1) as torch_engine:
        for batch in batches:
            peer.prepare(batch.batch_size)
            output, reference = peer.predict(batch), torch_engine.predict(batch)
            assert (output.dtype, output.shape) == (np.float32, (batch.batch_size,))
            check(
                compare(output, reference),
                name=name,
                reference="torch",
                tables=peer.table_format,
                mlp=peer.mlp,
                batch=batch.batch_size,
                limit=1e-6,
            )
        assert peer.version
        assert peer.implementations()


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("model", ["one_hot", "dot"])
def test_compiled_peers_score_fixed_and_ragged_bags_of_several_sizes(tmp_path, name, model):
    bundle = make_bundle(model, tmp_path / model)
    with opened(bundle, name) as peer, TorchEngine(bundle, 1) as torch_engine:
        for size, seed in ((4, 0), (4, 1), (9, 2)):
            batch = random_batch(bundle.config, size, np.random.default_rng(seed))
            limit = 1e-6 if peer.mlp == "fp32" else 5e-3
            np.testing.assert_allclose(peer.predict(batch), torch_engine.predict(batch), rtol=0, atol=limit)


def test_empty_bags_at_the_end_of_a_feature_are_scored(tmp_path):
    bundle = make_bundle("dot", tmp_path / "b")
    batch = Batch.from_bags([[0.5] * 3] * 2, [[[1, 2], []], [[], []], [[3], []]])
    with TorchEngine(bundle, 1) as torch_engine:
        reference = torch_engine.predict(batch)
    for name in ("torch-lean", "openvino-fp32"):
        with opened(bundle, name) as peer:
            np.testing.assert_allclose(peer.predict(batch), reference, rtol=0, atol=1e-6)


def test_fbgemm_holds_a_quantised_copy_and_the_others_map_the_file(tmp_path):
    bundle = make_bundle("one_hot", tmp_path / "b")
    with opened(bundle, "torch-lean") as lean:
        assert lean.copied_table_bytes == 0
    with opened(bundle, "fbgemm-int8") as fbgemm:
        rows = sum(part.rows for group in bundle.config.groups for part in group.parts)
        assert fbgemm.copied_table_bytes >= rows * 20


def unlike(change: dict[str, object]) -> ModelConfig:
    return replace(CONFIGS["self"], **change)


@pytest.mark.parametrize(
    ("config", "what"),
    [
        (CONFIGS["parts"], "compositional tables"),
        (CONFIGS["branches"], "interaction projection"),
        (CONFIGS["ids_only"], "first-order terms"),
        (unlike({"dense_transform": "log1p"}), "a dense transform"),
    ],
)
def test_models_that_peers_are_not_written_for_are_refused(tmp_path, config, what):
    bundle = export_bundle(RandomSource(config, 0), tmp_path / "b")
    with pytest.raises(EngineError, match=f"peers are written for plain tables .*: {what}"):
        open_peer(bundle, "torch-lean", threads=1)


def test_a_missing_package_is_named_with_its_remedy(tmp_path, monkeypatch):
    bundle = make_bundle("self", tmp_path / "b")
    monkeypatch.setattr(registry, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"openvino-bf16 needs the package openvino.*dlrm-deploy\[bench\]"):
        open_peer(bundle, "openvino-bf16", threads=1)


def test_a_package_that_does_not_load_here_is_a_reason_not_a_crash(tmp_path, monkeypatch):
    def fail(bundle: Bundle, threads: int) -> None:
        raise OSError("libfbgemm.so: undefined symbol")

    bundle = make_bundle("self", tmp_path / "b")
    monkeypatch.setattr("dlrm_deploy.bench.peers.torch_peers.TorchLeanPeer.__init__", lambda self, *a: fail(*a))
    with pytest.raises(EngineError, match="torch-lean cannot be opened here: libfbgemm.so"):
        open_peer(bundle, "torch-lean", threads=1)


def test_what_a_peer_raises_while_scoring_is_an_engine_error(tmp_path, monkeypatch):
    bundle = make_bundle("self", tmp_path / "b")
    batch = random_batch(bundle.config, 2, np.random.default_rng(0))
    with opened(bundle, "torch-lean") as peer:
        monkeypatch.setattr(torch.nn.functional, "embedding_bag", lambda *a, **k: _raise())
        with pytest.raises(EngineError, match="torch-lean failed on a batch of 2: no kernel"):
            peer.predict(batch)


def _raise() -> None:
    raise RuntimeError("no\n kernel")


def test_every_peer_has_a_class_that_says_the_same_name():
    from importlib import import_module

    for name in PEER_NAMES:
        if missing_peer_package(name) is None:
            place = registry._PEERS[name]
            kind = getattr(import_module(f"dlrm_deploy.bench.peers.{place.module}"), place.kind)
            assert kind.name == name
            assert kind.mlp == ("bf16" if name.endswith("bf16") else "fp32")
