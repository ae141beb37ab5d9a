import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from dlrm_deploy.cli.main import cli

COMMANDS = ["demo", "train", "export", "build", "check", "bench", "inspect"]
BLOCKED = "import sys; sys.modules[{package!r}] = None; from dlrm_deploy.cli.main import main; main()"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command):
    result = CliRunner().invoke(cli, [command, "--help"])
    assert result.exit_code == 0
    assert "Usage:" in result.output


def test_help_lists_the_commands_in_the_order_of_the_road_and_answers_at_once():
    start = time.monotonic()
    result = subprocess.run([sys.executable, "-m", "dlrm_deploy.cli.main", "--help"], capture_output=True, text=True)
    assert result.returncode == 0
    places = [result.stdout.index(f"\n  {command} ") for command in COMMANDS]
    assert places == sorted(places)
    assert time.monotonic() - start < 5  # importing torch alone takes longer on a busy machine


def test_an_unknown_command_is_wrong_usage():
    result = CliRunner().invoke(cli, ["serve-it"])
    assert result.exit_code == 2
    assert "No such command" in result.output


@pytest.mark.parametrize(
    ("package", "arguments", "extra"),
    [
        ("onnx", ["export", "--preset", "kaggle", "--out", "{tmp}/out"], "export"),
        ("torch", ["demo", "--out", "{tmp}/out"], "train"),
    ],
)
def test_a_missing_package_names_the_extra_that_brings_it(tmp_path, package, arguments, extra):
    code = BLOCKED.format(package=package)
    arguments = [argument.format(tmp=tmp_path) for argument in arguments]
    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert result.returncode == 3
    assert f"pip install 'dlrm-deploy[{extra}]'" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


# A shell that runs tests in the background has children ignore Ctrl-C, and Python then leaves it ignored.
LISTENING = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "


def export_process(out):
    """An export of 860 MB of random tables: long enough to be interrupted."""
    code = LISTENING + "from dlrm_deploy.cli.main import main; main()"
    arguments = ["export", "--preset", "kaggle", "--scale-rows", "0.4", "--out", str(out)]
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for_partial(process, folder):
    for _ in range(600):
        if any(folder.glob(".bundle.partial-*/tables/*.bin")):
            return
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    raise AssertionError("the export did not begin")


def test_ctrl_c_leaves_nothing_half_written(tmp_path):
    process = export_process(tmp_path / "bundle")
    wait_for_partial(process, tmp_path)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Interrupted" in errors
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


def test_a_killed_export_leaves_no_bundle_and_the_next_one_cleans_up(tmp_path):
    process = export_process(tmp_path / "bundle")
    wait_for_partial(process, tmp_path)
    process.kill()
    process.communicate(timeout=60)
    assert not (tmp_path / "bundle").exists()
    arguments = ["export", "--preset", "kaggle", "--scale-rows", "1e-5", "--out", str(tmp_path / "bundle")]
    assert CliRunner().invoke(cli, arguments).exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_being_terminated_leaves_nothing_half_written(tmp_path):
    process = export_process(tmp_path / "bundle")
    wait_for_partial(process, tmp_path)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


def run_main(*arguments, prepare="", **options):
    code = f"{prepare}\nfrom dlrm_deploy.cli.main import main; main()"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, **options)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, the disk that is always full")
def test_an_output_that_cannot_be_printed_exits_3_without_a_traceback(bundle):
    with Path("/dev/full").open("w") as full:
        result = run_main("inspect", bundle.path, "--json", stdout=full)
    assert result.returncode == 3
    assert "Error: No space left on device" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_reader_that_left_is_no_verdict(bundle):
    reader, writer = os.pipe()
    os.close(reader)
    result = run_main("inspect", bundle.path, "--json", stdout=writer)
    os.close(writer)
    assert result.returncode == 128 + signal.SIGPIPE
    assert result.stderr == ""


def test_a_bug_never_reads_as_a_verdict(bundle):
    prepare = (
        "import dlrm_deploy.bundle\ndef bug(*a): raise RuntimeError('bug')\ndlrm_deploy.bundle.Bundle.golden = bug"
    )
    result = run_main("check", bundle.path, prepare=prepare)
    assert result.returncode == 3
    assert "this is a bug of dlrm-deploy" in result.stderr


def test_an_export_that_the_disk_cannot_hold_is_refused_before_it_begins(tmp_path):
    result = run_main("export", "--preset", "kaggle", "--scale-rows", "1e5", "--out", tmp_path / "bundle")
    assert result.returncode == 3
    assert "the tables need 216" in result.stderr
    assert list(tmp_path.iterdir()) == []
