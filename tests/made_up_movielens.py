"""MovieLens-100K made up: small files in both layouts, for tests that need no real ratings."""

import numpy as np

from dlrm_deploy.data import movielens_files

GENRES = movielens_files._GENRES


def made_up(seed=0, users=12, items=20, ratings=120):
    """Rows of the three files: users (age, gender, occupation, zip), items (year, genres), ratings."""
    rng = np.random.default_rng(seed)
    user_rows = [
        (u + 1, int(rng.integers(10, 70)), "MF"[u % 2], ["writer", "doctor", "none"][u % 3], f"{u % 4}52{u:02d}")
        for u in range(users)
    ]
    item_rows = [
        (i + 1, None if i == 3 else 1950 + i, sorted(rng.choice(GENRES, 1 + i % 3, replace=False), key=GENRES.index))
        for i in range(items)
    ]
    pairs = rng.permutation(users * items)[:ratings]
    rating_rows = [
        (
            int(p) // items + 1,
            int(p) % items + 1,
            int(rng.integers(1, 6)),
            880_000_000 + int(rng.integers(0, 40)) * 9000,
        )
        for p in pairs
    ]
    return user_rows, item_rows, rating_rows


def write_recbole(folder, data):
    users, items, ratings = data
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token"]
    lines += ["\t".join(map(str, row)) for row in users]
    (folder / "ml-100k.user").write_text("\n".join(lines) + "\n")
    lines = ["item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq"]
    lines += [f"{i}\tFilm é {i}\t{year or 'unkonwn'}\t{' '.join(genres)}" for i, year, genres in items]
    (folder / "ml-100k.item").write_text("\n".join(lines) + "\n", encoding="utf-8")
    lines = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
    lines += ["\t".join(map(str, row)) for row in ratings]
    (folder / "ml-100k.inter").write_text("\n".join(lines) + "\n")
    return folder


def write_grouplens(folder, data):
    users, items, ratings = data
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "u.user").write_text("".join("|".join(map(str, row)) + "\n" for row in users))
    lines = []
    for i, year, genres in items:
        title = f"Film é {i} ({year})" if year else "unknown"
        flags = "|".join(str(int(genre in genres)) for genre in GENRES)
        lines.append(f"{i}|{title}|01-Jan-{year or ''}||http://example.org|{flags}\n")
    (folder / "u.item").write_text("".join(lines), encoding="latin-1")
    (folder / "u.data").write_text("".join("\t".join(map(str, row)) + "\n" for row in ratings))
    return folder
