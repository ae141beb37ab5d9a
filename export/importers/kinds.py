"""The projects whose checkpoints are known, by the names that `--from` takes. Light, since `--help` shows them."""

from __future__ import annotations

from typing import Literal, get_args

Kind = Literal["facebook", "torchrec", "nvidia", "dlrm-deploy"]
KINDS: tuple[Kind, ...] = get_args(Kind)
AUTO = "auto"
"""For `--from`: the kind is told from what the checkpoint holds."""

PROJECTS: dict[Kind, str] = {
    "facebook": "facebookresearch/dlrm",
    "torchrec": "TorchRec",
    "nvidia": "NVIDIA DeepLearningExamples",
    "dlrm-deploy": "dlrm-deploy",
}
