#!/usr/bin/env python3
"""Find, or fetch, a headless Chromium, in which the tests look at the HTML report.

    fetch_browser.py --into build/browser    prints the program to run

Tried in turn: the program that the environment variable CHROME names, a Chromium or Chrome on PATH, an earlier fetch,
and Debian's package, which is unpacked under `--into` together with the libraries that this machine lacks. apt finds
and checks them with a state of its own and the sources of this machine: nothing is installed, nothing outside `--into`
is written, root is not needed. It takes about 70 MB and 20 seconds, once.

Main path: `main` -> `provide` -> `_from_debian`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ON_PATH = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome-stable", "google-chrome", "chrome")
DEBIAN_PACKAGES = ("chromium-headless-shell", "chromium")
"""The first that the machine's sources have. The shell needs no window toolkit: less to fetch."""

STATUS = Path("/var/lib/dpkg/status")
NETWORK_TIMEOUT_S = 15
APT_TIMEOUT_S = 240

_START = """#!/bin/sh
# Starts the unpacked browser with the libraries and fonts that were unpacked beside it.
here=$(dirname "$(readlink -f "$0")")
export LD_LIBRARY_PATH={libraries}${{LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}}
export FONTCONFIG_FILE="$here/fonts.conf" XDG_CACHE_HOME="$here/cache" XDG_CONFIG_HOME="$here/config"
exec "$here/{program}" "$@"
"""

_FONTS = """<?xml version="1.0"?>
<!DOCTYPE fontconfig SYSTEM "urn:fontconfig:fonts.dtd">
<fontconfig>
  <dir>/usr/share/fonts</dir>
  <dir prefix="relative">root/usr/share/fonts</dir>
  <cachedir prefix="xdg">fontconfig</cachedir>
  <match>
    <test name="family" qual="all" compare="not_eq"><string>monospace</string></test>
    <edit name="family" mode="append_last" binding="same"><string>DejaVu Sans</string></edit>
  </match>
  <alias binding="same"><family>monospace</family><prefer><family>DejaVu Sans Mono</family></prefer></alias>
</fontconfig>
"""


class FetchError(Exception):
    """There is no browser, and none can be had. The message says why, and what to do."""


def provide(into: Path) -> Path:
    """Return the program of a browser that starts, fetching one to `into` if this machine has none.

    `into` appears whole or not at all, and is used at once the next time.

    Raises:
        FetchError: no source has one, or the one named by CHROME does not start.
    """
    named = os.environ.get("CHROME")
    if named:
        program = shutil.which(named)
        if program is None:
            raise FetchError(f"CHROME is set to {named}, but no such program can be run.")
        return _that_starts(Path(program))
    for name in ON_PATH:
        program = shutil.which(name)
        if program is not None:
            return _that_starts(Path(program))
    start = into / "browser"
    if start.is_file():
        return _that_starts(start)
    into.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=into.parent) as scratch:
        unpacked = Path(scratch) / "browser"
        try:
            _from_debian(unpacked, Path(scratch) / "apt")
            _that_starts(unpacked / "browser")
        except FetchError as err:
            raise FetchError(
                f"no browser: none of {', '.join(ON_PATH)} is on PATH, and Debian's package cannot be used: {err}. "
                "Install Chromium, or name the program of one in the environment variable CHROME."
            ) from err
        try:
            unpacked.rename(into)
        except OSError as err:
            if not start.is_file():  # otherwise another process was quicker, with the same files
                raise FetchError(f"cannot write {into}: {err}") from err
    return start


def _that_starts(program: Path) -> Path:
    _run([str(program), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", "about:blank"], timeout=60)
    return program


def _from_debian(unpacked: Path, state: Path) -> None:
    """Unpack the package and what it needs and the machine lacks, and write the script that starts it."""
    for tool in ("apt-get", "dpkg"):
        if shutil.which(tool) is None:
            raise FetchError(f"{tool} is not on this machine")
    packages = _download(state)
    root = unpacked / "root"
    root.mkdir(parents=True)
    for package in packages:
        _run(["dpkg", "-x", str(package), str(root)])
    programs = sorted(
        path
        for name in ("chromium-headless-shell", "headless_shell", "chromium")
        for path in root.glob(f"usr/lib/*/{name}")
        if path.is_file() and os.access(path, os.X_OK)
    )
    if not programs:
        raise FetchError("the package holds no program under usr/lib")
    (unpacked / "fonts.conf").write_text(_FONTS, encoding="utf-8")
    folders = sorted({path.parent.relative_to(unpacked) for path in root.rglob("lib*.so*")})
    libraries = ":".join(f'"$here/{folder}"' for folder in folders)
    start = unpacked / "browser"
    start.write_text(
        _START.format(libraries=libraries, program=programs[0].relative_to(unpacked)),
        encoding="utf-8",
    )
    start.chmod(0o755)


def _download(state: Path) -> list[Path]:
    """Download with an apt state of its own, which knows what is installed and changes nothing of it."""
    for folder in ("lists/partial", "cache/archives/partial"):
        (state / folder).mkdir(parents=True)
    # apt locks the folder of the status file: a copy of it needs no root and gets in nobody's way.
    if STATUS.is_file():
        shutil.copyfile(STATUS, state / "status")
    else:
        (state / "status").touch()
    config = state / "apt.conf"
    config.write_text(
        "#clear APT::Update;\n#clear DPkg;\n"  # the machine's hooks are for the machine's own packages
        f'Dir::State::Lists "{state / "lists"}/";\nDir::State::Status "{state / "status"}";\n'
        f'Dir::State::extended_states "{state / "extended_states"}";\nDir::Cache "{state / "cache"}/";\n'
        f'APT::Sandbox::User "{_user_name()}";\nAPT::Install-Recommends "false";\nAcquire::Languages "none";\n'
        f'Acquire::http::Timeout "{NETWORK_TIMEOUT_S}";\nAcquire::https::Timeout "{NETWORK_TIMEOUT_S}";\n',
        encoding="utf-8",
    )
    apt = ["apt-get", "--quiet", "--assume-yes", f"--config-file={config}"]
    refusals = []
    try:
        _run([*apt, "update"])
    except FetchError as err:  # one broken source of several: the others may do
        refusals.append(str(err))
    for package in DEBIAN_PACKAGES:
        try:
            _run([*apt, "--download-only", "install", package])
        except FetchError as err:
            refusals.append(str(err))
            continue
        return sorted((state / "cache/archives").glob("*.deb"))
    raise FetchError("; ".join(refusals))


def _user_name() -> str:
    """apt drops root for this user; it must be one who can write to the scratch folder, which is the caller."""
    import pwd

    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # a container may run under a number without a name
        return ""


def _run(command: list[str], timeout: float = APT_TIMEOUT_S) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=timeout, check=False)
    except (OSError, subprocess.TimeoutExpired) as err:
        raise FetchError(f"{command[0]}: {err}") from err
    if done.returncode != 0:
        lines = (done.stdout + done.stderr).strip().splitlines()
        said = [line for line in lines if line[:2] in ("E:", "W:")] or lines[-2:]
        raise FetchError(f"{command[0]} ended with {done.returncode}: {' '.join(said)}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Find or fetch a headless Chromium.")
    parser.add_argument("--into", type=Path, required=True, help="folder for what has to be fetched")
    options = parser.parse_args(arguments)
    try:
        print(provide(options.into.absolute()))
    except (FetchError, OSError) as err:
        print(f"error: {err}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
