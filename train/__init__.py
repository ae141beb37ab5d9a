"""A recipe becomes a checkpoint. Imports torch, knows nothing of ONNX."""
