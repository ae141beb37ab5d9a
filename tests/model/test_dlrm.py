"""The model against a DLRM written in NumPy over the reference operators, for every interaction."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from dlrm_deploy.batch import Batch
from dlrm_deploy.config import FeatureConfig, ModelConfig
from dlrm_deploy.errors import BatchError, ConfigError
from dlrm_deploy.model.dlrm import DLRM
from dlrm_deploy.model.keys import dense_shapes, table_key
from dlrm_deploy.ops import reference
from dlrm_deploy.tables import TableConfig

DOT = ModelConfig(
    name="tiny",
    dense_features=("age", "hour"),
    tables=(TableConfig(name="user", rows=5, width=4), TableConfig(name="item", rows=7, width=4)),
    features=(
        FeatureConfig(name="liked", table="item", pooling="mean"),
        FeatureConfig(name="user", table="user"),
        FeatureConfig(name="item", table="item"),
    ),
    bottom_mlp=(6, 4),
    top_mlp=(8, 5, 1),
)
TWO_WIDTHS = replace(
    DOT,
    interaction="concat",
    tables=(TableConfig(name="user", rows=5, width=3), TableConfig(name="item", rows=7, width=4)),
)
CONFIGS = {
    "dot": DOT,
    "dot_self": replace(DOT, self_interaction=True),
    "concat": replace(DOT, interaction="concat"),
    "concat_two_widths": TWO_WIDTHS,
    "dcn_two_widths": replace(TWO_WIDTHS, interaction="dcn", cross_layers=2, cross_rank=3),
    "weighted": replace(
        DOT, weighted=True, features=tuple(FeatureConfig(name=f.name, table=f.table) for f in DOT.features)
    ),
}
BATCH = Batch.from_bags([[1, 2], [0, -1], [3, 0]], [[[1, 6, 1], [], [0]], [[0], [4], [2]], [[6], [], [3]]])


def batch_for(config):
    weights = np.linspace(-1, 1, BATCH.indices.size, dtype=np.float32)
    return replace(BATCH, weights=weights) if config.weighted else BATCH


def score_in_numpy(config, tensors, batch):
    """Probabilities from checkpoint tensors, one table and one feature at a time."""

    def mlp(x, prefix, layers, relu):
        for i in range(layers):
            key = prefix.format(i)
            x = x @ tensors[key + ".weight"].T + tensors[key + ".bias"]
            x = np.maximum(x, 0) if relu else x
        return x

    vectors = []
    for f, feature in enumerate(config.features):
        table = tensors[table_key(feature.table)]
        pooled = reference.table_batched_embedding_bag(
            table,
            batch.indices,
            batch.offsets,
            num_features=len(config.features),
            features=[f],
            row_starts=[0],
            rows=[len(table)],
            mean=[int(feature.pooling == "mean")],
            per_sample_weights=batch.weights,
        )
        vectors.append(pooled[:, 0])
    x = mlp(batch.dense, "dense_arch.model._mlp.{}._linear", len(config.bottom_mlp), relu=True)
    if config.interaction == "dot":
        x = reference.dot_interaction(x, np.stack(vectors, axis=1), self_interaction=config.self_interaction)
    else:
        x = np.concatenate([x, *vectors], axis=1)
    first = x
    for i in range(config.cross_layers):
        v, w, b = (tensors[f"inter_arch.crossnet.{name}.{i}"] for name in ("V_kernels", "W_kernels", "bias"))
        x = first * (x @ v.T @ w.T + b) + x
    x = mlp(x, "over_arch.model.0._mlp.{}._linear", len(config.top_mlp) - 1, relu=True)
    return 1 / (1 + np.exp(-mlp(x, "over_arch.model.1", 1, relu=False)[:, 0]))


@pytest.fixture(params=CONFIGS)
def model(request):
    model = DLRM(CONFIGS[request.param], seed=2)
    with torch.no_grad():
        for key, tensor in model.named_tensors().items():
            if "crossnet.bias" in key:
                tensor.copy_(torch.linspace(-1, 1, len(tensor)))  # zero at the start, so it would not show
    return model


def test_predict_matches_numpy(model):
    tensors = {key: tensor.numpy() for key, tensor in model.named_tensors().items()}
    batch = batch_for(model.config)
    expected = score_in_numpy(model.config, tensors, batch)
    assert np.ptp(expected) > 1e-3  # not a constant that anything would match
    actual = model.predict(batch)
    assert actual.dtype == np.float32
    # Sums of at most 24 products of size 10, then a sigmoid of slope 1/4: 24 * 10 * 2**-24 * 3 layers / 4 = 1e-5.
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


def test_training_forward_equals_inference_and_reaches_every_weight(model):
    batch = batch_for(model.config)
    tensors = [None if a is None else torch.from_numpy(a) for a in (batch.dense, batch.indices, batch.offsets)]
    weights = None if batch.weights is None else torch.from_numpy(batch.weights)
    logits = model(*tensors, weights)
    np.testing.assert_array_equal(logits.sigmoid().detach().numpy(), model.predict(batch))
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert all(parameter.grad.is_sparse for parameter in model.group_weights)


def test_named_tensors_are_views_that_cover_every_parameter(model):
    tensors = model.named_tensors()
    assert {k: tuple(v.shape) for k, v in tensors.items() if "embedding_bags" not in k} == dense_shapes(model.config)
    with torch.no_grad():
        for tensor in tensors.values():
            tensor.fill_(7)
    assert all(bool((parameter == 7).all()) for parameter in model.parameters())


def test_weights_follow_from_the_seed():
    one, same, other = (DLRM(DOT, seed=seed).named_tensors() for seed in (1, 1, 2))
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not any(torch.equal(one[key], other[key]) for key in one)
    bound = 1 / np.sqrt(7)
    item = one[table_key("item")]
    assert item.abs().max() <= bound
    assert item.abs().max() > bound / 2


def test_given_tables_are_used_without_a_copy():
    matrix = torch.rand(12, 4)
    model = DLRM(DOT, group_weights=[matrix])
    assert model.named_tensors()[table_key("user")].data_ptr() == matrix.data_ptr()
    with pytest.raises(ConfigError, match=r"group_weights must be \[\(\(12, 4\), torch.float32\)\], got \[\(\(11, 4\)"):
        DLRM(DOT, group_weights=[matrix[1:]])


def test_bad_id_is_named_by_feature():
    model = DLRM(DOT)
    bad = replace(BATCH, indices=np.where(BATCH.indices == 4, 5, BATCH.indices))
    with pytest.raises(BatchError, match=r"feature 'user', sample 1, position 0 of its bag: id 5 is outside \[0, 5\)"):
        model.predict(bad)
    assert np.isfinite(DLRM(replace(DOT, index_policy="modulo")).predict(bad)).all()


def test_batch_of_another_model_is_refused():
    with pytest.raises(BatchError, match="dense has 3 columns"):
        DLRM(DOT).predict(replace(BATCH, dense=np.zeros((3, 3), np.float32)))


def test_no_samples_give_no_probabilities(model):
    empty = Batch(np.zeros((0, 2), np.float32), np.zeros(0, np.int64), np.zeros(1, np.int64))
    weights = np.zeros(0, np.float32) if model.config.weighted else None
    assert model.predict(replace(empty, weights=weights)).shape == (0,)


def test_fixed_pooling_factors_need_no_offsets():
    features = tuple(FeatureConfig(name=n, table=n, pooling_factor=k) for n, k in (("user", 1), ("item", 2)))
    model = DLRM(replace(DOT, features=features))
    batch = Batch.from_bags([[1, 2], [0, -1]], [[[0], [4]], [[1, 2], [3, 3]]])
    with torch.inference_mode():
        logits = model(torch.from_numpy(batch.dense), torch.from_numpy(batch.indices))
    np.testing.assert_array_equal(logits.sigmoid().numpy(), model.predict(batch))


def test_export_keeps_each_operator_as_one_node_for_any_batch():
    model = DLRM(DOT).eval()
    example = [torch.from_numpy(a) for a in (BATCH.dense, BATCH.indices, BATCH.offsets)]
    batch, ids = torch.export.Dim("batch"), torch.export.Dim("ids")
    shapes = {"dense": {0: batch}, "indices": {0: ids}, "offsets": {0: 3 * batch + 1}, "weights": None}
    with torch.no_grad():
        program = torch.export.export(model, (*example, None), dynamic_shapes=shapes)
    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count("dlrm_deploy.table_batched_embedding_bag.default") == 1
    assert targets.count("dlrm_deploy.dot_interaction.default") == 1
    assert not [target for target in targets if "embedding_bag" in target and "dlrm_deploy" not in target]
    larger = Batch.from_bags(np.ones((5, 2)), [[[1], [], [0], [3, 3], []], [[0]] * 5, [[6]] * 5])
    logits = program.module()(*(torch.from_numpy(a) for a in (larger.dense, larger.indices, larger.offsets)), None)
    np.testing.assert_allclose(logits.sigmoid().detach().numpy(), model.predict(larger), rtol=0, atol=1e-7)
