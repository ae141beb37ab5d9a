"""The shipped recipe of the planted task comes near the best that can be had, and beats every sum of single effects."""

from pathlib import Path

import pytest

from dlrm_deploy.train.recipe import Recipe
from dlrm_deploy.train.run import train

RECIPE = Path(__file__).parents[2] / "dlrm_deploy" / "train" / "recipes" / "criteo-planted.toml"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_planted_recipe_learns_the_products_of_pairs(tmp_path):
    recipe = Recipe.read(RECIPE)
    found = train(recipe, tmp_path / "run").test_auc
    test = recipe.load()[1].test
    assert test.ceiling().auc - 0.025 < found < test.ceiling().auc
    assert found > test.ceiling(pairs=False).auc + 0.04
