from __future__ import annotations

import pytest

from dlrm_deploy.bench.stored import commands, read_rows, write_rows
from dlrm_deploy.errors import ConfigError

LINES = '{"command": "dlrm-deploy bench \'my b\' --batch 1", "ratio": 2}\n{"command": "dlrm-deploy bench c"}\n'


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows"])
def test_rows_come_back_from_both_forms(tmp_path, name):
    write_rows(tmp_path / name, LINES)
    rows = read_rows(tmp_path / name)
    assert [row.get("ratio") for row in rows] == [2, None]
    assert commands([*rows, *rows]) == [["my b", "--batch", "1"], ["c"]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no rows"),
        ("[]", "holds no rows"),
        ("{", "cannot read the rows"),
        ("[1]", "a row without its command"),
        ('{"engine": "a"}\n', "a row without its command"),
        ("\xff", "cannot read the rows"),
    ],
)
def test_other_files_are_refused(tmp_path, text, message):
    (tmp_path / "rows").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=message):
        read_rows(tmp_path / "rows")


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot read the rows of .*missing"):
        read_rows(tmp_path / "missing")


@pytest.mark.parametrize("command", ["rm -rf x", "dlrm-deploy loadtest b", ""])
def test_only_our_own_command_is_ever_run_again(command):
    with pytest.raises(ConfigError, match="nothing to run again"):
        commands([{"command": command}])
