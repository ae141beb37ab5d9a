"""MovieLens-100K as click-through data: will this user rate this film 4 or better?

The rows belong to GroupLens, who do not allow redistribution or commercial use without permission, so they
are never part of this project: they are read from a path that the user gives, or from the `recbole` wheel,
which carries them and which pip fetches into a cache folder. The wheel is read as a zip file; it is neither
unpacked nor imported.

Nothing of the validation and test splits reaches a feature: vocabularies, dense statistics and the users'
histories come from the training split only, and a history holds only what was rated strictly earlier. Row 0
of a table whose vocabulary comes from the data stands for every value that the training split does not hold.

Main path: `load` -> `read_tables` (dlrm_deploy.data.movielens_files) -> `_features`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from dlrm_deploy.data.dataset import ArrayDataset, Bags, FloatArray, LongArray, Schema, SparseFeature, Splits
from dlrm_deploy.data.movielens_files import Tables, read_tables, recbole_wheel
from dlrm_deploy.errors import DataError

DENSE_FEATURES = ("age", "release_year", "day", "log_time")
HISTORY = 10
"""Liked films in a history, at most."""

MAX_GENRES = 6
LIKED = 4.0
ZIP_PREFIX = 3
# First age of each group, as in MovieLens-1M.
_AGE_GROUPS = (18, 25, 35, 45, 50, 56)
_DAY = 86_400

Split = Literal["random", "time"]


@dataclass(frozen=True, slots=True)
class Rows:
    """Row numbers of the ratings file in each split."""

    train: LongArray
    validation: LongArray
    test: LongArray


def load(
    path: Path | None = None, *, split: Split = "random", seed: int = 0, share_item_table: bool = False
) -> tuple[Schema, Splits]:
    """Read MovieLens-100K and make features of it.

    Args:
        path: folder or zip file (a wheel is one) with `u.data`, `u.item`, `u.user` (GroupLens) or
            `ml-100k.inter`, `.item`, `.user` (RecBole), at any depth. None takes the `recbole` wheel from the
            cache, or fetches it.
        split: "random": 80 / 10 / 10 % at random. "time": the first 80 % in time, the next 10 %, the last 10
            %: the honest one for a service, and harder, as users and films of the last weeks are new.
        seed: of the random split.
        share_item_table: pool the history from the table of `item` rather than from one of its own.

    Returns:
        The schema: 4 dense features, 7 of one id, `genres` and `liked` with bags that vary. And the splits,
        whose samples are in the order of time.

    Raises:
        DataError: missing, damaged, or not MovieLens-100K; the message names file and line.
    """
    tables = read_tables(recbole_wheel() if path is None else path)
    rows = split_rows(tables.timestamp, split, seed)
    return _features(tables, rows, share_item_table)


def split_rows(timestamp: LongArray, split: Split, seed: int) -> Rows:
    """Divide ratings 80 / 10 / 10: the same way for the same seed and number of ratings."""
    size = timestamp.size
    if split == "random":
        order = np.random.default_rng(seed).permutation(size)
    elif split == "time":
        order = np.argsort(timestamp, kind="stable")
    else:
        raise DataError(f"split must be random or time, got {split!r}.")
    if size < 10:
        raise DataError(f"{size} ratings are too few to split 80 / 10 / 10: at least 10 are needed.")
    ends = size * 8 // 10, size * 9 // 10
    parts = (order[: ends[0]], order[ends[0] : ends[1]], order[ends[1] :])
    return Rows(*(part[np.argsort(timestamp[part], kind="stable")] for part in parts))


def _features(tables: Tables, rows: Rows, share_item_table: bool) -> tuple[Schema, Splits]:
    user, item = tables.user, tables.item  # positions in the user and item files, [S]
    train = rows.train
    dense = _standardised(
        np.stack(
            [
                tables.age[user].astype(np.float64),
                tables.release_year[item],
                (tables.timestamp // _DAY).astype(np.float64),
                np.log1p(_seconds_since_first(user, tables.timestamp, train)),
            ],
            axis=1,
        ),
        train,
    )
    features: list[SparseFeature] = []
    bags: list[Bags] = []

    def add(name: str, rows: int, ids: Bags, **kind: Any) -> None:
        features.append(SparseFeature(name=name, rows=rows, **kind))
        bags.append(ids)

    zip_prefix = np.array([code[:ZIP_PREFIX] for code in tables.zip_code])
    for name, column in (
        ("user", user),
        ("item", item),
        ("occupation", tables.occupation[user]),
        ("gender", tables.gender[user]),
        ("zip_prefix", zip_prefix[user]),
    ):
        vocabulary = np.unique(column[train])
        add(name, vocabulary.size + 1, Bags.single(_ids(column, vocabulary)), pooling_factor=1)
    add("hour", 24, Bags.single(tables.timestamp // 3600 % 24), pooling_factor=1)
    age_group = np.searchsorted(_AGE_GROUPS, tables.age, side="right")[user]
    add("age_group", len(_AGE_GROUPS) + 1, Bags.single(age_group), pooling_factor=1)

    # Sum gave 0.002 to 0.003 more validation AUC than mean, in two runs.
    genres = Bags(tables.genre, tables.genre_offsets).take(item)
    vocabulary = np.unique(genres.take(train).values)
    genres = Bags(_ids(genres.values, vocabulary), genres.offsets)
    add("genres", vocabulary.size + 1, genres, pooling="sum", max_ids=MAX_GENRES)

    history = liked_before(user, item, tables.rating, tables.timestamp, train)
    vocabulary = np.unique(item[train])
    history = Bags(_ids(history.values, vocabulary), history.offsets)
    table = "item" if share_item_table else "liked"
    add("liked", vocabulary.size + 1, history, table=table, pooling="mean", max_ids=HISTORY)

    labels = (tables.rating >= LIKED).astype(np.float32)
    splits = (
        ArrayDataset(dense[part], [feature.take(part) for feature in bags], labels[part])
        for part in (rows.train, rows.validation, rows.test)
    )
    return Schema(DENSE_FEATURES, tuple(features)), Splits(*splits)


def liked_before(
    user: LongArray, item: LongArray, rating: npt.NDArray[np.float64], timestamp: LongArray, train: LongArray
) -> Bags:
    """The last `HISTORY` items that each rating's user had rated `LIKED` or better before it, oldest first.

    Args:
        user: [S] whose rating it is.
        item: [S] of what.
        rating: [S] the rating.
        timestamp: [S] when, in seconds.
        train: rows of the training split; no other row is looked at.

    Returns:
        S bags of 0 to `HISTORY` values of `item`. What the user rated in the same second does not count.
    """
    events = train[rating[train] >= LIKED]
    events = events[np.lexsort((events, timestamp[events], user[events]))]
    span = int(timestamp.max()) + 1
    keys = user[events] * span + timestamp[events]
    ends = np.searchsorted(keys, user * span + timestamp, side="left")
    starts = np.maximum(ends - HISTORY, np.searchsorted(keys, user * span, side="left"))
    return Bags.ranges(item[events], starts, ends - starts)


def _seconds_since_first(user: LongArray, timestamp: LongArray, train: LongArray) -> LongArray:
    """Seconds since the user's first rating in the training split; 0 where there is no earlier one."""
    first_U = np.full(int(user.max()) + 1, np.iinfo(np.int64).max)
    np.minimum.at(first_U, user[train], timestamp[train])
    first: LongArray = first_U[user]
    return np.maximum(timestamp, first) - first


def _standardised(columns: npt.NDArray[np.float64], train: LongArray) -> FloatArray:
    """Columns [S, D] with mean 0 and deviation 1 over the training split; NaN (missing) becomes the mean."""
    known = columns[train]
    deviation = np.nanstd(known, axis=0)
    scaled = (columns - np.nanmean(known, axis=0)) / np.where(deviation > 0, deviation, 1)
    filled: FloatArray = np.nan_to_num(scaled, nan=0.0).astype(np.float32)
    return filled


def _ids(column: npt.NDArray[Any], vocabulary: npt.NDArray[Any]) -> LongArray:
    """1 + the position of each value in the sorted vocabulary; 0 for a value that is not in it."""
    position = np.minimum(np.searchsorted(vocabulary, column), vocabulary.size - 1)
    return np.where(vocabulary[position] == column, position + 1, 0)
