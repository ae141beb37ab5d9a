"""Checkpoints: what is written comes back; shards are put together; damage and malice are refused."""

import json
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from dlrm_deploy import checkpoint as module
from dlrm_deploy.batch import Batch
from dlrm_deploy.bundle import Golden
from dlrm_deploy.checkpoint import MODEL_PREFIX, Checkpoint, save_checkpoint
from dlrm_deploy.config import ModelConfig, TableConfig
from dlrm_deploy.errors import CheckpointError, OutputError
from dlrm_deploy.model.dlrm import DLRM
from dlrm_deploy.model.keys import table_key

CONFIG = ModelConfig.from_dict(
    {
        "name": "tiny",
        "dense_features": ["age"],
        "tables": [{"name": "user", "rows": 50, "width": 4}, {"name": "item", "rows": 7, "width": 4}],
        "bottom_mlp": [4],
        "top_mlp": [3, 1],
    }
)
USER = MODEL_PREFIX + table_key("user")
STATE = f"fused.state.{table_key('user')}.user.momentum1"
BATCH = Batch.from_bags([[1], [2]], [[[0], [1, 2]], [[3], []]])


@pytest.fixture
def model():
    return DLRM(CONFIG, seed=5)


@pytest.fixture
def saved(model, tmp_path):
    save_checkpoint(
        tmp_path / "step-3",
        config=CONFIG,
        tensors=model.named_tensors(),
        optimizer={STATE: torch.arange(50.0)},
        trainer_state={"step": 3},
        golden=Golden(BATCH, model.predict(BATCH)),
    )
    return tmp_path / "step-3"


def write_dcp(folder, state, config=CONFIG):
    dcp.save(state, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    (folder / "model.toml").write_text(config.to_toml())


def test_what_was_saved_comes_back(saved, model):
    opened = Checkpoint.open(saved)
    assert opened.config == CONFIG
    assert set(opened.keys()) == {MODEL_PREFIX + name for name in model.named_tensors()} | {STATE}
    for name, tensor in model.named_tensors().items():
        np.testing.assert_array_equal(opened.read(MODEL_PREFIX + name), tensor.numpy())
    assert opened.shape(STATE) == (50,)
    assert opened.trainer_state() == {"step": 3}
    golden = opened.golden()
    np.testing.assert_array_equal(golden.probabilities, model.predict(golden.batch))


def test_plain_torch_reads_it_too(saved, model):
    loaded = torch.zeros(50, 4)
    dcp.load({USER: loaded}, checkpoint_id=saved, no_dist=True)
    assert torch.equal(loaded, model.named_tensors()[table_key("user")])


def test_load_into_fills_tensors_in_place(saved, model):
    other = DLRM(CONFIG, seed=6)
    state = torch.zeros(50)
    tensors = {MODEL_PREFIX + name: tensor for name, tensor in other.named_tensors().items()}
    Checkpoint.open(saved).load_into({**tensors, STATE: state})
    np.testing.assert_array_equal(other.predict(BATCH), model.predict(BATCH))
    assert state.tolist() == list(range(50))
    with pytest.raises(CheckpointError, match=r"momentum1 is \[50\], but the model needs \[51\]"):
        Checkpoint.open(saved).load_into({STATE: torch.zeros(51)})


def test_existing_folder_is_kept(saved, model):
    with pytest.raises(OutputError, match="exists already"):
        save_checkpoint(saved, config=CONFIG, tensors={}, optimizer={}, trainer_state={})
    Checkpoint.open(saved)


def test_failed_save_leaves_nothing(tmp_path, model, monkeypatch):
    monkeypatch.setattr(module.json, "dumps", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_checkpoint(tmp_path / "x", config=CONFIG, tensors=model.named_tensors(), optimizer={}, trainer_state={})
    assert list(tmp_path.iterdir()) == []


def sharded(tmp_path, model, boxes):
    """A checkpoint whose user table is stored in boxes, as several processes would."""
    table = model.named_tensors()[table_key("user")]
    folder = tmp_path / "sharded"
    state = {MODEL_PREFIX + name: tensor for name, tensor in model.named_tensors().items()}
    del state[USER]
    parts = {f"part{i}": table[a : a + m, c : c + n].clone() for i, (a, m, c, n) in enumerate(boxes)}
    write_dcp(folder, state | parts)
    # Rewrite torch's metadata so that the parts are chunks of one tensor.
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    chunks = []
    for i, (a, m, c, n) in enumerate(boxes):
        entry = metadata.state_dict_metadata.pop(f"part{i}")
        index = next(key for key in metadata.storage_data if key.fqn == f"part{i}")
        info = metadata.storage_data.pop(index)
        chunk = dcp.metadata.ChunkStorageMetadata(torch.Size([a, c]), torch.Size([m, n]))
        metadata.storage_data[dcp.metadata.MetadataIndex(USER, chunk.offsets, i)] = info
        chunks.append(chunk)
    metadata.state_dict_metadata[USER] = dcp.metadata.TensorStorageMetadata(entry.properties, table.shape, chunks)
    path.write_bytes(pickle.dumps(metadata))
    return folder, table


@pytest.mark.parametrize(
    ("boxes", "first_rows"),
    [
        ([(20, 30, 0, 4), (0, 20, 0, 4)], [0, 20]),
        ([(0, 50, 0, 1), (0, 50, 1, 3)], [0]),
        ([(0, 10, 0, 2), (10, 40, 0, 2), (0, 10, 2, 2), (10, 40, 2, 2)], [0, 10]),
    ],
    ids=["rows", "columns", "grid"],
)
def test_shards_of_several_processes_are_put_together(tmp_path, model, boxes, first_rows):
    folder, table = sharded(tmp_path, model, boxes)
    opened = Checkpoint.open(folder)
    np.testing.assert_array_equal(opened.read(USER), table)
    blocks = list(opened.chunks(USER))
    assert [first for first, _ in blocks] == first_rows
    np.testing.assert_array_equal(np.concatenate([block for _, block in blocks]), table)
    loaded = torch.zeros(50, 4)
    opened.load_into({USER: loaded})
    assert torch.equal(loaded, table)
    assert opened.golden() is None


def test_shards_that_form_no_rows_are_refused_as_blocks_only(tmp_path, model):
    folder, table = sharded(tmp_path, model, [(0, 50, 0, 2), (0, 20, 2, 2), (20, 30, 2, 2)])
    np.testing.assert_array_equal(Checkpoint.open(folder).read(USER), table)
    with pytest.raises(CheckpointError, match="do not form blocks of rows"):
        list(Checkpoint.open(folder).chunks(USER))


def test_missing_shard_is_refused(tmp_path, model):
    folder, _ = sharded(tmp_path, model, [(0, 20, 0, 4), (30, 20, 0, 4)])
    with pytest.raises(CheckpointError, match="chunks of model.sparse_arch.*user.weight are missing"):
        Checkpoint.open(folder)


def test_missing_and_misshaped_tables_are_named(tmp_path, model):
    tensors = {MODEL_PREFIX + name: tensor for name, tensor in model.named_tensors().items()}
    write_dcp(tmp_path / "without", {key: tensor for key, tensor in tensors.items() if key != USER})
    with pytest.raises(CheckpointError, match="holds no tensor model.sparse_arch.*user.weight"):
        Checkpoint.open(tmp_path / "without")
    tables = (TableConfig(name="user", rows=51, width=4), CONFIG.tables[1])
    write_dcp(tmp_path / "other", tensors, replace(CONFIG, tables=tables))
    with pytest.raises(CheckpointError, match=r"user.weight is \[50, 4\], but the model needs \[51, 4\]"):
        Checkpoint.open(tmp_path / "other")
    write_dcp(tmp_path / "half", {**tensors, USER: tensors[USER].half()})
    with pytest.raises(CheckpointError, match=r"user.weight is float16, expected float32"):
        Checkpoint.open(tmp_path / "half")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused_where_they_are_read(tmp_path, model, bad):
    model.named_tensors()[table_key("user")][7, 1] = bad
    save_checkpoint(tmp_path / "x", config=CONFIG, tensors=model.named_tensors(), optimizer={}, trainer_state={})
    opened = Checkpoint.open(tmp_path / "x")
    opened.read(MODEL_PREFIX + table_key("item"))
    with pytest.raises(CheckpointError, match="user.weight holds NaN or infinite values"):
        opened.read(USER)


@pytest.mark.parametrize("name", [".metadata", "model.toml"])
def test_folder_without_its_files_is_no_checkpoint(saved, name):
    (saved / name).unlink()
    with pytest.raises(CheckpointError, match=f"is not a checkpoint of dlrm-deploy: it holds no {name}"):
        Checkpoint.open(saved)


def data_file(folder):
    (file,) = folder.glob("*.distcp")
    return file


def test_truncated_data_is_named(saved):
    file = data_file(saved)
    file.write_bytes(file.read_bytes()[:200])
    opened = Checkpoint.open(saved)
    with pytest.raises(CheckpointError, match=r"\.distcp is truncated: .* the file at 200"):
        opened.read(USER)


def test_overwritten_data_is_refused(saved):
    file = data_file(saved)
    file.write_bytes(b"\0" * file.stat().st_size)
    with pytest.raises(CheckpointError, match=r"is damaged where model\..*user.weight is stored"):
        Checkpoint.open(saved).read(USER)


def test_missing_data_file_is_named(saved):
    data_file(saved).unlink()
    with pytest.raises(CheckpointError, match="cannot read model.*No such file"):
        Checkpoint.open(saved).read(USER)


@pytest.mark.parametrize("length", [0, 10, 300])
def test_truncated_metadata_is_refused(saved, length):
    (saved / ".metadata").write_bytes((saved / ".metadata").read_bytes()[:length])
    with pytest.raises(CheckpointError, match=r"\.metadata is damaged or was not written by"):
        Checkpoint.open(saved)


class Malice:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return open, (str(self.target), "w")


@pytest.mark.parametrize("place", ["alone", "inside"])
def test_malicious_metadata_runs_no_code(saved, tmp_path, place):
    target = tmp_path / "owned"
    path = saved / ".metadata"
    payload = Malice(target)
    if place == "inside":
        metadata = pickle.loads(path.read_bytes())
        metadata.planner_data = payload
        payload = metadata
    path.write_bytes(pickle.dumps(payload))
    with pytest.raises(CheckpointError, match="it names .*open, which no checkpoint needs"):
        Checkpoint.open(saved)
    assert not target.exists()
    pickle.loads(path.read_bytes())  # the attack works where pickles are trusted
    assert target.exists()


def test_malicious_tensor_runs_no_code(saved, tmp_path):
    target = tmp_path / "owned"
    torch.save(Malice(target), data_file(saved))
    size = data_file(saved).stat().st_size
    metadata = pickle.loads((saved / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.offset, info.length = 0, size
    (saved / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="is damaged where"):
        Checkpoint.open(saved).read(USER)
    assert not target.exists()


def test_metadata_may_not_lead_out_of_the_folder(saved, tmp_path):
    shutil.copy(data_file(saved), tmp_path / "elsewhere")
    metadata = pickle.loads((saved / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = "../elsewhere"
    (saved / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="makes no sense"):
        Checkpoint.open(saved)


def test_damaged_small_files_are_named(saved):
    opened = Checkpoint.open(saved)
    (saved / "trainer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"cannot read trainer.json"):
        opened.trainer_state()
    (saved / "golden.npz").write_bytes(b"PK")
    with pytest.raises(CheckpointError, match=r"golden.npz"):
        opened.golden()
    (saved / "model.toml").write_text(json.dumps({"name": 1}))
    with pytest.raises(CheckpointError, match=r"is damaged: .*model.toml"):
        Checkpoint.open(saved)


def test_reading_a_table_needs_no_second_buffer(tmp_path):
    config = replace(CONFIG, tables=(TableConfig(name="user", rows=4_000_000, width=4), CONFIG.tables[1]))
    tensors = DLRM(config).named_tensors()
    save_checkpoint(tmp_path / "x", config=config, tensors=tensors, optimizer={}, trainer_state={})
    code = f"""
from pathlib import Path
from dlrm_deploy.checkpoint import Checkpoint

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

opened = Checkpoint.open({str(tmp_path / "x")!r})
opened.read("model.over_arch.model.1.bias")
before = peak()
opened.read({USER!r})
print(peak() - before)
"""
    grown = int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    assert 62_500 * 0.9 < grown < 62_500 * 1.3  # KiB; the table is 62,500
