"""Graphs of models whose names are easy to mix up."""

import numpy as np
from bundles import CONFIGS

from dlrm_deploy.config import FeatureConfig, ModelConfig
from dlrm_deploy.data.random import random_batch
from dlrm_deploy.engines.registry import open_engine
from dlrm_deploy.export.bundle import export_bundle
from dlrm_deploy.export.sources import RandomSource
from dlrm_deploy.export.tensorrt_graph import write_tensorrt_model
from dlrm_deploy.tables import TableConfig


def test_names_that_join_to_the_same_text_stay_apart(tmp_path):
    def path_table(name):
        parts = {"partition": "quotient-remainder", "part_rows": (5, 4), "combine": "path", "path_hidden": 3}
        return TableConfig(name=name, rows=20, width=8, **parts)

    config = ModelConfig(
        name="m",
        tables=(path_table("b_c"), path_table("c")),
        features=(FeatureConfig(name="a", table="b_c"), FeatureConfig(name="a_b", table="c")),
        interaction="fm",
    )
    bundle = export_bundle(RandomSource(config), tmp_path / "bundle")
    batch = random_batch(config, 9, np.random.default_rng(0))
    with open_engine(bundle, "torch") as torch, open_engine(bundle, "onnxruntime-stock") as stock:
        np.testing.assert_allclose(stock.predict(batch), torch.predict(batch), rtol=0, atol=1e-6)
    model = write_tensorrt_model(config, bundle.dense_weights(), bundle.map_tables(), max_bag=4)
    outputs = [name for node in model.graph.node for name in node.output]
    assert len(outputs) == len(set(outputs))


def test_a_model_of_plain_tables_needs_no_nodes_to_make_its_vectors(tmp_path):
    import onnx

    bundle = export_bundle(RandomSource(CONFIGS["dot"]), tmp_path / "bundle")
    model = onnx.load(bundle.model_path, load_external_data=False)
    kinds = [node.op_type for node in model.graph.node if node.op_type != "Constant"]
    layers = len(CONFIGS["dot"].bottom_mlp) + len(CONFIGS["dot"].top_mlp)
    assert sorted(set(kinds)) == ["EmbeddingBagDotInteraction", "Gemm", "Relu", "Sigmoid", "Squeeze"]
    assert (kinds.count("Gemm"), kinds.count("EmbeddingBagDotInteraction")) == (layers, 1)
