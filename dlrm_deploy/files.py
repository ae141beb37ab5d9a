"""Write files and folders so that they are there whole or not at all, and hash them.

Everything is made beside its place and renamed. A process killed half-way leaves a hidden
`.NAME.partial-PID` behind, which the next write to the same place removes.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dlrm_deploy.errors import ConfigError, OutputError

_CHUNK = 1 << 22


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file, read in pieces so that memory stays flat."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_CHUNK):
            digest.update(piece)
    return digest.hexdigest()


def file_damage(path: Path, size: int, sha256: str | None, source: str) -> str | None:
    """What is wrong with a file that `source` lists with this size and hash (None: not compared), if anything."""
    try:
        seen = path.stat().st_size
        if seen != size:
            return f"{path} has {seen} bytes, {source} says {size}: it was cut or altered."
        if sha256 is not None and sha256_file(path) != sha256:
            return f"{path} was altered: its SHA-256 is not the one in {source}."
    except FileNotFoundError:
        return f"{path} is missing."
    except OSError as err:
        return f"cannot read {path}: {err}."
    return None


@contextmanager
def written_in_blocks(path: Path) -> Iterator[Callable[[memoryview], None]]:
    """A new file, written from its start by calls with contiguous memory, in blocks of 4 MiB at multiples of that.

    Linux then keeps it in huge pages where the file system can, and maps them as such: random rows of a mapped table
    need fewer address translations. Files written in smaller pieces, or across such multiples, may stay in small ones.
    """
    block, used = bytearray(_CHUNK), 0
    with path.open("wb", buffering=0) as file:

        def flush() -> None:
            nonlocal used
            left = memoryview(block)[:used]
            while left:
                left = left[file.write(left) :]
            used = 0

        def write(data: memoryview) -> None:
            nonlocal used
            left = data.cast("B") if data.nbytes else data  # what is empty cannot be cast
            while left.nbytes:
                taken = left[: _CHUNK - used]
                block[used : used + len(taken)] = taken
                used += len(taken)
                left = left[len(taken) :]
                if used == _CHUNK:
                    flush()

        yield write
        flush()


def sha256_folder(folder: Path) -> str:
    """Hex SHA-256 over the names and hashes of all files of a folder, in the order of their names."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    lines = "".join(f"{sha256_file(folder / name)}  {name}\n" for name in names)
    return hashlib.sha256(lines.encode()).hexdigest()


@contextmanager
def output_errors(out: Path) -> Iterator[None]:
    """Turn what the operating system says while writing `out` into an `OutputError`."""
    try:
        yield
    except OSError as err:
        raise OutputError(
            f"cannot write {out}: {err.strerror or err}. What was there is unchanged; choose a place that is "
            "writable and has room."
        ) from err


@contextmanager
def atomic_folder(out: Path, overwrite: bool = False, marker: str = "manifest.json") -> Iterator[Path]:
    """Yield an empty folder that becomes `out` when the block ends, and vanishes if it fails.

    Args:
        out: where the folder will be.
        overwrite: replace what is there, provided that it holds `marker`: a mistyped path cannot cost a home folder.

    Raises:
        OutputError: `out` exists, or cannot be written.
    """
    with output_errors(out):
        out = out.resolve()  # a link stays a link: what it points to is made or replaced
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(out)
    _check_free(out, overwrite, marker)
    with output_errors(out):
        partial = _beside(out, "partial")
        partial.mkdir()
    try:
        with output_errors(out):
            yield partial
            _sync(partial)
            _check_free(out, overwrite, marker)  # somebody else may have been quicker
            old = _beside(out, "old")
            if overwrite and out.exists():
                out.rename(old)
            partial.rename(out)  # refused by the system where a folder with content is in the way
            shutil.rmtree(old, ignore_errors=True)
            _sync_entry(out.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def scratch_folder(out: Path, overwrite: bool = False, marker: str = "manifest.json") -> Iterator[Path]:
    """Yield an empty hidden folder beside `out`, for what is needed to make it; it vanishes when the block ends.

    What a killed process left goes with the next one for the same `out`.

    Args:
        out: what will be made; see `atomic_folder` for this and the other arguments.

    Raises:
        OutputError: `out` exists and is not to be replaced, or the place cannot be written.
    """
    with output_errors(out):
        out = out.resolve()
        place = out.with_name(f"{out.name}.scratch")
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(place)
    _check_free(out, overwrite, marker)
    partial = _beside(place, "partial")
    with output_errors(out):
        partial.mkdir()
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_free(out: Path, overwrite: bool, marker: str) -> None:
    if not out.exists() and not out.is_symlink():
        return
    if not overwrite:
        raise OutputError(f"{out} exists already. Choose another --out, or add --overwrite to replace it.")
    if not (out / marker).is_file():
        raise OutputError(f"{out} exists and holds no {marker}, so it is not replaced. Choose another --out.")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder for changes that must not cross those of another process; waits for its turn."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks: as good as without this
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextmanager
def atomic_file(out: Path) -> Iterator[Path]:
    """Yield a path to write; it replaces `out` when the block ends, and vanishes if it fails."""
    partial = _beside(out, "partial")
    try:
        with output_errors(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(out)
            yield partial
            _sync_entry(partial)
            partial.replace(out)
            _sync_entry(out.parent)
    finally:
        with suppress(OSError):  # not there, or in no folder: the error that matters is on its way
            partial.unlink()


def _beside(out: Path, kind: str) -> Path:
    return out.parent / f".{out.name}.{kind}-{os.getpid()}"


def _remove_leftovers(out: Path) -> None:
    """Remove what earlier processes, now dead, left beside `out`; bring back an `out` that one had moved aside."""
    for left in out.parent.glob(f".{out.name}.*-*"):
        kind, _, pid = left.name.removeprefix(f".{out.name}.").partition("-")
        if kind not in ("partial", "old") or not pid.isdigit() or _is_alive(int(pid)):
            continue
        if kind == "old" and not out.exists():
            left.rename(out)
        elif left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sync(folder: Path) -> None:
    for parent, _, names in os.walk(folder):
        for name in names:
            _sync_entry(Path(parent) / name)
        _sync_entry(Path(parent))


def _sync_entry(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_between(path: Path, begin: str, end: str, text: str, what: str = "text") -> None:
    """Put text between two lines of a file; `what` it is, for the error.

    Raises:
        ConfigError: they are not there.
        OutputError: the file cannot be written.
    """
    whole = path.read_text(encoding="utf-8")
    before, found_begin, rest = whole.partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found_begin and found_end):
        raise ConfigError(f"{path} has no place for the {what}: a line {begin!r}, and below it {end!r}.")
    with atomic_file(path) as beside:
        beside.write_text(f"{before}{begin}\n\n{text}\n{end}{after}", encoding="utf-8")
