"""Runs: resumed after kill -9 they end with the same bits; the folder says what happened."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dlrm_deploy.checkpoint import MODEL_PREFIX, Checkpoint
from dlrm_deploy.config import ModelConfig
from dlrm_deploy.errors import CheckpointError, ConfigError, MissingDependencyError, OutputError
from dlrm_deploy.files import sha256_file
from dlrm_deploy.metrics import auc
from dlrm_deploy.model.dlrm import DLRM
from dlrm_deploy.train import log as log_module
from dlrm_deploy.train import run as run_module
from dlrm_deploy.train.recipe import Recipe
from dlrm_deploy.train.run import TrainingError, train

MODEL = ModelConfig.from_dict(
    {
        "name": "tiny",
        "dense_features": ["age", "hour"],
        "tables": [{"name": "user", "rows": 30, "width": 4}, {"name": "item", "rows": 50, "width": 4}],
        "features": [
            {"name": "user", "table": "user", "pooling_factor": 1},
            {"name": "liked", "table": "item", "pooling": "mean", "max_ids": 4},
        ],
        "bottom_mlp": [8, 4],
        "top_mlp": [8, 1],
    }
)


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "model.toml").write_text(MODEL.to_toml())
    return make_recipe(tmp_path)


def make_recipe(folder, **changes):
    """40 steps of 4 epochs, a checkpoint every 3 and an evaluation every 10."""
    options = {"batch_size": 64, "epochs": 4, "checkpoint_steps": 3, "log_steps": 1, "threads": 1, "seed": 3}
    return Recipe.from_dict(
        {
            "model": {"file": str(folder / "model.toml")},
            "data": {"kind": "random", "size": 640, "seed": 5},
            "optimizer": {"mlp_lr": 0.05, "table_lr": 0.1, "table_weight_decay": 0.001},
            "train": {**options, "tensorboard": False, **changes},
        }
    )


def tensors(run):
    """Every tensor of the best and the last checkpoint, and what they say about the run."""
    found = {}
    for path in [run / "best", *sorted((run / "checkpoints").iterdir())]:
        checkpoint = Checkpoint.open(path)
        found.update({(path.name, key): checkpoint.read(key) for key in sorted(checkpoint.keys())})
        found[path.name, "golden"] = checkpoint.golden().probabilities
        found[path.name, "state"] = json.dumps(checkpoint.trainer_state())
    return found


def records(run):
    """The log without what the clock says."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "samples_per_second"} for line in lines]


def assert_same_run(actual, expected):
    ours, theirs = tensors(actual), tensors(expected)
    assert ours.keys() == theirs.keys()
    for key in theirs:
        np.testing.assert_array_equal(ours[key], theirs[key], err_msg=str(key))
    assert (actual / "result.json").read_text() == (expected / "result.json").read_text()
    assert (actual / "best").readlink() == (expected / "best").readlink()


def test_training_learns_the_planted_signal_and_leaves_a_complete_run(recipe, tmp_path):
    run = tmp_path / "run"
    result = train(recipe, run)
    assert sorted(path.name for path in run.iterdir()) == [
        ".lock", "best", "checkpoints", "metrics.jsonl", "recipe.toml", "result.json",
    ]  # fmt: skip
    _, splits = recipe.load()
    batch, labels = splits.validation.batch(np.arange(len(splits.validation)))
    untrained = auc(labels, DLRM(MODEL, seed=3).predict(batch))
    assert result.validation_auc > untrained + 0.05

    best = Checkpoint.open(run / "best")
    model = DLRM(best.config)
    best.load_into({MODEL_PREFIX + name: tensor for name, tensor in model.named_tensors().items()})
    assert auc(labels, model.predict(batch)) == result.validation_auc
    golden = best.golden()
    assert golden.batch.batch_size == 64
    np.testing.assert_array_equal(model.predict(golden.batch), golden.probabilities)
    tested, _ = splits.test.batch([0, 63])
    np.testing.assert_array_equal(golden.batch.dense[[0, -1]], tested.dense)  # real rows of the test split

    log = records(run)
    assert [line["step"] for line in log if line["event"] == "train"] == list(range(1, 41))
    assert [line["step"] for line in log if line["event"] == "validation"] == [10, 20, 30, 40]
    assert max(line["auc"] for line in log if line["event"] == "validation") == result.validation_auc
    assert {path.name for path in (run / "checkpoints").iterdir()} == {f"step-{result.best_step}", "step-40"}


def test_early_stopping_keeps_the_best_evaluation(recipe, tmp_path):
    long = make_recipe(tmp_path, epochs=200, patience=2, evaluate_steps=5, checkpoint_steps=None)
    result = train(long, tmp_path / "run")
    evaluations = [line for line in records(tmp_path / "run") if line["event"] == "validation"]
    aucs = [line["auc"] for line in evaluations]
    best = int(np.argmax(aucs))
    assert result.steps < 2000
    assert len(aucs) == best + 3
    assert (result.best_step, result.validation_auc) == (evaluations[best]["step"], aucs[best])


DRIVER = """
import os, signal, sys, threading, time
from pathlib import Path
import torch
from dlrm_deploy.train.recipe import Recipe
from dlrm_deploy.train import run

recipe, out = Recipe.read(Path(sys.argv[1])), Path(sys.argv[2])
kills = 0
for plan in sys.argv[3:]:
    child = os.fork()
    if child == 0:
        kind, _, number = plan.partition(":")
        if kind != "end":
            counts = [0]
            def counted(call):
                def wrapper(*args, **kwargs):
                    counts[0] += 1
                    if counts[0] == int(number):
                        os.kill(os.getpid(), signal.SIGKILL)
                    return call(*args, **kwargs)
                return wrapper
            owner, name = {
                "step": (run._Run, "_step"),
                "fsync": (os, "fsync"),
                "rename": (Path, "rename"),
                "replace": (Path, "replace"),
                "rmtree": (run.shutil, "rmtree"),
            }[kind]
            setattr(owner, name, counted(getattr(owner, name)))
        run.train(recipe, out)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if plan != "end":
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (plan, status)
        kills += 1
    else:
        assert status == 0, status
print(kills)
"""


@pytest.mark.slow
def test_run_that_was_killed_again_and_again_ends_with_the_same_bits(recipe, tmp_path):
    (tmp_path / "recipe.toml").write_text(recipe.to_toml())
    train(recipe, tmp_path / "whole")
    # Where each process dies: in its n-th training step, or before its n-th call that makes a file last, puts a
    # checkpoint in its place, moves RUN/best, or removes an old checkpoint.
    plan = ["step:1", "fsync:3", "rename:1", "step:5", "fsync:9", "replace:2", "step:4", "replace:3", "rmtree:1"]
    plan += ["rename:2", "step:6", "rmtree:2", "fsync:20", "end"]
    command = [sys.executable, "-c", DRIVER, str(tmp_path / "recipe.toml"), str(tmp_path / "run"), *plan]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) == len(plan) - 1
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    # Log lines are those of an uninterrupted run, but for means over windows that a kill cut.
    assert records(tmp_path / "run") == records(tmp_path / "whole")
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


@pytest.mark.slow
def test_command_killed_by_the_clock_resumes_to_the_same_bits(tmp_path, recipe):
    longer = make_recipe(tmp_path, epochs=40)
    (tmp_path / "recipe.toml").write_text(longer.to_toml())
    train(longer, tmp_path / "whole")
    main = "from dlrm_deploy.cli.main import main; main()"
    arguments = ["train", str(tmp_path / "recipe.toml"), "--out", str(tmp_path / "run")]
    command = [sys.executable, "-c", main, *arguments]
    killed = 0
    for steps in (3, 60):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            if any(int(path.name[5:]) >= steps for path in (tmp_path / "run" / "checkpoints").glob("step-*")):
                break
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
    assert killed == 2
    assert not (tmp_path / "run" / "result.json").exists()
    train(longer, tmp_path / "run")
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_finished_run_is_not_trained_again(recipe, tmp_path, monkeypatch):
    result = train(recipe, tmp_path / "run")
    monkeypatch.setattr(run_module, "_Run", None)
    assert train(recipe, tmp_path / "run") == result


def test_other_recipe_in_the_same_run_is_refused_by_its_first_difference(recipe, tmp_path):
    train(make_recipe(tmp_path, epochs=1), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"run of another recipe \(\[train\] epochs was 1, now it is 4\)"):
        train(recipe, tmp_path / "run")


def test_changed_model_file_is_refused_on_resume(recipe, tmp_path):
    train(recipe, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    (tmp_path / "model.toml").write_text(replace(MODEL, top_mlp=(9, 1)).to_toml())
    with pytest.raises(ConfigError, match="was trained with other data or another model file"):
        train(recipe, tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: [], r"trainer\.json is damaged: it holds no JSON object, but \[\]"),
        (lambda state: None, r"trainer\.json is damaged: it holds no JSON object, but null"),
        (lambda state: {"step": 40}, r"trainer\.json: missing key best_step"),
        (lambda state: {**state, "loss": 1}, r"trainer\.json: unknown key loss\. Known keys: step"),
        (lambda state: {**state, "step": 39, "best_step": 0}, "it is of step 39, in the folder of step 40"),
        (lambda state: {**state, "step": "40"}, "these values make no sense: {'step': '40'"),
        (lambda state: {**state, "best_step": 41}, "make no sense: .*'best_step': 41"),
        (lambda state: {**state, "stale": 1.5}, "make no sense: .*'stale': 1.5"),
        (lambda state: {**state, "best_auc": None}, "make no sense: .*'best_auc': None"),
        (lambda state: {**state, "best_log_loss": float("nan")}, "make no sense: .*'best_log_loss': nan"),
        (lambda state: {**state, "stopped": 0}, "make no sense: .*'stopped': 0"),
        (lambda state: {**state, "threads": 0}, "make no sense: .*'threads': 0"),
    ],
)
def test_damaged_trainer_state_is_refused_on_resume(finished, change, message):
    recipe, run = finished
    folder = run / "checkpoints" / "step-40"
    state = json.loads((folder / "trainer.json").read_text())
    (folder / "trainer.json").write_text(json.dumps(change(state)))
    table = json.loads((folder / "files.json").read_text())  # with the hash that goes with it
    altered = {"size": (folder / "trainer.json").stat().st_size, "sha256": sha256_file(folder / "trainer.json")}
    table["files"]["trainer.json"] = altered
    (folder / "files.json").write_text(json.dumps(table))
    (run / "result.json").unlink()
    with pytest.raises(CheckpointError, match=message):
        train(recipe, run)


@pytest.fixture
def finished(recipe, tmp_path, finished_run):
    """A recipe and a copy of its finished run."""
    shutil.copytree(finished_run / "run", tmp_path / "run", symlinks=True)
    (tmp_path / "run" / "recipe.toml").write_text(recipe.to_toml())
    return recipe, tmp_path / "run"


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    (folder / "model.toml").write_text(MODEL.to_toml())
    train(make_recipe(folder), folder / "run")
    return folder


@pytest.mark.parametrize("name", ["__0_0.distcp", "trainer.json"])
def test_altered_checkpoint_is_refused_on_resume(finished, name):
    recipe, run = finished
    (run / "result.json").unlink()
    path = run / "checkpoints" / "step-40" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"step-40/{name} was altered"):
        train(recipe, run)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "{}", '{"steps": 1}', "\xff"],
    ids=["empty", "cut", "list", "null", "{}", "one", "bytes"],
)
def test_damaged_result_says_what_to_do_and_that_helps(finished, text):
    recipe, run = finished
    before = (run / "result.json").read_text()
    (run / "result.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(
        TrainingError, match=r"cannot read .*result\.json: .*\. Remove it: the same command then scores"
    ):
        train(recipe, run)
    (run / "result.json").unlink()
    train(recipe, run)
    assert (run / "result.json").read_text() == before


def test_result_whose_values_are_no_numbers_is_refused(finished):
    recipe, run = finished
    result = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps({**result, "test_auc": "good"}))
    with pytest.raises(TrainingError, match="a value is no number"):
        train(recipe, run)


def test_resumed_run_takes_the_threads_it_began_with(tmp_path, recipe, monkeypatch):
    unset = make_recipe(tmp_path, threads=None, epochs=2)
    seen = []

    class Listener(run_module.Silent):
        def stepped(self, step, loss):
            seen.append(torch.get_num_threads())
            if step == 10 and len(seen) == 10:
                raise KeyboardInterrupt

    monkeypatch.setattr(run_module.os, "sched_getaffinity", lambda _: {0})
    with pytest.raises(KeyboardInterrupt):
        train(unset, tmp_path / "run", Listener())
    monkeypatch.setattr(run_module.os, "sched_getaffinity", lambda _: {0, 1})
    train(unset, tmp_path / "run", Listener())
    assert seen == [1] * (10 + 11)  # the last checkpoint was of step 9
    train(unset, tmp_path / "other", Listener())
    assert set(seen[21:]) == {2}


@pytest.mark.parametrize("call", ["open", "fsync", "write"])
def test_full_disk_is_said_and_the_earlier_checkpoint_is_kept(tmp_path, recipe, monkeypatch, call):
    train(recipe, tmp_path / "whole")
    armed = []

    def full(original):
        def wrapper(*args, **kwargs):
            if armed and (call != "open" or str(args[0]).endswith(".distcp")):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return original(*args, **kwargs)

        return wrapper

    class Listener(run_module.Silent):
        def stepped(self, step, loss):
            if step == 6:
                armed.append(step)

    owner, name = {"open": (Path, "open"), "fsync": (os, "fsync"), "write": (Path, "write_text")}[call]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, full(getattr(owner, name)))
        with pytest.raises(OutputError, match=r"cannot write .*/step-6: No space left on device"):
            train(recipe, tmp_path / "run", Listener())
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-3"]
    Checkpoint.open(tmp_path / "run" / "checkpoints" / "step-3").verify()
    train(recipe, tmp_path / "run")
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_log_that_cannot_be_written_is_said(tmp_path):
    log = log_module.RunLog(tmp_path, 0, tensorboard=False)
    log._file.close()
    log._file = Path("/dev/full").open("a")  # noqa: SIM115  # every write to it finds the disk full
    with pytest.raises(OutputError, match=r"cannot write .*metrics\.jsonl: No space left on device"):
        log.write({"step": 1})


def test_damaged_checkpoint_is_named_on_resume(recipe, tmp_path):
    train(recipe, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    (data,) = (tmp_path / "run" / "checkpoints" / "step-40").glob("*.distcp")
    data.write_bytes(data.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"\.distcp has 100 bytes, files\.json says"):
        train(recipe, tmp_path / "run")


def test_folder_that_is_no_run_is_left_alone(recipe, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="holds something that is not a run"):
        train(recipe, tmp_path / "home")
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["thesis.txt"]


def test_place_that_cannot_be_written_is_named(recipe, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot write .*file/run"):
        train(recipe, tmp_path / "file" / "run")


def test_two_processes_may_not_train_in_one_run(recipe, tmp_path):
    with run_module._claim(tmp_path / "run", recipe), pytest.raises(OutputError, match="another process is training"):
        train(recipe, tmp_path / "run")


def test_divergence_stops_with_the_step(tmp_path, recipe):
    wild = Recipe.from_dict({**to_dict(recipe), "optimizer": {"mlp": "sgd", "mlp_lr": 1e30, "table_lr": 1e30}})
    with pytest.raises(TrainingError, match=r"the loss is (nan|inf) at step \d+: training diverged. Lower mlp_lr"):
        train(wild, tmp_path / "run")


def to_dict(recipe):
    from dataclasses import asdict

    return {section: {k: v for k, v in values.items() if v is not None} for section, values in asdict(recipe).items()}


def test_sgd_runs_resume_too(tmp_path, recipe):
    values = to_dict(recipe)
    sgd = Recipe.from_dict({**values, "optimizer": {"mlp": "sgd", "mlp_lr": 0.1}})
    result = train(sgd, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    assert train(sgd, tmp_path / "run") == result


def test_an_interrupted_run_with_tables_of_parts_ends_with_the_same_bits(tmp_path):
    kinds = [
        {"partition": "quotient-remainder", "part_rows": [8, 4], "combine": "path", "path_hidden": 3},
        {"partition": "chinese-remainder", "part_rows": [7, 8], "projection": 4, "width": 6},
    ]
    values = {**MODEL.to_dict(), "wide": True}
    values["tables"] = [{**table, **kind} for table, kind in zip(values["tables"], kinds, strict=True)]
    (tmp_path / "model.toml").write_text(ModelConfig.from_dict(values).to_toml())
    recipe = make_recipe(tmp_path, epochs=1)

    class Interrupt(run_module.Silent):
        def stepped(self, step, loss):
            if step == 8:
                raise KeyboardInterrupt

    train(recipe, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "interrupted", Interrupt())
    assert {path.name for path in (tmp_path / "interrupted" / "checkpoints").iterdir()} == {"step-6"}
    train(recipe, tmp_path / "interrupted")
    assert_same_run(tmp_path / "interrupted", tmp_path / "whole")


def test_tensorboard_gets_the_values_of_the_log(tmp_path, recipe):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = train(make_recipe(tmp_path, tensorboard=True), tmp_path / "run")
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("validation/auc")] == [10, 20, 30, 40]
    assert max(event.value for event in board.Scalars("validation/auc")) == pytest.approx(result.validation_auc)


def test_missing_tensorboard_is_said_with_a_way_on(tmp_path, recipe, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingDependencyError, match="tensorboard = false"):
        train(make_recipe(tmp_path, tensorboard=True), tmp_path / "run")


def test_log_lines_after_the_checkpoint_are_dropped(tmp_path):
    path = tmp_path / log_module.METRICS
    path.write_text('{"step": 1}\n{"step": 5}\n{"step": 9}\n{"st')
    log_module.RunLog(tmp_path, 5, tensorboard=False).close()
    assert path.read_text() == '{"step": 1}\n{"step": 5}\n'


def test_reporter_hears_every_step(tmp_path, recipe):
    heard = []

    class Listener(run_module.Silent):
        def started(self, step, steps):
            heard.append((step, steps))

        def stepped(self, step, loss):
            heard.append(step)

    train(recipe, tmp_path / "run", Listener())
    assert heard == [(0, 40), *range(1, 41)]


def test_a_run_that_failed_before_its_first_checkpoint_takes_a_mended_recipe(recipe, tmp_path):
    out = tmp_path / "mended"
    broken = replace(recipe, model=replace(recipe.model, file=str(tmp_path / "missing.toml")))
    with pytest.raises(ConfigError, match=r"missing.toml"):
        train(broken, out)
    assert train(recipe, out).steps > 0
    with pytest.raises(ConfigError, match="is a run of another recipe"):
        train(broken, out)
