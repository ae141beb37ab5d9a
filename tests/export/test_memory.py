"""Peak memory of an export, measured in a process of its own: tables pass through, they are never held twice."""

import subprocess
import sys

import pytest
from peak_memory import PEAK

from dlrm_deploy.checkpoint import Checkpoint, save_checkpoint
from dlrm_deploy.config import ModelConfig
from dlrm_deploy.export.bundle import export_bundle
from dlrm_deploy.export.sources import RandomSource
from dlrm_deploy.model.dlrm import DLRM
from dlrm_deploy.tables import TableConfig

ROWS, WIDTH = 4_000_000, 16
TABLE_BYTES = ROWS * WIDTH * 4  # 256 MB, one group

EXPORT = f"""{PEAK}
import sys
import numpy, onnx, torch
import dlrm_deploy.engines.torch_eager
from dlrm_deploy.checkpoint import Checkpoint
from dlrm_deploy.export.bundle import export_bundle
from dlrm_deploy.export.sources import CheckpointSource, RandomSource

source = CheckpointSource(Checkpoint.open(Path(sys.argv[1])))
if sys.argv[3] == "random":
    source = RandomSource(source.config)
before = peak()
export_bundle(source, Path(sys.argv[2]))
print(peak() - before)
"""


CONVERT = f"""{PEAK}
import sys
import numpy, onnx, torch
import dlrm_deploy.engines.torch_eager
from dlrm_deploy.bundle import Bundle
from dlrm_deploy.export.convert import convert_bundle

fp32 = Bundle.open(sys.argv[1])
before = peak()
convert_bundle(fp32, Path(sys.argv[2]), tables="int8", mlp="bf16")
print(peak() - before)
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    config = ModelConfig.from_dict(
        {
            "name": "large",
            "dense_features": ["d"],
            "bottom_mlp": [WIDTH],
            "top_mlp": [1],
            "tables": [{"name": "t", "rows": ROWS, "width": WIDTH}],
        }
    )
    assert config.tables == (TableConfig(name="t", rows=ROWS, width=WIDTH),)
    path = tmp_path_factory.mktemp("memory") / "checkpoint"
    save_checkpoint(path, config=config, tensors=DLRM(config).named_tensors(), optimizer={}, trainer_state={})
    return path


@pytest.mark.parametrize("source", ["checkpoint", "random"])
def test_an_export_stays_below_the_size_of_its_largest_table_group_and_a_third(checkpoint, tmp_path, source):
    arguments = [str(checkpoint), str(tmp_path / "bundle"), source]
    result = subprocess.run([sys.executable, "-c", EXPORT, *arguments], capture_output=True, text=True, check=True)
    assert (tmp_path / "bundle" / "tables" / "width16.bin").stat().st_size == TABLE_BYTES
    assert 0 < int(result.stdout) < 1.3 * TABLE_BYTES


def test_a_conversion_never_holds_the_fp32_tables(checkpoint, tmp_path):
    export_bundle(RandomSource(Checkpoint.open(checkpoint).config), tmp_path / "fp32")
    arguments = [str(tmp_path / "fp32"), str(tmp_path / "int8")]
    result = subprocess.run([sys.executable, "-c", CONVERT, *arguments], capture_output=True, text=True, check=True)
    assert (tmp_path / "int8" / "tables" / "width16.int8.bin").stat().st_size == ROWS * (WIDTH + 4)
    assert 0 < int(result.stdout) < 0.6 * TABLE_BYTES
