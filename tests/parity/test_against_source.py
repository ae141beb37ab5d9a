import numpy as np
import pytest
from bundles import CONFIGS, make_bundle

from dlrm_deploy.export.sources import RandomSource
from dlrm_deploy.model.keys import top_keys
from dlrm_deploy.parity.against_source import differences

CONFIG = CONFIGS["dot"]
BIAS = top_keys(CONFIG)[0][1]


class Zero(RandomSource):
    """A source whose first value of each table and of one bias is a zero of the sign given."""

    def __init__(self, zero):
        super().__init__(CONFIG, seed=3)
        self._zero = np.float32(zero)

    def part_chunks(self, part):
        for first, chunk in super().part_chunks(part):
            chunk[0, 0] = self._zero
            yield first, chunk

    def dense(self):
        weights = super().dense()
        weights[BIAS][0] = self._zero
        return weights


class Short(RandomSource):
    """Stops one row early."""

    def part_chunks(self, part):
        return ((first, chunk[:-1]) for first, chunk in super().part_chunks(part))


@pytest.fixture
def bundle(tmp_path):
    return make_bundle("dot", tmp_path / "bundle")


def test_a_bundle_is_what_its_source_holds(bundle):
    assert list(differences(bundle, RandomSource(CONFIG, seed=3))) == []


def test_the_sign_of_a_zero_counts(tmp_path):
    from dlrm_deploy.export.bundle import export_bundle

    bundle = export_bundle(Zero(0.0), tmp_path / "bundle")
    assert list(differences(bundle, Zero(0.0))) == []
    found = list(differences(bundle, Zero(-0.0)))
    assert found[0] == "table t_a: 1 of 11 rows, the first one is row 0"
    assert found[-1] == f"weight {BIAS}: 1 of 16 values"
    assert len(found) == 4


def test_rows_that_the_source_lacks_are_reported(bundle):
    found = list(differences(bundle, Short(CONFIG, seed=3)))
    assert found[0] == "table t_a: the source gives 10 of 11 rows"
    assert len(found) == 3
