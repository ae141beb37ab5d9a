"""Tables are in memory once a process, in the pages that were asked for, and for as long as an engine needs them."""

import gc
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from bundles import make_bundle

import dlrm_deploy
from dlrm_deploy.batch import Batch
from dlrm_deploy.bundle import Bundle
from dlrm_deploy.config import FeatureConfig, ModelConfig
from dlrm_deploy.data.random import random_batch
from dlrm_deploy.engines import table_memory
from dlrm_deploy.engines.registry import MAPPING_ENGINES, open_engine
from dlrm_deploy.engines.table_memory import huge_pages_missing, open_table_memory
from dlrm_deploy.errors import EngineError
from dlrm_deploy.export.bundle import export_bundle
from dlrm_deploy.export.sources import RandomSource
from dlrm_deploy.tables import TableConfig

# Bundles of tests were never checked; tests/parity/test_gate.py is about that.
pytestmark = pytest.mark.filterwarnings("ignore::dlrm_deploy.errors.ParityWarning")

needs_huge_pages = pytest.mark.skipif(huge_pages_missing() is not None, reason=str(huge_pages_missing()))

ROWS, WIDTH = 200_000, 64
TABLE_BYTES = ROWS * WIDTH * 4


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A bundle with one table of 51 MB. Read only."""
    config = ModelConfig(
        name="large",
        dense_features=("d",),
        tables=(TableConfig(name="t", rows=ROWS, width=WIDTH),),
        features=(FeatureConfig(name="f", table="t", pooling_factor=1000),),
        bottom_mlp=(WIDTH,),
        top_mlp=(4, 1),
    )
    return export_bundle(RandomSource(config, seed=1), tmp_path_factory.mktemp("large") / "bundle")


def mappings(bundle):
    """How often this process has mapped the bundle's tables."""
    return Path("/proc/self/maps").read_text().count(f"{bundle.path}/tables/")


def memory(kind):
    """Kilobytes of this process, of one kind of /proc/self/smaps_rollup."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{kind}:"))


def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def batch_of_ids(ids):
    return Batch(np.zeros((len(ids) // 1000, 1), np.float32), ids, np.arange(len(ids) // 1000 + 1) * 1000)


@pytest.mark.parametrize("options", [{}, {"prefault": True}])
def test_the_engines_of_a_process_map_each_table_file_once_and_the_last_one_unmaps_it(bundle, options):
    assert mappings(bundle) == 0
    first = open_engine(bundle, "onnxruntime", **options)
    second = open_engine(Bundle.open(bundle.path), "onnxruntime-stock", **options)
    second.stage_outputs(bundle.golden().batch, ["probabilities"])  # a session of its own
    assert mappings(bundle) == len(bundle.manifest.table_groups) == 1
    pointers = [[value.data_ptr() for value in engine._tables.values.values()] for engine in (first, second)]
    assert pointers[0] == pointers[1]
    first.close()
    assert mappings(bundle) == 1
    assert np.abs(second.predict(bundle.golden().batch) - bundle.golden().probabilities).max() < 1e-6
    second.close()
    assert mappings(bundle) == 0


def test_mapped_tables_are_not_copied(large):
    before = memory("Anonymous")
    engines = [open_engine(large, name, threads=1, prefault=True) for name in MAPPING_ENGINES]
    for engine in engines:
        engine.predict(batch_of_ids(np.arange(8000)))
    assert (memory("Anonymous") - before) * 1024 < TABLE_BYTES / 2
    for engine in engines:
        engine.close()


@needs_huge_pages
def test_huge_pages_are_had_once_for_all_engines_and_given_back(large):
    before, huge_before = memory("Anonymous"), memory("AnonHugePages")
    engines = [open_engine(large, name, threads=1, huge_pages=True) for name in MAPPING_ENGINES]
    scores = [engine.predict(batch_of_ids(np.arange(8000))) for engine in engines]
    assert mappings(large) == 0
    assert TABLE_BYTES <= (memory("Anonymous") - before) * 1024 < 1.5 * TABLE_BYTES
    assert (memory("AnonHugePages") - huge_before) * 1024 > TABLE_BYTES / 2
    for engine in engines:
        engine.close()
    gc.collect()
    assert (memory("Anonymous") - before) * 1024 < TABLE_BYTES / 2
    with open_engine(large, "onnxruntime", threads=1) as mapped:
        np.testing.assert_array_equal(mapped.predict(batch_of_ids(np.arange(8000))), scores[0])


@pytest.mark.parametrize("option", ["prefault", pytest.param("huge_pages", marks=needs_huge_pages)])
def test_scoring_waits_for_no_page_once_tables_are_in_memory(large, option):
    ids = np.random.default_rng(0).permutation(ROWS)[:20_000]
    waited = {}
    for options in ({}, {option: True}):
        with open_engine(large, "onnxruntime", threads=1, **options) as engine:
            for _ in range(2):
                engine.predict(batch_of_ids(np.zeros(20_000, np.int64)))  # what the session itself touches first
            before = faults()
            engine.predict(batch_of_ids(ids))
            waited[bool(options)] = faults() - before
    # At least one fault for every 2 MB: file systems keep pages in blocks of up to that size.
    assert waited[False] >= TABLE_BYTES >> 21
    assert waited[True] < waited[False] / 3


def test_where_the_kernel_cannot_populate_a_mapping_every_page_is_read(large, monkeypatch):
    monkeypatch.setattr(table_memory, "_POPULATE_READ", 9999)
    mapped = open_table_memory(large.path / large.manifest.table_groups[0].file)
    before = faults()
    mapped.prefault()
    during = faults() - before
    before = faults()
    mapped.data[:: 4096 * 3].max()
    assert faults() - before < during / 10


@pytest.mark.parametrize("engine", MAPPING_ENGINES)
def test_scores_do_not_depend_on_where_tables_lie(any_bundle, engine):
    batch = random_batch(any_bundle.config, 37, np.random.default_rng(0))
    choices = [{}, {"prefault": True}, *([] if huge_pages_missing() else [{"prefault": True, "huge_pages": True}])]
    scores = []
    for options in choices:
        with open_engine(any_bundle, engine, threads=1, **options) as opened:
            scores.append(opened.predict(batch))
    for other in scores[1:]:
        np.testing.assert_array_equal(other, scores[0])


def test_tables_of_every_format_are_mapped_once_and_may_be_copied(converted_bundle):
    batch = random_batch(converted_bundle.config, 37, np.random.default_rng(0))
    with open_engine(converted_bundle, "onnxruntime", threads=1) as mapped:
        assert mappings(converted_bundle) == len(converted_bundle.manifest.table_groups)
        scores = mapped.predict(batch)
    if not huge_pages_missing():
        with open_engine(converted_bundle, "onnxruntime", threads=1, huge_pages=True) as copied:
            assert mappings(converted_bundle) == 0
            np.testing.assert_array_equal(copied.predict(batch), scores)


def test_a_replaced_file_is_another_file(tmp_path):
    path, new = tmp_path / "table", tmp_path / "new"
    path.write_bytes(b"old")
    new.write_bytes(b"new")
    old = open_table_memory(path)
    new.replace(path)
    assert bytes(open_table_memory(path).data) == b"new"
    assert bytes(old.data) == b"old"
    assert not old.data.flags.writeable


@needs_huge_pages
def test_a_copy_holds_the_files_bytes_begins_on_a_huge_page_and_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(table_memory, "_BLOCK", 1000)
    path = tmp_path / "table"
    path.write_bytes(np.random.default_rng(0).bytes(4321))
    copied = open_table_memory(path, huge_pages=True)
    assert bytes(copied.data) == path.read_bytes()
    assert copied.data.ctypes.data % (2 << 20) == 0
    assert not copied.data.flags.writeable
    assert open_table_memory(path, huge_pages=True) is copied
    assert open_table_memory(path) is not copied


FORK = """
import os, signal, sys, warnings
import numpy as np
from dlrm_deploy.bundle import Bundle
from dlrm_deploy.engines.registry import open_engine

warnings.simplefilter("ignore")
bundle = Bundle.open(sys.argv[1])
batch = bundle.golden().batch
here = open_engine(bundle, "onnxruntime", threads=2, huge_pages=True)
scores = here.predict(batch)
places = lambda engine: [value.data_ptr() for value in engine._tables.values.values()]
child = os.fork()
if child == 0:
    signal.alarm(30)
    there = open_engine(bundle, "onnxruntime", threads=2, huge_pages=True)
    same = np.array_equal(there.predict(batch), scores) and places(there) == places(here)
    os._exit(0 if same else 1)
print(os.waitpid(child, 0)[1], np.array_equal(here.predict(batch), scores))
"""


@needs_huge_pages
def test_a_copy_made_before_a_fork_serves_the_engines_of_the_child(bundle):
    done = subprocess.run([sys.executable, "-c", FORK, bundle.path], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "True"]


FORK_WHILE_LOCKED = """
import os, signal, sys
from pathlib import Path
from dlrm_deploy.engines import table_memory
with table_memory._lock:  # as another thread does while it copies tables
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        os._exit(0 if table_memory.open_table_memory(Path(sys.argv[1])).data.size == 3 else 1)
print(os.waitpid(child, 0)[1])
"""


def test_a_fork_while_tables_are_being_opened_does_not_stop_the_child(tmp_path):
    path = tmp_path / "table"
    path.write_bytes(b"abc")
    done = subprocess.run([sys.executable, "-c", FORK_WHILE_LOCKED, path], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0"]


@pytest.mark.parametrize("content", [None, b""], ids=["missing", "empty"])
def test_a_file_that_cannot_be_mapped_is_named(tmp_path, content):
    path = tmp_path / "table"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(EngineError, match=f"cannot map {path}.*Copy the bundle again"):
        open_table_memory(path)


def test_a_table_file_of_another_size_is_refused(bundle):
    record = bundle.manifest.table_groups[0]
    with (bundle.path / record.file).open("ab") as file:
        file.write(b"more")
    size = record.rows * record.width * 4
    with pytest.raises(EngineError, match=rf"{record.file} has {size + 4} bytes, expected {size}"):
        open_engine(bundle, "onnxruntime")


def test_huge_pages_that_are_switched_off_are_refused(bundle, tmp_path, monkeypatch):
    setting = tmp_path / "enabled"
    setting.write_text("always madvise [never]\n")
    monkeypatch.setattr(table_memory, "_HUGE_PAGE_SETTING", setting)
    with pytest.raises(EngineError, match=r"switched off: .*enabled says 'always madvise \[never\]'. Leave huge pages"):
        dlrm_deploy.load(bundle.path, huge_pages=True)


@needs_huge_pages
def test_a_copy_that_memory_has_no_room_for_is_refused_before_it_is_made(bundle, tmp_path, monkeypatch):
    state = tmp_path / "meminfo"
    state.write_text("MemTotal: 9 kB\nMemAvailable: 0 kB\n")
    monkeypatch.setattr(table_memory, "_MEMORY_STATE", state)
    with pytest.raises(EngineError, match=r"needs 0.0 GB of memory, and 0.0 GB are free. Leave huge pages out"):
        dlrm_deploy.load(bundle.path, huge_pages=True)


@pytest.mark.parametrize("option", ["prefault", "huge_pages"])
def test_engines_that_map_no_tables_refuse_the_options(bundle, option):
    for engine in ("torch", "tensorrt"):
        with pytest.raises(EngineError, match=f"{option} is an option of onnxruntime and onnxruntime-stock, not of"):
            dlrm_deploy.load(bundle.path, engine, **{option: True})


def test_a_removed_bundle_still_scores(tmp_path):
    bundle = make_bundle("dot", tmp_path / "gone")
    golden = bundle.golden()
    with open_engine(bundle, "onnxruntime") as engine:
        shutil.rmtree(bundle.path)
        assert np.abs(engine.predict(golden.batch) - golden.probabilities).max() < 1e-6
