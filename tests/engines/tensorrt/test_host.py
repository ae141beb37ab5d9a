import numpy as np
import pytest
from plan_models import batch_of, small_model

from dlrm_deploy.engines.tensorrt.host import plan_feeds
from dlrm_deploy.errors import BatchError


def only_feed(*arguments):
    (feed,) = plan_feeds(*arguments)
    return feed


def test_a_feed_holds_what_the_plan_takes_and_ids_in_32_bits():
    config = small_model(weighted=True)
    batch = batch_of(config, [[2, 0], [1, 1], [0, 3], [1, 0]])
    feed = only_feed(batch, config, 5, 8)
    assert {name: (array.dtype.name, array.shape) for name, array in feed.items()} == {
        "dense": ("float32", (2, 3)),
        "indices": ("int32", (8,)),
        "offsets": ("int32", (9,)),
        "weights": ("float32", (8,)),
    }
    np.testing.assert_array_equal(feed["indices"], batch.indices)


def test_fixed_bags_have_no_offsets():
    config = small_model(factors=(1, 1, 1, 1))
    assert set(only_feed(batch_of(config, [[1]] * 4), config, None, 8)) == {"dense", "indices"}


def test_a_batch_without_ids_feeds_one_that_no_bag_owns():
    config = small_model(weighted=True)
    feed = only_feed(batch_of(config, [[0]] * 4), config, 5, 8)
    np.testing.assert_array_equal(feed["indices"], [0])
    np.testing.assert_array_equal(feed["weights"], [0])
    np.testing.assert_array_equal(feed["offsets"], np.zeros(5))


def test_the_first_bag_that_is_too_long_and_the_longest_are_named():
    config = small_model()
    batch = batch_of(config, [[1, 6], [9, 0], [0, 0], [0, 0]])
    with pytest.raises(BatchError, match=r"'f0', sample 1: the bag holds 6 ids.*at most 5.*--max-bag 9"):
        only_feed(batch, config, 5, 8)
    assert len(only_feed(batch, config, 9, 8)["indices"]) == 16


def test_an_id_beyond_32_bits_is_a_bad_id_under_policy_error():
    config = small_model()
    batch = batch_of(config, [[1]] * 4)
    batch.indices[2] = 2**32
    with pytest.raises(BatchError, match=r"feature 'f2', sample 0, position 0 of its bag: id 4294967296 is outside"):
        only_feed(batch, config, 5, 8)


@pytest.mark.parametrize(("policy", "expected"), [("clamp", 2**31 - 1), ("zero", 2**31 - 1), ("modulo", 2**40 % 3)])
def test_an_id_beyond_32_bits_keeps_its_row_under_the_other_policies(policy, expected):
    config = small_model(policy=policy)  # feature f1 reads a table of 3 rows
    batch = batch_of(config, [[1]] * 4)
    batch.indices[1] = 2**40
    assert only_feed(batch, config, 5, 8)["indices"][1] == expected


def test_more_samples_than_the_plan_takes_become_several_feeds_in_order():
    config = small_model(weighted=True)
    batch = batch_of(config, [[2, 0, 1], [1, 1, 0], [0, 3, 0], [1, 0, 0]])
    feeds = list(plan_feeds(batch, config, 5, 2))
    assert [feed["dense"].shape[0] for feed in feeds] == [2, 1]
    np.testing.assert_array_equal(np.concatenate([feed["dense"] for feed in feeds]), batch.dense)
    np.testing.assert_array_equal(feeds[0]["offsets"], [0, 2, 2, 3, 4, 4, 7, 8, 8])
    np.testing.assert_array_equal(feeds[1]["offsets"], [0, 1, 1, 1, 1])
    np.testing.assert_array_equal(feeds[1]["indices"], batch.indices[2:3])
    np.testing.assert_array_equal(feeds[1]["weights"], batch.weights[2:3])


def test_a_large_batch_is_refused_as_a_whole_and_names_its_own_samples():
    config = small_model()
    batch = batch_of(config, [[1, 1, 1]] * 4)
    batch.indices[11] = -1
    with pytest.raises(BatchError, match=r"feature 'f3', sample 2, position 0 of its bag: id -1"):
        plan_feeds(batch, config, 5, 1)
    with pytest.raises(BatchError, match=r"'f0', sample 2: the bag holds 6 ids"):
        plan_feeds(batch_of(config, [[1, 1, 6]] + [[1, 1, 1]] * 3), config, 5, 1)
