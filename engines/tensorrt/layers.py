"""Reads what a build says about its plan: the layers of the verbose log, and memory sizes.

An engine inspector says the same, but only where there is a GPU.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

_LAYER = re.compile(
    r"^Name: (?P<name>.*?), LayerType: (?P<type>\w+), Inputs: \[(?P<inputs>.*?)\], Constants: ", re.MULTILINE
)
_TENSOR = re.compile(r"\{ Name: (.*?), Dimensions: ")
_MEMORY = {
    "scratch_bytes": re.compile(r"^Max Scratch Memory: (\d+) bytes"),
    "weights_bytes": re.compile(r"^Total Weights Memory: (\d+) bytes"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanLayer:
    """One kernel launch, or shape computation, of a plan."""

    name: str
    type: str
    reads: tuple[str, ...]
    """Inputs of the plan that it reads: a table that is an input should be read by one layer."""


def read_layers(messages: Iterable[str], inputs: Collection[str]) -> tuple[PlanLayer, ...]:
    """The layers listed by the last `Layers:` block of a build log; none where there is no such block.

    Args:
        messages: the log.
        inputs: names of the plan's inputs.
    """
    layers: tuple[PlanLayer, ...] = ()
    for message in messages:
        if message.startswith("Layers:"):
            layers = tuple(
                PlanLayer(
                    name=layer["name"],
                    type=layer["type"],
                    reads=tuple(name for name in _TENSOR.findall(layer["inputs"]) if name in inputs),
                )
                for layer in _LAYER.finditer(message)
            )
    return layers


def read_memory(messages: Iterable[str]) -> dict[str, int]:
    """Device memory of an execution context and of the plan's weights, in bytes, where the build log states them."""
    memory = {}
    for message in messages:
        for key, pattern in _MEMORY.items():
            if match := pattern.match(message):
                memory[key] = int(match[1])
    return memory
