#!/usr/bin/env python3
"""Find, or fetch, the third-party C++ files that the native build compiles against.

They are never copied into the repository, so a fresh machine needs a way to get them. CMake runs this file at
configure time, before any Python environment exists: hence the standard library only, and Python 3.10.

    fetch_headers.py onnxruntime --into build/headers    prints the folder that holds onnxruntime_cxx_api.h
    fetch_headers.py googletest --into build/headers     prints the folder that holds GoogleTest's CMakeLists.txt

Each source is tried in turn: a folder the user names, the system, an earlier fetch, the official release archive, and
the Debian package, which comes from the mirrors this machine is already set up for, through a private
`apt-get` state: nothing is installed, nothing outside `--into` and a temporary folder is written, root is not needed.

apt checks the signature of what it fetches. A release archive has none: what was fetched is printed with its SHA-256,
and `--release-sha256`, or the environment variable ONNXRUNTIME_RELEASE_SHA256 or GOOGLETEST_RELEASE_SHA256, names the
only one to accept. Another one is an error, and no other source is tried then.

Main path: `main` -> `provide` -> one of `_from_release`, `_from_debian`.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request
from dataclasses import dataclass
from functools import partial
from pathlib import Path

NETWORK_TIMEOUT_S = 15
APT_TIMEOUT_S = 300


class FetchError(Exception):
    """One source did not have the files. The message says why."""


class ChecksumError(Exception):
    """A release archive is not the one that the user expects."""


@dataclass(frozen=True)
class ThirdParty:
    """One set of files that the build needs, and where it may come from."""

    name: str
    variable: str
    """Environment variable, and CMake cache variable, with which the user names a folder."""
    sha256_variable: str
    """Environment variable with which the user pins the release archive."""
    required: str
    """File whose presence makes a folder the right one, relative to it."""
    system_folders: tuple[str, ...]
    release: str
    """Official archive; `{machine}` is replaced by its name of this machine's architecture."""
    machines: dict[str, str]
    """`platform.machine()` -> `{machine}`."""
    folder_in_release: str
    """Pattern of the wanted folder inside the archive."""
    debian_package: str
    debian_suite: str | None
    """Suite to take the package from; None is the machine's own."""
    folder_in_package: str


THIRD_PARTY = {
    "onnxruntime": ThirdParty(
        name="ONNX Runtime 1.21 C++ headers",
        variable="ONNXRUNTIME_INCLUDE_DIR",
        sha256_variable="ONNXRUNTIME_RELEASE_SHA256",
        required="onnxruntime_cxx_api.h",
        system_folders=tuple(
            f"{root}/include/{sub}".rstrip("/")
            for root in ("/usr/local", "/usr")
            for sub in ("", "onnxruntime", "onnxruntime/core/session")
        ),
        release="https://github.com/microsoft/onnxruntime/releases/download/v1.21.0/"
        "onnxruntime-linux-{machine}-1.21.0.tgz",
        machines={"x86_64": "x64", "aarch64": "aarch64"},
        folder_in_release="onnxruntime-linux-*/include",
        debian_package="libonnxruntime-dev",
        debian_suite="trixie",
        folder_in_package="usr/include/onnxruntime",
    ),
    "googletest": ThirdParty(
        name="GoogleTest sources",
        variable="GOOGLETEST_SOURCE_DIR",
        sha256_variable="GOOGLETEST_RELEASE_SHA256",
        required="googletest/include/gtest/gtest.h",
        system_folders=("/usr/src/googletest",),
        release="https://github.com/google/googletest/archive/refs/tags/v1.14.0.tar.gz",
        machines={},
        folder_in_release="googletest-1.14.0",
        debian_package="googletest",
        debian_suite=None,
        folder_in_package="usr/src/googletest",
    ),
}


def provide(wanted: ThirdParty, into: Path, release_sha256: str | None = None) -> Path:
    """Return a folder holding `wanted.required`, fetching it to `into` if this machine has none.

    The folder under `into` appears whole or not at all, and is used at once the next time.

    Raises:
        FetchError: no source has the files; the message lists every source and how to name a folder.
        ChecksumError: the release archive's SHA-256 is not `release_sha256`, or else what the environment names.
    """
    named = os.environ.get(wanted.variable)
    if named:
        if (Path(named) / wanted.required).is_file():
            return Path(named)
        raise FetchError(f"{wanted.variable} is set to {named}, but there is no {wanted.required} in it.")
    target = into / wanted.debian_package
    for folder in (*map(Path, wanted.system_folders), target):
        if (folder / wanted.required).is_file():
            return folder

    into.mkdir(parents=True, exist_ok=True)
    failures = []
    expected = release_sha256 or os.environ.get(wanted.sha256_variable)
    from_release = partial(_from_release, sha256=expected)
    for title, fetch in (("release archive", from_release), ("Debian package", _from_debian)):
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=into) as scratch:
            try:
                found = fetch(wanted, Path(scratch))
                if not (found / wanted.required).is_file():
                    raise FetchError(f"it has no {wanted.required}")
                _move(found, target)
                return target
            except FetchError as err:
                failures.append(f"  {title}: {err}")
    looked = ", ".join(wanted.system_folders)
    raise FetchError(
        f"{wanted.name} were not found.\n  this machine: no {wanted.required} in {looked}\n"
        + "\n".join(failures)
        + f"\nDownload them from {_release_url(wanted)} or install the Debian package {wanted.debian_package}, "
        f"and name the folder that holds {wanted.required}: set {wanted.variable} in the environment, or pass "
        f"-D{wanted.variable}=FOLDER to CMake."
    )


def _move(found: Path, target: Path) -> None:
    try:
        found.rename(target)
    except OSError as err:
        if not target.is_dir():  # otherwise another process was quicker, with the same files
            raise FetchError(f"cannot write {target}: {err}") from err


def _release_url(wanted: ThirdParty) -> str:
    machine = platform.machine()
    return wanted.release.format(machine=wanted.machines.get(machine, machine))


def _from_release(wanted: ThirdParty, scratch: Path, sha256: str | None) -> Path:
    if wanted.machines and platform.machine() not in wanted.machines:
        raise FetchError(f"there is none for {platform.machine()}")
    url = _release_url(wanted)
    archive = scratch / "release.tgz"
    try:
        with (
            urllib.request.urlopen(url, timeout=NETWORK_TIMEOUT_S) as response,
            archive.open("wb") as file,
        ):
            shutil.copyfileobj(response, file)
        found = hashlib.sha256(archive.read_bytes()).hexdigest()
        if sha256 and found != sha256.lower():
            raise ChecksumError(
                f"{url} has SHA-256 {found}, expected {sha256}. Nothing of it was used. Find out which is right, then "
                f"correct {wanted.sha256_variable} or --release-sha256, or name a folder with {wanted.variable}."
            )
        checked = "as expected" if sha256 else f"not checked; set {wanted.sha256_variable} to pin it"
        print(f"fetched {url}, SHA-256 {found} ({checked})", file=sys.stderr)
        with tarfile.open(archive) as tar:
            _extract_sources(tar, scratch)
    except (OSError, urllib.error.URLError, tarfile.TarError) as err:
        raise FetchError(f"{url}: {err}") from err
    return _only_match(scratch, wanted.folder_in_release)


def _extract_sources(tar: tarfile.TarFile, scratch: Path) -> None:
    """Unpack regular files only, and only below `scratch`; shared libraries are of no use here."""
    root = scratch.resolve()
    for member in tar:
        inside = (root / member.name).resolve().is_relative_to(root)
        if member.isfile() and inside and ".so" not in member.name:
            tar.extract(member, root)


def _from_debian(wanted: ThirdParty, scratch: Path) -> Path:
    for tool in ("apt-get", "dpkg"):
        if shutil.which(tool) is None:
            raise FetchError(f"{tool} is not on this machine")
    suite = wanted.debian_suite if _os_release_id() == "debian" else None
    sources = read_sources(Path("/etc/apt"))
    try:
        package = _apt_download(wanted.debian_package, in_suite(sources, suite), scratch / "apt")
    except FetchError as err:
        if suite is None or "NO_PUBKEY" not in str(err):
            raise
        # The machine's keyring is older than the suite; its own suite offers the newer one, signed with a key it knows.
        keyring_package = _apt_download("debian-archive-keyring", sources, scratch / "apt-keyring")
        _run(["dpkg", "-x", str(keyring_package), str(scratch / "keyring")])
        keyring = scratch / "keyring/usr/share/keyrings/debian-archive-keyring.gpg"
        package = _apt_download(wanted.debian_package, in_suite(sources, suite, keyring), scratch / "apt2")
    _run(["dpkg", "-x", str(package), str(scratch / "package")])
    return _only_match(scratch / "package", wanted.folder_in_package)


def _os_release_id() -> str:
    try:
        return platform.freedesktop_os_release().get("ID", "")
    except OSError:
        return ""


def read_sources(etc_apt: Path) -> list[dict[str, str]]:
    """Read the machine's apt sources, both formats, as deb822 fields. Disabled ones and deb-src are left out."""
    stanzas: list[dict[str, str]] = []
    for path in sorted((etc_apt / "sources.list.d").glob("*.sources")):
        for text in "\n".join(_lines(path)).split("\n\n"):
            fields: dict[str, str] = {}
            key = ""
            for line in text.splitlines():
                if line[:1] in (" ", "\t"):
                    fields[key] = fields.get(key, "") + "\n" + line
                elif ":" in line:
                    key, _, value = line.partition(":")
                    fields[key] = value.strip()
            if fields.get("Enabled", "yes").lower() != "no" and "deb" in fields.get("Types", "").split():
                stanzas.append({**fields, "Types": "deb"})
    for path in (etc_apt / "sources.list", *sorted((etc_apt / "sources.list.d").glob("*.list"))):
        for line in _lines(path):
            stanza = _one_line_source(line)
            if stanza is not None:
                stanzas.append(stanza)
    return stanzas


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        return []
    return [line.rstrip() for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]


def _one_line_source(line: str) -> dict[str, str] | None:
    """`deb [signed-by=K] URI SUITE COMPONENT...` as deb822 fields; None for anything else."""
    words = line.partition("#")[0].split()
    if not words or words[0] != "deb":
        return None
    fields = {"Types": "deb"}
    rest = words[1:]
    if rest and rest[0].startswith("["):
        options = ""
        while rest and not options.endswith("]"):
            options = f"{options} {rest.pop(0)}"
        for option in options.strip(" []").split():
            key, _, value = option.partition("=")
            names = {"signed-by": "Signed-By", "arch": "Architectures", "trusted": "Trusted"}
            fields[names.get(key.lower(), key)] = value.replace(",", " ")
    if len(rest) < 3:
        return None
    return {**fields, "URIs": rest[0], "Suites": rest[1], "Components": " ".join(rest[2:])}


def in_suite(sources: list[dict[str, str]], suite: str | None, keyring: Path | None = None) -> list[dict[str, str]]:
    """Point the sources of the main Debian archive at `suite`, drop the others. With None, keep all as they are.

    The main archive is told from security, backports and third parties by its component `main` and its suites: a name
    alone is the release itself, "name-updates" or "name-security" is not.
    """
    if suite is None:
        return sources
    chosen = []
    for source in sources:
        releases = [name for name in source.get("Suites", "").split() if "-" not in name and "/" not in name]
        if releases and "main" in source.get("Components", "").split():
            signed = {"Signed-By": str(keyring)} if keyring is not None else {}
            chosen.append({**source, "Suites": suite, "Components": "main", **signed})
    return chosen


def _apt_download(package: str, sources: list[dict[str, str]], state: Path) -> Path:
    """Download one package with an apt state of its own: the machine's lists and cache stay as they are."""
    if not sources:
        raise FetchError("no apt source of the Debian archive is set up on this machine")
    for folder in ("lists/partial", "cache/archives/partial", "sources", "download"):
        (state / folder).mkdir(parents=True)
    (state / "status").touch()
    stanzas = ("\n".join(f"{key}: {value}" for key, value in source.items()) for source in sources)
    (state / "sources/all.sources").write_text("\n\n".join(stanzas) + "\n", encoding="utf-8")
    # The machine's own apt settings (proxy, certificates) still apply; its hooks after an update do not.
    config = state / "apt.conf"
    config.write_text(
        "#clear APT::Update;\n"
        f'Dir::Etc::SourceList "/dev/null";\nDir::Etc::SourceParts "{state / "sources"}/";\n'
        f'Dir::State::Lists "{state / "lists"}/";\nDir::State::Status "{state / "status"}";\n'
        f'Dir::Cache "{state / "cache"}/";\nAPT::Sandbox::User "{_user_name()}";\nAcquire::Languages "none";\n'
        f'Acquire::http::Timeout "{NETWORK_TIMEOUT_S}";\nAcquire::https::Timeout "{NETWORK_TIMEOUT_S}";\n',
        encoding="utf-8",
    )
    apt = ["apt-get", "--quiet", f"--config-file={config}"]
    _run([*apt, "--error-on=any", "update"])
    _run([*apt, "download", package], cwd=state / "download")
    return _only_match(state / "download", "*.deb")


def _user_name() -> str:
    """apt drops root for this user; it must be one who can write to the scratch folder, which is the caller."""
    import pwd

    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # a container may run under a number without a name
        return ""


def _run(command: list[str], cwd: Path | None = None) -> None:
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=APT_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as err:
        raise FetchError(f"{command[0]}: {err}") from err
    if done.returncode != 0:
        said = [line for line in (done.stdout + done.stderr).splitlines() if line[:2] in ("E:", "W:")]
        raise FetchError(f"{command[0]} ended with {done.returncode}: " + " ".join(said or [done.stderr.strip()]))


def _only_match(folder: Path, pattern: str) -> Path:
    matches = list(folder.glob(pattern))
    if len(matches) != 1:
        raise FetchError(f"expected one {pattern} in what was fetched, found {len(matches)}")
    return matches[0]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Find or fetch C++ files that the native build needs.")
    parser.add_argument("what", choices=sorted(THIRD_PARTY))
    parser.add_argument("--into", type=Path, required=True, help="folder for what has to be fetched")
    parser.add_argument("--release-sha256", metavar="HEX", help="the only SHA-256 to accept of a release archive")
    options = parser.parse_args(arguments)
    try:
        print(provide(THIRD_PARTY[options.what], options.into.absolute(), options.release_sha256))
    except (FetchError, ChecksumError, OSError) as err:
        print(f"error: {err}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
