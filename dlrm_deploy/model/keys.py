"""Names and shapes of a model's tensors, as TorchRec names them. Free of torch: exporter and engines use it too.

The top MLP's input columns follow our order of interaction pairs (docs/operators.md), not TorchRec's.
"""

from __future__ import annotations

from dlrm_deploy.config import ModelConfig


def table_key(table: str) -> str:
    """Key of an embedding table [rows, width]."""
    return f"sparse_arch.embedding_bag_collection.embedding_bags.{table}.weight"


def bottom_keys(config: ModelConfig) -> tuple[tuple[str, str], ...]:
    """Weight and bias key of each layer of the bottom MLP."""
    return tuple(_linear(f"dense_arch.model._mlp.{i}._linear") for i in range(len(config.bottom_mlp)))


def cross_keys(config: ModelConfig) -> tuple[tuple[str, str, str], ...]:
    """Keys of W, V and bias of each cross layer (interaction dcn)."""
    prefix = "inter_arch.crossnet"
    return tuple(
        (f"{prefix}.W_kernels.{i}", f"{prefix}.V_kernels.{i}", f"{prefix}.bias.{i}") for i in range(config.cross_layers)
    )


def top_keys(config: ModelConfig) -> tuple[tuple[str, str], ...]:
    """Weight and bias key of each layer of the top MLP; the last one gives the logit."""
    hidden = tuple(_linear(f"over_arch.model.0._mlp.{i}._linear") for i in range(len(config.top_mlp) - 1))
    return (*hidden, _linear("over_arch.model.1"))


def dense_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Key and shape of every tensor but the tables, from bottom to top. Linear weights are [out, in]."""
    shapes: dict[str, tuple[int, ...]] = {}
    width = len(config.dense_features)
    for (weight, bias), out in zip(bottom_keys(config), config.bottom_mlp, strict=True):
        shapes[weight], shapes[bias] = (out, width), (out,)
        width = out
    width = config.interaction_width
    for w, v, bias in cross_keys(config):
        shapes[w], shapes[v], shapes[bias] = (width, config.cross_rank), (config.cross_rank, width), (width,)
    for (weight, bias), out in zip(top_keys(config), config.top_mlp, strict=True):
        shapes[weight], shapes[bias] = (out, width), (out,)
        width = out
    return shapes


def table_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Key and shape [rows, width] of every table."""
    return {table_key(table.name): (table.rows, table.width) for table in config.tables}


def _linear(prefix: str) -> tuple[str, str]:
    return f"{prefix}.weight", f"{prefix}.bias"
