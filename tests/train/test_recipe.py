"""Recipes: every wrong key and value is named; TOML comes back as it went."""

import re
from pathlib import Path

import numpy as np
import pytest
from made_up_movielens import made_up, write_recbole

from dlrm_deploy.errors import ConfigError
from dlrm_deploy.schemes import TableScheme
from dlrm_deploy.train.recipe import Recipe

RECIPES = Path(__file__).parents[2] / "dlrm_deploy" / "train" / "recipes"
LAYERS = {"name": "m", "width": 4, "bottom_mlp": [4], "top_mlp": [1]}
HASH = {"partition": "hash", "collisions": 4}
CONCAT = {"partition": "quotient-remainder", "collisions": 4, "combine": "concat", "threshold": 100}
GOOD = {
    "model": {"preset": "kaggle", "scale_rows": 0.001},
    "data": {"kind": "random", "size": 100},
    "train": {"batch_size": 10, "epochs": 2},
}


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_shipped_recipes_are_valid_and_come_back_from_toml(path, tmp_path):
    recipe = Recipe.read(path)
    (tmp_path / "recipe.toml").write_text(recipe.to_toml())
    assert Recipe.read(tmp_path / "recipe.toml") == recipe


def test_paths_are_relative_to_the_recipe(tmp_path):
    (tmp_path / "r.toml").write_text(
        '[model]\nname = "m"\nwidth = 4\nbottom_mlp = [4]\ntop_mlp = [1]\n[data]\nkind = "movielens"\npath = "ml"\n'
        "[train]\nbatch_size = 1\nsteps = 1\n"
    )
    assert Recipe.read(tmp_path / "r.toml").data.path == str(tmp_path / "ml")
    (tmp_path / "r.toml").write_text(
        '[model]\nfile = "m.json"\n[data]\nkind = "random"\nsize = 1\n[train]\nbatch_size = 1\nsteps = 1\n'
    )
    assert Recipe.read(tmp_path / "r.toml").model.file == str(tmp_path / "m.json")


def test_table_scheme_dense_and_features_come_back_from_toml(tmp_path):
    model = {"name": "m", "width": 4, "top_mlp": [1], "interaction": "concat", "dense": False, "features": ["b", "a"]}
    recipe = Recipe.from_dict({**GOOD, "model": {**model, "tables": CONCAT}, "data": {"kind": "movielens"}})
    (tmp_path / "recipe.toml").write_text(recipe.to_toml())
    again = Recipe.read(tmp_path / "recipe.toml")
    assert again == recipe
    assert again.model.tables == TableScheme(**CONCAT)
    assert (again.model.dense, again.model.features) == (False, ("b", "a"))


def test_movielens_model_sees_what_the_recipe_chooses(tmp_path):
    write_recbole(tmp_path / "ml", made_up())
    movielens = {"kind": "movielens", "path": str(tmp_path / "ml")}
    model = {"name": "m", "width": 4, "interaction": "fm", "features": ["item", "user"], "tables": HASH}
    config, splits = Recipe.from_dict({**GOOD, "model": {**model, "dense": False}, "data": movielens}).load()
    assert [feature.name for feature in config.features] == ["item", "user"]
    assert all(table.partition == "hash" for table in config.tables)
    splits.train.batch([0, 1])[0].check_fits(config)
    everything, all_splits = Recipe.from_dict({**GOOD, "model": LAYERS, "data": movielens}).load()
    names = [feature.name for feature in everything.features]
    assert everything.dense_features
    all_splits.test.batch([0])[0].check_fits(everything)
    full, _ = all_splits.train.batch([3, 1])
    chosen, _ = splits.train.batch([3, 1])
    bags = [
        full.indices[full.offsets[f] : full.offsets[f + 2]] for f in (2 * names.index("item"), 2 * names.index("user"))
    ]
    np.testing.assert_array_equal(chosen.indices, np.concatenate(bags))
    with pytest.raises(ConfigError, match="no feature film in the data. Features: user, item"):
        Recipe.from_dict({**GOOD, "model": {**model, "features": ["film", "user"]}, "data": movielens}).load()


def test_planted_data_comes_with_its_features_and_the_model_sees_those_it_chooses():
    planted = {"kind": "planted", "size": 20, "seed": 3, "scale_rows": 0.0005}
    config, splits = Recipe.from_dict({**GOOD, "model": LAYERS, "data": planted}).load()
    assert (len(config.dense_features), len(config.features)) == (13, 26)
    assert config.table("cat_2").rows == 5066  # 10131227 in Criteo's data
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (20, 2, 2)
    splits.test.batch([0, 1])[0].check_fits(config)
    few, _ = Recipe.from_dict({**GOOD, "model": {**LAYERS, "features": ["cat_5", "cat_2"]}, "data": planted}).load()
    assert [feature.name for feature in few.features] == ["cat_5", "cat_2"]


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("model", {}, "[model] needs one of: preset, file, or layers (name, width"),
        ("model", {"preset": "kaggle", "file": "x"}, "[model] needs one of"),
        ("model", {"preset": "kaggle", "width": 4}, "[model] needs one of"),
        ("model", {"name": "m", "bottom_mlp": [4]}, "[model] missing key width"),
        ("model", {"dense": False, "wide": True}, "[model] missing key name, width"),
        ("model", {"name": "m", "width": 4, "top_mlp": [1]}, "interaction dot needs a bottom MLP"),
        ("model", {"name": "m", "width": 4, "bottom_mlp": [4]}, "top_mlp is empty, at least one layer is needed"),
        ("model", {**LAYERS, "dense": False}, "a bottom MLP needs dense_features, and there are none"),
        ("model", {**LAYERS, "dense": "no"}, "[model]: dense must be true or false, got 'no'"),
        ("model", {**LAYERS, "wide": 1}, "[model]: wide must be true or false, got 1"),
        ("model", {**LAYERS, "features": "user"}, "[model] features must be a list, got 'user'"),
        ("model", {**LAYERS, "features": ["a", "a"]}, "feature names must differ, repeated: a"),
        ("model", {**LAYERS, "features": [1]}, "name 1 must be letters"),
        ("model", {**LAYERS, "branch1": [4]}, "branch1 belongs to interaction projection, not dot"),
        ("model", {**LAYERS, "dense_transform": "log"}, "dense_transform must be one of none, log1p, log3, got 'log'"),
        ("model", {**LAYERS, "interaction": "dcn-v1"}, "cross_layers must be a whole number of at least 1, got 0"),
        ("model", {**LAYERS, "tables": "hash"}, "[model] tables must be a table of keys, got 'hash'"),
        ("model", {**LAYERS, "tables": {"kind": "hash"}}, "[model.tables]: unknown key kind. Known keys: partition"),
        ("model", {**LAYERS, "tables": {"partition": "hash"}}, "[model.tables]: partition hash takes collisions"),
        ("model", {"preset": "kaggle", "tables": HASH}, "[model] needs one of: preset, file, or layers"),
        ("model", {**LAYERS, "width": 5, "bottom_mlp": [5], "tables": CONCAT}, "width 5 is not a multiple of its 2"),
        ("model", {"file": "x", "scale_rows": 0.5}, "scale_rows goes with preset"),
        ("model", {"preset": "kaggle", "scale_rows": 0}, "scale_rows must be a number above 0, got 0"),
        ("model", {**LAYERS, "top_mlp": 1}, "[model] top_mlp must be a list, got 1"),
        ("model", {"presets": "kaggle"}, "[model]: unknown key presets. Known keys: preset, scale_rows"),
        ("model", {"preset": 5}, "[model] preset must be a text, got 5"),
        ("model", {"file": 5}, "[model] file must be a text, got 5"),
        ("model", {**LAYERS, "name": 5}, "model name 5 must be letters"),
        ("model", {**LAYERS, "width": "4"}, "width must be a whole number of at least 1, got '4'"),
        (
            "model",
            {**LAYERS, "interaction": "cat"},
            "interaction must be one of dot, concat, dcn, dcn-v1, projection, fm, got 'cat'",
        ),
        ("model", {**LAYERS, "interaction": ["dot"]}, "interaction must be one of dot, concat, dcn, dcn-v1, projec"),
        ("model", {**LAYERS, "self_interaction": "no"}, "[model]: self_interaction must be true or false, got 'no'"),
        ("model", {"preset": "kaggle", "self_interaction": 0}, "self_interaction must be true or false, got 0"),
        ("model", {**LAYERS, "bottom_mlp": [8]}, "the dot interaction needs one width"),
        ("data", {"kind": ["random"]}, "[data]: kind must be one of movielens, random, planted, got ['random']"),
        ("data", {"kind": {}}, "[data]: kind must be one of movielens, random, planted, got {}"),
        ("data", {"kind": "movielens", "share_item_table": "no"}, "[data]: share_item_table must be true or false"),
        ("train", {"batch_size": 1, "epochs": 1, "tensorboard": "off"}, "[train]: tensorboard must be true or false"),
        ("data", {}, "[data]: kind must be one of movielens, random, planted, got None"),
        ("data", {"kind": "criteo"}, "kind must be one of movielens, random, planted, got 'criteo'"),
        ("data", "movielens", "got 'movielens'"),
        ("data", {"kind": "random"}, "[data]: missing key size"),
        ("data", {"kind": "random", "size": 0}, "[data] size must be a whole number of at least 1, got 0"),
        ("data", {"kind": "random", "size": 1, "distribution": "x"}, "distribution must be one of uniform"),
        ("data", {"kind": "planted"}, "[data]: missing key size"),
        ("data", {"kind": "planted", "size": 1, "seed": -1}, "[data] seed must be a whole number of at least 0"),
        (
            "data",
            {"kind": "planted", "size": 1, "scale_rows": 1e300},
            "[data] scale_rows must be at most 100, got 1e+300",
        ),
        ("data", {"kind": "planted", "size": 10, "scale_rows": 0}, "[data] scale_rows must be a number above 0, got 0"),
        ("data", {"kind": "movielens", "split": "x"}, "split must be random or time, got 'x'"),
        ("data", {"kind": "movielens", "path": ""}, "[data] path must be a text, got ''"),
        ("data", {"kind": "movielens", "size": 1}, "unknown key size"),
        ("optimizer", {"mlp": "adam"}, "[optimizer] mlp must be adagrad or sgd, got 'adam'"),
        ("optimizer", {"mlp_lr": 0}, "[optimizer] mlp_lr must be a number above 0, got 0"),
        ("optimizer", {"table_weight_decay": -1.0}, "table_weight_decay must be a number of at least 0, got -1.0"),
        ("optimizer", {"table_lr": float("nan")}, "table_lr must be a number above 0, got nan"),
        ("optimizer", {"eps": "x"}, "eps must be a number above 0, got 'x'"),
        ("train", {"batch_size": 10}, "[train] needs one of: epochs, steps"),
        ("train", {"batch_size": 10, "epochs": 1, "steps": 1}, "[train] needs one of: epochs, steps"),
        ("data", {"kind": "random", "size": 10**20}, "[data] size must be at most"),
        ("train", {"batch_size": 1, "epochs": 1, "seed": 2**64}, "seed must be at most"),
        ("train", {"batch_size": 1, "epochs": 1, "threads": 5000}, "threads must be at most 1024, got 5000"),
        ("train", {"batch_size": 0, "epochs": 1}, "batch_size must be a whole number of at least 1, got 0"),
        ("train", {"batch_size": 1, "epochs": 1.5}, "epochs must be a whole number of at least 1, got 1.5"),
        ("train", {"batch_size": 1, "epochs": 1, "threads": 0}, "threads must be a whole number"),
        ("train", {"batch_size": 1, "epochs": 1, "seed": -1}, "seed must be a whole number of at least 0"),
        ("train", {"epochs": 1}, "[train]: missing key batch_size"),
        ("other", {}, "unknown key other. Known keys: model, data, train, optimizer"),
    ],
)
def test_wrong_recipes_are_refused(section, values, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        Recipe.from_dict({**GOOD, section: values})


def test_model_and_data_that_do_not_go_together_are_refused():
    movielens = {"kind": "movielens"}
    with pytest.raises(ConfigError, match="a preset or file brings features of its own"):
        Recipe.from_dict({**GOOD, "data": movielens}).load()
    with pytest.raises(ConfigError, match="the planted task has features of its own"):
        Recipe.from_dict({**GOOD, "data": {"kind": "planted", "size": 10}}).load()
    with pytest.raises(ConfigError, match="random data has no features of its own"):
        Recipe.from_dict({**GOOD, "model": LAYERS}).load()


def test_unreadable_recipe_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read .*none\.toml"):
        Recipe.read(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("[model\n")
    with pytest.raises(ConfigError, match=r"bad\.toml is not valid TOML"):
        Recipe.read(tmp_path / "bad.toml")
