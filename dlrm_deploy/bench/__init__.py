"""Measures engines side by side on one machine and returns rows of facts; draws no conclusions.

Main path: `run.run_bench` -> `inputs.rotating_batches` -> `measure.interleave` -> `rows.BenchRow`.
Printing is in `dlrm_deploy.cli.bench`, the picture in `plot`.
"""
