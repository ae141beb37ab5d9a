"""The model against a DLRM written in NumPy, for every interaction and every kind of table."""

from dataclasses import replace

import numpy as np
import numpy_model
import pytest
import torch

from dlrm_deploy.batch import Batch
from dlrm_deploy.config import FeatureConfig, ModelConfig
from dlrm_deploy.errors import BatchError, ConfigError
from dlrm_deploy.model.dlrm import DLRM
from dlrm_deploy.model.keys import dense_shapes, table_key
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
SUMMED = tuple(replace(feature, pooling="sum") for feature in DOT.features)


def with_item_table(config=DOT, **kind):
    """The model with an item table of another kind; two features read it, beside the plain table of user."""
    return replace(config, tables=(DOT.tables[0], TableConfig(name="item", rows=7, **{"width": 4, **kind})))


QUOTIENT = {"partition": "quotient-remainder", "part_rows": (2, 4)}
REMAINDERS = {"partition": "chinese-remainder", "part_rows": (3, 4)}
PATH = {**QUOTIENT, "combine": "path", "path_hidden": 3}
NO_DENSE = {"dense_features": (), "bottom_mlp": ()}
CONFIGS = {
    "dot": DOT,
    "dot_self": replace(DOT, self_interaction=True),
    "dot_without_dense": replace(DOT, **NO_DENSE),
    "concat": replace(DOT, interaction="concat"),
    "concat_two_widths": TWO_WIDTHS,
    "concat_without_bottom_mlp": replace(TWO_WIDTHS, bottom_mlp=()),
    "concat_without_dense": replace(TWO_WIDTHS, **NO_DENSE),
    "dcn_two_widths": replace(TWO_WIDTHS, interaction="dcn", cross_layers=2, cross_rank=3),
    "dcn_v1": replace(TWO_WIDTHS, interaction="dcn-v1", cross_layers=2),
    "dcn_v1_without_bottom_mlp": replace(TWO_WIDTHS, interaction="dcn-v1", cross_layers=2, bottom_mlp=(), wide=True),
    "projection": replace(DOT, interaction="projection", branch1=(5, 8), branch2=(12,)),
    "fm": replace(DOT, interaction="fm", bottom_mlp=(), top_mlp=(), wide=True),
    "fm_of_ids": replace(DOT, interaction="fm", top_mlp=(), **NO_DENSE, wide=True),
    "fm_with_both_mlps": replace(DOT, interaction="fm"),
    "wide_weighted": replace(DOT, wide=True, weighted=True, features=SUMMED, dense_transform="log1p"),
    "log1p": replace(DOT, dense_transform="log1p"),
    "log3": replace(DOT, dense_transform="log3", interaction="concat", bottom_mlp=()),
    "weighted": replace(DOT, weighted=True, features=SUMMED),
    "modulo": replace(DOT, features=(*DOT.features[:2], FeatureConfig(name="item", table="item", modulo=3))),
    "hash": with_item_table(partition="hash", part_rows=(3,)),
    "quotient_multiply": with_item_table(**QUOTIENT),
    "quotient_add": with_item_table(**QUOTIENT, combine="add"),
    "quotient_concat": with_item_table(**QUOTIENT, combine="concat"),
    "quotient_weighted": with_item_table(replace(DOT, weighted=True, features=SUMMED), **QUOTIENT),
    "quotient_wide": with_item_table(replace(DOT, wide=True), **QUOTIENT),
    "three_parts": with_item_table(partition="quotient-remainder", part_rows=(2, 2, 2)),
    "three_parts_side_by_side": with_item_table(
        replace(TWO_WIDTHS, interaction="dcn-v1", cross_layers=1),
        partition="quotient-remainder", part_rows=(2, 2, 2), combine="concat", width=6,
    ),
    "remainders_multiply": with_item_table(**REMAINDERS),
    "remainders_add": with_item_table(**REMAINDERS, combine="add"),
    "path": with_item_table(**PATH),
    "path_of_two": with_item_table(**{**PATH, "part_rows": (2, 2, 2)}),
    "path_of_remainders": with_item_table(**{**PATH, **REMAINDERS}),
    "path_weighted_wide": with_item_table(replace(DOT, weighted=True, features=SUMMED, wide=True), **PATH),
    "mixed_dimension": with_item_table(width=3, projection=4),
    "projected_quotient": with_item_table(**QUOTIENT, width=2, projection=4),
    "only_paths": replace(
        DOT,
        tables=tuple(TableConfig(name=name, rows=n, width=4, **PATH) for name, n in (("user", 5), ("item", 7))),
    ),
}  # fmt: skip
"""Every interaction on plain tables, and every kind of table beside a plain one."""

BATCH = Batch.from_bags([[1, 2], [0, -1], [3, 0]], [[[1, 6, 1], [], [0]], [[0], [4], [2]], [[6], [], [3]]])


def batch_for(config):
    weights = np.linspace(-1, 1, BATCH.indices.size, dtype=np.float32) if config.weighted else None
    return replace(BATCH, dense=BATCH.dense[:, : len(config.dense_features)], weights=weights)


@pytest.fixture(params=CONFIGS)
def model(request):
    return random_model(CONFIGS[request.param])


def random_model(config):
    """A model without a weight that is zero, or would not show in a sum."""
    model = DLRM(config, seed=2)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in model.named_tensors().values():
            tensor.add_(torch.empty_like(tensor).uniform_(-0.5, 0.5, generator=generator))
    return model


def numpy_tensors(model):
    return {key: tensor.numpy().copy() for key, tensor in model.named_tensors().items()}


def test_predict_matches_numpy(model):
    batch = batch_for(model.config)
    expected = numpy_model.probabilities(model.config, numpy_tensors(model), batch)
    assert np.ptp(expected) > 1e-3  # not a constant that anything would match
    actual = model.predict(batch)
    assert actual.dtype == np.float32
    # Sums of at most 24 products of size 10, then a sigmoid of slope 1/4: 24 * 10 * 2**-24 * 3 layers / 4 = 1e-5.
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


def test_gradient_is_the_slope_of_the_numpy_model(model):
    batch = batch_for(model.config)
    arrays = (batch.dense, batch.indices, batch.offsets, batch.weights)
    model(*(None if a is None else torch.from_numpy(a) for a in arrays)).sum().backward()
    gradients = DLRM(model.config, [p.grad.to_dense() for p in model.group_weights])
    for key in dense_shapes(model.config):
        gradients.weight(key).data.copy_(model.weight(key).grad)
    tensors, slopes = numpy_tensors(model), numpy_tensors(gradients)
    rng = np.random.default_rng(5)
    step = 1e-7  # in float64, and small enough to meet no kink of a ReLU
    for key, tensor in tensors.items():
        direction = rng.standard_normal(tensor.shape)
        ends = [
            numpy_model.logits(model.config, {**tensors, key: tensor + sign * step * direction}, batch).sum()
            for sign in (1, -1)
        ]
        slope, expected = np.sum(slopes[key] * direction), (ends[0] - ends[1]) / (2 * step)
        scale = 1 + np.abs(slopes[key]).sum()  # float32 sums inside
        assert abs(slope - expected) <= 1e-5 * scale, key


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


@pytest.mark.parametrize("name", ["hash", "three_parts", "remainders_add", "path", "mixed_dimension", "quotient_wide"])
def test_ids_out_of_range_are_treated_before_any_row_is_computed(name):
    bags = [[[1, 9, 1], [], [0]], [[0], [4], [2]], [[-3], [], [3, 70]]]  # items are below 7
    good = {
        "clamp": [[[1, 6, 1], [], [0]], [[0], [4], [2]], [[0], [], [3, 6]]],
        "modulo": [[[1, 2, 1], [], [0]], [[0], [4], [2]], [[4], [], [3, 0]]],
        "zero": [[[1, 1], [], [0]], [[0], [4], [2]], [[], [], [3]]],
    }
    model = random_model(replace(CONFIGS[name], features=SUMMED))
    for policy, replaced in good.items():
        lenient = DLRM(replace(model.config, index_policy=policy))
        lenient.load_state_dict(model.state_dict())
        actual = lenient.predict(Batch.from_bags(BATCH.dense, bags))
        expected = model.predict(Batch.from_bags(BATCH.dense, replaced))
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6, err_msg=policy)
    with pytest.raises(BatchError, match=r"feature 'liked', sample 0, position 1 of its bag: id 9 is outside \[0, 7\)"):
        model.predict(Batch.from_bags(BATCH.dense, bags))


def test_batch_of_another_model_is_refused():
    with pytest.raises(BatchError, match="dense has 3 columns"):
        DLRM(DOT).predict(replace(BATCH, dense=np.zeros((3, 3), np.float32)))


def test_no_samples_give_no_probabilities(model):
    dense = np.zeros((0, len(model.config.dense_features)), np.float32)
    empty = Batch(dense, np.zeros(0, np.int64), np.zeros(1, np.int64))
    weights = np.zeros(0, np.float32) if model.config.weighted else None
    assert model.predict(replace(empty, weights=weights)).shape == (0,)


FIXED = tuple(FeatureConfig(name=n, table=n, pooling_factor=k) for n, k in (("user", 1), ("item", 2)))


@pytest.mark.parametrize("name", ["dot", "quotient_multiply", "path", "mixed_dimension", "quotient_wide"])
def test_fixed_pooling_factors_need_no_offsets(name):
    model = random_model(replace(CONFIGS[name], features=FIXED))
    batch = Batch.from_bags([[1, 2], [0, -1]], [[[0], [4]], [[1, 2], [3, 3]]])
    with torch.inference_mode():
        logits = model(torch.from_numpy(batch.dense), torch.from_numpy(batch.indices))
    np.testing.assert_array_equal(logits.sigmoid().numpy(), model.predict(batch))
    expected = numpy_model.probabilities(model.config, numpy_tensors(model), batch)
    np.testing.assert_allclose(model.predict(batch), expected, rtol=0, atol=1e-5)


# (id, first row exactly, first row as rounded) where c = 8192 and 41. Ids above 2^24 = 16,777,216 are even in float32,
# so the last id before a multiple of c becomes that multiple. The float32 next to 1 / 41 is a little below it.
ROUNDED = [
    ("float32", (4096, 8192), 24_576_000 - 1, 2999, 3000),
    ("float32", (4096, 8192), 2**25 - 1, 4095, 4095),  # 4096 is no row: held at the last one
    ("float32", (3, 41), 41, 1, 1),
    ("float32-reciprocal", (3, 41), 41, 1, 0),
    ("float32-reciprocal", (4096, 8192), 24_576_000 - 1, 2999, 3000),
]


@pytest.mark.parametrize(("division", "part_rows", "item", "exact", "rounded"), ROUNDED)
def test_float32_quotients_read_the_rows_that_such_a_checkpoint_was_trained_with(
    division, part_rows, item, exact, rounded
):
    batch = Batch.from_bags([[1, 2]], [[[item]], [[2]], [[item, item]]])
    first_rows = {}
    for kind in ("exact", division):
        table = TableConfig(
            name="item", rows=min(2**25, part_rows[0] * part_rows[1]), width=4, partition="quotient-remainder",
            part_rows=part_rows, division=kind,
        )  # fmt: skip
        model = DLRM(replace(DOT, tables=(DOT.tables[0], table)))
        model.pool(torch.from_numpy(batch.indices), torch.from_numpy(batch.offsets))[0].sum().backward()
        grad = model.group_weights[0].grad.to_dense()
        (group,) = model.config.groups
        first_rows[kind] = grad[group.rows_of("item.0")].abs().sum(1).nonzero().view(-1).tolist()
        expected = numpy_model.probabilities(model.config, numpy_tensors(model), batch)
        np.testing.assert_allclose(model.predict(batch), expected, rtol=0, atol=1e-5)
    assert first_rows == {"exact": [exact], division: [rounded]}


def test_tables_of_parts_start_as_tables_that_train_well():
    tensors = DLRM(with_item_table(**QUOTIENT), seed=1).named_tensors()
    first, second = (tensors[table_key(f"item.{j}")] for j in (0, 1))
    assert first.abs().max() <= 1 / np.sqrt(2)
    assert (second - 1).abs().max() <= 1 / np.sqrt(4)
    assert (second - 1).abs().max() > 0.25
    added = DLRM(with_item_table(**QUOTIENT, combine="add"), seed=1).named_tensors()[table_key("item.1")]
    assert added.abs().max() <= 1 / np.sqrt(4)
    bank = DLRM(with_item_table(**PATH), seed=1).named_tensors()[table_key("item.1")]
    assert bank.shape == (4, 2 * 3 * 4 + 3 + 4)
    assert not bank[:, 12:15].any()
    assert not bank[:, -4:].any()
    assert bank[:, :12].any(1).all()
    wide = DLRM(replace(DOT, wide=True), seed=1).named_tensors()
    assert not wide[table_key("item.wide")].any()
    assert not wide["wide_arch.bias"].any()


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
