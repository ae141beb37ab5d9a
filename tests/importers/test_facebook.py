"""facebookresearch/dlrm checkpoints: golden files of the project itself, and models restated here in other shapes."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peak_memory import PEAK

sys.path.insert(0, str(Path(__file__).parent))
from facebook_models import FacebookModel, plain, qr
from golden_scores import GOLDEN, assert_scores, ragged_batch, read_golden

from dlrm_deploy.batch import Batch
from dlrm_deploy.engines.registry import open_engine
from dlrm_deploy.errors import CheckpointError, ConfigError
from dlrm_deploy.export.bundle import export_bundle
from dlrm_deploy.export.importers.common import ImportOptions
from dlrm_deploy.export.importers.detect import open_source
from dlrm_deploy.export.importers.facebook import readings

pytestmark = pytest.mark.filterwarnings("ignore::dlrm_deploy.errors.ParityWarning")

FOLDER = GOLDEN / "facebook"
ASKED = {
    **{
        f"qr-{name}": {"qr_operation": "mult"} for name in ("mult", "mult-mixed", "at-threshold", "few-rows", "adagrad")
    },
    **{f"qr-{name}": {"qr_operation": "add"} for name in ("add", "add-mixed")},
    **{name: {"interaction": "dot"} for name in ("one-layer", "deep")},
}
"""What the files of some variants do not tell."""

CLAMPED = "loss-threshold"
WHOLE = sorted(path.stem for path in FOLDER.glob("*.pt") if "rank" not in path.stem and path.stem != CLAMPED)


def opened(path, **options):
    return open_source(path, "facebook", ImportOptions(**options))


def golden(variant):
    return opened(FOLDER / f"{variant}.pt", **ASKED.get(variant, {}))


@pytest.mark.parametrize("variant", WHOLE)
def test_every_golden_variant_gives_the_projects_own_output(variant, tmp_path):
    assert_scores(golden(variant), tmp_path, *read_golden(FOLDER / f"{variant}.npz"))


def test_a_model_with_loss_threshold_gives_the_output_before_the_clamp(tmp_path):
    batch, expected = read_golden(FOLDER / f"{CLAMPED}.npz")
    bundle = export_bundle(golden(CLAMPED), tmp_path / "bundle")
    with open_engine(bundle, "torch", threads=1) as engine:
        scores = engine.predict(batch)
    np.testing.assert_allclose(np.clip(scores, expected.min(), expected.max()), expected, rtol=0, atol=1e-6)
    assert scores.max() > expected.max() + 0.01


MADE_UP = {
    "dot-itself": FacebookModel(plain(1, 2, 300, width=5), bottom=(2, 5), top=(1,), interaction="dot-self"),
    "cat": FacebookModel(plain(9, 9, 2, 50, width=3), bottom=(1, 7, 8, 3), top=(11, 3, 1), interaction="cat"),
    "many": FacebookModel(plain(*range(1, 27), width=16), bottom=(13, 32, 16), top=(32, 16, 1)),
    "qr-one-collision": FacebookModel([qr(20, 1), *plain(5), qr(1, 20)], operation="mult"),
    "qr-49-collisions": FacebookModel([qr(21, 49), qr(3, 7), *plain(60)], operation="add"),
    "qr-concat": FacebookModel([qr(8, 3, width=2), qr(2, 2, width=2)], operation="concat", interaction="dot-self"),
    "projected-and-plain": FacebookModel(
        [*plain(6), {"embs.weight": (40, 1), "proj.weight": (4, 1)}, {"embs.weight": (9, 4)}]
    ),
    "learned-weights": FacebookModel([{**t, "pool": (t["weight"][0],)} for t in plain(30, 4, 5)]),
}


@pytest.mark.parametrize("name", MADE_UP)
def test_models_of_other_shapes_give_the_output_of_a_restatement(name, tmp_path):
    model = MADE_UP[name]
    options = {"qr_operation": model.operation} if model.operation != "concat" and "qr" in name else {}
    batch = ragged_batch(model.rows, model.bottom[0], seed=len(name))
    source = opened(model.save(tmp_path / "model.pt"), **options)
    assert_scores(source, tmp_path, batch, model.forward(batch))


def test_ids_above_2_to_the_24_read_the_rows_that_the_projects_float32_division_reads(tmp_path):
    model = FacebookModel([qr(20, 1 << 20, width=2)], bottom=(2, 2), top=(8, 1), interaction="cat", operation="add")
    path = model.save(tmp_path / "model.pt")
    ids = np.array([(k << 20) - offset for k in range(1, 20) for offset in (0, 1)])
    batch = Batch(np.ones((len(ids), 2), np.float32), ids, np.arange(len(ids) + 1))
    source = opened(path, qr_operation="add")
    assert source.config.tables[0].division == "float32"
    assert_scores(source, tmp_path, batch, model.forward(batch))

    exact = export_bundle(opened(path, qr_operation="add", quotient="exact"), tmp_path / "exact")
    with open_engine(exact, "torch", threads=1) as engine:
        wrong = np.flatnonzero(np.abs(engine.predict(batch) - model.forward(batch)) > 1e-6)
    assert len(wrong) > 0
    assert (ids[wrong] > 1 << 24).all()


@pytest.mark.parametrize("collisions", [2, 3, 7, 49, 1000, 4099])
def test_quotients_of_ids_below_2_to_the_24_are_exact_in_float32(collisions):
    ids = torch.cat([torch.arange(1 << 16), torch.arange((1 << 24) - (1 << 20), 1 << 24)])
    assert torch.equal((ids / collisions).long(), ids // collisions)


def test_shapes_with_one_reading_are_read():
    config = golden("qr-mult-mixed").config
    assert [table.partition for table in config.tables] == ["full", "quotient-remainder", "full", "quotient-remainder"]
    assert config.tables[1].part_rows == (60, 5)
    assert config.tables[1].rows == 300
    assert config.tables[1].division == "exact"
    assert (config.bottom_mlp, config.top_mlp, len(config.dense_features)) == ((8, 4), (8, 4, 1), 5)
    assert [feature.name for feature in config.features] == ["cat_0", "cat_1", "cat_2", "cat_3"]
    assert golden("dot-itself").config.self_interaction
    assert golden("cat").config.interaction == "concat"
    assert [table.width for table in golden("md").config.tables] == [8, 4, 3, 8, 5]
    assert [table.projection for table in golden("md").config.tables] == [None, 8, 8, None, 8]


def test_readings_are_all_numbers_of_tables_that_fit_and_no_other():
    for width in range(1, 12):
        for count in range(1, 40):
            gives = {
                "dot": width + count * (count + 1) // 2,
                "dot-self": width + (count + 1) * (count + 2) // 2,
                "cat": width * (count + 1),
            }
            for interaction, inputs in gives.items():
                assert readings(inputs, width)[interaction] == count
    assert readings(383, 32) == {"dot": 26, "dot-self": 25}
    assert readings(7, 7) == {}


def test_options_are_in_the_config(tmp_path):
    path = FacebookModel(plain(10, 6)).save(tmp_path / "model.pt")
    config = opened(path, name="mine", features=("user", "item"), dense_transform="log1p", modulo=10).config
    assert config.name == "mine"
    assert [table.name for table in config.tables] == ["user", "item"]
    assert [feature.modulo for feature in config.features] == [10, 10]
    assert config.dense_transform == "log1p"


def test_modulo_and_log1p_give_raw_inputs_the_output_of_prepared_ones(tmp_path):
    model = FacebookModel(plain(10, 6))
    batch = ragged_batch(model.rows, 3)
    raw = Batch(np.expm1(np.abs(batch.dense)), batch.indices + 10 * (batch.indices % 3), batch.offsets)
    prepared = replace(batch, dense=np.log(raw.dense + 1))
    source = opened(model.save(tmp_path / "model.pt"), dense_transform="log1p", modulo=10)
    assert_scores(source, tmp_path, raw, model.forward(prepared))


def test_a_bare_state_dict_and_a_wrapped_model_are_read_too(tmp_path):
    model = MADE_UP["cat"]
    expected = opened(model.save(tmp_path / "model.pt")).config
    torch.save(model.state, tmp_path / "bare.pt")
    torch.save({"epoch": 1, "net": {f"module.{key}": value for key, value in model.state.items()}}, tmp_path / "ddp.pt")
    assert opened(tmp_path / "bare.pt").config == expected
    assert opened(tmp_path / "ddp.pt").config == expected


# What is asked for


@pytest.mark.parametrize("variant", ["one-layer", "deep"])
def test_two_fitting_interactions_are_asked_for(variant):
    with pytest.raises(CheckpointError, match=r"dot and cat both give the 8 inputs of .*Add --interaction dot or cat"):
        opened(FOLDER / f"{variant}.pt")
    assert opened(FOLDER / f"{variant}.pt", interaction="cat").config.interaction == "concat"


def test_the_operation_of_quotient_remainder_tables_is_asked_for():
    with pytest.raises(CheckpointError, match="Add --qr-operation mult or --qr-operation add"):
        opened(FOLDER / "qr-add.pt")
    with pytest.raises(CheckpointError, match="with concat, vectors would be 8 wide, not 4"):
        opened(FOLDER / "qr-add.pt", qr_operation="concat")
    with pytest.raises(CheckpointError, match="this model was trained with concat"):
        opened(FOLDER / "qr-concat.pt", qr_operation="mult")


@pytest.mark.parametrize("option", ["qr_operation", "quotient"])
def test_quotient_remainder_options_without_such_tables_are_refused(option):
    value = {"qr_operation": "mult", "quotient": "exact"}[option]
    with pytest.raises(ConfigError, match=f"{value}: .* holds no quotient-remainder tables"):
        opened(FOLDER / "plain-dot.pt", **{option: value})


def test_an_interaction_that_does_not_fit_is_refused():
    with pytest.raises(CheckpointError, match=r"give: cat 16\. --interaction dot fits"):
        opened(FOLDER / "plain-dot.pt", interaction="cat")


# Partial files


def test_a_file_of_one_process_says_how_many_tables_the_model_has():
    with pytest.raises(
        CheckpointError, match=r"holds 1 table \(emb_l.0\), but the top MLP was made for 3 \(dot\) or 2"
    ):
        opened(FOLDER / "ddp-rank1.pt")
    with pytest.raises(
        CheckpointError, match=r"was made for 3 \(dot\): .* Each process of a distributed run saves only"
    ):
        opened(FOLDER / "ddp-rank1.pt", interaction="dot")


def test_a_file_of_one_process_that_fits_another_interaction_is_not_taken_for_whole():
    with pytest.raises(CheckpointError, match="fits dot-self, but it may also be a part of a model: dot with 3 tables"):
        opened(FOLDER / "ddp-rank0.pt")
    assert opened(FOLDER / "ddp-rank0.pt", interaction="dot-self").config.self_interaction


def test_one_table_of_26_is_refused_with_the_number(tmp_path):
    path = FacebookModel(plain(*range(1, 27))).save(
        tmp_path / "m.pt", **{f"emb_l_{i}_weight": None for i in range(3, 26)}
    )
    with pytest.raises(
        CheckpointError, match=r"holds 3 tables \(emb_l.0 to emb_l.2\), but the top MLP was made for 26"
    ):
        opened(path)


def test_a_file_that_lost_a_table_is_refused_where_its_optimizer_tells(tmp_path):
    path = FacebookModel(plain(10, 6, 8)).save(tmp_path / "m.pt", emb_l_2_weight=None)
    message = r"holds 2 tables .* its optimizer trained 11 tensors, and the file has 10\. .* made for dot with 3 tables"
    with pytest.raises(CheckpointError, match=message):
        opened(path)


def test_a_bare_state_dict_that_may_have_lost_a_table_is_asked_about(tmp_path):
    state = {key: value for key, value in FacebookModel(plain(10, 6, 8)).state.items() if key != "emb_l.2.weight"}
    torch.save(state, tmp_path / "bare.pt")
    with pytest.raises(CheckpointError, match=r"no optimizer state .* fits dot-self, but .* dot with 3 tables"):
        opened(tmp_path / "bare.pt")
    assert opened(tmp_path / "bare.pt", interaction="dot-self").config.self_interaction


def test_a_whole_dot_self_file_needs_no_option():
    assert opened(GOLDEN / "facebook" / "dot-itself.pt").config.self_interaction


def test_the_file_of_one_process_is_not_taken_for_a_model_also_without_its_prefix(tmp_path):
    saved = torch.load(GOLDEN / "facebook" / "ddp-rank0.pt", weights_only=False)  # a golden file of ours
    saved["state_dict"] = {key.replace("module.", ""): value for key, value in saved["state_dict"].items()}
    torch.save(saved, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="may also be a part of a model: dot with 3 tables"):
        opened(tmp_path / "x.pt")


# What is refused


BASE = FacebookModel(plain(10, 6, 8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"emb_l_1_weight": None}, "holds 2 tables, emb_l.0, emb_l.2, but not emb_l.1"),
        ({"emb_l_1_weight": torch.zeros(6, 5)}, "the vectors of emb_l.1 are 5 wide, but the bottom MLP ends in 4"),
        ({"emb_l_1_weight": torch.zeros(6)}, r"emb_l.1.weight is \[6\], expected a matrix"),
        ({"emb_l_1_weight": torch.zeros(0, 4)}, r"emb_l.1.weight is \[0, 4\], expected a matrix"),
        ({"emb_l_1_weight": torch.zeros(6, 4, dtype=torch.int8)}, "emb_l.1.weight is int8, expected one of float32"),
        ({"bot_l_2_bias": None}, "bot_l has layers at 0, 2, .*missing: bot_l.2.bias"),
        (
            {"bot_l_0_weight": None, "bot_l_0_bias": None},
            "bot_l has layers at 2, .*missing: bot_l.0.weight, bot_l.0.bias",
        ),
        ({"bot_l_2_bias": torch.zeros(5)}, r"bot_l.2.bias is \[5\], and the model needs \[4\] there"),
        ({"bot_l_2_weight": torch.zeros(4, 7)}, r"bot_l.2.weight is \[4, 7\], and the model needs \[4, 6\] there"),
        ({"top_l_2_weight": torch.zeros(2, 5)}, "top_mlp must end in 1"),
        ({"top_l_0_weight": torch.zeros(5, 9)}, "takes 9 values, but 3 tables .* give: dot 10, dot-self 14, cat 16"),
    ],
)
def test_tensors_that_do_not_make_a_model_are_refused(changes, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        opened(BASE.save(tmp_path / "model.pt", **changes))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"weight_q": (5, 4)}, "table emb_l.0 holds weight_q, expected"),
        (
            {"weight": (5, 4), "weight_q": (5, 4), "weight_r": (2, 4)},
            "holds weight and weight_q and weight_r, expected",
        ),
        ({"proj.weight": (4, 2)}, "holds proj.weight, expected"),
        ({"weight_q": (5, 4), "weight_r": (2, 2)}, r"vectors of 4 \(weight_q\) and 2 \(weight_r\)"),
        ({"weight_q": (5, 3), "weight_r": (2, 3)}, "Multiplied or added they must both be 4 wide, side by side 2"),
        ({"embs.weight": (5, 2)}, "the vectors of emb_l.0 are 2 wide"),
        ({"embs.weight": (5, 2), "proj.weight": (6, 2)}, "the vectors of emb_l.0 are 6 wide"),
        ({"embs.weight": (5, 2), "proj.weight": (4, 3)}, r"proj.weight is \[4, 3\], and the model needs \[4, 2\]"),
        ({"weight": (5, 4), "pool": (6,)}, r"v_W_l.0 is \[6\], expected \[5\]"),
        ({"embs.weight": (5, 4), "pool": (5,)}, "the project trains no such model"),
    ],
)
def test_tables_that_the_project_cannot_have_are_refused(table, message, tmp_path):
    path = FacebookModel([table]).save(tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=message):
        opened(path, interaction="dot", **({"qr_operation": "mult"} if "weight_q" in table else {}))


def test_quotient_remainder_tables_of_two_widths_are_refused(tmp_path):
    path = FacebookModel([qr(5, 2), qr(5, 2, width=2)]).save(tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="some quotient-remainder tables are 4 wide and some half of that"):
        opened(path)


def test_pooling_weights_for_some_tables_are_refused(tmp_path):
    path = FacebookModel([{"weight": (5, 4), "pool": (5,)}, {"weight": (3, 4)}]).save(tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="pooling weights v_W_l for 1 of 2 tables"):
        opened(path)


def test_tensors_that_the_project_does_not_have_are_refused_unless_they_may_be_ignored(tmp_path):
    state = {**BASE.state, "bot_l.1.weight_scale": torch.ones(1), "gate.weight": torch.ones(2, 2)}
    torch.save({"state_dict": state, "ema": {"gate": torch.ones(1)}}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"has state_dict.bot_l.1.weight_scale, state_dict.gate.weight, so what"):
        opened(tmp_path / "model.pt")
    assert opened(tmp_path / "model.pt", allow_unknown=True).config == opened(BASE.save(tmp_path / "plain.pt")).config


def test_two_models_in_one_file_are_refused(tmp_path):
    torch.save({"state_dict": BASE.state, "ema": BASE.state}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"holds 2 models \(ema.emb_l, state_dict.emb_l\)"):
        opened(tmp_path / "model.pt")


def test_a_layer_under_two_names_is_refused(tmp_path):
    torch.save({**BASE.state, "bot_l.module.0.weight": torch.zeros(6, 3)}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"holds bot_l.0.weight twice: as bot_l.0.weight and as bot_l.module.0"):
        opened(tmp_path / "model.pt")


def test_modulo_below_the_rows_of_a_table_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"emb_l.0 has rows for 10 ids, but with --modulo 9 no id above 8"):
        opened(BASE.save(tmp_path / "model.pt"), modulo=9)


# A config of the user's


def test_a_config_that_agrees_gives_the_same_model(tmp_path):
    path = BASE.save(tmp_path / "model.pt")
    config = replace(opened(path).config, name="known", index_policy="clamp")
    assert opened(path, config=config).config is config


def test_a_config_is_compared_with_every_shape(tmp_path):
    path = BASE.save(tmp_path / "model.pt")
    config = opened(path).config
    rows = replace(config, tables=(*config.tables[:2], replace(config.tables[2], rows=9)))
    with pytest.raises(
        CheckpointError, match=re.escape("table cat_2: the checkpoint holds 8 rows (state_dict.emb_l.2.w")
    ):
        opened(path, config=rows)
    with pytest.raises(CheckpointError, match=r"bot_l.0.weight is \[6, 3\], and --config needs \[7, 3\]"):
        opened(path, config=replace(config, bottom_mlp=(7, 4)))
    with pytest.raises(CheckpointError, match=r"top_l.2.weight is \[1, 5\], and --config needs \[5, 5\] there"):
        opened(path, config=replace(config, top_mlp=(5, 5, 1)))
    with pytest.raises(CheckpointError, match=r"--config says interaction fm"):
        opened(path, config=replace(config, interaction="fm"))
    with pytest.raises(CheckpointError, match=r"--config says 2 features, and the checkpoint holds 3 tables"):
        opened(path, config=replace(config, tables=config.tables[:2], features=config.features[:2]))
    with pytest.raises(ConfigError, match=r"--interaction was given beside --config"):
        opened(path, config=config, interaction="dot")


def test_layers_that_a_config_does_not_have_are_refused(tmp_path):
    path = FacebookModel(plain(10), bottom=(3, 4, 4)).save(tmp_path / "model.pt")
    config = opened(path).config
    with pytest.raises(CheckpointError, match=r"has no place for state_dict.bot_l.2.weight, state_dict.bot_l.2.bias"):
        opened(path, config=replace(config, bottom_mlp=(4,)))
    with pytest.raises(
        CheckpointError, match=r"--config needs over_arch.model.1.weight \[1, 1\], and the checkpoint h"
    ):
        opened(path, config=replace(config, top_mlp=(5, 1, 1)))


def test_a_config_with_another_kind_of_table_is_refused(tmp_path):
    path = FacebookModel([qr(7, 5)]).save(tmp_path / "model.pt")
    config = opened(path, interaction="dot", qr_operation="add").config
    other = replace(config.tables[0], partition="chinese-remainder", division="exact")
    with pytest.raises(CheckpointError, match="says partition chinese-remainder for table cat_0, but emb_l.0 holds"):
        opened(path, config=replace(config, tables=(other,)))


# Memory

EXPORT = f"""{PEAK}
import sys
import numpy, onnx, torch
import dlrm_deploy.engines.torch_eager
from dlrm_deploy.export.bundle import export_bundle
from dlrm_deploy.export.importers.common import ImportOptions
from dlrm_deploy.export.importers.detect import open_source

small, large, out = map(Path, sys.argv[1:])
export_bundle(open_source(small, "auto", ImportOptions()), out / "small")
before = peak()
export_bundle(open_source(large, "auto", ImportOptions()), out / "large")
print(peak() - before)
"""


def test_an_import_stays_below_the_size_of_its_largest_table_and_a_third(tmp_path):
    rows, width = 2_400_000, 16  # 154 MB
    model = FacebookModel([{"weight": (30, width), "pool": (30,)}], bottom=(2, width))
    large = FacebookModel([{"weight": (rows, width), "pool": (rows,)}], bottom=(2, width))
    paths = [model.save(tmp_path / "small.pt"), large.save(tmp_path / "large.pt")]
    arguments = [*map(str, paths), str(tmp_path)]
    result = subprocess.run([sys.executable, "-c", EXPORT, *arguments], capture_output=True, text=True, check=True)
    assert (tmp_path / "large" / "tables" / "width16.bin").stat().st_size == rows * width * 4
    assert int(result.stdout) < 1.3 * rows * width * 4
