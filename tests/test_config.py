from dataclasses import replace

import pytest

from dlrm_deploy.config import FeatureConfig, ModelConfig
from dlrm_deploy.errors import ConfigError
from dlrm_deploy.presets import PRESET_NAMES, preset
from dlrm_deploy.tables import TableConfig


def small(**changes):
    values = {
        "name": "small",
        "dense_features": ("age", "hour"),
        "tables": (TableConfig(name="user", rows=10, width=4), TableConfig(name="item", rows=7, width=4)),
        "features": (
            FeatureConfig(name="user", table="user", pooling_factor=1),
            FeatureConfig(name="liked", table="item", pooling="mean", max_ids=5),
            FeatureConfig(name="item", table="item", pooling_factor=1),
        ),
        "bottom_mlp": (8, 4),
        "top_mlp": (6, 1),
    }
    return ModelConfig(**{**values, **changes})


@pytest.mark.parametrize("name", PRESET_NAMES)
def test_a_preset_survives_toml_and_json(name):
    config = preset(name)
    assert ModelConfig.from_toml(config.to_toml()) == config
    assert ModelConfig.from_json(config.to_json()) == config


def test_every_option_survives_toml_and_json():
    config = small(self_interaction=True, index_policy="modulo")
    weighted = replace(config, features=tuple(replace(f, pooling="sum") for f in config.features), weighted=True)
    cross = replace(config, self_interaction=False, interaction="dcn", cross_layers=2, cross_rank=3)
    table = TableConfig(name="user", rows=10, width=4, partition="quotient-remainder", part_rows=(4, 3), combine="add")
    parts = replace(config, tables=(table, config.tables[1]), wide=True, dense_transform="log1p")
    branches = replace(config, self_interaction=False, interaction="projection", branch1=(8,), branch2=(6, 4))
    ids_only = replace(
        config, self_interaction=False, interaction="fm", dense_features=(), bottom_mlp=(), top_mlp=(),
        features=tuple(replace(f, modulo=7) for f in config.features),
    )  # fmt: skip
    for each in (config, weighted, cross, parts, branches, ids_only):
        assert ModelConfig.from_toml(each.to_toml()) == each
        assert ModelConfig.from_json(each.to_json()) == each


# Sums of rows and GiB of fp32 tables as published with each model.
@pytest.mark.parametrize(
    ("name", "rows", "gib", "top_input"),
    [
        ("kaggle", 33_762_577, 2.01, 367),
        ("terabyte-10m", 49_126_297, 11.71, 415),
        ("mlperf-v1", 187_767_399, 89.53, 479),
        ("mlperf-v2", 204_184_588, 97.36, 3456),
        ("rm1", 32_000_000, 3.81, 32 + 8 * 32),
        ("rm2", 16_000_000, 3.81, 64 + 32 * 64),
        ("rm3", 20_000_000, 2.38, 32 + 10 * 32),
        ("paper", 8_000_000, 1.91, 100),
    ],
)
def test_presets_have_the_published_sizes(name, rows, gib, top_input):
    config = preset(name)
    assert sum(table.rows for table in config.tables) == rows
    assert round(config.table_bytes / 2**30, 2) == gib
    assert config.interaction_width == top_input


def test_scaled_rows_are_rounded_up_and_never_zero():
    config = preset("kaggle", scale_rows=0.01)
    assert config.tables[2].rows == 101_313
    assert min(table.rows for table in config.tables) == 1
    with pytest.raises(ConfigError, match="--scale-rows must be a positive number"):
        preset("kaggle", scale_rows=0.0)


def test_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(ConfigError, match="no preset is named 'criteo'. Presets: kaggle, terabyte-10m"):
        preset("criteo")


def test_tables_of_one_width_form_a_group_with_their_first_rows():
    tables = (
        TableConfig(name="a", rows=10, width=4),
        TableConfig(name="b", rows=5, width=8),
        TableConfig(name="c", rows=7, width=4),
    )
    features = tuple(FeatureConfig(name=name, table=name) for name in ("c", "b", "a"))
    config = small(tables=tables, features=features, interaction="concat")
    four, eight = config.groups
    assert (four.width, four.rows, four.row_starts) == (4, 17, (0, 10))
    assert [(slot.feature, slot.part.name, slot.row_start) for slot in four.slots] == [(0, "c", 10), (2, "a", 0)]
    assert (eight.width, eight.rows, eight.row_starts) == (8, 5, (0,))
    assert [slot.feature for slot in eight.slots] == [1]
    assert four.rows_of("c") == slice(10, 17)
    assert config.interaction_width == 4 + 4 + 8 + 4


def test_pooling_factors_are_known_only_where_all_are_fixed():
    assert preset("mlperf-v2").pooling_factors[:4] == (3, 2, 1, 2)
    assert small().pooling_factors is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dense_features": ()}, "a bottom MLP needs dense_features, and there are none"),
        ({"features": ()}, "features is empty"),
        ({"dense_features": ("age", "age")}, "dense feature names must differ, repeated: age"),
        ({"name": "no spaces"}, "must be letters, digits"),
        ({"bottom_mlp": (8, 5)}, "the bottom MLP ends in 5 and table 'user' is 4 wide"),
        ({"bottom_mlp": ()}, "interaction dot needs a bottom MLP"),
        ({"top_mlp": ()}, "top_mlp is empty"),
        (
            {"dense_features": (), "bottom_mlp": (), "interaction": "concat", "dense_transform": "log1p"},
            "dense_transform needs dense_features",
        ),
        ({"dense_transform": "log"}, "dense_transform must be one of none, log1p, log3, got 'log'"),
        ({"interaction": "projection", "branch1": (8,)}, "branch2 must end in a multiple of the embedding width 4"),
        ({"branch1": (8,)}, "branch1 belongs to interaction projection, not dot"),
        ({"bottom_mlp": (0, 4)}, "bottom_mlp must be a whole number of at least 1, got 0"),
        ({"top_mlp": (6, 2)}, "top_mlp must end in 1"),
        ({"interaction": "cat"}, "interaction must be one of dot, concat, dcn, dcn-v1, projection, fm, got 'cat'"),
        ({"interaction": "concat", "self_interaction": True}, "self_interaction belongs to interaction dot"),
        ({"interaction": "dcn"}, "cross_layers must be a whole number of at least 1"),
        ({"cross_rank": 4}, "cross_rank belongs to interaction dcn, not dot"),
        ({"cross_layers": 4}, "cross_layers belongs to interactions dcn and dcn-v1, not dot"),
        ({"index_policy": "wrap"}, "index_policy must be one of error, clamp, modulo, zero"),
        ({"weighted": "no"}, "weighted must be true or false, got 'no'"),
        ({"self_interaction": 1}, "self_interaction must be true or false, got 1"),
        ({"weighted": True}, "per-sample weights go with sum pooling"),
        ({"features": (FeatureConfig(name="x", table="none"),)}, "reads table 'none', which is not among the tables"),
        ({"features": (FeatureConfig(name="x", table="user"),)}, "no feature reads table item"),
    ],
)
def test_a_config_that_cannot_be_right_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        small(**changes)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FeatureConfig(name="f", table="t", pooling="max"), "pooling must be one of sum, mean"),
        (lambda: FeatureConfig(name="f", table="t", pooling_factor=2, max_ids=3), "not both"),
        (lambda: FeatureConfig(name="f", table="t", modulo=0), "modulo must be a whole number of at least 1, got 0"),
        (lambda: FeatureConfig(name="f", table="t", modulo=1 << 63), "modulo must be at most 2\\^62"),
    ],
)
def test_a_table_or_feature_that_cannot_be_right_is_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name = ", "is not valid TOML"),
        ('nmae = "x"', "unknown key nmae. Known keys: name, dense_features"),
        ('nme = "x"\n[[tables]]\nname = "t"\nrows = 3\nwidth = 4', "unknown key nme"),
        ('[[tables]]\nname = "t"\nrows = 3\nwidth = 4', "missing key name"),
        ('name = "x"\ntables = 3', "tables must be a list"),
        ('name = "x"\n[[tables]]\nname = "t"\nrow = 3', "unknown key row. Known keys: name, rows, width"),
        ('name = "x"\ntables = ["t"]', "expected a table of keys, got str"),
        ('name = "x"\nbottom_mlp = 3', "bottom_mlp must be a list"),
    ],
)
def test_a_toml_mistake_is_named(text, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_toml(text)


def test_without_features_each_table_is_read_by_one():
    text = 'name = "m"\ndense_features = ["d"]\nbottom_mlp = [4]\ntop_mlp = [1]\n'
    text += '[[tables]]\nname = "t"\nrows = 3\nwidth = 4'
    assert ModelConfig.from_toml(text).features == (FeatureConfig(name="t", table="t"),)


def test_a_config_file_is_read_by_its_suffix(tmp_path):
    for name, text in (("m.toml", small().to_toml()), ("m.json", small().to_json())):
        (tmp_path / name).write_text(text)
        assert ModelConfig.read(tmp_path / name) == small()
    with pytest.raises(ConfigError, match="cannot read .*missing.toml"):
        ModelConfig.read(tmp_path / "missing.toml")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ConfigError, match="is not valid JSON"):
        ModelConfig.read(tmp_path / "bad.json")
