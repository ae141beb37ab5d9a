from __future__ import annotations

import numpy as np
import pytest
from click.testing import CliRunner, Result

from dlrm_deploy.batch_file import read_batch
from dlrm_deploy.cli.main import cli
from dlrm_deploy.data.trace import StackProfile, Trace


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["trace", *map(str, arguments)])


@pytest.fixture
def profile(tmp_path):
    """Of any feature: half repeats, half at a distance of 3, over 9 ids."""
    half = StackProfile(feature="*", lines=9, distances=np.array([1, 3]), cumulative=np.array([0.5, 1.0]))
    Trace((half,)).write(tmp_path / "half.npz")
    return tmp_path / "half.npz"


def write_batch(path, bags: dict[int, list[int]]):
    """Two features of the samples given: `bags[sample]` are the ids of both."""
    lengths = [len(ids) for ids in bags.values()] * 2
    ids = [i for ids in bags.values() for i in ids] * 2
    np.savez(
        path,
        dense=np.zeros((len(bags), 1), np.float32),
        indices=np.array(ids),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
    )
    return path


def test_traffic_profiled_and_generated_again_has_the_same_hit_rates(bundle, tmp_path, profile):
    made, again, out = tmp_path / "made.npz", tmp_path / "again.npz", tmp_path / "profile.npz"
    for seed, path in ((1, made), (2, again)):
        result = run("generate", profile, "--bundle", bundle.path, "--samples", 3000, "--seed", seed, "--out", path)
        assert result.exit_code == 0, result.output
    assert read_batch(made)[0].batch_size == 3000
    read_batch(made)[0].check_fits(bundle.config)
    assert read_batch(made)[0].explain_bad_ids(bundle.config) is None
    assert not np.array_equal(read_batch(made)[0].indices, read_batch(again)[0].indices)
    result = run("profile", made, again, "--bundle", bundle.path, "--out", out)
    assert result.exit_code == 0, result.output
    profiled = Trace.read(out)
    assert [p.feature for p in profiled.profiles] == [f.name for f in bundle.config.features]
    for each in profiled.profiles:
        assert each.hit_rate(1) == pytest.approx(0.5, abs=0.02)
        assert each.hit_rate(3) == pytest.approx(1.0, abs=0.02)


def test_batch_files_are_one_stream_in_the_order_given(tmp_path):
    first, second = write_batch(tmp_path / "1.npz", {0: [4], 1: [5]}), write_batch(tmp_path / "2.npz", {0: [4]})
    result = run("profile", first, second, "--out", tmp_path / "p.npz")
    assert result.exit_code == 0, result.output
    for number, each in enumerate(Trace.read(tmp_path / "p.npz").profiles):
        assert (each.feature, each.accesses, each.lines) == (str(number), 3, 2)
        np.testing.assert_array_equal(each.distances, [0, 2])


def test_a_recipes_data_is_profiled_with_the_names_of_its_features(tmp_path):
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        '[model]\npreset = "kaggle"\nscale_rows = 1e-5\n[data]\nkind = "random"\nsize = 50\ndistribution = "zipf"\n'
        "[train]\nbatch_size = 10\nepochs = 1\n"
    )
    result = run("profile", "--recipe", recipe, "--out", tmp_path / "p.npz")
    assert result.exit_code == 0, result.output
    profiles = Trace.read(tmp_path / "p.npz").profiles
    assert [p.feature for p in profiles] == [f"cat_{i}" for i in range(26)]
    assert {p.accesses for p in profiles} == {50}


def test_show_lists_each_feature_with_its_hit_rates(tmp_path):
    distances, cumulative = np.array([0, 1, 50]), np.array([0.25, 0.75, 1.0])
    Trace(
        (StackProfile(feature="clicks", lines=100, distances=distances, cumulative=cumulative, accesses=4000),)
    ).write(tmp_path / "p.npz")
    result = run("show", tmp_path / "p.npz")
    assert result.exit_code == 0, result.output
    (line,) = [line for line in result.stdout.splitlines() if "clicks" in line]
    words = line.replace("│", " ").split()
    assert words == ["clicks", "4,000", "100", "25.0%", "50.0%", "50.0%", "50.0%", "50.0%", "50.0%", "75.0%"]


def test_a_profile_of_a_larger_model_is_refused_or_squeezed(bundle, tmp_path):
    wide = StackProfile(feature="*", lines=1000, distances=np.array([2, 900]), cumulative=np.array([0.5, 1.0]))
    Trace((wide,)).write(tmp_path / "wide.npz")
    to_bundle = ["--bundle", bundle.path, "--samples", 40]
    result = run("generate", tmp_path / "wide.npz", *to_bundle, "--out", tmp_path / "b.npz")
    assert result.exit_code == 3
    assert "1000 ids, and the table has" in result.stderr
    result = run("generate", tmp_path / "wide.npz", *to_bundle, "--squeeze", "--cold", "--out", tmp_path / "b.npz")
    assert result.exit_code == 0, result.output
    assert read_batch(tmp_path / "b.npz")[0].explain_bad_ids(bundle.config) is None
    result = run("squeeze", tmp_path / "wide.npz", "--bundle", bundle.path, "--out", tmp_path / "narrow.npz")
    assert result.exit_code == 0, result.output
    assert [p.lines for p in Trace.read(tmp_path / "narrow.npz").profiles] == list(bundle.config.feature_rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["profile", "--out", "p.npz"], "either BATCH_FILES or --recipe"),
        (["generate", "PROFILE", "--samples", "3", "--out", "b.npz"], "Give --bundle or --preset"),
        (["generate", "PROFILE", "--samples", "3", "--preset", "kaggle", "--out", "b.npy"], "should end in .npz"),
        (["generate", "PROFILE", "--samples", "3", "--scale-rows", "2", "--out", "b.npz"], "goes with --preset"),
        (["squeeze", "PROFILE", "--preset", "kaggle", "--out", "p.txt"], "should end in .npz"),
        (["generate", "PROFILE", "--samples", "0", "--preset", "kaggle", "--out", "b.npz"], "0 is not in the range"),
    ],
)
def test_wrong_usage_exits_2(profile, arguments, message):
    result = run(*(profile if word == "PROFILE" else word for word in arguments))
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


def test_a_model_has_one_name(profile, bundle, tmp_path):
    both = ["--bundle", bundle.path, "--preset", "kaggle"]
    result = run("squeeze", profile, *both, "--out", tmp_path / "p.npz")
    assert result.exit_code == 2
    assert "either --bundle or --preset" in result.stderr


def test_a_file_that_is_no_trace_exits_3(tmp_path):
    (tmp_path / "t.txt").write_text("hello")
    result = run("show", tmp_path / "t.txt")
    assert result.exit_code == 3
    assert "t.txt has 1 lines, and a trace has three" in result.stderr
