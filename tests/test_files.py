import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dlrm_deploy.errors import OutputError
from dlrm_deploy.files import (
    atomic_file,
    atomic_folder,
    scratch_folder,
    sha256_file,
    sha256_folder,
    written_in_blocks,
)


def test_a_folder_appears_only_when_its_block_ends(tmp_path):
    out = tmp_path / "deep" / "bundle"
    with atomic_folder(out) as folder:
        (folder / "manifest.json").write_text("new")
        assert not out.exists()
    assert (out / "manifest.json").read_text() == "new"
    assert [path.name for path in out.parent.iterdir()] == ["bundle"]


def test_a_block_that_fails_leaves_nothing(tmp_path):
    def fail():
        with atomic_folder(tmp_path / "bundle") as folder:
            (folder / "half").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_kept_unless_told_otherwise(tmp_path):
    out = tmp_path / "bundle"
    out.mkdir()
    with pytest.raises(OutputError, match="exists already"), atomic_folder(out):
        pass
    with (
        pytest.raises(OutputError, match=r"holds no manifest.json, so it is not replaced"),
        atomic_folder(out, overwrite=True),
    ):
        pass
    (out / "manifest.json").write_text("old")
    with atomic_folder(out, overwrite=True) as folder:
        (folder / "manifest.json").write_text("new")
    assert (out / "manifest.json").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_an_overwrite_that_fails_keeps_the_old_folder(tmp_path):
    out = tmp_path / "bundle"
    out.mkdir()
    (out / "manifest.json").write_text("old")

    def fail():
        with atomic_folder(out, overwrite=True):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert (out / "manifest.json").read_text() == "old"


def dead_pid():
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    process.wait()
    return process.pid


def test_leftovers_of_a_killed_process_are_removed_and_those_of_a_live_one_kept(tmp_path):
    dead, alive = tmp_path / f".bundle.partial-{dead_pid()}", tmp_path / f".bundle.partial-{os.getppid()}"
    for folder in (dead, alive):
        folder.mkdir()
    with atomic_folder(tmp_path / "bundle") as folder:
        (folder / "file").write_text("x")
    assert not dead.exists()
    assert alive.exists()


def test_a_folder_moved_aside_by_a_process_killed_between_two_renames_comes_back(tmp_path):
    old = tmp_path / f".bundle.old-{dead_pid()}"
    old.mkdir()
    (old / "manifest.json").write_text("old")

    def fail():
        with atomic_folder(tmp_path / "bundle", overwrite=True):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert (tmp_path / "bundle" / "manifest.json").read_text() == "old"


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    out = tmp_path / "file"
    out.write_text("old")

    def fail():
        with atomic_file(out) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert out.read_text() == "old"
    with atomic_file(out) as temporary:
        temporary.write_text("new")
    assert out.read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_place_that_cannot_be_written_is_an_error_that_names_it(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with (
        pytest.raises(OutputError, match=r"cannot write .*file/bundle: "),
        atomic_folder(tmp_path / "file" / "bundle"),
    ):
        pass


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, the disk that is always full")
def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path):
    def fill():
        with atomic_folder(tmp_path / "bundle") as folder:
            (folder / "table").symlink_to("/dev/full")
            with (folder / "table").open("wb") as file:
                file.write(b"x" * 100_000)

    with pytest.raises(OutputError, match="No space left on device"):
        fill()
    assert list(tmp_path.iterdir()) == []


def test_a_file_written_in_blocks_holds_the_bytes_of_all_calls_in_order(tmp_path):
    random = np.random.default_rng(0)
    pieces = [random.integers(0, 256, size, np.uint8) for size in (5, 0, 4 << 20, 3, (9 << 20) + 1, 1)]
    rows = np.arange(12, dtype="<f4").reshape(3, 4)
    with written_in_blocks(tmp_path / "table") as write:
        for piece in pieces:
            write(piece.data)
        write(rows.data)
        write(rows[:0].data)
    expected = b"".join([*(piece.tobytes() for piece in pieces), rows.tobytes()])
    assert (tmp_path / "table").read_bytes() == expected
    with written_in_blocks(tmp_path / "empty"):
        pass
    assert (tmp_path / "empty").read_bytes() == b""


def test_a_file_written_in_blocks_is_written_at_multiples_of_huge_pages(tmp_path, monkeypatch):
    written = []

    class Recorded(io.FileIO):
        def write(self, data):
            written.append((self.tell(), len(data)))
            return super().write(bytes(data)[: 3 << 20])  # a system may write less than it was asked to

    monkeypatch.setattr(Path, "open", lambda self, mode, buffering: Recorded(self, mode))
    with written_in_blocks(tmp_path / "table") as write:
        for _ in range(9):
            write(np.ones(1_000_000, np.uint8).data)
    monkeypatch.undo()
    assert written == [(0, 4 << 20), (3 << 20, 1 << 20), (4 << 20, 4 << 20), (7 << 20, 1 << 20), (8 << 20, 611_392)]
    assert (tmp_path / "table").read_bytes() == b"\x01" * 9_000_000


def test_sha256_is_that_of_the_bytes(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256_file(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_the_hash_of_a_folder_changes_with_any_name_or_byte(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a").write_text("x")
    (tmp_path / "b").write_text("y")
    before = sha256_folder(tmp_path)
    assert sha256_folder(tmp_path) == before
    (tmp_path / "b").write_text("z")
    altered = sha256_folder(tmp_path)
    (tmp_path / "b").rename(tmp_path / "c")
    assert len({before, altered, sha256_folder(tmp_path)}) == 3


def test_a_folder_that_somebody_else_made_meanwhile_is_kept(tmp_path):
    out = tmp_path / "bundle"

    def late():
        with atomic_folder(out) as folder:
            (folder / "manifest.json").write_text("mine")
            out.mkdir()
            (out / "manifest.json").write_text("theirs")

    with pytest.raises(OutputError, match="exists already"):
        late()
    assert (out / "manifest.json").read_text() == "theirs"
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_what_an_interrupted_overwrite_had_moved_aside_is_not_overwritten_without_being_asked(tmp_path):
    old = tmp_path / f".bundle.old-{dead_pid()}"
    old.mkdir()
    (old / "manifest.json").write_text("old")
    with pytest.raises(OutputError, match="exists already"), atomic_folder(tmp_path / "bundle"):
        pass
    assert (tmp_path / "bundle" / "manifest.json").read_text() == "old"


def test_a_link_is_written_through(tmp_path):
    real = tmp_path / "real"
    real.mkdir()
    (real / "manifest.json").write_text("old")
    link = tmp_path / "link"
    link.symlink_to(real)
    with atomic_folder(link, overwrite=True) as folder:
        (folder / "manifest.json").write_text("new")
    assert link.is_symlink()
    assert (real / "manifest.json").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


def test_a_scratch_folder_vanishes_and_so_do_those_of_killed_processes(tmp_path):
    left = tmp_path / ".out.scratch.partial-999999999"
    left.mkdir()
    with scratch_folder(tmp_path / "out") as folder:
        assert folder.parent == tmp_path
        (folder / "file").write_text("x")
        with atomic_folder(tmp_path / "out") as made:
            (made / "manifest.json").write_text("{}")
        assert (folder / "file").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(OutputError, match="exists already"), scratch_folder(tmp_path / "out"):
        pytest.fail("entered")
    with pytest.raises(ZeroDivisionError), scratch_folder(tmp_path / "out", overwrite=True):
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
