"""Small bundles for tests, made by the real exporter from seeded random weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dlrm_deploy.bundle import Bundle
from dlrm_deploy.config import FeatureConfig, ModelConfig
from dlrm_deploy.export.bundle import export_bundle
from dlrm_deploy.export.convert import convert_bundle
from dlrm_deploy.export.sources import RandomSource
from dlrm_deploy.presets import preset
from dlrm_deploy.tables import TableConfig


def _model(name: str, widths: dict[str, int], **options: object) -> ModelConfig:
    tables = tuple(
        TableConfig(name=f"t_{key}", rows=11 + 7 * i, width=width) for i, (key, width) in enumerate(widths.items())
    )
    features = tuple(FeatureConfig(name=key, table=f"t_{key}", max_ids=5) for key in widths)
    values = {"dense_features": ("d0", "d1", "d2"), "bottom_mlp": (16, 8), "top_mlp": (16, 8, 1)}
    return ModelConfig(name=name, tables=tables, features=features, **{**values, **options})


def _mean(config: ModelConfig) -> ModelConfig:
    features = tuple(replace(f, pooling="mean" if i % 2 else "sum") for i, f in enumerate(config.features))
    return replace(config, features=features)


def _parts() -> tuple[TableConfig, ...]:
    """One table of each kind, of width 8."""

    def table(
        name: str, rows: int, *part_rows: int, partition: str = "quotient-remainder", **kind: object
    ) -> TableConfig:
        return TableConfig(name=name, rows=rows, width=8, partition=partition, part_rows=part_rows, **kind)

    return (
        TableConfig(name="plain", rows=11, width=8),
        table("product", 50, 13, 4),
        table("other_product", 60, 20, 3),
        table("sum", 40, 5, 2, 4, combine="add"),
        table("float", 30, 8, 4, combine="concat", division="float32"),
        table("chinese", 100, 3, 5, 7, partition="chinese-remainder"),
        table("hashed", 90, 13, partition="hash"),
        table("path", 20, 5, 4, combine="path", path_hidden=3),
        TableConfig(name="narrow", rows=17, width=3, projection=8),
    )


def _of_parts(name: str, **options: object) -> ModelConfig:
    tables = _parts()
    features = tuple(
        FeatureConfig(name=f"f_{table.name}", table=table.name, max_ids=4, modulo=13 if i == 2 else None)
        for i, table in enumerate(tables)
    )
    values = {"dense_features": ("d0", "d1", "d2"), "bottom_mlp": (16, 8), "top_mlp": (16, 8, 1)}
    return ModelConfig(name=name, **{**values, "tables": tables, "features": features, **options})


_WIDTH_8 = {"a": 8, "b": 8, "c": 8}
_SEVERAL_WIDTHS = {"a": 8, "b": 4, "c": 8, "d": 12, "e": 4}

CONFIGS: dict[str, ModelConfig] = {
    "dot": _mean(_model("dot", _WIDTH_8)),
    "self": _model("self", _WIDTH_8, self_interaction=True),
    "concat": _mean(_model("concat", _SEVERAL_WIDTHS, interaction="concat")),
    "dcn": _model("dcn", _SEVERAL_WIDTHS, interaction="dcn", cross_layers=2, cross_rank=6),
    "weighted": _model("weighted", _WIDTH_8, weighted=True),
    "one_hot": preset("kaggle", 1e-5),
    "fixed": replace(
        _model("fixed", _SEVERAL_WIDTHS, interaction="concat"),
        features=tuple(
            FeatureConfig(name=key, table=f"t_{key}", pooling_factor=1 + i % 3, pooling="mean" if i % 2 else "sum")
            for i, key in enumerate(_SEVERAL_WIDTHS)
        ),
    ),
    "shared": replace(
        _model("shared", {"a": 8, "b": 8}),
        features=tuple(
            FeatureConfig(name=name, table=table, max_ids=4)
            for name, table in (("x", "t_b"), ("y", "t_a"), ("z", "t_b"))
        ),
    ),
    "parts": _mean(_of_parts("parts")),
    "parts_weighted": _of_parts("parts_weighted", weighted=True, index_policy="zero", dense_transform="log3"),
    "parts_fixed": replace(
        _of_parts("parts_fixed", interaction="concat", wide=True),
        features=tuple(
            FeatureConfig(name=f"f_{table.name}", table=table.name, pooling_factor=1 + i % 3)
            for i, table in enumerate(_parts())
        ),
    ),
    "cross": _model("cross", _SEVERAL_WIDTHS, interaction="dcn-v1", cross_layers=2, dense_transform="log1p"),
    "branches": _model("branches", _WIDTH_8, interaction="projection", branch1=(12, 16), branch2=(24,)),
    "factorization": _mean(_model("fm", _WIDTH_8, interaction="fm", wide=True, bottom_mlp=(), top_mlp=())),
    "ids_only": _model("ids_only", _WIDTH_8, dense_features=(), bottom_mlp=(), wide=True),
}
"""One model for every form of the operators, every kind of table and every interaction."""


def make_bundle(name: str, out: Path, **options: object) -> Bundle:
    return export_bundle(RandomSource(CONFIGS[name], seed=3), out, **options)


CONVERSIONS: dict[str, dict[str, str]] = {
    "fp16": {"tables": "fp16", "mlp": "fp32"},
    "bf16": {"tables": "bf16", "mlp": "bf16"},
    "int8": {"tables": "int8", "mlp": "fp32"},
    "int4": {"tables": "int4", "mlp": "bf16"},
    "int8_mlp": {"tables": "int8", "mlp": "int8"},
}
"""Number formats of `make_converted`, by a short name."""


def make_converted(name: str, conversion: str, folder: Path) -> Bundle:
    """The bundle `make_bundle(name)` in other number formats, in `folder`."""
    return convert_bundle(make_bundle(name, folder / "fp32"), folder / conversion, **CONVERSIONS[conversion])
