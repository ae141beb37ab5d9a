"""Folders of NVIDIA's DLRM: golden files of the project itself, and models restated here in other shapes."""

import re
import sys
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent))
from golden_scores import GOLDEN, assert_scores, read_golden, sigmoid
from import_memory import memory_of_reading

from dlrm_deploy.batch import Batch
from dlrm_deploy.errors import CheckpointError, ConfigError
from dlrm_deploy.export.importers.common import ImportOptions
from dlrm_deploy.export.importers.detect import open_source
from dlrm_deploy.export.importers.nvidia import NvidiaFolder
from dlrm_deploy.export.importers.nvidia_metadata import Metadata, device_order, metadata
from dlrm_deploy.tensors.store import BLOCK_BYTES

pytestmark = pytest.mark.filterwarnings("ignore::dlrm_deploy.errors.ParityWarning")

VARIANTS = [
    "dot",
    "dot-no-padding",
    "dot-joint",
    "cat",
    "hash",
    "one-layer",
    "twelve-tables",
    "equal-sizes",
    "one-process-ordered",
    "two-processes",
    "two-processes-ordered",
    "three-processes-cat",
    "three-processes-cat-ordered",
    "five-processes",
]


def open_nvidia(path, **options):
    return open_source(path, "nvidia", ImportOptions(**options))


@pytest.mark.parametrize("name", VARIANTS)
def test_a_folder_scores_as_the_project_did(tmp_path, name):
    path = GOLDEN / "nvidia" / name
    assert_scores(open_source(path, "auto", ImportOptions()), tmp_path, *read_golden(Path(f"{path}.npz")))


def test_every_golden_folder_is_compared():
    assert {path.stem for path in (GOLDEN / "nvidia").glob("*.npz")} == set(VARIANTS)


# Models restated


@dataclass
class Model:
    """A folder of the project, written and scored by definition. `devices` lists the tables of each device."""

    rows: tuple[int, ...] = (30, 100, 7, 50)
    width: int = 4
    dense: int = 3
    hidden: tuple[int, ...] = (9,)
    top: tuple[int, ...] = (8, 5)
    kind: str = "dot"
    devices: tuple[tuple[int, ...], ...] = ((1, 3, 0, 2),)
    ordered: bool = False
    hash_indices: bool = False
    padded: bool = True
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self):
        g = torch.Generator().manual_seed(5)
        vectors = len(self.rows) + 1
        columns = vectors * self.width if self.kind == "cat" else self.width + vectors * (vectors - 1) // 2
        self.padding = -columns % 8 if self.padded and self.kind == "dot" else 0
        for f, count in enumerate(self.rows):
            self.tensors[f"table.{f}"] = torch.randn(count, self.width, generator=g) * 0.5
        for name, widths in {
            "bottom": (self.dense, *self.hidden, self.width),
            "top": (columns + self.padding, *self.top, 1),
        }.items():
            for layer, (width, out) in enumerate(pairwise(widths)):
                self.tensors[f"{name}.weights.{layer}"] = torch.randn(out, width, generator=g) / width**0.5
                self.tensors[f"{name}.biases.{layer}"] = torch.randn(out, generator=g) * 0.1

    @property
    def mapping(self):
        vectors = [len(tables) + (device == 0) for device, tables in enumerate(self.devices)]
        return {"bottom_mlp": 0, "embedding": [list(t) for t in self.devices], "vectors_per_gpu": vectors}

    def layers(self, name):
        weights = [value for key, value in self.tensors.items() if key.startswith(f"{name}.weights.")]
        biases = [value for key, value in self.tensors.items() if key.startswith(f"{name}.biases.")]
        return weights, biases

    def write(self, folder):
        folder.mkdir(exist_ok=True)
        for f in range(len(self.rows)):
            table = self.tensors[f"table.{f}"]
            (folder / f"bottom_model.embeddings.{f}.bin").write_bytes(table.numpy().tobytes())
            torch.save({"shape": table.shape}, folder / f"embeddings.{f}.meta.pt")
        weights, biases = self.layers("bottom")
        torch.save({"weights": weights, "biases": biases}, folder / "bottom_model.mlp.pt")
        weights, biases = self.layers("top")
        torch.save({"weights": weights[:-1], "biases": biases[:-1]}, folder / "top_model.mlp.pt")
        torch.save({"weight": weights[-1], "bias": biases[-1]}, folder / "top_model.out.pt")
        config = {
            "interaction_op": self.kind,
            "hash_indices": self.hash_indices,
            "bottom_features_ordered": self.ordered,
            "seed": 1,
        }
        self.write_metadata(folder, {"device_mapping": self.mapping, "epoch": 0, "step": 7}, config)
        return folder

    @staticmethod
    def write_metadata(folder, data, config):
        torch.save({"data": data, "config": config}, folder / "metadata.pt")

    def batch(self, samples=19):
        rng = np.random.default_rng(3)
        ids = [np.r_[0, count - 1, rng.integers(0, count, samples - 2)] for count in self.rows]
        offsets = np.arange(samples * len(ids) + 1)
        return Batch(rng.normal(size=(samples, self.dense)).astype(np.float32), np.concatenate(ids), offsets)

    def forward(self, batch, order):
        """Probabilities, with the tables' vectors in this order behind the bottom MLP's."""
        x = torch.from_numpy(batch.dense)
        for weight, bias in zip(*self.layers("bottom"), strict=True):
            x = F.relu(F.linear(x, weight, bias))
        ids = torch.from_numpy(batch.indices).reshape(len(self.rows), -1)
        if self.hash_indices:
            ids = ids % torch.tensor(self.rows)[:, None]
        vectors = torch.stack([x, *(self.tensors[f"table.{f}"][ids[f]] for f in order)], 1)
        if self.kind == "cat":
            top = vectors.flatten(1)
        else:
            row, column = torch.tril_indices(vectors.shape[1], vectors.shape[1], offset=-1)
            products = (vectors @ vectors.mT)[:, row, column]
            top = torch.cat([x, products, torch.zeros(len(x), self.padding)], 1)
        weights, biases = self.layers("top")
        for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
            top = F.relu(F.linear(top, weight, bias))
        return sigmoid(F.linear(top, weights[-1], biases[-1])[:, 0].numpy())


@pytest.mark.parametrize("kind", ["dot", "cat"])
@pytest.mark.parametrize(
    ("devices", "ordered", "order"),
    [
        (((1, 3, 0, 2),), False, (1, 3, 0, 2)),
        (((1, 3, 0, 2),), True, (1, 3, 0, 2)),  # one process: nothing looks at the flag
        (((3, 0), (1, 2)), False, (3, 0, 1, 2)),
        (((3, 0), (1, 2)), True, (0, 1, 2, 3)),
        (((), (2,), (0, 1, 3)), False, (2, 0, 1, 3)),
    ],
)
def test_a_restated_model_scores_as_its_own_forward(tmp_path, kind, devices, ordered, order):
    model = Model(kind=kind, devices=devices, ordered=ordered)
    source = open_nvidia(model.write(tmp_path / "in"))
    assert [table.rows for table in source.config.tables] == list(model.rows)
    batch = model.batch()
    assert_scores(source, tmp_path, batch, model.forward(batch, order))


@pytest.mark.parametrize(
    "model",
    [
        Model(rows=(5,), devices=((0,),), width=3),
        Model(rows=(5, 6, 7), devices=((2, 1, 0),), width=2),  # 2 + 6 = 8 columns: nothing to fill up
        Model(padded=False),
        Model(hidden=(), top=(3,)),
        Model(rows=tuple(range(2, 15)), devices=(tuple(reversed(range(13))),), width=8, dense=13),
    ],
    ids=["one table", "no padding", "not padded", "one layer", "thirteen tables"],
)
def test_other_sizes_score_as_their_own_forward(tmp_path, model):
    batch = model.batch()
    order = [number for tables in model.devices for number in tables]
    assert_scores(open_nvidia(model.write(tmp_path / "in")), tmp_path, batch, model.forward(batch, order))


def test_hashed_ids_are_taken_modulo_the_rows_of_their_table(tmp_path):
    model = Model(hash_indices=True)
    batch = model.batch()
    batch = replace(batch, indices=batch.indices + np.repeat([30, 0, 70, 5000], 19))
    source = open_nvidia(model.write(tmp_path / "in"))
    assert [feature.modulo for feature in source.config.features] == list(model.rows)
    assert_scores(source, tmp_path, batch, model.forward(batch, (1, 3, 0, 2)))
    with pytest.raises(ConfigError, match="--modulo 9: the checkpoint was trained with hash_indices"):
        open_nvidia(tmp_path / "in", modulo=9)


def test_every_bag_holds_one_id(tmp_path):
    assert open_nvidia(Model().write(tmp_path / "in")).config.pooling_factors == (1, 1, 1, 1)


def test_the_order_and_the_hash_are_in_the_provenance(tmp_path):
    facts = open_nvidia(Model(devices=((3, 0), (1, 2))).write(tmp_path / "in")).provenance()
    assert facts["order_of_tables_in_top_model"] == "[3, 0, 1, 2], as the 2 devices of the run held them"
    assert facts["hash_indices"] is False


# The order of the tables


def test_without_metadata_the_order_is_asked_for_and_the_answer_is_right(tmp_path):
    model = Model()
    folder = model.write(tmp_path / "in")
    (folder / "metadata.pt").unlink()
    with pytest.raises(
        ConfigError, match=r"lacks metadata\.pt.*Copy metadata\.pt too.*--features with cat_0, cat_1, cat_2, cat_3"
    ):
        open_nvidia(folder)
    with pytest.raises(ConfigError, match=r"lacks metadata\.pt, which says the device mapping"):
        open_nvidia(folder, features=("a", "b", "c", "d"))
    source = open_nvidia(folder, features=("cat_1", "cat_3", "cat_0", "cat_2"))
    assert [feature.name for feature in source.config.features] == ["cat_0", "cat_1", "cat_2", "cat_3"]
    assert source.provenance()["order_of_tables_in_top_model"] == "[1, 3, 0, 2], as --features says"
    batch = model.batch()
    assert_scores(source, tmp_path, batch, model.forward(batch, (1, 3, 0, 2)))


def test_without_the_flag_only_a_run_of_several_processes_is_asked_about():
    order = (1, 0)
    assert device_order(Metadata(devices=(order,)))[0] == order
    assert device_order(Metadata(devices=((1,), (0,)))) is None
    assert device_order(Metadata(devices=((0,), (1,))))[0] == (0, 1)
    assert device_order(Metadata()) is None


def test_names_of_features_are_given_in_the_order_of_the_tables_numbers(tmp_path):
    folder = Model().write(tmp_path / "in")
    config = open_nvidia(folder, features=("a", "b", "c", "d")).config
    assert [(table.name, table.rows) for table in config.tables] == [("a", 30), ("b", 100), ("c", 7), ("d", 50)]
    with pytest.raises(ConfigError, match=r"metadata.pt tells their order"):
        open_nvidia(folder, features=("cat_1", "cat_3", "cat_0", "cat_2"))
    with pytest.raises(ConfigError, match=r"--features has 3 names"):
        open_nvidia(folder, features=("a", "b", "c"))


MAPPING = "data.device_mapping."


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({f"{MAPPING}embedding.0.0": 0, f"{MAPPING}embedding.0.1": 0}, r"contradicts itself: tables \[\[0, 0\]\]"),
        ({f"{MAPPING}embedding.0.0": 1}, "contradicts itself"),
        (
            {f"{MAPPING}embedding.0.0": 0, f"{MAPPING}vectors_per_gpu.0": 1},
            r"contradicts itself.*vectors per device \[1\]",
        ),
        ({f"{MAPPING}embedding.0.0": 0, f"{MAPPING}vectors_per_gpu.1": 1}, "contradicts itself"),
        ({f"{MAPPING}embedding.0.0": 0.5}, "is 0.5, expected a number"),
        ({f"{MAPPING}embedding.0.0": True}, "is True, expected a number"),
        ({f"{MAPPING}bottom_mlp": 1, f"{MAPPING}embedding.0.0": 0}, "bottom MLP was on device 1"),
        ({"config.interaction_op": "fm"}, r"interaction_op is 'fm', expected one of dot, cuda_dot, cat"),
        ({"config.hash_indices": "yes"}, r"hash_indices is 'yes', expected true or false"),
    ],
)
def test_metadata_that_contradicts_itself_is_refused(values, match):
    with pytest.raises(CheckpointError, match=match):
        metadata(Path("metadata.pt"), values)


def test_both_dot_implementations_are_one_interaction():
    assert metadata(Path("x"), {"config.interaction_op": "cuda_dot"}).interaction == "dot"


# Interactions


def test_an_interaction_that_nothing_tells_is_asked_for(tmp_path):
    model = Model(rows=(9,), width=8, devices=((0,),))  # dot gives 8 + 1, filled up to 16, and cat 2 x 8
    folder = model.write(tmp_path / "in")
    model.write_metadata(folder, {"device_mapping": model.mapping}, {})
    with pytest.raises(
        ConfigError, match=r"dot and cat both give the 16 values.*--interaction dot or --interaction cat"
    ):
        open_nvidia(folder)
    assert open_nvidia(folder, interaction="cat").config.interaction == "concat"
    source = open_nvidia(folder, interaction="dot")
    batch = model.batch()
    assert_scores(source, tmp_path, batch, model.forward(batch, (0,)))


@pytest.mark.parametrize("asked", ["cat", "dot-self"])
def test_an_interaction_that_metadata_contradicts_is_refused(tmp_path, asked):
    with pytest.raises(ConfigError, match=f"--interaction {asked}, but the model computes dot"):
        open_nvidia(Model().write(tmp_path / "in"), interaction=asked)


# Refusals


def test_a_config_has_to_agree_with_the_folder(tmp_path):
    folder = Model().write(tmp_path / "in")
    config = open_nvidia(folder).config
    assert open_nvidia(folder, config=config).config == config
    tables = config.tables
    wrong = {
        r"table cat_1: the checkpoint holds 100 rows": replace(
            config, tables=(tables[0], replace(tables[1], rows=8), *tables[2:])
        ),
        r"--config says interaction concat": replace(config, interaction="concat"),
        r"--config says interaction dot with itself": replace(config, self_interaction=True),
        r"bottom_model.mlp.weights.0 is \[9, 3\], and --config needs \[10, 3\]": replace(config, bottom_mlp=(10, 4)),
        r"top_model.out.weight is \[1, 5\], and --config needs \[1, 8\]": replace(config, top_mlp=(8, 1)),
        r"holds 4 tables, one for each feature; --config has 3": replace(
            config, tables=tables[:3], features=config.features[:3]
        ),
    }
    for match, contradicting in wrong.items():
        with pytest.raises(CheckpointError) as caught:
            open_nvidia(folder, config=contradicting)
        assert re.search(match, str(caught.value)), (match, str(caught.value))


@pytest.mark.parametrize(
    ("name", "match"),
    [
        (
            "bottom_model.embeddings.2.bin",
            r"holds 3 of 4 tables: bottom_model.embeddings.N.bin is missing for N = 2\. ",
        ),
        ("embeddings.1.meta.pt", r"lacks embeddings.1.meta.pt"),
        ("bottom_model.mlp.pt", r"lacks bottom_model.mlp.pt. The processes of a run write parts of one folder"),
        ("top_model.out.pt", r"lacks top_model.out.pt"),
    ],
)
def test_a_missing_file_is_named(tmp_path, name, match):
    folder = Model().write(tmp_path / "in")
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=match):
        open_nvidia(folder)


def test_a_missing_last_table_is_noticed_with_and_without_metadata(tmp_path):
    folder = Model(width=8).write(tmp_path / "in")
    (folder / "bottom_model.embeddings.3.bin").unlink()
    with pytest.raises(CheckpointError, match="missing for N = 3"):
        open_nvidia(folder)
    (folder / "metadata.pt").unlink()
    with pytest.raises(
        CheckpointError, match=r"takes 24 values. With 3 tables of width 8, dot gives 14 \(filled up to 16"
    ):
        open_nvidia(folder, features=("cat_0", "cat_1", "cat_2"))


def test_more_tables_than_metadata_knows_are_refused(tmp_path):
    model = Model()
    folder = model.write(tmp_path / "in")
    model.write_metadata(folder, {"device_mapping": {"bottom_mlp": 0, "embedding": [[0, 1]]}}, {})
    with pytest.raises(CheckpointError, match=r"holds tables 0 to 3, but metadata.pt knows 2"):
        open_nvidia(folder)


def change(name, value):
    def alter(folder):
        torch.save(value, folder / name)

    return alter


@pytest.mark.parametrize(
    ("alter", "match"),
    [
        (lambda f: (f / "bottom_model.embeddings.0.bin").write_bytes(b"\0" * 476), r"has 476 bytes, expected 480"),
        (change("embeddings.0.meta.pt", {"shape": torch.Size([30])}), r"expected a shape of two numbers"),
        (
            change("embeddings.0.meta.pt", {"shape": torch.Size([60, 2])}),
            r"table 0 is 2 wide and the bottom MLP ends in 4",
        ),
        (
            change("top_model.out.pt", {"weight": torch.zeros(2, 5), "bias": torch.zeros(2)}),
            r"is \[2, 5\], expected \[1, 5\]",
        ),
        (change("top_model.out.pt", {"bias": torch.zeros(1)}), r"lacks layers"),
        (
            change("top_model.mlp.pt", {"weights": [torch.zeros(5, 18)], "biases": [torch.zeros(5)]}),
            r"takes 18 values, and dot is meant. With 4 tables of width 4, dot gives 14 \(filled up to 16\) and cat 20",
        ),
        (change("bottom_model.mlp.pt", {"weights": [torch.zeros(4, 3)], "biases": []}), r"holds none"),
        (change("bottom_model.mlp.pt", {"weights": [torch.zeros(9, 3), torch.zeros(4, 8)]}), r"gives 9 values"),
        (
            change(
                "bottom_model.mlp.pt",
                {"weights": [torch.zeros(4, 3)], "biases": [torch.zeros(4)], "new": torch.zeros(2)},
            ),
            r"no place for .*bottom_model\.mlp\.new",
        ),
    ],
)
def test_files_that_make_no_model_are_refused(tmp_path, alter, match):
    folder = Model().write(tmp_path / "in")
    alter(folder)
    with pytest.raises(CheckpointError, match=match):
        open_nvidia(folder)


def test_nan_in_a_table_is_refused_by_row_and_column(tmp_path):
    model = Model()
    model.tensors["table.1"][77, 3] = float("nan")
    source = open_nvidia(model.write(tmp_path / "in"))
    with pytest.raises(CheckpointError, match=r"row 77, column 3"):
        list(source.part_chunks(source.config.tables[1].parts[0]))


def test_tables_are_read_in_blocks(tmp_path):
    model = Model()
    folder = model.write(tmp_path / "in")
    rows = 3 * BLOCK_BYTES // 16 - 1
    values = np.arange(rows * 4, dtype=np.float32).reshape(rows, 4)
    values.tofile(folder / "bottom_model.embeddings.2.bin")
    torch.save({"shape": torch.Size([rows, 4])}, folder / "embeddings.2.meta.pt")
    store = NvidiaFolder(folder)
    blocks = list(store.chunks("bottom_model.embeddings.2"))
    assert len(blocks) == 3
    assert max(block.nbytes for _, block in blocks) <= BLOCK_BYTES
    for first, block in blocks:
        np.testing.assert_array_equal(block, values[first : first + len(block)])
    with pytest.raises(CheckpointError, match="holds no tensor nothing"):
        store.read("nothing")


def test_a_folder_is_read_in_less_memory_than_its_largest_table_takes(tmp_path):
    rows, width = 1_600_000, 16  # 102 MB
    paths = [
        Model(rows=(count, 7), devices=((0, 1),), width=width).write(tmp_path / str(count)) for count in (30, rows)
    ]
    read, grown = memory_of_reading(*paths)
    assert read == (rows + 7) * width * 4
    assert grown < 3.5 * BLOCK_BYTES


def test_a_flipped_bit_in_a_weight_is_refused_unless_checksums_are_not_compared(tmp_path):
    folder = Model().write(tmp_path / "in")
    file = folder / "top_model.out.pt"
    weight = torch.load(file, weights_only=True)["weight"].numpy().tobytes()
    content = bytearray(file.read_bytes())
    content[content.index(weight)] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"top_model\.out\.pt: its record .*, which holds weight, was altered"):
        open_nvidia(folder)
    assert open_nvidia(folder, no_crc=True).provenance()["options"] == {"no_crc": True}


def test_a_summary_gives_hashed_sizes_by_feature(tmp_path):
    source = open_nvidia(Model(rows=(30, 100, 7, 50), hash_indices=True).write(tmp_path / "in"))
    assert "ids modulo 30 (cat_0), 100 (cat_1), 7 (cat_2), 50 (cat_3)" in "\n".join(source.summary())
