"""Tensors out of checkpoint files of any project: read piece by piece, without running anything that a file holds.

`TorchFile` reads what `torch.save` wrote, `DcpFolder` what `torch.distributed.checkpoint` wrote, `RawMatrix` bare
numbers. None of them imports torch.
"""
