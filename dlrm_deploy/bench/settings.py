"""What a benchmark measures, and the command line that repeats it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dlrm_deploy.bench.machine import available_cores
from dlrm_deploy.bench.peers.registry import PEER_NAMES, missing_peer_package
from dlrm_deploy.bench.variant import Variant
from dlrm_deploy.data.random import BATCH_DISTRIBUTIONS, BatchDistribution
from dlrm_deploy.engines.registry import ENGINE_NAMES, MOST_THREADS, missing_package
from dlrm_deploy.errors import ConfigError


def default_engines() -> tuple[str, ...]:
    """The CPU engines whose packages are installed, PyTorch first."""
    return tuple(n for n in ("torch", "onnxruntime-stock", "onnxruntime") if missing_package(n) is None)


def all_engines() -> tuple[str, ...]:
    """`default_engines` and every peer whose package is installed."""
    return (*default_engines(), *(name for name in PEER_NAMES if missing_peer_package(name) is None))


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchSettings:
    """What to measure.

    Raises:
        ConfigError: unknown or repeated engines, a batch size, thread count, number of rounds or slice that is not
            positive, too many threads, an unknown distribution, a trace without distribution "trace" or the reverse,
            or a baseline or limited engine that is not among those measured.
    """

    engines: tuple[str, ...] = field(default_factory=default_engines)
    """Names of engines and peers."""

    variants: tuple[Variant, ...] = ()
    """Measured with engine onnxruntime on the converted bundle."""

    batch_sizes: tuple[int, ...] = (1, 128, 2048)
    threads: int = field(default_factory=lambda: min(available_cores(), MOST_THREADS))
    distribution: BatchDistribution = "uniform"
    trace: Path | None = None
    """File of `dlrm_deploy.data.trace`, for distribution "trace"."""

    rounds: int = 7
    slice_ms: float = 60.0
    seed: int = 0
    baseline: str | None = None
    """Ratios are taken to this engine; None for the first one that runs."""

    only: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Batch sizes of engines that are not measured at all of them."""

    prefault: bool = False
    huge_pages: bool = False
    """Of ONNX Runtime's engines, as `dlrm_deploy.load` takes them."""

    isolate: bool = False
    """Give each engine a process of its own."""

    breakdown: bool = False
    """Profile ONNX Runtime's engines by operator."""

    def __post_init__(self) -> None:
        for name in self.engines:
            if name not in (*ENGINE_NAMES, *PEER_NAMES):
                raise ConfigError(
                    f"no engine is named {name!r}. Engines: {', '.join(ENGINE_NAMES)}. Peers: {', '.join(PEER_NAMES)}."
                )
        for kind, values in (("engine", self.labels), ("batch size", self.batch_sizes)):
            if not values:
                raise ConfigError(f"give at least one {kind} to measure.")
            if len(set(values)) < len(values):
                raise ConfigError(f"each {kind} is measured once, but one is repeated: {', '.join(map(str, values))}.")
        for kind, least in (("batch size", min(self.batch_sizes)), ("threads", self.threads), ("rounds", self.rounds)):
            if least < 1:
                raise ConfigError(f"{kind} must be at least 1, got {least}.")
        if self.threads > MOST_THREADS:
            raise ConfigError(f"threads must be at most {MOST_THREADS}, got {self.threads}.")
        if not 0 < self.slice_ms <= 60_000:
            raise ConfigError(f"a slice must last between 0 and 60000 ms, got {self.slice_ms}.")
        if self.seed < 0:
            raise ConfigError(f"seed must be at least 0, got {self.seed}.")
        if self.distribution not in BATCH_DISTRIBUTIONS:
            known = ", ".join(BATCH_DISTRIBUTIONS)
            raise ConfigError(f"distribution must be one of {known}, got {self.distribution!r}.")
        if (self.distribution == "trace") != (self.trace is not None):
            raise ConfigError("distribution trace and a trace file go together: give both or neither.")
        for what, named in (("baseline", [self.baseline or self.labels[0]]), ("only", list(self.only))):
            for name in named:
                if name not in self.labels:
                    raise ConfigError(f"{what} {name!r} is not among the engines measured: {', '.join(self.labels)}.")

    @property
    def labels(self) -> tuple[str, ...]:
        """What the rows are called: engines, then variants. An engine on a converted bundle gets brackets too."""
        return (*self.engines, *(variant.label for variant in self.variants))

    def measures(self, label: str, batch_size: int) -> bool:
        """Whether an engine is measured at a batch size."""
        return batch_size in self.only.get(label, self.batch_sizes)

    def command(self, target: Sequence[str], baseline: str) -> str:
        """The command line that repeats this run; `target` is the bundle or the preset's options."""
        options: list[tuple[str, object]] = [("--engine", ",".join(self.engines))]
        options += [("--variant", variant) for variant in self.variants]
        options += [
            ("--batch", ",".join(map(str, self.batch_sizes))),
            ("--threads", self.threads),
            ("--distribution", self.distribution),
        ]
        if self.trace is not None:
            options.append(("--trace", self.trace))
        options += [
            ("--rounds", self.rounds),
            ("--slice-ms", f"{self.slice_ms:g}"),
            ("--seed", self.seed),
            ("--baseline", baseline),
        ]
        options += [("--only", f"{name}={','.join(map(str, sizes))}") for name, sizes in self.only.items()]
        words = [str(word) for pair in options for word in pair]
        flags = {
            "--prefault": self.prefault,
            "--huge-pages": self.huge_pages,
            "--isolate": self.isolate,
            "--breakdown": self.breakdown,
        }
        return shlex.join(["dlrm-deploy", "bench", *target, *words, *(flag for flag, given in flags.items() if given)])
