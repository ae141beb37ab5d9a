"""TorchRec checkpoints: golden files of TorchRec itself, and models restated here in other shapes."""

import re
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent))
from golden_scores import GOLDEN, assert_scores, ragged_batch, read_golden, sigmoid
from import_memory import memory_of_reading

from dlrm_deploy.config import FeatureConfig, ModelConfig
from dlrm_deploy.errors import CheckpointError, ConfigError
from dlrm_deploy.export.importers.common import ImportOptions
from dlrm_deploy.export.importers.detect import open_source
from dlrm_deploy.export.importers.torchrec import infer_config, table_order
from dlrm_deploy.tables import TableConfig
from dlrm_deploy.tensors.store import BLOCK_BYTES

pytestmark = pytest.mark.filterwarnings("ignore::dlrm_deploy.errors.ParityWarning")

BAGS = "sparse_arch.embedding_bag_collection.embedding_bags."
FIRST = "over_arch.model.0._mlp.0._linear.weight"
WHOLE = [
    "dot",
    "dot-train",
    "one-layer",
    "deep",
    "thirteen-tables",
    "single-table",
    "width-3",
    "dcn",
    "dcn-train",
    "projection",
    "projection-train",
]
SHARDED = [
    "dcp-plain",
    "dcp-nested",
    "sharded-1",
    "row-wise-2",
    "row-wise-2-optimizer",
    "row-wise-2-dtensor",
    "column-wise-2",
    "table-wise-3",
    "table-wise-3-dcn",
    "mixed-2",
    "thirteen-tables-2",
]


def open_torchrec(path, **options):
    return open_source(path, "torchrec", ImportOptions(**options))


# Golden files


@pytest.mark.parametrize("name", [f"{n}.pt" for n in WHOLE] + [f"{n}.dcp" for n in SHARDED])
def test_a_checkpoint_scores_as_torchrec_did(tmp_path, name):
    path = GOLDEN / "torchrec" / name
    assert_scores(open_torchrec(path), tmp_path, *read_golden(path.with_suffix(".npz")))


def config_of(rows, tables, **options):
    """The golden models' config: `tables` gives the table of each feature."""
    return ModelConfig(
        name="golden",
        dense_features=tuple(f"d{i}" for i in range(5)),
        tables=tuple(TableConfig(name=f"t_cat_{t}", rows=count, width=4) for t, count in enumerate(rows)),
        features=tuple(FeatureConfig(name=f"cat_{f}", table=f"t_cat_{t}", **options) for f, t in enumerate(tables)),
        bottom_mlp=(8, 4),
        top_mlp=(8, 4, 1),
    )


@pytest.mark.parametrize("name", ["shared-table.pt", "shared-table-2.dcp"])
def test_features_that_share_a_table_are_asked_for_and_then_right(tmp_path, name):
    path = GOLDEN / "torchrec" / name
    with pytest.raises(CheckpointError, match=r"holds 2 tables .* for 3 features.*one process.*--config"):
        open_torchrec(path)
    source = open_torchrec(path, config=config_of((30, 7), (0, 0, 1)))
    assert_scores(source, tmp_path, *read_golden(path.with_suffix(".npz")))


def test_mean_pooling_comes_from_the_config(tmp_path):
    path = GOLDEN / "torchrec" / "mean.pt"
    source = open_torchrec(path, config=config_of((30, 7, 100), (0, 1, 2), pooling="mean"))
    assert_scores(source, tmp_path, *read_golden(path.with_suffix(".npz")))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_file_that_one_process_of_several_wrote_is_refused(rank):
    with pytest.raises(
        CheckpointError, match=r"names torch\._utils\._rebuild_wrapper_subclass.* not called\. .*save with torch.distr"
    ):
        open_source(GOLDEN / "torchrec" / f"rank-files{rank}.pt", "auto", ImportOptions())


def test_every_golden_file_is_compared():
    elsewhere = {"shared-table", "shared-table-2", "mean", "rank-files"}
    assert {path.stem for path in (GOLDEN / "torchrec").glob("*.npz")} == elsewhere.union(WHOLE, SHARDED)


# Models restated


def linear(state, name, width, out, generator):
    state[f"{name}.weight"] = torch.randn(out, width, generator=generator) / width**0.5
    state[f"{name}.bias"] = torch.randn(out, generator=generator) * 0.1


def mlp(state, name, widths, generator):
    for i, (width, out) in enumerate(pairwise(widths)):
        linear(state, f"{name}._mlp.{i}._linear", width, out, generator)


def make(tables, kind="dot", width=6, dense=3, hidden=(7,), over=(9, 5), seed=0):
    """A state_dict as TorchRec names it: tables {name: rows}, then dense_arch, inter_arch and over_arch."""
    g = torch.Generator().manual_seed(seed)
    state = {f"{BAGS}{name}.weight": torch.randn(rows, width, generator=g) * 0.3 for name, rows in tables.items()}
    mlp(state, "dense_arch.model", (dense, *hidden, width), g)
    flat = (len(tables) + 1) * width
    top = width + len(tables) * (len(tables) + 1) // 2 if kind == "dot" else flat
    for layer in range(2 if kind in ("low-rank", "vector", "full") else 0):
        shapes = {"low-rank": {"W_kernels": (flat, 3), "V_kernels": (3, flat), "bias": (flat,)}}
        shapes |= {"vector": {"kernels": (flat, 1), "bias": (flat, 1)}}
        shapes |= {"full": {"kernels": (flat, flat), "bias": (flat, 1)}}
        for name, shape in shapes[kind].items():
            state[f"inter_arch.crossnet.{name}.{layer}"] = torch.randn(shape, generator=g) / flat**0.5
    if kind == "projection":
        mlp(state, "inter_arch.interaction_branch1.model", (flat, 4, 2 * width), g)
        mlp(state, "inter_arch.interaction_branch2.model", (flat, 3 * width), g)
        top = width + 6
    mlp(state, "over_arch.model.0", (top, *over), g)
    linear(state, "over_arch.model.1", over[-1], 1, g)
    return state


def run_mlp(state, name, x):
    layers = sum(key.startswith(f"{name}._mlp.") for key in state) // 2
    for i in range(layers):
        x = F.relu(F.linear(x, state[f"{name}._mlp.{i}._linear.weight"], state[f"{name}._mlp.{i}._linear.bias"]))
    return x


def cross(state, x0):
    x = x0
    for layer in range(2):
        get = {name: state.get(f"inter_arch.crossnet.{name}.{layer}") for name in ("W_kernels", "V_kernels", "kernels")}
        bias = state[f"inter_arch.crossnet.bias.{layer}"].reshape(-1)
        if get["kernels"] is None:
            x = x0 * (x @ get["V_kernels"].T @ get["W_kernels"].T + bias) + x
        elif get["kernels"].shape[1] == 1:
            x = x0 * (x @ get["kernels"]) + bias + x
        else:
            x = x0 * (x @ get["kernels"].T + bias) + x
    return x


def forward(state, kind, batch):
    """Probabilities as TorchRec's forward defines them, with the tables in the order of `state`."""
    tables = [value for key, value in state.items() if key.startswith(BAGS)]
    size = batch.batch_size
    x_BD = run_mlp(state, "dense_arch.model", torch.from_numpy(batch.dense))
    vectors = [x_BD]
    for f, table in enumerate(tables):
        bounds = torch.from_numpy(batch.offsets[f * size : (f + 1) * size + 1].copy())
        ids = torch.from_numpy(batch.indices[bounds[0] : bounds[-1]])
        bags = F.embedding_bag(ids, table, bounds - bounds[0], mode="sum", include_last_offset=True)
        vectors.append(bags)
    x_BVD = torch.stack(vectors, 1)
    flat = x_BVD.flatten(1)
    if kind == "dot":
        row, column = torch.triu_indices(len(vectors), len(vectors), offset=1)
        top = torch.cat([x_BD, (x_BVD @ x_BVD.mT)[:, row, column]], 1)
    elif kind == "projection":
        width = x_BD.shape[1]
        first = run_mlp(state, "inter_arch.interaction_branch1.model", flat).reshape(size, -1, width)
        second = run_mlp(state, "inter_arch.interaction_branch2.model", flat).reshape(size, width, -1)
        top = torch.cat([x_BD, (first @ second).flatten(1)], 1)
    else:
        top = cross(state, flat)
    top = run_mlp(state, "over_arch.model.0", top)
    return sigmoid(F.linear(top, state["over_arch.model.1.weight"], state["over_arch.model.1.bias"])[:, 0].numpy())


TABLES = {"user": 11, "item": 300, "city": 2, "day": 7, "age": 50}


def save(state, path, prefix="", **beside):
    torch.save({**{prefix + key: value for key, value in state.items()}, **beside}, path)
    return path


@pytest.mark.parametrize("kind", ["dot", "low-rank", "vector", "full", "projection"])
@pytest.mark.parametrize("prefix", ["", "module.model."])
def test_a_restated_model_scores_as_its_own_forward(tmp_path, kind, prefix):
    state = make(TABLES, kind)
    batch = ragged_batch(list(TABLES.values()), 3)
    source = open_torchrec(save(state, tmp_path / "model.pt", prefix))
    assert [feature.name for feature in source.config.features] == list(TABLES)
    assert_scores(source, tmp_path, batch, forward(state, kind, batch))


@pytest.mark.parametrize("shape", [{"width": 1, "hidden": ()}, {"over": (4,), "dense": 1}, {"hidden": (9, 8, 7)}])
@pytest.mark.parametrize("tables", [{"only": 9}, {f"t{i}": i + 1 for i in range(14)}])
def test_other_sizes_score_as_their_own_forward(tmp_path, shape, tables):
    state = make(tables, **shape)
    batch = ragged_batch(list(tables.values()), shape.get("dense", 3), seed=1)
    assert_scores(open_torchrec(save(state, tmp_path / "m.pt")), tmp_path, batch, forward(state, "dot", batch))


def test_a_nested_dict_with_optimizer_and_buffers_holds_the_same_model(tmp_path):
    state = make(TABLES)
    names = {key.replace("arch.model", "arch.module.model", 1): value for key, value in state.items()}
    names["inter_arch.triu_indices"] = torch.zeros(2, 15, dtype=torch.int64)
    optimizer = {"state": {f"{BAGS}user.weight": {"momentum1": torch.zeros(11)}, FIRST: {"sum": torch.zeros(9, 21)}}}
    content = {"app": {"model": names, "optim": optimizer, "step": 3}, "epoch": torch.tensor(2)}
    torch.save(content, tmp_path / "model.pt")
    batch = ragged_batch(list(TABLES.values()), 3)
    source = open_source(tmp_path / "model.pt", "auto", ImportOptions())
    assert source.provenance()["prefix"] == "app.model."
    assert_scores(source, tmp_path, batch, forward(state, "dot", batch))


def test_optimizer_state_beside_a_bare_model_is_ignored(tmp_path):
    state = make(TABLES)
    averages = {f"fused_optimizer.exp_avg.{key}": value for key, value in state.items()}
    beside = {"optimizer.state.0.sum": torch.zeros(3), "fused.momentum": torch.zeros(2), "optim": averages}
    path = save(state, tmp_path / "model.pt", **averages, **beside)
    assert list(open_torchrec(path).config.tables) == list(
        open_torchrec(save(state, tmp_path / "bare.pt")).config.tables
    )


def test_tables_of_another_module_are_not_the_models(tmp_path):
    state = make(TABLES)
    path = save(state, tmp_path / "model.pt", **{f"teacher.{BAGS}other.weight": torch.zeros(3, 6)})
    with pytest.raises(CheckpointError, match=r"no model of pytorch/torchrec has teacher\.sparse_arch"):
        open_torchrec(path)
    assert len(open_torchrec(path, allow_unknown=True).config.tables) == 5


def test_half_precision_tables_become_float32(tmp_path):
    state = {key: value.to(torch.bfloat16) if key.startswith(BAGS) else value for key, value in make(TABLES).items()}
    batch = ragged_batch(list(TABLES.values()), 3)
    rounded = {key: value.float() for key, value in state.items()}
    source = open_torchrec(save(state, tmp_path / "model.pt"))
    assert_scores(source, tmp_path, batch, forward(rounded, "dot", batch))


def test_modulo_and_dense_transform_come_before_the_model(tmp_path):
    state = make({"a": 10, "b": 10})
    batch = ragged_batch([10, 10], 3)
    shifted = replace(batch, indices=batch.indices + 10 * (np.arange(len(batch.indices)) % 5))
    path = save(state, tmp_path / "model.pt")
    assert_scores(open_torchrec(path, modulo=10), tmp_path, shifted, forward(state, "dot", batch))
    assert open_torchrec(path, dense_transform="log1p").config.dense_transform == "log1p"


# The order of tables


def test_tables_of_a_folder_go_by_the_numbers_in_their_names(tmp_path):
    tables = {f"t_cat_{i}": i + 2 for i in range(12)}
    state = make(tables)
    dcp.save(dict(reversed(state.items())), checkpoint_id=tmp_path / "dcp", no_dist=True)
    batch = ragged_batch(list(tables.values()), 3)
    source = open_torchrec(tmp_path / "dcp")
    assert [table.name for table in source.config.tables] == list(tables)
    assert_scores(source, tmp_path, batch, forward(state, "dot", batch))


@pytest.mark.parametrize("prefix", ["", "model.model."])
def test_a_folder_with_names_that_tell_no_order_asks_and_takes_the_answer(tmp_path, prefix):
    state = make(TABLES)
    content = {prefix + key: state[key] for key in sorted(state)}
    dcp.save(content, checkpoint_id=tmp_path / "dcp", no_dist=True)
    with pytest.raises(ConfigError, match=r"does not keep the order .*--features"):
        open_torchrec(tmp_path / "dcp")
    with pytest.raises(ConfigError, match=r"once, in the model's order; nobody does not fit"):
        open_torchrec(tmp_path / "dcp", features=(*TABLES, "nobody"))
    batch = ragged_batch(list(TABLES.values()), 3)
    source = open_torchrec(tmp_path / "dcp", features=tuple(TABLES))
    assert_scores(source, tmp_path, batch, forward(state, "dot", batch))


@pytest.mark.parametrize(
    ("names", "trusted", "expected"),
    [
        (("b", "a"), True, ("b", "a")),
        (("t_2", "t_10", "t_1"), False, ("t_1", "t_2", "t_10")),
        (("0", "10", "9"), False, ("0", "9", "10")),
        (("t_1", "t_2"), True, ("t_1", "t_2")),
        (("anything",), False, ("anything",)),
    ],
)
def test_table_order_where_something_tells_it(names, trusted, expected):
    assert table_order(Path("x"), names, trusted, ImportOptions())[0] == expected


@pytest.mark.parametrize(
    ("names", "trusted"),
    [
        (("b", "a"), False),
        (("t_1", "u_2"), False),
        (("t_1", "t_01"), False),
        (("t_1", "t"), False),
        (("t_2", "t_1"), True),  # the file and the numbers disagree: perhaps it was made from a folder
    ],
)
def test_table_order_where_nothing_tells_it_is_asked_for(names, trusted):
    with pytest.raises(ConfigError, match="--features"):
        table_order(Path("x"), names, trusted, ImportOptions())
    assert table_order(Path("x"), names, trusted, ImportOptions(features=names))[0] == names


def test_a_file_whose_tables_are_scattered_does_not_tell_their_order(tmp_path):
    state = make(TABLES)
    moved = {key: value for key, value in state.items() if "user" not in key} | {
        key: value for key, value in state.items() if "user" in key
    }
    with pytest.raises(ConfigError, match="does not keep the order of its tables"):
        open_torchrec(save(moved, tmp_path / "model.pt"))


def test_characters_that_names_cannot_have_become_underscores(tmp_path):
    source = open_torchrec(save(make({"user:id": 4, "-x y": 3}), tmp_path / "model.pt"))
    assert [table.name for table in source.config.tables] == ["user_id", "_x_y"]


# Refusals


def refused(tmp_path, state, match, error=CheckpointError, **options):
    with pytest.raises(error, match=match):
        open_torchrec(save(state, tmp_path / "model.pt"), **options)


def changed(key, value, kind="dot"):
    state = make(TABLES, kind)
    assert key in state or key.startswith("new.") or "arch" in key
    state[key] = value
    return state


def without(*parts, kind="dot"):
    state = make(TABLES, kind)
    kept = {key: value for key, value in state.items() if not any(part in key for part in parts)}
    assert len(kept) < len(state)
    return kept


def test_a_checkpoint_of_one_process_says_that_tables_are_missing(tmp_path):
    refused(tmp_path, without("user"), r"holds 4 tables \(item, city, day, age\), .* for 5 features.*one process")


def test_more_tables_than_features_are_refused(tmp_path):
    state = changed(f"{BAGS}more.weight", torch.zeros(3, 6))
    state = {key: state[key] for key in sorted(state, key=lambda key: not key.startswith(BAGS))}
    refused(tmp_path, state, r"6 tables .* for 5 features. The tensors are of different models")


@pytest.mark.parametrize(
    ("state", "match"),
    [
        (changed(f"{BAGS}item.weight", torch.zeros(3, 5)), r"table item is 5 wide and dense_arch ends in 6"),
        (changed(FIRST, torch.zeros(9, 20)), r"takes 20 values.*no number of features F makes D \+ F \(F \+ 1\) / 2"),
        (changed("over_arch.model.1.weight", torch.zeros(2, 5)), r"is \[2, 5\], expected \[1, 5\]"),
        (changed("over_arch.model.1.bias", torch.zeros(2)), r"bias is \[2\], and the model needs \[1\]"),
        (without("over_arch.model.1.weight"), r"lacks layers"),
        (without("dense_arch.model._mlp.0"), r"there are N = 1; expected all from 0 to 1"),
        (without("over_arch.model.0._mlp.1._linear.bias"), r"holds none"),
        (changed("over_arch.model.0._mlp.1._linear.weight", torch.zeros(5, 8)), r"\[5, 8\], but the layer before .* 9"),
        (without("over_arch"), r"no whole TorchRec DLRM: expected .*, found tables below sparse_arch"),
        (without("embedding_bags"), r"no whole TorchRec DLRM"),
        (changed(f"{BAGS}user.weight_qscaleshift", torch.zeros(11, 2)), r"holds a quantized model"),
        (changed(f"{BAGS}user.weight", torch.zeros(11, 6, dtype=torch.int8)), r"is int8, expected one of float32"),
        (changed(f"{BAGS}user.weight", torch.zeros(0, 6)), r"expected a matrix"),
        (changed("inter_arch.crossnet.U_kernels.0", torch.zeros(1, 36, 2), "low-rank"), r"LowRankMixtureCrossNet"),
        (without("crossnet.V_kernels.1", kind="low-rank"), r"V_kernels\.1 .*holds none"),
        (changed("inter_arch.crossnet.bias.1", torch.zeros(35), "low-rank"), r"bias.1 is \[35\]"),
        (without("interaction_branch2", kind="projection"), r"interaction_branch1 and interaction_branch2 must be"),
        (changed(FIRST, torch.zeros(9, 13), "projection"), r"end in 12 and 18 with vectors of width 6"),
    ],
)
def test_tensors_that_make_no_model_are_refused(tmp_path, state, match):
    refused(tmp_path, state, match)


def test_two_models_in_one_file_are_refused_by_name(tmp_path):
    state = make(TABLES)
    content = {"model": state, "average": state}
    refused(tmp_path, content, r"holds 2 models: model\.sparse_arch, average\.sparse_arch")


def test_two_tables_that_get_one_name_are_refused_by_their_own(tmp_path):
    state = changed(f"{BAGS}us er.weight", torch.zeros(3, 6)) | {f"{BAGS}us_er.weight": torch.zeros(3, 6)}
    refused(tmp_path, state, r"two tables become us_er here: .*\.us er\.weight and .*\.us_er\.weight\. .*another name")


def test_a_sparse_table_is_called_sparse(tmp_path):
    state = make(TABLES)
    key = next(key for key in state if key.startswith(BAGS))
    refused(tmp_path, state | {key: state[key].to_sparse()}, rf"{re.escape(key)} is sparse.*to_dense")


def test_unknown_tensors_of_the_model_are_refused_unless_allowed(tmp_path):
    state = changed("wide_arch.weight", torch.zeros(3))
    refused(tmp_path, state, r"no model of pytorch/torchrec has wide_arch\.weight")
    assert open_torchrec(tmp_path / "model.pt", allow_unknown=True).config.interaction == "dot"


def test_nan_in_a_table_is_refused_by_row_and_column(tmp_path):
    state = make(TABLES)
    state[f"{BAGS}item.weight"][123, 4] = float("nan")
    source = open_torchrec(save(state, tmp_path / "model.pt"))
    with pytest.raises(CheckpointError, match=r"item.*row 123, column 4"):
        list(source.part_chunks(source.config.table("item").parts[0]))


def test_a_config_has_to_agree_with_the_checkpoint(tmp_path):
    path = GOLDEN / "torchrec" / "dot.pt"
    config = config_of((30, 7, 100), (0, 1, 2))
    tables = config.tables
    wrong = {
        r"table t_cat_1: the checkpoint holds 7 rows": replace(
            config, tables=(tables[0], replace(tables[1], rows=8), tables[2])
        ),
        r"--config says interaction concat": replace(config, interaction="concat"),
        r"--config says interaction dot with itself": replace(config, self_interaction=True),
        r"is \[8, 5\], and --config needs \[9, 5\]": replace(config, bottom_mlp=(9, 4)),
        r"over_arch.model.1.weight is \[1, 4\], and --config needs \[1, 8\]": replace(config, top_mlp=(8, 1)),
        r"no place for .*t_cat_2": config_of((30, 7), (0, 1, 1)),
    }
    for match, contradicting in wrong.items():
        with pytest.raises(CheckpointError) as caught:
            open_torchrec(path, config=contradicting)
        assert re.search(match, str(caught.value)), (match, str(caught.value))


def test_options_of_other_projects_mean_nothing_here(tmp_path):
    refused(tmp_path, make(TABLES), "--qr-operation means nothing", ConfigError, qr_operation="mult")
    refused(tmp_path, make(TABLES), "--interaction means nothing", ConfigError, interaction="dot")


def test_a_config_is_read_off_shapes_alone():
    shapes = {key: tuple(value.shape) for key, value in make(TABLES, "projection").items() if BAGS not in key}
    tables = {name: (rows, 6) for name, rows in TABLES.items()}
    config = infer_config(Path("x"), shapes, tables, ImportOptions(name="mine"))
    assert (config.name, config.interaction, config.branch1, config.branch2) == ("mine", "projection", (4, 12), (18,))
    assert config.bottom_mlp == (7, 6)
    assert config.top_mlp == (9, 5, 1)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_checkpoint_is_read_in_less_memory_than_its_largest_table_takes(tmp_path, kind):
    rows, width = 1_600_000, 16  # 102 MB
    for count in (30, rows):
        state = make({"t_0": count, "t_1": 7}, width=width)
        if kind == "file":
            save(state, tmp_path / str(count))
        else:
            dcp.save(state, checkpoint_id=tmp_path / str(count), no_dist=True)
    read, grown = memory_of_reading(tmp_path / "30", tmp_path / str(rows))
    assert read == (rows + 7) * width * 4
    assert grown < 3.5 * BLOCK_BYTES
