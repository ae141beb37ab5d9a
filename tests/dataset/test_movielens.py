"""MovieLens features on the real data (skipped where the wheel cannot be had) and on a small made-up copy."""

import zipfile

import numpy as np
import pytest
from made_up_movielens import made_up, write_grouplens, write_recbole

from dlrm_deploy.data import movielens, movielens_files
from dlrm_deploy.data.movielens_files import read_tables, recbole_wheel
from dlrm_deploy.errors import DataError

DAY = 86_400


@pytest.fixture
def folder(tmp_path):
    return write_recbole(tmp_path / "ml", made_up())


@pytest.fixture(scope="module")
def real():
    try:
        return read_tables(recbole_wheel())
    except DataError as err:
        pytest.skip(f"MovieLens-100K cannot be had here: {err}")


@pytest.fixture(params=["made up", "real"])
def tables(request, tmp_path):
    if request.param == "real":
        return request.getfixturevalue("real")
    return read_tables(write_recbole(tmp_path / "ml", made_up()))


def bag_of(dataset, schema, row, name):
    """The ids of feature `name` in one row."""
    batch, _ = dataset.batch([row])
    f = [feature.name for feature in schema.features].index(name)
    return batch.indices[batch.offsets[f] : batch.offsets[f + 1]]


# Reading


def test_both_layouts_give_the_same_samples(tmp_path):
    data = made_up()
    one = movielens.load(write_recbole(tmp_path / "a", data))
    other = movielens.load(write_grouplens(tmp_path / "b" / "ml-100k", data).parent)
    assert one[0] == other[0]
    for part in ("train", "validation", "test"):
        x, y = (getattr(splits, part) for _, splits in (one, other))
        (batch_x, labels_x), (batch_y, labels_y) = x.batch(np.arange(len(x))), y.batch(np.arange(len(y)))
        np.testing.assert_array_equal(batch_x.dense, batch_y.dense)
        np.testing.assert_array_equal(batch_x.indices, batch_y.indices)
        np.testing.assert_array_equal(batch_x.offsets, batch_y.offsets)
        np.testing.assert_array_equal(labels_x, labels_y)


def test_a_zip_file_reads_like_its_folder(tmp_path, folder):
    path = tmp_path / "any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in folder.iterdir():
            archive.write(file, f"recbole/dataset_example/ml-100k/{file.name}")
    (_, a), (_, b) = movielens.load(path), movielens.load(folder)
    np.testing.assert_array_equal(a.train.batch([0, 5])[0].indices, b.train.batch([0, 5])[0].indices)


def test_the_real_data_have_their_published_size(real):
    assert real.user.size == 100_000
    assert (real.age.size, real.release_year.size) == (943, 1682)
    assert np.isnan(real.release_year).sum() == 2
    assert np.diff(real.genre_offsets).max() == movielens.MAX_GENRES
    assert (real.rating >= 4).mean() == pytest.approx(0.55375)


# Splits


@pytest.mark.parametrize("split", ["random", "time"])
def test_splits_are_80_10_10_share_no_row_and_repeat(tables, split):
    rows = movielens.split_rows(tables.timestamp, split, seed=0)
    again = movielens.split_rows(tables.timestamp, split, seed=0)
    size = tables.timestamp.size
    assert (rows.train.size, rows.validation.size, rows.test.size) == (size * 8 // 10, size // 10, size // 10)
    parts = np.concatenate([rows.train, rows.validation, rows.test])
    np.testing.assert_array_equal(np.sort(parts), np.arange(size))
    np.testing.assert_array_equal(parts, np.concatenate([again.train, again.validation, again.test]))


def test_another_seed_gives_another_random_split(tables):
    one, other = (movielens.split_rows(tables.timestamp, "random", seed) for seed in (0, 1))
    assert not np.array_equal(one.test, other.test)


def test_the_time_split_trains_on_the_past_only(tables):
    rows = movielens.split_rows(tables.timestamp, "time", 0)
    time = tables.timestamp
    assert time[rows.train].max() <= time[rows.validation].min()
    assert time[rows.validation].max() <= time[rows.test].min()


def test_an_unknown_split_is_refused(folder):
    with pytest.raises(DataError, match="random or time, got 'user'"):
        movielens.load(folder, split="user")


# Features


@pytest.mark.parametrize("split", ["random", "time"])
def test_a_history_is_the_last_liked_training_items_rated_strictly_earlier(tables, split):
    rows = movielens.split_rows(tables.timestamp, split, 0)
    history = movielens.liked_before(tables.user, tables.item, tables.rating, tables.timestamp, rows.train)
    in_train = np.zeros(tables.user.size, bool)
    in_train[rows.train] = True
    events = np.flatnonzero(in_train & (tables.rating >= 4))
    checked = np.random.default_rng(0).choice(tables.user.size, min(500, tables.user.size), replace=False)
    lengths = []
    for row in checked:
        earlier = events[(tables.user[events] == tables.user[row]) & (tables.timestamp[events] < tables.timestamp[row])]
        expected = earlier[np.argsort(tables.timestamp[earlier], kind="stable")][-10:]
        found = history.values[history.offsets[row] : history.offsets[row + 1]]
        np.testing.assert_array_equal(found, tables.item[expected])
        lengths.append(found.size)
    assert min(lengths) == 0
    assert max(lengths) == 10 or tables.user.size < 1000


def test_what_is_held_out_changes_no_feature_of_any_row(tmp_path):
    """Ratings of held-out rows are changed, and a held-out user gets a value that nobody else has."""
    users, items, ratings = made_up()
    before = movielens.load(write_recbole(tmp_path / "a", (users, items, ratings)))
    rows = movielens.split_rows(np.array([row[3] for row in ratings]), "random", 0)
    held_out = set(np.concatenate([rows.validation, rows.test]).tolist())
    changed = [(u, i, 6 - r, t) if n in held_out else (u, i, r, t) for n, (u, i, r, t) in enumerate(ratings)]
    after = movielens.load(write_recbole(tmp_path / "b", (users, items, changed)))
    assert before[0] == after[0]
    for part in ("train", "validation", "test"):
        x, y = getattr(before[1], part), getattr(after[1], part)
        (batch_x, labels_x), (batch_y, labels_y) = x.batch(np.arange(len(x))), y.batch(np.arange(len(y)))
        np.testing.assert_array_equal(batch_x.dense, batch_y.dense)
        np.testing.assert_array_equal(batch_x.indices, batch_y.indices)
        assert np.array_equal(labels_x, labels_y) == (part == "train")


def test_dense_values_are_standardised_by_the_training_split(tables):
    rows = movielens.split_rows(tables.timestamp, "random", 0)
    schema, splits = movielens._features(tables, rows, False)
    assert schema.dense_features == ("age", "release_year", "day", "log_time")
    np.testing.assert_allclose(splits.train.dense.mean(axis=0), 0, atol=1e-3)
    np.testing.assert_allclose(splits.train.dense.std(axis=0), 1, atol=0.02)  # 0.02: missing years, set to the mean
    assert np.abs(splits.test.dense.mean(axis=0)).max() > 1e-4


def test_a_missing_year_becomes_the_mean(folder):
    tables = read_tables(folder)
    rows = movielens.split_rows(tables.timestamp, "random", 0)
    _, splits = movielens._features(tables, rows, False)
    missing = np.isnan(tables.release_year[tables.item[rows.train]])
    assert missing.any()
    np.testing.assert_array_equal(splits.train.dense[missing, 1], 0)
    assert (splits.train.dense[~missing, 1] != 0).all()


def test_a_value_that_training_does_not_hold_gets_row_0(tmp_path):
    users, items, ratings = made_up()
    last = max(row[3] for row in ratings) + DAY
    users.append((99, 30, "M", "astronaut", "X9999"))
    items.append((99, 1999, ["Western"]))
    ratings.append((99, 99, 5, last))
    schema, splits = movielens.load(write_recbole(tmp_path / "ml", (users, items, ratings)), split="time")
    newest = len(splits.test) - 1
    for name in ("user", "item", "occupation", "zip_prefix"):
        np.testing.assert_array_equal(bag_of(splits.test, schema, newest, name), [0])
        train = [bag_of(splits.train, schema, row, name)[0] for row in range(len(splits.train))]
        assert min(train) == 1
        rows = next(feature.rows for feature in schema.features if feature.name == name)
        assert max(train) == rows - 1
    assert bag_of(splits.test, schema, newest, "liked").size == 0


@pytest.mark.parametrize("split", ["random", "time"])
def test_row_0_stands_for_exactly_the_users_and_items_that_training_does_not_hold(tables, split):
    rows = movielens.split_rows(tables.timestamp, split, 0)
    _, splits = movielens._features(tables, rows, False)
    batch, _ = splits.test.batch(np.arange(len(splits.test)))
    for f, column in enumerate((tables.user, tables.item)):
        ids = batch.indices[f * len(splits.test) : (f + 1) * len(splits.test)]
        np.testing.assert_array_equal(ids == 0, ~np.isin(column[rows.test], column[rows.train]))


@pytest.mark.parametrize("share", [False, True])
def test_samples_fit_the_model_of_their_schema_and_ids_are_in_range(tables, share):
    rows = movielens.split_rows(tables.timestamp, "time", 0)
    schema, splits = movielens._features(tables, rows, share)
    config = schema.model_config("m", 4, (4,), (1,))
    assert ("liked" in {table.name for table in config.tables}) != share
    assert len(config.features) == 9
    for dataset in (splits.train, splits.validation, splits.test):
        batch, labels = dataset.batch(np.arange(len(dataset)))
        batch.check_fits(config)
        assert batch.explain_bad_ids(config) is None
        assert set(np.unique(labels)) == {0, 1}
        longest_F = np.diff(batch.offsets).reshape(9, -1).max(axis=1)
        assert (longest_F <= [feature.longest_bag for feature in config.features]).all()


def test_hour_age_group_and_label_are_what_the_files_say(tmp_path):
    users, items, ratings = made_up()
    schema, splits = movielens.load(write_recbole(tmp_path / "ml", (users, items, ratings)))
    rows = movielens.split_rows(np.array([row[3] for row in ratings]), "random", 0)
    for position, row in enumerate(rows.test):
        user, _, rating, timestamp = ratings[row]
        age = users[user - 1][1]
        group = sum(age >= first for first in (18, 25, 35, 45, 50, 56))
        assert bag_of(splits.test, schema, position, "hour").tolist() == [timestamp // 3600 % 24]
        assert bag_of(splits.test, schema, position, "age_group").tolist() == [group]
        assert splits.test.batch([position])[1].tolist() == [rating >= 4]


# Damage


def test_a_path_that_does_not_exist_says_what_to_give(tmp_path):
    with pytest.raises(DataError, match=r"nowhere does not exist\. Give the path"):
        movielens.load(tmp_path / "nowhere")


def test_a_folder_without_ratings_says_what_is_looked_for(tmp_path):
    with pytest.raises(DataError, match=r"holds neither u\.data nor ml-100k\.inter"):
        movielens.load(tmp_path)


@pytest.mark.parametrize("cut", [0.3, 0.95])
def test_a_truncated_zip_is_named(tmp_path, folder, cut):
    path = tmp_path / "cut.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in folder.iterdir():
            archive.write(file, file.name)
    raw = path.read_bytes()
    path.write_bytes(raw[: int(len(raw) * cut)])
    with pytest.raises(DataError, match=r"cut\.zip is no folder and no whole zip file"):
        movielens.load(path)


def test_an_altered_member_of_a_zip_is_named(tmp_path, folder):
    path = tmp_path / "bad.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(folder / "ml-100k.inter", "ml-100k.inter")
    raw = bytearray(path.read_bytes())
    raw[60] ^= 1
    path.write_bytes(raw)
    with pytest.raises(DataError, match=r"cannot read .*bad\.zip, ml-100k\.inter: Bad CRC"):
        movielens.load(path)


def test_a_missing_file_is_named(folder):
    (folder / "ml-100k.user").unlink()
    with pytest.raises(DataError, match=r"holds no ml-100k\.user"):
        movielens.load(folder)


def replace_line(path, number, line):
    lines = path.read_text(encoding="utf-8").split("\n")
    lines[number - 1] = line
    path.write_text("\n".join(lines), encoding="utf-8")


@pytest.mark.parametrize(
    ("file", "number", "line", "message"),
    [
        ("inter", 1, "user_id:token\titem_id:token\tscore:float\ttimestamp:float", "line 1: no column rating"),
        ("inter", 4, "1\t2\tgreat\t880000000", "line 4: bad rating, got 'great'"),
        ("inter", 4, "1\t2\t9\t880000000", "line 4: bad rating, got '9': expected a number from 0 to 5"),
        ("inter", 4, "1\t2\tnan\t880000000", "line 4: bad rating, got 'nan'"),
        ("inter", 5, "1\t2\t3\tinf", "line 5: bad timestamp, got 'inf'"),
        ("inter", 5, "1\t2\t3", "line 5: 3 fields where 4 are expected"),
        ("inter", 6, "77\t2\t3\t880000000", r"line 6: user_id '77' is not in .*ml-100k\.user"),
        ("inter", 6, "1\t77\t3\t880000000", r"line 6: item_id '77' is not in .*ml-100k\.item"),
        ("user", 3, "1\t20\tM\twriter\t12345", "line 3: user_id 1 occurs twice"),
        ("user", 3, "2\told\tM\twriter\t12345", "line 3: bad age, got 'old'"),
        ("item", 1, "item_id:token\tmovie_title:token_seq\tyear:token\tclass:token_seq", "no column release_year"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(folder, file, number, line, message):
    replace_line(folder / f"ml-100k.{file}", number, line)
    with pytest.raises(DataError, match=rf"ml-100k\.{file}, .*{message}"):
        movielens.load(folder)


def test_a_bad_genre_flag_and_a_short_line_of_u_item_are_named(tmp_path):
    folder = write_grouplens(tmp_path / "ml", made_up())
    lines = (folder / "u.item").read_text(encoding="latin-1").splitlines()
    (folder / "u.item").write_text("\n".join([lines[0][:-1] + "x", *lines[1:]]), encoding="latin-1")
    with pytest.raises(DataError, match=r"u\.item, line 1: bad genres: expected a flag"):
        movielens.load(folder)
    (folder / "u.item").write_text("\n".join([lines[0], "2|Film"]), encoding="latin-1")
    with pytest.raises(DataError, match=r"u\.item, line 2: 2 fields where 24"):
        movielens.load(folder)


def test_text_that_is_not_utf_8_is_named_by_line(folder):
    raw = (folder / "ml-100k.item").read_bytes().replace("Film é 2".encode(), b"Film \xe9 2", 1)
    (folder / "ml-100k.item").write_bytes(raw)
    with pytest.raises(DataError, match=r"ml-100k\.item, line 3: not utf-8"):
        movielens.load(folder)


def test_an_empty_file_and_too_few_ratings_are_refused(folder):
    lines = (folder / "ml-100k.inter").read_text().splitlines(keepends=True)
    (folder / "ml-100k.inter").write_text("".join(lines[:9]))
    with pytest.raises(DataError, match="8 ratings are too few"):
        movielens.load(folder)
    (folder / "ml-100k.inter").write_text(lines[0])
    with pytest.raises(DataError, match=r"ml-100k\.inter holds no rows"):
        movielens.load(folder)


# The wheel


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("DLRM_DEPLOY_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert movielens_files.cache_folder() == tmp_path / "dlrm-deploy"
    monkeypatch.setenv("DLRM_DEPLOY_CACHE", str(tmp_path / "own"))
    assert movielens_files.cache_folder() == tmp_path / "own"


def test_offline_without_a_cache_says_how_to_give_a_path(monkeypatch, tmp_path):
    monkeypatch.setenv("DLRM_DEPLOY_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # pip then knows no index at all, as if offline
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(DataError, match=r"could not be fetched with pip .* offline\? Give the path of a folder"):
        movielens.load()
    assert list(tmp_path.iterdir()) == []


def pretend_download(monkeypatch, tmp_path, content, wanted):
    monkeypatch.setenv("DLRM_DEPLOY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(movielens_files, "WHEEL_SHA256", wanted)
    calls = []

    def download(folder):
        calls.append(folder)
        (folder / movielens_files.WHEEL).write_bytes(content)

    monkeypatch.setattr(movielens_files, "_pip_download", download)
    return calls


def test_a_wheel_with_another_checksum_is_refused_and_not_kept(monkeypatch, tmp_path):
    pretend_download(monkeypatch, tmp_path, b"something else", "0" * 64)
    with pytest.raises(DataError, match="SHA-256 is another"):
        recbole_wheel()
    assert not (tmp_path / "cache").exists()


def test_a_wheel_is_fetched_once_and_again_when_the_cached_one_is_damaged(monkeypatch, tmp_path):
    sha256 = "ed7002b439e9ac845f22357d822bac1444730fbdb6016d3ec9432297b9ec9f73"  # of b"content"
    calls = pretend_download(monkeypatch, tmp_path, b"content", sha256)
    path = recbole_wheel()
    assert recbole_wheel() == path
    assert len(calls) == 1
    path.write_bytes(b"conte")
    assert recbole_wheel().read_bytes() == b"content"
    assert len(calls) == 2
    assert [file.name for file in path.parent.iterdir()] == [movielens_files.WHEEL]
