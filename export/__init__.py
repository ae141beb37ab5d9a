"""Export: a checkpoint, or a preset with random weights, becomes a bundle. The only folder that imports onnx."""
