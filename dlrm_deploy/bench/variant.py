"""Variant: the model of the bundle converted to other number formats, to be measured beside the fp32 bundle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dlrm_deploy.errors import ConfigError

TABLES = ("fp32", "fp16", "bf16", "int8", "int4", "auto")
MLPS = ("fp32", "bf16", "int8")

ENGINE = "onnxruntime"
"""The engine that variants are measured with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """Row format of the tables and number format of the MLPs, as `dlrm-deploy export --tables --mlp` takes them."""

    tables: Any = "fp32"
    mlp: Any = "fp32"

    def __post_init__(self) -> None:
        for name, value, choices in (("tables", self.tables, TABLES), ("mlp", self.mlp, MLPS)):
            if value not in choices:
                raise ConfigError(f"variant: {name} must be one of {', '.join(choices)}, got {value!r}.")
        if (self.tables, self.mlp) == ("fp32", "fp32"):
            raise ConfigError("variant: tables and mlp are both fp32, which is the bundle itself. Change one of them.")

    @classmethod
    def parse(cls, text: str) -> Variant:
        """Read `tables=int8,mlp=bf16`; what is left out stays fp32.

        Raises:
            ConfigError: anything else.
        """
        given: dict[str, str] = {}
        for word in text.split(","):
            key, equals, value = word.strip().partition("=")
            if key not in ("tables", "mlp") or not equals or key in given:
                raise ConfigError(f"variant {text!r} is not of the form tables=int8,mlp=bf16.")
            given[key] = value
        return cls(**given)

    def __str__(self) -> str:
        return f"tables={self.tables},mlp={self.mlp}"

    @property
    def label(self) -> str:
        """What its rows are called."""
        return label_of(ENGINE, self.tables, self.mlp)


def label_of(engine: str, tables: str, mlp: str) -> str:
    """What rows of an engine on a bundle are called: its name, and number formats unless both are fp32."""
    return engine if (tables, mlp) == ("fp32", "fp32") else f"{engine}[{tables},{mlp}]"
