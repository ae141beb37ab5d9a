"""Inner tensors of the graph, as the ONNX Runtime engines show them."""

import sys
from dataclasses import fields

import numpy as np
import pytest
from bundles import make_bundle

from dlrm_deploy.data.random import random_batch
from dlrm_deploy.engines.registry import open_engine
from dlrm_deploy.errors import MissingDependencyError
from dlrm_deploy.model.stage_names import INTERACTIONS, LOGITS, PROBABILITIES, pooled_name
from dlrm_deploy.ops.contract import BagAttributes
from dlrm_deploy.ops.reference import dot_interaction, table_batched_embedding_bag

ENGINES = ["onnxruntime-stock", "onnxruntime"]


def pooled_bags(bundle, batch):
    """By name, what the operator's reference gives for each table group."""
    pooled = {}
    for group, matrices in zip(bundle.config.groups, bundle.map_groups(), strict=True):
        if group.slots:
            attributes = BagAttributes.of(bundle.config, group, bundle.manifest.table_formats)
            offsets = batch.offsets if attributes.pooling_factors is None else None
            keywords = {field.name: getattr(attributes, field.name) for field in fields(attributes)}
            del keywords["weighted"]
            pooled[pooled_name(group.name)] = table_batched_embedding_bag(
                matrices, batch.indices, offsets, per_sample_weights=batch.weights, **keywords
            )
    return pooled


@pytest.mark.parametrize("engine", ENGINES)
def test_pooled_bags_are_those_of_the_reference_in_every_form(any_bundle, engine):
    batch = random_batch(any_bundle.config, 9, np.random.default_rng(0))
    expected = pooled_bags(any_bundle, batch)
    with open_engine(any_bundle, engine, threads=1) as opened:
        shown = opened.stage_outputs(batch, list(expected))
    assert set(shown) == set(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(shown[name], values, rtol=1e-6, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("engine", ENGINES)
def test_pooled_bags_of_a_converted_bundle_are_those_of_the_reference(converted_bundle, engine):
    batch = random_batch(converted_bundle.config, 9, np.random.default_rng(0))
    expected = pooled_bags(converted_bundle, batch)
    with open_engine(converted_bundle, engine, threads=1) as opened:
        shown = opened.stage_outputs(batch, list(expected))
    for name, values in expected.items():
        np.testing.assert_allclose(shown[name], values, rtol=1e-6, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_fused_node_shows_its_pooled_bags_beside_its_interactions_or_either_alone(bundle, engine):
    assert "EmbeddingBagDotInteraction" in bundle.manifest.operators
    batch = random_batch(bundle.config, 9, np.random.default_rng(0))
    (pooled,) = (pooled_name(group.name) for group in bundle.config.groups)
    with open_engine(bundle, engine, threads=1) as opened:
        both = opened.stage_outputs(batch, ["bottom_1", pooled, INTERACTIONS])
        alone = {name: opened.stage_outputs(batch, [name])[name] for name in (pooled, INTERACTIONS)}
    expected = dot_interaction(both["bottom_1"], both[pooled])
    np.testing.assert_allclose(both[INTERACTIONS], expected, rtol=0, atol=1e-6)
    for name, values in alone.items():
        np.testing.assert_array_equal(values, both[name])


@pytest.mark.parametrize("engine", ENGINES)
def test_names_that_the_graph_lacks_are_left_out_and_the_rest_is_in_line_with_the_scores(any_bundle, engine):
    batch = any_bundle.golden().batch
    with open_engine(any_bundle, engine, threads=1) as opened:
        assert opened.stage_outputs(batch, ["nothing"]) == {}
        shown = opened.stage_outputs(batch, [PROBABILITIES, "nothing", LOGITS])
    np.testing.assert_allclose(shown[PROBABILITIES], any_bundle.golden().probabilities, rtol=0, atol=1e-6)
    np.testing.assert_allclose(1 / (1 + np.exp(-shown[LOGITS][:, 0])), shown[PROBABILITIES], rtol=0, atol=1e-6)


def test_without_onnx_it_is_said_what_to_install(tmp_path, monkeypatch):
    bundle = make_bundle("dot", tmp_path / "bundle")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with (
        open_engine(bundle, "onnxruntime") as engine,
        pytest.raises(MissingDependencyError, match=r"needs the package onnx.*pip install 'dlrm-deploy\[export\]'"),
    ):
        engine.stage_outputs(bundle.golden().batch, [LOGITS])
