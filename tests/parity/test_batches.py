from dataclasses import replace

import numpy as np
import pytest
from bundles import CONFIGS

from dlrm_deploy.parity.batches import SAMPLES, awkward_batches, out_of_range_batch


def lengths_of(config, batch):
    return np.diff(batch.offsets).reshape(len(config.features), SAMPLES)


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


def test_awkward_batches_fit_the_model_and_hold_valid_ids(config):
    for name, batch in awkward_batches(config, np.random.default_rng(0)).items():
        batch.check_fits(config)
        assert batch.explain_bad_ids(config) is None, name


def test_bags_are_what_their_names_say():
    config = CONFIGS["dot"]
    batches = awkward_batches(config, np.random.default_rng(0))
    lengths = {name: lengths_of(config, batch) for name, batch in batches.items()}
    assert (lengths["all bags empty"] == 0).all()
    assert (lengths["one id per bag"] == 1).all()
    assert (lengths["longest bags"] == 5).all()
    assert (lengths["bags of 300 ids"][:, 1] == 300).all()
    assert (lengths["uneven bags"][:, 0] == 0).all()
    assert (lengths["uneven bags"][:, -1] == 5).all()
    repeated = batches["one id repeated"]
    assert all(np.unique(bag).size == 1 for bag in np.split(repeated.indices, repeated.offsets[1:-1]))
    edges = batches["first and last rows"].indices.reshape(len(config.features), -1)
    assert [set(ids) for ids in edges.tolist()] == [{0, rows - 1} for rows in config.feature_rows]


def test_bags_hold_several_ids_also_where_the_model_does_not_say_how_many():
    config = replace(CONFIGS["dot"], features=tuple(replace(f, max_ids=None) for f in CONFIGS["dot"].features))
    batches = awkward_batches(config, np.random.default_rng(0))
    assert lengths_of(config, batches["longest bags"]).min() == 8
    assert len(set(lengths_of(config, batches["uneven bags"]).reshape(-1))) > 3


def test_no_bag_is_longer_than_a_plan_takes():
    batches = awkward_batches(CONFIGS["dot"], np.random.default_rng(0), most_ids=3)
    assert max(lengths_of(CONFIGS["dot"], batch).max() for batch in batches.values()) == 3


def test_a_model_with_fixed_bags_gets_no_other_bags():
    names = set(awkward_batches(CONFIGS["fixed"], np.random.default_rng(0)))
    assert names == {"longest bags", "one id repeated", "first and last rows"}


def test_out_of_range_ids_go_beyond_32_bits_where_ids_are_int64(config):
    wide = out_of_range_batch(config, np.random.default_rng(0), np.int64)
    narrow = out_of_range_batch(config, np.random.default_rng(0), np.int32)
    assert narrow.indices.max() == 2**31 - 1
    assert wide.indices.max() == (2**32 - 1 if len(config.features) > 1 else 2**31 - 1)


def test_out_of_range_ids_lie_on_both_sides_of_every_table_and_fit_32_bits(config):
    batch = out_of_range_batch(config, np.random.default_rng(0), np.int32)
    batch.check_fits(config)
    bounds = batch.offsets[::SAMPLES]
    for f, rows in enumerate(config.feature_rows):
        ids = batch.indices[bounds[f] : bounds[f + 1]]
        assert ids.min() < 0, f
        assert ids.max() >= rows, f
    assert batch.indices.min() == np.iinfo(np.int32).min
    assert batch.indices.max() == np.iinfo(np.int32).max
