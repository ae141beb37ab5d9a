"""Widths of the dot interaction, forth and back."""

import pytest

from dlrm_deploy.export.importers.layers import dot_width, features_of_dot


def test_the_number_of_features_comes_back_from_the_width():
    for vector in (1, 4, 128):
        widths = {dot_width(features, vector): features for features in range(1, 60)}
        for width in range(vector + 1800):
            assert features_of_dot(width, vector) == widths.get(width), (width, vector)


@pytest.mark.parametrize("features", [94_906_265, 10**9, 2**40 + 1])
def test_numbers_beyond_the_precision_of_floats_are_exact(features):
    assert features_of_dot(dot_width(features, 16), 16) == features
    assert features_of_dot(dot_width(features, 16) + 1, 16) is None
    assert features_of_dot(dot_width(features, 16) - 1, 16) is None
