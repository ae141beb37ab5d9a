"""TensorRT plans: built in a child process on any machine where the library allows it, executed on an NVIDIA GPU.

One builder and one engine serve both Python modules, `tensorrt_rtx` and `tensorrt`; what a module can do is found by
looking for its attributes. Main path: `build.build_plan` -> `worker` -> `sidecar`; then `engine.open_tensorrt_engine`.
"""
