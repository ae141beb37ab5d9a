import contextlib
import json
import shutil

import numpy as np
import pytest

from dlrm_deploy.bundle import AUTO_HASH_BYTES, DENSE, GOLDEN, MANIFEST, MODEL, Bundle, Manifest, PlanRecord
from dlrm_deploy.errors import BundleError, OutputError


def alter(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def change_manifest(bundle, change):
    path = bundle.path / MANIFEST
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


@pytest.mark.parametrize("name", [MODEL, DENSE, GOLDEN, "tables/width8.bin"])
@pytest.mark.parametrize("position", [0, -1])
def test_an_altered_byte_is_an_error_that_names_the_file(bundle, name, position):
    alter(bundle.path / name, position)
    with pytest.raises(BundleError, match=f"{name} was altered"):
        Bundle.open(bundle.path)


@pytest.mark.parametrize("name", [MODEL, DENSE, GOLDEN, "tables/width8.bin"])
def test_a_truncated_file_is_an_error_that_names_it(bundle, name):
    path = bundle.path / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BundleError, match=rf"{name} has \d+ bytes, the manifest says \d+"):
        Bundle.open(bundle.path, verify="none")


@pytest.mark.parametrize("name", [MODEL, DENSE, GOLDEN, "tables/width8.bin"])
def test_a_missing_file_is_an_error_that_names_it(bundle, name):
    (bundle.path / name).unlink()
    with pytest.raises(BundleError, match=f"{name} is missing"):
        Bundle.open(bundle.path)


def test_a_large_file_is_hashed_only_in_full(bundle, monkeypatch):
    monkeypatch.setattr("dlrm_deploy.bundle.AUTO_HASH_BYTES", 100)
    alter(bundle.path / "tables/width8.bin", 8)
    Bundle.open(bundle.path)
    with pytest.raises(BundleError, match=r"width8.bin was altered"):
        Bundle.open(bundle.path, verify="full")
    assert [problem for problem in bundle.altered_files() if "width8.bin was altered" in problem]
    assert AUTO_HASH_BYTES > 100


def test_an_untouched_bundle_has_no_altered_files(any_bundle):
    assert any_bundle.altered_files() == []
    assert Bundle.open(any_bundle.path, verify="full").manifest == any_bundle.manifest


def test_a_manifest_survives_its_json(any_bundle):
    assert Manifest.from_json(any_bundle.manifest.to_json(), "here") == any_bundle.manifest


def test_a_folder_without_manifest_is_no_bundle(tmp_path):
    with pytest.raises(BundleError, match=r"is not a bundle: it holds no manifest.json"):
        Bundle.open(tmp_path)
    with pytest.raises(BundleError, match="is not a bundle"):
        Bundle.open(tmp_path / "nowhere")
    (tmp_path / MANIFEST).mkdir()
    with pytest.raises(BundleError, match="cannot read"):
        Bundle.open(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format_version=3), "format version 3, and this dlrm-deploy reads versions up to 2"),
        (lambda m: m.update(format="other"), "is not the manifest of a dlrm-deploy bundle"),
        (lambda m: m.pop("model"), "is damaged"),
        (lambda m: m.pop("files"), "lists no hash for"),
        (lambda m: m["files"].pop(MODEL), "lists no hash for model.onnx"),
        (lambda m: m["files"].update({"../x": {"size": 1, "sha256": ""}}), "outside the bundle"),
        (lambda m: m["files"].update({"/etc/passwd": {"size": 1, "sha256": ""}}), "outside the bundle"),
        (lambda m: m.update(files=3), "is damaged"),
        (lambda m: m["table_groups"][0].update(rows=1), "is listed as 1 x 8"),
        (lambda m: m.update(table_groups=[]), "0 table groups for 1"),
        (lambda m: m["model"].update(top_mlp=[2]), "top_mlp must end in 1"),
        (lambda m: m.update(surprise=1), "unknown key surprise"),
        (lambda m: m.update(model="x"), "is damaged"),
        (lambda m: m.update(inputs=[]), "is damaged"),
        (lambda m: m["inputs"][1].update(dtype="float32"), "indices are float32"),
        (lambda m: m["inputs"][1].update(dtype="no such type"), "is damaged"),
        (lambda m: m["table_groups"][0].update(file=3), "is damaged"),
        (lambda m: m["table_groups"][0].update(file=["x"]), "is damaged"),
        (lambda m: m["files"][MODEL].update(size="1"), "is damaged: size is '1'"),
        (lambda m: m["model"].update(weighted="no"), "weighted must be true or false"),
    ],
)
def test_a_manifest_that_cannot_be_right_is_refused(bundle, change, message):
    change_manifest(bundle, change)
    with pytest.raises(BundleError, match=message):
        Bundle.open(bundle.path)


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"', "\udcff"])
def test_a_manifest_that_is_no_json_object_is_refused(bundle, text):
    (bundle.path / MANIFEST).write_text(text, errors="surrogateescape")
    with pytest.raises(BundleError):
        Bundle.open(bundle.path)


def test_a_golden_batch_with_a_pickle_inside_is_refused(bundle):
    np.savez(bundle.path / GOLDEN, dense=np.array([object()], dtype=object))
    with pytest.raises(BundleError, match="cannot read"):
        bundle.golden()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("offsets"), "holds no 'offsets'"),
        (lambda a: a.update(offsets=a["offsets"][:-1]), "is damaged: offsets must run"),
        (lambda a: a.update(probabilities=a["probabilities"][:-1]), "probabilities are float32"),
        (lambda a: a.update(probabilities=a["probabilities"].astype(float)), "probabilities are float64"),
    ],
)
def test_a_golden_batch_that_cannot_be_right_is_refused(bundle, change, message):
    arrays = bundle.golden().arrays()
    change(arrays)
    np.savez(bundle.path / GOLDEN, **arrays)
    with pytest.raises(BundleError, match=message):
        bundle.golden()


def test_parity_and_plans_are_recorded_and_survive_opening(bundle):
    folder = bundle.path / "engines"
    folder.mkdir()
    for name in ("a.plan", "a.json", "b.plan", "b.json"):
        (folder / name).write_text(name)
    bundle.record_parity("onnxruntime", {"passed": True})
    bundle.add_plan(PlanRecord(engine="tensorrt-rtx", plan="engines/a.plan", sidecar="engines/a.json"))
    bundle.add_plan(PlanRecord(engine="tensorrt-rtx", plan="engines/b.plan", sidecar="engines/b.json"))
    again = Bundle.open(bundle.path, verify="full")
    assert again.manifest.parity == {"onnxruntime": {"passed": True}}
    assert [record.plan for record in again.manifest.plans] == ["engines/b.plan"]
    assert sorted(path.name for path in folder.iterdir()) == ["b.json", "b.plan"]
    assert again.altered_files() == []
    (folder / "b.plan").write_text("B.plan")
    Bundle.open(bundle.path)  # a plan is verified by its engine
    with pytest.raises(BundleError, match=r"b.plan was altered"):
        Bundle.open(bundle.path, verify="full")


def test_changes_of_two_processes_do_not_undo_each_other(bundle):
    first, second = Bundle.open(bundle.path), Bundle.open(bundle.path)
    first.record_parity("torch", {"passed": True})
    second.record_parity("onnxruntime", {"passed": False})
    again = Bundle.open(bundle.path)
    assert again.manifest.parity == {"torch": {"passed": True}, "onnxruntime": {"passed": False}}
    assert again.manifest == second.manifest


def test_an_infinite_parity_record_is_refused_and_changes_nothing(bundle):
    before = (bundle.path / MANIFEST).read_bytes()
    with pytest.raises(ValueError, match="not JSON compliant"):
        bundle.record_parity("onnxruntime", {"limit": float("inf")})
    assert (bundle.path / MANIFEST).read_bytes() == before
    assert bundle.manifest.parity == {}


@pytest.mark.parametrize("position", range(0, 200, 7))
def test_a_damaged_golden_batch_is_an_error_wherever_the_damage_is(bundle, position):
    path = bundle.path / GOLDEN
    data = bytearray(path.read_bytes())
    data[position] ^= 0xFF
    data[-position - 1] ^= 0xFF
    path.write_bytes(data)
    with contextlib.suppress(BundleError):
        assert bundle.golden().probabilities.shape == (64,)


def test_a_bundle_that_cannot_be_written_keeps_its_manifest(bundle, monkeypatch):
    before = (bundle.path / MANIFEST).read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full)
    with pytest.raises(OutputError, match="No space left on device"):
        bundle.record_parity("onnxruntime", {})
    assert (bundle.path / MANIFEST).read_bytes() == before


def test_a_copied_bundle_is_a_bundle(bundle, tmp_path):
    shutil.copytree(bundle.path, tmp_path / "copy")
    copy = Bundle.open(tmp_path / "copy", verify="full")
    np.testing.assert_array_equal(copy.golden().probabilities, bundle.golden().probabilities)
