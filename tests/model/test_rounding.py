from dataclasses import replace

import pytest
from bundles import CONFIGS

from dlrm_deploy.model.rounding import LEAST_LIMIT, derived_limit
from dlrm_deploy.presets import preset


def test_the_limit_grows_with_the_width_of_the_layers():
    assert derived_limit(preset("kaggle")) == LEAST_LIMIT
    assert derived_limit(preset("mlperf-v2")) == pytest.approx(2.07e-6, rel=0.02)
    wide = replace(CONFIGS["dot"], bottom_mlp=(40_000, 8))
    assert derived_limit(wide) == pytest.approx(40_000**0.5 * 2.0**-26, rel=0.01)
