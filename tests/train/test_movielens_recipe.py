"""The shipped recipes: all of them train, and the first one keeps what README and demo promise on the real ratings."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from made_up_movielens import made_up, write_recbole

from dlrm_deploy.checkpoint import Checkpoint
from dlrm_deploy.data.movielens_files import recbole_wheel
from dlrm_deploy.errors import DataError
from dlrm_deploy.model.dlrm import DLRM
from dlrm_deploy.model.keys import table_shapes
from dlrm_deploy.train.logistic_regression import fit_logistic_regression
from dlrm_deploy.train.recipe import Recipe
from dlrm_deploy.train.run import train

RECIPES = Path(__file__).parents[2] / "dlrm_deploy" / "train" / "recipes"
RECIPE = RECIPES / "movielens.toml"


@pytest.fixture(scope="module")
def ratings(tmp_path_factory):
    return write_recbole(tmp_path_factory.mktemp("ml"), made_up(users=150, items=140, ratings=400))


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("movielens*.toml")))
def test_every_recipe_trains_every_kind_of_weight_that_its_model_has(name, ratings, tmp_path):
    recipe = Recipe.read(RECIPES / f"{name}.toml")
    short = replace(recipe.train, epochs=None, steps=2, batch_size=300, tensorboard=False, threads=1)
    recipe = replace(recipe, train=short, data=replace(recipe.data, path=str(ratings)))
    train(recipe, tmp_path / "run")
    config, _ = recipe.load()
    checkpoint = Checkpoint.open(tmp_path / "run" / "checkpoints" / "step-2")
    before = DLRM(config, seed=short.seed).named_tensors()
    after = {key: checkpoint.read(f"model.{key}") for key in before}
    assert [key for key in before if np.array_equal(before[key].numpy(), after[key])] == []
    for key, (rows, _) in table_shapes(config).items():
        part = key.removesuffix(".weight").partition("embedding_bags.")[2]
        assert checkpoint.read(f"fused.state.{key}.{part}.momentum1").shape == (rows,)


@pytest.mark.slow
def test_the_movielens_recipe_beats_logistic_regression_with_ids(tmp_path):
    try:
        recbole_wheel()
    except DataError as err:
        pytest.skip(f"MovieLens-100K cannot be had here: {err}")
    recipe = Recipe.read(RECIPE)
    dlrm = train(recipe, tmp_path / "run")
    baseline = fit_logistic_regression(*recipe.load())
    assert dlrm.test_auc >= 0.775
    assert dlrm.test_auc >= baseline.test_auc + 0.005
