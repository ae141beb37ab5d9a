"""`dlrm-deploy build`."""

from __future__ import annotations

import json
import time
from pathlib import Path

import click

from dlrm_deploy.config import PRECISIONS, Precision
from dlrm_deploy.engines.registry import PLAN_ENGINES
from dlrm_deploy.engines.tensorrt.options import DEFAULT_MAX_BATCH, TABLES, Tables


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--engine", type=click.Choice(PLAN_ENGINES), default="tensorrt-rtx", help="Library to build with.")
@click.option(
    "--precision", type=click.Choice(PRECISIONS), help="Of MLPs and interaction.  [default: that of the bundle's MLPs]"
)
@click.option(
    "--max-batch",
    type=click.IntRange(min=1),
    default=DEFAULT_MAX_BATCH,
    help="Samples that the plan takes at once; the engine cuts larger batches.",
)
@click.option(
    "--max-bag", type=click.IntRange(min=1), help="Ids that a bag can hold.  [default: the longest the model expects]"
)
@click.option(
    "--tables", type=click.Choice(TABLES), default="auto",
    help="Tables inside the plan, or beside it as inputs; auto: beside it above 64 MiB.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def build(
    bundle: Path,
    engine: str,
    precision: Precision | None,
    max_batch: int,
    max_bag: int | None,
    tables: Tables,
    as_json: bool,
) -> None:
    """Build a TensorRT plan for BUNDLE and keep it there.

    Building with tensorrt-rtx needs no GPU; executing a plan does. A plan and the JSON file that describes it go into
    BUNDLE/engines and replace an earlier plan of the same engine once they are complete.
    """
    from dlrm_deploy.bundle import Bundle
    from dlrm_deploy.engines.tensorrt.build import build_plan

    start = time.perf_counter()
    built = build_plan(
        Bundle.open(bundle), engine, precision=precision, max_batch=max_batch, max_bag=max_bag, tables=tables
    )
    seconds = time.perf_counter() - start
    sidecar = built.sidecar
    placement = "input" if sidecar.table_inputs else "constant"
    if as_json:
        click.echo(
            json.dumps(
                {
                    "engine": engine,
                    "plan": built.record.plan,
                    "sidecar": built.record.sidecar,
                    "bytes": sidecar.plan.size,
                    "library_version": sidecar.library_version,
                    "precision": sidecar.precision,
                    "compute_capabilities": sidecar.compute_capabilities,
                    "max_batch": max_batch,
                    "max_bag": sidecar.max_bag,
                    "tables": placement,
                    "layers": len(sidecar.layers),
                    "graph": {"rows": sidecar.graph.rows, "max_abs": sidecar.graph.max_abs},
                    "seconds": round(seconds, 3),
                    "executed": sidecar.executed,
                }
            )
        )
        return
    bags = "fixed bags" if sidecar.max_bag is None else f"bags of up to {sidecar.max_bag} ids"
    click.echo(f"Wrote {bundle / built.record.plan}: {sidecar.plan.size / 1e6:.1f} MB in {seconds:.1f} s")
    click.echo(f"  {engine} {sidecar.library_version}, {sidecar.precision}, up to {max_batch} samples, {bags}")
    click.echo(f"  tables: {placement}; layers: {len(sidecar.layers)}")
    click.echo(f"  GPUs (compute capability): {', '.join(sidecar.compute_capabilities) or 'not stated'}")
    if sidecar.graph.max_abs is not None:
        error = f"max abs error {sidecar.graph.max_abs:.2e} from PyTorch on {sidecar.graph.rows} golden rows"
        click.echo(f"  its graph, run on the CPU: {error}")
    click.echo("Built, not executed: executing needs an NVIDIA GPU.")
