"""The cost of number formats, on small runs: every step is the real one."""

from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from made_up_movielens import made_up, write_recbole

from dlrm_deploy.data.planted import Ceiling
from dlrm_deploy.precision_table import BEGIN, END, FORMATS, Converted, Scored, compare, convert_one, main, markdown
from dlrm_deploy.train.recipe import Recipe
from dlrm_deploy.train.run import train

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "dlrm_deploy" / "train" / "recipes"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A short run of the planted recipe, where `compare` has its runs."""
    folder = tmp_path_factory.mktemp("runs")
    recipe = Recipe.read(RECIPES / "criteo-planted.toml")
    short = replace(recipe.train, epochs=None, steps=20, batch_size=512, tensorboard=False)
    train(replace(recipe, train=short, data=replace(recipe.data, size=10000)), folder / "criteo-planted" / "seed-0")
    return folder


def test_every_pair_of_formats_is_scored_on_the_test_split(runs):
    scored, ceiling = convert_one("criteo-planted", 0, runs)
    of = dict(zip(FORMATS, scored, strict=True))
    test = Recipe.read(runs / "criteo-planted" / "seed-0" / "recipe.toml").load()[1].test
    assert ceiling == test.ceiling()
    assert 0.5 < of["fp32", "fp32"].auc < ceiling.auc
    assert len({model.auc for model in scored}) > 6  # formats differ
    assert len({model.log_loss for model in scored}) == len(FORMATS)
    for model in scored:
        assert model.auc == pytest.approx(of["fp32", "fp32"].auc, abs=0.01)
    assert of["int4", "fp32"].table_bytes < of["int8", "fp32"].table_bytes < of["fp16", "fp32"].table_bytes
    assert of["bf16", "bf16"].table_bytes == of["fp16", "fp32"].table_bytes == of["fp32", "bf16"].table_bytes // 2
    limits = {kind: of[kind].limit for kind in (("fp32", "fp32"), ("fp32", "int8"), ("int8", "fp32"), ("int4", "bf16"))}
    assert list(limits.values()) == [0, 5e-4, 5e-4, 2e-3]


def test_movielens_is_trained_converted_and_printed(tmp_path):
    data = write_recbole(tmp_path / "ml", made_up(users=120, items=130, ratings=1500))
    (recipe,) = compare(["movielens"], tmp_path / "runs", 1, data=data, say=lambda line: None)
    assert recipe.ceiling is None
    page = tmp_path / "precision.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    folders = ["--runs", str(tmp_path / "runs"), "--data", str(data), "--write", str(page)]
    result = CliRunner().invoke(main, ["movielens", "--seeds", "1", *folders], catch_exceptions=False)
    assert result.exit_code == 0
    assert page.read_text() == f"before\n{BEGIN}\n\n{markdown([recipe])}\n{END}\nafter\n"


def test_the_worst_seed_decides():
    def seed(drop: float) -> tuple[Scored, ...]:
        def one(tables: str, mlp: str) -> Scored:
            limit = 0.0 if (tables, mlp) == ("fp32", "fp32") else 0.002 if tables == "int4" else 0.0005
            lost = drop if tables == "int8" else 0
            return Scored(auc=0.75 - lost, log_loss=0.5, table_bytes=2048, limit=limit)

        return tuple(one(*kind) for kind in FORMATS)

    made = Converted(name="m", models=(seed(0.0001), seed(0.0007)), ceiling=Ceiling(0.8, 0.4))
    lines = markdown([made]).splitlines()
    nothing = "0.0e+00, 0.0e+00"
    assert lines[2] == "| `m` | fp32 | fp32 | 0.75000 |  | 0.50000 |  |  |  | 2 KiB |"
    assert (
        f"| `m` | int8 | bf16 | 0.74960 | 4.0e-04, 7.0e-04 | 0.50000 | {nothing} | 0.0005 | FAILED | 2 KiB |" in lines
    )
    assert f"| `m` | int4 | bf16 | 0.75000 | {nothing} | 0.50000 | {nothing} | 0.002 | passed | 2 KiB |" in lines
    assert lines[-1] == "| `m` | best possible | | 0.80000 |  | 0.40000 | | | | |"


def test_the_page_has_a_place_for_the_table():
    text = (ROOT / "docs" / "precision.md").read_text(encoding="utf-8")
    assert 0 < text.find(BEGIN) < text.find(END)
