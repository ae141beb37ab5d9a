"""Where the tests' browser comes from, without asking a network: programs and packages here are made up."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "packaging" / "fetch_browser.py"
WORKS, FAILS = "#!/bin/sh\nexit 0\n", "#!/bin/sh\necho broken >&2\nexit 5\n"


@pytest.fixture
def fetch(monkeypatch, tmp_path):
    """The module on a machine whose PATH has the shell's tools and no browser."""
    spec = importlib.util.spec_from_file_location("fetch_browser", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("sh", "dirname", "readlink", "dpkg", "dpkg-deb", "tar", "rm", "cp", "mkdir", "cat", "sed"):
        if (found := shutil.which(name)) is not None:
            (tools / name).symlink_to(found)
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.delenv("CHROME", raising=False)
    return module


@pytest.fixture
def into(tmp_path):
    return tmp_path / "build" / "browser"


def program(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    path.chmod(0o755)
    return path


def test_the_program_that_the_environment_names_comes_first_and_must_be_there(fetch, into, tmp_path, monkeypatch):
    program(tmp_path / "bin" / "chromium", FAILS)
    mine = program(tmp_path / "mine", WORKS)
    monkeypatch.setenv("CHROME", str(mine))
    assert fetch.provide(into) == mine
    monkeypatch.setenv("CHROME", str(tmp_path / "none"))
    with pytest.raises(fetch.FetchError, match=r"CHROME is set to .*none, but no such program"):
        fetch.provide(into)


def test_a_browser_on_path_is_used_before_anything_is_fetched(fetch, into, tmp_path):
    chromium = program(tmp_path / "bin" / "chromium", WORKS)
    assert fetch.provide(into) == chromium
    assert not into.exists()


def test_a_browser_that_does_not_start_is_no_browser(fetch, into, tmp_path):
    program(tmp_path / "bin" / "google-chrome", FAILS)
    with pytest.raises(fetch.FetchError, match=r"google-chrome ended with 5: broken"):
        fetch.provide(into)


def test_without_apt_the_error_says_what_was_tried_and_what_to_do(fetch, into):
    with pytest.raises(fetch.FetchError) as error:
        fetch.provide(into)
    for part in ("google-chrome", "apt-get is not on this machine", "Install Chromium", "environment variable CHROME"):
        assert part in str(error.value)
    assert not list(into.parent.iterdir())  # no scratch is left behind


@pytest.fixture
def archive(tmp_path, fetch):
    """Makes an apt-get that offers a package with this browser, and counts how often it is asked."""

    def offer(browser: str, name: str = "chromium-headless-shell") -> Path:
        tree = tmp_path / "tree"
        program(tree / f"usr/lib/chromium/{name}", browser)
        program(tree / "usr/lib/here/libneeded.so.1", "")
        (tree / "DEBIAN").mkdir(exist_ok=True)
        (tree / "DEBIAN/control").write_text(
            f"Package: {name}\nVersion: 1\nArchitecture: all\nMaintainer: n\nDescription: d\n"
        )
        package = tmp_path / f"{name}.deb"
        subprocess.run([_dpkg_deb(), "--root-owner-group", "-b", tree, package], check=True, capture_output=True)
        return program(
            tmp_path / "bin" / "apt-get",
            f"""#!/bin/sh
echo "$@" >> {tmp_path}/asked
config=${{3#--config-file=}}
case "$*" in
  *update) exit 0 ;;
  *"install {name}") cache=$(sed -n 's/^Dir::Cache "\\(.*\\)";$/\\1/p' "$config")
    cp {package} "$cache/archives/" ;;
  *) echo "E: Unable to locate package" ; exit 100 ;;
esac
""",
        )

    return offer


def _dpkg_deb() -> str:
    found = shutil.which("dpkg-deb")
    if found is None:
        pytest.skip("dpkg-deb, which makes a package to unpack, is not on this machine")
    return found


SAYS_LIBRARIES = '#!/bin/sh\necho "$LD_LIBRARY_PATH|$FONTCONFIG_FILE|$*"\n'


@pytest.mark.parametrize("package", ["chromium-headless-shell", "chromium"])
def test_debian_s_package_is_unpacked_with_its_libraries_and_found_again(fetch, into, tmp_path, archive, package):
    archive(SAYS_LIBRARIES, package)
    start = fetch.provide(into)
    assert start == into / "browser"
    said = subprocess.run([start, "--a", "b c"], capture_output=True, text=True, check=True).stdout.strip().split("|")
    assert str(into / "root/usr/lib/here") in said[0].split(":")
    assert said[1:] == [str(into / "fonts.conf"), "--a b c"]
    asked = (tmp_path / "asked").read_text()
    assert fetch.provide(into) == start
    assert (tmp_path / "asked").read_text() == asked
    assert [path.name for path in into.parent.iterdir()] == ["browser"]


def test_an_unpacked_browser_that_does_not_start_is_not_kept(fetch, into, archive):
    archive(FAILS)
    with pytest.raises(fetch.FetchError, match=r"Debian's package cannot be used: .* ended with 5: broken"):
        fetch.provide(into)
    assert not list(into.parent.iterdir())


def test_apt_works_on_a_copy_of_what_is_installed(fetch, into, tmp_path, archive, monkeypatch):
    installed = tmp_path / "status"
    installed.write_text("Package: something\n")
    monkeypatch.setattr(fetch, "STATUS", installed)
    seen = []
    run = fetch._run
    monkeypatch.setattr(fetch, "_run", lambda command, **o: seen.append(status_of(command)) or run(command, **o))
    archive(WORKS)
    fetch.provide(into)
    copies = {status for status in seen if status is not None}
    assert len(copies) == 1
    assert copies != {(installed, "Package: something\n")}
    assert {content for _, content in copies} == {"Package: something\n"}


def status_of(command):
    """The status file that an apt command works on, and what it holds."""
    for word in command:
        if word.startswith("--config-file="):
            config = Path(word.partition("=")[2]).read_text()
            path = Path(config.partition('Dir::State::Status "')[2].partition('"')[0])
            return path, path.read_text()
    return None


def test_the_command_prints_the_program_or_the_reason(fetch, into, tmp_path, capsys):
    assert fetch.main(["--into", str(into)]) == 1
    assert capsys.readouterr().err.startswith("error: no browser")
    chromium = program(tmp_path / "bin" / "chromium", WORKS)
    assert fetch.main(["--into", str(into)]) == 0
    assert capsys.readouterr().out == f"{chromium}\n"
