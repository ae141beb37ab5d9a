"""Models as facebookresearch/dlrm computes and saves them, restated in a few lines: any size, without its sources."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from dlrm_deploy.batch import Batch

State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class FacebookModel:
    """A state_dict with random weights, and what the project computes from it."""

    tables: Sequence[dict[str, tuple[int, ...]]]
    """Shapes by name: weight, or weight_q and weight_r, or embs.weight and proj.weight; pool for v_W_l."""

    bottom: Sequence[int] = (3, 6, 4)
    top: Sequence[int] = (5, 1)
    interaction: str = "dot"
    operation: str = "mult"
    seed: int = 0
    state: State = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        state: State = {}
        for i, shapes in enumerate(self.tables):
            for name, shape in shapes.items():
                values = torch.randn(shape, generator=generator) / 3
                state[f"v_W_l.{i}" if name == "pool" else f"emb_l.{i}.{name}"] = values
        for mlp, widths in (("bot_l", self.bottom), ("top_l", (self.top_inputs, *self.top))):
            for k, (width, out) in enumerate(pairwise(widths)):
                state[f"{mlp}.{2 * k}.weight"] = torch.randn(out, width, generator=generator) / width**0.5
                state[f"{mlp}.{2 * k}.bias"] = torch.randn(out, generator=generator) / 2
        object.__setattr__(self, "state", state)

    @property
    def top_inputs(self) -> int:
        width, vectors = self.bottom[-1], len(self.tables) + 1
        if self.interaction == "cat":
            return width * vectors
        return width + vectors * (vectors + (1 if self.interaction == "dot-self" else -1)) // 2

    @property
    def rows(self) -> list[int]:
        """Ids of each table."""
        return [
            t["weight_q"][0] * t["weight_r"][0] if "weight_q" in t else (t.get("weight") or t["embs.weight"])[0]
            for t in self.tables
        ]

    def save(self, path: Path, **changes: torch.Tensor | None) -> Path:
        """Write a file as the project does; `changes` replaces tensors, or leaves them out (None): `a_b` is a.b."""
        names = {name.replace(".", "_"): name for name in self.state}
        state = self.state | {names[key]: value for key, value in changes.items() if value is not None}
        for key in (key for key, value in changes.items() if value is None):
            del state[names[key]]
        optimizer = {"state": {}, "param_groups": [{"lr": 0.1, "params": list(range(len(self.state)))}]}
        torch.save({"epoch": 0, "iter": 6, "state_dict": state, "opt_state_dict": optimizer}, path)
        return path

    def forward(self, batch: Batch) -> np.ndarray:
        """Probabilities [B]."""
        samples = batch.batch_size
        x = self._mlp("bot_l", torch.from_numpy(batch.dense))
        vectors = [x]
        for i in range(len(self.tables)):
            offsets = batch.offsets[i * samples : (i + 1) * samples + 1]
            ids = torch.from_numpy(batch.indices[offsets[0] : offsets[-1]])
            vectors.append(self._table(i, ids, torch.from_numpy(offsets - offsets[0])))
        z = torch.cat(vectors, dim=1)
        if self.interaction != "cat":
            stacked = torch.stack(vectors, dim=1)
            products = stacked @ stacked.transpose(1, 2)
            itself = self.interaction == "dot-self"
            pairs = [(i, j) for i in range(len(vectors)) for j in range(i + itself)]
            z = torch.cat([x, torch.stack([products[:, i, j] for i, j in pairs], dim=1)], dim=1)
        return torch.sigmoid(self._mlp("top_l", z, last=True))[:, 0].numpy()

    def _mlp(self, mlp: str, x: torch.Tensor, last: bool = False) -> torch.Tensor:
        layers = sum(name.startswith(mlp) for name in self.state) // 2
        for k in range(layers):
            x = F.linear(x, self.state[f"{mlp}.{2 * k}.weight"], self.state[f"{mlp}.{2 * k}.bias"])
            x = x if last and k == layers - 1 else x.relu()
        return x

    def _table(self, i: int, ids: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        def bag(name: str, rows: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
            table = self.state[f"emb_l.{i}.{name}"]
            return F.embedding_bag(
                rows, table, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True
            )

        if "weight_q" in self.tables[i]:
            collisions = self.tables[i]["weight_r"][0]
            q, r = bag("weight_q", (ids / collisions).long()), bag("weight_r", ids % collisions)
            return {"mult": q * r, "add": q + r, "concat": torch.cat([q, r], dim=1)}[self.operation]
        if "embs.weight" in self.tables[i]:
            pooled = bag("embs.weight", ids)
            return pooled @ self.state[f"emb_l.{i}.proj.weight"].T if "proj.weight" in self.tables[i] else pooled
        pool = self.state.get(f"v_W_l.{i}")
        return bag("weight", ids, None if pool is None else pool[ids])


def plain(*rows: int, width: int = 4) -> list[dict[str, tuple[int, ...]]]:
    """Plain tables of these rows."""
    return [{"weight": (n, width)} for n in rows]


def qr(quotients: int, collisions: int, width: int = 4) -> dict[str, tuple[int, ...]]:
    """A quotient-remainder table."""
    return {"weight_q": (quotients, width), "weight_r": (collisions, width)}
