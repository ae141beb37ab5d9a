"""Fixtures used across the tree. Also makes `tests/awkward.py` and `tests/bundles.py` importable from every test."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from bundles import CONFIGS, CONVERSIONS, make_bundle, make_converted


@pytest.fixture(scope="session")
def _bundle_folders(tmp_path_factory):
    return {}, tmp_path_factory.mktemp("bundles")


@pytest.fixture(params=CONFIGS)
def any_bundle(request, _bundle_folders):
    """Each model of `bundles.CONFIGS` in turn. Read only: made once."""
    made, folder = _bundle_folders
    if request.param not in made:
        made[request.param] = make_bundle(request.param, folder / request.param)
    return made[request.param]


@pytest.fixture
def bundle(tmp_path):
    """A small bundle of its own for a test that alters it."""
    return make_bundle("dot", tmp_path / "bundle")


@pytest.fixture(
    params=[
        (kind, conversion) for kind in ("dot", "weighted", "one_hot", "parts", "fixed") for conversion in CONVERSIONS
    ],
    ids="-".join,
)
def converted_bundle(request, _bundle_folders):
    """Some models of `bundles.CONFIGS` in each of `bundles.CONVERSIONS`. Read only: made once."""
    made, folder = _bundle_folders
    if request.param not in made:
        place = folder / "-".join(request.param)
        place.mkdir()
        made[request.param] = make_converted(*request.param, place)
    return made[request.param]
