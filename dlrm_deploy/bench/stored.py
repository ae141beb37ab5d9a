"""Rows of a benchmark on disk: JSON lines, or one JSON array in a file that ends in .json."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dlrm_deploy.errors import ConfigError
from dlrm_deploy.files import atomic_file

Facts = dict[str, Any]


def read_rows(path: Path) -> list[Facts]:
    """The rows of a file, each complete in itself.

    Raises:
        ConfigError: it cannot be read, or holds something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
        rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines()]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as err:
        raise ConfigError(f"cannot read the rows of {path}: {err}.") from err
    for row in rows:
        if not isinstance(row, dict) or not isinstance(row.get("command"), str):
            raise ConfigError(f"{path} does not hold rows of `dlrm-deploy bench --out`: a row without its command.")
    if not rows:
        raise ConfigError(f"{path} holds no rows.")
    return rows


def write_rows(path: Path, lines: str) -> None:
    """Write JSON lines to a file.

    Raises:
        OutputError: it cannot be written.
    """
    if path.suffix == ".json":
        lines = "[\n" + ",\n".join(lines.splitlines()) + "\n]\n"
    with atomic_file(path) as beside:
        beside.write_text(lines, encoding="utf-8")


def commands(rows: Sequence[Facts]) -> list[list[str]]:
    """The arguments of each `dlrm-deploy bench` that the rows came from, each once, in order.

    Raises:
        ConfigError: no row came from one.
    """
    found = []
    for text in dict.fromkeys(row["command"] for row in rows):
        words = shlex.split(text)
        if words[:2] == ["dlrm-deploy", "bench"]:
            found.append(words[2:])
    if not found:
        raise ConfigError("none of the rows came from `dlrm-deploy bench`, so that there is nothing to run again.")
    return found
