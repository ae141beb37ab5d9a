"""The limit for bfloat16 MLPs: right engines are far within it, and ones that round in another way are outside."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from bundles import CONFIGS, make_bundle
from torch.nn import functional as F

from dlrm_deploy.data.random import random_batch
from dlrm_deploy.engines.registry import open_engine
from dlrm_deploy.engines.torch_eager import TorchEngine
from dlrm_deploy.export.convert import convert_bundle
from dlrm_deploy.model.dlrm import to_bf16
from dlrm_deploy.parity.bf16_limit import rounding_deviations, rounding_limit
from dlrm_deploy.parity.limits import Limits, precision_limit

MODELS = ("dot", "concat", "parts_weighted", "branches", "ids_only", "factorization", "cross")


@pytest.fixture(params=MODELS)
def reference(request, tmp_path):
    fp32 = make_bundle(request.param, tmp_path / "fp32")
    with TorchEngine(convert_bundle(fp32, tmp_path / "bf16", tables="fp32", mlp="bf16"), threads=1) as engine:
        yield engine


def rms(values):
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))


def score_with(engine, batch, layer):
    was, engine.model.layer = engine.model.layer, layer
    try:
        return engine.predict(batch)
    finally:
        engine.model.layer = was


def test_an_engine_that_adds_in_another_order_is_within_both_limits(reference):
    batch = random_batch(reference.bundle.config, 1024, np.random.default_rng(0))

    def reversed_order(x, weight, bias):
        return F.linear(to_bf16(x).flip(1), weight.flip(1), bias)

    difference = score_with(reference, batch, reversed_order) - reference.predict(batch)
    limit = Limits(reference.bundle, reference, reference).of(batch)
    assert np.abs(difference).max() <= limit.most
    assert rms(difference) <= limit.rms


@pytest.mark.parametrize(
    "rounded",
    [
        lambda x: x,  # not at all
        lambda x: (x.view(torch.int32) & -65536).view(torch.float32),  # towards zero
    ],
)
def test_an_engine_that_rounds_in_another_way_is_outside_on_average(rounded, tmp_path):
    fp32 = make_bundle("dot", tmp_path / "fp32")
    with TorchEngine(convert_bundle(fp32, tmp_path / "bf16", tables="fp32", mlp="bf16"), threads=1) as reference:
        batch = random_batch(fp32.config, 1024, np.random.default_rng(0))
        wrong = score_with(reference, batch, lambda x, weight, bias: F.linear(rounded(x), weight, bias))
        limit = Limits(reference.bundle, reference, reference).of(batch)
        assert rms(wrong - reference.predict(batch)) > 1.5 * limit.rms


def test_deviations_are_those_of_independent_roundings(tmp_path):
    """Rounding up or down at random, twice, is what the formula describes."""
    fp32 = make_bundle("dot", tmp_path / "fp32")
    with TorchEngine(convert_bundle(fp32, tmp_path / "bf16", tables="fp32", mlp="bf16"), threads=1) as engine:
        batch = random_batch(fp32.config, 512, np.random.default_rng(0))
        generator = torch.Generator().manual_seed(0)
        dense = torch.from_numpy(batch.dense)

        def dithered(x, weight, bias):
            if x.data_ptr() == dense.data_ptr():  # the same bits in every engine
                return F.linear(to_bf16(x), weight, bias)
            spacing = torch.ldexp(torch.ones_like(x), torch.frexp(x).exponent - 8)
            shift = (torch.rand(x.shape, generator=generator) - 0.5) * spacing
            return F.linear(torch.where(x == 0, 0, x + shift), weight, bias)

        found = [score_with(engine, batch, dithered).astype(np.float64) for _ in range(40)]
        seen = np.sqrt(np.mean([(found[i] - found[i + 1]) ** 2 for i in range(0, 40, 2)], axis=0))
        sigma = rounding_deviations(engine.model, batch)
    assert np.median(seen / sigma) == pytest.approx(1, abs=0.15)


def test_an_empty_batch_has_no_rounding(reference):
    limit = rounding_limit(reference, random_batch(reference.bundle.config, 0, np.random.default_rng(0)))
    assert (limit.most, limit.rms) == (0, 0)


def test_the_first_samples_of_a_large_batch_stand_for_all(reference, monkeypatch):
    batch = random_batch(reference.bundle.config, 600, np.random.default_rng(0))
    whole = rounding_limit(reference, batch)
    monkeypatch.setattr("dlrm_deploy.parity.bf16_limit.SAMPLES", 150)
    part = rounding_limit(reference, batch)
    first = rounding_limit(reference, batch.rows(0, 150))
    assert part.most == first.most
    # One flip in 600 samples makes less of their mean than one in 150.
    assert part.rms < first.rms or first.rms == 0
    assert part.most == pytest.approx(whole.most, rel=0.3)


def test_stored_tables_of_any_format_leave_the_limit_alone(tmp_path):
    fp32 = make_bundle("dot", tmp_path / "fp32")
    converted = convert_bundle(fp32, tmp_path / "int4", tables="int4", mlp="fp32")
    with open_engine(converted, "torch") as reference:
        limits = Limits(converted, reference, reference)
        batch = converted.golden().batch
        assert limits.default == limits.of(batch).most == precision_limit(CONFIGS["dot"], "fp32")
        assert limits.of(batch).rms is None


def test_without_the_reference_the_limit_is_that_of_the_number_format(tmp_path):
    converted = convert_bundle(make_bundle("dot", tmp_path / "fp32"), tmp_path / "bf16")
    with open_engine(converted, "onnxruntime-stock") as engine:
        assert Limits(converted, engine, None).default == precision_limit(CONFIGS["dot"], "bf16")


@pytest.mark.parametrize(
    ("mlp", "plan", "coarser"), [("bf16", "fp32", "bf16"), ("bf16", "fp16", "bf16"), ("fp32", "fp16", "fp16")]
)
def test_a_plan_gets_the_limit_of_the_coarser_of_its_own_format_and_the_references(mlp, plan, coarser, tmp_path):
    """An fp32 plan of a bundle with bf16 MLPs does not round where the reference does."""
    converted = convert_bundle(make_bundle("dot", tmp_path / "fp32"), tmp_path / "out", tables="int8", mlp=mlp)
    engine = SimpleNamespace(name="tensorrt-rtx", precision=plan)
    with open_engine(converted, "torch") as reference:
        limits = Limits(converted, engine, reference)
    assert limits.default == precision_limit(CONFIGS["dot"], coarser)
