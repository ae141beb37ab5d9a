"""The DLRM in plain PyTorch, nothing about deployment."""
