"""Make tests/golden/torchrec: checkpoints of TorchRec's own models, whole and sharded, and what they computed.

    python tests/golden/make/from_torchrec.py [VARIANT ...]

Needs torch 2.13, torchrec 1.8 and fbgemm-gpu-cpu 1.8. Processes talk over gloo, tables live on the CPU.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import inputs
import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor, PoolingType
from torchrec.models.dlrm import DLRM, DLRM_DCN, DLRM_Projection, DLRMTrain

GOLDEN = Path(__file__).resolve().parents[1] / "torchrec"
DENSE_WIDTH = 5
STEPS = 6
DULL = 3  # exit status of a variant whose outputs hardly differ: another seed is tried


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One model and how it is saved. `sharding` gives one word per table; without it the model is not sharded."""

    rows: tuple[int, ...] = (30, 7, 100)
    width: int = 4
    kind: str = "dot"
    dense_arch: tuple[int, ...] = (8, 4)
    over_arch: tuple[int, ...] = (8, 4, 1)
    shared: bool = False
    mean: bool = False
    train: bool = False
    save: str = "pt"
    processes: int = 1
    sharding: tuple[str, ...] = ()
    dtensor: bool = False
    optimizer: bool = False


RW2, TW3 = ("row_wise",) * 3, ("table_wise 2", "table_wise 0", "table_wise 1")
VARIANTS = {
    "dot": Variant(),
    "dot-train": Variant(train=True),
    "one-layer": Variant(dense_arch=(4,), over_arch=(6, 1)),
    "deep": Variant(dense_arch=(9, 8, 7, 4), over_arch=(9, 8, 7, 6, 1)),
    "thirteen-tables": Variant(rows=tuple(range(3, 16))),
    "single-table": Variant(rows=(20,)),
    "shared-table": Variant(shared=True),
    "mean": Variant(mean=True),
    "width-3": Variant(width=3, dense_arch=(8, 3)),
    "dcn": Variant(kind="dcn"),
    "dcn-train": Variant(kind="dcn", train=True, rows=(30, 7)),
    "projection": Variant(kind="projection"),
    "projection-train": Variant(kind="projection", train=True, rows=(30, 7)),
    "dcp-plain": Variant(save="dcp"),
    "dcp-nested": Variant(save="dcp-nested", train=True),
    "sharded-1": Variant(save="dcp", sharding=("table_wise 0",) * 3, optimizer=True),
    "row-wise-2": Variant(save="dcp", processes=2, sharding=RW2, train=True),
    "row-wise-2-optimizer": Variant(save="dcp-nested", processes=2, sharding=RW2, train=True, optimizer=True),
    "row-wise-2-dtensor": Variant(save="dcp", processes=2, sharding=RW2, dtensor=True),
    "column-wise-2": Variant(
        save="dcp", processes=2, sharding=("column_wise",) * 3, width=8, dense_arch=(8, 8), optimizer=True
    ),
    "table-wise-3": Variant(save="dcp", processes=3, sharding=TW3),
    "table-wise-3-dcn": Variant(save="dcp", processes=3, sharding=TW3, kind="dcn", train=True),
    "mixed-2": Variant(
        save="dcp",
        processes=2,
        rows=(30, 7, 100, 12),
        sharding=("row_wise", "data_parallel", "column_wise", "table_wise 1"),
        width=8,
        dense_arch=(8, 8),
    ),
    "thirteen-tables-2": Variant(
        save="dcp",
        processes=2,
        rows=tuple(range(3, 16)),
        sharding=tuple(f"table_wise {i % 2}" if i % 3 else "row_wise" for i in range(13)),
    ),
    "shared-table-2": Variant(save="dcp", processes=2, shared=True, sharding=("row_wise", "table_wise 1")),
    "rank-files": Variant(save="rank-files", processes=2, sharding=RW2),
}


def build(variant: Variant) -> nn.Module:
    """The model, on the CPU, not sharded, tables t_cat_0, t_cat_1, ... of features cat_0, cat_1, ..."""
    owners = [0, *range(len(variant.rows) - 1)] if variant.shared else list(range(len(variant.rows)))
    tables = [
        EmbeddingBagConfig(
            name=f"t_cat_{t}",
            embedding_dim=variant.width,
            num_embeddings=feature_rows(variant)[owners.index(t)],
            feature_names=[f"cat_{f}" for f, owner in enumerate(owners) if owner == t],
            pooling=PoolingType.MEAN if variant.mean else PoolingType.SUM,
        )
        for t in sorted(set(owners))
    ]
    collection = EmbeddingBagCollection(tables=tables, device=torch.device("cpu"))
    sizes = collection, DENSE_WIDTH, list(variant.dense_arch), list(variant.over_arch)
    if variant.kind == "dcn":
        model: DLRM = DLRM_DCN(*sizes, dcn_num_layers=2, dcn_low_rank_dim=3)
    elif variant.kind == "projection":
        model = DLRM_Projection(
            *sizes,
            interaction_branch1_layer_sizes=[7, 2 * variant.width],
            interaction_branch2_layer_sizes=[3 * variant.width],
        )
    else:
        model = DLRM(*sizes)
    return DLRMTrain(model) if variant.train else model


def feature_rows(variant: Variant) -> tuple[int, ...]:
    """Ids of each feature; with a shared table the first two features have the same."""
    return (variant.rows[0], *variant.rows[:-1]) if variant.shared else variant.rows


def shard(model: nn.Module, variant: Variant) -> nn.Module:
    """The model in DistributedModelParallel, with the optimizer of the tables inside."""
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from torchrec.distributed import DistributedModelParallel
    from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
    from torchrec.distributed.sharding_plan import (
        column_wise,
        construct_module_sharding_plan,
        data_parallel,
        row_wise,
        table_wise,
    )
    from torchrec.distributed.types import ShardingEnv, ShardingPlan

    (path, collection), *_ = [(n, m) for n, m in model.named_modules() if isinstance(m, EmbeddingBagCollection)]
    generators = {}
    for config, word in zip(collection.embedding_bag_configs(), variant.sharding, strict=True):
        kind, *rank = word.split()
        generators[config.name] = {
            "row_wise": lambda rank: row_wise(compute_kernel="fused"),
            "column_wise": lambda rank: column_wise(ranks=list(range(variant.processes)), compute_kernel="fused"),
            "data_parallel": lambda rank: data_parallel(),
            "table_wise": lambda rank: table_wise(rank=int(rank[0]), compute_kernel="fused"),
        }[kind](rank)
    sharder = EmbeddingBagCollectionSharder(
        fused_params={
            "optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
            "learning_rate": 0.1,
        }
    )
    plan = construct_module_sharding_plan(
        collection,
        generators,
        sharder=sharder,
        local_size=variant.processes,
        world_size=variant.processes,
        device_type="cpu",
    )
    return DistributedModelParallel(
        model,
        env=ShardingEnv(dist.get_world_size(), dist.get_rank(), dist.group.WORLD, output_dtensor=variant.dtensor),
        device=torch.device("cpu"),
        plan=ShardingPlan({path: plan}),
        sharders=[sharder],
    )


def logits(model: nn.Module, batch: dict[str, object], features: int) -> torch.Tensor:
    inner = model.module if hasattr(model, "module") else model
    inner = inner.model if isinstance(inner, DLRMTrain) else inner
    keyed = KeyedJaggedTensor.from_offsets_sync(
        keys=[f"cat_{f}" for f in range(features)],
        values=torch.from_numpy(batch["indices"]),
        offsets=torch.from_numpy(batch["offsets"]),
    )
    return inner(torch.from_numpy(batch["dense"]), keyed).squeeze(-1)


def make(name: str) -> None:
    """Build, train a few steps, save and score; every process of the variant runs this."""
    variant = VARIANTS[name]
    rank, rows = int(os.environ.get("RANK", 0)), feature_rows(variant)
    torch.set_num_threads(1)
    torch.manual_seed(int(os.environ["SEED"]))
    dist.init_process_group("gloo")
    model = build(variant)
    if variant.sharding:
        model = shard(model, variant)
    fused = model.fused_optimizer if variant.sharding else None
    own = [p for n, p in model.named_parameters() if not (fused and n in fused.params)]
    optimizer = torch.optim.Adagrad(own, lr=0.05)
    for step in range(STEPS):
        batch = inputs.multi_hot(rows, DENSE_WIDTH, seed=1000 + step)
        labels = (torch.arange(inputs.SAMPLES) * 7 % 3 == 0).float()
        optimizer.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(logits(model, batch, len(rows)), labels).backward()
        optimizer.step()
    model.eval()
    state = model.state_dict()
    if variant.save == "pt":
        torch.save(state, GOLDEN / f"{name}.pt")
    elif variant.save == "rank-files":
        torch.save(state, GOLDEN / f"{name}{rank}.pt")
    else:
        content = {"model": state} if variant.save == "dcp-nested" else dict(state)
        if variant.optimizer and fused:
            content["optimizer"] = fused.state_dict()
        shutil.rmtree(GOLDEN / f"{name}.dcp", ignore_errors=True) if rank == 0 else None
        dist.barrier()
        dcp.save(content, checkpoint_id=GOLDEN / f"{name}.dcp")
    batch = inputs.multi_hot(rows, DENSE_WIDTH, seed=len(name))
    with torch.no_grad():
        expected = logits(model, batch, len(rows)).numpy()
    if np.ptp(expected) < (0.1 if variant.mean else 0.5):
        sys.exit(DULL)
    if rank == 0:
        inputs.save(GOLDEN / f"{name}.npz", batch, expected, "logit", rows, [repr(variant)])
    dist.destroy_process_group()


def main() -> None:
    GOLDEN.mkdir(exist_ok=True)
    for name in sys.argv[1:] or VARIANTS:
        for seed in range(20):
            statuses = run(name, seed)
            if DULL not in statuses:
                break
        if any(statuses):
            print(f"FAILED {name}")


def run(name: str, seed: int) -> list[int]:
    """Exit statuses of the processes of one variant."""
    size = VARIANTS[name].processes
    group = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29513"}
    command = [sys.executable, __file__, "--one", name]
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank), "SEED": str(seed)} for rank in range(size)]
    processes = [subprocess.Popen(command, env=os.environ | group | rank) for rank in ranks]
    return [process.wait() for process in processes]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        make(sys.argv[2])
    else:
        main()
