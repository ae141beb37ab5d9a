from __future__ import annotations

from pathlib import Path

import pytest

from dlrm_deploy.bench import settings
from dlrm_deploy.bench.peers.registry import PEER_NAMES
from dlrm_deploy.bench.settings import BenchSettings, all_engines, default_engines
from dlrm_deploy.bench.variant import Variant
from dlrm_deploy.engines.registry import ENGINE_NAMES
from dlrm_deploy.errors import ConfigError

CPU_ENGINES = ("torch", "onnxruntime-stock", "onnxruntime")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"engines": ("openvino",)},
            f"no engine is named 'openvino'. Engines: {', '.join(ENGINE_NAMES)}. Peers: {', '.join(PEER_NAMES)}",
        ),
        ({"engines": ()}, "at least one engine"),
        ({"engines": ("torch", "torch")}, "each engine is measured once.*torch, torch"),
        ({"batch_sizes": ()}, "at least one batch size"),
        ({"batch_sizes": (8, 0)}, "batch size must be at least 1, got 0"),
        ({"batch_sizes": (8, 8)}, "each batch size is measured once"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"threads": 1025}, "threads must be at most 1024, got 1025"),
        ({"rounds": 0}, "rounds must be at least 1, got 0"),
        ({"slice_ms": 0.0}, "a slice must last"),
        ({"slice_ms": float("nan")}, "a slice must last"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"distribution": "normal"}, "distribution must be one of uniform, gaussian, zipf, trace, got 'normal'"),
        (
            {"engines": ("torch",), "baseline": "tensorrt"},
            "baseline 'tensorrt' is not among the engines measured: torch",
        ),
        ({"engines": ("torch",), "only": {"tensorrt": (1,)}}, "only 'tensorrt' is not among the engines measured"),
        ({"distribution": "trace"}, "distribution trace and a trace file go together"),
        ({"trace": Path("t")}, "distribution trace and a trace file go together"),
        ({"variants": (Variant(mlp="bf16"), Variant(mlp="bf16"))}, "each engine is measured once"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        BenchSettings(**options)


def test_the_default_engines_are_the_cpu_engines_whose_packages_are_installed(monkeypatch):
    assert default_engines() == CPU_ENGINES
    monkeypatch.setattr(settings, "missing_package", lambda name: "install it" if name == "torch" else None)
    assert default_engines() == ("onnxruntime-stock", "onnxruntime")


def test_all_engines_are_those_and_the_peers_installed(monkeypatch):
    monkeypatch.setattr(settings, "missing_peer_package", lambda name: None if name == "torch-lean" else "install it")
    assert all_engines() == (*CPU_ENGINES, "torch-lean")


def test_the_command_says_everything_that_is_not_the_default():
    made = BenchSettings(
        engines=("torch", "torch-compile"),
        variants=(Variant(tables="int8", mlp="bf16"), Variant(mlp="bf16")),
        batch_sizes=(8,),
        threads=1,
        distribution="trace",
        trace=Path("my trace"),
        only={"torch-compile": (8, 9)},
        prefault=True,
        isolate=True,
    )
    assert made.command(["b"], "torch") == (
        "dlrm-deploy bench b --engine torch,torch-compile --variant tables=int8,mlp=bf16 "
        "--variant tables=fp32,mlp=bf16 --batch 8 --threads 1 --distribution trace --trace 'my trace' --rounds 7 "
        "--slice-ms 60 --seed 0 --baseline torch --only torch-compile=8,9 --prefault --isolate"
    )
