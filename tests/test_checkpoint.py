"""Checkpoints: what is written comes back; shards are put together; damage and malice are refused."""

import json
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from peak_memory import PEAK

from dlrm_deploy import checkpoint as module
from dlrm_deploy.batch import Batch
from dlrm_deploy.bundle import Golden
from dlrm_deploy.checkpoint import MODEL_PREFIX, Checkpoint, save_checkpoint
from dlrm_deploy.config import ModelConfig
from dlrm_deploy.errors import CheckpointError, OutputError
from dlrm_deploy.export.sources import CheckpointSource
from dlrm_deploy.files import sha256_file, sha256_folder
from dlrm_deploy.model.dlrm import DLRM
from dlrm_deploy.model.keys import table_key
from dlrm_deploy.tables import TableConfig

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


@pytest.fixture
def bare(saved):
    """The same as torch alone would have written it: without hashes, reading has to look after itself."""
    for name in ("files.json", "trainer.json", "golden.npz"):
        (saved / name).unlink()
    return saved


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
        ([(0, 50, 0, 2), (0, 20, 2, 2), (20, 30, 2, 2)], [0, 20]),
    ],
    ids=["rows", "columns", "grid", "no grid"],
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


def test_missing_shard_is_refused(tmp_path, model):
    folder, _ = sharded(tmp_path, model, [(0, 20, 0, 4), (30, 20, 0, 4)])
    with pytest.raises(CheckpointError, match="chunks of model.sparse_arch.*user.weight are missing: rows 20 to 29"):
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


def test_truncated_data_is_named(bare):
    file = data_file(bare)
    file.write_bytes(file.read_bytes()[:200])
    opened = Checkpoint.open(bare)
    with pytest.raises(CheckpointError, match=r"\.distcp is truncated: .* the file at 200"):
        opened.read(USER)


def test_overwritten_data_is_refused(bare):
    file = data_file(bare)
    file.write_bytes(b"\0" * file.stat().st_size)
    with pytest.raises(CheckpointError, match=r"is damaged where model\..*user.weight is stored"):
        Checkpoint.open(bare).read(USER)


def test_missing_data_file_is_named(bare):
    data_file(bare).unlink()
    with pytest.raises(CheckpointError, match=r"lacks __0_0\.distcp, which holds model\."):
        Checkpoint.open(bare).read(USER)


@pytest.mark.parametrize("length", [0, 10, 300])
def test_truncated_metadata_is_refused(bare, length):
    (bare / ".metadata").write_bytes((bare / ".metadata").read_bytes()[:length])
    with pytest.raises(CheckpointError, match=r"\.metadata is damaged or was not written by"):
        Checkpoint.open(bare)


class Malice:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return open, (str(self.target), "w")


@pytest.mark.parametrize("place", ["alone", "inside"])
def test_malicious_metadata_runs_no_code(bare, tmp_path, place):
    target = tmp_path / "owned"
    path = bare / ".metadata"
    payload = Malice(target)
    if place == "inside":
        metadata = pickle.loads(path.read_bytes())
        metadata.planner_data = payload
        payload = metadata
    path.write_bytes(pickle.dumps(payload))
    with pytest.raises(CheckpointError, match="it names .*open, which no checkpoint needs"):
        Checkpoint.open(bare)
    assert not target.exists()
    pickle.loads(path.read_bytes())  # the attack works where pickles are trusted
    assert target.exists()


def test_malicious_tensor_runs_no_code(bare, tmp_path):
    target = tmp_path / "owned"
    torch.save(Malice(target), data_file(bare))
    size = data_file(bare).stat().st_size
    metadata = pickle.loads((bare / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.offset, info.length = 0, size
    (bare / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="is damaged where"):
        Checkpoint.open(bare).read(USER)
    assert not target.exists()


def test_metadata_may_not_lead_out_of_the_folder(bare, tmp_path):
    shutil.copy(data_file(bare), tmp_path / "elsewhere")
    metadata = pickle.loads((bare / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = "../elsewhere"
    (bare / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="makes no sense"):
        Checkpoint.open(bare)


def test_damaged_small_files_are_named(saved):
    opened = Checkpoint.open(saved)
    for text, message in (
        ("{", "cannot read trainer.json"),
        ("[]", r"holds no JSON object, but \[\]"),
        ("null", "null"),
    ):
        (saved / "trainer.json").write_text(text)
        with pytest.raises(CheckpointError, match=message):
            opened.trainer_state()
    (saved / "golden.npz").write_bytes(b"PK")
    with pytest.raises(CheckpointError, match=r"golden.npz"):
        opened.golden()


def test_damaged_model_is_named(bare):
    (bare / "model.toml").write_text(json.dumps({"name": 1}))
    with pytest.raises(CheckpointError, match=r"is damaged: .*model.toml"):
        Checkpoint.open(bare)


FILES = [".metadata", "__0_0.distcp", "model.toml", "trainer.json", "golden.npz"]


def alter(path):
    """Change one byte that no reader notices: of a value, a name or a number, not of the structure."""
    content = bytearray(path.read_bytes())
    place = len(content) // 2
    content[place] ^= 1
    path.write_bytes(content)


def test_files_json_lists_every_other_file(saved):
    assert sorted(json.loads((saved / "files.json").read_text())["files"]) == sorted(FILES)
    assert sorted(path.name for path in saved.iterdir()) == sorted(["files.json", *FILES])


@pytest.mark.parametrize("name", FILES)
def test_an_altered_byte_is_refused_and_its_file_named(saved, name):
    alter(saved / name)
    with pytest.raises(CheckpointError, match=rf"{name} was altered: its SHA-256 is not the one in files\.json"):
        Checkpoint.open(saved)


@pytest.mark.parametrize("name", FILES)
def test_cut_and_missing_files_are_named(saved, name):
    (saved / name).write_bytes((saved / name).read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=rf"{name} has \d+ bytes, files\.json says \d+"):
        Checkpoint.open(saved)
    (saved / name).unlink()
    with pytest.raises(CheckpointError, match=rf"{name}"):
        Checkpoint.open(saved)


def test_large_files_are_hashed_before_they_are_loaded_or_exported_not_when_opened(saved, model, monkeypatch):
    monkeypatch.setattr(module, "AUTO_HASH_BYTES", 0)
    Checkpoint.open(saved).verify()
    before = Checkpoint.open(saved).read(USER)
    content = bytearray(data_file(saved).read_bytes())
    place = content.index(before.tobytes())
    content[place] ^= 1  # the last bit of one weight
    data_file(saved).write_bytes(content)
    opened = Checkpoint.open(saved)
    assert (opened.read(USER) != before).sum() == 1  # torch does not notice
    message = r"\.distcp was altered"
    with pytest.raises(CheckpointError, match=message):
        opened.load_into({STATE: torch.zeros(50)})
    with pytest.raises(CheckpointError, match=message):
        CheckpointSource(opened)


def test_an_export_names_the_checkpoint_by_the_hash_of_its_table_of_files(saved):
    provenance = CheckpointSource(Checkpoint.open(saved)).provenance()
    assert provenance == {"source": "checkpoint", "checkpoint_sha256": sha256_file(saved / "files.json")}


def test_a_checkpoint_of_torch_alone_has_a_hash_too(bare):
    assert Checkpoint.open(bare).sha256 == sha256_folder(bare)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.update(format_version=2), "version 2, and this dlrm-deploy reads"),
        (lambda table: table.pop("format"), "is of format None"),
        (lambda table: table.pop("files"), "it holds no table of files"),
        (lambda table: table["files"].pop("__0_0.distcp"), "it does not list __0_0.distcp"),
        (lambda table: table["files"].pop("golden.npz"), "it does not list golden.npz"),
        (
            lambda table: table["files"].update({"../x": {"size": 1, "sha256": ""}}),
            r"record of '\.\./x' makes no sense",
        ),
        (lambda table: table["files"]["model.toml"].update(size="1"), "record of 'model.toml' makes no sense"),
        (lambda table: table["files"]["model.toml"].pop("size"), "model.toml: missing key size"),
        (lambda table: table["files"].update({"model.toml": 3}), "model.toml: expected a table of keys, got int"),
    ],
)
def test_a_damaged_table_of_files_is_refused(saved, change, message):
    table = json.loads((saved / "files.json").read_text())
    change(table)
    (saved / "files.json").write_text(json.dumps(table))
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(saved)


def test_a_missing_table_of_files_is_refused(saved):
    (saved / "files.json").unlink()
    with pytest.raises(CheckpointError, match=r"cannot read files\.json"):
        Checkpoint.open(saved)


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from test_checkpoint import CONFIG, DLRM, OutputError, save_checkpoint

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    save_checkpoint(
        Path(sys.argv[1]), config=CONFIG, tensors=DLRM(CONFIG).named_tensors(), optimizer={}, trainer_state={}
    )
except OutputError as err:
    print(err)
"""


@pytest.mark.parametrize("limit", [0, 300, 2000])
def test_a_write_that_the_system_refuses_is_said_and_leaves_nothing(tmp_path, limit):
    """With a limit on the size of files, where torch hides what the system said as it does on a full disk."""
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "run" / "step-1"), str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    assert done.stdout.startswith(f"cannot write {tmp_path / 'run' / 'step-1'}: File too large."), done.stderr
    assert list((tmp_path / "run").iterdir()) == []


def test_reading_a_table_needs_no_second_buffer(tmp_path):
    config = replace(CONFIG, tables=(TableConfig(name="user", rows=4_000_000, width=4), CONFIG.tables[1]))
    tensors = DLRM(config).named_tensors()
    save_checkpoint(tmp_path / "x", config=config, tensors=tensors, optimizer={}, trainer_state={})
    code = f"""{PEAK}
from dlrm_deploy.checkpoint import Checkpoint

opened = Checkpoint.open({str(tmp_path / "x")!r})
opened.read("model.over_arch.model.1.bias")
before = peak()
opened.read({USER!r})
print(peak() - before)
"""
    grown = int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    assert 64_000_000 * 0.8 < grown < 64_000_000 * 1.3  # the table is 64 MB
