"""Folders of torch.distributed.checkpoint: pieces of any number of processes become the tensor they are pieces of."""

import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from peak_memory import PEAK
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata

from dlrm_deploy.errors import CheckpointError
from dlrm_deploy.tensors.dcp import DcpFolder

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

TABLE = torch.arange(60.0).reshape(12, 5)


def save(folder, state):
    dcp.save(state, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    return folder


def edit(folder, change):
    """Change the metadata, as a writer with other ideas would have written it."""
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))


def save_boxes(folder, table, boxes):
    """`table` as several processes store it: each box (starts, ends) is a chunk of its own."""
    parts = {
        f"part{i}": table[tuple(slice(a, b) for a, b in zip(starts, ends, strict=True))].clone()
        for i, (starts, ends) in enumerate(boxes)
    }
    save(folder, parts)

    def merge(metadata):
        chunks = []
        for i, (starts, _) in enumerate(boxes):
            entry = metadata.state_dict_metadata.pop(f"part{i}")
            index = next(index for index in metadata.storage_data if index.fqn == f"part{i}")
            chunk = ChunkStorageMetadata(torch.Size(starts), entry.size)
            metadata.storage_data[MetadataIndex("t", chunk.offsets, i)] = metadata.storage_data.pop(index)
            chunks.append(chunk)
        metadata.state_dict_metadata["t"] = TensorStorageMetadata(entry.properties, table.shape, chunks)

    edit(folder, merge)
    return folder


BOXES = {
    "one": [((0, 0), (12, 5))],
    "rows": [((7, 0), (12, 5)), ((0, 0), (3, 5)), ((3, 0), (7, 5))],
    "columns": [((0, 0), (12, 2)), ((0, 2), (12, 5))],
    "grid": [((a, c), (a + 6, d)) for a in (0, 6) for c, d in ((0, 1), (1, 5))],
    "bricks": [((0, 0), (5, 3)), ((5, 0), (12, 3)), ((0, 3), (8, 5)), ((8, 3), (12, 5))],
    "an empty one": [((0, 0), (12, 5)), ((12, 0), (12, 5))],
    "twice the same": [((0, 0), (6, 5)), ((0, 0), (6, 5)), ((6, 0), (12, 5))],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("boxes", BOXES)
def test_boxes_of_any_form_become_the_tensor(tmp_path, boxes, dtype, monkeypatch):
    table = TABLE.to(dtype)
    opened = DcpFolder(save_boxes(tmp_path / "x", table, BOXES[boxes]))
    values = table.float().numpy() if dtype == torch.bfloat16 else table.numpy()
    assert opened.shape("t") == (12, 5)
    assert opened.dtype("t") == str(dtype).removeprefix("torch.")
    np.testing.assert_array_equal(opened.read("t"), values, strict=True)
    monkeypatch.setattr("dlrm_deploy.tensors.store.BLOCK_BYTES", 50)
    blocks = list(opened.chunks("t"))
    assert len(blocks) >= 6
    assert [first for first, _ in blocks] == [0, *np.cumsum([len(block) for _, block in blocks])[:-1]]
    np.testing.assert_array_equal(np.concatenate([block for _, block in blocks]), values, strict=True)


def test_boxes_of_three_dimensions_become_the_tensor(tmp_path):
    cube = torch.arange(24.0).reshape(2, 3, 4)
    halves = [((a, b, 0), (a + 1, c, 4)) for a in (0, 1) for b, c in ((0, 1), (1, 3))]
    np.testing.assert_array_equal(DcpFolder(save_boxes(tmp_path / "x", cube, halves)).read("t"), cube.numpy())


@pytest.mark.parametrize(
    ("boxes", "missing"),
    [
        ([((0, 0), (4, 5)), ((9, 0), (12, 5))], "rows 4 to 8 is stored nowhere"),
        ([((0, 0), (12, 2)), ((0, 3), (12, 5))], "columns 2 to 2 is stored nowhere"),
        ([((0, 0), (12, 2)), ((0, 2), (8, 5))], "rows 8 to 11, columns 2 to 4 is stored nowhere"),
        ([((0, 0), (6, 5)), ((0, 0), (6, 5))], "rows 6 to 11 is stored nowhere"),
    ],
)
def test_missing_boxes_are_named(tmp_path, boxes, missing):
    with pytest.raises(CheckpointError, match=f"chunks of t are missing: {missing}"):
        DcpFolder(save_boxes(tmp_path / "x", TABLE, boxes))


def test_scalars_empty_tensors_and_views_come_back(tmp_path):
    state = {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4), "view": TABLE[2:8:2, 1:4], "turned": TABLE.T}
    opened = DcpFolder(save(tmp_path / "x", state))
    for key, tensor in state.items():
        np.testing.assert_array_equal(opened.read(key), tensor.numpy(), strict=True)
        (block,) = opened.chunks(key)
        assert block[0] == 0
        np.testing.assert_array_equal(block[1], tensor.numpy(), strict=True)
    assert opened.describe() == "a torch.distributed.checkpoint folder with 4 tensors: scalar, empty, view, ..."
    with pytest.raises(CheckpointError, match="holds no tensor x"):
        opened.read("x")


class Touch:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


def test_objects_beside_the_tensors_are_left_alone(tmp_path):
    state = {"t": TABLE, "step": 7, "settings": {"rate": 0.1, "name": "x"}, "bad": Touch(tmp_path / "owned")}
    opened = DcpFolder(save(tmp_path / "x", state))
    assert opened.keys() == ("t",)
    np.testing.assert_array_equal(opened.read("t"), TABLE.numpy())
    assert not (tmp_path / "owned").exists()


def test_metadata_of_older_torch_is_read(tmp_path):
    """It names the properties in another module, and has neither a storage_meta nor a version."""
    folder = save(tmp_path / "x", {"t": TABLE})
    edit(folder, lambda metadata: [metadata.__dict__.pop(name) for name in ("storage_meta", "version")])
    path = folder / ".metadata"
    data = pickle.dumps(pickle.loads(path.read_bytes()), 2)
    new_name = b"ctorch.distributed.checkpoint.metadata\nTensorProperties"
    assert new_name in data
    path.write_bytes(data.replace(new_name, b"ctorch.distributed._shard.sharded_tensor.metadata\nTensorProperties"))
    np.testing.assert_array_equal(DcpFolder(folder).read("t"), TABLE.numpy())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"offset": -1}, "the place of t makes no sense"),
        ({"length": 1 << 70}, "the place of t makes no sense"),
        ({"length": 10}, "the place of t makes no sense"),
        ({"relative_path": "../x"}, "the place of t makes no sense"),
        ({"relative_path": "/etc/passwd"}, "the place of t makes no sense"),
        ({"transform_descriptors": ["zstd"]}, "t is stored compressed"),
    ],
)
def test_places_that_make_no_sense_are_refused(tmp_path, change, message):
    folder = save(tmp_path / "x", {"t": TABLE})
    edit(folder, lambda metadata: [vars(info).update(change) for info in metadata.storage_data.values()])
    with pytest.raises(CheckpointError, match=rf"\.metadata is damaged or was not written by .*: {message}"):
        DcpFolder(folder)


def test_a_box_that_holds_another_tensor_is_refused(tmp_path):
    folder = save(tmp_path / "x", {"t": TABLE})
    (file,) = folder.glob("*.distcp")
    torch.save(TABLE.reshape(5, 12), file)
    size = file.stat().st_size
    edit(folder, lambda metadata: [vars(info).update(offset=0, length=size) for info in metadata.storage_data.values()])
    with pytest.raises(CheckpointError, match=r"t should be \[12, 5\] float32, found \[5, 12\] float32"):
        DcpFolder(folder).read("t")
    torch.save({"t": TABLE}, file)
    edit(
        folder,
        lambda metadata: [vars(info).update(length=file.stat().st_size) for info in metadata.storage_data.values()],
    )
    with pytest.raises(CheckpointError, match="found a torch.save file with 1 tensors: t"):
        DcpFolder(folder).read("t")


def test_every_cut_of_the_metadata_and_of_the_data_is_refused(tmp_path):
    folder = save(tmp_path / "x", {"t": TABLE})
    (file,) = folder.glob("*.distcp")
    metadata, data = (folder / ".metadata").read_bytes(), file.read_bytes()
    for length in range(0, len(metadata), 3):
        (folder / ".metadata").write_bytes(metadata[:length])
        with pytest.raises(CheckpointError, match=r"\.metadata is damaged"):
            DcpFolder(folder)
    (folder / ".metadata").write_bytes(metadata)
    opened = DcpFolder(folder)
    for length in range(0, len(data), 50):
        file.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=rf"is truncated: t ends at byte {len(data)}, the file at {length}\."):
            opened.read("t")


MEMORY = f"""{PEAK}
import sys
from dlrm_deploy.tensors.dcp import DcpFolder

opened = DcpFolder(sys.argv[1])
opened.read("warm")
before = peak()
total = sum(block.nbytes for _, block in opened.chunks("table"))
print(total, peak() - before)
assert "torch" not in sys.modules
"""


def test_a_box_that_is_a_whole_table_passes_through_in_little_memory(tmp_path):
    save(tmp_path / "x", {"table": torch.zeros(800_000, 64), "warm": torch.zeros(1000)})
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "x")]
    total, grown = map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    assert total == 800_000 * 64 * 4
    assert grown < 50_000_000


def test_a_flipped_bit_is_found_in_the_piece_that_holds_it(tmp_path):
    folder = save_boxes(tmp_path / "dcp", TABLE, BOXES["rows"])
    opened = DcpFolder(folder)
    opened.verify()
    (file,) = opened.files()
    content = bytearray((folder / file).read_bytes())
    content[content.index(TABLE[3:7].numpy().tobytes())] ^= 1
    (folder / file).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{file} is damaged where t is stored: its record .* was altered"):
        opened.verify()


def test_a_missing_file_says_to_copy_those_of_all_processes(tmp_path):
    opened = DcpFolder(save(tmp_path / "dcp", {"t": TABLE}))
    (file,) = opened.files()
    (tmp_path / "dcp" / file).unlink()
    for read in (opened.verify, lambda: opened.read("t")):
        with pytest.raises(CheckpointError, match=rf"dcp lacks {file}, which holds t\. .* files of all processes"):
            read()
