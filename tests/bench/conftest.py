"""Tiny bundles: one model in the fixed form, and one with ragged bags, two table groups and per-sample weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from dlrm_deploy.bundle import Bundle
from dlrm_deploy.config import FeatureConfig, ModelConfig, TableConfig

FIXED = ModelConfig(
    name="fixed",
    dense_features=("d0", "d1"),
    tables=(TableConfig(name="a", rows=3000, width=4), TableConfig(name="b", rows=5, width=4)),
    features=(
        FeatureConfig(name="a", table="a", pooling_factor=2),
        FeatureConfig(name="b", table="b", pooling_factor=1),
    ),
    bottom_mlp=(8, 4),
    top_mlp=(8, 1),
)
RAGGED = ModelConfig(
    name="ragged",
    dense_features=("d0",),
    tables=(TableConfig(name="a", rows=700, width=4), TableConfig(name="b", rows=300, width=16)),
    features=(
        FeatureConfig(name="a", table="a", max_ids=6),
        FeatureConfig(name="b", table="b", max_ids=3),
        FeatureConfig(name="c", table="b", pooling_factor=1),
    ),
    bottom_mlp=(4,),
    top_mlp=(8, 1),
    interaction="concat",
    weighted=True,
)
CONFIGS = {"fixed": FIXED, "ragged": RAGGED}


@pytest.fixture(scope="session", params=CONFIGS)
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return _export(CONFIGS[request.param], tmp_path_factory.mktemp("bench") / request.param)


@pytest.fixture(scope="session")
def fixed_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return _export(FIXED, tmp_path_factory.mktemp("bench") / "fixed")


def _export(config: ModelConfig, out: Path) -> Bundle:
    from dlrm_deploy.export.bundle import export_bundle
    from dlrm_deploy.export.sources import RandomSource

    return export_bundle(RandomSource(config, seed=1), out)


@pytest.fixture
def configs() -> dict[str, ModelConfig]:
    return CONFIGS
