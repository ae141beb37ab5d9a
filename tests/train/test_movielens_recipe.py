"""The shipped recipe on the real ratings: what README and demo promise."""

from pathlib import Path

import pytest

from dlrm_deploy.data.movielens_files import recbole_wheel
from dlrm_deploy.errors import DataError
from dlrm_deploy.train.logistic_regression import fit_logistic_regression
from dlrm_deploy.train.recipe import Recipe
from dlrm_deploy.train.run import train

RECIPE = Path(__file__).parents[2] / "dlrm_deploy" / "train" / "recipes" / "movielens.toml"


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
