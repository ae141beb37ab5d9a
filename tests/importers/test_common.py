"""What all importers share: number formats, damaged values, golden files, options, provenance."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from facebook_models import FacebookModel, plain
from golden_scores import GOLDEN, ragged_batch

from dlrm_deploy.bundle import Bundle
from dlrm_deploy.errors import CheckpointError, ConfigError
from dlrm_deploy.export.bundle import export_bundle
from dlrm_deploy.export.importers.common import ImportOptions, describe
from dlrm_deploy.export.importers.detect import open_source
from dlrm_deploy.files import sha256_file
from dlrm_deploy.presets import preset

MODEL = FacebookModel(plain(10, 6, 8))
BATCH = ragged_batch(MODEL.rows, 3)


@pytest.fixture
def path(tmp_path):
    return MODEL.save(tmp_path / "model.pt")


def opened(path, **options):
    return open_source(path, "auto", ImportOptions(**options))


def save_golden(path, **changes):
    arrays = {"dense": BATCH.dense, "indices": BATCH.indices, "offsets": BATCH.offsets}
    arrays |= {"probabilities": MODEL.forward(BATCH)} | changes
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


# Values


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_formats_become_float32_to_the_nearest(dtype, tmp_path):
    state = {key: tensor.to(dtype) for key, tensor in MODEL.state.items()}
    torch.save({"state_dict": state}, tmp_path / "model.pt")
    source = opened(tmp_path / "model.pt")
    ((first, block),) = source.part_chunks(source.config.tables[1].parts[0])
    weights = source.dense()
    assert (first, block.dtype, weights["over_arch.model.1.weight"].dtype) == (0, np.float32, np.float32)
    np.testing.assert_array_equal(block, state["emb_l.1.weight"].float())
    np.testing.assert_array_equal(weights["over_arch.model.1.weight"], state["top_l.2.weight"].float())


def test_formats_may_differ_between_tensors(tmp_path):
    path = MODEL.save(tmp_path / "model.pt", emb_l_0_weight=MODEL.state["emb_l.0.weight"].half())
    bundle = export_bundle(opened(path), tmp_path / "bundle")
    assert bundle.map_tables()[0].dtype == np.float32


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "emb_l_1_weight",
            float("nan"),
            r"table cat_1 \(state_dict.emb_l.1.weight\) holds NaN .* nan at row 4, column 2",
        ),
        ("emb_l_1_weight", float("inf"), "inf at row 4, column 2"),
        ("top_l_0_weight", float("nan"), r"state_dict.top_l.0.weight holds NaN .* nan at row 4, column 2"),
    ],
)
def test_a_value_that_is_not_finite_is_named_and_no_bundle_is_left(name, value, message, tmp_path):
    tensor = MODEL.state[name.replace("_l_", "_l.").replace("_weight", ".weight")].clone()
    tensor[4, 2] = value
    source = opened(MODEL.save(tmp_path / "model.pt", **{name: tensor}))
    with pytest.raises(CheckpointError, match=message):
        export_bundle(source, tmp_path / "bundle")
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.pt"]


def test_a_float64_value_beyond_float32_is_refused(tmp_path):
    tensor = MODEL.state["emb_l.2.weight"].double()
    tensor[7, 0] = 1e39
    source = opened(MODEL.save(tmp_path / "model.pt", emb_l_2_weight=tensor))
    with pytest.raises(CheckpointError, match=r"do not fit float32.*: 1e\+39 at row 7, column 0 .* 1 of the 32 .*3.4e"):
        export_bundle(source, tmp_path / "bundle")


def test_a_bundle_says_where_it_came_from(path, tmp_path):
    source = opened(path, name="clicks", dense_transform="log3", golden=None)
    manifest = export_bundle(source, tmp_path / "bundle").manifest
    assert manifest.model.name == "clicks"
    expected = {
        "source": "facebookresearch/dlrm checkpoint",
        "checkpoint": "model.pt",
        "checkpoint_sha256": sha256_file(path),
        "from": "facebook",
        "options": {"name": "clicks", "dense_transform": "log3"},
    }
    assert expected.items() <= manifest.provenance.items()


def test_every_option_can_be_written_into_the_manifest(path, tmp_path):
    config = opened(path).config
    source = opened(path, config=config, allow_unknown=True, golden=save_golden(tmp_path / "golden.npz"))
    assert json.loads(json.dumps(source.provenance()["options"])) == {
        "config": "imported",
        "allow_unknown": True,
        "golden": "golden.npz",
    }


def test_tensors_that_were_ignored_are_listed(tmp_path):
    gates = {f"gate.{i}": torch.ones(1) for i in range(25)}
    torch.save({"state_dict": {**MODEL.state, **gates}}, tmp_path / "model.pt")
    source = opened(tmp_path / "model.pt", allow_unknown=True)
    facts = source.provenance()["ignored_tensors"]
    assert facts["count"] == 25
    assert len(facts["names"]) == 20
    assert facts["names"][0] == "state_dict.gate.0"
    assert source.summary()[-1].startswith("ignored tensors: state_dict.gate.0, state_dict.gate.1, ")
    assert source.summary()[-1].endswith("state_dict.gate.19, ... (25 in all)")
    plain_source = opened(MODEL.save(tmp_path / "plain.pt"), allow_unknown=True)
    assert "ignored_tensors" not in plain_source.provenance()
    assert "ignored" not in "".join(plain_source.summary())


def test_a_sparse_table_is_called_sparse(tmp_path):
    path = MODEL.save(tmp_path / "model.pt", emb_l_0_weight=MODEL.state["emb_l.0.weight"].to_sparse())
    for options in ({}, {"allow_unknown": True}):
        with pytest.raises(CheckpointError, match=r"emb_l\.0\.weight is sparse.*to_dense"):
            opened(path, **options)


def test_a_file_without_tables_is_said_to_hold_none(tmp_path):
    path = MODEL.save(tmp_path / "model.pt", **{f"emb_l_{i}_weight": None for i in range(3)})
    with pytest.raises(CheckpointError, match=r"model\.pt holds no tables\. Put all tables into one"):
        opened(path)


# Golden files


@pytest.mark.parametrize("kind", ["probabilities", "logits"])
def test_a_golden_file_that_agrees_is_kept_in_the_bundle(kind, path, tmp_path):
    expected = MODEL.forward(BATCH).astype(np.float64)
    changes = {"probabilities": None, "logits": np.log(expected / (1 - expected))} if kind == "logits" else {}
    golden = save_golden(tmp_path / "golden.npz", indices=BATCH.indices.astype(np.int32), **changes)
    bundle = export_bundle(opened(path, golden=golden), tmp_path / "bundle")
    kept = Bundle.open(bundle.path).golden()
    np.testing.assert_allclose(kept.probabilities, expected, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(kept.batch.indices, BATCH.indices)


def test_a_golden_file_that_differs_ends_the_export_and_says_what_may_be_wrong(path, tmp_path):
    wrong = MODEL.forward(BATCH)
    wrong[5] += 0.001 if wrong[5] < 0.5 else -0.001
    golden = save_golden(tmp_path / "golden.npz", probabilities=wrong)
    with pytest.raises(
        CheckpointError, match=r"sample 5 of .*golden.npz differs by 0.001 .*--dense-transform"
    ) as caught:
        export_bundle(opened(path, golden=golden), tmp_path / "bundle")
    assert "train again" not in str(caught.value)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dense": None}, "golden.npz lacks dense: it holds indices, offsets, probabilities"),
        ({"probabilities": None}, "holds no output beside the batch, expected either probabilities or logits"),
        ({"logits": np.zeros(17)}, "holds probabilities and logits beside the batch, expected either"),
        ({"probabilities": np.zeros(3)}, r"probabilities are float64 \[3\], expected \[17\]"),
        ({"probabilities": np.full(17, np.nan)}, r"expected \[17\] finite"),
        ({"probabilities": np.full(17, 1.5)}, "probabilities between 0 and 1"),
        ({"probabilities": np.zeros(17, np.int64)}, "probabilities are int64"),
        ({"dense": np.zeros((17, 4))}, "does not fit the model: dense has 4 columns"),
        ({"dense": np.zeros((17, 3), "U1")}, "dense must be float32, got <U1"),
        ({"dense": np.full((17, 3), 1e39)}, "dense is inf at sample 0, column 0"),
        ({"indices": BATCH.indices.astype(np.uint64) + 2**63}, "indices holds 92233720368547758.., and int64 ends at"),
        ({"offsets": BATCH.offsets[:-17]}, "golden.npz: offsets"),
        ({"indices": BATCH.indices.astype(np.float32)}, "indices must be int32 or int64, got float32"),
        ({"weights": np.ones(len(BATCH.indices))}, "takes no per-sample weights"),
    ],
)
def test_a_golden_file_that_does_not_fit_is_refused(changes, message, path, tmp_path):
    golden = save_golden(tmp_path / "golden.npz", **changes)
    with pytest.raises(ConfigError, match=message):
        opened(path, golden=golden)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x93NUMPY", b"not an array", b"\x80\x04N."])
def test_a_golden_file_that_is_none_is_refused(content, path, tmp_path):
    (tmp_path / "golden.npz").write_bytes(content)
    with pytest.raises(ConfigError, match="--golden: cannot read .*golden.npz"):
        opened(path, golden=tmp_path / "golden.npz")


def test_a_golden_file_with_one_array_or_none_at_all_is_refused(path, tmp_path):
    np.save(tmp_path / "golden.npy", np.zeros(3))
    with pytest.raises(ConfigError, match="it is no .npz file"):
        opened(path, golden=tmp_path / "golden.npy")
    with pytest.raises(ConfigError, match="--golden: cannot read .*nowhere.npz"):
        opened(path, golden=tmp_path / "nowhere.npz")


@pytest.mark.parametrize(("at", "byte"), [(6, 1), (8, 99)], ids=["encrypted", "compressed in an unknown way"])
def test_an_odd_zip_file_is_no_golden_file(at, byte, path, tmp_path):
    golden = save_golden(tmp_path / "golden.npz")
    data = bytearray(golden.read_bytes())
    for begin, more in ((b"PK\x03\x04", 0), (b"PK\x01\x02", 2)):  # both say it: the record and the directory
        data[data.index(begin) + at + more] = byte
    golden.write_bytes(data)
    with pytest.raises(ConfigError, match="--golden: cannot read .*golden.npz: .*(encrypted|compression)"):
        opened(path, golden=golden)


@pytest.mark.parametrize("dtype", [np.uint64, np.int32, np.uint8])
def test_a_golden_file_may_have_any_whole_numbers_and_floats(dtype, path, tmp_path):
    golden = save_golden(
        tmp_path / "golden.npz", indices=BATCH.indices.astype(dtype), dense=BATCH.dense.astype(np.float64)
    )
    kept = opened(path, golden=golden).golden().batch
    assert (kept.indices.dtype, kept.offsets.dtype, kept.dense.dtype) == (np.int64, np.int64, np.float32)
    np.testing.assert_array_equal(kept.indices, BATCH.indices)
    np.testing.assert_array_equal(kept.dense, BATCH.dense)


# Options


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("a", "b"), "--features has 2 names, 2 of them different, but the checkpoint has 3 features"),
        (("a", "b", "a"), "--features has 3 names, 2 of them different"),
        (("a", "b", ""), "feature name '' must be letters"),
        (("a", "b", "../c"), r"feature name '../c' must be letters"),
    ],
)
def test_feature_names_are_checked(names, message, path):
    with pytest.raises(ConfigError, match=message):
        opened(path, features=names)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "a b"}, "model name 'a b' must be letters"),
        ({"dense_transform": "sqrt"}, "--dense-transform must be one of none, log1p, log3"),
        ({"quotient": "float16"}, "--quotient must be one of exact, float32"),
        ({"modulo": 0}, "--modulo must be a whole number of at least 1"),
    ],
)
def test_values_of_options_are_checked(values, message):
    with pytest.raises(ConfigError, match=message):
        ImportOptions(**values)


def test_the_options_of_one_project_mean_nothing_for_another():
    options = ImportOptions(qr_operation="mult", modulo=3)
    with pytest.raises(ConfigError, match="--qr-operation means nothing for a TorchRec checkpoint"):
        options.only("modulo", source="a TorchRec checkpoint")
    assert options.given() == ("qr_operation", "modulo")


def test_a_config_excludes_options_that_it_says_itself(path):
    config = opened(path).config
    with pytest.raises(ConfigError, match="--name, --modulo was given beside --config"):
        opened(path, config=config, modulo=10, name="other")


def test_a_summary_shows_layers_kinds_of_tables_and_transforms(tmp_path):
    source = open_source(
        GOLDEN / "facebook" / "qr-mult-mixed.pt",
        "auto",
        ImportOptions(qr_operation="mult", quotient="float32-reciprocal", dense_transform="log1p", modulo=300),
    )
    text = "\n".join(source.summary())
    for part in (
        "facebookresearch/dlrm checkpoint qr-mult-mixed.pt",
        "bottom 5-8-4, interaction dot, top 14-8-4-1",
        "2 plain, 2 quotient-remainder (multiply, float32-reciprocal quotient)",
        "log(max(x + 1, 1))",
        "ids modulo 300",
    ):
        assert part in text
    assert "26 plain" in describe(preset("kaggle", 1e-4))[1]
