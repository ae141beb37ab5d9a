"""Names and shapes of a model's tensors, as TorchRec names them. Free of torch: exporter and engines use it too.

The top MLP's input columns follow our order of interaction pairs (docs/operators.md), not TorchRec's.
"""

from __future__ import annotations

from dlrm_deploy.config import ModelConfig

DENSE_VECTORS = "dense_arch.vectors"
"""[D, W]: the vector of each dense feature (interaction fm without a bottom MLP)."""

WIDE_DENSE = "wide_arch.dense.weight"
"""[1, D]: first-order weights of the dense features."""

WIDE_BIAS = "wide_arch.bias"


def table_key(part: str) -> str:
    """Key of the matrix [rows, width] of a table part, by the part's name."""
    return f"sparse_arch.embedding_bag_collection.embedding_bags.{part}.weight"


def projection_key(table: str) -> str:
    """Key of a table's projection [projection, width]."""
    return f"sparse_arch.projections.{table}.weight"


def bottom_keys(config: ModelConfig) -> tuple[tuple[str, str], ...]:
    """Weight and bias key of each layer of the bottom MLP."""
    return _mlp("dense_arch", len(config.bottom_mlp))


def branch_keys(config: ModelConfig) -> tuple[tuple[tuple[str, str], ...], tuple[tuple[str, str], ...]]:
    """Weight and bias key of each layer of the two MLPs of interaction projection."""
    first, second = (f"inter_arch.interaction_branch{i}" for i in (1, 2))
    return _mlp(first, len(config.branch1)), _mlp(second, len(config.branch2))


def cross_keys(config: ModelConfig) -> tuple[tuple[str, ...], ...]:
    """Keys of each cross layer: W, V and bias for interaction dcn, w and bias for dcn-v1."""
    names = ("W_kernels", "V_kernels", "bias") if config.interaction == "dcn" else ("kernels", "bias")
    return tuple(tuple(f"inter_arch.crossnet.{name}.{layer}" for name in names) for layer in range(config.cross_layers))


def top_keys(config: ModelConfig) -> tuple[tuple[str, str], ...]:
    """Weight and bias key of each layer of the top MLP; the last one gives the logit."""
    if not config.top_mlp:
        return ()
    hidden = tuple(_linear(f"over_arch.model.0._mlp.{i}._linear") for i in range(len(config.top_mlp) - 1))
    return (*hidden, _linear("over_arch.model.1"))


def mlp_weight_keys(config: ModelConfig) -> frozenset[str]:
    """Keys of the weights, not the biases, of all MLPs: what an MLP precision other than fp32 rounds."""
    chains = (bottom_keys(config), *branch_keys(config), top_keys(config))
    return frozenset(weight for chain in chains for weight, _ in chain)


def dense_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Key and shape of every tensor but the tables, from bottom to top. Linear weights are [out, in]."""
    shapes: dict[str, tuple[int, ...]] = {}
    dense = len(config.dense_features)

    def mlp(keys: tuple[tuple[str, str], ...], width: int, outs: tuple[int, ...]) -> None:
        for (weight, bias), out in zip(keys, outs, strict=True):
            shapes[weight], shapes[bias] = (out, width), (out,)
            width = out

    mlp(bottom_keys(config), dense, config.bottom_mlp)
    for table in config.tables:
        if table.projection is not None:
            shapes[projection_key(table.name)] = (table.projection, table.width)
    if config.interaction == "fm" and dense and not config.bottom_mlp:
        shapes[DENSE_VECTORS] = (dense, config.vector_widths[0])
    width = config.flat_width
    for keys in cross_keys(config):
        if config.interaction == "dcn":
            shapes[keys[0]], shapes[keys[1]] = (width, config.cross_rank), (config.cross_rank, width)
        else:
            shapes[keys[0]] = (1, width)
        shapes[keys[-1]] = (width,)
    for keys_, outs in zip(branch_keys(config), (config.branch1, config.branch2), strict=True):
        mlp(keys_, width, outs)
    mlp(top_keys(config), config.interaction_width, config.top_mlp)
    if config.wide:
        if dense:
            shapes[WIDE_DENSE] = (1, dense)
        shapes[WIDE_BIAS] = (1,)
    return shapes


def table_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Key and shape [rows, width] of every table part."""
    return {table_key(part.name): (part.rows, part.width) for group in config.groups for part in group.parts}


def _mlp(prefix: str, layers: int) -> tuple[tuple[str, str], ...]:
    return tuple(_linear(f"{prefix}.model._mlp.{i}._linear") for i in range(layers))


def _linear(prefix: str) -> tuple[str, str]:
    return f"{prefix}.weight", f"{prefix}.bias"
