"""Runs an engine and the PyTorch reference on the same batches, and says how far apart their outputs are."""
