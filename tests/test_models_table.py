"""The comparison of models, on made-up ratings: small, but every step is the real one."""

from pathlib import Path

import pytest
from click.testing import CliRunner
from made_up_movielens import made_up, write_recbole

from dlrm_deploy.bundle import Bundle
from dlrm_deploy.config import ModelConfig, parse_toml
from dlrm_deploy.errors import ConfigError
from dlrm_deploy.files import write_between
from dlrm_deploy.models_table import (
    BEGIN,
    END,
    ENGINES,
    RECIPES,
    Deployed,
    Row,
    compare,
    each,
    main,
    markdown,
)
from dlrm_deploy.train.recipe import Recipe
from dlrm_deploy.train.run import TrainingResult

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "dlrm_deploy" / "train" / "recipes"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_recbole(tmp_path_factory.mktemp("ml"), made_up(users=120, items=130, ratings=1500))


def test_every_movielens_recipe_is_compared_under_equal_conditions():
    recipes = {path.stem: Recipe.read(path) for path in SHIPPED.glob("movielens*.toml")}
    assert sorted(RECIPES) == sorted(recipes)
    first = recipes["movielens"]
    for name, recipe in recipes.items():
        assert recipe.model.name == name
        assert recipe.data == first.data
        for key in ("batch_size", "epochs", "patience"):
            assert getattr(recipe.train, key) == getattr(first.train, key)
        for key in ("mlp", "mlp_lr", "mlp_weight_decay", "table_weight_decay", "eps"):
            assert getattr(recipe.optimizer, key) == getattr(first.optimizer, key)


def test_the_comparison_is_made_once_and_goes_on_with_more_seeds(data, tmp_path):
    said = []
    (row,) = compare(["movielens-mf"], tmp_path, 1, data=data, say=said.append)
    assert len(said) == 2
    bundle = Bundle.open(tmp_path / "movielens-mf" / "bundle", verify="full")
    assert 0 < row.results[0].test_auc < 1
    assert {engine: passed for engine, (passed, _) in row.deployed.parity.items()} == dict.fromkeys(ENGINES, True)
    files = [path.stat().st_size for path in (bundle.path / "tables").iterdir()]
    assert row.deployed.table_bytes == sum(files) == 4 * row.deployed.table_parameters
    assert row.deployed.other_parameters == sum(array.size for array in bundle.dense_weights().values())
    written = (bundle.path / "manifest.json").stat().st_mtime_ns
    arguments = ["movielens-mf", "--runs", str(tmp_path), "--seeds", "2", "--data", str(data)]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert "movielens-mf  seed 1" in result.stderr
    assert (bundle.path / "manifest.json").stat().st_mtime_ns == written
    assert f"{row.results[0].test_auc:.4f}" in result.stdout
    assert result.stdout.count("\n") == 3


@pytest.mark.parametrize("jobs", [1, 2])
def test_work_is_done_once_in_one_process_or_several(jobs):
    assert sorted(each(jobs, pow, [(2, 3), (3, 2), (5, 1)])) == [((2, 3), 8), ((3, 2), 9), ((5, 1), 5)]


def test_table_holds_means_and_ends_over_seeds_and_verdicts():
    results = tuple(TrainingResult(1, 1, 0.5, 0.5, auc, loss, 1.0) for auc, loss in ((0.7, 0.5), (0.8, 0.3)))
    parity = {"onnxruntime": (True, 4e-8), "onnxruntime-stock": (False, 0.25)}
    deployed = Deployed(table_parameters=12345, other_parameters=678, table_bytes=49380, parity=parity)
    assert markdown([Row(name="m", results=results, deployed=deployed)]).splitlines()[2] == (
        "| `m` | 0.7500 (0.7000 to 0.8000) | 0.4000 (0.3000 to 0.5000) | 12,345 | 678 | 48 KiB | passed, 4.0e-08 | "
        "FAILED, 2.5e-01 |"
    )


def test_table_replaces_the_one_between_the_markers(tmp_path):
    path = tmp_path / "models.md"
    path.write_text(f"before\n\n{BEGIN}\n\nold\n\n{END}\n\nafter\n")
    write_between(path, BEGIN, END, "| new |\n", "table")
    assert path.read_text() == f"before\n\n{BEGIN}\n\n| new |\n\n{END}\n\nafter\n"
    path.write_text(f"{END}\n{BEGIN}\n")
    with pytest.raises(ConfigError, match="models.md has no place for the table"):
        write_between(path, BEGIN, END, "", "table")


def test_unknown_recipe_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no recipe movielens-x. Recipes: movielens, movielens-dot-self"):
        compare(["movielens-x"], tmp_path, 1)


def test_snippets_of_the_documentation_are_valid():
    """Each TOML block of docs/models.md is a part of a recipe's [model], or a table of a ModelConfig."""
    blocks = (ROOT / "docs" / "models.md").read_text(encoding="utf-8").split("```toml\n")[1:]
    assert len(blocks) >= 8
    recipe = '[data]\nkind = "movielens"\n[train]\nbatch_size = 1\nsteps = 1\n'
    model = '[model]\nname = "m"\nwidth = 32\nbottom_mlp = [64, 32]\ntop_mlp = [64, 1]\n'
    for block in (block.split("```")[0] for block in blocks):
        if "[[tables]]" in block:
            ModelConfig.from_toml('name = "m"\ninteraction = "concat"\ntop_mlp = [1]\n' + block)
        else:
            text = (block if "[model]" in block else model + block) + recipe
            assert Recipe.from_dict(parse_toml(text, "docs/models.md")).model.name
