from __future__ import annotations

from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from dlrm_deploy.bench.inputs import Inputs
from dlrm_deploy.bench.isolate import IsolatedSubject, Job
from dlrm_deploy.bench.peers.registry import missing_peer_package
from dlrm_deploy.bench.subject import Options
from dlrm_deploy.config import FeatureConfig, ModelConfig
from dlrm_deploy.engines.table_memory import huge_pages_missing
from dlrm_deploy.export.bundle import export_bundle
from dlrm_deploy.export.sources import RandomSource
from dlrm_deploy.tables import TableConfig

ROWS, WIDTH = 100_000, 64


@pytest.mark.skipif(huge_pages_missing() is not None, reason=str(huge_pages_missing()))
@pytest.mark.skipif(missing_peer_package("fbgemm-int8") is not None, reason=str(missing_peer_package("fbgemm-int8")))
def test_tables_that_fbgemm_copies_lie_in_huge_pages_as_ours_may(tmp_path):
    config = ModelConfig(
        name="large",
        dense_features=("d",),
        tables=(TableConfig(name="t", rows=ROWS, width=WIDTH),),
        features=(FeatureConfig(name="f", table="t", pooling_factor=2),),
        bottom_mlp=(WIDTH,),
        top_mlp=(4, 1),
    )
    bundle = export_bundle(RandomSource(config, seed=1), tmp_path / "bundle")
    job = Job(
        bundle=bundle.path,
        engine="fbgemm-int8",
        options=Options(threads=1),
        inputs=partial(Inputs, config, 0, distribution="uniform", index_dtype=bundle.manifest.index_dtype, trace=None),
        slice_ms=1.0,
    )
    with closing(IsolatedSubject(job)) as subject:
        lines = Path(f"/proc/{subject.process}/smaps_rollup").read_text().splitlines()
    huge = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("AnonHugePages:"))
    assert huge > ROWS * (WIDTH + 4) / 2
