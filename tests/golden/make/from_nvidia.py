"""Make tests/golden/nvidia: checkpoints of NVIDIA DeepLearningExamples' DLRM and what its model computed.

    python tests/golden/make/from_nvidia.py PATH_OF/PyTorch/Recommendation/DLRM [VARIANT ...]

Needs torch, absl-py, PyYAML and tqdm. The model, the flags, the device mapping and the writer are the project's; the
training loop is ours, because its own needs CUDA streams. `stub` names what is replaced so that the modules import and
run on a CPU.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import inputs
import numpy as np
import torch
import torch._dynamo  # before the project's folder, whose `triton` would be taken for the compiler, is on the path

GOLDEN = Path(__file__).resolve().parents[1] / "nvidia"
DENSE_WIDTH, STEPS = 5, 6
DULL = 3  # exit status of a variant whose outputs hardly differ: another seed is tried
SIZES = (30, 100, 7, 50)
SMALL = (
    "--embedding_dim 4 --bottom_mlp_sizes 8,4 --top_mlp_sizes 8,4,1 --embedding_type multi_table --interaction_op dot"
)
# processes, cardinalities of the features, flags
VARIANTS: dict[str, tuple[int, tuple[int, ...], str]] = {
    "dot": (1, SIZES, SMALL),
    "dot-no-padding": (1, (30, 100, 7), SMALL.replace("dim 4", "dim 2").replace("8,4 ", "8,2 ")),
    "dot-joint": (1, SIZES, SMALL.replace("multi_table", "joint")),
    "cat": (1, SIZES, SMALL.replace("op dot", "op cat")),
    "hash": (1, SIZES, f"{SMALL.replace('multi_table', 'joint')} --max_table_size 20 --hash_indices"),
    "one-layer": (1, SIZES, SMALL.replace("8,4 ", "4 ").replace("8,4,1", "8,1")),
    "twelve-tables": (1, tuple(range(3, 15)), SMALL),
    "equal-sizes": (1, (9, 9, 9), SMALL),
    "one-process-ordered": (1, SIZES, f"{SMALL} --bottom_features_ordered"),
    "two-processes": (2, SIZES, SMALL),
    "two-processes-ordered": (2, SIZES, f"{SMALL} --bottom_features_ordered"),
    "three-processes-cat": (3, (30, 100, 7, 50, 12), SMALL.replace("op dot", "op cat")),
    "three-processes-cat-ordered": (
        3,
        (30, 100, 7, 50, 12),
        f"{SMALL.replace('op dot', 'op cat')} --bottom_features_ordered",
    ),
    "five-processes": (5, (30, 100, 7, 50, 12), SMALL),
}


def stub() -> None:
    """Stand-ins for what needs CUDA, and for a logger: none of them takes part in a forward on the CPU."""
    names = "apex apex.mlp apex.optimizers dllogger dlrm.cuda_ext dlrm.cuda_ext.fused_gather_embedding"
    modules = {name: ModuleType(name) for name in names.split()}
    sys.modules |= modules
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        if parent in modules:
            setattr(modules[parent], child, module)
    vars(modules["apex.mlp"])["MLP"] = torch.nn.Module
    vars(modules["dlrm.cuda_ext"])["dotBasedInteract"] = None
    vars(modules["dlrm.cuda_ext.fused_gather_embedding"])["BuckleEmbeddingFusedGatherFunction"] = None
    torch.Tensor.cuda = lambda self, *_, **__: self
    torch.distributed.all_to_all = all_to_all


def all_to_all(received: list[torch.Tensor], sent: list[torch.Tensor]) -> None:
    """What gloo lacks: sizes that differ. `received[r]` gets what rank r sends to this one, shapes may differ."""
    rank = torch.distributed.get_rank()
    received[rank].copy_(sent[rank].reshape(received[rank].shape))
    others = [r for r in range(len(sent)) if r != rank]
    waiting = [torch.distributed.isend(sent[r].contiguous(), r) for r in others]
    for r in others:
        torch.distributed.recv(received[r], r)
    for request in waiting:
        request.wait()


def make(name: str) -> None:
    """Build the model as dlrm/scripts/main.py does, train a few steps, save and score; every process runs this."""
    sys.path.insert(0, str(Path.cwd()))
    stub()
    from dlrm.scripts import main as project

    world, cardinalities, words = VARIANTS[name]
    arguments = f"--base_device cpu --backend gloo --dataset_type synthetic_gpu {words}".split()
    flags = project.FLAGS
    flags(["main.py", *arguments])
    rank, seed = int(os.environ.get("RANK", 0)), int(os.environ["SEED"])
    if world > 1:
        project.dist.init_distributed_mode(backend=flags.backend, use_gpu=False)
    project.validate_flags(len(cardinalities))
    torch.set_num_threads(1)
    torch.manual_seed(seed)  # the same in all processes: DistributedDataParallel copies the top model of rank 0
    sizes = [min(n, flags.max_table_size or n) for n in cardinalities]
    mapping = project.get_device_mapping(sizes, num_gpus=world)
    own = mapping["embedding"][rank]
    model = project.DistributedDlrm(
        vectors_per_gpu=mapping["vectors_per_gpu"],
        embedding_device_mapping=mapping["embedding"],
        embedding_type=flags.embedding_type,
        embedding_dim=flags.embedding_dim,
        world_num_categorical_features=len(sizes),
        categorical_feature_sizes=[sizes[i] for i in own],
        num_numerical_features=DENSE_WIDTH,
        hash_indices=flags.hash_indices,
        bottom_mlp_sizes=flags.bottom_mlp_sizes if rank == mapping["bottom_mlp"] else None,
        top_mlp_sizes=flags.top_mlp_sizes,
        interaction_op=flags.interaction_op,
        fp16=flags.amp,
        use_cpp_mlp=flags.optimized_mlp,
        bottom_features_ordered=flags.bottom_features_ordered,
        device=flags.base_device,
    )
    if world > 1:
        model.top_model = torch.nn.parallel.DistributedDataParallel(model.top_model)
    per_process = [inputs.SAMPLES // world + (r < inputs.SAMPLES % world) for r in range(world)]
    mine = slice(sum(per_process[:rank]), sum(per_process[: rank + 1]))

    def logits(batch: dict[str, np.ndarray]) -> torch.Tensor:
        ids_BF = torch.from_numpy(batch["indices"].reshape(len(sizes), -1).T.copy())
        return model(torch.from_numpy(batch["dense"]), ids_BF[:, own], per_process).squeeze(-1)

    sparse = [p for n, p in model.named_parameters() if "embeddings" in n]
    dense = [p for n, p in model.named_parameters() if "embeddings" not in n]
    optimizers = [torch.optim.Adagrad(group, lr=0.1) for group in (sparse, dense) if group]
    for step in range(STEPS):
        labels = (torch.arange(inputs.SAMPLES) * 7 % 3 == 0).float()[mine]
        for optimizer in optimizers:
            optimizer.zero_grad()
        found = logits(inputs.one_hot(cardinalities, DENSE_WIDTH, seed=1000 + step))
        torch.nn.functional.binary_cross_entropy_with_logits(found, labels).backward()
        for optimizer in optimizers:
            optimizer.step()
    model.eval()
    batch = inputs.one_hot(cardinalities, DENSE_WIDTH, seed=len(name))
    with torch.no_grad():
        expected = logits(batch)
    if world > 1:
        parts: list[torch.Tensor] = [torch.empty(0)] * world
        torch.distributed.all_gather_object(parts, expected)
        expected = torch.cat(parts)
    if np.ptp(expected.numpy()) < 0.3:
        sys.exit(DULL)
    writer = project.make_distributed_checkpoint_writer(
        device_mapping=mapping, rank=rank, is_main_process=rank == 0, config=flags.flag_values_dict()
    )
    writer.save_checkpoint(model, str(GOLDEN / name), epoch=0, step=STEPS)
    if rank == 0:
        inputs.save(GOLDEN / f"{name}.npz", batch, expected.numpy(), "logit", cardinalities, arguments)


def run(source: str, name: str, seed: int) -> list[int]:
    """Exit statuses of the processes of one variant."""
    world = VARIANTS[name][0]
    shutil.rmtree(GOLDEN / name, ignore_errors=True)
    group = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29514"}
    ranks = [group | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else {} for rank in range(world)]
    command = [sys.executable, __file__, "--one", name]
    environments = [os.environ | rank | {"SEED": str(seed)} for rank in ranks]
    processes = [subprocess.Popen(command, cwd=source, env=environment) for environment in environments]
    return [process.wait() for process in processes]


def main() -> None:
    GOLDEN.mkdir(exist_ok=True)
    source, *names = sys.argv[1:]
    for name in names or VARIANTS:
        for seed in range(20):
            statuses = run(source, name, seed)
            if DULL not in statuses:
                break
        if any(statuses):
            print(f"FAILED {name}")


if __name__ == "__main__":
    if sys.argv[1] == "--one":
        make(sys.argv[2])
    else:
        main()
