"""Runs: which slots of which pooled output make up each feature's vector."""

from dlrm_deploy.config import FeatureConfig, ModelConfig
from dlrm_deploy.model.keys import projection_key
from dlrm_deploy.model.vectors import Run, path_features, runs, wide_places
from dlrm_deploy.tables import TableConfig

QUOTIENT = {"partition": "quotient-remainder", "part_rows": (4, 3)}


def model(tables, **options):
    """A model with a feature for each table, or as `features` names them."""
    names = options.pop("features", None) or [table.name for table in tables]
    features = tuple(FeatureConfig(name=f"f{i}", table=name) for i, name in enumerate(names))
    return ModelConfig(name="m", tables=tuple(tables), features=features, interaction="concat", top_mlp=(1,), **options)


def table(name, width=4, **kind):
    return TableConfig(name=name, rows=12, width=width, **kind)


def test_plain_tables_of_one_width_are_one_run():
    config = model([table("a"), table("b"), table("c")], features=["b", "a", "b", "c"])
    assert runs(config) == (Run(0, 4, ((0, 0),), "multiply", None, 4),)


def test_a_run_ends_where_the_width_changes():
    config = model([table("a"), table("b", 2), table("c", 2), table("d")])
    assert runs(config) == (
        Run(0, 1, ((0, 0),), "multiply", None, 4),
        Run(1, 2, ((1, 0),), "multiply", None, 2),
        Run(3, 1, ((0, 1),), "multiply", None, 4),
    )


def test_second_parts_follow_all_first_parts():
    config = model([table("a", **QUOTIENT), table("b", **QUOTIENT), table("c")])
    assert [slot.part.name for slot in config.groups[0].slots] == ["a.0", "b.0", "c", "a.1", "b.1"]
    assert runs(config) == (
        Run(0, 2, ((0, 0), (0, 3)), "multiply", None, 4),
        Run(2, 1, ((0, 2),), "multiply", None, 4),
    )


def test_another_combination_is_another_run():
    config = model([table("a", **QUOTIENT), table("b", **QUOTIENT, combine="add"), table("c", **QUOTIENT)])
    assert [(run.first, run.combine, run.parts) for run in runs(config)] == [
        (0, "multiply", ((0, 0), (0, 3))), (1, "add", ((0, 1), (0, 4))), (2, "multiply", ((0, 2), (0, 5))),
    ]  # fmt: skip


def test_parts_side_by_side_are_as_wide_as_the_table():
    config = model([table("a", **QUOTIENT, combine="concat"), table("b", **QUOTIENT, combine="concat")])
    assert [(group.name, group.width) for group in config.groups] == [("width2", 2)]
    assert runs(config) == (Run(0, 2, ((0, 0), (0, 2)), "concat", None, 4),)


def test_each_projected_table_is_a_run_of_its_own():
    config = model([table("a", 2, projection=4), table("b", 2, projection=4), table("c")])
    assert [(run.count, run.parts, run.projection, run.width) for run in runs(config)] == [
        (1, ((0, 0),), projection_key("a"), 4), (1, ((0, 1),), projection_key("b"), 4), (1, ((1, 0),), None, 4),
    ]  # fmt: skip


def test_features_of_path_tables_have_outputs_of_their_own_behind_the_groups():
    path = table("p", **QUOTIENT, combine="path", path_hidden=2)
    config = model([table("a"), path], features=["p", "a", "p"])
    assert [(f, t.name) for f, t in path_features(config)] == [(0, "p"), (2, "p")]
    groups = len(config.groups)
    assert [group.slots for group in config.groups if group.width != 4] == [()]
    assert [(run.first, run.count, run.parts) for run in runs(config)] == [
        (0, 1, ((groups, 0),)), (1, 1, ((0, 0),)), (2, 1, ((groups + 1, 0),)),
    ]  # fmt: skip


def test_first_order_weights_are_the_last_slots_of_their_group():
    config = model([table("a"), table("b")], features=["b", "a", "b"], wide=True)
    assert wide_places(config) == (1, 0)
    narrow = model([table("a", 1), table("b", 1)], wide=True)
    assert wide_places(narrow) == (0, 2)
    assert [slot.part.name for slot in narrow.groups[0].slots] == ["a", "b", "a.wide", "b.wide"]
