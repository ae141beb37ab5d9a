"""Find and parse the files of MovieLens-100K, in GroupLens's or RecBole's layout, from a folder or a zip
file.

Every damaged line is a `DataError` that names file and line. What the columns mean to a model is up to
`dlrm_deploy.data.movielens`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from dlrm_deploy.data.dataset import LongArray
from dlrm_deploy.errors import DataError
from dlrm_deploy.files import atomic_file, sha256_file

WHEEL = "recbole-1.2.1-py3-none-any.whl"
WHEEL_SHA256 = "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407"

GIVE_A_PATH = (
    "Give the path of a folder or zip file with u.data, u.item and u.user (ml-100k.zip of grouplens.org), "
    f"or of the {WHEEL} file."
)

DAMAGED = f"Is the file damaged? {GIVE_A_PATH}"

T = TypeVar("T")
Fields = dict[str, str]


@dataclass(frozen=True, slots=True)
class Tables:
    """The three files, by column. Letters: S ratings, U users, M films, G genres over all films."""

    user: LongArray
    """[S] position of the user among the U users."""

    item: LongArray
    """[S] position of the film among the M films."""

    rating: npt.NDArray[np.float64]
    timestamp: LongArray
    """[S] seconds since 1970."""

    age: LongArray
    """[U] years."""

    gender: npt.NDArray[np.str_]
    occupation: npt.NDArray[np.str_]
    zip_code: npt.NDArray[np.str_]
    release_year: npt.NDArray[np.float64]
    """[M] NaN where the file does not say."""

    genre: LongArray
    """[G] position of each genre among all genres by name, film after film."""

    genre_offsets: LongArray
    """[M + 1] film m is of genres genre[genre_offsets[m]:genre_offsets[m + 1]]."""


@dataclass(frozen=True, slots=True)
class _Layout:
    """How one project writes the three files. A file without header gets its columns from here."""

    ratings: str
    items: str
    users: str
    separators: tuple[str, str, str]
    columns: tuple[tuple[str, ...], ...] | None
    encoding: str


# The 19 flags at the end of a line of u.item, in its order.
_GENRES = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama",
    "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip

_RECBOLE = _Layout("ml-100k.inter", "ml-100k.item", "ml-100k.user", ("\t", "\t", "\t"), None, "utf-8")
_GROUPLENS = _Layout(
    "u.data",
    "u.item",
    "u.user",
    ("\t", "|", "|"),
    (
        ("user_id", "item_id", "rating", "timestamp"),
        ("item_id", "movie_title", "release_date", "video_release_date", "imdb_url", *_GENRES),
        ("user_id", "age", "gender", "occupation", "zip_code"),
    ),
    "latin-1",
)
_NEEDED = (
    ("user_id", "item_id", "rating", "timestamp"),
    ("item_id",),
    ("user_id", "age", "gender", "occupation", "zip_code"),
)


def read_tables(path: Path) -> Tables:
    """Parse the three files found at any depth in a folder or zip file.

    Raises:
        DataError: nothing there, a damaged file, or a line that is not what its layout says.
    """
    with _Files(path) as files:
        layouts = [layout for layout in (_GROUPLENS, _RECBOLE) if files.has(layout.ratings)]
        if not layouts:
            raise DataError(f"{path} holds neither {_GROUPLENS.ratings} nor {_RECBOLE.ratings}. {GIVE_A_PATH}")
        layout = layouts[0]
        ratings, items, users = (
            _Table(files.read(name, layout.encoding), files.label(name), separator, columns, needed)
            for name, separator, columns, needed in zip(
                (layout.ratings, layout.items, layout.users),
                layout.separators,
                layout.columns or (None, None, None),
                _NEEDED,
                strict=True,
            )
        )
    genres = items.column("genres", _grouplens_genres if layout.columns else _recbole_genres)
    return Tables(
        user=ratings.positions("user_id", users),
        item=ratings.positions("item_id", items),
        rating=np.array(ratings.column("rating", _rating)),
        timestamp=np.array(ratings.column("timestamp", _timestamp), np.int64),
        age=np.array(users.column("age", _age), np.int64),
        gender=np.array(users.column("gender", lambda fields: fields["gender"])),
        occupation=np.array(users.column("occupation", lambda fields: fields["occupation"])),
        zip_code=np.array(users.column("zip_code", lambda fields: fields["zip_code"])),
        release_year=np.array(items.column("release year", _grouplens_year if layout.columns else _recbole_year)),
        genre=np.unique([genre for film in genres for genre in film], return_inverse=True)[1],
        genre_offsets=np.concatenate([[0], np.cumsum([len(film) for film in genres])]).astype(np.int64),
    )


def _rating(fields: Fields) -> float:
    rating = float(fields["rating"])
    if not 0 <= rating <= 5:
        raise ValueError("expected a number from 0 to 5")
    return rating


def _timestamp(fields: Fields) -> int:
    timestamp = int(float(fields["timestamp"]))
    if not 0 <= timestamp < 1 << 40:
        raise ValueError("expected seconds since 1970")
    return timestamp


def _age(fields: Fields) -> int:
    age = int(fields["age"])
    if not 0 <= age <= 150:
        raise ValueError("expected years")
    return age


def _recbole_year(fields: Fields) -> float:
    year = fields["release_year"]  # "unkonwn" and "V" occur
    return float(year) if re.fullmatch(r"\d{4}", year) else float("nan")


def _grouplens_year(fields: Fields) -> float:
    years = re.findall(r"\((\d{4})\)", fields["movie_title"])  # where RecBole's year comes from, too
    return float(years[-1]) if years else float("nan")


def _recbole_genres(fields: Fields) -> list[str]:
    return fields["class"].split()


def _grouplens_genres(fields: Fields) -> list[str]:
    if not {fields[genre] for genre in _GENRES} <= {"0", "1"}:
        raise ValueError("expected a flag 0 or 1 for each of the 19 genres")
    return [genre for genre in _GENRES if fields[genre] == "1"]


class _Table:
    """The lines of one file, split into named fields."""

    def __init__(
        self, text: str, label: str, separator: str, columns: Sequence[str] | None, needed: Sequence[str]
    ) -> None:
        lines = text.split("\n")
        self._first = 1
        if columns is None:  # RecBole's header: name:type, name:type, ...
            columns = [name.partition(":")[0] for name in lines.pop(0).rstrip("\r").split(separator)]
            self._first = 2
        missing = [name for name in needed if name not in columns]
        if missing:
            raise DataError(
                f"{label}, line 1: no column {', '.join(missing)} among {', '.join(columns)}. {GIVE_A_PATH}"
            )
        self._label = label
        self._rows: list[Fields] = []
        while lines and not lines[-1]:
            lines.pop()
        for number, line in enumerate(lines, self._first):
            values = line.rstrip("\r").split(separator)
            if len(values) != len(columns):
                raise DataError(
                    f"{label}, line {number}: {len(values)} fields where {len(columns)} are expected "
                    f"({', '.join(columns[:6])}{', ...' if len(columns) > 6 else ''}). {DAMAGED}"
                )
            self._rows.append(dict(zip(columns, values, strict=True)))
        if not self._rows:
            raise DataError(f"{label} holds no rows. {DAMAGED}")

    def column(self, name: str, parse: Callable[[Fields], T]) -> list[T]:
        """`parse` of every line."""
        values = []
        for number, fields in enumerate(self._rows, self._first):
            try:
                values.append(parse(fields))
            except KeyError as err:
                raise DataError(f"{self._label}, line 1: no column {err.args[0]}. {GIVE_A_PATH}") from err
            except (ValueError, OverflowError) as err:
                seen = f", got {fields[name]!r}" if name in fields else ""
                raise DataError(f"{self._label}, line {number}: bad {name}{seen}: {err}.") from err
        return values

    def positions(self, key: str, other: _Table) -> LongArray:
        """For every line, the position of the line of `other` with the same `key`."""
        known: dict[str, int] = {}
        for position, fields in enumerate(other._rows):
            if known.setdefault(fields[key], position) != position:
                raise DataError(f"{other._label}, line {position + other._first}: {key} {fields[key]} occurs twice.")
        found = []
        for number, fields in enumerate(self._rows, self._first):
            if fields[key] not in known:
                raise DataError(f"{self._label}, line {number}: {key} {fields[key]!r} is not in {other._label}.")
            found.append(known[fields[key]])
        return np.array(found, np.int64)


class _Files:
    """Read text files by their last name from a folder or a zip file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._zip: zipfile.ZipFile | None = None
        self._names: dict[str, str] = {}

    def __enter__(self) -> _Files:
        wanted = {name for layout in (_GROUPLENS, _RECBOLE) for name in (layout.ratings, layout.items, layout.users)}
        if self._path.is_dir():
            members: Iterable[str] = (
                (Path(folder) / name).relative_to(self._path).as_posix()
                for folder, _, names in os.walk(self._path)
                for name in names
            )
        else:
            try:
                self._zip = zipfile.ZipFile(self._path)
            except FileNotFoundError as err:
                raise DataError(f"{self._path} does not exist. {GIVE_A_PATH}") from err
            except (OSError, zipfile.BadZipFile) as err:
                raise DataError(f"{self._path} is no folder and no whole zip file: {err}. {GIVE_A_PATH}") from err
            members = self._zip.namelist()
        for member in sorted(members, key=lambda name: (name.count("/"), name), reverse=True):
            if (name := PurePosixPath(member).name) in wanted:
                self._names[name] = member  # the one nearest to the top stays
        return self

    def __exit__(self, *_: Any) -> None:
        if self._zip is not None:
            self._zip.close()

    def has(self, name: str) -> bool:
        return name in self._names

    def label(self, name: str) -> str:
        return f"{self._path}, {self._names[name]}" if self._zip else str(self._path / self._names[name])

    def read(self, name: str, encoding: str) -> str:
        if name not in self._names:
            raise DataError(f"{self._path} holds no {name}. {GIVE_A_PATH}")
        member = self._names[name]
        try:
            raw = self._zip.read(member) if self._zip else (self._path / member).read_bytes()
            return raw.decode(encoding)
        except UnicodeDecodeError as err:
            line = err.object[: err.start].count(b"\n") + 1
            raise DataError(f"{self.label(name)}, line {line}: not {encoding} text. {DAMAGED}") from err
        except (OSError, EOFError, zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError) as err:
            raise DataError(f"cannot read {self.label(name)}: {err}. {DAMAGED}") from err


def cache_folder() -> Path:
    """`DLRM_DEPLOY_CACHE`, else `dlrm-deploy` in the user's cache folder."""
    if own := os.environ.get("DLRM_DEPLOY_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dlrm-deploy"


def recbole_wheel() -> Path:
    """The `recbole` wheel in the cache folder, fetched by pip (2 MB) where it is not there or not whole.

    Raises:
        DataError: pip could not fetch it, or fetched something else.
        OutputError: the cache folder cannot be written.
    """
    cached = cache_folder() / WHEEL
    if cached.is_file() and sha256_file(cached) == WHEEL_SHA256:
        return cached
    with tempfile.TemporaryDirectory() as folder:
        _pip_download(Path(folder))
        fetched = Path(folder) / WHEEL
        if not fetched.is_file() or sha256_file(fetched) != WHEEL_SHA256:
            raise DataError(f"pip did not fetch the expected {WHEEL}: its SHA-256 is another. {GIVE_A_PATH}")
        with atomic_file(cached) as temporary:
            temporary.write_bytes(fetched.read_bytes())
    return cached


def _pip_download(folder: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-input",
    ]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), "recbole==1.2.1"]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    except (OSError, subprocess.SubprocessError) as err:
        stderr = err.stderr if isinstance(err, subprocess.CalledProcessError) else str(err)
        lines = [line for line in (stderr or str(err)).splitlines() if line.strip()]
        raise DataError(
            f"MovieLens-100K could not be fetched with pip (recbole==1.2.1): {lines[-1].strip()} "
            f"Is this machine offline? {GIVE_A_PATH}"
        ) from err
