"""What each operator computes: NumPy reference and PyTorch form. The contract is docs/operators.md."""
