"""Make tests/golden/facebook: checkpoints that facebookresearch/dlrm's own script saved, and what its model computed.

    python tests/golden/make/from_facebook.py PATH_OF_DLRM_SOURCES [VARIANT ...]

Needs torch, numpy<2.3, scikit-learn, tensorboard, onnx, tqdm and mlperf-logging. Each variant runs dlrm_s_pytorch.py in
a process of its own, with `--save-model`; the model that the script leaves behind then scores the golden inputs.
`PATCHED` names the variants that the unchanged script cannot run, with what was changed.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

import inputs

GOLDEN = Path(__file__).resolve().parents[1] / "facebook"
RUN = (
    "--data-generation random --num-batches 6 --mini-batch-size 16 --test-freq 6 --print-freq 6 "
    "--num-indices-per-lookup 4 --round-targets True --learning-rate 0.1"
)
PLAIN = "--arch-sparse-feature-size 4 --arch-embedding-size 30-7-100 --arch-mlp-bot 5-8-4 --arch-mlp-top 8-4-1"
LARGE = "--arch-sparse-feature-size 4 --arch-embedding-size 30-47-100 --arch-mlp-bot 5-8-4 --arch-mlp-top 8-4-1"
MIXED = "--arch-sparse-feature-size 4 --arch-embedding-size 30-300-7-250 --arch-mlp-bot 5-8-4 --arch-mlp-top 8-4-1"
CONCAT = LARGE.replace("5-8-4", "5-6-8")
MD = (
    "--arch-sparse-feature-size 8 --arch-embedding-size 10-100-300-10-40 --arch-mlp-bot 5-8 --arch-mlp-top 8-1 "
    "--md-flag --md-threshold 0 --md-temperature 0.3"
)
QR = "--qr-flag --qr-threshold 10"

VARIANTS = {
    "plain-dot": PLAIN,
    "dot-itself": f"{PLAIN} --arch-interaction-itself",
    "cat": f"{PLAIN} --arch-interaction-op cat",
    "qr-mult": f"{LARGE} {QR} --qr-operation mult",
    "qr-add": f"{LARGE} {QR} --qr-operation add --qr-collisions 3",
    "qr-concat": f"{CONCAT} {QR} --qr-operation concat",
    "qr-concat-cat": f"{CONCAT} {QR} --qr-operation concat --arch-interaction-op cat --qr-collisions 7",
    "qr-mult-mixed": f"{MIXED} --qr-flag --qr-operation mult --qr-collisions 5",
    "qr-add-mixed": f"{MIXED} --qr-flag --qr-operation add --numpy-rand-seed 9",
    "qr-at-threshold": f"{PLAIN.replace('30-7-100', '40-41-39')} --qr-flag --qr-threshold 40",
    "qr-few-rows": f"{PLAIN.replace('30-7-100', '3-9-5')} --qr-flag --qr-threshold 2 --qr-collisions 4",
    "md": MD,
    "md-cat": f"{MD} --arch-interaction-op cat",
    "md-round-dims": f"{MD} --md-round-dims",
    "weighted-dot": f"{PLAIN} --weighted-pooling learned --optimizer adagrad",
    "weighted-cat": f"{PLAIN} --weighted-pooling learned --arch-interaction-op cat --optimizer adagrad",
    "weighted-fixed": f"{PLAIN} --weighted-pooling fixed",
    "rwsadagrad": f"{PLAIN} --optimizer rwsadagrad --learning-rate 0.03",
    "adagrad": f"{PLAIN} --optimizer adagrad --loss-function bce",
    "qr-adagrad": f"{LARGE} {QR} --optimizer adagrad --learning-rate 0.02",
    "single-table": f"{PLAIN.replace('30-7-100', '20')} --numpy-rand-seed 5",
    "single-table-cat": f"{PLAIN.replace('30-7-100', '20')} --arch-interaction-op cat --numpy-rand-seed 5",
    "width-1": f"{PLAIN.replace('size 4', 'size 1').replace('5-8-4', '5-8-1')}",
    "width-3": f"{PLAIN.replace('size 4', 'size 3').replace('5-8-4', '5-8-3')}",
    "one-layer": "--arch-sparse-feature-size 2 --arch-embedding-size 30-7-100 --arch-mlp-bot 4-2 --arch-mlp-top 1",
    "one-layer-bottom": "--arch-sparse-feature-size 2 --arch-embedding-size 30-7 --arch-mlp-bot 4-2 --arch-mlp-top 5-1",
    "deep": "--arch-sparse-feature-size 2 --arch-embedding-size 30-7-100 --arch-mlp-bot 3-9-8-7-2 "
    "--arch-mlp-top 9-8-6-3-1 --optimizer adagrad",
    "two-digits": f"{PLAIN.replace('30-7-100', '3-4-5-6-7-8-9-10-11-12-13-14')}",
    "loss-threshold": f"{PLAIN} --loss-threshold 0.4",
    "mlperf": f"{PLAIN} --mlperf-logging --loss-function wbce --loss-weights 1.0-2.0",
    "ddp": PLAIN,
    "ddp-rank": PLAIN,
}
PATCHED = {"md-round-dims": "tricks.md_embedding_bag.pow_2_round returns int64"}


def make(variant: str) -> None:
    """Run the script in this process, score the golden inputs with the model it built, and write the two files."""
    sys.path.insert(0, str(Path.cwd()))
    import torch  # only the processes of the variants need it

    torch.set_num_threads(1)
    rank = int(os.environ.get("RANK", -1))
    file = GOLDEN / f"{variant}{'' if rank < 0 else rank}.pt"
    arguments = f"{RUN} {VARIANTS[variant]}".split()  # of an option given twice the last one counts
    if variant in PATCHED:
        import tricks.md_embedding_bag as md

        rounded = md.pow_2_round
        md.pow_2_round = lambda dims: rounded(dims).long()
    with tempfile.TemporaryDirectory() as board:
        sys.argv = ["dlrm_s_pytorch.py", *arguments, "--save-model", str(file), "--tensor-board-filename", board]
        script = runpy.run_path("dlrm_s_pytorch.py", run_name="__main__")
    model = script["dlrm"].eval()
    saved = torch.load(file, weights_only=False)
    assert saved["state_dict"].keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, saved["state_dict"][key]) for key, tensor in model.state_dict().items())
    if variant == "ddp":
        wrap_as_processes_do(model, saved, file)

    args = script["args"]
    rows = args.ln_emb
    batch = inputs.multi_hot(rows, int(args.arch_mlp_bot.split("-")[0]), seed=len(variant))
    bags = [inputs.feature_bags(batch, f) for f in range(len(rows))]
    offsets = torch.stack([torch.from_numpy(o[:-1]) for _, o in bags])
    with torch.no_grad():
        expected = model(torch.from_numpy(batch["dense"]), offsets, [torch.from_numpy(i) for i, _ in bags])
        if rank >= 0:
            expected = script["ext_dist"].all_gather(expected, None)
    if rank <= 0:
        inputs.save(GOLDEN / f"{variant}.npz", batch, expected.numpy()[:, 0], "probability", rows, arguments)


def wrap_as_processes_do(model, saved: dict[str, object], file: Path) -> None:  # type: ignore[no-untyped-def]
    """Give the MLPs the names that they have in a run of several processes, with all tables in one file."""
    import torch
    from torch.nn.parallel import DistributedDataParallel

    torch.distributed.init_process_group("gloo", init_method="tcp://127.0.0.1:29511", rank=0, world_size=1)
    model.bot_l = DistributedDataParallel(model.bot_l)
    model.top_l = DistributedDataParallel(model.top_l)
    torch.save(saved | {"state_dict": model.state_dict()}, file)


def main() -> None:
    source, *names = sys.argv[1:]
    for variant in names or VARIANTS:
        ranks = 2 if variant == "ddp-rank" else 1
        group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29512"} if ranks == 2 else {}
        environments = [
            os.environ | group | ({"RANK": str(r), "LOCAL_RANK": str(r)} if group else {}) for r in range(ranks)
        ]
        command = [sys.executable, __file__, "--one", variant]
        processes = [subprocess.Popen(command, cwd=source, env=environment) for environment in environments]
        statuses = [process.wait() for process in processes]
        if any(statuses):
            print(f"FAILED {variant}")


if __name__ == "__main__":
    if sys.argv[1] == "--one":
        make(sys.argv[2])
    else:
        main()
