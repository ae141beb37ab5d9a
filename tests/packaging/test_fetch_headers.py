"""Where the native build gets its third-party headers from, without asking a network."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import io
import sys
import tarfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "packaging" / "fetch_headers.py"


@pytest.fixture
def fetch(monkeypatch):
    spec = importlib.util.spec_from_file_location("fetch_headers", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "fetch_headers", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    for name in ("ONNXRUNTIME_INCLUDE_DIR", "ONNXRUNTIME_RELEASE_SHA256"):
        monkeypatch.delenv(name, raising=False)
    return module


@pytest.fixture
def wanted(fetch, tmp_path):
    """ONNX Runtime's headers on a machine that has none."""
    return dataclasses.replace(fetch.THIRD_PARTY["onnxruntime"], system_folders=(str(tmp_path / "system"),))


def failing(fetch, reason):
    def source(wanted, scratch, **options):
        raise fetch.FetchError(reason)

    return source


def holding(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "onnxruntime_cxx_api.h").write_text("// header")
    return folder


def test_a_folder_named_in_the_environment_comes_first_and_must_hold_the_header(fetch, wanted, tmp_path, monkeypatch):
    holding(tmp_path / "system")
    monkeypatch.setenv("ONNXRUNTIME_INCLUDE_DIR", str(tmp_path / "mine"))
    with pytest.raises(fetch.FetchError, match=r"is set to .*mine, but there is no onnxruntime_cxx_api\.h in it"):
        fetch.provide(wanted, tmp_path / "into")
    mine = holding(tmp_path / "mine")
    assert fetch.provide(wanted, tmp_path / "into") == mine


def test_the_system_is_used_before_anything_is_fetched(fetch, wanted, tmp_path):
    system = holding(tmp_path / "system")
    assert fetch.provide(wanted, tmp_path / "into") == system


def test_the_debian_package_follows_a_release_that_cannot_be_reached_and_is_found_again(
    fetch, wanted, tmp_path, monkeypatch
):
    monkeypatch.setattr(fetch, "_from_release", failing(fetch, "unreachable"))
    monkeypatch.setattr(fetch, "_from_debian", lambda wanted, scratch: holding(scratch / "include"))
    first = fetch.provide(wanted, tmp_path / "into")
    assert (first / "onnxruntime_cxx_api.h").is_file()
    assert [path.name for path in (tmp_path / "into").iterdir()] == [first.name]  # no scratch is left behind
    monkeypatch.setattr(fetch, "_from_debian", failing(fetch, "asked twice"))
    assert fetch.provide(wanted, tmp_path / "into") == first


@pytest.fixture
def release(fetch, wanted, tmp_path, monkeypatch):
    """The parts of `provide` with a release archive on disk, no Debian package, and the archive's SHA-256."""
    archive = tmp_path / "release.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("onnxruntime-linux-test-1.21.0/include/onnxruntime_cxx_api.h"), io.BytesIO())
    monkeypatch.setattr(fetch, "_from_debian", failing(fetch, "asked"))
    wanted = dataclasses.replace(wanted, release=archive.as_uri(), machines={})
    return wanted, hashlib.sha256(archive.read_bytes()).hexdigest()


def test_a_release_archive_is_named_with_its_checksum(fetch, release, tmp_path, capsys):
    wanted, sha256 = release
    assert (fetch.provide(wanted, tmp_path / "into") / wanted.required).is_file()
    told = f"SHA-256 {sha256} (not checked; set ONNXRUNTIME_RELEASE_SHA256 to pin it)"
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_a_pinned_release_archive_is_used_only_where_it_is_the_one(fetch, release, tmp_path, monkeypatch, capsys, how):
    wanted, sha256 = release

    def provide(expected):
        if how == "argument":
            return fetch.provide(wanted, tmp_path / "into", expected)
        monkeypatch.setenv("ONNXRUNTIME_RELEASE_SHA256", expected)
        return fetch.provide(wanted, tmp_path / "into")

    with pytest.raises(fetch.ChecksumError, match=f"has SHA-256 {sha256}, expected {'0' * 64}"):
        provide("0" * 64)
    assert not list((tmp_path / "into").iterdir())
    assert (provide(sha256.upper()) / wanted.required).is_file()
    assert f"{sha256} (as expected)" in capsys.readouterr().err


def test_when_every_source_fails_the_error_lists_them_and_says_how_to_name_a_folder(
    fetch, wanted, tmp_path, monkeypatch
):
    monkeypatch.setattr(fetch, "_from_release", failing(fetch, "timed out"))
    monkeypatch.setattr(fetch, "_from_debian", failing(fetch, "no apt-get"))
    with pytest.raises(fetch.FetchError) as error:
        fetch.provide(wanted, tmp_path / "into")
    for part in ("release archive: timed out", "Debian package: no apt-get", "-DONNXRUNTIME_INCLUDE_DIR=FOLDER"):
        assert part in str(error.value)
    assert not list((tmp_path / "into").iterdir())


def test_both_formats_of_apt_sources_are_read_without_disabled_and_source_entries(fetch, tmp_path):
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / "sources.list").write_text(
        "# comment\ndeb [arch=amd64 signed-by=/k.gpg] http://mirror.test/debian bookworm main contrib # here\n"
        "deb-src http://mirror.test/debian bookworm main\ndeb cdrom\n"
    )
    (tmp_path / "sources.list.d/a.sources").write_text(
        "Types: deb deb-src\nURIs: http://mirror.test/debian\nSuites: bookworm bookworm-updates\nComponents: main\n"
        "Signed-By:\n -----BEGIN-----\n .\n\n"
        "Enabled: no\nTypes: deb\nURIs: http://off.test\nSuites: x\n\n"
        "Types: deb-src\nURIs: http://src.test\nSuites: x\n"
    )
    deb822, one_line = fetch.read_sources(tmp_path)
    assert deb822["Types"] == "deb"
    assert deb822["Signed-By"] == "\n -----BEGIN-----\n ."
    assert one_line == {
        "Types": "deb", "Architectures": "amd64", "Signed-By": "/k.gpg", "URIs": "http://mirror.test/debian",
        "Suites": "bookworm", "Components": "main contrib",
    }  # fmt: skip


def test_only_the_main_archive_is_pointed_at_another_suite(fetch):
    main = {"URIs": "http://mirror.test/debian", "Suites": "bookworm bookworm-updates", "Components": "main"}
    security = {"URIs": "http://mirror.test/security", "Suites": "bookworm-security", "Components": "main"}
    other = {"URIs": "http://other.test", "Suites": "nodistro", "Components": "tools"}
    assert fetch.in_suite([main, security, other], "trixie") == [{**main, "Suites": "trixie"}]
    assert fetch.in_suite([main, security], None) == [main, security]


def test_a_keyring_that_is_too_old_is_replaced_by_the_one_of_the_machine_s_own_suite(
    fetch, wanted, tmp_path, monkeypatch
):
    asked = []

    def download(package, sources, state):
        asked.append((package, sources[0]["Suites"], sources[0].get("Signed-By", "").endswith(".gpg")))
        if len(asked) == 1:
            raise fetch.FetchError("NO_PUBKEY 0123")
        return state / "x.deb"

    monkeypatch.setattr(fetch.shutil, "which", lambda tool: tool)
    monkeypatch.setattr(fetch, "_os_release_id", lambda: "debian")
    monkeypatch.setattr(fetch, "read_sources", lambda folder: [{"Suites": "bullseye", "Components": "main"}])
    monkeypatch.setattr(fetch, "_apt_download", download)
    monkeypatch.setattr(
        fetch, "_run", lambda command: (Path(command[-1]) / "usr/include/onnxruntime").mkdir(parents=True)
    )
    assert fetch._from_debian(wanted, tmp_path) == tmp_path / "package/usr/include/onnxruntime"
    assert asked == [
        ("libonnxruntime-dev", "trixie", False),
        ("debian-archive-keyring", "bullseye", False),
        ("libonnxruntime-dev", "trixie", True),
    ]


def test_an_archive_is_unpacked_inside_its_folder_only_and_without_libraries(fetch, tmp_path):
    archive = tmp_path / "release.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        for name in ("p/include/a.h", "p/lib/libx.so.1", "../escaped.h"):
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    into = tmp_path / "out"
    into.mkdir()
    with tarfile.open(archive) as tar:
        fetch._extract_sources(tar, into)
    assert [str(path.relative_to(into)) for path in into.rglob("*") if path.is_file()] == ["p/include/a.h"]
    assert not (tmp_path / "escaped.h").exists()
