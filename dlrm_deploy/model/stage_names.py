"""Names of the graph's tensors that hold what a stage of the model gives. Free of torch and onnx.

`dlrm_deploy.export` writes graphs with these names, and `dlrm_deploy.parity.bisect` finds the stages by them.
"""

from __future__ import annotations

from dlrm_deploy.model.vectors import Run

DENSE_LOG = "dense_log"
"""Dense values [B, D] after a transform by logarithm."""

INTERACTIONS = "interactions"
"""What the top MLP reads [B, interaction_width]."""

LOGITS = "logits"
"""[B, 1]."""

PROBABILITIES = "probabilities"
"""[B], the graph's output."""


def pooled_name(group: str) -> str:
    """Tensor that holds the pooled bags [B, T, W] of a table group."""
    return f"pooled_{group}"


def path_name(feature: str) -> str:
    """Tensor that holds the pooled vector [B, 1, W] of a feature of a path table."""
    return f"path_{feature}"


def run_name(run: Run) -> str:
    """Tensor that holds the vectors [B, count, W] of a run, where making them took any work."""
    return f"vectors_{run.first}"


def mlp_name(mlp: str, layer: int) -> str:
    """Tensor that holds what a layer gives, after its ReLU; `mlp` is bottom, top, branch1 or branch2."""
    return f"{mlp}_{layer}"


def cross_name(layer: int) -> str:
    """Tensor that holds what a cross layer gives; the last one's is `INTERACTIONS`."""
    return f"cross_{layer}"
