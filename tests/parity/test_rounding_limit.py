"""The limit for bfloat16 and int8 MLPs: right engines are within it, ones that round in another way are outside."""

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
from dlrm_deploy.model.keys import branch_keys, top_keys
from dlrm_deploy.model.layers import ROUNDINGS, to_bf16
from dlrm_deploy.ops.torch_int8 import quantize_samples
from dlrm_deploy.parity.limits import Limits, precision_limit
from dlrm_deploy.parity.rounding_limit import rounding_deviations, rounding_limit

MODELS = ("dot", "concat", "parts_weighted", "branches", "ids_only", "factorization", "cross")


def converted(name, mlp, folder):
    return convert_bundle(make_bundle(name, folder / "fp32"), folder / mlp, tables="fp32", mlp=mlp)


@pytest.fixture(params=["bf16", "int8"])
def mlp(request):
    return request.param


@pytest.fixture(params=MODELS)
def reference(request, mlp, tmp_path):
    with TorchEngine(converted(request.param, mlp, tmp_path), threads=1) as engine:
        yield engine


def rms(values):
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))


def score_with(engine, batch, layer):
    was, engine.model.layer = engine.model.layer, layer
    try:
        return engine.predict(batch)
    finally:
        engine.model.layer = was


@pytest.mark.parametrize("name", MODELS)
def test_an_engine_that_adds_in_another_order_is_within_both_limits(name, tmp_path):
    with TorchEngine(converted(name, "bf16", tmp_path), threads=1) as reference:
        batch = random_batch(reference.bundle.config, 1024, np.random.default_rng(0))

        def reversed_order(x, weight, bias):
            return F.linear(to_bf16(x).flip(1), weight.flip(1), bias)

        difference = score_with(reference, batch, reversed_order) - reference.predict(batch)
        limit = Limits(reference.bundle, reference, reference).of(batch)
    assert np.abs(difference).max() <= limit.most
    assert rms(difference) <= limit.rms


@pytest.mark.parametrize("name", MODELS)
def test_an_engine_whose_values_between_int8_mlps_are_rounded_in_another_way_is_within_both_limits(name, tmp_path):
    with TorchEngine(converted(name, "int8", tmp_path), threads=1) as reference:
        batch = random_batch(reference.bundle.config, 1024, np.random.default_rng(0))
        layer = reference.model.layer
        sums = {keys[0][0] for keys in (top_keys(reference.model.config), *branch_keys(reference.model.config)) if keys}
        moved = [reference.model.weight(key) for key in sums]

        def other_sums(x, weight, bias):
            if any(weight is one for one in moved):  # every value the next float32 number, up or down
                x = torch.nextafter(x, torch.where(torch.arange(x.shape[1]) % 2 == 0, torch.inf, -torch.inf))
            return layer(x, weight, bias)

        difference = score_with(reference, batch, other_sums) - reference.predict(batch)
        limit = Limits(reference.bundle, reference, reference).of(batch)
    assert np.abs(difference).max() <= limit.most
    assert rms(difference) <= limit.rms


def towards_zero(x):
    return (x.view(torch.int32) & -65536).view(torch.float32)


def to_int8_towards_zero(x):
    _, step = quantize_samples(x)
    return (x / step).trunc() * step


@pytest.mark.parametrize(
    ("mlp", "rounded"),
    [
        ("bf16", lambda x: x),  # not at all
        ("bf16", towards_zero),
        ("int8", lambda x: x),
        ("int8", to_int8_towards_zero),
        ("int8", to_bf16),
    ],
)
def test_an_engine_that_rounds_in_another_way_is_outside_on_average(mlp, rounded, tmp_path):
    with TorchEngine(converted("dot", mlp, tmp_path), threads=1) as reference:
        batch = random_batch(reference.bundle.config, 1024, np.random.default_rng(0))
        wrong = score_with(reference, batch, lambda x, weight, bias: F.linear(rounded(x), weight, bias))
        limit = Limits(reference.bundle, reference, reference).of(batch)
        assert rms(wrong - reference.predict(batch)) > 1.5 * limit.rms


def test_deviations_are_those_of_independent_roundings(mlp, tmp_path):
    """Rounding up or down at random, twice, is what the formula describes."""
    with TorchEngine(converted("dot", mlp, tmp_path), threads=1) as engine:
        batch = random_batch(engine.bundle.config, 512, np.random.default_rng(0))
        generator = torch.Generator().manual_seed(0)
        dense = torch.from_numpy(batch.dense)

        def dithered(x, weight, bias):
            if x.data_ptr() == dense.data_ptr():  # the same bits in every engine
                return engine_layer(x, weight, bias)
            if mlp == "bf16":
                spacing = torch.ldexp(torch.ones_like(x), torch.frexp(x).exponent - 8)
            else:
                spacing = x.abs().amax(1, keepdim=True) / 127
            shift = (torch.rand(x.shape, generator=generator) - 0.5) * spacing
            return F.linear(torch.where(x == 0, 0, x + shift), weight, bias)

        engine_layer = engine.model.layer
        found = [score_with(engine, batch, dithered).astype(np.float64) for _ in range(40)]
        seen = np.sqrt(np.mean([(found[i] - found[i + 1]) ** 2 for i in range(0, 40, 2)], axis=0))
        sigma = rounding_deviations(engine.model, batch, ROUNDINGS[mlp])
    assert np.median(seen / sigma) == pytest.approx(1, abs=0.15)


def test_an_empty_batch_has_no_rounding(reference):
    limit = rounding_limit(reference, random_batch(reference.bundle.config, 0, np.random.default_rng(0)))
    assert (limit.most, limit.rms) == (0, 0)


def test_the_first_samples_of_a_large_batch_stand_for_all(reference, monkeypatch):
    batch = random_batch(reference.bundle.config, 600, np.random.default_rng(0))
    whole = rounding_limit(reference, batch)
    monkeypatch.setattr("dlrm_deploy.parity.rounding_limit.SAMPLES", 150)
    part = rounding_limit(reference, batch)
    first = rounding_limit(reference, batch.rows(0, 150))
    assert part.most == first.most
    # One flip in 600 samples makes less of their mean than one in 150.
    assert part.rms < first.rms or first.rms == 0
    assert part.most == pytest.approx(whole.most, rel=0.5)


def test_stored_tables_of_any_format_leave_the_limit_alone(tmp_path):
    fp32 = make_bundle("dot", tmp_path / "fp32")
    bundle = convert_bundle(fp32, tmp_path / "int4", tables="int4", mlp="fp32")
    with open_engine(bundle, "torch") as reference:
        limits = Limits(bundle, reference, reference)
        batch = bundle.golden().batch
        assert limits.default == limits.of(batch).most == precision_limit(CONFIGS["dot"], "fp32")
        assert limits.of(batch).rms is None


def test_without_the_reference_the_limit_is_that_of_the_number_format(mlp, tmp_path):
    bundle = converted("dot", mlp, tmp_path)
    with open_engine(bundle, "onnxruntime-stock") as engine:
        assert Limits(bundle, engine, None).default == precision_limit(CONFIGS["dot"], mlp)


@pytest.mark.parametrize(
    ("mlp", "plan", "coarser"),
    [
        ("bf16", "fp32", "bf16"),
        ("bf16", "fp16", "bf16"),
        ("fp32", "fp16", "fp16"),
        ("int8", "int8", "int8"),
        ("int8", "bf16", "int8"),
        ("fp32", "int8", "int8"),
    ],
)
def test_a_plan_gets_the_limit_of_the_coarser_of_its_own_format_and_the_references(mlp, plan, coarser, tmp_path):
    """An fp32 plan of a bundle with bf16 MLPs does not round where the reference does."""
    bundle = convert_bundle(make_bundle("dot", tmp_path / "fp32"), tmp_path / "out", tables="int8", mlp=mlp)
    engine = SimpleNamespace(name="tensorrt-rtx", precision=plan)
    with open_engine(bundle, "torch") as reference:
        limits = Limits(bundle, engine, reference)
    assert limits.default == precision_limit(CONFIGS["dot"], coarser)
