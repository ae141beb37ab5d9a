"""Which project wrote a checkpoint: told right, and a wrong --from answered with the right one."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

sys.path.insert(0, str(Path(__file__).parent))
from bundles import CONFIGS, make_bundle
from facebook_models import FacebookModel, plain
from golden_scores import GOLDEN

from dlrm_deploy.checkpoint import save_checkpoint
from dlrm_deploy.errors import CheckpointError, ConfigError
from dlrm_deploy.export.importers.common import ForeignSource, ImportOptions
from dlrm_deploy.export.importers.detect import KINDS, look, open_source
from dlrm_deploy.export.sources import CheckpointSource
from dlrm_deploy.model.dlrm import DLRM

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

FACEBOOK = FacebookModel(plain(10, 6)).state
TORCHREC = {"sparse_arch.embedding_bag_collection.embedding_bags.t_a.weight": torch.zeros(3, 2)}


def save_ours(path):
    config = CONFIGS["dot"]
    save_checkpoint(path, config=config, tensors=DLRM(config).named_tensors(), optimizer={}, trainer_state={})
    return path


def saved(path, tensors):
    torch.save(tensors, path)
    return path


def kinds(path):
    return list(look(path).kinds)


def test_each_kind_of_checkpoint_is_told_from_what_it_holds(tmp_path):
    assert kinds(save_ours(tmp_path / "ours")) == ["dlrm-deploy"]
    assert kinds(saved(tmp_path / "f.pt", {"state_dict": FACEBOOK})) == ["facebook"]
    assert kinds(saved(tmp_path / "g.pt", FACEBOOK)) == ["facebook"]
    assert kinds(saved(tmp_path / "t.pt", {f"model.{key}": value for key, value in TORCHREC.items()})) == ["torchrec"]
    assert kinds(saved(tmp_path / "u.pt", TORCHREC)) == ["torchrec"]
    (tmp_path / "nvidia").mkdir()
    (tmp_path / "nvidia" / "bottom_model.mlp.pt").touch()
    assert kinds(tmp_path / "nvidia") == ["nvidia"]
    dcp.save(TORCHREC, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert kinds(tmp_path / "dcp") == ["torchrec"]


@pytest.mark.parametrize("project", ["facebook", "torchrec", "nvidia"])
def test_every_golden_checkpoint_is_told_right(project):
    paths = [path for path in (GOLDEN / project).iterdir() if path.suffix != ".npz"]
    # A torch.save file of one process's shards is refused before that.
    found = {path.name: kinds(path) for path in paths if not path.name.startswith("rank-files")}
    assert len(found) > 3
    assert set(map(tuple, found.values())) == {(project,)}, found


def test_our_own_checkpoint_is_opened_as_such(tmp_path):
    path = save_ours(tmp_path / "ours")
    assert isinstance(open_source(path, "auto", ImportOptions()), CheckpointSource)
    assert isinstance(open_source(path, "dlrm-deploy", ImportOptions()), CheckpointSource)
    with pytest.raises(ConfigError, match="--name, --modulo goes with checkpoints of other projects"):
        open_source(path, "auto", ImportOptions(name="other", modulo=3))


def test_a_facebook_model_in_a_folder_is_opened_too(tmp_path):
    dcp.save({"state_dict": FACEBOOK}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    source = open_source(tmp_path / "dcp", "auto", ImportOptions())
    assert isinstance(source, ForeignSource)
    assert [table.rows for table in source.config.tables] == [10, 6]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "facebook"])
def test_a_wrong_from_says_what_it_is(kind):
    message = (
        rf"--from {kind}, but .*plain-dot.pt is a facebookresearch/dlrm checkpoint: it holds .*Use --from facebook,"
    )
    with pytest.raises(CheckpointError, match=message):
        open_source(GOLDEN / "facebook" / "plain-dot.pt", kind, ImportOptions())


def test_a_file_of_two_projects_asks_which(tmp_path):
    path = saved(tmp_path / "m.pt", {"a": FACEBOOK, "b": TORCHREC})
    with pytest.raises(CheckpointError, match="looks like a facebookresearch/dlrm .* and a TorchRec .*Say which one"):
        open_source(path, "auto", ImportOptions())
    with pytest.raises(CheckpointError, match="Use --from facebook or torchrec"):
        open_source(path, "nvidia", ImportOptions())
    assert len(open_source(path, "facebook", ImportOptions()).config.tables) == 2


def test_an_unknown_kind_is_refused():
    with pytest.raises(ConfigError, match="--from must be one of auto, facebook"):
        open_source(GOLDEN / "facebook" / "plain-dot.pt", "hugectr", ImportOptions())


def test_a_file_of_no_project_says_what_it_holds(tmp_path):
    path = saved(tmp_path / "m.pt", {"layer": {"weight": torch.zeros(2)}})
    with pytest.raises(CheckpointError, match=r"a torch.save file with 1 tensors: layer.weight. No tensor of a model"):
        open_source(path, "auto", ImportOptions())


def test_a_path_that_is_not_there_is_said(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        open_source(tmp_path / "nowhere", "auto", ImportOptions())


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "it is empty"),
        (["best", "checkpoints"], "the folder of a run. Give RUN/best"),
        ([".snapshot_metadata", "0"], "written by torchsnapshot"),
        (["__0_0.distcp"], "the save did not finish"),
        (["a.txt", "b.txt"], "it holds a.txt, b.txt. Expected .metadata"),
    ],
)
def test_a_folder_that_is_no_checkpoint_says_what_to_do(names, message, tmp_path):
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=message):
        open_source(tmp_path, "auto", ImportOptions())


def test_a_bundle_is_no_checkpoint(tmp_path):
    bundle = make_bundle("dot", tmp_path / "bundle")
    with pytest.raises(CheckpointError, match="it is a bundle already"):
        open_source(bundle.path, "auto", ImportOptions())


def test_a_checkpoint_of_ours_without_its_config_is_not_taken_for_torchrecs(tmp_path):
    path = save_ours(tmp_path / "ours")
    (path / "model.toml").unlink()
    assert kinds(path) == ["dlrm-deploy"]
    alone = tmp_path / "alone"
    alone.mkdir()
    for file in (".metadata", "__0_0.distcp"):
        shutil.copy(path / file, alone / file)
    assert kinds(alone) == ["torchrec"]
