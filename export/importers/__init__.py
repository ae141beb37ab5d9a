"""Importers: checkpoints of other projects become `Source`s, which export to bundles like our own.

Each project has one module that reads the architecture off its tensors' shapes and says which of its tensors is which
of ours. Nothing is guessed: what shapes cannot tell is asked for. Free of torch and onnx, and nothing in a checkpoint
is run.

Main path: `detect.open_source` -> `facebook.open_facebook` -> `common.ForeignSource`.
"""
