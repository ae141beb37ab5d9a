"""Files of torch.save: read as torch.load reads them, in little memory, and refused where they are damaged."""

import argparse
import collections
import pickletools
import random
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from peak_memory import PEAK

from dlrm_deploy.errors import CheckpointError
from dlrm_deploy.tensors.torch_file import TorchFile

BOTH = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
TABLE = torch.arange(60.0).reshape(12, 5)


def save(path, value, zipped=True):
    torch.save(value, path, _use_new_zipfile_serialization=zipped)
    return path


def expected(tensor):
    tensor = tensor.detach()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


TENSORS = {
    "float32": TABLE,
    "float64": TABLE.double(),
    "float16": TABLE.half(),
    "bfloat16": TABLE.bfloat16(),
    "int64": TABLE.long(),
    "int32": TABLE.int(),
    "int16": TABLE.short(),
    "int8": TABLE.char(),
    "uint8": TABLE.byte(),
    "uint16": TABLE.to(torch.uint16),
    "bool": TABLE > 7,
    "complex64": TABLE.to(torch.complex64),
}
VIEWS = {
    "rows": TABLE[3:7],
    "columns": TABLE[:, 1:3],
    "box": TABLE[2:9:3, 4:],
    "transposed": TABLE.T,
    "permuted": TABLE.reshape(3, 4, 5).permute(2, 0, 1),
    "expanded": TABLE[1:2].expand(6, 5),
    "scalar": TABLE[1, 2],
    "vector": TABLE[:, 2],
    "no rows": TABLE[:0],
    "no columns": TABLE[:, :0],
}


@BOTH
@pytest.mark.parametrize("dtype", TENSORS)
def test_every_dtype_comes_back(tmp_path, dtype, zipped):
    tensor = TENSORS[dtype]
    opened = TorchFile(save(tmp_path / "x.pt", {"t": tensor}, zipped))
    assert opened.keys() == ("t",)
    assert opened.shape("t") == (12, 5)
    assert opened.dtype("t") == dtype
    np.testing.assert_array_equal(opened.read("t"), expected(tensor), strict=True)


@BOTH
@pytest.mark.parametrize("small_blocks", [False, True])
def test_views_come_back_whole_and_in_blocks(tmp_path, zipped, small_blocks, monkeypatch):
    """All of them share one storage; with small blocks and reads, strided ones are read in many pieces."""
    if small_blocks:
        monkeypatch.setattr("dlrm_deploy.tensors.store.BLOCK_BYTES", 40)
        monkeypatch.setattr("dlrm_deploy.tensors.strided._SMALL_READ", 4)
    opened = TorchFile(save(tmp_path / "x.pt", VIEWS, zipped))
    for name, tensor in VIEWS.items():
        assert opened.shape(name) == tuple(tensor.shape)
        np.testing.assert_array_equal(opened.read(name), tensor.numpy(), strict=True)
        blocks = list(opened.chunks(name))
        assert blocks[0][0] == 0
        if small_blocks and tensor.shape and tensor.numel():
            assert max(block.nbytes for _, block in blocks) <= max(40, tensor[0].nbytes)
        if tensor.shape:
            assert [first for first, _ in blocks] == [0, *np.cumsum([len(block) for _, block in blocks])[:-1]]
            np.testing.assert_array_equal(np.concatenate([block for _, block in blocks]), tensor.numpy(), strict=True)
        else:
            assert blocks == [(0, tensor.numpy())]
            assert blocks[0][1].shape == ()


@BOTH
def test_names_are_paths_and_plain_values_stand_beside_tensors(tmp_path, zipped):
    linear = torch.nn.Linear(3, 4)
    value = {
        "state_dict": linear.state_dict(),  # an OrderedDict with attributes
        "parameter": linear.weight,
        "tables": [TABLE, (TABLE.half(), {7: TABLE})],
        "array": np.arange(6.0, dtype=np.float32).reshape(2, 3).T,
        "loss": np.float64(0.25),
        "step": np.int64(3),
        "epoch": 2,
        "best": None,
        "name": "dlrm",
        "arguments": argparse.Namespace(rate=0.1, sizes=[3, 4]),
        "counts": collections.defaultdict(list, a=[1]),
        "shape": TABLE.shape,
        "device": torch.device("cpu"),
        "dtype": torch.float32,
        "labels": {"x"},
    }
    opened = TorchFile(save(tmp_path / "x.pt", value, zipped))
    tensors = {
        "state_dict.weight": linear.weight,
        "state_dict.bias": linear.bias,
        "parameter": linear.weight,
        "tables.0": TABLE,
        "tables.1.0": TABLE.half(),
        "tables.1.1.7": TABLE,
    }
    assert opened.keys() == (*tensors, "array")
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(opened.read(name), expected(tensor), strict=True)
    np.testing.assert_array_equal(opened.read("array"), value["array"], strict=True)
    assert opened.values() == {
        "loss": 0.25,
        "step": 3,
        "epoch": 2,
        "best": None,
        "name": "dlrm",
        "arguments.rate": 0.1,
        "arguments.sizes.0": 3,
        "arguments.sizes.1": 4,
        "counts.a.0": 1,
        "shape.0": 12,
        "shape.1": 5,
        "device": "cpu",
        "dtype": "float32",
        "labels.0": "x",
    }
    assert opened.describe() == "a torch.save file with 7 tensors: state_dict.weight, state_dict.bias, parameter, ..."


@BOTH
def test_sparse_optimizer_state_comes_in_its_parts(tmp_path, zipped):
    table = torch.nn.EmbeddingBag(9, 4, sparse=True)
    optimizer = torch.optim.Adagrad(table.parameters(), lr=0.1)
    table(torch.tensor([[1, 2, 1]])).sum().backward()
    gradient = table.weight.grad.coalesce()
    optimizer.step()
    path = save(tmp_path / "x.pt", {"optimizer": optimizer.state_dict(), "gradient": gradient}, zipped)
    opened = TorchFile(path)
    sums = optimizer.state_dict()["state"][0]["sum"]
    np.testing.assert_array_equal(opened.read("optimizer.state.0.sum"), sums.numpy())
    np.testing.assert_array_equal(opened.read("gradient.indices"), gradient.indices().numpy())
    np.testing.assert_array_equal(opened.read("gradient.values"), gradient.values().numpy())
    assert opened.values()["gradient.size.0"] == 9
    assert opened.values()["optimizer.param_groups.0.lr"] == 0.1


@BOTH
def test_bare_tensor_and_tensor_with_attributes_come_back(tmp_path, zipped):
    tensor = TABLE.clone()
    tensor.tensor_model_parallel = True
    opened = TorchFile(save(tmp_path / "x.pt", tensor, zipped))
    assert opened.keys() == ("",)
    np.testing.assert_array_equal(opened.read(""), TABLE.numpy())


def replace_record(path, suffix, content, **arguments):
    """Rewrite one record of a zip archive."""
    with zipfile.ZipFile(path) as archive:
        records = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, old in records.items():
            if not name.endswith(suffix):
                archive.writestr(name, old)
            elif content is not None:
                archive.writestr(name, content(old), **arguments)


@BOTH
def test_tensors_of_a_gpu_are_read_without_one(tmp_path, zipped):
    path = save(tmp_path / "x.pt", {"t": TABLE}, zipped)
    name, gpu = b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0"
    if zipped:
        replace_record(path, "data.pkl", lambda old: old.replace(name, gpu))
    else:
        path.write_bytes(path.read_bytes().replace(name, gpu))
    assert b"cuda:0" in path.read_bytes()
    np.testing.assert_array_equal(TorchFile(path).read("t"), TABLE.numpy())


def test_a_view_of_a_storage_in_a_legacy_file_is_read_from_its_place(tmp_path):
    """As torch before 0.4 wrote views: the persistent id names a part of a storage."""
    path = save(tmp_path / "x.pt", {"t": TABLE[0].clone()}, zipped=False)
    raw = path.read_bytes()
    # 5 values of a storage of 7, from the second on.
    id_end = raw.index(b"K\x05Nt")
    raw = raw[:id_end] + b"K\x07X\x01\x00\x00\x00vK\x02K\x05\x87t" + raw[id_end + 4 :]
    count = raw.rindex((5).to_bytes(8, "little"))
    raw = raw[:count] + (7).to_bytes(8, "little") + np.arange(7, dtype="<f4").tobytes()
    path.write_bytes(raw)
    assert torch.load(path)["t"].tolist() == [2, 3, 4, 5, 6]
    assert TorchFile(path).read("t").tolist() == [2, 3, 4, 5, 6]


def test_archives_without_a_byte_order_and_of_any_name_are_read(tmp_path):
    """torch before 2.1 wrote no byte order; the records are in a folder named after the file."""
    path = save(tmp_path / "modèle 1.pt", {"t": TABLE})
    np.testing.assert_array_equal(TorchFile(path).read("t"), TABLE.numpy())
    replace_record(path, "byteorder", None)
    np.testing.assert_array_equal(TorchFile(path).read("t"), TABLE.numpy())


def test_an_unknown_tensor_is_answered_with_known_ones(tmp_path):
    opened = TorchFile(save(tmp_path / "x.pt", {"a": {"weight": TABLE}, "b": TABLE}))
    with pytest.raises(CheckpointError, match=r"x.pt holds no tensor c.weight. It holds 2, such as a.weight."):
        opened.read("c.weight")


# Damage


@BOTH
def test_every_cut_is_refused(tmp_path, zipped):
    raw = save(tmp_path / "x.pt", {"a": TABLE, "b": TABLE.half(), "c": 3}, zipped).read_bytes()
    path = tmp_path / "cut.pt"
    for length in range(0, len(raw), 5):
        path.write_bytes(raw[:length])
        with pytest.raises(CheckpointError, match="cut.pt"):
            TorchFile(path)


@BOTH
def test_flipped_bytes_give_values_or_a_message(tmp_path, zipped):
    value = {"a": torch.nn.Parameter(TABLE.clone()), "b": [TABLE.T, np.float64(1)], "c": TABLE.to_sparse()}
    raw = save(tmp_path / "x.pt", value, zipped).read_bytes()
    path = tmp_path / "flipped.pt"
    random_ = random.Random(3)
    refused = 0
    for _ in range(600):
        content = bytearray(raw)
        content[random_.randrange(min(2000, len(raw)))] = random_.randrange(256)
        path.write_bytes(content)
        try:
            opened = TorchFile(path)
            for key in list(opened.keys()):
                assert opened.read(key).shape == opened.shape(key)
        except CheckpointError as err:
            assert "flipped.pt" in str(err)  # noqa: PT017  each flip may be harmless
            refused += 1
    assert refused > 100


@pytest.mark.parametrize(
    ("suffix", "content", "message"),
    [
        ("data/0", None, "its record x/data/0 is missing"),
        ("data/0", lambda old: old[:-4], "its record x/data/0 has 236 bytes, while 240 are expected"),
        ("data.pkl", None, "with 0 records named data.pkl"),
        ("byteorder", lambda old: b"big", "its byte order is big, expected little"),
    ],
)
def test_records_that_do_not_fit_are_named(tmp_path, suffix, content, message):
    path = save(tmp_path / "x.pt", {"a": TABLE})
    replace_record(path, suffix, content)
    with pytest.raises(CheckpointError, match=message):
        TorchFile(path)


def test_a_compressed_archive_is_refused(tmp_path):
    path = save(tmp_path / "x.pt", {"a": TABLE})
    replace_record(path, "data/0", lambda old: old, compress_type=zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="x/data/0 is compressed, which torch.save does not do"):
        TorchFile(path)


def test_formats_of_others_are_refused_by_name(tmp_path):
    path = tmp_path / "x.pt"
    torch.jit.script(torch.nn.Linear(2, 2)).save(path)
    with pytest.raises(CheckpointError, match="it is a TorchScript archive"):
        TorchFile(path)
    path.write_bytes(b"x" * 257 + b"ustar" + b"\0" * 300)
    with pytest.raises(CheckpointError, match="it is a tar archive"):
        TorchFile(path)
    path.write_bytes(b"version https://git-lfs")
    with pytest.raises(CheckpointError, match="begins with b'version ', while a file of torch.save"):
        TorchFile(path)
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="it is empty"):
        TorchFile(path)
    with pytest.raises(CheckpointError, match="cannot read .*none.pt.*No such file"):
        TorchFile(tmp_path / "none.pt")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"K\x0cK\x05\x86", b"K\x0dK\x05\x86", r"shape \[13, 5\] ends behind its storage of 240 bytes"),
        (b"QK\x00K\x0c", b"QK\x01K\x0c", r"shape \[12, 5\] ends behind its storage"),
        (b"QK\x00K\x0c", b"QJ\xff\xff\xff\xffK\x0c", "the offset of a tensor is -1"),
        (b"K\x05K\x01\x86", b"J\xff\xff\xff\xffK\x01\x86", "the stride of a tensor is -1"),
        (b"K\x0cK\x05\x86", b"\x8a\x08" + b"\xff" * 7 + b"\x3fK\x05\x86", "more than any file holds"),
        (b"K\x0cK\x05\x86", b"K\x0c\x85", "has 1 dimensions and 2 strides"),
    ],
)
def test_a_tensor_outside_its_storage_is_refused(tmp_path, old, new, message):
    path = save(tmp_path / "x.pt", {"a": TABLE})

    def change(pickled):
        bare = b"".join(without_puts(pickled))
        assert old in bare
        return bare.replace(old, new, 1)

    replace_record(path, "data.pkl", change)
    with pytest.raises(CheckpointError, match=message):
        TorchFile(path)


def without_puts(pickled):
    """The opcodes of a pickle but those that fill the memo, which stand between the numbers of a shape."""
    places = [place for _, _, place in pickletools.genops(pickled)] + [len(pickled)]
    for (opcode, _, place), end in zip(pickletools.genops(pickled), places[1:], strict=True):
        if opcode.name not in ("BINPUT", "LONG_BINPUT"):
            yield pickled[place:end]


def test_a_small_file_cannot_ask_for_a_large_table(tmp_path):
    path = save(tmp_path / "x.pt", {"a": torch.zeros(1).expand(1 << 40), "b": TABLE})
    assert path.stat().st_size < 5000
    opened = TorchFile(path)
    np.testing.assert_array_equal(opened.read("b"), TABLE.numpy())
    with pytest.raises(CheckpointError, match="is a view of a storage of 4 bytes. Save a contiguous copy"):
        next(opened.chunks("a"))
    with pytest.raises(CheckpointError, match=r"a is \[1099511627776\]|is a view of a storage"):
        opened.read("a")


@pytest.mark.parametrize("nested", ["doubled", "itself", "deep"])
def test_nesting_without_an_end_is_refused(tmp_path, nested):
    value = [1]
    if nested == "doubled":
        for _ in range(60):
            value = [value, value]
    elif nested == "itself":
        value.append(value)
    else:
        for _ in range(300):
            value = [value]
    with pytest.raises(CheckpointError, match="nested without an end"):
        TorchFile(save(tmp_path / "x.pt", value))


def test_two_tensors_of_one_name_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="two tensors have the name a.b"):
        TorchFile(save(tmp_path / "x.pt", {"a": {"b": TABLE}, "a.b": TABLE}))


def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path):
    path = save(tmp_path / "x.pt", {"a": TABLE})
    opened = TorchFile(path)
    path.write_bytes(path.read_bytes()[:400])
    with pytest.raises(CheckpointError, match="became shorter while it was read"):
        opened.read("a")


MEMORY = f"""{PEAK}
import sys
from dlrm_deploy.tensors.torch_file import TorchFile

opened = TorchFile(sys.argv[1])
opened.read("warm")
before = peak()
total = sum(block.nbytes for _, block in opened.chunks("table"))
print(total, peak() - before)
assert "torch" not in sys.modules
"""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_table_passes_through_in_little_memory_and_without_torch(tmp_path, dtype):
    rows = 200_000_000 // 64 // dtype.itemsize
    path = save(tmp_path / "x.pt", {"table": torch.zeros(rows, 64, dtype=dtype), "warm": torch.zeros(1000)})
    command = [sys.executable, "-c", MEMORY, str(path)]
    total, grown = map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    assert total == rows * 64 * 4
    assert grown < 80_000_000  # a block of 16 MiB, its float32 form, and what converts it


# Checksums


def flip(path, values, place=0):
    """Flip one bit of some values in a file."""
    content = bytearray(path.read_bytes())
    content[content.index(values.numpy().tobytes()) + place] ^= 1
    path.write_bytes(content)
    return path


def test_a_flipped_bit_is_found_and_the_tensors_in_its_record_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr("dlrm_deploy.tensors.torch_file._CRC_BYTES", 100)
    shared = torch.arange(500.0)
    views = {"a": shared, "b": shared[:3], "c": {"d": TABLE}}
    opened = TorchFile(save(tmp_path / "x.pt", views))
    opened.verify()
    flip(tmp_path / "x.pt", shared, 1999)
    assert opened.read("a")[499] != 499
    with pytest.raises(CheckpointError, match=r"x\.pt: its record x/data/0, which holds a, b, was altered.*--no-crc"):
        opened.verify()


def test_a_flipped_bit_in_a_name_is_found(tmp_path):
    path = save(tmp_path / "x.pt", {"weight_a": TABLE})
    path.write_bytes(path.read_bytes().replace(b"weight_a", b"weight_c"))
    with pytest.raises(CheckpointError, match=r"its record x/data\.pkl was altered"):
        TorchFile(path).verify()


def test_a_file_from_before_torch_1_6_carries_no_checksum(tmp_path):
    opened = TorchFile(flip(save(tmp_path / "x.pt", {"t": TABLE}, zipped=False), TABLE))
    opened.verify()
    assert opened.read("t")[0, 0] != 0


def test_records_that_overlap_are_not_read_over_and_over(tmp_path):
    """A small file can say that each of a thousand records is the whole of it."""
    whole = save(tmp_path / "x.pt", [torch.arange(1000.0) + i for i in range(3)])
    opened = TorchFile(whole)
    opened._records = opened._records * 2
    with pytest.raises(CheckpointError, match="its records overlap"):
        opened.verify()
