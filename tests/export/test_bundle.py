import json
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from bundles import CONFIGS, make_bundle

from dlrm_deploy.bundle import Golden
from dlrm_deploy.data.random import random_batch
from dlrm_deploy.engines.registry import open_engine
from dlrm_deploy.errors import CheckpointError, OutputError
from dlrm_deploy.export.bundle import export_bundle
from dlrm_deploy.export.sources import RandomSource


@pytest.mark.parametrize("batch_size", [0, 1, 2, 37])
def test_the_graph_scores_as_pytorch_does(any_bundle, batch_size):
    batch = random_batch(any_bundle.config, batch_size, np.random.default_rng(batch_size))
    with open_engine(any_bundle, "torch", threads=1) as torch, open_engine(any_bundle, "onnxruntime-stock") as stock:
        expected, actual = torch.predict(batch), stock.predict(batch)
    assert expected.shape == actual.shape == (batch_size,)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6)


def test_the_model_loads_in_a_bare_session_and_passes_the_checker(any_bundle):
    onnx.checker.check_model(any_bundle.model_path, full_check=True)
    session = ort.InferenceSession(any_bundle.model_path)
    inputs = [(i.name, i.type) for i in session.get_inputs()]
    if any_bundle.config.dense_features:
        assert inputs[0] == ("dense", "tensor(float)")
    assert [name for name, _ in inputs] == [spec.name for spec in any_bundle.manifest.inputs]


def test_tables_are_one_after_the_other_and_outside_the_graph(any_bundle):
    model = onnx.load(any_bundle.model_path, load_external_data=False)
    outside = {tensor.name for tensor in model.graph.initializer if tensor.external_data}
    assert outside == {f"tables_{group.name}" for group in any_bundle.config.groups}
    source = RandomSource(any_bundle.config, seed=3)
    for group, matrix in zip(any_bundle.config.groups, any_bundle.map_tables(), strict=True):
        for part in group.parts:
            expected = np.concatenate([chunk for _, chunk in source.part_chunks(part)])
            np.testing.assert_array_equal(matrix[group.rows_of(part.name)], expected)


def test_int32_ids_score_the_same(tmp_path):
    wide, narrow = make_bundle("dot", tmp_path / "wide"), make_bundle("dot", tmp_path / "narrow", index_dtype="int32")
    batch = random_batch(wide.config, 9, np.random.default_rng(0))
    with open_engine(wide, "onnxruntime-stock") as a, open_engine(narrow, "onnxruntime-stock") as b:
        np.testing.assert_array_equal(a.predict(batch), b.predict(batch))


def test_two_exports_of_one_model_differ_only_in_their_provenance(tmp_path):
    a, b = make_bundle("concat", tmp_path / "a"), make_bundle("concat", tmp_path / "b")
    assert a.manifest.files == b.manifest.files


class ChangedSource(RandomSource):
    """A random model with a golden batch, and tables that a test may spoil."""

    def __init__(self, golden=None, spoil=lambda chunks: chunks):
        super().__init__(CONFIGS["dot"], seed=3)
        self._golden, self._spoil = golden, spoil

    def golden(self):
        return self._golden

    def part_chunks(self, part):
        return self._spoil(super().part_chunks(part))


def test_the_checkpoints_golden_batch_is_kept_when_the_export_agrees(bundle, tmp_path):
    golden = bundle.golden()
    exported = export_bundle(ChangedSource(golden), tmp_path / "out")
    np.testing.assert_array_equal(exported.golden().probabilities, golden.probabilities)


def test_an_export_that_does_not_give_the_trainers_outputs_is_refused(bundle, tmp_path):
    golden = bundle.golden()
    wrong = Golden(golden.batch, np.where(np.arange(64) == 5, 0.9, golden.probabilities).astype(np.float32))
    with pytest.raises(CheckpointError, match="sample 5 of the checkpoint's golden batch differs"):
        export_bundle(ChangedSource(wrong), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda chunks: [(first, chunk[:-1]) for first, chunk in chunks], "the source holds 10 of 11 rows"),
        (lambda chunks: [(first, chunk[:, 1:]) for first, chunk in chunks], "do not fit the model's 11 x 8"),
        (lambda chunks: [(first + 1, chunk) for first, chunk in chunks], "rows 1 to 12"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(spoil, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        export_bundle(ChangedSource(spoil=spoil), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_bundle_is_replaced_only_on_request(bundle):
    with pytest.raises(OutputError, match="exists already"):
        make_bundle("self", bundle.path)
    assert make_bundle("self", bundle.path, overwrite=True).config.name == "self"


def test_the_index_policy_can_be_chosen_at_export(tmp_path):
    bundle = make_bundle("dot", tmp_path / "bundle", index_policy="modulo")
    assert bundle.config == replace(CONFIGS["dot"], index_policy="modulo")
    assert json.loads((bundle.path / "manifest.json").read_text())["model"]["index_policy"] == "modulo"


def test_progress_is_told_of_every_byte(tmp_path):
    counts = []
    make_bundle("dot", tmp_path / "bundle", progress=counts.append)
    assert sum(counts) == CONFIGS["dot"].table_bytes
