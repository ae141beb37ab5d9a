from dataclasses import replace

import numpy as np
import pytest
from bundles import CONFIGS

from dlrm_deploy.batch import Batch
from dlrm_deploy.model.rounding import LEAST_LIMIT, derived_limit
from dlrm_deploy.presets import preset


def test_the_limit_grows_with_the_width_of_the_layers():
    assert derived_limit(preset("kaggle")) == LEAST_LIMIT
    assert derived_limit(preset("mlperf-v2")) == pytest.approx(2.07e-6, rel=0.02)
    wide = replace(CONFIGS["dot"], bottom_mlp=(40_000, 8))
    assert derived_limit(wide) == pytest.approx(40_000**0.5 * 2.0**-26, rel=0.01)


def test_a_batchs_longest_bag_counts_where_it_is_longer_than_the_models():
    config = CONFIGS["dot"]

    def limit(length):
        ids = np.zeros(length, np.int64)
        return derived_limit(config, Batch(np.zeros((1, 3), np.float32), ids, np.array([0, 0, length, length])))

    assert limit(0) == limit(5) == derived_limit(config)
    assert limit(90_000) == pytest.approx(300 * 2.0**-26, rel=0.01)
