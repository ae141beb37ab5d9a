"""`dlrm-deploy train` as a person or a script sees it."""

import json

import pytest
from click.testing import CliRunner

from dlrm_deploy.cli.main import cli
from dlrm_deploy.train import run as run_module

RECIPE = """
[model]
preset = "kaggle"
scale_rows = 0.00001
[data]
kind = "random"
size = 64
[train]
batch_size = 16
epochs = 2
threads = 1
tensorboard = false
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    return path


def invoke(*arguments):
    return CliRunner().invoke(cli, ["train", *(str(argument) for argument in arguments)])


def test_train_prints_the_result_and_where_the_checkpoint_is(recipe, tmp_path):
    result = invoke(recipe, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert "test        AUC 0." in result.stdout
    assert f"checkpoint  {tmp_path / 'run' / 'best'}" in result.stdout
    assert "step        4  validation AUC" in result.stderr


def test_json_is_one_object_and_a_finished_run_says_so(recipe, tmp_path):
    first, second = (json.loads(invoke(recipe, "--out", tmp_path / "run", "--json").stdout) for _ in range(2))
    assert first["best"] == str(tmp_path / "run" / "best")
    assert 0 < first["test_auc"] < 1
    assert (first.pop("finished_before"), second.pop("finished_before")) == (False, True)
    assert first == second
    assert "was finished before; nothing was trained" in invoke(recipe, "--out", tmp_path / "run").stdout


@pytest.mark.parametrize(("steps", "where"), [(0, "from the start"), (6, "from step 4")])
def test_interrupt_exits_130_and_says_how_to_go_on(recipe, tmp_path, monkeypatch, steps, where):
    step = run_module._Run._step

    def interrupted(self, rows):
        if self._state.step == steps:
            raise KeyboardInterrupt
        return step(self, rows)

    monkeypatch.setattr(run_module._Run, "_step", interrupted)
    result = invoke(recipe, "--out", tmp_path / "run")
    assert result.exit_code == 130
    assert f"Interrupted. To go on {where}" in result.stderr
    assert f"dlrm-deploy train {recipe} --out {tmp_path / 'run'}" in result.stderr
    monkeypatch.undo()
    again = invoke(recipe, "--out", tmp_path / "run")
    assert again.exit_code == 0
    assert ("resuming at step 4 of 8" in again.stderr) == (steps == 6)


def test_mistakes_exit_3_or_2_without_a_traceback(recipe, tmp_path):
    recipe.write_text(RECIPE.replace("epochs", "epoch"))
    result = invoke(recipe, "--out", tmp_path / "run")
    assert result.exit_code == 3
    assert "unknown key epoch. Known keys: batch_size, epochs" in result.stderr
    assert not (tmp_path / "run").exists()
    assert invoke(tmp_path / "none.toml", "--out", tmp_path / "run").exit_code == 2
    assert invoke(recipe).exit_code == 2


def test_terminal_gets_a_progress_bar(recipe, tmp_path, monkeypatch):
    from dlrm_deploy.cli import train as module

    monkeypatch.setattr(module.sys.stderr, "isatty", lambda: True, raising=False)
    console = module.Console(quiet=False)
    console.started(2, 10)
    console.stepped(3, 0.5)
    console.evaluated(3, 0.75, 0.5, improved=True)
    assert console._bar.tasks[0].completed == 3
    console.close()
    console.close()
